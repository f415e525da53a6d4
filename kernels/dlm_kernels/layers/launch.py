"""The launchers of `rms_norm`, `add_rms_norm`, `qk_norm_rope` and `swiglu`, one launch each. Specification:
reference.layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from ..plans import Call, Calls, Launch, Plan
from ..reference.layers import NormedSum, RotatedHeads
from ..tiles import SWIGLU_TILE, norm_tile, rope_tile
from .kernel import FUSION, qk_norm_rope_kernel, rms_norm_kernel, swiglu_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The tensors of a launch.
_OF_NORM = ("x_ptr", "residual_ptr", "weight_ptr", "total_ptr", "normed_ptr")
_OF_ROPE = (
    "q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_weight_ptr", "k_weight_ptr", "q_scale_ptr", "q_out_ptr", "k_out_ptr",
)  # fmt: skip
_OF_SWIGLU = ("gate_ptr", "up_ptr", "out_ptr")
_calls_of_norm = Calls("rms_norm", ("x", "weight"))
_calls_of_sum = Calls("add_rms_norm", ("x", "residual", "weight"))
_calls_of_rope = Calls("qk_norm_rope", ("q", "k", "cos", "sin", "q_weight", "k_weight", "q_scale"))
_calls_of_swiglu = Calls("swiglu", ("gate", "up"))


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

    def check() -> None:
        check_rms_norm(x, weight, eps, DTYPES, MAX_ROW)
        _check_call("rms_norm", rms_norm_kernel, x=x, weight=weight)

    call, tensors, pointers = _accepted(_calls_of_norm, (x, weight), (type(eps), eps), check)
    normed = _like(x)
    plan = _plan(call, rms_norm_kernel, lambda: _plan_of_norm(x, None, eps))
    plan.run(x, tensors, (normed,), pointers)
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

    def check() -> None:
        check_add_rms_norm(x, residual, weight, eps, DTYPES, MAX_ROW)
        _check_call("add_rms_norm", rms_norm_kernel, x=x, residual=residual, weight=weight)

    call, tensors, pointers = _accepted(_calls_of_sum, (x, residual, weight), (type(eps), eps), check)
    result = _normed_sum(x)
    plan = _plan(call, rms_norm_kernel, lambda: _plan_of_norm(x, residual, eps))
    plan.run(x, tensors, result, pointers)
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
    given = (q, k, cos, sin, q_weight, k_weight, q_scale)

    def check() -> None:
        check_qk_norm_rope(q, k, cos, sin, q_weight, k_weight, eps, q_scale, DTYPES, MAX_HEAD_DIM)
        _check_call("qk_norm_rope", qk_norm_rope_kernel, **dict(zip(_calls_of_rope.names, given)))

    call, tensors, pointers = _accepted(_calls_of_rope, given, (type(eps), eps), check)
    result = _rotated(q, k)
    plan = _plan(call, qk_norm_rope_kernel, lambda: _plan_of_rope(given, eps))
    plan.run(q, tensors, result, pointers)
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

    def check() -> None:
        check_swiglu(gate, up, DTYPES)
        _check_call("swiglu", swiglu_kernel, gate=gate, up=up)

    call, tensors, pointers = _accepted(_calls_of_swiglu, (gate, up), (), check)
    out = _like(gate)
    plan = _plan(call, swiglu_kernel, lambda: _plan_of_swiglu(gate, up))
    plan.run(gate, tensors, (out,), pointers)
    return out


def _accepted(
    calls: Calls, given: Sequence[Tensor | None], facts: tuple[object, ...], check: Callable[[], None]
) -> tuple[Call, list[Tensor], tuple[int, ...]]:
    """(the call, its tensors, their pointers) of arguments that the check accepts, or is known to accept."""
    call, key, tensors, pointers = calls.find(given, facts)
    if call is None or not call.accepts(tensors, ()):
        check()
        if call is None:
            call = calls.add(key)
        call.accepted(())
    return call, tensors, pointers


def _plan(call: Call, kernel: Any, make: Callable[[], Plan]) -> Plan:
    """How calls like one are launched."""
    plan = call.plan_for((kernel,))
    if plan is None:
        plan = make()
        call.plan = (kernel,), plan
    return plan


def _launched(
    kernel: Any,
    programs: int,
    names: Sequence[str],
    present: Sequence[str],
    values: Mapping[str, object],
    num_warps: int,
) -> Plan:
    """One launch of so many programs, or none.

    Args:
        names: the kernel's tensors, of which a call has those that are `present`, in this order.
    """
    places = {name: place for place, name in enumerate(present)}
    options = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": FUSION}
    return Plan([Launch(kernel, (programs,), names, places, {**values, **options})] if programs else [])


def _plan_of_norm(x: Tensor, residual: Tensor | None, eps: float) -> Plan:
    d = x.shape[-1]
    BLOCK_D, num_warps = norm_tile(d)
    values = {
        "x_stride": row_stride(x) if x.numel() else 0,
        "residual_stride": 0 if residual is None or not x.numel() else row_stride(residual),
        "eps": float(eps),
        "d": d,
        "BLOCK_D": BLOCK_D,
    }
    present = ("x_ptr", "weight_ptr", "normed_ptr")
    if residual is not None:
        present = ("x_ptr", "residual_ptr", "weight_ptr", "total_ptr", "normed_ptr")
    return _launched(rms_norm_kernel, x.numel() // d, _OF_NORM, present, values, num_warps)


def _plan_of_rope(given: Sequence[Tensor | None], eps: float | None) -> Plan:
    q, k, cos, sin, _, _, q_scale = given
    B, W, H, D = q.shape
    H_kv, R = k.shape[2], cos.shape[2]
    HEADS, BLOCK_R, BLOCK_P, num_warps = rope_tile(D, R)
    # What is one for all rows has no stride from row to row.
    over_rows = cos.shape[0] > 1
    scale_strides = (0, 0)
    if q_scale is not None:
        scale_strides = (q_scale.stride(0) if q_scale.shape[0] > 1 else 0, q_scale.stride(1))
    values = {
        "q_batch_stride": q.stride(0),
        "q_position_stride": q.stride(1),
        "q_head_stride": q.stride(2),
        "k_batch_stride": k.stride(0),
        "k_position_stride": k.stride(1),
        "k_head_stride": k.stride(2),
        "cos_batch_stride": cos.stride(0) if over_rows else 0,
        "cos_position_stride": cos.stride(1),
        "sin_batch_stride": sin.stride(0) if over_rows else 0,
        "sin_position_stride": sin.stride(1),
        "scale_batch_stride": scale_strides[0],
        "scale_position_stride": scale_strides[1],
        "W": W,
        "eps": 0.0 if eps is None else float(eps),
        "H": H,
        "H_KV": H_kv,
        "D": D,
        "R": R,
        "ALIGNED": D % 16 == 0 and all(map(_is_aligned, (q, k, cos, sin))),
        "HEADS": HEADS,
        "BLOCK_R": BLOCK_R,
        "BLOCK_P": BLOCK_P,
    }
    present = [name for name, tensor in zip(_OF_ROPE, (*given, q, k)) if tensor is not None]
    programs = B * W * (triton.cdiv(H, HEADS) + triton.cdiv(H_kv, HEADS))
    return _launched(qk_norm_rope_kernel, programs, _OF_ROPE, present, values, num_warps)


def _plan_of_swiglu(gate: Tensor, up: Tensor) -> Plan:
    width, count = gate.shape[-1], gate.numel()
    BLOCK_I, num_warps = SWIGLU_TILE
    values = {
        "gate_stride": row_stride(gate) if count else 0,
        "up_stride": row_stride(up) if count else 0,
        "WIDTH": width,
        "BLOCK_I": BLOCK_I,
    }
    programs = count // width * triton.cdiv(width, BLOCK_I) if count else 0
    return _launched(swiglu_kernel, programs, _OF_SWIGLU, _OF_SWIGLU, values, num_warps)


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


def _is_aligned(tensor: Tensor) -> bool:
    """Whether every step but the last is a multiple of 16 elements; a dimension of one has no step."""
    return all(size == 1 or stride % 16 == 0 for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]))
