"""Key/value buffers of a fixed size, behind transformers' `Cache` interface."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class KVLayer(CacheLayerMixin):
    """One layer's buffers.

    `update` only hands keys and values through, since `block_attention` stores and attends in one op.

    Attributes:
        keys: [rows, H_kv, capacity, D]; None without a capacity.
        values: the values, of the same shape as `keys`.
        is_initialized: always True, for transformers.
    """

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing, because the buffers are made with the cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """`get_max_length` by its name in transformers 5.17."""
        return self.get_max_length()


class KVCache(Cache):
    """Keys (after RoPE) and values of every layer, `[rows, H_kv, capacity, D]` each, allocated once and never grown.

    The cache holds no lengths: for each row the decoder chooses which slots are visible, hidden or written, and tells
    this in the `Window` of each forward.

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

        super().__init__(layers=[KVLayer(buffer(device), buffer(device)) for device in devices])
