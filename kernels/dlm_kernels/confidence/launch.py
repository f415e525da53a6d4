"""`confidence` in Triton: its launcher, which chooses a tile and a form. Device code: kernel.py and merge.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import device
from ..checks.confidence import check_arguments, requested
from ..library import operator
from ..reference.confidence import Confidence
from ..tiles import ConfidenceTile, confidence_column_tiles, confidence_parts, confidence_tile, log2_slots
from .kernel import _confidence_kernel
from .merge import PARTIAL_IDS, PARTIAL_VALUES, _merge_kernel

__all__ = ["confidence", "launch"]

# Programs wanted for every SM: fewer rows than that are split. Splitting changes no bit of a row, so the choice may
# look at N and at the device.
PROGRAMS_PER_SM = 2
FIELD_TYPES = {
    "token": torch.int64,
    "second_token": torch.int64,
    "sampled_token": torch.int64,
    "error": torch.int32,
}


def present(*, outputs: Sequence[str], **_: object) -> tuple[str, ...]:
    """The fields of `Confidence` that are not None."""
    return tuple(name for name in Confidence._fields if requested(name, outputs))


def _fake(logits: Tensor, *, rows: Tensor | None, outputs: Sequence[str], **_: object) -> Confidence:
    return allocate(logits.shape[0] if rows is None else rows.shape[0], outputs, logits.device)


@operator(fake=_fake, present=present, result=Confidence)
def confidence(
    logits: Tensor,
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
    bias_ids: Tensor | None = None,
    bias: Tensor | None = None,
    previous: Tensor | None = None,
    previous_logsumexp: Tensor | None = None,
) -> Confidence:
    """Most likely token per row with its probability and, on request, runner-up, logsumexp, entropy, KL, a draw, a
    query.

    Arguments, results and errors are those of `reference.confidence`, which is the specification; float64 is not
    accepted. Token ids do not depend on the tile. Floats depend in the last bits on the tile of the GPU, which on
    sm_100 is another one with "kl" and on sm_120 with a bias, but neither on the other rows nor on their number.

    Many rows are one launch, with a program for each row. With fewer than two rows for every SM, every part of a row
    (`tiles.confidence_parts`) has a program, and a second launch merges the parts. Both forms add up the same parts in
    the same order, so a row has the same bits in either.

    Cost: the logits are read once; "kl" reads `previous` beside them, which is twice the bytes. A bias costs what its
    ids cost: each tile (`ConfidenceTile.columns` x 16 bytes) that holds one compares all its elements with all K ids.

    Raises:
        As reference.confidence, and RuntimeError: CPU tensors without Triton's interpreter.  NotImplementedError: a GPU
        that `tiles.TARGETS` does not name.
    """
    N = check_arguments(
        logits, rows, outputs, banned, temperature, sample_temperature, seed, noise, query, soft_cap,
        bias_ids, bias, previous, previous_logsumexp,
    )  # fmt: skip
    tile = _tile(logits, kl="kl" in outputs, biased=bias is not None)
    split = N < PROGRAMS_PER_SM * _multiprocessors(logits.device)
    return launch(
        logits, rows, outputs, banned, temperature, sample_temperature, seed, noise, query, soft_cap,
        bias_ids, bias, previous, previous_logsumexp, N=N, tile=tile, split=split,
    )  # fmt: skip


def launch(
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
    *,
    N: int,
    tile: ConfidenceTile,
    split: bool,
) -> Confidence:
    """`confidence` of checked arguments by a tile; with `split`, each part of a row has a program, if its vocabulary
    has several parts."""
    # 1. How the vocabulary is cut, and whether a row is.
    V, itemsize = logits.shape[1], logits.element_size()
    part_tiles, parts = confidence_parts(V, tile, itemsize)
    split = split and parts > 1

    # 2. What is written: the outputs, or of a row that is split the partials of its parts.
    result = allocate(N, outputs, logits.device)
    if N == 0:
        return result
    values, ids = allocate_partials(N, parts, logits.device) if split else (None, None)
    fields = {f"{name}_ptr": None if split else value for name, value in result._asdict().items()}

    # 3. One launch, or two.
    num_banned = 0 if banned is None else banned.shape[-1]
    with device.launching_on(logits):
        _confidence_kernel[(N, parts) if split else (N,)](
            logits_ptr=logits,
            rows_ptr=rows,
            banned_ptr=banned if num_banned else None,
            temperature_ptr=temperature,
            sample_temperature_ptr=sample_temperature,
            seed_ptr=seed,
            noise_ptr=noise,
            query_ptr=query,
            bias_ids_ptr=bias_ids,
            bias_ptr=bias,
            previous_ptr=previous,
            previous_logsumexp_ptr=previous_logsumexp,
            **fields,
            values_ptr=values,
            ids_ptr=ids,
            row_stride=logits.stride(0),
            previous_stride=None if previous is None else previous.stride(0),
            banned_stride=num_banned if num_banned and banned.dim() == 2 else 0,
            num_bias=None if bias is None else bias.shape[1],
            R=logits.shape[0],
            V=V,
            soft_cap=soft_cap,
            HAS_ROWS=rows is not None,
            NUM_BANNED=num_banned,
            HAS_BIAS=bias is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_SOFT_CAP=soft_cap is not None,
            SECOND="second" in outputs,
            ENTROPY="entropy" in outputs,
            KL="kl" in outputs,
            SAMPLED="sampled" in outputs,
            QUERY="query" in outputs,
            COLUMNS=tile.columns,
            GROUP=16 // itemsize,
            COLUMN_TILES=part_tiles if split else confidence_column_tiles(V, tile, itemsize),
            PART_TILES=part_tiles,
            PARTS=parts,
            LOG2_SLOTS=log2_slots(parts),
            SPLIT=split,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
        )
        if split:
            merge(
                result, values, ids, outputs, rows, temperature, sample_temperature, query, soft_cap,
                previous_logsumexp, N=N, R=logits.shape[0], V=V, parts=parts,
            )  # fmt: skip
    return result


def allocate(N: int, outputs: Sequence[str], device: torch.device) -> Confidence:
    """The outputs of N rows, not written."""
    fields = {
        name: torch.empty(N, dtype=FIELD_TYPES.get(name, torch.float32), device=device)
        if requested(name, outputs)
        else None
        for name in Confidence._fields
    }
    return Confidence(**fields)


def allocate_partials(N: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the first launch leaves for the second: the values and the ids of every part of every row."""
    return (
        torch.empty(N, PARTIAL_VALUES, parts, dtype=torch.float32, device=device),
        torch.empty(N, PARTIAL_IDS, parts, dtype=torch.int32, device=device),
    )


