"""Policies that change which masked positions are written: thresholds that move, scores that are weighted, a learned filter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from dlm_kernels import RowState
from torch import Tensor

from .base import Choice, Memory, Policy, View

if TYPE_CHECKING:
    from ..schedule import Plan


@dataclasses.dataclass(frozen=True)
class NearBest(Policy):
    """The threshold is lowered to just below the best score where nothing reaches it, so near-ties of the best are written with it.

    value = min(value, best score - slack). dInfer, arXiv:2510.08666.
    """

    slack: float = 1e-5

    def choose(self, view: View, choice: Choice) -> Choice:
        best = torch.where(view.eligible, choice.score, -torch.inf).amax(1)
        return dataclasses.replace(choice, value=torch.minimum(choice.value, best - self.slack))


@dataclasses.dataclass(frozen=True)
class AdaptiveThreshold(Policy):
    """The threshold falls as the block fills: value * (1 - alpha * (1 - masked / block)). Streaming-dLLM, arXiv:2601.17917."""

    alpha: float = 0.3

    def choose(self, view: View, choice: Choice) -> Choice:
        left = view.eligible.sum(1).float() / view.in_region.sum(1).clamp(min=1).float()
        return dataclasses.replace(choice, value=choice.value * (1 - self.alpha * (1 - left)))


@dataclasses.dataclass(frozen=True)
class LocalLeap(Policy):
    """Positions within `distance` of a confident one (score >= the threshold) need only `relaxed_threshold`.

    LocalLeap, arXiv:2510.07081.
    """

    relaxed_threshold: float = 0.75
    distance: int = 4

    def choose(self, view: View, choice: Choice) -> Choice:
        anchors = (view.eligible & (choice.score >= choice.value[:, None])).float()
        near = F.max_pool1d(anchors[:, None], 2 * self.distance + 1, stride=1, padding=self.distance)[:, 0] > 0
        return dataclasses.replace(choice, value=torch.where(near, self.relaxed_threshold, choice.value[:, None]))


@dataclasses.dataclass(frozen=True)
class CertaintyPrior(Policy):
    """Scores are multiplied by the Gaussian-weighted share of decoded neighbours (`sigma` positions wide).

    Left of the canvas counts as decoded, right of it as its last position does. d2Cache, arXiv:2509.23094.
    """

    sigma: float = 10.0
    reach: ClassVar[int] = 30

    def choose(self, view: View, choice: Choice) -> Choice:
        state, L = view.state, view.state.tokens.shape[1]
        decoded = state.tokens != view.plan.diffusion.mask_token_id
        last = decoded.gather(1, (state.canvas_len[:, None] - 1).clamp(min=0).long())
        inside = torch.arange(L, device=decoded.device) < state.canvas_len[:, None]
        decoded = torch.where(inside, decoded, last).double()
        padded = torch.cat([torch.ones_like(decoded[:, :1]).expand(-1, self.reach), decoded, last.double().expand(-1, self.reach)], 1)
        offset = torch.arange(-self.reach, self.reach + 1, device=decoded.device, dtype=torch.float64)
        weight = torch.exp(-(offset**2) / (2 * self.sigma**2))
        share = F.conv1d(padded[:, None], (weight / weight.sum())[None, None])[:, 0]
        prior = share.gather(1, view.position.clamp(0, L - 1).long()).float()
        return dataclasses.replace(choice, score=choice.score * prior)


@dataclasses.dataclass(frozen=True)
class LearnedFilter(Policy):
    """A learned head says which predictions are already final; the fixed schedule writes its share besides.

    Learn2PD, arXiv:2509.25188.

    head: (confidence [B, W] fp32, 0 where not eligible) -> [B, W] in [0, 1], on the device. eotp: end-of-text prediction: the row is
    cut after the first accepted position that predicts an EOS, or else after the most confident position that does.
    """

    head: Callable[[Tensor], Tensor] | None = None
    accept_threshold: float = 0.96
    eotp: bool = False

    def memory(self, plan: Plan, state: RowState) -> Memory:
        if self.head is None:
            raise ValueError("generate: preset learn2pd needs a trained filter, pass head=callable(confidence [B, W]) -> [B, W]")
        return {}

    def choose(self, view: View, choice: Choice) -> Choice:
        accepted = view.eligible & (self.head(torch.where(view.eligible, view.confidence, 0.0)) > self.accept_threshold)
        if self.eotp:
            ends = (view.token[:, :, None] == view.sampling.eos).any(2)
            W = ends.shape[1]
            lane = torch.arange(W, device=ends.device)
            first = torch.where(accepted & ends, lane, W).amin(1)
            likely = torch.where(view.eligible & ends, view.confidence, -1.0)
            likely = torch.where((view.eligible & ends).any(1), likely.argmax(1), W)
            cut = torch.where(first < W, first, likely)
            end = view.position[:, 0] + cut.int() + 1
            shorter = torch.where(view.selects & (cut < W), end, view.state.canvas_len)
            view.state.canvas_len.copy_(torch.minimum(view.state.canvas_len, shorter))
            view.state.block_end.copy_(torch.minimum(view.state.block_end, view.state.canvas_len))
        return choice.only(accepted | view.best(view.quota(), choice.score))
