"""Device code of `unmask` for regions that are read from memory, because they do not fit the registers: the step, tile
by tile. Specification: reference.unmask.

One program per row. Lanes are counted from the region's first. What one thread writes other threads read behind a
barrier, so everything is told from memory: the choice from the lanes' inputs, the row's next phase from the canvas as
it is after the writes. The stages have the numbers of the same stages in kernel.py, which keeps a row in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import state as row_state
from .canvas import fill, first_masked, first_stop_token, is_stop_token, load_stop_ids
from .memory_select import (
    choose_best_of_runs_in_memory,
    choose_in_memory,
    eligible_lanes,
    force_in_blocks_in_memory,
    remask_candidates_at,
    remask_cut_in_memory,
)
from .row import POINTERS, advance_block, advance_pipeline, open_block, part_of, quota_or_minimum
from .select import load_keys

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
def unmask_memory_kernel(
    # state, read and written
    tokens_ptr, unmask_step_ptr, unmask_confidence_ptr,
    canvas_len_ptr, block_start_ptr, block_end_ptr, block_masks_ptr, block_step_ptr, step_ptr,
    phase_ptr, nfe_ptr, query_tokens_ptr, error_ptr,
    # out, and for passes "factor" room for the keys of the lanes
    changed_ptr, keys_ptr,
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
    LOG_W: tl.constexpr, BLOCK_W: tl.constexpr, LOG_T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    PIPELINE: tl.constexpr = SCOPE != "row"
    row = tl.program_id(0).to(tl.int64)
    tokens_ptr += row * tokens_stride
    unmask_step_ptr += row * unmask_step_stride
    unmask_confidence_ptr += row * unmask_confidence_stride
    changed_ptr += row * W
    query_len = tl.load(query_len_ptr + row)
    phase = tl.load(phase_ptr + row)
    block_start = tl.load(block_start_ptr + row)
    block_end = tl.load(block_end_ptr + row)
    lane_start = block_start
    if lane_start_ptr is not None:
        lane_start = tl.load(lane_start_ptr + row)
    canvas_len = tl.load(canvas_len_ptr + row)
    step = tl.load(step_ptr + row)
    block_length = tl.maximum(tl.load(block_length_ptr + row), 1)
    index = tl.arange(0, BLOCK_T)
    for begin in range(0, W, BLOCK_T):
        tl.store(changed_ptr + begin + index, index < 0, mask=begin + index < W)
    tl.debug_barrier()

    # 1. Who takes part, and as what.
    prefills, commits, selects = part_of(phase, block_start, block_end, lane_start, W, KIND, CACHE)
    if (query_len > 0) & (prefills | commits | selects):
        tl.store(nfe_ptr + row, tl.load(nfe_ptr + row) + 1)
        tl.store(query_tokens_ptr + row, tl.load(query_tokens_ptr + row) + query_len)
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
            # 2. What the lanes hold, and which are eligible: the pointers here, a tile of lanes where it is needed.
            length = block_end - block_start
            offset = block_start - lane_start
            held_token_ptr = tokens_ptr + block_start
            held_step_ptr = unmask_step_ptr + block_start
            changed_row = changed_ptr + offset
            pred_row = pred_ptr + row * pred_stride + offset
            score_row = score_ptr + row * score_stride + offset
            value_row = value_ptr + row * value_stride
            if VALUE_PER_LANE:
                value_row += offset
            rank_row = score_row
            if rank_ptr is not None:
                rank_row = rank_ptr + row * rank_stride + offset
            allowed_row = None
            if allowed_ptr is not None:
                allowed_row = allowed_ptr + row * allowed_stride + offset
            entropy_row = None
            if entropy_ptr is not None:
                entropy_row = entropy_ptr + row * entropy_stride + offset
            remask_row = None
            if REMASK != "none":
                remask_row = remask_score_ptr + row * remask_score_stride + offset
            # Lanes looked at: an exiting row writes every mask in its lanes.
            first_lane, last_lane = length * 0, length
            exiting = False
            if exits_ptr is not None:
                exiting = tl.load(exits_ptr + row) != 0
                first_lane = tl.maximum(-offset, -block_start)
                last_lane = tl.minimum(W - offset, canvas_len - block_start)

            # 3. Which rows fail: an unusable statistic, or a row that should have ended, ends it before anything is
            # written.
            n, broken = 0, 0
            for begin in range(first_lane, last_lane, BLOCK_T):
                lane = begin + index
                seen = lane < last_lane
                in_region = (lane >= 0) & (lane < length)
                held_token = tl.load(held_token_ptr + lane, mask=seen, other=0)
                eligible = eligible_lanes(lane, held_token, in_region, allowed_row, mask_id, RENOISE)
                n += tl.sum(eligible.to(tl.int32))
                if stat_error_ptr is not None:
                    needed = eligible
                    if EDIT or REMASK != "none":
                        needed = needed | (tl.load(held_step_ptr + lane, mask=in_region, other=-1) >= 0)
                    if exits_ptr is not None:
                        needed = needed | (seen & (held_token == mask_id))
                    stat_error = tl.load(stat_error_ptr + row * stat_error_stride + offset + lane, mask=needed, other=0)
                    broken = tl.maximum(broken, tl.max((stat_error != 0).to(tl.int32)))
            fault = broken * _ERROR_LOGITS
            if max_steps_ptr is not None:
                stalled = (step >= tl.load(max_steps_ptr + row)) & (fault == 0)
                fault = tl.where(stalled, _ERROR_STALLED, fault)
            if fault != 0:
                tl.store(error_ptr + row, tl.load(error_ptr + row) | fault)
                next_phase = _DONE
            else:
                # 4. Which lanes are written.
                if exiting == 0:
                    kmin = quota_or_minimum(
                        n, tl.load(steps_ptr + row), tl.load(block_masks_ptr + row), tl.load(block_step_ptr + row),
                        tl.load(min_unmask_ptr + row), QUOTA, SCOPE,
                    )  # fmt: skip
                    fallback = kmin
                    if fallback_ptr is not None:
                        fallback = tl.load(fallback_ptr + row)
                    max_unmask = None
                    if max_unmask_ptr is not None:
                        max_unmask = tl.load(max_unmask_ptr + row)
                    keys_row = None
                    if PASSES == "factor":
                        keys_row = keys_ptr + row * BLOCK_W
                    choose_in_memory(
                        length, n, kmin, fallback, max_unmask, held_token_ptr, allowed_row, value_row, score_row,
                        rank_row, entropy_row, keys_row, changed_row, mask_id,
                        PASSES, INCLUSIVE, VALUE_PER_LANE, RENOISE, LOG_W, BLOCK_W, LOG_T, BLOCK_T,
                    )  # fmt: skip
                    if RUNS:
                        choose_best_of_runs_in_memory(
                            length, tl.load(run_value_ptr + row), held_token_ptr, allowed_row, score_row, rank_row,
                            changed_row, mask_id, BLOCK_W, BLOCK_T,
                        )  # fmt: skip
                    if PIPELINE:
                        force_in_blocks_in_memory(
                            length, block_length, tl.load(activate_masks_ptr + row),
                            held_token_ptr, allowed_row, rank_row, changed_row, mask_id, SCOPE, BLOCK_W, BLOCK_T,
                        )  # fmt: skip

                # 5. Which lanes are masked again.
                if REMASK != "none":
                    remask_count, remask_limit_ptr = 0, None
                    if REMASK != "saber":
                        remask_count = tl.load(remask_count_ptr + row)
                    if REMASK == "wino":
                        remask_limit_ptr = remask_value_ptr + row
                    cut = remask_cut_in_memory(
                        length, held_token_ptr, held_step_ptr, changed_row, remask_row, mask_id,
                        tl.load(min_unmask_ptr + row), remask_count, remask_limit_ptr, exiting,
                        REMASK, LOG_W, BLOCK_W, BLOCK_T,
                    )  # fmt: skip

                # 6. The row as it will be, tile by tile, and
                # 7. the writes of a tile, once every warp has read its part of that tile.
                block_step = tl.load(block_step_ptr + row)
                first_mask, any_changed = length, 0
                for begin in range(first_lane, last_lane, BLOCK_T):
                    lane = begin + index
                    seen = lane < last_lane
                    in_region = (lane >= 0) & (lane < length)
                    held_token = tl.load(held_token_ptr + lane, mask=seen, other=0)
                    held_step = tl.load(held_step_ptr + lane, mask=seen, other=-1)
                    written = in_region & (held_step >= 0)
                    changed = tl.load(changed_row + lane, mask=in_region, other=0) != 0
                    if exits_ptr is not None:
                        changed = tl.where(exiting, in_region if RENOISE else seen & (held_token == mask_id), changed)
                    if EDIT:
                        edit_value = tl.load(edit_value_ptr + row)
                        if exits_ptr is not None:
                            edit_value = tl.where(exiting, float("inf"), edit_value)
                        differs = written & (tl.load(pred_row + lane, mask=written, other=0) != held_token)
                        score = tl.load(score_row + lane, mask=written, other=float("-inf"))
                        changed = changed | (differs & (score > edit_value))
                    token = tl.load(pred_row + lane, mask=changed, other=0)
                    token_step = step + lane * 0
                    confidence = tl.load(
                        confidence_ptr + row * confidence_stride + offset + lane, mask=changed, other=0.0
                    )
                    stores_token, stores_step = changed, changed
                    if RENOISE:
                        refilled = in_region & (changed == 0)
                        refill = tl.load(refill_ptr + row * refill_stride + offset + lane, mask=refilled, other=0)
                        token = tl.where(refilled, refill, token)
                        stores_token = changed | refilled
                    if REMASK != "none":
                        candidates = remask_candidates_at(
                            lane, changed & in_region, written, remask_row, remask_limit_ptr, REMASK
                        )  # fmt: skip
                        remasked = candidates & (load_keys(lane, candidates, remask_row, True, BLOCK_W) >= cut)
                        token = tl.where(remasked, mask_id, token)
                        token_step = tl.where(remasked, -1, token_step)
                        confidence = tl.where(remasked, 0.0, confidence)
                        stores_token, stores_step = changed | remasked, changed | remasked
                    if PIPELINE:
                        first_mask = tl.minimum(
                            first_mask, tl.min(tl.where(in_region & (held_token == mask_id), lane, length))
                        )
                    any_changed = tl.maximum(any_changed, tl.max(changed.to(tl.int32)))
                    tl.debug_barrier()
                    tl.store(held_token_ptr + lane, token, mask=stores_token)
                    tl.store(held_step_ptr + lane, token_step, mask=stores_step)
                    tl.store(unmask_confidence_ptr + block_start + lane, confidence, mask=stores_step)
                    tl.store(changed_row + lane, changed, mask=seen)
                tl.store(step_ptr + row, step + 1)
                if CACHE != "delayed":
                    tl.store(block_step_ptr + row, block_step + 1)
                tl.debug_barrier()

                # What a stop token fills.
                masks_end = canvas_len
                if STOP == "fill":
                    # What follows the row's first written stop token becomes that token: no mask is left there.
                    masks_end = first_stop_token(
                        tokens_ptr, unmask_step_ptr, 0, canvas_len, canvas_len, stop_ids_ptr, K, BLOCK_L
                    )
                    filler = tl.load(tokens_ptr + masks_end, mask=masks_end < canvas_len, other=0)
                    # Every warp has read the canvas before one writes it.
                    tl.debug_barrier()
                    fill(tokens_ptr, unmask_step_ptr, masks_end + 1, canvas_len, filler, step, mask_id, BLOCK_L)
                    tl.debug_barrier()
                # 8. What the row needs next, and where its region then is.
                stop_at = block_end
                if STOP != "never":
                    stop_at = first_stop_token(
                        tokens_ptr, unmask_step_ptr, block_start, block_end, block_end, stop_ids_ptr, K, BLOCK_L
                    )
                mask_at = first_masked(tokens_ptr, block_start, block_end, mask_id, BLOCK_L)
                if PIPELINE:
                    delay = None
                    if CACHE == "delayed":
                        delay = tl.load(delay_ptr + row)
                    next_phase = advance_pipeline(
                        None, None, block_start + first_mask, mask_at, stop_at, masks_end, canvas_len, block_start,
                        block_end, block_length, tl.load(append_masks_ptr + row),
                        mask_id, phase, step, block_step, delay,
                        tokens_ptr, canvas_len_ptr + row, block_start_ptr + row, block_end_ptr + row,
                        block_step_ptr + row, CACHE, STOP, BLOCK_L,
                    )  # fmt: skip
                else:
                    all_stop = True
                    if STOP == "all_stop":
                        others = 0
                        stops = load_stop_ids(stop_ids_ptr, K)
                        for begin in range(0, length, BLOCK_T):
                            lane = begin + index
                            token = tl.load(held_token_ptr + lane, mask=lane < length, other=0)
                            is_stop = is_stop_token(token, stops, stop_ids_ptr, K)
                            others += tl.sum(((lane < length) & (is_stop == 0)).to(tl.int32))
                        all_stop = others == 0
                    # Behind the block only an exiting row writes, and leaves no mask in its lanes.
                    if exits_ptr is not None and not RENOISE:
                        masks_begin = tl.where(exiting, tl.maximum(block_end, lane_start + W), block_end)
                    next_phase, opens, start = advance_block(
                        mask_at, stop_at, any_changed, all_stop, exiting, masks_begin, block_end, canvas_len,
                        block_length, mask_id, tokens_ptr, EDIT, RENOISE, CACHE, STOP, BLOCK_L,
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
