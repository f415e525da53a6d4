"""Device code of `block_attention` for long windows (prefill): one program a query tile walks the cached prefix, then
the window.

Nothing is split and nothing is combined. The key tiles that a query tile needs are those between the first and the last
key that any of its rows sees. A contiguous range of them, which every row sees whole, is multiplied without a mask, and
only the others (the diagonal, ends, holes) evaluate the predicate. In "causal" mode with four positions a tile:

    key tile      0 1 2 3
    query tile 0  m . . .      m: masked   f: whole   .: not read
    query tile 1  f m . .
    query tile 2  f f m .
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import (
    E4M3_UNIT,
    ROW_POINTERS,
    _cache_base,
    _first_visible,
    _load_cached,
    _load_row,
    _load_tile,
    _slots_visible,
    _tile_pages,
)
from .combine import LOWEST, _normalized, _write_output
from .split import (
    LAST_ORDER,
    NO_ORDER,
    SCAN_N,
    _attend_tile,
    _load_order,
    _load_queries,
    _store_window,
    _window_visible,
)


@triton.jit
def _window_tiles(
    q_len, q_pos_ptr, q_block_ptr, query_pos, query_block, live, MODE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(first, end) of the key tiles that some row sees, and (first, end) of a range within, which every row sees whole.

    Both are exact for orders that ascend. For other orders more tiles than necessary are read, and masked.
    """
    if MODE == "causal":
        order = query_pos
        order_ptr = q_pos_ptr
    else:
        order = query_block
        order_ptr = q_block_ptr
    newest = tl.max(tl.where(live, order, NO_ORDER), 0)
    oldest = tl.min(tl.where(live, order, LAST_ORDER), 0)
    if MODE == "shadow":
        first_pos = tl.min(tl.where(live, query_pos, LAST_ORDER), 0)
        last_pos = tl.max(tl.where(live, query_pos, NO_ORDER), 0)
    begin = q_len
    end = q_len * 0
    hole = q_len
    for start in range(0, q_len, SCAN_N):
        j = start + tl.arange(0, SCAN_N)
        inside = j < q_len
        key_block = tl.load(q_block_ptr + j, mask=inside, other=-1)
        some = key_block >= 0
        every = some
        if MODE != "full":
            key_order = tl.load(order_ptr + j, mask=inside, other=0)
            some = some & (key_order <= newest)
            every = every & (key_order <= oldest)
        if MODE == "shadow":
            # A key of a block before the newest one may be the twin of a query.
            key_pos = tl.load(q_pos_ptr + j, mask=inside, other=0)
            every = every & ((key_block >= newest) | (key_pos < first_pos) | (key_pos > last_pos))
        begin = tl.minimum(begin, tl.min(tl.where(some, j, q_len), 0))
        end = tl.maximum(end, tl.max(tl.where(some, j + 1, 0), 0))
        hole = tl.minimum(hole, tl.min(tl.where(every | (j < begin), q_len, j), 0))
    first_tile = begin // BLOCK_N
    end_tile = tl.cdiv(end, BLOCK_N)
    first_whole = tl.cdiv(begin, BLOCK_N)
    return first_tile, end_tile, first_whole, tl.maximum(tl.minimum(hole // BLOCK_N, end_tile), first_whole)


@triton.jit(
    do_not_specialize=["W", "H_KV", "S_MAX", "num_pages", "sliding_window", "num_tiles", "longest"],
    do_not_specialize_on_alignment=ROW_POINTERS,
)
def _prefill_kernel(
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
    q_strides,
    k_strides,
    v_strides,
    k_cache_strides,
    v_cache_strides,
    W,
    H_KV,
    S_MAX,
    num_pages,
    sliding_window,
    num_tiles,
    longest,
    scale_log2,
    G: tl.constexpr,
    D: tl.constexpr,
    MODE: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of query rows of one KV head against everything that the tile sees, for batch rows of more than
    `longest` query rows. For other batch rows the kernel writes the zeros beyond `longest`, where the split form has no
    program.
    """
    # 1. Which rows. The tiles that see most start first, so that the last ones to finish are short.
    pair = tl.program_id(0) // num_tiles
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    batch = (pair // H_KV).to(tl.int64)
    head = (pair % H_KV).to(tl.int64)
    if HAS_CACHE:
        q_len, kv_len, replaced_start, replaced_end = _load_row(q_len_ptr, kv_len_ptr, replaced_ptr, batch)
        cache_row = tl.load(cache_row_ptr + batch).to(tl.int64)
    else:
        q_len = tl.load(q_len_ptr + batch)
    is_short = q_len * G <= longest
    if is_short & (tile * BLOCK_M + BLOCK_M <= longest):
        return
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if is_short | (tile * BLOCK_M >= q_len * G):
        # If the batch row is short, the rows of this tile before `longest` are the split form's.
        in_place = tl.where(is_short & (row < longest), W * G, row)
        _write_output(out_ptr, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), batch, head, in_place, W, H_KV, G, D, BLOCK_D)
        return

    # 2. The queries, of which a dead one may be anything, and where the window's keys are.
    q_pos_ptr += batch * W
    q_block_ptr += batch * W
    query = row // G
    live = tl.load(q_block_ptr + query, mask=query < q_len, other=-1) >= 0
    q = _load_queries(q_ptr, q_strides, batch, head, row, query < q_len, G, D, BLOCK_D)
    k_base = k_ptr + batch * k_strides[0] + head * k_strides[1]
    v_base = v_ptr + batch * v_strides[0] + head * v_strides[1]

    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # 3. The window's keys are stored, and the cached keys attended: the tiles seen whole, then the others.
    if HAS_CACHE:
        k_slots = _cache_base(k_cache_ptr, k_cache_strides, cache_row, head, PAGE)
        v_slots = _cache_base(v_cache_ptr, v_cache_strides, cache_row, head, PAGE)
        if PAGE != 0:
            page_table_ptr += cache_row * num_pages
        score_scale = scale_log2
        if k_scale_ptr is not None:
            k_scale_ptr += head
            v_scale_ptr += head
            score_scale = scale_log2 * (tl.load(k_scale_ptr) * E4M3_UNIT)
        _store_window(
            k_base, v_base, k_slots, v_slots, k_scale_ptr, v_scale_ptr, kv_slot_ptr + batch * W, q_block_ptr,
            page_table_ptr, k_strides, v_strides, k_cache_strides, v_cache_strides, tile, q_len, G, PAGE, D, BLOCK_M,
            BLOCK_D,
        )  # fmt: skip
        first = _first_visible(kv_len, sliding_window)
        first_tile = first // BLOCK_N
        end_tile = tl.cdiv(kv_len, BLOCK_N)
        # The range that is seen whole lies before the replaced slots, which leave a gap of tiles behind the range.
        first_whole = tl.cdiv(first, BLOCK_N)
        end_whole = kv_len // BLOCK_N
        gap = end_tile
        end_gap = end_tile
        if replaced_start < replaced_end:
            end_whole = tl.minimum(end_whole, replaced_start // BLOCK_N)
            gap = tl.minimum(tl.maximum(tl.cdiv(replaced_start, BLOCK_N), first_tile), end_tile)
            end_gap = tl.where(replaced_end < kv_len, tl.maximum(replaced_end // BLOCK_N, gap), end_tile)
        if kept_ptr is not None:
            kept_ptr += batch * S_MAX
            end_whole = first_whole
        end_whole = tl.maximum(end_whole, first_whole)
        for index in range(first_whole, end_whole):
            start = index * BLOCK_N
            slot = start + tl.arange(0, BLOCK_N)
            page = _tile_pages(page_table_ptr, start, slot, None, PAGE, BLOCK_N)
            k = _load_cached(k_slots, slot, page, k_cache_strides, None, q.dtype, PAGE, D, BLOCK_D)
            v = _load_cached(v_slots, slot, page, v_cache_strides, None, q.dtype, PAGE, D, BLOCK_D)
            row_max, row_sum, acc = _attend_tile(q, k, v, None, row_max, row_sum, acc, score_scale, False)
        for count in range(first_tile, end_tile - (end_whole - first_whole) - (end_gap - gap)):
            index = count + tl.where(count >= first_whole, end_whole - first_whole, 0)
            index += tl.where(index >= gap, end_gap - gap, 0)
            start = index * BLOCK_N
            slot = start + tl.arange(0, BLOCK_N)
            visible = _slots_visible(slot, first, kv_len, replaced_start, replaced_end, kept_ptr, sliding_window)
            page = _tile_pages(page_table_ptr, start, slot, visible, PAGE, BLOCK_N)
            k = _load_cached(k_slots, slot, page, k_cache_strides, visible, q.dtype, PAGE, D, BLOCK_D)
            v = _load_cached(v_slots, slot, page, v_cache_strides, visible, q.dtype, PAGE, D, BLOCK_D)
            row_max, row_sum, acc = _attend_tile(q, k, v, visible[None, :], row_max, row_sum, acc, score_scale, False)
        if v_scale_ptr is not None:
            acc *= tl.load(v_scale_ptr) * E4M3_UNIT

    # 4. The window: the tiles seen whole, then the others.
    query_pos, query_block = _load_order(q_pos_ptr, q_block_ptr, query, live, MODE)
    first_tile, end_tile, first_whole, end_whole = _window_tiles(
        q_len, q_pos_ptr, q_block_ptr, query_pos, query_block, live, MODE, BLOCK_N
    )
    for index in range(first_whole, end_whole):
        j = index * BLOCK_N + tl.arange(0, BLOCK_N)
        k = _load_tile(k_base, j.to(tl.int64) * k_strides[2], None, D, BLOCK_D)
        v = _load_tile(v_base, j.to(tl.int64) * v_strides[2], None, D, BLOCK_D)
        row_max, row_sum, acc = _attend_tile(q, k, v, None, row_max, row_sum, acc, scale_log2, False)
    for count in range(first_tile, end_tile - (end_whole - first_whole)):
        index = count + tl.where(count >= first_whole, end_whole - first_whole, 0)
        j = index * BLOCK_N + tl.arange(0, BLOCK_N)
        key_live, visible = _window_visible(j, q_len, q_pos_ptr, q_block_ptr, query_pos, query_block, MODE, False)
        k = _load_tile(k_base, j.to(tl.int64) * k_strides[2], key_live, D, BLOCK_D)
        v = _load_tile(v_base, j.to(tl.int64) * v_strides[2], key_live, D, BLOCK_D)
        row_max, row_sum, acc = _attend_tile(q, k, v, visible, row_max, row_sum, acc, scale_log2, False)

    _write_output(out_ptr, _normalized(acc, row_sum, live), batch, head, row, W, H_KV, G, D, BLOCK_D)
