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
from .plan import Plan

# A row whose drafts were accepted less than once in so many tries, after so many, goes on without drafts.
TRIES, RARELY = 8, 4


@dataclasses.dataclass(frozen=True)
class Drafts(DraftSource):
    """Where the next drafts come from, and how drafting has gone so far; both are written in place."""

    @classmethod
    def empty(cls, state: RowState, lanes: int) -> Drafts:
        """The drafts of a decode that has not begun: no row has a source."""
        B, device = state.tokens.shape[0], state.tokens.device
        return cls(
            token=torch.full((B, lanes), -1, dtype=torch.int64, device=device),
            score=torch.zeros(B, lanes, dtype=torch.float32, device=device),
            confidence=torch.zeros(B, lanes, dtype=torch.float32, device=device),
            tried=torch.zeros(B, dtype=torch.int32, device=device),
            accepted=torch.zeros(B, dtype=torch.int32, device=device),
        )

    def of_rows(self, rows: Tensor) -> Drafts:
        """A copy for some rows [n] int64 of the batch."""
        return Drafts(**{name: field.index_select(0, rows) for name, field in vars(self).items()})

    def put_rows(self, rows: Tensor, part: Drafts) -> None:
        """Takes over `part`, that of the rows [n]."""
        for name, field in vars(self).items():
            field.index_copy_(0, rows, getattr(part, name))

    def suspended(self) -> Tensor:
        """[B] bool rows whose drafts were accepted too rarely to pay for themselves."""
        return self.tried > (RARELY * self.accepted).clamp(min=TRIES - 1)

    def ready(self, state: RowState, selects: Tensor) -> Tensor:
        """[B] bool rows that have a source, of those that select. The first step of a block has none: its forward is
        what makes the first."""
        return (state.block_step > 0) & selects

    def tokens(self, ops: Ops, lanes: Lanes, ready: Tensor, D: int) -> Tensor:
        """[B, D, W] the tokens that every draft holds at the lanes; a row without a source has D equal drafts."""
        return ops.draft_build(self, lanes.tokens, lanes.eligible, ready, D=D)

    def choose(
        self,
        ops: Ops,
        lanes: Lanes,
        ready: Tensor,
        drafting: Tensor,
        selects: Tensor,
        held: Tensor,
        token: Tensor,
        score: Tensor,
        confidence: Tensor,
        plan: Plan,
    ) -> Choice:
        """Accepts the longest chain of drafts that agree, and makes the last of them the next source.

        Args:
            ops: the backend.
            lanes: the positions that the step looks at.
            ready: [B] bool rows that had drafts to verify.
            drafting: [B] bool rows that go on drafting.
            selects: [B] bool rows for which tokens are chosen.
            held: [B, D, W] tokens that the drafts hold.
            token: [B, D, W] tokens that the forward predicts from each draft.
            score: [B, D, W] what orders the predictions.
            confidence: [B, D, W] probability of the predictions.
            plan: what is the same for every step of the decode.
        """
        verified = ops.verify(
            self,
            held,
            token,
            score,
            confidence,
            eligible=lanes.eligible,
            ready=ready,
            drafting=drafting,
            selects=selects,
            mask_id=plan.mask_id,
        )
        chosen = verified.chosen.float()
        return Choice(
            pred=verified.pred,
            score=chosen,
            confidence=verified.confidence,
            value=torch.full_like(chosen[:, 0], 0.5),
            min_unmask=plan.constants.zeros(selects.shape[0]),
            rank=chosen,
            exact=True,
        )
