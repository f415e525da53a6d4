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


def schedule_of(setting: Setting) -> Memory:
    """What `scheduled_step` reads of every row: what its blocks are counted from, [B, 2] int32, and the steps of each
    [B, 1] float64."""
    first = setting.first
    # A product of int32 may wrap.
    return {
        "origin": torch.stack([first - (setting.block_length - 1), first], -1),
        "steps": setting.sampling.steps[:, None].double(),
    }


def scheduled_step(view: View) -> tuple[Tensor, Tensor]:
    """The row's place in its fixed schedule: (index of this step, steps in all), [B] float64."""
    ends = torch.stack([view.state.canvas_len, view.state.block_start], -1)
    blocks = (ends - view.memory["origin"]) // view.setting.block_length
    total, before = (blocks * view.memory["steps"]).unbind(-1)
    return before + view.block_step, total


def reduce_gap(view: View, among: Tensor, count: Tensor, reduction: str) -> Tensor:
    """[B] float64: one number per row, made of the row's gaps on the lanes `among` [B, W] bool, of which there are
    `count` [B].

    "median" is the lower median, and "quantile" is the interpolated 0.2 quantile.
    """
    if reduction == "mean":
        return torch.where(among, view.gap, view.zero).double().sum(1) / count.clamp(min=1)
    ordered = torch.where(among, view.gap.double(), math.inf).sort(1).values

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
    lane_fields: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ("gap",)
    reads: ClassVar[str] = "row"
    family: ClassVar[str] = "exit"
    thirds: ClassVar[tuple[float, float]] = (0.33, 0.67)  # where the second and the last third of the schedule begin

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
        if self.answer_start is None:
            return lanes.masked
        return lanes.masked | self._answer(setting, lanes, state)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        # No row owns them, so that they are no buffers.
        values = [torch.tensor(x, dtype=torch.float64) for x in (self.thirds, self.gap_thresholds)]
        return {**schedule_of(setting), "thirds": tuple(x.to(state.tokens.device) for x in values)}

    def choose(self, view: View, choice: Choice) -> Choice:
        step, steps = scheduled_step(view)
        thirds, thresholds = view.memory["thirds"]
        threshold = thresholds[torch.bucketize((step + 1) / steps, thirds, right=True)]
        answer = self._answer(view.setting, view.lanes, view.state)
        count = answer.sum(1)
        exits = (count > 0) & (reduce_gap(view, answer, count, "mean") >= threshold)
        return dataclasses.replace(choice, exits=exits)


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
    lane_fields: ClassVar[tuple[str, ...]] = ()
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
        return {
            **schedule_of(setting),
            "predicted": lane_buffer(setting, state, torch.int64, -1),
            "calm": row_buffer(state, torch.int32),
        }

    def choose(self, view: View, choice: Choice) -> Choice:
        step, steps = scheduled_step(view)
        one_step = steps <= 1
        u = (step / (steps - 1).clamp(min=1)).masked_fill_(one_step, 1.0)
        span = self.high - self.low
        if self.curve == "cosine":
            threshold = self.low + 0.5 * span * (1 + torch.cos(math.pi * u))
        elif self.curve == "linear":
            threshold = self.high - span * u
        else:
            threshold = self.low + span * torch.exp(-float(self.rate) * u)
        threshold.masked_fill_(one_step, self.low)

        masks = view.masked.sum(1)
        changes = view.masked & (view.greedy != view.memory["predicted"])
        changed = changes.sum(1, dtype=torch.float64) / masks.clamp(min=1)
        changed.masked_fill_(view.step == 0, 1.0)
        has_progress = 1 - masks.double() / view.state.canvas_len >= self.min_progress
        calm_steps = (view.memory["calm"] + 1) * (has_progress & (changed <= self.max_change))
        view.keep("calm", calm_steps)
        view.keep("predicted", view.greedy)
        gap = reduce_gap(view, view.masked, masks, self.reduce)
        exits = has_progress & (gap >= threshold) & (calm_steps > self.patience)
        choice = dataclasses.replace(choice, exits=exits)
        if choice.pred is view.greedy and choice.confidence is view.greedy_confidence:
            return choice
        return dataclasses.replace(
            choice,
            pred=torch.where(exits[:, None], view.greedy, choice.pred),
            confidence=torch.where(exits[:, None], view.greedy_confidence, choice.confidence),
        )
