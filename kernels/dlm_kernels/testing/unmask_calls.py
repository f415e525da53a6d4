"""Random calls of `unmask`: rows in every phase, and every input that could mislead the op.

The tests of the op (tests/support/unmask_cases.py) and the check on a GPU (bench/checks/unmask.py) draw from here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks.unmask import wanted_inputs
from ..rules import Kind, UnmaskRule
from ..state import COMMIT, DENOISE, DONE, REFRESH, RowState
from .random_rows import RandomRows

MASK = 7
# What a canvas holds and what is predicted: few tokens, so that predictions repeat what is written, on both sides of
# the mask's id.
TOKENS = (0, 1, 2, 3, 4, 5, 6, 8, 9)
GARBAGE_TOKEN, GARBAGE_ERROR = 10**15, 7
GARBAGE_FLOATS = (math.nan, math.inf, -math.inf)
THRESHOLDS = (0.0, 0.1, 0.25, 0.5, 7 / 12, 0.9, 1.0, 2.0, 4.0, -0.5)
HOSTILE_THRESHOLDS = (math.nan, math.inf, -math.inf)


def random_call(
    generator: torch.Generator, rule: UnmaskRule, kind: Kind, *, B: int, L: int, W: int
) -> tuple[RowState, dict[str, object]]:
    """A state on the CPU and the fields of `UnmaskInputs`, None where an optional one is not given.

    Canvas: blocks of every length, with all, some or none of their positions masked; infilled canvases, masks before
    the region and behind the canvas, stop tokens among given and written ones. Rows: mostly in a phase that fits the
    call's kind; some sit the forward out, and the region of some does not fit the lanes. Lanes: they may begin before
    the region and before the canvas; scores tie, are NaN, infinite or -0.0; few rows have broken statistics; lanes that
    are not needed hold garbage. Numbers: thresholds that nothing or everything passes, NaN and infinite ones, counts
    below 0 and above what there is, blocks of length 0.

    Args:
        generator: gives all that is drawn. B: rows. L: positions of a canvas, at least W. W: lanes.
    """
    draw = _Draws(generator, B)
    pick, integers, one_of = draw.pick, draw.integers, draw.one_of
    given = _given(draw, rule)

    # 1. The canvas, and where the row stands.
    canvas_len, start, end, length = _regions(draw, rule, L, W)
    step = one_of(integers(0, 10), integers(0, 100))
    tokens, unmask_step = _canvas(draw, rule, L, W, canvas_len, start, end, length, step)
    position = torch.arange(L)
    in_region = (position >= start[:, None]) & (position < end[:, None])
    masks = ((tokens == MASK) & in_region).sum(1).int()
    fitting = (REFRESH,) if kind == "refresh" else (DENOISE, DENOISE, DENOISE, COMMIT)
    if kind == "denoise" and rule.cache not in ("commit", "delayed"):
        fitting = (DENOISE,)
    state = RowState(
        tokens=tokens,
        unmask_step=unmask_step,
        unmask_confidence=torch.where(unmask_step >= 0, draw.uniform(B, L), 0.0),
        canvas_len=canvas_len,
        block_start=start,
        block_end=end,
        block_masks=one_of(masks, masks, integers(masks, end - start + 1), integers(0, W + 1)),
        block_step=one_of(integers(0, 5), integers(0, W)),
        step=step,
        phase=torch.where(draw.chance(0.85), pick(fitting), integers(REFRESH, DONE + 1)).int(),
        nfe=integers(0, 100),
        query_tokens=integers(0, 10000),
        error=torch.zeros(B, dtype=torch.int32),
    )

    # 2. The lanes, and which of them are needed.
    lane_start = start
    if given["lane_start"]:
        lane_start = start - integers(0, (W - (end - start)).clamp(min=0) + 1)
        lane_start = lane_start + torch.where(draw.chance(0.05), integers(-W, W + 1), 0)
    allowed = draw.chance(0.8, B, W)
    needed = _needed(state, rule, lane_start, W, allowed if given["allowed"] else None, given["exits"])

    def floats(values: Tensor) -> Tensor:
        return torch.where(needed, values, pick(GARBAGE_FLOATS, B, W))

    def predictions() -> Tensor:
        return torch.where(needed, draw.tokens(_stop_share(draw), B, W), GARBAGE_TOKEN)

    # 3. Thresholds: a few rows have hostile ones. An entropy budget is one of the whole row.
    hostile = draw.chance(0.15)

    def thresholds(*shape: int) -> Tensor:
        ordinary = torch.where(draw.chance(0.7, *shape), pick(THRESHOLDS, *shape), draw.uniform(*shape))
        is_hostile = hostile.reshape(B, *[1] * (len(shape) - 1)) & draw.chance(0.5, *shape)
        return torch.where(is_hostile, pick(HOSTILE_THRESHOLDS, *shape), ordinary)

    value = thresholds(B)
    if rule.passes == "entropy":
        value = value * one_of(torch.ones(B), torch.full((B,), float(W)))
    if rule.passes == "threshold" and draw.drawn(0.3):
        value = floats(thresholds(B, W))
    broken = draw.chance(0.1)[:, None] & draw.chance_of(pick((0.5, 1 / W))[:, None].expand(B, W))
    counts = (-1, 0, 0, 1, 1, 2, 3, 4, W)

    # 4. The call.
    inputs = {
        "query_len": torch.where(draw.chance(0.12), 0, integers(1, W + 1)),
        "pred": predictions(),
        "score": floats(_scores(draw, W)),
        "confidence": floats(draw.uniform(B, W)),
        "value": value,
        "min_unmask": pick((0, 1, 1, 1, 2, 3, W, W + 5)).int(),
        "steps": one_of(pick((0, 1, 2, 3, W, 2 * W + 1)).int(), integers(0, W + 2)),
        "block_length": length if rule.pipeline else torch.where(draw.chance(0.1), 0, length),
        "mask_id": MASK,
        "stop_ids": draw.stop_ids,
        "stat_error": torch.where(needed, broken.int(), GARBAGE_ERROR),
        "rank": floats(_scores(draw, W)),
        "entropy": floats(_entropies(draw, W)),
        "allowed": allowed,
        "lane_start": lane_start,
        "fallback": pick(counts).int(),
        "max_unmask": pick(counts).int(),
        "exits": draw.chance(0.3),
        "max_steps": step + pick((0, 1, 100, 100)).int(),
        "run_value": thresholds(B),
        "edit_value": thresholds(B),
        "refill": predictions(),
        "remask_score": floats(_scores(draw, W)),
        "remask_count": one_of(pick(counts).int(), integers(0, W + 1)),
        "remask_value": thresholds(B),
        "append_masks": one_of(integers(0, length + 1), integers(0, W + 1)),
        "activate_masks": one_of(integers(0, length + 1), integers(0, W + 1)),
        "delay": integers(0, 7),
        "first_token": draw.tokens(torch.full((B,), 0.3), B),
        "first_token_confidence": draw.uniform(B),
    }
    return state, {name: None if given.get(name) is False else tensor for name, tensor in inputs.items()}


class _Draws(RandomRows):
    """Random tensors, and tokens of which some are the call's stop tokens."""

    def __init__(self, generator: torch.Generator, B: int) -> None:
        super().__init__(generator, B)
        count = (0, 1, 1, 2, 3)[int(self.integers(0, 5, 1))]
        self.stop_ids = torch.tensor(TOKENS)[torch.randperm(len(TOKENS), generator=generator)[:count]]

    def tokens(self, stop_share: Tensor, *shape: int) -> Tensor:
        """int64, none the mask. `stop_share`: [B], how many of a row's are stop tokens."""
        tokens = self.pick(TOKENS, *shape)
        if not len(self.stop_ids):
            return tokens
        stops = self.pick(self.stop_ids.tolist(), *shape)
        is_stop = self.chance_of(stop_share.reshape(self.B, *[1] * (len(shape) - 1)).expand(shape))
        return torch.where(is_stop, stops, tokens)


