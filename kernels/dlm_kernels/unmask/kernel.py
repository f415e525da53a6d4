"""Device code of `unmask` for regions that fit the registers. Specification: reference.unmask.

One program per row chooses lanes, writes them and moves the row on. Absent arguments are None, so what a rule does not
use is not compiled. The stages have the numbers of the same stages in memory.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import state as row_state
from .canvas import fill, first_stop_token, is_stop_token, load_stop_ids
from .row import POINTERS, advance_block, advance_pipeline, open_block, part_of, quota_or_minimum
from .select import choose, force_in_blocks, masked_again

_DENOISE, _DONE = tl.constexpr(row_state.DENOISE), tl.constexpr(row_state.DONE)
_ERROR_LOGITS, _ERROR_STALLED = tl.constexpr(row_state.ERROR_LOGITS), tl.constexpr(row_state.ERROR_STALLED)


# No argument is specialised, so neither another width, nor another number of stop ids, nor another model, nor a slice
# compiles the kernel again.
@triton.jit(
    do_not_specialize=(
        "tokens_stride", "unmask_step_stride", "unmask_confidence_stride", "pred_stride", "score_stride",
        "confidence_stride", "value_stride", "rank_stride", "entropy_stride", "stat_error_stride", "allowed_stride",
        "refill_stride", "remask_score_stride",
        "W", "K", "mask_id",
    ),
    do_not_specialize_on_alignment=POINTERS,
)  # fmt: skip
def unmask_kernel(
    # state, read and written
    tokens_ptr, unmask_step_ptr, unmask_confidence_ptr,
    canvas_len_ptr, block_start_ptr, block_end_ptr, block_masks_ptr, block_step_ptr, step_ptr,
    phase_ptr, nfe_ptr, query_tokens_ptr, error_ptr,
    # out
    changed_ptr,
    # inputs [B, W]; from rank on None where absent
    pred_ptr, score_ptr, confidence_ptr,
    rank_ptr, entropy_ptr, stat_error_ptr, allowed_ptr, refill_ptr, remask_score_ptr,
    # inputs [B], value also [B, W]; from lane_start on None where absent
    query_len_ptr, value_ptr, min_unmask_ptr, steps_ptr, block_length_ptr, stop_ids_ptr,
    lane_start_ptr, fallback_ptr, max_unmask_ptr, run_value_ptr, edit_value_ptr, remask_count_ptr, remask_value_ptr,
    exits_ptr, max_steps_ptr, append_masks_ptr, activate_masks_ptr, delay_ptr,
    first_token_ptr, first_token_confidence_ptr,
    # row strides
    tokens_stride, unmask_step_stride, unmask_confidence_stride, pred_stride, score_stride, confidence_stride,
    value_stride, rank_stride, entropy_stride, stat_error_stride, allowed_stride, refill_stride, remask_score_stride,
    # sizes and scalars
    W, K, mask_id,
    # flags
    KIND: tl.constexpr, PASSES: tl.constexpr, INCLUSIVE: tl.constexpr, QUOTA: tl.constexpr, SCOPE: tl.constexpr,
    RUNS: tl.constexpr, EDIT: tl.constexpr, RENOISE: tl.constexpr, REMASK: tl.constexpr, CACHE: tl.constexpr,
    FIRST_TOKEN: tl.constexpr, STOP: tl.constexpr, VALUE_PER_LANE: tl.constexpr,
    # tiles
    LOG_W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    PIPELINE: tl.constexpr = SCOPE != "row"
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_W)
    in_call = lane < W
    tokens_ptr += row * tokens_stride
    unmask_step_ptr += row * unmask_step_stride
    unmask_confidence_ptr += row * unmask_confidence_stride

    # 0. All that a step may need is read at once, whatever of it turns out to be needed: each read that waits for
    # another costs as much as all the arithmetic. Where the row's lanes lie in its canvas is told by these reads, and
    # so the canvas is read next.
    query_len = tl.load(query_len_ptr + row)
    phase = tl.load(phase_ptr + row)
    block_start = tl.load(block_start_ptr + row)
    block_end = tl.load(block_end_ptr + row)
    lane_start = block_start
    if lane_start_ptr is not None:
        lane_start = tl.load(lane_start_ptr + row)
    canvas_len = tl.load(canvas_len_ptr + row)
    step = tl.load(step_ptr + row)
    block_step = tl.load(block_step_ptr + row)
    block_length = tl.maximum(tl.load(block_length_ptr + row), 1)
    nfe = tl.load(nfe_ptr + row)
    query_tokens = tl.load(query_tokens_ptr + row)
    error = tl.load(error_ptr + row)
    steps = tl.load(steps_ptr + row)
    block_masks = tl.load(block_masks_ptr + row)
    min_unmask = tl.load(min_unmask_ptr + row)
    exiting = False
    if exits_ptr is not None:
        exiting = tl.load(exits_ptr + row) != 0
    max_steps = step
    if max_steps_ptr is not None:
        max_steps = tl.load(max_steps_ptr + row)
    fallback = None
    if fallback_ptr is not None:
        fallback = tl.load(fallback_ptr + row)
    max_unmask = None
    if max_unmask_ptr is not None:
        max_unmask = tl.load(max_unmask_ptr + row)
    run_value = None
    if RUNS:
        run_value = tl.load(run_value_ptr + row)
    edit_value = 0.0
    if EDIT:
        edit_value = tl.load(edit_value_ptr + row)
        if exits_ptr is not None:
            edit_value = tl.where(exiting, float("inf"), edit_value)
    remask_count, remask_value = 0, 0.0
    if REMASK == "lowest" or REMASK == "wino":
        remask_count = tl.load(remask_count_ptr + row)
    if REMASK == "wino":
        remask_value = tl.load(remask_value_ptr + row)
    activate_masks, append_masks = 0, 0
    if PIPELINE:
        activate_masks = tl.load(activate_masks_ptr + row)
        append_masks = tl.load(append_masks_ptr + row)
    delay = None
    if CACHE == "delayed":
        delay = tl.load(delay_ptr + row)
    if STOP != "never":
        stops = load_stop_ids(stop_ids_ptr, K)
    score_ptr += row * score_stride
    pred = tl.load(pred_ptr + row * pred_stride + lane, mask=in_call, other=0)
    score = tl.load(score_ptr + lane, mask=in_call, other=0.0)
    confidence = tl.load(confidence_ptr + row * confidence_stride + lane, mask=in_call, other=0.0)
    if VALUE_PER_LANE:
        value = tl.load(value_ptr + row * value_stride + lane, mask=in_call, other=0.0)
    else:
        value = tl.load(value_ptr + row * value_stride)
    rank = score
    if rank_ptr is not None:
        rank = tl.load(rank_ptr + row * rank_stride + lane, mask=in_call, other=0.0)
    if entropy_ptr is not None:
        entropy_ptr += row * entropy_stride
    stat_error = lane * 0
    if stat_error_ptr is not None:
        stat_error = tl.load(stat_error_ptr + row * stat_error_stride + lane, mask=in_call, other=0)
    allowed = in_call
    if allowed_ptr is not None:
        allowed = tl.load(allowed_ptr + row * allowed_stride + lane, mask=in_call, other=0) != 0
    refill = pred
    if RENOISE:
        refill = tl.load(refill_ptr + row * refill_stride + lane, mask=in_call, other=0)
    remask_score = score
    if REMASK != "none":
        remask_score = tl.load(remask_score_ptr + row * remask_score_stride + lane, mask=in_call, other=0.0)

    # 1. Who takes part, and as what.
    prefills, commits, selects = part_of(phase, block_start, block_end, lane_start, W, KIND, CACHE)
    position = lane_start + lane
    in_region = (position >= block_start) & (position < block_end)
    # Lanes looked at: an exiting row writes every mask in its lanes.
    seen = in_region
    if exits_ptr is not None:
        seen = (position >= 0) & (position < canvas_len) & in_call
    held_token_ptr = tokens_ptr + lane_start
    held_step_ptr = unmask_step_ptr + lane_start
    is_read = seen & (selects & (query_len > 0))
    held_token = tl.load(held_token_ptr + lane, mask=is_read, other=0)
    held_step = tl.load(held_step_ptr + lane, mask=is_read, other=-1)
    # One thread writes the row's fields for all threads, but not before every warp has read them all.
    tl.debug_barrier()
    changed = lane < 0
    if (query_len > 0) & (prefills | commits | selects):
        tl.store(nfe_ptr + row, nfe + 1)
        tl.store(query_tokens_ptr + row, query_tokens + query_len)
        next_phase = _DENOISE
        # A block may open, at `start`; no position before `masks_begin` is masked then.
        opens = prefills | commits
        start = block_end
        masks_begin = block_end
        if prefills:
            start = block_start
            masks_begin = block_start
        if commits & (block_end >= canvas_len):
            next_phase = _DONE
            opens = commits & False

        if selects:
            # 2. Which lanes are eligible.
            masked = in_region & (held_token == mask_id)
            written = in_region & (held_step >= 0)
            eligible = in_region
            if not RENOISE:
                eligible = masked & allowed
            n = tl.sum(eligible.to(tl.int32))

            # 3. Which rows fail: an unusable statistic, or a row that should have ended, ends it before anything is
            # written.
            fault = 0
            if stat_error_ptr is not None:
                needed = eligible
                if EDIT or REMASK != "none":
                    needed = needed | written
                if exits_ptr is not None:
                    needed = needed | (seen & (held_token == mask_id))
                fault = tl.max((needed & (stat_error != 0)).to(tl.int32)) * _ERROR_LOGITS
            if max_steps_ptr is not None:
                stalled = (step >= max_steps) & (fault == 0)
                fault = tl.where(stalled, _ERROR_STALLED, fault)
            if fault != 0:
                tl.store(error_ptr + row, error | fault)
                next_phase = _DONE
            else:
                # 4. Which lanes are written.
                if exiting:
                    changed = in_region if RENOISE else seen & (held_token == mask_id)
                else:
                    kmin = quota_or_minimum(n, steps, block_masks, block_step, min_unmask, QUOTA, SCOPE)
                    changed = choose(
                        eligible, n, kmin, kmin if fallback is None else fallback, max_unmask, run_value, value, score,
                        rank, score_ptr, entropy_ptr, PASSES, INCLUSIVE, RUNS, LOG_W, BLOCK_W,
                    )  # fmt: skip
                    if PIPELINE:
                        changed = force_in_blocks(
                            changed, eligible, masked, rank, block_end - block_start, block_length, activate_masks,
                            SCOPE, BLOCK_W,
                        )  # fmt: skip
                if EDIT:
                    changed = changed | (written & (pred != held_token) & (score > edit_value))

                # 5. Which lanes are masked again.
                if REMASK != "none":
                    remasked = masked_again(
                        changed & in_region, written, masked, remask_score, min_unmask, remask_count, remask_value,
                        exiting, REMASK, LOG_W, BLOCK_W,
                    )  # fmt: skip

                # 6. The row as it will be. All that follows is told from registers, because other threads store too and
                # nothing orders a load after their stores.
                token = tl.where(changed, pred, held_token)
                token_step = tl.where(changed, step, held_step)
                stores_token, stores_step, stores_confidence = changed, changed, changed
                if RENOISE:
                    refilled = in_region & (changed == 0)
                    token = tl.where(refilled, refill, token)
                    stores_token = changed | refilled
                if REMASK != "none":
                    token = tl.where(remasked, mask_id, token)
                    token_step = tl.where(remasked, -1, token_step)
                    confidence = tl.where(remasked, 0.0, confidence)
                    stores_token = changed | remasked
                    stores_step, stores_confidence = stores_token, stores_token
                stop_at = block_end
                masks_end = canvas_len
                if STOP != "never":
                    is_stop = in_region & is_stop_token(token, stops, stop_ids_ptr, K)
                    stop_at = tl.min(tl.where(is_stop & (token_step >= 0), position, block_end))
                if STOP == "fill":
                    # What follows the row's first written stop token becomes that token: no mask is left there.
                    stop_before = first_stop_token(
                        tokens_ptr, unmask_step_ptr, 0, block_start, canvas_len, stop_ids_ptr, K, BLOCK_L // 2
                    )
                    stop_behind = first_stop_token(
                        tokens_ptr, unmask_step_ptr, block_end, canvas_len, canvas_len, stop_ids_ptr, K, BLOCK_L // 2
                    )
                    masks_end = tl.minimum(stop_before, stop_behind)
                    masks_end = tl.minimum(masks_end, tl.where(stop_at < block_end, stop_at, canvas_len))
                    filler = tl.sum(tl.where(position == masks_end, token, 0))
                    if (masks_end < block_start) | (masks_end >= block_end):
                        filler = tl.load(tokens_ptr + masks_end, mask=masks_end < canvas_len, other=0)
                    filled = in_region & (position > masks_end) & ((token == mask_id) | (token_step >= 0))
                    filled_masks = filled & (token == mask_id)
                    token = tl.where(filled, filler, token)
                    token_step = tl.where(filled_masks, step, token_step)
                    stores_token, stores_step = changed | filled, changed | filled_masks
                    stop_at = tl.min(tl.where((is_stop & (token_step >= 0)) | filled, position, block_end))

                # 7. Write. Every warp has read its part of the row, but for what lies around the region.
                if STOP == "fill":
                    tl.debug_barrier()
                tl.store(held_token_ptr + lane, token, mask=stores_token)
                tl.store(held_step_ptr + lane, token_step, mask=stores_step)
                tl.store(unmask_confidence_ptr + lane_start + lane, confidence, mask=stores_confidence)
                tl.store(step_ptr + row, step + 1)
                if CACHE != "delayed":
                    tl.store(block_step_ptr + row, block_step + 1)
                if STOP == "fill":
                    fill(tokens_ptr, unmask_step_ptr, masks_end + 1, block_start, filler, step, mask_id, BLOCK_L // 2)
                    begin = tl.maximum(masks_end + 1, block_end)
                    fill(tokens_ptr, unmask_step_ptr, begin, canvas_len, filler, step, mask_id, BLOCK_L // 2)

                # 8. What the row needs next, and where its region then is.
                left = in_region & (token == mask_id)
                mask_at = tl.min(tl.where(left, position, block_end))
                if PIPELINE:
                    first = tl.min(tl.where(masked, position, block_end))
                    next_phase = advance_pipeline(
                        position, left, first, mask_at, stop_at, masks_end, canvas_len, block_start, block_end,
                        block_length, append_masks, mask_id, phase, step, block_step, delay,
                        tokens_ptr, canvas_len_ptr + row, block_start_ptr + row, block_end_ptr + row,
                        block_step_ptr + row, CACHE, STOP, BLOCK_L,
                    )  # fmt: skip
                else:
                    all_stop = True
                    if STOP == "all_stop":
                        all_stop = tl.max((in_region & (is_stop == 0)).to(tl.int32)) == 0
                    # Behind the block only an exiting row writes, and leaves no mask in its lanes.
                    if exits_ptr is not None and not RENOISE:
                        masks_begin = tl.where(exiting, tl.maximum(block_end, lane_start + W), block_end)
                    next_phase, opens, start = advance_block(
                        mask_at, stop_at, tl.max(changed.to(tl.int32)), all_stop, exiting, masks_begin, block_end,
                        canvas_len, block_length, mask_id, tokens_ptr, EDIT, RENOISE, CACHE, STOP, BLOCK_L,
                    )  # fmt: skip

        # 9. The block that opens.
        if opens:
            next_phase = open_block(
                row, next_phase, prefills, commits, start, masks_begin, block_end, canvas_len, block_length, step,
                mask_id, K, tokens_ptr, unmask_step_ptr, unmask_confidence_ptr,
                block_start_ptr, block_end_ptr, block_masks_ptr, block_step_ptr, stop_ids_ptr,
                first_token_ptr, first_token_confidence_ptr,
                CACHE, FIRST_TOKEN, STOP, BLOCK_L,
            )  # fmt: skip
        tl.store(phase_ptr + row, next_phase)
    tl.store(changed_ptr + row * W + lane, changed, mask=in_call)
