"""Random calls of `draft_build` and `verify`: drafts that the forward agrees with for a while.

The tests of the ops (tests/support/drafts_cases.py) and the check on a GPU (bench/checks/unmask.py) draw from here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference import DraftSource
from .random_rows import RandomRows
from .unmask_calls import GARBAGE_FLOATS, GARBAGE_TOKEN, MASK, TOKENS


def random_drafts(generator: torch.Generator, *, B: int, D: int, W: int) -> tuple[DraftSource, dict[str, Tensor]]:
    """A source on the CPU, and by name the lanes of a step, the rows' flags, and what the forward said of each draft.

    Some rows have no source, draft nothing or sit out. Chains of drafts that agree have every length up to D. Scores
    tie, are NaN, infinite or -0.0; masks also lie in lanes that are not eligible, whose predictions are garbage.

    Args:
        generator: gives all that is drawn. B: rows. D: drafts. W: lanes.
    """
    draw = RandomRows(generator, B)

    # 1. The source, and the lanes that its drafts fill from the best on.
    eligible = draw.chance_of(draw.pick((0.0, 0.3, 0.5, 0.7, 1.0, 1.0))[:, None].expand(B, W))
    token = draw.pick(TOKENS, B, W)
    score = _scores(draw, B, W)
    best_first = torch.where(score.isnan(), -math.inf, score).argsort(dim=1, descending=True, stable=True)
    not_eligible = (~eligible).gather(1, best_first).int()
    order = best_first.gather(1, not_eligible.argsort(dim=1, stable=True))

    # 2. What the forward says of each draft. A draft agrees with the one after if the lane which that one fills next
    # is the forward's best, too, with the same token.
    draft = torch.arange(D)
    next_lane = order[:, (draft + 1).clamp(max=W - 1)]
    has_next = draft + 1 < eligible.sum(1, keepdim=True)
    is_next = (torch.arange(W) == next_lane[:, :, None]) & has_next[:, :, None]
    all_drafts = torch.full((B,), D, dtype=torch.int32)
    agreeing = draw.one_of(0 * all_drafts, all_drafts, all_drafts, draw.integers(0, D + 1))
    agrees = (draft < agreeing[:, None])[:, :, None]
    repeats = ~agrees & draw.chance(0.05)[:, None, None]  # the whole source
    from_source = (is_next & agrees) | repeats
    tokens_in_chain = torch.where(from_source, token[:, None], draw.pick(TOKENS, B, D, W))
    scores_in_chain = torch.where(from_source, torch.where(is_next, 2.0, 1.0), _scores(draw, B, D, W))

    # 3. Other rows say nearly the same as the source, so that a chain ends anywhere.
    nearly = draw.chance(0.3)[:, None, None]
    nearly_token = torch.where(draw.chance(0.1, B, D, W), draw.pick(TOKENS, B, D, W), token[:, None])
    nearly_score = torch.where(draw.chance(0.02, B, D, W), math.nan, score[:, None])

    def floats(values: Tensor) -> Tensor:
        """The values; garbage in lanes that are not eligible."""
        is_read = eligible.reshape(B, *[1] * (values.dim() - 2), W)
        return torch.where(is_read, values, draw.pick(GARBAGE_FLOATS, *values.shape))

    source = DraftSource(
        token=torch.where(eligible, token, GARBAGE_TOKEN),
        score=floats(score),
        confidence=draw.uniform(B, W),
        tried=draw.integers(0, 9),
        accepted=draw.integers(0, 9),
    )
    return source, {
        "tokens": torch.where(eligible, MASK, draw.pick((*TOKENS, MASK), B, W)),
        "eligible": eligible,
        "ready": draw.chance(0.85),
        "drafting": draw.chance(0.85),
        "selects": draw.chance(0.85),
        "token": torch.where(eligible[:, None], torch.where(nearly, nearly_token, tokens_in_chain), GARBAGE_TOKEN),
        "score": floats(torch.where(nearly, nearly_score, scores_in_chain)),
        "confidence": floats(draw.uniform(B, D, W)),
    }


def _scores(draw: RandomRows, *shape: int) -> Tensor:
    """A coarse grid with hostile numbers, a finer one, which makes ties, or any number."""
    hostile = draw.pick((0.0, -0.0, 0.25, 0.5, math.inf, -math.inf, math.nan), *shape)
    return draw.one_of(hostile, draw.integers(0, shape[-1], *shape) / shape[-1], draw.uniform(*shape))
