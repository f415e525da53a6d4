"""Device code of `confidence`: one program per needed row, one pass over the vocabulary.

The vocabulary is cut into groups of GROUP consecutive ids (one 16-byte load), the groups are dealt round-robin to LANES lanes:

    id = (tile * LANES + lane) * GROUP + element        one tile = one trip of the loop

Each lane keeps four numbers, updated once a group: its largest logit and the tile where it first saw it, and the running sums
of the softmax and of the entropy ("kl": and of the divergence). Everything else is found after the loop by re-reading a
*column*, the ids of one lane (about V / LANES of them): which element of the group it was, the runner-up inside the winner's
lane, and what is left of a lane whose winner is banned. So banned ids, the runner-up and the ids themselves cost nothing in the
loop. Nor do biases: the loop stops at a tile that holds a biased id, that tile is read as the incomplete last one is and its
elements are compared with every biased id, and the loop goes on after it. What is re-read is biased again.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .reference.confidence import LIMIT, MAX_TEMPERATURE, MIN_TEMPERATURE, PREVIOUS_FLOOR
from .state import ERROR_LOGITS

_LIMIT = tl.constexpr(LIMIT)
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_MAX_TEMPERATURE = tl.constexpr(MAX_TEMPERATURE)
_ERROR = tl.constexpr(ERROR_LOGITS)
_LOG2E = tl.constexpr(math.log2(math.e))
_TWO_LOG2E = tl.constexpr(2 * math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
_FLOOR_LOG2 = tl.constexpr(PREVIOUS_FLOOR * math.log2(math.e))
_NO_TILE = tl.constexpr(2**30)  # above every tile


@triton.jit
def _fmix32(h):
    h ^= h >> 16
    h = tl.mul(h, 0x85EBCA6B, sanitize_overflow=False)
    h ^= h >> 13
    h = tl.mul(h, 0xC2B2AE35, sanitize_overflow=False)
    return h ^ (h >> 16)


@triton.jit
def _noise_key(seed_ptr, noise_ptr, n):
    """Philox words (k0, k1) of output n; reference.noise.row_key."""
    address = noise_ptr + n.to(tl.int64) * 3
    request, position, step = tl.load(address), tl.load(address + 1), tl.load(address + 2)
    k0, k1, _, _ = tl.philox(tl.load(seed_ptr), request, position, step, tl.zeros_like(step))
    return k0, k1


@triton.jit
def _noise_bits(ids, k0, k1):
    """uint32 word of every id; reference.noise.bits."""
    return _fmix32(tl.add(_fmix32(ids.to(tl.uint32) ^ k0), k1, sanitize_overflow=False))


@triton.jit
def _uniform(ids, k0, k1):
    """((bits >> 9) + 0.5) * 2^-23; reference.noise.uniform."""
    # Without a conversion: the bits become the mantissa of 1.x, from which 1 - 2^-24 is subtracted, exactly.
    one_to_two = ((_noise_bits(ids, k0, k1) >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    return one_to_two - 0.999999940395355224609375


@triton.jit
def _gumbel(ids, k0, k1):
    return -tl.log(-tl.log(_uniform(ids, k0, k1)))


@triton.jit
def _cap(x, soft_cap, HAS_SOFT_CAP: tl.constexpr):
    """soft_cap * tanh(x / soft_cap); -inf stays -inf."""
    if HAS_SOFT_CAP:
        # 1 - 2 / (e^(2y) + 1): saturates to +-1 where the exponential overflows or vanishes. Off by 2^-23 at most, absolutely.
        tanh = 1.0 - 2.0 / (tl.exp2(x * tl.div_rn(_TWO_LOG2E, soft_cap)) + 1.0)
        return tl.where(x <= -_LIMIT, float("-inf"), soft_cap * tanh)
    else:
        return x


@triton.jit
def _is_banned(ids, banned_ptr, NUM_BANNED: tl.constexpr):
    banned = ids < 0
    if NUM_BANNED > 0:  # else banned_ptr is None, and even an empty loop is compiled
        for k in range(NUM_BANNED):
            banned |= ids == tl.load(banned_ptr + k)
    return banned


@triton.jit
def _column(lane, LANES: tl.constexpr, GROUP: tl.constexpr, COLUMN: tl.constexpr):
    """[COLUMN, GROUP] ids of one lane, ascending by row."""
    tiles = tl.arange(0, COLUMN)
    return (tiles[:, None] * LANES + lane) * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _add_bias(x, first, offset, biases, V, HAS_BIAS: tl.constexpr):
    """Logits of the ids first + offset with their biases, one after the other."""
    if HAS_BIAS:
        bias_ids_ptr, bias_ptr, num_bias = biases
        for k in range(num_bias):
            biased_id = tl.load(bias_ids_ptr + k)
            if (biased_id >= 0) & (biased_id < V):  # beyond V the load's -inf must stay
                x = tl.where(biased_id.to(tl.int32) - first == offset, x + tl.load(bias_ptr + k), x)
    return x


@triton.jit
def _next_biased_tile(start, biases, V, LANES: tl.constexpr, GROUP: tl.constexpr):
    """The first tile from `start` on that holds a biased id."""
    bias_ids_ptr, _, num_bias = biases
    nearest = tl.full((), _NO_TILE, tl.int32)
    for k in range(num_bias):
        biased_id = tl.load(bias_ids_ptr + k)
        biased_tile = (biased_id // (LANES * GROUP)).to(tl.int32)
        ahead = (biased_id >= 0) & (biased_id < V) & (biased_tile >= start)
        nearest = tl.where(ahead, tl.minimum(nearest, biased_tile), nearest)
    return nearest


@triton.jit
def _load(logits_ptr, ids, biases, V, HAS_BIAS: tl.constexpr):
    x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    return _add_bias(x, 0, ids, biases, V, HAS_BIAS)


@triton.jit
def _first_largest_tile(values, COLUMN: tl.constexpr):
    """Largest of a [COLUMN, GROUP] column and the lowest tile that holds it."""
    per_tile = tl.max(values, axis=1)
    largest = tl.max(per_tile, axis=0)
    return largest, tl.min(tl.where(per_tile == largest, tl.arange(0, COLUMN), COLUMN), axis=0)


@triton.jit
def _lowest_id(ids, chosen, V):
    return tl.min(tl.min(tl.where(chosen, ids, V), axis=1), axis=0)


@triton.jit
def _pivot(best, scale, soft_cap, HAS_SOFT_CAP: tl.constexpr):
    """What exponents are taken relative to: the largest one so far, rounded down to an integer and finite.

    An integer, so that rescaling is exact and no fused rounding can make two pivots disagree; finite, because a lane may hold
    nothing but -inf, and -inf - -inf is NaN. -2e36 is below LIMIT / MIN_TEMPERATURE in units of log2.
    """
    return tl.maximum(tl.floor(_cap(best, soft_cap, HAS_SOFT_CAP) * scale), -2e36)


@triton.jit
def _score(x, ids, sample_scale, k0, k1, soft_cap, HAS_SOFT_CAP: tl.constexpr):
    return tl.fma(_cap(x, soft_cap, HAS_SOFT_CAP), sample_scale, _gumbel(ids, k0, k1))


@triton.jit
def _probability(logit, scale, row_pivot, row_total):
    return tl.minimum(tl.div_rn(tl.exp2(tl.fma(logit, scale, -row_pivot)), row_total), 1.0)  # not above 1 by rounding


@triton.jit
def _store(pointer, n, value):
    if pointer is not None:  # requested
        tl.store(pointer + n, value)


@triton.jit
def _store_row(
    n, values,
    token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr, confidence_ptr, margin_ptr,
    sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
):  # fmt: skip
    """One value to every output that was requested. Pointers one by one: Triton 3.6 takes no tuple that holds a None."""
    _store(token_ptr, n, values[0])
    _store(logit_ptr, n, values[1])
    _store(second_token_ptr, n, values[2])
    _store(second_logit_ptr, n, values[3])
    _store(logsumexp_ptr, n, values[4])
    _store(entropy_ptr, n, values[5])
    _store(kl_ptr, n, values[6])
    _store(confidence_ptr, n, values[7])
    _store(margin_ptr, n, values[8])
    _store(sampled_token_ptr, n, values[9])
    _store(sampled_confidence_ptr, n, values[10])
    _store(query_confidence_ptr, n, values[11])
    _store(error_ptr, n, values[12])


@triton.jit
def _accumulate(
    state, x, before, tile, scales, sampling, elements,
    HAS_SOFT_CAP: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, SAMPLED: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Every lane's state after one more group of logits, x [LANES, GROUP], and of the previous step's, `before`."""
    best, best_tile, pivot, total, energy, divergence, drawn, drawn_tile = state
    scale, soft_cap, before_shift = scales
    draws, sample_scale, k0, k1 = sampling
    largest = tl.max(x, axis=1)
    best_tile = tl.where(largest > best, tile, best_tile)  # strictly: ties stay with the lowest id
    best = tl.maximum(best, largest)
    raised = _pivot(best, scale, soft_cap, HAS_SOFT_CAP)
    exponent = tl.fma(_cap(x, soft_cap, HAS_SOFT_CAP), scale, -raised[:, None])
    weight = tl.exp2(exponent)  # a NaN stays in `total`, although max drops it
    step = pivot - raised
    decay = tl.exp2(step)
    if ENTROPY:
        # Where the exponent is -inf the weight is 0, and so it is at -10000: 0 * -inf would be NaN.
        energy = decay * (energy + step * total) + tl.sum(weight * tl.maximum(exponent, -10000.0), axis=1)
    if KL:
        # log2 of the previous step's probability. A NaN must outlive the floor, to be found in the sum.
        log_before = tl.fma(_cap(before, soft_cap, HAS_SOFT_CAP), scale, -before_shift)
        log_before = tl.maximum(log_before, _FLOOR_LOG2, propagate_nan=tl.PropagateNan.ALL)
        # Differences are summed, not two sums subtracted: they are small where the step changed little.
        change = tl.maximum(exponent, -10000.0) - log_before
        divergence = decay * (divergence + step * total) + tl.sum(weight * change, axis=1)
        # Once infinite, the sum stays so or becomes NaN, whatever weight 0 or decay 0 it meets.
        divergence = tl.where(tl.max(before, axis=1) >= _LIMIT, float("inf"), divergence)
    total = decay * total + tl.sum(weight, axis=1)
    if SAMPLED:
        if draws:
            score = _score(x, tile * (LANES * GROUP) + elements, sample_scale, k0, k1, soft_cap, HAS_SOFT_CAP)
            highest = tl.max(score, axis=1)
            drawn_tile = tl.where(highest > drawn, tile, drawn_tile)
            drawn = tl.maximum(drawn, highest)
    return best, best_tile, raised, total, energy, divergence, drawn, drawn_tile


