"""Llama, Qwen2 and Qwen3 as transformers ships them, driven through transformers' attention interface.

No forward is rewritten. The base model is called with one extra keyword, `dlm_call`, which transformers hands through
to the attention function (attention.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .attention import ATTENTION_NAME, AttentionCall
from .cache import KVCache

CLASSES = {LlamaForCausalLM: LlamaAttention, Qwen2ForCausalLM: Qwen2Attention, Qwen3ForCausalLM: Qwen3Attention}
MODEL_TYPES = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}


def verify(model: nn.Module) -> None:
    """Raises NotImplementedError for a model of a known class that was altered in a way our attention would ignore."""
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
        if type(module) is not expected or "forward" in module.__dict__:
            replacement = type(module).__name__ + (" with a replaced forward" if "forward" in module.__dict__ else "")
            raise NotImplementedError(
                f"dlm_fast: layer {index} must have an unmodified {expected.__name__}, got {replacement}"
            )
        if getattr(module, "sliding_window", None) is not None:
            raise NotImplementedError(
                f"dlm_fast: layer {index} has sliding_window={module.sliding_window}; only full attention is supported"
            )


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
    replaced = [index for index in missed if "forward" in layers[index].self_attn.__dict__]
    return f"{where}, the forward of layer {replaced[0]}'s self_attn was replaced" if replaced else where


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of hidden states, keys and values, which is the dtype of the first norm's output.

    The weights of a quantised layer have another dtype.
    """
    return torch.promote_types(
        model.model.embed_tokens.weight.dtype, model.model.layers[0].input_layernorm.weight.dtype
    )


def new_cache(model: nn.Module, rows: int, capacity: int) -> KVCache:
    """Key/value buffers for every layer, in the dtype that the model computes in and on its device."""
    layer = model.model.layers[0]
    return KVCache(
        num_layers=len(model.model.layers),
        num_kv_heads=model.config.num_key_value_heads,
        head_dim=layer.self_attn.head_dim,
        rows=rows,
        capacity=capacity,
        dtype=compute_dtype(model),
        device=layer.input_layernorm.weight.device,
    )


def window_hidden(model: nn.Module, input_ids: Tensor, call: AttentionCall) -> Tensor:
    """Last hidden states [B, W, d] of a window of tokens [B, W] against the cache; the head is not applied."""
    out = model.model(
        input_ids=input_ids,
        position_ids=call.window.q_pos,
        past_key_values=call.cache,
        use_cache=False,
        return_dict=True,  # config.json may ask for tuples
        dlm_call=call,
    )
    return out.last_hidden_state


def head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [N, V] of the rows [N, d] that a decoder needs."""
    return model.lm_head(hidden)
