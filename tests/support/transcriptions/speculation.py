"""FreeDave (arXiv:2510.00294): the static decoder's tokens in fewer forwards, by verifying several of its next states
in one.

A static decoder here writes one token per step, the most confident of the block. Greedy; self rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transcriptions.common import Cache, Model, Row, Settings, Stats, order
from transcriptions.policies_select import Block, blocks_of


def decode_freedave(
    model: Model, canvas: Sequence[int], settings: Settings, *, block_length: int | None = 32, drafts: int = 4
) -> Row:
    """E1 over full visibility: a block's opening forward computes the canvas, the others the block, over the keys
    around it."""
    row, L, drafting = Row(canvas, settings), len(canvas), Drafting(drafts)
    for block in blocks_of(row, block_length):
        cache, around = Cache(), [p for p in range(L) if not block.start <= p < block.end]

        def opening() -> dict:
            row.pay(L)
            return model.look(row.tokens, range(L), cache=cache, store=True)

        def again(tokens: list[int]) -> dict:
            return model.look(tokens, range(block.start, block.end), cache=cache, cached=around)

        speculate(row, block, drafting, opening, again)
        if row.closed(block.start, block.end):
            return row
    return row


def decode_freedave_block(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int,
    alignment: str = "abs",
    causal_prefix: bool = False,
    drafts: int = 4,
) -> Row:
    """E1 over block-causal visibility: what precedes a block is computed once, by a prefill and commits, and is exact.

    causal_prefix: in a prefill and in a commit, positions see only those before them.
    """
    row, L, cache, drafting = Row(canvas, settings), len(canvas), Cache(), Drafting(drafts)
    if not row.masked(0, L):
        return row
    first = row.masked(0, L)[0]
    start = first // block_length * block_length if alignment == "abs" else first
    lowest = -1 if alignment == "rel" else -L
    number = [p // block_length if alignment == "abs" else max(lowest, (p - start) // block_length) for p in range(L)]

    def sees(q: int, k: int) -> bool:
        return k <= q if causal_prefix else number[k] <= number[q]

    if start:
        row.pay(start)
        model.look(row.tokens, range(start), cache=cache, sees=sees, store=True)
    for index, begin in enumerate(range(start, L, block_length)):
        block = Block(index, begin, min(begin + block_length, L), 0)
        inside = range(block.start, block.end)

        def again(tokens: list[int]) -> dict:
            return model.look(tokens, inside, cache=cache, cached=range(block.start))

        def opening() -> dict:
            row.pay(len(inside))
            return again(row.tokens)

        if row.masked(block.start, block.end):
            speculate(row, block, drafting, opening, again)
            if row.closed(block.start, block.end):
                return row
        if not row.masked(block.end, L):
            return row
        row.pay(len(inside))
        model.look(row.tokens, inside, cache=cache, cached=range(block.start), sees=sees, store=True)
    return row


class Drafting:
    """How many canvases a forward verifies: one, once 8 or more forwards had less than a quarter as many drafts
    accepted (not counting the first of each)."""

    def __init__(self, drafts: int) -> None:
        self.drafts, self.tried, self.accepted = drafts, 0, 0

    @property
    def width(self) -> int:
        return 1 if self.tried >= 8 and 4 * self.accepted < self.tried else self.drafts

    def record(self, accepted: int) -> None:
        if self.width > 1:
            self.tried, self.accepted = self.tried + 1, self.accepted + accepted


def speculate(
    row: Row, block: Block, drafting: Drafting, opening: Callable[[], dict], again: Callable[[list[int]], dict]
) -> None:
    """Fills a block. Drafts are ever longer prefixes of one order; a draft is right if the static decoder makes it of
    another right one, and the first always is. The last mask needs no forward: the accepted canvas has predicted it."""

    def ranked(tokens: list[int], rows: dict) -> list[Stats]:
        masked = [p for p in range(block.start, block.end) if tokens[p] == row.settings.mask_id]
        return order([row.stats(p, rows[p]) for p in masked], lambda s: s.confidence)

    prediction = ranked(row.tokens, opening())
    written: list[Stats] = []
    while True:
        if len(prediction) == 1:
            written += prediction
        for s in written:
            row.write(s)
        row.step += 1
        if not row.masked(block.start, block.end) or row.closed(block.start, block.end):
            return

        width = drafting.width
        states = [with_tokens(row.tokens, prediction[: k + 1]) for k in range(min(width, len(prediction)))]
        predictions = [ranked(tokens, again(tokens)) for tokens in states]
        row.pay(width * (block.end - block.start))
        targets = [with_tokens(tokens, made[:1]) for tokens, made in zip(states, predictions)]
        best = 0
        for j in range(1, len(states)):
            if states[j] == targets[best]:
                best = j
        drafting.record(best)
        written, prediction = prediction[: best + 1], predictions[best]


def with_tokens(tokens: list[int], written: Sequence[Stats]) -> list[int]:
    """A copy of the canvas with some positions written."""
    result = list(tokens)
    for s in written:
        result[s.position] = s.token
    return result
