"""Device code of `unmask` for regions that are read from memory: which lanes a step writes. Specification:
reference.select.

Lanes are counted from the region's first. The order and the keys are those of select.py. A choice needs the keys of all
lanes only to count them, so the choice keeps 32 bits a lane and finds the last chosen key bit by bit. Only the prefix
of "factor", whose limit depends on a lane's place, needs sorted keys; that sort goes through a buffer in memory. The
chosen lanes are left in `changed_ptr`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row import number_masked_again
from .select import (
    FIXED_BUDGET_MAX,
    FIXED_ENTROPY_MAX,
    INELIGIBLE,
    KEY_MAX,
    KEY_MIN,
    flat_test,
    load_keys,
    no_nan,
    ordered_bits,
    remask_candidates,
    sort_descending,
    to_scaled,
)


@triton.jit
def eligible_lanes(lane, held_token, in_region, allowed_ptr, mask_id, RENOISE: tl.constexpr):
    """Lanes that may be chosen."""
    eligible = in_region
    if not RENOISE:
        eligible = in_region & (held_token == mask_id)
        if allowed_ptr is not None:
            eligible = eligible & (tl.load(allowed_ptr + lane, mask=in_region, other=0) != 0)
    return eligible


@triton.jit
def eligible_at(lane, length, held_token_ptr, allowed_ptr, mask_id, RENOISE: tl.constexpr):
    """Which of the lanes `lane` of the region, which has `length` lanes, may be chosen."""
    inside = (lane >= 0) & (lane < length)
    held_token = tl.load(held_token_ptr + lane, mask=inside, other=0)
    return eligible_lanes(lane, held_token, inside, allowed_ptr, mask_id, RENOISE)


@triton.jit
def _flat_test(
    lane, eligible, value_ptr, score_ptr, PASSES: tl.constexpr, INCLUSIVE: tl.constexpr, VALUE_PER_LANE: tl.constexpr
):  # fmt: skip
    """`flat_test` of what is in memory."""
    passes = eligible & False
    if PASSES == "threshold":
        if VALUE_PER_LANE:
            value = tl.load(value_ptr + lane, mask=eligible, other=0.0)
        else:
            value = tl.load(value_ptr)
        score = tl.load(score_ptr + lane, mask=eligible, other=float("-inf"))
        passes = flat_test(eligible, value, score, PASSES, INCLUSIVE)
    return passes


@triton.jit
def remask_candidates_at(lane, chosen, written, score_ptr, limit_ptr, REMASK: tl.constexpr):
    """`remask_candidates` of what is in memory."""
    score, limit = 0.0, 0.0
    if REMASK == "wino":
        score = tl.load(score_ptr + lane, mask=written, other=float("inf"))
        limit = tl.load(limit_ptr)
    return remask_candidates(chosen, written, score, limit, REMASK)


@triton.jit
def _fits(inside, used, limit, INCLUSIVE: tl.constexpr):
    """Without `used`: are at most `limit` lanes inside? With `used`: do the lanes inside spend no more than `limit`, as
    the entropy rule counts?

    used: None, or fp32 that holds integers and takes half the registers of int64, in which the integers are summed.
    """
    if used is None:
        fits = tl.sum(inside.to(tl.int32)) <= limit
    else:
        prefix = tl.where(inside, used, 0.0)
        # The 49 bits are summed 16 at a time: lanes of int64 would not fit the registers beside `bits` and `used`.
        high = tl.floor(prefix * 2.0**-32)
        rest = prefix - high * 2.0**32
        middle = tl.floor(rest * 2.0**-16)
        low = tl.sum((rest - middle * 2.0**16).to(tl.int32))
        spent = (tl.sum(high.to(tl.int32)).to(tl.int64) << 32) + (tl.sum(middle.to(tl.int32)).to(tl.int64) << 16) + low
        if not INCLUSIVE:
            spent -= tl.max(prefix).to(tl.int64)
        fits = (spent < limit) if INCLUSIVE else (spent <= limit)
    return fits


@triton.jit
def prefix_cut(bits, used, limit, INCLUSIVE: tl.constexpr, LOG_W: tl.constexpr, BLOCK_W: tl.constexpr):
    """The key of the last lane of the longest prefix, in rank order, that fits (`_fits`); above every key if none does.

    bits: of every lane's rank, INELIGIBLE where the lane is no candidate. A longer prefix fits only if a shorter one
    does, so the search finds first the greatest bits whose lanes do not all fit, and then how many of these lanes fit.
    """
    lane = tl.arange(0, BLOCK_W)
    edge = tl.min(bits) * 0 + INELIGIBLE
    for step in range(32):
        trial = edge ^ ((edge * 0 + 1) << (31 - step))
        edge = tl.where(_fits(bits >= trial, used, limit, INCLUSIVE), edge, trial)
    ties = edge * 0
    for step in range(LOG_W):
        trial = ties + (BLOCK_W >> (step + 1))
        ties = tl.where(_fits((bits > edge) | ((bits == edge) & (lane < trial)), used, limit, INCLUSIVE), trial, ties)
    return (edge.to(tl.int64) << 32) | (BLOCK_W - ties).to(tl.int64)


@triton.jit
def best_cut(bits, take, LOG_W: tl.constexpr, BLOCK_W: tl.constexpr):
    """The take-th greatest key; above every key if take is 0 or less."""
    if take == 1:
        top = tl.max(bits)
        lane = tl.min(tl.where(bits == top, tl.arange(0, BLOCK_W), BLOCK_W))
        cut = (top.to(tl.int64) << 32) | (BLOCK_W - 1 - lane).to(tl.int64)
    else:
        cut = prefix_cut(bits, None, tl.maximum(take, 0), False, LOG_W, BLOCK_W)
    return cut


@triton.jit
def bits_of(lane, candidates, rank_ptr, LOWEST: tl.constexpr):
    """The upper 32 bits of `keys_of`, which need no lane."""
    rank = no_nan(tl.load(rank_ptr + lane, mask=candidates, other=0.0))
    if LOWEST:
        rank = -rank
    return tl.where(candidates, ordered_bits(rank), INELIGIBLE)


@triton.jit
def _sort_in_memory(keys_ptr, width, LOG_T: tl.constexpr, BLOCK_T: tl.constexpr):
    """Sort `width` keys, a power of two and at least BLOCK_T, from the greatest to the smallest.

    The sort is bitonic: in registers within a tile, and through memory where a run spans more than one tile.
    """
    index = tl.arange(0, BLOCK_T)
    for begin in range(0, width, BLOCK_T):
        keys = tl.load(keys_ptr + begin + index)
        # Every second run is to ascend: its complements are sorted in its place, from the greatest to the smallest.
        flips = (begin & BLOCK_T) != 0
        keys = sort_descending(tl.where(flips, ~keys, keys), 1, LOG_T, BLOCK_T)
        tl.store(keys_ptr + begin + index, tl.where(flips, ~keys, keys))
    run = 2 * BLOCK_T
    while run <= width:
        distance = run // 2
        while distance >= BLOCK_T:
            tl.debug_barrier()
            for begin in range(0, width // 2, BLOCK_T):
                # Tiles that begin with the lower key of their pairs.
                lower = (begin // distance) * 2 * distance + begin % distance
                first = tl.load(keys_ptr + lower + index)
                second = tl.load(keys_ptr + lower + distance + index)
                descends = (lower & run) == 0
                swaps = (first < second) == descends
                tl.store(keys_ptr + lower + index, tl.where(swaps, second, first))
                tl.store(keys_ptr + lower + distance + index, tl.where(swaps, first, second))
            distance = distance // 2
        tl.debug_barrier()
        for begin in range(0, width, BLOCK_T):
            keys = tl.load(keys_ptr + begin + index)
            flips = (begin & run) != 0
            keys = sort_descending(tl.where(flips, ~keys, keys), LOG_T, LOG_T, BLOCK_T)
            tl.store(keys_ptr + begin + index, tl.where(flips, ~keys, keys))
        run = 2 * run
    tl.debug_barrier()


@triton.jit
def _factor_cut(
    length, n, kmin, fallback, max_unmask,
    held_token_ptr, allowed_ptr, value_ptr, score_ptr, rank_ptr, keys_ptr, mask_id,
    RENOISE: tl.constexpr, BLOCK_W: tl.constexpr, LOG_T: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The key of the last lane that "factor" writes; above every key if it writes none."""
    index = tl.arange(0, BLOCK_T)
    width = length * 0 + BLOCK_T
    while width < length:
        width = 2 * width
    for begin in range(0, width, BLOCK_T):
        lane = begin + index
        eligible = eligible_at(lane, length, held_token_ptr, allowed_ptr, mask_id, RENOISE)
        tl.store(keys_ptr + lane, load_keys(lane, eligible, rank_ptr, False, BLOCK_W))
    tl.debug_barrier()
    _sort_in_memory(keys_ptr, width, LOG_T, BLOCK_T)
    value = tl.load(value_ptr)
    count = n
    for begin in range(0, n, BLOCK_T):
        place = begin + index
        keys = tl.load(keys_ptr + place, mask=place < n, other=0)
        source = BLOCK_W - 1 - (keys & 0xFFFFFFFF).to(tl.int32)
        score = no_nan(tl.load(score_ptr + source, mask=place < n, other=0.0))
        passes = score >= 1.0 - tl.div_rn(value, (place + 2).to(tl.float32))
        count = tl.minimum(count, tl.min(tl.where(passes | (place >= n), n, place)))
    take = tl.where(count >= kmin, count, fallback)
    if max_unmask is not None:
        take = tl.minimum(take, max_unmask)
    return tl.load(keys_ptr + take - 1, mask=take > 0, other=KEY_MAX)


