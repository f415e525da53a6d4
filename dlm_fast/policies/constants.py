"""Tensors that are the same for every row and every step of a decode. They are made once, when the decode is opened,
because a small tensor that is made in a step costs the step a launch."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

# A policy may count so far whatever the canvas is: positions of a block, slots of a position.
LEAST = 4096


@dataclasses.dataclass(frozen=True)
class Constants:
    """Numbers of which a step takes views, since a view costs no launch. Nobody may write them.

    Attributes:
        integers: [length] int64: 0, 1, 2, ...
        indices: [size] int32: the same numbers.
        zero: [size] int64: zeros, whose bytes are zeros of any dtype.
        none: [size] int32: -1.
        lowest: [1] fp32: -inf.
        kept_share: [length] fp64 of a preset that drops positions behind the block at random (`scatter_suffix`): the
            probability with which the n-th of them is kept; 2 at n = 0, for the positions that are always kept. None of
            other presets.
    """

    integers: Tensor
    indices: Tensor
    zero: Tensor
    none: Tensor
    lowest: Tensor
    kept_share: Tensor | None
    _parts: dict[tuple, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, rows: int, length: int, horizon: int | None, device: torch.device) -> Constants:
        """The constants of a decode.

        Args:
            rows: the most rows of a step.
            length: the most positions that a row computes or looks at.
            horizon: positions behind the block that are seen, if they are dropped at random; else None.
            device: where the tensors lie.
        """
        size, length = max(rows * length, LEAST), max(length, LEAST)
        indices = torch.arange(size, dtype=torch.int32, device=device)
        integers, kept_share = indices[:length].long(), None
        if horizon is not None:
            # A Gaussian of a quarter of the horizon. DPad, arXiv:2508.14148.
            z = 4 * (integers - 1).double() / max(1, horizon - 1)
            kept_share = (1.6 * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)).clamp(max=1)
            kept_share[0] = 2
        return cls(
            integers=integers,
            indices=indices,
            zero=torch.zeros(size, dtype=torch.int64, device=device),
            none=torch.full_like(indices, -1),
            lowest=torch.full((1,), -torch.inf, dtype=torch.float32, device=device),
            kept_share=kept_share,
        )

    def counted(self, count: int, begin: int = 0) -> Tensor:
        """[count] int64: begin, begin + 1, ..."""
        return self._part("integers", begin, (count,))

    def places(self, count: int, begin: int = 0) -> Tensor:
        """[count] int32: begin, begin + 1, ..."""
        return self._part("indices", begin, (count,))

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Zeros of a shape."""
        return self._part("zero", 0, shape, dtype)

    def nothing(self, *shape: int) -> Tensor:
        """-1 in int32, of a shape: no cache slot, no row of logits, no id."""
        return self._part("none", 0, shape)

    def _part(self, name: str, begin: int, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A view of a field, which is kept: a decode asks for the same few at every step."""
        key = name, begin, shape, dtype
        if key not in self._parts:
            values, count = getattr(self, name), math.prod(shape)
            values = values if dtype is None else values.view(dtype)
            # A slice that is too long would be cut without a word.
            assert begin + count <= values.shape[0], (begin, count, values.shape)
            self._parts[key] = values[begin : begin + count].view(shape)
        return self._parts[key]
