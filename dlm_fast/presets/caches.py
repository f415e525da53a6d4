"""The cache operations: what is kept between forwards, each as one row of the table `CACHES`.

To add one, write its row here: nothing else in the package asks for a cache by its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.rules import CacheOp
from dlm_kernels.state import COMMIT


class Sizes(NamedTuple):
    """The sizes of a batch from which a cache's window widths follow.

    Attributes:
        canvas: positions of the longest canvas.
        prompt: the most positions before a row's first block.
        opened: the most positions up to the end of a row's first block.
        rest: the most positions from a row's first block to its end.
        block: positions of a block.
        waiting: the most positions before a block that wait for its first step to compute their final keys.
        before: 1 where a position is predicted by the row before it, else 0.
        vicinity: positions on either side of the block that are recomputed with it.
        pipeline: whether several blocks are decoded at once.
    """

    canvas: int
    prompt: int
    opened: int
    rest: int
    block: int
    waiting: int
    before: int
    vicinity: int
    pipeline: bool


@dataclasses.dataclass(frozen=True)
class Place:
    """Where every row stands, as a cache's extent needs it; tensors [B] int32.

    Attributes:
        start: start of the block, or of the pipeline's blocks.
        end: end of the block, or of the pipeline's blocks.
        length: end of the canvas.
        zero: zeros.
        floor: first position whose keys ever change: `zero`, or the end of a prompt that sees only itself; never behind
            the block.
        before: 1 where a position is predicted by the row before it, else 0.
        block_causal: whether a position sees nothing behind its block.
        horizon: positions behind the block that a denoise step sees; None = all.
        vicinity: positions on either side of the block that a denoise step recomputes with it.
        sub_block: start and end of the sub-block that a denoise step recomputes alone, and [B] bool rows in which it
            does; None without sub-block cache.
        waiting: first position whose keys are not final, where finished blocks wait for the next block's first step;
            None where they do not.
    """

    start: Tensor
    end: Tensor
    length: Tensor
    zero: Tensor
    floor: Tensor
    before: int
    block_causal: bool
    horizon: int | None
    vicinity: int
    sub_block: tuple[Tensor, Tensor, Tensor] | None
    waiting: Tensor | None = None


class Extent(NamedTuple):
    """What a step computes and sees of the cache; tensors [B] int32.

    Attributes:
        begin: first position that is computed.
        stop: position behind the last one that is computed.
        cached: cached slots that are visible.
        replaced: [B, 2] range of cached slots that the window replaces; None = none.
        begins: where `begin` is, if it is that of every row and step: at the first position of the "canvas" or of the
            "block". None promises nothing and costs a step a few launches.
    """

    begin: Tensor
    stop: Tensor
    cached: Tensor
    replaced: Tensor | None = None
    begins: Literal["canvas", "block"] | None = None


def _uncached(at: Place) -> Extent:
    """The canvas; of a block-causal model up to the end of the block, since nothing behind it is seen."""
    return Extent(at.zero, at.end if at.block_causal else _seen(at), at.zero, begins="canvas")


def _seen(at: Place) -> Tensor:
    """[B] the position behind the last one that a denoise step sees, by the horizon."""
    return at.length if at.horizon is None else torch.minimum(at.end + at.horizon, at.length)


def _from_block(at: Place) -> Extent:
    """The block and all behind it, up to the horizon, over the keys before it."""
    return Extent(at.start, _seen(at), at.start, begins="block")


def _from_row_before(at: Place) -> Extent:
    """The block and all behind it, from the row on that predicts the block's first position."""
    if not at.before:
        return Extent(at.start, at.length, at.start, begins="block")
    begin = torch.maximum(at.start - at.before, at.floor)
    return Extent(begin, at.length, begin)


def _scattered(at: Place) -> Extent:
    """Positions of the whole canvas, chosen one by one, over the keys of all others."""
    return Extent(at.floor, at.length, at.length, begins="canvas" if at.floor is at.zero else None)


def _inside(at: Place) -> Extent:
    """The block with its vicinity, over the keys on both sides of it."""
    if not at.vicinity:
        return Extent(at.start, at.end, at.length, torch.stack([at.start, at.end], -1), begins="block")
    begin = torch.maximum(at.start - at.vicinity, at.floor)
    stop = torch.minimum(at.end + at.vicinity, at.length)
    return Extent(begin, stop, at.length, torch.stack([begin, stop], -1))


