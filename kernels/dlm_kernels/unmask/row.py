"""Device code of `unmask`: who takes part in a step, and where a row stands after the step, from scalars.
Specification: reference.advance.

The two kernels share this code; they differ in where they keep a row's lanes, in registers or in memory.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl

from .. import state as row_state
from ..rules import UnmaskInputs
from .canvas import count_masked, first_masked, first_token_closes

_REFRESH, _DENOISE = tl.constexpr(row_state.REFRESH), tl.constexpr(row_state.DENOISE)
_COMMIT, _DONE = tl.constexpr(row_state.COMMIT), tl.constexpr(row_state.DONE)

# The tensors of a call. A slice of a tensor, as of a batch, may begin anywhere, and compiles no kernel anew: rows may
# have any stride, so that no lanes are read as vectors. (Only the kernel's own room for keys is.)
POINTERS = tuple(
    f"{name}_ptr"
    for name in (
        *(field.name for kind in (row_state.RowState, UnmaskInputs) for field in dataclasses.fields(kind)),
        "changed",
    )
)


@triton.jit
def part_of(phase, block_start, block_end, lane_start, W, KIND: tl.constexpr, CACHE: tl.constexpr):
    """Does the row prefill, commit, or select? At most one of the three."""
    prefills = (phase == _REFRESH) & (KIND == "refresh" and CACHE == "commit")
    commits = (phase == _COMMIT) & (KIND == "denoise" and CACHE == "commit")
    selects = (phase == _DENOISE) & (KIND == "denoise") | (phase == _REFRESH) & (
        KIND == "refresh" and CACHE != "commit"
    )
    selects = selects | (phase == _COMMIT) & (KIND == "denoise" and CACHE == "delayed")
    selects = selects & (block_end - lane_start <= W) & (block_start >= lane_start)
    return prefills, commits, selects


@triton.jit
def quota_or_minimum(
    n, steps, block_masks, block_step, min_unmask, QUOTA: tl.constexpr, SCOPE: tl.constexpr
):  # fmt: skip
    """How many lanes must pass: the block's quota, or the call's minimum."""
    if QUOTA:
        S = tl.maximum(steps, 1)
        kmin = tl.maximum(block_masks // S + (block_step < block_masks % S).to(tl.int32), 1)
    elif SCOPE == "each":
        kmin = n * 0
    else:
        kmin = min_unmask
    return kmin


@triton.jit
def number_masked_again(chosen, any_left, min_unmask, count, REMASK: tl.constexpr):
    """How many lanes a step masks again at most.

    chosen: the number of lanes just written. any_left: whether the region still holds a mask.
    """
    if REMASK == "saber":
        n = tl.maximum(min_unmask, 0)
        m = tl.maximum(n, chosen)
        k = tl.minimum(tl.maximum(n // 2, (m + 7) // 8), m - 1)
        k = tl.where(any_left, k, 0)
    elif REMASK == "wino":
        k = tl.where(chosen > 1, count, 0)
    else:
        k = count
    return k


@triton.jit
def advance_pipeline(
    position, masked, first, mask_at, stop_at, masks_end, canvas_len, block_start, block_end, block_length,
    append_masks, mask_id, phase, step, block_step, delay,
    tokens_ptr, canvas_len_ptr, block_start_ptr, block_end_ptr, block_step_ptr,
    CACHE: tl.constexpr, STOP: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Several blocks at once: move the region of the row, and return the row's next phase.

    masked: whether the lane at `position` lies in the region and is masked after the step; None = read the canvas.
    first: the first position of the region that was masked before the step, mask_at: the first one that is masked after
    the step, stop_at: the first written stop token of the region; each is block_end where there is no such position.
    masks_end: no canvas position from here on is masked.
    phase, step, block_step: of the row before the step.
    """
    # 1. The leading blocks that leave the region.
    start = block_start
    if CACHE == "delayed":
        if phase == _COMMIT:
            start = tl.minimum(block_start + block_length, block_end)
            block_step = block_step * 0
    else:
        start = block_start + (first - block_start) // block_length * block_length
        start = tl.where(first < block_end, start, block_end)
    # 2. Does a stop token end the row, or cut its canvas?
    stopped = stop_at < mask_at
    if STOP == "after_block":
        mask_block = block_start + (mask_at - block_start) // block_length * block_length
        stopped = stop_at < tl.where(mask_at < block_end, mask_block, block_end)
    elif STOP != "closed":
        stopped = stopped & False
    if STOP == "closed" or STOP == "after_block" or STOP == "appends":
        canvas_len = tl.where(stop_at < block_end, block_end, canvas_len)
        masks_end = canvas_len
        tl.store(canvas_len_ptr, canvas_len)
    # 3. Is a block appended? The last block begins at `tail`.
    tail = block_end - 1 - (block_end - 1 - block_start) % block_length
    if masked is None:
        tail_masks = count_masked(tokens_ptr, tail, block_end, mask_id, BLOCK_L)
    else:
        tail_masks = tl.sum((masked & (position >= tail)).to(tl.int32))
    appends = (tail_masks <= append_masks) & (block_end < canvas_len)
    if STOP == "fill":
        appends = appends & (stop_at == block_end)
    end = tl.where(appends, tl.minimum(block_end + block_length, canvas_len), block_end)
    done = stopped
    if mask_at == block_end:
        done = done | (first_masked(tokens_ptr, block_end, masks_end, mask_id, BLOCK_L) >= masks_end)
    # 4. What the row needs next.
    next_phase = _DENOISE
    if CACHE == "delayed":
        head_end = tl.minimum(start + block_length, end)
        if masked is None:
            head_masks = count_masked(tokens_ptr, start, tl.minimum(head_end, masks_end), mask_id, BLOCK_L)
        else:
            head_masks = tl.sum((masked & (position >= start) & (position < head_end)).to(tl.int32))
            head_masks += count_masked(
                tokens_ptr, tl.maximum(start, block_end), tl.minimum(head_end, masks_end), mask_id, BLOCK_L
            )
        # Did the step find the first block finished? No such step counts before what precedes the region is committed.
        waited = tl.where((first >= head_end) & (step + 1 >= delay), block_step + 1, 0)
        if head_masks == 0:
            next_phase = tl.where(waited >= delay, _COMMIT, _REFRESH)
        if step + 2 <= delay:
            next_phase = _REFRESH
        tl.store(block_step_ptr, waited)
    if done:
        next_phase = _DONE
    tl.store(block_start_ptr, start)
    tl.store(block_end_ptr, end)
    return next_phase