def merge(
    result: Confidence,
    values: Tensor,
    ids: Tensor,
    outputs: Sequence[str],
    rows: Tensor | None,
    temperature: Tensor | None,
    sample_temperature: Tensor | None,
    query: Tensor | None,
    soft_cap: float | None,
    previous_logsumexp: Tensor | None,
    *,
    N: int,
    R: int,
    V: int,
    parts: int,
) -> None:
    """The second launch: writes `result` from the partials of every part."""
    _merge_kernel[(N,)](
        values_ptr=values,
        ids_ptr=ids,
        rows_ptr=rows,
        temperature_ptr=temperature,
        sample_temperature_ptr=sample_temperature,
        query_ptr=query,
        previous_logsumexp_ptr=previous_logsumexp,
        **{f"{name}_ptr": value for name, value in result._asdict().items()},
        R=R,
        V=V,
        soft_cap=soft_cap,
        HAS_ROWS=rows is not None,
        HAS_TEMPERATURE=temperature is not None,
        HAS_SOFT_CAP=soft_cap is not None,
        SECOND="second" in outputs,
        ENTROPY="entropy" in outputs,
        KL="kl" in outputs,
        SAMPLED="sampled" in outputs,
        QUERY="query" in outputs,
        PARTS=parts,
        LOG2_SLOTS=log2_slots(parts),
        num_warps=1,
        num_stages=1,
    )


def _multiprocessors(device: torch.device) -> int:
    # An H100 for the interpreter.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _tile(logits: Tensor, kl: bool, biased: bool) -> ConfidenceTile:
    capability = device.capability_of("confidence", logits, _confidence_kernel)
    return confidence_tile(capability, logits.element_size(), kl, biased)
