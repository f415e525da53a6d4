"""Device code of `linear_confidence`: the head's product and the statistics of its logits, which live in registers
only.

One program computes BLOCK_M rows x one part of the vocabulary, BLOCK_V ids at a time, and leaves that part's partials
to `_merge_kernel`. Row m of a tile depends on row m of `hidden` alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .confidence.merge import (
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
    _field,
)
from .confidence.row import _FAR_BELOW, _NO_ID, _NO_PIVOT, _cap, _noise_key, _pivot, _sampling, _scales, _score


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, hidden_rows, weight_rows, is_row, is_id, H,
    EVEN_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_V] fp32 products; 0 for what is no row or no id."""
    h = tl.arange(0, BLOCK_H)
    logits = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        row_mask, id_mask = is_row[:, None], is_id[:, None]
        if not EVEN_H:
            row_mask, id_mask = row_mask & (start + h < H)[None, :], id_mask & (start + h < H)[None, :]
        hidden = tl.load(hidden_ptr + hidden_rows[:, None] + (start + h)[None, :], mask=row_mask, other=0.0)
        weight = tl.load(weight_ptr + weight_rows[:, None] + (start + h)[None, :], mask=id_mask, other=0.0)
        logits = tl.dot(hidden, weight.T, logits, input_precision="ieee")
    return logits


@triton.jit
def _largest_of(values, ids):
    """Largest of each row of [BLOCK_M, BLOCK_V] and the lowest id that has it."""
    largest = tl.max(values, axis=1)
    return largest, tl.min(tl.where(values == largest[:, None], ids[None, :], _NO_ID), axis=1)


@triton.jit
def _at(values, ids, wanted):
    """The value of each row at the id that it wants, -inf where the tile has not got it."""
    return tl.max(tl.where(ids[None, :] == wanted[:, None], values, float("-inf")), axis=1)


