"""The loop's plan: how a canvas is cut into blocks, and which window each kind of step computes.

Everything here after `open_rows` is fixed-shape tensor work on the device; nothing is read by the host.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlm_kernels import RowState, Window
from dlm_kernels.reference.advance import first_masked
from dlm_kernels.reference.noise import uniform_scores
from dlm_kernels.state import COMMIT, DENOISE, DONE, REFRESH

from ..diffusion import DiffusionConfig
from ..presets import Preset

if TYPE_CHECKING:
    from .measure import Sampling


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static shape of a decode: one preset on one batch of canvases.

    Attributes:
        preset, diffusion: what is decoded, and how.
        block_length: positions of a block. first: [B] where the first block begins; of a prompt-aligned ("rel") model
            that is the end of the prompt, of an "abs" model a multiple of block_length.
        refresh_width, denoise_width: of the two kinds of step, the largest where they vary; the first is 0 where no
            such step exists.
        lanes: positions whose statistics a step needs, the most of them where that varies. whole_row: they start at
            `first`, not at the block, since a policy looks at all masks of the row and every step computes them.
        varies: window widths differ from step to step.
        capacity: cache slots per row.
    """

    preset: Preset
    diffusion: DiffusionConfig
    block_length: int
    first: Tensor
    refresh_width: int
    denoise_width: int
    lanes: int
    whole_row: bool
    varies: bool
    capacity: int

    @property
    def previous(self) -> bool:
        """Whether a position is predicted by the row before it."""
        return self.diffusion.logits_row == "previous"

    @property
    def shadow_block(self) -> int:
        """Block id of shadow rows: behind that of the canvas, or of prompt and response where the prompt is
        isolated."""
        return 1 + int(self.diffusion.prompt_isolated)

    @property
    def flagged(self) -> bool:
        """Whether windows are scattered positions, not a range."""
        return self.preset.cache == "scattered" or self.preset.keep_last or self.preset.scatter_suffix


def open_rows(
    canvases: list[Tensor], preset: Preset, diffusion: DiffusionConfig, device: torch.device
) -> tuple[Plan, RowState]:
    """The plan and the initial state of a batch of canvases (token ids with masks, 1-D, of any lengths >= 1).

    Rows without a mask are done before they start. Blocks begin at the first mask ("rel") or at multiples of the block
    length ("abs"); then the positions before the first mask in its block are fixed tokens of that block.
    """
    mask_id = diffusion.mask_token_id
    B, L = len(canvases), max((len(c) for c in canvases), default=0)
    state = RowState.empty(B, L, "cpu")
    first_mask = []
    for b, canvas in enumerate(canvases):
        state.tokens[b, : len(canvas)] = canvas
        state.canvas_len[b] = len(canvas)
        masked = (canvas == mask_id).nonzero()
        first_mask.append(int(masked[0]) if len(masked) else len(canvas))
    longest = max((len(c) - f for c, f in zip(canvases, first_mask)), default=0)
    block_length = preset.block_length or diffusion.block_length or max(1, longest)
    if preset.schedule == "canvas":
        block_length = max(1, longest)

    absolute = diffusion.visibility == "block" and diffusion.block_alignment == "abs"
    for b, canvas in enumerate(canvases):
        start = first_mask[b] // block_length * block_length if absolute else first_mask[b]
        end = min(start + block_length, len(canvas))
        state.block_start[b], state.block_end[b] = start, end
        state.block_masks[b] = int((canvas[start:end] == mask_id).sum())
        if state.block_masks[b] == 0:
            state.phase[b] = DONE
        elif preset.cache in ("commit", "fused"):
            state.phase[b] = REFRESH if start > 0 else DENOISE
        else:
            state.phase[b] = DENOISE if preset.cache == "none" else REFRESH

    block = min(block_length, max(1, L))
    starts = state.block_start.tolist()
    rest = max((len(c) - s for c, s in zip(canvases, starts)), default=0)
    before = int(diffusion.logits_row == "previous")
    refresh_width = {
        "none": 0,
        "commit": max(starts, default=0),
        "fused": max(state.block_end.tolist(), default=0),
    }.get(preset.cache, L)
    denoise_width = {
        "none": L, "prefix": rest, "once": rest + before, "commit": block, "fused": rest, "delayed": rest, "scattered": L,
        "dual": min(block + 2 * preset.vicinity, L),
    }[preset.cache]  # fmt: skip
    # Where a step does not compute every mask of the row, a policy that looks at the row sees the block.
    computes_row = preset.visibility == "full" and preset.cache in ("none", "prefix", "once") and preset.horizon is None
    whole_row = computes_row and any(policy.reads == "row" for policy in preset.policies)
    state = RowState(**{f.name: getattr(state, f.name).to(device) for f in dataclasses.fields(state)})
    plan = Plan(
        preset=preset,
        diffusion=diffusion,
        block_length=block_length,
        first=state.block_start.clone(),
        refresh_width=refresh_width,
        denoise_width=denoise_width + (block if preset.shadow else 0),
        lanes=max(1, rest) if whole_row or preset.pipeline else block,
        whole_row=whole_row,
        varies=preset.pipeline or preset.cache == "scattered",
        capacity=0 if preset.cache == "none" else L,
    )
    return plan, state


