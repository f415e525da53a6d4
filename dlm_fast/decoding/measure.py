"""From logits to what a rule needs: predictions, probabilities, margins, entropies."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.reference.confidence import Confidence

from ..ops import Ops
from ..policies import Lanes, Sampling
from ..policies.constants import Constants
from ..policies.view import noise_of, uniform
from ..presets import Preset

# What the filters of the draws make at a time, at the most, and what they make of an id: copies of its logit, its
# probability, its place in an order.
FILTERED, FILTER_BYTES = 2**28, 64


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a decode asks of `confidence`, the same at every step.

    Attributes:
        outputs: statistics of the distribution that is drawn from.
        model_outputs: statistics of the model's own distribution, whatever may be drawn: what early exits look at.
        margin: whether anybody reads the margin.
        entropy: whether the rule spends a budget of entropy.
        chance: whether the rule writes each position by chance.
        divergence: whether anybody reads the divergence from the step before.
        draws: whether any row has a temperature above 0.
        tempered: whether statistics are those of the tempered distribution.
        filters: whether top_k or top_p narrow what is drawn from.
        two_distributions: whether the model's own distribution is another one, and takes a pass of its own.
    """

    outputs: tuple[str, ...]
    model_outputs: tuple[str, ...]
    margin: bool
    entropy: bool
    chance: bool
    divergence: bool
    draws: bool
    tempered: bool
    filters: bool
    two_distributions: bool


def wanted_of(preset: Preset, sampling: Sampling) -> Wanted:
    """What a preset, its policies and a batch's filters want measured."""
    names = {name for policy in preset.policies for name in policy.outputs} | {preset.score, preset.rank}
    entropy = bool(names & {"entropy", "neg_entropy"}) or preset.by_entropy
    model_outputs = ("second",) if names & {"margin", "gap"} else ()
    divergence = "kl" in names
    tempered = sampling.draws and preset.tempered
    filters = bool(sampling.top_k or sampling.top_p < 1) and (sampling.draws or preset.greedy_filters)
    return Wanted(
        outputs=(*(("entropy",) if entropy else ()), *(("sampled",) if sampling.draws else ())),
        model_outputs=model_outputs,
        margin="margin" in names,
        entropy=preset.by_entropy,
        chance=preset.by_chance,
        divergence=divergence,
        draws=sampling.draws,
        tempered=tempered,
        filters=filters,
        two_distributions=(bool(model_outputs) or divergence) and (filters or tempered),
    )


@dataclasses.dataclass(frozen=True)
class History:
    """The distributions of the step before, where a policy compares with them; replaced in place.

    Attributes:
        logits: [B * lanes, V] as the model's head gave them.
        logsumexp: [B * lanes] fp32.
    """

    logits: Tensor
    logsumexp: Tensor

    def replace(self, rows: Tensor, logits: Tensor, logsumexp: Tensor) -> None:
        """Keeps this step's; a row that sits the step out keeps its own, since what was computed for it is nobody's."""
        torch.where(rows[:, None], logits, self.logits, out=self.logits)
        torch.where(rows, logsumexp, self.logsumexp, out=self.logsumexp)

    def of_rows(self, rows: Tensor, batch: int) -> History:
        """A copy for some rows [n] int64 of the `batch` rows."""
        logits, logsumexp = (x.unflatten(0, (batch, -1)).index_select(0, rows) for x in vars(self).values())
        return History(logits.flatten(0, 1), logsumexp.flatten(0, 1))

    def put_rows(self, rows: Tensor, batch: int, part: History) -> None:
        """Takes over `part`, that of the rows [n]."""
        for mine, theirs in zip(vars(self).values(), vars(part).values()):
            mine.unflatten(0, (batch, -1)).index_copy_(0, rows, theirs.unflatten(0, (rows.shape[0], -1)))


