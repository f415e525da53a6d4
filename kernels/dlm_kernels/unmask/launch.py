"""`unmask` in one launch: one program per row selects, writes and moves the row on. Specification: reference.unmask.

A region of up to 256 lanes stays in registers (kernel.py); a longer one is read tile by tile (memory.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import device
from ..checks.unmask import OPTIONAL_LANES, OPTIONAL_ROWS, Kind, check_arguments, wanted_arguments
from ..library import operator
from ..rules import PASSES, UnmaskRule
from ..state import RowState
from ..static import CompileCase
from ..tiles import UNMASK_TILES, UnmaskTile, unmask_tile
from .kernel import unmask_kernel
from .memory import unmask_memory_kernel

MAX_W = UNMASK_TILES[-1].BLOCK_W
# 32-bit registers of a multiprocessor. A program is given as many as its threads can have: without a bound ptxas
# prefers spills to fewer programs at once, and there are only as many programs as rows.
REGISTERS = 65536
# Canvas positions read at once in the search for the next mask; it ends at the first tile that holds one.
BLOCK_L = 256

# Inputs with rows to stride over.
STRIDED = ("pred", "score", "confidence", "value", "rank", "entropy", "stat_error", "allowed", "refill", "remask_score")


def _changed(*, score: Tensor, **_: object) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.bool)


@operator(mutates=("state",), fake=_changed)
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
    lane_start: Tensor | None = None,
    rank: Tensor | None = None,
    entropy: Tensor | None = None,
    stat_error: Tensor | None = None,
    allowed: Tensor | None = None,
    fallback: Tensor | None = None,
    max_unmask: Tensor | None = None,
    run_value: Tensor | None = None,
    edit_value: Tensor | None = None,
    refill: Tensor | None = None,
    remask_score: Tensor | None = None,
    remask_count: Tensor | None = None,
    remask_value: Tensor | None = None,
    exits: Tensor | None = None,
    max_steps: Tensor | None = None,
    append_masks: Tensor | None = None,
    activate_masks: Tensor | None = None,
    delay: Tensor | None = None,
    seed: Tensor | None = None,
    seed_confidence: Tensor | None = None,
) -> Tensor:
    """Write the chosen predictions of every row's region and move every row to what it needs next, in place, in one
    launch.

    Equal to reference.unmask on every field of `state` and in what it returns, bit for bit; arguments, rules and errors
    are described there. W may be at most MAX_W. Nothing depends on the tile width or on the other rows. Traffic: 29 B a
    lane of the region at most (40 B with an optional lane tensor or two; above 256 lanes they are read three to five
    times, from L2 but for the first), plus 8 B a canvas position from the block to the next mask when the block is
    finished; rule.stop "fill" reads 12 B of every canvas position.

    Raises:
        As reference.unmask, and ValueError: W > MAX_W.  RuntimeError: CPU tensors without Triton's interpreter.
        NotImplementedError: a GPU that `tiles.TARGETS` does not name.
    """
    rows = dict(
        query_len=query_len, value=value, min_unmask=min_unmask, steps=steps, block_length=block_length, lane_start=lane_start,
        fallback=fallback, max_unmask=max_unmask, run_value=run_value, edit_value=edit_value, remask_count=remask_count,
        remask_value=remask_value, exits=exits, max_steps=max_steps, append_masks=append_masks, activate_masks=activate_masks,
        delay=delay, seed=seed, seed_confidence=seed_confidence,
    )  # fmt: skip
    lanes = dict(
        pred=pred, score=score, confidence=confidence, rank=rank, entropy=entropy, stat_error=stat_error, allowed=allowed,
        refill=refill, remask_score=remask_score,
    )  # fmt: skip
    check_arguments(state, rule, kind, mask_id, stop_ids, rows=rows, lanes=lanes)
    B, W = score.shape
    if W > MAX_W:
        raise ValueError(f"unmask: score [B, W] must have W <= {MAX_W}, got W={W}")
    changed = torch.empty(B, W, dtype=torch.bool, device=score.device)
    if B == 0:
        return changed
    device.capability_of("unmask", score, unmask_kernel)
    tile = unmask_tile(W)
    given = rows | lanes
    arguments = dict(
        **{f"{name}_ptr": field for name, field in vars(state).items()},
        **{f"{name}_ptr": tensor for name, tensor in given.items()},
        changed_ptr=changed, stop_ids_ptr=stop_ids,
        tokens_stride=state.tokens.stride(0), unmask_step_stride=state.unmask_step.stride(0),
        unmask_confidence_stride=state.unmask_confidence.stride(0),
        **{f"{name}_stride": 0 if given[name] is None else given[name].stride(0) for name in STRIDED},
        W=W, K=stop_ids.shape[0], mask_id=mask_id,
        **_flags(rule, kind, value.dim() == 2), **_tiles(tile),
        num_warps=tile.num_warps, num_stages=1, maxnreg=_max_registers(tile.num_warps),
    )  # fmt: skip
    with device.launching_on(score):
        if tile.BLOCK_T is None:
            unmask_kernel[(B,)](**arguments)
        else:
            keys = (
                torch.empty(B, tile.BLOCK_W, dtype=torch.int64, device=score.device)
                if rule.passes == "factor"
                else None
            )
            unmask_memory_kernel[(B,)](**arguments, keys_ptr=keys)
    return changed


def _tiles(tile: UnmaskTile) -> dict[str, int]:
    tiles = dict(LOG_W=tile.BLOCK_W.bit_length() - 1, BLOCK_W=tile.BLOCK_W, BLOCK_L=BLOCK_L)
    if tile.BLOCK_T is not None:
        tiles |= dict(LOG_T=tile.BLOCK_T.bit_length() - 1, BLOCK_T=tile.BLOCK_T, BLOCK_L=tile.BLOCK_T)
    return tiles


def _max_registers(num_warps: int) -> int:
    return min(255, REGISTERS // (32 * num_warps))


def _flags(rule: UnmaskRule, kind: Kind, value_per_lane: bool) -> dict[str, object]:
    return dict(
        KIND=kind, PASSES=rule.passes, INCLUSIVE=rule.inclusive, QUOTA=rule.quota, SCOPE=rule.scope, RUNS=rule.runs,
        EDIT=rule.edit, RENOISE=rule.renoise, REMASK=rule.remask, CACHE=rule.cache, SEED=rule.seed, STOP=rule.stop,
        VALUE_PER_LANE=value_per_lane,
    )  # fmt: skip


# Optional arguments that a decoder passes at every step.
USUAL = {"lane_start", "rank", "stat_error", "max_steps"}
# Rules beyond the pass tests, each with optional arguments that it does not need but may have.
VARIANTS: tuple[tuple[str, Kind, UnmaskRule, tuple[str, ...]], ...] = (
    (
        "pipeline-each",
        "denoise",
        UnmaskRule("threshold", pipeline=True, scope="each", cache="fused", stop="appends"),
        (),
    ),
    (
        "pipeline-first",
        "denoise",
        UnmaskRule("entropy", pipeline=True, scope="first", cache="delayed", stop="fill"),
        (),
    ),
    (
        "pipeline-first-refresh",
        "refresh",
        UnmaskRule("threshold", pipeline=True, scope="first", cache="delayed", stop="fill"),
        (),
    ),
    ("edit", "denoise", UnmaskRule("threshold", edit=True, cache="commit", stop="after_block"), ("exits",)),
    ("entropy-capped", "denoise", UnmaskRule("entropy", cache="refresh"), ("max_unmask",)),
    ("runs", "denoise", UnmaskRule("threshold", runs=True, cache="refresh"), ("max_unmask",)),
    ("lowest", "denoise", UnmaskRule("none", remask="lowest"), ()),
    ("saber", "denoise", UnmaskRule("threshold", remask="saber"), ()),
    ("wino", "denoise", UnmaskRule("threshold", remask="wino", cache="once"), ("max_unmask", "fallback")),
    ("renoise", "denoise", UnmaskRule("entropy", renoise=True, cache="commit", stop="after_block"), ("exits",)),
    ("exits", "denoise", UnmaskRule("none", quota=True), ("exits",)),
    (
        "per-lane",
        "denoise",
        UnmaskRule("threshold", cache="refresh", stop="all_stop"),
        ("value", "max_unmask", "fallback", "allowed"),
    ),
    ("seed", "denoise", UnmaskRule("threshold", cache="commit", seed=True, stop="after_block"), ()),
    ("seed-prefill", "refresh", UnmaskRule("threshold", cache="commit", seed=True), ()),
)


def compile_cases(capability: int) -> list[CompileCase]:
    """Every tile with every pass test, the inclusive ones at the narrowest, and at the widest in registers and in
    memory, as the variants; the other kinds of step, and a call with no optional argument, at the narrowest. Equal for
    all targets."""
    rules = [(f"{passes}{'-inclusive' if inclusive else ''}", "denoise", UnmaskRule(passes, inclusive=inclusive, cache="refresh"))
             for passes in PASSES for inclusive in (False, True) if not (inclusive and passes in ("none", "factor"))]  # fmt: skip
    others = [
        ("quota", "denoise", UnmaskRule("threshold", quota=True, cache="commit", stop="after_block")),
        ("prefill", "refresh", UnmaskRule("threshold", cache="commit")),
        ("refresh-trusted", "refresh", UnmaskRule("threshold", cache="refresh", stop="never")),
    ]
    narrowest, widest = UNMASK_TILES[0], UNMASK_TILES[-2:]
    cases: list[CompileCase] = []
    for tile in UNMASK_TILES:
        for name, kind, rule in rules + others * (tile == narrowest):
            if not rule.inclusive or tile in (narrowest, *widest):
                cases.append(_case(name, kind, rule, set() if name == "refresh-trusted" else USUAL, tile))
    return cases + [
        _case(name, kind, rule, USUAL | {*more}, tile) for name, kind, rule, more in VARIANTS for tile in widest
    ]


def _case(name: str, kind: Kind, rule: UnmaskRule, given: set[str], tile: UnmaskTile) -> CompileCase:
    kernel = unmask_kernel if tile.BLOCK_T is None else unmask_memory_kernel
    given = given | {name for name, wanted in wanted_arguments(rule).items() if wanted}
    given |= {"entropy"} if rule.passes == "entropy" else {"keys"} if rule.passes == "factor" else set()
    constexprs = _flags(rule, kind, "value" in given) | _tiles(tile)
    optional = (*OPTIONAL_LANES, *OPTIONAL_ROWS, *(("keys",) if tile.BLOCK_T else ()))
    constexprs |= {f"{name}_ptr": None for name in optional if name not in given}
    types = {torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32", torch.bool: "*u1"}
    dtypes = dict.fromkeys(("tokens", "pred", "stop_ids", "keys"), torch.int64)
    dtypes |= OPTIONAL_LANES | OPTIONAL_ROWS | {"changed": torch.bool}
    dtypes |= dict.fromkeys(("unmask_confidence", "score", "confidence", "value"), torch.float32)
    signature: dict[str, object] = {}
    for arg in kernel.arg_names:
        pointer = types[dtypes.get(arg.removesuffix("_ptr"), torch.int32)]
        signature[arg] = "constexpr" if arg in constexprs else pointer if arg.endswith("_ptr") else "i32"
    return CompileCase(
        kernel="unmask",
        config=f"{name} BLOCK_W={tile.BLOCK_W} num_warps={tile.num_warps}",
        fn=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible_by_16=tuple(arg for arg, kind in signature.items() if arg.endswith("_ptr") and kind != "constexpr"),
        num_warps=tile.num_warps,
        num_stages=1,
        maxnreg=_max_registers(tile.num_warps),
    )
