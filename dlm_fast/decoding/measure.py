"""From logits to what a rule needs: predictions, probabilities, margins, entropies; and the choice that a preset's rule
makes of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.reference.confidence import Confidence

from ..ops import Ops
from ..policies import Choice, View
from ..policies.base import Lanes
from .plan import Plan, sub_block


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Device tensors that decide draws; arguments of every step, so that a captured step serves every request.

    Attributes:
        temperature: [B] fp32, 0 = greedy. seed: [1] int64. request: [B] int32 index that keys the noise.
        banned: [K] int64 ids never drawn. eos: [E] int64. no_eos_before: [B] int32 first position that may hold an EOS,
            None where no row has such a rule.
        value: [B] fp32 of the pass test. min_unmask, steps, block_length: [B] int32.
        max_steps: [B] int32 denoise steps after which a row has stalled.
        transfer: [B, S] fp32 share of the masks that a step of rule "schedule" or "bernoulli" writes, None for other
            rules.
        append_masks, activate_masks: [B] int32 of a pipeline, else None. delay: [B] int32 of cache "delayed", else
            None.
        top_k, top_p: the filters; 0 and 1.0 are off. draws: whether any row has a temperature above 0. The host knows
            these three.
    """

    temperature: Tensor
    seed: Tensor
    request: Tensor
    banned: Tensor
    eos: Tensor
    no_eos_before: Tensor | None
    value: Tensor
    min_unmask: Tensor
    steps: Tensor
    block_length: Tensor
    max_steps: Tensor
    transfer: Tensor | None
    append_masks: Tensor | None
    activate_masks: Tensor | None
    delay: Tensor | None
    top_k: int
    top_p: float
    draws: bool


def lanes_view(plan: Plan, state: RowState, start: Tensor, W: int) -> Lanes:
    """The positions start .. start + W of every row."""
    L = state.tokens.shape[1]
    position = start[:, None] + torch.arange(W, dtype=torch.int32, device=start.device)
    inside = position.clamp(0, L - 1).long()
    tokens, unmask_step = state.tokens.gather(1, inside), state.unmask_step.gather(1, inside)
    masked = (position < state.canvas_len[:, None]) & (tokens == plan.diffusion.mask_token_id)
    in_region = (position >= state.block_start[:, None]) & (position < state.block_end[:, None])
    return Lanes(position, tokens, masked, in_region, in_region & masked, in_region & (unmask_step >= 0))


