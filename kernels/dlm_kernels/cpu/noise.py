"""The generator of `reference.noise`, bit for bit, in numpy: its integers have 32 bits as they stand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..reference.noise import TOKEN_STREAM

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_LOW, _HALF = np.uint64(_MASK), np.uint64(32)
# [2, rounds, 1]: what the two words of a seed have grown by at each round.
_KEY_GROWTH = np.outer((0x9E3779B9, 0xBB67AE85), range(_ROUNDS)).astype(np.uint64)[:, :, None]


def row_key(seed: Tensor, noise: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The two words [N] uint32 that address the token noise of each row, from a seed [1] int64 of all rows or [N] with
    one for each, and the rows' counters [N, 3] int32: the first half of Philox-4x32-10."""
    c0, c1, c2 = noise.numpy().T.astype(np.uint64) & _LOW
    c3 = np.full_like(c0, TOKEN_STREAM)
    number = seed.numpy().astype(np.uint64)
    for k0, k1 in zip(*((np.stack((number & _LOW, number >> _HALF))[:, None] + _KEY_GROWTH) & _LOW)):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (right >> _HALF) ^ c1 ^ k0, right & _LOW
        c2, c3 = (left >> _HALF) ^ c3 ^ k1, left & _LOW
    return c0.astype(np.uint32), c1.astype(np.uint32)


def gumbel(k0: np.ndarray, k1: np.ndarray, ids: np.ndarray, dtype: torch.dtype) -> Tensor:
    """[P] standard Gumbel noise of P pairs of a row's key [P] uint32 and a vocabulary id [P]."""
    word = _fmix32(_fmix32(ids.astype(np.uint32) ^ k0) + k1)
    uniform = torch.from_numpy((word >> np.uint32(9)).astype(np.float32)).to(dtype).add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def _fmix32(h: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3, in place."""
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h
