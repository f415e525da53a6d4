"""Device code of `unmask` in registers: which lanes a step writes, and which it masks again. Specification:
reference.select.

Positions are ordered by a bitonic sort of 64-bit keys (order-preserving bits of the rank, then the lane). All keys
differ, so the order is total and nothing here depends on the tile width, the batch or the number of warps. All sums are
integer sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import select as reference
from ..rules import ENTROPY_SCALE
from .row import number_masked_again

_ENTROPY_SCALE = tl.constexpr(float(ENTROPY_SCALE))
FIXED_ENTROPY_MAX = tl.constexpr(float(reference.FIXED_ENTROPY_MAX))
FIXED_BUDGET_MAX = tl.constexpr(float(reference.FIXED_BUDGET_MAX))
# Bits below those of every number, -inf included.
INELIGIBLE = tl.constexpr(-(2**31))
KEY_MIN, KEY_MAX = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)


@triton.jit
def no_nan(x):
    """NaN counts as -inf."""
    return tl.where(x != x, float("-inf"), x)


@triton.jit
def ordered_bits(x):
    """int32 that compares as the fp32 (not NaN) does, with -0.0 = 0.0."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def to_scaled(x, low: tl.constexpr, limit: tl.constexpr, nan: tl.constexpr):
    """floor(x * 2^24), saturating at `low` and `limit`: integers that fp32 holds exactly."""
    scaled = tl.floor(tl.where(x != x, nan / _ENTROPY_SCALE, x) * _ENTROPY_SCALE)
    return tl.where(scaled > limit, limit, tl.where(scaled < low, low, scaled))


