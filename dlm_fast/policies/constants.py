"""Tensors that are the same for every row and every step of a decode. They are made once, when the decode is opened,
because a small tensor that is made in a step costs the step a launch."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Constants:
    """Numbers of which a step takes views, since a view costs no launch. Nobody may write them.

    Attributes:
        counted: [length] int64: 0, 1, 2, ...
        places: [size] int32: the same numbers.
        zero: [size] int64: zeros, whose bytes are zeros of any dtype.
        none: [size] int32: -1, which stands for no cache slot and no row of logits.
        lowest: [1] fp32: -inf.
        kept_share: [length] fp64 of a preset that drops positions behind the block at random (`scatter_suffix`): the
            probability with which the n-th of them is kept; 2 at n = 0, for the positions that are always kept. None of
            other presets.
    """

    counted: Tensor
    places: Tensor
    zero: Tensor
    none: Tensor
    lowest: Tensor
    kept_share: Tensor | None

    @classmethod
    def of(cls, rows: int, length: int, horizon: int | None, device: torch.device) -> Constants:
        """The constants of a decode.

        Args:
            rows: the most rows of a step.
            length: the most positions that a row computes or looks at.
            horizon: positions behind the block that are seen, if they are dropped at random; else None.
            device: where the tensors lie.
        """
        size = max(1, rows) * length
        places = torch.arange(size, dtype=torch.int32, device=device)
        zero = torch.zeros(size, dtype=torch.int64, device=device)
        counted, kept_share = places[:length].long(), None
        if horizon is not None:
            # A Gaussian of a quarter of the horizon. DPad, arXiv:2508.14148.
            z = 4 * (counted - 1).double() / max(1, horizon - 1)
            kept_share = (1.6 * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)).clamp(max=1)
            kept_share[0] = 2
        lowest = torch.full((1,), -torch.inf, dtype=torch.float32, device=device)
        return cls(counted, places, zero, torch.full_like(places, -1), lowest, kept_share)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Zeros of a shape."""
        return self.zero.view(dtype)[: math.prod(shape)].view(shape)

    def nothing(self, *shape: int) -> Tensor:
        """-1 in int32, of a shape."""
        return self.none[: math.prod(shape)].view(shape)
