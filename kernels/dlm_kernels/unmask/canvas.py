"""Device code of `unmask`: what the kernels read from, or write to, a row's canvas outside the lanes of the call, tile
by tile."""

from __future__ import annotations

import triton
import triton.language as tl

# A token that no canvas holds.
_NO_TOKEN = tl.constexpr(-(2**63))


@triton.jit
def first_masked(tokens_ptr, begin, end, mask_id, BLOCK_L: tl.constexpr):
    """First masked position in [begin, end), or `end`."""
    first, tile = end, begin
    while (tile < end) & (first == end):
        position = tile + tl.arange(0, BLOCK_L)
        token = tl.load(tokens_ptr + position, mask=position < end, other=0)
        first = tl.min(tl.where((position < end) & (token == mask_id), position, end))
        tile += BLOCK_L
    return first


@triton.jit
def count_masked(tokens_ptr, begin, end, mask_id, BLOCK_L: tl.constexpr):
    """The number of masked positions in [begin, end)."""
    count = 0
    for tile in range(begin, end, BLOCK_L):
        position = tile + tl.arange(0, BLOCK_L)
        token = tl.load(tokens_ptr + position, mask=position < end, other=0)
        count += tl.sum(((position < end) & (token == mask_id)).to(tl.int32))
    return count


@triton.jit
def load_stop_ids(stop_ids_ptr, K):
    """The first four stop tokens, which are all of most models; what is no token where there are fewer."""
    return (
        tl.load(stop_ids_ptr, mask=K > 0, other=_NO_TOKEN),
        tl.load(stop_ids_ptr + 1, mask=K > 1, other=_NO_TOKEN),
        tl.load(stop_ids_ptr + 2, mask=K > 2, other=_NO_TOKEN),
        tl.load(stop_ids_ptr + 3, mask=K > 3, other=_NO_TOKEN),
    )


@triton.jit
def is_stop_token(token, stops, stop_ids_ptr, K):
    """Is each token one of the K stop tokens, of which `stops` are the first four?"""
    is_stop = (token == stops[0]) | (token == stops[1]) | (token == stops[2]) | (token == stops[3])
    for i in range(4, K):
        is_stop = is_stop | (token == tl.load(stop_ids_ptr + i))
    return is_stop


@triton.jit
def first_stop_token(tokens_ptr, unmask_step_ptr, begin, end, none, stop_ids_ptr, K, BLOCK_L: tl.constexpr):
    """First position in [begin, end) where a stop token was written, or `none`."""
    first = none
    stops = load_stop_ids(stop_ids_ptr, K)
    for tile in range(begin, end, BLOCK_L):
        position = tile + tl.arange(0, BLOCK_L)
        token = tl.load(tokens_ptr + position, mask=position < end, other=0)
        written = tl.load(unmask_step_ptr + position, mask=position < end, other=-1) >= 0
        first = tl.minimum(
            first, tl.min(tl.where(written & is_stop_token(token, stops, stop_ids_ptr, K), position, none))
        )
    return first


@triton.jit
def fill(tokens_ptr, unmask_step_ptr, begin, end, token, step, mask_id, BLOCK_L: tl.constexpr):
    """Every position in [begin, end) that is masked or was written becomes `token`."""
    for tile in range(begin, end, BLOCK_L):
        position = tile + tl.arange(0, BLOCK_L)
        masked = (tl.load(tokens_ptr + position, mask=position < end, other=0) == mask_id) & (position < end)
        written = tl.load(unmask_step_ptr + position, mask=position < end, other=-1) >= 0
        # Each thread stores only where that thread has loaded.
        tl.store(tokens_ptr + position, token + position.to(tl.int64) * 0, mask=masked | written)
        tl.store(unmask_step_ptr + position, step + position * 0, mask=masked)


@triton.jit
def first_token_closes(
    tokens_ptr, unmask_step_ptr, begin, end, canvas_len, first_token, mask_id, stop_ids_ptr, K,
    STOP: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Does `first_token`, written to the masked position `begin`, end the row?

    The token is an argument and is not read from `begin`, because other threads may not see it there yet.
    """
    first_mask, first_stop, others = end, end, 0
    stops = load_stop_ids(stop_ids_ptr, K)
    for tile in range(begin, end, BLOCK_L):
        position = tile + tl.arange(0, BLOCK_L)
        inside = position < end
        token = tl.load(tokens_ptr + position, mask=inside, other=0)
        written = tl.load(unmask_step_ptr + position, mask=inside, other=-1) >= 0
        token = tl.where(position == begin, first_token, token)
        written = written | (position == begin)
        is_stop = is_stop_token(token, stops, stop_ids_ptr, K)
        first_mask = tl.minimum(first_mask, tl.min(tl.where(inside & (token == mask_id), position, end)))
        first_stop = tl.minimum(first_stop, tl.min(tl.where(inside & written & is_stop, position, end)))
        others += tl.sum((inside & (is_stop == 0)).to(tl.int32))
    filled = first_mask == end
    closes = filled & False
    if STOP == "closed":
        closes = first_stop < first_mask
    elif STOP == "after_block":
        closes = filled & (first_stop < end)
    elif STOP == "all_stop":
        closes = filled & (first_stop < end) & (others == 0)
    if filled & (closes == 0):
        closes = first_masked(tokens_ptr, end, canvas_len, mask_id, BLOCK_L) >= canvas_len
    return closes
