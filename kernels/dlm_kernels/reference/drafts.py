"""Lossless self-speculation in plain torch: `draft_build` makes the canvases that one forward verifies, `verify`
accepts them.

The last accepted forward, the source, predicts the whole order of a block. Draft k writes its k + 1 best positions; one
forward of all drafts tells what the static decoder (one token a step) would have done after each, and the longest
agreeing chain is accepted. The tokens are therefore those of the static decoder, in fewer forwards of more positions.
FreeDave, arXiv:2510.00294.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks.drafts import check_build, check_verify
from ..state import DraftSource
from .select import rank_order


class Verified(NamedTuple):
    """What a step writes, lane by lane, each [B, W]: the lanes `chosen` (bool), their token `pred` (int64) and its
    `confidence` (fp32)."""

    chosen: Tensor
    pred: Tensor
    confidence: Tensor


def draft_build(source: DraftSource, tokens: Tensor, eligible: Tensor, ready: Tensor, *, D: int) -> Tensor:
    """The held tokens of D canvases a row: draft k is the row with its k + 1 best eligible lanes written, as the source
    predicts them.

        source's order 2 0 1, D = 2       tokens  # # # g    draft 0  # # c g    draft 1  a # c g

    Best means of highest source.score, and of the lowest lane among ties; -0.0 ties with 0.0, and NaN counts as -inf.

    Args:
        source: its token and score are read where a lane is eligible.
        tokens: [B, W] int64 held tokens of the lanes, W as in `source`.
        eligible: [B, W] bool lanes that may be written. A draft writes no more than there are.
        ready: [B] bool rows that have a source; every draft of another row is the row as it is.
        D: drafts, at least 1 and at most `checks.drafts.MAX_DRAFTS`.
    Returns:
        [B, D, W] int64.
    Raises:
        TypeError: dtype. ValueError: shape, device, last stride, D.

    Checked in the debug mode only (`dlm_kernels.debug`), because it reads the device: tokens, and source.token where a
    draft may write it, are ids.
    """
    check_build(source, tokens, eligible, ready, D)
    place = _places(eligible, source.score)[:, None]
    k = torch.arange(D, device=place.device)[:, None]
    write = (place <= k) & (eligible & ready[:, None])[:, None]
    return torch.where(write, source.token[:, None], tokens[:, None])


def verify(
    source: DraftSource,
    held: Tensor,
    token: Tensor,
    score: Tensor,
    confidence: Tensor,
    *,
    eligible: Tensor,
    ready: Tensor,
    drafting: Tensor,
    selects: Tensor,
    mask_id: int,
) -> Verified:
    """Accepts the longest chain of drafts and makes its last canvas the next source, in place.

        target_i  draft i with the one lane written that the static decoder writes next: its best masked lane, by the
                  draft's own scores, receives the draft's own token (nothing if the draft holds no mask)
        agrees    draft j > i is what the static decoder makes of draft i: target_i = held_j on every lane, and there
                  are more than j eligible lanes
        accepted  best = 0; again and again the last draft that agrees with `best`, until there is none

    A ready row writes the best + 1 lanes of the accepted draft, as the source predicted them. The last masked lane
    needs no forward of its own: the accepted canvas has predicted it, so it is written too. A row without a source
    writes at most that last lane.

    Args:
        source: what the drafts were made from. Rows that select get the predictions of their accepted draft (draft 0
            without drafts); of rows that draft and select, tried and accepted are counted.
        held: [B, D, W] int64 from `draft_build`. token int64, score, confidence fp32 [B, D, W]: what the forward of
            each draft predicts, read in eligible lanes only; scores are ordered as in `draft_build`. The first two
            strides may be anything.
        eligible, ready: as given to `draft_build`.
        drafting: [B] bool rows that may accept more than draft 0, if they are ready.
        selects: [B] bool rows that take part in this step.
        mask_id: what a masked lane holds.
    Returns:
        `Verified`; pred and confidence hold the predictions of the accepted draft in lanes that are not chosen,
        eligible or not.
    Raises:
        TypeError: dtype. ValueError: shape, device, last stride, fields of the source that are expanded, share memory
        or require a gradient.

    Checked in the debug mode only (`dlm_kernels.debug`), because it reads the device: held holds ids, token
    (where its draft holds a mask) and source.token hold other ids than the mask's wherever they may be written, and
    tried and accepted are not negative.
    """
    check_verify(source, held, token, score, confidence, eligible, ready, drafting, selects, mask_id)
    # 1. Which later drafts agree with each draft.
    B, D, W = held.shape
    place = _places(eligible, source.score)
    left = eligible.sum(1)
    masked = eligible[:, None] & (held == mask_id)
    next_lane = _places(masked.flatten(0, 1), score.flatten(0, 1)).view(B, D, W) == 0
    target = torch.where(next_lane, token, held)
    drafts = ready & drafting
    k = torch.arange(D, device=held.device)
    agrees = (target[:, :, None] == held[:, None]).all(-1)  # [B, draft, later draft]
    agrees = agrees & (k[None, :] > k[:, None]) & (k < left[:, None])[:, None] & drafts[:, None, None]

    # 2. The chain, from draft 0 to the last draft that agrees with the one before.
    best = torch.zeros(B, 1, dtype=torch.int64, device=held.device)
    for _ in range(D - 1):
        reached = agrees.gather(1, best[:, :, None].expand(B, 1, D))[:, 0]
        best = torch.maximum(best, torch.where(reached, k, 0).amax(1, keepdim=True))

    def of_best(values: Tensor) -> Tensor:
        return values.gather(1, best[:, :, None].expand(B, 1, W))[:, 0]

    # 3. What is written.
    count = torch.where(ready, best[:, 0] + 1, 0)
    closes = left - count == 1
    from_draft = (place < count[:, None]) & eligible
    result = Verified(
        chosen=(place < (count + closes)[:, None]) & eligible,
        pred=torch.where(from_draft, source.token, of_best(token)),
        confidence=torch.where(from_draft, source.confidence, of_best(confidence)),
    )

    # 4. The accepted draft becomes the source.
    counts = drafts & selects
    source.accepted.add_(torch.where(counts, best[:, 0], 0).int())
    source.tried.add_(counts.int())
    for mine, new in ((source.token, token), (source.score, score), (source.confidence, confidence)):
        mine.copy_(torch.where(selects[:, None], of_best(new), mine))
    return result


def _places(among: Tensor, score: Tensor) -> Tensor:
    """[B, W] int64: the place of every lane in the order of `unmask`, W for lanes that are not `among`."""
    order = rank_order(among, score)
    place = torch.zeros_like(order).scatter(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return torch.where(among, place, order.shape[1])
