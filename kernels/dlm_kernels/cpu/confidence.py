"""`confidence` on a CPU: the rows that are needed, a few at a time, so that what one pass leaves in the cache the next
one finds there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..checks.confidence import (
    LIMIT,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    PREVIOUS_FLOOR,
    check_arguments,
    requested,
)
from ..reference.confidence import Confidence
from ..state import ERROR_LOGITS
from . import noise as random_numbers
from .calls import on_cpu

# Numbers of a chunk of rows for each thread: 1 MiB in fp32, what the second-level cache of a core holds.
CHUNK = 1 << 18
# Gumbel noise lies in (-2.82, 16.64), so no id whose score is more than this below another's can be drawn. Where
# rounding makes a tie of two scores with their noise, it rounds the difference too, and both may win.
NOISE_SPAN = 20.0
# Below this a weight exp(x) is zero in fp32 and in float64.
NO_WEIGHT = -1e4

# What a field holds in a row that failed and in one that is not needed, if not zero.
_ABSENT = {"token": (0, -1), "sampled_token": (0, -1), "second_token": (-1, -1), "error": (ERROR_LOGITS, 0)}
_INTEGERS = {"token": torch.int64, "sampled_token": torch.int64, "second_token": torch.int64, "error": torch.int32}


@on_cpu(reference.confidence)
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
    """`reference.confidence`, which says what is computed, and of what arguments.

    A needed row is read once and copied in fp32 (float64 logits: in float64); what a caller does not ask for is not
    computed.
    """
    N = check_arguments(
        logits, rows, outputs, banned, temperature, sample_temperature, seed, noise, query, soft_cap,
        bias_ids, bias, previous, previous_logsumexp, extra_dtypes=(torch.float64,),
    )  # fmt: skip
    R, V = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    row = list(range(R)) if rows is None else rows.tolist()
    present = [n for n, r in enumerate(row) if 0 <= r < R]
    by_output = {
        "banned": None if banned is None or not banned.shape[-1] else banned.expand(N, -1),
        "temperature": temperature,
        "sample_temperature": sample_temperature,
        "noise": noise,
        "query": query,
        "bias_ids": bias_ids,
        "bias": bias,
    }

    # 1. The rows that are there, chunk by chunk.
    size = max(1, CHUNK * torch.get_num_threads() // V)
    chunks = []
    for begin in range(0, len(present), size):
        at = _places(present[begin : begin + size])
        places = _places([row[n] for n in present[begin : begin + size]])
        arguments = {name: x[at] for name, x in by_output.items() if x is not None}
        if previous is not None:
            arguments["previous"] = _copied(previous, places, dtype)
            arguments["previous_logsumexp"] = previous_logsumexp[places]
        x = _copied(logits, places, dtype)
        chunks.append(_statistics(x, outputs, soft_cap=soft_cap, seed=seed, **arguments))

    # 2. Every output: what its chunk says, or what stands for a row that is not needed or not there.
    place = torch.tensor(present)
    failures = [n for n, r in enumerate(row) if r != -1] if len(present) + row.count(-1) < N else []
    fields = {}
    for name in Confidence._fields:
        if not requested(name, outputs):
            fields[name] = None
            continue
        values = None
        if chunks:
            values = chunks[0][name] if len(chunks) == 1 else torch.cat([chunk[name] for chunk in chunks])
        if len(present) < N or values is None:
            failed, unneeded = _ABSENT.get(name, (0, 0))
            everywhere = torch.full((N,), unneeded, dtype=_INTEGERS.get(name, dtype))
            if failures:
                everywhere[failures] = failed
            values = everywhere if values is None else everywhere.index_copy_(0, place, values)
        fields[name] = values
    return Confidence(**fields)


def _statistics(
    x: Tensor,
    outputs: Sequence[str],
    *,
    soft_cap: float | None,
    seed: Tensor | None,
    banned: Tensor | None = None,
    temperature: Tensor | None = None,
    sample_temperature: Tensor | None = None,
    noise: Tensor | None = None,
    query: Tensor | None = None,
    bias_ids: Tensor | None = None,
    bias: Tensor | None = None,
    previous: Tensor | None = None,
    previous_logsumexp: Tensor | None = None,
) -> dict[str, Tensor]:
    """The requested fields of rows of logits [n, V], which are overwritten; every argument has n rows."""
    V, dtype = x.shape[1], x.dtype
    if bias is not None:
        _add_bias(x, bias_ids, bias)

    # 1. Errors and choices. The largest number of a row tells whether the row holds NaN or +inf too.
    top = _first_largest(x)
    peak = _at(x, top)
    error = ~(peak < LIMIT)
    token, logit, second_token, second_logit = _best_allowed(x, top, banned, "second" in outputs)
    error |= ~(logit > -LIMIT)
    if temperature is not None:
        error |= ~_is_temperature(temperature)
    if "sampled" in outputs:
        error |= ~(_is_temperature(sample_temperature) | (sample_temperature == 0))
    if "query" in outputs:
        in_vocabulary = (query >= 0) & (query < V)
        error |= ~in_vocabulary
        query = torch.where(in_vocabulary, query, 0)
    fields = {"token": token, "error": error.to(torch.int32) * ERROR_LOGITS}
    if second_token is not None:
        absent = second_logit <= -LIMIT
        fields["second_token"] = torch.where(absent, -1, second_token)

    # 2. The cap, and the draw, which has a temperature of its own.
    if soft_cap is not None:
        dead = x <= -LIMIT
        x.div_(soft_cap).tanh_().mul_(soft_cap).masked_fill_(dead, -math.inf)
        logit = _at(x, token)
        second_logit = None if second_token is None else _at(x, second_token)
    fields["logit"] = logit
    if second_token is not None:
        fields["second_logit"] = torch.where(absent, -math.inf, second_logit)
    if "sampled" in outputs:
        draws = ~error & (sample_temperature != 0)
        fields["sampled_token"] = _drawn(x, token, draws, sample_temperature, seed, noise, banned)

    # 3. The softmax.
    pivot = peak
    if temperature is not None:
        x.div_(temperature.to(dtype)[:, None])
    if temperature is not None or soft_cap is not None:
        pivot = x.amax(1)
    shifted = x.sub_(pivot[:, None])
    keeps_shifted = "entropy" in outputs or "kl" in outputs
    weight = shifted.exp() if keeps_shifted else shifted.exp_()
    total = weight.sum(1)
    fields["confidence"] = _at(weight, token) / total
    if second_token is not None:
        second = torch.where(absent, 0.0, _at(weight, second_token))
        fields["margin"] = fields["confidence"] - second / total
    if "sampled" in outputs:
        fields["sampled_confidence"] = _at(weight, fields["sampled_token"]) / total
    if "query" in outputs:
        fields["query_confidence"] = _at(weight, query) / total
    if "logsumexp" in outputs:
        fields["logsumexp"] = pivot + total.log()
    if keeps_shifted:
        # An id of weight 0 may have shifted = -inf, and -inf * 0 is NaN: such an id adds nothing.
        shifted.clamp_(min=NO_WEIGHT)
    if "kl" in outputs:
        fields["kl"] = _divergence(
            shifted, weight, total, previous, previous_logsumexp, soft_cap=soft_cap, temperature=temperature
        )
    if "entropy" in outputs:
        fields["entropy"] = total.log() - shifted.mul_(weight).sum(1) / total

    # 4. Rows that failed.
    if error.any():
        for name in fields.keys() - {"error"}:
            fields[name] = torch.where(error, _ABSENT.get(name, (0, 0))[0], fields[name])
    return fields


def _best_allowed(
    x: Tensor, top: Tensor, banned: Tensor | None, wants_second: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The best id of each row of x that is not banned and its logit, and those of the next one if that is wanted.

    Ids are taken out of x for a while, and put back.
    """
    best = _best(x, top, wants_second)
    # Ids are banned so that they do not win where they would; mostly they would not.
    if banned is None or not any((banned == ids[:, None]).any() for ids in best[::2] if ids is not None):
        return best
    places, held = _ban(x, banned)
    best = _best(x, _first_largest(x), wants_second)
    x.scatter_(1, places, held)
    return best


