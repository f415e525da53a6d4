"""What the `unmask` op is told, shared by its reference and its kernels: a static rule, and the inputs of one call."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

from .checks.named import check_of, shown

Kind = Literal["refresh", "denoise"]
Pass = Literal["none", "threshold", "factor", "entropy"]
Scope = Literal["row", "each", "first"]
Remask = Literal["none", "lowest", "saber", "wino"]
CacheOp = Literal["none", "commit", "refresh", "once", "fused", "delayed"]
Stop = Literal["never", "after_block", "closed", "appends", "fill", "all_stop"]

KINDS: tuple[Kind, ...] = ("refresh", "denoise")
PASSES: tuple[Pass, ...] = ("none", "threshold", "factor", "entropy")
SCOPES: tuple[Scope, ...] = ("row", "each", "first")
REMASKS: tuple[Remask, ...] = ("none", "lowest", "saber", "wino")
CACHE_OPS: tuple[CacheOp, ...] = ("none", "commit", "refresh", "once", "fused", "delayed")
STOPS: tuple[Stop, ...] = ("never", "after_block", "closed", "appends", "fill", "all_stop")

# Entropies are summed in fixed point (2^-24 nat), so that the entropy budget does not depend on the order of summation.
ENTROPY_SCALE = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnmaskRule:
    """The static part of an `unmask` call. The numbers (thresholds, quotas) are device tensors: `UnmaskInputs`.

    select(score, eligible) = every eligible position that passes, if at least kmin pass, else the kmin of highest rank
    (ties: lowest position); kmin is clamped to the number of eligible positions.

    Attributes:
        passes: Which positions pass.
            "none": No position passes, so that kmin decides (a fixed schedule). LLaDA, arXiv:2502.09992.
            "threshold": A position passes if score > value (strict) or, if `inclusive`, score >= value. Fast-dLLM,
                arXiv:2505.22618.
            "factor": In rank order r = 1..n, positions pass while score_r >= 1 - value / (r + 1). Fast-dLLM,
                arXiv:2505.22618.
            "entropy": In rank order, positions pass while the sum of their entropies without the largest one is
                <= value or, if `inclusive`, while the whole sum is < value. EB-Sampler, arXiv:2505.24857.
        inclusive: Whether "threshold" and "entropy" compare as just said for `inclusive`.
        quota: kmin is the block's schedule m0 // S + (i < m0 % S) at block step i, at least 1 (m0 = the block's masks
            at its start, S = `steps` of the call), instead of the constant `min_unmask` of the call.
        pipeline: The region of a row holds several blocks, which are decoded at once; a step may append one block. D2F,
            arXiv:2508.09192.
        scope: What kmin counts over.
            "row": All eligible positions of the region.
            "each": For pipelines. A fully activated block in which nothing passes writes its best position; other
                blocks then write nothing. D2F.
            "first": For pipelines. kmin counts as for "row", and then the first block with masks writes its best
                position if nothing was chosen in that block. d3LLM, arXiv:2601.07568.
        runs: Besides, the best position of every maximal run of adjacent eligible positions is written if its score is
            > `run_value`. dInfer's hierarchy, arXiv:2510.08666.
        edit: Besides, a written position whose prediction differs is overwritten if its score is > `edit_value`. The
            block is finished by a step that writes nothing, because the keys of that step are final. LLaDA2.1's joint
            threshold, arXiv:2602.08676.
        renoise: The canvas has no masks: every position of the region is eligible, and the positions that are not
            chosen receive `refill` (uniform-noise models such as DiffusionGemma). Only `exits` finishes the block.
        remask: After the step's writes, the k positions of lowest `remask_score` are masked again (ties: lowest
            position).
            "lowest": k = `remask_count`, among all written positions of the region. RCR in MDPO, arXiv:2508.13148.
            "saber": The same positions; k = min(max(n // 2, ceil(m / 8)), m - 1) with n = `min_unmask` and m = max(n,
                positions just chosen), but k = 0 if no mask is left. Saber, arXiv:2510.18165.
            "wino": Among positions that were written before this step and whose remask_score is < `remask_value`; k is
                at most `remask_count`, and 0 unless more than one position was chosen. WINO, arXiv:2507.18578.
        cache: What follows a finished block.
            "none": The next block with masks.
            "refresh": The next block with masks, after a REFRESH step.
            "once": The next block with masks; a REFRESH step comes at the start of the row only.
            "commit": A COMMIT step, then the very next block, with or without masks.
            "fused": For pipelines. Finished blocks are committed by the next step, whatever else that step computes.
            "delayed": For pipelines. The region's first block is committed by a COMMIT step, which selects too, after
                `delay` steps that found the block finished; those are REFRESH steps, unless they commit the block
                before. What precedes the region is committed by the row's `delay`-th step; until then all steps are
                REFRESH steps. d3LLM.
            A pipeline has "none", "fused" or "delayed"; every other rule has one of the first four.
        first_token: After a prefill and after a commit, the first position of the block receives `first_token`, the
            prediction of the row before that position. Fast-dLLM v2, NBDiff.
        stop: When a written stop token ends the row.
            "never": The row ends at the end of its canvas only.
            "after_block": The row ends after a block in which a stop token was written.
            "closed": The row ends once a stop token was written and no position before that token in the region is
                masked.
            "all_stop": The row ends after a block that holds nothing but stop tokens.
            "appends": For pipelines. A written stop token only prevents further blocks. D2F.
            "fill": For pipelines. The first written stop token overwrites what follows. d3LLM.
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
    first_token: bool = False
    stop: Stop = "closed"

    @check_of("UnmaskRule")
    def __post_init__(self) -> None:
        def fail(rule: str) -> None:
            raise ValueError(f"UnmaskRule: {rule}")

        known = {"passes": PASSES, "scope": SCOPES, "remask": REMASKS, "cache": CACHE_OPS, "stop": STOPS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                fail(f"{name} must be one of {', '.join(values)}, got {name}={getattr(self, name)!r}")
        for name, flag in vars(self).items():
            if name not in known and not isinstance(flag, bool):
                raise TypeError(f"UnmaskRule: {name} must be a bool, got {name}={shown(flag)}")
        if self.pipeline != (self.scope != "row"):
            fail(
                "scope must be 'each' or 'first' for a pipeline, and 'row' otherwise, "
                f"got {self.scope!r}, pipeline={self.pipeline}"
            )
        one_by_one = self.quota or self.edit or self.first_token
        if self.pipeline and (self.cache not in ("none", "fused", "delayed") or one_by_one):
            fail("a pipeline must have cache 'none', 'fused' or 'delayed' and no quota, edit or first_token")
        if not self.pipeline and (self.cache in ("fused", "delayed") or self.stop in ("appends", "fill")):
            fail(f"cache={self.cache!r} with stop={self.stop!r} needs a pipeline")
        if self.pipeline and self.stop == "all_stop":
            fail("stop='all_stop' must not be a pipeline's")
        if self.scope == "each" and self.passes not in ("none", "threshold"):
            fail(f"scope 'each' must have a flat test (passes 'none' or 'threshold'), got passes={self.passes!r}")
        if self.edit and self.stop == "closed":
            fail("stop='closed' must not be an editing rule's: tokens before the stop token may still change")
        if self.first_token and self.cache != "commit":
            fail(f"first_token must have cache 'commit', got cache={self.cache!r}")
        if self.edit + self.renoise + (self.remask != "none") + self.pipeline > 1:
            fail("edit, renoise, remask and pipeline must not be combined")
        if self.renoise and (self.runs or self.quota or self.stop == "closed" or self.cache not in ("none", "commit")):
            fail("renoise must have no runs, no quota, cache 'none' or 'commit', and stop other than 'closed'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnmaskInputs:
    """What one `unmask` call is told about every row [B] and every lane [B, W] of the batch, in device tensors.

    Lane j of row b is the position lane_start[b] + j of the canvas. Every [B, W] tensor may have any row stride, and
    lanes that are not needed may hold anything. An input that belongs to a rule is given if and only if the rule uses
    that input.

    Attributes:
        query_len: [B] int32: positions of the row that the forward computed; 0 = the row sat the forward out.
        pred: [B, W] int64: the token to write, never mask_id.
        score: [B, W] fp32: what rule.passes tests. NaN counts as -inf, here and in `rank`.
        confidence: [B, W] fp32: what is recorded where a token is written.
        value: [B] fp32: the threshold, factor or entropy budget; for passes "threshold" also [B, W].
        min_unmask: [B] int32: positions to write at least, unless rule.quota says how many; 0 forces none.
        steps: [B] int32: denoise steps of a block, for rule.quota; a number below 1 counts as 1.
        block_length: [B] int32: length of the blocks to come; a number below 1 counts as 1.
        mask_id: the token that a masked position holds.
        stop_ids: [K] int64: the stop tokens, K from 0 to 16.
        lane_start: [B] int32: position of lane 0; None = block_start, which a pipeline needs and which may be given as
            the state's own tensor. Lanes before the canvas are nothing. A row whose region does not lie in its lanes
            sits the step out.
        rank: [B, W] fp32: the order of the positions; None = score.
        entropy: [B, W] fp32, nats: for passes "entropy".
        stat_error: [B, W] int32: not 0 where the statistics of the lane are unusable; None = all are usable.
        allowed: [B, W] bool: lanes that may be chosen; None = all.
        fallback: [B] int32: positions to write where fewer than min_unmask pass; None = min_unmask.
        max_unmask: [B] int32: positions to choose at most, the best ones; None = no limit.
        run_value: [B] fp32: for rule.runs.
        edit_value: [B] fp32: for rule.edit.
        refill: [B, W] int64: the new token of a position that is not chosen, for rule.renoise.
        remask_score: [B, W] fp32: the order in which positions are masked again, for rule.remask.
        remask_count: [B] int32: positions to mask again, for rule.remask "lowest" and "wino".
        remask_value: [B] fp32: the limit of remask_score, for rule.remask "wino".
        exits: [B] bool: rows that write every mask now (early exit), not for pipelines; None = no row does.
        max_steps: [B] int32: denoise steps that the row may take; None = no limit.
        append_masks: [B] int32, for pipelines: a block is appended once the last one holds at most so many masks.
        activate_masks: [B] int32, for pipelines: a block is fully activated once the block before holds at most so many
            masks.
        delay: [B] int32: for rule.cache "delayed".
        first_token: [B] int64: the token of the first position after a prefill or commit, for rule.first_token.
        first_token_confidence: [B] fp32: what is recorded for that token, for rule.first_token.
    """

    query_len: Tensor
    pred: Tensor
    score: Tensor
    confidence: Tensor
    value: Tensor
    min_unmask: Tensor
    steps: Tensor
    block_length: Tensor
    mask_id: int
    stop_ids: Tensor
    lane_start: Tensor | None = None
    rank: Tensor | None = None
    entropy: Tensor | None = None
    stat_error: Tensor | None = None
    allowed: Tensor | None = None
    fallback: Tensor | None = None
    max_unmask: Tensor | None = None
    run_value: Tensor | None = None
    edit_value: Tensor | None = None
    refill: Tensor | None = None
    remask_score: Tensor | None = None
    remask_count: Tensor | None = None
    remask_value: Tensor | None = None
    exits: Tensor | None = None
    max_steps: Tensor | None = None
    append_masks: Tensor | None = None
    activate_masks: Tensor | None = None
    delay: Tensor | None = None
    first_token: Tensor | None = None
    first_token_confidence: Tensor | None = None