@triton.jit
def choose_in_memory(
    length, n, kmin, fallback, max_unmask,
    held_token_ptr, allowed_ptr, value_ptr, score_ptr, rank_ptr, entropy_ptr, keys_ptr, changed_ptr, mask_id,
    PASSES: tl.constexpr, INCLUSIVE: tl.constexpr, VALUE_PER_LANE: tl.constexpr, RENOISE: tl.constexpr,
    LOG_W: tl.constexpr, BLOCK_W: tl.constexpr, LOG_T: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Mark the chosen lanes. max_unmask may be None; keys_ptr, [BLOCK_W] int64, is for "factor" only."""
    index = tl.arange(0, BLOCK_T)
    all_lanes = tl.arange(0, BLOCK_W)
    kmin = tl.minimum(kmin, n)
    fallback = tl.minimum(fallback, n)
    # 1. How many lanes pass a flat test? If enough do, no order is needed, unless only the best ones may be written.
    count = n * 0
    if PASSES == "threshold":
        for begin in range(0, length, BLOCK_T):
            lane = begin + index
            eligible = eligible_at(lane, length, held_token_ptr, allowed_ptr, mask_id, RENOISE)
            count += tl.sum(
                _flat_test(lane, eligible, value_ptr, score_ptr, PASSES, INCLUSIVE, VALUE_PER_LANE).to(tl.int32)
            )
    enough = count >= kmin
    orders = enough == 0
    # 2. The cut: the key of the last lane that is chosen by its place in the order.
    cut = n.to(tl.int64) * 0 + KEY_MAX
    if PASSES == "factor":
        cut = _factor_cut(
            length, n, kmin, fallback, max_unmask,
            held_token_ptr, allowed_ptr, value_ptr, score_ptr, rank_ptr, keys_ptr, mask_id,
            RENOISE, BLOCK_W, LOG_T, BLOCK_T,
        )  # fmt: skip
    elif PASSES == "entropy":
        candidates = eligible_at(all_lanes, length, held_token_ptr, allowed_ptr, mask_id, RENOISE)
        bits = bits_of(all_lanes, candidates, rank_ptr, False)
        entropy = tl.load(entropy_ptr + all_lanes, mask=bits != INELIGIBLE, other=0.0)
        used = to_scaled(entropy, 0.0, FIXED_ENTROPY_MAX, FIXED_ENTROPY_MAX)
        budget = to_scaled(tl.load(value_ptr), -FIXED_BUDGET_MAX, FIXED_BUDGET_MAX, -FIXED_BUDGET_MAX).to(tl.int64)
        cut = prefix_cut(bits, used, budget, INCLUSIVE, LOG_W, BLOCK_W)
        for begin in range(0, length, BLOCK_T):
            lane = begin + index
            eligible = eligible_at(lane, length, held_token_ptr, allowed_ptr, mask_id, RENOISE)
            count += tl.sum((eligible & (load_keys(lane, eligible, rank_ptr, False, BLOCK_W) >= cut)).to(tl.int32))
        take = tl.where(count >= kmin, count, fallback)
        if max_unmask is not None:
            take = tl.minimum(take, max_unmask)
        if take != count:
            cut = best_cut(bits, take, LOG_W, BLOCK_W)
    else:
        take = fallback
        if max_unmask is not None:
            orders = orders | (count > max_unmask)
            take = tl.minimum(tl.where(enough, count, fallback), max_unmask)
        if orders:
            candidates = eligible_at(all_lanes, length, held_token_ptr, allowed_ptr, mask_id, RENOISE)
            if max_unmask is not None and PASSES == "threshold":
                passes = _flat_test(all_lanes, candidates, value_ptr, score_ptr, PASSES, INCLUSIVE, VALUE_PER_LANE)
                candidates = tl.where(enough, passes, candidates)
            cut = best_cut(bits_of(all_lanes, candidates, rank_ptr, False), take, LOG_W, BLOCK_W)

    # 3. Chosen is what passes a flat test, or lies at or above the cut.
    for begin in range(0, length, BLOCK_T):
        lane = begin + index
        eligible = eligible_at(lane, length, held_token_ptr, allowed_ptr, mask_id, RENOISE)
        above = load_keys(lane, eligible, rank_ptr, False, BLOCK_W) >= cut
        passes = _flat_test(lane, eligible, value_ptr, score_ptr, PASSES, INCLUSIVE, VALUE_PER_LANE) & enough
        if max_unmask is None:
            chosen = passes | (eligible & above)
        else:
            # The name is not `candidates`, which has the shape of `all_lanes`: a loop keeps the shape of a name that it
            # rebinds.
            may_be_chosen = (passes | (eligible & (enough == 0))) if PASSES == "threshold" else eligible
            chosen = may_be_chosen & (above | (passes & (orders == 0)))
        tl.store(changed_ptr + lane, chosen, mask=lane < length)
    tl.debug_barrier()


@triton.jit
def _next_lane(begin, length, held_token_ptr, allowed_ptr, mask_id, ELIGIBLE: tl.constexpr, BLOCK_T: tl.constexpr):
    """The first lane from `begin` on that is eligible (or is not), or `length`."""
    found, tile = length, begin
    while (tile < length) & (found == length):
        lane = tile + tl.arange(0, BLOCK_T)
        eligible = eligible_at(lane, length, held_token_ptr, allowed_ptr, mask_id, False)
        wanted = eligible if ELIGIBLE else eligible == 0
        found = tl.min(tl.where(wanted & (lane < length), lane, length))
        tile += BLOCK_T
    return found


@triton.jit
def _best_between(
    begin, end, held_token_ptr, allowed_ptr, rank_ptr, mask_id, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """The greatest key of an eligible lane in [begin, end), or KEY_MIN."""
    top = end.to(tl.int64) * 0 + KEY_MIN
    for tile in range(begin, end, BLOCK_T):
        lane = tile + tl.arange(0, BLOCK_T)
        eligible = eligible_at(lane, end, held_token_ptr, allowed_ptr, mask_id, False)
        top = tl.maximum(top, tl.max(tl.where(eligible, load_keys(lane, eligible, rank_ptr, False, BLOCK_W), KEY_MIN)))
    return top


@triton.jit
def _count_between(begin, end, held_token_ptr, changed_ptr, mask_id, BLOCK_T: tl.constexpr):
    """Of the lanes in [begin, end): how many are chosen, and how many are masked."""
    chosen, masks = 0, 0
    for tile in range(begin, end, BLOCK_T):
        lane = tile + tl.arange(0, BLOCK_T)
        chosen += tl.sum((tl.load(changed_ptr + lane, mask=lane < end, other=0) != 0).to(tl.int32))
        masks += tl.sum((tl.load(held_token_ptr + lane, mask=lane < end, other=mask_id + 1) == mask_id).to(tl.int32))
    return chosen, masks


@triton.jit
def _lane_of(key, BLOCK_W: tl.constexpr):
    """The lane whose key it is."""
    return BLOCK_W - 1 - (key & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def choose_best_of_runs_in_memory(
    length, run_value, held_token_ptr, allowed_ptr, score_ptr, rank_ptr, changed_ptr, mask_id,
    BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Mark the best lane of every maximal run of adjacent eligible lanes if its score is above run_value."""
    begin = _next_lane(0, length, held_token_ptr, allowed_ptr, mask_id, True, BLOCK_T)
    while begin < length:
        end = _next_lane(begin, length, held_token_ptr, allowed_ptr, mask_id, False, BLOCK_T)
        top = _best_between(begin, end, held_token_ptr, allowed_ptr, rank_ptr, mask_id, BLOCK_W, BLOCK_T)
        best = _lane_of(top, BLOCK_W)
        tl.store(changed_ptr + best, True, mask=no_nan(tl.load(score_ptr + best)) > run_value)
        begin = _next_lane(end, length, held_token_ptr, allowed_ptr, mask_id, True, BLOCK_T)
    tl.debug_barrier()


@triton.jit
def force_in_blocks_in_memory(
    length, block_length, activate_masks, held_token_ptr, allowed_ptr, rank_ptr, changed_ptr, mask_id,
    SCOPE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Mark the best lane of every block that must write although nothing in it was chosen."""
    begin, last = length * 0, length
    if SCOPE == "first":
        first = _next_lane(0, length, held_token_ptr, allowed_ptr, mask_id, True, BLOCK_T)
        begin = first // block_length * block_length
        last = tl.minimum(begin + block_length, length)
    # What precedes the region is finished.
    masks_before = activate_masks
    while begin < last:
        end = tl.minimum(begin + block_length, length)
        top = _best_between(begin, end, held_token_ptr, allowed_ptr, rank_ptr, mask_id, BLOCK_W, BLOCK_T)
        chosen, masks = _count_between(begin, end, held_token_ptr, changed_ptr, mask_id, BLOCK_T)
        forced = (masks_before <= activate_masks) & (chosen == 0) & (top != KEY_MIN)
        # Every warp has read what is chosen in the block before one writes it.
        tl.debug_barrier()
        tl.store(changed_ptr + _lane_of(top, BLOCK_W), True, mask=forced)
        masks_before = masks
        begin = end
    tl.debug_barrier()


@triton.jit
def remask_cut_in_memory(
    length, held_token_ptr, held_step_ptr, changed_ptr, score_ptr, mask_id,
    min_unmask, count, limit_ptr, exiting,
    REMASK: tl.constexpr, LOG_W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The smallest key, lowest scores first, of a lane that the step masks again; above every key if there is none."""
    chosen, masks_left = 0, 0
    for begin in range(0, length, BLOCK_T):
        lane = begin + tl.arange(0, BLOCK_T)
        changed = tl.load(changed_ptr + lane, mask=lane < length, other=0) != 0
        masked = tl.load(held_token_ptr + lane, mask=lane < length, other=mask_id + 1) == mask_id
        chosen += tl.sum(changed.to(tl.int32))
        masks_left += tl.sum((masked & (changed == 0)).to(tl.int32))
    k = number_masked_again(chosen, masks_left != 0, min_unmask, count, REMASK)
    if exiting:
        k = k * 0
    cut = length.to(tl.int64) * 0 + KEY_MAX
    if k > 0:
        lane = tl.arange(0, BLOCK_W)
        changed = tl.load(changed_ptr + lane, mask=lane < length, other=0) != 0
        written = tl.load(held_step_ptr + lane, mask=lane < length, other=-1) >= 0
        candidates = remask_candidates_at(lane, changed, written, score_ptr, limit_ptr, REMASK)
        cut = best_cut(bits_of(lane, candidates, score_ptr, True), k, LOG_W, BLOCK_W)
    return cut
