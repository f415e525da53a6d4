"""Random tensors for a batch of rows, of which each may be drawn in another way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RandomRows:
    """Random tensors of B rows, all from one generator."""

    def __init__(self, generator: torch.Generator, B: int) -> None:
        self.generator, self.B = generator, B

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1); [B] without a shape."""
        return torch.rand(shape or (self.B,), generator=self.generator)

    def integers(self, low: int | Tensor, high: int | Tensor, *shape: int) -> Tensor:
        """int32, low <= x < high; [B] without a shape. The bounds may differ from row to row."""
        part = torch.rand(shape or (self.B,), generator=self.generator, dtype=torch.float64)
        return (low + ((high - low) * part).floor()).int()

    def chance(self, share: float, *shape: int) -> Tensor:
        """bool; [B] without a shape."""
        return self.uniform(*shape) < share

    def chance_of(self, shares: Tensor) -> Tensor:
        """bool, True with the probability that each element says."""
        return self.uniform(*shares.shape) < shares

    def drawn(self, share: float) -> bool:
        return bool(self.chance(share, 1))

    def pick(self, choices: Sequence[float], *shape: int) -> Tensor:
        """One of the choices for each element; [B] without a shape."""
        index = torch.randint(len(choices), shape or (self.B,), generator=self.generator)
        return torch.tensor(choices)[index]

    def one_of(self, *options: Tensor) -> Tensor:
        """Every row from one of the tensors."""
        index = torch.randint(len(options), (self.B,), generator=self.generator)
        return torch.stack(options)[index, torch.arange(self.B)]
