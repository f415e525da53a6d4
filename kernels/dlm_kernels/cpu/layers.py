"""The ops of a layer for a CPU, where a step of a small model is mostly calls of torch: the bits of the reference, in
fewer of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..checks.layers import check_add_rms_norm, check_qk_norm_rope, check_rms_norm, check_swiglu
from ..reference.layers import DTYPES, NormedSum, RotatedHeads, normed


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    check_rms_norm(x, weight, eps, DTYPES)
    return _normed(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> NormedSum:
    """`reference.add_rms_norm`."""
    check_add_rms_norm(x, residual, weight, eps, DTYPES)
    total = residual + x
    return NormedSum(total, _normed(total, weight, eps))


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float | None = None,
    q_scale: Tensor | None = None,
) -> RotatedHeads:
    """`reference.qk_norm_rope`, with the heads of queries and keys turned together: the results may be views of one
    tensor."""
    check_qk_norm_rope(q, k, cos, sin, q_weight, k_weight, eps, q_scale, DTYPES)
    heads, half = q.shape[2], cos.shape[-1] // 2
    if (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)) or 2 * half != q.shape[3]:
        norms = {"q_weight": q_weight, "k_weight": k_weight, "eps": eps}
        return reference.qk_norm_rope(q, k, cos, sin, **norms, q_scale=q_scale)
    if q_weight is not None:
        q, k = _normed(q, q_weight, eps), _normed(k, k_weight, eps)
    both = torch.cat((q, k), 2)
    turned = torch.cat((both[..., half:].neg(), both[..., :half]), -1).mul_(sin[:, :, None])
    both = both.mul_(cos[:, :, None]).add_(turned).transpose(1, 2)
    q, k = both[:, :heads], both[:, heads:]
    return RotatedHeads(q if q_scale is None else q.mul_(q_scale[:, None, :, None]), k)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.swiglu`."""
    check_swiglu(gate, up, DTYPES)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return reference.swiglu(gate, up)
    return F.silu(gate).mul_(up).contiguous()


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of rows, in one call of torch for float32, where its roundings are those of the reference."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return normed(x, weight, eps)
