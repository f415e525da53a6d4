"""`confidence` in Triton: its launcher, its tiles, and the configurations that must compile."""

from __future__ import annotations

from typing import Sequence

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from .confidence_device import _confidence_kernel
from .reference.confidence import OUTPUTS, Confidence, check_arguments, requested
from .static import CompileCase
from .tiles import CONFIDENCE_TILES, ConfidenceTile, confidence_tile


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
    """Most likely token per row with its probability and, on request, runner-up, logsumexp, entropy, KL, a draw, a query.

    Arguments, results and errors are those of `reference.confidence`, which specifies it; float64 is not accepted. Token ids do
    not depend on the tile. Floats depend on the GPU's tile in the last bits, which on sm_100 is another one with "kl" and on
    sm_120 with a bias, and on nothing else: not on the other rows.

    Cost: the logits, read once; "kl" reads `previous` beside them, twice the bytes. A bias costs what its ids cost: each of the
    tiles (`Tile.lanes` x 16 bytes) that hold one compares all its elements with all K ids, the other tiles nothing.

    Raises also: RuntimeError for CPU tensors without Triton's interpreter.  NotImplementedError: no tile for this GPU.
    """
    N = check_arguments(
        logits, rows, outputs, banned, temperature, sample_temperature, seed, noise, query, soft_cap,
        bias_ids, bias, previous, previous_logsumexp,
    )  # fmt: skip
    if logits.device.type == "cpu" and isinstance(_confidence_kernel, JITFunction):
        raise RuntimeError(
            "confidence: logits must be on a GPU, got device=cpu; CPU tensors need TRITON_INTERPRET=1 set before triton is "
            "imported, or dlm_kernels.reference.confidence"
        )

    def allocate(dtype: torch.dtype, group: str | None = None) -> Tensor | None:
        return torch.empty(N, dtype=dtype, device=logits.device) if group is None or group in outputs else None

    result = Confidence(
        token=allocate(torch.int64),
        logit=allocate(torch.float32),
        second_token=allocate(torch.int64, "second"),
        second_logit=allocate(torch.float32, "second"),
        logsumexp=allocate(torch.float32, "logsumexp"),
        entropy=allocate(torch.float32, "entropy"),
        kl=allocate(torch.float32, "kl"),
        confidence=allocate(torch.float32),
        margin=allocate(torch.float32, "second"),
        sampled_token=allocate(torch.int64, "sampled"),
        sampled_confidence=allocate(torch.float32, "sampled"),
        query_confidence=allocate(torch.float32, "query"),
        error=allocate(torch.int32),
    )
    if N == 0:
        return result

    R, V = logits.shape
    num_banned = 0 if banned is None else banned.shape[-1]
    tile = _tile(logits, kl="kl" in outputs, biased=bias is not None)
    group = 16 // logits.element_size()
    _confidence_kernel[(N,)](
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
        **{f"{name}_ptr": values for name, values in result._asdict().items()},
        row_stride=logits.stride(0),
        previous_stride=None if previous is None else previous.stride(0),
        num_bias=None if bias is None else bias.shape[1],
        banned_stride=num_banned if num_banned and banned.dim() == 2 else 0,
        R=R,
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
        COLUMN=triton.next_power_of_2(triton.cdiv(V, tile.lanes * group)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return result


def _tile(logits: Tensor, kl: bool, biased: bool) -> ConfidenceTile:
    capability = 90
    if logits.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(logits.device)
        capability = 10 * major + minor
    try:
        return confidence_tile(capability, logits.element_size(), kl, biased)
    except KeyError:
        known = ", ".join(f"{c / 10}" for c in sorted({capability for capability, _ in CONFIDENCE_TILES}))
        raise NotImplementedError(
            f"confidence: no tile for compute capability {capability / 10}; there are tiles for {known}"
        ) from None


def compile_cases(capability: int) -> list[CompileCase]:
    """Every configuration that a decoder launches on a GPU of this capability: dtypes and sets of outputs; "bare" has no option."""
    V = 126464
    output_types = {
        "token": "*i64", "logit": "*fp32", "second_token": "*i64", "second_logit": "*fp32", "logsumexp": "*fp32",
        "entropy": "*fp32", "kl": "*fp32", "confidence": "*fp32", "margin": "*fp32", "sampled_token": "*i64",
        "sampled_confidence": "*fp32", "query_confidence": "*fp32", "error": "*i32",
    }  # fmt: skip
    sets = {
        "bare": (),
        "second": ("second",),
        "second+logsumexp+entropy": ("second", "logsumexp", "entropy"),
        "kl": ("logsumexp", "kl"),
        "sampled": ("sampled",),
        "bias": ("second", "logsumexp", "entropy"),
        "everything": OUTPUTS,
        # Without "kl": no decoder has it beside a bias, and with fp32 logits ptxas spills 24 to 70 bytes of the two together.
        "everything+bias": tuple(name for name in OUTPUTS if name != "kl"),
    }
    cases = []
    for itemsize, dtype in ((2, "bf16"), (2, "fp16"), (4, "fp32")):
        for name, outputs in sets.items():
            bare, everything = name == "bare", name.startswith("everything")
            kl, biased = "kl" in outputs, name.endswith("bias")
            tile, group = confidence_tile(capability, itemsize, kl, biased), 16 // itemsize
            signature = {
                "logits_ptr": f"*{dtype}",
                "rows_ptr": "constexpr" if bare else "*i32",
                "banned_ptr": "constexpr" if bare else "*i64",
                "temperature_ptr": "*fp32" if everything else "constexpr",
                "sample_temperature_ptr": "*fp32" if "sampled" in outputs else "constexpr",
                "seed_ptr": "*i64" if "sampled" in outputs else "constexpr",
                "noise_ptr": "*i32" if "sampled" in outputs else "constexpr",
                "query_ptr": "*i64" if "query" in outputs else "constexpr",
                "bias_ids_ptr": "*i64" if biased else "constexpr",
                "bias_ptr": "*fp32" if biased else "constexpr",
                "previous_ptr": f"*{dtype}" if kl else "constexpr",
                "previous_logsumexp_ptr": "*fp32" if kl else "constexpr",
                **{f"{field}_ptr": type_ if requested(field, outputs) else "constexpr" for field, type_ in output_types.items()},
                "row_stride": "i32",
                "previous_stride": "i32" if kl else "constexpr",
                "banned_stride": "i32",
                "num_bias": "i32" if biased else "constexpr",
                "R": "i32",
                "V": "i32",
                "soft_cap": "fp32" if everything else "constexpr",
            }
            constexprs = {argument: None for argument, type_ in signature.items() if type_ == "constexpr"}
            constexprs |= {
                "HAS_ROWS": not bare,
                "NUM_BANNED": 0 if bare else 4 if everything else 1,
                "HAS_BIAS": biased,
                "HAS_TEMPERATURE": everything,
                "HAS_SOFT_CAP": everything,
                "SECOND": "second" in outputs,
                "ENTROPY": "entropy" in outputs,
                "KL": kl,
                "SAMPLED": "sampled" in outputs,
                "QUERY": "query" in outputs,
                "LANES": tile.lanes,
                "GROUP": group,
                "COLUMN": triton.next_power_of_2(triton.cdiv(V, tile.lanes * group)),
            }
            signature |= {argument: "constexpr" for argument in constexprs}
            pointers = tuple(argument for argument, type_ in signature.items() if str(type_).startswith("*"))
            cases.append(
                CompileCase(
                    kernel="confidence",
                    config=f"{dtype} {name}",
                    fn=_confidence_kernel,
                    signature={argument: signature[argument] for argument in _confidence_kernel.arg_names},
                    constexprs=constexprs,
                    divisible_by_16=(*pointers, "row_stride", *(["previous_stride"] if kl else []), "V"),
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    # A draw costs two software logarithms an element (about 80 instructions): it is bound by arithmetic, not
                    # by memory, and outside the gate of the reduction. With a bias the loop over whole tiles is the same, but lies
                    # in a loop over the biased ones, which the count takes for it. "kl" loads two logits for an id: the gate
                    # is what the memory allows for each.
                    elements_per_iteration=None if "sampled" in outputs or biased else (1 + kl) * tile.lanes * group,
                )
            )
    return cases
