"""`unmask` in one launch: one program per row of the batch selects, writes and moves the row on. Specification: reference.unmask.

Positions are ordered by a bitonic sort of 64-bit keys (order-preserving bits of the rank, then the lane), which are all different: the
order is total, so nothing here depends on the tile width, the batch or the number of warps. All sums are integer sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import state as row_state
from .reference.unmask import FIXED_BUDGET_MAX, FIXED_ENTROPY_MAX, Kind, check_arguments
from .rules import ENTROPY_SCALE, PASSES, UnmaskRule
from .state import RowState
from .static import CompileCase

# (BLOCK_W, num_warps): the narrowest tile that holds the lanes is used. One warp needs no barrier; wide tiles are bound by the sort,
# whose 64-bit keys and partners must stay in registers.
TILES: tuple[tuple[int, int], ...] = ((32, 1), (128, 4), (256, 4), (1024, 4), (2048, 16))
# The widest tile that every rule compiles to without a spill on all six targets ("factor" spills at 4096 on sm_80).
MAX_W = TILES[-1][0]
# Canvas positions read at once in the search for the next mask; it ends at the first tile that holds one.
BLOCK_L = 256

_WIDE, _DENOISE = tl.constexpr(row_state.WIDE), tl.constexpr(row_state.DENOISE)
_COMMIT, _DONE = tl.constexpr(row_state.COMMIT), tl.constexpr(row_state.DONE)
_ERROR_LOGITS = tl.constexpr(row_state.ERROR_LOGITS)
_ENTROPY_SCALE = tl.constexpr(float(ENTROPY_SCALE))
_FIXED_ENTROPY_MAX, _FIXED_BUDGET_MAX = tl.constexpr(float(FIXED_ENTROPY_MAX)), tl.constexpr(float(FIXED_BUDGET_MAX))
# Below the bits of every number, -inf included.
_INELIGIBLE = tl.constexpr(-(2**31))
_KEY_MIN, _KEY_MAX = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)


@triton.jit
def _ordered_bits(x):
    """int32 that compares as the fp32 does, with NaN = -inf and -0.0 = 0.0."""
    bits = tl.where(x != x, float("-inf"), x).to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _to_fixed(x, low: tl.constexpr, limit: tl.constexpr, nan: tl.constexpr):
    """floor(x * 2^24) as int64, saturating at +-limit."""
    scaled = tl.floor(tl.where(x != x, nan / _ENTROPY_SCALE, x) * _ENTROPY_SCALE)
    return tl.where(scaled > limit, limit, tl.where(scaled < low, low, scaled)).to(tl.int64)


@triton.jit
def _compare_and_swap(keys, DISTANCE: tl.constexpr, RUN: tl.constexpr, BLOCK_W: tl.constexpr):
    """Order every pair (i, i + DISTANCE): larger first, except in every second run of RUN keys."""
    pairs: tl.constexpr = [BLOCK_W // (2 * DISTANCE), 2, DISTANCE]
    here = tl.reshape(keys, pairs)
    # The partner is what the pair sums to without the key itself, exact in wrapping integers (built-in sums are quick to interpret).
    partner = tl.sum(here, axis=1)[:, None, :] - here
    index = tl.reshape(tl.arange(0, BLOCK_W), pairs)
    wants_smaller = ((index & DISTANCE) != 0) != ((index & RUN) != 0)
    return tl.reshape(tl.where((here > partner) == wants_smaller, partner, here), [BLOCK_W])


@triton.jit
def _sort_descending(keys, LOG_W: tl.constexpr, BLOCK_W: tl.constexpr):
    for stage in tl.static_range(1, LOG_W + 1):
        for step in tl.static_range(stage):
            keys = _compare_and_swap(keys, 1 << (stage - 1 - step), 1 << stage, BLOCK_W)
    return keys


@triton.jit
def _first_masked(tokens_ptr, begin, end, mask_id, BLOCK_L: tl.constexpr):
    """First masked position in [begin, end), or `end`."""
    first, tile = end, begin
    while (tile < end) & (first == end):
        position = tile + tl.arange(0, BLOCK_L)
        token = tl.load(tokens_ptr + position, mask=position < end, other=0)
        first = tl.min(tl.where((position < end) & (token == mask_id), position, end))
        tile += BLOCK_L
    return first


@triton.jit
def _count_masked(tokens_ptr, begin, end, mask_id, BLOCK_L: tl.constexpr):
    count = 0
    for tile in range(begin, end, BLOCK_L):
        position = tile + tl.arange(0, BLOCK_L)
        token = tl.load(tokens_ptr + position, mask=position < end, other=0)
        count += tl.sum(((position < end) & (token == mask_id)).to(tl.int32))
    return count


@triton.jit
def _keys(eligible, rank_ptr, BLOCK_W: tl.constexpr):
    """One int64 a lane, all different: greater = better, eligible lanes above the rest."""
    lane = tl.arange(0, BLOCK_W)
    rank = tl.load(rank_ptr + lane, mask=eligible, other=0.0)
    bits = tl.where(eligible, _ordered_bits(rank), _INELIGIBLE)
    return (bits.to(tl.int64) << 32) | (BLOCK_W - 1 - lane)


@triton.jit
def _flat_test(eligible, value, score_ptr, PASSES: tl.constexpr, INCLUSIVE: tl.constexpr, BLOCK_W: tl.constexpr):
    """Lanes that pass a test which needs no order."""
    passes = eligible & False
    if PASSES == "threshold":
        score = tl.load(score_ptr + tl.arange(0, BLOCK_W), mask=eligible, other=float("-inf"))
        score = tl.where(score != score, float("-inf"), score)
        passes = eligible & ((score >= value) if INCLUSIVE else (score > value))
    return passes


@triton.jit
def _cut(
    eligible, n, kmin, value, score_ptr, rank_ptr, entropy_ptr,
    PASSES: tl.constexpr, INCLUSIVE: tl.constexpr, LOG_W: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The key of the last lane chosen in rank order: the kmin-th or, for a prefix test, the last that passes if that is later."""
    rank_index = tl.arange(0, BLOCK_W)
    best = _sort_descending(_keys(eligible, rank_ptr, BLOCK_W), LOG_W, BLOCK_W)
    cut = tl.min(tl.where(rank_index < kmin, best, _KEY_MAX))
    if (PASSES == "factor") | (PASSES == "entropy"):
        source = BLOCK_W - 1 - (best & 0xFFFFFFFF).to(tl.int32)
        if PASSES == "factor":
            score = tl.load(score_ptr + source, mask=rank_index < n, other=float("-inf"))
            score = tl.where(score != score, float("-inf"), score)
            passes = score >= 1.0 - tl.div_rn(value, (rank_index + 2).to(tl.float32))
            # The prefix is what lies above the best key that fails.
            cut = tl.minimum(cut, tl.max(tl.where(passes & (rank_index < n), _KEY_MIN, best)) + 1)
        else:
            entropy = tl.load(entropy_ptr + source, mask=rank_index < n, other=0.0)
            used = _to_fixed(entropy, 0.0, _FIXED_ENTROPY_MAX, _FIXED_ENTROPY_MAX)
            budget = _to_fixed(value, -_FIXED_BUDGET_MAX, _FIXED_BUDGET_MAX, -_FIXED_BUDGET_MAX)
            # Prefix sums never fall, so the prefix is found by halving: a scan of int64 would not fit the registers of wide tiles.
            count = n * 0
            for halving in tl.static_range(LOG_W + 1):
                longer = count + (BLOCK_W >> halving)
                total = tl.sum(tl.where(rank_index < (longer if INCLUSIVE else longer - 1), used, 0))
                fits = (total < budget) if INCLUSIVE else (total <= budget)
                count = tl.where((longer <= n) & fits, longer, count)
            cut = tl.minimum(cut, tl.min(tl.where(rank_index < count, best, _KEY_MAX)))
    return cut


