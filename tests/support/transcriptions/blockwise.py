"""Decoders that finish one block before they open the next (LLaDA, Dream, Fast-dLLM, dInfer, SDAR, LLaDA2).

Over full visibility nothing is exact but recomputing the canvas; the approximate caches below hold the keys that their
papers hold. Over block-causal visibility a cache is exact, so everything is recomputed, and only the forwards are
counted as a cache would pay them.

    Nie et al. (LLaDA) arXiv:2502.09992; Ye et al. (Dream) arXiv:2508.15487; Wu et al. (Fast-dLLM) arXiv:2505.22618;
    Wang et al. (dLLM-RL, TraDo) arXiv:2509.06949; Ma et al. (dInfer) arXiv:2510.08666; Wang et al. (CreditDecoding)
    arXiv:2510.06133; Chen et al. (dParallel) arXiv:2509.26488; Cheng et al. (SDAR) arXiv:2510.06303; Bie et al.
    (LLaDA2.0) arXiv:2512.15745.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from transcriptions.common import Cache, Model, Row, Rule, Settings, Stats, fp32, make_rule, order, select

Rows = dict[int, Tensor]


def blocks_of(row: Row, block_length: int | None) -> Iterator[tuple[int, int]]:
    """[start, end) of the blocks of a full-visibility canvas: from its first mask on, cut at its end. None: one
    block."""
    L = len(row.tokens)
    masked = row.masked(0, L)
    if masked:
        length = block_length or L - masked[0]
        for start in range(masked[0], L, length):
            yield start, min(start + length, L)


def decode_uncached(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None,
    steps_per_block: int | None = None,
    score: str = "confidence",
    rank: str | None = None,
    cfg_scale: float = 0.0,
    suppress_eos: bool = False,
    **rule: Any,
) -> Row:
    """LLaDA, and Fast-dLLM and dParallel without a cache: every step recomputes the canvas and writes into the block.

    cfg_scale: a second forward sees masks in place of the given tokens; l = u + (cfg_scale + 1) (c - u), u of that one.
    suppress_eos: a predicted stop token ranks last, and passes no threshold.
    """
    row, L = Row(canvas, settings), len(canvas)

    def unless_suppressed(name: str) -> Callable[[Stats], float]:
        return lambda s: -math.inf if suppress_eos and s.token in settings.stop_ids else row.score(name, s)

    for start, end in blocks_of(row, block_length):
        scores = {"score": unless_suppressed(score), "rank": unless_suppressed(rank or score)}
        choose = make_rule(row, **scores, steps=steps_per_block or block_length or end - start, **rule)
        opened, i = len(row.masked(start, end)), 0
        while row.masked(start, end):
            rows = model.look(row.tokens, range(L))
            row.pay(L)
            if cfg_scale > 0:
                blind = [settings.mask_id if row.given[p] else row.tokens[p] for p in range(L)]
                unconditional = model.look(blind, range(L))
                row.query_tokens += L
                rows = {p: unconditional[p] + (cfg_scale + 1) * (rows[p] - unconditional[p]) for p in range(L)}
            logits_of = model.predictor(rows)
            step(row, choose, [row.stats(p, logits_of(p)) for p in row.masked(start, end)], opened, i)
            i += 1
            if row.closed(start, end):
                return row
    return row


def step(row: Row, choose: Rule, candidates: list[Stats], spread: int, i: int) -> None:
    """One denoise step: what the rule chooses among the candidates is written. spread: what a quota is of."""
    for s in choose(candidates, spread, i):
        row.write(s)
    row.step += 1


def decode_dream(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    steps_per_block: int | None = None,
    schedule_eps: float = 1e-3,
    score: str = "neg_entropy",
    order_temperature: float = 0.0,
    strict_reference: bool = False,
    bernoulli: bool = False,
) -> Row:
    """Dream: the whole canvas is one block, and a step writes the share of its masks that a linear schedule of noise
    levels asks for.

    order_temperature a > 0: ranked by score / a + a Gumbel draw of the position. strict_reference: a step may write
    nothing. bernoulli (Dream's "origin"): every masked position is written with the probability that the schedule
    gives, by its own draw.
    """
    row, L = Row(canvas, settings), len(canvas)
    for start, end in blocks_of(row, None):
        S = steps_per_block or end - start
        t = torch.linspace(1, schedule_eps, S + 1, dtype=torch.float32)
        i = 0
        while row.masked(start, end):
            logits_of = model.predictor(model.look(row.tokens, range(L)))
            row.pay(L)
            candidates = [row.stats(p, logits_of(p)) for p in row.masked(start, end)]
            last = i >= S - 1
            ratio = torch.tensor(1.0) if last else 1 - t[i + 1] / t[i]
            if bernoulli:
                chosen = [s for s in candidates if last or settings.uniform(s.position, row.step) < ratio.item()]
            else:
                k = len(candidates) if last else math.floor((torch.tensor(float(len(candidates))) * ratio).item())
                k = k if strict_reference else max(1, k)
                chosen = order(candidates, lambda s: perturbed(row, s, row.score(score, s), order_temperature))[:k]
            for s in chosen:
                row.write(s)
            row.step += 1
            i += 1
            if row.closed(start, end):
                return row
    return row


def decode_rnd1(
    model: Model, canvas: Sequence[int], settings: Settings, *, steps_per_block: int = 256, score: str = "neg_entropy"
) -> Row:
    """RND1: the whole canvas is one block, and iteration i of N leaves the floor(m i / N) least certain of its m masks,
    i = N - 1, ..., 0. An iteration that would write nothing repeats the forward before it, and is left out here.
    """
    row, L, N = Row(canvas, settings), len(canvas), steps_per_block
    opened = len(row.masked(0, L))
    for i in range(N - 1, -1, -1):
        masks, left = row.masked(0, L), opened * i // N
        if len(masks) <= left:
            continue
        logits_of = model.predictor(model.look(row.tokens, range(L)))
        row.pay(L)
        certain_first = order([row.stats(p, logits_of(p)) for p in masks], lambda s: row.score(score, s))
        for s in certain_first[: len(masks) - left]:
            row.write(s)
        row.step += 1
        if row.closed(0, L):
            return row
    return row


def perturbed(row: Row, s: Stats, score: float, order_temperature: float) -> float:
    """A score / a + Gumbel noise, in fp32; a = 0: the score."""
    if not order_temperature:
        return score
    u = torch.tensor(row.settings.uniform(s.position, row.step), dtype=torch.float32)
    a = torch.tensor(order_temperature, dtype=torch.float32)
    return (torch.tensor(score, dtype=torch.float32) / a + -torch.log(-torch.log(u))).item()


def decode_refreshed(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int,
    cache: str,
    steps_per_block: int | None = None,
    horizon: int | None = None,
    choose_with: Callable[[Row, int], Rule] | None = None,
    rule: str = "threshold",
    **options: Any,
) -> Row:
    """Fast-dLLM's prefix and dual caches, and dLLM-RL's horizon: a block starts by a forward of everything, whose keys
    then go stale.

    "prefix": the keys before the block are kept, the block and what follows is recomputed (as far as `horizon` past the
    block, beyond which nothing is visible). "dual": those after the block are kept too, and only the block is
    recomputed. Where a position is predicted by the row before it, the full forward writes the block's first mask,
    whatever its score, and only that: in the window no row predicts the block's first position.
    """
    row, L = Row(canvas, settings), len(canvas)
    for start, end in blocks_of(row, block_length):
        if choose_with is not None:
            choose = choose_with(row, end - start)
        else:
            choose = make_rule(row, rule, steps=steps_per_block or block_length, **options)
        opened, i, stored = len(row.masked(start, end)), 0, Cache()
        while row.masked(start, end):
            if i == 0:
                window, kept = range(L), range(0)
            elif cache == "prefix":
                window = range(start, L if horizon is None else min(end + horizon, L))
                kept = range(start)
            else:
                window = range(start, end)
                kept = [*range(start), *range(end, L)]
            rows = model.look(row.tokens, window, cache=stored, cached=kept, store=i == 0)
            row.pay(len(window))
            logits_of = model.predictor(rows)
            if i == 0 and model.previous:
                first = row.masked(start, end)[0]
                step(row, lambda candidates, *_: candidates, [row.stats(first, logits_of(first))], opened, i)
            else:
                step(row, choose, [row.stats(p, logits_of(p)) for p in row.masked(start, end)], opened, i)
            i += 1
            if row.closed(start, end):
                return row
    return row


def below_best(row: Row, score: str, threshold: float) -> Rule:
    """dInfer's threshold: at least min(threshold, best - 1e-5), so that ties of the best are written together."""

    def choose(candidates: list[Stats], opened: int, i: int) -> list[Stats]:
        best = max(row.score(score, s) for s in candidates)
        bound = min(fp32(threshold), fp32(best - fp32(1e-5)))
        return [s for s in candidates if row.score(score, s) >= bound]

    return choose


def best_of_runs(row: Row, score: str, threshold: float, run_threshold: float) -> Rule:
    """dInfer's hierarchy: all above the threshold, at least the best; and the best of each run of masks if above the
    lower one."""

    def choose(candidates: list[Stats], opened: int, i: int) -> list[Stats]:
        def value(s: Stats) -> float:
            return row.score(score, s)

        chosen = {s.position for s in select(order(candidates, value), lambda s: value(s) > fp32(threshold), 1)}
        runs: list[list[Stats]] = []
        for s in candidates:
            if runs and runs[-1][-1].position == s.position - 1:
                runs[-1].append(s)
            else:
                runs.append([s])
        leaders = [order(run, value)[0] for run in runs]
        chosen |= {s.position for s in leaders if value(s) > fp32(run_threshold)}
        return [s for s in candidates if s.position in chosen]

    return choose


def decode_dinfer(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int,
    threshold: float = 0.9,
    score: str = "confidence",
    run_threshold: float | None = None,
    cache: str = "dual",
) -> Row:
    """dInfer's parallel decoders over a dual cache: its threshold, or, with a `run_threshold`, its hierarchy."""

    def choose_with(row: Row, length: int) -> Rule:
        if run_threshold is None:
            return below_best(row, score, threshold)
        return best_of_runs(row, score, threshold, run_threshold)

    return decode_refreshed(model, canvas, settings, block_length=block_length, cache=cache, choose_with=choose_with)


def decode_vicinity(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int,
    vicinity: int = 16,
    warmup_steps: int = 4,
    refresh_interval: int | None = None,
    threshold: float = 0.9,
    score: str = "confidence",
) -> Row:
    """dInfer's vicinity refresh: of a dual cache, `vicinity` positions on either side of the block are recomputed with
    it.

    The row's first `warmup_steps` forwards are full and fill no cache. After them a forward is full that finds no
    cache, that is the first of its block, or a `refresh_interval`-th of it.
    """
    row, L, stored = Row(canvas, settings), len(canvas), Cache()
    for start, end in blocks_of(row, block_length):
        choose = below_best(row, score, threshold)
        i = 0
        while row.masked(start, end):
            warm = row.step >= warmup_steps
            full = not stored.keys or i == 0 or (refresh_interval is not None and i % refresh_interval == 0)
            window = range(L) if full else range(max(0, start - vicinity), min(L, end + vicinity))
            rows = model.look(
                row.tokens, window, cache=stored, cached=[p for p in range(L) if p not in window], store=warm
            )
            row.pay(len(window))
            logits_of = model.predictor(rows)
            positions = row.masked(start, end)[:1] if i == 0 and model.previous else row.masked(start, end)
            step(row, choose, [row.stats(p, logits_of(p)) for p in positions], 0, i)
            i += 1
            if row.closed(start, end):
                return row
    return row


def decode_credit(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int,
    credit_decay: float = 0.8,
    credit_power: float = 0.2,
    credit_weight: float = 0.7,
    score: str = "confidence",
    rule: str = "threshold",
    inclusive: bool = True,
    **options: Any,
) -> Row:
    """CreditDecoding over a dual cache: what a position predicted in earlier steps of its block raises that token's
    logit.

    In every step all credit decays, then the likeliest token of each masked position earns p ** credit_power, p without
    temperature; the step decides by l + credit_weight * ln(1 + credit). Credit is kept in fp32.
    """
    row, L = Row(canvas, settings), len(canvas)
    for start, end in blocks_of(row, block_length):
        choose = make_rule(row, rule, score=score, inclusive=inclusive, **options)
        opened, i, stored = len(row.masked(start, end)), 0, Cache()
        credit: dict[int, Tensor] = {}
        while row.masked(start, end):
            window = range(L) if i == 0 else range(start, end)
            kept = [] if i == 0 else [*range(start), *range(end, L)]
            logits_of = model.predictor(model.look(row.tokens, window, cache=stored, cached=kept, store=i == 0))
            row.pay(len(window))
            for v in credit.values():
                v *= credit_decay
            candidates = []
            for p in row.masked(start, end):
                logits = logits_of(p)
                raw = row.stats(p, logits)
                v = credit.setdefault(p, torch.zeros(len(logits), dtype=torch.float32))
                v[raw.likeliest] += torch.tensor(raw.p[raw.likeliest].item(), dtype=torch.float32) ** credit_power
                candidates.append(row.stats(p, logits + (credit_weight * torch.log1p(v)).double()))
            if i == 0 and model.previous:
                step(row, lambda those, *_: those[:1], candidates, opened, i)
            else:
                step(row, choose, candidates, opened, i)
            i += 1
            if row.closed(start, end):
                return row
    return row


def layout(row: Row, block_length: int, alignment: str) -> tuple[int, Callable[[int], int]]:
    """Where the first block of a block-causal canvas begins, and the number of the block that a position is in.

    "abs": blocks are multiples of the length. "rel": they begin at the first mask, and what precedes it is block 0.
    "both": they begin there in both directions, so that what precedes it is blocks too, the first of them a short one.
    """
    first = row.masked(0, len(row.tokens))[0]
    if alignment == "abs":
        return first // block_length * block_length, lambda p: p // block_length
    if alignment == "both":
        return first, lambda p: (p - first) // block_length
    return first, lambda p: 0 if p < first else 1 + (p - first) // block_length


def decode_block_causal(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int,
    alignment: str,
    cached: bool = True,
    causal_prefix: bool = False,
    quota_of: str = "block",
    steps_per_block: int | None = None,
    rule: str,
    **options: Any,
) -> Row:
    """SDAR, TraDo, LLaDA2, Efficient-DLM, Stable-DiffCoder, BD3-LM: a block sees itself and what precedes it,
    everything recomputed at every step.

    What precedes the block was committed by forwards of their own, in which positions saw their block and all earlier
    ones, or, with `causal_prefix`, only earlier positions. `cached` counts those: one of everything before the first
    block, one per later block but the last; else every step counts as a forward of [0, block end).
    A quota is that of a block of the full length, whatever of it is given (quota_of "masks", BD3-LM: of its masks), and
    never more than the masks that are left.
    """
    row, L = Row(canvas, settings), len(canvas)
    if not row.masked(0, L):
        return row
    start, block = layout(row, block_length, alignment)
    if cached and start:
        row.pay(start)
    while True:
        end = min(start + block_length, L)

        def sees(q: int, k: int, start: int = start) -> bool:
            return k <= q if causal_prefix and q < start else block(k) <= block(q)

        choose = make_rule(row, rule, steps=steps_per_block or block_length, **options)
        spread, i = block_length if quota_of == "block" else len(row.masked(start, end)), 0
        while row.masked(start, end):
            logits_of = model.predictor(model.look(row.tokens, range(end), sees=sees))
            row.pay(end - start if cached else end)
            step(row, choose, [row.stats(p, logits_of(p)) for p in row.masked(start, end)], spread, i)
            i += 1
            if row.closed(start, end):
                return row
        if not row.masked(end, L):
            return row
        if cached:
            row.pay(end - start)
        start = end
