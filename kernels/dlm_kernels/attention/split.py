"""Device code of `block_attention`: the pass over cached prefix and window, cut into splits.

Rows of a tile are (query, head of the group) pairs: row r is query r // G and head r % G of the KV head's group, for
any integer G. The visible prefix is cut by the row's own length (`_split_plan`), never by batch, bucket or capacity.
The last split also takes the window, so a row with a short prefix has one split, whose program writes the output
itself. With G=1, SPLIT=4, kv_len=6, a window of 3 in "causal" mode and cache slots 4..5 replaced:

                 split 0    split 1, window
    cache slot   0 1 2 3  | 4 5   j = 0 1 2
    query 0      1 1 1 1  | 0 0       1 0 0
    query 1      1 1 1 1  | 0 0       1 1 0
    query 2      1 1 1 1  | 0 0       1 1 1

A split's key tiles that every row sees whole come first and need no mask, then its other tiles (ends, holes, a sliding
window's edge), then the window. Which tiles are whole follows from kv_len, the replaced slots and the sliding window;
with `kept` none is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import (
    E4M3_UNIT,
    ROW_POINTERS,
    _cache_base,
    _first_visible,
    _is_replaced,
    _load_cached,
    _load_row,
    _load_tile,
    _replaced_tiles,
    _slots_visible,
    _split_plan,
    _store_keys,
    _tile_mask,
    _tile_pages,
)
from .combine import DEAD, LOWEST, _normalized, _partial_pointers, _write_output

# Positions per iteration when looking for the last key that a tile of queries can see.
SCAN_N = tl.constexpr(1024)
# Orders that come before and after every position and block.
NO_ORDER = tl.constexpr(-2147483648)
LAST_ORDER = tl.constexpr(2147483647)


@triton.jit
def _by_key(x, SWAP: tl.constexpr):
    """A vector over keys, to broadcast against a tile of scores, which is [rows, keys] or, with swapped operands,
    [keys, rows]."""
    return x[:, None] if SWAP else x[None, :]


@triton.jit
def _by_row(x, SWAP: tl.constexpr):
    """A vector over rows, to broadcast against a tile of scores."""
    return x[None, :] if SWAP else x[:, None]


@triton.jit
def _attend_tile(q, k, v, visible, row_max, row_sum, acc, scale_log2, SWAP: tl.constexpr):
    """One step of the online softmax, in base 2. Hidden keys get weight 0 exactly and move no pivot; `visible` is None
    where no key is hidden.

    SWAP computes the transposes, S^T = K Q^T and O^T = V^T P^T: the tensor cores of sm_90 want 64 rows in their first
    operand, which keys and head dim have when the queries are few. `acc` is then [BLOCK_D, rows].
    """
    if SWAP:
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    key_axis: tl.constexpr = 0 if SWAP else 1
    new_max = tl.maximum(row_max, tl.max(scores, key_axis))
    decay = tl.exp2(row_max - new_max)
    weights = tl.exp2(scores - _by_row(new_max, SWAP))
    row_sum = row_sum * decay + tl.sum(weights, key_axis)
    acc *= _by_row(decay, SWAP)
    if SWAP:
        acc = tl.dot(tl.trans(v), weights.to(v.dtype), acc, input_precision="ieee")
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return new_max, row_sum, acc


@triton.jit
def _window_visible(j, q_len, q_pos_ptr, q_block_ptr, query_pos, query_block, MODE: tl.constexpr, SWAP: tl.constexpr):
    """(which window positions are live, which of them each row sees), by the predicate of `Window`."""
    inside = j < q_len
    key_block = tl.load(q_block_ptr + j, mask=inside, other=-1)
    key_live = key_block >= 0
    # A dead key comes after every query, so that one vector of orders is in registers instead of orders and flags.
    if MODE == "full":
        visible = _by_key(key_live, SWAP)
    elif MODE == "causal":
        key_order = tl.where(key_live, tl.load(q_pos_ptr + j, mask=inside, other=0), LAST_ORDER)
        visible = _by_key(key_order, SWAP) <= _by_row(query_pos, SWAP)
    else:
        key_order = tl.where(key_live, key_block, LAST_ORDER)
        visible = _by_key(key_order, SWAP) <= _by_row(query_block, SWAP)
    if MODE == "shadow":
        key_pos = tl.load(q_pos_ptr + j, mask=inside, other=0)
        twin = _by_key(key_pos, SWAP) == _by_row(query_pos, SWAP)
        visible = visible & ~(twin & (_by_key(key_order, SWAP) < _by_row(query_block, SWAP)))
    return key_live, visible


@triton.jit
def _load_order(q_pos_ptr, q_block_ptr, query, live, MODE: tl.constexpr):
    """Position and block of each row's query; what the predicate of the mode does not look at may be anything."""
    query_block = tl.load(q_block_ptr + query, mask=live, other=NO_ORDER)
    query_pos = query_block
    if (MODE == "causal") or (MODE == "shadow"):
        query_pos = tl.load(q_pos_ptr + query, mask=live, other=NO_ORDER)
    return query_pos, query_block


