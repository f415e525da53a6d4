"""Specification of `linear_confidence`: `confidence` of the logits hidden @ weight.T, a few rows of them at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks.confidence import check_linear_arguments
from .confidence import Confidence, confidence

# Rows whose logits exist at the same time, and ids that one product is of: bounds of the memory, not of the op.
CHUNK_ROWS, CHUNK_IDS = 64, 8192


def linear_confidence(
    hidden: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    outputs: Sequence[str] = ("second",),
    banned: Tensor | None = None,
    temperature: Tensor | None = None,
    sample_temperature: Tensor | None = None,
    seed: Tensor | None = None,
    noise: Tensor | None = None,
    query: Tensor | None = None,
    soft_cap: float | None = None,
) -> Confidence:
    """What `confidence` says of the logits of a head without a bias, hidden @ weight.T, which are never written.

        logits = hidden @ weight.T, products summed in fp32 and not rounded to the inputs' dtype

    A head that writes bf16 logits rounds them, so ids can differ from `confidence` of those where two logits are that
    close.

    Args:
        hidden: [R, H] fp16, bf16 or fp32, last stride 1, any row stride; what the head would be given.
        weight: [V, H] of the same dtype, last stride 1, any row stride: the head's, as nn.Linear keeps it.
        rows: [N] int32, the row of `hidden` of each output; -1 = nothing needed. None: every row, N = R.
        outputs: as in `confidence`, but not "kl". Neither biases nor a top k: use `confidence` where they are needed.
        banned, temperature, sample_temperature, seed, noise, query, soft_cap: as in `confidence`.
    Returns:
        Confidence, as `confidence` of the fp32 logits would return it (float64 inputs: of float64 logits).
    Raises:
        ValueError: shapes, strides, "kl" or unknown outputs, an argument that its output needs or that no output uses.
        TypeError: dtypes.

    Cost: the head's own N*V*H multiply-adds. Memory beyond the results does not grow with N*V.
    """
    N = check_linear_arguments(
        hidden, weight, rows, outputs, banned, temperature, sample_temperature, seed, noise, query, soft_cap,
        extra_dtypes=(torch.float64,),
    )  # fmt: skip
    R, dtype = hidden.shape[0], torch.float64 if hidden.dtype == torch.float64 else torch.float32
    row = torch.arange(R, dtype=torch.int32, device=hidden.device) if rows is None else rows
    present = (row >= 0) & (row < R)
    per_row = {
        "banned": None if banned is None else banned.expand(N, banned.shape[-1]),
        "temperature": temperature,
        "sample_temperature": sample_temperature,
        "noise": noise,
        "query": query,
    }
    chunks = []
    for start in range(0, max(N, 1), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        index = torch.where(present[chunk], row[chunk], 0).long()
        # R = 0: rows that are all errors or not needed still have logits to look at.
        inputs = (
            hidden[index].to(dtype)
            if R
            else torch.zeros(len(index), hidden.shape[1], dtype=dtype, device=hidden.device)
        )
        logits = torch.cat([inputs @ part.to(dtype).T for part in weight.split(CHUNK_IDS)], 1)
        # Each output's own row of the chunk; -1 and rows outside stay what they are.
        own = torch.arange(len(index), dtype=torch.int32, device=hidden.device)
        own = torch.where(row[chunk] == -1, -1, torch.where(present[chunk], own, len(index)))
        arguments = {name: None if values is None else values[chunk].contiguous() for name, values in per_row.items()}
        chunks.append(confidence(logits, rows=own, outputs=outputs, seed=seed, soft_cap=soft_cap, **arguments))
    return Confidence(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*chunks)))
