"""Are `unmask`, `draft_build`, `verify` and `uniform_scores` their references, bit for bit, under every rule and in
every phase? Does a row depend on the other rows?

There is no float64 form: the reference decides by comparisons and integer sums only, so it is exact. It runs on the
CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dlm_fast import Ops
from dlm_kernels import RowState, UnmaskInputs, UnmaskRule, reference
from dlm_kernels.reference import DraftSource
from dlm_kernels.rules import PASSES
from dlm_kernels.state import ROW_FIELDS
from dlm_kernels.testing import GuardedMemory, poisoned, same_bits
from dlm_kernels.testing.drafts_calls import random_drafts
from dlm_kernels.testing.unmask_calls import MASK, random_call

from .run import Case, Sizes, generator

# Lanes and rows of calls that are read from memory. The interpreter is too slow for so many lanes; its tests have their
# own.
MEMORY_WIDTHS, MEMORY_CANVASES = (1025, 4097, 8192), 16
# Drafts and lanes.
DRAFTS = ((1, 32), (4, 32), (8, 33), (3, 1100))
# Counters of random numbers.
NOISES = (1, 127, 129, 5000)
SELECTS = [
    {"passes": passes, "inclusive": inclusive, "quota": quota}
    for passes in PASSES
    for inclusive in ((False, True) if passes in ("threshold", "entropy") else (False,))
    for quota in (False, True)
]
AFTERS = [
    ({"cache": cache, "stop": stop}, kind)
    for cache in ("none", "commit", "refresh", "once")
    for stop in ("never", "after_block", "closed", "all_stop")
    for kind in ("denoise", "refresh")
    if (cache, kind) != ("none", "refresh")
]
# Rules that are more than a way to select and a way to go on.
VARIANTS = [
    *(
        (UnmaskRule(passes, pipeline=True, scope=scope, cache=cache, stop=stop, runs=stop == "never"), kind)
        for scope in ("each", "first")
        for passes in (("none", "threshold") if scope == "each" else PASSES)
        for cache, kind in (("none", "denoise"), ("fused", "denoise"), ("delayed", "denoise"), ("delayed", "refresh"))
        for stop in ("never", "after_block", "closed", "appends", "fill")
    ),
    *(
        (
            UnmaskRule(passes, remask=remask, quota=passes == "none", runs=passes == "threshold", cache="commit"),
            "denoise",
        )
        for passes in PASSES
        for remask in ("lowest", "saber", "wino")
    ),
    *(
        (UnmaskRule(passes, edit=True, cache=cache, stop=stop), "denoise")
        for passes in PASSES
        for cache, stop in (("commit", "after_block"), ("refresh", "all_stop"), ("none", "never"))
    ),
    *(
        (UnmaskRule(passes, renoise=True, cache=cache, stop="after_block"), "denoise")
        for passes in PASSES
        for cache in ("none", "commit")
    ),
    *(
        (UnmaskRule("threshold", runs=True, quota=quota, cache="once"), kind)
        for quota in (False, True)
        for kind in ("denoise", "refresh")
    ),
    *(
        (UnmaskRule("none", cache="commit", first_token=True, stop=stop), kind)
        for stop in ("never", "after_block", "closed", "all_stop")
        for kind in ("denoise", "refresh")
    ),
]


def cases(ops: Ops, device: torch.device, sizes: Sizes, seed: int) -> Iterator[Case]:
    # Each way to select meets every third way to go on, and each way to go on every third way to select.
    for (n, select), (m, (after, kind)) in itertools.product(enumerate(SELECTS), enumerate(AFTERS)):
        if (n + m) % 3 == 0:
            yield case(ops, device, sizes, seed, sizes.widths[0], UnmaskRule(**select, **after), kind)
    for rule, kind in VARIANTS:
        yield case(ops, device, sizes, seed, sizes.widths[0], rule, kind)
    plain = [
        (UnmaskRule(**select, **AFTERS[4 * n % len(AFTERS)][0]), AFTERS[4 * n % len(AFTERS)][1])
        for n, select in enumerate(SELECTS)
    ]
    memory_sizes = dataclasses.replace(sizes, canvases=MEMORY_CANVASES)
    for W in (*sizes.widths[1:], *(MEMORY_WIDTHS if device.type == "cuda" else ())):
        # Sorting networks of many lanes compile slowly: each width meets every third or sixth way to select, and fewer
        # variants.
        stride = 3 if W <= 256 else 6
        for n, (rule, kind) in enumerate(plain + VARIANTS[:: 3 * stride]):
            if (n + W) % stride == 0 or n >= len(plain):
                yield case(ops, device, memory_sizes if W in MEMORY_WIDTHS else sizes, seed, W, rule, kind)
    for D, W in DRAFTS:
        name = f"drafts D={D} W={W}"
        yield name, partial(drafts_equal_reference, ops, device, seed, name, sizes.canvases, D, W)
    for N in NOISES:
        yield f"noise N={N}", partial(noise_equals_reference, ops, device, seed, f"noise N={N}", N)
    name = "row alone = row in the batch"
    for rule, kind in plain + VARIANTS[::5]:
        yield (
            f"{name} {words(rule)} {kind}",
            partial(rows_are_independent, ops, device, seed, name + str(rule), sizes, rule, kind),
        )


def words(rule: UnmaskRule) -> str:
    """The options of the rule that are not the plainest."""
    given = [(field.name, getattr(rule, field.name)) for field in dataclasses.fields(rule)]
    return " ".join(
        name if value is True else f"{name}={value}"
        for name, value in given
        if value not in (False, "row") and (name, value) != ("remask", "none")
    )


def case(ops: Ops, device: torch.device, sizes: Sizes, seed: int, W: int, rule: UnmaskRule, kind: str) -> Case:
    name = f"W={W} {words(rule)} {kind}"
    return name, partial(equals_reference, ops, device, seed, name, sizes.canvases, W, rule, kind)


def moved(call: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}


def compare_states(ours: RowState, expected: RowState, note: str = "") -> None:
    for name in ("tokens", "unmask_step", "unmask_confidence", *ROW_FIELDS):
        same_bits(f"state.{name}{note}", getattr(ours, name), getattr(expected, name))


def equals_reference(
    ops: Ops, device: torch.device, seed: int, name: str, B: int, W: int, rule: UnmaskRule, kind: str
) -> None:
    state, call = random_call(generator(seed, name), rule, kind, B=B, L=3 * W + 5, W=W)
    memory = GuardedMemory()
    ours = RowState(**{field: memory.spread(x.to(device), gap=5) for field, x in vars(state).items()})
    ours_call = moved(call, device)
    with poisoned(memory):
        changed = ops.unmask(ours, rule, UnmaskInputs(**ours_call), kind=kind)
    memory.check()
    for argument, value in call.items():
        if isinstance(value, Tensor):
            same_bits(f"{argument} (an input)", ours_call[argument], value)
    expected = reference.unmask(state, rule, UnmaskInputs(**call), kind=kind)
    compare_states(ours, state)
    same_bits("the lanes written", changed, expected)


def rows_are_independent(
    ops: Ops, device: torch.device, seed: int, name: str, sizes: Sizes, rule: UnmaskRule, kind: str
) -> None:
    """Every row, bit for bit: alone with as few lanes as its block has, and in the batch."""
    B, W = min(8, sizes.canvases), sizes.widths[0]
    state, call = random_call(generator(seed, name), rule, kind, B=B, L=3 * W + 5, W=W)
    state, call = RowState(**moved(vars(state), device)), moved(call, device)
    together = state.clone()
    changed = ops.unmask(together, rule, UnmaskInputs(**call), kind=kind)
    for b in range(B):
        first = state.block_start[b] if call["lane_start"] is None else call["lane_start"][b]
        # Without exits, no lane behind the block matters; a row whose block does not fit keeps all lanes.
        lanes = max(1, int(state.block_end[b] - first)) if call["exits"] is None else W
        alone = RowState(**{f.name: getattr(state, f.name)[b : b + 1].clone() for f in dataclasses.fields(state)})
        single = {
            argument: value[b : b + 1, :lanes].contiguous()
            if isinstance(value, Tensor) and value.dim() == 2
            else value[b : b + 1]
            if isinstance(value, Tensor) and argument != "stop_ids"
            else value
            for argument, value in call.items()
        }
        changed_alone = ops.unmask(alone, rule, UnmaskInputs(**single), kind=kind)
        expected = RowState(**{f.name: getattr(together, f.name)[b : b + 1] for f in dataclasses.fields(state)})
        compare_states(alone, expected, f", row {b} alone")
        same_bits(f"the lanes written, row {b} alone", changed_alone, changed[b : b + 1, : changed_alone.shape[1]])


def drafts_equal_reference(ops: Ops, device: torch.device, seed: int, name: str, B: int, D: int, W: int) -> None:
    """Drafts of rows that agree with them for a while: both ops, on memory between guard zones."""
    source, call = random_drafts(generator(seed, name), B=B, D=D, W=W)
    tokens, eligible, ready = call.pop("tokens"), call["eligible"], call["ready"]
    memory = GuardedMemory()
    ours = DraftSource(**{key: memory.copy(x.to(device)) for key, x in vars(source).items()})
    on_device = moved(call, device)
    with poisoned(memory):
        held = ops.draft_build(ours, tokens.to(device), on_device["eligible"], on_device["ready"], D=D)
        written = ops.verify(ours, held, **on_device, mask_id=MASK)
    memory.check()
    same_bits("held", held, reference.draft_build(source, tokens, eligible, ready, D=D))
    expected = reference.verify(source, held.cpu(), **call, mask_id=MASK)
    for key, value in expected._asdict().items():
        same_bits(key, getattr(written, key), value)
    for key, value in vars(source).items():
        same_bits(f"source.{key}", getattr(ours, key), value)


def noise_equals_reference(ops: Ops, device: torch.device, seed: int, name: str, N: int) -> None:
    """Counters of any value, under one seed and under a seed for each, on memory between guard zones."""
    random = generator(seed, name)
    counters = torch.randint(-(2**31), 2**31, (N, 3), generator=random).int()
    for kind, seeds in (("one seed", 1), ("a seed for each", N)):
        key = torch.randint(-(2**63), 2**63 - 1, (seeds,), generator=random)
        memory = GuardedMemory()
        ours = memory.copy(key.to(device)), memory.copy(counters.to(device))
        with poisoned(memory):
            scores = ops.uniform_scores(*ours)
        memory.check()
        same_bits(f"scores of {kind}", scores, reference.uniform_scores(key, counters))
