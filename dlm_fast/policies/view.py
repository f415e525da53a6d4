"""What a policy sees of a denoise step, and what it decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.reference.noise import uniform_scores
from dlm_kernels.reference.select import quota, rank_order

from .setting import Sampling, Setting

# Tensors, but for policies that work on the host.
Memory = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The positions that a step may write, [B, W]: lane j of row b is position `position[b, j]`.

    Attributes:
        position: int32 place in the canvas.
        tokens: int64 what the canvas holds there.
        masked: bool positions of the canvas that hold the mask.
        in_region: bool positions of the block, or of the pipeline's blocks.
        eligible: bool positions that are masked and in the region.
        written: bool positions of the region that the decoder wrote.
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

    The fields of `Lanes` can be read from a view itself: `view.eligible`. Statistics hold where a policy needs them
    (`Policy.reads`); elsewhere they are 0, and a token is -1.

    Attributes:
        setting: the facts of the decode.
        state: where every row stands, before this step writes.
        lanes: the positions that are looked at.
        selects: [B] bool rows that take part in this step; what is decided for other rows is not used.
        logits: [B, W, V] as the model's head gave them, guidance included.
        token: int64 prediction; where there is a temperature, a draw.
        confidence: fp32 probability of the prediction.
        greedy: int64 most likely token.
        greedy_confidence: fp32 probability of the most likely token.
        margin: fp32 top-1 minus top-2 probability. None, as each of the next three, unless some policy asks in
            `outputs`.
        gap: fp32 top-1 minus top-2 logit of the model's own distribution, whatever may be drawn.
        entropy: fp32 entropy in nats.
        kl: fp32 divergence from the row's step before, in nats.
        error: int32, not 0 where the statistics are unusable.
        stated: what the preset's rule predicts, tests and orders by, as fields of a `Choice`.
        restate: statistics again with a sparse logit bias, (ids [B, W, K] int64, bias [B, W, K] fp32) -> View.
        memory: the policy's own buffers (`Policy.memory`), kept between steps.
        back: fp32 probability of the token that is held, predicted by the shadow of its position; None without shadows.
    """

    setting: Setting
    state: RowState
    lanes: Lanes
    selects: Tensor
    logits: Tensor
    token: Tensor
    confidence: Tensor
    greedy: Tensor
    greedy_confidence: Tensor
    margin: Tensor | None
    gap: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None
    error: Tensor
    stated: dict[str, Tensor | None]
    restate: Callable[[Tensor, Tensor], View]
    memory: Memory = dataclasses.field(default_factory=dict)
    back: Tensor | None = None

    @property
    def position(self) -> Tensor:
        return self.lanes.position

    @property
    def tokens(self) -> Tensor:
        return self.lanes.tokens

    @property
    def masked(self) -> Tensor:
        return self.lanes.masked

    @property
    def in_region(self) -> Tensor:
        return self.lanes.in_region

    @property
    def eligible(self) -> Tensor:
        return self.lanes.eligible

    @property
    def written(self) -> Tensor:
        return self.lanes.written

    @property
    def block_step(self) -> Tensor:
        return self.state.block_step

    @property
    def step(self) -> Tensor:
        return self.state.step

    def uniform(self) -> Tensor:
        """A number in (0, 1) per lane, [B, W] fp32, that depends on (seed, request, position, the row's step) only."""
        return uniform(self.lanes, self.state, self.setting.sampling)

    def is_eos(self) -> Tensor:
        """[B, W] bool predictions that would end the text."""
        return (self.token[:, :, None] == self.setting.sampling.eos).any(2)

    def quota(self) -> Tensor:
        """[B] int32 positions that the fixed schedule (`steps_per_block`, `quota_of`) writes now, if so many are
        masked."""
        sampling = self.setting.sampling
        spread = sampling.block_length if self.setting.block_quota else self.state.block_masks
        return quota(spread, self.state.block_step, sampling.steps)

    def keep(self, name: str, value: Tensor) -> Tensor:
        """Writes the rows of this step into a buffer of `memory`, [B, ...], and returns the buffer."""
        buffer = self.memory[name]
        buffer.copy_(torch.where(self.selects.view(-1, *[1] * (buffer.dim() - 1)), value, buffer))
        return buffer

    def best(self, count: Tensor, score: Tensor | None = None, among: Tensor | None = None) -> Tensor:
        """[B, W] bool: the `count` [B] best of the eligible lanes, or of the lanes `among`; ties go to the lowest
        position."""
        among = self.lanes.eligible if among is None else among
        return places(among, self.confidence if score is None else score) < count[:, None]

    def restated(self, choice: Choice, ids: Tensor, bias: Tensor) -> Choice:
        """The choice by the statistics of biased logits (`restate`)."""
        return dataclasses.replace(choice, **self.restate(ids, bias).stated)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a step decides, lane by lane [B, W] or row by row [B]; `dlm_kernels.UnmaskInputs` says what each field
    means.

    A policy returns a changed copy: `dataclasses.replace(choice, score=...)`.

    Attributes:
        exact: whether `score` > `value` decides, whatever the preset's rule is (`only` sets it).
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
        minimum = torch.zeros_like(self.min_unmask) if fallback is None else torch.ones_like(self.min_unmask)
        return dataclasses.replace(
            self,
            exact=True,
            score=chosen.to(torch.float32),
            value=torch.full_like(minimum, 0.5, dtype=torch.float32),
            rank=self.score if self.rank is None else self.rank,
            min_unmask=minimum,
            fallback=fallback,
        )


def uniform(lanes: Lanes, state: RowState, sampling: Sampling) -> Tensor:
    """A number in (0, 1) per lane, [B, W] fp32, that depends on (seed, request, position, the row's step) only."""
    B, W = lanes.position.shape
    request, step = (rows[:, None].expand(B, W) for rows in (sampling.request, state.step))
    counters = torch.stack([request, lanes.position, step], -1)
    return uniform_scores(sampling.seed, counters.flatten(0, 1)).view(B, W)


def places(among: Tensor, score: Tensor) -> Tensor:
    """[B, W] int64: the place of every lane in the order of `unmask` (score descending, position ascending), W for
    lanes that are not `among`."""
    order = rank_order(among, score)
    place = torch.zeros_like(order).scatter(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return torch.where(among, place, order.shape[1])
