"""Decoder models as transformers ships them, driven through transformers' attention interface.

No forward is rewritten. The base model is called with one extra keyword, `dlm_call`, which transformers hands through
to the attention function. There our op stores the window's keys and values and attends, in one call.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
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

from ..ops import Ops, choose
from .cache import KVCache
from .tensors import BUILDING

CLASSES = {
    LlamaForCausalLM: LlamaAttention,
    Qwen2ForCausalLM: Qwen2Attention,
    Qwen3ForCausalLM: Qwen3Attention,
    Qwen3MoeForCausalLM: Qwen3MoeAttention,
    Glm4MoeForCausalLM: Glm4MoeAttention,
    Ministral3ForCausalLM: Ministral3Attention,
}
# The name under which transformers finds it (`config._attn_implementation`).
ATTENTION_NAME = "dlm_fast"


@dataclasses.dataclass
class AttentionCall:
    """What one forward tells every attention layer.

    Attributes:
        window: which positions the forward computes, and what they see.
        cache: the key/value buffers; None = keys and values live for this forward only.
        ops: the backend.
        plain: whether the forward is a plain one (`model(input_ids)`), and not a decoder's.
        served: numbers of the layers that attended through the call, in order. The list is Python's own and adds no op
            to a compiled graph.
        copies: copies of the window on the devices of layers that are elsewhere.
    """

    window: Window
    cache: KVCache | None
    ops: Ops
    plain: bool = False
    served: list[int] = dataclasses.field(default_factory=list)
    copies: dict[torch.device, Window] = dataclasses.field(default_factory=dict)

    def window_on(self, device: torch.device) -> Window:
        """The window on the device of a layer."""
        if self.window.q_pos.device == device:
            return self.window
        if device not in self.copies:
            tensors = {name: tensor.to(device) for name, tensor in self.window.tensors().items()}
            self.copies[device] = dataclasses.replace(self.window, **tensors)
        return self.copies[device]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    dlm_call: AttentionCall | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    query [B, H, W, D], key and value [B, H_kv, W, D] after RoPE -> [B, W, H, D].
    """
    # 1. Refuse what the op cannot do.
    if dlm_call is None:
        raise RuntimeError(
            "dlm_fast attention: called on a model that is not patched; use dlm_fast.patch or dlm_fast.load"
        )
    if attention_mask is not None or sliding_window is not None:
        name = "sliding_window" if attention_mask is None else "attention_mask with 4 dimensions"
        raise NotImplementedError(f"dlm_fast attention: {name} is not supported")
    if dropout:
        raise NotImplementedError(f"dlm_fast attention: dropout must be 0, got dropout={dropout}; call model.eval()")
    if query.requires_grad and torch.is_grad_enabled() and dlm_call.ops.name == "triton":
        raise NotImplementedError(
            "dlm_fast attention: the Triton kernel has no backward; use torch.no_grad() or backend='reference'"
        )
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError(
            f"dlm_fast attention: a plain forward takes no earlier keys, got {key.shape[2] - query.shape[2]} in "
            "past_key_values"
        )

    # 2. Attend, with the cache of this layer.
    layer = dlm_call.cache.layers[module.layer_idx] if dlm_call.cache is not None else None
    caches = (None, None) if layer is None else (layer.keys, layer.values)
    device, window = query.device.type, dlm_call.window_on(query.device)
    if torch.is_autocast_enabled(device):
        # Under autocast RoPE leaves queries and keys in float32, and values come in the dtype of autocast. Torch's own
        # attention casts all three to the dtype of autocast, and so does this function.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        with torch.autocast(device, enabled=False):
            out = dlm_call.ops.block_attention(query, key, value, *caches, window, scale=scaling)
    else:
        out = dlm_call.ops.block_attention(query, key, value, *caches, window, scale=scaling)
    dlm_call.served.append(module.layer_idx)
    return out.transpose(1, 2), None


# No mask function is registered by this name, so transformers builds no [L, L] mask at all.
AttentionInterface.register(ATTENTION_NAME, attention)


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
            call = AttentionCall(window, None, choose("reference", torch.device("cpu")))
            model.config._attn_implementation = ATTENTION_NAME
            found = window_hidden(model, ids, call)
            reason = None
            if call.served != [0, 1]:
                reason = f"layers {call.served} of [0, 1] attended through our function"
            elif not torch.allclose(found, expected, atol=1e-4, rtol=1e-4):
                reason = f"its hidden states differ by {(found - expected).abs().max():.2g}"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        raise NotImplementedError(
            f"dlm_fast: {kind.__name__} of transformers {transformers.__version__} cannot be driven: {reason}"
        )


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


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of hidden states, keys and values, which is the dtype of the first norm's output.

    The weights of a quantised layer have another dtype.
    """
    return torch.promote_types(
        model.model.embed_tokens.weight.dtype, model.model.layers[0].input_layernorm.weight.dtype
    )


def new_cache(model: nn.Module, rows: int, capacity: int) -> KVCache:
    """Key/value buffers for every layer, in the dtype that the model computes in and on the layer's device."""
    layers = model.model.layers
    return KVCache(
        num_kv_heads=model.config.num_key_value_heads,
        head_dim=layers[0].self_attn.head_dim,
        rows=rows,
        capacity=capacity,
        dtype=compute_dtype(model),
        devices=[layer.input_layernorm.weight.device for layer in layers],
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
