"""Policies that take tokens back or overwrite them, inside the current block only."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from dlm_kernels import RowState

from ..limits import MAX_SHIFT, number, whole
from .base import Policy, lane_buffer, row_buffer
from .setting import Setting
from .view import Choice, Memory, View


@dataclasses.dataclass(frozen=True)
class RunningConfidence(Policy):
    """Every step writes all masks and takes back the least confident, so that the block fills on a fixed schedule.

    After step i of S, ceil(m0 (i + 1) / S) of the block's m0 masks are written; a token keeps the score of the step
    that wrote it. RCR in MDPO, arXiv:2508.13148.
    """

    family: ClassVar[str] = "revise"
    remask: ClassVar[str] = "lowest"

    def memory(self, setting: Setting, state: RowState) -> Memory:
        return {"run": lane_buffer(setting, state, torch.float32)}

    def choose(self, view: View, choice: Choice) -> Choice:
        masks, steps = view.state.block_masks.long(), view.setting.sampling.steps.clamp(min=1)
        done = torch.minimum((masks * (view.block_step + 1) + steps - 1) // steps, masks)
        run = view.keep("run", torch.where(view.eligible, choice.score, view.memory["run"]))
        return dataclasses.replace(choice.only(view.eligible), remask_score=run, remask_count=(masks - done).int())


@dataclasses.dataclass(frozen=True)
class Backtrack(Policy):
    """Writes what beats the mean confidence of all earlier writes (at least `min_unmask`), takes back what fell most.

    Saber, arXiv:2510.18165.
    """

    reads: ClassVar[str] = "region"
    family: ClassVar[str] = "revise"
    remask: ClassVar[str] = "saber"

    def memory(self, setting: Setting, state: RowState) -> Memory:
        whole = torch.zeros_like(state.unmask_confidence)
        return {
            "last": lane_buffer(setting, state, torch.float32),
            "final": whole,
            "ever": torch.zeros_like(whole, dtype=torch.bool),
        }

    def choose(self, view: View, choice: Choice) -> Choice:
        last = torch.where((view.block_step == 0)[:, None], 0.0, view.memory["last"])
        fall = view.confidence - last
        view.keep("last", view.confidence)
        ever = view.memory["ever"]
        count = ever.sum(1)
        mean = torch.where(ever, view.memory["final"].double(), 0.0).sum(1) / count.clamp(min=1)
        value = torch.where(count > 0, mean, 1.0).float()
        return dataclasses.replace(choice, score=view.confidence, rank=None, value=value, remask_score=fall)

    def after(self, view: View, choice: Choice, written: torch.Tensor) -> None:
        # Lanes past the canvas write to a column of their own.
        L = view.memory["final"].shape[1]
        place = torch.where(written, view.position.long(), L)

        def put(name: str, values: torch.Tensor) -> None:
            buffer = view.memory[name]
            buffer.copy_(torch.nn.functional.pad(buffer, (0, 1)).scatter(1, place, values)[:, :L])

        put("final", view.confidence)
        put("ever", torch.ones_like(written))


@dataclasses.dataclass(frozen=True)
class Wino(Policy):
    """Wide in, narrow out: writes boldly, and takes back what its context no longer supports. WINO, arXiv:2507.18578.

    A shadow copy of the block predicts every written token from all the others; the lowest of those below
    verify_threshold are masked again, fewer than the step before has written.
    """

    verify_threshold: float = 0.9
    reads: ClassVar[str] = "region"
    family: ClassVar[str] = "revise"
    remask: ClassVar[str] = "wino"
    # Tokens a step may write: this share of the masks, within bounds. What the first step of a block counts as the step
    # before it.
    share: ClassVar[float] = 0.7
    least: ClassVar[int] = 5
    most: ClassVar[int] = 20
    first: ClassVar[int] = 30

    def __post_init__(self) -> None:
        number("policy Wino", "verify_threshold", self.verify_threshold, 0, 1)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        return {"accepted": row_buffer(state, torch.int32)}

    def choose(self, view: View, choice: Choice) -> Choice:
        cap = (view.eligible.sum(1).double() * self.share).floor().clamp(self.least, self.most).int()
        before = torch.where(view.block_step == 0, self.first, view.memory["accepted"])
        return dataclasses.replace(
            choice,
            max_unmask=cap,
            remask_score=view.back,
            remask_count=before - 1,
            remask_value=torch.full_like(choice.value, self.verify_threshold),
        )

    def after(self, view: View, choice: Choice, written: torch.Tensor) -> None:
        view.keep("accepted", written.sum(1).int())


@dataclasses.dataclass(frozen=True)
class JointThreshold(Policy):
    """Masks become tokens above the threshold, tokens become other tokens above `edit_threshold`. LLaDA2.1,
    arXiv:2602.08676.

    A block ends with a step that changes nothing, or after `max_post_edits` steps without masks. repeat_penalty is
    subtracted from the logit of the token before each position, of the block; its first position has none (SGLang).
    """

    edit_threshold: float = 0.0
    max_post_edits: int = 16
    repeat_penalty: float = 0.0
    reads: ClassVar[str] = "region"
    family: ClassVar[str] = "edit"

    def __post_init__(self) -> None:
        number("policy JointThreshold", "edit_threshold", self.edit_threshold)
        whole("policy JointThreshold", "max_post_edits", self.max_post_edits)
        number("policy JointThreshold", "repeat_penalty", self.repeat_penalty, -MAX_SHIFT, MAX_SHIFT)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        return {"post": row_buffer(state, torch.int32)}

    def choose(self, view: View, choice: Choice) -> Choice:
        if self.repeat_penalty:
            L = view.state.tokens.shape[1]
            before = view.state.tokens.gather(1, (view.position - 1).clamp(0, L - 1).long())
            before = torch.where(view.position > view.state.block_start[:, None], before, -1)[:, :, None]
            choice = view.restated(choice, before, torch.full_like(before, -self.repeat_penalty, dtype=torch.float32))
        full = ~view.eligible.any(1)
        post = view.keep("post", torch.where(view.block_step == 0, 0, view.memory["post"]) + full)
        settled = full & (post > self.max_post_edits)
        return dataclasses.replace(
            choice, edit_value=torch.full_like(choice.value, self.edit_threshold).masked_fill(settled, math.inf)
        )
