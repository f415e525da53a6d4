"""The configurations of the small ops of a layer that must compile: those of the models that are decoded."""

from __future__ import annotations

import triton

from ..static import CompileCase
from ..tiles import SWIGLU_TILE, norm_tile, rope_tile
from .kernel import FUSION, qk_norm_rope_kernel, rms_norm_kernel, swiglu_kernel

# Hidden sizes: the embedded models, LLaDA2-mini, Ministral-3, Dream-7B, LLaDA-8B and SDAR-8B; then the longest row.
ROWS = (64, 192, 2048, 3072, 3584, 4096, 16384)
# (what it is, H, H_kv, D, R, norms, a scale).
HEADS = (
    ("LLaDA-8B", 32, 32, 128, 128, False, False),
    ("Dream-7B", 28, 4, 128, 128, False, False),
    ("SDAR-8B", 32, 8, 128, 128, True, False),
    ("LLaDA2-mini", 16, 4, 128, 64, True, False),
    ("Ministral-3", 32, 8, 128, 128, False, True),
    ("embedded", 4, 2, 32, 32, False, False),
    ("odd", 3, 1, 80, 40, True, True),
    ("largest", 8, 2, 512, 512, True, False),
    ("largest partial", 8, 2, 512, 128, True, True),
)
# Widths of the feed-forward networks: the embedded models, LLaDA2-mini's experts, SDAR-8B and LLaDA-8B, Dream-7B.
WIDTHS = (128, 512, 12288, 18944)


def compile_cases(capability: int) -> list[CompileCase]:
    """Every model in bfloat16, as the launchers specialise aligned tensors, and one in the other dtypes and unaligned;
    the configurations are the same for all targets."""
    norms = [("bf16", d, summed) for d in ROWS for summed in (False, True)]
    norms += [(dtype, 4096, True) for dtype in ("fp16", "fp32")] + [("fp32", 16384, True), ("bf16", 63, True)]
    heads = [("bf16", *model, True) for model in HEADS]
    heads += [(dtype, *HEADS[2], True) for dtype in ("fp16", "fp32")] + [("fp32", *HEADS[0], True)]
    heads += [("fp32", *HEADS[-1], True), ("bf16", *HEADS[2], False)]
    widths = [("bf16", width) for width in WIDTHS] + [(dtype, 12288) for dtype in ("fp16", "fp32")] + [("bf16", 63)]
    return [
        *(_norm_case(*norm) for norm in norms),
        *(_heads_case(*model) for model in heads),
        *(_swiglu_case(*width) for width in widths),
    ]


def _norm_case(dtype: str, d: int, summed: bool) -> CompileCase:
    BLOCK_D, num_warps = norm_tile(d)
    constexprs = {"d": d, "BLOCK_D": BLOCK_D} | ({} if summed else {"residual_ptr": None, "total_ptr": None})
    name = "add_rms_norm" if summed else "rms_norm"
    strides = ("x_stride", "residual_stride") if d % 16 == 0 else ()
    return _case(name, f"{dtype} d={d}", rms_norm_kernel, dtype, constexprs, strides, num_warps)


def _heads_case(
    dtype: str, model: str, H: int, H_KV: int, D: int, R: int, normed: bool, scaled: bool, aligned: bool
) -> CompileCase:
    HEADS, BLOCK_R, BLOCK_P, num_warps = rope_tile(D, R)
    constexprs = {"H": H, "H_KV": H_KV, "D": D, "R": R, "ALIGNED": aligned and D % 16 == 0}
    constexprs |= {"HEADS": HEADS, "BLOCK_R": BLOCK_R, "BLOCK_P": BLOCK_P}
    constexprs |= {} if normed else {"q_weight_ptr": None, "k_weight_ptr": None}
    constexprs |= {} if scaled else {"q_scale_ptr": None}
    config = f"{dtype} {model}{'' if aligned else ' unaligned'} H={H}/{H_KV} D={D} R={R}"
    return _case("qk_norm_rope", config, qk_norm_rope_kernel, dtype, constexprs, (), num_warps)


def _swiglu_case(dtype: str, width: int) -> CompileCase:
    BLOCK_I, num_warps = SWIGLU_TILE
    strides = ("gate_stride", "up_stride") if width % 16 == 0 else ()
    constexprs = {"WIDTH": width, "BLOCK_I": BLOCK_I}
    return _case("swiglu", f"{dtype} I={width}", swiglu_kernel, dtype, constexprs, strides, num_warps)


def _case(
    kernel: str,
    config: str,
    fn: triton.JITFunction,
    dtype: str,
    constexprs: dict[str, object],
    strides: tuple[str, ...],
    num_warps: int,
) -> CompileCase:
    signature: dict[str, object] = {}
    for name in fn.arg_names:
        kind = f"*{dtype}" if name.endswith("_ptr") else "fp32" if name == "eps" else "i32"
        signature[name] = "constexpr" if name in constexprs else kind
    pointers = tuple(name for name, kind in signature.items() if str(kind).startswith("*"))
    return CompileCase(
        kernel=kernel,
        config=config,
        fn=fn,
        signature=signature,
        constexprs=constexprs,
        divisible_by_16=(*pointers, *strides),
        num_warps=num_warps,
        num_stages=1,
        fusion=FUSION,
    )
