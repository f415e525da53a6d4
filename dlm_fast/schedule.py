"""The loop's plan: how a canvas is cut into blocks, and which window each kind of step computes.

Everything here after `open_rows` is fixed-shape tensor work on the device; nothing is read by the host.
"""

from __future__ import annotations

import dataclasses

import torch
from dlm_kernels import RowState, Window
from dlm_kernels.state import COMMIT, DENOISE, DONE, WIDE
from torch import Tensor

from .diffusion import DiffusionConfig
from .presets import Preset


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static shape of a decode: one preset on one batch of canvases.

    Attributes:
        preset, diffusion: what is decoded, and how.
        block_length: positions of a block. first: [B] where the first block begins; of a prompt-aligned ("rel") model
            that is the end of the prompt, of an "abs" model a multiple of block_length.
        wide, window: widths of the two kinds of step (see `Window`); wide is 0 where no such step exists.
        lanes: positions whose statistics a step needs (the longest block).
        capacity: cache slots per row.
    """

    preset: Preset
    diffusion: DiffusionConfig
    block_length: int
    first: Tensor
    wide: int
    window: int
    lanes: int
    capacity: int


def open_rows(canvases: list[Tensor], preset: Preset, diffusion: DiffusionConfig, device: torch.device) -> tuple[Plan, RowState]:
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

    absolute = diffusion.visibility == "block" and diffusion.block_alignment == "abs"
    for b, canvas in enumerate(canvases):
        start = first_mask[b] // block_length * block_length if absolute else first_mask[b]
        end = min(start + block_length, len(canvas))
        state.block_start[b], state.block_end[b] = start, end
        state.block_masks[b] = int((canvas[start:end] == mask_id).sum())
        if state.block_masks[b] == 0:
            state.phase[b] = DONE
        elif preset.cache in ("prefix", "dual") or (preset.cache == "commit" and start > 0):
            state.phase[b] = WIDE
        else:
            state.phase[b] = DENOISE

    lanes = min(block_length, max(1, L))
    starts = state.block_start.tolist()
    if preset.cache == "none":
        wide, window = 0, L
    elif preset.cache == "commit":
        wide, window = max(starts, default=0), lanes
    elif preset.cache == "dual":
        wide, window = L, lanes
    else:
        wide, window = L, max((len(c) - s for c, s in zip(canvases, starts)), default=0)
    state = RowState(**{f.name: getattr(state, f.name).to(device) for f in dataclasses.fields(state)})
    plan = Plan(
        preset=preset,
        diffusion=diffusion,
        block_length=block_length,
        first=state.block_start.clone(),
        wide=wide,
        window=window,
        lanes=lanes,
        capacity=0 if preset.cache == "none" else L,
    )
    return plan, state


def window_of(plan: Plan, state: RowState, kind: str) -> Window:
    """The window that a step of `kind` ("wide" or "window") computes, rows that need another kind sitting it out.

    Wide: commit presets prefill [0, block_start); the others compute and store the whole canvas (a refresh).
    Window: none [0, canvas) | prefix [block, end of canvas) | dual and commit [block_start, block_end).
    """
    B, L = state.tokens.shape
    W = plan.wide if kind == "wide" else plan.window
    device = state.tokens.device
    zero = torch.zeros(B, dtype=torch.int32, device=device)
    start, end, cache = state.block_start, state.block_end, plan.preset.cache
    if kind == "wide":
        takes_part = state.phase == WIDE
        begin, stop = zero, start if cache == "commit" else state.canvas_len
        kv_len, replaced = zero, torch.stack([zero, zero], -1)
    else:
        takes_part = (state.phase == DENOISE) | (state.phase == COMMIT)
        begin, stop = start, end
        kv_len, replaced = start, torch.stack([zero, zero], -1)
        if cache == "none":
            # A block-causal model never sees what follows the block, so nothing after it need be computed.
            begin, stop, kv_len = zero, end if plan.diffusion.visibility == "block" else state.canvas_len, zero
        elif cache == "prefix":
            stop = state.canvas_len
        elif cache == "dual":
            kv_len, replaced = state.canvas_len, torch.stack([start, end], -1)
    q_len = torch.where(takes_part, stop - begin, zero)
    lane = torch.arange(W, dtype=torch.int32, device=device)
    # Dead lanes of the bucket still index embeddings and RoPE: keep them inside the canvas.
    q_pos = (begin[:, None] + lane).clamp(max=L - 1)
    if plan.diffusion.visibility == "block":
        # One irregular block before the first ("rel": the prompt); blocks of an "abs" model count from position 0.
        first = plan.first[:, None]
        if plan.diffusion.block_alignment == "abs":
            first = first % plan.block_length
        block = 1 + torch.div(q_pos - first, plan.block_length, rounding_mode="floor")
        mode = "block"
        if plan.diffusion.block_alignment == "rel":
            block = block.clamp(min=0)
    else:
        block, mode = torch.zeros_like(q_pos), "full"
    kv_slot = q_pos if cache != "none" else torch.full_like(q_pos, -1)
    return Window(
        q_pos=q_pos,
        q_block=block.int(),
        q_len=q_len,
        kv_slot=torch.where(lane < q_len[:, None], kv_slot, -1).int(),
        kv_len=torch.where(takes_part, kv_len, zero),
        replaced=replaced.int(),
        cache_row=torch.arange(B, dtype=torch.int32, device=device),
        mode=mode,
    )


def lane_positions(plan: Plan, state: RowState) -> Tensor:
    """[B, lanes] absolute positions of the block's lanes (the last ones may lie past the block)."""
    return state.block_start[:, None] + torch.arange(plan.lanes, dtype=torch.int32, device=state.tokens.device)


def phase_counts(state: RowState) -> Tensor:
    """[2] int32 on the device: rows that need a wide step, rows that need a window step."""
    wide = state.phase == WIDE
    return torch.stack([wide.sum(), (~wide & (state.phase != DONE)).sum()]).int()
