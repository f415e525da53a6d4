"""Policies that remember earlier steps of the block: stable predictions, short lists, accumulated credit."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from dlm_kernels import RowState
from dlm_kernels.checks.confidence import MAX_BIAS

from ..limits import MAX_SHIFT, flag, number, whole
from .base import Policy, lane_buffer
from .setting import Setting
from .view import Choice, Memory, View, ordered


@dataclasses.dataclass(frozen=True)
class KLStability(Policy):
    """Writes every position that is confident and whose distribution stood still for some steps.

        ready = score > threshold, and KL(p_t || p_{t-1}) < kl_threshold in the last kl_history steps of this block

    Where no position is ready, the step writes the schedule's share. KLASS, arXiv:2511.05664.

    Attributes:
        kl_threshold: the divergence, in nats, below which a distribution stood still.
        kl_history: number of steps for which the distribution must have stood still.
    """

    kl_threshold: float = 0.015
    kl_history: int = 2
    lane_fields: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ("kl",)

    def __post_init__(self) -> None:
        number("policy KLStability", "kl_threshold", self.kl_threshold, 0)
        whole("policy KLStability", "kl_history", self.kl_history, 1)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        return {"calm": lane_buffer(setting, state, torch.int32)}

    def choose(self, view: View, choice: Choice) -> Choice:
        stood_still = (view.block_step > 0)[:, None] & (view.kl < self.kl_threshold)
        calm_steps = view.keep("calm", (view.memory["calm"] + 1) * stood_still)
        ready = view.eligible & (calm_steps >= self.kl_history) & (choice.score > choice.value[:, None])
        return choice.only(ready, fallback=view.quota())


@dataclasses.dataclass(frozen=True)
class ConsistentTrajectory(Policy):
    """Writes candidates that stayed on a short list with an unchanged prediction, instead of this step's best.

    Every step makes a short list of the best positions that the step did not write. A candidate is consistent if the
    position is among the best again, was on the list of the step before, and has the prediction of the step before.
    This is the list form of CCD, arXiv:2512.02044.

    Attributes:
        dynamic: whether a step writes all consistent candidates (CCD-DS), instead of as many as the schedule writes.
    """

    dynamic: bool = False
    lane_fields: ClassVar[tuple[str, ...]] = ()
    warmup: ClassVar[int] = 4  # steps of a block before the list may decide
    longest: ClassVar[int] = 5  # the list's greatest length, in shares of the schedule

    def __post_init__(self) -> None:
        flag("policy ConsistentTrajectory", "dynamic", self.dynamic)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        return {
            "listed": lane_buffer(setting, state, torch.bool),
            "predicted": lane_buffer(setting, state, torch.int64, -1),
        }

    def choose(self, view: View, choice: Choice) -> Choice:
        # 1. The lanes in the order of their scores, and there, what the step before left, and ranks among the eligible.
        order = ordered(choice.score)
        listed = view.memory["listed"] & (view.block_step > 0)[:, None]
        stable = listed & (view.greedy == view.memory["predicted"])
        eligible, listed, stable = (lanes.gather(1, order) for lanes in (view.eligible, listed, stable))
        rank = eligible.cumsum(1)

        # 2. How many positions the schedule writes, and how long the list is: 1 in the first steps, 2 near the end.
        step, masks, steps = view.block_step, view.state.block_masks, view.setting.sampling.steps
        masks_left, share = rank[:, -1], (masks // steps).clamp(min=1)
        two = view.setting.constants.places(1, 2)
        longest = torch.where(10 * masks_left <= masks, two, self.longest * share)
        length = torch.minimum(step - (self.warmup - 2), longest).clamp(min=1)[:, None]
        goes_on = step < steps - 1
        count = torch.where(goes_on, torch.minimum(share, masks_left), masks_left)[:, None]

        # 3. What is written: the best positions, or the best candidates.
        best_lanes = eligible & (rank <= count)
        consistent = eligible & (rank <= length) & stable
        consistent_rank = consistent.cumsum(1)
        has_enough = (consistent_rank[:, -1:] >= count)[:, 0] & (best_lanes & listed).any(1)
        reads_list = (step > self.warmup) & goes_on & has_enough
        candidates = consistent if self.dynamic else consistent & (consistent_rank <= count)
        chosen = torch.where(reads_list[:, None], candidates, best_lanes)

        # 4. The list of the next step, and both in the order of the lanes again.
        rest = eligible & ~chosen
        listed = rest & (rest.cumsum(1) <= length)
        listed, chosen = (torch.empty_like(lanes).scatter_(1, order, lanes) for lanes in (listed, chosen))
        view.keep("listed", listed)
        view.keep("predicted", view.greedy)
        return choice.only(chosen)


@dataclasses.dataclass(frozen=True)
class Credit(Policy):
    """Tokens that led in earlier steps keep a decaying credit, which is added to their logits.

        C <- credit_decay * C
        C[top-1] += p ** credit_power
        decode from logits + credit_weight * ln(1 + C)

    A step gives credit to one token per position, so one slot per step of the block holds all of C. This is the sparse
    form of CreditDecoding (arXiv:2510.06133), as dInfer has the method.

    Attributes:
        credit_decay: what a step leaves of the credit.
        credit_power: exponent of the probability that a leading token is credited with.
        credit_weight: weight of the credit beside the logits.
    """

    credit_decay: float = 0.8
    credit_power: float = 0.2
    credit_weight: float = 0.7
    lane_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        number("policy Credit", "credit_decay", self.credit_decay, 0, 1)
        number("policy Credit", "credit_power", self.credit_power, 0)
        number("policy Credit", "credit_weight", self.credit_weight, 0, MAX_SHIFT)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        B, slots = state.tokens.shape[0], setting.block_length
        if slots > MAX_BIAS:
            raise ValueError(
                f"generate: policy Credit keeps a credit per step and needs block_length <= {MAX_BIAS}, got "
                f"block_length={slots}"
            )
        device = state.tokens.device
        return {
            "ids": torch.full((B, setting.lanes, slots), -1, dtype=torch.int64, device=device),
            "credit": torch.zeros(B, setting.lanes, slots, dtype=torch.float32, device=device),
        }

    def choose(self, view: View, choice: Choice) -> Choice:
        first_step = (view.block_step == 0)[:, None, None]
        constants = view.setting.constants
        ids = torch.where(first_step, constants.nothing(1), view.memory["ids"])
        credit = torch.where(first_step, view.zero, view.memory["credit"]) * self.credit_decay
        slots = constants.places(ids.shape[2])
        has_slot = ids == view.greedy[:, :, None]
        # A token that leads for the first time takes the slot of this step.
        credited = (
            torch.where(has_slot.any(2, keepdim=True), has_slot, slots == view.block_step[:, None, None])
            & view.eligible[:, :, None]
        )
        ids = torch.where(credited, view.greedy[:, :, None], ids)
        credit = torch.where(credited, credit + view.greedy_confidence[:, :, None] ** self.credit_power, credit)
        view.keep("ids", ids)
        view.keep("credit", credit)
        return view.restated(choice, ids, self.credit_weight * torch.log1p(credit))
