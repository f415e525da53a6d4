"""`linear_confidence` in Triton: its launcher and the configurations that must compile."""

from __future__ import annotations

from collections.abc import Sequence

import triton
from torch import Tensor

from . import device
from .checks.confidence import LINEAR_OUTPUTS, check_linear_arguments
from .confidence.launch import allocate, allocate_partials, merge, merge_case, present
from .library import operator
from .linear_confidence_device import _linear_confidence_kernel
from .reference.confidence import Confidence
from .static import CompileCase
from .tiles import LinearConfidenceTile, linear_confidence_parts, linear_confidence_tile


def _fake(hidden: Tensor, *, rows: Tensor | None, outputs: Sequence[str], **_: object) -> Confidence:
    return allocate(hidden.shape[0] if rows is None else rows.shape[0], outputs, 0, hidden.device)


@operator(fake=_fake, present=present, result=Confidence)
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

    Arguments, results and errors are those of `reference.linear_confidence`, which specifies it; float64 is not
    accepted. The logits are the fp32 sums of the products, never rounded to the inputs' dtype: where a head writes
    bf16, two logits that it rounds to the same are told apart here. A row's bits do not depend on the other rows and
    not on their number.

    This is the option for memory, not for speed: 128 blocks of 32 rows of bf16 logits over 126,464 ids are 1.04 GB, the
    partials here (two launches, `tiles.linear_confidence_parts`) 26 MB. Fusing saves the logits' write and read, 2% of
    the head's time at 32 rows and about 15% from 256 on, and the product of a general kernel loses as much or more
    against the vendor's.

    Raises also: RuntimeError for CPU tensors without Triton's interpreter.  NotImplementedError: a GPU that
    `tiles.TARGETS` does not
        name.
    """
    N = check_linear_arguments(
        hidden, weight, rows, outputs, banned, temperature, sample_temperature, seed, noise, query, soft_cap
    )  # fmt: skip
    device.capability_of("linear_confidence", hidden, _linear_confidence_kernel)
    return launch(
        hidden, weight, rows, outputs, banned, temperature, sample_temperature, seed, noise, query, soft_cap,
        N=N, tile=linear_confidence_tile(hidden.element_size()),
    )  # fmt: skip


def launch(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    outputs: Sequence[str],
    banned: Tensor | None,
    temperature: Tensor | None,
    sample_temperature: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
    query: Tensor | None,
    soft_cap: float | None,
    *,
    N: int,
    tile: LinearConfidenceTile,
) -> Confidence:
    """`linear_confidence` of checked arguments by a tile."""
    (R, H), V = hidden.shape, weight.shape[0]
    part_tiles, parts = linear_confidence_parts(V, tile)
    result = allocate(N, outputs, 0, hidden.device)
    if N == 0:
        return result
    partials = allocate_partials(N, parts, 0, hidden.device)
    num_banned = 0 if banned is None else banned.shape[-1]
    with device.launching_on(hidden):
        _linear_confidence_kernel[(triton.cdiv(N, tile.BLOCK_M), parts)](
            hidden_ptr=hidden,
            weight_ptr=weight,
            rows_ptr=rows,
            banned_ptr=banned if num_banned else None,
            temperature_ptr=temperature,
            sample_temperature_ptr=sample_temperature,
            seed_ptr=seed,
            noise_ptr=noise,
            query_ptr=query,
            values_ptr=partials[0],
            ids_ptr=partials[1],
            hidden_stride=hidden.stride(0),
            weight_stride=weight.stride(0),
            banned_stride=num_banned if num_banned and banned.dim() == 2 else 0,
            N=N,
            R=R,
            V=V,
            H=H,
            soft_cap=soft_cap,
            HAS_ROWS=rows is not None,
            NUM_BANNED=num_banned,
            HAS_TEMPERATURE=temperature is not None,
            HAS_SOFT_CAP=soft_cap is not None,
            SECOND="second" in outputs,
            ENTROPY="entropy" in outputs,
            SAMPLED="sampled" in outputs,
            QUERY="query" in outputs,
            EVEN_H=H % tile.BLOCK_H == 0,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_V=tile.BLOCK_V,
            BLOCK_H=tile.BLOCK_H,
            PART_TILES=part_tiles,
            PARTS=parts,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        merge(
            result, partials, outputs, 0, rows, temperature, sample_temperature, query, soft_cap, None, N=N, R=R, V=V, parts=parts
        )  # fmt: skip
    return result


def compile_cases(capability: int) -> list[CompileCase]:
    """Both launches, on every GPU by the same tiles: what a decoder asks of a head in bf16, and all outputs in every
    dtype."""
    V, H = 126464, 4096
    kinds = (
        ("bf16", "second+logsumexp+entropy"),
        ("bf16", "everything"),
        ("fp16", "everything"),
        ("fp32", "everything"),
    )
    cases = []
    for dtype, name in kinds:
        everything = name == "everything"
        tile = linear_confidence_tile(4 if dtype == "fp32" else 2)
        part_tiles, parts = linear_confidence_parts(V, tile)
        signature = dict.fromkeys(_linear_confidence_kernel.arg_names, "constexpr")
        signature |= {f"{name}_ptr": f"*{dtype}" for name in ("hidden", "weight")}
        signature |= {"rows_ptr": "*i32", "banned_ptr": "*i64", "values_ptr": "*fp32", "ids_ptr": "*i32"}
        signature |= dict.fromkeys(("hidden_stride", "weight_stride", "banned_stride", "N", "R", "V", "H"), "i32")
        if everything:
            signature |= {
                "temperature_ptr": "*fp32",
                "sample_temperature_ptr": "*fp32",
                "seed_ptr": "*i64",
                "noise_ptr": "*i32",
            }
            signature |= {"query_ptr": "*i64", "soft_cap": "fp32"}
        flags = {
            "HAS_ROWS": True,
            "NUM_BANNED": 4 if everything else 1,
            "HAS_TEMPERATURE": everything,
            "HAS_SOFT_CAP": everything,
            "SECOND": True,
            "ENTROPY": True,
            "SAMPLED": everything,
            "QUERY": everything,
            "EVEN_H": H % tile.BLOCK_H == 0,
            "BLOCK_M": tile.BLOCK_M,
            "BLOCK_V": tile.BLOCK_V,
            "BLOCK_H": tile.BLOCK_H,
            "PART_TILES": part_tiles,
            "PARTS": parts,
        }
        pointers = tuple(argument for argument, kind in signature.items() if str(kind).startswith("*"))
        cases.append(
            CompileCase(
                kernel="linear_confidence",
                config=f"{dtype} {name}",
                fn=_linear_confidence_kernel,
                signature=signature,
                constexprs={
                    argument: flags.get(argument) for argument, kind in signature.items() if kind == "constexpr"
                },
                divisible_by_16=(*pointers, "hidden_stride", "weight_stride", "V", "H"),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                mma="wgmma" if capability == 90 and dtype != "fp32" else None,
            )
        )
    parts = linear_confidence_parts(V, linear_confidence_tile(2))[1]
    cases.append(merge_case("everything", LINEAR_OUTPUTS, parts, "linear_confidence merge"))
    return cases
