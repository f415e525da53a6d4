"""The configurations of `unmask` that must compile: rules, kinds of step, optional inputs, at the tiles they meet."""

from __future__ import annotations

import dataclasses

import torch

from ..checks.unmask import LANES, OPTIONAL, ROWS, wanted_inputs
from ..rules import PASSES, Kind, UnmaskRule
from ..static import CompileCase
from ..tiles import UNMASK_TILES, UnmaskTile
from .kernel import unmask_kernel
from .launch import flags_of, max_registers, tiles_of
from .memory import unmask_memory_kernel

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
    constexprs = flags_of(rule, kind, "value" in given) | tiles_of(tile)
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
        divisible_by_16=("keys_ptr",) if "keys" in given and tile.BLOCK_T else (),
        num_warps=tile.num_warps,
        num_stages=1,
        maxnreg=max_registers(tile.num_warps),
    )
