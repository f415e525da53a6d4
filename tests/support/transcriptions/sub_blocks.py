"""Decoders made from an autoregressive model: a commit predicts the next block's first token.

Sources: Wu et al. (Fast-dLLM v2) arXiv:2509.26328; Tian et al. (NBDiff) arXiv:2512.06776; Nemotron-Labs-Diffusion
(NVIDIA 2026).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from transcriptions.blockwise import layout, step
from transcriptions.common import Cache, Model, Row, Settings, make_rule


def decode_seeded(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int,
    alignment: str,
    causal_prefix: bool = False,
    draws_first_token: bool = False,
    sub_block_length: int | None = None,
    sub_block_cache: bool = False,
    steps_per_block: int | None = None,
    rule: str = "threshold",
    **options: object,
) -> Row:
    """Fast-dLLM v2 (sub-blocks), NBDiff and Nemotron (causal prompt and commits).

    Fast-dLLM v2 and NBDiff predict a position by the row before it, Nemotron by its own.
    A prefill or commit's last row says what the next block begins with: greedily, or by a draw (Nemotron). Only masks
    of the leftmost sub-block that has any are eligible. Without a sub-block cache the decoder is exact, and everything
    is recomputed here.

    sub_block_cache: while the leftmost sub-block with masks begins with a token, and the block was computed once, only
    the sub-block is computed, against the block's last keys; its own new ones replace them.
    """
    row, L, stored = Row(canvas, settings), len(canvas), Cache()
    if not row.masked(0, L):
        return row
    start, block = layout(row, block_length, alignment)
    length = sub_block_length or block_length
    if start:
        row.pay(start)
    while True:
        end = min(start + block_length, L)

        def sees(q: int, k: int, start: int = start) -> bool:
            return k <= q if causal_prefix and q < start else block(k) <= block(q)

        if start and row.masked(start, start + 1):
            logits = model.look(row.tokens, range(start), sees=sees)[start - 1]
            write_first_token(row, start, logits, drawn=draws_first_token)
            if row.closed(start, end):
                return row
        choose = make_rule(row, rule, steps=steps_per_block or block_length, **options)
        opened, i = len(row.masked(start, end)), 0
        while row.masked(start, end):
            a = next(a for a in range(start, end, length) if row.masked(a, min(a + length, end)))
            b = min(a + length, end)
            if sub_block_cache and i > 0 and not row.masked(a, a + 1):
                outside = [p for p in range(end) if not a <= p < b]
                rows = model.look(row.tokens, range(a, b), cache=stored, cached=outside, store=True)
                row.pay(b - a)
            else:
                rows = model.look(row.tokens, range(end), sees=sees, cache=stored, store=True)
                row.pay(end - start)
            logits_of = model.predictor(rows)
            step(row, choose, [row.stats(p, logits_of(p)) for p in row.masked(a, b)], opened, i)
            i += 1
            if row.closed(start, end):
                return row
        if not row.masked(end, L):
            return row
        row.pay(end - start)
        start = end


def write_first_token(row: Row, position: int, logits: Tensor, *, drawn: bool) -> None:
    """Writes a block's first position: by a draw, or the likeliest token whatever the temperature and the filters. This
    is no denoise step."""
    settings = row.settings
    if not drawn:
        row.settings = dataclasses.replace(settings, temperature=0.0, top_k=0, top_p=1.0)
    row.write(row.stats(position, logits))
    row.settings = settings
