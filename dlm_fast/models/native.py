"""Decoder models as transformers ships them, driven through transformers' attention interface.

The base model is called with one extra keyword, `dlm_call`, which transformers hands through to the attention function.
There our op stores the window's keys and values and attends, in one call. Layers whose modules are all known may have
forwards of ours (`fused`); of other layers no forward is rewritten.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    Glm4MoeForCausalLM,
    LlamaForCausalLM,
    Ministral3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.ministral3.modeling_ministral3 import Ministral3Attention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from dlm_kernels import Window

from ..ops import REFERENCE, Ops
from . import fused, parallel
from .attention import ATTENTION_NAME, AttentionCall
from .cache import KVCache, Paging
from .tensors import BUILDING

__all__ = ["ATTENTION_NAME", "CLASSES", "AttentionCall"]

CLASSES = {
    LlamaForCausalLM: LlamaAttention,
    Qwen2ForCausalLM: Qwen2Attention,
    Qwen3ForCausalLM: Qwen3Attention,
    Qwen3MoeForCausalLM: Qwen3MoeAttention,
    Glm4MoeForCausalLM: Glm4MoeAttention,
    Ministral3ForCausalLM: Ministral3Attention,
}


# A model of two layers, in the fields of every class; experts where the class has some.
_TINY = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2**18,  # no less than what the rotary positions of Ministral3 are stretched to
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@functools.cache
def probe(kind: type[nn.Module]) -> None:
    """Runs a tiny random model of a class through our attention, once per process.

    Raises NotImplementedError where the installed transformers does not hand every layer to our attention, or where the
    layers then do not compute what its own attention makes of them. No version is refused by its number.
    """
    reason = _tried(kind, fuse=False)
    if reason is not None:
        raise NotImplementedError(
            f"dlm_fast: {kind.__name__} of transformers {transformers.__version__} cannot be driven: {reason}"
        )


@functools.cache
def probe_fused(kind: type[nn.Module]) -> str | None:
    """Runs a tiny random model of a class with our forwards of its layers, once per process.

    Returns why the installed transformers computes something else, or None.
    """
    reason = _tried(kind, fuse=True)
    return None if reason is None else f"of transformers {transformers.__version__}, with fused layers {reason}"


def _tried(kind: type[nn.Module], *, fuse: bool) -> str | None:
    """What is wrong with a tiny random model of a class that attends through our function, with its own layers or with
    fused ones; None = it computes what it should."""
    with BUILDING, torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        try:
            model = kind(kind.config_class(**_TINY)).float().eval()
            ids = torch.arange(6)[None]
            expected = model.model(input_ids=ids, use_cache=False).last_hidden_state
            position = ids.int()
            window = Window(
                q_pos=position,
                q_block=position,
                q_len=torch.tensor([6], dtype=torch.int32),
                kv_slot=torch.full_like(position, -1),
                kv_len=torch.zeros(1, dtype=torch.int32),
                replaced=torch.zeros(1, 2, dtype=torch.int32),
                cache_row=torch.zeros(1, dtype=torch.int32),
                mode="block",
            )
            call = AttentionCall(window, None, REFERENCE)
            model.config._attn_implementation = ATTENTION_NAME
            if fuse:
                for module, forward in fused.forwards(model, REFERENCE).items():
                    module.forward = forward
            found = window_hidden(model, ids, call)
            if call.served != [0, 1]:
                return f"layers {call.served} of [0, 1] attended through our function"
            if not torch.allclose(found, expected, atol=1e-4, rtol=1e-4):
                return f"its hidden states differ by {(found - expected).abs().max():.2g}"
            return None
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def verify(model: nn.Module) -> None:
    """Raises NotImplementedError for a model of a known class that was altered in a way our attention would ignore, and
    ValueError for one whose heads the ranks of a tensor parallel model do not divide."""
    expected = CLASSES[type(model)]
    layers = model.model.layers
    numbers = [getattr(layer.self_attn, "layer_idx", index) for index, layer in enumerate(layers)]
    if numbers != list(range(model.config.num_hidden_layers)):
        raise NotImplementedError(
            f"dlm_fast: the layers must be numbered 0 to {model.config.num_hidden_layers - 1} as in "
            f"config.num_hidden_layers, got layer_idx={numbers}"
        )
    for index, layer in enumerate(layers):
        module = layer.self_attn
        if type(module) is not expected or _is_replaced(module):
            replacement = type(module).__name__ + (" with a replaced forward" if _is_replaced(module) else "")
            raise NotImplementedError(
                f"dlm_fast: layer {index} must have an unmodified {expected.__name__}, got {replacement}"
            )
        # Ministral3 reads the window from its configuration, the other classes keep it in the layer.
        owner = module.config if expected is Ministral3Attention else module
        if getattr(owner, "sliding_window", None) is not None:
            raise NotImplementedError(
                f"dlm_fast: layer {index} has sliding_window={owner.sliding_window}; only full attention is supported"
            )
    parallel.verify(model)


def _is_replaced(module: nn.Module) -> bool:
    """Whether the forward of a module is not its class's. A hook of accelerate keeps the forward that it wraps, and
    only moves what goes in and comes out."""
    forward = module.__dict__.get("forward")
    if forward is not None and "_hf_hook" in module.__dict__:
        forward = module.__dict__.get("_old_forward")
        return getattr(forward, "__func__", None) is not type(module).forward
    return forward is not None


def head_dims(model: nn.Module) -> set[int]:
    """The head sizes of the model's layers."""
    return {layer.self_attn.head_dim for layer in model.model.layers}


