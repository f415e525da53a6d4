"""Device code of `confidence` after its pass over the vocabulary: which ids the columns' largest logits are, and what
follows them.

A *column* is the ids (tile * COLUMNS + column) * GROUP + element over all tiles and elements. The answers lie in few
columns: in that of the winner, and in a column whose winner is banned. Those are read again, and biased again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..checks.confidence import MAX_BANNED
from .row import _NO_ID, _score

_MAX_BANNED = tl.constexpr(MAX_BANNED)


@triton.jit
def _load_bans(banned_ptr, num_banned, end):
    """The banned ids below `end`, -1 where there is none: as many for every call, because a loop over their number is
    unrolled by the compilers, which takes registers that the tile needs."""
    index = tl.arange(0, _MAX_BANNED)
    bans = tl.load(banned_ptr + index, mask=index < num_banned, other=-1)
    return tl.where((bans >= 0) & (bans < end), bans, -1).to(tl.int32)


@triton.jit
def _is_banned(ids, bans, HAS_BANNED: tl.constexpr):
    is_banned = ids < 0
    if HAS_BANNED:
        is_banned |= tl.max((tl.expand_dims(ids, -1) == bans[2]).to(tl.int32), axis=-1) > 0
    return is_banned


@triton.jit
def _ids_of_column(column, first_tile, COLUMNS: tl.constexpr, GROUP: tl.constexpr, COLUMN_TILES: tl.constexpr):
    """[COLUMN_TILES, GROUP] ids of one column, ascending by row, from a tile on."""
    tiles = first_tile + tl.arange(0, COLUMN_TILES)
    return (tiles[:, None] * COLUMNS + column) * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _add_bias(x, first, offset, biases, end, HAS_BIAS: tl.constexpr):
    """The logits of the ids first + offset with their biases, which are added one after the other."""
    if HAS_BIAS:
        bias_ids_ptr, bias_ptr, num_bias = biases
        for k in range(num_bias):
            biased_id = tl.load(bias_ids_ptr + k)
            if (biased_id >= 0) & (biased_id < end):  # beyond the end the load's -inf must stay
                x = tl.where(biased_id.to(tl.int32) - first == offset, x + tl.load(bias_ptr + k), x)
    return x


@triton.jit
def _load(logits_ptr, ids, biases, end, HAS_BIAS: tl.constexpr):
    x = tl.load(logits_ptr + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
    return _add_bias(x, 0, ids, biases, end, HAS_BIAS)


@triton.jit
def _first_largest_tile(values, first_tile, COLUMN_TILES: tl.constexpr):
    """The largest value of a [COLUMN_TILES, GROUP] column and the lowest tile that holds it."""
    per_tile = tl.max(values, axis=1)
    largest = tl.max(per_tile, axis=0)
    return largest, first_tile + tl.min(tl.where(per_tile == largest, tl.arange(0, COLUMN_TILES), COLUMN_TILES), axis=0)


@triton.jit
def _lowest_id(ids, chosen):
    return tl.min(tl.min(tl.where(chosen, ids, _NO_ID), axis=1), axis=0)


@triton.jit
def _without_banned(
    bests, logits_ptr, bans, biases, first_tile, end, scales, sampling,
    HAS_BIAS: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, SAMPLED: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, COLUMN_TILES: tl.constexpr,
):  # fmt: skip
    """The columns' largest allowed logits and draws: a column that won with a group that holds a banned id is searched
    again."""
    best, best_tile, drawn, drawn_tile = bests
    _, soft_cap, _ = scales
    _, sample_scale, k0, k1 = sampling
    banned_ptr, num_banned, _ = bans
    columns = tl.arange(0, COLUMNS)
    suspect = columns < 0
    for k in range(num_banned):
        banned_group = tl.load(banned_ptr + k) // GROUP
        suspect |= best_tile * COLUMNS + columns == banned_group
        if SAMPLED:
            suspect |= drawn_tile * COLUMNS + columns == banned_group
    if tl.max(suspect.to(tl.int32), axis=0) > 0:
        for k in range(num_banned):
            banned_id = tl.load(banned_ptr + k)
            if (banned_id >= first_tile * (COLUMNS * GROUP)) & (banned_id < end):
                column = (banned_id.to(tl.int32) // GROUP) % COLUMNS
                ids = _ids_of_column(column, first_tile, COLUMNS, GROUP, COLUMN_TILES)
                x = _load(logits_ptr, ids, biases, end, HAS_BIAS)
                is_banned = _is_banned(ids, bans, True)
                value, tile = _first_largest_tile(tl.where(is_banned, float("-inf"), x), first_tile, COLUMN_TILES)
                best = tl.where(columns == column, value, best)
                best_tile = tl.where(columns == column, tile, best_tile)
                if SAMPLED:
                    score = _score(x, ids, sample_scale, k0, k1, soft_cap, HAS_SOFT_CAP)
                    value, tile = _first_largest_tile(
                        tl.where(is_banned, float("-inf"), score), first_tile, COLUMN_TILES
                    )
                    drawn = tl.where(columns == column, value, drawn)
                    drawn_tile = tl.where(columns == column, tile, drawn_tile)
    return best, best_tile, drawn, drawn_tile


@triton.jit
def _choose(
    bests, logits_ptr, bans, biases, first_tile, end, scales, sampling,
    HAS_BANNED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, SECOND: tl.constexpr,
    SAMPLED: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, COLUMN_TILES: tl.constexpr,
):  # fmt: skip
    """Token, runner-up and draw among the allowed ids below `end` of tiles [first_tile, first_tile + COLUMN_TILES),
    with their logits and the draw's score. A choice whose logit (score) is -inf is none, and its id means nothing."""
    best, best_tile, drawn, drawn_tile = bests
    _, soft_cap, _ = scales
    draws, sample_scale, k0, k1 = sampling
    columns = tl.arange(0, COLUMNS)
    # 1. Token: the lowest id of the first column that holds the largest allowed logit.
    groups = best_tile * COLUMNS + columns
    top = tl.max(best, axis=0)
    top_column = tl.min(tl.where(best == top, groups, _NO_ID), axis=0) % COLUMNS
    ids = _ids_of_column(top_column, first_tile, COLUMNS, GROUP, COLUMN_TILES)
    x = _load(logits_ptr, ids, biases, end, HAS_BIAS)
    x = tl.where(_is_banned(ids, bans, HAS_BANNED), float("-inf"), x)
    token = _lowest_id(ids, x == top)

    # 2. Runner-up: the best other column, or the best other id of the winner's column.
    second_token = token
    second = top
    if SECOND:
        others = tl.where(columns == top_column, float("-inf"), best)
        elsewhere = tl.max(others, axis=0)
        group_ids = tl.min(tl.where(others == elsewhere, groups, _NO_ID), axis=0) * GROUP + tl.arange(0, GROUP)
        group_x = _load(logits_ptr, group_ids, biases, end, HAS_BIAS)
        group_x = tl.where(_is_banned(group_ids, bans, HAS_BANNED), float("-inf"), group_x)
        x = tl.where(ids == token, float("-inf"), x)
        second = tl.maximum(elsewhere, tl.max(tl.max(x, axis=1), axis=0))
        elsewhere_id = tl.min(tl.where(group_x == second, group_ids, _NO_ID), axis=0)
        # Where no other column has anything, the group is an arbitrary one, perhaps the winner's own.
        elsewhere_id = tl.where(elsewhere == second, elsewhere_id, _NO_ID)
        second_token = tl.minimum(_lowest_id(ids, x == second), elsewhere_id)

    # 3. Draw: the scores of the winning group are computed again.
    sampled_token = token
    sampled = top
    highest = top
    if SAMPLED:
        if draws:
            highest = tl.max(drawn, axis=0)
            group = tl.min(tl.where(drawn == highest, drawn_tile * COLUMNS + columns, _NO_ID), axis=0)
            group_ids = group * GROUP + tl.arange(0, GROUP)
            group_x = _load(logits_ptr, group_ids, biases, end, HAS_BIAS)
            score = _score(group_x, group_ids, sample_scale, k0, k1, soft_cap, HAS_SOFT_CAP)
            score = tl.where(_is_banned(group_ids, bans, HAS_BANNED), float("-inf"), score)
            sampled_token = tl.min(tl.where(score == tl.max(score, axis=0), group_ids, _NO_ID), axis=0)
            sampled = tl.max(tl.where(group_ids == sampled_token, group_x, float("-inf")), axis=0)
    return token, top, second_token, second, sampled_token, sampled, highest