def _given(draw: _Draws, rule: UnmaskRule) -> dict[str, bool]:
    """Which optional inputs are given: what the rule wants, and of those that any rule may have, some."""
    shares = {
        "rank": 0.5,
        "stat_error": 0.7,
        "allowed": 0.3,
        "lane_start": 0.0 if rule.pipeline else 0.4,
        "fallback": 0.3,
        "max_unmask": 0.3,
        "exits": 0.0 if rule.pipeline else 0.8 if rule.renoise else 0.3,
        "max_steps": 0.3,
    }
    free = {name: draw.drawn(share) for name, share in shares.items()}
    return wanted_inputs(rule) | free | {"entropy": rule.passes == "entropy"}


def _regions(draw: _Draws, rule: UnmaskRule, L: int, W: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B] int32 each: the length of the canvas, begin and end of the region, the length of blocks."""
    whole = torch.full((draw.B,), L, dtype=torch.int32)
    canvas_len = draw.one_of(whole, draw.integers(1, L + 1))
    start = draw.one_of(
        torch.zeros_like(whole),
        draw.integers(0, (canvas_len - W).clamp(min=0) + 1),
        draw.integers(0, canvas_len),
    )
    start = torch.minimum(start, canvas_len - 1)
    if rule.pipeline:
        # The region holds whole blocks, unless the canvas ends in the last; few of them, or as many as there are lanes.
        length = draw.one_of(draw.pick((1, 2, 3, 4, W)).int(), draw.integers(1, W + 1))
        blocks = draw.integers(1, (W // length).clamp(min=1) + 1)
        end = start + length * draw.one_of(blocks, blocks.clamp(max=6))
    else:
        length = draw.integers(1, W + 1)
        end = start + draw.one_of(torch.full_like(whole, W), draw.integers(1, W + 1))
    end = torch.minimum(end, canvas_len)
    near_end = torch.minimum(end + draw.integers(0, W + 6), canvas_len)
    return draw.one_of(canvas_len, canvas_len, near_end), start, end, length


def _canvas(
    draw: _Draws, rule: UnmaskRule, L: int, W: int, canvas_len: Tensor, start: Tensor, end: Tensor, length: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[B, L] each: tokens, and the step at which each was written."""
    B, position = draw.B, torch.arange(L)
    before, behind = position < start[:, None], position >= end[:, None]

    # 1. The chance of a mask: in the region that of the position's block, or one for the whole region.
    block = ((position - start[:, None]) // length[:, None]).clamp(0, W - 1).long()
    by_block = draw.pick((0.0, 0.2, 0.7, 1.0), B, W).gather(1, block)
    share = draw.one_of(by_block, by_block, draw.pick((0.0, 0.05, 0.5, 1.0))[:, None].expand(B, L))
    share_behind = draw.pick((1.0, 1.0, 0.5) if rule.pipeline else (0.0, 0.0, 2 / L, 0.3, 1.0))
    share = torch.where(before, draw.pick((0.0, 0.0, 0.0, 0.3))[:, None], share)
    share = torch.where(behind, share_behind[:, None], share)
    masked = draw.chance_of(share)

    # 2. The other positions are given or written.
    tokens = torch.where(masked, MASK, draw.tokens(_stop_share(draw), B, L))
    written = ~masked & draw.chance_of(torch.where(behind, 0.05, 0.5))
    at_step = draw.integers(torch.zeros(B, 1), step[:, None].clamp(min=1), B, L)
    return tokens, torch.where(written, at_step, -1).int()


def _stop_share(draw: _Draws) -> Tensor:
    """[B]: a tenth of a row's tokens are stop tokens; of a few rows, nearly all."""
    return draw.pick((0.1, 0.1, 0.1, 0.1, 0.9))


def _needed(
    state: RowState, rule: UnmaskRule, lane_start: Tensor, W: int, allowed: Tensor | None, may_exit: bool
) -> Tensor:
    """[B, W] bool: lanes that must hold more than garbage, as `reference.unmask` says."""
    L = state.tokens.shape[1]
    lane = lane_start[:, None] + torch.arange(W)
    held_token, held_step = (x.gather(1, lane.clamp(0, L - 1)) for x in (state.tokens, state.unmask_step))
    masked = (lane >= 0) & (lane < state.canvas_len[:, None]) & (held_token == MASK)
    in_region = (lane >= state.block_start[:, None]) & (lane < state.block_end[:, None])
    needed = in_region & (masked if allowed is None else masked & allowed)
    if rule.renoise:
        needed = in_region
    if rule.edit or rule.remask != "none":
        needed = needed | (in_region & (held_step >= 0))
    return needed | masked if may_exit else needed


def _scores(draw: _Draws, W: int) -> Tensor:
    """[B, W]: two coarse grids, which make ties, or any number; a few NaN and -inf."""
    B = draw.B
    hostile = draw.pick((0.0, -0.0, 0.25, 0.5, 0.9, 1.0, math.inf, -math.inf, math.nan), B, W)
    scores = draw.one_of(hostile, draw.integers(0, 12, B, W) / 12, draw.uniform(B, W))
    scores = torch.where(draw.chance(0.02, B, W), math.nan, scores)
    return torch.where(draw.chance(0.02, B, W), -math.inf, scores)


def _entropies(draw: _Draws, W: int) -> Tensor:
    """[B, W]: a coarse grid or any number, of every size; a few NaN."""
    B = draw.B
    hostile = draw.pick((0.0, 0.125, 0.25, 0.5, -1e-9, math.inf, math.nan), B, W)
    ordinary = draw.uniform(B, W) * draw.pick((0.01, 0.3, 1.0, 9.0))[:, None]
    return torch.where(draw.chance(0.01, B, W), math.nan, draw.one_of(hostile, ordinary))
