"""The window of a step: which positions it computes, which it looks at, and what they see. Fixed-shape tensor work on
the device; the host reads nothing."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dlm_kernels import RowState, Window
from dlm_kernels.reference.advance import first_masked
from dlm_kernels.reference.noise import uniform_scores
from dlm_kernels.rules import Kind
from dlm_kernels.state import COMMIT, DENOISE, REFRESH

from ..policies import Lanes, Sampling
from ..presets.caches import Canvas, Extent, Place
from .plan import Bucket, Plan


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step computes and looks at.

    Attributes:
        bucket: its shape.
        window: what the forward computes.
        lanes: what is looked at.
        takes_part: [B] bool rows of the window.
        selects: [B] bool rows of the window for which tokens are chosen.
    """

    bucket: Bucket
    window: Window
    lanes: Lanes
    takes_part: Tensor
    selects: Tensor


def step_of(plan: Plan, state: RowState, sampling: Sampling, bucket: Bucket) -> Step:
    """The step of a bucket from where every row stands."""
    window = window_of(plan, state, sampling, bucket)
    takes_part = window.q_len > 0
    lanes = lanes_of(plan, state, bucket.lanes)
    return Step(bucket, window, lanes, takes_part, takes_part & phase_selects(plan, state, bucket.kind))


def lanes_of(plan: Plan, state: RowState, count: int) -> Lanes:
    """The first `count` positions of every row's block, or of all its blocks where policies look at the whole row."""
    L = state.tokens.shape[1]
    start = plan.first if plan.whole_row else state.block_start
    position = start[:, None] + torch.arange(count, dtype=torch.int32, device=start.device)
    inside = position.clamp(0, L - 1).long()
    tokens, unmask_step = state.tokens.gather(1, inside), state.unmask_step.gather(1, inside)
    masked = (position < state.canvas_len[:, None]) & (tokens == plan.mask_id)
    in_region = (position >= state.block_start[:, None]) & (position < state.block_end[:, None])
    return Lanes(position, tokens, masked, in_region, in_region & masked, in_region & (unmask_step >= 0))


def phase_fits(state: RowState, kind: Kind) -> Tensor:
    """[B] bool rows whose phase a step of `kind` serves."""
    if kind == "refresh":
        return state.phase == REFRESH
    return (state.phase == DENOISE) | (state.phase == COMMIT)


def phase_selects(plan: Plan, state: RowState, kind: Kind) -> Tensor:
    """[B] bool rows for which a step of `kind` chooses tokens; those that it only prefills or commits are left out."""
    if kind == "refresh":
        return (state.phase == REFRESH) & (plan.prefill_rule is None)
    return (state.phase == DENOISE) | ((state.phase == COMMIT) & plan.cache.commit_selects)


def window_of(plan: Plan, state: RowState, sampling: Sampling, bucket: Bucket) -> Window:
    """The window that a step computes; rows that need another kind of step or a wider one sit it out."""
    # 1. Which positions: a range, or those that are flagged, in order.
    L, device = state.tokens.shape[1], state.tokens.device
    extent = extent_of(plan, state, bucket.kind)
    index = torch.arange(bucket.width, dtype=torch.int32, device=device)
    kept = None
    if plan.scattered:
        flags = flagged(plan, state, sampling, bucket.kind, extent)
        order = (~flags).to(torch.int8).sort(dim=1, stable=True).indices.int()
        q_len = flags.sum(1, dtype=torch.int32)
        q_pos = torch.nn.functional.pad(order, (0, max(0, bucket.width - L)))[:, : bucket.width]
        if plan.cache.reused is not None and bucket.kind == "denoise":
            kept = (~flags).contiguous()
    else:
        q_len = extent.stop - extent.begin
        q_pos = extent.begin[:, None] + index
    is_shadow = None
    if plan.shadow and bucket.kind == "denoise":
        # Behind the canvas, the block's positions once more.
        is_shadow = index >= q_len[:, None]
        q_pos = torch.where(is_shadow, state.block_start[:, None] + index - q_len[:, None], q_pos)
        q_len = q_len + state.block_end - state.block_start
    served = phase_fits(state, bucket.kind)
    fits = q_len <= bucket.width
    if plan.preset.pipeline:
        fits = fits & (state.block_end - state.block_start <= bucket.lanes)
    q_len = torch.where(served & fits, q_len, 0)
    # Dead positions of the bucket still index embeddings and RoPE, and so stay inside the canvas.
    q_pos = q_pos.clamp(0, max(L - 1, 0))

    # 2. What they see of each other.
    q_block, mode = visibility(plan, state, bucket.kind, q_pos)
    if is_shadow is not None:
        q_block, mode = torch.where(is_shadow, plan.shadow_block, q_block), "shadow"

    # 3. Where their keys go, and which cached keys they see.
    rows = torch.arange(state.tokens.shape[0], dtype=torch.int32, device=device)
    replaced = torch.zeros_like(rows)[:, None].expand(-1, 2) if extent.replaced is None else extent.replaced
    return Window(
        q_pos=q_pos.contiguous(),
        q_block=q_block.int().contiguous(),
        q_len=q_len.int(),
        kv_slot=torch.where(stored(plan, state, bucket.kind, q_pos, index < q_len[:, None]), q_pos, -1).int(),
        kv_len=torch.where(served, extent.cached, 0).int(),
        replaced=replaced.int().contiguous(),
        cache_row=rows,
        mode=mode,
        kept=kept,
    )


