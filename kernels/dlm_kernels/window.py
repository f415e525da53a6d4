"""The one description of what a forward computes, told to the attention op from device memory."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["full", "causal", "block"]
MODES: tuple[Mode, ...] = ("full", "causal", "block")


@dataclasses.dataclass(frozen=True)
class Window:
    """Which positions a forward computes, what they see, and where their keys go.

    Every decoder is data in these tensors: sub-blocks, pipelines, overlays and padding differ here and nowhere else.
    All tensors are int32 on the model's device; `W` is the width of the bucket, of which row `b` uses `q_len[b]`.

    A window position `j` of row `b` is *live* if `j < q_len[b]` and `q_block[b, j] >= 0`. A dead position is attended by
    nobody, its output is zero and its key is not stored. A live query `i` sees

        cached slot s    if  s < kv_len[b]  and not  replaced[b, 0] <= s < replaced[b, 1]            (in every mode)
        live window j    if  "full": always | "causal": q_pos[j] <= q_pos[i] | "block": q_block[j] <= q_block[i]

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
    """

    q_pos: Tensor
    q_block: Tensor
    q_len: Tensor
    kv_slot: Tensor
    kv_len: Tensor
    replaced: Tensor
    cache_row: Tensor
    mode: Mode

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"Window: mode must be one of {', '.join(MODES)}, got mode={self.mode!r}")
        B, W = self.shape
        expected = {"q_block": (B, W), "q_len": (B,), "kv_slot": (B, W), "kv_len": (B,), "replaced": (B, 2), "cache_row": (B,)}
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"Window: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            if field.name != "mode" and tensor.dtype != torch.int32:
                raise TypeError(f"Window: {field.name} must be int32, got {tensor.dtype}")
            if field.name != "mode" and tensor.device != self.q_pos.device:
                raise ValueError(f"Window: {field.name} must be on {self.q_pos.device}, got {tensor.device}")

    @property
    def shape(self) -> tuple[int, int]:
        if self.q_pos.dim() != 2:
            raise ValueError(f"Window: q_pos must be [B, W], got shape {tuple(self.q_pos.shape)}")
        return self.q_pos.shape[0], self.q_pos.shape[1]
