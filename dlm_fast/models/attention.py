"""The attention function that transformers calls in a patched model: our op, told by the forward what it computes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dlm_kernels import Window

from ..ops import Ops
from .cache import KVCache

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
        query_scales: the factor [B, W] of the queries of all layers on a device, once a layer that has one has computed
            it.
    """

    window: Window
    cache: KVCache | None
    ops: Ops
    plain: bool = False
    served: list[int] = dataclasses.field(default_factory=list)
    copies: dict[torch.device, Window] = dataclasses.field(default_factory=dict)
    query_scales: dict[torch.device, Tensor] = dataclasses.field(default_factory=dict)

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
