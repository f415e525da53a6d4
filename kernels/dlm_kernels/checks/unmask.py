"""What a call of `unmask` may be given: checked by its reference and by the kernel's launcher, without reading an
element."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..reference.written import check_written
from ..rules import UnmaskRule
from ..state import ROW_FIELDS, RowState

Kind = Literal["refresh", "denoise"]
KINDS: tuple[Kind, ...] = ("refresh", "denoise")
MAX_STOP_IDS = 16


def wanted_arguments(rule: UnmaskRule) -> dict[str, bool]:
    """Optional arguments that belong to a rule: given if and only if it uses them."""
    return {
        "run_value": rule.runs,
        "edit_value": rule.edit,
        "refill": rule.renoise,
        "remask_score": rule.remask != "none",
        "remask_count": rule.remask in ("lowest", "wino"),
        "remask_value": rule.remask == "wino",
        "append_masks": rule.pipeline,
        "activate_masks": rule.pipeline,
        "delay": rule.cache == "delayed",
        "seed": rule.seed,
        "seed_confidence": rule.seed,
    }


OPTIONAL_LANES = {
    "rank": torch.float32,
    "entropy": torch.float32,
    "stat_error": torch.int32,
    "allowed": torch.bool,
    "refill": torch.int64,
    "remask_score": torch.float32,
}
OPTIONAL_ROWS = {
    "lane_start": torch.int32,
    "fallback": torch.int32,
    "max_unmask": torch.int32,
    "run_value": torch.float32,
    "edit_value": torch.float32,
    "remask_count": torch.int32,
    "remask_value": torch.float32,
    "exits": torch.bool,
    "max_steps": torch.int32,
    "append_masks": torch.int32,
    "activate_masks": torch.int32,
    "delay": torch.int32,
    "seed": torch.int64,
    "seed_confidence": torch.float32,
}


def check_arguments(
    state: RowState,
    rule: UnmaskRule,
    kind: Kind,
    mask_id: int,
    stop_ids: Tensor,
    *,
    rows: dict[str, Tensor | None],
    lanes: dict[str, Tensor | None],
) -> None:
    """Raise unless dtypes, shapes, devices and strides are what `unmask` needs. Reads no element; shared with the
    kernel's launcher."""
    if kind not in KINDS:
        raise ValueError(f"unmask: kind must be one of {', '.join(KINDS)}, got kind={kind!r}")
    if kind == "refresh" and rule.cache == "none":
        raise ValueError(
            "unmask: kind 'refresh' needs a rule.cache other than 'none' (no row could take part), got rule.cache='none'"
        )
    if isinstance(mask_id, bool) or not isinstance(mask_id, int):
        raise TypeError(f"unmask: mask_id must be an int, got {type(mask_id).__name__}")
    if not 0 <= mask_id < 2**31:
        raise ValueError(f"unmask: mask_id must be in [0, 2^31), got mask_id={mask_id}")
    given = {**vars(state), **rows, **lanes, "stop_ids": stop_ids}
    if rule.passes == "entropy" and given["entropy"] is None:
        raise ValueError("unmask: entropy must be given for rule.passes 'entropy', got entropy=None")
    for name, wanted in wanted_arguments(rule).items():
        if (given[name] is not None) != wanted:
            must = "must be given for" if wanted else "must be None for"
            raise ValueError(
                f"unmask: {name} {must} {rule}, got {name}={'None' if given[name] is None else 'a tensor'}"
            )
    if rule.pipeline and given["exits"] is not None:
        raise ValueError("unmask: exits must be None for a pipeline, got a tensor")
    for name, tensor in (("tokens", state.tokens), ("score", lanes["score"])):
        if tensor.dim() != 2 or tensor.shape[1] < 1:
            raise ValueError(
                f"unmask: {name} must be 2-D and at least one position wide, got shape {tuple(tensor.shape)}"
            )
    if stop_ids.dim() != 1 or stop_ids.shape[0] > MAX_STOP_IDS:
        raise ValueError(f"unmask: stop_ids must be [K] with K <= {MAX_STOP_IDS}, got shape {tuple(stop_ids.shape)}")

    (B, L), W = state.tokens.shape, lanes["score"].shape[1]
    expected = {
        "tokens": (torch.int64, (B, L)),
        "unmask_step": (torch.int32, (B, L)),
        "unmask_confidence": (torch.float32, (B, L)),
    }
    expected |= {name: (OPTIONAL_ROWS.get(name, torch.int32), (B,)) for name in (*ROW_FIELDS, *rows)} | {
        "value": (torch.float32, (B,))
    }
    expected |= {name: (OPTIONAL_LANES.get(name, torch.float32), (B, W)) for name in lanes}
    expected |= {"pred": (torch.int64, (B, W)), "stop_ids": (torch.int64, tuple(stop_ids.shape))}
    if rule.passes == "threshold" and given["value"].dim() == 2:
        expected["value"] = (torch.float32, (B, W))
    for name, (dtype, shape) in expected.items():
        tensor = given[name]
        if tensor is None and (name in OPTIONAL_LANES or name in OPTIONAL_ROWS):
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"unmask: {name} must be {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"unmask: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != state.tokens.device:
            raise ValueError(f"unmask: {name} must be on {state.tokens.device} like tokens, got {tensor.device}")
        if shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"unmask: the last dimension of {name} must have stride 1, got strides {tensor.stride()}")
    check_written("unmask", vars(state))
