"""Specification of `confidence`: what every needed row of logits says about its token, in one pass over the
vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks.confidence import (
    LIMIT,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    PREVIOUS_FLOOR,
    check_arguments,
    requested,
)
from ..state import ERROR_LOGITS
from . import noise as random_numbers


class Confidence(NamedTuple):
    """Statistics of N rows, each [N]; None where they were not requested. Defined in `confidence`."""

    token: Tensor  # int64
    logit: Tensor  # fp32, soft-capped, untempered
    second_token: Tensor | None  # int64, -1 = no second candidate
    second_logit: Tensor | None
    logsumexp: Tensor | None
    entropy: Tensor | None  # nats
    kl: Tensor | None  # nats
    confidence: Tensor
    margin: Tensor | None
    sampled_token: Tensor | None
    sampled_confidence: Tensor | None
    query_confidence: Tensor | None
    error: Tensor  # int32, 0 or ERROR_LOGITS


def confidence(
    logits: Tensor,
    *,
    rows: Tensor | None = None,
    outputs: Sequence[str] = ("second",),
    banned: Tensor | None = None,
    temperature: Tensor | None = None,
    sample_temperature: Tensor | None = None,
    seed: Tensor | None = None,
    noise: Tensor | None = None,
    query: Tensor | None = None,
    soft_cap: float | None = None,
    bias_ids: Tensor | None = None,
    bias: Tensor | None = None,
    previous: Tensor | None = None,
    previous_logsumexp: Tensor | None = None,
) -> Confidence:
    """Most likely token per row with its probability and, on request, runner-up, logsumexp, entropy, KL, a draw, a
    query.

        x = logits, plus `bias` at `bias_ids`    l = soft_cap * tanh(x / soft_cap), or x    p = softmax(l / temperature)
        token, second_token = the two allowed ids of highest x (ties: lowest id); logit, second_logit their l
        confidence = p[token]        margin = confidence - p[second_token]        entropy = -sum p ln p (nats)
        kl = sum p (ln p - max(ln p', ln 1e-12)), not below 0
            ln p' = (previous, capped) / temperature - previous_logsumexp
        sampled_token = argmax over allowed ids of l / sample_temperature + gumbel(row key, id)
        sampled_confidence = p[sampled_token]

    Sums are over all V ids; `logsumexp` is of l / temperature. An id is allowed if it is not banned and its x is above
    -1e30. Banned ids cannot be token, second_token or sampled_token, but stay in every sum. Everything is computed in
    fp32 (float64 logits: in float64), the sum x too. `previous` gets no bias.

    Args:
        logits: [R, V] fp16, bf16 or fp32, last stride 1, any row stride; read once, not modified.
        rows: [N] int32, the logits row of each output; -1 = nothing is needed, and nothing is read. None: every row,
            and N = R.
        outputs: optional groups, any of `checks.confidence.OUTPUTS`; token, logit, confidence and error always come.
        banned: [K] or [N, K] int64, K <= 32; -1 = none. Ids outside [0, V) ban nothing.
        temperature: [N] fp32 of the statistics. None: 1.
        sample_temperature: [N] fp32, 0 = greedy (sampled_token is token). Required for "sampled", as are:
        seed: [1] int64 of all outputs, or [N] with one for each, and
        noise: [N, 3] int32, request index, absolute position and own step of each output; see `reference.noise`.
        query: [N] int64, required for "query": query_confidence = p[query].
        soft_cap: a constant of the model, in [1e-30, 1e30]; None = no cap.
        bias_ids: [N, K] int64, 1 <= K <= 64, given with bias. Ids outside [0, V), such as -1, bias nothing: what their
            bias is does not matter. An id that comes twice gets both, one after the other.
        bias: [N, K] fp32, finite, of any sign.
        previous: [R, V], dtype and stride rules of the logits; its row r is compared with their row r. Required for
            "kl", as is:
        previous_logsumexp: [R] fp32, of previous at the temperature of this call. +inf: there is none, and kl is +inf.
    Returns:
        Confidence. A row with an error (error = 1) has token = sampled_token = 0, second_token = -1 and zeros
        elsewhere, never NaN: its x holds a NaN or +inf or allows no token, its temperature is not in [1e-6, 1e6] (for
        sampling: nor 0), its query is outside [0, V) or its row outside [-1, R). A row that is not needed has -1 for
        ids and zeros elsewhere. Without a second candidate second_token is -1, second_logit -inf and margin =
        confidence. A kl that is not finite, or whose row of `previous` holds a NaN or +inf, is +inf and no error.
    Raises:
        ValueError: shapes, strides, unknown outputs, an argument that its output needs or that no output uses.
        TypeError: dtypes.

    Cost: R*V elements read once ("kl": twice as many), about 10 bytes written per row and group. Recurrences: one-pass
    softmax, arXiv:1805.02867. Rules that use it: low confidence, arXiv:2502.09992; margin, arXiv:2502.06768; entropy
    budget, arXiv:2505.24857; KL stability, arXiv:2511.05664; a bias by past confidence, arXiv:2510.06133.
    """
    N = check_arguments(
        logits, rows, outputs, banned, temperature, sample_temperature, seed, noise, query, soft_cap,
        bias_ids, bias, previous, previous_logsumexp, extra_dtypes=(torch.float64,),
    )  # fmt: skip
    # 1. The row of every output, with its bias.
    R, V = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    row = torch.arange(R, device=logits.device) if rows is None else rows.to(torch.int64)
    needed = row != -1
    present = (row >= 0) & (row < R)

    def rows_of(values: Tensor) -> Tensor:
        """The row of each output, 0 where there is none. Shapes are fixed: boolean indexing would read the device."""
        if not R:
            return torch.zeros(N, *values.shape[1:], dtype=dtype, device=logits.device)
        return torch.where(present.view(N, *[1] * (values.dim() - 1)), values[row.clamp(0, R - 1)].to(dtype), 0.0)

    raw = _add_bias(rows_of(logits), bias_ids, bias)
    raw = torch.where(raw <= -LIMIT, -math.inf, raw)
    scale = torch.ones(N, dtype=dtype, device=logits.device) if temperature is None else temperature.to(dtype)
    is_tempered = _is_temperature(scale if temperature is None else temperature)

    # 2. Errors and choices. Tokens are chosen by x: the cap is increasing, and its rounding must not make a tie.
    ids = torch.arange(V, device=logits.device)
    allowed = ~_is_banned(ids, banned, N) & (raw > -math.inf)
    error = ~present | torch.isnan(raw).any(1) | (raw >= LIMIT).any(1) | ~allowed.any(1) | ~is_tempered
    if "sampled" in outputs:
        error |= ~(_is_temperature(sample_temperature) | (sample_temperature == 0))
    if "query" in outputs:
        in_vocabulary = (query >= 0) & (query < V)
        error |= ~in_vocabulary
    # A failed row is computed as a row of zeros, so that nothing below can be NaN, and overwritten at the end.
    raw = torch.where(error[:, None], 0.0, raw)
    allowed = allowed | error[:, None]
    scale = torch.where(error, 1.0, scale)

    token = _first_largest(raw, allowed)
    others = allowed & (ids != token[:, None])
    second_token = torch.where(others.any(1), _first_largest(raw, others), -1)

    # 3. The softmax of the capped logits, and what follows from the choices.
    capped = _cap(raw, soft_cap)
    scaled = capped / scale[:, None]
    shifted = scaled - scaled.amax(1, keepdim=True)
    weight = shifted.exp()
    total = weight.sum(1)
    # An id of probability 0 has shifted = -inf, and -inf * 0 is NaN: it adds nothing.
    energy = (weight * torch.where(weight > 0, shifted, 0.0)).sum(1)

    def at(values: Tensor, index: Tensor, absent: float) -> Tensor:
        return torch.where(index >= 0, values.gather(1, index.clamp(min=0)[:, None])[:, 0], absent)

    best = at(weight, token, 0.0) / total
    result = Confidence(
        token=token,
        logit=at(capped, token, 0.0),
        second_token=second_token,
        second_logit=at(capped, second_token, -math.inf),
        logsumexp=scaled.amax(1) + total.log(),
        entropy=total.log() - energy / total,
        kl=None,
        confidence=best,
        margin=best - at(weight, second_token, 0.0) / total,
        sampled_token=None,
        sampled_confidence=None,
        query_confidence=None,
        error=(error & needed).to(torch.int32) * ERROR_LOGITS,
    )

    # 4. The groups that need more arguments.
    if "kl" in outputs:
        before, before_logsumexp = rows_of(previous), rows_of(previous_logsumexp)
        usable = ~(torch.isnan(before) | (before >= LIMIT)).any(1) & before_logsumexp.isfinite()
        log_before = (_cap(before, soft_cap) / scale[:, None] - before_logsumexp[:, None]).clamp(min=PREVIOUS_FLOOR)
        change = torch.where(weight > 0, shifted - total.log()[:, None] - log_before, 0.0)
        kl = (weight * change).sum(1) / total
        result = result._replace(kl=torch.where(usable & kl.isfinite(), kl.clamp(min=0), math.inf))
    if "sampled" in outputs:
        greedy = error | (sample_temperature == 0)
        inverse = 1 / torch.where(greedy, 1.0, sample_temperature).to(dtype)
        drawn = capped * inverse[:, None] + random_numbers.gumbel(random_numbers.row_key(seed, noise), ids, dtype)
        sampled = torch.where(greedy, token, _first_largest(drawn, allowed))
        result = result._replace(sampled_token=sampled, sampled_confidence=at(weight, sampled, 0.0) / total)
    if "query" in outputs:
        result = result._replace(query_confidence=at(weight, torch.where(in_vocabulary, query, 0), 0.0) / total)

    # 5. Rows that failed or are not needed, and fields that were not requested.
    absent = {"token": (0, -1), "sampled_token": (0, -1), "second_token": (-1, -1), "error": (ERROR_LOGITS, 0)}
    fields = {}
    for name, values in result._asdict().items():
        if values is None or not requested(name, outputs):
            fields[name] = None
            continue
        failed, unneeded = absent.get(name, (0, 0))
        fields[name] = torch.where(needed, torch.where(error, failed, values), unneeded).to(values.dtype)
    return Confidence(**fields)


def _first_largest(values: Tensor, allowed: Tensor) -> Tensor:
    """[N] lowest id among the largest allowed values; any id where nothing is allowed."""
    candidates = torch.where(allowed, values, -math.inf)
    ids = torch.arange(values.shape[1], device=values.device)
    largest = allowed & (candidates == candidates.amax(1, keepdim=True))
    return torch.where(largest, ids, values.shape[1] - 1).amin(1)


def _is_banned(ids: Tensor, banned: Tensor | None, N: int) -> Tensor:
    mask = torch.zeros(N, ids.shape[0], dtype=torch.bool, device=ids.device)
    if banned is not None:
        for column in banned.expand(N, banned.shape[-1]).unbind(1):
            mask |= ids == column[:, None]
    return mask


def _add_bias(values: Tensor, bias_ids: Tensor | None, bias: Tensor | None) -> Tensor:
    """`values` [N, V] plus the bias. Ids are taken one of each row at a time, which defines the order in which several
    biases of an id are added."""
    if bias is None:
        return values
    valid = (bias_ids >= 0) & (bias_ids < values.shape[1])
    index, added = torch.where(valid, bias_ids, 0), torch.where(valid, bias, 0.0).to(values.dtype)
    for k in range(bias.shape[1]):
        values = values.scatter_add(1, index[:, k, None], added[:, k, None])
    return values


def _cap(values: Tensor, soft_cap: float | None) -> Tensor:
    return (
        values
        if soft_cap is None
        else torch.where(values <= -LIMIT, -math.inf, soft_cap * torch.tanh(values / soft_cap))
    )


def _is_temperature(values: Tensor) -> Tensor:
    return (values >= MIN_TEMPERATURE) & (values <= MAX_TEMPERATURE)
