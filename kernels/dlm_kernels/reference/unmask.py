"""`unmask` in plain torch: which positions are written or masked again, and what the row does next.

This is the specification of the kernels and of the form for a CPU. Every shape is fixed and no value is read by the
host, so the function also runs under FakeTensorMode. A row's result depends on nothing but that row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks.unmask import check_arguments
from ..rules import Kind, UnmaskInputs, UnmaskRule
from ..state import COMMIT, DENOISE, DONE, ERROR_LOGITS, ERROR_STALLED, REFRESH, RowState
from .advance import After, advance_block, advance_pipeline, is_in
from .select import lowest, quota, select, select_in_blocks


def unmask(state: RowState, rule: UnmaskRule, inputs: UnmaskInputs, *, kind: Kind) -> Tensor:
    """Write the chosen predictions of every row's region and move every row to what it needs next, in place.

    Lane j of a row is position lane_start + j; the region is [block_start, block_end). A row takes part if query_len >
    0 and its phase is what this step is for; every other row is left exactly as it is, counters included:

        phase     kind       rule.cache          what happens
        REFRESH   "refresh"  "commit"            a prefill selects nothing; then DENOISE, or COMMIT if the block holds
                                                 no mask
        REFRESH   "refresh"  all but "none" and  select and write (the step is also denoise step 0 of the block or row)
                             "commit"
        DENOISE   "denoise"  any                 select and write
        COMMIT    "denoise"  "commit"            the very next block: DENOISE, or COMMIT again if it holds no mask
        COMMIT    "denoise"  "delayed"           select and write; then the region's first block leaves the region

    A selecting row, in this order:

        failed    The row is DONE and nothing is written, if a lane whose statistics are needed has stat_error != 0
                  (ERROR_LOGITS) or else if the row has taken max_steps (ERROR_STALLED). Needed are the eligible lanes;
                  with rule.edit or rule.remask also the written lanes of the region, with `exits` also every masked
                  lane.
        chosen    `select` among the masked, allowed lanes of the region (rule.renoise: among all its lanes); rule.edit
                  adds its edits.
        exits     An exiting row writes every masked lane of its canvas instead, inside the region or not
                  (rule.renoise: every lane of the region).
        write     Chosen lanes receive pred, the row's step and confidence; rule.renoise gives the others `refill`.
        remask    rule.remask masks written lanes again; their unmask_step is -1 and their confidence 0.
        fill      rule.stop "fill" overwrites what follows the first written stop token.

    and then, for blocks decoded one at a time,

        A written stop token ends the row (rule.stop)   -> DONE; given tokens never stop a row
        The block still holds masks, or was edited      -> DENOISE
        No mask follows the block                       -> DONE
        Otherwise                                       -> COMMIT ("commit"; the very next block if rule.edit), or on
                                                           to the block of the next mask: REFRESH ("refresh"),
                                                           DENOISE ("none", "once"). Blocks lie at
                                                           block_end + i * block_length.

    or, for a pipeline,

        A written stop token ends the row, or bars further blocks ("closed", "after_block", "appends": the canvas is
        cut at block_end).
        The region's leading blocks that held no mask before this step leave the region ("delayed": the first one, on a
        COMMIT step).
        The last block holds at most append_masks masks -> one more block is appended
        No mask is left in the canvas                   -> DONE
        Otherwise                                       -> DENOISE or, while the region's first block holds no mask,
                                                           REFRESH and then COMMIT ("delayed")

    Args:
        state: is read and written in place. 2-D fields may have any row stride.
        inputs: what the call is told about its rows and lanes, see `UnmaskInputs`.
        kind: the kind of the forward just run.
    Returns:
        [B, W] bool: lanes written by this step (before any was masked again).
    Raises:
        TypeError: dtype.  ValueError: shape, device, last stride, K > 16, an input that the rule needs or does not use,
        unknown kind, kind "refresh" without a cache, fields of the state that are expanded, share memory or require a
        gradient.

    Checked in the debug mode only (`dlm_kernels.debug`), because it reads the device: 0 <= block_start <= block_end <=
    canvas_len <= L, phases, counts that are not negative, tokens and stop_ids that are ids, the mask's not among the
    stop_ids, and pred and first_token that are other ids than the mask's wherever they may be written.

    Low-confidence unmasking: LLaDA, arXiv:2502.09992; the other rules: `UnmaskRule`.
    """
    check_arguments(state, rule, inputs, kind)
    (B, L), W = state.tokens.shape, inputs.score.shape[1]
    s, position = state, torch.arange(L, device=state.tokens.device)
    if B == 0:
        return torch.zeros(B, W, dtype=torch.bool, device=position.device)
    mask_id, pred, confidence = inputs.mask_id, inputs.pred, inputs.confidence
    lane_start = s.block_start if inputs.lane_start is None else inputs.lane_start

    # 1. Who takes part, and as what.
    is_refresh = kind == "refresh"
    region_fits = (s.block_start >= lane_start) & (s.block_end - lane_start <= W)
    takes_part = inputs.query_len > 0
    prefills = takes_part & (s.phase == REFRESH) & (is_refresh and rule.cache == "commit")
    commits = takes_part & (s.phase == COMMIT) & (not is_refresh and rule.cache == "commit")
    phase_selects = s.phase == (REFRESH if is_refresh else DENOISE)
    phase_selects = phase_selects | ((s.phase == COMMIT) & (not is_refresh and rule.cache == "delayed"))
    selects = takes_part & region_fits & phase_selects & ~prefills
    takes_part = prefills | commits | selects

    # 2. What the lanes hold, and which are eligible. A lane outside the canvas looks at some position of the canvas,
    # and nothing is ever written there.
    lane = torch.arange(W, device=position.device) + lane_start[:, None]
    in_canvas = (lane >= 0) & (lane < s.canvas_len[:, None])
    in_region = (lane >= s.block_start[:, None]) & (lane < s.block_end[:, None])
    lane = lane.clamp(0, L - 1)
    held_token, held_step = s.tokens.gather(1, lane), s.unmask_step.gather(1, lane)
    masked = in_canvas & (held_token == mask_id)
    written = in_region & (held_step >= 0)
    eligible = in_region & (masked if inputs.allowed is None else masked & inputs.allowed)
    if rule.renoise:
        eligible = in_region

    # 3. Which rows fail: an unusable statistic, or a row that should have ended, ends it before anything is written.
    needed = eligible
    if rule.edit or rule.remask != "none":
        needed = needed | written
    if inputs.exits is not None:
        needed = needed | masked
    broken = stalled = torch.zeros_like(selects)
    if inputs.stat_error is not None:
        broken = selects & (needed & (inputs.stat_error != 0)).any(1)
    if inputs.max_steps is not None:
        stalled = selects & ~broken & (s.step >= inputs.max_steps)
    failed = broken | stalled
    selects = selects & ~failed

    # 4. What is written.
    changed = _chosen(state, rule, inputs, eligible, masked & in_region)
    if rule.edit:
        changed = changed | (written & (pred != held_token) & (inputs.score > inputs.edit_value[:, None]))
    exiting = torch.zeros_like(selects) if inputs.exits is None else inputs.exits
    changed = torch.where(exiting[:, None], in_region if rule.renoise else masked, changed) & selects[:, None]
    refilled = torch.zeros_like(changed)
    if rule.renoise:
        refilled = in_region & ~changed & (selects & ~exiting)[:, None]
        pred = torch.where(refilled, inputs.refill, pred)
    tokens = _to_canvas(s.tokens, lane_start, changed | refilled, pred)
    unmask_step = _to_canvas(s.unmask_step, lane_start, changed, s.step[:, None].expand(B, W))
    unmask_confidence = _to_canvas(s.unmask_confidence, lane_start, changed, confidence)

    # 5. What is masked again.
    if rule.remask != "none":
        remasked = _remasked(rule, inputs, changed & in_region, written, masked & in_region)
        remasked = remasked & (selects & ~exiting)[:, None]
        tokens = _to_canvas(tokens, lane_start, remasked, torch.full_like(pred, mask_id))
        unmask_step = _to_canvas(unmask_step, lane_start, remasked, torch.full_like(held_step, -1))
        unmask_confidence = _to_canvas(unmask_confidence, lane_start, remasked, torch.zeros_like(confidence))

    # 6. What a stop token fills: all that follows the first one becomes that token, but given tokens stay.
    if rule.stop == "fill":
        in_row = position < s.canvas_len[:, None]
        is_stop = in_row & (unmask_step >= 0) & is_in(tokens, inputs.stop_ids)
        first = torch.where(is_stop, position, L - 1).amin(1, keepdim=True)
        not_given = (tokens == mask_id) | (unmask_step >= 0)
        filled = in_row & not_given & (position > first) & is_stop.any(1, keepdim=True) & selects[:, None]
        filled_masks = filled & (tokens == mask_id)
        tokens = torch.where(filled, tokens.gather(1, first), tokens)
        unmask_step = torch.where(filled_masks, s.step[:, None], unmask_step)

    # 7. What the row needs next, and where its region then is.
    after = After(tokens, unmask_step, unmask_confidence, selects, prefills, commits, changed.any(1), exiting)
    advance = advance_pipeline if rule.pipeline else advance_block
    new = dict(
        tokens=tokens,
        unmask_step=unmask_step,
        unmask_confidence=unmask_confidence,
        step=s.step + selects,
        nfe=s.nfe + takes_part,
        query_tokens=s.query_tokens + torch.where(takes_part, inputs.query_len, 0),
        error=s.error | torch.where(broken, ERROR_LOGITS, 0) | torch.where(stalled, ERROR_STALLED, 0),
    )
    new |= advance(rule, s, after, inputs)
    new["phase"] = torch.where(takes_part, new["phase"], s.phase)
    new["phase"] = torch.where(failed, DONE, new["phase"])
    for name, field in new.items():
        getattr(state, name).copy_(field)
    return changed


def _chosen(state: RowState, rule: UnmaskRule, inputs: UnmaskInputs, eligible: Tensor, region_masks: Tensor) -> Tensor:
    """Lanes that the rule's test, its quota and its additions choose among the eligible ones, [B, W] bool."""
    kmin = quota(state.block_masks, state.block_step, inputs.steps) if rule.quota else inputs.min_unmask
    ordered = (inputs.score, inputs.value, kmin, inputs.rank, inputs.entropy)
    limits = dict(fallback=inputs.fallback, max_unmask=inputs.max_unmask, run_value=inputs.run_value)
    if not rule.pipeline:
        return select(rule, eligible, *ordered, **limits)
    B, W = eligible.shape
    lane, length = torch.arange(W, device=eligible.device), inputs.block_length.clamp(min=1)
    block_of = (lane // length[:, None]).clamp(max=W - 1).expand(B, W).contiguous()
    # What precedes the region is finished, so the region's first block is always active.
    masks_before = torch.nn.functional.pad(_count(block_of, region_masks), (1, 0))[:, :-1]
    active = (masks_before <= inputs.activate_masks[:, None]).gather(1, block_of) | (block_of == 0)
    return select_in_blocks(rule, eligible, *ordered, block_of=block_of, active=active, **limits)


def _remasked(rule: UnmaskRule, inputs: UnmaskInputs, chosen: Tensor, written: Tensor, masked: Tensor) -> Tensor:
    """Lanes that a step masks again, [B, W] bool, among the lanes given, which lie in the region.

    chosen: lanes that the step wrote. written, masked: before the step.
    """
    score, count, m = inputs.remask_score, inputs.remask_count, chosen.sum(1)
    if rule.remask == "lowest":
        return lowest(written | chosen, score, count)
    if rule.remask == "saber":
        n = inputs.min_unmask.clamp(min=0)
        m = torch.maximum(n, m)
        k = torch.minimum(torch.maximum(n // 2, (m + 7) // 8), m - 1)
        return lowest(written | chosen, score, torch.where((masked & ~chosen).any(1), k, 0))
    candidates = written & (score < inputs.remask_value[:, None])
    return lowest(candidates, score, torch.where(m > 1, count, 0))


def _to_canvas(canvas: Tensor, lane_start: Tensor, write: Tensor, values: Tensor) -> Tensor:
    """The canvas [B, L] with `values` [B, W] where lanes are to be written.

    Each position reads its lane, so that no two lanes write to one place.
    """
    W = write.shape[1]
    to_lane = torch.arange(canvas.shape[1], device=canvas.device) - lane_start[:, None]
    inside = (to_lane >= 0) & (to_lane < W)
    to_lane = to_lane.clamp(0, W - 1).long()
    return torch.where(write.gather(1, to_lane) & inside, values.gather(1, to_lane), canvas)


def _count(block_of: Tensor, flags: Tensor) -> Tensor:
    """[B, W] int32: the number of flags in each block."""
    return torch.zeros(block_of.shape, dtype=torch.int32, device=flags.device).scatter_add(1, block_of, flags.int())
