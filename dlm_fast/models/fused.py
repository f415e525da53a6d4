"""Forwards of transformers' decoder layers in few launches.

transformers computes the norms, the rotary positions, the activation and the sums of a layer in 30 to 48 small
launches. The forwards here compute them with four ops (`dlm_kernels.reference.layers`), which round where transformers
rounds, so that on a CPU the bits are the same. They are bound to the layers of one model, never to a class. Projections
and experts are called as the modules that they are: their hooks run, and they may be adapters or quantised.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import SiLUActivation
from transformers.models.glm4_moe import modeling_glm4_moe as glm4_moe
from transformers.models.llama import modeling_llama as llama
from transformers.models.ministral3 import modeling_ministral3 as ministral3
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from dlm_kernels.checks.layers import MAX_EPS, MAX_ROW, MIN_EPS

from ..ops import Ops
from .attention import ATTENTION_NAME, AttentionCall, attention


@dataclasses.dataclass(frozen=True)
class Parts:
    """The classes of the modules that a fused layer computes itself.

    Attributes:
        attention: of `self_attn`.
        norm: of every norm.
        mlp: of a dense `mlp`; a module of another class, as a mixture of experts is, is called.
    """

    attention: type[nn.Module]
    norm: type[nn.Module]
    mlp: type[nn.Module]


PARTS = {
    llama.LlamaDecoderLayer: Parts(llama.LlamaAttention, llama.LlamaRMSNorm, llama.LlamaMLP),
    qwen2.Qwen2DecoderLayer: Parts(qwen2.Qwen2Attention, qwen2.Qwen2RMSNorm, qwen2.Qwen2MLP),
    qwen3.Qwen3DecoderLayer: Parts(qwen3.Qwen3Attention, qwen3.Qwen3RMSNorm, qwen3.Qwen3MLP),
    qwen3_moe.Qwen3MoeDecoderLayer: Parts(
        qwen3_moe.Qwen3MoeAttention, qwen3_moe.Qwen3MoeRMSNorm, qwen3_moe.Qwen3MoeMLP
    ),
    glm4_moe.Glm4MoeDecoderLayer: Parts(glm4_moe.Glm4MoeAttention, glm4_moe.Glm4MoeRMSNorm, glm4_moe.Glm4MoeMLP),
    ministral3.Ministral3DecoderLayer: Parts(
        ministral3.Ministral3Attention, ministral3.Ministral3RMSNorm, ministral3.Ministral3MLP
    ),
}
# Dtypes of the ops.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SILU = (nn.SiLU, SiLUActivation)
# Where transformers keeps what it captures of a call, and whose hooks capture it; a version without this place has no
# hook that is known to be idle.
_CAPTURES = "transformers.utils.output_capturing"
try:
    from transformers.utils.output_capturing import _active_collector as _CAPTURING
except ImportError:
    _CAPTURING = None


def obstacle(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """Why a layer must run as transformers has it in a model of a dtype, in words behind its name; None = nothing is in
    the way."""
    parts = PARTS.get(type(layer))
    if parts is None:
        return f"is a {type(layer).__name__}"
    for name, module, kind in _computed(layer, parts):
        if type(module) is not kind:
            return f"has a {type(module).__name__} as {name}, where a {kind.__name__} was expected"
        if "forward" in module.__dict__ or module._compiled_call_impl is not None:
            return f"has a {name} whose forward was replaced or compiled"
        if _is_hooked(module):
            return f"has a {name} with hooks, which would not run"
        if kind is parts.norm and module.weight.dtype != dtype:
            return f"has a norm of {module.weight.dtype} in a model of {dtype}"
    inner = layer._modules["self_attn"]._modules
    if "q_norm" in inner and inner["q_norm"].variance_epsilon != inner["k_norm"].variance_epsilon:
        return "has a q_norm and a k_norm of different epsilon"
    return None


def _computed(layer: nn.Module, parts: Parts) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """The modules that a fused forward does not call, with their names and expected classes."""
    modules = layer._modules
    yield "input_layernorm", modules["input_layernorm"], parts.norm
    yield "post_attention_layernorm", modules["post_attention_layernorm"], parts.norm
    yield "self_attn", modules["self_attn"], parts.attention
    for name in ("q_norm", "k_norm"):
        if name in modules["self_attn"]._modules:
            yield name, modules["self_attn"]._modules[name], parts.norm
    mlp = modules["mlp"]
    if type(mlp) is parts.mlp:
        yield "mlp", mlp, parts.mlp
        activation = mlp._modules["act_fn"]
        yield "act_fn", activation, type(activation) if type(activation) in _SILU else nn.SiLU


def _is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks that its call would run.

    Those that transformers leaves in every attention after a call that asks for hidden states or attentions do nothing
    while no call does.
    """
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    idle = _CAPTURING is not None and not _CAPTURING.get()
    return any(not (idle and hook.__module__ == _CAPTURES) for hook in module._forward_hooks.values())


