"""Which lanes of one row a step of `unmask` chooses: `reference.select` in Python's numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..reference.select import FIXED_BUDGET_MAX, FIXED_ENTROPY_MAX
from ..rules import ENTROPY_SCALE, UnmaskRule

# `UnmaskInputs` of one row, by name: a number, or a list with a number for every lane. An input that is None is absent.
Inputs = Mapping[str, Any]


def chosen_lanes(rule: UnmaskRule, given: Inputs, eligible: list[int], masks: list[int], least: int) -> list[int]:
    """The lanes that the rule's test, its least number and its additions choose; a lane may be named twice.

    Args:
        eligible: lanes that may be chosen, in ascending order.
        masks: masked lanes of the region, which tell how far a pipeline's blocks are.
        least: positions to choose at least, if so many are eligible.
    """
    score = _no_nan(given["score"])
    rank = _no_nan(given["rank"]) if "rank" in given else score
    # A reversed sort leaves ties in their order too.
    best_first = sorted(eligible, key=rank.__getitem__, reverse=True)
    least = 0 if rule.scope == "each" else least

    chosen = _passing(rule, given, score, best_first)
    if len(chosen) < min(least, len(eligible)):
        chosen = best_first[: max(given.get("fallback", least), 0)]
    if "max_unmask" in given:
        chosen = chosen[: max(given["max_unmask"], 0)]
    if rule.runs:
        # In a run of adjacent lanes, a lane and its place among the eligible ones differ by one number.
        run = {j: j - i for i, j in enumerate(eligible)}
        best = {run[j]: j for j in reversed(best_first)}
        chosen = chosen + [j for j in best.values() if score[j] > given["run_value"]]
    if rule.pipeline:
        # A block is fully activated if the block before holds few masks; nothing precedes the region's first block.
        length = max(given["block_length"], 1)
        best = {j // length: j for j in reversed(best_first)}
        served, masked = {j // length for j in chosen}, [j // length for j in masks]
        for block in best.keys() - served:
            if rule.scope == "first":
                is_forced = block == eligible[0] // length
            else:
                is_forced = block == 0 or masked.count(block - 1) <= given["activate_masks"]
            if is_forced:
                chosen = [*chosen, best[block]]
    return chosen


def _passing(rule: UnmaskRule, given: Inputs, score: list[float], best_first: list[int]) -> list[int]:
    """Lanes that pass the rule's test, best first."""
    value = given["value"]
    if rule.passes == "none" or not best_first:
        return []
    if rule.passes == "threshold":
        limit = value if isinstance(value, list) else [value] * len(score)
        if rule.inclusive:
            return [j for j in best_first if score[j] >= limit[j]]
        return [j for j in best_first if score[j] > limit[j]]
    # What passes is a prefix, which stops at the first failure.
    passes = _by_factor if rule.passes == "factor" else _within_budget
    for place, fits in enumerate(passes(rule, given, score, best_first)):
        if not fits:
            return best_first[:place]
    return best_first


def _by_factor(rule: UnmaskRule, given: Inputs, score: list[float], best_first: list[int]) -> Iterator[bool]:
    """Whether each score reaches the factor's limit at its place, in fp32."""
    one, factor = np.float32(1), np.float32(given["value"])
    for place, j in enumerate(best_first):
        yield score[j] >= one - factor / np.float32(place + 2)


def _within_budget(rule: UnmaskRule, given: Inputs, score: list[float], best_first: list[int]) -> Iterator[bool]:
    """Whether the entropies up to each lane stay within the budget of the row."""
    budget = _to_fixed(given["value"], -FIXED_BUDGET_MAX, FIXED_BUDGET_MAX, nan=-FIXED_BUDGET_MAX)
    total = largest = 0
    for j in best_first:
        used = _to_fixed(given["entropy"][j], 0, FIXED_ENTROPY_MAX, nan=FIXED_ENTROPY_MAX)
        total, largest = total + used, max(largest, used)
        yield total < budget if rule.inclusive else total - largest <= budget


def _to_fixed(x: float, low: int, high: int, nan: int) -> int:
    """floor(x * ENTROPY_SCALE), at least `low` and at most `high`; NaN gives `nan`."""
    return nan if math.isnan(x) else math.floor(min(max(x * ENTROPY_SCALE, low), high))


def _no_nan(numbers: list[float]) -> list[float]:
    return [x if x == x else -math.inf for x in numbers]
