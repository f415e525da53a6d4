"""The second launch of `confidence`: one small program per row makes the outputs of its parts' partials.

The partials are values [N, VALUES, PARTS] and ids [N, IDS, PARTS], with fields in the order of the constants below; a
field that no requested output needs is neither written nor read. Choices are exact, so the order in which they are
merged does not matter; sums are merged by `_merge_sums`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..unmask.select import KEY_MIN
from .choice import _key, _number_of, _value_of
from .row import _ERROR, _LIMIT, _NO_ID, _NO_PIVOT, _finish, _merge_sums, _sampling, _scales

# The fields of a part: its sums, its largest logit of all ids, then what is chosen among the allowed ids.
PARTIAL_VALUES, PARTIAL_IDS = 10, 3
_VALUES = tl.constexpr(PARTIAL_VALUES)
_IDS = tl.constexpr(PARTIAL_IDS)
_PIVOT, _TOTAL, _ENERGY, _DIVERGENCE, _LARGEST, _TOP, _SECOND, _DRAWN, _SAMPLED, _QUERY = map(tl.constexpr, range(10))
_TOKEN, _SECOND_TOKEN, _SAMPLED_TOKEN = map(tl.constexpr, range(3))

# What has a value, or a few, for each row. A slice of such a tensor may begin anywhere, and compiles no kernel anew:
# only logits are read as vectors.
ROW_POINTERS = (
    "rows_ptr", "banned_ptr", "temperature_ptr", "sample_temperature_ptr", "seed_ptr", "noise_ptr", "query_ptr",
    "bias_ids_ptr", "bias_ptr", "previous_logsumexp_ptr",
    "token_ptr", "logit_ptr", "second_token_ptr", "second_logit_ptr", "logsumexp_ptr", "entropy_ptr", "kl_ptr",
    "confidence_ptr", "margin_ptr", "sampled_token_ptr", "sampled_confidence_ptr", "query_confidence_ptr", "error_ptr",
)  # fmt: skip


@triton.jit
def _store(pointer, n, value):
    if pointer is not None:  # the output was requested
        tl.store(pointer + n, value)


@triton.jit
def _store_row(
    n, values,
    token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr, confidence_ptr,
    margin_ptr, sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
):  # fmt: skip
    """Stores one value to every output that was requested. The pointers come one by one, because Triton 3.6 takes no
    tuple that holds a None."""
    _store(token_ptr, n, values[0])
    _store(logit_ptr, n, values[1])
    _store(second_token_ptr, n, values[2])
    _store(second_logit_ptr, n, values[3])
    _store(logsumexp_ptr, n, values[4])
    _store(entropy_ptr, n, values[5])
    _store(kl_ptr, n, values[6])
    _store(confidence_ptr, n, values[7])
    _store(margin_ptr, n, values[8])
    _store(sampled_token_ptr, n, values[9])
    _store(sampled_confidence_ptr, n, values[10])
    _store(query_confidence_ptr, n, values[11])
    _store(error_ptr, n, values[12])


@triton.jit
def _field(ptr, n, field, part, FIELDS: tl.constexpr, PARTS: tl.constexpr):
    """Where the partials of output n keep a field of a part (or of each part)."""
    return ptr + (n.to(tl.int64) * FIELDS + field) * PARTS + part


@triton.jit(do_not_specialize=("R",), do_not_specialize_on_alignment=ROW_POINTERS)
def _merge_kernel(
    values_ptr, ids_ptr,
    rows_ptr, temperature_ptr, sample_temperature_ptr, query_ptr, previous_logsumexp_ptr,
    token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr, confidence_ptr,
    margin_ptr, sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
    R, V, soft_cap,
    HAS_ROWS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, SECOND: tl.constexpr,
    ENTROPY: tl.constexpr, KL: tl.constexpr, SAMPLED: tl.constexpr, QUERY: tl.constexpr,
    PARTS: tl.constexpr, LOG2_SLOTS: tl.constexpr,
):  # fmt: skip
    """The outputs of a row from the partials of its parts, in a grid of (N,)."""
    # 1. The row, and what it is told.
    n = tl.program_id(0)
    row = n
    if HAS_ROWS:
        row = tl.load(rows_ptr + n)
        if row == -1:
            _store_row(
                n, (-1, 0.0, -1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1, 0.0, 0.0, 0),
                token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr,
                confidence_ptr, margin_ptr, sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
            )  # fmt: skip
            return
    error = (row < 0) | (row >= R)
    before_logsumexp = 0.0
    if KL:
        before_logsumexp = tl.load(previous_logsumexp_ptr + row, mask=error == 0, other=0.0)
    temperature, scale, bad = _scales(n, temperature_ptr, HAS_TEMPERATURE)
    error |= bad
    draws, _, bad = _sampling(n, sample_temperature_ptr, SAMPLED)
    error |= bad
    cap = 0.0
    if HAS_SOFT_CAP:
        cap = soft_cap

    # 2. The sums of the row.
    slot = tl.arange(0, 1 << LOG2_SLOTS)
    is_part = slot < PARTS
    zeros = tl.zeros((1 << LOG2_SLOTS,), tl.float32)
    pivots = tl.load(_field(values_ptr, n, _PIVOT, slot, _VALUES, PARTS), mask=is_part, other=_NO_PIVOT)
    totals = tl.load(_field(values_ptr, n, _TOTAL, slot, _VALUES, PARTS), mask=is_part, other=0.0)
    energies, divergences = zeros, zeros
    if ENTROPY:
        energies = tl.load(_field(values_ptr, n, _ENERGY, slot, _VALUES, PARTS), mask=is_part, other=0.0)
    if KL:
        divergences = tl.load(_field(values_ptr, n, _DIVERGENCE, slot, _VALUES, PARTS), mask=is_part, other=0.0)
    largest = tl.load(_field(values_ptr, n, _LARGEST, slot, _VALUES, PARTS), mask=is_part, other=float("-inf"))
    tops = tl.load(_field(values_ptr, n, _TOP, slot, _VALUES, PARTS), mask=is_part, other=float("-inf"))
    tokens = tl.load(_field(ids_ptr, n, _TOKEN, slot, _IDS, PARTS), mask=is_part, other=_NO_ID)

    row_pivot, row_total, row_energy, row_divergence = _merge_sums(
        pivots, totals, energies, divergences, LOG2_SLOTS, ENTROPY, KL
    )  # fmt: skip
    row_best = tl.max(largest, axis=0)
    error |= (row_total != row_total) | (row_best >= _LIMIT)

    # 3. The choices of the row: token, runner-up, draw, and the logit of the query.
    keys = _key(tops, tokens)
    token_key = tl.max(keys, axis=0)
    token, top = _number_of(token_key), _value_of(token_key)
    error |= (top > -_LIMIT) == 0

    second_token = token
    second = top
    if SECOND:
        seconds = tl.load(_field(values_ptr, n, _SECOND, slot, _VALUES, PARTS), mask=is_part, other=float("-inf"))
        second_tokens = tl.load(_field(ids_ptr, n, _SECOND_TOKEN, slot, _IDS, PARTS), mask=is_part, other=_NO_ID)
        keys = tl.where(keys == token_key, KEY_MIN, keys)
        second_key = tl.max(tl.maximum(keys, _key(seconds, second_tokens)), axis=0)
        second = _value_of(second_key)
        exists = second > -_LIMIT
        second_token = tl.where(exists, _number_of(second_key), -1)
        second = tl.where(exists, second, float("-inf"))

    sampled_token = token
    sampled = top
    if SAMPLED:
        if draws:
            drawn = tl.load(_field(values_ptr, n, _DRAWN, slot, _VALUES, PARTS), mask=is_part, other=float("-inf"))
            drawn_logits = tl.load(
                _field(values_ptr, n, _SAMPLED, slot, _VALUES, PARTS), mask=is_part, other=float("-inf")
            )
            drawn_tokens = tl.load(_field(ids_ptr, n, _SAMPLED_TOKEN, slot, _IDS, PARTS), mask=is_part, other=_NO_ID)
            sampled_token = _number_of(tl.max(_key(drawn, drawn_tokens), axis=0))
            # Ids of different parts differ, so the token is that of one part.
            sampled = tl.max(tl.where(drawn_tokens == sampled_token, drawn_logits, float("-inf")), axis=0)

    query_logit = top
    if QUERY:
        query = tl.load(query_ptr + n)
        error |= ((query >= 0) & (query < V)) == 0
        # Every part but the query's has left -inf.
        queried = tl.load(_field(values_ptr, n, _QUERY, slot, _VALUES, PARTS), mask=is_part, other=float("-inf"))
        query_logit = tl.max(queried, axis=0)

    # 4. The outputs.
    if error:
        _store_row(
            n, (0, 0.0, -1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, _ERROR),
            token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr,
            confidence_ptr, margin_ptr, sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
        )  # fmt: skip
    else:
        sums = (row_pivot, row_total, row_energy, row_divergence, row_best)
        choices = (token, top, second_token, second, sampled_token, sampled, query_logit)
        values = _finish(sums, choices, temperature, scale, before_logsumexp, cap, HAS_SOFT_CAP, KL)
        _store_row(
            n, values,
            token_ptr, logit_ptr, second_token_ptr, second_logit_ptr, logsumexp_ptr, entropy_ptr, kl_ptr,
            confidence_ptr, margin_ptr, sampled_token_ptr, sampled_confidence_ptr, query_confidence_ptr, error_ptr,
        )  # fmt: skip
