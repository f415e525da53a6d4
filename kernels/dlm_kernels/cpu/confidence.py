"""`confidence` on a CPU: the rows that are needed, a few at a time, so that what one pass leaves in the cache the next
one finds there."""

from __future__ import annotations

import functools
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
_INTEGERS = {"token": np.int64, "sampled_token": np.int64, "second_token": np.int64, "error": np.int32}

# Arguments that have a row for every row of the result.
_PER_OUTPUT = ("temperature", "sample_temperature", "noise", "query", "bias_ids", "bias")


@functools.cache
def _names(outputs: tuple[str, ...]) -> tuple[str, ...]:
    """The fields of `Confidence` that a call with these outputs fills."""
    return tuple(name for name in Confidence._fields if requested(name, outputs))


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
    row = np.arange(R) if rows is None else rows.numpy()
    present = ((row >= 0) & (row < R)).nonzero()[0]
    per_output = (temperature, sample_temperature, noise, query, bias_ids, bias)
    given = [(name, x) for name, x in zip(_PER_OUTPUT, per_output) if x is not None]
    ids = None if banned is None else banned.numpy()

    # 1. The rows that are there, chunk by chunk.
    size = max(1, CHUNK * torch.get_num_threads() // V)
    chunks = []
    for begin in range(0, len(present), size):
        at = present[begin : begin + size]
        places = row[at]
        arguments = {name: x[at] for name, x in given}
        arguments["banned"] = ids if ids is None or ids.ndim == 1 else ids[at]
        arguments["seed"] = seed if seed is None or len(seed) == 1 else seed[at]
        if previous is not None:
            arguments["previous"] = _copied(previous, places, dtype)
            arguments["previous_logsumexp"] = previous_logsumexp[places]
        x = _copied(logits, places, dtype)
        with np.errstate(all="ignore"):  # weights may underflow, whatever the caller made of that
            chunks.append(_statistics(x, outputs, soft_cap=soft_cap, **arguments))

    # 2. Every output: what its chunk says, or what stands for a row that is not needed or not there.
    fields, names = dict.fromkeys(Confidence._fields), _names(tuple(outputs))
    if len(present) == N and len(chunks) == 1:
        fields |= {name: torch.from_numpy(chunks[0][name]) for name in names}
        return Confidence(**fields)
    unneeded = row == -1
    fails = ~unneeded if len(present) + np.count_nonzero(unneeded) < N else None
    real = np.float64 if dtype == torch.float64 else np.float32
    for name in names:
        everywhere = np.zeros(N, _INTEGERS.get(name, real))
        if_failed, if_unneeded = _ABSENT.get(name, (0, 0))
        if if_unneeded:
            everywhere[unneeded] = if_unneeded
        if fails is not None:
            everywhere[fails] = if_failed
        if chunks:
            values = [chunk[name] for chunk in chunks]
            everywhere[present] = values[0] if len(values) == 1 else np.concatenate(values)
        fields[name] = torch.from_numpy(everywhere)
    return Confidence(**fields)


def _statistics(
    x: Tensor,
    outputs: Sequence[str],
    *,
    soft_cap: float | None,
    seed: Tensor | None,
    banned: np.ndarray | None,
    temperature: Tensor | None = None,
    sample_temperature: Tensor | None = None,
    noise: Tensor | None = None,
    query: Tensor | None = None,
    bias_ids: Tensor | None = None,
    bias: Tensor | None = None,
    previous: Tensor | None = None,
    previous_logsumexp: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """The requested fields of rows of logits [n, V], which are overwritten; every argument has n rows, and `banned` and
    `seed` may have one for all.

    Torch computes what has V columns, and numpy what has a number a row: an op of numpy costs some hundred nanoseconds
    there, and one of torch some microseconds.
    """
    numbers = x.numpy()
    each = np.arange(len(numbers))
    if bias is not None:
        _add_bias(x, bias_ids, bias)

    # 1. Errors and choices. The largest number of a row tells whether the row holds NaN or +inf too.
    top = numbers.argmax(1)
    peak = numbers[each, top]
    token, logit, second_token, second_logit = _best_allowed(numbers, top, peak, banned, "second" in outputs)
    usable = (peak < LIMIT) & (logit > -LIMIT)
    if temperature is not None:
        usable &= _is_temperature(temperature.numpy())
    if "sampled" in outputs:
        usable &= _is_temperature(sample_temperature.numpy()) | (sample_temperature.numpy() == 0)
    if "query" in outputs:
        query = query.numpy()
        in_vocabulary = (query >= 0) & (query < numbers.shape[1])
        usable &= in_vocabulary
        query = np.where(in_vocabulary, query, 0)
    fields = {"token": token, "error": ~usable * np.int32(ERROR_LOGITS)}
    if second_token is not None:
        absent = second_logit <= -LIMIT
        fields["second_token"] = np.where(absent, -1, second_token)

    # 2. The cap, and the draw, which has a temperature of its own.
    if soft_cap is not None:
        dead = x <= -LIMIT
        x.div_(soft_cap).tanh_().mul_(soft_cap).masked_fill_(dead, -math.inf)
        logit = numbers[each, token]
        second_logit = None if second_token is None else numbers[each, second_token]
    fields["logit"] = logit
    if second_token is not None:
        fields["second_logit"] = np.where(absent, -np.inf, second_logit)
    if "sampled" in outputs:
        draws = usable & (sample_temperature.numpy() != 0)
        fields["sampled_token"] = _drawn(x, token, draws, sample_temperature, seed, noise, banned)

    # 3. The softmax.
    pivot = peak
    if temperature is not None:
        x.div_(temperature.to(x.dtype)[:, None])
    if temperature is not None or soft_cap is not None:
        pivot = x.amax(1).numpy()
    shifted = x.sub_(torch.from_numpy(pivot)[:, None])
    keeps_shifted = "entropy" in outputs or "kl" in outputs
    weight = shifted.exp() if keeps_shifted else shifted.exp_()
    weights, total = weight.numpy(), weight.sum(1)
    sums = total.numpy()
    fields["confidence"] = weights[each, token] / sums
    if second_token is not None:
        second = np.where(absent, np.zeros_like(sums), weights[each, second_token])
        fields["margin"] = fields["confidence"] - second / sums
    if "sampled" in outputs:
        fields["sampled_confidence"] = weights[each, fields["sampled_token"]] / sums
    if "query" in outputs:
        fields["query_confidence"] = weights[each, query] / sums
    if "logsumexp" in outputs:
        fields["logsumexp"] = pivot + total.log().numpy()
    if keeps_shifted:
        # An id of weight 0 may have shifted = -inf, and -inf * 0 is NaN: such an id adds nothing.
        shifted.clamp_(min=NO_WEIGHT)
    if "kl" in outputs:
        fields["kl"] = _divergence(
            shifted, weight, total, previous, previous_logsumexp, soft_cap=soft_cap, temperature=temperature
        ).numpy()
    if "entropy" in outputs:
        fields["entropy"] = (total.log() - shifted.mul_(weight).sum(1) / total).numpy()

    # 4. Rows that failed.
    if not usable.all():
        for name in fields.keys() - {"error"}:
            fields[name] = np.where(usable, fields[name], fields[name].dtype.type(_ABSENT.get(name, (0, 0))[0]))
    return fields


def _best_allowed(
    x: np.ndarray, top: np.ndarray, peak: np.ndarray, banned: np.ndarray | None, wants_second: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The best id of each row of x that is not banned and its logit, and those of the next one if that is wanted.

    Ids are taken out of x for a while, and put back. `top` and `peak` are the best id and its logit where nothing is
    banned.
    """
    best = _best(x, top, peak, wants_second)
    # Ids are banned so that they do not win where they would; mostly they would not.
    if banned is None or not (_is_among(best[0], banned) or (wants_second and _is_among(best[2], banned))):
        return best
    place, held = _ban(x, banned)
    top = x.argmax(1)
    best = _best(x, top, x[np.arange(len(x)), top], wants_second)
    x[place] = held
    return best


def _best(
    x: np.ndarray, top: np.ndarray, peak: np.ndarray, wants_second: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """`_best_allowed` where nothing is banned."""
    if not wants_second:
        return top, peak, None, None
    each = np.arange(len(x))
    x[each, top] = -np.inf
    second_token = x.argmax(1)
    second_logit = x[each, second_token]
    x[each, top] = peak
    return top, peak, second_token, second_logit


def _is_among(ids: np.ndarray, banned: np.ndarray) -> bool:
    """Whether any of the ids [n] is banned by [K] or by its row of [n, K]."""
    return bool((banned == ids[:, None]).any())


def _ban(x: np.ndarray, banned: np.ndarray) -> tuple[tuple[slice | np.ndarray, np.ndarray], np.ndarray]:
    """Makes the logits of banned ids [K] or [n, K] -inf in place. Returns their places and what x held there."""
    inside = (banned >= 0) & (banned < x.shape[1])
    place = (inside.nonzero()[0] if banned.ndim == 2 else slice(None)), banned[inside]
    held = x[place]
    x[place] = -np.inf
    return place, held


def _drawn(
    capped: Tensor,
    token: np.ndarray,
    draws: np.ndarray,
    temperature: Tensor,
    seed: Tensor,
    noise: Tensor,
    banned: np.ndarray | None,
) -> np.ndarray:
    """[n] sampled ids: of rows that draw, the id of highest score; of the others the token.

    Only ids that some noise could make the best one get noise: few, unless the row is flat.
    """
    sampled, rows = token.copy(), np.flatnonzero(draws)
    if not len(rows):
        return sampled
    # 1. The scores without noise, and who may win.
    scores = capped[torch.from_numpy(rows)]
    if banned is not None:
        _ban(scores.numpy(), banned if banned.ndim == 1 else banned[rows])
    allowed = scores > -LIMIT
    scores.mul_((1 / temperature[rows].to(scores.dtype))[:, None])
    best = scores.numpy()[np.arange(len(rows)), token[rows]]
    may_win = allowed & (scores >= torch.from_numpy(best)[:, None] - NOISE_SPAN)

    # 2. Their noise, row after row, and the lowest id of the highest score.
    place = np.flatnonzero(may_win.numpy())
    count = may_win.sum(1).numpy()
    row = np.repeat(np.arange(len(rows)), count)
    ids = place - row * scores.shape[1]
    k0, k1 = random_numbers.row_key(seed if len(seed) == 1 else seed[rows], noise[rows])
    drawn = scores.flatten()[place].add_(random_numbers.gumbel(k0[row], k1[row], ids, scores.dtype)).numpy()
    largest = np.maximum.reduceat(drawn, np.cumsum(count) - count)
    wins = np.flatnonzero(drawn == largest[row])
    sampled[rows] = ids[wins[np.searchsorted(row[wins], np.arange(len(rows)))]]
    return sampled


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


def _is_temperature(values: np.ndarray) -> np.ndarray:
    return (values >= MIN_TEMPERATURE) & (values <= MAX_TEMPERATURE)


def _copied(x: Tensor, places: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The rows of a tensor in `dtype`, in memory of their own."""
    if x.dtype == dtype:
        return torch.from_numpy(x.detach().numpy()[places])
    return x[places].to(dtype)
