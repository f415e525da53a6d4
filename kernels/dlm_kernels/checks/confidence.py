"""What `confidence` accepts: its outputs and limits, and the checks that reference and kernel share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .named import check_of, shown

OUTPUTS = ("second", "logsumexp", "entropy", "kl", "sampled", "query")
MAX_BANNED, MAX_BIAS = 32, 64
# Between these caps, a cap and what is divided by one are finite in fp32 and not zero.
MIN_CAP, MAX_CAP = 1e-30, 1e30
# A logit at or below -LIMIT counts as -inf (masks are often written with finfo.min), one at or above LIMIT as +inf:
# between them every intermediate of the one-pass recurrences is finite in fp32.
LIMIT = 1e30
# A temperature outside of these is an error of its row: LIMIT / MIN_TEMPERATURE must be finite, and LIMIT /
# MAX_TEMPERATURE infinitely unlikely.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
# The least ln p of a token of the previous step. KLASS adds 1e-12 inside both logarithms, which keeps the divergence
# finite.
PREVIOUS_FLOOR = math.log(1e-12)

_GROUP_OF = {
    "second_token": "second",
    "second_logit": "second",
    "margin": "second",
    "logsumexp": "logsumexp",
    "entropy": "entropy",
    "kl": "kl",
    "sampled_token": "sampled",
    "sampled_confidence": "sampled",
    "query_confidence": "query",
}


def requested(field: str, outputs: Sequence[str]) -> bool:
    """Whether a field of `Confidence` belongs to a call with these outputs."""
    return field not in _GROUP_OF or _GROUP_OF[field] in outputs


@check_of("confidence")
def check_arguments(
    logits: Tensor,
    rows: Tensor | None,
    outputs: Sequence[str],
    banned: Tensor | None,
    temperature: Tensor | None,
    sample_temperature: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    query: Tensor | None,
    soft_cap: float | None,
    bias_ids: Tensor | None,
    bias: Tensor | None,
    previous: Tensor | None,
    previous_logsumexp: Tensor | None,
    extra_dtypes: tuple[torch.dtype, ...] = (),
) -> int:
    """Raises on a call that `confidence` does not define, and returns N. Looks at shapes and dtypes, never at values on
    the device."""
    _check_matrix("logits", logits, "[R, V] with 1 <= V < 2^30", extra_dtypes)
    if not 1 <= logits.shape[1] < 2**30:
        raise ValueError(f"confidence: logits must be [R, V] with 1 <= V < 2^30, got shape {list(logits.shape)}")
    _check_outputs(outputs, soft_cap)
    _check_groups(
        outputs,
        sampled={"sample_temperature": sample_temperature, "seed": seed, "noise": noise},
        query={"query": query},
        kl={"previous": previous, "previous_logsumexp": previous_logsumexp},
    )
    if (bias_ids is None) != (bias is None):
        raise ValueError(
            f"confidence: bias_ids and bias must be given together, got bias_ids={_kind(bias_ids)}, bias={_kind(bias)}"
        )
    if previous is not None:
        if previous.dtype != logits.dtype:
            raise TypeError(f"confidence: previous must have the logits' dtype {logits.dtype}, got {previous.dtype}")
        if previous.shape != logits.shape:
            raise ValueError(
                f"confidence: previous must have the logits' shape {list(logits.shape)}, got {list(previous.shape)}"
            )
        if previous.shape[1] > 1 and previous.stride(1) != 1:
            raise ValueError(f"confidence: previous must have last stride 1, got strides {previous.stride()}")
        if previous.device != logits.device:
            raise ValueError(f"confidence: previous must be on {logits.device}, got {previous.device}")
    N = _check_row_tensors(logits, rows, banned, temperature, sample_temperature, seed, noise, query)
    _check_tensors(
        logits.device,
        N,
        ("bias_ids", bias_ids, torch.int64, [] if bias_ids is None else [(N, bias_ids.shape[-1:].numel())]),
        ("bias", bias, torch.float32, [] if bias_ids is None else [tuple(bias_ids.shape)]),
        ("previous_logsumexp", previous_logsumexp, torch.float32, [(logits.shape[0],)]),
    )
    if bias_ids is not None and not 1 <= bias_ids.shape[1] <= MAX_BIAS:
        raise ValueError(f"confidence: bias_ids must hold 1 to {MAX_BIAS} ids a row, got K={bias_ids.shape[1]}")
    return N


def _check_matrix(name: str, values: Tensor, shape: str, extra_dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises unless `values` is a matrix of a dtype that the op takes, with any row stride and last stride 1."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, *extra_dtypes)
    if values.dtype not in dtypes:
        raise TypeError(f"confidence: {name} must be one of {', '.join(map(str, dtypes))}, got {values.dtype}")
    if values.dim() != 2:
        raise ValueError(f"confidence: {name} must be {shape}, got shape {list(values.shape)}")
    if values.shape[1] > 1 and values.stride(1) != 1:
        raise ValueError(f"confidence: {name} must have last stride 1, got strides {values.stride()}")


def _check_outputs(outputs: Sequence[str], soft_cap: float | None) -> None:
    """Raises on output groups that the op does not have, and on a cap that is not a positive number."""
    if isinstance(outputs, str) or len(set(outputs)) != len(outputs) or not set(outputs) <= set(OUTPUTS):
        raise ValueError(f"confidence: outputs must be distinct names out of {OUTPUTS}, got {outputs!r}")
    if soft_cap is None:
        return
    if isinstance(soft_cap, bool) or not (isinstance(soft_cap, (int, float)) and 0 < soft_cap < math.inf):
        raise ValueError(f"confidence: soft_cap must be a positive finite number or None, got {shown(soft_cap)}")
    if not MIN_CAP <= soft_cap <= MAX_CAP:
        raise ValueError(f"confidence: soft_cap must be in [{MIN_CAP:g}, {MAX_CAP:g}] or None, got {shown(soft_cap)}")


def _check_groups(outputs: Sequence[str], **groups: dict[str, Tensor | None]) -> None:
    for group, arguments in groups.items():
        for name, value in arguments.items():
            if (value is not None) != (group in outputs):
                state = "required" if value is None else "used"
                raise ValueError(
                    f"confidence: {name} is {state} only with {group!r} in outputs, "
                    f"got {name}={_kind(value)}, {outputs!r}"
                )


def _check_row_tensors(
    matrix: Tensor,
    rows: Tensor | None,
    banned: Tensor | None,
    temperature: Tensor | None,
    sample_temperature: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    query: Tensor | None,
) -> int:
    N = matrix.shape[0]
    if rows is not None:
        if rows.dim() != 1:
            raise ValueError(f"confidence: rows must be [N], got shape {list(rows.shape)}")
        N = rows.shape[0]
    K = 0 if banned is None else banned.shape[-1:].numel()
    _check_tensors(
        matrix.device,
        N,
        ("rows", rows, torch.int32, [(N,)]),
        ("temperature", temperature, torch.float32, [(N,)]),
        ("sample_temperature", sample_temperature, torch.float32, [(N,)]),
        ("seed", seed, torch.int64, [(1,)] if N == 1 else [(1,), (N,)]),
        ("noise", noise, torch.int32, [(N, 3)]),
        ("query", query, torch.int64, [(N,)]),
        ("banned", banned, torch.int64, [(K,), (N, K)]),
    )
    if K > MAX_BANNED:
        raise ValueError(f"confidence: banned must hold at most {MAX_BANNED} ids a row, got K={K}")
    return N


def _check_tensors(
    device: torch.device, N: int, *tensors: tuple[str, Tensor | None, torch.dtype, list[tuple[int, ...]]]
) -> None:
    for name, value, dtype, shapes in tensors:
        if value is None:
            continue
        if value.dtype != dtype:
            raise TypeError(f"confidence: {name} must be {dtype}, got {value.dtype}")
        if tuple(value.shape) not in shapes:
            raise ValueError(
                f"confidence: {name} must have shape {' or '.join(map(str, shapes))}, "
                f"got {tuple(value.shape)} (N = {N})"
            )
        if not value.is_contiguous():
            raise ValueError(f"confidence: {name} must be contiguous, got strides {value.stride()}")
        if value.device != device:
            raise ValueError(f"confidence: {name} must be on {device}, got {value.device}")


def _kind(value: Tensor | None) -> str:
    return "None" if value is None else f"{value.dtype} {list(value.shape)}"
