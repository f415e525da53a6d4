"""Policies that decide when a step computes a stale cache again."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from ..limits import number
from .base import Policy
from .view import Choice, View


@dataclasses.dataclass(frozen=True)
class EntropyRefresh(Policy):
    """Refreshes the cache after a step that wrote a token of high entropy.

    This follows the idea of EntropyCache, arXiv:2603.18489.

    Attributes:
        refresh_entropy: the entropy in nats above which a written token asks for a refresh.
    """

    refresh_entropy: float = 1.0
    lane_fields: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ("entropy",)
    family: ClassVar[str] = "refresh"

    def __post_init__(self) -> None:
        number("policy EntropyRefresh", "refresh_entropy", self.refresh_entropy, 0)

    def refreshes(self, view: View, choice: Choice, written: Tensor) -> Tensor:
        return (written & (view.entropy > self.refresh_entropy)).any(1)
