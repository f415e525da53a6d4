"""The configurations of `draft_build` and `verify` that must compile: both kernels with every tile."""

from __future__ import annotations

import triton

from ..static import CompileCase
from ..tiles import DRAFTS_TILES
from .kernel import draft_build_kernel, verify_kernel


def compile_cases(capability: int) -> list[CompileCase]:
    """Both kernels with every tile; the configurations are the same for all targets."""
    return [_case(kernel, *tile) for kernel in (draft_build_kernel, verify_kernel) for tile in DRAFTS_TILES]


def _case(kernel: triton.JITFunction, BLOCK_T: int, num_warps: int) -> CompileCase:
    dtypes = dict.fromkeys(("source_token_ptr", "tokens_ptr", "held_ptr", "token_ptr", "pred_ptr"), "*i64")
    dtypes |= dict.fromkeys(
        ("source_score_ptr", "source_confidence_ptr", "score_ptr", "confidence_ptr", "certain_ptr"), "*fp32"
    )
    dtypes |= dict.fromkeys(("tried_ptr", "accepted_ptr"), "*i32") | {"BLOCK_T": "constexpr"}
    signature = {arg: dtypes.get(arg, "*u1" if arg.endswith("_ptr") else "i32") for arg in kernel.arg_names}
    return CompileCase(
        kernel=kernel.__name__.removesuffix("_kernel"),
        config=f"BLOCK_T={BLOCK_T} num_warps={num_warps}",
        fn=kernel,
        signature=signature,
        constexprs={"BLOCK_T": BLOCK_T},
        divisible_by_16=(),
        num_warps=num_warps,
        num_stages=1,
    )
