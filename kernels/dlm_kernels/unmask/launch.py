"""`unmask` in one launch: one program per row selects, writes and moves the row on. Specification: reference.unmask.

A region of up to 256 lanes stays in registers (kernel.py); a longer one is read tile by tile (memory.py).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import device
from ..checks.unmask import LANES, OPTIONAL, ROWS, Kind, check_arguments, wanted_inputs
from ..library import operator
from ..rules import PASSES, UnmaskInputs, UnmaskRule
from ..state import RowState
from ..static import CompileCase
from ..tiles import UNMASK_TILES, UnmaskTile, unmask_tile
from .kernel import unmask_kernel
from .memory import unmask_memory_kernel

MAX_W = UNMASK_TILES[-1].BLOCK_W
# 32-bit registers of a multiprocessor. A program is given as many as its threads can have: without a bound, ptxas
# prefers spills to fewer programs at once, but there are only as many programs as rows.
REGISTERS = 65536
# Canvas positions read at once in the search for the next mask; the search ends at the first tile that holds a mask.
BLOCK_L = 256

# Tensors whose rows may have any stride.
STRIDED = ("tokens", "unmask_step", "unmask_confidence", *LANES, "value")


def _changed(*, inputs: UnmaskInputs, **_: object) -> Tensor:
    return inputs.score.new_empty(inputs.score.shape, dtype=torch.bool)


@operator(mutates=("state",), fake=_changed)
def unmask(state: RowState, rule: UnmaskRule, inputs: UnmaskInputs, *, kind: Kind) -> Tensor:
    """Write the chosen predictions of every row's region and move every row to what it needs next, in place, in one
    launch.

    Equal to reference.unmask on every field of `state` and in what is returned, bit for bit; the reference describes
    the arguments, the rules and the errors. W may be at most MAX_W. Nothing depends on the tile width or on the other
    rows. Traffic: 29 B a lane of the region at most (40 B with an optional lane tensor or two; above 256 lanes they are
    read three to five times, from L2 but for the first), plus 8 B a canvas position from the block to the next mask
    when the block is finished; rule.stop "fill" reads 12 B of every canvas position.

    Raises:
        As reference.unmask, and ValueError: W > MAX_W.  RuntimeError: CPU tensors without Triton's interpreter.
        NotImplementedError: a GPU that `tiles.TARGETS` does not name.
    """
    check_arguments(state, rule, inputs, kind)
    score = inputs.score
    B, W = score.shape
    if W > MAX_W:
        raise ValueError(f"unmask: score [B, W] must have W <= {MAX_W}, got W={W}")
    changed = torch.empty(B, W, dtype=torch.bool, device=score.device)
    if B == 0:
        return changed
    device.capability_of("unmask", score, unmask_kernel)
    tile = unmask_tile(W)
    tensors = vars(state) | vars(inputs)
    mask_id = tensors.pop("mask_id")
    arguments = dict(
        **{f"{name}_ptr": tensor for name, tensor in tensors.items()},
        changed_ptr=changed,
        **{f"{name}_stride": 0 if tensors[name] is None else tensors[name].stride(0) for name in STRIDED},
        W=W,
        K=inputs.stop_ids.shape[0],
        mask_id=mask_id,
        **_flags(rule, kind, inputs.value.dim() == 2),
        **_tiles(tile),
        num_warps=tile.num_warps,
        num_stages=1,
        maxnreg=_max_registers(tile.num_warps),
    )
    with device.launching_on(score):
        if tile.BLOCK_T is None:
            unmask_kernel[(B,)](**arguments)
        else:
            keys = None
            if rule.passes == "factor":
                keys = torch.empty(B, tile.BLOCK_W, dtype=torch.int64, device=score.device)
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
        KIND=kind,
        PASSES=rule.passes,
        INCLUSIVE=rule.inclusive,
        QUOTA=rule.quota,
        SCOPE=rule.scope,
        RUNS=rule.runs,
        EDIT=rule.edit,
        RENOISE=rule.renoise,
        REMASK=rule.remask,
        CACHE=rule.cache,
        FIRST_TOKEN=rule.first_token,
        STOP=rule.stop,
        VALUE_PER_LANE=value_per_lane,
    )


# Optional inputs that a decoder passes at every step.
USUAL = {"lane_start", "rank", "stat_error", "max_steps"}
D2F = UnmaskRule("threshold", pipeline=True, scope="each", cache="fused", stop="appends")
D3LLM = UnmaskRule("threshold", pipeline=True, scope="first", cache="delayed", stop="fill")
FIRST_TOKEN = UnmaskRule("threshold", cache="commit", first_token=True)
# Rules beyond the pass tests, each with optional inputs that the rule does not need but may have.
VARIANTS: tuple[tuple[str, Kind, UnmaskRule, tuple[str, ...]], ...] = (
    ("pipeline-each", "denoise", D2F, ()),
    ("pipeline-first", "denoise", dataclasses.replace(D3LLM, passes="entropy"), ()),
    ("pipeline-first-refresh", "refresh", D3LLM, ()),
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
    ("first-token", "denoise", dataclasses.replace(FIRST_TOKEN, stop="after_block"), ()),
    ("first-token-prefill", "refresh", FIRST_TOKEN, ()),
)


def compile_cases(capability: int) -> list[CompileCase]:
    """The calls that are compiled for every target alike.

    Every tile meets every pass test. The inclusive tests are met at the narrowest tile and at the widest ones in
    registers and in memory, as the variants are; the other kinds of step, and a call with no optional input, are met at
    the narrowest tile.
    """
    rules: list[tuple[str, Kind, UnmaskRule]] = []
    for passes in PASSES:
        rules.append((passes, "denoise", UnmaskRule(passes, cache="refresh")))
        if passes in ("threshold", "entropy"):
            rules.append((f"{passes}-inclusive", "denoise", UnmaskRule(passes, inclusive=True, cache="refresh")))
    other_steps: list[tuple[str, Kind, UnmaskRule]] = [
        ("quota", "denoise", UnmaskRule("threshold", quota=True, cache="commit", stop="after_block")),
        ("prefill", "refresh", UnmaskRule("threshold", cache="commit")),
        ("refresh-trusted", "refresh", UnmaskRule("threshold", cache="refresh", stop="never")),
    ]
    narrowest, widest = UNMASK_TILES[0], UNMASK_TILES[-2:]
    cases: list[CompileCase] = []
    for tile in UNMASK_TILES:
        for name, kind, rule in rules + other_steps * (tile == narrowest):
            if not rule.inclusive or tile in (narrowest, *widest):
                cases.append(_case(name, kind, rule, set() if name == "refresh-trusted" else USUAL, tile))
    for name, kind, rule, optional in VARIANTS:
        cases += [_case(name, kind, rule, USUAL | {*optional}, tile) for tile in widest]
    return cases


def _case(name: str, kind: Kind, rule: UnmaskRule, given: set[str], tile: UnmaskTile) -> CompileCase:
    """The call with the rule's inputs and those `given`: optional inputs, and "value" where that is per lane."""
    kernel = unmask_kernel if tile.BLOCK_T is None else unmask_memory_kernel
    given = given | {input_name for input_name, wanted in wanted_inputs(rule).items() if wanted}
    given |= {"entropy"} if rule.passes == "entropy" else {"keys"} if rule.passes == "factor" else set()
    constexprs = _flags(rule, kind, "value" in given) | _tiles(tile)
    optional = (*OPTIONAL, *(("keys",) if tile.BLOCK_T else ()))
    constexprs |= {f"{input_name}_ptr": None for input_name in optional if input_name not in given}
    types = {torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32", torch.bool: "*u1"}
    dtypes = dict.fromkeys(("tokens", "stop_ids", "keys"), torch.int64) | LANES | ROWS
    dtypes |= {"unmask_confidence": torch.float32, "changed": torch.bool}
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
        divisible_by_16=tuple(arg for arg, word in signature.items() if arg.endswith("_ptr") and word != "constexpr"),
        num_warps=tile.num_warps,
        num_stages=1,
        maxnreg=_max_registers(tile.num_warps),
    )
