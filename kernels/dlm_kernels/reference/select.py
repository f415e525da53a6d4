"""Which of a row's positions a step writes: the prefix rule, and what is added to the prefix. Part of the specification
of `unmask`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rules import ENTROPY_SCALE, UnmaskRule

# Fixed-point entropies saturate, so that NaN and inf have a meaning and no sum over a block can overflow int64: 2^48 is
# 2^24 nats, and 2^14 positions of it still fit an infinite budget.
FIXED_ENTROPY_MAX = 1 << 48
FIXED_BUDGET_MAX = 1 << 62


def select(
    rule: UnmaskRule,
    eligible: Tensor,
    score: Tensor,
    value: Tensor,
    kmin: Tensor,
    rank: Tensor | None = None,
    entropy: Tensor | None = None,
    *,
    fallback: Tensor | None = None,
    max_unmask: Tensor | None = None,
    run_value: Tensor | None = None,
) -> Tensor:
    """Which lanes to write, [B, W] bool: all that pass, or if fewer than kmin pass, the `fallback` best (at most the
    eligible ones).

    Best means rank descending, then the lowest lane; -0.0 ties with 0.0, NaN is -inf. `factor` is fp32 with IEEE
    division. Entropies and their budget are rounded down to 1 / ENTROPY_SCALE nat and summed as integers; an entropy
    below 0 (rounding) counts as 0, a NaN one as infinite, and nothing passes a NaN budget. Of more than `max_unmask`
    lanes the best are kept; then rule.runs adds to them.

    Args:
        eligible: [B, W] bool.
        score: [B, W] fp32.
        value: [B] fp32, or [B, W] for a flat test.
        kmin: [B] int32.
        rank: [B, W] fp32; None = score.
        entropy: [B, W] fp32, for passes "entropy".
        fallback: [B] int32; None = kmin.
        max_unmask: [B] int32; None = no limit.
        run_value: [B] fp32, for rule.runs.
    """
    order = rank_order(eligible, score if rank is None else rank)
    n = eligible.sum(1, keepdim=True)
    r = torch.arange(1, eligible.shape[1] + 1, device=eligible.device)
    fallback = kmin if fallback is None else fallback
    kmin, fallback = (torch.minimum(k[:, None], n) for k in (kmin, fallback))
    value = value[:, None] if value.dim() == 1 else value.gather(1, order)
    score = _no_nan(score)
    in_order = score.gather(1, order)

    if rule.passes == "none":
        passes = torch.zeros_like(eligible)
    elif rule.passes == "threshold":
        passes = (in_order >= value) if rule.inclusive else (in_order > value)
    elif rule.passes == "factor":
        passes = in_order >= 1 - value / (r + 1).to(score.dtype)
    else:
        used = to_fixed(entropy, 0, FIXED_ENTROPY_MAX, nan=FIXED_ENTROPY_MAX).gather(1, order)
        used = torch.where(r <= n, used, 0)
        budget = to_fixed(value, -FIXED_BUDGET_MAX, FIXED_BUDGET_MAX, nan=-FIXED_BUDGET_MAX)
        total = used.cumsum(1)
        passes = (total < budget) if rule.inclusive else (total - used.cummax(1).values <= budget)
    passes = passes & (r <= n)
    if rule.passes in ("factor", "entropy"):
        # What passes is a prefix, which stops at the first failure.
        passes = (~passes).cumsum(1) == 0

    enough = passes.sum(1, keepdim=True) >= kmin
    chosen = torch.where(enough, passes, r <= fallback)
    if max_unmask is not None:
        chosen = chosen & (chosen.cumsum(1) <= max_unmask[:, None])
    chosen = torch.zeros_like(eligible).scatter(1, order, chosen)
    if rule.runs:
        starts = eligible & ~torch.nn.functional.pad(eligible, (1, 0))[:, :-1]
        best = _best_of_groups(eligible, starts.cumsum(1).clamp(min=1) - 1, order)
        chosen = chosen | (best & (score > run_value[:, None]))
    return chosen


def select_in_blocks(
    rule: UnmaskRule,
    eligible: Tensor,
    score: Tensor,
    value: Tensor,
    kmin: Tensor,
    rank: Tensor | None,
    entropy: Tensor | None,
    *,
    block_of: Tensor,
    active: Tensor,
    **limits: Tensor | None,
) -> Tensor:
    """`select` for a region of several blocks (rule.scope "each" or "first"), [B, W] bool.

    Args:
        block_of: [B, W] int64 in [0, W): the block of each lane, counted from the region's first.
        active: [B, W] bool: whether the lane's block is fully activated ("each").
        limits: fallback, max_unmask and run_value, as in `select`.
    """
    if rule.scope == "each":
        kmin = torch.zeros_like(kmin)
    chosen = select(rule, eligible, score, value, kmin, rank, entropy, **limits)
    order = rank_order(eligible, score if rank is None else rank)
    best = _best_of_groups(eligible, block_of, order)
    if rule.scope == "first":
        first = torch.where(eligible, block_of, block_of.shape[1]).amin(1, keepdim=True)
        active = block_of == first
    served = torch.zeros_like(block_of).scatter_reduce(1, block_of, chosen.long(), "amax").gather(1, block_of) > 0
    return chosen | (best & active & ~served)


def rank_order(eligible: Tensor, rank: Tensor) -> Tensor:
    """Lanes of every row, best first: eligible before the rest, then rank descending (NaN = -inf), then the lowest
    lane. [B, W] int64"""
    by_rank = _no_nan(rank).sort(dim=1, descending=True, stable=True).indices
    by_eligible = eligible.gather(1, by_rank).to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    return by_rank.gather(1, by_eligible)


def lowest(candidates: Tensor, score: Tensor, count: Tensor) -> Tensor:
    """The `count` [B] candidates [B, W] of lowest score (ties: lowest lane; NaN = -inf), at most all. [B, W] bool"""
    order = rank_order(candidates, -_no_nan(score))
    r = torch.arange(1, candidates.shape[1] + 1, device=candidates.device)
    taken = r <= torch.minimum(count[:, None], candidates.sum(1, keepdim=True))
    return torch.zeros_like(candidates).scatter(1, order, taken)


def quota(block_masks: Tensor, block_step: Tensor, steps: Tensor) -> Tensor:
    """LLaDA's schedule (its num_transfer_tokens): m0 // S + (i < m0 % S) positions at block step i, at least 1. [B]
    int32"""
    steps = steps.clamp(min=1)
    return (block_masks // steps + (block_step < block_masks % steps)).clamp(min=1).to(torch.int32)


def to_fixed(x: Tensor, low: int, high: int, nan: int) -> Tensor:
    """floor(x * ENTROPY_SCALE) as int64, at least `low` and at most `high`; NaN gives `nan`."""
    scaled = (x * ENTROPY_SCALE).floor().nan_to_num(nan=nan, posinf=high, neginf=low)
    return scaled.clamp(low, high).to(torch.int64)


def _no_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), -torch.inf, x)


def _best_of_groups(eligible: Tensor, group: Tensor, order: Tensor) -> Tensor:
    """The best eligible lane of every group [B, W] int64 (values in [0, W)). [B, W] bool"""
    W = order.shape[1]
    place = torch.zeros_like(order).scatter(1, order, torch.arange(W, device=order.device).expand_as(order))
    place = torch.where(eligible, place, W)
    first = torch.full_like(place, W).scatter_reduce(1, group, place, "amin")
    return eligible & (place == first.gather(1, group))
