"""How a policy is written: the class to subclass, and what `generate(policy=...)` takes in place of an instance."""

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
    """A rule for what a step writes, in torch functions that run on the device.

    A subclass is a frozen dataclass; its fields are the policy's numbers. No method may read a tensor on the host or
    make a shape that depends on values, so that a step can be captured.

    Class attributes:
        outputs: the statistics that the policy needs beyond token and confidence, any of "margin", "gap", "entropy" and
            "kl".
        reads: the positions whose statistics the policy reads: "masked" (the eligible positions), "region" (also the
            positions of the region that were written), or "row" (every masked position of the canvas).
        lane_fields: the fields of `Lanes` that the policy reads, of those that are made only if a policy does: "masked"
            and "written". What `reads` needs is made anyway.
        family: what the policy replaces, one of "select", "exit", "revise", "edit" and "refresh"; policies that make no
            sense together are refused by their families.
        remask: how a policy of family "revise" masks tokens again (`UnmaskRule.remask`).
        greedy_only: whether the policy makes its own predictions, so that a temperature, top_k and top_p are refused.
    """

    outputs: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = "masked"
    lane_fields: ClassVar[tuple[str, ...]] = ("masked", "written")
    family: ClassVar[str] = "select"
    remask: ClassVar[str] = "none"
    greedy_only: ClassVar[bool] = False

    def needed(self, setting: Setting, lanes: Lanes, state: RowState) -> Tensor:
        """[B, W] bool: the lanes whose statistics the policy reads."""
        if self.reads == "row":
            return lanes.masked
        return lanes.eligible | lanes.written if self.reads == "region" else lanes.eligible

    def memory(self, setting: Setting, state: RowState) -> Memory:
        """The policy's buffers, which live as long as the decode and which the policy writes in place.

        A tensor has one entry per row of the batch in its first dimension, unless it has no dimension. A step of some
        rows gets those rows of it; anything but a tensor is the same for all rows (`View.rows` tells them apart). A new
        row may take the place of one that is done: its entries are then those that this method makes for it, and of
        what is no tensor the policy itself must forget the row before, at the step at which `View.step` is 0.
        """
        return {}

    def choose(self, view: View, choice: Choice) -> Choice:
        """The policy's choice for this step, made from `choice`, which the rule and earlier policies made."""
        return choice

    def after(self, view: View, choice: Choice, written: Tensor) -> None:
        """Is called after the step wrote the lanes `written` [B, W] bool; `view.state` is the new state then."""

    def refreshes(self, view: View, choice: Choice, written: Tensor) -> Tensor | None:
        """[B] bool: the rows whose cache the next step refreshes if they stay in their block; None = no opinion."""
        return None


@dataclasses.dataclass(frozen=True)
class Function(Policy):
    """A policy that is one torch function `(view, choice) -> choice`.

    The function may also return a bool tensor [B, W], which says exactly the lanes to write, or a float32 tensor
    [B, W], which is a new score.

    Attributes:
        function: the function.
    """

    function: Callable[[View, Choice], Any]
    outputs: ClassVar[tuple[str, ...]] = ("margin", "gap", "entropy")

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"policy Function: function must be a function, got function={shown(self.function)}")

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
    """A tuple of policies from a policy, a function, or a list of policies and functions.

    Raises TypeError for anything else; the message names the argument by `name`.
    """
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
    """A buffer [B, W] with one entry per lane, filled with `fill`."""
    return torch.full((state.tokens.shape[0], setting.lanes), fill, dtype=dtype, device=state.tokens.device)


def row_buffer(state: RowState, dtype: torch.dtype, fill: float = 0) -> Tensor:
    """A buffer [B] with one entry per row, filled with `fill`."""
    return torch.full((state.tokens.shape[0],), fill, dtype=dtype, device=state.tokens.device)
