"""The launchers of `rms_norm`, `add_rms_norm`, `qk_norm_rope` and `swiglu`, one launch each. Specification:
reference.layers."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import device
from ..checks.layers import (
    MAX_HEAD_DIM,
    MAX_ROW,
    check_add_rms_norm,
    check_qk_norm_rope,
    check_rms_norm,
    check_swiglu,
    row_stride,
)
from ..library import operator
from ..reference.layers import NormedSum, RotatedHeads
from ..tiles import SWIGLU_TILE, norm_tile, rope_tile
from .kernel import FUSION, qk_norm_rope_kernel, rms_norm_kernel, swiglu_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _like(x: Tensor, **_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@operator(fake=_like)
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Every row divided by its root mean square, times the weight; arguments and results are those of
    reference.rms_norm.

    d is at most 16,384. The sum of squares is added in another order than the reference's, so before its rounding the
    quotient n = x * rsqrt(...) differs by at most 2^-18 of itself. Results then differ

        in 16 bits   by at most |weight| ulp(n) + ulp(normed): a unit in the last place for each rounding
        in float32   by at most 2^-18 |normed|

    NaN and infinities are carried as in the reference. A row's bits depend on the row, the weight, the dtype and d
    alone. Traffic: a row is read once and written once; one program a row.

    Raises:
        As reference.rms_norm, and ValueError: d above 16,384.  RuntimeError: a gradient is wanted; CPU tensors without
        Triton's interpreter, or bfloat16 in it.  NotImplementedError: a GPU that `tiles.TARGETS` does not name.
    """
    check_rms_norm(x, weight, eps, DTYPES, MAX_ROW)
    _check_call("rms_norm", rms_norm_kernel, x=x, weight=weight)
    normed = _like(x)
    _launch_norm(x, None, weight, None, normed, eps)
    return normed


def _normed_sum(x: Tensor, **_: object) -> NormedSum:
    return NormedSum(_like(x), _like(x))


@operator(fake=_normed_sum, result=NormedSum)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> NormedSum:
    """total = residual + x and its norm; arguments and results are those of reference.add_rms_norm.

    `total` equals the reference's bit for bit, and `normed` equals `rms_norm(total, weight)` of this backend bit for
    bit. Traffic: two rows are read once and two are written once; one program a row.

    Raises:
        As reference.add_rms_norm, and ValueError: d above 16,384.  RuntimeError, NotImplementedError: as `rms_norm`.
    """
    check_add_rms_norm(x, residual, weight, eps, DTYPES, MAX_ROW)
    _check_call("add_rms_norm", rms_norm_kernel, x=x, residual=residual, weight=weight)
    result = _normed_sum(x)
    _launch_norm(x, residual, weight, result.total, result.normed, eps)
    return result


def _rotated(q: Tensor, k: Tensor, **_: object) -> RotatedHeads:
    return RotatedHeads(_like(q).transpose(1, 2), _like(k).transpose(1, 2))


@operator(fake=_rotated, result=RotatedHeads)
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
    """Queries and keys with their heads normed, if there are weights, and rotated; arguments and results are those of
    reference.qk_norm_rope.

    D is at most 512. Without weights the results equal the reference's bit for bit. With weights, a normed head h
    differs from the reference's as `rms_norm` says, by e(h), and the results by at most

        |cos| e(x) + |sin| e(turned) + ulp(x * cos) + ulp(turned * sin) + ulp(sum)

    and, where there is a scale, by |q_scale| times that and ulp(q). NaN and infinities are carried as in the reference.
    A head's bits depend on the head, its weight, its cos, sin and scale, the dtype, D and R alone. Traffic: a head is
    read once and written once; a program takes a few heads of a position.

    Raises:
        As reference.qk_norm_rope, and ValueError: D above 512.  RuntimeError, NotImplementedError: as `rms_norm`.
    """
    check_qk_norm_rope(q, k, cos, sin, q_weight, k_weight, eps, q_scale, DTYPES, MAX_HEAD_DIM)
    given = {"q": q, "k": k, "cos": cos, "sin": sin, "q_weight": q_weight, "k_weight": k_weight, "q_scale": q_scale}
    _check_call("qk_norm_rope", qk_norm_rope_kernel, **given)
    result = _rotated(q, k)
    B, W, H, D = q.shape
    H_kv, R = k.shape[2], cos.shape[2]
    HEADS, BLOCK_R, BLOCK_P, num_warps = rope_tile(D, R)
    programs = B * W * (triton.cdiv(H, HEADS) + triton.cdiv(H_kv, HEADS))
    if programs == 0:
        return result
    # What is one for all rows has no stride from row to row.
    over_rows = cos.shape[0] > 1
    scale_strides = (0, 0)
    if q_scale is not None:
        scale_strides = (q_scale.stride(0) if q_scale.shape[0] > 1 else 0, q_scale.stride(1))
    with device.launching_on(q):
        qk_norm_rope_kernel[(programs,)](
            q_ptr=q,
            k_ptr=k,
            cos_ptr=cos,
            sin_ptr=sin,
            q_weight_ptr=q_weight,
            k_weight_ptr=k_weight,
            q_scale_ptr=q_scale,
            q_out_ptr=result.q,
            k_out_ptr=result.k,
            q_batch_stride=q.stride(0),
            q_position_stride=q.stride(1),
            q_head_stride=q.stride(2),
            k_batch_stride=k.stride(0),
            k_position_stride=k.stride(1),
            k_head_stride=k.stride(2),
            cos_batch_stride=cos.stride(0) if over_rows else 0,
            cos_position_stride=cos.stride(1),
            sin_batch_stride=sin.stride(0) if over_rows else 0,
            sin_position_stride=sin.stride(1),
            scale_batch_stride=scale_strides[0],
            scale_position_stride=scale_strides[1],
            W=W,
            eps=0.0 if eps is None else float(eps),
            H=H,
            H_KV=H_kv,
            D=D,
            R=R,
            ALIGNED=D % 16 == 0 and all(map(_is_aligned, (q, k, cos, sin))),
            HEADS=HEADS,
            BLOCK_R=BLOCK_R,
            BLOCK_P=BLOCK_P,
            num_warps=num_warps,
            num_stages=1,
            enable_fp_fusion=FUSION,
        )
    return result


