"""`confidence` in Triton: its launcher, which chooses a tile and a form. Device code: kernel.py and merge.py."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import device
from ..checks.confidence import check_arguments, requested
from ..library import operator
from ..plans import Calls, Launch, Plan
from ..reference.confidence import Confidence
from ..tiles import ConfidenceTile, confidence_column_tiles, confidence_parts, confidence_tile, log2_slots
from .kernel import _confidence_kernel
from .merge import PARTIAL_IDS, PARTIAL_VALUES, _merge_kernel

__all__ = ["confidence"]

# Programs wanted for every SM: fewer rows than that are split. Splitting changes no bit of a row, so the choice may
# look at N and at the device.
PROGRAMS_PER_SM = 2
FIELD_TYPES = {
    "token": torch.int64,
    "second_token": torch.int64,
    "sampled_token": torch.int64,
    "error": torch.int32,
}
# The tensors that a call may have, by their names in the kernel.
_NAMES = (
    "logits_ptr", "rows_ptr", "banned_ptr", "temperature_ptr", "sample_temperature_ptr", "seed_ptr", "noise_ptr",
    "query_ptr", "bias_ids_ptr", "bias_ptr", "previous_ptr", "previous_logsumexp_ptr",
)  # fmt: skip
_FIELD_NAMES = tuple(f"{name}_ptr" for name in Confidence._fields)
_PARTIAL_NAMES = ("values_ptr", "ids_ptr")
# What the second launch reads besides the partials.
_MERGED_NAMES = ("rows_ptr", "temperature_ptr", "sample_temperature_ptr", "query_ptr", "previous_logsumexp_ptr")
_calls = Calls("confidence", _NAMES)


def present(*, outputs: Sequence[str], **_: object) -> tuple[str, ...]:
    """The fields of `Confidence` that are not None."""
    return tuple(name for name in Confidence._fields if requested(name, outputs))


def _fake(logits: Tensor, *, rows: Tensor | None, outputs: Sequence[str], **_: object) -> Confidence:
    return allocate(logits.shape[0] if rows is None else rows.shape[0], dtypes_of(outputs), logits.device)


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
    sm_100 is another one with "kl" (and again another with a bias too) and on sm_120 with a bias, but neither on the
    other rows nor on their number.

    Many rows are one launch, with a program for each row. With fewer than two rows for every SM, every part of a row
    (`tiles.confidence_parts`) has a program, and a second launch merges the parts. Both forms add up the same parts in
    the same order, so a row has the same bits in either.

    Cost: the logits are read once; "kl" reads `previous` beside them, which is twice the bytes. A bias costs what its
    ids cost: each tile (`ConfidenceTile.columns` x 16 bytes) that holds one compares all its elements with all K ids.

    Raises:
        As reference.confidence, and RuntimeError: CPU tensors without Triton's interpreter.  NotImplementedError: a GPU
        that `tiles.TARGETS` does not name.
    """
    # 1. What is known of such a call.
    given = (
        logits, rows, banned, temperature, sample_temperature, seed, noise, query, bias_ids, bias, previous,
        previous_logsumexp,
    )  # fmt: skip
    names = outputs if type(outputs) is tuple else tuple(outputs) if type(outputs) is list else None
    call, key, tensors, pointers = _calls.find(given, (type(outputs), names, type(soft_cap), soft_cap))

    # 2. The check, unless the call is known to pass.
    if call is None or not call.accepts(tensors, ()):
        check_arguments(
            logits, rows, outputs, banned, temperature, sample_temperature, seed, noise, query, soft_cap,
            bias_ids, bias, previous, previous_logsumexp,
        )  # fmt: skip
        if call is None:
            call = _calls.add(key if names is not None else None)
        call.accepted(())

    # 3. The plan of such calls for this tile, form and kernels.
    tile = _tile(logits, kl="kl" in outputs, biased=bias is not None, sampled="sampled" in outputs)
    N = logits.shape[0] if rows is None else rows.shape[0]
    split = N < PROGRAMS_PER_SM * _multiprocessors(logits.device)
    depends = (tile, split, _confidence_kernel, _merge_kernel)
    plan = call.plan_for(depends)
    if plan is None:
        plan = _ConfidencePlan(given, outputs, soft_cap, tile, split)
        call.plan = depends, plan
    return plan.run(logits, tensors, pointers)