@triton.jit
def _end_of_visible(order_ptr, block_ptr, q_len, newest):
    """The first window position beyond every live key of order at most `newest`, from which on the whole tile sees
    nothing."""
    end = 0
    for start in range(0, q_len, SCAN_N):
        j = start + tl.arange(0, SCAN_N)
        live = tl.load(block_ptr + j, mask=j < q_len, other=-1) >= 0
        order = tl.load(order_ptr + j, mask=j < q_len, other=0)
        end = tl.maximum(end, tl.max(tl.where(live & (order <= newest), j + 1, 0), 0))
    return end


@triton.jit
def _load_queries(q_ptr, strides, batch, head, row, inside, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] queries of a tile; zeros beyond the row's length."""
    offset = (head * G + row % G) * strides[1] + (row // G).to(tl.int64) * strides[2]
    return _load_tile(q_ptr + batch * strides[0], offset, inside, D, BLOCK_D)


@triton.jit
def _store_window(
    k_base, v_base, k_slots, v_slots, k_scale_ptr, v_scale_ptr, slot_ptr, q_block_ptr, table_ptr, k_strides, v_strides,
    k_cache_strides, v_cache_strides, tile, q_len,
    G: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores keys and values of the queries whose first row lies in this tile, so that one program stores each.

    The slots are hidden from every reader (the contract of Window), so no order between programs is needed.
    """
    first = (tile * BLOCK_M + G - 1) // G
    last = tl.minimum((tile * BLOCK_M + BLOCK_M + G - 1) // G, q_len)
    _store_keys(
        k_slots,
        k_base,
        k_scale_ptr,
        slot_ptr,
        q_block_ptr,
        table_ptr,
        k_cache_strides,
        k_strides[2],
        first,
        last,
        PAGE,
        D,
        BLOCK_D,
    )
    _store_keys(
        v_slots,
        v_base,
        v_scale_ptr,
        slot_ptr,
        q_block_ptr,
        table_ptr,
        v_cache_strides,
        v_strides[2],
        first,
        last,
        PAGE,
        D,
        BLOCK_D,
    )


# Nothing is compiled again for the lengths of a bucket.
@triton.jit(
    do_not_specialize=[
        "partial_rows",
        "W",
        "H_KV",
        "S_MAX",
        "num_pages",
        "sliding_window",
        "first_batch",
        "first_head",
        "first_tile",
        "num_tiles",
        "longest",
    ],
    do_not_specialize_on_alignment=ROW_POINTERS,
)
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    q_pos_ptr,
    q_block_ptr,
    q_len_ptr,
    kv_slot_ptr,
    kv_len_ptr,
    replaced_ptr,
    kept_ptr,
    page_table_ptr,
    cache_row_ptr,
    out_ptr,
    partials_ptr,
    q_strides,
    k_strides,
    v_strides,
    k_cache_strides,
    v_cache_strides,
    partial_rows,
    W,
    H_KV,
    S_MAX,
    num_pages,
    sliding_window,
    first_batch,
    first_head,
    first_tile,
    num_tiles,
    longest,
    scale_log2,
    G: tl.constexpr,
    D: tl.constexpr,
    MODE: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of query rows of one KV head against one split. The result of a batch row with one split is final, that
    of a row with several is partial.

    Strides are those of (batch row, head, position), and of a cache those of (cache row or page, head, slot). Batch
    rows of more than `longest` query rows are left to the prefill kernel.
    """
    # 1. The row's lengths, and whether it has such a split. A program without one returns after one wait.
    batch = (first_batch + tl.program_id(1)).to(tl.int64)
    split = tl.program_id(2)
    is_only, is_last = True, True
    if HAS_CACHE:
        q_len, kv_len, replaced_start, replaced_end = _load_row(q_len_ptr, kv_len_ptr, replaced_ptr, batch)
        cache_row = tl.load(cache_row_ptr + batch).to(tl.int64)
        base, length = _split_plan(kv_len, sliding_window, SPLIT, MAX_SPLITS, BLOCK_N)
        begin = base + split * length
        is_only, is_last = kv_len - base <= length, kv_len - begin <= length
        # The combine reads no partial results of a split that holds nothing, nor of one whose slots are replaced.
        is_replaced = _is_replaced(begin, length, replaced_start, replaced_end) & (is_last == 0)
        if ((split > 0) & (begin >= kv_len)) | is_replaced | (q_len * G > longest):
            return
    else:
        q_len = tl.load(q_len_ptr + batch)
        if q_len * G > longest:
            return

    # 2. Which rows. Query tiles of one KV head are neighbours, so that the second one finds the keys in L2.
    head = (first_head + tl.program_id(0) // num_tiles).to(tl.int64)
    tile = first_tile + tl.program_id(0) % num_tiles
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if tile * BLOCK_M >= q_len * G:
        if is_only:
            _write_output(out_ptr, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), batch, head, row, W, H_KV, G, D, BLOCK_D)
        return

    # 3. The queries. A dead one may be anything: no other row looks at it, and nothing is written of it.
    q_pos_ptr += batch * W
    q_block_ptr += batch * W
    query = row // G
    live = tl.load(q_block_ptr + query, mask=query < q_len, other=-1) >= 0
    q = _load_queries(q_ptr, q_strides, batch, head, row, query < q_len, G, D, BLOCK_D)

    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if SWAP:
        acc = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # 4. The cached keys of the split.
    if HAS_CACHE:
        k_slots = _cache_base(k_cache_ptr, k_cache_strides, cache_row, head, PAGE)
        v_slots = _cache_base(v_cache_ptr, v_cache_strides, cache_row, head, PAGE)
        if PAGE != 0:
            page_table_ptr += cache_row * num_pages
        if kept_ptr is not None:
            kept_ptr += batch * S_MAX
        score_scale = scale_log2
        if k_scale_ptr is not None:
            k_scale_ptr += head
            v_scale_ptr += head
            score_scale = scale_log2 * (tl.load(k_scale_ptr) * E4M3_UNIT)
        first = _first_visible(kv_len, sliding_window)
        end = tl.minimum(begin + length, kv_len)
        gap, gap_tiles = _replaced_tiles(begin, end, replaced_start, replaced_end, kv_len, BLOCK_N)
        tiles_end = tl.cdiv(end, BLOCK_N)
        # First the tiles that are seen whole, without a mask: those before the replaced slots, or those behind them,
        # whichever are more. Then the others, around both ranges that are left out.
        whole = tl.maximum(tl.cdiv(first, BLOCK_N), begin // BLOCK_N)
        whole_end = tl.maximum(end // BLOCK_N, whole)
        behind = False
        if kept_ptr is not None:
            whole_end = whole
        elif replaced_start < replaced_end:
            whole_before = tl.minimum(tl.maximum(replaced_start // BLOCK_N, whole), whole_end)
            first_behind = tl.minimum(tl.maximum(tl.cdiv(replaced_end, BLOCK_N), whole), whole_end)
            behind = whole_end - first_behind > whole_before - whole
            whole_end = tl.where(behind, whole_end, whole_before)
            whole = tl.where(behind, first_behind, whole)
        for index in range(whole, whole_end):
            start = index * BLOCK_N
            slot = start + tl.arange(0, BLOCK_N)
            page = _tile_pages(page_table_ptr, start, slot, None, PAGE, BLOCK_N)
            k = _load_cached(k_slots, slot, page, k_cache_strides, None, q.dtype, PAGE, D, BLOCK_D)
            v = _load_cached(v_slots, slot, page, v_cache_strides, None, q.dtype, PAGE, D, BLOCK_D)
            row_max, row_sum, acc = _attend_tile(q, k, v, None, row_max, row_sum, acc, score_scale, SWAP)
        whole_tiles = whole_end - whole
        left_out = tl.where(behind, gap, whole)
        left_out_tiles = tl.where(behind, gap_tiles, whole_tiles)
        last_left_out = tl.where(behind, whole, gap)
        last_left_out_tiles = tl.where(behind, whole_tiles, gap_tiles)
        for count in range(begin // BLOCK_N, tiles_end - gap_tiles - whole_tiles):
            index = count + tl.where(count >= left_out, left_out_tiles, 0)
            index += tl.where(index >= last_left_out, last_left_out_tiles, 0)
            start = index * BLOCK_N
            slot = start + tl.arange(0, BLOCK_N)
            # Hidden slots are not read at all, because another program of this launch may be writing them.
            visible = _slots_visible(slot, first, kv_len, replaced_start, replaced_end, kept_ptr, sliding_window)
            page = _tile_pages(page_table_ptr, start, slot, visible, PAGE, BLOCK_N)
            k = _load_cached(k_slots, slot, page, k_cache_strides, visible, q.dtype, PAGE, D, BLOCK_D)
            v = _load_cached(v_slots, slot, page, v_cache_strides, visible, q.dtype, PAGE, D, BLOCK_D)
            row_max, row_sum, acc = _attend_tile(
                q, k, v, _by_key(visible, SWAP), row_max, row_sum, acc, score_scale, SWAP
            )
        if v_scale_ptr is not None:
            acc *= tl.load(v_scale_ptr) * E4M3_UNIT

    # 5. The window, which belongs to the last split: its keys are stored, and attended.
    if is_last:
        k_base = k_ptr + batch * k_strides[0] + head * k_strides[1]
        v_base = v_ptr + batch * v_strides[0] + head * v_strides[1]
        if HAS_CACHE:
            _store_window(
                k_base, v_base, k_slots, v_slots, k_scale_ptr, v_scale_ptr, kv_slot_ptr + batch * W, q_block_ptr,
                page_table_ptr, k_strides, v_strides, k_cache_strides, v_cache_strides, tile, q_len,
                G, PAGE, D, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        query_pos, query_block = _load_order(q_pos_ptr, q_block_ptr, query, live, MODE)
        window_end = q_len
        # Looking for the end is worth its latency only where that can save a tile.
        if MODE == "causal" and q_len > BLOCK_N:
            window_end = _end_of_visible(q_pos_ptr, q_block_ptr, q_len, tl.max(query_pos, 0))
        elif MODE != "full" and q_len > BLOCK_N:
            window_end = _end_of_visible(q_block_ptr, q_block_ptr, q_len, tl.max(query_block, 0))
        for start in range(0, window_end, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            key_live, visible = _window_visible(j, q_len, q_pos_ptr, q_block_ptr, query_pos, query_block, MODE, SWAP)
            k = _load_tile(k_base, j.to(tl.int64) * k_strides[2], key_live, D, BLOCK_D)
            v = _load_tile(v_base, j.to(tl.int64) * v_strides[2], key_live, D, BLOCK_D)
            row_max, row_sum, acc = _attend_tile(q, k, v, visible, row_max, row_sum, acc, scale_log2, SWAP)

    # 6. The output, or a partial result for the combine.
    if SWAP:
        acc = tl.trans(acc)
    if is_only:
        _write_output(out_ptr, _normalized(acc, row_sum, live), batch, head, row, W, H_KV, G, D, BLOCK_D)
    elif HAS_CACHE:
        program = (split * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        partial = program * BLOCK_M + tl.arange(0, BLOCK_M)
        acc_ptr, max_ptr, sum_ptr = _partial_pointers(partials_ptr, partial_rows, partial, D, BLOCK_D)
        in_use = row < q_len * G
        tl.store(max_ptr, tl.where(live, row_max, LOWEST), mask=in_use)
        tl.store(sum_ptr, tl.where(live, row_sum, DEAD), mask=in_use)
        tl.store(acc_ptr, acc, mask=_tile_mask(in_use, D, BLOCK_D))