def _block(at: Place) -> Extent:
    """The block over the keys before it; where a sub-block is recomputed alone, over the block's older keys too."""
    if at.sub_block is None:
        return Extent(at.start, at.end, at.start, begins="block")
    sub_start, sub_end, alone = at.sub_block
    begin, stop = torch.where(alone, sub_start, at.start), torch.where(alone, sub_end, at.end)
    replaced = torch.where(alone[:, None], torch.stack([begin, stop], -1), 0)
    return Extent(begin, stop, torch.where(alone, at.end, at.start), replaced)


def _block_and_waiting(at: Place) -> Extent:
    """The block, or the pipeline's blocks, and the finished ones before that wait for their final keys."""
    if at.waiting is None:
        return Extent(at.start, at.end, at.start, begins="block")
    return Extent(at.waiting, at.end, at.waiting)


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What every row holds, as a cache that reuses or stores positions one by one needs it.

    Attributes:
        state: where every row stands.
        mask_id: id of the mask.
        previous: whether a position is predicted by the row before it.
        block_length: positions of a block.
    """

    state: RowState
    mask_id: int
    previous: bool
    block_length: int


def _decoded_before(at: Canvas) -> Tensor:
    """[B, L] bool: positions that were decoded two steps ago or earlier: each is computed once more after it was
    written, and then reused."""
    state = at.state
    decoded = (state.tokens != at.mask_id) & (state.unmask_step <= (state.step - 2)[:, None])
    if not at.previous:
        return decoded
    # Such a row predicts the next position too: it is done when both are, the canvas's last one alone.
    position = torch.arange(state.tokens.shape[1], dtype=torch.int32, device=decoded.device)
    behind = torch.nn.functional.pad(decoded, (0, 1), value=True)[:, 1:]
    return decoded & (behind | (position == state.canvas_len[:, None] - 1))


def _first_block_of_commits(at: Canvas, position: Tensor) -> Tensor:
    """[B, W] bool: positions [B, W] of the block that a row appends in this step. Only these are read again before they
    are recomputed."""
    state = at.state
    return (state.phase == COMMIT)[:, None] & (position < (state.block_start + at.block_length)[:, None])


def _every_block_step(state: RowState, interval: int) -> Tensor:
    return state.block_step % interval == 0


def _every_row_step(state: RowState, interval: int) -> Tensor:
    """d3LLM counts a row's forwards, from 1."""
    return (state.step + 1) % interval == 0


def _every_block_step_and_second(state: RowState, interval: int) -> Tensor:
    """dKV-Cache computes a block's second step of everything too."""
    return _every_block_step(state, interval) | (state.block_step == 1)


@dataclasses.dataclass(frozen=True)
class Refresh:
    """The steps of a cache that compute the canvas instead of a window: a prefill, a block's first step, a refresh.

    Attributes:
        stop: the position behind the last one that they compute, [B].
        width: the most positions that they compute.
        opens: which rows begin with one: "all", or "prompt", those with positions before their first block.
        repeats: whether a row comes back to them, so that a second one may be asked for before the first has been seen.
    """

    stop: Callable[[Place], Tensor]
    width: Callable[[Sizes], int]
    opens: str = "all"
    repeats: bool = True


@dataclasses.dataclass(frozen=True)
class CacheOperation:
    """One cache operation.

    Attributes:
        keeps: what is kept between forwards, in a line.
        after_block: what follows a finished block, as the `unmask` op calls it (`UnmaskRule.cache`).
        extent: what a denoise step computes, and which cached slots it sees.
        width: the most positions that a denoise step computes.
        refresh: its steps of the whole canvas; None = it has none.
        stores: whether keys are kept at all.
        visibility: the model visibility that it serves; None = both.
        schedules: the schedules that it serves.
        reads: options of a preset that this cache reads and not every other one does.
        grows_stale: whether kept keys grow old, so that `warmup_steps`, `refresh_interval` and policies refresh them.
        refreshed: [B] bool rows that `refresh_interval` sends to a refresh.
        reused: [B, L] bool positions that a denoise step leaves out and whose keys it reuses; None = its window is the
            whole extent.
        stored: [B, W] bool positions [B, W] of a denoise step whose keys are stored; None = those of all.
        computes_masks: whether a step computes every mask of the row, and not only the block's.
        opens_at_row_before: whether only a block's first step computes the row that predicts its first position.
        frozen_around: whether the keys around the block are the same for all steps in it, so that drafts share them.
    """

    keeps: str
    after_block: CacheOp
    extent: Callable[[Place], Extent]
    width: Callable[[Sizes], int]
    refresh: Refresh | None = None
    stores: bool = True
    visibility: str | None = None
    schedules: tuple[str, ...] = ("block",)
    reads: tuple[str, ...] = ()
    grows_stale: bool = False
    refreshed: Callable[[RowState, int], Tensor] = _every_block_step
    reused: Callable[[Canvas], Tensor] | None = None
    stored: Callable[[Canvas, Tensor], Tensor] | None = None
    computes_masks: bool = False
    opens_at_row_before: bool = False
    frozen_around: bool = False

    def op(self, pipeline: bool) -> CacheOp:
        """What follows a finished block, as the `unmask` op calls it. The op fuses commits of a pipeline alone: one
        block at a time, the next one simply opens, and its extent begins with the finished one."""
        return "once" if self.after_block == "fused" and not pipeline else self.after_block

    def defers(self, pipeline: bool) -> bool:
        """Whether a finished block waits for the next block's first step, which computes its final keys."""
        return self.after_block == "fused" and not pipeline

    @property
    def prefills(self) -> bool:
        """Whether its refresh steps only fill the cache, and write no token (see `reference.unmask`)."""
        return self.after_block == "commit"

    @property
    def commits(self) -> bool:
        """Whether finished blocks are appended by a step of their own (COMMIT)."""
        return self.after_block in ("commit", "delayed")

    @property
    def commit_selects(self) -> bool:
        """Whether such a step writes tokens too."""
        return self.after_block == "delayed"

    @property
    def keys_are_final(self) -> bool:
        """Whether no key that is kept is older than its token, so that a token may be overwritten until its block
        ends."""
        return not self.stores or (self.commits and not self.commit_selects)