class _ConfidencePlan:
    """How all calls like one are launched: their outputs, the partials of their parts and their launches.

    Args:
        given: the tensors of the call, as `_NAMES` names them; only what they look like is used.
        split: whether each part of a row has a program, if the vocabulary has several parts.
    """

    def __init__(
        self,
        given: Sequence[Tensor | None],
        outputs: Sequence[str],
        soft_cap: float | None,
        tile: ConfidenceTile,
        split: bool,
    ) -> None:
        # 1. How the vocabulary is cut, and whether a row is.
        logits, rows, banned, temperature, _, seed, *_, bias, previous, _ = given
        (R, V), itemsize = logits.shape, logits.element_size()
        part_tiles, parts = confidence_parts(V, tile, itemsize)
        split = split and parts > 1

        # 2. What is written: the outputs, or of a row that is split the partials of its parts.
        self.N = N = R if rows is None else rows.shape[0]
        self.parts = parts if split else None
        self.dtypes = dtypes_of(outputs)
        tensors = [*given, *self.dtypes, *(_PARTIAL_NAMES if split else ())]
        present = [
            name for name, tensor in zip((*_NAMES, *_FIELD_NAMES, *_PARTIAL_NAMES), tensors) if tensor is not None
        ]
        places = {name: place for place, name in enumerate(present)}
        num_banned = 0 if banned is None else banned.shape[-1]
        if not num_banned:
            places.pop("banned_ptr", None)

        # 3. One launch, or two.
        common = {
            "R": R,
            "V": V,
            "soft_cap": soft_cap,
            "HAS_ROWS": rows is not None,
            "HAS_TEMPERATURE": temperature is not None,
            "HAS_SOFT_CAP": soft_cap is not None,
            "SECOND": "second" in outputs,
            "ENTROPY": "entropy" in outputs,
            "KL": "kl" in outputs,
            "SAMPLED": "sampled" in outputs,
            "QUERY": "query" in outputs,
            "PARTS": parts,
            "LOG2_SLOTS": log2_slots(parts),
        }
        values = common | {
            "row_stride": logits.stride(0),
            "previous_stride": None if previous is None else previous.stride(0),
            "banned_stride": num_banned if num_banned and banned.dim() == 2 else 0,
            "seed_stride": None if seed is None else int(seed.shape[0] > 1),
            "num_banned": num_banned or None,
            "num_bias": None if bias is None else bias.shape[1],
            "HAS_BANNED": num_banned > 0,
            "HAS_BIAS": bias is not None,
            "COLUMNS": tile.columns,
            "GROUP": 16 // itemsize,
            "COLUMN_TILES": part_tiles if split else confidence_column_tiles(V, tile, itemsize),
            "PART_TILES": part_tiles,
            "SPLIT": split,
            "WARPS": tile.num_warps,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "maxnreg": tile.max_registers,
        }
        written, left = (_PARTIAL_NAMES, _FIELD_NAMES) if split else (_FIELD_NAMES, _PARTIAL_NAMES)
        values |= dict.fromkeys(left)
        grid = (N, parts) if split else (N,)
        launches = [Launch(_confidence_kernel, grid, (*_NAMES, *written), places, values)]
        if split:
            names, options = (*_MERGED_NAMES, *_FIELD_NAMES, *_PARTIAL_NAMES), {"num_warps": 1, "num_stages": 1}
            launches.append(Launch(_merge_kernel, (N,), names, places, common | options))
        self.plan = Plan(launches if N else [])

    def run(self, logits: Tensor, tensors: Sequence[Tensor], pointers: tuple[int, ...]) -> Confidence:
        """The results of the call that has these tensors, those of `_NAMES` that it has."""
        result = allocate(self.N, self.dtypes, logits.device)
        if self.plan.launches:
            written = [tensor for tensor in result if tensor is not None]
            if self.parts is not None:
                written += allocate_partials(self.N, self.parts, logits.device)
            self.plan.run(logits, tensors, written, pointers)
        return result


def dtypes_of(outputs: Sequence[str]) -> tuple[torch.dtype | None, ...]:
    """The dtype of every field of `Confidence`; None for one that is not asked for."""
    return tuple(
        FIELD_TYPES.get(name, torch.float32) if requested(name, outputs) else None for name in Confidence._fields
    )


def allocate(N: int, dtypes: Sequence[torch.dtype | None], device: torch.device) -> Confidence:
    """The outputs of N rows, not written."""
    return Confidence._make([None if dtype is None else torch.empty(N, dtype=dtype, device=device) for dtype in dtypes])


def allocate_partials(N: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the first launch leaves for the second: the values and the ids of every part of every row."""
    return (
        torch.empty(N, PARTIAL_VALUES, parts, dtype=torch.float32, device=device),
        torch.empty(N, PARTIAL_IDS, parts, dtype=torch.int32, device=device),
    )


@functools.cache
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _multiprocessors(device: torch.device) -> int:
    # An H100 for the interpreter.
    return _multiprocessors_of(device.index) if device.type == "cuda" else 132


def _tile(logits: Tensor, kl: bool, biased: bool, sampled: bool) -> ConfidenceTile:
    capability = device.capability_of("confidence", logits, _confidence_kernel)
    return confidence_tile(capability, logits.element_size(), kl, biased, sampled)