def window_of(plan: Plan, state: RowState, sampling: Sampling, kind: str, width: int | None = None) -> Window:
    """The window that a step of `kind` ("refresh" or "denoise") computes, rows that need another kind or a wider one
    sitting it out.

    width: positions of the bucket; None = the plan's.
    """
    B, L = state.tokens.shape
    W = width or (plan.refresh_width if kind == "refresh" else plan.denoise_width)
    device = state.tokens.device
    begin, stop, kv_len, replaced = _extent(plan, state, kind)
    takes_part = _takes_part(state, kind)
    lane = torch.arange(W, dtype=torch.int32, device=device)
    shadow = plan.preset.shadow and kind == "denoise"
    kept = None
    if plan.flagged:
        flags = _flags(plan, state, sampling, kind, begin, stop)
        # Positions in order, those that are computed first.
        order = (~flags).to(torch.int8).sort(dim=1, stable=True).indices.int()
        q_len, q_pos = flags.sum(1, dtype=torch.int32), torch.nn.functional.pad(order, (0, max(0, W - L)))[:, :W]
        if plan.preset.cache == "scattered" and kind == "denoise":
            kept = ~flags
    else:
        q_len = stop - begin
        q_pos = begin[:, None] + lane
    if shadow:
        # Behind the canvas, the block's positions once more.
        q_pos = torch.where(lane < q_len[:, None], q_pos, state.block_start[:, None] + lane - q_len[:, None])
        is_shadow = lane >= q_len[:, None]
        q_len = q_len + state.block_end - state.block_start
    q_len = torch.where(takes_part & (q_len <= W), q_len, 0)
    # Dead lanes of the bucket still index embeddings and RoPE: keep them inside the canvas.
    q_pos = q_pos.clamp(0, max(L - 1, 0))

    block, mode = torch.zeros_like(q_pos), "full"
    if plan.diffusion.visibility == "block":
        block, mode = block_of(plan, q_pos), "block"
        if plan.preset.causal_commit:
            # Blocks of one position: causal.
            block = torch.where((state.phase == DENOISE)[:, None] & (kind == "denoise"), block, q_pos)
    elif plan.diffusion.prompt_isolated and (kind == "refresh" or plan.preset.cache == "none"):
        # Denoise steps over a cache compute positions of the response only, which see everything.
        block, mode = (q_pos >= plan.first[:, None]).to(torch.int32), "block"
    if shadow:
        block, mode = torch.where(is_shadow, plan.shadow_block, block), "shadow"
    stores = lane < q_len[:, None] if plan.capacity else torch.zeros_like(q_pos, dtype=torch.bool)
    if plan.preset.cache == "delayed" and kind == "denoise":
        # Only the block that this step commits is read again before it is recomputed.
        stores = stores & (state.phase == COMMIT)[:, None] & (q_pos < (state.block_start + plan.block_length)[:, None])
    kv_slot = torch.where(stores, q_pos, -1)
    return Window(
        q_pos=q_pos.contiguous(),
        q_block=block.int().contiguous(),
        q_len=q_len.int(),
        kv_slot=kv_slot.int(),
        kv_len=torch.where(takes_part, kv_len, 0).int(),
        replaced=replaced.int().contiguous(),
        cache_row=torch.arange(B, dtype=torch.int32, device=device),
        mode=mode,
        kept=None if kept is None else kept.contiguous(),
    )


