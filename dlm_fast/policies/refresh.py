"""Policies that decide when a stale cache is computed again."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from ..limits import number
from .base import Policy
from .view import Choice, View


@dataclasses.dataclass(frozen=True)
class EntropyRefresh(Policy):
    """The cache is refreshed after a step that wrote a token of more than `refresh_entropy` nats.

    After the idea of EntropyCache, arXiv:2603.18489.
    """

    refresh_entropy: float = 1.0
    outputs: ClassVar[tuple[str, ...]] = ("entropy",)
    family: ClassVar[str] = "refresh"

    def __post_init__(self) -> None:
        number("policy EntropyRefresh", "refresh_entropy", self.refresh_entropy, 0)

    def refreshes(self, view: View, choice: Choice, written: Tensor) -> Tensor:
        return (torch.where(written, view.entropy, 0.0) > self.refresh_entropy).any(1)
