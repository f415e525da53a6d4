"""Key/value buffers of a fixed size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass
class KVLayer:
    """One layer's buffers.

    Attributes:
        keys: [rows, H_kv, capacity, D]; None without a capacity.
        values: the values, of the same shape as `keys`.
    """

    keys: Tensor | None
    values: Tensor | None


class KVCache:
    """Keys (after RoPE) and values of every layer, `[rows, H_kv, capacity, D]` each, allocated once and never grown.

    The cache holds no lengths: for each row the decoder chooses which slots are visible, hidden or written, and tells
    this in the `Window` of each forward. It is no cache of transformers and never handed to it: `block_attention`
    stores and attends in one op.

    Args:
        num_kv_heads: key/value heads of a layer.
        head_dim: size of a head.
        rows: rows of the batch.
        capacity: slots per row; 0 = the cache stores nothing, for decoders that recompute the whole canvas.
        dtype: dtype of the buffers.
        devices: device of the buffers of every layer.
    """

    def __init__(
        self,
        *,
        num_kv_heads: int,
        head_dim: int,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        devices: Sequence[torch.device],
    ) -> None:
        self.capacity = capacity
        shape = (rows, num_kv_heads, capacity, head_dim)

        def buffer(device: torch.device) -> Tensor | None:
            return torch.zeros(shape, dtype=dtype, device=device) if capacity else None

        self.layers = [KVLayer(buffer(device), buffer(device)) for device in devices]