def _takes_part(state: RowState, kind: str) -> Tensor:
    return state.phase == REFRESH if kind == "refresh" else (state.phase == DENOISE) | (state.phase == COMMIT)


def selects_of(plan: Plan, state: RowState, kind: str) -> Tensor:
    """[B] bool: rows that a step of `kind` denoises, those that it only prefills or commits left out."""
    cache = plan.preset.cache
    if kind == "refresh":
        return (state.phase == REFRESH) & (cache != "commit")
    return (state.phase == DENOISE) | ((state.phase == COMMIT) & (cache == "delayed"))


def _extent(plan: Plan, state: RowState, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row [B]: the range [begin, stop) that a step computes, the cached slots it sees, and those it replaces [B,
    2].

    Wide: commit prefills [0, block); fused computes the appended blocks besides; all others compute and store the whole
    canvas. Window: none [0, canvas) | prefix, once, delayed [block, canvas) | dual, commit [block] | fused [first
    uncommitted, appended end). The keys of an isolated prompt never change: with a cache, the row's first step computes
    them and no other one does.
    """
    start, end, length = state.block_start, state.block_end, state.canvas_len
    cache, preset = plan.preset.cache, plan.preset
    zero = torch.zeros_like(start)
    nothing = torch.stack([zero, zero], -1)
    least = plan.first if plan.diffusion.prompt_isolated else zero
    if kind == "refresh":
        begin = torch.where(state.step > 0, least, 0)
        return begin, {"commit": start, "fused": end}.get(cache, length), begin, nothing
    if cache == "none":
        # A block-causal model never sees what follows the block, so nothing after it need be computed.
        stop = end if plan.diffusion.visibility == "block" else length
        if preset.horizon is not None:
            stop = torch.minimum(end + preset.horizon, length)
        return zero, stop, zero, nothing
    if cache == "prefix":
        stop = length if preset.horizon is None else torch.minimum(end + preset.horizon, length)
        return start, stop, start, nothing
    if cache == "once":
        begin = torch.maximum(start - int(plan.previous), least)
        return begin, length, begin, nothing
    if cache == "delayed":
        return start, length, start, nothing
    if cache == "scattered":
        return least, length, length, nothing
    if cache == "dual":
        begin, stop = torch.maximum(start - preset.vicinity, least), torch.minimum(end + preset.vicinity, length)
        return begin, stop, length, torch.stack([begin, stop], -1)
    if preset.sub_block_cache:
        sub_start, sub_end = sub_block(plan, state)
        held = state.tokens.gather(1, sub_start.clamp(max=state.tokens.shape[1] - 1).long()[:, None])[:, 0]
        narrow = (state.phase == DENOISE) & (state.block_step > 0) & (held != plan.diffusion.mask_token_id)
        begin, stop = torch.where(narrow, sub_start, start), torch.where(narrow, sub_end, end)
        replaced = torch.where(narrow[:, None], torch.stack([begin, stop], -1), nothing)
        return begin, stop, torch.where(narrow, end, start), replaced
    return start, end, start, nothing


def _flags(plan: Plan, state: RowState, sampling: Sampling, kind: str, begin: Tensor, stop: Tensor) -> Tensor:
    """[B, L] bool: the positions of [begin, stop) that a step computes, where they are no range."""
    B, L = state.tokens.shape
    preset = plan.preset
    position = torch.arange(L, dtype=torch.int32, device=state.tokens.device)
    in_canvas = (position >= begin[:, None]) & (position < state.canvas_len[:, None])
    if preset.cache == "scattered":
        if kind == "refresh":
            return in_canvas
        # Decoded two steps ago: computed once more after it was written, then reused.
        decoded = (state.tokens != plan.diffusion.mask_token_id) & (state.unmask_step <= (state.step - 2)[:, None])
        if plan.previous:
            # Such a row predicts the next position too: it is done when both are, the canvas's last one alone.
            after = torch.nn.functional.pad(decoded, (0, 1), value=True)[:, 1:]
            decoded = decoded & (after | (position == state.canvas_len[:, None] - 1))
        return in_canvas & ~decoded
    flags = (position < stop[:, None]) & in_canvas
    if kind == "refresh" and preset.horizon is not None:
        flags = in_canvas & (position < (state.block_end + preset.horizon)[:, None])
    if preset.scatter_suffix:
        distance = (position - state.block_end[:, None]).clamp(min=0).double()
        z = 4 * distance / max(1, preset.horizon - 1)
        keep = (1.6 * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)).clamp(max=1)
        request, place, block = (
            x.expand(B, L) for x in (sampling.request[:, None], position, state.block_start[:, None])
        )
        noise = uniform_scores(sampling.seed, torch.stack([request, place, block], -1).flatten(0, 1)).view(B, L)
        flags = flags & ((position < state.block_end[:, None]) | (noise < keep))
    if preset.keep_last:
        flags = flags | (position == state.canvas_len[:, None] - 1)
    return flags


def block_of(plan: Plan, position: Tensor) -> Tensor:
    """Diffusion block of positions [B, ...]: one irregular block before the first ("rel": the prompt); "abs" blocks
    count from 0."""
    first = plan.first[:, None]
    if plan.diffusion.block_alignment == "abs":
        return 1 + torch.div(position - first % plan.block_length, plan.block_length, rounding_mode="floor")
    return (1 + torch.div(position - first, plan.block_length, rounding_mode="floor")).clamp(min=0)


def sub_block(plan: Plan, state: RowState) -> tuple[Tensor, Tensor]:
    """[B] start and end of the leftmost sub-block with masks of every row's block (of the last one if there are
    none)."""
    length = plan.preset.sub_block_length
    masked = first_masked(state.tokens, state.block_start, state.block_end, plan.diffusion.mask_token_id)
    masked = torch.maximum(torch.minimum(masked, state.block_end - 1), state.block_start)
    start = state.block_start + (masked - state.block_start) // length * length
    return start, torch.minimum(start + length, state.block_end)


def lane_start(plan: Plan, state: RowState) -> Tensor:
    """[B] int32 position of every row's first lane."""
    return plan.first if plan.whole_row else state.block_start


