"""The tile table: what every launcher may launch, by shape class and compute capability. Data only, and the only place
for it.

Every entry compiles for its targets without a spill and within their shared memory (`dlm-fast compile-report`). There
is no autotune: a tile fixes the order of a row's sums, so one that was chosen by timing could change a greedy token
from run to run. A tile never depends on the batch, the bucket or the capacity of a cache, for the same reason.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

# Compute capability (90 for 9.0) of every GPU that the kernels run on, and the capability whose tiles it runs. The
# code is compiled for the GPU's own target. A GPU that borrows tiles has the tensor cores of the lender's family and at
# least as much shared memory.
TARGETS = {80: 80, 86: 86, 87: 86, 89: 89, 90: 90, 100: 100, 103: 100, 120: 120, 121: 120}


@dataclasses.dataclass(frozen=True)
class AttentionTile:
    """How one launch cuts the work. BLOCK_N, SPLIT and MAX_SPLITS set the order in which a row's keys are summed.

    The fp32 partial results of a split take rows / SPLIT of the bytes of its 16-bit keys and values, written once and
    read once: with SPLIT = 512, between 1/16 (32 rows) and 1/4 (128 rows). A batch row of more than PREFILL_ROWS rows
    is the prefill kernel's, because its products take longer than reading its keys, and because its partial results
    would cost more than the keys themselves.

    Attributes:
        BLOCK_M: rows of a program; a row is a query and one of the query heads of the group.
        BLOCK_N: keys of an iteration.
        num_warps: launch option.
        num_stages: launch option.
        SPLIT: slots that a split has at least.
        MAX_SPLITS: splits of a prefix at most; a prefix longer than MAX_SPLITS * SPLIT gets splits of 2, 3, ... SPLIT.
        SWAP: keys and head dim, not queries, are the first operand of the products: wgmma wants 64 rows and 4 warps.
        PREFILL_ROWS: rows (queries times heads of a group) that a batch row of the split form has at most.
        max_registers: launch option; None lets ptxas choose, which prefers spills to few programs for small tiles.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    SPLIT: int = 512
    MAX_SPLITS: int = 32
    SWAP: bool = False
    PREFILL_ROWS: int = 512
    max_registers: int | None = None


# Head sizes of `block_attention`: what tl.dot takes a product over, in tiles of a power of two.
HEAD_DIMS = (*range(16, 257, 16), 512)

# fp32 numbers of a tile that a program of the combine merges.
COMBINE_ELEMENTS = 2048

