"""One denoise step, which is what is captured, profiled and tested: its shapes are fixed, the host reads nothing, and
all that it changes is in `Decode`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import RowState, UnmaskInputs, UnmaskRule
from dlm_kernels.state import DENOISE, REFRESH, amend

from ..limits import shown
from ..models.cache import KVCache
from ..patching import PatchHandle
from ..policies import Choice, Sampling, View
from ..policies.view import Memory
from .forward import Forward, Result, forward_of, with_last_rank
from .plan import Bucket, Plan
from .window import Step, step_of


@dataclasses.dataclass(frozen=True)
class Decode:
    """Everything that a step reads and writes; its buffers live as long as the decode.

    Attributes:
        forward: the plan, the rows' state, the model with its cache, and what the decoder adds to a forward.
        memory: the buffers of every policy.
        constants: the fields of `UnmaskInputs` that are the same for every step.
    """

    forward: Forward
    memory: tuple[Memory, ...]
    constants: dict[str, Any]

    @property
    def plan(self) -> Plan:
        return self.forward.plan

    @property
    def state(self) -> RowState:
        return self.forward.state

    @property
    def sampling(self) -> Sampling:
        return self.forward.sampling

    def of_rows(self, rows: Tensor) -> Decode:
        """A decode of some rows [n] int64 of the batch, on copies of all that a step of them reads, but for the
        cache."""
        forward = self.forward.of_rows(rows)
        memory = tuple(
            {name: kept.index_select(0, rows) if _per_row(kept) else kept for name, kept in kept_by.items()}
            for kept_by in self.memory
        )
        return Decode(forward, memory, _constants(forward.plan, forward.sampling))

    def put_rows(self, rows: Tensor, part: Decode) -> None:
        """Takes over what a step of `part`, the decode of the rows [n], has changed."""
        self.forward.put_rows(rows, part.forward)
        for mine, its in zip(self.memory, part.memory):
            for name, kept in its.items():
                if not _per_row(kept):
                    mine[name] = kept
                elif name in mine:
                    mine[name].index_copy_(0, rows, kept)
                else:
                    raise ValueError(f"generate: a policy must open memory[{name!r}] in `memory`, not in a step")

    def take_rows(self, rows: Tensor, part: Decode) -> None:
        """Takes new rows in the place of the rows [n]: those of `part`, which has just been opened for them.

        What a policy keeps for all rows together stays.
        """
        self.plan.first.index_copy_(0, rows, part.plan.first)
        if self.plan.prefilled is not None:
            self.plan.prefilled.index_copy_(0, rows, part.plan.prefilled)
        self.forward.put_rows(rows, part.forward)
        for mine, its in zip(self.memory, part.memory):
            for name, kept in its.items():
                if _per_row(kept):
                    mine[name].index_copy_(0, rows, kept)

    def with_sampling(self, sampling: Sampling) -> Decode:
        """The same decode with other numbers, which may decide otherwise which ops a step runs."""
        sampling = dataclasses.replace(sampling, uniform_scores=self.sampling.uniform_scores)
        return Decode(self.forward.with_sampling(sampling), self.memory, _constants(self.plan, sampling))


def _per_row(kept: Any) -> bool:
    """Whether a policy keeps this for each row (`Policy.memory`)."""
    return isinstance(kept, Tensor) and kept.dim() > 0


def _constants(plan: Plan, sampling: Sampling) -> dict[str, Any]:
    return {
        "steps": sampling.steps,
        "block_length": sampling.block_length,
        "mask_id": plan.mask_id,
        "stop_ids": sampling.eos,
        "max_steps": sampling.max_steps,
        "append_masks": sampling.append_masks,
        "activate_masks": sampling.activate_masks,
        "delay": sampling.delay,
    }


def open_decode(
    handle: PatchHandle, plan: Plan, state: RowState, sampling: Sampling, cache: KVCache | None = None
) -> Decode:
    """Allocates what a decode keeps between steps; the key/value buffers too, unless `cache` has them.

    Raises ValueError where a policy's memory holds a tensor that has not one entry per row, or lies elsewhere.
    """
    sampling = dataclasses.replace(sampling, uniform_scores=handle.ops.uniform_scores)
    forward, B = forward_of(handle, plan, state, sampling, cache), state.tokens.shape[0]
    memory = tuple(policy.memory(forward.setting, state) for policy in plan.preset.policies)
    for policy, kept_by in zip(plan.preset.policies, memory):
        for name, kept in kept_by.items():
            if _per_row(kept) and kept.device != state.tokens.device:
                raise ValueError(
                    f"generate: policy {type(policy).__name__} must keep memory[{name!r}] on the rows' device, "
                    f"{state.tokens.device}, got {kept.device}"
                )
            if _per_row(kept) and kept.shape[0] != B:
                raise ValueError(
                    f"generate: policy {type(policy).__name__} must keep one entry per row in the first dimension of "
                    f"memory[{name!r}], or no dimension, got {list(kept.shape)} for {B} rows"
                )
    return Decode(forward, memory, _constants(plan, sampling))


def denoise_step(decode: Decode, bucket: Bucket, rows: Tensor | None = None) -> None:
    """One forward and what follows from it, in place, with no host read: window, forward, look, choose, write, after.

    Rows that need the other kind of step, or a wider one, are left unchanged.

    Args:
        rows: [bucket.rows] int64, the rows of the batch that the step computes, n different ones; None: all of them, in
            their order. A step of some rows is the same step of a smaller decode: what a step reads of its rows is
            copied, and what it has changed is written back. That keeps the ops and the policies free of an index (the
            copies are a few KB a row), and what such a step computes is a matter of its bucket alone.
    """
    part = decode if rows is None else decode.of_rows(rows)
    step = step_of(part.plan, part.state, part.sampling, bucket)
    if rows is not None:
        step = dataclasses.replace(step, window=dataclasses.replace(step.window, cache_row=rows.int()))
    _run(part, part.forward.admitted(step))
    if rows is not None:
        decode.put_rows(rows, part)


def _run(decode: Decode, step: Step) -> None:
    """The step from its forward on."""
    plan, forward, bucket = decode.plan, decode.forward, step.bucket
    if bucket.kind == "refresh" and plan.prefill_rule is not None:
        prefill(decode, step)
        return
    result = forward.run(step)
    view = forward.look(step, result)
    choice = choose(decode, step, result, view)
    rule = plan.exact_rule if choice.exact else plan.unmask_rule
    written = write(decode, step, result, choice, rule, view.error)
    after(decode, step, view, choice, written)
    forward.after(step, result)


def prefill(decode: Decode, step: Step) -> None:
    """A step that fills the cache and writes no token."""
    result = decode.forward.prefill(step)
    write(decode, step, result, nothing_chosen(decode.plan, step), decode.plan.prefill_rule)
    request_refresh(decode.plan, decode.state, step.takes_part, None)
    decode.forward.after(step, result)


def choose(decode: Decode, step: Step, result: Result, view: View) -> Choice:
    """What the step writes: the choice of the preset's rule, as its policies change it."""
    choice = decode.forward.choose(step, result, view)
    for policy, memory in zip(decode.plan.preset.policies, decode.memory):
        choice = policy.choose(dataclasses.replace(view, memory=memory), choice)
        if not isinstance(choice, Choice):
            raise TypeError(f"generate: policy {type(policy).__name__} must return a Choice, got {shown(choice)}")
    if decode.plan.preset.takes_last_rank and not choice.exact:
        choice = with_last_rank(view, choice)
    if decode.plan.opens_at_row_before and step.bucket.kind == "refresh":
        choice = only_first_mask(view, choice)
    return choice