def request_refresh(plan: Plan, state: RowState, took_part: Tensor, more: Tensor | None) -> None:
    """Turns rows that go on in their block to a REFRESH step where the preset or a policy (`more` [B] bool) refreshes
    the cache."""
    preset = plan.preset
    wanted = torch.zeros_like(took_part) if more is None else more
    if preset.warmup_steps:
        # The step after the warm-up is of everything too: it is the one whose keys are kept.
        wanted = wanted | (state.step <= preset.warmup_steps)
    if preset.refresh_interval is not None:
        # d3LLM counts a row's forwards from 1, the others a block's from 0.
        counter = state.step + 1 if preset.cache == "delayed" else state.block_step
        wanted = wanted | (counter % preset.refresh_interval == 0)
    if preset.cache == "scattered":
        wanted = wanted | ((state.block_step == 1) & (preset.refresh_interval is not None))
    state.phase.copy_(torch.where(took_part & wanted & (state.phase == DENOISE), REFRESH, state.phase))


def counts_of(plan: Plan, state: RowState, sampling: Sampling) -> Tensor:
    """[4] int32 on the device: rows that need a refresh step, rows that need a denoise step, and if widths vary, the
    widest window and the most lanes that a row needs."""
    wide = state.phase == REFRESH
    window = ~wide & (state.phase != DONE)
    widest = most = torch.zeros((), dtype=torch.int32, device=wide.device)
    if plan.varies and wide.numel():
        begin, stop, _, _ = _extent(plan, state, "denoise")
        need = _flags(plan, state, sampling, "denoise", begin, stop).sum(1) if plan.flagged else stop - begin
        # Rows that are still to take their refresh step count too: a host that reads this late has them in its next
        # window.
        widest = torch.where(window | wide, need, 0).amax()
        most = torch.where(window | wide, state.block_end - state.block_start, 0).amax()
    return torch.stack([wide.sum(), window.sum(), widest, most]).int()