def measure(
    ops: Ops,
    plan: Plan,
    state: RowState,
    sampling: Sampling,
    logits: Tensor,
    lanes: Lanes,
    needed: Tensor,
    *,
    history: dict[str, Tensor] | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    branches: int = 1,
) -> dict[str, Tensor | None]:
    """The statistics of `View`, each [B, W] ([B * branches, W]), from logits [B * branches * W, V] of the lanes.

    history: {"logits", "logsumexp"} of the step before, for KL; replaced by this step's. bias: (ids, values) [B, W, K].
    """
    preset = plan.preset
    N, W = logits.shape[0], lanes.position.shape[1]
    wanted = {name for policy in preset.policies for name in policy.outputs} | {preset.score, preset.rank}
    rows = torch.where(needed.flatten(), torch.arange(N, dtype=torch.int32, device=logits.device), -1).int()

    def by_lane(row_values: Tensor) -> Tensor:
        """[B] -> [N]"""
        return row_values.repeat_interleave(branches * W)

    position = lanes.position.repeat_interleave(branches, 0)
    banned = sampling.banned
    if sampling.no_eos_before is not None:
        too_early = position < sampling.no_eos_before.repeat_interleave(branches)[:, None]
        banned = torch.cat([banned.expand(N, -1), torch.where(too_early.view(-1, 1), sampling.eos, -1)], -1)
    raw = logits
    if bias is not None:
        bias = tuple(x.flatten(0, 1) for x in bias)
    if (sampling.top_k or sampling.top_p < 1) and (sampling.draws or preset.greedy_filters):
        # Rows that draw nothing are as in a batch of their own.
        heat = by_lane(sampling.temperature)
        narrowed = heat >= 0 if preset.greedy_filters else heat > 0
        if bias is not None:
            # A bias changes what the filters keep.
            ids, values = bias
            inside = (ids >= 0) & (ids < logits.shape[1]) & narrowed[:, None]
            logits = logits.scatter_add(
                1, torch.where(inside, ids, 0), torch.where(inside, values, 0.0).to(logits.dtype)
            )
            bias = torch.where(narrowed[:, None], -1, ids), values
        logits = filtered(logits, plan, sampling, heat, banned, needed.flatten(), narrowed)

    own = []  # of the model's distribution, whatever may be drawn: what early exits and stability look at
    if wanted & {"margin", "gap"}:
        own.append("second")
    own_more = {}
    if history is not None:
        own += ["logsumexp", "kl"]
        own_more = {"previous": history["logits"], "previous_logsumexp": history["logsumexp"]}
    outputs, more = [], {}
    if wanted & {"entropy", "neg_entropy"} or preset.rule == "entropy":
        outputs.append("entropy")
    if sampling.draws:
        outputs.append("sampled")
        noise = torch.stack([by_lane(sampling.request), position.flatten(), by_lane(state.step)], -1)
        more |= {"sample_temperature": by_lane(sampling.temperature), "seed": sampling.seed, "noise": noise}
        if preset.tempered:
            heat = by_lane(sampling.temperature)
            more["temperature"] = torch.where(heat > 0, heat, 1.0)
    if bias is not None:
        more |= {"bias_ids": bias[0], "bias": bias[1]}
    # One pass over the vocabulary, unless what is drawn from is another distribution than the model's.
    apart = bool(own) and (raw is not logits or "temperature" in more)
    if apart:
        stats = stats_of(
            ops,
            logits,
            rows=rows,
            outputs=(*outputs, *(("second",) if "margin" in wanted else ())),
            banned=banned,
            **more,
        )
        model_stats = stats_of(ops, raw, rows=rows, outputs=tuple(own), banned=banned, **own_more)
    else:
        stats = model_stats = stats_of(
            ops, logits, rows=rows, outputs=(*outputs, *own), banned=banned, **more, **own_more
        )
    if history is not None:
        # A row that sits this step out keeps its own: what was computed for it is nobody's.
        own_rows = needed.flatten()
        history["logits"].copy_(torch.where(own_rows[:, None], raw, history["logits"]))
        history["logsumexp"].copy_(torch.where(own_rows, model_stats.logsumexp, history["logsumexp"]))

    token, confidence = (
        (stats.sampled_token, stats.sampled_confidence) if sampling.draws else (stats.token, stats.confidence)
    )
    result = {
        "token": token,
        "confidence": confidence,
        "greedy": stats.token,
        "greedy_confidence": stats.confidence,
        "margin": stats.margin,
        "gap": None if model_stats.second_logit is None else model_stats.logit - model_stats.second_logit,
        "entropy": stats.entropy,
        "kl": model_stats.kl if history is not None else None,
        "error": stats.error,
    }
    return {name: None if values is None else values.view(-1, W) for name, values in result.items()}


def stats_of(ops: Ops, logits: Tensor, **given: Any) -> Confidence:
    """`ops.confidence`, whose numbers are float64 for float64 logits; what rules compare and a state keeps is fp32 for
    all."""
    stats = ops.confidence(logits, **given)
    if logits.dtype != torch.float64:
        return stats
    return stats._replace(
        **{n: x.float() for n, x in stats._asdict().items() if x is not None and x.is_floating_point()}
    )