@dataclasses.dataclass(frozen=True)
class Banned:
    """The ids that no draw gives, of a whole decode.

    Attributes:
        always: [K] int64: those of every position.
        early: [K + E] int64: those of the positions that may hold no EOS yet.
        late: [K + E] int64: those of the other positions, with -1 in the place of an EOS.
    """

    always: Tensor
    early: Tensor
    late: Tensor

    @classmethod
    def of(cls, sampling: Sampling) -> Banned:
        """What a batch bans."""
        banned, eos = sampling.banned, sampling.eos
        return cls(banned, torch.cat([banned, eos]), torch.cat([banned, torch.full_like(eos, -1)]))

    def at(self, position: Tensor, no_eos_before: Tensor | None) -> Tensor:
        """[..., K + E] the ids that are banned at positions, before `no_eos_before` the EOS; [K] without it."""
        if no_eos_before is None:
            return self.always
        return torch.where((position < no_eos_before)[..., None], self.early, self.late)


@dataclasses.dataclass(frozen=True)
class Question:
    """What a step asks of `confidence`, whatever the logits are; one row a lane, or a lane of a copy.

    Attributes:
        needed: [N] bool lanes whose statistics anybody reads.
        rows: [N] int32 rows of the logits, -1 = not needed.
        banned: [K] or [N, K] int64 ids that may not be drawn.
        draws: the arguments of a draw; empty where nothing is drawn.
    """

    needed: Tensor
    rows: Tensor
    banned: Tensor
    draws: dict[str, Tensor]


def question_of(
    wanted: Wanted,
    state: RowState,
    sampling: Sampling,
    lanes: Lanes,
    needed: Tensor,
    *,
    banned: Banned,
    constants: Constants,
    copies: int = 1,
) -> Question:
    """What a step asks of `confidence`.

    Args:
        needed: [B, W] (or [B * copies, W]) bool lanes whose statistics anybody reads.
        banned: the ids that no draw gives.
        constants: tensors of the decode that no step has to make.
        copies: canvases per row.
    """
    (B, W), needed, no_eos_before = lanes.position.shape, needed.flatten(), sampling.no_eos_before
    banned_ids = banned.at(lanes.position, None if no_eos_before is None else no_eos_before[:, None])
    if no_eos_before is not None:
        banned_ids = banned_ids[:, None].expand(B, copies, W, -1).flatten(0, 2)
    draws = {}
    if wanted.draws:
        temperature = sampling.temperature.repeat_interleave(W)  # there are no copies where something is drawn
        draws = {
            "sample_temperature": temperature,
            "seed": sampling.seeds(W),
            "noise": noise_of(lanes, state, sampling),
        }
        if wanted.tempered:
            draws["temperature"] = softmax_temperature(temperature)
    rows = torch.where(needed, constants.places(needed.shape[0]), constants.nothing(1))
    return Question(needed, rows, banned_ids, draws)


