"""Policies whose decisions a small trained network makes: a head from `dlm_fast.load_head`, or any such function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.state import amend

from ..limits import flag, number, shown
from .base import Policy
from .heads import MAX_SIZE, Head, load_head
from .setting import Setting
from .view import Choice, Memory, View


@dataclasses.dataclass(frozen=True)
class _Learned(Policy):
    """What both learned policies have: a head, and a threshold for its probabilities.

    Attributes:
        head: a `Head`; or a head's name or file, which is opened on the model's device when a decode starts; or a
            function with the arguments that the policy's docstring names.
        accept_threshold: the number that the head's probabilities must exceed; None = the threshold that the head was
            trained for or, for a function, the published one.
    """

    head: Callable[..., Tensor] | str | Path | None = None
    accept_threshold: float | None = None
    lane_fields: ClassVar[tuple[str, ...]] = ()
    signature: ClassVar[str] = ""  # the arguments and the result of the head, for errors

    def __post_init__(self) -> None:
        owner = f"policy {type(self).__name__}"
        if not (self.head is None or isinstance(self.head, (str, Path)) or callable(self.head)):
            raise TypeError(
                f"{owner}: head must be a name, a file or callable{self.signature}, got head={shown(self.head)}"
            )
        number(owner, "accept_threshold", self.accept_threshold, 0, 1, none=True)

    def _opened(self, setting: Setting, state: RowState, kind: str, called: str, published: float) -> Memory:
        """The head and its threshold, as a decode keeps them.

        Raises an error before anything is decoded if the head does not fit the decoder. `kind` is the kind of head that
        the policy reads, `called` names the head in errors, and `published` is the threshold of a function.
        """
        name, head = f"preset {setting.preset_name}", self.head
        if head is None:
            raise ValueError(
                f"generate: {name} needs a trained {called}, pass head=a name, a file or callable{self.signature}"
            )
        if isinstance(head, (str, Path)):
            head = load_head(head, device=state.tokens.device)
        if setting.block_length > MAX_SIZE:
            rule = f"a head reads a block of at most {MAX_SIZE} positions"
            raise ValueError(f"generate: {name}: {rule}, got block_length={setting.block_length}")
        if isinstance(head, Head):
            device = next(head.parameters()).device
            facts = {
                "kind": (head.kind, kind),
                "block_length": (head.block_length, setting.block_length),
                "device": (str(device), str(state.tokens.device)),
            }
            for what, (of_head, of_decode) in facts.items():
                if of_head != of_decode:
                    rule = f"head must be of {what} {of_decode!r} as this decode is"
                    raise ValueError(f"generate: {name}: {rule}, got a head of {what} {of_head!r}")
            if head.training:
                raise ValueError(f"generate: {name}: head must be in eval mode, call head.eval()")
        value = self.accept_threshold
        return {"head": head, "accept": getattr(head, "accept_threshold", published) if value is None else value}


def of_block(view: View, values: Tensor) -> Tensor:
    """Values [B, W] of the lanes as values [B, block_length] of the block's positions.

    A position of the block that no lane looks at has the value 0 (False).
    """
    W, length = values.shape[1], view.setting.block_length
    if not view.setting.whole_row:
        return F.pad(values, (0, length - W)) if W < length else values
    lane = (view.state.block_start - view.position[:, 0])[:, None] + view.setting.constants.places(length)
    inside = (lane >= 0) & (lane < W)
    return torch.where(inside, values.gather(1, lane.clamp(0, W - 1).long()), torch.zeros_like(values[:, :1]))


def of_lanes(view: View, values: Tensor) -> Tensor:
    """Values [B, block_length] of the block's positions as values [B, W] of the lanes; 0 outside the block."""
    W, length = view.position.shape[1], view.setting.block_length
    if not view.setting.whole_row:
        return values[:, :W]
    place = view.position - view.state.block_start[:, None]
    inside = (place >= 0) & (place < length)
    return torch.where(inside, values.gather(1, place.clamp(0, length - 1).long()), 0.0)


@dataclasses.dataclass(frozen=True)
class LearnedFilter(_Learned):
    """Writes the predictions that a learned head calls final, and besides the share of the fixed schedule.

    The head is a function (confidence [B, block_length] fp32, 0 where not eligible) -> [B, block_length] in [0, 1],
    on the device. Learn2PD, arXiv:2509.25188.

    Attributes:
        eotp: whether a predicted end of text cuts the row (end-of-text prediction). The cut comes after the first
            accepted position that predicts an EOS, or else after the block's most confident eligible position that
            predicts one. Positions behind the cut are not computed any more and are never written.
    """

    eotp: bool = False
    signature: ClassVar[str] = "(confidence [B, block_length]) -> [B, block_length]"

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("policy LearnedFilter", "eotp", self.eotp)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        return self._opened(setting, state, "filter", "filter", published=0.96)

    def choose(self, view: View, choice: Choice) -> Choice:
        confidence = of_block(view, torch.where(view.eligible, view.confidence, view.zero))
        verdict = of_lanes(view, view.memory["head"](confidence))
        accepted = view.eligible & (verdict > view.memory["accept"])
        if self.eotp:
            ends = view.is_eos()
            W = ends.shape[1]
            lane = view.setting.constants.counted(W)
            first_accepted = torch.where(accepted & ends, lane, W).amin(1)
            most_confident = torch.where(view.eligible & ends, view.confidence, -1.0)
            most_confident = torch.where((view.eligible & ends).any(1), most_confident.argmax(1), W)
            cut = torch.where(first_accepted < W, first_accepted, most_confident)
            end = view.position[:, 0] + cut.int() + 1
            canvas_len = torch.minimum(view.state.canvas_len, end)
            block_end = torch.minimum(view.state.block_end, canvas_len)
            amend(view.state, view.selects & (cut < W), canvas_len=canvas_len, block_end=block_end)
        return choice.only(accepted | view.best(view.quota(), choice.score))


@dataclasses.dataclass(frozen=True)
class LearnedCommit(_Learned):
    """Writes the positions to which a learned head gives more than the threshold, or the best one if there is none.

    The head is a function (confidence [B, block_length] fp32, 0 where not eligible; eligible [B, block_length] bool;
    time [B] fp32, the block's steps over the block's length, at most 1) -> [B, block_length] in [0, 1], on the device.

    The method is Learning Unmasking Policies, arXiv:2512.09106, decoded greedily. The paper trains its head by
    reinforcement; the heads of this package are trained on targets (`python -m dlm_fast.training policy`).
    """

    signature: ClassVar[str] = (
        "(confidence [B, block_length], eligible [B, block_length], time [B]) -> [B, block_length]"
    )

    def memory(self, setting: Setting, state: RowState) -> Memory:
        return self._opened(setting, state, "commit", "policy", published=0.5)

    def choose(self, view: View, choice: Choice) -> Choice:
        confidence = of_block(view, torch.where(view.eligible, view.confidence, view.zero))
        verdict = of_lanes(view, view.memory["head"](confidence, of_block(view, view.eligible), block_time(view)))
        choice = dataclasses.replace(choice, rank=verdict)
        return choice.only(view.eligible & (verdict > view.memory["accept"]), fallback=torch.ones_like(view.block_step))


def block_time(view: View) -> Tensor:
    """[B] fp32 in [0, 1]: the denoise steps that the block has taken, over the block's length."""
    return (view.block_step.float() / view.setting.block_length).clamp(max=1.0)