@triton.jit
def compare_and_swap(keys, DISTANCE: tl.constexpr, RUN: tl.constexpr, BLOCK_W: tl.constexpr):
    """Order every pair (i, i + DISTANCE): larger first, except in every second run of RUN keys."""
    pairs: tl.constexpr = [BLOCK_W // (2 * DISTANCE), 2, DISTANCE]
    here = tl.reshape(keys, pairs)
    # The partner is the sum of the pair minus the key, which is exact in wrapping integers. (A built-in sum is quick to
    # interpret.)
    partner = tl.sum(here, axis=1)[:, None, :] - here
    index = tl.reshape(tl.arange(0, BLOCK_W), pairs)
    wants_smaller = ((index & DISTANCE) != 0) != ((index & RUN) != 0)
    return tl.reshape(tl.where((here > partner) == wants_smaller, partner, here), [BLOCK_W])


@triton.jit
def sort_descending(keys, FIRST: tl.constexpr, LOG_W: tl.constexpr, BLOCK_W: tl.constexpr):
    """The keys from the greatest to the smallest. Their runs of 2^(FIRST - 1) must be sorted, every second one
    ascending."""
    for stage in tl.static_range(FIRST, LOG_W + 1):
        for step in tl.static_range(stage):
            keys = compare_and_swap(keys, 1 << (stage - 1 - step), 1 << stage, BLOCK_W)
    return keys


@triton.jit
def _cut(keys, take, LOG_W: tl.constexpr, BLOCK_W: tl.constexpr):
    """The take-th greatest key; above every key if take is 0 or less. A take of 1, the usual one, needs no sort."""
    cut = take.to(tl.int64) * 0 + KEY_MAX
    if take == 1:
        cut = tl.max(keys)
    elif take > 1:
        best = sort_descending(keys, 1, LOG_W, BLOCK_W)
        cut = tl.min(tl.where(tl.arange(0, BLOCK_W) < take, best, KEY_MAX))
    return cut


@triton.jit
def keys_of(lane, candidates, rank, LOWEST: tl.constexpr, BLOCK_W: tl.constexpr):
    """One int64 a lane, all different: a better lane (of higher rank or, if LOWEST, of lower rank) has the greater key,
    and every candidate has a greater key than every other lane."""
    rank = no_nan(rank)
    if LOWEST:
        rank = -rank
    bits = tl.where(candidates, ordered_bits(rank), INELIGIBLE)
    return (bits.to(tl.int64) << 32) | (BLOCK_W - 1 - lane)


@triton.jit
def load_keys(lane, candidates, rank_ptr, LOWEST: tl.constexpr, BLOCK_W: tl.constexpr):
    """`keys_of` the ranks in memory."""
    return keys_of(lane, candidates, tl.load(rank_ptr + lane, mask=candidates, other=0.0), LOWEST, BLOCK_W)


@triton.jit
def flat_test(eligible, value, score, PASSES: tl.constexpr, INCLUSIVE: tl.constexpr):
    """Lanes that pass a test which needs no order."""
    passes = eligible & False
    if PASSES == "threshold":
        score = no_nan(score)
        passes = eligible & ((score >= value) if INCLUSIVE else (score > value))
    return passes


@triton.jit
def _passing_prefix(
    best, n, value, score_ptr, entropy_ptr,
    PASSES: tl.constexpr, INCLUSIVE: tl.constexpr, LOG_W: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """How many lanes pass a test that goes in rank order and stops at the first failure. `best`: the sorted keys."""
    rank_index = tl.arange(0, BLOCK_W)
    source = BLOCK_W - 1 - (best & 0xFFFFFFFF).to(tl.int32)
    if PASSES == "factor":
        score = no_nan(tl.load(score_ptr + source, mask=rank_index < n, other=float("-inf")))
        passes = score >= 1.0 - tl.div_rn(value, (rank_index + 2).to(tl.float32))
        count = tl.min(tl.where(passes & (rank_index < n), n, tl.minimum(rank_index, n)))
    else:
        entropy = tl.load(entropy_ptr + source, mask=rank_index < n, other=0.0)
        used = to_scaled(entropy, 0.0, FIXED_ENTROPY_MAX, FIXED_ENTROPY_MAX).to(tl.int64)
        budget = to_scaled(value, -FIXED_BUDGET_MAX, FIXED_BUDGET_MAX, -FIXED_BUDGET_MAX).to(tl.int64)
        # What a prefix spends, with or without its largest entropy, never falls as the prefix grows. So the longest
        # prefix that fits is found by halving: a scan of int64 would not fit the registers of the wider tiles.
        count = n * 0
        for halving in tl.static_range(LOG_W + 1):
            longer = count + (BLOCK_W >> halving)
            prefix = tl.where(rank_index < longer, used, 0)
            spent = tl.sum(prefix)
            if not INCLUSIVE:
                spent -= tl.max(prefix)
            fits = (spent < budget) if INCLUSIVE else (spent <= budget)
            count = tl.where((longer <= n) & fits, longer, count)
    return count


@triton.jit
def choose(
    eligible, n, kmin, fallback, max_unmask, run_value, value, score, rank, score_ptr, entropy_ptr,
    PASSES: tl.constexpr, INCLUSIVE: tl.constexpr, RUNS: tl.constexpr, LOG_W: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The chosen lanes.

    max_unmask and run_value may be None. The pointers are those of the lanes' scores and entropies, which the tests
    that go in rank order read in that order.
    """
    lane = tl.arange(0, BLOCK_W)
    kmin = tl.minimum(kmin, n)
    fallback = tl.minimum(fallback, n)
    # 1. How many lanes pass a flat test? If enough do, no order is needed, unless only the best ones may be written.
    passes = flat_test(eligible, value, score, PASSES, INCLUSIVE)
    count = tl.sum(passes.to(tl.int32))
    enough = count >= kmin
    orders = enough == 0
    candidates = eligible
    if max_unmask is not None:
        orders = orders | (count > max_unmask)
        if PASSES == "threshold":
            candidates = tl.where(enough, passes, eligible)
    # 2. The cut: the key of the last lane that is chosen by its place in the order.
    if (PASSES == "factor") | (PASSES == "entropy"):
        best = sort_descending(keys_of(lane, candidates, rank, False, BLOCK_W), 1, LOG_W, BLOCK_W)
        take = _passing_prefix(best, n, value, score_ptr, entropy_ptr, PASSES, INCLUSIVE, LOG_W, BLOCK_W)
        take = tl.where(take >= kmin, take, fallback)
        if max_unmask is not None:
            take = tl.minimum(take, max_unmask)
        cut = tl.min(tl.where(lane < take, best, KEY_MAX))
    else:
        take = fallback
        if max_unmask is not None:
            take = tl.minimum(tl.where(enough, count, fallback), max_unmask)
        cut = n.to(tl.int64) * 0 + KEY_MAX
        if orders:
            cut = _cut(keys_of(lane, candidates, rank, False, BLOCK_W), take, LOG_W, BLOCK_W)

    # 3. Chosen is what passes a flat test, or lies at or above the cut.
    keys = keys_of(lane, eligible, rank, False, BLOCK_W)
    passes = passes & enough
    if max_unmask is None:
        chosen = passes | (eligible & (keys >= cut))
    else:
        candidates = (passes | (eligible & (enough == 0))) if PASSES == "threshold" else eligible
        chosen = candidates & ((keys >= cut) | (passes & (orders == 0)))
    if RUNS:
        chosen = chosen | (_best_of_runs(eligible, keys, BLOCK_W) & (no_nan(score) > run_value))
    return chosen


@triton.jit
def _best_of_runs(eligible, keys, BLOCK_W: tl.constexpr):
    """The best lane of every maximal run of adjacent eligible lanes. The runs, which are few, are met one by one."""
    lane = tl.arange(0, BLOCK_W)
    best = eligible & False
    begin = tl.min(tl.where(eligible, lane, BLOCK_W))
    while begin < BLOCK_W:
        end = tl.min(tl.where(eligible | (lane < begin), BLOCK_W, lane))
        inside = (lane >= begin) & (lane < end)
        top = tl.max(tl.where(inside, keys, KEY_MIN))
        best = best | (inside & (keys == top))
        begin = tl.min(tl.where(eligible & (lane >= end), lane, BLOCK_W))
    return best


@triton.jit
def force_in_blocks(
    chosen, eligible, masked, rank, region_length, block_length, activate_masks,
    SCOPE: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The chosen lanes, and the best lane of every block that must write although none of its lanes was chosen.

    Lane 0 begins the region.
    """
    lane = tl.arange(0, BLOCK_W)
    keys = keys_of(lane, eligible, rank, False, BLOCK_W)
    if SCOPE == "first":
        begin = tl.min(tl.where(eligible, lane, BLOCK_W)) // block_length * block_length
        inside = eligible & (lane >= begin) & (lane < begin + block_length)
        served = tl.max((chosen & inside).to(tl.int32)) != 0
        top = tl.max(tl.where(inside, keys, KEY_MIN))
        chosen = chosen | (inside & (keys == top) & (served == 0))
    else:
        # What precedes the region is finished.
        masks_before = activate_masks
        for begin in range(0, region_length, block_length):
            inside = (lane >= begin) & (lane < begin + block_length)
            served = tl.max((chosen & inside).to(tl.int32)) != 0
            top = tl.max(tl.where(inside & eligible, keys, KEY_MIN))
            forced = (masks_before <= activate_masks) & (served == 0)
            chosen = chosen | (inside & eligible & (keys == top) & forced)
            masks_before = tl.sum((inside & masked).to(tl.int32))
    return chosen


@triton.jit
def masked_again(
    chosen, written, masked, score, min_unmask, count, limit, exiting,
    REMASK: tl.constexpr, LOG_W: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Lanes that a step masks again: the lanes of lowest score (ties: lowest lane; NaN = -inf). `masked`: before the
    step."""
    lane = tl.arange(0, BLOCK_W)
    any_left = tl.max((masked & (chosen == 0)).to(tl.int32)) != 0
    k = number_masked_again(tl.sum(chosen.to(tl.int32)), any_left, min_unmask, count, REMASK)
    if exiting:
        k = k * 0
    candidates = remask_candidates(chosen, written, score, limit, REMASK)
    keys = keys_of(lane, candidates, score, True, BLOCK_W)
    return candidates & (keys >= _cut(keys, k, LOG_W, BLOCK_W))


@triton.jit
def remask_candidates(chosen, written, score, limit, REMASK: tl.constexpr):
    """Lanes among which a step masks again. `written`: before the step; `chosen`: by the step."""
    if REMASK == "wino":
        candidates = written & (score < limit)
    else:
        candidates = written | chosen
    return candidates
