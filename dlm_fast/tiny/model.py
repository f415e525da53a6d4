"""The architecture of the embedded models: a class of transformers, and a config.json that says how to decode."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from .tokenizer import EOS_ID, MASK_ID, PAD_ID, VOCAB_SIZE, build_tokenizer

MAX_POSITIONS = 512
# The slower a pair of dimensions turns, the better the pair compares words at any distance. With a base of 10,000 the
# model did not learn to look words up in a map within 900 steps, which were enough with this base.
ROPE_THETA = 1e6

_SHAPE = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=384,
    max_position_embeddings=MAX_POSITIONS,
    rms_norm_eps=1e-6,
    rope_parameters=dict(rope_type="default", rope_theta=ROPE_THETA),
    tie_word_embeddings=False,
    eos_token_id=EOS_ID,
    pad_token_id=PAD_ID,
    bos_token_id=None,
    attn_implementation="sdpa",
)


def build_model(*, seed: int, prompt_isolated: bool = False) -> PreTrainedModel:
    """An untrained fp32 Qwen3 with two key/value heads and about 0.9 M parameters.

    All positions see one another, but an isolated prompt does not see the response. In training the 4-D mask of a
    forward decides who sees whom, and not the class.
    """
    dlm = dict(
        mask_token_id=MASK_ID,
        eos_token_ids=[EOS_ID],
        visibility="full",
        prompt_isolated=prompt_isolated,
        block_alignment="rel",
        block_length=None,
        logits_row="self",
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**_SHAPE, dlm=dlm))


def export(model: PreTrainedModel, folder: Path) -> None:
    """Writes config, generation config, tokenizer and fp32 safetensors, which the Auto classes can load."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
