"""`draft_build` and `verify`, one launch each, one program per row. Specification: reference.drafts."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import device
from ..checks.drafts import check_build, check_verify
from ..library import operator
from ..reference.drafts import Verified
from ..state import DraftSource
from ..tiles import drafts_tile
from .kernel import draft_build_kernel, verify_kernel


def _held(source: DraftSource, tokens: Tensor, *, D: int, **_: object) -> Tensor:
    B, W = tokens.shape
    return tokens.new_empty(B, D, W)


@operator(fake=_held)
def draft_build(source: DraftSource, tokens: Tensor, eligible: Tensor, ready: Tensor, *, D: int) -> Tensor:
    """The held tokens [B, D, W] int64 of D canvases a row: draft k is the row with its k + 1 best eligible lanes
    written.

    The result equals that of reference.draft_build bit for bit, where arguments and errors are described. Nothing
    depends on the tile or on the other rows. Traffic: every draft reads 26 B a lane (all but the first from L2) and
    writes 8 B.

    Raises:
        As reference.draft_build, and RuntimeError: CPU tensors without Triton's interpreter.  NotImplementedError: a
        GPU that `tiles.TARGETS` does not name.
    """
    check_build(source, tokens, eligible, ready, D)
    B, W = tokens.shape
    held = torch.empty(B, D, W, dtype=torch.int64, device=tokens.device)
    if B == 0:
        return held
    device.capability_of("draft_build", tokens, draft_build_kernel)
    BLOCK_T, num_warps = drafts_tile(W)
    with device.launching_on(tokens):
        draft_build_kernel[(B,)](
            source_token_ptr=source.token,
            source_score_ptr=source.score,
            tokens_ptr=tokens,
            eligible_ptr=eligible,
            ready_ptr=ready,
            held_ptr=held,
            source_token_stride=source.token.stride(0),
            source_score_stride=source.score.stride(0),
            tokens_stride=tokens.stride(0),
            eligible_stride=eligible.stride(0),
            W=W,
            D=D,
            BLOCK_T=BLOCK_T,
            num_warps=num_warps,
            num_stages=1,
        )
    return held


def _verified(held: Tensor, **_: object) -> Verified:
    """`Verified` of the shapes and dtypes that `verify` returns, not written."""
    B, _, W = held.shape
    return Verified(
        chosen=torch.empty(B, W, dtype=torch.bool, device=held.device),
        pred=torch.empty(B, W, dtype=torch.int64, device=held.device),
        confidence=torch.empty(B, W, dtype=torch.float32, device=held.device),
    )


@operator(mutates=("source",), fake=_verified, result=Verified)
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

    The result equals that of reference.verify bit for bit, where arguments and errors are described. Nothing depends on
    the tile or on the other rows. Traffic: 61 B a lane, and besides 13 B a lane for every accepted draft and 16 B for
    every draft that is compared with one.

    Raises:
        As reference.verify, and RuntimeError: CPU tensors without Triton's interpreter.  NotImplementedError: a GPU
        that `tiles.TARGETS` does not name.
    """
    check_verify(source, held, token, score, confidence, eligible, ready, drafting, selects, mask_id)
    B, D, W = held.shape
    result = _verified(held=held)
    if B == 0:
        return result
    device.capability_of("verify", held, verify_kernel)
    BLOCK_T, num_warps = drafts_tile(W)
    with device.launching_on(held):
        verify_kernel[(B,)](
            source_token_ptr=source.token,
            source_score_ptr=source.score,
            source_confidence_ptr=source.confidence,
            tried_ptr=source.tried,
            accepted_ptr=source.accepted,
            held_ptr=held,
            token_ptr=token,
            score_ptr=score,
            confidence_ptr=confidence,
            eligible_ptr=eligible,
            ready_ptr=ready,
            drafting_ptr=drafting,
            selects_ptr=selects,
            chosen_ptr=result.chosen,
            pred_ptr=result.pred,
            certain_ptr=result.confidence,
            source_token_stride=source.token.stride(0),
            source_score_stride=source.score.stride(0),
            source_confidence_stride=source.confidence.stride(0),
            eligible_stride=eligible.stride(0),
            held_stride=held.stride(0),
            held_draft_stride=held.stride(1),
            token_stride=token.stride(0),
            token_draft_stride=token.stride(1),
            score_stride=score.stride(0),
            score_draft_stride=score.stride(1),
            confidence_stride=confidence.stride(0),
            confidence_draft_stride=confidence.stride(1),
            W=W,
            D=D,
            mask_id=mask_id,
            BLOCK_T=BLOCK_T,
            num_warps=num_warps,
            num_stages=1,
        )
    return result