# What changes with the batch recompiles nothing.
@triton.jit(do_not_specialize=["N", "R", "banned_stride"])
def _linear_confidence_kernel(
    hidden_ptr, weight_ptr, rows_ptr, banned_ptr, temperature_ptr, sample_temperature_ptr, seed_ptr, noise_ptr, query_ptr,
    values_ptr, ids_ptr,
    hidden_stride, weight_stride, banned_stride, N, R, V, H, soft_cap,
    HAS_ROWS: tl.constexpr, NUM_BANNED: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    SECOND: tl.constexpr, ENTROPY: tl.constexpr, SAMPLED: tl.constexpr, QUERY: tl.constexpr, EVEN_H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PART_TILES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Row tiles of one part are neighbours in time, so that the part's weights come from memory once.
    part = tl.program_id(1)
    lanes = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.minimum(lanes, N - 1)
    row = n
    if HAS_ROWS:
        row = tl.load(rows_ptr + n)
    is_row = (row >= 0) & (row < R) & (lanes < N)
    hidden_rows = tl.where(is_row, row, 0).to(tl.int64) * hidden_stride
    _, scale, _ = _scales(n, temperature_ptr, HAS_TEMPERATURE)
    scale += tl.zeros((BLOCK_M,), tl.float32)
    draws, sample_scale, _ = _sampling(n, sample_temperature_ptr, SAMPLED)
    draws &= is_row
    any_draws = tl.max(draws.to(tl.int32), axis=0) > 0
    k0 = tl.zeros((BLOCK_M,), tl.uint32)
    k1 = tl.zeros((BLOCK_M,), tl.uint32)
    if SAMPLED:
        k0, k1 = _noise_key(seed_ptr, noise_ptr, n)
    query = n.to(tl.int64)
    if QUERY:
        query = tl.load(query_ptr + n)
    cap = 0.0
    if HAS_SOFT_CAP:
        cap = soft_cap

    nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    no_id = tl.full((BLOCK_M,), _NO_ID, tl.int32)
    pivot, total, energy, best = tl.full((BLOCK_M,), _NO_PIVOT, tl.float32), zeros, zeros, nothing
    top, token, second, second_token = nothing, no_id, nothing, no_id
    drawn, sampled, sampled_token, query_logit = nothing, nothing, no_id, nothing

    first = part * PART_TILES
    last = tl.minimum(first + PART_TILES, (V + BLOCK_V - 1) // BLOCK_V)
    # A tile of rows that need nothing reads nothing.
    last = tl.where(tl.max(is_row.to(tl.int32), axis=0) > 0, last, first)
    for tile in range(first, last):
        ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        weight_rows = ids.to(tl.int64) * weight_stride
        x = _logits(
            hidden_ptr, weight_ptr, hidden_rows, weight_rows, is_row, ids < V, H, EVEN_H, BLOCK_M, BLOCK_V, BLOCK_H
        )
        x = tl.where((ids < V)[None, :], x, float("-inf"))

        # The sums of all ids, as in `confidence`, a row at a time instead of a lane.
        largest = tl.max(x, axis=1)
        best = tl.maximum(best, largest)
        raised = tl.maximum(pivot, _pivot(largest, scale, cap, HAS_SOFT_CAP))
        exponent = tl.fma(_cap(x, cap, HAS_SOFT_CAP), scale[:, None], -raised[:, None])
        weight = tl.exp2(exponent)
        step = tl.maximum(pivot - raised, _FAR_BELOW)
        decay = tl.exp2(step)
        if ENTROPY:
            energy = decay * (energy + step * total) + tl.sum(weight * tl.maximum(exponent, _FAR_BELOW), axis=1)
        total = decay * total + tl.sum(weight, axis=1)
        pivot = raised
        if QUERY:
            query_logit = tl.maximum(query_logit, _at(x, ids, query))

        # The choices among the allowed ones. Later tiles have higher ids, so ties stay with what is there.
        allowed = x
        if NUM_BANNED > 0:
            for k in range(NUM_BANNED):
                banned = tl.load(banned_ptr + n.to(tl.int64) * banned_stride + k)
                here = (banned >= tile * BLOCK_V) & (banned < (tile + 1) * BLOCK_V)
                if tl.max(here.to(tl.int32), axis=0) > 0:
                    allowed = tl.where(ids[None, :] == banned[:, None], float("-inf"), allowed)
        tile_top, tile_token = _largest_of(allowed, ids)
        if SECOND:
            others = tl.where(ids[None, :] == tile_token[:, None], float("-inf"), allowed)
            tile_second, tile_second_token = _largest_of(others, ids)
            # Either the tile's best passes the best so far, which may stay ahead of the tile's second, or it does not.
            passes, stays = tile_top > top, top >= tile_second
            beaten = tl.where(stays, top, tile_second)
            beaten_token = tl.where(stays, token, tile_second_token)
            second_token = tl.where(passes, beaten_token, tl.where(tile_top > second, tile_token, second_token))
            second = tl.where(passes, beaten, tl.where(tile_top > second, tile_top, second))
        token = tl.where(tile_top > top, tile_token, token)
        top = tl.maximum(top, tile_top)
        if SAMPLED:
            if any_draws:
                score = _score(x, ids[None, :], sample_scale[:, None], k0[:, None], k1[:, None], cap, HAS_SOFT_CAP)
                highest, candidate = _largest_of(tl.where(allowed > float("-inf"), score, float("-inf")), ids)
                sampled = tl.where(highest > drawn, _at(x, ids, candidate), sampled)
                sampled_token = tl.where(highest > drawn, candidate, sampled_token)
                drawn = tl.maximum(drawn, highest)

    written = lanes < N
    tl.store(_field(values_ptr, n, _PIVOT, part, _VALUES, PARTS), pivot, mask=written)
    tl.store(_field(values_ptr, n, _TOTAL, part, _VALUES, PARTS), total, mask=written)
    tl.store(_field(values_ptr, n, _LARGEST, part, _VALUES, PARTS), best, mask=written)
    tl.store(_field(values_ptr, n, _TOP, part, _VALUES, PARTS), top, mask=written)
    tl.store(_field(ids_ptr, n, _TOKEN, part, _IDS, PARTS), token, mask=written)
    if ENTROPY:
        tl.store(_field(values_ptr, n, _ENERGY, part, _VALUES, PARTS), energy, mask=written)
    if SECOND:
        tl.store(_field(values_ptr, n, _SECOND, part, _VALUES, PARTS), second, mask=written)
        tl.store(_field(ids_ptr, n, _SECOND_TOKEN, part, _IDS, PARTS), second_token, mask=written)
    if SAMPLED:
        tl.store(_field(values_ptr, n, _DRAWN, part, _VALUES, PARTS), drawn, mask=written)
        tl.store(_field(values_ptr, n, _SAMPLED, part, _VALUES, PARTS), sampled, mask=written)
        tl.store(_field(ids_ptr, n, _SAMPLED_TOKEN, part, _IDS, PARTS), sampled_token, mask=written)
    if QUERY:
        tl.store(_field(values_ptr, n, _QUERY, part, _VALUES, PARTS), query_logit, mask=written)
