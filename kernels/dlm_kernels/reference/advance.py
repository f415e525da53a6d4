"""Where a row stands after a step: its region, its phase, and whether a stop token ended it. Part of the specification
of `unmask`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..rules import UnmaskInputs, UnmaskRule
from ..state import COMMIT, DENOISE, DONE, REFRESH, RowState


class After(NamedTuple):
    """A row after its writes: the canvas [B, L], and what happened in the step [B]."""

    tokens: Tensor
    unmask_step: Tensor
    unmask_confidence: Tensor
    selects: Tensor
    prefills: Tensor
    commits: Tensor
    changed: Tensor
    exiting: Tensor


def advance_block(rule: UnmaskRule, s: RowState, after: After, inputs: UnmaskInputs) -> dict[str, Tensor]:
    """Blocks one at a time: the fields of the state that change once the step's tokens are written."""
    tokens, unmask_step, mask_id = after.tokens, after.unmask_step, inputs.mask_id
    length = inputs.block_length.clamp(min=1)
    position = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)

    # 1. Is the block finished, and does a stop token end the row?
    in_block = (position >= s.block_start[:, None]) & (position < s.block_end[:, None])
    masked = in_block & (tokens == mask_id)
    finished = after.selects & ~masked.any(1)
    if rule.edit:
        finished = finished & (~after.changed | after.exiting)
    if rule.renoise:
        finished = after.selects & after.exiting
    stopped = _stopped(rule, tokens, unmask_step, in_block, masked, finished, after.selects, inputs.stop_ids)

    # 2. Is the row done, does its block wait for a commit, or does another block open?
    next_mask = first_masked(tokens, s.block_end, s.canvas_len, mask_id)
    exhausted = torch.where(after.commits, s.block_end, next_mask) >= s.canvas_len
    done = stopped | ((finished | after.commits) & exhausted)
    leaves = finished & ~done
    to_commit = leaves & (rule.cache == "commit" and not rule.edit)
    advances = (leaves & ~to_commit) | (after.commits & ~done)

    # 3. Where the region then is.
    one_by_one = after.commits | (rule.cache == "commit")
    skipped = torch.where(one_by_one, 0, (next_mask - s.block_end) // length)
    start = torch.where(advances, s.block_end + skipped * length, s.block_start)
    end = torch.where(advances, torch.minimum(start + length, s.canvas_len), s.block_end)

    # 4. The first token of a block that a prefill or a commit opens. That token may close the row, or fill the block.
    first_token_fields = {}
    if rule.first_token:
        opens = after.prefills | (after.commits & ~done)
        receives = (position == start[:, None]) & (tokens == mask_id) & opens[:, None]
        tokens = torch.where(receives, inputs.first_token[:, None], tokens)
        unmask_step = torch.where(receives, s.step[:, None], unmask_step)
        confidence = torch.where(receives, inputs.first_token_confidence[:, None], after.unmask_confidence)
        first_token_fields = dict(tokens=tokens, unmask_step=unmask_step, unmask_confidence=confidence)
        in_next = (position >= start[:, None]) & (position < end[:, None])
        masked, received = in_next & (tokens == mask_id), receives.any(1)
        filled = received & ~masked.any(1)
        closes = _stopped(rule, tokens, unmask_step, in_next, masked, filled, received, inputs.stop_ids)
        done = done | closes | (filled & (first_masked(tokens, end, s.canvas_len, mask_id) >= s.canvas_len))

    # 5. What the row needs next.
    masks = torch.where(advances | after.prefills, count_masked(tokens, start, end, mask_id), s.block_masks)
    phase = torch.full_like(s.phase, DENOISE)
    phase = torch.where(advances & (rule.cache == "refresh"), REFRESH, phase)
    opened = after.prefills | after.commits | (advances & (rule.cache == "commit"))
    phase = torch.where(to_commit | (opened & (masks == 0)), COMMIT, phase)
    phase = torch.where(done, DONE, phase)
    step = torch.where(advances, 0, s.block_step + after.selects)
    region = dict(block_start=start, block_end=end, block_masks=masks, block_step=step, phase=phase)
    return first_token_fields | region


def advance_pipeline(rule: UnmaskRule, s: RowState, after: After, inputs: UnmaskInputs) -> dict[str, Tensor]:
    """Several blocks at once: the fields of the state that change once the step's tokens are written.

    The region loses the blocks that were finished before the step, and gains at most one block.
    """
    tokens, selects, commits = after.tokens, after.selects, s.phase == COMMIT
    mask_id, length, delay = inputs.mask_id, inputs.block_length.clamp(min=1), inputs.delay
    position = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    in_region = (position >= s.block_start[:, None]) & (position < s.block_end[:, None])
    masked = in_region & (tokens == mask_id)

    # 1. The leading blocks that leave: everything before the first block that held a mask before this step, or the one
    # block of a delayed commit. The last block may be short: with no mask left, that block leaves too.
    first = torch.where(in_region & (s.tokens == mask_id), position, s.block_end[:, None]).amin(1)
    start = _block_begin(s, first, length)
    if rule.cache == "delayed":
        start = torch.where(commits, torch.minimum(s.block_start + length, s.block_end), s.block_start)
    start = torch.where(selects, start, s.block_start)

    # 2. Does a stop token end the row, or cut its canvas? `closed` are the blocks that are finished after this step and
    # behind finished blocks only.
    open_from = torch.where(masked, position, s.block_end[:, None]).amin(1)
    closed = in_region & (position < _block_begin(s, open_from, length)[:, None])
    is_stop = in_region & (after.unmask_step >= 0) & is_in(tokens, inputs.stop_ids)
    seen = selects & is_stop.any(1)
    if rule.stop == "closed":
        stopped = selects & (is_stop & (masked.cumsum(1) == 0)).any(1)
    else:
        stopped = selects & (is_stop & closed).any(1) & (rule.stop == "after_block")
    canvas_len = torch.where(seen & (rule.stop in ("closed", "after_block", "appends")), s.block_end, s.canvas_len)

    # 3. Is a block appended? The last block begins at `tail`. A row whose stop token filled the canvas needs no block.
    tail = s.block_end - 1 - torch.remainder(s.block_end - 1 - s.block_start, length)
    appends = selects & ~(seen & (rule.stop == "fill")) & (s.block_end < canvas_len)
    appends = appends & (count_masked(tokens, tail, s.block_end, mask_id) <= inputs.append_masks)
    end = torch.where(appends, torch.minimum(s.block_end + length, canvas_len), s.block_end)
    done = selects & (stopped | (count_masked(tokens, s.block_start, canvas_len, mask_id) == 0))

    # 4. What the row needs next.
    phase = torch.full_like(s.phase, DENOISE)
    step = s.block_step + selects
    if rule.cache == "delayed":
        head_end = torch.minimum(start + length, end)
        # Did the step find the first block finished? No such step counts before what precedes the region is committed.
        waits = (first >= head_end) & (s.step + 1 >= delay)
        waited = torch.where(waits, torch.where(commits, 0, s.block_step) + 1, 0)
        step = torch.where(selects, waited, s.block_step)
        finished = count_masked(tokens, start, head_end, mask_id) == 0
        phase = torch.where(finished, torch.where(waited >= delay, COMMIT, REFRESH), phase)
        phase = torch.where(s.step + 2 <= delay, REFRESH, phase)
    phase = torch.where(done, DONE, phase)
    return dict(block_start=start, block_end=end, block_step=step, canvas_len=canvas_len, phase=phase)


def _block_begin(s: RowState, position: Tensor, length: Tensor) -> Tensor:
    """[B]: where the region's block that holds `position` begins; block_end if the position is the region's end."""
    begin = s.block_start + (position - s.block_start) // length * length
    return torch.where(position < s.block_end, begin, s.block_end)


def _stopped(
    rule: UnmaskRule,
    tokens: Tensor,
    unmask_step: Tensor,
    in_block: Tensor,
    masked: Tensor,
    finished: Tensor,
    rows: Tensor,
    stop_ids: Tensor,
) -> Tensor:
    """[B] bool: does a token that was written in the block end the row?"""
    is_stop = is_in(tokens, stop_ids)
    stop = in_block & (unmask_step >= 0) & is_stop
    if rule.stop == "closed":
        return rows & (stop & (masked.cumsum(1) == 0)).any(1)
    if rule.stop == "after_block":
        return rows & finished & stop.any(1)
    if rule.stop == "all_stop":
        return rows & finished & stop.any(1) & (is_stop | ~in_block).all(1)
    return torch.zeros_like(rows)


def is_in(tokens: Tensor, ids: Tensor) -> Tensor:
    """[B, L] bool: is the token one of `ids` [K]?"""
    return (tokens[:, :, None] == ids).any(2)


def first_masked(tokens: Tensor, begin: Tensor, end: Tensor, mask_id: int) -> Tensor:
    """First masked position of every row in [begin, end), or `end` if there is none. [B] int32"""
    position = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    return torch.where(_masked_in(tokens, begin, end, mask_id), position, end[:, None]).amin(1)


def count_masked(tokens: Tensor, begin: Tensor, end: Tensor, mask_id: int) -> Tensor:
    """Masked positions of every row in [begin, end). [B] int32"""
    return _masked_in(tokens, begin, end, mask_id).sum(1, dtype=torch.int32)


def _masked_in(tokens: Tensor, begin: Tensor, end: Tensor, mask_id: int) -> Tensor:
    position = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    return (tokens == mask_id) & (position >= begin[:, None]) & (position < end[:, None])
