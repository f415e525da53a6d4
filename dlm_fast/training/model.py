"""The two tiny architectures, both plain transformers classes with the decoder's facts in config.json."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dlm_fast.training.objectives import Batch
from dlm_fast.training.tokenizer import EOS_ID, MASK_ID, PAD_ID, VOCAB_SIZE, build_tokenizer

KINDS = ("full", "block-causal")
MAX_POSITIONS = 512
DEFAULT_BLOCK_LENGTH = 8

_SHAPE = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=32,
    intermediate_size=384,
    max_position_embeddings=MAX_POSITIONS,
    tie_word_embeddings=False,
    eos_token_id=EOS_ID,
    pad_token_id=PAD_ID,
    bos_token_id=None,
    attn_implementation="sdpa",
)


def build_model(kind: str, *, seed: int) -> PreTrainedModel:
    """An untrained fp32 model, about 0.9 M parameters.

    "full" is a Llama in which every position is to see every other; "block-causal" a Qwen3 with two
    key/value heads. Which positions see which is decided by the 4-D mask given to forward, not by the class.
    """
    if kind not in KINDS:
        raise ValueError(f"training: model must be one of {', '.join(KINDS)}, got model={kind!r}")
    dlm = dict(
        mask_token_id=MASK_ID,
        eos_token_ids=[EOS_ID],
        visibility="full" if kind == "full" else "block",
        block_alignment="rel",
        block_length=DEFAULT_BLOCK_LENGTH,
        logits_row="self",
    )
    rope = dict(rope_type="default", rope_theta=10000.0)
    torch.manual_seed(seed)
    if kind == "full":
        return LlamaForCausalLM(
            LlamaConfig(**_SHAPE, num_key_value_heads=4, rms_norm_eps=1e-5, rope_parameters=rope, dlm=dlm)
        )
    return Qwen3ForCausalLM(
        Qwen3Config(**_SHAPE, num_key_value_heads=2, rms_norm_eps=1e-6, rope_parameters=rope, dlm=dlm)
    )


@torch.no_grad()
def full_from_block_causal(source: Qwen3ForCausalLM, batch: Batch) -> LlamaForCausalLM:
    """A "full" model that computes nearly what the block-causal `source` does, to go on training from.

    The block-causal objective learns from several times as many tokens a forward, so the full model starts
    from its weights. Key/value heads are repeated. A Llama has no norms on queries and keys: their gains
    and the mean size of each head's queries and keys, measured on `batch`, go into the projections.
    """
    state = source.state_dict()
    sizes: dict[str, Tensor] = {}
    counted = batch.targets != PAD_ID

    def measure(name: str):
        def hook(_, inputs) -> None:
            sizes[name] = inputs[0].float().pow(2).mean(-1).sqrt()[counted].mean(0)

        return hook

    hooks = [
        getattr(layer.self_attn, f"{letter}_norm").register_forward_pre_hook(measure(f"{index}.{letter}"))
        for index, layer in enumerate(source.model.layers)
        for letter in "qk"
    ]
    source(input_ids=batch.tokens, position_ids=batch.position_ids, attention_mask=batch.visible, use_cache=False)
    for hook in hooks:
        hook.remove()
    for index in range(source.config.num_hidden_layers):
        attention = f"model.layers.{index}.self_attn."
        for letter in "qk":
            gain = state.pop(f"{attention}{letter}_norm.weight")
            name = f"{attention}{letter}_proj.weight"
            heads = state[name].unflatten(0, (-1, source.config.head_dim))
            state[name] = (heads * gain[None, :, None] / sizes[f"{index}.{letter}"][:, None, None]).flatten(0, 1)
        repeats = source.config.num_attention_heads // source.config.num_key_value_heads
        for letter in "kv":
            heads = state[f"{attention}{letter}_proj.weight"].unflatten(0, (-1, source.config.head_dim))
            state[f"{attention}{letter}_proj.weight"] = heads.repeat_interleave(repeats, dim=0).flatten(0, 1)
    model = build_model("full", seed=0)
    model.load_state_dict(state)
    return model


def export(model: PreTrainedModel, folder: Path) -> None:
    """Writes config, generation config, tokenizer and fp32 safetensors, loadable by the Auto classes."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
