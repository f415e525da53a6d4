"""What a call of `unmask` may be given: checked by its reference and by the kernels' launcher, without reading an
element."""

from __future__ import annotations

import dataclasses

import torch

from ..rules import KINDS, Kind, UnmaskInputs, UnmaskRule
from ..state import ROW_FIELDS, RowState
from .named import check_of, shown
from .written import check_written

MAX_STOP_IDS = 16

# The tensors of `UnmaskInputs` and their dtypes. LANES have a number for every lane [B, W], ROWS one for every row [B];
# `value` is per row, or per lane for passes "threshold".
LANES = {
    "pred": torch.int64,
    "score": torch.float32,
    "confidence": torch.float32,
    "rank": torch.float32,
    "entropy": torch.float32,
    "stat_error": torch.int32,
    "allowed": torch.bool,
    "refill": torch.int64,
    "remask_score": torch.float32,
}
ROWS = {
    "query_len": torch.int32,
    "value": torch.float32,
    "min_unmask": torch.int32,
    "steps": torch.int32,
    "block_length": torch.int32,
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
    "first_token": torch.int64,
    "first_token_confidence": torch.float32,
}
# Inputs that may be None.
OPTIONAL = tuple(field.name for field in dataclasses.fields(UnmaskInputs) if field.default is None)
# Every tensor of a call in the order of the checks: its name, its dtype, what its shape depends on, may it be None.
TENSORS = (
    ("tokens", torch.int64, "canvas", False),
    ("unmask_step", torch.int32, "canvas", False),
    ("unmask_confidence", torch.float32, "canvas", False),
    *((name, torch.int32, "row", False) for name in ROW_FIELDS),
    *((name, dtype, "value" if name == "value" else "row", name in OPTIONAL) for name, dtype in ROWS.items()),
    *((name, dtype, "lane", name in OPTIONAL) for name, dtype in LANES.items()),
    ("stop_ids", torch.int64, "stop_ids", False),
)


def wanted_inputs(rule: UnmaskRule) -> dict[str, bool]:
    """Optional inputs that belong to a rule: each is given if and only if the rule uses it."""
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
        "first_token": rule.first_token,
        "first_token_confidence": rule.first_token,
    }


@check_of("unmask")
def check_arguments(state: RowState, rule: UnmaskRule, inputs: UnmaskInputs, kind: Kind) -> None:
    """Raise unless dtypes, shapes, devices and strides are what `unmask` needs. Reads no element."""
    # 1. The scalars, and which inputs are there.
    if kind not in KINDS:
        raise ValueError(f"unmask: kind must be one of {', '.join(KINDS)}, got kind={kind!r}")
    if kind == "refresh" and rule.cache == "none":
        raise ValueError(
            "unmask: kind 'refresh' needs a rule.cache other than 'none' (no row could take part), "
            "got rule.cache='none'"
        )
    mask_id, stop_ids = inputs.mask_id, inputs.stop_ids
    if isinstance(mask_id, bool) or not isinstance(mask_id, int):
        raise TypeError(f"unmask: mask_id must be an int, got {type(mask_id).__name__}")
    if not 0 <= mask_id < 2**31:
        raise ValueError(f"unmask: mask_id must be in [0, 2^31), got mask_id={shown(mask_id)}")
    if rule.passes == "entropy" and inputs.entropy is None:
        raise ValueError("unmask: entropy must be given for rule.passes 'entropy', got entropy=None")
    given = vars(state) | vars(inputs)
    for name, wanted in wanted_inputs(rule).items():
        tensor = given[name]
        if (tensor is not None) != wanted:
            must = "must be given for" if wanted else "must be None for"
            raise ValueError(f"unmask: {name} {must} {rule}, got {name}={'None' if tensor is None else 'a tensor'}")
    if rule.pipeline and inputs.exits is not None:
        raise ValueError("unmask: exits must be None for a pipeline, got a tensor")

    # 2. The tensors that say how large the others must be.
    for name, tensor in (("tokens", state.tokens), ("score", inputs.score)):
        if tensor.dim() != 2 or tensor.shape[1] < 1:
            raise ValueError(
                f"unmask: {name} must be 2-D and at least one position wide, got shape {tuple(tensor.shape)}"
            )
    if stop_ids.dim() != 1 or stop_ids.shape[0] > MAX_STOP_IDS:
        raise ValueError(f"unmask: stop_ids must be [K] with K <= {MAX_STOP_IDS}, got shape {tuple(stop_ids.shape)}")

    # 3. Every tensor.
    (B, L), W, device = state.tokens.shape, inputs.score.shape[1], state.tokens.device
    shapes = {"canvas": (B, L), "row": (B,), "lane": (B, W), "value": (B,), "stop_ids": tuple(stop_ids.shape)}
    if rule.passes == "threshold" and inputs.value.dim() == 2:
        shapes["value"] = (B, W)
    for name, dtype, form, is_optional in TENSORS:
        tensor = given[name]
        if tensor is None and is_optional:
            continue
        shape = shapes[form]
        if tensor.dtype != dtype:
            raise TypeError(f"unmask: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"unmask: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"unmask: {name} must be on {device} like tokens, got {tensor.device}")
        # Most tensors are contiguous, which is quicker to tell than a stride.
        if not tensor.is_contiguous() and shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"unmask: the last dimension of {name} must have stride 1, got strides {tensor.stride()}")
    check_written("unmask", vars(state))
