"""`unmask` in plain torch: which masked positions are written, and what the row does next.

This is the specification of the kernel and what runs on CPU. Every shape is fixed and no value is read by the host, so it also runs
under FakeTensorMode. A row's result depends on nothing but that row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..rules import ENTROPY_SCALE, UnmaskRule
from ..state import COMMIT, DENOISE, DONE, ERROR_LOGITS, ROW_FIELDS, WIDE, RowState

Kind = Literal["wide", "window"]
KINDS: tuple[Kind, ...] = ("wide", "window")
MAX_STOP_IDS = 16

# Fixed-point entropies saturate, so that NaN and inf have a meaning and no sum over a block can overflow int64: 2^48 is 2^24 nats, and
# 2^14 positions of it still fit an infinite budget.
FIXED_ENTROPY_MAX = 1 << 48
FIXED_BUDGET_MAX = 1 << 62


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
    rank: Tensor | None = None,
    entropy: Tensor | None = None,
    stat_error: Tensor | None = None,
) -> None:
    """Write the chosen predictions of every row's current block and move every row to what it needs next, in place.

    Lane j of a row is position block_start + j. A row takes part if query_len > 0 and its phase is what this step is for; every other
    row is left exactly as it is, counters included:

        phase     kind       rule.cache    what happens
        WIDE      "wide"     "commit"      prefill: nothing is selected; DENOISE, or COMMIT if the block holds no mask
        WIDE      "wide"     "refresh"     select and write (it is also denoise step 0 of the block)
        DENOISE   "window"   any           select and write
        COMMIT    "window"   "commit"      the very next block: DENOISE, or COMMIT again if it holds no mask

    Select and write: `select` chooses among the masked positions of the block; they receive pred, the row's step and confidence.
        an eligible lane with stat_error != 0            -> nothing is written, ERROR_LOGITS, DONE
        a written stop token ends the row (rule.stop)    -> DONE; given tokens never stop a row
        the block still holds masks                      -> DENOISE
        no mask after the block                          -> DONE
        otherwise                                        -> COMMIT ("commit"), or on to the block of the next mask: WIDE ("refresh"),
                                                            DENOISE ("none"). Blocks lie at block_end + i * block_length.

    Args:
        state: read and written in place. 2-D fields may have any row stride.
        kind: the kind of forward just run.
        query_len: [B] int32 positions of the row that the forward computed; 0 = the row sat it out.
        pred: [B, W] int64 token to write, never mask_id. W >= the longest block; a row whose block is longer than W sits out.
        score: [B, W] fp32, tested by rule.passes. NaN counts as -inf, here and in `rank`.
        confidence: [B, W] fp32, recorded where a token is written.
        value: [B] fp32 threshold, factor or entropy budget.
        min_unmask: [B] int32 positions to write at least, if not rule.quota; 0 forces none.
        steps: [B] int32 denoise steps of a block, if rule.quota; below 1 counts as 1.
        block_length: [B] int32 length of the blocks to come; below 1 counts as 1.
        mask_id: what a masked position holds.
        stop_ids: [K] int64, K from 0 to 16.
        rank: [B, W] fp32, orders the positions; None = score.
        entropy: [B, W] fp32 nats, for passes="entropy".
        stat_error: [B, W] int32, not 0 = the statistics of the lane are unusable; None = all usable.
        All [B, W] may have any row stride; lanes that are not masked positions of a block may hold anything.
    Raises:
        TypeError: dtype.  ValueError: shape, device, last stride, K > 16, missing entropy, unknown kind, kind "wide" without a cache.

    Low-confidence unmasking: LLaDA, arXiv:2502.09992; the other rules: `UnmaskRule`.
    """
    check_arguments(
        state, rule, kind, mask_id, stop_ids,
        rows=dict(query_len=query_len, value=value, min_unmask=min_unmask, steps=steps, block_length=block_length),
        lanes=dict(pred=pred, score=score, confidence=confidence, rank=rank, entropy=entropy, stat_error=stat_error),
    )  # fmt: skip
    (B, L), W = state.tokens.shape, score.shape[1]
    if B == 0:
        return
    s, position = state, torch.arange(L, device=state.tokens.device)

    # Who takes part, and as what.
    selects = s.phase == (WIDE if kind == "wide" else DENOISE)
    prefills = selects if kind == "wide" and rule.cache == "commit" else torch.zeros_like(selects)
    commits = (s.phase == COMMIT) & (kind == "window" and rule.cache == "commit")
    selects = selects & ~prefills & (s.block_end - s.block_start <= W)
    prefills, commits, selects = (rows & (query_len > 0) for rows in (prefills, commits, selects))
    takes_part = prefills | commits | selects

    # The block of every row, lane by lane. Lanes past the block look at some position of the canvas, and are never eligible.
    lane = torch.arange(W, device=position.device) + s.block_start[:, None]
    in_block = lane < s.block_end[:, None]
    lane = lane.clamp(0, L - 1)
    eligible = in_block & (s.tokens.gather(1, lane) == mask_id)

    # An unusable statistic ends the row before anything is written.
    failed = torch.zeros_like(selects) if stat_error is None else selects & (eligible & (stat_error != 0)).any(1)
    selects = selects & ~failed
    kmin = quota(s.block_masks, s.block_step, steps) if rule.quota else min_unmask
    chosen = select(rule, eligible, score, value, kmin, rank, entropy) & selects[:, None]

    # Write: lanes to canvas, so that no two lanes can write to one position.
    to_lane = position - s.block_start[:, None]
    inside = (to_lane >= 0) & (to_lane < W)
    to_lane = to_lane.clamp(0, W - 1)
    write = chosen.gather(1, to_lane) & inside
    tokens = torch.where(write, pred.gather(1, to_lane), s.tokens)
    unmask_step = torch.where(write, s.step[:, None], s.unmask_step)
    unmask_confidence = torch.where(write, confidence.gather(1, to_lane), s.unmask_confidence)

    # Is the block finished, and did a token that we wrote stop the row?
    block_tokens, written = tokens.gather(1, lane), unmask_step.gather(1, lane) >= 0
    masked = in_block & (block_tokens == mask_id)
    stop = in_block & written & (block_tokens[:, :, None] == stop_ids).any(2)
    finished = selects & ~masked.any(1)
    if rule.stop == "closed":
        stopped = selects & (stop & (masked.cumsum(1) == 0)).any(1)
    else:
        stopped = finished & stop.any(1) & (rule.stop == "after_block")

    # What the row needs next, and where its block then is.
    next_mask = first_masked(tokens, s.block_end, s.canvas_len, mask_id)
    exhausted = torch.where(commits, s.block_end, next_mask) >= s.canvas_len
    done = failed | stopped | ((finished | commits) & exhausted)
    leaves = finished & ~done
    to_commit = leaves & (rule.cache == "commit")
    advances = (leaves & ~to_commit) | (commits & ~done)

    length = block_length.clamp(min=1)
    skipped = torch.where(commits, 0, (next_mask - s.block_end) // length)
    start = torch.where(advances, s.block_end + skipped * length, s.block_start)
    end = torch.where(advances, torch.minimum(start + length, s.canvas_len), s.block_end)
    masks = torch.where(advances, count_masked(tokens, start, end, mask_id), s.block_masks)

    phase = torch.where(takes_part, DENOISE, s.phase)
    phase = torch.where(advances & (rule.cache == "refresh"), WIDE, phase)
    phase = torch.where(to_commit | ((prefills | commits) & (masks == 0)), COMMIT, phase)
    phase = torch.where(done, DONE, phase)

    new = dict(
        tokens=tokens,
        unmask_step=unmask_step,
        unmask_confidence=unmask_confidence,
        block_start=start,
        block_end=end,
        block_masks=masks,
        block_step=torch.where(advances, 0, s.block_step + selects),
        step=s.step + selects,
        phase=phase,
        nfe=s.nfe + takes_part,
        query_tokens=s.query_tokens + torch.where(takes_part, query_len, 0),
        error=torch.where(failed, s.error | ERROR_LOGITS, s.error),
    )
    for name, field in new.items():
        getattr(state, name).copy_(field)


def select(
    rule: UnmaskRule,
    eligible: Tensor,
    score: Tensor,
    value: Tensor,
    kmin: Tensor,
    rank: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Tensor:
    """Which eligible lanes to write, [B, W] bool: all that pass, or the kmin best if fewer pass (at most the eligible ones).

    Best means rank descending, then the lowest lane; -0.0 ties with 0.0, NaN is -inf. `factor` is fp32 with IEEE division. Entropies and
    their budget are rounded down to 1 / ENTROPY_SCALE nat and summed as integers; an entropy below 0 (rounding) counts as 0, a NaN one
    as infinite, and nothing passes a NaN budget.

    Args:
        eligible: [B, W] bool; score, rank, entropy: [B, W] fp32; value: [B] fp32; kmin: [B] int32.
    """
    order = rank_order(eligible, score if rank is None else rank)
    n = eligible.sum(1, keepdim=True)
    r = torch.arange(1, eligible.shape[1] + 1, device=eligible.device)
    kmin, value = torch.minimum(kmin[:, None], n), value[:, None]
    score = torch.where(score.isnan(), -torch.inf, score).gather(1, order)

    if rule.passes == "none":
        passes = torch.zeros_like(eligible)
    elif rule.passes == "threshold":
        passes = (score >= value) if rule.inclusive else (score > value)
    elif rule.passes == "factor":
        passes = score >= 1 - value / (r + 1).to(score.dtype)
    else:
        used = to_fixed(entropy, 0, FIXED_ENTROPY_MAX, nan=FIXED_ENTROPY_MAX).gather(1, order)
        used = torch.where(r <= n, used, 0)
        budget = to_fixed(value, -FIXED_BUDGET_MAX, FIXED_BUDGET_MAX, nan=-FIXED_BUDGET_MAX)
        total = used.cumsum(1)
        passes = (total < budget) if rule.inclusive else (total - used <= budget)
    passes = passes & (r <= n)
    if rule.passes in ("factor", "entropy"):
        passes = (~passes).cumsum(1) == 0  # a prefix: it stops at the first failure

    enough = passes.sum(1, keepdim=True) >= kmin
    chosen = torch.where(enough, passes, r <= kmin)
    return torch.zeros_like(eligible).scatter(1, order, chosen)


def rank_order(eligible: Tensor, rank: Tensor) -> Tensor:
    """Lanes of every row, best first: eligible before the rest, then rank descending (NaN = -inf), then the lowest lane. [B, W] int64"""
    rank = torch.where(rank.isnan(), -torch.inf, rank)
    by_rank = rank.sort(dim=1, descending=True, stable=True).indices
    by_eligible = eligible.gather(1, by_rank).to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    return by_rank.gather(1, by_eligible)


def quota(block_masks: Tensor, block_step: Tensor, steps: Tensor) -> Tensor:
    """LLaDA's schedule (its num_transfer_tokens): m0 // S + (i < m0 % S) positions at block step i, at least 1. [B] int32"""
    steps = steps.clamp(min=1)
    return (block_masks // steps + (block_step < block_masks % steps)).clamp(min=1).to(torch.int32)


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


def to_fixed(x: Tensor, low: int, high: int, nan: int) -> Tensor:
    """floor(x * ENTROPY_SCALE) as int64, at least `low` and at most `high`; NaN gives `nan`."""
    scaled = (x * ENTROPY_SCALE).floor().nan_to_num(nan=nan, posinf=high, neginf=low)
    return scaled.clamp(low, high).to(torch.int64)


def check_arguments(
    state: RowState,
    rule: UnmaskRule,
    kind: Kind,
    mask_id: int,
    stop_ids: Tensor,
    *,
    rows: dict[str, Tensor],
    lanes: dict[str, Tensor | None],
) -> None:
    """Raise unless dtypes, shapes, devices and strides are what `unmask` needs. Reads no element; shared with the kernel's launcher."""
    if kind not in KINDS:
        raise ValueError(f"unmask: kind must be one of {', '.join(KINDS)}, got kind={kind!r}")
    if kind == "wide" and rule.cache == "none":
        raise ValueError("unmask: kind 'wide' needs rule.cache 'commit' or 'refresh' (no row could take part), got rule.cache='none'")
    if isinstance(mask_id, bool) or not isinstance(mask_id, int):
        raise TypeError(f"unmask: mask_id must be an int, got {type(mask_id).__name__}")
    if not 0 <= mask_id < 2**31:
        raise ValueError(f"unmask: mask_id must be in [0, 2^31), got mask_id={mask_id}")
    if rule.passes == "entropy" and lanes["entropy"] is None:
        raise ValueError("unmask: entropy must be given for rule.passes 'entropy', got entropy=None")
    for name, tensor in (("tokens", state.tokens), ("score", lanes["score"])):
        if tensor.dim() != 2 or tensor.shape[1] < 1:
            raise ValueError(f"unmask: {name} must be 2-D and at least one position wide, got shape {tuple(tensor.shape)}")
    if stop_ids.dim() != 1 or stop_ids.shape[0] > MAX_STOP_IDS:
        raise ValueError(f"unmask: stop_ids must be [K] with K <= {MAX_STOP_IDS}, got shape {tuple(stop_ids.shape)}")

    (B, L), W, int32 = state.tokens.shape, lanes["score"].shape[1], torch.int32
    expected = {"tokens": (torch.int64, (B, L)), "unmask_step": (int32, (B, L)), "unmask_confidence": (torch.float32, (B, L))}
    expected |= {name: (int32, (B,)) for name in (*ROW_FIELDS, *rows)} | {"value": (torch.float32, (B,))}
    expected |= {name: (torch.float32, (B, W)) for name in lanes}
    expected |= {"pred": (torch.int64, (B, W)), "stat_error": (int32, (B, W)), "stop_ids": (torch.int64, tuple(stop_ids.shape))}
    given = {**vars(state), **rows, **lanes, "stop_ids": stop_ids}
    for name, (dtype, shape) in expected.items():
        tensor = given[name]
        if tensor is None and name in ("rank", "entropy", "stat_error"):
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"unmask: {name} must be {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"unmask: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != state.tokens.device:
            raise ValueError(f"unmask: {name} must be on {state.tokens.device} like tokens, got {tensor.device}")
        if shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"unmask: the last dimension of {name} must have stride 1, got strides {tensor.stride()}")
