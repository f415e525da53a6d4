"""Policies of what a step recomputes and what it sees: family H. Full visibility.

Streaming-dLLM; DPad arXiv:2508.14148; FreeCache arXiv:2505.21467; dKV-Cache arXiv:2505.15781; EntropyCache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from transcriptions.common import Cache, Model, Row, Settings, Stats, fp32, make_rule, order, quota, select
from transcriptions.policies_select import blocks_of


def decode_streaming(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    threshold: float = 0.9,
    alpha: float = 0.3,
    horizon: int = 96,
    min_unmask: int = 1,
) -> Row:
    """H6 and A5: only `horizon` positions after the block, and the last one of the canvas, are computed and seen.

    A block begins by a forward from the start, whose keys before the block then stay. The threshold falls as the block
    fills up. Where the row before a position predicts it, the block's first forward writes just its first mask,
    whatever its confidence.
    """
    row, L = Row(canvas, settings), len(canvas)
    for block in blocks_of(row, block_length):
        cache = Cache()
        while row.masked(block.start, block.end):
            begin = 0 if block.i == 0 else block.start
            window = list(range(begin, min(block.end + horizon, L)))
            window += [L - 1] if window[-1] != L - 1 else []
            rows = model.look(row.tokens, window, cache=cache, cached=range(begin), store=True)
            row.pay(len(window))
            predict, masked = model.predictor(rows), row.masked(block.start, block.end)
            candidates = [row.stats(p, predict(p)) for p in masked]
            if model.previous and block.i == 0:
                chosen = candidates[:1]
            else:
                r = fp32(len(masked) / (block.end - block.start))
                tau = fp32(fp32(threshold) * fp32(1 - fp32(fp32(alpha) * fp32(1 - r))))
                chosen = select(order(candidates, lambda s: s.confidence), lambda s: s.confidence >= tau, min_unmask)
            for s in chosen:
                row.write(s)
            row.step += 1
            block.i += 1
            if row.closed(block.start, block.end):
                return row
    return row


def decode_dpad(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    threshold: float = 0.9,
    inclusive: bool = True,
    horizon: int = 256,
) -> Row:
    """H6: of the `horizon` positions after a block, each is kept for its decode with a probability that falls with
    distance."""
    row, L = Row(canvas, settings), len(canvas)
    for block in blocks_of(row, block_length):
        window = list(range(block.end))
        for p in range(block.end, min(block.end + horizon, L)):
            z = 4 * (p - block.end) / (horizon - 1)
            density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
            if settings.uniform(p, block.start) < fp32(min(1.0, 1.6 * density)):
                window.append(p)
        while row.masked(block.start, block.end):
            predict = model.predictor(model.look(row.tokens, window))
            row.pay(len(window))
            candidates = [row.stats(p, predict(p)) for p in row.masked(block.start, block.end)]
            for s in make_rule(row, "threshold", threshold=threshold, inclusive=inclusive)(
                candidates, block.masks, block.i
            ):
                row.write(s)
            row.step += 1
            block.i += 1
            if row.closed(block.start, block.end):
                return row
    return row


def decode_freecache(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    threshold: float = 0.9,
    inclusive: bool = True,
) -> Row:
    """H2: one forward of everything; from then on only what follows the start of the block, over keys that are never
    refreshed.

    Where the row before a position predicts it, the window begins one position earlier.
    """
    row, L, cache = Row(canvas, settings), len(canvas), Cache()
    for block in blocks_of(row, block_length):
        while row.masked(block.start, block.end):
            begin = 0 if row.step == 0 else max(0, block.start - 1) if model.previous else block.start
            rows = model.look(row.tokens, range(begin, L), cache=cache, cached=range(begin), store=True)
            row.pay(L - begin)
            predict = model.predictor(rows)
            candidates = [row.stats(p, predict(p)) for p in row.masked(block.start, block.end)]
            for s in make_rule(row, "threshold", threshold=threshold, inclusive=inclusive)(
                candidates, block.masks, block.i
            ):
                row.write(s)
            row.step += 1
            block.i += 1
            if row.closed(block.start, block.end):
                return row
    return row


# (block step, statistics written by the step before) -> whether this step computes everything
Refresh = Callable[[int, list[Stats]], bool]


def decode_settled(
    model: Model, canvas: Sequence[int], settings: Settings, block_length: int | None, steps: int, refreshes: Refresh
) -> Row:
    """LLaDA's quota, recomputing what was not yet decoded two steps ago; the keys of the rest are as they were stored
    last.

    Where the row before a position predicts it, keys are settled once their own token and the next one are.
    """
    row, L, cache = Row(canvas, settings), len(canvas), Cache()
    just_written: list[Stats] = []
    for block in blocks_of(row, block_length):
        while row.masked(block.start, block.end):

            def settled(p: int) -> bool:
                """Whether p held its token by the end of the step before the last."""
                decoded = row.given[p] or 0 <= row.unmask_step[p] <= row.step - 2
                return decoded and (
                    not model.previous or p == L - 1 or row.given[p + 1] or 0 <= row.unmask_step[p + 1] <= row.step - 2
                )

            old = [] if refreshes(block.i, just_written) else [p for p in range(L) if settled(p)]
            window = [p for p in range(L) if p not in old]
            rows = model.look(row.tokens, window, cache=cache, cached=old, store=True)
            row.pay(len(window))
            predict = model.predictor(rows)
            candidates = [row.stats(p, predict(p)) for p in row.masked(block.start, block.end)]
            just_written = order(candidates, lambda s: s.confidence)[: quota(block.masks, steps, block.i)]
            for s in just_written:
                row.write(s)
            row.step += 1
            block.i += 1
            if row.closed(block.start, block.end):
                return row
    return row


def decode_dkv_cache(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    steps: int = 32,
    refresh_interval: int = 8,
) -> Row:
    """H3: everything at the first two steps of a block, and every `refresh_interval` steps."""

    def refreshes(i: int, just_written: list[Stats]) -> bool:
        return i < 2 or i % refresh_interval == 0

    return decode_settled(model, canvas, settings, block_length, steps, refreshes)


def decode_entropy_cache(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    steps: int = 32,
    refresh_entropy: float = 1.0,
) -> Row:
    """H5: everything at the first step of a block, and after a step that wrote a token of large entropy."""

    def refreshes(i: int, just_written: list[Stats]) -> bool:
        return i == 0 or max(s.entropy for s in just_written) > fp32(refresh_entropy)

    return decode_settled(model, canvas, settings, block_length, steps, refreshes)