# By padded head dim: the tile for at most two query heads per KV head, the tile for more, and that of the prefill. A
# tile is never chosen by batch, bucket or capacity: wgmma, mma.sync and the warps of a tile may round differently, so a
# BLOCK_M that followed the bucket could change bits. Registers are the limit everywhere; no tile spills on a target of
# `compile_cases` with triton 3.6.0 and 3.7.1.
_SM_90_TILES = {
    16: (AttentionTile(64, 64, 4, 3), AttentionTile(128, 64, 8, 3), AttentionTile(128, 64, 8, 3)),
    32: (AttentionTile(64, 64, 4, 3), AttentionTile(128, 64, 8, 3), AttentionTile(128, 64, 8, 3)),
    64: (AttentionTile(32, 64, 4, 3, SWAP=True), AttentionTile(128, 64, 8, 3), AttentionTile(128, 64, 8, 3)),
    128: (AttentionTile(32, 64, 4, 3, SWAP=True), AttentionTile(128, 64, 8, 3), AttentionTile(128, 64, 8, 3)),
    256: (AttentionTile(64, 32, 8, 3), AttentionTile(64, 32, 8, 3), AttentionTile(64, 32, 8, 3)),
    512: (AttentionTile(32, 16, 8, 3), AttentionTile(32, 16, 8, 3), AttentionTile(32, 16, 8, 3)),
}
_SM_100_TILES = {
    16: (AttentionTile(64, 64, 4, 3), AttentionTile(128, 64, 8, 3), AttentionTile(128, 64, 8, 3)),
    32: (AttentionTile(64, 64, 4, 3), AttentionTile(128, 64, 8, 3), AttentionTile(128, 64, 8, 3)),
    64: (AttentionTile(64, 64, 4, 3), AttentionTile(128, 64, 8, 3), AttentionTile(128, 64, 8, 3)),
    # 256 of the 512 columns of tensor memory: two programs fit at most, and 255 registers a thread leave room for both.
    128: (AttentionTile(64, 32, 4, 4, max_registers=255), AttentionTile(128, 32, 8, 4), AttentionTile(128, 64, 8, 3)),
    256: (AttentionTile(64, 32, 8, 3), AttentionTile(64, 32, 8, 3), AttentionTile(64, 32, 8, 3)),
    512: (AttentionTile(32, 16, 8, 3), AttentionTile(32, 16, 8, 3), AttentionTile(32, 16, 8, 3)),
}
# These targets have mma.sync and, but for sm_80, 99 KB of shared memory.
_MMA_SYNC_TILES = {
    16: (
        AttentionTile(64, 16, 4, 3, max_registers=255),
        AttentionTile(128, 64, 8, 2, max_registers=255),
        AttentionTile(128, 32, 8, 2, max_registers=255),
    ),
    32: (
        AttentionTile(64, 32, 4, 2, max_registers=255),
        AttentionTile(128, 32, 8, 4, max_registers=255),
        AttentionTile(128, 32, 8, 4, max_registers=255),
    ),
    64: (AttentionTile(64, 32, 4, 4, max_registers=255), AttentionTile(128, 64, 8, 3), AttentionTile(128, 32, 8, 3)),
    128: (AttentionTile(64, 32, 4, 3), AttentionTile(128, 32, 8, 3), AttentionTile(64, 64, 8, 2)),
    256: (AttentionTile(64, 16, 8, 3), AttentionTile(64, 16, 8, 3), AttentionTile(64, 16, 8, 3)),
    512: (AttentionTile(32, 16, 8, 2), AttentionTile(32, 16, 8, 2), AttentionTile(32, 16, 8, 2)),
}
_SM_80_TILES = _MMA_SYNC_TILES | {
    128: (AttentionTile(64, 32, 4, 3, max_registers=255), AttentionTile(128, 16, 8, 3), AttentionTile(64, 64, 8, 2))
}
# float32 multiplies without tensor cores ("ieee"); these tiles are for tests and tiny models.
_FLOAT32_TILES = {
    16: (AttentionTile(16, 32, 4, 2, max_registers=255),) * 3,
    32: (AttentionTile(16, 32, 4, 2, max_registers=255),) * 3,
    64: (AttentionTile(16, 16, 4, 2, max_registers=255),) * 3,
    128: (AttentionTile(16, 16, 4, 2, max_registers=255),) * 3,
    256: (AttentionTile(16, 16, 8, 2),) * 3,
    512: (AttentionTile(16, 16, 8, 1, max_registers=255),) * 3,
}
# Keys that wait in registers for their turn, decoded to float32, would spill, so nothing is loaded ahead.
_FP8_FLOAT32_TILES = _FLOAT32_TILES | {
    128: (AttentionTile(16, 16, 4, 1, max_registers=255),) * 3,
    256: (AttentionTile(16, 16, 8, 1, max_registers=255),) * 3,
}
ATTENTION_TILES = {
    80: _SM_80_TILES,
    86: _MMA_SYNC_TILES,
    89: _MMA_SYNC_TILES,
    90: _SM_90_TILES,
    100: _SM_100_TILES,
    120: _MMA_SYNC_TILES,
}


