"""Device code of `block_attention`: what becomes of the sums of a tile, and the combine of partial results."""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import ROW_POINTERS, _is_replaced, _load_row, _split_plan, _tile_mask

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


@triton.jit
def _partial_pointers(partials_ptr, partial_rows, row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the workspace holds rows' partial results: their sums of values [rows, BLOCK_D], pivots and sums of
    weights. All `partial_rows` sums of values come first, then all pivots, then all sums of weights.

    A tile of rows lies at the number that its program has in the grid of the split kernel: the split comes first, then
    the batch row, then the KV head and the tile. The workspace has fewer than 2^31 numbers.
    """
    max_ptr = partials_ptr + partial_rows * D
    acc = partials_ptr + row[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    return acc, max_ptr + row, max_ptr + partial_rows + row


@triton.jit(
    do_not_specialize=[
        "partial_rows",
        "W",
        "H_KV",
        "G",
        "BLOCK_N",
        "sliding_window",
        "first_batch",
        "first_head",
        "first_row",
        "num_rows",
        "longest",
    ],
    do_not_specialize_on_alignment=ROW_POINTERS,
)
def _combine_kernel(
    partials_ptr,
    q_len_ptr,
    kv_len_ptr,
    replaced_ptr,
    out_ptr,
    partial_rows,
    W,
    H_KV,
    G,
    BLOCK_N,
    sliding_window,
    first_batch,
    first_head,
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
    batch = (first_batch + tl.program_id(1)).to(tl.int64)
    q_len, kv_len, replaced_start, replaced_end = _load_row(q_len_ptr, kv_len_ptr, replaced_ptr, batch)
    base, length = _split_plan(kv_len, sliding_window, SPLIT, MAX_SPLITS, BLOCK_N)
    if (kv_len - base <= length) | (q_len * G > longest):
        return
    splits = tl.cdiv(kv_len - base, length)
    tiles = num_rows // BLOCK_R
    head = (first_head + tl.program_id(0) // tiles).to(tl.int64)
    tile_start = tl.program_id(0) % tiles * BLOCK_R
    local = tile_start + tl.arange(0, BLOCK_R)
    rows_in_use = q_len * G - first_row
    merged = tl.where(tile_start < rows_in_use, splits, 0)

    # 2. The splits that have written something, one after the other.
    row_max = tl.full([BLOCK_R], LOWEST, tl.float32)
    row_sum = tl.where(local < rows_in_use, 0.0, DEAD)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    partial = program * BLOCK_R + tl.arange(0, BLOCK_R)
    acc_ptr, max_ptr, sum_ptr = _partial_pointers(partials_ptr, partial_rows, partial, D, BLOCK_D)
    split_rows = tl.num_programs(1) * tl.num_programs(0) * BLOCK_R
    for split in tl.range(0, merged, num_stages=3):
        is_replaced = _is_replaced(base + split * length, length, replaced_start, replaced_end)
        written = (is_replaced == 0) | (split == splits - 1)
        in_use = (local < rows_in_use) & written
        behind = split * split_rows
        split_max = tl.load(max_ptr + behind, mask=in_use, other=LOWEST)
        split_sum = tl.load(sum_ptr + behind, mask=in_use, other=0.0)
        split_acc = tl.load(acc_ptr + behind * D, mask=_tile_mask(in_use, D, BLOCK_D), other=0.0)
        new_max = tl.maximum(row_max, split_max)
        decay = tl.exp2(row_max - new_max)
        share = tl.exp2(split_max - new_max)
        row_sum = row_sum * decay + split_sum * share
        acc = acc * decay[:, None] + split_acc * share[:, None]
        row_max = new_max

    # 3. The output. A row is live unless its sum is negative: `row_sum >= 0` is false of NaN.
    result = _normalized(acc, row_sum, (row_sum < 0) == 0)
    _write_output(out_ptr, result, batch, head, first_row + local, W, H_KV, G, D, BLOCK_D)