@triton.jit
def _whole_tiles(
    state, logits_ptr, previous_ptr, start, stop, scales, sampling, elements,
    HAS_SOFT_CAP: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, SAMPLED: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The state after tiles [start, stop). No mask: filling in for masked elements would cost an instruction for every two."""
    for tile in range(start, stop):
        x = tl.load(logits_ptr + tile * (LANES * GROUP) + elements).to(tl.float32)
        before = x
        if KL:
            before = tl.load(previous_ptr + tile * (LANES * GROUP) + elements).to(tl.float32)
        state = _accumulate(state, x, before, tile, scales, sampling, elements, HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, LANES, GROUP)
    return state


@triton.jit
def _one_tile(
    state, logits_ptr, previous_ptr, tile, biases, V, scales, sampling, elements,
    HAS_BIAS: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, SAMPLED: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The state after a tile that is incomplete, empty or biased."""
    if tile * (LANES * GROUP) < V:
        ids = tile * (LANES * GROUP) + elements
        x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        # First ids and offsets apart: the offsets are constants of the machine code, and no register holds the id of an element.
        first = (tile * LANES + tl.arange(0, LANES)[:, None]) * GROUP
        x = _add_bias(x, first, tl.arange(0, GROUP)[None, :], biases, V, HAS_BIAS)
        before = x
        if KL:
            before = tl.load(previous_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        state = _accumulate(state, x, before, tile, scales, sampling, elements, HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, LANES, GROUP)
    return state


# R and the stride of `banned` change with the batch: no recompilation for them. Nor for the number of biases: a loop over them
# that is unrolled takes registers that the tile needs.
@triton.jit(do_not_specialize=["R", "banned_stride", "num_bias"])
def _confidence_kernel(
    logits_ptr, rows_ptr, banned_ptr, temperature_ptr, sample_temperature_ptr, seed_ptr, noise_ptr, query_ptr,
    bias_ids_ptr, bias_ptr, previous_ptr, previous_logsumexp_ptr,
    token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr, confidence_ptr, margin_ptr,
    sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
    row_stride, previous_stride, banned_stride, num_bias, R, V, soft_cap,
    HAS_ROWS: tl.constexpr, NUM_BANNED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr, SECOND: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, SAMPLED: tl.constexpr,
    QUERY: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row = n
    if HAS_ROWS:
        row = tl.load(rows_ptr + n)
        if row == -1:
            _store_row(
                n, (-1, 0.0, -1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1, 0.0, 0.0, 0),
                token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr, confidence_ptr, margin_ptr,
                sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
            )  # fmt: skip
            return
    error = (row < 0) | (row >= R)
    V = tl.where(error, 0, V)  # a row outside the logits is never read
    logits_ptr += row.to(tl.int64) * row_stride
    if NUM_BANNED > 0:
        banned_ptr += n.to(tl.int64) * banned_stride
    # Where an argument is None its place in a tuple is taken by a number that nothing reads, for Triton 3.6.
    biases = (0, 0, 0)
    if HAS_BIAS:
        biases = (bias_ids_ptr + n.to(tl.int64) * num_bias, bias_ptr + n.to(tl.int64) * num_bias, num_bias)
    cap = 0.0
    if HAS_SOFT_CAP:
        cap = soft_cap
    before_logsumexp = 0.0
    if KL:
        before_logsumexp = tl.load(previous_logsumexp_ptr + row, mask=error == 0, other=0.0)
        previous_ptr += row.to(tl.int64) * previous_stride

    temperature = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + n)
        usable = (temperature >= _MIN_TEMPERATURE) & (temperature <= _MAX_TEMPERATURE)
        error |= usable == 0
        temperature = tl.where(usable, temperature, 1.0)
    scale = tl.div_rn(_LOG2E, temperature)  # everything exponential below is in units of log2
    before_shift = before_logsumexp * _LOG2E

    sample_scale = 0.0
    k0 = tl.zeros((), tl.uint32)
    k1 = tl.zeros((), tl.uint32)
    draws = error
    if SAMPLED:
        sample_temperature = tl.load(sample_temperature_ptr + n)
        draws = (sample_temperature >= _MIN_TEMPERATURE) & (sample_temperature <= _MAX_TEMPERATURE)
        error |= (draws | (sample_temperature == 0.0)) == 0
        sample_scale = tl.div_rn(1.0, tl.where(draws, sample_temperature, 1.0))
        k0, k1 = _noise_key(seed_ptr, noise_ptr, n)

    # One pass over the vocabulary.
    lanes = tl.arange(0, LANES)
    elements = lanes[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    best = tl.full((LANES,), float("-inf"), tl.float32)
    best_tile = tl.zeros((LANES,), tl.int32)
    pivot = _pivot(best, scale, cap, HAS_SOFT_CAP)
    total = tl.zeros((LANES,), tl.float32)
    energy = tl.zeros((LANES,), tl.float32)
    divergence = tl.zeros((LANES,), tl.float32)
    drawn = tl.full((LANES,), float("-inf"), tl.float32)
    drawn_tile = tl.zeros((LANES,), tl.int32)
    state = (best, best_tile, pivot, total, energy, divergence, drawn, drawn_tile)
    scales = (scale, cap, before_shift)
    sampling = (draws, sample_scale, k0, k1)
    whole = V // (LANES * GROUP)
    start = 0
    if HAS_BIAS:
        while start * (LANES * GROUP) < V:
            stop = tl.minimum(_next_biased_tile(start, biases, V, LANES, GROUP), whole)
            state = _whole_tiles(
                state, logits_ptr, previous_ptr, start, stop, scales, sampling, elements,
                HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, LANES, GROUP,
            )  # fmt: skip
            state = _one_tile(
                state, logits_ptr, previous_ptr, stop, biases, V, scales, sampling, elements,
                HAS_BIAS, HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, LANES, GROUP,
            )  # fmt: skip
            start = stop + 1
    else:
        state = _whole_tiles(
            state, logits_ptr, previous_ptr, start, whole, scales, sampling, elements,
            HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, LANES, GROUP,
        )  # fmt: skip
        state = _one_tile(
            state, logits_ptr, previous_ptr, whole, biases, V, scales, sampling, elements,
            HAS_BIAS, HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, LANES, GROUP,
        )  # fmt: skip
    best, best_tile, pivot, total, energy, divergence, drawn, drawn_tile = state

    # Merge the lanes' sums.
    row_best = tl.max(best, axis=0)
    row_pivot = _pivot(row_best, scale, cap, HAS_SOFT_CAP)
    step = pivot - row_pivot
    decay = tl.exp2(step)
    row_total = tl.sum(decay * total, axis=0)
    row_energy = 0.0
    if ENTROPY:
        row_energy = tl.sum(decay * (energy + step * total), axis=0)
    row_divergence = 0.0
    if KL:
        row_divergence = tl.sum(decay * (divergence + step * total), axis=0)
    error |= (row_total != row_total) | (row_best >= _LIMIT)

    # A lane that won with a group that holds a banned id is searched again without the banned ids.
    if NUM_BANNED > 0:
        suspect = lanes < 0
        for k in range(NUM_BANNED):
            banned_group = tl.load(banned_ptr + k) // GROUP
            suspect |= best_tile * LANES + lanes == banned_group
            if SAMPLED:
                suspect |= drawn_tile * LANES + lanes == banned_group
        if tl.max(suspect.to(tl.int32), axis=0) > 0:
            for k in range(NUM_BANNED):
                banned_id = tl.load(banned_ptr + k)
                if (banned_id >= 0) & (banned_id < V):
                    lane = (banned_id.to(tl.int32) // GROUP) % LANES
                    ids = _column(lane, LANES, GROUP, COLUMN)
                    x = _load(logits_ptr, ids, biases, V, HAS_BIAS)
                    banned = _is_banned(ids, banned_ptr, NUM_BANNED)
                    value, tile = _first_largest_tile(tl.where(banned, float("-inf"), x), COLUMN)
                    best = tl.where(lanes == lane, value, best)
                    best_tile = tl.where(lanes == lane, tile, best_tile)
                    if SAMPLED:
                        score = _score(x, ids, sample_scale, k0, k1, cap, HAS_SOFT_CAP)
                        value, tile = _first_largest_tile(tl.where(banned, float("-inf"), score), COLUMN)
                        drawn = tl.where(lanes == lane, value, drawn)
                        drawn_tile = tl.where(lanes == lane, tile, drawn_tile)

    # Token: the lowest id of the first lane that holds the largest allowed logit.
    groups = best_tile * LANES + lanes
    none: tl.constexpr = COLUMN * LANES  # a group beyond every vocabulary of this column length
    top = tl.max(best, axis=0)
    error |= (top > -_LIMIT) == 0
    top_lane = tl.min(tl.where(best == top, groups, none), axis=0) % LANES
    ids = _column(top_lane, LANES, GROUP, COLUMN)
    x = _load(logits_ptr, ids, biases, V, HAS_BIAS)
    x = tl.where(_is_banned(ids, banned_ptr, NUM_BANNED), float("-inf"), x)
    token = _lowest_id(ids, x == top, V)

    # Runner-up: the best other lane, or the best other id of the winner's lane.
    second_token = token
    second = top
    if SECOND:
        others = tl.where(lanes == top_lane, float("-inf"), best)
        elsewhere = tl.max(others, axis=0)
        group_ids = tl.min(tl.where(others == elsewhere, groups, none), axis=0) * GROUP + tl.arange(0, GROUP)
        group_x = _load(logits_ptr, group_ids, biases, V, HAS_BIAS)
        group_x = tl.where(_is_banned(group_ids, banned_ptr, NUM_BANNED), float("-inf"), group_x)
        x = tl.where(ids == token, float("-inf"), x)
        second = tl.maximum(elsewhere, tl.max(tl.max(x, axis=1), axis=0))
        elsewhere_id = tl.min(tl.where(group_x == second, group_ids, V), axis=0)
        # Where no other lane has anything, the group is any one, the winner's own not excepted.
        elsewhere_id = tl.where(elsewhere == second, elsewhere_id, V)
        second_token = tl.minimum(_lowest_id(ids, x == second, V), elsewhere_id)
        exists = second > -_LIMIT
        second_token = tl.where(exists, second_token, -1)
        second = tl.where(exists, second, float("-inf"))

    # Draw: recompute the winning group's scores.
    sampled_token = token
    sampled = top
    if SAMPLED:
        if draws:
            highest = tl.max(drawn, axis=0)
            group = tl.min(tl.where(drawn == highest, drawn_tile * LANES + lanes, none), axis=0)
            group_ids = group * GROUP + tl.arange(0, GROUP)
            group_x = _load(logits_ptr, group_ids, biases, V, HAS_BIAS)
            score = _score(group_x, group_ids, sample_scale, k0, k1, cap, HAS_SOFT_CAP)
            score = tl.where(_is_banned(group_ids, banned_ptr, NUM_BANNED), float("-inf"), score)
            sampled_token = tl.min(tl.where(score == tl.max(score, axis=0), group_ids, V), axis=0)
            sampled = tl.max(tl.where(group_ids == sampled_token, group_x, float("-inf")), axis=0)

    query_logit = top
    if QUERY:
        query = tl.load(query_ptr + n)
        in_vocabulary = (query >= 0) & (query < V)
        error |= in_vocabulary == 0
        query_logit = tl.load(logits_ptr + query, mask=in_vocabulary, other=0.0).to(tl.float32)
        query_logit = _add_bias(query_logit, 0, query, biases, V, HAS_BIAS)

    log_total = tl.log2(row_total)
    row_max = _cap(row_best, cap, HAS_SOFT_CAP)
    logsumexp = tl.div_rn(row_max, temperature) + (log_total - tl.fma(row_max, scale, -row_pivot)) * _LN2
    entropy = tl.maximum((log_total - tl.div_rn(row_energy, row_total)) * _LN2, 0.0)  # not below 0 by rounding
    kl = 0.0
    if KL:
        kl = (tl.div_rn(row_divergence, row_total) - log_total) * _LN2
        meaningful = (tl.abs(kl) < float("inf")) & (tl.abs(before_logsumexp) < float("inf"))
        kl = tl.where(meaningful, tl.maximum(kl, 0.0), float("inf"))

    top = _cap(top, cap, HAS_SOFT_CAP)
    second = _cap(second, cap, HAS_SOFT_CAP)
    confidence = _probability(top, scale, row_pivot, row_total)
    margin = confidence - _probability(second, scale, row_pivot, row_total)
    sampled_confidence = _probability(_cap(sampled, cap, HAS_SOFT_CAP), scale, row_pivot, row_total)
    query_confidence = _probability(_cap(query_logit, cap, HAS_SOFT_CAP), scale, row_pivot, row_total)
    if error:
        _store_row(
            n, (0, 0.0, -1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, _ERROR),
            token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr, confidence_ptr, margin_ptr,
            sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
        )  # fmt: skip
    else:
        values = (token, top, second_token, second, logsumexp, entropy, kl, confidence, margin, sampled_token, sampled_confidence,
                  query_confidence, 0)  # fmt: skip
        _store_row(
            n, values,
            token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr, confidence_ptr, margin_ptr,
            sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
        )  # fmt: skip
