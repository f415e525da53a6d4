"""Decoders with several blocks in flight (D2F, dLLM-Var, d3LLM).

The region holds the blocks that were opened and have not left. A block is opened when the last one is written far
enough; one whose predecessor is written far enough is fully activated, and then writes its best position when none
passes.

    Wang et al. (D2F) arXiv:2508.09192; Yang et al. (dLLM-Var) arXiv:2510.24605; Qian et al. (d3LLM) arXiv:2601.07568.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from transcriptions.blockwise import layout
from transcriptions.common import Cache, Model, Row, Settings, Stats, fp32, order, select


class Region:
    """The opened blocks, from `start` (committed up to there) to `end`; the number of masks of each says how far it
    is."""

    def __init__(self, row: Row, start: int, block_length: int) -> None:
        self.row, self.start, self.length = row, start, block_length
        self.end = min(start + block_length, len(row.tokens))

    def blocks(self) -> list[tuple[int, int]]:
        return [(s, min(s + self.length, self.end)) for s in range(self.start, self.end, self.length)]

    def progress(self, block: tuple[int, int]) -> float:
        return (self.length - len(self.row.masked(*block))) / self.length

    def finished(self) -> list[tuple[int, int]]:
        """The leading blocks that hold no mask."""
        leading = []
        for block in self.blocks():
            if self.row.masked(*block):
                break
            leading.append(block)
        return leading

    def activated(self, activate_threshold: float) -> dict[tuple[int, int], bool]:
        """Whether each block may force a token: the first one, and those whose predecessor is written far enough."""
        blocks = self.blocks()
        return {b: i == 0 or self.progress(blocks[i - 1]) >= activate_threshold for i, b in enumerate(blocks)}

    def append(self, append_threshold: float) -> None:
        """Opens one more block if the last one is written far enough."""
        blocks = self.blocks()
        if self.end < len(self.row.tokens) and (not blocks or self.progress(blocks[-1]) >= append_threshold):
            self.end = min(self.end + self.length, len(self.row.tokens))


def passes(score: float, threshold: float, inclusive: bool) -> bool:
    return score >= fp32(threshold) if inclusive else score > fp32(threshold)


def choose(
    row: Row,
    region: Region,
    logits_of: Callable[[int], Tensor],
    *,
    threshold: float,
    inclusive: bool,
    score: str,
    rank: str | None,
    scope: str,
    min_unmask: int,
    activate_threshold: float,
) -> list[Stats]:
    """The positions that a step writes: those that pass, and forced ones, which are the best by `rank`.

    scope "each": one of every fully activated block in which none passes. "first": of the opened blocks together, up to
    `min_unmask` if fewer pass; and one of the first block with masks if nothing of it is written.
    """
    chosen: list[Stats] = []
    stats = {b: [row.stats(p, logits_of(p)) for p in row.masked(*b)] for b in region.blocks()}

    def ranked(candidates: list[Stats]) -> list[Stats]:
        return order(candidates, lambda s: row.score(rank or score, s))

    def passing(s: Stats) -> bool:
        return passes(row.score(score, s), threshold, inclusive)

    if scope == "each":
        for b, active in region.activated(activate_threshold).items():
            chosen += select(ranked(stats[b]), passing, 1 if active else 0)
        return chosen
    chosen = select(ranked([s for those in stats.values() for s in those]), passing, min_unmask)
    first = next((those for those in stats.values() if those), [])
    if first and not any(s in chosen for s in first):
        chosen = chosen + ranked(first)[:1]
    return chosen


def ended(row: Row, region: Region) -> bool:
    """Whether a written stop token ends the row: nothing before it is masked ("after_block": up to the end of its
    block)."""
    stops = row.written_stops(region.start, region.end)
    if not stops or row.settings.stop not in ("closed", "after_block"):
        return False
    if row.settings.stop == "closed":
        return not row.masked(region.start, stops[0])
    return not row.masked(region.start, next(end for _, end in region.blocks() if stops[0] < end))


def barred(row: Row) -> bool:
    """Whether a written stop token keeps further blocks from being opened."""
    return row.settings.stop != "never" and bool(row.written_stops(0, len(row.tokens)))


def fill(row: Row) -> None:
    """Everything after the first written stop token that was not given becomes that token, if the stop rule is
    "fill"."""
    stops = row.written_stops(0, len(row.tokens))
    if row.settings.stop != "fill" or not stops:
        return
    for p in range(stops[0] + 1, len(row.tokens)):
        if row.given[p]:
            continue
        if row.tokens[p] == row.settings.mask_id:
            row.unmask_step[p] = row.step
        row.tokens[p] = row.tokens[stops[0]]


def masks_left(row: Row, region: Region) -> list[int]:
    """Masks that the row is still to write: none after the region once further blocks are barred."""
    return row.masked(region.start, region.end if barred(row) else len(row.tokens))


def decode_pipeline(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int,
    visibility: str,
    alignment: str = "rel",
    cached: bool = True,
    threshold: float = 0.9,
    inclusive: bool = False,
    score: str = "confidence",
    rank: str | None = None,
    scope: str = "each",
    min_unmask: int = 1,
    append_threshold: float = 1.0,
    activate_threshold: float = 1.0,
) -> Row:
    """D2F ("block" visibility) and dLLM-Var ("full"): a forward of the region denoises it, and commits its finished
    leading blocks.

    D2F: a block sees the prompt, itself and earlier blocks, so the commit is exact, and everything is recomputed here.
    dLLM-Var: the committed keys are those of this forward, in which they saw the region's masks.
    """
    row, L = Row(canvas, settings), len(canvas)
    if not row.masked(0, L):
        return row
    first = row.masked(0, L)[0]
    start, block = layout(row, block_length, alignment) if visibility == "block" else (first, None)
    region, stored, before = Region(row, start, block_length), Cache(), None
    committed = 0  # the first forward also commits what precedes the region
    while masks_left(row, region):
        finished = region.finished()
        if visibility == "block":
            rows = model.look(row.tokens, range(region.end), sees=lambda q, k: block(k) <= block(q))
        else:
            window, kept = range(committed, region.end), range(committed)
            rows = model.look(row.tokens, window, cache=stored, cached=kept, store=True)
        row.pay(region.end - committed if cached else region.end)
        for s in choose(
            row, region, model.predictor(rows, before), scope=scope, score=score, rank=rank,
            threshold=threshold, inclusive=inclusive, min_unmask=min_unmask, activate_threshold=activate_threshold,
        ):  # fmt: skip
            row.write(s)
        fill(row)
        row.step += 1
        if ended(row, region):
            return row
        committed = region.start = finished[-1][1] if finished else region.start
        before = rows.get(committed - 1, before)
        if not barred(row):
            region.append(append_threshold)
    return row


def decode_d3llm(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int,
    threshold: float = -0.5,
    inclusive: bool = True,
    score: str = "neg_entropy",
    rank: str | None = None,
    scope: str = "first",
    min_unmask: int = 1,
    append_threshold: float = 0.1,
    activate_threshold: float = 0.95,
    commit_delay: int = 2,
    refresh_interval: int | None = 3,
) -> Row:
    """d3LLM: full visibility over the whole canvas; the first part that is finished and not cached waits `commit_delay`
    forwards.

    Forwards count from 1. The prompt is finished at 0, and a block in the forward that finds the block finished and
    everything before it cached. A forward that caches recomputes what is not cached yet, and keeps the keys of what it
    caches. Among the other forwards, one that comes before the prompt is cached, that finds a block waiting, or whose
    number is a multiple of `refresh_interval` recomputes everything; the rest recompute what is not cached. Once a stop
    token bars further blocks (without filling), the canvas ends where the last block ends.
    """
    row, L, stored = Row(canvas, settings), len(canvas), Cache()
    if not row.masked(0, L):
        return row
    region = Region(row, row.masked(0, L)[0], block_length)
    before: Tensor | None = None
    cached, waits_since, n, prompt_waits = 0, 0, 0, True
    while masks_left(row, region):
        n += 1
        finished, caches = region.finished(), None
        if not prompt_waits and finished and waits_since is None:
            waits_since = n
        if waits_since is not None and n - waits_since >= commit_delay:
            caches = region.start if prompt_waits else finished.pop(0)[1]
            waits_since = n if finished else None
        refreshes = refresh_interval is not None and n % refresh_interval == 0
        full = caches is None and (prompt_waits or bool(finished) or refreshes)
        seen = region.end if barred(row) and settings.stop != "fill" else L
        window = range(seen) if full else range(cached, seen)
        rows = model.look(row.tokens, window, cache=stored, cached=range(window[0]), store=full or caches is not None)
        row.pay(len(window))
        for s in choose(
            row, region, model.predictor(rows, before), scope=scope, score=score, rank=rank,
            threshold=threshold, inclusive=inclusive, min_unmask=min_unmask, activate_threshold=activate_threshold,
        ):  # fmt: skip
            row.write(s)
        fill(row)
        row.step += 1
        if ended(row, region):
            return row
        if caches is not None:
            cached, region.start, prompt_waits = caches, caches, False
        before = rows.get(region.start - 1, before)
        if not barred(row):
            region.append(append_threshold)
    return row
