"""Policies that choose which masked positions a step writes: families A and B, and a learned head. Full visibility, no
cache.

EB-Sampler arXiv:2505.24857; KLASS arXiv:2511.05664; CCD / CCD-DS (coherent contextual decoding); LocalLeap; certainty
prior (d2Cache, arXiv:2509.23094); Learn2PD (a learned filter, and EoTP); Learning Unmasking Policies
(arXiv:2512.09106), greedy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from transcriptions.common import Cache, Model, Row, Settings, Stats, fp32, order, quota, select, units


@dataclasses.dataclass
class Block:
    """A block [start, end), the index-th of the row; `masks` when it was opened, and the steps `i` taken in it
    since."""

    index: int
    start: int
    end: int
    masks: int
    i: int = 0


def blocks_of(row: Row, block_length: int | None) -> Iterator[Block]:
    """The row's blocks from its first mask on, one after the other; those that hold no mask when their turn comes are
    skipped."""
    L = len(row.tokens)
    if not row.masked(0, L):
        return
    first = row.masked(0, L)[0]
    length = block_length or L - first
    for index, start in enumerate(range(first, L, length)):
        end = min(start + length, L)
        if row.masked(start, end):
            yield Block(index, start, end, len(row.masked(start, end)))


Predict = Callable[[int], Tensor]
Choose = Callable[[Row, Block, list[Stats]], list[Stats]]
# What to write at once instead of choosing, ending the row; None = go on.
Leave = Callable[[Row, Block, Predict], list[Stats] | None]


def block_by_block(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    block_length: int | None,
    choose: Choose,
    leave: Leave = lambda row, block, predict: None,
    cache: str = "none",
) -> Row:
    """One block after the other, every step one forward and then what `choose` says of the block's masks.

    cache: "none": a forward computes the canvas. "prefix", "dual": the first of a block does, and its keys are kept;
    later ones compute what follows the block's start, or only the block. Then, where the row before a position predicts
    it, the first of a block writes just its first mask.
    """
    row, L = Row(canvas, settings), len(canvas)
    for block in blocks_of(row, block_length):
        stored = Cache()
        while row.masked(block.start, block.end):
            window = range(L)
            if cache != "none" and block.i > 0:
                window = range(block.start, block.end if cache == "dual" else L)
            kept = [p for p in range(L) if p not in window]
            predict = model.predictor(model.look(row.tokens, window, cache=stored, cached=kept, store=True))
            row.pay(len(window))
            final = leave(row, block, predict)
            if final is not None:
                for s in final:
                    row.write(s)
                row.step += 1
                return row
            candidates = [row.stats(p, predict(p)) for p in row.masked(block.start, block.end)]
            chosen = choose(row, block, candidates)
            if cache != "none" and block.i == 0 and model.previous:
                chosen = candidates[:1]
            for s in chosen:
                row.write(s)
            row.step += 1
            block.i += 1
            if row.closed(block.start, block.end):
                return row
    return row


def decode_eb_sampler(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    entropy_bound: float = 0.1,
    score: str = "neg_entropy",
    min_unmask: int | None = 1,
    steps: int = 1,
    cache: str = "none",
) -> Row:
    """A3: best first, the largest prefix whose entropies, without the largest of them, sum to at most the bound."""

    def choose(row: Row, block: Block, candidates: list[Stats]) -> list[Stats]:
        ordered = order(candidates, lambda s: row.score(score, s))
        minimum = quota(block.masks, steps, block.i) if min_unmask is None else min_unmask
        fitting = 0
        for k in range(1, len(ordered) + 1):
            entropies = [units(s.entropy) for s in ordered[:k]]
            if sum(entropies) - max(entropies) <= units(entropy_bound):
                fitting = k
        return ordered[: max(fitting, min(minimum, len(ordered)))]

    return block_by_block(model, canvas, settings, block_length, choose, cache=cache)


def divergence(logits: Tensor, before: Tensor) -> float:
    """KL(p || p') of two rows of logits, in nats; ln p' is at least -27.6."""
    log_p, lse = logits.log_softmax(-1), before.logsumexp(-1)
    log_before = (before - lse).clamp(min=-27.6)
    return max(0.0, fp32((log_p.exp() * (log_p - log_before)).sum().item()))


def decode_klass(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    threshold: float = 0.6,
    kl_threshold: float = 0.015,
    kl_history: int = 2,
    steps: int = 32,
    cache: str = "none",
) -> Row:
    """B1: what is confident and has not moved for `kl_history` steps of the block; if nothing is, the quota's share."""
    before: dict[int, Tensor] = {}
    stable_for: dict[int, int] = {}

    def choose(row: Row, block: Block, candidates: list[Stats]) -> list[Stats]:
        for s in candidates:
            moved = divergence(s.logits, before[s.position]) if block.i > 0 else math.inf
            stable_for[s.position] = stable_for.get(s.position, 0) + 1 if moved < fp32(kl_threshold) else 0
            before[s.position] = s.logits
        ready = [s for s in candidates if stable_for[s.position] >= kl_history and s.confidence > fp32(threshold)]
        if ready:
            return ready
        return order(candidates, lambda s: s.confidence)[: quota(block.masks, steps, block.i)]

    return block_by_block(model, canvas, settings, block_length, choose, cache=cache)


def decode_ccd(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    steps: int = 32,
    dynamic: bool = False,
    cache: str = "none",
) -> Row:
    """B2 (dynamic: CCD-DS): the least uncertain positions; those preferred that were so a step ago with the same
    token."""
    listed: list[int] = []
    likeliest: dict[int, int] = {}

    def choose(row: Row, block: Block, candidates: list[Stats]) -> list[Stats]:
        i = block.i
        if i == 0:
            listed.clear()
            likeliest.clear()
        ordered = order(candidates, lambda s: -s.entropy)
        width = max(1, block.masks // steps)
        few_left = 10 * len(ordered) <= block.masks
        list_size = 1 if i < 4 else 2 if few_left else min(i - 2, 5 * width)

        best = ordered[:width]
        consistent = [s for s in ordered[:list_size] if s.position in listed and s.likeliest == likeliest[s.position]]
        if i >= steps - 1:
            chosen = ordered
        elif i < 5 or not any(s.position in listed for s in best) or len(consistent) < len(best):
            chosen = best
        else:
            chosen = consistent if dynamic else consistent[: len(best)]

        listed[:] = [s.position for s in ordered if s not in chosen][:list_size]
        likeliest.update({s.position: s.likeliest for s in candidates})
        return chosen

    return block_by_block(model, canvas, settings, block_length, choose, cache=cache)


def decode_local_leap(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    threshold: float = 0.9,
    relaxed_threshold: float = 0.75,
    distance: int = 4,
    cache: str = "none",
) -> Row:
    """A6: around a position that passes the threshold, a lower one will do."""

    def choose(row: Row, block: Block, candidates: list[Stats]) -> list[Stats]:
        anchors = [s.position for s in candidates if s.confidence >= fp32(threshold)]

        def passes(s: Stats) -> bool:
            near = any(abs(s.position - anchor) <= distance for anchor in anchors)
            return s.confidence >= fp32(relaxed_threshold if near else threshold)

        return select(order(candidates, lambda s: s.confidence), passes, 1)

    return block_by_block(model, canvas, settings, block_length, choose, cache=cache)


def decode_certainty_prior(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int | None = 32,
    rule: str = "quota",
    threshold: float = 0.9,
    inclusive: bool = False,
    steps: int = 32,
    sigma: float = 10.0,
    cache: str = "none",
) -> Row:
    """A8: confidence times the share of decoded positions around, by Gaussian weights cut at 30 positions.

    What lies left of the canvas counts as decoded, what lies right of it as much as its last position.
    """
    weights = {d: math.exp(-d * d / (2 * sigma * sigma)) for d in range(-30, 31)}

    def choose(row: Row, block: Block, candidates: list[Stats]) -> list[Stats]:
        L = len(row.tokens)

        def decoded(position: int) -> bool:
            return position < 0 or row.tokens[min(position, L - 1)] != settings.mask_id

        def score(s: Stats) -> float:
            around = sum(w for d, w in weights.items() if decoded(s.position + d)) / sum(weights.values())
            return fp32(s.confidence * fp32(around))

        ordered = order(candidates, score)
        if rule == "quota":
            return ordered[: quota(block.masks, steps, block.i)]
        tau = fp32(threshold)
        return select(ordered, lambda s: score(s) >= tau if inclusive else score(s) > tau, 1)

    return block_by_block(model, canvas, settings, block_length, choose, cache=cache)


def decode_learn2pd(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    head: Callable[[list[float]], list[float]],
    block_length: int | None = 32,
    accept_threshold: float = 0.96,
    steps: int = 32,
    eotp: bool = False,
) -> Row:
    """A head sees the block's confidences (0 where nothing is masked) and accepts positions; the quota's share is
    written too.

    eotp: the row ends after the first accepted position that predicts a stop id, else after the most confident one that
    does.
    """
    row = Row(canvas, settings)
    end_of_row = len(canvas)
    for block in blocks_of(row, block_length):
        length = block_length or block.end - block.start
        while row.masked(block.start, min(block.end, end_of_row)):
            predict = model.predictor(model.look(row.tokens[:end_of_row], range(end_of_row)))
            row.pay(end_of_row)
            candidates = [row.stats(p, predict(p)) for p in row.masked(block.start, min(block.end, end_of_row))]
            confidence = {s.position: s.confidence for s in candidates}
            verdict = head([confidence.get(p, 0.0) for p in range(block.start, block.start + length)])
            accepted = [s for s in candidates if fp32(verdict[s.position - block.start]) > fp32(accept_threshold)]
            best = order(candidates, lambda s: s.confidence)

            if eotp:
                final = [s for s in accepted if s.token in settings.stop_ids] or [
                    s for s in best if s.token in settings.stop_ids
                ]
                if final:
                    end_of_row = final[0].position + 1
            for s in accepted + best[: quota(block.masks, steps, block.i)]:
                if s.position < end_of_row:
                    row.write(s)
            row.step += 1
            block.i += 1
            if row.closed(block.start, min(block.end, end_of_row)):
                return row
    return row


def decode_learned_commit(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    head: Callable[[list[float], list[bool], float], list[float]],
    block_length: int | None = 32,
    accept_threshold: float = 0.5,
    cache: str = "none",
) -> Row:
    """A head sees the block's confidences (0 where nothing is masked), what is masked, and the share of the block's
    steps taken.

    What it gives more than the threshold is written; where it gives that to nothing, the position to which it gives
    most.
    """

    def choose(row: Row, block: Block, candidates: list[Stats]) -> list[Stats]:
        length = block_length or block.end - block.start
        confidence = {s.position: s.confidence for s in candidates}
        positions = range(block.start, block.start + length)
        taken = fp32(min(1.0, block.i / length))
        verdict = head([confidence.get(p, 0.0) for p in positions], [p in confidence for p in positions], taken)
        given = {p: fp32(v) for p, v in zip(positions, verdict)}
        return select(
            order(candidates, lambda s: given[s.position]), lambda s: given[s.position] > fp32(accept_threshold), 1
        )

    return block_by_block(model, canvas, settings, block_length, choose, cache=cache)
