"""How a policy is written: the class to subclass, and what `generate(policy=...)` takes in its place."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlm_kernels import RowState

from ..limits import shown
from .setting import Setting
from .view import Choice, Lanes, Memory, View


@dataclasses.dataclass(frozen=True)
class Policy:
    """A rule for what a step writes, in torch functions that run on the device. Subclasses are frozen dataclasses of
    their numbers.

    Nothing in them may read a tensor on the host or make a shape that depends on values, so that a step can be
    captured.

    Class attributes:
        outputs: statistics it needs beyond token and confidence: any of "margin", "gap", "entropy", "kl".
        reads: whose statistics: "masked" (eligible positions), "region" (also written ones), "row" (masked ones of the
            canvas).
        family: what it replaces, to refuse what makes no sense together: "select", "exit", "revise", "edit", "refresh".
        greedy_only: it makes its own predictions, and refuses a temperature, top_k and top_p.
        remask: how a revising policy masks tokens again (`UnmaskRule.remask`).
    """

    outputs: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = "masked"
    family: ClassVar[str] = "select"
    remask: ClassVar[str] = "none"
    greedy_only: ClassVar[bool] = False

    def needed(self, setting: Setting, lanes: Lanes, state: RowState) -> Tensor:
        """[B, W] bool lanes whose statistics it reads."""
        if self.reads == "row":
            return lanes.masked
        return lanes.eligible | lanes.written if self.reads == "region" else lanes.eligible

    def memory(self, setting: Setting, state: RowState) -> Memory:
        """Buffers that live as long as the decode; the policy writes them in place."""
        return {}

    def choose(self, view: View, choice: Choice) -> Choice:
        """The choice of this step, given the one of the preset's rule."""
        return choice

    def after(self, view: View, choice: Choice, written: Tensor) -> None:
        """Called when the step has written `written` [B, W] bool; `view.state` is then the new state."""

    def refreshes(self, view: View, choice: Choice, written: Tensor) -> Tensor | None:
        """[B] bool rows whose cache is to be refreshed next, if they stay in their block; None = no say."""
        return None


@dataclasses.dataclass(frozen=True)
class Function(Policy):
    """A policy that is one torch function `(view, choice) -> choice`.

    It may also return a bool tensor [B, W], exactly the positions to write, or a float tensor [B, W], a new score.
    """

    function: Callable[[View, Choice], Any]
    outputs: ClassVar[tuple[str, ...]] = ("margin", "gap", "entropy")

    def choose(self, view: View, choice: Choice) -> Choice:
        result = self.function(view, choice)
        if isinstance(result, Choice):
            return result
        shape = tuple(view.position.shape)
        if (
            not isinstance(result, Tensor)
            or tuple(result.shape) != shape
            or result.dtype not in (torch.bool, torch.float32)
        ):
            got = f"{tuple(result.shape)}, {result.dtype}" if isinstance(result, Tensor) else repr(result)
            raise TypeError(f"generate: policy must return a Choice or a bool or float32 tensor {shape}, got {got}")
        return choice.only(result) if result.dtype == torch.bool else dataclasses.replace(choice, score=result)


def as_policies(policy: Any, name: str = "policy") -> tuple[Policy, ...]:
    """A policy, a function or a sequence of them, as a tuple of policies. Raises TypeError otherwise, naming the
    argument."""
    if policy is None:
        return ()
    if isinstance(policy, Policy):
        return (policy,)
    if isinstance(policy, (list, tuple)):
        return tuple(p for item in policy for p in as_policies(item, name))
    if callable(policy) and not inspect.isclass(policy):
        return (Function(policy),)
    rule = "must be a Policy, a function (view, choice) -> choice, or a list of them"
    raise TypeError(f"generate: {name} {rule}, got {name}={shown(policy)}")


def lane_buffer(setting: Setting, state: RowState, dtype: torch.dtype, fill: float = 0) -> Tensor:
    """A buffer [B, W] with one entry per lane."""
    return torch.full((state.tokens.shape[0], setting.lanes), fill, dtype=dtype, device=state.tokens.device)


def row_buffer(state: RowState, dtype: torch.dtype, fill: float = 0) -> Tensor:
    """A buffer [B] with one entry per row."""
    return torch.full((state.tokens.shape[0],), fill, dtype=dtype, device=state.tokens.device)