@triton.jit
def advance_block(
    mask_at, stop_at, changed, all_stop, exiting, masks_begin, block_end, canvas_len,
    block_length, mask_id, tokens_ptr,
    EDIT: tl.constexpr, RENOISE: tl.constexpr, CACHE: tl.constexpr, STOP: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Blocks one at a time: the row's next phase, whether a block opens, and where that block begins.

    changed: whether a lane was written. all_stop: whether the block holds nothing but stop tokens. No position in
    [block_end, masks_begin) is masked.
    """
    next_phase = _DENOISE
    start = block_end
    finished = mask_at == block_end
    if EDIT:
        finished = finished & ((changed == 0) | exiting)
    if RENOISE:
        finished = (finished & False) | exiting
    stopped = stop_at < mask_at
    if STOP == "after_block" or STOP == "all_stop":
        stopped = finished & (stop_at < block_end)
        if STOP == "all_stop":
            stopped = stopped & all_stop
    elif STOP == "never":
        stopped = stopped & False
    opens = finished & False
    if stopped:
        next_phase = _DONE
    elif finished:
        next_mask = first_masked(tokens_ptr, masks_begin, canvas_len, mask_id, BLOCK_L)
        if next_mask >= canvas_len:
            next_phase = _DONE
        elif CACHE == "commit" and not EDIT:
            next_phase = _COMMIT
        else:
            if CACHE != "commit":
                start = block_end + (next_mask - block_end) // block_length * block_length
            opens = finished
            if CACHE == "refresh":
                next_phase = _REFRESH
    return next_phase, opens, start


@triton.jit
def open_block(
    row, next_phase, prefills, commits, start, masks_begin, block_end, canvas_len, block_length, step, mask_id, K,
    tokens_ptr, unmask_step_ptr, unmask_confidence_ptr,
    block_start_ptr, block_end_ptr, block_masks_ptr, block_step_ptr, stop_ids_ptr,
    first_token_ptr, first_token_confidence_ptr,
    CACHE: tl.constexpr, FIRST_TOKEN: tl.constexpr, STOP: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Open the block at `start` and return the row's next phase.

    No position of the block before masks_begin is masked.
    """
    end = tl.minimum(start + block_length, canvas_len)
    if prefills:
        end = block_end
    else:
        tl.store(block_step_ptr + row, 0)
    masks = count_masked(tokens_ptr, tl.maximum(start, masks_begin), end, mask_id, BLOCK_L)
    closes = False
    if FIRST_TOKEN:
        is_masked = tl.load(tokens_ptr + start, mask=start < canvas_len, other=0) == mask_id
        if (prefills | commits) & (start < canvas_len) & is_masked:
            first_token = tl.load(first_token_ptr + row)
            closes = first_token_closes(
                tokens_ptr, unmask_step_ptr, start, end, canvas_len, first_token, mask_id, stop_ids_ptr, K,
                STOP, BLOCK_L,
            )  # fmt: skip
            # One thread writes what the other threads have just read.
            tl.debug_barrier()
            tl.store(tokens_ptr + start, first_token)
            tl.store(unmask_step_ptr + start, step)
            tl.store(unmask_confidence_ptr + start, tl.load(first_token_confidence_ptr + row))
            masks -= 1
    if (CACHE == "commit") & (masks == 0):
        next_phase = _COMMIT
    if closes:
        next_phase = _DONE
    tl.store(block_start_ptr + row, start)
    tl.store(block_end_ptr + row, end)
    tl.store(block_masks_ptr + row, masks)
    return next_phase
