"""Decoders that change what they wrote (LLaDA2.1, LLaDA2.2).

Sources: Bie et al. (LLaDA2.1) arXiv:2602.08676; LLaDA2.2, as served.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from transcriptions.blockwise import layout
from transcriptions.common import Model, Row, Settings, fp32, make_rule


def decode_joint_threshold(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int,
    alignment: str,
    edit_threshold: float = 0.0,
    max_post_edits: int = 16,
    repeat_penalty: float = 0.0,
    threshold: float = 0.5,
    inclusive: bool = False,
    score: str = "confidence",
    min_unmask: int = 1,
) -> Row:
    """JointThreshold: a step writes masks above one threshold and rewrites its own tokens above another.

    A block is finished by the forward that changes nothing, which is its commit, or by the forward after
    `max_post_edits` ones that began without masks, which edits nothing; one that was given whole is committed without a
    denoise step. repeat_penalty: taken from the logit of what a position's left neighbour in the block holds; the
    block's first has none.
    """
    row, L = Row(canvas, settings), len(canvas)
    if not row.masked(0, L):
        return row
    start, block = layout(row, block_length, alignment)
    if start:
        row.pay(start)
    choose = make_rule(row, "threshold", score=score, threshold=threshold, inclusive=inclusive, min_unmask=min_unmask)
    while True:
        end, post = min(start + block_length, L), 0
        if not row.masked(start, end):
            row.pay(end - start)
        while row.masked(start, end) or row.written(start, end):
            logits_of = model.predictor(model.look(row.tokens, range(end), sees=lambda q, k: block(k) <= block(q)))
            row.pay(end - start)
            stats = {}
            for p in row.masked(start, end) + row.written(start, end):
                logits = logits_of(p).clone()
                if p > start:
                    logits[row.tokens[p - 1]] -= repeat_penalty
                stats[p] = row.stats(p, logits)
            masks = row.masked(start, end)
            changes = choose([stats[p] for p in masks], len(masks), 0)
            if not masks:
                post += 1
            if masks or post <= max_post_edits:
                written = [stats[p] for p in row.written(start, end)]
                changes += [
                    s
                    for s in written
                    if row.score(score, s) > fp32(edit_threshold) and s.token != row.tokens[s.position]
                ]
            for s in changes:
                row.write(s)
            row.step += 1
            if not changes:
                break
        if not row.masked(end, L) or row.closed(start, end):
            return row
        start = end


def decode_insert_delete(
    model: Model,
    canvas: Sequence[int],
    settings: Settings,
    *,
    block_length: int,
    alignment: str,
    delete_id: int,
    split_id: int,
    threshold: float = 0.5,
    edit_threshold: float = 0.0,
    max_post_edits: int = 16,
) -> Row:
    """JointThreshold with insertions and deletions (LLaDA2.2), greedy: DELETE drops its position, SPLIT puts a mask
    before what it holds.

    What follows in the block moves, is cut at the block's end or padded with masks. Masks that the block did not begin
    with are introduced ones. The final update leaves none of mask, DELETE and SPLIT; one more forward commits it if it
    changed anything, and if a block follows. A content that comes again is left by giving its weakest real change
    something that was never drawn for that place (commands are drawn too); what was drawn for a place is remembered by
    place.
    """
    row, L, M = Row(canvas, settings), len(canvas), settings.mask_id
    if not row.masked(0, L):
        return row
    start, block = layout(row, block_length, alignment)
    if start:
        row.pay(start)
    while True:
        end = min(start + block_length, L)
        prompt = next(p for p in range(start, end + 1) if p == end or not row.given[p])
        original = set(row.masked(start, end))
        updates = post = 0
        seen: set[tuple[int, ...]] = set()
        drawn: dict[int, set[int]] = {p: set() for p in range(start, end)}
        committed = False
        while True:
            logits_of = model.predictor(model.look(row.tokens, range(end), sees=lambda q, k: block(k) <= block(q)))
            row.pay(end - start)
            content, masks = tuple(row.tokens[start:end]), row.masked(start, end)
            waiting = [p for p in masks if p in original]
            updates += 1
            post += not waiting
            final = updates > (end - start) + max_post_edits or (
                post >= max_post_edits if max_post_edits else not waiting
            )

            pick = {p: likeliest(logits_of(p), set(settings.banned(p))) for p in range(start, end)}
            if not final:
                for p in waiting:
                    if pick[p][0] == M:
                        pick[p] = likeliest(logits_of(p), {M, *settings.banned(p)})
            writes = []
            if masks and (final or not waiting):
                writes = masks
            elif masks:
                ranked = sorted(masks, key=lambda p: (-pick[p][1], p))
                passing = [p for p in ranked if pick[p][1] > fp32(threshold)]
                minimum = len(masks) - len(waiting) + 1
                writes = passing if len(passing) >= minimum else ranked[:minimum]
            if max_post_edits == 0 and set(waiting) <= set(writes):
                final, writes = True, masks
            edited = {
                p: pick[p][1] > fp32(edit_threshold) and pick[p][0] != row.tokens[p]
                for p in range(prompt, end)
                if row.tokens[p] != M
            }
            if final:
                for p in [*writes, *edited]:
                    if pick[p][0] in (M, delete_id, split_id):
                        pick[p] = likeliest(logits_of(p), {M, delete_id, split_id, *settings.banned(p)})
                edited = {p: change and pick[p][0] != row.tokens[p] for p, change in edited.items()}
            changes = sorted([*writes, *(p for p in edited if edited[p])])
            if not changes:
                row.step += 1
                committed = True
                break
            real = [p for p in changes if pick[p][0] != row.tokens[p]]
            if content in seen and not final and real:
                weakest = min(real, key=lambda p: (pick[p][1], p))
                avoid = drawn[weakest] | set(settings.banned(weakest)) | ({M} if weakest in waiting else set())
                pick[weakest] = likeliest(logits_of(weakest), avoid)
            seen.add(content)
            for p in changes:
                drawn[p].add(pick[p][0])
            rewrite(row, start, end, {p: pick[p] for p in changes}, original, delete_id, split_id)
            row.step += 1
            if final:
                committed = tuple(row.tokens[start:end]) == content
                break
        if not row.masked(end, L) or row.closed(start, end):
            return row
        if not committed:
            row.pay(end - start)
        start = end


def likeliest(logits: Tensor, without: set[int]) -> tuple[int, float]:
    """The likeliest id but for some, and its probability."""
    p, values = logits.softmax(-1).tolist(), logits.tolist()
    token = min((i for i in range(len(values)) if i not in without), key=lambda i: (-values[i], i))
    return token, fp32(p[token])


def rewrite(
    row: Row,
    start: int,
    end: int,
    picks: dict[int, tuple[int, float]],
    original: set[int],
    delete_id: int,
    split_id: int,
) -> None:
    """Applies the picks to the block: writes, deletions and splits, from left to right. What was an original mask
    moves."""
    M = row.settings.mask_id
    introduced = (M, -1, 0.0, False)

    cells = []
    for p in range(start, end):
        here = (row.tokens[p], row.unmask_step[p], row.confidence[p], p in original)
        token, confidence = picks.get(p, (None, 0.0))
        if token == delete_id:
            continue
        if token == split_id:
            cells.append(introduced)
        elif token == M:
            here = (M, -1, 0.0, p in original)
        elif token is not None:
            here = (token, row.step, confidence, p in original)
        cells.append(here)
    cells = (cells + [introduced] * (end - start))[: end - start]
    original.clear()
    for p, (token, step, confidence, began) in zip(range(start, end), cells):
        row.tokens[p], row.unmask_step[p], row.confidence[p] = token, step, confidence
        if began:
            original.add(p)
