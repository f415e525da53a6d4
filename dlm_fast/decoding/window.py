"""The window of a step: which positions it computes, which it looks at, and what they see. Fixed-shape tensor work on
the device; the host reads nothing."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dlm_kernels import RowState, Window
from dlm_kernels.reference.advance import first_masked
from dlm_kernels.rules import Kind
from dlm_kernels.state import COMMIT, DENOISE, REFRESH

from ..policies import Lanes, Sampling
from ..presets.caches import Canvas, Extent, Place
from .plan import Bucket, Plan


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a window has the positions of the canvas.

    Attributes:
        position: [B, W] int32 of a range: its positions, also those behind the canvas; None of other windows.
        place: [B, W] int64: `Window.q_pos` for indexing; None where the window is the canvas from its first position
            on, a part of it, or with a shadow behind it.
        computed: [B, L] bool of a scattered window: the positions that it computes; None of a range.
        order: [B, L] int64 of a scattered window: the place of every position that it computes; None of a range, whose
            places are counted from `Window.q_pos[:, 0]`.
        at_block: whether the range begins with the block.
        leaves_lanes_out: whether the window may be a part of the block.
        unbroken: [B] int32 of a range: positions that follow each other without a gap.
        is_shadow: [B, W] bool: the places of a shadow of the block; None without shadows.
        selects: [B] bool rows in a phase for which tokens are chosen; None = no row is.
        serves: [B] bool rows in a phase that the step serves.
        takes_part: [B] bool rows of those that fit the bucket: of each, a window computes a position at least.
    """

    position: Tensor | None
    place: Tensor | None
    computed: Tensor | None
    order: Tensor | None
    at_block: bool
    leaves_lanes_out: bool
    unbroken: Tensor
    is_shadow: Tensor | None
    selects: Tensor | None
    serves: Tensor
    takes_part: Tensor


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step computes and looks at.

    Attributes:
        bucket: its shape.
        window: what the forward computes.
        layout: where the window has a position.
        input_ids: [B, W] int64 tokens of the window.
        lanes: what is looked at.
        takes_part: [B] bool rows of the window.
        selects: [B] bool rows of the window for which tokens are chosen.
        lanes_first: whether lane j is the window's j-th position, for every lane.
    """

    bucket: Bucket
    window: Window
    layout: Layout
    input_ids: Tensor
    lanes: Lanes
    takes_part: Tensor
    selects: Tensor
    lanes_first: bool


def step_of(plan: Plan, state: RowState, sampling: Sampling, bucket: Bucket) -> Step:
    """The step of a bucket from where every row stands."""
    window, layout = window_of(plan, state, sampling, bucket)
    input_ids = input_ids_of(layout, state.tokens, bucket.width, plan.mask_id)
    takes_part = selects = layout.takes_part
    if layout.selects is None:
        selects = plan.constants.zeros(takes_part.shape[0], dtype=torch.bool)
    elif layout.selects is not layout.serves:
        selects = takes_part & layout.selects
    lanes_first = layout.at_block and not plan.whole_row and bucket.lanes <= bucket.width
    return Step(
        bucket=bucket,
        window=window,
        layout=layout,
        input_ids=input_ids,
        lanes=lanes_of(plan, state, bucket.lanes, (layout, input_ids) if lanes_first else None),
        takes_part=takes_part,
        selects=selects,
        lanes_first=lanes_first,
    )


def input_ids_of(layout: Layout, canvases: Tensor, width: int, mask_id: int) -> Tensor:
    """Tokens [B, W] of a window on canvases [B, L]; of a shadow the mask."""
    if layout.is_shadow is not None:
        tokens = torch.nn.functional.pad(canvases, (0, width - canvases.shape[1]))
        return tokens.masked_fill_(layout.is_shadow, mask_id)
    return canvases[:, :width].contiguous() if layout.place is None else canvases.gather(1, layout.place)


def lanes_of(plan: Plan, state: RowState, count: int, window: tuple[Layout, Tensor] | None = None) -> Lanes:
    """The first `count` positions of every row's block, or of all its blocks where policies look at the whole row.

    `window` is the layout of the step's window and its tokens, if these begin with the lanes.
    """
    if window is not None:
        layout, tokens = window
        position, place, tokens = (x[:, :count] for x in (layout.position, layout.place, tokens))
    else:
        start = (plan.first if plan.whole_row else state.block_start)[:, None]
        position = start + plan.constants.places(count)
        place = (start + plan.constants.counted(count)).clamp(max=state.tokens.shape[1] - 1)
        tokens = state.tokens.gather(1, place)
    holds_mask = tokens == plan.mask_id
    in_region = position < state.block_end[:, None]
    if plan.whole_row:
        in_region = in_region & (position >= state.block_start[:, None])
    fields = plan.preset.lane_fields
    masked = written = None
    if "masked" in fields:
        masked = holds_mask & (position < state.canvas_len[:, None])
    if "written" in fields:
        written = in_region & (state.unmask_step.gather(1, place) >= 0)
    return Lanes(position, place, tokens, in_region, in_region & holds_mask, masked, written)


def phases(plan: Plan, state: RowState, kind: Kind) -> tuple[Tensor | None, Tensor]:
    """[B] bool rows for which a step of `kind` may choose tokens, by their phase (None: none), and all that it serves;
    those that it serves and chooses nothing for it prefills or commits."""
    if kind == "refresh":
        served = state.phase == REFRESH
        return served if plan.prefill_rule is None else None, served
    denoises = state.phase == DENOISE
    if not plan.cache.commits:
        return denoises, denoises
    served = denoises | (state.phase == COMMIT)
    return served if plan.cache.commit_selects else denoises, served


def window_of(plan: Plan, state: RowState, sampling: Sampling, bucket: Bucket) -> tuple[Window, Layout]:
    """The window that a step computes, and where it has a position; rows that need another kind of step or a wider one
    sit it out."""
    # 1. Which positions: a range, or those that are flagged, in order.
    (B, L), W, constants = state.tokens.shape, bucket.width, plan.constants
    extent = extent_of(plan, state, bucket.kind)
    index = constants.places(W)
    position = place = flags = order = kept = is_shadow = None
    # A refresh of what is reused later is of the whole extent, and the canvas's last position is added to a range.
    refreshes_reused = plan.cache.reused is not None and bucket.kind == "refresh"
    adds_last = plan.preset.keep_last and not plan.preset.scatter_suffix
    scattered = plan.scattered and not (refreshes_reused or adds_last)
    unbroken = None
    if scattered:
        flags = flagged(plan, state, sampling, bucket.kind, extent)
        count = flags.cumsum(1)
        q_len, order = count[:, -1], count - 1
        # Positions that are not computed meet in a column behind the others.
        column = torch.where(flags, order, constants.counted(1, L))
        found = constants.zeros(B, L + 1, dtype=torch.int64).scatter(1, column, constants.counted(L).expand(B, L))
        place = found[:, :W]
        q_pos = place.int()
        if plan.cache.reused is not None:
            kept = ~flags
    elif plan.shadow and bucket.kind == "denoise":
        # The canvas, and behind it the block's positions once more.
        is_shadow, shift = index >= state.canvas_len[:, None], state.block_start - state.canvas_len
        q_pos, q_len = (index + is_shadow * shift[:, None]).clamp(max=L - 1), state.block_end - shift
    elif extent.begins == "canvas" and not adds_last:
        q_len, q_pos = extent.stop, index.expand(B, W).contiguous()
    else:
        q_len = stop = stop_of(plan, state, bucket.kind, extent)
        q_pos = index
        if extent.begins != "canvas":
            q_len = stop - extent.begin
            q_pos = position = extent.begin[:, None] + index
        if adds_last:
            q_pos = torch.where(index < q_len[:, None], q_pos, state.canvas_len[:, None] - 1)
            unbroken, q_len = q_len, q_len + (stop < state.canvas_len)
        # Dead positions of the bucket still index embeddings and RoPE, and so stay inside the canvas.
        q_pos = q_pos.clamp(max=L - 1)
        place = q_pos.long()
    selects, serves = phases(plan, state, bucket.kind)
    served = serves
    if W < plan.bucket(bucket.kind).width:
        served = served & (q_len <= W)
    if plan.preset.pipeline and bucket.lanes < plan.lanes:
        served = served & (state.block_end - state.block_start <= bucket.lanes)
    q_len = torch.mul(q_len, served, out=torch.empty_like(state.phase))

    # 2. What they see of each other.
    q_block, mode = visibility(plan, state, bucket.kind, extent, q_pos, selects)
    if is_shadow is not None:
        q_block, mode = q_block.masked_fill(is_shadow, plan.shadow_block), "shadow"

    # 3. Where their keys go, and which cached keys they see.
    kv_slot, kv_len = constants.nothing(B, W), constants.zeros(B)
    if plan.cache.stores:
        stored = index < q_len[:, None]
        if plan.cache.stored is not None and bucket.kind == "denoise":
            stored = stored & plan.cache.stored(canvas_of(plan, state), q_pos)
        kv_slot, kv_len = torch.where(stored, q_pos, constants.nothing(1)), extent.cached * served
    window = Window(
        q_pos=q_pos,
        q_block=q_block,
        q_len=q_len,
        kv_slot=kv_slot,
        kv_len=kv_len,
        replaced=constants.zeros(B, 2) if extent.replaced is None else extent.replaced,
        cache_row=constants.places(B),
        mode=mode,
        kept=kept,
    )
    return window, Layout(
        position=position,
        place=place,
        computed=flags,
        order=order,
        at_block=extent.begins == "block" and not scattered,
        leaves_lanes_out=plan.preset.sub_block_cache,
        unbroken=window.q_len if unbroken is None or not plan.previous else unbroken * served,
        is_shadow=is_shadow,
        selects=selects,
        serves=serves,
        takes_part=served,
    )


def extent_of(plan: Plan, state: RowState, kind: Kind) -> Extent:
    """What a step of `kind` computes of every row, and which cached slots it sees.

    The keys of an isolated prompt never change: with a cache, the row's first step computes them and no other one does.
    """
    zero = plan.constants.zeros(state.block_start.shape[0])
    floor = plan.first if plan.diffusion.prompt_isolated else zero
    place = Place(
        start=state.block_start,
        end=state.block_end,
        length=state.canvas_len,
        zero=zero,
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
    if plan.prefilled is not None:
        return Extent(plan.prefilled, plan.cache.refresh.stop(place), plan.prefilled)
    if floor is zero:
        return Extent(zero, plan.cache.refresh.stop(place), zero, begins="canvas")
    begin = floor * (state.step > 0)
    return Extent(begin, plan.cache.refresh.stop(place), begin)


def visibility(
    plan: Plan, state: RowState, kind: Kind, extent: Extent, q_pos: Tensor, in_work: Tensor | None
) -> tuple[Tensor, str]:
    """The diffusion block of every window position [B, W], and the mode of the window; `in_work` [B] bool rows of which
    tokens of the block are chosen, None of a step that chooses none."""
    if plan.block_causal and plan.diffusion.causal_prefix:
        if in_work is None:
            return q_pos, "block"
        # Blocks of one position see causally; a step that chooses tokens opens the block in work to itself.
        start, opened = state.block_start[:, None], in_work[:, None]
        if extent.begins != "block":
            opened = opened & (q_pos >= start)
        return torch.where(opened, start, q_pos), "block"
    if plan.block_causal and extent.begins == "block" and q_pos.shape[1] <= plan.block_length:
        return plan.constants.zeros(*q_pos.shape), "block"  # all of one block
    if plan.block_causal and (extent.begins == "block" or (plan.defers and kind == "denoise")):
        # From the first block on, whatever their alignment, blocks may be counted from there.
        return torch.div(q_pos - plan.first[:, None], plan.block_length, rounding_mode="floor"), "block"
    if plan.block_causal:
        return block_of(plan, q_pos), "block"
    if plan.diffusion.prompt_isolated and (kind == "refresh" or not plan.cache.stores):
        # Denoise steps over a cache compute positions of the response only, which see everything.
        return (q_pos >= plan.first[:, None]).to(torch.int32), "block"
    return plan.constants.zeros(*q_pos.shape), "full"


def stop_of(plan: Plan, state: RowState, kind: Kind, extent: Extent) -> Tensor:
    """[B] the position behind the last one that a step computes of the extent: a refresh sees no farther than denoise
    steps where its window is scattered."""
    if kind == "refresh" and plan.scattered and plan.preset.horizon is not None:
        return torch.minimum(state.block_end + plan.preset.horizon, state.canvas_len)
    return extent.stop


def flagged(plan: Plan, state: RowState, sampling: Sampling, kind: Kind, extent: Extent) -> Tensor:
    """[B, L] bool: the positions of the extent that a step computes, where they are no range."""
    (B, L), preset, constants = state.tokens.shape, plan.preset, plan.constants
    position = constants.places(L)
    flags = position < stop_of(plan, state, kind, extent)[:, None]
    if extent.begins != "canvas":
        flags = flags & (position >= extent.begin[:, None])
    if plan.cache.reused is not None:
        # "Greater" says "and not" in one launch.
        return flags if kind == "refresh" else flags > plan.cache.reused(canvas_of(plan, state))
    if preset.scatter_suffix:
        number = (constants.counted(L, 1) - state.block_end[:, None]).clamp(min=0)
        counters = (x.expand(B, L) for x in (sampling.request[:, None], position, state.block_start[:, None]))
        counters = torch.stack(list(counters), -1).flatten(0, 1)
        noise = sampling.uniform_scores(sampling.seeds(L), counters).view(B, L)
        flags = flags & (noise < constants.kept_share.expand(B, -1).gather(1, number))
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
    opens = state.block_step == 0
    if not plan.skips:
        return torch.add(state.block_start, opens & (state.block_start > plan.first), alpha=-plan.block_length)
    # Blocks without masks were passed over: all from the last block in which a token was written.
    position = plan.constants.places(state.tokens.shape[1])
    written = (state.unmask_step >= 0) & (position < state.block_start[:, None])
    last = torch.where(written, position, plan.constants.nothing(1)).amax(1)
    block = plan.first + (last - plan.first) // plan.block_length * plan.block_length
    return torch.where((last >= 0) & opens, block, state.block_start)


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
    """What every row needs next, [6, B] int32 on the device: its phase, the positions of a refresh step, those of a
    denoise step, the lanes of its region, whether it has drafts to verify ([B] bool), and where its region begins."""

    def width(kind: Kind) -> Tensor:
        if kind == "refresh" and plan.cache.refresh is None:
            return plan.constants.zeros(state.phase.shape[0])
        extent = extent_of(plan, state, kind)
        if plan.scattered:
            return flagged(plan, state, sampling, kind, extent).sum(1)
        count = extent.stop if extent.begins == "canvas" else extent.stop - extent.begin
        return count + lanes if plan.shadow and kind == "denoise" else count

    lanes = state.block_end - state.block_start
    return torch.stack([state.phase, width("refresh"), width("denoise"), lanes, drafting, state.block_start]).int()
