"""The tile table: what every launcher may launch, by shape class and compute capability. Data only, and the only place for it.

Every entry compiles for its targets without a spill and within their shared memory (`dlm-fast compile-report`). There is no autotune:
a tile fixes the order of a row's sums, so one that was chosen by timing could change a greedy token from run to run. A tile never
depends on the batch, the bucket or the capacity of a cache, for the same reason.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class AttentionTile:
    """How one launch cuts the work. BLOCK_N and SPLIT set the order in which a row's keys are summed."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    SPLIT: int = 512


# By padded head dim: the tile for at most two query heads per KV head, and for more. Never by batch, bucket or capacity:
# wgmma, mma.sync and the warps of a tile may round differently, so a BLOCK_M that followed the bucket could change bits.
# Registers are the limit everywhere: zero spills on every target of `compile_cases` with triton 3.7.1.
_SM_90_TILES = {
    16: (AttentionTile(64, 64, 4, 3), AttentionTile(128, 64, 8, 3)),
    32: (AttentionTile(64, 64, 4, 3), AttentionTile(128, 64, 8, 3)),
    64: (AttentionTile(64, 64, 4, 3), AttentionTile(128, 64, 8, 3)),
    128: (AttentionTile(64, 32, 4, 4), AttentionTile(128, 64, 8, 3)),
    256: (AttentionTile(64, 32, 8, 3), AttentionTile(64, 32, 8, 3)),
    512: (AttentionTile(32, 16, 8, 3), AttentionTile(32, 16, 8, 3)),
}
_SM_100_TILES = _SM_90_TILES | {128: (AttentionTile(64, 32, 4, 4), AttentionTile(128, 32, 8, 4))}
# mma.sync and, but for sm_80, 99 KB of shared memory: what any other capability gets.
_MMA_SYNC_TILES = {
    16: (AttentionTile(64, 16, 4, 3), AttentionTile(128, 64, 8, 2)),
    32: (AttentionTile(64, 32, 4, 2), AttentionTile(128, 32, 8, 4)),
    64: (AttentionTile(64, 32, 4, 4), AttentionTile(128, 64, 8, 3)),
    128: (AttentionTile(64, 64, 8, 3), AttentionTile(128, 32, 8, 3)),
    256: (AttentionTile(64, 16, 8, 3), AttentionTile(64, 16, 8, 3)),
    512: (AttentionTile(32, 16, 8, 2), AttentionTile(32, 16, 8, 2)),
}
# float32 multiplies without tensor cores ("ieee"): for tests and tiny models.
_FLOAT32_TILES = {
    16: (AttentionTile(16, 16, 4, 2), AttentionTile(16, 16, 4, 2)),
    32: (AttentionTile(16, 16, 4, 2), AttentionTile(16, 16, 4, 2)),
    64: (AttentionTile(32, 32, 4, 2), AttentionTile(32, 32, 4, 2)),
    128: (AttentionTile(16, 16, 4, 2), AttentionTile(16, 16, 4, 2)),
    256: (AttentionTile(16, 16, 8, 2), AttentionTile(16, 16, 8, 2)),
    512: (AttentionTile(16, 16, 8, 2), AttentionTile(16, 16, 8, 2)),
}
ATTENTION_TILES = {90: _SM_90_TILES, 100: _SM_100_TILES, 103: _SM_100_TILES}


def attention_tile(capability: int, *, D: int, G: int, dtype: torch.dtype) -> AttentionTile:
    """The tile of a model on a GPU; `capability` as in sm_90."""
    tiles = ATTENTION_TILES.get(capability, _MMA_SYNC_TILES) if dtype != torch.float32 else _FLOAT32_TILES
    return tiles[1 << (D - 1).bit_length()][G > 2]


@dataclasses.dataclass(frozen=True)
class ConfidenceTile:
    """LANES x (16 bytes of logits) are consumed a trip. A row's sums depend on the lanes and warps, so the choice looks at the GPU,
    the dtype and the arguments' presence and never at the number of rows."""

    lanes: int
    num_warps: int
    num_stages: int = 1


# (compute capability, bytes of a logit): tile. On sm_100 and sm_120 ptxas spills with 4 groups of 8 logits a thread, on sm_120 also
# with 16 warps.
CONFIDENCE_TILES = {
    **{(capability, itemsize): ConfidenceTile(lanes=1024, num_warps=8) for capability in (80, 86, 89, 90) for itemsize in (2, 4)},
    (100, 2): ConfidenceTile(lanes=1024, num_warps=16),
    (120, 2): ConfidenceTile(lanes=512, num_warps=8),
    **{(capability, 4): ConfidenceTile(lanes=1024, num_warps=8) for capability in (100, 120)},
}
# Warps of a call with "kl" or a bias where it differs from the tile's: with 8, the ptxas of Triton 3.6 spills there.
_KL_WARPS = {100: 16}
_BIAS_WARPS = {120: 16}


def confidence_tile(capability: int, itemsize: int, kl: bool, biased: bool) -> ConfidenceTile:
    tile = CONFIDENCE_TILES[capability, itemsize]
    warps = max(tile.num_warps, _KL_WARPS.get(capability, 0) * kl, _BIAS_WARPS.get(capability, 0) * biased)
    return dataclasses.replace(tile, num_warps=warps)


# (BLOCK_W, num_warps): the narrowest tile that holds the lanes is used. One warp needs no barrier; wide tiles are bound by the
# sort, whose 64-bit keys and partners must stay in registers.
UNMASK_TILES: tuple[tuple[int, int], ...] = ((32, 1), (128, 4), (256, 4), (1024, 4), (2048, 16))