def unfusable(model: nn.Module) -> str | None:
    """Why the layers of a model of a known class cannot be fused; None = they can."""
    if getattr(model.config, "quantization_config", None) is not None:
        return "its weights are quantised"
    dtype = model.model.embed_tokens.weight.dtype
    if dtype not in DTYPES:
        return f"its dtype is {dtype}"
    if model.config.hidden_size > MAX_ROW:
        return f"its hidden size is {model.config.hidden_size}"
    for index, layer in enumerate(model.model.layers):
        reason = obstacle(layer, dtype)
        if reason is None and "forward" in layer.__dict__:
            reason = "has a replaced forward"  # as a hook of accelerate is, which moves tensors between devices
        if reason is not None:
            return f"layer {index} {reason}"
        for _, norm, kind in _computed(layer, PARTS[type(layer)]):
            if kind is PARTS[type(layer)].norm and not MIN_EPS <= norm.variance_epsilon <= MAX_EPS:
                return f"layer {index} has a norm with epsilon {norm.variance_epsilon}"
    return None


def forwards(model: nn.Module, ops: Ops) -> dict[nn.Module, Callable[..., Tensor]]:
    """The forwards of the model's layers and of its last norm, by the module to which each is bound."""
    found: dict[nn.Module, Callable[..., Tensor]] = {
        layer: functools.partial(_layer_forward, layer) for layer in model.model.layers
    }
    norm = model.model.norm
    if type(norm) is PARTS[type(model.model.layers[0])].norm and "forward" not in norm.__dict__:
        found[norm] = functools.partial(_norm_forward, norm, model.model, ops)
    return found


def _norm_forward(norm: nn.Module, base: nn.Module, ops: Ops, hidden_states: Tensor) -> Tensor:
    """The forward of the last norm of a base model."""
    if base.config._attn_implementation != ATTENTION_NAME or not _is_computed(ops, norm, hidden_states):
        return type(norm).forward(norm, hidden_states)
    return ops.rms_norm(hidden_states, norm.weight, eps=norm.variance_epsilon)


def _layer_forward(layer: nn.Module, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    """A layer's forward. What asks for more than a decode does, runs as transformers has it: keys that are kept outside
    our cache, another attention or its mask, autocast, activation checkpointing, a module that was hooked or replaced
    since the model was patched."""
    call, cached = kwargs.get("dlm_call"), (kwargs.get("cache"), kwargs.get("past_key_values"))
    if (
        call is None
        or args
        or cached != (None, None)
        or kwargs.get("attention_mask") is not None
        or layer.self_attn.config._attn_implementation != ATTENTION_NAME
        or (layer.training and getattr(layer, "gradient_checkpointing", False))
        or _has_any_global_hook()
        or obstacle(layer, hidden_states.dtype) is not None
        or not _is_computed(call.ops, layer.input_layernorm, hidden_states)
    ):
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    ops, first, second = call.ops, layer.input_layernorm, layer.post_attention_layernorm
    normed = ops.rms_norm(hidden_states, first.weight, eps=first.variance_epsilon)
    attended = _attended(layer.self_attn, normed, kwargs["position_embeddings"], kwargs["position_ids"], call)
    total, normed = ops.add_rms_norm(attended, hidden_states, second.weight, eps=second.variance_epsilon)
    mlp = layer.mlp
    if type(mlp) is PARTS[type(layer)].mlp:
        return total + mlp.down_proj(ops.swiglu(mlp.gate_proj(normed), mlp.up_proj(normed)))
    return total + mlp(normed)


def _is_computed(ops: Ops, norm: nn.Module, hidden_states: Tensor) -> bool:
    """Whether the ops compute what goes through a norm: not under autocast, where dtypes mix, not what has gaps or
    repeats in memory, and not in Triton where gradients may be wanted, which the kernels do not have."""
    if torch.is_autocast_enabled(hidden_states.device.type) or hidden_states.dtype != norm.weight.dtype:
        return False
    return hidden_states.is_contiguous() and (ops.name != "triton" or not torch.is_grad_enabled())


def _attended(
    module: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], position_ids: Tensor, call: AttentionCall
) -> Tensor:
    """What `self_attn` makes of normed hidden states [B, W, d]."""
    heads = (*hidden.shape[:-1], -1, module.head_dim)
    query, key, value = (projection(hidden).view(heads) for projection in (module.q_proj, module.k_proj, module.v_proj))
    norms, cos, sin = {}, *rotary
    if "q_norm" in module._modules and getattr(module, "use_qk_norm", True):
        q_norm, k_norm = module.q_norm, module.k_norm
        norms = {"q_weight": q_norm.weight, "k_weight": k_norm.weight, "eps": q_norm.variance_epsilon}
    if type(module) is ministral3.Ministral3Attention:
        norms["q_scale"] = _scale_of_positions(module, call, position_ids, query.dtype)
    query, key = call.ops.qk_norm_rope(query, key, cos, sin, **norms)
    # What the attention refuses, as a sliding window is, is passed on to it.
    owner = module.config if type(module) is ministral3.Ministral3Attention else module
    options = {"scaling": module.scaling, "sliding_window": getattr(owner, "sliding_window", None)}
    dropout = module.attention_dropout if module.training else 0.0
    out, _ = attention(module, query, key, value.transpose(1, 2), None, **options, dropout=dropout, dlm_call=call)
    return module.o_proj(out.reshape(*hidden.shape[:-1], -1))


def _scale_of_positions(module: nn.Module, call: AttentionCall, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, W] factor of the queries of Ministral3, by their positions; it is the same in every layer of a forward."""
    scale = call.query_scales.get(position_ids.device)
    if scale is None:
        rope = module.config.rope_parameters
        beta, positions = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
        scale = ministral3.get_llama_4_attn_scale(position_ids, beta, positions).to(dtype)[:, 0, :, 0]
        call.query_scales[position_ids.device] = scale
    return scale