def extent_of(plan: Plan, state: RowState, kind: Kind) -> Extent:
    """What a step of `kind` computes of every row, and which cached slots it sees.

    The keys of an isolated prompt never change: with a cache, the row's first step computes them and no other one does.
    """
    floor = plan.first if plan.diffusion.prompt_isolated else torch.zeros_like(state.block_start)
    place = Place(
        start=state.block_start,
        end=state.block_end,
        length=state.canvas_len,
        floor=floor,
        before=int(plan.previous),
        block_causal=plan.block_causal,
        horizon=plan.preset.horizon,
        vicinity=plan.preset.vicinity,
        sub_block=_lone_sub_block(plan, state) if plan.preset.sub_block_cache else None,
        waiting=waiting_from(plan, state) if plan.defers and kind == "denoise" else None,
    )
    if kind == "denoise":
        return plan.cache.extent(place)
    begin = torch.where(state.step > 0, floor, 0)
    return Extent(begin, plan.cache.refresh.stop(place), begin)


def visibility(plan: Plan, state: RowState, kind: Kind, q_pos: Tensor) -> tuple[Tensor, str]:
    """The diffusion block of every window position [B, W], and the mode of the window."""
    if plan.block_causal and plan.diffusion.causal_prefix:
        # Blocks of one position see causally; a denoise step opens the block in work to itself.
        start = state.block_start[:, None]
        in_work = phase_selects(plan, state, kind)[:, None] & (q_pos >= start)
        return torch.where(in_work, start, q_pos), "block"
    if plan.block_causal:
        return block_of(plan, q_pos), "block"
    if plan.diffusion.prompt_isolated and (kind == "refresh" or not plan.cache.stores):
        # Denoise steps over a cache compute positions of the response only, which see everything.
        return (q_pos >= plan.first[:, None]).to(torch.int32), "block"
    return torch.zeros_like(q_pos), "full"


def stored(plan: Plan, state: RowState, kind: Kind, q_pos: Tensor, live: Tensor) -> Tensor:
    """[B, W] bool: the window positions whose keys are stored."""
    if not plan.cache.stores:
        return torch.zeros_like(live)
    if plan.cache.stored is None or kind == "refresh":
        return live
    return live & plan.cache.stored(canvas_of(plan, state), q_pos)


