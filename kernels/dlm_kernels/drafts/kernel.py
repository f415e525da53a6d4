"""Device code of `draft_build` and `verify`, which read a row in tiles of BLOCK_T lanes. Specification:
reference.drafts.

Lanes have the keys of `unmask` (order-preserving bits of the score, then the lane). No two keys are equal, so the order
is total and nothing depends on the tile or the batch. Few lanes are wanted in order, so they are found one by one, each
as the greatest key below the last one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..unmask.select import KEY_MAX, KEY_MIN, load_keys

# As many lanes as a key can tell apart.
_LANES = tl.constexpr(2**31)
# A slice of a tensor, as of a batch, may begin anywhere, and compiles no kernel anew: rows may have any stride, so that
# no lanes are read as vectors.
_POINTERS = (
    "source_token_ptr", "source_score_ptr", "source_confidence_ptr", "tried_ptr", "accepted_ptr", "tokens_ptr",
    "held_ptr", "token_ptr", "score_ptr", "confidence_ptr", "eligible_ptr", "ready_ptr", "drafting_ptr", "selects_ptr",
    "chosen_ptr", "pred_ptr", "certain_ptr",
)  # fmt: skip


@triton.jit
def _best_below(limit, W, score_ptr, eligible_ptr, held_ptr, mask_id, BLOCK_T: tl.constexpr):
    """The greatest key below `limit` of an eligible lane, which must be masked in the canvas `held_ptr` if that is not
    None; KEY_MIN if there is none."""
    top = limit * 0 + KEY_MIN
    for begin in range(0, W, BLOCK_T):
        lane = begin + tl.arange(0, BLOCK_T)
        candidates = tl.load(eligible_ptr + lane, mask=lane < W, other=0) != 0
        if held_ptr is not None:
            candidates = candidates & (tl.load(held_ptr + lane, mask=candidates, other=0) == mask_id)
        keys = load_keys(lane, candidates, score_ptr, False, _LANES)
        top = tl.maximum(top, tl.max(tl.where(candidates & (keys < limit), keys, KEY_MIN)))
    return top


@triton.jit
def _last_of_best(number, W, score_ptr, eligible_ptr, BLOCK_T: tl.constexpr):
    """The key of the last of the `number` best eligible lanes; above every key if `number` is 0, KEY_MIN if there are
    fewer lanes."""
    cut = number.to(tl.int64) * 0 + KEY_MAX
    for _ in range(number):
        cut = _best_below(cut, W, score_ptr, eligible_ptr, None, 0, BLOCK_T)
    return cut


@triton.jit(
    do_not_specialize=("W", "D", "source_token_stride", "source_score_stride", "tokens_stride", "eligible_stride"),
    do_not_specialize_on_alignment=_POINTERS,
)
def draft_build_kernel(
    # in
    source_token_ptr, source_score_ptr, tokens_ptr, eligible_ptr, ready_ptr,
    # out
    held_ptr,
    # row strides
    source_token_stride, source_score_stride, tokens_stride, eligible_stride,
    # sizes
    W, D,
    # tiles
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The canvases of the drafts of a row, one after the other: each writes one lane more than the draft before."""
    row = tl.program_id(0).to(tl.int64)
    eligible_ptr += row * eligible_stride
    score_ptr = source_score_ptr + row * source_score_stride
    ready = tl.load(ready_ptr + row) != 0
    cut = row * 0 + KEY_MAX
    for k in range(D):
        if ready:
            cut = _best_below(cut, W, score_ptr, eligible_ptr, None, 0, BLOCK_T)
        for begin in range(0, W, BLOCK_T):
            lane = begin + tl.arange(0, BLOCK_T)
            eligible = tl.load(eligible_ptr + lane, mask=lane < W, other=0) != 0
            writes = eligible & (load_keys(lane, eligible, score_ptr, False, _LANES) >= cut)
            held = tl.load(tokens_ptr + row * tokens_stride + lane, mask=lane < W, other=0)
            token = tl.load(source_token_ptr + row * source_token_stride + lane, mask=writes, other=0)
            tl.store(held_ptr + (row * D + k) * W + lane, tl.where(writes, token, held), mask=lane < W)


