"""`confidence` in Triton: its launcher, its tiles, and the configurations that must compile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import device
from ..checks.confidence import OUTPUTS, check_arguments, requested
from ..library import operator
from ..reference.confidence import Confidence
from ..static import CompileCase
from ..tiles import ConfidenceTile, confidence_parts, confidence_tile
from .kernel import _confidence_kernel
from .merge import PARTIAL_IDS, PARTIAL_VALUES, _merge_kernel

# Programs wanted for every SM. Fewer rows than that are split; it changes no bit of a row, so it may look at N and at
# the device.
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

    Arguments, results and errors are those of `reference.confidence`, which specifies it; float64 is not accepted.
    Token ids do not depend on the tile. Floats depend on the GPU's tile in the last bits, which on sm_100 is another
    one with "kl" and on sm_120 with a bias, and on nothing else: not on the other rows and not on their number.

    One launch where rows are many, one program a row. With fewer than two rows for every SM, a program for every part
    of a row (`tiles.confidence_parts`) and a second launch that merges the parts. Both add up the same parts in the
    same order, so a row has the same bits either way.

    Cost: the logits, read once; "kl" reads `previous` beside them, twice the bytes. A bias costs what its ids cost:
    each of the tiles (`ConfidenceTile.lanes` x 16 bytes) that hold one compares all its elements with all K ids, the
    other tiles nothing.

    Raises also: RuntimeError for CPU tensors without Triton's interpreter.  NotImplementedError: a GPU that
        `tiles.TARGETS` does not name.
    """
    N = check_arguments(
        logits, rows, outputs, banned, temperature, sample_temperature, seed, noise, query, soft_cap,
        bias_ids, bias, previous, previous_logsumexp,
    )  # fmt: skip
    tile = _tile(logits, kl="kl" in outputs, biased=bias is not None)
    return launch(
        logits, rows, outputs, banned, temperature, sample_temperature, seed, noise, query, soft_cap,
        bias_ids, bias, previous, previous_logsumexp, N=N, tile=tile, split=N < PROGRAMS_PER_SM * _multiprocessors(logits.device),
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
    """`confidence` of checked arguments by a tile; `split`: a program for each part of a row, if its vocabulary has
    several."""
    V = logits.shape[1]
    part_tiles, parts = confidence_parts(V, tile, logits.element_size())
    split = split and parts > 1
    result = allocate(N, outputs, logits.device)
    if N == 0:
        return result
    values, ids = allocate_partials(N, parts, logits.device) if split else (None, None)
    fields = {f"{name}_ptr": None if split else value for name, value in result._asdict().items()}
    group = 16 // logits.element_size()
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
            LANES=tile.lanes,
            GROUP=group,
            COLUMN=_column(V, tile, group, part_tiles, split),
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
                result, values, ids, outputs, rows, temperature, sample_temperature, query, soft_cap, previous_logsumexp,
                N=N, R=logits.shape[0], V=V, parts=parts,
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


def log2_slots(parts: int) -> int:
    """Logarithm of the least power of 2 that holds the parts."""
    return (parts - 1).bit_length()


def _column(V: int, tile: ConfidenceTile, group: int, part_tiles: int, split: bool) -> int:
    return part_tiles if split else triton.next_power_of_2(triton.cdiv(V, tile.lanes * group))


def _multiprocessors(device: torch.device) -> int:
    # An H100 for the interpreter.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _tile(logits: Tensor, kl: bool, biased: bool) -> ConfidenceTile:
    capability = device.capability_of("confidence", logits, _confidence_kernel)
    return confidence_tile(capability, logits.element_size(), kl, biased)


OUTPUT_POINTERS = {
    "token": "*i64", "logit": "*fp32", "second_token": "*i64", "second_logit": "*fp32", "logsumexp": "*fp32",
    "entropy": "*fp32", "kl": "*fp32", "confidence": "*fp32", "margin": "*fp32", "sampled_token": "*i64",
    "sampled_confidence": "*fp32", "query_confidence": "*fp32", "error": "*i32",
}  # fmt: skip
_STATISTICS = ("second", "logsumexp", "entropy")
_SETS = {
    "bare": (),
    "second": ("second",),
    "second+logsumexp+entropy": _STATISTICS,
    "kl": ("logsumexp", "kl"),
    "sampled": ("sampled",),
    "bias": _STATISTICS,
    "everything": OUTPUTS,
    # Without "kl": no decoder has it beside a bias, and with fp32 logits ptxas spills 24 to 70 bytes of the two
    # together.
    "everything+bias": tuple(name for name in OUTPUTS if name != "kl"),
}
# What a decoder asks of few rows.
_SPLIT_SETS = ("second", "second+logsumexp+entropy", "everything", "everything+bias")


def compile_cases(capability: int) -> list[CompileCase]:
    """Every configuration that a decoder launches on a GPU of this capability: dtypes, sets of outputs and forms
    ("split": the first of two launches); "bare" has no option. The second launch: one for each set of outputs."""
    V = 126464
    cases = []
    for itemsize, dtype in ((2, "bf16"), (2, "fp16"), (4, "fp32")):
        cases += [_case(capability, itemsize, dtype, name, False, V) for name in _SETS]
        cases += [_case(capability, itemsize, dtype, name, True, V) for name in _SPLIT_SETS]
    parts = confidence_parts(V, confidence_tile(capability, 2, False, False), 2)[1]
    cases += [_merge_case(name, parts) for name in ("second", "second+logsumexp+entropy", "everything")]
    return cases


def _case(capability: int, itemsize: int, dtype: str, name: str, split: bool, V: int) -> CompileCase:
    outputs = _SETS[name]
    bare, everything = name == "bare", name.startswith("everything")
    kl, biased, sampled = "kl" in outputs, name.endswith("bias"), "sampled" in outputs
    tile, group = confidence_tile(capability, itemsize, kl, biased), 16 // itemsize
    part_tiles, parts = confidence_parts(V, tile, itemsize)
    signature = dict.fromkeys(_confidence_kernel.arg_names, "constexpr")
    signature |= {"logits_ptr": f"*{dtype}", "row_stride": "i32", "banned_stride": "i32", "R": "i32", "V": "i32"}
    if not bare:
        signature |= {"rows_ptr": "*i32", "banned_ptr": "*i64"}
    if everything:
        signature |= {"temperature_ptr": "*fp32", "soft_cap": "fp32"}
    if sampled:
        signature |= {"sample_temperature_ptr": "*fp32", "seed_ptr": "*i64", "noise_ptr": "*i32"}
    if "query" in outputs:
        signature |= {"query_ptr": "*i64"}
    if biased:
        signature |= {"bias_ids_ptr": "*i64", "bias_ptr": "*fp32", "num_bias": "i32"}
    if kl:
        signature |= {"previous_ptr": f"*{dtype}", "previous_logsumexp_ptr": "*fp32", "previous_stride": "i32"}
    if split:
        signature |= {"values_ptr": "*fp32", "ids_ptr": "*i32"}
    else:
        signature |= {f"{field}_ptr": kind for field, kind in OUTPUT_POINTERS.items() if requested(field, outputs)}
    flags = {
        "HAS_ROWS": not bare,
        "NUM_BANNED": 0 if bare else 4 if everything else 1,
        "HAS_BIAS": biased,
        "HAS_TEMPERATURE": everything,
        "HAS_SOFT_CAP": everything,
        "SECOND": "second" in outputs,
        "ENTROPY": "entropy" in outputs,
        "KL": kl,
        "SAMPLED": sampled,
        "QUERY": "query" in outputs,
        "LANES": tile.lanes,
        "GROUP": group,
        "COLUMN": _column(V, tile, group, part_tiles, split),
        "PART_TILES": part_tiles,
        "PARTS": parts,
        "LOG2_SLOTS": log2_slots(parts),
        "SPLIT": split,
    }
    return CompileCase(
        kernel="confidence",
        config=f"{dtype} {name}{' split' if split else ''}",
        fn=_confidence_kernel,
        signature=signature,
        constexprs={argument: flags.get(argument) for argument, kind in signature.items() if kind == "constexpr"},
        divisible_by_16=(*_pointers(signature), "row_stride", *(["previous_stride"] if kl else []), "V"),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.max_registers,
        # A draw costs two software logarithms an element (about 80 instructions): it is bound by arithmetic, not by
        # memory, and outside the gate of the reduction. With a bias the loop over whole tiles is the same, but lies in
        # a loop over the biased ones, which the count takes for it. "kl" loads two logits for an id: the gate is what
        # the memory allows for each.
        elements_per_iteration=None if sampled or biased else (1 + kl) * tile.lanes * group,
    )


def _merge_case(name: str, parts: int) -> CompileCase:
    """The second launch for a set of outputs; "everything" with all that a row can have."""
    outputs, everything = _SETS[name], name.startswith("everything")
    signature = dict.fromkeys(_merge_kernel.arg_names, "constexpr")
    signature |= {"values_ptr": "*fp32", "ids_ptr": "*i32", "rows_ptr": "*i32", "R": "i32", "V": "i32"}
    signature |= {f"{field}_ptr": kind for field, kind in OUTPUT_POINTERS.items() if requested(field, outputs)}
    if everything:
        signature |= {"temperature_ptr": "*fp32", "soft_cap": "fp32"}
    if "sampled" in outputs:
        signature |= {"sample_temperature_ptr": "*fp32"}
    if "query" in outputs:
        signature |= {"query_ptr": "*i64"}
    if "kl" in outputs:
        signature |= {"previous_logsumexp_ptr": "*fp32"}
    flags = {
        "HAS_ROWS": True,
        "HAS_TEMPERATURE": everything,
        "HAS_SOFT_CAP": everything,
        "SECOND": "second" in outputs,
        "ENTROPY": "entropy" in outputs,
        "KL": "kl" in outputs,
        "SAMPLED": "sampled" in outputs,
        "QUERY": "query" in outputs,
        "PARTS": parts,
        "LOG2_SLOTS": log2_slots(parts),
    }
    return CompileCase(
        kernel="confidence merge",
        config=name,
        fn=_merge_kernel,
        signature=signature,
        constexprs={argument: flags.get(argument) for argument, kind in signature.items() if kind == "constexpr"},
        divisible_by_16=(*_pointers(signature), "V"),
        num_warps=1,
        num_stages=1,
    )


def _pointers(signature: dict[str, object]) -> tuple[str, ...]:
    return tuple(argument for argument, kind in signature.items() if str(kind).startswith("*"))
