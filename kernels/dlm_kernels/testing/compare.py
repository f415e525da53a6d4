"""When a result is right: integers and copies bit for bit, floats by an error bound that plain torch sets."""

from __future__ import annotations

import torch
from torch import Tensor


class Failure(AssertionError):
    """An op computed something else than its specification; the message says what."""


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    as_integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(as_integer)


def same_bits(name: str, ours: Tensor, expected: Tensor, *, any_nan: bool = False) -> None:
    """Raises Failure unless both hold the same bits; with `any_nan`, one NaN is as good as another."""
    if ours.dtype != expected.dtype or ours.shape != expected.shape:
        raise Failure(f"{name}: {ours.dtype} {list(ours.shape)} instead of {expected.dtype} {list(expected.shape)}")
    ours, expected = ours.cpu(), expected.cpu()
    differs = bits(ours) != bits(expected)
    if any_nan and ours.is_floating_point():
        differs &= ~(ours.isnan() & expected.isnan())
    wrong = differs.nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise Failure(
            f"{name}: {len(wrong)} of {ours.numel()} differ, first at {list(at)}: "
            f"{ours[at].item()} instead of {expected[at].item()}"
        )


def no_worse_than_torch(
    name: str,
    ours: Tensor,
    low_precision: Tensor,
    exact: Tensor,
    *,
    factor: float = 2,
    floor: float = 1e-6,
    unit: float = 1.0,
    half_steps: bool = True,
    one_by_one: bool = False,
    may_be_nan: Tensor | None = None,
    means_of: Tensor | None = None,
) -> None:
    """Raises Failure unless our error against float64 is at most `factor` times that of plain torch in our dtype.

        allowed = factor * max(torch's largest error, half a step of our dtype at the result)
                + floor * max(unit, largest)

    `largest` is the largest exact result. The half step is there because of few results torch's may all happen to lie
    close to a number of the dtype. Infinities and NaN must stand exactly where the float64 result has them.

    Args:
        low_precision: what plain torch computes in the dtype of `ours`. exact: what it computes in float64.
        half_steps: False leaves the half step out of the bound.
        one_by_one: the stricter bound of every result by torch's error in it alone,
            factor * torch's error + floor * max(unit, the result), without half steps.
        may_be_nan: [like ours] bool, results that may be NaN though the exact ones are finite. Given, `low_precision`
            may be so too, and of a result that is not finite only that is compared.
        means_of: what the results are weighted means of. Where NaN leave few results to find torch's error by, its
            largest value is one that torch may have rounded.
    """
    if ours.shape != exact.shape:
        raise Failure(f"{name}: shape {list(ours.shape)} instead of {list(exact.shape)}")
    dtype = ours.dtype
    ours, low_precision = ours.double().to(exact.device), low_precision.double().to(exact.device)
    finite = exact.isfinite()
    _check_not_finite(name, ours, exact, may_be_nan)

    # 1. Torch's error, and ours, where all that is compared is finite.
    zero = torch.zeros_like(exact)
    compared = finite if may_be_nan is None else finite & low_precision.isfinite()
    theirs = torch.where(compared, (low_precision - exact).abs(), zero)
    error = torch.where(finite & ours.isfinite(), (ours - exact).abs(), zero)
    sizes = torch.where(finite, exact.abs(), zero)

    # 2. What is allowed.
    largest_of_theirs = theirs.max().item() if theirs.numel() else 0.0
    if not compared.equal(finite):
        # No number of the dtype is nearer to an exact result than the one it is rounded to.
        rounded = torch.where(finite, (exact.to(dtype).double() - exact).abs(), zero)
        largest_of_theirs = max(largest_of_theirs, rounded.max().item())
    if means_of is not None and not low_precision.isfinite().all():
        values = means_of.double()[means_of.isfinite()].abs()
        if values.numel():
            largest_of_theirs = max(largest_of_theirs, torch.finfo(dtype).eps / 2 * values.max().item())
    if one_by_one:
        allowed = factor * theirs + floor * sizes.clamp(min=unit)
    else:
        of_torch = torch.full_like(sizes, largest_of_theirs)
        if half_steps:
            # Epsilon times the power of two below the number, halved; none at 0, whose mantissa is 0.
            half = torch.finfo(dtype).eps / 2 * sizes / (2 * torch.frexp(sizes).mantissa.clamp(min=0.5))
            of_torch = torch.maximum(of_torch, half)
        allowed = factor * of_torch + floor * max(unit, sizes.max().item() if sizes.numel() else 0.0)

    # 3. The verdict. A NaN in a bound, too, is a failure.
    if not (error <= allowed).all():
        worst = (error - allowed).argmax()
        raise Failure(
            f"{name}: error {error.flatten()[worst]:.3g} against float64, torch's largest is {largest_of_theirs:.3g} "
            f"(allowed {allowed.flatten()[worst]:.3g})"
        )


def _check_not_finite(name: str, ours: Tensor, exact: Tensor, may_be_nan: Tensor | None) -> None:
    finite = exact.isfinite()
    if may_be_nan is None:
        # One NaN is as good as another: its sign and payload are the hardware's.
        strange = (torch.where(finite, 0.0, values) for values in (ours, exact))
        same_bits(f"{name} (where not finite)", *strange, any_nan=True)
        excused = torch.zeros_like(finite)
    else:
        excused = may_be_nan.to(finite.device)
        hidden = int((ours.isfinite() & ~finite).sum())
        if hidden:
            raise Failure(f"{name}: {hidden} of {ours.numel()} are finite and should be NaN or infinite")
    unwritten = int((finite & ~ours.isfinite() & ~excused).sum())
    if unwritten:
        raise Failure(f"{name}: {unwritten} of {ours.numel()} are NaN or infinite and should not be (never written?)")