# What differs with an fp8 cache, by (padded head dim, place in the tile table): decoding its bytes costs registers, and
# a tile whose keys are the first operand takes them to the tensor cores byte by byte.
_FP8_MMA_SYNC_TILES = {(128, 1): AttentionTile(128, 16, 8, 3), (128, 2): AttentionTile(64, 32, 8, 3)}
_FP8_TILES = {
    80: _FP8_MMA_SYNC_TILES | {(128, 1): AttentionTile(64, 32, 8, 3)},
    86: _FP8_MMA_SYNC_TILES,
    89: _FP8_MMA_SYNC_TILES,
    90: {
        (64, 0): AttentionTile(64, 64, 4, 3),
        (128, 0): AttentionTile(64, 64, 4, 3),
        (128, 2): AttentionTile(128, 64, 8, 2),
    },
    100: {(128, 2): AttentionTile(128, 32, 8, 3)},
    120: _FP8_MMA_SYNC_TILES | {(128, 2): AttentionTile(64, 32, 8, 2)},
}


# Tiles of the split form that a GPU has yet to compare with those above, by capability, then by (padded head dim, place
# in the tile table); no launcher runs them. One row with few KV heads leaves most of a GPU idle: over 4096 slots, 4 KV
# heads and 2 query tiles are 64 programs with SPLIT = 512, for 132 multiprocessors. Shorter splits make more programs
# of a short prefix, and more partial results. From SPLIT * MAX_SPLITS slots on, splits become longer and not more, so
# that both numbers cut a row by the row's own length and by nothing else.
_SM_90_CANDIDATES = {
    (64, 1): (AttentionTile(128, 64, 8, 3, SPLIT=256, MAX_SPLITS=16),),
    (128, 0): (AttentionTile(32, 64, 4, 3, SWAP=True, SPLIT=256, MAX_SPLITS=16),),
    (128, 1): (
        AttentionTile(128, 64, 8, 3, SPLIT=256, MAX_SPLITS=16),
        AttentionTile(128, 64, 8, 3, SPLIT=256),
        AttentionTile(128, 64, 8, 3, SPLIT=128),
        AttentionTile(64, 32, 4, 3, SPLIT=256, MAX_SPLITS=16),
    ),
}
_SM_100_CANDIDATES = {
    (128, 0): (AttentionTile(64, 32, 4, 4, max_registers=255, SPLIT=256, MAX_SPLITS=16),),
    (128, 1): (
        AttentionTile(128, 32, 8, 4, SPLIT=256, MAX_SPLITS=16),
        AttentionTile(128, 32, 8, 4, SPLIT=128),
        AttentionTile(64, 32, 4, 4, max_registers=255, SPLIT=256, MAX_SPLITS=16),
    ),
}
_MMA_SYNC_CANDIDATES = {
    (128, 0): (AttentionTile(64, 32, 4, 3, max_registers=255, SPLIT=256, MAX_SPLITS=16),),
    (128, 1): (
        AttentionTile(128, 32, 8, 3, SPLIT=256, MAX_SPLITS=16),
        AttentionTile(64, 32, 4, 3, max_registers=255, SPLIT=256, MAX_SPLITS=16),
    ),
}
_SM_80_CANDIDATES = _MMA_SYNC_CANDIDATES | {(128, 1): (AttentionTile(128, 16, 8, 3, SPLIT=256, MAX_SPLITS=16),)}
ATTENTION_CANDIDATES = {
    80: _SM_80_CANDIDATES,
    86: _MMA_SYNC_CANDIDATES,
    89: _MMA_SYNC_CANDIDATES,
    90: _SM_90_CANDIDATES,
    100: _SM_100_CANDIDATES,
    120: _MMA_SYNC_CANDIDATES,
}


def attention_tile(capability: int, *, D: int, G: int, dtype: torch.dtype, fp8: bool = False) -> AttentionTile:
    """The tile of a model on a GPU; `capability` is a value of TARGETS, `fp8` says that of its cache."""
    return _attention_tile(capability, D, dtype, fp8, int(G > 2))


def attention_prefill_tile(capability: int, *, D: int, dtype: torch.dtype, fp8: bool = False) -> AttentionTile:
    """The tile of the prefill kernel, for which SPLIT, MAX_SPLITS, SWAP and PREFILL_ROWS mean nothing."""
    return _attention_tile(capability, D, dtype, fp8, 2)


