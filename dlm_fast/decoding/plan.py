"""The plan of a batch: how its canvases are cut into blocks, and everything about its steps that is the same for
all."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from dlm_kernels import RowState, UnmaskRule
from dlm_kernels.rules import Kind
from dlm_kernels.state import DENOISE, DONE, REFRESH

from ..diffusion import DiffusionConfig
from ..policies import Sampling, Setting
from ..policies.constants import Constants
from ..presets import Preset
from ..presets.caches import CacheOperation, Sizes


class Bucket(NamedTuple):
    """The shape of a step: what a step is compiled or captured for.

    Attributes:
        kind: "refresh" computes all that the cache needs (a prefill, a block's first step, a refresh), "denoise" what
            its extent is.
        rows: rows that are computed, those that sit the step out included.
        width: positions of a row that are computed, padding included.
        lanes: positions of a row that are looked at.
        drafts: canvases per row.
    """

    kind: Kind
    rows: int
    width: int
    lanes: int
    drafts: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is the same for every step of a decode: one preset on one batch of canvases, resolved once.

    Attributes:
        preset: the decoder.
        diffusion: how the model was trained to be decoded.
        cache: the preset's cache operation.
        mask_id: id of the mask.
        block_length: positions of a block.
        first: [B] int32 where a row's first block begins: at the end of its prompt, or, of a model whose blocks lie at
            multiples of block_length ("abs"), at one of these.
        prefilled: [B] int32 positions of a row whose keys are in the cache before its first step; None = of no row.
        width: positions of the canvas buffers.
        steps: the most denoise steps that fill a block of any row.
        refresh_width: positions of a refresh step, the most of them; 0 where there is no such step.
        denoise_width: positions of a denoise step, the most of them where that varies.
        lanes: positions that a step looks at, the most of them where that varies.
        whole_row: whether the lanes begin at `first`, since a policy looks at all masks of the row and every step
            computes them, instead of at the block.
        capacity: cache slots per row.
        previous: whether a position is predicted by the row before it.
        block_causal: whether a position sees its own block and earlier ones only.
        shadow: whether a copy of the block, its shadow, follows the canvas.
        shadow_block: block id of shadows: behind that of the canvas, or of prompt and response where the prompt is
            isolated.
        scattered: whether windows are scattered positions, not a range.
        defers: whether a finished block waits for the next block's first step, which computes its final keys.
        skips: whether blocks without masks lie between blocks with masks.
        opens_at_row_before: whether a block's first step writes its first mask alone, since later ones do not compute
            the row that predicts it.
        quota_of_view: whether the smallest number of positions that a step writes is `View.quota`, of a schedule that
            the op does not compute.
        unmask_rule: the static part of the `unmask` op.
        exact_rule: the same where a policy said itself which positions pass.
        prefill_rule: the same for refresh steps that write no token; None where they write.
        constants: tensors of the decode that no step has to make.
    """

    preset: Preset
    diffusion: DiffusionConfig
    cache: CacheOperation
    mask_id: int
    block_length: int
    first: Tensor
    prefilled: Tensor | None
    width: int
    steps: int
    refresh_width: int
    denoise_width: int
    lanes: int
    whole_row: bool
    capacity: int
    previous: bool
    block_causal: bool
    shadow: bool
    shadow_block: int
    scattered: bool
    defers: bool
    skips: bool
    opens_at_row_before: bool
    quota_of_view: bool
    unmask_rule: UnmaskRule
    exact_rule: UnmaskRule
    prefill_rule: UnmaskRule | None
    constants: Constants

    @property
    def copies(self) -> int:
        """Canvases that a forward computes of each row: two with guidance."""
        return 2 if self.preset.cfg_scale else 1

    def bucket(self, kind: Kind, *, width: int | None = None, lanes: int | None = None, drafts: int = 1) -> Bucket:
        """The bucket of a step of all rows: by default one that holds every row whatever happens."""
        full = self.refresh_width if kind == "refresh" else self.denoise_width
        rows, lanes = self.first.shape[0], self.lanes if lanes is None else lanes
        return Bucket(kind, rows, full if width is None else width, lanes, drafts)

    def setting(self, sampling: Sampling) -> Setting:
        """What its policies may read of it."""
        return Setting(
            preset_name=self.preset.name,
            block_length=self.block_length,
            lanes=self.lanes,
            whole_row=self.whole_row,
            first=self.first,
            mask_id=self.mask_id,
            cached=self.cache.stores,
            spreads_block=self.preset.quota_of == "block",
            spreads_evenly=self.preset.remainder == "even",
            sampling=sampling,
            constants=self.constants,
        )


def open_rows(
    canvases: list[Tensor], preset: Preset, diffusion: DiffusionConfig, device: torch.device
) -> tuple[Plan, RowState]:
    """The plan and the initial state of a batch of canvases (token ids with masks, 1-D, of any lengths >= 1).

    Rows without a mask are done before they start. Blocks begin at the first mask ("rel") or at multiples of the block
    length ("abs"); then the positions before the first mask in its block are fixed tokens of that block.
    """
    plan, host = plan_of_rows(canvases, preset, diffusion, len(canvases), device)
    state = on_device(host, device)
    return dataclasses.replace(plan, first=state.block_start.clone()), state


def plan_of_rows(
    canvases: list[Tensor], preset: Preset, diffusion: DiffusionConfig, rows: int, device: torch.device
) -> tuple[Plan, RowState]:
    """The plan of decodes that take these canvases, `rows` at a time, and the initial state of all of them, on the
    host."""
    longest = max((len(canvas) - first_mask(canvas, diffusion.mask_token_id) for canvas in canvases), default=0)
    block_length = block_length_of(preset, diffusion, longest)
    host = placed_rows(canvases, max(map(len, canvases), default=0), block_length, preset, diffusion)
    sizes = _sizes_of(canvases, host, block_length, preset, diffusion)
    steps = max(
        _steps_of_spans([len(c) for c in canvases], host.block_start, block_length, preset, diffusion), default=0
    )
    return plan_of(preset, diffusion, sizes, block_length=block_length, rows=rows, steps=steps, device=device), host


def block_length_of(preset: Preset, diffusion: DiffusionConfig, longest: int) -> int:
    """Positions of a block, where the longest row has `longest` positions from its first mask on."""
    length = None if preset.single_block else preset.block_length or diffusion.block_length
    return length or max(1, longest)


def first_mask(canvas: Tensor, mask_id: int) -> int:
    """Position of the first mask of a canvas; its length where it has none."""
    masked = (canvas == mask_id).nonzero()
    return int(masked[0]) if len(masked) else len(canvas)


def placed_rows(
    canvases: list[Tensor], width: int, block_length: int, preset: Preset, diffusion: DiffusionConfig
) -> RowState:
    """The initial state of canvases, on the host, in a buffer of `width` positions: where the first block of each is,
    and the step that it begins with."""
    mask_id, refresh = diffusion.mask_token_id, preset.operation.refresh
    state = RowState.empty(len(canvases), width, "cpu")
    absolute = diffusion.visibility == "block" and diffusion.block_alignment == "abs"
    for b, canvas in enumerate(canvases):
        state.tokens[b, : len(canvas)] = canvas
        state.canvas_len[b] = len(canvas)
        first = first_mask(canvas, mask_id)
        start = first // block_length * block_length if absolute else first
        end = min(start + block_length, len(canvas))
        state.block_start[b], state.block_end[b] = start, end
        state.block_masks[b] = int((canvas[start:end] == mask_id).sum())
        if state.block_masks[b] == 0:
            state.phase[b] = DONE
        elif refresh is None or (refresh.opens == "prompt" and start == 0):
            state.phase[b] = DENOISE
        else:
            state.phase[b] = REFRESH
    return state


def on_device(state: RowState, device: torch.device) -> RowState:
    """A copy of a state on a device."""
    placed = RowState.empty(*state.tokens.shape, device)
    for name, field in vars(placed).items():
        field.copy_(getattr(state, name))
    return placed


def _sizes_of(
    canvases: list[Tensor], state: RowState, block_length: int, preset: Preset, diffusion: DiffusionConfig
) -> Sizes:
    """The sizes of a batch that was placed."""
    starts, L = state.block_start.tolist(), state.tokens.shape[1]
    waiting = (_longest_wait(*row, block_length, diffusion.mask_token_id) for row in zip(canvases, starts))
    return Sizes(
        canvas=L,
        prompt=max(starts, default=0),
        opened=max(state.block_end.tolist(), default=0),
        rest=max((len(canvas) - start for canvas, start in zip(canvases, starts)), default=0),
        block=min(block_length, max(1, L)),
        waiting=max(waiting, default=0),
        before=int(diffusion.logits_row == "previous"),
        vicinity=preset.vicinity,
        pipeline=preset.pipeline,
    )


def plan_of(
    preset: Preset,
    diffusion: DiffusionConfig,
    sizes: Sizes,
    *,
    block_length: int,
    rows: int,
    steps: int,
    device: torch.device,
) -> Plan:
    """The plan of a decode of `rows` rows that are no larger than `sizes`; it has no rows yet (`Plan.first` is 0).

    steps: the most denoise steps that fill a block of any row (`steps_of`).
    """
    cache, previous = preset.operation, diffusion.logits_row == "previous"
    L, block = sizes.canvas, sizes.block
    # Where a step does not compute every mask of the row, a policy that looks at the row sees the block.
    computes_masks = preset.visibility == "full" and cache.computes_masks and preset.horizon is None
    whole_row = computes_masks and any(policy.reads == "row" for policy in preset.policies)
    return Plan(
        preset=preset,
        diffusion=diffusion,
        cache=cache,
        mask_id=diffusion.mask_token_id,
        block_length=block_length,
        first=torch.zeros(rows, dtype=torch.int32, device=device),
        prefilled=None,
        width=L,
        steps=steps,
        refresh_width=0 if cache.refresh is None else cache.refresh.width(sizes),
        denoise_width=cache.width(sizes) + (block if preset.shadow else 0),
        lanes=max(1, sizes.rest) if whole_row or preset.pipeline else block,
        whole_row=whole_row,
        capacity=L if cache.stores else 0,
        previous=previous,
        block_causal=diffusion.visibility == "block",
        shadow=preset.shadow,
        shadow_block=1 + int(diffusion.prompt_isolated),
        scattered=cache.reused is not None or preset.keep_last or preset.scatter_suffix,
        defers=cache.defers(preset.pipeline),
        skips=sizes.waiting > block_length,
        opens_at_row_before=previous and cache.opens_at_row_before and preset.drafts == 1,
        quota_of_view=preset.quota and not preset.quota_in_op,
        unmask_rule=preset.unmask_rule(),
        exact_rule=preset.unmask_rule(exact=True),
        prefill_rule=preset.prefill_rule() if cache.prefills else None,
        # The rows of a step may be rounded up to a power of two, and drafts are rows of a block each.
        constants=Constants.of(
            rows=1 << max(0, rows - 1).bit_length(),
            length=max(L + block, preset.drafts * block),
            horizon=preset.horizon if preset.scatter_suffix else None,
            device=device,
        ),
    )


def steps_of(canvases: list[Tensor], plan: Plan) -> list[int]:
    """For each row, the denoise steps that fill a block."""
    lengths = [len(canvas) for canvas in canvases]
    return _steps_of_spans(lengths, plan.first, plan.block_length, plan.preset, plan.diffusion)


def _steps_of_spans(
    lengths: list[int], first: Tensor, block_length: int, preset: Preset, diffusion: DiffusionConfig
) -> list[int]:
    # Where a row is one block, the longest row of the batch must not decide the schedule of a shorter one.
    one_block = preset.single_block or (preset.block_length or diffusion.block_length) is None
    spans = [length - start for length, start in zip(lengths, first.tolist())]
    return [preset.steps_per_block or (max(1, span) if one_block else block_length) for span in spans]


def _longest_wait(canvas: Tensor, start: int, block_length: int, mask_id: int) -> int:
    """The most positions from the start of one block with masks to that of the next: those between wait for it."""
    blocks = ((canvas[start:] == mask_id).nonzero().flatten() // block_length).unique()
    return int(blocks.diff().amax()) * block_length if len(blocks) > 1 else 0