def _activated(gate: Tensor, **_: object) -> Tensor:
    return _like(gate)


@operator(fake=_activated)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """R(R(silu(gate)) * up); arguments and results are those of reference.swiglu.

    Before its rounding, s = silu(gate) differs from the reference's by at most 2^-20 of itself. Results then differ

        in 16 bits   by at most |up| ulp(s) + ulp(result): a unit in the last place for each rounding
        in float32   by at most 2^-20 |result|

    NaN and infinities are carried as in the reference. Traffic: two numbers are read and one is written.

    Raises:
        As reference.swiglu, and RuntimeError, NotImplementedError: as `rms_norm`.
    """
    check_swiglu(gate, up, DTYPES)
    _check_call("swiglu", swiglu_kernel, gate=gate, up=up)
    out = _like(gate)
    if out.numel() == 0:
        return out
    width = gate.shape[-1]
    BLOCK_I, num_warps = SWIGLU_TILE
    with device.launching_on(gate):
        swiglu_kernel[(out.numel() // width * triton.cdiv(width, BLOCK_I),)](
            gate_ptr=gate,
            up_ptr=up,
            out_ptr=out,
            gate_stride=row_stride(gate),
            up_stride=row_stride(up),
            WIDTH=width,
            BLOCK_I=BLOCK_I,
            num_warps=num_warps,
            num_stages=1,
            enable_fp_fusion=FUSION,
        )
    return out


def _check_call(op: str, kernel: object, **tensors: Tensor | None) -> None:
    """Raises unless the kernel can run: no gradient is wanted, and there is a GPU, or an interpreter that rounds the
    dtype as a GPU does."""
    if torch.is_grad_enabled():
        wanted = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
        if wanted:
            raise RuntimeError(
                f"{op}: has no backward, got {', '.join(wanted)} with requires_grad=True; call it under torch.no_grad()"
            )
    name, first = next(iter(tensors.items()))
    device.capability_of(op, first, kernel)
    if not first.is_cuda and first.dtype == torch.bfloat16 and not isinstance(kernel, triton.runtime.JITFunction):
        raise RuntimeError(
            f"{op}: {name} is bfloat16, to which Triton's interpreter truncates instead of rounding: "
            "use float16 or float32"
        )


def _launch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, total: Tensor | None, normed: Tensor, eps: float
) -> None:
    if normed.numel() == 0:
        return
    d = x.shape[-1]
    BLOCK_D, num_warps = norm_tile(d)
    with device.launching_on(x):
        rms_norm_kernel[(normed.numel() // d,)](
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=weight,
            total_ptr=total,
            normed_ptr=normed,
            x_stride=row_stride(x),
            residual_stride=0 if residual is None else row_stride(residual),
            eps=float(eps),
            d=d,
            BLOCK_D=BLOCK_D,
            num_warps=num_warps,
            num_stages=1,
            enable_fp_fusion=FUSION,
        )


def _is_aligned(tensor: Tensor) -> bool:
    """Whether every step but the last is a multiple of 16 elements; a dimension of one has no step."""
    return all(size == 1 or stride % 16 == 0 for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]))
