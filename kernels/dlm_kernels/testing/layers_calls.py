"""Random calls of the small ops of a layer, and how far a kernel may be from the reference.

The tests of the ops (tests/kernels/test_layers.py) and the check on a GPU (bench/checks/layers.py) draw from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import RotatedHeads
from .compare import Failure

# What a kernel's float32 may differ by, as a share of the result, before anything is rounded to 16 bits.
NORM_SHARE, SWIGLU_SHARE = 2.0**-18, 2.0**-20
# NaN, infinities, zeros, numbers whose squares are infinite or vanish, and the least numbers of the dtypes.
HOSTILE = (math.nan, math.inf, -math.inf, 0.0, -0.0, 6e4, -3e38, 1e-30, -6e-8, 1e-40)
# A hostile row has so many of them at most.
MOST_HOSTILE = 3

Call = dict[str, Any]


def random_rows(
    generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype, *, size: float = 1.0, hostile: float = 0.0
) -> Tensor:
    """[..., d] normal numbers, and in a share of the rows up to MOST_HOSTILE numbers of HOSTILE."""
    rows = torch.randn(shape, generator=generator) * size
    flat = rows.view(-1, shape[-1]) if rows.numel() else rows.new_empty(0, shape[-1])
    for row in (torch.rand(len(flat), generator=generator) < hostile).nonzero()[:, 0]:
        for _ in range(MOST_HOSTILE):
            column, choice = (int(torch.randint(n, (), generator=generator)) for n in (shape[-1], len(HOSTILE)))
            flat[row, column] = HOSTILE[choice]
    return rows.to(dtype)


def random_norm(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype, *, hostile: float = 0.0) -> Call:
    """The arguments of `add_rms_norm`; those of `rms_norm` are among them."""
    return {
        "x": random_rows(generator, shape, dtype, size=3.0, hostile=hostile),
        "residual": random_rows(generator, shape, dtype, hostile=hostile / 2),
        "weight": random_rows(generator, shape[-1:], dtype),
        "eps": (1e-6, 1e-5, 1e-2)[int(torch.randint(3, (), generator=generator))],
    }


def random_heads(
    generator: torch.Generator,
    *,
    B: int,
    W: int,
    H: int,
    H_kv: int,
    D: int,
    R: int,
    dtype: torch.dtype,
    normed: bool = False,
    scaled: bool = False,
    shared: bool = False,
    fused: bool = False,
    hostile: float = 0.0,
) -> Call:
    """The arguments of `qk_norm_rope`.

    Args:
        normed: there are weights. scaled: there is a scale. shared: one cos, sin and scale for all rows.
        fused: queries and keys are parts of one projection, values behind them.
    """
    if fused:
        whole = random_rows(generator, (B, W, H + 2 * H_kv, D), dtype, hostile=hostile)
        q, k = whole[:, :, :H], whole[:, :, H : H + H_kv]
    else:
        q, k = (random_rows(generator, (B, W, heads, D), dtype, hostile=hostile) for heads in (H, H_kv))
    rows = 1 if shared else B
    angles = torch.rand(rows, W, R, generator=generator) * 2 * math.pi
    call: Call = {"q": q, "k": k, "cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
    call |= dict.fromkeys(("q_weight", "k_weight", "eps", "q_scale"))
    if normed:
        call |= {name: random_rows(generator, (D,), dtype) for name in ("q_weight", "k_weight")} | {"eps": 1e-6}
    if scaled:
        call["q_scale"] = (1 + torch.rand(rows, W, generator=generator)).to(dtype)
    return call


def random_mlp(
    generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype, *, fused: bool = False, hostile: float = 0.0
) -> Call:
    """The arguments of `swiglu`; with `fused` the halves of one projection."""
    if fused:
        gate, up = random_rows(generator, (*shape[:-1], 2 * shape[-1]), dtype, size=4.0, hostile=hostile).chunk(2, -1)
        return {"gate": gate, "up": up}
    return {name: random_rows(generator, shape, dtype, size=4.0, hostile=hostile) for name in ("gate", "up")}


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 distance of two neighbouring numbers of the dtype at each value; that of the least ones at 0."""
    info = torch.finfo(dtype)
    mantissa, exponent = torch.frexp(values.double().nan_to_num(0.0, 0.0, 0.0))
    spacing = torch.ldexp(torch.full_like(mantissa, info.eps), exponent - 1)
    return torch.where(mantissa == 0, 0.0, spacing).clamp(min=info.smallest_normal * info.eps)


