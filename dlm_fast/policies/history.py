"""Policies that remember earlier steps of the block: stable predictions, consistent trajectories, accumulated
credit."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from dlm_kernels import RowState
from dlm_kernels.checks.confidence import MAX_BIAS

from ..limits import MAX_SHIFT, flag, number, whole
from .base import Policy, lane_buffer
from .setting import Setting
from .view import Choice, Memory, View


@dataclasses.dataclass(frozen=True)
class KLStability(Policy):
    """Writes every confident position whose distribution stood still for `kl_history` steps, or else the schedule's
    share.

    ready = score > threshold, and KL(p_t || p_{t-1}) < kl_threshold in the last kl_history steps of this block.
    KLASS, arXiv:2511.05664.
    """

    kl_threshold: float = 0.015
    kl_history: int = 2
    outputs: ClassVar[tuple[str, ...]] = ("kl",)

    def __post_init__(self) -> None:
        number("policy KLStability", "kl_threshold", self.kl_threshold, 0)
        whole("policy KLStability", "kl_history", self.kl_history, 1)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        return {"calm": lane_buffer(setting, state, torch.int32)}

    def choose(self, view: View, choice: Choice) -> Choice:
        first = (view.block_step == 0)[:, None]
        calm = torch.where(~first & (view.kl < self.kl_threshold), view.memory["calm"] + 1, 0)
        calm = view.keep("calm", calm)
        ready = view.eligible & (calm >= self.kl_history) & (choice.score > choice.value[:, None])
        return choice.only(ready, fallback=view.quota())


@dataclasses.dataclass(frozen=True)
class ConsistentTrajectory(Policy):
    """Writes candidates that stayed on the short list with the same prediction, instead of this step's best. CCD, list
    form.

    dynamic: all of them (CCD-DS), else as many as the schedule writes. CCD: arXiv:2512.02044.
    """

    dynamic: bool = False
    # Steps before the list may decide; candidates a step gains from then on; the list's longest length in shares of the
    # schedule.
    warmup: ClassVar[int] = 4
    longest: ClassVar[int] = 5

    def __post_init__(self) -> None:
        flag("policy ConsistentTrajectory", "dynamic", self.dynamic)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        return {
            "listed": lane_buffer(setting, state, torch.bool),
            "predicted": lane_buffer(setting, state, torch.int64, -1),
        }

    def choose(self, view: View, choice: Choice) -> Choice:
        i, masks, steps = view.block_step, view.state.block_masks, view.setting.sampling.steps.clamp(min=1)
        left = view.eligible.sum(1).int()
        share = (masks // steps).clamp(min=1)
        length = torch.minimum(i - self.warmup + 2, self.longest * share)
        length = torch.where(i < self.warmup, 1, torch.where(10 * left <= masks, 2, length))
        last = i >= steps - 1
        count = torch.where(last, left, torch.minimum(share, left))

        listed = view.memory["listed"] & (i > 0)[:, None]
        best = view.best(count, choice.score)
        agreed = view.best(length, choice.score) & listed & (view.greedy == view.memory["predicted"])
        plain = (i < self.warmup + 1) | last | ~(best & listed).any(1) | (agreed.sum(1) < count)
        kept = agreed if self.dynamic else view.best(count, choice.score, among=agreed)
        chosen = torch.where(plain[:, None], best, kept)

        view.keep("listed", view.best(length, choice.score, among=view.eligible & ~chosen))
        view.keep("predicted", view.greedy)
        return choice.only(chosen)


@dataclasses.dataclass(frozen=True)
class Credit(Policy):
    """Tokens that led before keep a decaying credit that is added to their logits. CreditDecoding (arXiv:2510.06133) in
    dInfer, sparse form.

    C <- credit_decay * C;  C[top-1] += p ** credit_power;  decode from logits + credit_weight * ln(1 + C).
    Every step touches one token per position, so one slot per step of the block holds all of C.
    """

    credit_decay: float = 0.8
    credit_power: float = 0.2
    credit_weight: float = 0.7

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
        fresh = (view.block_step == 0)[:, None, None]
        ids = torch.where(fresh, -1, view.memory["ids"])
        credit = torch.where(fresh, 0.0, view.memory["credit"]) * self.credit_decay
        slots = torch.arange(ids.shape[2], device=ids.device)
        known = ids == view.greedy[:, :, None]
        # The first step at which a token leads gives it the slot of that step.
        own = (
            torch.where(known.any(2, keepdim=True), known, slots == view.block_step[:, None, None])
            & view.eligible[:, :, None]
        )
        ids = torch.where(own, view.greedy[:, :, None], ids)
        credit = torch.where(own, credit + view.greedy_confidence[:, :, None] ** self.credit_power, credit)
        view.keep("ids", ids)
        view.keep("credit", credit)
        return view.restated(choice, ids, self.credit_weight * torch.log1p(credit))
