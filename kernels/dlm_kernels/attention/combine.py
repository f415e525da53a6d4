"""Device code of `block_attention`: what becomes of the sums of a tile, and the combine of partial results."""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import _replaced_tiles, _split_plan, _tile_mask

# The pivot of a row without a visible key. It is finite, because -inf - -inf is NaN, and the least float32, so that no
# finite score lies below.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# The sum of weights that partial results hold for a dead row; that of a live row is at least 0, or NaN.
DEAD = tl.constexpr(-1.0)


@triton.jit
def _normalized(acc, row_sum, live):
    """The weighted mean of the values of live rows, zeros of the others.

    A live row sees itself, so its weights have a sum. Where the sum is NaN, or is 0 because every score is -inf, the
    mean is not a number either, and zeros in its place would hide an overflow from all that follows.
    """
    return tl.where(live[:, None], acc / tl.where(live, row_sum, 1.0)[:, None], 0.0)


@triton.jit
def _write_output(out_ptr, result, batch, head, row, W, H_KV, G, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rounds a tile of rows once and writes it to the contiguous [B, W, H, D] output."""
    columns = tl.arange(0, BLOCK_D)
    position = ((batch * W + row // G) * H_KV + head) * G + row % G
    mask = _tile_mask(row < W * G, D, BLOCK_D)
    tl.store(out_ptr + position[:, None] * D + columns[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["W", "H_KV", "G", "BLOCK_N", "sliding_window", "num_splits", "first_row", "num_rows", "longest"]
)
def _combine_kernel(
    partial_acc_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    q_len_ptr,
    kv_len_ptr,
    replaced_ptr,
    out_ptr,
    W,
    H_KV,
    G,
    BLOCK_N,
    sliding_window,
    num_splits,
    first_row,
    num_rows,
    longest,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges the partial results of a batch row that has several splits, in their order; rows beyond q_len get
    zeros."""
    # 1. Which rows, and how many splits they have.
    tiles = num_rows // BLOCK_R
    pair = tl.program_id(0) // tiles
    tile_start = tl.program_id(0) % tiles * BLOCK_R
    local = tile_start + tl.arange(0, BLOCK_R)
    batch = (pair // H_KV).to(tl.int64)
    head = (pair % H_KV).to(tl.int64)
    q_len = tl.load(q_len_ptr + batch)
    kv_len = tl.load(kv_len_ptr + batch)
    base, length, splits = _split_plan(kv_len, sliding_window, SPLIT, MAX_SPLITS, BLOCK_N)
    if (splits == 1) | (q_len * G > longest):
        return
    replaced_start = tl.load(replaced_ptr + 2 * batch)
    replaced_end = tl.load(replaced_ptr + 2 * batch + 1)
    columns = tl.arange(0, BLOCK_D)
    rows_in_use = q_len * G - first_row
    merged = tl.where(tile_start < rows_in_use, splits, 0)

    # 2. The splits that have written something, one after the other.
    row_max = tl.full([BLOCK_R], LOWEST, tl.float32)
    row_sum = tl.where(local < rows_in_use, 0.0, DEAD)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for split in tl.range(0, merged, num_stages=3):
        begin = base + split * length
        end = tl.minimum(begin + length, kv_len)
        _, gap_tiles = _replaced_tiles(begin, end, replaced_start, replaced_end, kv_len, BLOCK_N)
        written = (gap_tiles != tl.cdiv(end, BLOCK_N) - begin // BLOCK_N) | (split == splits - 1)
        in_use = (local < rows_in_use) & written
        partial = (pair.to(tl.int64) * num_splits + split) * num_rows + local
        split_max = tl.load(partial_max_ptr + partial, mask=in_use, other=LOWEST)
        split_sum = tl.load(partial_sum_ptr + partial, mask=in_use, other=0.0)
        mask = _tile_mask(in_use, D, BLOCK_D)
        split_acc = tl.load(partial_acc_ptr + partial[:, None] * D + columns[None, :], mask=mask, other=0.0)
        new_max = tl.maximum(row_max, split_max)
        decay = tl.exp2(row_max - new_max)
        share = tl.exp2(split_max - new_max)
        row_sum = row_sum * decay + split_sum * share
        acc = acc * decay[:, None] + split_acc * share[:, None]
        row_max = new_max

    # 3. The output. A row is live unless its sum is negative: `row_sum >= 0` is false of NaN.
    result = _normalized(acc, row_sum, (row_sum < 0) == 0)
    _write_output(out_ptr, result, batch, head, first_row + local, W, H_KV, G, D, BLOCK_D)
