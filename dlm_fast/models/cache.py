"""Static key/value buffers behind transformers' `Cache` interface."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class KVLayer(CacheLayerMixin):
    """One layer's buffers. `update` hands keys and values through: `block_attention` stores and attends in one op."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers are made with the cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """The older name of `get_max_length` (transformers 5.17)."""
        return self.get_max_length()


class KVCache(Cache):
    """Keys (after RoPE) and values of every layer, `[rows, H_kv, capacity, D]` each, allocated once and never grown.

    Lengths live in the `Window` of each forward, not here: which slots are visible, hidden or written is the decoder's
    choice, per row. `capacity=0` stores nothing (decoders that recompute the whole canvas).

    Args:
        num_layers, num_kv_heads, head_dim: of the model.
        rows: batch rows. capacity: slots per row.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        shape = (rows, num_kv_heads, capacity, head_dim)

        def buffer() -> Tensor | None:
            return torch.zeros(shape, dtype=dtype, device=device) if capacity else None

        super().__init__(layers=[KVLayer(buffer(), buffer()) for _ in range(num_layers)])