_WHOLE_CANVAS = Refresh(stop=lambda at: at.length, width=lambda sizes: sizes.canvas)

CACHES: dict[str, CacheOperation] = {
    "none": CacheOperation(
        "nothing: every step recomputes the canvas",
        "none", _uncached, lambda sizes: sizes.canvas, stores=False, schedules=("block", "canvas", "pipeline"),
        reads=("horizon",), computes_masks=True,
    ),
    "prefix": CacheOperation(
        "the keys before the block, as its first step computed them (Fast-dLLM)",
        "refresh", _from_block, lambda sizes: sizes.rest, _WHOLE_CANVAS, visibility="full", reads=("horizon",),
        grows_stale=True, computes_masks=True, opens_at_row_before=True,
    ),
    "dual": CacheOperation(
        "the keys on both sides of the block, as its first step computed them (Fast-dLLM)",
        "refresh", _inside, lambda sizes: min(sizes.block + 2 * sizes.vicinity, sizes.canvas), _WHOLE_CANVAS,
        visibility="full", reads=("vicinity",), grows_stale=True, opens_at_row_before=True, frozen_around=True,
    ),
    "once": CacheOperation(
        "the keys before the block, each as the last step of its own block left it (FreeCache)",
        "once", _from_row_before, lambda sizes: sizes.rest + sizes.before,
        dataclasses.replace(_WHOLE_CANVAS, repeats=False), visibility="full", computes_masks=True,
    ),
    "scattered": CacheOperation(
        "the keys of positions that were decoded two steps ago or earlier (dKV-Cache)",
        "refresh", _scattered, lambda sizes: sizes.canvas, _WHOLE_CANVAS, visibility="full", grows_stale=True,
        refreshed=_every_block_step_and_second, reused=_decoded_before,
    ),
    "commit": CacheOperation(
        "the keys of finished blocks, each appended by a forward of its own; exact for block-causal models",
        "commit", _block, lambda sizes: sizes.block,
        Refresh(lambda at: at.start, lambda sizes: sizes.prompt, opens="prompt", repeats=False),
        visibility="block", reads=("first_token", "sub_block_cache"), frozen_around=True,
    ),
    "fused": CacheOperation(
        "the keys of finished blocks, each appended by the next denoise forward (D2F); exact for block-causal models",
        "fused", _block_and_waiting,
        lambda sizes: sizes.rest if sizes.pipeline else min(sizes.rest, sizes.block + sizes.waiting),
        Refresh(lambda at: at.end, lambda sizes: sizes.opened, opens="prompt", repeats=False),
        schedules=("block", "pipeline"),
    ),
    "delayed": CacheOperation(
        "the keys of blocks that several forwards have found finished, appended one by one (d3LLM)",
        "delayed", _from_block, lambda sizes: sizes.rest, _WHOLE_CANVAS, visibility="full", schedules=("pipeline",),
        reads=("commit_delay",), grows_stale=True, refreshed=_every_row_step, stored=_first_block_of_commits,
    ),
}  # fmt: skip


def names(serves: Callable[[CacheOperation], bool]) -> str:
    """The names of the caches that `serves` holds for, as an error lists them: "'prefix', 'dual' or 'delayed'"."""
    found = [repr(name) for name, cache in CACHES.items() if serves(cache)]
    return " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
