"""What `uniform_scores` accepts: checked by its reference and by the kernel's launcher, without reading an element."""

from __future__ import annotations

import torch
from torch import Tensor

from .named import check_of


@check_of("uniform_scores")
def check_noise(seed: Tensor, noise: Tensor) -> None:
    """Raises unless `uniform_scores` can take the seed and the counters."""
    for name, tensor, dtype in (("seed", seed, torch.int64), ("noise", noise, torch.int32)):
        if tensor.dtype != dtype:
            raise TypeError(f"uniform_scores: {name} must be {dtype}, got {tensor.dtype}")
    if noise.dim() != 2 or noise.shape[1] != 3:
        raise ValueError(f"uniform_scores: noise must be [N, 3], got shape {tuple(noise.shape)}")
    N = noise.shape[0]
    shapes = [(1,)] if N == 1 else [(1,), (N,)]
    if tuple(seed.shape) not in shapes:
        raise ValueError(
            f"uniform_scores: seed must have shape {' or '.join(map(str, shapes))}, got {tuple(seed.shape)} (N = {N})"
        )
    if seed.device != noise.device:
        raise ValueError(f"uniform_scores: seed must be on {noise.device} like noise, got {seed.device}")
    for name, tensor in (("seed", seed), ("noise", noise)):
        if not tensor.is_contiguous():
            raise ValueError(f"uniform_scores: {name} must be contiguous, got strides {tensor.stride()}")
