"""Lossless self-speculation: a step verifies several canvases, each one token further along the static decoder's path.

The tensor work is in the ops `draft_build` and `verify` (dlm_kernels.reference.drafts); here is what a decoder keeps
between steps and how it asks for them. FreeDave, arXiv:2510.00294.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.reference import DraftSource

from ..ops import Ops
from ..policies import Choice, Lanes

# A row whose drafts were accepted less than once in so many tries, after so many, goes on without drafts.
TRIES, RARELY = 8, 4


@dataclasses.dataclass(frozen=True)
class Drafts(DraftSource):
    """The source of the next drafts, and how drafting went so far. Written in place."""

    @classmethod
    def empty(cls, state: RowState, lanes: int) -> Drafts:
        B, device = state.tokens.shape[0], state.tokens.device
        return cls(
            token=torch.full((B, lanes), -1, dtype=torch.int64, device=device),
            score=torch.zeros(B, lanes, dtype=torch.float32, device=device),
            confidence=torch.zeros(B, lanes, dtype=torch.float32, device=device),
            tried=torch.zeros(B, dtype=torch.int32, device=device),
            accepted=torch.zeros(B, dtype=torch.int32, device=device),
        )

    def suspended(self) -> Tensor:
        """[B] bool rows whose drafts were accepted too rarely to pay for themselves."""
        return (self.tried >= TRIES) & (RARELY * self.accepted < self.tried)

    def ready(self, state: RowState, kind: str) -> Tensor:
        """[B] bool rows that have a source: not those at the first step of a block, whose forward is the source."""
        return (state.block_step > 0) & (kind == "denoise")

    def tokens(self, ops: Ops, lanes: Lanes, ready: Tensor, D: int) -> Tensor:
        """[B, D, W] held tokens of every draft; a row without a source holds its own D times."""
        return ops.draft_build(self, lanes.tokens, lanes.eligible, ready, D=D)

    def choose(
        self,
        ops: Ops,
        lanes: Lanes,
        ready: Tensor,
        selects: Tensor,
        held: Tensor,
        token: Tensor,
        score: Tensor,
        confidence: Tensor,
        mask_id: int,
    ) -> Choice:
        """Accepts the longest chain and makes its last canvas the next source.

        Args:
            held, token, score, confidence: [B, D, W] of the drafts: what they hold, and what their forward predicts.
        """
        verified = ops.verify(
            self,
            held,
            token,
            score,
            confidence,
            eligible=lanes.eligible,
            ready=ready,
            drafting=~self.suspended(),
            selects=selects,
            mask_id=mask_id,
        )
        return Choice(
            pred=verified.pred,
            score=verified.chosen.float(),
            confidence=verified.confidence,
            value=torch.zeros_like(verified.confidence[:, 0]),
            min_unmask=torch.zeros_like(self.tried),
        ).only(verified.chosen)
