"""Policies that take tokens back or overwrite tokens, in the current block only."""

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
    """Writes all masks in every step and takes the least confident tokens back, on a fixed schedule.

    After step i of S, ceil(m0 (i + 1) / S) of the block's m0 masks are written. A token keeps the score of the step
    that wrote the token. RCR in MDPO, arXiv:2508.13148.
    """

    lane_fields: ClassVar[tuple[str, ...]] = ()
    family: ClassVar[str] = "revise"
    remask: ClassVar[str] = "lowest"

    def memory(self, setting: Setting, state: RowState) -> Memory:
        return {"run": lane_buffer(setting, state, torch.float32)}

    def choose(self, view: View, choice: Choice) -> Choice:
        # m0 - ceil(m0 (i + 1) / S) = floor(m0 (S - i - 1) / S)
        steps = view.setting.sampling.steps
        masks_left = (view.state.block_masks.long() * (steps - 1 - view.block_step) // steps).clamp(min=0)
        running_score = view.keep("run", torch.where(view.eligible, choice.score, view.memory["run"]))
        return dataclasses.replace(
            choice.only(view.eligible), remask_score=running_score, remask_count=masks_left.int()
        )


@dataclasses.dataclass(frozen=True)
class Backtrack(Policy):
    """Writes what beats the mean confidence of all earlier writes, and takes back what lost most confidence.

    A step writes `min_unmask` positions at least. Saber, arXiv:2510.18165.
    """

    lane_fields: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = "region"
    family: ClassVar[str] = "revise"
    remask: ClassVar[str] = "saber"

    def memory(self, setting: Setting, state: RowState) -> Memory:
        # The confidence of every position that was ever written, -1 of the others; the last column is nobody's.
        B, L = state.tokens.shape
        final = torch.full((B, L + 1), -1.0, dtype=torch.float32, device=state.tokens.device)
        return {"last": lane_buffer(setting, state, torch.float32), "final": final}

    def choose(self, view: View, choice: Choice) -> Choice:
        gain = view.confidence - torch.where((view.block_step > 0)[:, None], view.memory["last"], view.zero)
        view.keep("last", view.confidence)
        final = view.memory["final"][:, :-1]
        count = (final >= 0).sum(1)
        mean = final.clamp(min=0).double().sum(1) / count.clamp(min=1)
        value = (mean + (count == 0)).float()  # before the first write, nothing is confident enough
        return dataclasses.replace(choice, score=view.confidence, rank=None, value=value, remask_score=gain)

    def after(self, view: View, choice: Choice, written: torch.Tensor) -> None:
        final = view.memory["final"]
        nobody = view.setting.constants.counted(1, final.shape[1] - 1)
        final.scatter_(1, torch.where(written, view.lanes.place, nobody), view.confidence)


@dataclasses.dataclass(frozen=True)
class Wino(Policy):
    """Writes boldly, and takes back the tokens that their context no longer supports ("wide in, narrow out").

    A shadow copy of the block predicts every written token from all the other tokens. Tokens whose probability is below
    `verify_threshold` are masked again, the lowest first, and fewer than the step before wrote. WINO, arXiv:2507.18578.

    Attributes:
        verify_threshold: the probability below which a written token may be masked again.
    """

    verify_threshold: float = 0.9
    lane_fields: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = "region"
    family: ClassVar[str] = "revise"
    remask: ClassVar[str] = "wino"
    mask_share: ClassVar[float] = 0.7  # a step writes at most this share of the masks, clamped to the next two numbers
    min_tokens: ClassVar[int] = 5
    max_tokens: ClassVar[int] = 20
    tokens_before: ClassVar[int] = 30  # what the first step of a block takes as the number that the step before wrote

    def __post_init__(self) -> None:
        number("policy Wino", "verify_threshold", self.verify_threshold, 0, 1)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        return {
            "accepted": row_buffer(state, torch.int32),
            "limit": row_buffer(state, torch.float32, self.verify_threshold),
        }

    def choose(self, view: View, choice: Choice) -> Choice:
        masks = view.eligible.sum(1, dtype=torch.float64)
        max_unmask = (masks * self.mask_share).clamp(self.min_tokens, self.max_tokens).int()
        tokens_before = view.memory["accepted"].masked_fill(view.block_step == 0, self.tokens_before)
        return dataclasses.replace(
            choice,
            max_unmask=max_unmask,
            remask_score=view.back,
            remask_count=tokens_before - 1,
            remask_value=view.memory["limit"],
        )

    def after(self, view: View, choice: Choice, written: torch.Tensor) -> None:
        view.keep("accepted", written.sum(1, dtype=torch.int32))


@dataclasses.dataclass(frozen=True)
class JointThreshold(Policy):
    """Writes masks above the threshold, and overwrites written tokens above a threshold of their own.

    A block ends with a step that changes nothing, or after `max_post_edits` steps without masks. LLaDA2.1,
    arXiv:2602.08676.

    Attributes:
        edit_threshold: the score above which another prediction overwrites a written token.
        max_post_edits: number of steps without masks that may still edit the block.
        repeat_penalty: what is subtracted, at each position, from the logit of the token that stands one position
            before; the first position of the block has no penalty (SGLang).
    """

    edit_threshold: float = 0.0
    max_post_edits: int = 16
    repeat_penalty: float = 0.0
    lane_fields: ClassVar[tuple[str, ...]] = ()
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
            token_before = view.state.tokens.gather(1, (view.position - 1).clamp(0, L - 1).long())
            token_before = torch.where(view.position > view.state.block_start[:, None], token_before, -1)[:, :, None]
            choice = view.restated(
                choice, token_before, torch.full_like(token_before, -self.repeat_penalty, dtype=torch.float32)
            )
        without_masks = ~view.eligible.any(1)
        steps_without_masks = view.keep("post", view.memory["post"] * (view.block_step > 0) + without_masks)
        is_settled = without_masks & (steps_without_masks > self.max_post_edits)
        return dataclasses.replace(
            choice, edit_value=torch.full_like(choice.value, self.edit_threshold).masked_fill(is_settled, math.inf)
        )
