"""The small ops of a layer between its matrix products, in plain torch: norms, rotary embedding and gated activation.

Each function makes the sequence of torch ops that the modules of transformers make (Llama, Qwen2, Qwen3, Qwen3-MoE,
GLM-4-MoE and Ministral-3 agree in it), and so has their numbers bit for bit on a CPU; gradients flow through it. R
stands for the rounding to the dtype of the arguments; what is inside of an R is computed in float32.

Root mean square norm: arXiv:1910.07467. Rotary embedding: arXiv:2104.09864. SwiGLU: arXiv:2002.05202.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks.layers import check_add_rms_norm, check_qk_norm_rope, check_rms_norm, check_swiglu

# float64 is taken by the reference alone; as in the modules, a norm of it is computed in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NormedSum(NamedTuple):
    """The sum that the next layer adds to, and its norm, which the next product reads; both have the shape of x."""

    total: Tensor
    normed: Tensor


class RotatedHeads(NamedTuple):
    """Queries [B, H, W, D] and keys [B, H_kv, W, D], as attention takes them."""

    q: Tensor
    k: Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Every row divided by its root mean square, times the weight.

        normed = R(weight * R(x * rsqrt(mean(x^2) + eps)))

    Args:
        x: [..., d] float32, bfloat16 or float16 (here also float64, and any d); the last stride is 1, and all rows lie
            at one stride.
        weight: [d], dtype of x, last stride 1.
        eps: in [1e-30, 1e38].
    Returns:
        [..., d] in x's dtype.
    Raises:
        ValueError: shape, stride, device, eps.  TypeError: dtype.
    """
    check_rms_norm(x, weight, eps, DTYPES)
    return normed(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> NormedSum:
    """What a layer adds to its residual stream, and the norm of the sum.

        total = R(residual + x)        normed = rms_norm(total, weight)

    Args:
        x, residual: [..., d] of one shape and dtype, as `rms_norm` takes them. Neither is modified.
        weight, eps: as for `rms_norm`.
    Raises:
        ValueError: shape, stride, device, eps.  TypeError: dtype.
    """
    check_add_rms_norm(x, residual, weight, eps, DTYPES)
    total = residual + x
    return NormedSum(total, normed(total, weight, eps))


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
    """Queries and keys with their heads normed, if there are weights, and rotated by their positions.

        x = rms_norm(head, its weight)     or the head as it is
        first R dims of a head  R(R(x * cos) + R(turned * sin)),  turned = (-second half, first half) of them
        the other D - R dims    x
        queries at the end      R(q * q_scale), if there is a scale

    Args:
        q, k: [B, W, H, D] and [B, W, H_kv, D] float32, bfloat16 or float16 (here also float64, and any D), as the
            projections give them; any strides, the last one 1.
        cos, sin: [B, W, R] or [1, W, R], last stride 1; R is even and at most D.
        q_weight, k_weight: [D], last stride 1, of the norms of heads. They and eps are given together, or not at all.
        eps: of both norms, in [1e-30, 1e38].
        q_scale: [B, W] or [1, W], any strides. None: 1.
    Returns:
        RotatedHeads, transposed views of fresh contiguous [B, W, H, D] and [B, W, H_kv, D].
    Raises:
        ValueError: shape, stride, device, eps, one weight without the other or without eps, R odd or above D.
        TypeError: dtype; that of all tensors is q's.
    """
    check_qk_norm_rope(q, k, cos, sin, q_weight, k_weight, eps, q_scale, DTYPES)
    if q_weight is not None:
        q, k = normed(q, q_weight, eps), normed(k, k_weight, eps)
    cos, sin = cos[:, :, None], sin[:, :, None]
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    if q_scale is not None:
        q = q * q_scale[:, :, None, None]
    return RotatedHeads(q.contiguous().transpose(1, 2), k.contiguous().transpose(1, 2))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gated activation of a feed-forward network.

        R(R(silu(gate)) * up)        silu(x) = x / (1 + exp(-x))

    Args:
        gate, up: [..., I] of one shape, float32, bfloat16 or float16 (here also float64); the last stride is 1, and all
            rows lie at one stride, so the halves of a fused projection are taken as they are.
    Returns:
        [..., I] contiguous, in gate's dtype.
    Raises:
        ValueError: shape, stride, device.  TypeError: dtype.
    """
    check_swiglu(gate, up, DTYPES)
    return (F.silu(gate) * up).contiguous()


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of rows at any strides, without its check."""
    rows = x.to(torch.float32)
    mean_square = rows.pow(2).mean(-1, keepdim=True)
    return weight * (rows * torch.rsqrt(mean_square + eps)).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [B, W, H, D] with their first R dims rotated; cos and sin [B or 1, W, 1, R]."""
    R = cos.shape[-1]
    turning, first, second = x[..., :R], x[..., : R // 2], x[..., R // 2 : R]
    rotated = turning * cos + torch.cat((-second, first), -1) * sin
    return rotated if R == x.shape[-1] else torch.cat((rotated, x[..., R:]), -1)
