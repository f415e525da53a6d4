"""The configuration of `uniform_scores` that must compile; it is the same for all targets."""

from __future__ import annotations

from ..static import CompileCase
from ..tiles import NOISE_TILE
from .kernel import uniform_scores_kernel


def compile_cases(capability: int) -> list[CompileCase]:
    """The kernel with its only tile."""
    BLOCK_N, num_warps = NOISE_TILE
    return [
        CompileCase(
            kernel="uniform_scores",
            config=f"BLOCK_N={BLOCK_N} num_warps={num_warps}",
            fn=uniform_scores_kernel,
            signature={
                "seed_ptr": "*i64", "noise_ptr": "*i32", "score_ptr": "*fp32", "seed_stride": "i32", "N": "i32",
                "BLOCK_N": "constexpr",
            },
            constexprs={"BLOCK_N": BLOCK_N},
            divisible_by_16=(),
            num_warps=num_warps,
            num_stages=1,
        )
    ]  # fmt: skip