def flagged(plan: Plan, state: RowState, sampling: Sampling, kind: Kind, extent: Extent) -> Tensor:
    """[B, L] bool: the positions of the extent that a step computes, where they are no range."""
    B, L = state.tokens.shape
    preset = plan.preset
    position = torch.arange(L, dtype=torch.int32, device=state.tokens.device)
    in_canvas = (position >= extent.begin[:, None]) & (position < state.canvas_len[:, None])
    if plan.cache.reused is not None:
        return in_canvas if kind == "refresh" else in_canvas & ~plan.cache.reused(canvas_of(plan, state))
    flags = (position < extent.stop[:, None]) & in_canvas
    if kind == "refresh" and preset.horizon is not None:
        flags = in_canvas & (position < (state.block_end + preset.horizon)[:, None])
    if preset.scatter_suffix:
        distance = (position - state.block_end[:, None]).clamp(min=0).double()
        z = 4 * distance / max(1, preset.horizon - 1)
        keep = (1.6 * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)).clamp(max=1)
        counters = (x.expand(B, L) for x in (sampling.request[:, None], position, state.block_start[:, None]))
        noise = uniform_scores(sampling.seed, torch.stack(list(counters), -1).flatten(0, 1)).view(B, L)
        flags = flags & ((position < state.block_end[:, None]) | (noise < keep))
    if preset.keep_last:
        flags = flags | (position == state.canvas_len[:, None] - 1)
    return flags


def canvas_of(plan: Plan, state: RowState) -> Canvas:
    """What every row holds, as the functions of a cache need it."""
    return Canvas(state, plan.mask_id, plan.previous, plan.block_length)


def waiting_from(plan: Plan, state: RowState) -> Tensor:
    """[B] int32: the first position whose keys are not final in the cache.

    Those of a finished block are final once the next block's first step has computed them again.
    """
    position = torch.arange(state.tokens.shape[1], dtype=torch.int32, device=state.tokens.device)
    written = (state.unmask_step >= 0) & (position < state.block_start[:, None])
    last = torch.where(written, position, -1).amax(1)
    block = plan.first + (last - plan.first) // plan.block_length * plan.block_length
    return torch.where((last >= 0) & (state.block_step == 0), block, state.block_start)


def block_of(plan: Plan, position: Tensor) -> Tensor:
    """Diffusion block of positions [B, ...]: one irregular block before the first ("rel": the prompt); "abs" blocks
    count from 0; "both" blocks from one that ends with the first whole block of the prompt."""
    first = plan.first[:, None]
    if plan.diffusion.block_alignment == "abs":
        return 1 + torch.div(position - first % plan.block_length, plan.block_length, rounding_mode="floor")
    if plan.diffusion.block_alignment == "both":
        return 1 + torch.div(position + (-first) % plan.block_length, plan.block_length, rounding_mode="floor")
    return (1 + torch.div(position - first, plan.block_length, rounding_mode="floor")).clamp(min=0)


def sub_block(plan: Plan, state: RowState) -> tuple[Tensor, Tensor]:
    """[B] start and end of the leftmost sub-block with masks of every row's block (of the last one if there are
    none)."""
    length = plan.preset.sub_block_length
    masked = first_masked(state.tokens, state.block_start, state.block_end, plan.mask_id)
    masked = torch.maximum(torch.minimum(masked, state.block_end - 1), state.block_start)
    start = state.block_start + (masked - state.block_start) // length * length
    return start, torch.minimum(start + length, state.block_end)


def _lone_sub_block(plan: Plan, state: RowState) -> tuple[Tensor, Tensor, Tensor]:
    """Start and end of the sub-block, and [B] bool rows in which it is recomputed alone: those whose step before has
    written its first position."""
    start, end = sub_block(plan, state)
    token = state.tokens.gather(1, start.clamp(max=state.tokens.shape[1] - 1).long()[:, None])[:, 0]
    return start, end, (state.phase == DENOISE) & (state.block_step > 0) & (token != plan.mask_id)


def needs_of(plan: Plan, state: RowState, sampling: Sampling, drafting: Tensor) -> Tensor:
    """What every row needs next, [5, B] int32 on the device: its phase, the positions of a refresh step, those of a
    denoise step, the lanes of its region, and whether it has drafts to verify ([B] bool)."""

    def width(kind: Kind) -> Tensor:
        if kind == "refresh" and plan.cache.refresh is None:
            return torch.zeros_like(state.phase)
        extent = extent_of(plan, state, kind)
        if plan.scattered:
            return flagged(plan, state, sampling, kind, extent).sum(1)
        shadow = state.block_end - state.block_start if plan.shadow and kind == "denoise" else 0
        return extent.stop - extent.begin + shadow

    lanes = state.block_end - state.block_start
    return torch.stack([state.phase, width("refresh"), width("denoise"), lanes, drafting]).int()
