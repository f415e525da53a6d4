"""The configurations of `confidence` that must compile: dtypes, sets of outputs, both forms, and the merge of parts."""

from __future__ import annotations

from ..checks.confidence import OUTPUTS, requested
from ..static import CompileCase
from ..tiles import confidence_column_tiles, confidence_parts, confidence_tile, log2_slots
from .kernel import _confidence_kernel
from .merge import _merge_kernel

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
    "everything+bias": tuple(name for name in OUTPUTS if name != "kl"),
    "everything+bias+kl": OUTPUTS,
}
# What a decoder asks of few rows.
_SPLIT_SETS = ("second", "second+logsumexp+entropy", "everything", "everything+bias", "everything+bias+kl")


def compile_cases(capability: int) -> list[CompileCase]:
    """Every configuration that a decoder launches on a GPU of this capability. "split" is the first of two launches,
    and "bare" has no option; the second launch has a configuration for each set of outputs."""
    V = 126464
    cases = []
    for itemsize, dtype in ((2, "bf16"), (2, "fp16"), (4, "fp32")):
        cases += [_case(capability, itemsize, dtype, name, False, V) for name in _SETS]
        cases += [_case(capability, itemsize, dtype, name, True, V) for name in _SPLIT_SETS]
    parts = confidence_parts(V, confidence_tile(capability, 2, False, False, False), 2)[1]
    cases += [_merge_case(name, parts) for name in ("second", "second+logsumexp+entropy", "everything")]
    return cases


def _case(capability: int, itemsize: int, dtype: str, name: str, split: bool, V: int) -> CompileCase:
    # 1. What the call asks for, and its tile.
    outputs = _SETS[name]
    bare, everything = name == "bare", name.startswith("everything")
    kl, biased, sampled = "kl" in outputs, "bias" in name, "sampled" in outputs
    tile, group = confidence_tile(capability, itemsize, kl, biased, sampled), 16 // itemsize
    part_tiles, parts = confidence_parts(V, tile, itemsize)

    # 2. The arguments that are passed; what is left out is None and compiled in.
    signature = dict.fromkeys(_confidence_kernel.arg_names, "constexpr")
    signature |= {"logits_ptr": f"*{dtype}", "row_stride": "i32", "banned_stride": "i32", "R": "i32", "V": "i32"}
    if not bare:
        signature |= {"rows_ptr": "*i32", "banned_ptr": "*i64", "num_banned": "i32"}
    if everything:
        signature |= {"temperature_ptr": "*fp32", "soft_cap": "fp32"}
    if sampled:
        signature |= {
            "sample_temperature_ptr": "*fp32", "seed_ptr": "*i64", "seed_stride": "i32", "noise_ptr": "*i32",
        }  # fmt: skip
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

    # 3. The numbers that are compiled in.
    flags = {
        "HAS_ROWS": not bare,
        "HAS_BANNED": not bare,
        "HAS_BIAS": biased,
        "HAS_TEMPERATURE": everything,
        "HAS_SOFT_CAP": everything,
        "SECOND": "second" in outputs,
        "ENTROPY": "entropy" in outputs,
        "KL": kl,
        "SAMPLED": sampled,
        "QUERY": "query" in outputs,
        "COLUMNS": tile.columns,
        "GROUP": group,
        "COLUMN_TILES": part_tiles if split else confidence_column_tiles(V, tile, itemsize),
        "PART_TILES": part_tiles,
        "PARTS": parts,
        "LOG2_SLOTS": log2_slots(parts),
        "SPLIT": split,
        "WARPS": tile.num_warps,
    }
    return CompileCase(
        kernel="confidence",
        config=f"{dtype} {name}{' split' if split else ''}",
        fn=_confidence_kernel,
        signature=signature,
        constexprs={argument: flags.get(argument) for argument, kind in signature.items() if kind == "constexpr"},
        divisible_by_16=(
            "logits_ptr",
            "row_stride",
            "V",
            *(["previous_ptr", "previous_stride"] if kl else []),
            *(["values_ptr", "ids_ptr"] if split else []),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.max_registers,
        # A draw costs two software logarithms an element (about 80 instructions), so a call that draws is bound by
        # arithmetic, not by memory, and is outside the gate of the reduction. With a bias the loop over whole tiles is
        # the same, but lies in a loop over the biased ones, which the count would take for it. "kl" loads two logits
        # for an id, and the gate is what the memory allows for each.
        elements_per_iteration=None if sampled or biased else (1 + kl) * tile.columns * group,
    )


def _merge_case(name: str, parts: int) -> CompileCase:
    """The second launch for a set of outputs; "everything" has all that a row can have."""
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
        divisible_by_16=("values_ptr", "ids_ptr", "V"),
        num_warps=1,
        num_stages=1,
    )
