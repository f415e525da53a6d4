"""Device code of `block_attention`: one split-KV pass over cached prefix and window, and the combine of its partial results.

Rows of a tile are (query, head of the group) pairs: row r is query r // G, head r % G of the KV head's group, G any integer.
The cached prefix is cut at multiples of SPLIT, whatever the batch, bucket or capacity; the window is one more split. With
G=1, SPLIT=4, kv_len=6, a window of 3 in "causal" mode and cache slots 4..5 replaced:

                 split 0    split 1    window
    cache slot   0 1 2 3  | 4 5      | j = 0 1 2
    query 0      1 1 1 1  | 0 0      |     1 0 0
    query 1      1 1 1 1  | 0 0      |     1 1 0
    query 2      1 1 1 1  | 0 0      |     1 1 1
"""

from __future__ import annotations

import triton
import triton.language as tl

# Keys copied to the cache per iteration: enough to fill the copy's loads, few enough to cost no registers.
STORE_N = tl.constexpr(16)
# Positions per iteration when looking for the last key that a tile of queries can see.
SCAN_N = tl.constexpr(1024)
# Finite pivot of an empty row: a tile may hold no visible key, and -inf - -inf is NaN. -1e30 survives scaling by log2(e).
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _kept(rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask of a [rows, BLOCK_D] tile: the rows that are kept, and no column of the padding to a power of two."""
    mask = rows[:, None]
    if D != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    return mask


@triton.jit
def _load_tile(ptr, rows, stride, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of a tensor whose last stride is 1; rows not kept and the padding to a power of two are zero."""
    offset = rows.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(ptr + offset, mask=_kept(keep, D, BLOCK_D), other=0.0)


@triton.jit
def _attend_tile(q, k, v, visible, row_max, row_sum, acc, scale_log2):
    """One step of the online softmax, in base 2. Hidden keys get weight 0 exactly, and move no pivot."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    decay = tl.exp2(row_max - new_max)
    weights = tl.exp2(scores - new_max[:, None])
    row_sum = row_sum * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_max, row_sum, acc


@triton.jit
def _end_of_visible(order_ptr, block_ptr, q_len, newest):
    """First window position beyond every live key of order at most `newest`: from there on, the whole tile sees nothing."""
    end = 0
    for start in range(0, q_len, SCAN_N):
        j = start + tl.arange(0, SCAN_N)
        live = tl.load(block_ptr + j, mask=j < q_len, other=-1) >= 0
        order = tl.load(order_ptr + j, mask=j < q_len, other=0)
        end = tl.maximum(end, tl.max(tl.where(live & (order <= newest), j + 1, 0), 0))
    return end


@triton.jit
def _store_keys(
    cache_ptr, new_ptr, slot_ptr, block_ptr, cache_stride_s, new_stride_w, first, last, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Copies the stored ones among window positions [first, last) of one KV head to their cache slots."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(first, last, STORE_N):
        j = start + tl.arange(0, STORE_N)
        slot = tl.load(slot_ptr + j, mask=j < last, other=-1)
        stored = (slot >= 0) & (tl.load(block_ptr + j, mask=j < last, other=-1) >= 0)
        new = _load_tile(new_ptr, j, new_stride_w, stored, D, BLOCK_D)
        pointers = cache_ptr + slot.to(tl.int64)[:, None] * cache_stride_s + columns[None, :]
        tl.store(pointers, new, mask=_kept(stored, D, BLOCK_D))


# The lengths of a bucket must not multiply the compiled variants.
@triton.jit(do_not_specialize=["W", "H_KV", "num_splits", "first_tile", "num_tiles"])
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_pos_ptr,
    q_block_ptr,
    q_len_ptr,
    kv_slot_ptr,
    kv_len_ptr,
    replaced_ptr,
    cache_row_ptr,
    out_ptr,
    partial_acc_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    q_strides,
    k_strides,
    v_strides,
    k_cache_strides,
    v_cache_strides,
    W,
    H_KV,
    num_splits,
    first_tile,
    num_tiles,
    scale_log2,
    G: tl.constexpr,
    D: tl.constexpr,
    MODE: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of query rows of one KV head against one split. Without a cache the result is final, else partial.

    Strides are those of (batch row, head, position); for a cache (cache row, head, slot).
    """
    # Query tiles of one KV head are neighbours, so that the second one finds the keys in L2.
    pair = tl.program_id(0) // num_tiles
    tile = first_tile + tl.program_id(0) % num_tiles
    split = tl.program_id(1)
    batch = (pair // H_KV).to(tl.int64)
    head = (pair % H_KV).to(tl.int64)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // G
    q_len = tl.load(q_len_ptr + batch)
    if tile * BLOCK_M >= q_len * G:
        if not HAS_CACHE:
            _write_output(out_ptr, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), batch, head, row, W, H_KV, G, D, BLOCK_D)
        return
    # A split beyond the row's own prefix holds nothing: the combine does not read it.
    kv_len = 0
    if HAS_CACHE:
        kv_len = tl.load(kv_len_ptr + batch)
        if (split < num_splits) & (split * SPLIT >= kv_len):
            return

    q_pos_ptr += batch * W
    q_block_ptr += batch * W
    query_block = tl.load(q_block_ptr + query, mask=query < q_len, other=-1)
    live = query_block >= 0
    group_head = head * G + row % G
    columns = tl.arange(0, BLOCK_D)
    q_offset = group_head[:, None] * q_strides[1] + query.to(tl.int64)[:, None] * q_strides[2] + columns[None, :]
    q = tl.load(q_ptr + batch * q_strides[0] + q_offset, mask=_kept(live, D, BLOCK_D), other=0.0)

    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_CACHE and split < num_splits:
        cache_row = tl.load(cache_row_ptr + batch).to(tl.int64)
        k_base = k_cache_ptr + cache_row * k_cache_strides[0] + head * k_cache_strides[1]
        v_base = v_cache_ptr + cache_row * v_cache_strides[0] + head * v_cache_strides[1]
        replaced_start = tl.load(replaced_ptr + 2 * batch)
        replaced_end = tl.load(replaced_ptr + 2 * batch + 1)
        for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, kv_len), BLOCK_N):
            slot = start + tl.arange(0, BLOCK_N)
            # Hidden slots are not read at all: another program of this launch may be writing them.
            visible = (slot < kv_len) & ((slot < replaced_start) | (slot >= replaced_end))
            k = _load_tile(k_base, slot, k_cache_strides[2], visible, D, BLOCK_D)
            v = _load_tile(v_base, slot, v_cache_strides[2], visible, D, BLOCK_D)
            row_max, row_sum, acc = _attend_tile(q, k, v, visible[None, :], row_max, row_sum, acc, scale_log2)
    else:
        k_base = k_ptr + batch * k_strides[0] + head * k_strides[1]
        v_base = v_ptr + batch * v_strides[0] + head * v_strides[1]
        if HAS_CACHE:
            # Each live key is stored by one program, the one whose tile holds the first row of that query. The slots are
            # hidden from every reader (the contract of Window), so no order between programs is needed.
            first = (tile * BLOCK_M + G - 1) // G
            last = tl.minimum((tile * BLOCK_M + BLOCK_M + G - 1) // G, q_len)
            cache_row = tl.load(cache_row_ptr + batch).to(tl.int64)
            slots = kv_slot_ptr + batch * W
            k_slots = k_cache_ptr + cache_row * k_cache_strides[0] + head * k_cache_strides[1]
            v_slots = v_cache_ptr + cache_row * v_cache_strides[0] + head * v_cache_strides[1]
            _store_keys(k_slots, k_base, slots, q_block_ptr, k_cache_strides[2], k_strides[2], first, last, D, BLOCK_D)
            _store_keys(v_slots, v_base, slots, q_block_ptr, v_cache_strides[2], v_strides[2], first, last, D, BLOCK_D)

        end = q_len
        order_ptr = q_pos_ptr if MODE == "causal" else q_block_ptr
        query_order = tl.load(order_ptr + query, mask=live, other=-2147483648)
        if MODE != "full":
            # Worth its latency only where it can save a tile. Skipping changes no bit: a hidden tile adds exact zeros.
            if q_len > BLOCK_N:
                end = _end_of_visible(order_ptr, q_block_ptr, q_len, tl.max(query_order, 0))
        for start in range(0, end, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            key_live = tl.load(q_block_ptr + j, mask=j < q_len, other=-1) >= 0
            visible = key_live[None, :]
            if MODE != "full":
                key_order = tl.load(order_ptr + j, mask=j < q_len, other=0)
                visible = visible & (key_order[None, :] <= query_order[:, None])
            k = _load_tile(k_base, j, k_strides[2], key_live, D, BLOCK_D)
            v = _load_tile(v_base, j, v_strides[2], key_live, D, BLOCK_D)
            row_max, row_sum, acc = _attend_tile(q, k, v, visible, row_max, row_sum, acc, scale_log2)

    # A sum of zero is what marks a row that attended over nothing, here and in the combine.
    row_sum = tl.where(live, row_sum, 0.0)
    if HAS_CACHE:
        rows = num_tiles * BLOCK_M
        local = (pair.to(tl.int64) * (num_splits + 1) + split) * rows + row - first_tile * BLOCK_M
        in_use = row < q_len * G
        tl.store(partial_max_ptr + local, row_max, mask=in_use)
        tl.store(partial_sum_ptr + local, row_sum, mask=in_use)
        mask = _kept(in_use, D, BLOCK_D)
        tl.store(partial_acc_ptr + local[:, None] * D + columns[None, :], acc, mask=mask)
    else:
        _write_output(out_ptr, _normalized(acc, row_sum), batch, head, row, W, H_KV, G, D, BLOCK_D)


@triton.jit
def _normalized(acc, row_sum):
    """The weighted mean of the values; zeros, never NaN, for a row whose weights sum to zero."""
    seen = row_sum > 0
    return tl.where(seen[:, None], acc / tl.where(seen, row_sum, 1.0)[:, None], 0.0)


@triton.jit
def _write_output(out_ptr, result, batch, head, row, W, H_KV, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rounds a tile of rows once and writes it to the contiguous [B, W, H, D] output."""
    columns = tl.arange(0, BLOCK_D)
    position = ((batch * W + row // G) * H_KV + head) * G + row % G
    mask = _kept(row < W * G, D, BLOCK_D)
    tl.store(out_ptr + position[:, None] * D + columns[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["W", "H_KV", "num_splits", "first_row", "num_rows"])
def _combine_kernel(
    partial_acc_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    q_len_ptr,
    kv_len_ptr,
    out_ptr,
    W,
    H_KV,
    num_splits,
    first_row,
    num_rows,
    G: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges the partial results of the row's own splits, in the order 0 .. n-1, window; rows beyond q_len get zeros."""
    tiles = num_rows // BLOCK_R
    pair = tl.program_id(0) // tiles
    tile_start = tl.program_id(0) % tiles * BLOCK_R
    local = tile_start + tl.arange(0, BLOCK_R)
    batch = (pair // H_KV).to(tl.int64)
    head = (pair % H_KV).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    rows_in_use = tl.load(q_len_ptr + batch) * G - first_row
    in_use = local < rows_in_use
    live_splits = tl.cdiv(tl.load(kv_len_ptr + batch), SPLIT)
    parts = tl.where(tile_start < rows_in_use, live_splits + 1, 0)

    row_max = tl.full([BLOCK_R], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for index in tl.range(0, parts, num_stages=3):
        split = tl.where(index < live_splits, index, num_splits)
        partial = (pair.to(tl.int64) * (num_splits + 1) + split) * num_rows + local
        split_max = tl.load(partial_max_ptr + partial, mask=in_use, other=LOWEST)
        split_sum = tl.load(partial_sum_ptr + partial, mask=in_use, other=0.0)
        mask = _kept(in_use, D, BLOCK_D)
        split_acc = tl.load(partial_acc_ptr + partial[:, None] * D + columns[None, :], mask=mask, other=0.0)
        new_max = tl.maximum(row_max, split_max)
        decay = tl.exp2(row_max - new_max)
        share = tl.exp2(split_max - new_max)
        row_sum = row_sum * decay + split_sum * share
        acc = acc * decay[:, None] + split_acc * share[:, None]
        row_max = new_max
    _write_output(out_ptr, _normalized(acc, row_sum), batch, head, first_row + local, W, H_KV, G, D, BLOCK_D)
