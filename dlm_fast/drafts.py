"""Lossless self-speculation: a step verifies several canvases, each one token further along the static decoder's path.

The last accepted forward predicts the whole order of the block. Draft k writes its k + 1 best positions; one forward of all drafts
tells what the static decoder (one token per step) would have done after each, and the longest agreeing chain is accepted. The tokens
are therefore those of the static decoder, in fewer forwards of more positions. FreeDave, arXiv:2510.00294.
"""

from __future__ import annotations

import dataclasses

import torch
from dlm_kernels import RowState
from torch import Tensor

from .policies.base import Choice, Lanes, places

# A row whose drafts were accepted less than once in so many tries, after so many, goes on without drafts.
TRIES, RARELY = 8, 4


@dataclasses.dataclass(frozen=True)
class Drafts:
    """The source of the next drafts, per lane [B, W], and how drafting went so far, per row [B]. Written in place.

    token, score, confidence: predictions of the accepted canvas. tried, accepted: verifications, and drafts accepted beyond the first.
    """

    token: Tensor
    score: Tensor
    confidence: Tensor
    tried: Tensor
    accepted: Tensor

    @classmethod
    def empty(cls, state: RowState, lanes: int) -> Drafts:
        B, device = state.tokens.shape[0], state.tokens.device
        return cls(
            token=torch.full((B, lanes), -1, dtype=torch.int64, device=device),
            score=torch.zeros(B, lanes, device=device),
            confidence=torch.zeros(B, lanes, device=device),
            tried=torch.zeros(B, dtype=torch.int32, device=device),
            accepted=torch.zeros(B, dtype=torch.int32, device=device),
        )

    def suspended(self) -> Tensor:
        """[B] bool rows whose drafts were accepted too rarely to pay for themselves."""
        return (self.tried >= TRIES) & (RARELY * self.accepted < self.tried)

    def ready(self, state: RowState, kind: str) -> Tensor:
        """[B] bool rows that have a source: not those at the first step of a block, whose forward is the source."""
        return (state.block_step > 0) & (kind == "window")

    def tokens(self, lanes: Lanes, ready: Tensor, D: int) -> Tensor:
        """[B, D, W] held tokens of every draft; a row without a source holds its own D times."""
        place = places(lanes.eligible, self.score)[:, None]
        k = torch.arange(D, device=place.device)[:, None]
        write = (place <= k) & lanes.eligible[:, None] & ready[:, None, None]
        return torch.where(write, self.token[:, None], lanes.tokens[:, None])

    def choose(
        self, lanes: Lanes, ready: Tensor, selects: Tensor, held: Tensor, token: Tensor, score: Tensor, confidence: Tensor, mask_id: int
    ) -> Choice:
        """Accepts the longest chain and makes its last canvas the next source.

        Args:
            held, token, score, confidence: [B, D, W] of the drafts: what they hold, and what their forward predicts.
        """
        B, D, W = held.shape
        place = places(lanes.eligible, self.score)
        left = lanes.eligible.sum(1)
        masked = lanes.eligible[:, None] & (held == mask_id)
        best_lane = places(masked.flatten(0, 1), score.flatten(0, 1)).view(B, D, W) == 0
        target = torch.where(best_lane, token, held)
        agrees = (target[:, :, None] == held[:, None]).all(-1)  # [B, draft, later draft]
        k = torch.arange(D, device=held.device)
        agrees = agrees & (k[None, :] > k[:, None]) & (k < left[:, None])[:, None] & (ready & ~self.suspended())[:, None, None]
        best = torch.zeros(B, 1, dtype=torch.int64, device=held.device)
        for _ in range(D - 1):
            reached = agrees.gather(1, best[:, :, None].expand(B, 1, D))[:, 0]
            best = torch.maximum(best, torch.where(reached, k, 0).amax(1, keepdim=True))

        def of_best(values: Tensor) -> Tensor:
            return values.gather(1, best[:, :, None].expand(B, 1, W))[:, 0]

        count = torch.where(ready, best[:, 0] + 1, 0)
        # The last mask needs no forward of its own: the accepted canvas has predicted it.
        closes = left - count == 1
        from_draft = (place < count[:, None]) & lanes.eligible
        pred = torch.where(from_draft, self.token, of_best(token))
        certain = torch.where(from_draft, self.confidence, of_best(confidence))
        chosen = place < (count + closes)[:, None]
        choice = Choice(
            pred=pred,
            score=-place.float(),
            confidence=certain,
            value=torch.zeros(B, device=held.device),
            min_unmask=torch.zeros(B, dtype=torch.int32, device=held.device),
        ).only(chosen)

        tries = (ready & selects & ~self.suspended()).int()
        self.accepted.add_(torch.where(tries > 0, best[:, 0], 0).int())
        self.tried.add_(tries)
        for mine, new in ((self.token, token), (self.score, score), (self.confidence, confidence)):
            mine.copy_(torch.where(selects[:, None], of_best(new), mine))
        return choice
