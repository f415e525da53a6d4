"""Device code of `block_attention`, the cache's side: which slots a row sees, where a slot lies, how a key gets there
and back.

A cache is [rows, H_kv, S_max, D] or, with a page table, [pages, H_kv, PAGE, D]; then slot s lies in page
table[s // PAGE] at s % PAGE. Its elements have the dtype of q, or are e4m3 bytes with one float32 scale a head. The
bytes are taken apart and put together with operations on integers that are the same on every target: sm_80 and sm_86
have no conversion, and the interpreter's is no reference.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Arguments that a caller may cut out of longer tensors: wherever they begin, nothing is compiled again.
ROW_POINTERS = (
    "k_scale_ptr", "v_scale_ptr", "q_pos_ptr", "q_block_ptr", "q_len_ptr", "kv_slot_ptr", "kv_len_ptr", "replaced_ptr",
    "kept_ptr", "page_table_ptr", "cache_row_ptr",
)  # fmt: skip
# Keys copied to the cache per iteration: enough to fill the copy's loads, few enough to cost no registers.
STORE_N = tl.constexpr(16)
# What a decoded e4m3 value must be multiplied by: its exponent was left in the place of a float16's, and the bias of
# a float16 is larger by 8.
E4M3_UNIT = tl.constexpr(256.0)
# The interpreter runs no PTX; it decodes byte by byte, to the same values.
_COMPILED = tl.constexpr(not knobs.runtime.interpret)


def _unpacked(shift: int, mask: int, scale: int | None) -> str:
    """PTX that decodes the four e4m3 bytes of $2 to 16-bit floats, the first two in $0 and the others in $1.

    A byte is moved to the upper half of 16 bits; what is behind its sign moves on to the place of exponent and mantissa
    (`shift`, `mask`), which leaves its exponent in the place of a larger one. A `scale`, a 16-bit float, takes off what
    that is too small by. 0x7F, which is NaN, is the one value that becomes 0x80 by adding 1: all bits of its float are
    set.
    """
    pairs = ""
    for result, bytes_of_pair, signs_of_pair in (("$0", "0x1404", "0x9988"), ("$1", "0x3424", "0xBBAA")):
        pairs += f"""
            prmt.b32 h, $2, 0, {bytes_of_pair};
            prmt.b32 n, u, 0, {signs_of_pair};
            shr.u32 t, h, {shift};
            lop3.b32 t, t, {mask * 0x10001:#x}, n, 0xEA;
            lop3.b32 {result}, h, 0x80008000, t, 0xEA;"""
        if scale is not None:
            pairs += f"""
            fma.rn.bf16x2 {result}, {result}, s, z;"""
    scales = "" if scale is None else f"mov.b32 s, {scale * 0x10001:#x}; mov.b32 z, 0x80008000;"
    return f"""
        {{
            .reg .b32 u, h, n, t, s, z;
            and.b32 u, $2, 0x7F7F7F7F;
            add.u32 u, u, 0x01010101;
            {scales}{pairs}
        }}"""


_E4M3_TO_F16 = tl.constexpr(_unpacked(1, 0x3F80, None))
# The bias of a bfloat16 is larger by 120, of which E4M3_UNIT leaves 8.
_E4M3_TO_BF16 = tl.constexpr(_unpacked(4, 0x07F0, 0x7780))


@triton.jit
def _tile_mask(rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask of a [rows, BLOCK_D] tile: the rows that are kept, and no column of the padding to a power of two."""
    mask = rows[:, None]
    if D != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    return mask


@triton.jit
def _load_tile(ptr, offset, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] at `offset` [rows] of a tensor whose last stride is 1. Rows that are not kept and the padding are
    zero; `keep` None keeps all rows."""
    pointers = ptr + offset[:, None] + tl.arange(0, BLOCK_D)[None, :]
    if keep is not None:
        return tl.load(pointers, mask=_tile_mask(keep, D, BLOCK_D), other=0)
    elif D != BLOCK_D:
        return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _decode_e4m3(byte, dtype: tl.constexpr):
    """value / E4M3_UNIT in float16, bfloat16 or float32, exactly, subnormals and NaN included.

    Compiled code takes four bytes at a time apart, with the same 12 or 14 integer operations for every target.
    """
    if _COMPILED:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(_E4M3_TO_BF16, "=r,=r,r", [byte], tl.bfloat16, is_pure=True, pack=4)
        else:
            return tl.inline_asm_elementwise(_E4M3_TO_F16, "=r,=r,r", [byte], tl.float16, is_pure=True, pack=4).to(
                dtype
            )
    else:
        wide = byte.to(tl.uint16)
        size = wide & 0x7F
        # 0x7F would be 480, where e4m3 has its NaN; 0xFE ends in the place of a NaN of float16.
        size = tl.where(size == 0x7F, 0xFE, size)
        return (((wide & 0x80) << 8) | (size << 7)).to(tl.float16, bitcast=True).to(dtype)


@triton.jit
def _encode_e4m3(value):
    """The e4m3 byte nearest to a float32, ties to the even one; beyond +-448 that of +-448; NaN stays NaN."""
    bits = value.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    clipped = tl.where(size > 0x43E00000, 0x43E00000, size)  # 448
    # From 2^-6 on, 20 bits of the mantissa are dropped and the bias of the exponent becomes 7 instead of 127. A carry
    # runs into the exponent, as it should.
    normal = ((clipped + 0x7FFFF + ((clipped >> 20) & 1)) >> 20) - 960
    # Below 2^-6, e4m3 counts in steps of 2^-9; adding 2^23 makes float32 count, and round, in units.
    counted = clipped.to(tl.float32, bitcast=True) * 512.0 + 8388608.0
    code = tl.where(clipped >= 0x3C800000, normal, counted.to(tl.uint32, bitcast=True) - 0x4B000000)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _first_visible(kv_len, sliding_window):
    """The first cached slot that the sliding window leaves visible; a sliding window of n shows the last n - 1."""
    first = kv_len * 0
    if sliding_window is not None:
        first = tl.maximum(kv_len - sliding_window + 1, 0)
    return first


@triton.jit
def _slots_visible(slot, first, kv_len, replaced_start, replaced_end, kept_ptr, sliding_window):
    """Which cached slots the row sees."""
    visible = (slot < kv_len) & ((slot < replaced_start) | (slot >= replaced_end))
    if sliding_window is not None:
        visible = visible & (slot >= first)
    if kept_ptr is not None:
        visible = visible & (tl.load(kept_ptr + slot, mask=slot < kv_len, other=0) != 0)
    return visible


@triton.jit
def _split_plan(kv_len, sliding_window, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_N):
    """How a row's visible prefix is cut: (where the first split starts, slots a split). There is at least one split.

    The plan looks at nothing but the row's own length. Long prefixes get longer splits instead of more splits: the
    partial results are fp32 and as wide as the keys, so their number bounds the workspace and what the combine reads.
    """
    base = _first_visible(kv_len, sliding_window) // BLOCK_N * BLOCK_N
    span = kv_len - base
    length = SPLIT * tl.maximum(tl.cdiv(span, SPLIT * MAX_SPLITS), 1)
    return base, length


@triton.jit
def _load_row(q_len_ptr, kv_len_ptr, replaced_ptr, batch):
    """(q_len, kv_len, start and end of the replaced slots) of a batch row, loaded before any of them is looked at, so
    that the latencies pass side by side."""
    q_len = tl.load(q_len_ptr + batch)
    kv_len = tl.load(kv_len_ptr + batch)
    replaced_start = tl.load(replaced_ptr + 2 * batch)
    replaced_end = tl.load(replaced_ptr + 2 * batch + 1)
    return q_len, kv_len, replaced_start, replaced_end


@triton.jit
def _is_replaced(begin, length, replaced_start, replaced_end):
    """Whether all slots of a split are replaced. Unless the split is the last one, which has the window too, no partial
    result is written of it."""
    return (replaced_start <= begin) & (begin + length <= replaced_end)


@triton.jit
def _replaced_tiles(begin, end, replaced_start, replaced_end, kv_len, BLOCK_N):
    """(first, number) of the key tiles of a split [begin, end) that are replaced as a whole, and are passed over.

    Passing over them changes no bit, as a hidden tile adds exact zeros.
    """
    tiles_end = tl.cdiv(end, BLOCK_N)
    gap = tl.minimum(tl.maximum(tl.cdiv(replaced_start, BLOCK_N), begin // BLOCK_N), tiles_end)
    gap_end = tl.where(replaced_end < kv_len, replaced_end // BLOCK_N, tiles_end)
    return gap, tl.maximum(tl.minimum(gap_end, tiles_end) - gap, 0)


@triton.jit
def _cache_base(ptr, strides, cache_row, head, PAGE: tl.constexpr):
    """Where the slots of one KV head begin or, in a paged cache, where those of page 0 begin."""
    base = ptr + head * strides[1]
    if PAGE == 0:
        base += cache_row * strides[0]
    return base


@triton.jit
def _tile_pages(table_ptr, start, slot, visible, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of each slot of a tile, or one page for all where no tile crosses pages: a tile starts at a multiple of
    BLOCK_N."""
    page = 0
    if PAGE >= BLOCK_N:
        page = tl.load(table_ptr + start // PAGE).to(tl.int64)
    elif PAGE != 0:
        if visible is None:
            page = tl.load(table_ptr + slot // PAGE).to(tl.int64)
        else:
            page = tl.load(table_ptr + slot // PAGE, mask=visible, other=0).to(tl.int64)
    return page


@triton.jit
def _slot_offset(slot, page, strides, PAGE: tl.constexpr):
    """Where each slot lies behind `_cache_base`."""
    if PAGE == 0:
        return slot.to(tl.int64) * strides[2]
    else:
        return (slot % PAGE).to(tl.int64) * strides[2] + page * strides[0]


@triton.jit
def _load_cached(
    base, slot, page, strides, visible, dtype: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[slots, BLOCK_D] in q's dtype; of an e4m3 cache, in units of E4M3_UNIT times the head's scale."""
    tile = _load_tile(base, _slot_offset(slot, page, strides, PAGE), visible, D, BLOCK_D)
    if tile.dtype == tl.uint8:
        tile = _decode_e4m3(tile, dtype)
    return tile


@triton.jit
def _store_keys(
    base,
    new_ptr,
    scale_ptr,
    slot_ptr,
    block_ptr,
    table_ptr,
    strides,
    new_stride_w,
    first,
    last,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copies the window positions in [first, last) of one KV head that are stored to their cache slots."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(first, last, STORE_N):
        j = start + tl.arange(0, STORE_N)
        slot = tl.load(slot_ptr + j, mask=j < last, other=-1)
        stored = (slot >= 0) & (tl.load(block_ptr + j, mask=j < last, other=-1) >= 0)
        new = _load_tile(new_ptr, j.to(tl.int64) * new_stride_w, stored, D, BLOCK_D)
        if scale_ptr is not None:
            new = _encode_e4m3(tl.div_rn(new.to(tl.float32), tl.load(scale_ptr)))
        page = 0
        if PAGE != 0:
            page = tl.load(table_ptr + slot // PAGE, mask=stored, other=0).to(tl.int64)
        offset = _slot_offset(slot, page, strides, PAGE)
        tl.store(base + offset[:, None] + columns[None, :], new, mask=_tile_mask(stored, D, BLOCK_D))