# No integer is specialised: neither another width, nor another number of stop ids, nor another model compiles the kernel again.
@triton.jit(
    do_not_specialize=(
        "tokens_stride", "unmask_step_stride", "unmask_confidence_stride",
        "pred_stride", "score_stride", "rank_stride", "confidence_stride", "entropy_stride", "stat_error_stride",
        "W", "K", "mask_id",
    )
)  # fmt: skip
def _unmask_kernel(
    # state, read and written
    tokens_ptr, unmask_step_ptr, unmask_confidence_ptr,
    canvas_len_ptr, block_start_ptr, block_end_ptr, block_masks_ptr, block_step_ptr, step_ptr,
    phase_ptr, nfe_ptr, query_tokens_ptr, error_ptr,
    # inputs
    query_len_ptr, value_ptr, min_unmask_ptr, steps_ptr, block_length_ptr, stop_ids_ptr,
    pred_ptr, score_ptr, rank_ptr, confidence_ptr, entropy_ptr, stat_error_ptr,
    # row strides
    tokens_stride, unmask_step_stride, unmask_confidence_stride,
    pred_stride, score_stride, rank_stride, confidence_stride, entropy_stride, stat_error_stride,
    # sizes and scalars
    W, K, mask_id,
    # flags
    KIND: tl.constexpr, PASSES: tl.constexpr, INCLUSIVE: tl.constexpr, QUOTA: tl.constexpr, CACHE: tl.constexpr, STOP: tl.constexpr,
    HAS_STAT_ERROR: tl.constexpr,
    # tiles
    LOG_W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tokens_ptr += row * tokens_stride
    query_len = tl.load(query_len_ptr + row)
    phase = tl.load(phase_ptr + row)
    canvas_len = tl.load(canvas_len_ptr + row)
    block_start = tl.load(block_start_ptr + row)
    block_end = tl.load(block_end_ptr + row)
    block_masks = tl.load(block_masks_ptr + row)
    block_step = tl.load(block_step_ptr + row)
    block_length = tl.maximum(tl.load(block_length_ptr + row), 1)
    step = tl.load(step_ptr + row)
    # One thread writes these fields for all: not before every warp has read them.
    tl.debug_barrier()

    # Who takes part, and as what.
    prefills = (phase == _WIDE) & (KIND == "wide" and CACHE == "commit")
    commits = (phase == _COMMIT) & (KIND == "window" and CACHE == "commit")
    selects = (phase == _DENOISE) & (KIND == "window") | (phase == _WIDE) & (KIND == "wide" and CACHE == "refresh")
    selects = selects & (block_end - block_start <= W)

    if (query_len > 0) & (prefills | commits | selects):
        tl.store(nfe_ptr + row, tl.load(nfe_ptr + row) + 1)
        tl.store(query_tokens_ptr + row, tl.load(query_tokens_ptr + row) + query_len)
        next_phase = _DENOISE
        advances = commits
        start = block_end

        if prefills:
            if block_masks == 0:
                next_phase = _COMMIT

        if commits & (block_end >= canvas_len):
            next_phase = _DONE
            advances = commits & False

        if selects:
            lane = tl.arange(0, BLOCK_W)
            in_block = lane < block_end - block_start
            block_ptr = tokens_ptr + block_start
            score_row = score_ptr + row * score_stride
            rank_row = rank_ptr + row * rank_stride
            token = tl.load(block_ptr + lane, mask=in_block, other=0)
            eligible = in_block & (token == mask_id)
            n = tl.sum(eligible.to(tl.int32))

            # An unusable statistic ends the row before anything is written.
            failed = False
            if HAS_STAT_ERROR:
                stat_error = tl.load(stat_error_ptr + row * stat_error_stride + lane, mask=eligible, other=0)
                failed = tl.max((stat_error != 0).to(tl.int32)) != 0
            if failed:
                tl.store(error_ptr + row, tl.load(error_ptr + row) | _ERROR_LOGITS)
                next_phase = _DONE
            else:
                if QUOTA:
                    S = tl.maximum(tl.load(steps_ptr + row), 1)
                    kmin = tl.maximum(block_masks // S + (block_step < block_masks % S).to(tl.int32), 1)
                else:
                    kmin = tl.load(min_unmask_ptr + row)
                kmin = tl.minimum(kmin, n)
                value = tl.load(value_ptr + row)
                # A flat test that enough positions pass needs no order: then the cut is above every key.
                enough = tl.sum(_flat_test(eligible, value, score_row, PASSES, INCLUSIVE, BLOCK_W).to(tl.int32)) >= kmin
                cut = n.to(tl.int64) * 0 + _KEY_MAX
                if (PASSES == "factor") | (PASSES == "entropy") | (enough == 0):
                    cut = _cut(
                        eligible, n, kmin, value, score_row, rank_row, entropy_ptr + row * entropy_stride,
                        PASSES, INCLUSIVE, LOG_W, BLOCK_W,
                    )  # fmt: skip
                # Read again rather than kept through the sort, which needs the registers; volatile, or the two reads would be one.
                token = tl.load(block_ptr + lane, mask=in_block, other=0, volatile=True)
                eligible = in_block & (token == mask_id)
                passes = _flat_test(eligible, value, score_row, PASSES, INCLUSIVE, BLOCK_W) & enough
                chosen = passes | (eligible & (_keys(eligible, rank_row, BLOCK_W) >= cut))

                # Write, once every warp has read its part of the block.
                pred = tl.load(pred_ptr + row * pred_stride + lane, mask=chosen, other=0)
                confidence = tl.load(confidence_ptr + row * confidence_stride + lane, mask=chosen, other=0.0)
                written_ptr = unmask_step_ptr + row * unmask_step_stride + block_start
                unmask_step = tl.load(written_ptr + lane, mask=in_block, other=-1)
                tl.debug_barrier()
                tl.store(block_ptr + lane, pred, mask=chosen)
                tl.store(written_ptr + lane, step, mask=chosen)
                tl.store(unmask_confidence_ptr + row * unmask_confidence_stride + block_start + lane, confidence, mask=chosen)
                tl.store(step_ptr + row, step + 1)
                block_step += 1

                # Is the block finished, and did a token that we wrote stop the row? Told from registers: the stores above are
                # other threads' as well, and nothing orders a load after them.
                token = tl.where(chosen, pred, token)
                mask_lane = tl.min(tl.where(in_block & (token == mask_id), lane, BLOCK_W))
                finished = mask_lane == BLOCK_W
                stopped = False
                if STOP != "never":
                    is_stop = in_block & False
                    for i in range(K):
                        is_stop = is_stop | (token == tl.load(stop_ids_ptr + i))
                    written = in_block & (chosen | (unmask_step >= 0))
                    stop_lane = tl.min(tl.where(is_stop & written, lane, BLOCK_W))
                    stopped = stop_lane < mask_lane
                    if STOP == "after_block":
                        stopped = stopped & finished

                # What the row needs next. The rest of the canvas lies behind the block, where nothing was written.
                if stopped:
                    next_phase = _DONE
                elif finished:
                    next_mask = _first_masked(tokens_ptr, block_end, canvas_len, mask_id, BLOCK_L)
                    if next_mask >= canvas_len:
                        next_phase = _DONE
                    elif CACHE == "commit":
                        next_phase = _COMMIT
                    else:
                        start = block_end + (next_mask - block_end) // block_length * block_length
                        advances = finished
                        if CACHE == "refresh":
                            next_phase = _WIDE

        if advances:
            end = tl.minimum(start + block_length, canvas_len)
            masks = _count_masked(tokens_ptr, start, end, mask_id, BLOCK_L)
            if (CACHE == "commit") & (masks == 0):
                next_phase = _COMMIT
            tl.store(block_start_ptr + row, start)
            tl.store(block_end_ptr + row, end)
            tl.store(block_masks_ptr + row, masks)
            block_step = block_step * 0
        tl.store(block_step_ptr + row, block_step)
        tl.store(phase_ptr + row, next_phase)


def unmask(
    state: RowState,
    rule: UnmaskRule,
    *,
    kind: Kind,
    query_len: Tensor,
    pred: Tensor,
    score: Tensor,
    confidence: Tensor,
    value: Tensor,
    min_unmask: Tensor,
    steps: Tensor,
    block_length: Tensor,
    mask_id: int,
    stop_ids: Tensor,
    rank: Tensor | None = None,
    entropy: Tensor | None = None,
    stat_error: Tensor | None = None,
) -> None:
    """Write the chosen predictions of every row's current block and move every row to what it needs next, in place, in one launch.

    Equal to reference.unmask on every field of `state`, bit for bit; arguments, rules and errors are described there. W may be at
    most MAX_W. Nothing depends on the tile width or on the other rows. Traffic: 28 B a lane of the block at most, plus 8 B a
    canvas position from the block to the next mask when the block is finished.

    Raises:
        As reference.unmask, and ValueError: W > MAX_W.  RuntimeError: CPU tensors without Triton's interpreter.
    """
    check_arguments(
        state, rule, kind, mask_id, stop_ids,
        rows=dict(query_len=query_len, value=value, min_unmask=min_unmask, steps=steps, block_length=block_length),
        lanes=dict(pred=pred, score=score, confidence=confidence, rank=rank, entropy=entropy, stat_error=stat_error),
    )  # fmt: skip
    B, W = score.shape
    if W > MAX_W:
        raise ValueError(f"unmask: score [B, W] must have W <= {MAX_W}, got W={W}")
    if B == 0:
        return
    if not score.is_cuda and isinstance(_unmask_kernel, triton.JITFunction):
        raise RuntimeError(
            f"unmask: the Triton kernel needs CUDA tensors, or TRITON_INTERPRET=1 set before triton is imported, got {score.device} "
            "tensors; dlm_kernels.reference.unmask runs anywhere"
        )
    BLOCK_W, num_warps = next(tile for tile in TILES if W <= tile[0])
    # rank=None orders by score; other absent tensors are never read, and something of their type stands in for the pointer.
    has_stat_error = stat_error is not None
    rank, entropy = (score if tensor is None else tensor for tensor in (rank, entropy))
    stat_error = query_len if stat_error is None else stat_error
    _unmask_kernel[(B,)](
        **{f"{name}_ptr": field for name, field in vars(state).items()},
        query_len_ptr=query_len, value_ptr=value, min_unmask_ptr=min_unmask, steps_ptr=steps, block_length_ptr=block_length,
        stop_ids_ptr=stop_ids, pred_ptr=pred, score_ptr=score, rank_ptr=rank, confidence_ptr=confidence,
        entropy_ptr=entropy, stat_error_ptr=stat_error,
        tokens_stride=state.tokens.stride(0), unmask_step_stride=state.unmask_step.stride(0),
        unmask_confidence_stride=state.unmask_confidence.stride(0), pred_stride=pred.stride(0), score_stride=score.stride(0),
        rank_stride=rank.stride(0), confidence_stride=confidence.stride(0), entropy_stride=entropy.stride(0),
        stat_error_stride=stat_error.stride(0),
        W=W, K=stop_ids.shape[0], mask_id=mask_id,
        **_flags(rule, kind, has_stat_error), LOG_W=BLOCK_W.bit_length() - 1, BLOCK_W=BLOCK_W, BLOCK_L=BLOCK_L, num_warps=num_warps,
    )  # fmt: skip


def _flags(rule: UnmaskRule, kind: Kind, has_stat_error: bool) -> dict[str, object]:
    return dict(
        KIND=kind, PASSES=rule.passes, INCLUSIVE=rule.inclusive, QUOTA=rule.quota, CACHE=rule.cache, STOP=rule.stop,
        HAS_STAT_ERROR=has_stat_error,
    )  # fmt: skip


def compile_cases(capability: int) -> list[CompileCase]:
    """Every tile with every pass test, the inclusive ones at the narrowest and widest; the other kinds of step, and a call without
    stat_error, at the narrowest. Equal for all targets: the tiles do not depend on the GPU."""
    rules = [(f"{passes}{'-inclusive' if inclusive else ''}", "window", UnmaskRule(passes, inclusive, cache="refresh"))
             for passes in PASSES for inclusive in (False, True) if not (inclusive and passes in ("none", "factor"))]  # fmt: skip
    others = [
        ("quota", "window", UnmaskRule("threshold", quota=True, cache="commit", stop="after_block")),
        ("prefill", "wide", UnmaskRule("threshold", cache="commit")),
        ("refresh-trusted", "wide", UnmaskRule("threshold", cache="refresh", stop="never")),
    ]
    int64_ptrs = ("tokens_ptr", "pred_ptr", "stop_ids_ptr")
    fp32_ptrs = ("unmask_confidence_ptr", "value_ptr", "score_ptr", "rank_ptr", "confidence_ptr", "entropy_ptr")
    cases = []
    for BLOCK_W, num_warps in TILES:
        for name, kind, rule in rules + others * (BLOCK_W == TILES[0][0]):
            if rule.inclusive and BLOCK_W not in (TILES[0][0], MAX_W):
                continue
            constexprs = _flags(rule, kind, has_stat_error=name != "refresh-trusted")
            constexprs |= dict(LOG_W=BLOCK_W.bit_length() - 1, BLOCK_W=BLOCK_W, BLOCK_L=BLOCK_L)
            signature: dict[str, object] = {}
            for arg in _unmask_kernel.arg_names:
                pointer = "*i64" if arg in int64_ptrs else "*fp32" if arg in fp32_ptrs else "*i32"
                signature[arg] = "constexpr" if arg in constexprs else pointer if arg.endswith("_ptr") else "i32"
            cases.append(
                CompileCase(
                    kernel="unmask",
                    config=f"{name} BLOCK_W={BLOCK_W} num_warps={num_warps}",
                    fn=_unmask_kernel,
                    signature=signature,
                    constexprs=constexprs,
                    divisible_by_16=tuple(arg for arg in signature if arg.endswith("_ptr")),
                    num_warps=num_warps,
                    num_stages=1,
                )
            )
    return cases