@triton.jit(
    do_not_specialize=(
        "W", "D", "mask_id", "source_token_stride", "source_score_stride", "source_confidence_stride",
        "eligible_stride", "held_stride", "held_draft_stride", "token_stride", "token_draft_stride", "score_stride",
        "score_draft_stride", "confidence_stride", "confidence_draft_stride",
    ),
    do_not_specialize_on_alignment=_POINTERS,
)  # fmt: skip
def verify_kernel(
    # source, read and written
    source_token_ptr, source_score_ptr, source_confidence_ptr, tried_ptr, accepted_ptr,
    # in, [B, D, W]
    held_ptr, token_ptr, score_ptr, confidence_ptr,
    # in, [B, W] and [B]
    eligible_ptr, ready_ptr, drafting_ptr, selects_ptr,
    # out
    chosen_ptr, pred_ptr, certain_ptr,
    # strides of rows and drafts
    source_token_stride, source_score_stride, source_confidence_stride, eligible_stride,
    held_stride, held_draft_stride, token_stride, token_draft_stride, score_stride, score_draft_stride,
    confidence_stride, confidence_draft_stride,
    # sizes and scalars
    W, D, mask_id,
    # tiles
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What a step of a row writes, and the source of its next drafts."""
    # 1. The row, and how many of its lanes are eligible.
    row = tl.program_id(0).to(tl.int64)
    source_token_ptr += row * source_token_stride
    source_score_ptr += row * source_score_stride
    source_confidence_ptr += row * source_confidence_stride
    eligible_ptr += row * eligible_stride
    held_ptr += row * held_stride
    token_ptr += row * token_stride
    score_ptr += row * score_stride
    confidence_ptr += row * confidence_stride
    held_draft_stride = held_draft_stride.to(tl.int64)
    token_draft_stride = token_draft_stride.to(tl.int64)
    score_draft_stride = score_draft_stride.to(tl.int64)
    confidence_draft_stride = confidence_draft_stride.to(tl.int64)
    ready = tl.load(ready_ptr + row) != 0
    drafting = ready & (tl.load(drafting_ptr + row) != 0)
    selects = tl.load(selects_ptr + row) != 0
    index = tl.arange(0, BLOCK_T)
    left = 0
    for begin in range(0, W, BLOCK_T):
        eligible = tl.load(eligible_ptr + begin + index, mask=begin + index < W, other=0) != 0
        left += tl.sum(eligible.to(tl.int32))

    # 2. The chain: from the accepted draft to the last one that the static decoder makes of the accepted one.
    best = D * 0
    goes_on = drafting
    while goes_on:
        held_best = held_ptr + best * held_draft_stride
        score_best = score_ptr + best * score_draft_stride
        top = _best_below(row * 0 + KEY_MAX, W, score_best, eligible_ptr, held_best, mask_id, BLOCK_T)
        next_lane = _LANES - 1 - (top & 0xFFFFFFFF).to(tl.int32)
        writes = top != KEY_MIN
        token = tl.load(token_ptr + best * token_draft_stride + next_lane, mask=writes, other=0)
        reached = best
        for j in range(best + 1, tl.minimum(D, left)):
            differs = 0
            for begin in range(0, W, BLOCK_T):
                lane = begin + index
                target = tl.load(held_best + lane, mask=lane < W, other=0)
                target = tl.where(writes & (lane == next_lane), token, target)
                held = tl.load(held_ptr + j * held_draft_stride + lane, mask=lane < W, other=0)
                differs += tl.sum(((lane < W) & (target != held)).to(tl.int32))
            reached = tl.where(differs == 0, j, reached)
        goes_on = reached > best
        best = reached

    # 3. What is written: the accepted draft, and the last mask with it.
    count = tl.where(ready, best + 1, 0)
    closes = left - count == 1
    cut = _last_of_best(count, W, source_score_ptr, eligible_ptr, BLOCK_T)
    last = cut
    if closes:
        last = _best_below(cut, W, source_score_ptr, eligible_ptr, None, 0, BLOCK_T)
    if drafting & selects:
        tl.store(tried_ptr + row, tl.load(tried_ptr + row) + 1)
        tl.store(accepted_ptr + row, tl.load(accepted_ptr + row) + best)
    for begin in range(0, W, BLOCK_T):
        lane = begin + index
        inside = lane < W
        eligible = tl.load(eligible_ptr + lane, mask=inside, other=0) != 0
        keys = load_keys(lane, eligible, source_score_ptr, False, _LANES)
        from_draft = eligible & (keys >= cut)
        token = tl.load(token_ptr + best * token_draft_stride + lane, mask=inside, other=0)
        score = tl.load(score_ptr + best * score_draft_stride + lane, mask=inside, other=0.0)
        confidence = tl.load(confidence_ptr + best * confidence_draft_stride + lane, mask=inside, other=0.0)
        pred = tl.load(source_token_ptr + lane, mask=from_draft, other=0)
        certain = tl.load(source_confidence_ptr + lane, mask=from_draft, other=0.0)
        tl.store(chosen_ptr + row * W + lane, eligible & (keys >= last), mask=inside)
        tl.store(pred_ptr + row * W + lane, tl.where(from_draft, pred, token), mask=inside)
        tl.store(certain_ptr + row * W + lane, tl.where(from_draft, certain, confidence), mask=inside)
        # The next source, once every warp has read its part of this one.
        tl.debug_barrier()
        tl.store(source_token_ptr + lane, token, mask=inside & selects)
        tl.store(source_score_ptr + lane, score, mask=inside & selects)
        tl.store(source_confidence_ptr + lane, confidence, mask=inside & selects)
