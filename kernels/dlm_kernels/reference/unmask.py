"""`unmask` in plain torch: which positions are written or masked again, and what the row does next.

This is the specification of the kernel and what runs on CPU. Every shape is fixed and no value is read by the host, so
it also runs under FakeTensorMode. A row's result depends on nothing but that row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks.unmask import Kind, check_arguments
from ..rules import UnmaskRule
from ..state import COMMIT, DENOISE, DONE, ERROR_LOGITS, ERROR_STALLED, REFRESH, RowState
from .advance import After, advance_block, advance_pipeline, is_in
from .select import lowest, quota, select, select_in_blocks


def unmask(
    state: RowState,
    rule: UnmaskRule,
    *,
    kind: Kind,
    query_len: Tensor,
    pred: Tensor,
    score: Tensor,
    confidence: Tensor,
    value: Tensor,
    min_unmask: Tensor,
    steps: Tensor,
    block_length: Tensor,
    mask_id: int,
    stop_ids: Tensor,
    lane_start: Tensor | None = None,
    rank: Tensor | None = None,
    entropy: Tensor | None = None,
    stat_error: Tensor | None = None,
    allowed: Tensor | None = None,
    fallback: Tensor | None = None,
    max_unmask: Tensor | None = None,
    run_value: Tensor | None = None,
    edit_value: Tensor | None = None,
    refill: Tensor | None = None,
    remask_score: Tensor | None = None,
    remask_count: Tensor | None = None,
    remask_value: Tensor | None = None,
    exits: Tensor | None = None,
    max_steps: Tensor | None = None,
    append_masks: Tensor | None = None,
    activate_masks: Tensor | None = None,
    delay: Tensor | None = None,
    seed: Tensor | None = None,
    seed_confidence: Tensor | None = None,
) -> Tensor:
    """Write the chosen predictions of every row's region and move every row to what it needs next, in place.

    Lane j of a row is position lane_start + j; the region is [block_start, block_end). A row takes part if query_len >
    0 and its phase is what this step is for; every other row is left exactly as it is, counters included:

        phase     kind       rule.cache                  what happens
        REFRESH      "refresh"     "commit"                    prefill: nothing is selected; DENOISE, or COMMIT if the block holds no mask
        REFRESH      "refresh"     all others but "none"       select and write (it is also denoise step 0 of the block or row)
        DENOISE   "denoise"   any                         select and write
        COMMIT    "denoise"   "commit"                    the very next block: DENOISE, or COMMIT again if it holds no mask
        COMMIT    "denoise"   "delayed"                   select and write; then the region's first block leaves it

    A selecting row, in this order:
        failed      a lane whose statistics are needed has stat_error != 0: ERROR_LOGITS, DONE, nothing is written. So is a row that
                    has taken max_steps: ERROR_STALLED. Needed are eligible lanes; with rule.edit or remask_score the
                    written lanes of the region, with `exits` every masked lane.
        chosen      `select` among the masked, allowed lanes of the region (rule.renoise: all its lanes); rule.edit adds edits
        exits       an exiting row writes every masked lane of its canvas instead, inside the region or not (renoise: every region lane)
        write       chosen lanes receive pred, the row's step and confidence; rule.renoise gives the others `refill`
        remask      rule.remask masks written lanes again; their unmask_step is -1 and their confidence 0
        fill        rule.stop "fill"
    and then, for blocks decoded one at a time,
        a written stop token ends the row (rule.stop)    -> DONE; given tokens never stop a row
        the block still holds masks, or was edited       -> DENOISE
        no mask after the block                          -> DONE
        otherwise                                        -> COMMIT ("commit"; the very next block if rule.edit), or on to the block of the
                                                            next mask: REFRESH ("refresh"), DENOISE ("none", "once").
                                                            Blocks lie at block_end + i * block_length.
    or, for a pipeline,
        a written stop token ends the row, or bars further blocks ("closed", "after_block", "appends": the canvas is cut
        at block_end) the region's leading blocks that held no mask before this step leave it ("delayed": the first one,
        on a COMMIT step)
        the last block holds at most append_masks masks  -> one more block is appended
        no mask left in the canvas                       -> DONE
        otherwise                                        -> DENOISE, or while the region's first block holds no mask, REFRESH
                                                            and then COMMIT ("delayed")

    Args:
        state: read and written in place. 2-D fields may have any row stride.
        kind: the kind of forward just run.
        query_len: [B] int32 positions of the row that the forward computed; 0 = the row sat it out.
        pred: [B, W] int64 token to write, never mask_id. A row whose region does not lie in its lanes sits out.
        score: [B, W] fp32, tested by rule.passes. NaN counts as -inf, here and in `rank`.
        confidence: [B, W] fp32, recorded where a token is written.
        value: [B] fp32 threshold, factor or entropy budget; for passes "threshold" also [B, W].
        min_unmask: [B] int32 positions to write at least, if not rule.quota; 0 forces none.
        steps: [B] int32 denoise steps of a block, if rule.quota; below 1 counts as 1.
        block_length: [B] int32 length of the blocks to come; below 1 counts as 1.
        mask_id: what a masked position holds.
        stop_ids: [K] int64, K from 0 to 16.
        lane_start: [B] int32 position of lane 0 (lanes before the canvas are nothing), None = block_start. A pipeline's
            is block_start.
        rank: [B, W] fp32, orders the positions; None = score.
        entropy: [B, W] fp32 nats, for passes "entropy".
        stat_error: [B, W] int32, not 0 = the statistics of the lane are unusable; None = all usable.
        allowed: [B, W] bool lanes that may be chosen; None = all.
        fallback: [B] int32 positions to write where fewer than min_unmask pass; None = min_unmask.
        max_unmask: [B] int32 positions chosen at most, the best ones; None = no limit.
        run_value: [B] fp32, for rule.runs. edit_value: [B] fp32, for rule.edit. refill: [B, W] int64, for rule.renoise.
        remask_score: [B, W] fp32, for rule.remask. remask_count: [B] int32, for "lowest" and "wino". remask_value: [B]
            fp32, for "wino".
        exits: [B] bool rows that write every mask now (early commit); None = none.
        max_steps: [B] int32 denoise steps that the row may take; None = no limit.
        append_masks, activate_masks: [B] int32, for pipelines: a block is appended once the last one holds at most so
            many masks; a block is fully activated once the one before it does. delay: [B] int32, for "delayed".
        seed: [B] int64, seed_confidence: [B] fp32, for rule.seed: the token of the position after a prefill or commit.
        All [B, W] may have any row stride; lanes that are not needed may hold anything.
    Returns:
        [B, W] bool: lanes written by this step (before any was masked again).
    Raises:
        TypeError: dtype.  ValueError: shape, device, last stride, K > 16, an argument that the rule needs or does not
        use, unknown kind, kind "refresh" without a cache.

    Low-confidence unmasking: LLaDA, arXiv:2502.09992; the other rules: `UnmaskRule`.
    """
    optional = dict(
        lane_start=lane_start, fallback=fallback, max_unmask=max_unmask, run_value=run_value, edit_value=edit_value,
        remask_count=remask_count, remask_value=remask_value, exits=exits, max_steps=max_steps, append_masks=append_masks,
        activate_masks=activate_masks, delay=delay, seed=seed, seed_confidence=seed_confidence,
    )  # fmt: skip
    check_arguments(
        state, rule, kind, mask_id, stop_ids,
        rows=dict(query_len=query_len, value=value, min_unmask=min_unmask, steps=steps, block_length=block_length, **optional),
        lanes=dict(pred=pred, score=score, confidence=confidence, rank=rank, entropy=entropy, stat_error=stat_error,
                   allowed=allowed, refill=refill, remask_score=remask_score),
    )  # fmt: skip
    (B, L), W = state.tokens.shape, score.shape[1]
    s, position = state, torch.arange(L, device=state.tokens.device)
    if B == 0:
        return torch.zeros(B, W, dtype=torch.bool, device=position.device)
    lane_start = s.block_start if lane_start is None else lane_start
    length = block_length.clamp(min=1)

    # Who takes part, and as what.
    wide = kind == "refresh"
    fits = (s.block_start >= lane_start) & (s.block_end - lane_start <= W)
    takes_part = query_len > 0
    prefills = takes_part & (s.phase == REFRESH) & (wide and rule.cache == "commit")
    commits = takes_part & (s.phase == COMMIT) & (not wide and rule.cache == "commit")
    own_phase = (s.phase == (REFRESH if wide else DENOISE)) | (
        (s.phase == COMMIT) & (not wide and rule.cache == "delayed")
    )
    selects = takes_part & fits & own_phase & ~prefills
    takes_part = prefills | commits | selects

    # The row, lane by lane. Lanes past the canvas look at some position of it, and nothing is ever written there.
    lane = torch.arange(W, device=position.device) + lane_start[:, None]
    in_canvas = (lane >= 0) & (lane < s.canvas_len[:, None])
    in_region = (lane >= s.block_start[:, None]) & (lane < s.block_end[:, None])
    lane = lane.clamp(0, L - 1)
    held, held_step = s.tokens.gather(1, lane), s.unmask_step.gather(1, lane)
    masked = in_canvas & (held == mask_id)
    written = in_region & (held_step >= 0)
    eligible = in_region & (masked if allowed is None else masked & allowed)
    if rule.renoise:
        eligible = in_region

    # An unusable statistic, or a row that should have ended, ends it before anything is written.
    needed = eligible
    if rule.edit or remask_score is not None:
        needed = needed | written
    if exits is not None:
        needed = needed | masked
    broken = torch.zeros_like(selects) if stat_error is None else selects & (needed & (stat_error != 0)).any(1)
    stalled = torch.zeros_like(selects) if max_steps is None else selects & ~broken & (s.step >= max_steps)
    failed = broken | stalled
    selects = selects & ~failed

    # What is written.
    kmin = quota(s.block_masks, s.block_step, steps) if rule.quota else min_unmask
    more = dict(fallback=fallback, max_unmask=max_unmask, run_value=run_value)
    if rule.pipeline:
        block_of = (
            (torch.arange(W, device=position.device) // length[:, None]).clamp(max=W - 1).expand(B, W).contiguous()
        )
        masks_of = _count(block_of, masked & in_region)
        before = torch.nn.functional.pad(masks_of, (1, 0))[:, :-1]  # what precedes the region is finished
        active = (before <= activate_masks[:, None]).gather(1, block_of) | (block_of == 0)
        chosen = select_in_blocks(
            rule, eligible, score, value, kmin, rank, entropy, block_of=block_of, active=active, **more
        )
    else:
        chosen = select(rule, eligible, score, value, kmin, rank, entropy, **more)
    changed = chosen
    if rule.edit:
        changed = changed | (written & (pred != held) & (score > edit_value[:, None]))
    exiting = torch.zeros_like(selects) if exits is None else exits
    changed = torch.where(exiting[:, None], in_region if rule.renoise else masked, changed) & selects[:, None]
    overwritten = in_region & ~changed & (selects & ~exiting)[:, None] if rule.renoise else torch.zeros_like(changed)
    pred = torch.where(overwritten, refill, pred) if rule.renoise else pred

    tokens = _to_canvas(s.tokens, lane_start, changed | overwritten, pred)
    unmask_step = _to_canvas(s.unmask_step, lane_start, changed, s.step[:, None].expand(B, W))
    unmask_confidence = _to_canvas(s.unmask_confidence, lane_start, changed, confidence)

    # What is masked again.
    if rule.remask != "none":
        again = _remasked(
            rule, changed, written, in_region, masked & in_region, min_unmask, remask_score, remask_count, remask_value
        )
        again = again & (selects & ~exiting)[:, None]
        tokens = _to_canvas(tokens, lane_start, again, torch.full_like(pred, mask_id))
        unmask_step = _to_canvas(unmask_step, lane_start, again, torch.full_like(held_step, -1))
        unmask_confidence = _to_canvas(unmask_confidence, lane_start, again, torch.zeros_like(confidence))

    in_row = position < s.canvas_len[:, None]
    if rule.stop == "fill":
        # What follows the first stop token becomes it; given tokens stay.
        is_stop = in_row & (unmask_step >= 0) & is_in(tokens, stop_ids)
        first = torch.where(is_stop, position, L - 1).amin(1, keepdim=True)
        own = (tokens == mask_id) | (unmask_step >= 0)
        filled = in_row & own & (position > first) & is_stop.any(1, keepdim=True) & selects[:, None]
        fresh = filled & (tokens == mask_id)
        tokens = torch.where(filled, tokens.gather(1, first), tokens)
        unmask_step = torch.where(fresh, s.step[:, None], unmask_step)

    # What the row needs next, and where its region then is.
    after = After(tokens, unmask_step, selects, prefills, commits, changed.any(1), exiting)
    if rule.pipeline:
        settled = advance_pipeline(rule, s, after, length, mask_id, stop_ids, append_masks, delay)
    else:
        settled = advance_block(rule, s, after, length, mask_id, stop_ids, seed)
    if rule.seed:
        seeded = settled.pop("seeded")
        settled["unmask_confidence"] = torch.where(seeded, seed_confidence[:, None], unmask_confidence)
    settled["phase"] = torch.where(takes_part, settled["phase"], s.phase)
    settled["phase"] = torch.where(failed, DONE, settled["phase"])

    new = dict(
        tokens=tokens,
        unmask_step=unmask_step,
        unmask_confidence=unmask_confidence,
        step=s.step + selects,
        nfe=s.nfe + takes_part,
        query_tokens=s.query_tokens + torch.where(takes_part, query_len, 0),
        error=s.error | torch.where(broken, ERROR_LOGITS, 0) | torch.where(stalled, ERROR_STALLED, 0),
    )
    for name, field in (new | settled).items():
        getattr(state, name).copy_(field)
    return changed


def _remasked(
    rule: UnmaskRule,
    chosen: Tensor,
    written: Tensor,
    in_region: Tensor,
    masked: Tensor,
    min_unmask: Tensor,
    score: Tensor,
    count: Tensor | None,
    value: Tensor | None,
) -> Tensor:
    """Lanes that a step masks again, [B, W] bool."""
    chosen = chosen & in_region
    m = chosen.sum(1)
    if rule.remask == "lowest":
        return lowest(written | chosen, score, count)
    if rule.remask == "saber":
        n = min_unmask.clamp(min=0)
        m = torch.maximum(n, m)
        k = torch.minimum(torch.maximum(n // 2, (m + 7) // 8), m - 1)
        return lowest(written | chosen, score, torch.where((masked & ~chosen).any(1), k, 0))
    bad = written & (score < value[:, None])
    return lowest(bad, score, torch.where(m > 1, count, 0))


def _to_canvas(canvas: Tensor, lane_start: Tensor, write: Tensor, values: Tensor) -> Tensor:
    """The canvas [B, L] with `values` [B, W] where lanes are to be written. Read by position, so that no two lanes
    write to one place."""
    W = write.shape[1]
    to_lane = torch.arange(canvas.shape[1], device=canvas.device) - lane_start[:, None]
    inside = (to_lane >= 0) & (to_lane < W)
    to_lane = to_lane.clamp(0, W - 1).long()
    return torch.where(write.gather(1, to_lane) & inside, values.gather(1, to_lane), canvas)


def _count(block_of: Tensor, flags: Tensor) -> Tensor:
    """[B, W] int32: flags counted by block."""
    return torch.zeros(block_of.shape, dtype=torch.int32, device=flags.device).scatter_add(1, block_of, flags.int())
