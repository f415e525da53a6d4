"""The one description of what a forward computes, told to the attention op from device memory."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from .checks.named import check_of

Mode = Literal["full", "causal", "block", "shadow"]
MODES: tuple[Mode, ...] = ("full", "causal", "block", "shadow")


@dataclasses.dataclass(frozen=True)
class Window:
    """Which positions a forward computes, what they see, and where their keys go.

    Every decoder is data in these tensors: sub-blocks, pipelines, overlays and padding differ here and nowhere else.
    All tensors are int32 (`kept` is bool) on the model's device; `W` is the width of the bucket, of which row `b` uses
    `q_len[b]`.

    A window position `j` of row `b` is *live* if `j < q_len[b]` and `q_block[b, j] >= 0`. A dead position is attended
    by nobody, its output is zero and its key is not stored. A live query `i` sees

        cached slot s    if  s < kv_len[b]  and not  replaced[b, 0] <= s < replaced[b, 1]  and kept[b, s], in every mode
        live window j    if  "full": always | "causal": q_pos[j] <= q_pos[i] | "block": q_block[j] <= q_block[i]
                         | "shadow": as "block", but never its twin (equal q_pos) of an earlier block: a copy of the
                           block with its own q_block then predicts every token from all the others (WINO)

    A call's `sliding_window` hides all cached slots but `s > kv_len - sliding_window`, and no window position.

    The ops for a CPU keep beside a window what they have worked out from its tensors (`cpu.sight`), and see if a tensor
    was written since.

    Attributes:
        q_pos: [B, W] absolute positions (RoPE and "causal").
        q_block: [B, W] diffusion block of each position, -1 = dead. Alignment (ABS, REL) and variable block lengths
            differ only here.
        q_len: [B] live queries; 0 = the row sits this forward out.
        kv_slot: [B, W] cache slot that stores each position's key and value, -1 = not stored. A stored slot must be
            hidden (`>= kv_len` or replaced): a forward never reads what it writes.
        kv_len: [B] visible cache length.
        replaced: [B, 2] half-open range of cache slots hidden by this window (dual cache: its own slots).
        cache_row: [B] row of the cache buffers that belongs to each batch row.
        mode: the predicate inside the window.
        kept: [B, S_max] bool: cached slots that are not hidden one by one; None = all are kept. Decoders that recompute
            scattered positions (dKV-Cache) hide the slots of those positions.
        page_table: [R, P]: the caches are pages, [num_pages, H_kv, page_size, D] with page_size a power of two >= 16,
            and slot s of cache row r lies in page `page_table[r, s // page_size]` at `s % page_size`; S_max is P *
            page_size. kv_slot, kv_len, replaced and kept stay logical. A page may be in several rows; entries of slots
            that are neither visible nor stored are not used. None = the caches are [R, H_kv, S_max, D].
    """

    q_pos: Tensor
    q_block: Tensor
    q_len: Tensor
    kv_slot: Tensor
    kv_len: Tensor
    replaced: Tensor
    cache_row: Tensor
    mode: Mode
    kept: Tensor | None = None
    page_table: Tensor | None = None

    @check_of("Window")
    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"Window: mode must be one of {', '.join(MODES)}, got mode={self.mode!r}")
        (B, W), tensors = self.shape, self.tensors()
        expected = {
            "q_block": (B, W),
            "q_len": (B,),
            "kv_slot": (B, W),
            "kv_len": (B,),
            "replaced": (B, 2),
            "cache_row": (B,),
        }
        for name, shape in expected.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"Window: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if self.kept is not None and (self.kept.dtype != torch.bool or self.kept.dim() != 2 or self.kept.shape[0] != B):
            raise ValueError(
                f"Window: kept must be [B, S_max] bool with B={B}, got {tuple(self.kept.shape)}, {self.kept.dtype}"
            )
        if self.page_table is not None and self.page_table.dim() != 2:
            raise ValueError(f"Window: page_table must be [R, P], got shape {tuple(self.page_table.shape)}")
        for name, tensor in tensors.items():
            if name != "kept" and tensor.dtype != torch.int32:
                raise TypeError(f"Window: {name} must be int32, got {tensor.dtype}")
            if tensor.device != self.q_pos.device:
                raise ValueError(f"Window: {name} must be on {self.q_pos.device}, got {tensor.device}")

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def shape(self) -> tuple[int, int]:
        if self.q_pos.dim() != 2:
            raise ValueError(f"Window: q_pos must be [B, W], got shape {tuple(self.q_pos.shape)}")
        return self.q_pos.shape[0], self.q_pos.shape[1]


def capacity(k_cache: Tensor, window: Window) -> int:
    """S_max: how many slots a row of the cache has, in one piece or in the pages of its table."""
    return k_cache.shape[2] * (1 if window.page_table is None else window.page_table.shape[1])