def _best(x: Tensor, top: Tensor, wants_second: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`_best_allowed` where nothing is banned; `top` is the best id."""
    logit, second_token, second_logit = _at(x, top), None, None
    if wants_second:
        x.scatter_(1, top[:, None], -math.inf)
        second_token = _first_largest(x)
        second_logit = _at(x, second_token)
        x.scatter_(1, top[:, None], logit[:, None])
    return top, logit, second_token, second_logit


def _ban(x: Tensor, banned: Tensor) -> tuple[Tensor, Tensor]:
    """Makes the banned logits -inf in place. Returns places [n, K] and what x held there."""
    inside = (banned >= 0) & (banned < x.shape[1])
    # An id outside of the vocabulary puts back what place 0 holds, unless 0 is banned too.
    places = torch.where(inside, banned, 0)
    held = x.gather(1, places)
    x.scatter_reduce_(1, places, torch.where(inside, -math.inf, held), "amin")
    return places, held


def _drawn(
    capped: Tensor,
    token: Tensor,
    draws: Tensor,
    temperature: Tensor,
    seed: Tensor,
    noise: Tensor,
    banned: Tensor | None,
) -> Tensor:
    """[n] sampled ids: of rows that draw, the id of highest score; of the others the token.

    Only ids that some noise could make the best one get noise: few, unless the row is flat.
    """
    rows = draws.nonzero()[:, 0]
    if not len(rows):
        return token.clone()
    # 1. The scores without noise, and who may win.
    scores = capped[rows]
    if banned is not None:
        _ban(scores, banned[rows])
    allowed = scores > -LIMIT
    scores.mul_((1 / temperature[rows].to(scores.dtype))[:, None])
    best = _at(scores, token[rows])
    may_win = allowed & (scores >= best[:, None] - NOISE_SPAN)

    # 2. Their noise, row after row, and the lowest id of the highest score.
    place = np.flatnonzero(may_win.numpy())
    count = may_win.sum(1).numpy()
    row = np.repeat(np.arange(len(rows)), count)
    ids = place - row * scores.shape[1]
    k0, k1 = random_numbers.row_key(seed, noise[rows])
    drawn = scores.flatten()[place].add_(random_numbers.gumbel(k0[row], k1[row], ids, scores.dtype)).numpy()
    largest = np.maximum.reduceat(drawn, np.cumsum(count) - count)
    wins = np.flatnonzero(drawn == largest[row])
    first = wins[np.searchsorted(row[wins], np.arange(len(rows)))]
    return token.index_copy(0, rows, torch.from_numpy(ids[first]))


def _divergence(
    shifted: Tensor,
    weight: Tensor,
    total: Tensor,
    previous: Tensor,
    previous_logsumexp: Tensor,
    *,
    soft_cap: float | None,
    temperature: Tensor | None,
) -> Tensor:
    """[n] KL divergence from the step before, whose logits [n, V] are overwritten; +inf where it has none."""
    usable = (previous.amax(1) < LIMIT) & previous_logsumexp.isfinite()
    if soft_cap is not None:
        dead = previous <= -LIMIT
        previous.div_(soft_cap).tanh_().mul_(soft_cap).masked_fill_(dead, -math.inf)
    if temperature is not None:
        previous.div_(temperature.to(previous.dtype)[:, None])
    log_before = previous.sub_(previous_logsumexp.to(previous.dtype)[:, None]).clamp_(min=PREVIOUS_FLOOR)
    change = (shifted - total.log()[:, None]).sub_(log_before)
    kl = change.mul_(weight).sum(1) / total
    return torch.where(usable & kl.isfinite(), kl.clamp(min=0), math.inf)


def _add_bias(x: Tensor, bias_ids: Tensor, bias: Tensor) -> None:
    """Adds one id of each row at a time, which defines the order in which several biases of an id are added."""
    inside = (bias_ids >= 0) & (bias_ids < x.shape[1])
    places, added = torch.where(inside, bias_ids, 0), torch.where(inside, bias, 0.0).to(x.dtype)
    for k in range(bias.shape[1]):
        x.scatter_add_(1, places[:, k, None], added[:, k, None])


def _first_largest(x: Tensor) -> Tensor:
    """[n] lowest id among the largest of each row; that of a NaN if there is one. Numpy searches ten times as fast as
    torch."""
    return torch.from_numpy(np.argmax(x.numpy(), axis=1))


def _at(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids[:, None])[:, 0]


def _is_temperature(values: Tensor) -> Tensor:
    return (values >= MIN_TEMPERATURE) & (values <= MAX_TEMPERATURE)


def _places(numbers: list[int]) -> slice | Tensor:
    """Ascending numbers without a gap as a slice, whose rows are a view."""
    first, end = numbers[0], numbers[-1] + 1
    return slice(first, end) if numbers == list(range(first, end)) else torch.tensor(numbers)


def _copied(x: Tensor, places: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of a tensor in `dtype`, copied once."""
    return x[places].to(dtype, copy=isinstance(places, slice))
