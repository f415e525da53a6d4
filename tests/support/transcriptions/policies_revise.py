"""Policies that mask written tokens again: family D. Full visibility, no cache; only the current block is revised.

RCR (running confidence remasking, in MDPO) arXiv:2508.13148; Saber arXiv:2510.18165; WINO arXiv:2507.18578.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from transcriptions.common import Model, Row, Settings, fp32, order
from transcriptions.policies_select import blocks_of


def decode_rcr(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    steps: int = 32,
    score: str = "confidence",
) -> Row:
    """D1: every step writes all masks of the block, then masks again fewer and fewer of those written with the least
    score."""
    row, everything = Row(canvas, settings), range(len(canvas))
    for block in blocks_of(row, block_length):
        written_with: dict[int, float] = {}
        while row.masked(block.start, block.end):
            predict = model.predictor(model.look(row.tokens, everything))
            row.pay(len(everything))
            for s in [row.stats(p, predict(p)) for p in row.masked(block.start, block.end)]:
                row.write(s)
                written_with[s.position] = row.score(score, s)
            stay = -(-block.masks * (block.i + 1) // steps)  # ceil
            if block.i < steps - 1:
                for p in sorted(written_with, key=lambda p: (written_with[p], p))[: block.masks - stay]:
                    row.remask(p)
                    del written_with[p]
            row.step += 1
            block.i += 1
            if row.closed(block.start, block.end):
                return row
    return row


def decode_saber(
    model: Model, canvas: Sequence[int], settings: Settings, *, block_length: int | None = 32, min_unmask: int = 2
) -> Row:
    """D3: a threshold that is the mean score of everything written so far; then some whose score grew least are masked
    again."""
    row, everything = Row(canvas, settings), range(len(canvas))
    final: dict[int, float] = {}
    for block in blocks_of(row, block_length):
        last = dict.fromkeys(range(block.start, block.end), 0.0)
        while row.masked(block.start, block.end):
            predict = model.predictor(model.look(row.tokens, everything))
            row.pay(len(everything))
            stats = {p: row.stats(p, predict(p)) for p in range(block.start, block.end) if not row.given[p]}
            growth = {p: fp32(s.confidence - last[p]) for p, s in stats.items()}
            last = {p: s.confidence for p, s in stats.items()}

            threshold = fp32(sum(final.values()) / len(final)) if final else 1.0
            ordered = order([stats[p] for p in row.masked(block.start, block.end)], lambda s: s.confidence)
            chosen = [s for s in ordered if s.confidence > threshold]
            if len(chosen) < min_unmask:
                chosen = ordered[:min_unmask]
            for s in chosen:
                row.write(s)
                final[s.position] = s.confidence
            if row.masked(block.start, block.end):
                k = max(min_unmask, len(chosen))
                again = min(max(min_unmask // 2, math.ceil(k / 8)), k - 1)
                for p in sorted(row.written(block.start, block.end), key=lambda p: (growth[p], p))[:again]:
                    row.remask(p)
            row.step += 1
            if row.closed(block.start, block.end):
                return row
    return row


def decode_wino(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 128,
    threshold: float = 0.6,
    verify_threshold: float = 0.9,
) -> Row:
    """D2: masks in the shadow of the block say how likely each written token is without itself; unlikely ones are
    masked."""
    row, L = Row(canvas, settings), len(canvas)
    for block in blocks_of(row, block_length):
        shadow = list(range(block.start, block.end))
        last_accept = 30
        while row.masked(block.start, block.end):
            real, verify = shadowed(model, row, shadow)
            row.pay(L + len(shadow))
            masked = row.masked(block.start, block.end)
            ordered = order([row.stats(p, real[p]) for p in masked], lambda s: s.confidence)
            chosen = [s for s in ordered if s.confidence > fp32(threshold)]
            chosen = chosen[: min(max(7 * len(masked) // 10, 5), 20)] or ordered[:1]
            written_before = row.written(block.start, block.end)
            if len(chosen) > 1:
                back = {p: fp32(verify[p].softmax(-1)[row.tokens[p]].item()) for p in written_before}
                bad = sorted(
                    (p for p in written_before if back[p] < fp32(verify_threshold)), key=lambda p: (back[p], p)
                )
                if len(bad) >= last_accept:
                    bad = bad[: last_accept - 1]
                for p in bad:
                    row.remask(p)
            for s in chosen:
                row.write(s)
            last_accept = len(chosen)
            row.step += 1
            if row.closed(block.start, block.end):
                return row
    return row


def shadowed(model: Model, row: Row, shadow: list[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Logits of all positions, and of masks in the shadow of some: they see all but their twin, and each other,
    unseen."""
    L, n = len(row.tokens), len(shadow)
    visible = torch.zeros(L + n, L + n, dtype=torch.bool)
    visible[:, :L] = True
    visible[: model.isolated, model.isolated :] = False
    visible[L:, L:] = True
    for i, p in enumerate(shadow):
        visible[L + i, p] = False
    tokens = row.tokens + [row.settings.mask_id] * n
    logits, _ = model.forward(tokens, [*range(L), *shadow], visible)
    return dict(enumerate(logits[:L])), dict(zip(shadow, logits[L:]))
