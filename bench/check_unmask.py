"""Is `unmask` its reference, bit for bit, under every rule and in every phase? Does a row depend on the other rows?

There is no float64 form: the reference decides by comparisons and integer sums only, so it is exact. It runs on the CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import partial

import torch
from dlm_fast import Ops
from dlm_kernels import RowState, UnmaskRule, reference
from dlm_kernels.rules import CACHE_OPS, PASSES, STOPS
from dlm_kernels.state import ROW_FIELDS
from torch import Tensor

from .checks import Case, GuardedMemory, Sizes, generator, poisoned, same_bits

MASK, STOP_IDS = 3, (1, 2)
SELECTS = [
    (p, i, q) for p in PASSES for i in ((False, True) if p in ("threshold", "entropy") else (False,)) for q in (False, True)
]
AFTERS = [(c, s, k) for c in CACHE_OPS for s in STOPS for k in ("window", "wide") if (c, k) != ("none", "wide")]


def cases(ops: Ops, device: torch.device, sizes: Sizes, seed: int) -> Iterator[Case]:
    # Each way to select meets every third way to go on, and each way to go on every third way to select.
    for (n, select), (m, after) in itertools.product(enumerate(SELECTS), enumerate(AFTERS)):
        if (n + m) % 3 == 0:
            yield case(ops, device, sizes, seed, sizes.widths[0], select, after)
    for W, (n, select) in itertools.product(sizes.widths[1:], enumerate(SELECTS)):
        # Sorting networks of many lanes compile slowly: each width meets every third or sixth way to select.
        if (n + W) % (3 if W <= 256 else 6) == 0:
            yield case(ops, device, sizes, seed, W, select, AFTERS[(W + 4 * n) % len(AFTERS)])
    name = "row alone = row in the batch"
    for select, after in zip(SELECTS, AFTERS):
        rule = rule_of(select, after)
        yield f"{name} {rule}", partial(rows_are_independent, ops, device, seed, name + str(rule), sizes, rule, after[2])


def rule_of(select: tuple, after: tuple) -> UnmaskRule:
    passes, inclusive, quota = select
    return UnmaskRule(passes=passes, inclusive=inclusive, quota=quota, cache=after[0], stop=after[1])


def case(ops: Ops, device: torch.device, sizes: Sizes, seed: int, W: int, select: tuple, after: tuple) -> Case:
    rule, kind = rule_of(select, after), after[2]
    words = (rule.passes, "inclusive" * rule.inclusive, "quota" * rule.quota, f"cache={rule.cache}", f"stop={rule.stop}", kind)
    name = f"W={W} " + " ".join(filter(None, words))
    return name, partial(equals_reference, ops, device, seed, name, sizes.canvases, W, rule, kind)


def random_call(random: torch.Generator, B: int, W: int, rule: UnmaskRule, kind: str) -> tuple[RowState, dict]:
    """A batch on the CPU with rows in every phase, blocks of every length up to W, ties, and garbage in every lane nobody needs."""
    L = 3 * W + 5

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape or (B,), generator=random, dtype=torch.int32)

    length = integers(1, W + 1)
    start = (torch.rand(B, generator=random) * 2 * W).int()
    end = torch.minimum(start + length, torch.tensor(L, dtype=torch.int32))
    canvas_len = torch.minimum(end + integers(0, W + 6), torch.tensor(L, dtype=torch.int32))
    tokens = torch.randint(0, 9, (B, L), generator=random)
    share = torch.tensor([0.0, 0.05, 0.5, 1.0])[integers(0, 4).long()]
    tokens = torch.where(torch.rand(B, L, generator=random) < share[:, None], MASK, tokens)
    position = torch.arange(L)
    in_block = (position >= start[:, None]) & (position < end[:, None])
    written = in_block & (tokens != MASK) & (torch.rand(B, L, generator=random) < 0.5)
    state = RowState(
        tokens=tokens,
        unmask_step=torch.where(written, integers(0, 5, B, L), -1).int(),
        unmask_confidence=torch.where(written, torch.rand(B, L, generator=random), 0.0),
        canvas_len=canvas_len,
        block_start=start,
        block_end=end,
        block_masks=integers(0, W + 1),
        block_step=integers(0, W),
        step=integers(0, 100),
        phase=integers(0, 4),
        nfe=integers(0, 100),
        query_tokens=integers(0, 10000),
        error=torch.zeros(B, dtype=torch.int32),
    )
    # A coarse grid of scores makes ties; NaN counts as -inf.
    score = torch.randint(0, 12, (B, W), generator=random) / 12
    fine = torch.rand(B, W, generator=random)
    score = torch.where(integers(0, 2)[:, None] == 0, score, fine)
    score[torch.rand(B, W, generator=random) < 0.02] = math.nan
    score[torch.rand(B, W, generator=random) < 0.02] = -math.inf
    entropy = torch.rand(B, W, generator=random) * torch.tensor([0.01, 1.0, 9.0])[integers(0, 3, B, 1).long()]
    entropy[torch.rand(B, W, generator=random) < 0.01] = math.nan
    pred = torch.randint(4, 100, (B, W), generator=random)
    pred[torch.rand(B, W, generator=random) < 0.1] = STOP_IDS[0]
    stat_error = (torch.rand(B, W, generator=random) < 0.1 / W).int()
    lane = torch.arange(W)
    needed = (lane < (end - start)[:, None]) & (tokens.gather(1, (start[:, None] + lane).clamp(max=L - 1).long()) == MASK)
    for values, garbage in ((score, math.nan), (entropy, math.nan), (pred, 2**40), (stat_error, 7)):
        values[~needed] = garbage
    value = torch.tensor([0.1, 0.5, 0.9, 7 / 12])[integers(0, 4).long()]
    call = {
        "kind": kind,
        "query_len": integers(0, 4) * 8,
        "pred": pred,
        "score": score,
        "confidence": torch.rand(B, W, generator=random),
        "value": value * (W if rule.passes == "entropy" else 1),
        "min_unmask": integers(0, 4),
        "steps": integers(0, W + 2),
        "block_length": integers(0, W + 1),
        "mask_id": MASK,
        "stop_ids": torch.tensor(STOP_IDS),
        "rank": torch.rand(B, W, generator=random) if torch.rand(1, generator=random) < 0.5 else None,
        "entropy": entropy if rule.passes == "entropy" else None,
        "stat_error": stat_error,
    }
    return state, call


def moved(call: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}


def guarded_state(state: RowState, memory: GuardedMemory, device: torch.device) -> RowState:
    """The state on `device` between guard zones; rows of 2-D fields lie 5 elements apart, which belong to nobody."""
    fields = {}
    for name, field in vars(state).items():
        stride = (field.shape[1] + 5, 1) if field.dim() == 2 else (1,)
        fields[name] = memory.empty(tuple(field.shape), stride, field.dtype, device).copy_(field)
    return RowState(**fields)


def compare_states(ours: RowState, expected: RowState, note: str = "") -> None:
    for name in ("tokens", "unmask_step", "unmask_confidence", *ROW_FIELDS):
        same_bits(f"state.{name}{note}", getattr(ours, name), getattr(expected, name))


def equals_reference(ops: Ops, device: torch.device, seed: int, name: str, B: int, W: int, rule: UnmaskRule, kind: str) -> None:
    state, call = random_call(generator(seed, name), B, W, rule, kind)
    memory = GuardedMemory()
    ours, ours_call = guarded_state(state, memory, device), moved(call, device)
    with poisoned(memory):
        ops.unmask(ours, rule, **ours_call)
    memory.check()
    for argument, value in call.items():
        if isinstance(value, Tensor):
            same_bits(f"{argument} (an input)", ours_call[argument], value)
    reference.unmask(state, rule, **call)
    compare_states(ours, state)


def rows_are_independent(ops: Ops, device: torch.device, seed: int, name: str, sizes: Sizes, rule: UnmaskRule, kind: str) -> None:
    """Every row, bit for bit: alone with as few lanes as its block has, and in the batch."""
    B, W = min(8, sizes.canvases), sizes.widths[0]
    state, call = random_call(generator(seed, name), B, W, rule, kind)
    state, call = RowState(**moved(vars(state), device)), moved(call, device)
    together = state.clone()
    ops.unmask(together, rule, **call)
    for b in range(B):
        lanes = int(state.block_end[b] - state.block_start[b])
        alone = RowState(**{f.name: getattr(state, f.name)[b : b + 1].clone() for f in dataclasses.fields(state)})
        single = {
            argument: value[b : b + 1, :lanes].contiguous()
            if isinstance(value, Tensor) and value.dim() == 2
            else value[b : b + 1]
            if isinstance(value, Tensor) and argument != "stop_ids"
            else value
            for argument, value in call.items()
        }
        ops.unmask(alone, rule, **single)
        expected = RowState(**{f.name: getattr(together, f.name)[b : b + 1] for f in dataclasses.fields(state)})
        compare_states(alone, expected, f", row {b} alone")