def base_model(model: nn.Module) -> nn.Module:
    """The stack without its head: the module whose forward takes `dlm_call`."""
    return model.model


def altered(model: nn.Module, call: AttentionCall) -> str | None:
    """What altered the patched model, if a layer did not attend through `call`; None if all layers did."""
    layers = model.model.layers
    if call.served == list(range(len(layers))):
        return None
    missed = [index for index in range(len(layers)) if index not in call.served]
    if not missed:
        return None
    where = f"layers {missed[:8]} of {len(layers)}"
    implementation = model.config._attn_implementation
    if implementation != ATTENTION_NAME:
        reason = "set_attn_implementation, or unpatched meanwhile"
        return f"{where}, its attention implementation is {implementation!r} ({reason})"
    replaced = [index for index in missed if _is_replaced(layers[index].self_attn)]
    return f"{where}, the forward of layer {replaced[0]}'s self_attn was replaced" if replaced else where


def unfusable(model: nn.Module) -> str | None:
    """Why the layers of a model cannot be fused; None = they can."""
    return fused.unfusable(model) or probe_fused(type(model))


def fused_forwards(model: nn.Module, ops: Ops) -> dict[nn.Module, Callable[..., Tensor]]:
    """The forwards that fuse the layers of a model, by the module to which each is bound."""
    return fused.forwards(model, ops)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of hidden states, keys and values, which is the dtype of the first norm's output.

    The weights of a quantised layer have another dtype.
    """
    return torch.promote_types(
        model.model.embed_tokens.weight.dtype, model.model.layers[0].input_layernorm.weight.dtype
    )


def new_cache(model: nn.Module, rows: int, capacity: int, paging: Paging | None = None) -> KVCache:
    """Key/value buffers for every layer, for the heads that this process computes, in the dtype that the model computes
    in and on the layer's device."""
    layers = model.model.layers
    return KVCache(
        num_kv_heads=parallel.kv_heads(model),
        head_dim=layers[0].self_attn.head_dim,
        rows=rows,
        capacity=capacity,
        dtype=compute_dtype(model),
        devices=[layer.input_layernorm.weight.device for layer in layers],
        paging=paging,
    )


def window_hidden(model: nn.Module, input_ids: Tensor, call: AttentionCall) -> Tensor:
    """Last hidden states [B, W, d] of a window of tokens [B, W] against the cache; the head is not applied."""
    out = model.model(
        input_ids=input_ids,
        position_ids=call.window.q_pos,
        use_cache=False,
        return_dict=True,  # config.json may ask for tuples
        dlm_call=call,
    )
    return out.last_hidden_state.to(input_ids.device)  # the last layer may be on another device


def head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [N, V] of the rows [N, d] that a decoder needs."""
    return model.lm_head(hidden).to(hidden.device)
