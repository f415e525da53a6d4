"""Device code of `confidence` after its pass over the vocabulary: which ids the columns' largest logits are, and what
follows them.

A *column* is the ids (tile * COLUMNS + column) * GROUP + element over all tiles and elements, and a *group* is those of
one tile. The answers lie in few columns: in that of the winner, in the group that won the best other column, in that of
the draw, and, where one of them holds a banned id, in the columns of the banned ids. Those are read again, and biased
again.

What is chosen by its value, and among equals by its lowest number, is one int64 (`_key`), and all that is chosen of the
columns is found by one reduction over them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..checks.confidence import MAX_BANNED
from ..unmask.select import KEY_MIN, ordered_bits
from .row import _by_warp, _score

_MAX_BANNED = tl.constexpr(MAX_BANNED)
_NUMBERS = tl.constexpr(2**31 - 1)


@triton.jit
def _key(value, number):
    """int64 that is greater for a greater value (-0.0 is 0.0), and for equal values greater for the lower number, which
    is not negative."""
    return (ordered_bits(value).to(tl.int64) << 32) | (number ^ _NUMBERS)


@triton.jit
def _value_of(key):
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _number_of(key):
    return (key & _NUMBERS).to(tl.int32) ^ _NUMBERS


@triton.jit
def _load_bans(banned_ptr, num_banned, begin, end):
    """The banned ids in [begin, end), all read at once; -1 where there is none."""
    index = tl.arange(0, _MAX_BANNED)
    banned = tl.load(banned_ptr + index, mask=index < num_banned, other=-1)
    return tl.where((banned >= begin) & (banned < end), banned, -1).to(tl.int32)


@triton.jit
def _nth(banned, k):
    """The k-th banned id. The compilers do not unroll a loop that holds a reduction: unrolled, a loop over the banned
    ids takes registers that the tile needs."""
    return tl.max(tl.where(tl.arange(0, _MAX_BANNED) == k, banned, -1), axis=0)


@triton.jit
def _is_banned(ids, bans):
    banned, num_banned = bans
    is_banned = ids < 0
    for k in range(num_banned):
        is_banned |= ids == _nth(banned, k)
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
def _best_group(values, ids, GROUP: tl.constexpr):
    """The key of the first group of a column that holds its largest value."""
    return tl.max(tl.max(_key(values, ids // GROUP), axis=1), axis=0)


@triton.jit
def _without_banned(
    keys, draw_keys, logits_ptr, bans, biases, first_tile, end, scales, sampling,
    HAS_BIAS: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, SAMPLED: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, COLUMN_TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The keys of the columns' allowed logits and draws: every column that holds a banned id is searched again."""
    _, soft_cap, _ = scales
    _, sample_scale, k0, k1 = sampling
    banned, num_banned = bans
    columns = _by_warp(tl.arange(0, COLUMNS), COLUMNS, WARPS)
    for k in range(num_banned):
        banned_id = _nth(banned, k)
        if banned_id >= 0:
            column = (banned_id // GROUP) % COLUMNS
            ids = _ids_of_column(column, first_tile, COLUMNS, GROUP, COLUMN_TILES)
            x = _load(logits_ptr, ids, biases, end, HAS_BIAS)
            is_banned = _is_banned(ids, bans)
            keys = tl.where(columns == column, _best_group(tl.where(is_banned, float("-inf"), x), ids, GROUP), keys)
            if SAMPLED:
                score = _score(x, ids, sample_scale, k0, k1, soft_cap, HAS_SOFT_CAP)
                score = tl.where(is_banned, float("-inf"), score)
                draw_keys = tl.where(columns == column, _best_group(score, ids, GROUP), draw_keys)
    return keys, draw_keys


@triton.jit
def _largest_two(first, second, other_first, other_second):
    return tl.maximum(first, other_first), tl.maximum(tl.minimum(first, other_first), tl.maximum(second, other_second))


@triton.jit
def _largest_two_and_one(first, second, third, other_first, other_second, other_third):
    return (
        tl.maximum(first, other_first),
        tl.maximum(tl.minimum(first, other_first), tl.maximum(second, other_second)),
        tl.maximum(third, other_third),
    )


@triton.jit
def _largest_by_warp(keys):
    return tl.max(tl.max(keys, axis=0), axis=1)


@triton.jit
def _best_columns(keys, draw_keys, SECOND: tl.constexpr, SAMPLED: tl.constexpr):
    """The keys of the best column, of the best other one and of the best draw, of those of all columns."""
    top = _largest_by_warp(keys)
    second, draw = top, top
    if SECOND:
        second = _largest_by_warp(tl.where(keys == top[None, :, None], KEY_MIN, keys))
    if SAMPLED:
        draw = _largest_by_warp(draw_keys)
    if SECOND and SAMPLED:
        top, second, draw = tl.reduce((top, second, draw), 0, _largest_two_and_one)
    elif SECOND:
        top, second = tl.reduce((top, second), 0, _largest_two)
        draw = top
    else:
        top = tl.max(top, axis=0)
        second = top
        draw = tl.max(draw, axis=0) if SAMPLED else top
    return top, second, draw


@triton.jit
def _choose(
    bests, logits_ptr, banned_ptr, num_banned, biases, first_tile, end, scales, sampling,
    HAS_BANNED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, SECOND: tl.constexpr,
    SAMPLED: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, COLUMN_TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The largest logit of all ids, and token, runner-up and draw among the allowed ids below `end` of tiles
    [first_tile, first_tile + COLUMN_TILES), with their logits and the draw's score. A choice whose logit (score) is
    -inf is none, and its id means nothing."""
    _, soft_cap, _ = scales
    draws, sample_scale, k0, k1 = sampling
    # 1. The columns and groups that hold the answers. A banned id in one of them could have hidden another: then all
    # columns with banned ids are searched again.
    bans = (0, 0)  # nothing reads them where nothing is banned
    if HAS_BANNED:
        bans = (_load_bans(banned_ptr, num_banned, first_tile * (COLUMNS * GROUP), end), num_banned)
    best, best_tile, drawn, drawn_tile = bests
    columns = tl.arange(0, COLUMNS)
    keys = _by_warp(_key(best, best_tile * COLUMNS + columns), COLUMNS, WARPS)
    draw_keys = keys
    if SAMPLED:
        draw_keys = _by_warp(_key(drawn, drawn_tile * COLUMNS + columns), COLUMNS, WARPS)
    top_key, second_key, drawn_key = _best_columns(keys, draw_keys, SECOND, SAMPLED)
    largest = _value_of(top_key)
    searches = False
    if HAS_BANNED:
        banned, _ = bans
        banned_group = banned // GROUP
        suspect = banned_group % COLUMNS == _number_of(top_key) % COLUMNS
        if SECOND:
            suspect |= banned_group == _number_of(second_key)
        if SAMPLED:
            suspect |= banned_group == tl.where(draws, _number_of(drawn_key), -1)
        searches = tl.max((suspect & (banned >= 0)).to(tl.int32), axis=0) > 0
        if searches:
            keys, draw_keys = _without_banned(
                keys, draw_keys, logits_ptr, bans, biases, first_tile, end, scales, sampling,
                HAS_BIAS, HAS_SOFT_CAP, SAMPLED, COLUMNS, GROUP, COLUMN_TILES, WARPS,
            )  # fmt: skip
            top_key, second_key, drawn_key = _best_columns(keys, draw_keys, SECOND, SAMPLED)

    # 2. Those are read together.
    offsets = tl.arange(0, GROUP)
    ids = _ids_of_column(_number_of(top_key) % COLUMNS, first_tile, COLUMNS, GROUP, COLUMN_TILES)
    second_ids = _number_of(second_key) * GROUP + offsets
    drawn_ids = _number_of(drawn_key) * GROUP + offsets
    x = _load(logits_ptr, ids, biases, end, HAS_BIAS)
    second_x, drawn_x = tl.zeros((GROUP,), tl.float32), tl.zeros((GROUP,), tl.float32)
    score = drawn_x
    if SECOND:
        second_x = _load(logits_ptr, second_ids, biases, end, HAS_BIAS)
    if SAMPLED:
        drawn_x = _load(logits_ptr, drawn_ids, biases, end, HAS_BIAS)
        score = _score(drawn_x, drawn_ids, sample_scale, k0, k1, soft_cap, HAS_SOFT_CAP)
    if HAS_BANNED:
        if searches:
            x = tl.where(_is_banned(ids, bans), float("-inf"), x)
            if SECOND:
                second_x = tl.where(_is_banned(second_ids, bans), float("-inf"), second_x)
            if SAMPLED:
                score = tl.where(_is_banned(drawn_ids, bans), float("-inf"), score)

    # 3. Token: the lowest id of the first column that holds the largest allowed logit.
    keys = _key(x, ids)
    token_key = tl.max(tl.max(keys, axis=1), axis=0)
    token, top = _number_of(token_key), _value_of(token_key)

    # 4. Runner-up: the best other id of the winner's column, or the best one of the best other column.
    second_token, second = token, top
    if SECOND:
        key = tl.max(tl.max(tl.where(keys == token_key, KEY_MIN, keys), axis=1), axis=0)
        key = tl.maximum(key, tl.max(_key(second_x, second_ids), axis=0))
        second_token, second = _number_of(key), _value_of(key)

    # 5. Draw: the scores of the winning group are computed again.
    sampled_token, sampled, highest = token, top, top
    if SAMPLED:
        if draws:
            key = tl.max(_key(score, drawn_ids), axis=0)
            sampled_token, highest = _number_of(key), _value_of(key)
            sampled = tl.max(tl.where(drawn_ids == sampled_token, drawn_x, float("-inf")), axis=0)
    return largest, token, top, second_token, second, sampled_token, sampled, highest
