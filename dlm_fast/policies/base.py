"""What a policy sees, what it decides, and how to write one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.reference.noise import uniform_scores
from dlm_kernels.reference.select import quota, rank_order

from ..limits import shown

if TYPE_CHECKING:
    from ..decoding.measure import Sampling
    from ..decoding.plan import Plan

# Tensors, but for policies that work on the host.
Memory = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The positions that a step may write, lane by lane [B, W]; the first half of a `View`.

    position: int32. tokens: int64 held tokens. masked: bool masked positions of the canvas. in_region: bool, of the
    block (or the pipeline's blocks). eligible: bool, both. written: bool positions of the region that the decoder
    wrote.
    """

    position: Tensor
    tokens: Tensor
    masked: Tensor
    in_region: Tensor
    eligible: Tensor
    written: Tensor


@dataclasses.dataclass(frozen=True)
class View:
    """One denoise step as a policy sees it: device tensors, [B, W] unless said otherwise, lane j being
    `position[:, j]`.

    Statistics hold where they were needed (`Policy.reads`) and are 0 (token -1) elsewhere.

    Attributes:
        plan, state: what is decoded, and where every row stands, before this step's writes.
        memory: the policy's own buffers (`Policy.memory`), kept between steps.
        selects: [B] bool rows that take part in this step; nothing of the others is used.
        position: int32. tokens: int64 held tokens. masked: bool masked positions of the canvas. in_region: bool, of the
            block (or the pipeline's blocks). eligible: bool, both. written: bool positions of the region that the
            decoder wrote.
        token: int64 prediction (drawn if there is a temperature). confidence: its probability. greedy,
            greedy_confidence: the most likely token and its probability. margin: top-1 minus top-2 probability. gap:
            top-1 minus top-2 logit of the model's own distribution, whatever may be drawn. entropy: nats. kl: nats, to
            the step before. error: int32. None where the policy did not ask for it in `outputs`.
        block_start, block_end, block_step, step: of the state, [B].
        restate: statistics again, with a sparse logit bias (ids [B, W, K] int64, bias [B, W, K] fp32) -> View.
        logits: [B, W, V] as the model's head gave them (guidance included), for policies that want all of them.
        back: fp32 probability of the held token, predicted by the shadow of its position; None without shadow rows.
        sampling: seeds and request numbers, for `uniform`; steps and block lengths.
    """

    plan: Plan
    state: RowState
    memory: Memory
    selects: Tensor
    position: Tensor
    tokens: Tensor
    masked: Tensor
    in_region: Tensor
    eligible: Tensor
    written: Tensor
    token: Tensor
    confidence: Tensor
    greedy: Tensor
    greedy_confidence: Tensor
    margin: Tensor | None
    gap: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None
    error: Tensor
    restate: Callable[[Tensor, Tensor], View]
    sampling: Sampling
    logits: Tensor
    back: Tensor | None = None

    @property
    def block_step(self) -> Tensor:
        return self.state.block_step

    @property
    def step(self) -> Tensor:
        return self.state.step

    def uniform(self) -> Tensor:
        """A number in (0, 1) per lane, fp32 [B, W], that depends on (seed, request, position, the row's step) only."""
        B, W = self.position.shape
        request, step = (x[:, None].expand(B, W) for x in (self.sampling.request, self.state.step))
        return uniform_scores(self.sampling.seed, torch.stack([request, self.position, step], -1).flatten(0, 1)).view(
            B, W
        )

    def score(self, name: str) -> Tensor:
        """The numbers [B, W] fp32 that a preset's `score` or `rank` names."""
        if name == "margin":
            return self.margin
        if name == "neg_entropy":
            return -self.entropy
        if name == "random":
            return self.uniform()
        return -self.position.float() if name == "position" else self.confidence

    def stated(self) -> dict[str, Tensor | None]:
        """The fields of a `Choice` that are the step's statistics: what is predicted, what is tested and what
        orders."""
        preset = self.plan.preset
        score, rank = self.score(preset.score), None if preset.rank is None else self.score(preset.rank)
        if preset.suppress_eos:
            is_eos = self.is_eos()
            score = torch.where(is_eos, -torch.inf, score)
            rank = None if rank is None else torch.where(is_eos, -torch.inf, rank)
        if preset.rule == "bernoulli":
            score = -self.uniform()  # u < r, as a score above a threshold
        if preset.order_temperature:
            gumbel = -torch.log(-torch.log(self.uniform()))
            rank = (score if rank is None else rank) / preset.order_temperature + gumbel
        entropy = self.entropy if preset.rule == "entropy" else None
        return {"pred": self.token, "score": score, "confidence": self.confidence, "rank": rank, "entropy": entropy}

    def restated(self, choice: Choice, ids: Tensor, bias: Tensor) -> Choice:
        """The choice by the statistics of biased logits (`restate`)."""
        return dataclasses.replace(choice, **self.restate(ids, bias).stated())

    def is_eos(self) -> Tensor:
        """[B, W] bool predictions that would end the text."""
        return (self.token[:, :, None] == self.sampling.eos).any(2)

    def quota(self) -> Tensor:
        """[B] int32 positions that the fixed schedule (`steps_per_block`, `quota_of`) writes now, if so many are
        masked."""
        spread = self.sampling.block_length if self.plan.preset.quota_of == "block" else self.state.block_masks
        return quota(spread, self.state.block_step, self.sampling.steps)

    def keep(self, name: str, value: Tensor) -> Tensor:
        """Writes rows of a buffer of `memory` [B, ...], those of this step only, and returns the buffer."""
        buffer = self.memory[name]
        buffer.copy_(torch.where(self.selects.view(-1, *[1] * (buffer.dim() - 1)), value, buffer))
        return buffer

    def best(self, count: Tensor, score: Tensor | None = None, among: Tensor | None = None) -> Tensor:
        """The `count` [B] best of the eligible lanes (or of `among`), ties to the lowest position. [B, W] bool"""
        among = self.eligible if among is None else among
        return places(among, self.confidence if score is None else score) < count[:, None]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the `unmask` op is told, lane by lane [B, W] or row by row [B]; see its reference for the meaning of each.

    A policy returns a changed copy: `dataclasses.replace(choice, score=...)`. `exact`: `score` > `value` decides,
    whatever the preset's rule (`only` sets it).
    """

    pred: Tensor
    score: Tensor
    confidence: Tensor
    value: Tensor
    min_unmask: Tensor
    rank: Tensor | None = None
    entropy: Tensor | None = None
    allowed: Tensor | None = None
    fallback: Tensor | None = None
    max_unmask: Tensor | None = None
    run_value: Tensor | None = None
    edit_value: Tensor | None = None
    refill: Tensor | None = None
    remask_score: Tensor | None = None
    remask_count: Tensor | None = None
    remask_value: Tensor | None = None
    exits: Tensor | None = None
    exact: bool = False

    def only(self, chosen: Tensor, fallback: Tensor | None = None) -> Choice:
        """Writes exactly the eligible lanes of `chosen` [B, W] bool; where there are none, the `fallback` [B] int32
        best."""
        least = torch.zeros_like(self.min_unmask) if fallback is None else torch.ones_like(self.min_unmask)
        return dataclasses.replace(
            self,
            exact=True,
            score=chosen.to(torch.float32),
            value=torch.full_like(least, 0.5, dtype=torch.float32),
            rank=self.score if self.rank is None else self.rank,
            min_unmask=least,
            fallback=fallback,
        )


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

    def needed(self, plan: Plan, lanes: Lanes, state: RowState) -> Tensor:
        """[B, W] bool lanes whose statistics it reads."""
        if self.reads == "row":
            return lanes.masked
        return lanes.eligible | lanes.written if self.reads == "region" else lanes.eligible

    def memory(self, plan: Plan, state: RowState) -> Memory:
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


def places(among: Tensor, score: Tensor) -> Tensor:
    """The place of every lane in the order of `unmask` (score descending, position ascending), W for lanes not `among`.
    [B, W] int64"""
    order = rank_order(among, score)
    place = torch.zeros_like(order).scatter(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return torch.where(among, place, order.shape[1])


def lanes_of(plan: Plan, state: RowState, dtype: torch.dtype, fill: float = 0) -> Tensor:
    """A buffer [B, W] with one entry per lane."""
    return torch.full((state.tokens.shape[0], plan.lanes), fill, dtype=dtype, device=state.tokens.device)


def rows_of(state: RowState, dtype: torch.dtype, fill: float = 0) -> Tensor:
    """A buffer [B] with one entry per row."""
    return torch.full((state.tokens.shape[0],), fill, dtype=dtype, device=state.tokens.device)