def measure(
    ops: Ops,
    preset: Preset,
    wanted: Wanted,
    state: RowState,
    sampling: Sampling,
    logits: Tensor,
    lanes: Lanes,
    question: Question,
    *,
    history: History | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """The statistics of a `View`, each [B, W] (or [B * copies, W]), and what the preset's rule makes of them.

    Args:
        logits: [B * copies * W, V] of the lanes.
        question: what is asked of them.
        history: the step before, for the divergence; this step takes its place.
        bias: ids and values [B, W, K] that are added to the logits.
    """
    # 1. The distribution that is drawn from: biased, narrowed, tempered.
    W, drawn_logits, rows, banned = lanes.position.shape[1], logits, question.rows, question.banned
    arguments = dict(question.draws)
    if bias is not None:
        bias = tuple(values.flatten(0, 1) for values in bias)
    if wanted.filters:
        temperature = sampling.temperature.repeat_interleave(logits.shape[0] // sampling.temperature.shape[0])
        drawn_logits, bias = _narrowed(preset, sampling, logits, bias, banned, question.needed, temperature)
    if bias is not None:
        arguments |= {"bias_ids": bias[0], "bias": bias[1]}

    # 2. One pass over the vocabulary, or two where the model's own distribution is another one.
    outputs, model_outputs, model_arguments = wanted.outputs, wanted.model_outputs, {}
    if history is not None:
        model_outputs = (*model_outputs, "logsumexp", "kl")
        model_arguments = {"previous": history.logits, "previous_logsumexp": history.logsumexp}
    if wanted.two_distributions and model_outputs:
        outputs = (*outputs, *(("second",) if wanted.margin else ()))
        stats = stats_of(ops, drawn_logits, rows=rows, outputs=outputs, banned=banned, **arguments)
        model_stats = stats_of(ops, logits, rows=rows, outputs=model_outputs, banned=banned, **model_arguments)
    else:
        arguments |= model_arguments
        stats = stats_of(ops, drawn_logits, rows=rows, outputs=(*outputs, *model_outputs), banned=banned, **arguments)
        model_stats = stats
    if history is not None:
        history.replace(question.needed, logits, model_stats.logsumexp)

    # 3. Lane by lane.
    statistics = {
        "token": stats.sampled_token if wanted.draws else stats.token,
        "confidence": stats.sampled_confidence if wanted.draws else stats.confidence,
        "greedy": stats.token,
        "greedy_confidence": stats.confidence,
        "margin": stats.margin,
        "gap": None if model_stats.second_logit is None else model_stats.logit - model_stats.second_logit,
        "entropy": stats.entropy,
        "kl": model_stats.kl if history is not None else None,
        "error": stats.error,
    }
    statistics = {name: None if values is None else values.view(-1, W) for name, values in statistics.items()}
    if not wanted.draws:
        statistics |= {"greedy": statistics["token"], "greedy_confidence": statistics["confidence"]}
    return statistics, rule_fields_of(preset, wanted, state, sampling, lanes, statistics)


def rule_fields_of(
    preset: Preset,
    wanted: Wanted,
    state: RowState,
    sampling: Sampling,
    lanes: Lanes,
    statistics: dict[str, Tensor | None],
) -> dict[str, Tensor | None]:
    """What the preset's rule predicts, tests and orders by, as fields of a `Choice`; lanes as the statistics have
    them."""

    def numbers(name: str) -> Tensor:
        if name == "neg_entropy":
            return -statistics["entropy"]
        if name == "random":
            return uniform(lanes, state, sampling)
        if name == "position":
            # With drafts, there are statistics for each copy of a row.
            copies = statistics["token"].shape[0] // max(1, lanes.position.shape[0])
            score = -lanes.position.float()
            return score if copies == 1 else score.repeat_interleave(copies, 0)
        return statistics[name]

    score = numbers(preset.score)
    rank = None if preset.rank is None else numbers(preset.rank)
    if preset.suppress_eos:
        is_eos = (statistics["token"][:, :, None] == sampling.eos).any(2)
        score = torch.where(is_eos, -torch.inf, score)
        rank = None if rank is None else torch.where(is_eos, -torch.inf, rank)
    if wanted.chance:
        score = -uniform(lanes, state, sampling)  # u < r, as a score above a threshold
    if preset.order_temperature:
        gumbel = -torch.log(-torch.log(uniform(lanes, state, sampling)))
        rank = (score if rank is None else rank) / preset.order_temperature + gumbel
    return {
        "pred": statistics["token"],
        "score": score,
        "confidence": statistics["confidence"],
        "rank": rank,
        "entropy": statistics["entropy"] if wanted.entropy else None,
    }


def softmax_temperature(temperature: Tensor) -> Tensor:
    """The temperature of the distribution that is drawn from: 1 for a row that draws nothing."""
    return temperature + (temperature == 0)


def stats_of(ops: Ops, logits: Tensor, **arguments: Any) -> Confidence:
    """`ops.confidence`, whose numbers are float64 for float64 logits; what rules compare and a state keeps is fp32 for
    all."""
    stats = ops.confidence(logits, **arguments)
    if logits.dtype != torch.float64:
        return stats
    return stats._replace(
        **{name: x.float() for name, x in stats._asdict().items() if x is not None and x.is_floating_point()}
    )


def _narrowed(
    preset: Preset,
    sampling: Sampling,
    logits: Tensor,
    bias: tuple[Tensor, Tensor] | None,
    banned: Tensor,
    needed: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Logits that top_k and top_p have narrowed, and what is left of the bias: of the rows that are narrowed none,
    since it changes what the filters keep and so is added before."""
    # Rows that draw nothing are as in a batch of their own.
    narrowed = temperature >= 0 if preset.greedy_filters else temperature > 0
    if bias is not None:
        ids, values = bias
        inside = (ids >= 0) & (ids < logits.shape[1]) & narrowed[:, None]
        added = torch.where(inside, values, 0.0).to(logits.dtype)
        logits = logits.scatter_add(1, torch.where(inside, ids, 0), added)
        bias = torch.where(narrowed[:, None], -1, ids), values
    return filtered(logits, preset, sampling, temperature, banned, needed, narrowed), bias


def filtered(
    logits: Tensor,
    preset: Preset,
    sampling: Sampling,
    temperature: Tensor,
    banned: Tensor,
    needed: Tensor,
    narrowed: Tensor,
) -> Tensor:
    """Logits [N, V] fp32 with -inf outside the top-k and top-p sets of softmax(l / T) (T = 0: of l).

    The best allowed id is kept, and rows that are not `narrowed` [N] bool keep all. top-p keeps an id if those strictly
    better (ties: lower ids first) have at most top_p of the mass; top-k keeps every id as large as the k-th. Plain
    torch on any backend: it sorts the vocabulary, of so many rows at a time that what it makes meanwhile is bounded.
    """
    N, V = logits.shape
    rows = max(1, FILTERED // (V * FILTER_BYTES))
    if N > rows:
        # The ids that are banned may be the same for all rows.
        each = (x.split(rows) if x.shape[0] == N and x.dim() == y else [x] * -(-N // rows)
                for x, y in ((logits, 2), (temperature, 1), (banned, 2), (needed, 1), (narrowed, 1)))  # fmt: skip
        parts = zip(*each)
        return torch.cat([filtered(x, preset, sampling, *others) for x, *others in parts])
    work = torch.where(needed[:, None], logits, 0.0)
    work = work.double() if logits.dtype == torch.float64 else work.float()
    scaled = work / softmax_temperature(temperature)[:, None]
    keep = torch.ones_like(scaled, dtype=torch.bool)

    def top_k(keep: Tensor) -> Tensor:
        if not sampling.top_k or sampling.top_k >= V:
            return keep
        smallest = torch.where(keep, scaled, -torch.inf).topk(sampling.top_k, dim=1).values[:, -1:]
        return keep & (scaled >= smallest)

    def top_p(keep: Tensor) -> Tensor:
        if sampling.top_p >= 1:
            return keep
        p, order = torch.where(keep, scaled, -torch.inf).softmax(1).sort(dim=1, descending=True, stable=True)
        inside = p.cumsum(1) - p <= sampling.top_p
        return keep & torch.zeros_like(keep).scatter(1, order, inside)

    for narrow in (top_k, top_p) if preset.top_k_first else (top_p, top_k):
        keep = narrow(keep)
    keep = keep | ~narrowed[:, None]
    ids = banned.expand(N, -1)
    allowed = torch.ones(N, V + 1, dtype=torch.bool, device=logits.device)
    allowed = allowed.scatter(1, torch.where(ids < 0, V, ids), False)[:, :V]
    best = torch.where(allowed, work, -torch.inf).argmax(1, keepdim=True)
    keep = keep.scatter(1, best, True)
    return torch.where(keep, work, -torch.inf)
