"""Policies that exit early: once the answer is certain enough, a step writes every mask that is left."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from dlm_kernels import RowState

from ..limits import number, shown, whole
from .base import Policy, lane_buffer, row_buffer
from .setting import Setting
from .view import Choice, Lanes, Memory, View

ANSWER_LENGTH = 5  # positions of an answer whose start is known (Prophet)
CURVES = ("cosine", "linear", "exponential")
REDUCTIONS = ("mean", "median", "quantile", "min")


def scheduled_step(view: View) -> tuple[Tensor, Tensor]:
    """The row's place in its fixed schedule: (index of this step, steps in all), [B] float64."""
    length = view.setting.sampling.block_length
    blocks = (view.state.canvas_len - view.setting.first + length - 1) // length
    block = (view.state.block_start - view.setting.first) // length
    steps = view.setting.sampling.steps.double()  # a product of int32 may wrap
    return block * steps + view.block_step, blocks * steps


def reduce_gap(gap: Tensor, among: Tensor, reduction: str) -> Tensor:
    """[B] float64: one number per row, made of the row's gaps on the lanes `among` [B, W] bool.

    "median" is the lower median, and "quantile" is the interpolated 0.2 quantile.
    """
    count = among.sum(1)
    if reduction == "mean":
        return torch.where(among, gap.double(), 0.0).sum(1) / count.clamp(min=1)
    ordered = torch.where(among, gap.double(), math.inf).sort(1).values

    def gap_at(index: Tensor) -> Tensor:
        return ordered.gather(1, index.clamp(0, ordered.shape[1] - 1).long()[:, None])[:, 0]

    if reduction == "quantile":
        place = 0.2 * (count - 1).clamp(min=0).double()
        low, high = gap_at(place.floor()), gap_at(place.ceil())
        return low + torch.where(high > low, (high - low) * (place - place.floor()), 0.0)
    return gap_at((count - 1).clamp(min=0) // 2 if reduction == "median" else torch.zeros_like(count))


@dataclasses.dataclass(frozen=True)
class Prophet(Policy):
    """Exits when the mean logit gap of the answer reaches a threshold that falls along the schedule.

    Where a cache leaves later blocks uncomputed (dual, block-causal), an exit finishes the block instead of the row.
    Prophet, arXiv:2508.19982.

    Attributes:
        answer_start: offset in the response of the answer's five positions, whose gaps count; None = the gaps of all
            masked positions of the row count.
        gap_thresholds: the thresholds in the first third of the schedule, in the second third and in the rest.
    """

    answer_start: int | None = None
    gap_thresholds: tuple[float, float, float] = (7.5, 5.0, 2.5)
    outputs: ClassVar[tuple[str, ...]] = ("gap",)
    reads: ClassVar[str] = "row"
    family: ClassVar[str] = "exit"

    def __post_init__(self) -> None:
        whole("policy Prophet", "answer_start", self.answer_start, none=True)
        gaps = self.gap_thresholds
        if not isinstance(gaps, (tuple, list)) or len(gaps) != 3:
            raise ValueError(f"policy Prophet: gap_thresholds must be three numbers, got gap_thresholds={shown(gaps)}")
        for gap in gaps:
            number("policy Prophet", "gap_thresholds", gap)

    def _answer(self, setting: Setting, lanes: Lanes, state: RowState) -> Tensor:
        if self.answer_start is None:
            return lanes.masked
        start = setting.first[:, None] + self.answer_start
        answer = (
            (lanes.position >= start)
            & (lanes.position < start + ANSWER_LENGTH)
            & (lanes.position < state.canvas_len[:, None])
        )
        # With a cache, a step does not compute the positions before the block.
        return answer if not setting.cached else answer & (lanes.position >= state.block_start[:, None])

    def needed(self, setting: Setting, lanes: Lanes, state: RowState) -> Tensor:
        return lanes.masked | self._answer(setting, lanes, state)

    def choose(self, view: View, choice: Choice) -> Choice:
        step, steps = scheduled_step(view)
        u = (step + 1) / steps
        first_third, second_third, rest = self.gap_thresholds
        threshold = torch.where(u < 0.33, first_third, torch.where(u < 0.67, torch.full_like(u, second_third), rest))
        answer = self._answer(view.setting, view.lanes, view.state)
        return dataclasses.replace(choice, exits=answer.any(1) & (reduce_gap(view.gap, answer, "mean") >= threshold))


@dataclasses.dataclass(frozen=True)
class Sched(Policy):
    """Exits when the logit gap of the masked positions reaches a curve that falls from `high` to `low`.

    The curve is a function of u = step / (steps - 1):

        cosine       low + (high - low) * (1 + cos(pi u)) / 2
        linear       high - (high - low) * u
        exponential  low + (high - low) * exp(-rate * u)

    The predictions must also be calm: for `patience` + 1 steps, at most a share `max_change` of the masked positions
    changed their prediction. SchED, arXiv:2512.02892.

    Attributes:
        curve: shape of the curve: "cosine", "linear" or "exponential".
        high: value of the curve at the first step.
        low: value of the curve at the last step.
        rate: how fast the curve "exponential" falls.
        min_progress: share of the canvas that must be written before a row may exit.
        patience: number of further steps that the predictions must have been calm.
        max_change: largest share of changed predictions in a calm step.
        reduce: how the gaps of the positions become one number: "mean", "median", "quantile" or "min".
    """

    curve: str = "cosine"
    high: float = 7.5
    low: float = 2.5
    rate: float = 4.0
    min_progress: float = 0.0
    patience: int = 0
    max_change: float = 0.0
    reduce: str = "mean"
    outputs: ClassVar[tuple[str, ...]] = ("gap",)
    reads: ClassVar[str] = "row"
    family: ClassVar[str] = "exit"

    def __post_init__(self) -> None:
        for name, known in (("curve", CURVES), ("reduce", REDUCTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"policy Sched: {name} must be one of {', '.join(known)}, got {name}={shown(getattr(self, name))}"
                )
        for name in ("high", "low"):
            number("policy Sched", name, getattr(self, name))
        number("policy Sched", "rate", self.rate, 0)
        for name in ("min_progress", "max_change"):
            number("policy Sched", name, getattr(self, name), 0, 1)
        whole("policy Sched", "patience", self.patience)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        return {"predicted": lane_buffer(setting, state, torch.int64, -1), "calm": row_buffer(state, torch.int32)}

    def choose(self, view: View, choice: Choice) -> Choice:
        step, steps = scheduled_step(view)
        u = torch.where(steps > 1, step / (steps - 1).clamp(min=1), 1.0)
        span = self.high - self.low
        if self.curve == "cosine":
            threshold = self.low + 0.5 * span * (1 + torch.cos(math.pi * u))
        elif self.curve == "linear":
            threshold = self.high - span * u
        else:
            threshold = self.low + span * torch.exp(-float(self.rate) * u)
        threshold = torch.where(steps > 1, threshold, self.low)

        masks = view.masked.sum(1)
        changed = (view.masked & (view.greedy != view.memory["predicted"])).sum(1).double() / masks.clamp(min=1)
        changed = torch.where(view.step == 0, 1.0, changed)
        progress = 1 - masks.double() / view.state.canvas_len
        has_progress = progress >= self.min_progress
        calm_steps = torch.where(has_progress & (changed <= self.max_change), view.memory["calm"] + 1, 0)
        view.keep("calm", calm_steps)
        view.keep("predicted", view.greedy)
        exits = (
            has_progress & (reduce_gap(view.gap, view.masked, self.reduce) >= threshold) & (calm_steps > self.patience)
        )
        return dataclasses.replace(
            choice,
            exits=exits,
            pred=torch.where(exits[:, None], view.greedy, choice.pred),
            confidence=torch.where(exits[:, None], view.greedy_confidence, choice.confidence),
        )
