"""Unmask rules as data: what the `unmask` op is told, shared by its reference and its kernel."""

from __future__ import annotations

import dataclasses
from typing import Literal

Pass = Literal["none", "threshold", "factor", "entropy"]
CacheOp = Literal["none", "commit", "refresh"]
Stop = Literal["never", "after_block", "closed"]

PASSES: tuple[Pass, ...] = ("none", "threshold", "factor", "entropy")
CACHE_OPS: tuple[CacheOp, ...] = ("none", "commit", "refresh")
STOPS: tuple[Stop, ...] = ("never", "after_block", "closed")

# Entropies are summed in fixed point (2^-24 nat), so that the entropy budget does not depend on the order of summation.
ENTROPY_SCALE = 1 << 24


@dataclasses.dataclass(frozen=True)
class UnmaskRule:
    """The static part of one `unmask` call. The numbers (thresholds, quotas) are device tensors, arguments of the call.

    select(score, eligible) = every eligible position that passes, if at least kmin pass, else the kmin of highest rank
    (ties: lowest position); kmin is clamped to the number of eligible positions.

    Attributes:
        passes: which positions pass.
            "none": none do (a fixed schedule: kmin decides).                                      LLaDA, arXiv:2502.09992
            "threshold": score > value (strict) or, if `inclusive`, score >= value.               Fast-dLLM, arXiv:2505.22618
            "factor": in rank order r = 1..n, while score_r >= 1 - value / (r + 1).               Fast-dLLM, arXiv:2505.22618
            "entropy": in rank order, while the sum of entropies, the position's own excluded     EB-Sampler, arXiv:2505.24857
                (included if `inclusive`), is <= value (< value if `inclusive`).
        inclusive: see above.
        quota: kmin is the block's schedule m0 // S + (i < m0 % S) at block step i, at least 1 (S = `steps` of the call),
            instead of the constant `min_unmask` of the call.
        cache: what follows a finished block. "none": the next block with masks. "refresh": the same, after a WIDE step.
            "commit": a COMMIT step, then the very next block, with or without masks.
        stop: "never": only at the end of the canvas. "after_block": after a block in which a stop token was written.
            "closed": once a stop token was written and nothing before it in the block is masked.
    """

    passes: Pass
    inclusive: bool = False
    quota: bool = False
    cache: CacheOp = "none"
    stop: Stop = "closed"

    def __post_init__(self) -> None:
        for name, value, known in (("passes", self.passes, PASSES), ("cache", self.cache, CACHE_OPS), ("stop", self.stop, STOPS)):
            if value not in known:
                raise ValueError(f"UnmaskRule: {name} must be one of {', '.join(known)}, got {name}={value!r}")
