"""What the two kernels of `confidence` share for a row: its noise, its scales, its soft cap, and the merge of the
statistics of the parts that its vocabulary was cut into.

Bits: a row's sums are merged here and nowhere else, by the same operations in the same order, whether one program has
computed all parts or each part had a program. No product feeds a sum that the compiler could fuse it with
(`_rounded_product`), so every kernel that inlines these functions rounds at the same places.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..checks.confidence import LIMIT, MAX_TEMPERATURE, MIN_TEMPERATURE
from ..state import ERROR_LOGITS

_LIMIT = tl.constexpr(LIMIT)
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_MAX_TEMPERATURE = tl.constexpr(MAX_TEMPERATURE)
_ERROR = tl.constexpr(ERROR_LOGITS)
_LOG2E = tl.constexpr(math.log2(math.e))
_TWO_LOG2E = tl.constexpr(2 * math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
# The pivot of what holds nothing but -inf. It is finite, because -inf - -inf is NaN, and lies below
# -LIMIT / MIN_TEMPERATURE in units of log2.
_NO_PIVOT = tl.constexpr(-2e36)
# Stands for an exponent of -inf that is multiplied by its weight: 2^-10000 is 0 as well, but 0 * -inf would be NaN.
_FAR_BELOW = tl.constexpr(-10000.0)
_NO_ID = tl.constexpr(2**30)  # above every id, group and tile


@triton.jit
def _fmix32(h):
    h ^= h >> 16
    h = tl.mul(h, 0x85EBCA6B, sanitize_overflow=False)
    h ^= h >> 13
    h = tl.mul(h, 0xC2B2AE35, sanitize_overflow=False)
    return h ^ (h >> 16)


@triton.jit
def _noise_key(seed_ptr, seed_stride, noise_ptr, n):
    """Philox words (k0, k1) of output n (or of each of them); reference.noise.row_key. A stride of 0 is that of one
    seed for all outputs."""
    seed = tl.load(seed_ptr + n.to(tl.int64) * seed_stride)
    address = noise_ptr + n.to(tl.int64) * 3
    request, position, step = tl.load(address), tl.load(address + 1), tl.load(address + 2)
    k0, k1, _, _ = tl.philox(seed, request, position, step, tl.zeros_like(step))
    return k0, k1


@triton.jit
def _noise_bits(ids, k0, k1):
    """uint32 word of every id; reference.noise.bits."""
    return _fmix32(tl.add(_fmix32(ids.to(tl.uint32) ^ k0), k1, sanitize_overflow=False))


@triton.jit
def _uniform(ids, k0, k1):
    """((bits >> 9) + 0.5) * 2^-23; reference.noise.uniform."""
    # Without a conversion: the bits become the mantissa of 1.x, from which 1 - 2^-24 is subtracted, exactly.
    one_to_two = ((_noise_bits(ids, k0, k1) >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    return one_to_two - 0.999999940395355224609375


@triton.jit
def _gumbel(ids, k0, k1):
    return -tl.log(-tl.log(_uniform(ids, k0, k1)))


@triton.jit
def _cap(x, soft_cap, HAS_SOFT_CAP: tl.constexpr):
    """soft_cap * tanh(x / soft_cap), where -inf stays -inf."""
    if HAS_SOFT_CAP:
        # tanh y = 1 - 2 / (e^(2y) + 1) saturates to +-1 where the exponential overflows or vanishes, and its absolute
        # error is at most 2^-23.
        tanh = 1.0 - 2.0 / (tl.exp2(x * tl.div_rn(_TWO_LOG2E, soft_cap)) + 1.0)
        return tl.where(x <= -_LIMIT, float("-inf"), soft_cap * tanh)
    else:
        return x


@triton.jit
def _pivot(x, scale, soft_cap, HAS_SOFT_CAP: tl.constexpr):
    """What exponents up to that of x are taken relative to. The pivot is rounded down to an integer, so that rescaling
    is exact and no fused rounding can make two pivots disagree. That of -inf is -inf, and the caller takes its maximum
    with a finite one."""
    return tl.floor(_cap(x, soft_cap, HAS_SOFT_CAP) * scale)


@triton.jit
def _score(x, ids, sample_scale, k0, k1, soft_cap, HAS_SOFT_CAP: tl.constexpr):
    return tl.fma(_cap(x, soft_cap, HAS_SOFT_CAP), sample_scale, _gumbel(ids, k0, k1))


@triton.jit
def _scales(n, temperature_ptr, HAS_TEMPERATURE: tl.constexpr):
    """(temperature, 1 / temperature in units of log2, whether the temperature is out of range) of output n."""
    temperature = 1.0
    bad = n < 0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + n)
        bad = ((temperature >= _MIN_TEMPERATURE) & (temperature <= _MAX_TEMPERATURE)) == 0
        temperature = tl.where(bad, 1.0, temperature)
    return temperature, tl.div_rn(_LOG2E, temperature), bad


@triton.jit
def _sampling(n, sample_temperature_ptr, SAMPLED: tl.constexpr):
    """(whether output n draws, 1 / its sampling temperature, whether that is out of range)."""
    draws = n < 0
    bad = n < 0
    sample_scale = 1.0
    if SAMPLED:
        temperature = tl.load(sample_temperature_ptr + n)
        draws = (temperature >= _MIN_TEMPERATURE) & (temperature <= _MAX_TEMPERATURE)
        bad = (draws | (temperature == 0.0)) == 0
        sample_scale = tl.div_rn(1.0, tl.where(draws, temperature, 1.0))
    return draws, sample_scale, bad


@triton.jit
def _rounded_product(a, b):
    """a * b, rounded before anything else happens to it."""
    return tl.fma(a, b, 0.0)


@triton.jit
def _by_warp(x, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """[COLUMNS] values as [.., WARPS, LANES]. As the tiles are read, the middle axis says which warp holds a value, so
    the other two can be reduced without a barrier."""
    LANES: tl.constexpr = min(32, COLUMNS // WARPS)
    return tl.reshape(x, (COLUMNS // (WARPS * LANES), WARPS, LANES))


@triton.jit
def _sum_by_warp(x):
    return tl.sum(tl.sum(x, axis=0), axis=1)


# What two warps have added up, relative to the larger of their pivots: as many sums as the call needs.


@triton.jit
def _two_totals(pivot, total, other_pivot, other_total):
    raised = tl.maximum(pivot, other_pivot)
    decay, other_decay = tl.exp2(pivot - raised), tl.exp2(other_pivot - raised)
    return raised, tl.fma(decay, total, 0.0) + tl.fma(other_decay, other_total, 0.0)


@triton.jit
def _two_energies(pivot, total, energy, other_pivot, other_total, other_energy):
    raised = tl.maximum(pivot, other_pivot)
    step, other_step = tl.maximum(pivot - raised, _FAR_BELOW), tl.maximum(other_pivot - raised, _FAR_BELOW)
    decay, other_decay = tl.exp2(step), tl.exp2(other_step)
    energy, other_energy = tl.fma(step, total, energy), tl.fma(other_step, other_total, other_energy)
    return (
        raised,
        tl.fma(decay, total, 0.0) + tl.fma(other_decay, other_total, 0.0),
        tl.fma(decay, energy, 0.0) + tl.fma(other_decay, other_energy, 0.0),
    )


@triton.jit
def _two_divergences(
    pivot, total, energy, divergence, other_pivot, other_total, other_energy, other_divergence
):  # fmt: skip
    raised = tl.maximum(pivot, other_pivot)
    step, other_step = tl.maximum(pivot - raised, _FAR_BELOW), tl.maximum(other_pivot - raised, _FAR_BELOW)
    decay, other_decay = tl.exp2(step), tl.exp2(other_step)
    energy, other_energy = tl.fma(step, total, energy), tl.fma(other_step, other_total, other_energy)
    divergence = tl.fma(step, total, divergence)
    other_divergence = tl.fma(other_step, other_total, other_divergence)
    return (
        raised,
        tl.fma(decay, total, 0.0) + tl.fma(other_decay, other_total, 0.0),
        tl.fma(decay, energy, 0.0) + tl.fma(other_decay, other_energy, 0.0),
        tl.fma(decay, divergence, 0.0) + tl.fma(other_decay, other_divergence, 0.0),
    )


@triton.jit
def _sums_of_columns(
    pivot, total, energy, divergence,
    ENTROPY: tl.constexpr, KL: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """(pivot, total, energy, divergence) of all columns from each one's: every warp adds up its own columns relative to
    a pivot of its own, and the warps meet in one reduction."""
    # 1. By warp.
    pivot = _by_warp(pivot, COLUMNS, WARPS)
    total = _by_warp(total, COLUMNS, WARPS)
    pivots = tl.max(tl.max(pivot, axis=0), axis=1)
    step = tl.maximum(pivot - pivots[None, :, None], _FAR_BELOW)
    decay = tl.exp2(step)
    totals = _sum_by_warp(_rounded_product(decay, total))
    energies, divergences = tl.zeros_like(totals), tl.zeros_like(totals)
    if ENTROPY:
        energies = _sum_by_warp(_rounded_product(decay, tl.fma(step, total, _by_warp(energy, COLUMNS, WARPS))))
    if KL:
        divergences = _sum_by_warp(_rounded_product(decay, tl.fma(step, total, _by_warp(divergence, COLUMNS, WARPS))))

    # 2. Of all warps.
    row_energy, row_divergence = 0.0, 0.0
    if KL:
        row_pivot, row_total, row_energy, row_divergence = tl.reduce(
            (pivots, totals, energies, divergences), 0, _two_divergences
        )
    elif ENTROPY:
        row_pivot, row_total, row_energy = tl.reduce((pivots, totals, energies), 0, _two_energies)
    else:
        row_pivot, row_total = tl.reduce((pivots, totals), 0, _two_totals)
    return row_pivot, row_total, row_energy, row_divergence


@triton.jit
def _ordered_sum(values, LOG2_SLOTS: tl.constexpr):
    """The sum of [2^LOG2_SLOTS] values, neighbours first: an order that no layout and no number of warps can change."""
    for _ in tl.static_range(LOG2_SLOTS):
        even, odd = tl.split(tl.reshape(values, (values.shape[0] // 2, 2)))
        values = even + odd
    return tl.sum(values, axis=0)


@triton.jit
def _merge_sums(
    pivots, totals, energies, divergences, LOG2_SLOTS: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr
):
    """The row's (pivot, total, energy, divergence) from its parts'. A slot without a part has _NO_PIVOT and zeros."""
    row_pivot = tl.max(pivots, axis=0)
    # The step is not below _FAR_BELOW, where the decay is 0 already: the distance of two pivots times the total of a
    # whole part can overflow.
    step = tl.maximum(pivots - row_pivot, _FAR_BELOW)
    decay = tl.exp2(step)
    row_total = _ordered_sum(_rounded_product(decay, totals), LOG2_SLOTS)
    row_energy = 0.0
    if ENTROPY:
        row_energy = _ordered_sum(_rounded_product(decay, tl.fma(step, totals, energies)), LOG2_SLOTS)
    row_divergence = 0.0
    if KL:
        row_divergence = _ordered_sum(_rounded_product(decay, tl.fma(step, totals, divergences)), LOG2_SLOTS)
    return row_pivot, row_total, row_energy, row_divergence


@triton.jit
def _probability(logit, scale, row_pivot, row_total):
    return tl.minimum(tl.div_rn(tl.exp2(tl.fma(logit, scale, -row_pivot)), row_total), 1.0)  # not above 1 by rounding


@triton.jit
def _finish(
    sums, choices, temperature, scale, before_logsumexp, soft_cap, HAS_SOFT_CAP: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """The values of every output of a row without an error, in the order of `_store_row`.

    sums: pivot, total, energy, divergence, and the largest logit of all ids. choices: the token and its logit, the
    runner-up and its logit, the drawn token and its logit, and the logit of the query. No logit is capped yet.
    """
    row_pivot, row_total, row_energy, row_divergence, row_best = sums
    token, top, second_token, second, sampled_token, sampled, query_logit = choices
    log_total = tl.log2(row_total)
    row_max = _cap(row_best, soft_cap, HAS_SOFT_CAP)
    in_pivot = log_total - tl.fma(row_max, scale, -row_pivot)
    logsumexp = tl.fma(in_pivot, _LN2, tl.div_rn(row_max, temperature))
    entropy = tl.maximum((log_total - tl.div_rn(row_energy, row_total)) * _LN2, 0.0)  # not below 0 by rounding
    kl = 0.0
    if KL:
        kl = (tl.div_rn(row_divergence, row_total) - log_total) * _LN2
        meaningful = (tl.abs(kl) < float("inf")) & (tl.abs(before_logsumexp) < float("inf"))
        kl = tl.where(meaningful, tl.maximum(kl, 0.0), float("inf"))
    top = _cap(top, soft_cap, HAS_SOFT_CAP)
    second = _cap(second, soft_cap, HAS_SOFT_CAP)
    confidence = _probability(top, scale, row_pivot, row_total)
    margin = confidence - _probability(second, scale, row_pivot, row_total)
    sampled_confidence = _probability(_cap(sampled, soft_cap, HAS_SOFT_CAP), scale, row_pivot, row_total)
    query_confidence = _probability(_cap(query_logit, soft_cap, HAS_SOFT_CAP), scale, row_pivot, row_total)
    return (token, top, second_token, second, logsumexp, entropy, kl, confidence, margin, sampled_token,
            sampled_confidence, query_confidence, 0)  # fmt: skip