def near(name: str, ours: Tensor, expected: Tensor, allowed: Tensor) -> float:
    """Raises Failure unless every result is as near to the reference's as is allowed there; what is not finite must be
    the same. Returns the share of the results that differ."""
    if ours.dtype != expected.dtype or ours.shape != expected.shape:
        raise Failure(f"{name}: {ours.dtype} {list(ours.shape)} instead of {expected.dtype} {list(expected.shape)}")
    a, b = ours.double(), expected.double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = (a - b).abs()
    wrong = ~same & ~(error <= allowed)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise Failure(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} are too far from the reference, first at {list(at)}: "
            f"{a[at].item()} instead of {b[at].item()} (allowed {allowed[at].item():.3g})"
        )
    return (~same).double().mean().item() if same.numel() else 0.0


def norm_near(name: str, ours: Tensor, expected: Tensor, x: Tensor, weight: Tensor, eps: float) -> float:
    """`near`, for rows of x and what `rms_norm` makes of them: the bound of its docstring."""
    return near(name, ours, expected, _norm_bound(ours, expected, x, weight, eps))


def heads_near(name: str, ours: RotatedHeads, expected: RotatedHeads, call: Call) -> float:
    """`near`, for what `qk_norm_rope` makes of a call: the bound of its docstring. Without weights nothing differs."""
    shares = []
    for head, weight in (("q", "q_weight"), ("k", "k_weight")):
        a, b = (getattr(result, head).transpose(1, 2) for result in (ours, expected))
        scale = call["q_scale"] if head == "q" else None
        shares.append(near(f"{name} {head}", a, b, _heads_bound(a, b, call[head], call[weight], call, scale)))
    return max(shares)


def swiglu_near(name: str, ours: Tensor, expected: Tensor, gate: Tensor, up: Tensor) -> float:
    """`near`, for what `swiglu` makes of a call: the bound of its docstring."""
    if ours.dtype == torch.float32:
        return near(name, ours, expected, SWIGLU_SHARE * expected.double().abs() + ulp(expected * 0, ours.dtype))
    activated = torch.nn.functional.silu(gate)
    allowed = up.double().abs() * ulp(activated, ours.dtype) + _ulp_of_both(ours, expected)
    return near(name, ours, expected, allowed.nan_to_num(0.0, 0.0, 0.0))


def _ulp_of_both(ours: Tensor, expected: Tensor) -> Tensor:
    return torch.maximum(ulp(ours, ours.dtype), ulp(expected, ours.dtype))


def _norm_bound(ours: Tensor, expected: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = ours.dtype
    if dtype == torch.float32:
        return (NORM_SHARE * expected.double().abs() + ulp(expected * 0, dtype)).nan_to_num(0.0, 0.0, 0.0)
    quotient = reference.rms_norm(x, torch.ones_like(weight), eps=eps)
    return weight.double().abs() * ulp(quotient, dtype) + _ulp_of_both(ours, expected)


def _heads_bound(
    ours: Tensor, expected: Tensor, x: Tensor, weight: Tensor | None, call: Call, scale: Tensor | None
) -> Tensor:
    """By how much heads [B, W, heads, D] may differ."""
    if weight is None:
        return torch.zeros(ours.shape, dtype=torch.float64, device=ours.device)
    dtype, R = ours.dtype, call["cos"].shape[2]
    normed = reference.rms_norm(x.contiguous(), weight, eps=call["eps"])
    error = _norm_bound(normed, normed, x.contiguous(), weight, call["eps"])
    cos, sin = (call[name].double()[:, :, None] for name in ("cos", "sin"))

    def turned(values: Tensor) -> Tensor:
        return torch.cat((-values[..., R // 2 : R], values[..., : R // 2]), -1)

    products = normed[..., :R].double() * cos, turned(normed).double() * sin
    bound = cos.abs() * error[..., :R] + sin.abs() * turned(error).abs()
    bound = bound + sum(ulp(product, dtype) for product in products) + ulp(sum(products), dtype)
    bound = torch.cat((bound, error[..., R:]), -1)
    if scale is not None:
        bound = bound * scale.double().abs()[:, :, None, None] + _ulp_of_both(ours, expected)
    return bound.nan_to_num(0.0, 0.0, 0.0)
