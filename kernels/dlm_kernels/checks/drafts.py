"""What `draft_build` and `verify` accept: checked by their references and by the kernels' launchers, without reading an
element."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state import DraftSource
from .named import check_of, shown
from .written import check_written

# The largest number of drafts: `verify` compares each draft with every later one.
MAX_DRAFTS = 256


@check_of("draft_build")
def check_build(source: DraftSource, tokens: Tensor, eligible: Tensor, ready: Tensor, D: int) -> None:
    """Raises unless `draft_build` can take these."""
    if isinstance(D, bool) or not isinstance(D, int):
        raise TypeError(f"draft_build: D must be an int, got {type(D).__name__}")
    if D < 1:
        raise ValueError(f"draft_build: D must be at least 1, got D={shown(D)}")
    if D > MAX_DRAFTS:
        raise ValueError(f"draft_build: D must be at most {MAX_DRAFTS}, got D={shown(D)}")
    _check("draft_build", source, 2, dict(tokens=(tokens, torch.int64, "BW")), eligible=eligible, ready=ready)


@check_of("verify")
def check_verify(
    source: DraftSource,
    held: Tensor,
    token: Tensor,
    score: Tensor,
    confidence: Tensor,
    eligible: Tensor,
    ready: Tensor,
    drafting: Tensor,
    selects: Tensor,
    mask_id: int,
) -> None:
    """Raises unless `verify` can take these."""
    if isinstance(mask_id, bool) or not isinstance(mask_id, int):
        raise TypeError(f"verify: mask_id must be an int, got {type(mask_id).__name__}")
    lanes = dict(
        held=(held, torch.int64, "BDW"),
        token=(token, torch.int64, "BDW"),
        score=(score, torch.float32, "BDW"),
        confidence=(confidence, torch.float32, "BDW"),
    )
    if not 0 <= mask_id < 2**31:
        raise ValueError(f"verify: mask_id must be in [0, 2^31), got mask_id={shown(mask_id)}")
    _check("verify", source, 3, lanes, eligible=eligible, ready=ready, drafting=drafting, selects=selects)
    check_written("verify", {f"source.{name}": field for name, field in vars(source).items()})


def _check(op: str, source: DraftSource, rank: int, lanes: dict, *, eligible: Tensor, **rows: Tensor) -> None:
    name, (first, _, _) = next(iter(lanes.items()))
    if first.dim() != rank or 0 in first.shape[1:]:
        form = "[B, W]" if rank == 2 else "[B, D, W]"
        raise ValueError(f"{op}: {name} must be {form} with at least one lane, got shape {tuple(first.shape)}")
    if rank == 3 and first.shape[1] > MAX_DRAFTS:
        raise ValueError(f"{op}: {name} must hold at most {MAX_DRAFTS} drafts, got shape {tuple(first.shape)}")
    B, W, D = first.shape[0], first.shape[-1], first.shape[1]
    shapes = {"B": (B,), "BW": (B, W), "BDW": (B, D, W)}
    expected = (
        dict(lanes)
        | {"eligible": (eligible, torch.bool, "BW")}
        | {key: (x, torch.bool, "B") for key, x in rows.items()}
    )
    expected |= {
        "source.token": (source.token, torch.int64, "BW"),
        "source.score": (source.score, torch.float32, "BW"),
        "source.confidence": (source.confidence, torch.float32, "BW"),
        "source.tried": (source.tried, torch.int32, "B"),
        "source.accepted": (source.accepted, torch.int32, "B"),
    }
    for name, (tensor, dtype, form) in expected.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shapes[form]:
            raise ValueError(f"{op}: {name} must have shape {shapes[form]}, got {tuple(tensor.shape)}")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like {next(iter(lanes))}, got {tensor.device}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{op}: the last dimension of {name} must have stride 1, got strides {tensor.stride()}")