def _attention_tile(capability: int, D: int, dtype: torch.dtype, fp8: bool, place: int) -> AttentionTile:
    padded = 1 << (D - 1).bit_length()
    if dtype == torch.float32:
        return (_FP8_FLOAT32_TILES if fp8 else _FLOAT32_TILES)[padded][place]
    tile = ATTENTION_TILES[capability][padded][place]
    return _FP8_TILES[capability].get((padded, place), tile) if fp8 else tile


@dataclasses.dataclass(frozen=True)
class ConfidenceTile:
    """How a program of `confidence` reads a row of logits.

    The order of a row's sums follows from every field, so a tile is chosen by the GPU, the dtype and the presence of
    arguments, and never by the number of rows.

    Attributes:
        columns: columns that a vocabulary is dealt to; one trip of the loop reads 16 bytes of logits for each of them.
        num_warps: launch option.
        num_stages: launch option.
        part_tiles: trips of the loop that make a part, which has sums of its own; a power of 2.
        max_registers: launch option; None lets ptxas choose.
    """

    columns: int
    num_warps: int
    num_stages: int = 1
    part_tiles: int = 4
    max_registers: int | None = None


# The tile by (compute capability, bytes of a logit). On sm_100 and sm_120 ptxas spills with 4 groups of 8 logits a
# thread, and on sm_120 also with 16 warps. Parts are 16,384 ids everywhere, which gives 8 programs to a row of LLaDA's
# or Dream's vocabulary and 256 or more to 32 rows.
CONFIDENCE_TILES = {
    **{(capability, 2): ConfidenceTile(columns=1024, num_warps=8, part_tiles=2) for capability in (80, 86, 89, 90)},
    **{(capability, 4): ConfidenceTile(columns=1024, num_warps=8) for capability in (80, 86, 89, 90)},
    (100, 2): ConfidenceTile(columns=1024, num_warps=16, part_tiles=2),
    (120, 2): ConfidenceTile(columns=512, num_warps=8),
    **{(capability, 4): ConfidenceTile(columns=1024, num_warps=8) for capability in (100, 120)},
}
# Warps of a call with "kl" or a bias, where 8 are too few: the ptxas of Triton 3.6 spills with them.
_KL_WARPS = {100: 16}
_BIAS_WARPS = {120: 16}
# The tile of a call with both, where even 16 warps have too few registers for that of the table.
_KL_AND_BIAS_TILES = {(100, 2): ConfidenceTile(columns=512, num_warps=16, part_tiles=4)}
# Registers of a thread of a call without "kl", bias and draw, which fit four programs of 8 warps on a multiprocessor.
_FEW_REGISTERS = 64
# A call that needs more than that, by (compute capability, bytes of a logit).
_SOME_REGISTERS = {(100, 4): 80}
# Parts of a row at most: `_merge_kernel` holds a value of each in the registers of one warp.
CONFIDENCE_PARTS = 32


@functools.cache
def confidence_tile(capability: int, itemsize: int, kl: bool, biased: bool, sampled: bool) -> ConfidenceTile:
    """The tile of a call on a GPU; `capability` is a value of TARGETS, `itemsize` the bytes of a logit."""
    tile = CONFIDENCE_TILES[capability, itemsize]
    if kl and biased:
        tile = _KL_AND_BIAS_TILES.get((capability, itemsize), tile)
    warps = max(tile.num_warps, _KL_WARPS.get(capability, 0) * kl, _BIAS_WARPS.get(capability, 0) * biased)
    # Left alone, ptxas spills some of what needs many registers to make room for more programs.
    registers = _SOME_REGISTERS.get((capability, itemsize), _FEW_REGISTERS)
    if kl or biased or sampled:
        registers = 2048 // warps
    return dataclasses.replace(tile, num_warps=warps, max_registers=min(255, registers))


