"""Counter-based noise: the integer generator that the reference and the kernels share, bit for bit.

A number depends on nothing but its address: the seed, the request, the absolute position, the row's own step and, for
token noise, the vocabulary id. Where a row sits in a batch, how wide the batch is and in what order rows are computed
do not enter, so a sampled generation is reproducible and equals the same request run alone.

    row key     (k0, k1, _, _) = Philox-4x32-10(counter = (request, position, step, TOKEN_STREAM), key = seed lo, hi)
    token bits  fmix32(fmix32(id ^ k0) + k1), uint32 wraparound          fmix32: finaliser of MurmurHash3 (A. Appleby)
    uniform     ((bits >> 9) + 0.5) * 2^-23, exact in fp32, never 0 or 1
    gumbel      -log(-log(uniform))

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Philox is paid once a row;
a token costs the two cheap rounds. All uint32 are held in int64 tensors, which have every operation on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks.noise import check_noise

# The fourth word of the Philox counter says what the numbers are for, so that two streams never share a counter.
TOKEN_STREAM, ORDER_STREAM = 0, 1

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def row_key(seed: Tensor, noise: Tensor) -> Tensor:
    """The two words that address each row's token noise.

    Args:
        seed: [1] int64 of all rows, or [N] with one for each.
        noise: [N, 3] int32 (request index, absolute position, the row's own step); negative values wrap to uint32.
    Returns:
        [N, 2] int64 in [0, 2^32).
    """
    return _row_words(seed, noise, TOKEN_STREAM)[:, :2]


def bits(key: Tensor, vocab_ids: Tensor) -> Tensor:
    """[N, V] int64 in [0, 2^32): the random word of every (row, vocabulary id).

    Args:
        key: [N, 2] from `row_key`.
        vocab_ids: [V] or [N, V] integer ids.
    """
    k0, k1 = key[:, :1], key[:, 1:]
    return _fmix32((_fmix32((vocab_ids.to(torch.int64) & _MASK) ^ k0) + k1) & _MASK)


def uniform(key: Tensor, vocab_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, V] in (0, 1), a multiple of 2^-24; the same numbers in fp32 and in fp64."""
    return _to_unit_interval(bits(key, vocab_ids), dtype)


def gumbel(key: Tensor, vocab_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, V] standard Gumbel noise: argmax(log p + gumbel) is a draw from p. Lies in (-2.82, 16.64)."""
    return -torch.log(-torch.log(uniform(key, vocab_ids, dtype)))


def uniform_scores(seed: Tensor, noise: Tensor) -> Tensor:
    """[N] fp32 in (0, 1): one number per row, for unmasking in random order. Independent of the row's token noise.

    Args:
        seed: [1] or [N] int64 as for `row_key`, contiguous.
        noise: [N, 3] int32 as for `row_key`, contiguous.
    Raises:
        TypeError: dtype.  ValueError: shape, device, a tensor that is not contiguous.
    """
    check_noise(seed, noise)
    return _to_unit_interval(_row_words(seed, noise, ORDER_STREAM)[:, 0], torch.float32)


def philox_4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox-4x32.

    Args:
        counter: [..., 4] int64 in [0, 2^32).
        key: [..., 2] int64 in [0, 2^32), broadcast against `counter`.
    Returns:
        [..., 4] int64 in [0, 2^32).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def _row_words(seed: Tensor, noise: Tensor, stream: int) -> Tensor:
    if noise.dtype != torch.int32 or noise.dim() != 2 or noise.shape[1] != 3:
        raise ValueError(f"noise: noise must be int32 [N, 3], got {noise.dtype} {list(noise.shape)}")
    if seed.dtype != torch.int64 or seed.shape not in ((1,), (len(noise),)):
        raise ValueError(
            f"noise: seed must be int64 [1] or [N], got {seed.dtype} {list(seed.shape)} (N = {len(noise)})"
        )
    address = noise.to(torch.int64) & _MASK
    counter = torch.cat((address, torch.full_like(address[:, :1], stream)), 1)
    key = torch.stack((seed & _MASK, (seed >> 32) & _MASK), 1)
    return philox_4x32_10(counter, key)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a uint32 product, through 16-bit halves, because the full product does not fit int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _MASK


def _fmix32(h: Tensor) -> Tensor:
    h = h ^ (h >> 16)
    h = _multiply(h, 0x85EBCA6B)[1]
    h = h ^ (h >> 13)
    h = _multiply(h, 0xC2B2AE35)[1]
    return h ^ (h >> 16)


def _to_unit_interval(word: Tensor, dtype: torch.dtype) -> Tensor:
    return ((word >> 9).to(dtype) + 0.5) * 2.0**-23
