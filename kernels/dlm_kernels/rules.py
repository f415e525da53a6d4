"""Unmask rules as data: what the `unmask` op is told, shared by its reference and its kernel."""

from __future__ import annotations

import dataclasses
from typing import Literal

Pass = Literal["none", "threshold", "factor", "entropy"]
Scope = Literal["row", "each", "first"]
Remask = Literal["none", "lowest", "saber", "wino"]
CacheOp = Literal["none", "commit", "refresh", "once", "fused", "delayed"]
Stop = Literal["never", "after_block", "closed", "appends", "fill", "all_stop"]

PASSES: tuple[Pass, ...] = ("none", "threshold", "factor", "entropy")
SCOPES: tuple[Scope, ...] = ("row", "each", "first")
REMASKS: tuple[Remask, ...] = ("none", "lowest", "saber", "wino")
CACHE_OPS: tuple[CacheOp, ...] = ("none", "commit", "refresh", "once", "fused", "delayed")
STOPS: tuple[Stop, ...] = ("never", "after_block", "closed", "appends", "fill", "all_stop")

# Entropies are summed in fixed point (2^-24 nat), so that the entropy budget does not depend on the order of summation.
ENTROPY_SCALE = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnmaskRule:
    """The static part of one `unmask` call. The numbers (thresholds, quotas) are device tensors, arguments of the call.

    select(score, eligible) = every eligible position that passes, if at least kmin pass, else the kmin of highest rank
    (ties: lowest position); kmin is clamped to the number of eligible positions.

    Attributes:
        passes: which positions pass.
            "none": none do (a fixed schedule: kmin decides).                                      LLaDA, arXiv:2502.09992
            "threshold": score > value (strict) or, if `inclusive`, score >= value.               Fast-dLLM, arXiv:2505.22618
            "factor": in rank order r = 1..n, while score_r >= 1 - value / (r + 1).               Fast-dLLM, arXiv:2505.22618
            "entropy": in rank order, while the sum of entropies without the largest of them is <= value; if
                `inclusive`,
                while the whole sum is < value.                                                    EB-Sampler, arXiv:2505.24857
        inclusive: see above.
        quota: kmin is the block's schedule m0 // S + (i < m0 % S) at block step i, at least 1 (S = `steps` of the
            call), instead of the constant `min_unmask` of the call.
        pipeline: the region of a row holds several blocks, decoded at once; a step may append one.    D2F, arXiv:2508.09192
        scope: what kmin counts over. "row": all eligible positions. "each" (pipelines): a fully activated block in
            which nothing passes writes its best position, other blocks nothing (D2F). "first" (pipelines): as "row",
            and then the first block with masks writes its best position if nothing was chosen in it (d3LLM,
            arXiv:2601.07568).
        runs: besides, the best position of every maximal run of adjacent eligible positions is written if its score is
            > `run_value` (dInfer's hierarchy, arXiv:2510.08666).
        edit: besides, a written position whose prediction differs is overwritten if its score is > `edit_value`; the
            block is finished by a step that writes nothing, whose keys are then final (LLaDA2.1's joint threshold,
            arXiv:2602.08676).
        renoise: a canvas without masks: every position of the region is eligible, and those not chosen receive `refill`
            (uniform-noise models such as DiffusionGemma). The block is finished by `exits` only.
        remask: after the step's writes, the k positions of lowest `remask_score` are masked again (ties: lowest
            position).
            "lowest": k = `remask_count`, among all written positions of the region.               RCR in MDPO, arXiv:2508.13148
            "saber": the same positions, k = min(max(n // 2, ceil(m / 8)), m - 1), m = max(n, positions just chosen), n
                =
                `min_unmask`; nothing if no mask is left.                                          Saber, arXiv:2510.18165
            "wino": among positions written before this step whose remask_score is < `remask_value`, k = at most
                `remask_count`, and only if more than one was chosen.                             WINO, arXiv:2507.18578
        cache: what follows a finished block. "none": the next block with masks. "refresh": the same, after a REFRESH
            step.
            "commit": a COMMIT step, then the very next block, with or without masks. "once": a REFRESH step at the
                start of the
            row only. Pipelines: "none"; "fused": finished blocks are committed by the next step, whatever else it
            computes;
            "delayed": the region's first block is committed by a COMMIT step, which selects too, after `delay` steps
                that found it finished; those are REFRESH steps, unless they commit the block before it. What precedes
                the region is committed by the row's `delay`-th step; until then all are REFRESH (d3LLM).
        seed: after a prefill and after a commit, the first position of the block receives `seed`, the prediction of the
            row before it (Fast-dLLM v2, NBDiff).
        stop: "never": only at the end of the canvas. "after_block": after a block in which a stop token was written.
            "closed": once a stop token was written and nothing before it in the region is masked. "all_stop": after a
                block
            that holds nothing but stop tokens. Pipelines: "appends": a written stop token only prevents further blocks
            (D2F); "fill": what follows the first written stop token is overwritten by it (d3LLM).
    """

    passes: Pass = dataclasses.field(kw_only=False)
    inclusive: bool = False
    quota: bool = False
    pipeline: bool = False
    scope: Scope = "row"
    runs: bool = False
    edit: bool = False
    renoise: bool = False
    remask: Remask = "none"
    cache: CacheOp = "none"
    seed: bool = False
    stop: Stop = "closed"

    def __post_init__(self) -> None:
        def fail(rule: str) -> None:
            raise ValueError(f"UnmaskRule: {rule}")

        known = {"passes": PASSES, "scope": SCOPES, "remask": REMASKS, "cache": CACHE_OPS, "stop": STOPS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                fail(f"{name} must be one of {', '.join(values)}, got {name}={getattr(self, name)!r}")
        if self.pipeline != (self.scope != "row"):
            fail(
                f"scope must be 'each' or 'first' for a pipeline, and 'row' otherwise, got {self.scope!r}, pipeline={self.pipeline}"
            )
        if self.pipeline and (self.cache not in ("none", "fused", "delayed") or self.quota or self.edit or self.seed):
            fail("a pipeline must have cache 'none', 'fused' or 'delayed' and no quota, edit or seed")
        if not self.pipeline and (self.cache in ("fused", "delayed") or self.stop in ("appends", "fill")):
            fail(f"cache={self.cache!r} with stop={self.stop!r} needs a pipeline")
        if self.pipeline and self.stop == "all_stop":
            fail("stop='all_stop' must not be a pipeline's")
        if self.scope == "each" and self.passes not in ("none", "threshold"):
            fail(f"scope 'each' must have a flat test (passes 'none' or 'threshold'), got passes={self.passes!r}")
        if self.edit and self.stop == "closed":
            fail("stop='closed' must not be an editing rule's: tokens before the stop token may still change")
        if self.seed and self.cache != "commit":
            fail(f"seed must have cache 'commit', got cache={self.cache!r}")
        if self.edit + self.renoise + (self.remask != "none") + self.pipeline > 1:
            fail("edit, renoise, remask and pipeline must not be combined")
        if self.renoise and (self.runs or self.quota or self.stop == "closed" or self.cache not in ("none", "commit")):
            fail("renoise must have no runs, no quota, cache 'none' or 'commit', and stop other than 'closed'")
