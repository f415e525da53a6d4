"""Device code of `confidence`: one pass over the vocabulary of each needed row, by one program for the whole row or by
one for every part of it.

The vocabulary is cut into groups of GROUP consecutive ids (one 16-byte load). The groups are dealt round-robin to
COLUMNS columns, and PART_TILES tiles make a part:

    id = (tile * COLUMNS + column) * GROUP + element        one tile = one trip of the loop

Each column keeps its largest logit and the tile where that logit came first, and the running sums of the softmax and of
the entropy (with "kl", of the divergence too). Everything else is found after the loop by reading a column again: which
element of its group the largest logit is, the runner-up inside the winner's column, and what is left of a column whose
winner is banned. So banned ids, the runner-up and the ids themselves cost nothing in the loop. Biases cost nothing
there either: the loop stops at a tile that holds a biased id, that tile is read as the incomplete last one is and its
elements are compared with every biased id, and the loop goes on after it.

Sums start afresh in every part, and the sums of a part are reduced over the columns (`_sums_of_columns`) before they
meet those of another part (`_merge_sums`). A row therefore has the same bits whether one program reads all its parts
(many rows) or each part has a program (few rows, SPLIT). Largest logits are exact and go on from part to part.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..checks.confidence import PREVIOUS_FLOOR
from .choice import _add_bias, _choose
from .merge import (
    _DIVERGENCE,
    _DRAWN,
    _ENERGY,
    _IDS,
    _LARGEST,
    _PIVOT,
    _QUERY,
    _SAMPLED,
    _SAMPLED_TOKEN,
    _SECOND,
    _SECOND_TOKEN,
    _TOKEN,
    _TOP,
    _TOTAL,
    _VALUES,
    ROW_POINTERS,
    _field,
    _store_row,
)
from .row import (
    _ERROR,
    _FAR_BELOW,
    _LIMIT,
    _LOG2E,
    _NO_ID,
    _NO_PIVOT,
    _cap,
    _finish,
    _merge_sums,
    _noise_key,
    _pivot,
    _sampling,
    _scales,
    _score,
    _sums_of_columns,
)

_FLOOR_LOG2 = tl.constexpr(PREVIOUS_FLOOR * math.log2(math.e))


@triton.jit
def _next_biased_tile(start, biases, end, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The first tile from `start` on that holds a biased id below `end`."""
    bias_ids_ptr, _, num_bias = biases
    nearest = tl.full((), _NO_ID, tl.int32)
    for k in range(num_bias):
        biased_id = tl.load(bias_ids_ptr + k)
        biased_tile = (biased_id // (COLUMNS * GROUP)).to(tl.int32)
        ahead = (biased_id >= 0) & (biased_id < end) & (biased_tile >= start)
        nearest = tl.where(ahead, tl.minimum(nearest, biased_tile), nearest)
    return nearest


@triton.jit
def _accumulate(
    state, x, before, tile, scales, sampling, elements,
    HAS_SOFT_CAP: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, SAMPLED: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Every column's state after one more group of logits, x [COLUMNS, GROUP], and of the previous step's, `before`."""
    best, best_tile, drawn, drawn_tile, pivot, total, energy, divergence = state
    scale, soft_cap, before_shift = scales
    draws, sample_scale, k0, k1 = sampling
    largest = tl.max(x, axis=1)
    best_tile = tl.where(largest > best, tile, best_tile)  # strictly: ties stay with the lowest id
    best = tl.maximum(best, largest)
    raised = tl.maximum(pivot, _pivot(largest, scale, soft_cap, HAS_SOFT_CAP))
    exponent = tl.fma(_cap(x, soft_cap, HAS_SOFT_CAP), scale, -raised[:, None])
    weight = tl.exp2(exponent)  # a NaN stays in `total`, although max drops it
    step = pivot - raised
    decay = tl.exp2(step)
    if ENTROPY:
        energy = decay * (energy + step * total) + tl.sum(weight * tl.maximum(exponent, _FAR_BELOW), axis=1)
    if KL:
        # log2 of the previous step's probability. A NaN must outlive the floor, to be found in the sum.
        log_before = tl.fma(_cap(before, soft_cap, HAS_SOFT_CAP), scale, -before_shift)
        log_before = tl.maximum(log_before, _FLOOR_LOG2, propagate_nan=tl.PropagateNan.ALL)
        # Differences are summed, not two sums subtracted: they are small where the step changed little.
        change = tl.maximum(exponent, _FAR_BELOW) - log_before
        divergence = decay * (divergence + step * total) + tl.sum(weight * change, axis=1)
        # Once infinite, the sum stays so or becomes NaN, whatever weight 0 or decay 0 it meets.
        divergence = tl.where(tl.max(before, axis=1) >= _LIMIT, float("inf"), divergence)
    total = decay * total + tl.sum(weight, axis=1)
    if SAMPLED:
        if draws:
            score = _score(x, tile * (COLUMNS * GROUP) + elements, sample_scale, k0, k1, soft_cap, HAS_SOFT_CAP)
            highest = tl.max(score, axis=1)
            drawn_tile = tl.where(highest > drawn, tile, drawn_tile)
            drawn = tl.maximum(drawn, highest)
    return best, best_tile, drawn, drawn_tile, raised, total, energy, divergence


@triton.jit
def _whole_tiles(
    state, logits_ptr, previous_ptr, start, stop, scales, sampling, elements,
    HAS_SOFT_CAP: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, SAMPLED: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The state after the tiles [start, stop), which are read without a mask: filling in for masked elements would cost
    an instruction for every two."""
    for tile in range(start, stop):
        x = tl.load(logits_ptr + tile * (COLUMNS * GROUP) + elements).to(tl.float32)
        before = x
        if KL:
            before = tl.load(previous_ptr + tile * (COLUMNS * GROUP) + elements).to(tl.float32)
        state = _accumulate(
            state, x, before, tile, scales, sampling, elements, HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, COLUMNS, GROUP
        )
    return state


@triton.jit
def _one_tile(
    state, logits_ptr, previous_ptr, tile, biases, end, scales, sampling, elements,
    HAS_BIAS: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, SAMPLED: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The state after a tile that is incomplete, empty or biased."""
    if tile * (COLUMNS * GROUP) < end:
        ids = tile * (COLUMNS * GROUP) + elements
        x = tl.load(logits_ptr + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
        # First ids and offsets are kept apart: the offsets are constants of the machine code, and no register holds the
        # id of an element.
        first = (tile * COLUMNS + tl.arange(0, COLUMNS)[:, None]) * GROUP
        x = _add_bias(x, first, tl.arange(0, GROUP)[None, :], biases, end, HAS_BIAS)
        before = x
        if KL:
            before = tl.load(previous_ptr + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
        state = _accumulate(
            state, x, before, tile, scales, sampling, elements, HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, COLUMNS, GROUP
        )
    return state


@triton.jit
def _part(
    bests, logits_ptr, previous_ptr, part, biases, V, scales, sampling, elements,
    LAST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr,
    SAMPLED: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, PART_TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The columns' largest logits and draws after one more part, and the part's own sums: pivot, total, energy,
    divergence.

    LAST says that this may be the last part, whose last tile may be incomplete.
    """
    # 1. Every column reads its ids of the part.
    best, best_tile, drawn, drawn_tile = bests
    zeros = tl.zeros((COLUMNS,), tl.float32)
    state = (best, best_tile, drawn, drawn_tile, tl.full((COLUMNS,), _NO_PIVOT, tl.float32), zeros, zeros, zeros)
    start = part * PART_TILES
    end = tl.minimum((start + PART_TILES) * (COLUMNS * GROUP), V)
    whole = end // (COLUMNS * GROUP)
    if HAS_BIAS:
        while start * (COLUMNS * GROUP) < end:
            stop = tl.minimum(_next_biased_tile(start, biases, end, COLUMNS, GROUP), whole)
            state = _whole_tiles(
                state, logits_ptr, previous_ptr, start, stop, scales, sampling, elements,
                HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, COLUMNS, GROUP,
            )  # fmt: skip
            state = _one_tile(
                state, logits_ptr, previous_ptr, stop, biases, end, scales, sampling, elements,
                HAS_BIAS, HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, COLUMNS, GROUP,
            )  # fmt: skip
            start = stop + 1
    else:
        state = _whole_tiles(
            state, logits_ptr, previous_ptr, start, whole, scales, sampling, elements,
            HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, COLUMNS, GROUP,
        )  # fmt: skip
        if LAST:
            state = _one_tile(
                state, logits_ptr, previous_ptr, whole, biases, end, scales, sampling, elements,
                HAS_BIAS, HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, COLUMNS, GROUP,
            )  # fmt: skip

    # 2. The columns' sums become the part's.
    best, best_tile, drawn, drawn_tile, pivot, total, energy, divergence = state
    sums = _sums_of_columns(pivot, total, energy, divergence, ENTROPY, KL, COLUMNS, WARPS)
    return (best, best_tile, drawn, drawn_tile), sums


# R and the strides of `banned` and `seed` change with the batch, and nothing is compiled again for them. Nor is
# anything for the numbers of banned ids and biases: a loop over them that is unrolled takes registers that the tile
# needs.
@triton.jit(
    do_not_specialize=("R", "banned_stride", "seed_stride", "num_banned", "num_bias"),
    do_not_specialize_on_alignment=ROW_POINTERS,
)
def _confidence_kernel(
    logits_ptr, rows_ptr, banned_ptr, temperature_ptr, sample_temperature_ptr, seed_ptr, noise_ptr, query_ptr,
    bias_ids_ptr, bias_ptr, previous_ptr, previous_logsumexp_ptr,
    token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr, confidence_ptr,
    margin_ptr, sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
    values_ptr, ids_ptr,
    row_stride, previous_stride, banned_stride, seed_stride, num_banned, num_bias, R, V, soft_cap,
    HAS_ROWS: tl.constexpr, HAS_BANNED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr, SECOND: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, SAMPLED: tl.constexpr,
    QUERY: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, COLUMN_TILES: tl.constexpr, PART_TILES: tl.constexpr,
    PARTS: tl.constexpr, LOG2_SLOTS: tl.constexpr, SPLIT: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The outputs of a row, in a grid of (N,). With SPLIT the grid is (N, PARTS), a program leaves the partials of a
    part to `_merge_kernel`, and the pointers to the outputs are None."""
    # 1. The row, and what it is told.
    n = tl.program_id(0)
    row = n
    if HAS_ROWS:
        row = tl.load(rows_ptr + n)
        if row == -1:
            if not SPLIT:
                _store_row(
                    n, (-1, 0.0, -1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1, 0.0, 0.0, 0),
                    token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr,
                    confidence_ptr, margin_ptr, sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr,
                    error_ptr,
                )  # fmt: skip
            return
    error = (row < 0) | (row >= R)
    V = tl.where(error, 0, V)  # a row outside the logits is never read
    logits_ptr += row.to(tl.int64) * row_stride
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
    # Everything exponential is in units of log2.
    temperature, scale, bad = _scales(n, temperature_ptr, HAS_TEMPERATURE)
    error |= bad
    draws, sample_scale, bad = _sampling(n, sample_temperature_ptr, SAMPLED)
    error |= bad
    k0 = tl.zeros((), tl.uint32)
    k1 = tl.zeros((), tl.uint32)
    if SAMPLED:
        k0, k1 = _noise_key(seed_ptr, seed_stride, noise_ptr, n)

    # 2. One pass over the vocabulary, part by part.
    scales = (scale, cap, before_logsumexp * _LOG2E)
    sampling = (draws, sample_scale, k0, k1)
    elements = tl.arange(0, COLUMNS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    nothing = tl.full((COLUMNS,), float("-inf"), tl.float32)
    first_tile = 0
    end = V
    if SPLIT:
        part = tl.program_id(1)
        first_tile = part * PART_TILES
        end = tl.minimum((first_tile + PART_TILES) * (COLUMNS * GROUP), V)
        tiles = tl.zeros((COLUMNS,), tl.int32) + first_tile
        bests = (nothing, tiles, nothing, tiles)
        bests, sums = _part(
            bests, logits_ptr, previous_ptr, part, biases, V, scales, sampling, elements,
            True, HAS_BIAS, HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, COLUMNS, GROUP, PART_TILES, WARPS,
        )  # fmt: skip
        row_pivot, row_total, row_energy, row_divergence = sums
    else:
        tiles = tl.zeros((COLUMNS,), tl.int32)
        bests = (nothing, tiles, nothing, tiles)
        slot = tl.arange(0, 1 << LOG2_SLOTS)
        pivots = tl.full((1 << LOG2_SLOTS,), _NO_PIVOT, tl.float32)
        totals = tl.zeros((1 << LOG2_SLOTS,), tl.float32)
        energies, divergences = totals, totals
        # Only the last part can have an incomplete tile, but every part can have biased ones. Without biases the last
        # part is read after the loop, so that the loop over whole tiles is all that the parts' loop loads.
        left_out: tl.constexpr = 0 if HAS_BIAS else 1
        for part in range(PARTS - left_out):
            bests, sums = _part(
                bests, logits_ptr, previous_ptr, part, biases, V, scales, sampling, elements,
                HAS_BIAS, HAS_BIAS, HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, COLUMNS, GROUP, PART_TILES, WARPS,
            )  # fmt: skip
            pivots = tl.where(slot == part, sums[0], pivots)
            totals = tl.where(slot == part, sums[1], totals)
            energies = tl.where(slot == part, sums[2], energies)
            divergences = tl.where(slot == part, sums[3], divergences)
        if not HAS_BIAS:
            bests, sums = _part(
                bests, logits_ptr, previous_ptr, PARTS - 1, biases, V, scales, sampling, elements,
                True, HAS_BIAS, HAS_SOFT_CAP, ENTROPY, KL, SAMPLED, COLUMNS, GROUP, PART_TILES, WARPS,
            )  # fmt: skip
            pivots = tl.where(slot == PARTS - 1, sums[0], pivots)
            totals = tl.where(slot == PARTS - 1, sums[1], totals)
            energies = tl.where(slot == PARTS - 1, sums[2], energies)
            divergences = tl.where(slot == PARTS - 1, sums[3], divergences)
        row_pivot, row_total, row_energy, row_divergence = _merge_sums(
            pivots, totals, energies, divergences, LOG2_SLOTS, ENTROPY, KL
        )  # fmt: skip

    # 3. The choices among the ids that are allowed.
    if HAS_BANNED:
        banned_ptr += n.to(tl.int64) * banned_stride
    row_best, token, top, second_token, second, sampled_token, sampled, drawn = _choose(
        bests, logits_ptr, banned_ptr, num_banned, biases, first_tile, end, scales, sampling,
        HAS_BANNED, HAS_BIAS, HAS_SOFT_CAP, SECOND, SAMPLED, COLUMNS, GROUP, COLUMN_TILES, WARPS,
    )  # fmt: skip
    query_logit = top
    if QUERY:
        query = tl.load(query_ptr + n)
        error |= ((query >= 0) & (query < V)) == 0
        in_part = (query >= first_tile * (COLUMNS * GROUP)) & (query < end)
        query_logit = tl.load(logits_ptr + query, mask=in_part, other=float("-inf")).to(tl.float32)
        query_logit = _add_bias(query_logit, 0, query, biases, end, HAS_BIAS)
        query_logit = tl.where(in_part, query_logit, float("-inf"))

    # 4. A part's partials, or the outputs of the row.
    if SPLIT:
        part = tl.program_id(1)
        tl.store(_field(values_ptr, n, _PIVOT, part, _VALUES, PARTS), row_pivot)
        tl.store(_field(values_ptr, n, _TOTAL, part, _VALUES, PARTS), row_total)
        tl.store(_field(values_ptr, n, _LARGEST, part, _VALUES, PARTS), row_best)
        tl.store(_field(values_ptr, n, _TOP, part, _VALUES, PARTS), top)
        tl.store(_field(ids_ptr, n, _TOKEN, part, _IDS, PARTS), token)
        if ENTROPY:
            tl.store(_field(values_ptr, n, _ENERGY, part, _VALUES, PARTS), row_energy)
        if KL:
            tl.store(_field(values_ptr, n, _DIVERGENCE, part, _VALUES, PARTS), row_divergence)
        if SECOND:
            tl.store(_field(values_ptr, n, _SECOND, part, _VALUES, PARTS), second)
            tl.store(_field(ids_ptr, n, _SECOND_TOKEN, part, _IDS, PARTS), second_token)
        if SAMPLED:
            tl.store(_field(values_ptr, n, _DRAWN, part, _VALUES, PARTS), drawn)
            tl.store(_field(values_ptr, n, _SAMPLED, part, _VALUES, PARTS), sampled)
            tl.store(_field(ids_ptr, n, _SAMPLED_TOKEN, part, _IDS, PARTS), sampled_token)
        if QUERY:
            tl.store(_field(values_ptr, n, _QUERY, part, _VALUES, PARTS), query_logit)
        return

    if SECOND:
        exists = second > -_LIMIT
        second_token = tl.where(exists, second_token, -1)
        second = tl.where(exists, second, float("-inf"))
    error |= (row_total != row_total) | (row_best >= _LIMIT) | ((top > -_LIMIT) == 0)
    if error:
        _store_row(
            n, (0, 0.0, -1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, _ERROR),
            token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr,
            confidence_ptr, margin_ptr, sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
        )  # fmt: skip
    else:
        merged = (row_pivot, row_total, row_energy, row_divergence, row_best)
        choices = (token, top, second_token, second, sampled_token, sampled, query_logit)
        values = _finish(merged, choices, temperature, scale, before_logsumexp, cap, HAS_SOFT_CAP, KL)
        _store_row(
            n, values,
            token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr,
            confidence_ptr, margin_ptr, sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
        )  # fmt: skip
