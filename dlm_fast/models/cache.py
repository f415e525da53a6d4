"""Key/value buffers of a fixed size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


@dataclasses.dataclass
class KVLayer:
    """One layer's buffers.

    Attributes:
        keys: [rows, H_kv, capacity, D], or [pages, H_kv, page_size, D] of a cache in pages; None without a capacity.
        values: the values, of the same shape as `keys`.
    """

    keys: Tensor | None
    values: Tensor | None


class Paging(NamedTuple):
    """How a cache is cut into pages.

    Attributes:
        page_size: slots of a page, a power of two.
        pages: pages of all rows together.
    """

    page_size: int
    pages: int


class KVCache:
    """Keys (after RoPE) and values of every layer, allocated once and never grown.

    The cache holds no lengths: for each row the decoder chooses which slots are visible, hidden or written, and tells
    this in the `Window` of each forward. It is no cache of transformers and never handed to it: `block_attention`
    stores and attends in one op. What no window has stored is never read, so that the buffers hold anything at first.

    Attributes:
        layers: the buffers.
        capacity: slots per row.
        page_table: [rows, capacity / page_size] int32 on the first layer's device, which page has a row's slots; None
            of a cache in one piece.
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
        paging: Paging | None = None,
    ) -> None:
        """
        Args:
            num_kv_heads: key/value heads of a layer.
            head_dim: size of a head.
            rows: rows of the batch.
            capacity: slots per row; 0 = the cache stores nothing, for decoders that recompute the whole canvas.
            dtype: dtype of the buffers.
            devices: device of the buffers of every layer.
            paging: None = every row has `capacity` slots of its own, in one piece.
        """
        self.capacity, self.page_table = capacity, None
        shape = (rows, num_kv_heads, capacity, head_dim)
        if paging is not None:
            shape = (paging.pages, num_kv_heads, paging.page_size, head_dim)
            width = -(-capacity // paging.page_size)
            self.page_table = torch.zeros(rows, width, dtype=torch.int32, device=devices[0])

        def buffer(device: torch.device) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=device) if capacity else None

        self.layers = [KVLayer(buffer(device), buffer(device)) for device in devices]