def filtered(
    logits: Tensor,
    plan: Plan,
    sampling: Sampling,
    temperature: Tensor,
    banned: Tensor,
    needed: Tensor,
    narrowed: Tensor,
) -> Tensor:
    """Logits [N, V] fp32 with -inf outside the top-k and top-p sets of softmax(l / T) (T = 0: of l). The best allowed
    id is kept. Rows that are not `narrowed` [N] bool keep all.

    top-p keeps an id if those strictly better (ties: lower ids first) have at most top_p of the mass; top-k keeps every
    id as large as the k-th. Plain torch on any backend: it sorts the vocabulary.
    """
    N, V = logits.shape
    work = torch.where(needed[:, None], logits, 0.0)
    work = work.double() if logits.dtype == torch.float64 else work.float()
    scaled = work / torch.where(temperature > 0, temperature, 1.0)[:, None]
    keep = torch.ones_like(scaled, dtype=torch.bool)

    def top_k(keep: Tensor) -> Tensor:
        if not sampling.top_k or sampling.top_k >= V:
            return keep
        least = torch.where(keep, scaled, -torch.inf).topk(sampling.top_k, dim=1).values[:, -1:]
        return keep & (scaled >= least)

    def top_p(keep: Tensor) -> Tensor:
        if sampling.top_p >= 1:
            return keep
        p, order = torch.where(keep, scaled, -torch.inf).softmax(1).sort(dim=1, descending=True, stable=True)
        inside = p.cumsum(1) - p <= sampling.top_p
        return keep & torch.zeros_like(keep).scatter(1, order, inside)

    for step in (top_k, top_p) if plan.preset.top_k_first else (top_p, top_k):
        keep = step(keep)
    keep = keep | ~narrowed[:, None]
    ids = banned.expand(N, -1)
    allowed = torch.ones(N, V + 1, dtype=torch.bool, device=logits.device).scatter(
        1, torch.where(ids < 0, V, ids), False
    )[:, :V]
    best = torch.where(allowed, work, -torch.inf).argmax(1, keepdim=True)
    keep = keep.scatter(1, best, True)
    return torch.where(keep, work, -torch.inf)


def rule_choice(plan: Plan, view: View) -> Choice:
    """What the preset's rule makes of a step, before its policies."""
    preset, sampling, state = plan.preset, view.sampling, view.state
    value, min_unmask = sampling.value, sampling.min_unmask
    if preset.quota and preset.quota_of == "block":
        min_unmask = view.quota()
    if sampling.transfer is not None:
        last = state.step >= sampling.steps - 1
        share = sampling.transfer.gather(1, torch.minimum(state.step, sampling.steps - 1).long()[:, None])[:, 0]
        if preset.rule == "bernoulli":
            value = -torch.where(last, 1.0, share)
            min_unmask = torch.zeros_like(min_unmask)
        else:
            masks = view.eligible.sum(1)
            count = (masks.to(torch.float32) * share).floor().to(torch.int32)
            count = count if preset.strict_reference else count.clamp(min=1)
            min_unmask = torch.where(last, masks.to(torch.int32), count)
    allowed = None
    if preset.sub_block_length is not None:
        start, end = sub_block(plan, state)
        allowed = (view.position >= start[:, None]) & (view.position < end[:, None])
    return Choice(
        **view.stated(),
        value=value,
        min_unmask=min_unmask,
        allowed=allowed,
        run_value=None if preset.run_threshold is None else torch.full_like(value, preset.run_threshold),
    )


def opening(plan: Plan, view: View, choice: Choice) -> Choice:
    """The choice of the forward that opens a block's stale cache, where positions are predicted by the row before them.

    It writes the block's first masked position and nothing else: later steps do not compute the row that predicts it.
    """
    if not (plan.previous and plan.preset.cache in ("prefix", "dual")):
        return choice
    opens = view.state.block_step == 0
    first = (view.eligible.cumsum(1) == 1) | ~opens[:, None]
    return dataclasses.replace(
        choice,
        allowed=first if choice.allowed is None else choice.allowed & first,
        min_unmask=torch.where(opens, 1, choice.min_unmask),
        fallback=None if choice.fallback is None else torch.where(opens, 1, choice.fallback),
    )
