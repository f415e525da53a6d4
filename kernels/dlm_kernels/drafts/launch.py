"""`draft_build` and `verify`, one launch each, one program per row. Specification: reference.drafts."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from .. import device
from ..checks.drafts import check_build, check_verify
from ..library import operator
from ..plans import Calls, Launch, Plan
from ..reference.drafts import Verified
from ..state import DraftSource
from ..tiles import drafts_tile
from .kernel import draft_build_kernel, verify_kernel

_of_source = attrgetter("token", "score", "confidence", "tried", "accepted")
_SOURCE = tuple(f"source_{name}_ptr" for name in ("token", "score", "confidence")) + ("tried_ptr", "accepted_ptr")
_BUILD_NAMES = (*_SOURCE, "tokens_ptr", "eligible_ptr", "ready_ptr")
_VERIFY_NAMES = (
    *_SOURCE, "held_ptr", "token_ptr", "score_ptr", "confidence_ptr", "eligible_ptr", "ready_ptr", "drafting_ptr",
    "selects_ptr",
)  # fmt: skip
_VERIFIED_NAMES = ("chosen_ptr", "pred_ptr", "certain_ptr")
_build_calls, _verify_calls = Calls("draft_build", _BUILD_NAMES), Calls("verify", _VERIFY_NAMES)


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
    # 1. What is known of such a call.
    try:
        given = (*_of_source(source), tokens, eligible, ready)
    except AttributeError:  # no source: the check says so
        given = ()
    call, key, tensors, pointers = _build_calls.find(given, (type(source), type(D), D))

    # 2. The check, unless the call is known to pass.
    if call is None or not call.accepts(tensors, ()):
        check_build(source, tokens, eligible, ready, D)
        if call is None:
            call = _build_calls.add(key if type(source) is DraftSource else None)
        call.accepted(())

    # 3. The plan of such calls.
    B, W = tokens.shape
    held = torch.empty(B, D, W, dtype=torch.int64, device=tokens.device)
    if B == 0:
        return held
    device.capability_of("draft_build", tokens, draft_build_kernel)
    plan = call.plan_for((draft_build_kernel,))
    if plan is None:
        plan = _build_plan(given, D)
        call.plan = (draft_build_kernel,), plan
    plan.run(tokens, tensors, (held,), pointers)
    return held


def _build_plan(given: Sequence[Tensor], D: int) -> Plan:
    """How all calls like one are launched, whose tensors `_BUILD_NAMES` names."""
    names = (*_BUILD_NAMES, "held_ptr")
    token, score, *_, tokens, eligible, _ = given
    B, W = tokens.shape
    BLOCK_T, num_warps = drafts_tile(W)
    values = {
        "source_token_stride": token.stride(0),
        "source_score_stride": score.stride(0),
        "tokens_stride": tokens.stride(0),
        "eligible_stride": eligible.stride(0),
        "W": W,
        "D": D,
        "BLOCK_T": BLOCK_T,
        "num_warps": num_warps,
        "num_stages": 1,
    }
    places = {name: place for place, name in enumerate(names)}
    used = [name for name in names if name not in ("source_confidence_ptr", "tried_ptr", "accepted_ptr")]
    return Plan([Launch(draft_build_kernel, (B,), used, places, values)])


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
    # 1. What is known of such a call.
    try:
        given = (*_of_source(source), held, token, score, confidence, eligible, ready, drafting, selects)
    except AttributeError:  # no source: the check says so
        given = ()
    call, key, tensors, pointers = _verify_calls.find(given, (type(source), type(mask_id), mask_id))
    written = pointers[: len(_SOURCE)]

    # 2. The check, unless the call is known to pass.
    if call is None or not call.accepts(tensors, written):
        check_verify(source, held, token, score, confidence, eligible, ready, drafting, selects, mask_id)
        if call is None:
            call = _verify_calls.add(key if type(source) is DraftSource else None)
        call.accepted(written)

    # 3. The plan of such calls.
    result = _verified(held=held)
    if held.shape[0] == 0:
        return result
    device.capability_of("verify", held, verify_kernel)
    plan = call.plan_for((verify_kernel,))
    if plan is None:
        plan = _verify_plan(given, mask_id)
        call.plan = (verify_kernel,), plan
    plan.run(held, tensors, result, pointers)
    return result


def _verify_plan(given: Sequence[Tensor], mask_id: int) -> Plan:
    """How all calls like one are launched, whose tensors `_VERIFY_NAMES` names."""
    source_token, source_score, source_confidence, _, _, held, token, score, confidence, eligible, *_ = given
    B, D, W = held.shape
    BLOCK_T, num_warps = drafts_tile(W)
    values = {
        "source_token_stride": source_token.stride(0),
        "source_score_stride": source_score.stride(0),
        "source_confidence_stride": source_confidence.stride(0),
        "eligible_stride": eligible.stride(0),
        "held_stride": held.stride(0),
        "held_draft_stride": held.stride(1),
        "token_stride": token.stride(0),
        "token_draft_stride": token.stride(1),
        "score_stride": score.stride(0),
        "score_draft_stride": score.stride(1),
        "confidence_stride": confidence.stride(0),
        "confidence_draft_stride": confidence.stride(1),
        "W": W,
        "D": D,
        "mask_id": mask_id,
        "BLOCK_T": BLOCK_T,
        "num_warps": num_warps,
        "num_stages": 1,
    }
    names = (*_VERIFY_NAMES, *_VERIFIED_NAMES)
    places = {name: place for place, name in enumerate(names)}
    return Plan([Launch(verify_kernel, (B,), names, places, values)])