def write(
    decode: Decode, step: Step, result: Result, choice: Choice, rule: UnmaskRule, error: Tensor | None = None
) -> Tensor:
    """Hands the choice to the `unmask` op, which writes the state; [B, W] bool lanes that were written."""
    fields = {name: value for name, value in vars(choice).items() if name != "exact"}
    # The state's own tensor means what None means, and is one kernel with the lanes that begin elsewhere.
    lane_start = decode.plan.first if decode.plan.whole_row else decode.state.block_start
    inputs = UnmaskInputs(
        query_len=result.query_len,
        lane_start=lane_start,
        stat_error=error,
        **decode.constants,
        **fields,
        **result.inputs,
    )
    return decode.forward.handle.ops.unmask(decode.state, rule, inputs, kind=step.bucket.kind)


def after(decode: Decode, step: Step, view: View, choice: Choice, written: Tensor) -> None:
    """Tells the policies what was written, and sends rows to a refresh where the preset or a policy asks for it."""
    wanted = None
    for policy, memory in zip(decode.plan.preset.policies, decode.memory):
        remembering = dataclasses.replace(view, memory=memory)
        policy.after(remembering, choice, written)
        rows = policy.refreshes(remembering, choice, written)
        if rows is not None:
            wanted = rows if wanted is None else wanted | rows
    request_refresh(decode.plan, decode.state, step.takes_part, wanted)


def request_refresh(plan: Plan, state: RowState, took_part: Tensor, wanted: Tensor | None) -> None:
    """Sends rows that go on in their block to a refresh where the preset or a policy (`wanted` [B] bool) asks for
    it."""
    preset, rows = plan.preset, wanted
    if preset.warmup_steps:
        # The step after the warm-up is of everything too: it is the one whose keys are kept.
        warms_up = state.step <= preset.warmup_steps
        rows = warms_up if rows is None else rows | warms_up
    if preset.refresh_interval is not None:
        due = plan.cache.refreshed(state, preset.refresh_interval)
        rows = due if rows is None else rows | due
    if rows is not None:
        amend(state, rows & took_part & (state.phase == DENOISE), phase=REFRESH)


def nothing_chosen(plan: Plan, step: Step) -> Choice:
    """The choice of a prefill: it writes no token."""
    shape, zeros = step.lanes.position.shape, plan.constants.zeros
    lanes = zeros(*shape, dtype=torch.float32)
    return Choice(
        pred=zeros(*shape, dtype=torch.int64),
        score=lanes,
        confidence=lanes,
        value=zeros(shape[0], dtype=torch.float32),
        min_unmask=zeros(shape[0]),
    )


def only_first_mask(view: View, choice: Choice) -> Choice:
    """The choice of the step that opens a block, where positions are predicted by the row before them: the block's
    first masked position and nothing else, since later steps do not compute the row that predicts it."""
    opens = view.state.block_step == 0
    first = (view.lanes.eligible.cumsum(1) == 1) | ~opens[:, None]
    return dataclasses.replace(
        choice,
        allowed=first if choice.allowed is None else choice.allowed & first,
        min_unmask=torch.where(opens, 1, choice.min_unmask),
        fallback=None if choice.fallback is None else torch.where(opens, 1, choice.fallback),
    )
