"""What a policy sees of a denoise step, and what the policy decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import RowState

from .setting import Sampling, Setting

# A tensor has an entry [B, ...] for every row. What no row owns is no tensor, but a function or a tuple of tensors; a
# policy that works on the host keeps what it likes.
Memory = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The positions that a step may write, [B, W]: lane j of row b is position `position[b, j]`.

    Attributes:
        position: int32, the lane's position in the canvas.
        place: int64, the same, for indexing: of a lane behind the canvas buffer, the buffer's last position.
        tokens: int64, the token that the canvas holds there.
        in_region: bool, the lane is a position of the block, or of one of the pipeline's blocks.
        eligible: bool, the lane is masked and in the region.
        masked: bool, the lane is a position of the canvas that holds the mask; None unless some policy reads it
            (`Policy.lane_fields`).
        written: bool, the lane is in the region and the decoder wrote its token; None unless some policy reads it.
    """

    position: Tensor
    place: Tensor
    tokens: Tensor
    in_region: Tensor
    eligible: Tensor
    masked: Tensor | None
    written: Tensor | None


@dataclasses.dataclass(frozen=True)
class View:
    """One denoise step as a policy sees it: tensors on the device, [B, W] unless an entry says otherwise.

    The fields of `Lanes` can be read from the view itself, as `view.eligible`. A statistic is valid on the lanes that
    some policy needs (`Policy.reads`); on the other lanes a statistic is 0 and a token is -1.

    Attributes:
        setting: the facts of the decode.
        state: where every row stands before this step writes.
        lanes: the positions that the step looks at; lane j of row b is position `position[b, j]`.
        selects: [B] bool, the rows that take part in this step; a choice for any other row has no effect.
        rows: [B] int32, which rows of the batch the step computes: a step may be of some rows only.
        logits: [B, W, V], the logits of the model's head, guidance included; -inf for an excluded EOS.
        token: int64 prediction; a draw where the row has a temperature.
        confidence: fp32 probability of the prediction.
        greedy: int64 most likely token.
        greedy_confidence: fp32 probability of the most likely token.
        margin: fp32 top-1 minus top-2 probability; None unless some policy lists "margin" in `outputs`.
        gap: fp32 top-1 minus top-2 logit of the model's own distribution, also where the token is drawn from another
            one; None unless some policy lists "gap".
        entropy: fp32 entropy in nats; None unless some policy lists "entropy".
        kl: fp32 divergence in nats from the distribution of the row's previous step; None unless some policy lists
            "kl".
        error: int32, not 0 where the statistics are unusable.
        rule_fields: what the preset's rule predicts, tests and orders by, as fields of a `Choice`.
        restate: a function that computes the statistics again with a sparse bias on the logits,
            (ids [B, W, K] int64, bias [B, W, K] fp32) -> View.
        memory: the policy's own buffers (`Policy.memory`), which are kept between steps.
        back: fp32 probability of the token that the canvas holds, as the shadow of the position predicts the token;
            None without shadows.
    """

    setting: Setting
    state: RowState
    lanes: Lanes
    selects: Tensor
    rows: Tensor
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
    rule_fields: dict[str, Tensor | None]
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
    def zero(self) -> Tensor:
        """[1] fp32 zero, which no step has to make."""
        return self.setting.constants.zeros(1, dtype=torch.float32)

    @property
    def sampling(self) -> Sampling:
        """How the batch draws."""
        return self.setting.sampling

    @property
    def block_step(self) -> Tensor:
        return self.state.block_step

    @property
    def step(self) -> Tensor:
        return self.state.step

    def uniform(self) -> Tensor:
        """[B, W] fp32: a number in (0, 1) per lane, a function of (seed, request, position, the row's step) alone."""
        return uniform(self.lanes, self.state, self.setting.sampling)

    def is_eos(self) -> Tensor:
        """[B, W] bool: the lanes whose prediction would end the text."""
        return (self.token[:, :, None] == self.setting.sampling.eos).any(2)

    def quota(self) -> Tensor:
        """[B] int32: how many positions the fixed schedule writes in this step, at least one.

        The schedule is that of the options `steps_per_block`, `quota_of` and `remainder`. If fewer positions are
        masked, the schedule writes all of them.
        """
        sampling = self.setting.sampling
        spread = sampling.block_length if self.setting.spreads_block else self.state.block_masks
        if not self.setting.spreads_evenly:
            # `reference.select.quota`; a batch has no fewer steps than one.
            return (spread // sampling.steps + (self.state.block_step < spread % sampling.steps)).clamp(min=1)
        steps_left = (sampling.steps - self.state.block_step).clamp(min=1).long()
        share = spread * steps_left // sampling.steps - spread * (steps_left - 1) // sampling.steps
        return share.clamp(min=1).to(torch.int32)

    def keep(self, name: str, value: Tensor) -> Tensor:
        """Writes `value` [B, ...] into a buffer of `memory` for the rows of this step, and returns the buffer."""
        buffer = self.memory[name]
        rows = self.selects.view(-1, *[1] * (buffer.dim() - 1))
        return torch.where(rows, value.to(buffer.dtype), buffer, out=buffer)

    def best(self, count: Tensor, score: Tensor | None = None, among: Tensor | None = None) -> Tensor:
        """[B, W] bool: the `count` [B] best of the lanes `among`; ties go to the lowest position.

        By default the lanes are the eligible ones, and the score is the confidence.
        """
        among = self.lanes.eligible if among is None else among
        return among & (ranks(among, self.confidence if score is None else score) <= count[:, None])

    def restated(self, choice: Choice, ids: Tensor, bias: Tensor) -> Choice:
        """`choice`, as the statistics of the biased logits (`restate`) predict, test and order."""
        return dataclasses.replace(choice, **self.restate(ids, bias).rule_fields)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a step decides, per lane [B, W] or per row [B]; a policy returns `dataclasses.replace(choice, ...)`.

    `dlm_kernels.UnmaskInputs` gives the shape and dtype of every field but `exact`.

    Attributes:
        pred: the token to write.
        score: what the pass test compares with `value`.
        confidence: the probability of `pred`, which is recorded.
        value: the number that the pass test compares `score` with.
        min_unmask: the smallest number of positions that the step writes.
        rank: what orders the lanes; None = `score`.
        entropy: the entropy in nats, for the rule "entropy".
        allowed: the lanes that may be written; None = all.
        fallback: how many positions the step writes where fewer than `min_unmask` pass; None = `min_unmask`.
        max_unmask: the largest number of positions that the step writes.
        run_value: the number that the best score of a run of adjacent masks must exceed.
        edit_value: the number that the score of a written position must exceed for its token to be overwritten.
        refill: the tokens of the positions that stay unchosen, for models without masks.
        remask_score: what orders the positions that are masked again, lowest first.
        remask_count: how many positions are masked again.
        remask_value: the number below which `remask_score` must be for a position to be masked again.
        exits: the rows that write every mask now.
        exact: whether `score` > `value` alone decides, whatever the preset's rule is (`only` sets this field).
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
        """The choice that writes exactly the eligible lanes of `chosen` [B, W] bool.

        Where a row has no such lane, the `fallback` [B] int32 best lanes are written; without a fallback, none.
        """
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


def noise_of(lanes: Lanes, state: RowState, sampling: Sampling) -> Tensor:
    """[B * W, 3] int32: what addresses the random numbers of every lane: request, position, and the row's step."""
    shape = lanes.position.shape
    request, step = (rows[:, None].expand(shape) for rows in (sampling.request, state.step))
    return torch.stack([request, lanes.position, step], -1).flatten(0, 1)


def uniform(lanes: Lanes, state: RowState, sampling: Sampling) -> Tensor:
    """[B, W] fp32: a number in (0, 1) per lane, a function of (seed, request, position, the row's step) alone."""
    shape = lanes.position.shape
    return sampling.uniform_scores(sampling.seeds(shape[1]), noise_of(lanes, state, sampling)).view(shape)


def ordered(score: Tensor) -> Tensor:
    """[B, W] int64: the lanes in the order of `unmask`.

    The order is by score, highest first; ties go to the lowest position, and NaN counts as -inf.
    """
    score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return score.sort(dim=1, descending=True, stable=True).indices


def ranks(among: Tensor, score: Tensor) -> Tensor:
    """[B, W] int64: the rank of every lane of `among`, from 1, in the order of `unmask`; of another lane any number."""
    order = ordered(score)
    return torch.empty_like(order).scatter_(1, order, among.gather(1, order).cumsum(1))
