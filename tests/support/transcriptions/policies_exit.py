"""Policies that end a row early, by writing every mask that is left: family C. Full visibility, no cache.

Prophet arXiv:2508.19982; SchED (a schedule of thresholds on the logit gap).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from transcriptions.common import Model, Row, Settings, Stats, fp32, order, quota
from transcriptions.policies_select import Block, Choose, Predict, block_by_block


def quota_by_confidence(steps: int) -> Choose:
    def choose(row: Row, block: Block, candidates: list[Stats]) -> list[Stats]:
        return order(candidates, lambda s: s.confidence)[: quota(block.masks, steps, block.i)]

    return choose


def scheduled_steps(canvas: Sequence[int], mask_id: int, block_length: int | None, steps: int) -> int:
    """The steps of all blocks together: T."""
    if mask_id not in canvas:
        return 0
    room = len(canvas) - list(canvas).index(mask_id)
    return math.ceil(room / (block_length or room)) * steps


def decode_prophet(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    steps: int = 32,
    answer_start: int | None = None,
    gap_thresholds: tuple[float, float, float] = (7.5, 5.0, 2.5),
) -> Row:
    """C1: once the gap of the answer's logits is wide enough for this part of the schedule, everything is written.

    answer_start: the answer is the five positions from this offset behind the first mask, if in the canvas; None =
    every mask.
    """
    total, L = scheduled_steps(canvas, settings.mask_id, block_length, steps), len(canvas)
    first = list(canvas).index(settings.mask_id) if settings.mask_id in canvas else L

    def leave(row: Row, block: Block, predict: Predict) -> list[Stats] | None:
        begin = L if answer_start is None else first + answer_start
        answer = row.masked(0, L) if answer_start is None else range(begin, min(begin + 5, L))
        if not answer:
            return None
        gap = sum(row.stats(p, predict(p)).gap for p in answer) / len(answer)
        done = (block.index * steps + block.i + 1) / total
        at_start, in_middle, at_end = gap_thresholds
        if fp32(gap) < fp32(at_start if done < 0.33 else in_middle if done < 0.67 else at_end):
            return None
        return [row.stats(p, predict(p)) for p in row.masked(0, L)]

    return block_by_block(model, canvas, settings, block_length, quota_by_confidence(steps), leave)


def curve_value(curve: str, high: float, low: float, rate: float, u: float) -> float:
    """From `high` at u = 0 to `low` (or towards it) at u = 1."""
    return {
        "linear": high + (low - high) * u,
        "cosine": low + (high - low) * (1 + math.cos(math.pi * u)) / 2,
        "exponential": low + (high - low) * math.exp(-rate * u),
    }[curve]


def reduced(values: list[float], reduce: str) -> float:
    """The mean, the lower median, the 20% quantile (interpolated linearly) or the least."""
    values = sorted(values)
    n = len(values)
    if reduce == "mean":
        return sum(values) / n
    if reduce == "median":
        return values[(n - 1) // 2]
    if reduce == "quantile":
        place = 0.2 * (n - 1)
        low = math.floor(place)
        return values[low] + (place - low) * (values[min(low + 1, n - 1)] - values[low])
    return values[0]


def decode_sched(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    steps: int = 32,
    curve: str = "cosine",
    high: float = 7.5,
    low: float = 2.5,
    rate: float = 4.0,
    reduce: str = "mean",
    min_progress: float = 0.0,
    patience: int = 0,
    max_change: float = 0.0,
) -> Row:
    """C2: the gap of the masked positions' logits against a threshold that falls along the schedule.

    Besides, for more than `patience` steps in a row at most `max_change` of the masked positions changed their
    likeliest token. An exit writes the likeliest tokens.
    """
    total, L = scheduled_steps(canvas, settings.mask_id, block_length, steps), len(canvas)
    before: dict[int, int] = {}
    calm_steps = 0

    def leave(row: Row, block: Block, predict: Predict) -> list[Stats] | None:
        nonlocal calm_steps
        stats = [row.stats(p, predict(p)) for p in row.masked(0, L)]
        changed = sum(before.get(s.position) != s.likeliest for s in stats) / len(stats)
        before.update({s.position: s.likeliest for s in stats})
        far_enough = 1 - len(stats) / L >= min_progress
        calm_steps = calm_steps + 1 if far_enough and changed <= max_change else 0

        u = (block.index * steps + block.i) / (total - 1) if total > 1 else 1.0
        tau = curve_value(curve, high, low, rate, u) if total > 1 else low
        gap = reduced([s.gap for s in stats], reduce)
        if not (far_enough and fp32(gap) >= fp32(tau) and calm_steps > patience):
            return None
        return [dataclasses.replace(s, token=s.likeliest, confidence=fp32(s.p[s.likeliest].item())) for s in stats]

    return block_by_block(model, canvas, settings, block_length, quota_by_confidence(steps), leave)
