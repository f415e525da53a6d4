"""Policies that change which masked positions are written: thresholds that move, scores that are weighted."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch
import torch.nn.functional as F

from dlm_kernels import RowState

from ..limits import number, whole
from .base import Policy
from .setting import Setting
from .view import Choice, Memory, View

# Below this width a neighbour's weight is 0 in float64 anyway, and a little further below the square of the width is 0.
MIN_SIGMA = 1e-2


@dataclasses.dataclass(frozen=True)
class NearBest(Policy):
    """Where no score reaches the threshold, the threshold sinks to just below the best score.

    The step then writes the best position and the positions that nearly tie with the best one:

        value = min(value, best score - slack)

    dInfer, arXiv:2510.08666.

    Attributes:
        slack: how far below the best score the threshold sinks.
    """

    slack: float = 1e-5
    lane_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        number("policy NearBest", "slack", self.slack, 0)

    def choose(self, view: View, choice: Choice) -> Choice:
        best_score = torch.where(view.eligible, choice.score, view.setting.constants.lowest).amax(1)
        return dataclasses.replace(choice, value=torch.minimum(choice.value, best_score - self.slack))


@dataclasses.dataclass(frozen=True)
class AdaptiveThreshold(Policy):
    """The threshold falls as the block fills: value * (1 - alpha * (1 - masked / block)).

    Streaming-dLLM, arXiv:2601.17917.

    Attributes:
        alpha: the share of the threshold that is lost when the block is full.
    """

    alpha: float = 0.3
    lane_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        number("policy AdaptiveThreshold", "alpha", self.alpha, 0, 1)

    def choose(self, view: View, choice: Choice) -> Choice:
        masked, length = (lanes.sum(1, dtype=torch.float32) for lanes in (view.eligible, view.in_region))
        masked_share = masked / length.clamp(min=1)
        return dataclasses.replace(choice, value=choice.value * (1 - self.alpha * (1 - masked_share)))


@dataclasses.dataclass(frozen=True)
class LocalLeap(Policy):
    """Positions near a confident position (score >= the threshold) need to pass a lower threshold only.

    LocalLeap, arXiv:2510.07081.

    Attributes:
        relaxed_threshold: the threshold of a position near a confident one.
        distance: how many positions away from a confident position counts as near.
    """

    relaxed_threshold: float = 0.75
    distance: int = 4
    lane_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        number("policy LocalLeap", "relaxed_threshold", self.relaxed_threshold)
        whole("policy LocalLeap", "distance", self.distance)

    def choose(self, view: View, choice: Choice) -> Choice:
        anchors = (view.eligible & (choice.score >= choice.value[:, None])).float()
        reach = min(self.distance, anchors.shape[1])
        is_near = F.max_pool1d(anchors[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0] > 0
        return dataclasses.replace(choice, value=torch.where(is_near, self.relaxed_threshold, choice.value[:, None]))


@dataclasses.dataclass(frozen=True)
class CertaintyPrior(Policy):
    """Every score is multiplied by the share of the position's neighbours that are decoded, weighted by a Gaussian.

    Positions left of the canvas count as decoded; positions right of the canvas count as the last position of the
    canvas does. d2Cache, arXiv:2509.23094.

    Attributes:
        sigma: the width of the Gaussian, in positions.
    """

    sigma: float = 10.0
    lane_fields: ClassVar[tuple[str, ...]] = ()
    reach: ClassVar[int] = 30  # neighbours on either side that are weighed

    def __post_init__(self) -> None:
        number("policy CertaintyPrior", "sigma", self.sigma, MIN_SIGMA)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        offset = torch.arange(-self.reach, self.reach + 1, device=state.tokens.device, dtype=torch.float64)
        weight = torch.exp(-(offset**2) / (2 * float(self.sigma) ** 2))
        # No row owns the weights, so that they are no buffer.
        return {"smoothed": functools.partial(F.conv1d, weight=(weight / weight.sum())[None, None])}

    def choose(self, view: View, choice: Choice) -> Choice:
        state, counted = view.state, view.setting.constants.counted
        # Behind the canvas stands its last token.
        last = state.canvas_len[:, None] - counted(1, 1)
        tokens = state.tokens.gather(1, torch.minimum(counted(state.tokens.shape[1]), last))
        decoded = (tokens != view.setting.mask_id).double()[:, None]
        padded = F.pad(F.pad(decoded, (0, self.reach), mode="replicate"), (self.reach, 0), value=1.0)
        prior = view.memory["smoothed"](padded)[:, 0].gather(1, view.lanes.place).float()
        return dataclasses.replace(choice, score=choice.score * prior)