def confidence_parts(V: int, tile: ConfidenceTile, itemsize: int) -> tuple[int, int]:
    """(tiles of a part, parts) of a vocabulary of V ids. Larger vocabularies than 32 parts hold have larger parts."""
    tiles, part_tiles = -(-V * itemsize // (16 * tile.columns)), tile.part_tiles
    while part_tiles * CONFIDENCE_PARTS < tiles:
        part_tiles *= 2
    return part_tiles, -(-tiles // part_tiles)


def confidence_column_tiles(V: int, tile: ConfidenceTile, itemsize: int) -> int:
    """Tiles that a column crosses from the first id to the last one of a vocabulary, rounded up to a power of 2."""
    return 1 << (-(-V * itemsize // (16 * tile.columns)) - 1).bit_length()


def log2_slots(parts: int) -> int:
    """Logarithm of the least power of 2 that holds the parts."""
    return (parts - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class UnmaskTile:
    """How a program of `unmask` holds the lanes of a row: all of them in registers, or in memory, read tile by tile.

    Attributes:
        BLOCK_W: lanes that a row has at most.
        num_warps: launch option.
        BLOCK_T: lanes of a tile that is read from memory again and again; None keeps all lanes in registers.
    """

    BLOCK_W: int
    num_warps: int
    BLOCK_T: int | None = None


# The narrowest tile that holds the lanes is used. One warp needs no barrier. In registers, wide tiles are bound by the
# sort, whose 64-bit keys and partners must stay there. From memory, a choice keeps 32 bits of a lane, or 96 with the
# entropies, in 128 registers a thread.
UNMASK_TILES = (UnmaskTile(32, 1), UnmaskTile(128, 4), UnmaskTile(256, 4), UnmaskTile(8192, 16, 1024))


def unmask_tile(W: int) -> UnmaskTile:
    """The tile of a call with W lanes a row."""
    for tile in UNMASK_TILES:
        if W <= tile.BLOCK_W:
            return tile
    raise ValueError(f"unmask_tile: W must be at most {UNMASK_TILES[-1].BLOCK_W}, got W={W}")


# (BLOCK_T, num_warps) of `draft_build` and `verify`: lanes read at once; more are read tile by tile.
DRAFTS_TILES = ((32, 1), (256, 4), (1024, 8))


def drafts_tile(W: int) -> tuple[int, int]:
    """The tile of a call with W lanes a row."""
    return next((tile for tile in DRAFTS_TILES if W <= tile[0]), DRAFTS_TILES[-1])


# (counters of a program, num_warps) of `uniform_scores`: a counter costs ten rounds of Philox and 16 bytes.
NOISE_TILE = (128, 4)

# (longest row, num_warps) of `rms_norm` and `add_rms_norm`, which hold a row in registers: 16 numbers a thread, so that
# a thread has two or more loads of 16 bytes on the way, and up to 32 numbers a thread in the longest rows.
NORM_TILES = ((512, 1), (1024, 2), (2048, 4), (4096, 8), (16384, 16))


def norm_tile(d: int) -> tuple[int, int]:
    """(BLOCK_D, num_warps) of rows of d numbers."""
    return max(32, _power_of_2(d)), next(warps for longest, warps in NORM_TILES if d <= longest)


# Numbers of its heads that a program of `qk_norm_rope` holds, 8 heads of 128, and its warps: a thread loads 16 bytes of
# either half.
ROPE_ELEMENTS, ROPE_WARPS = 1024, 2


def rope_tile(D: int, R: int) -> tuple[int, int, int, int]:
    """(HEADS, BLOCK_R, BLOCK_P, num_warps) of heads of D dims, R of which are rotated: BLOCK_R holds one half of these,
    and BLOCK_P the others. The number of heads of a model is not looked at, because the order of a head's sum may not
    depend on it."""
    HEADS = max(1, ROPE_ELEMENTS // _power_of_2(D))
    return HEADS, _power_of_2(R // 2), _power_of_2(max(1, D - R)), ROPE_WARPS


# (BLOCK_I, num_warps) of `swiglu`: 8 numbers of both arguments a thread.
SWIGLU_TILE = (1024, 4)


def _power_of_2(n: int) -> int:
    """The least power of 2 that is not below n."""
    return 1 << (n - 1).bit_length()
