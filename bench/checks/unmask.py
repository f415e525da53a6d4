"""Are `unmask`, `draft_build` and `verify` their references, bit for bit, under every rule and in every phase? Does a
row depend on the other rows?

There is no float64 form: the reference decides by comparisons and integer sums only, so it is exact. It runs on the
CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dlm_fast import Ops
from dlm_kernels import RowState, UnmaskInputs, UnmaskRule, reference
from dlm_kernels.checks.unmask import wanted_inputs
from dlm_kernels.reference import DraftSource
from dlm_kernels.rules import PASSES
from dlm_kernels.state import ROW_FIELDS
from dlm_kernels.testing import GuardedMemory, poisoned, same_bits

from .run import Case, Sizes, generator

MASK, STOP_IDS = 3, (1, 2)
# Lanes and rows of calls that are read from memory. The interpreter is too slow for so many lanes; its tests have their
# own.
MEMORY_WIDTHS, MEMORY_CANVASES = (1025, 4097, 8192), 16
# Drafts and lanes.
DRAFTS = ((1, 32), (4, 32), (8, 33), (3, 1100))
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


def random_call(random: torch.Generator, B: int, W: int, rule: UnmaskRule) -> tuple[RowState, dict]:
    """A batch on the CPU, and the fields of `UnmaskInputs`: rows in every phase, blocks of every length up to W, ties,
    and garbage in every lane that is not needed."""
    L = 3 * W + 5

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape or (B,), generator=random, dtype=torch.int32)

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(shape or (B,), generator=random) < share

    def drawn(share: float) -> bool:
        return bool(chance(share, 1))

    block_length = integers(0, W + 1) if not rule.pipeline else integers(1, max(2, W // 2))
    start = (torch.rand(B, generator=random) * 2 * W).int()
    # A pipeline's region holds whole blocks, unless the canvas ends in the last.
    length = integers(1, W + 1) if not rule.pipeline else (W // block_length).clamp(max=integers(1, 6)) * block_length
    end = torch.minimum(start + length, torch.tensor(L, dtype=torch.int32))
    canvas_len = torch.minimum(
        end + integers(0, W + 6) * (not rule.pipeline or drawn(0.8)), torch.tensor(L, dtype=torch.int32)
    )
    tokens = torch.randint(0, 9, (B, L), generator=random)
    share = torch.tensor([0.0, 0.05, 0.5, 1.0])[integers(0, 4).long()]
    tokens = torch.where(torch.rand(B, L, generator=random) < share[:, None], MASK, tokens)
    position = torch.arange(L)
    in_block = (position >= start[:, None]) & (position < end[:, None])
    written = in_block & (tokens != MASK) & chance(0.5, B, L)
    state = RowState(
        tokens=tokens,
        unmask_step=torch.where(written, integers(0, 5, B, L), -1).int(),
        unmask_confidence=torch.where(written, torch.rand(B, L, generator=random), 0.0),
        canvas_len=canvas_len,
        block_start=start,
        block_end=end,
        block_masks=integers(0, W + 1),
        block_step=integers(0, W),
        step=integers(0, 6 if rule.cache == "delayed" else 100),
        phase=integers(0, 4),
        nfe=integers(0, 100),
        query_tokens=integers(0, 10000),
        error=torch.zeros(B, dtype=torch.int32),
    )
    # Lanes may begin before the block, where they see the end of the block before; the region must still fit.
    lane_start = start
    if not rule.pipeline and drawn(0.5):
        lane_start = start - torch.minimum(torch.minimum(integers(0, W), (W - (end - start)).clamp(min=0)), start)
    lane = lane_start[:, None] + torch.arange(W)
    held_token, held_step = (field.gather(1, lane.clamp(max=L - 1).long()) for field in (tokens, state.unmask_step))
    in_lane_block = (lane >= start[:, None]) & (lane < end[:, None])
    allowed = chance(0.8, B, W) if drawn(0.3) else None
    exits = chance(0.3) if not rule.pipeline and drawn(0.8 if rule.renoise else 0.3) else None
    needed = in_lane_block & (held_token == MASK)
    if allowed is not None:
        needed = needed & allowed
    if rule.renoise:
        needed = in_lane_block
    if rule.edit or rule.remask != "none":
        needed = needed | (in_lane_block & (held_step >= 0))
    if exits is not None:
        needed = needed | ((lane < canvas_len[:, None]) & (held_token == MASK))

    def scores() -> Tensor:
        """A coarse grid makes ties; NaN counts as -inf."""
        score = torch.where(
            chance(0.5)[:, None],
            torch.randint(0, 12, (B, W), generator=random) / 12,
            torch.rand(B, W, generator=random),
        )
        score[chance(0.02, B, W)] = math.nan
        score[chance(0.02, B, W)] = -math.inf
        return score

    def predictions() -> Tensor:
        pred = torch.randint(4, 100, (B, W), generator=random)
        return torch.where(chance(0.1, B, W), STOP_IDS[0], pred)

    entropy = torch.rand(B, W, generator=random) * torch.tensor([0.01, 1.0, 9.0])[integers(0, 3, B, 1).long()]
    entropy[chance(0.01, B, W)] = math.nan
    lanes = {
        "pred": (predictions(), 2**40),
        "score": (scores(), math.nan),
        "confidence": (torch.rand(B, W, generator=random), math.nan),
        "rank": (scores(), math.inf),
        "entropy": (entropy, math.nan),
        "stat_error": (chance(0.1 / W, B, W).int(), 7),
        "refill": (predictions(), 2**40),
        "remask_score": (scores(), -math.inf),
    }
    for values, garbage in lanes.values():
        values[~needed] = garbage
    value = torch.tensor([0.1, 0.5, 0.9, 7 / 12])[integers(0, 4).long()]
    if rule.passes == "threshold" and drawn(0.3):
        value = torch.tensor([0.1, 0.5, 0.9, 7 / 12])[integers(0, 4, B, W).long()]
    optional = {
        "rank": lanes["rank"][0] if drawn(0.5) else None,
        "entropy": lanes["entropy"][0] if rule.passes == "entropy" else None,
        "allowed": allowed,
        "lane_start": None if lane_start is start else lane_start,
        "fallback": integers(0, 5) if drawn(0.3) else None,
        "max_unmask": integers(0, 5) if drawn(0.3) else None,
        "exits": exits,
        "max_steps": integers(50, 200) if drawn(0.3) else None,
    }
    ruled = {
        "run_value": torch.rand(B, generator=random),
        "edit_value": torch.rand(B, generator=random),
        "refill": lanes["refill"][0],
        "remask_score": lanes["remask_score"][0],
        "remask_count": integers(0, W + 1),
        "remask_value": torch.rand(B, generator=random),
        "append_masks": integers(0, W + 1),
        "activate_masks": integers(0, W + 1),
        "delay": integers(0, 5),
        "first_token": torch.randint(0, 3, (B,), generator=random),
        "first_token_confidence": torch.rand(B, generator=random),
    }
    call = {
        "query_len": integers(0, 4) * 8,
        "pred": lanes["pred"][0],
        "score": lanes["score"][0],
        "confidence": lanes["confidence"][0],
        "value": value * (W if rule.passes == "entropy" else 1),
        "min_unmask": integers(0, 4),
        "steps": integers(0, W + 2),
        "block_length": block_length,
        "mask_id": MASK,
        "stop_ids": torch.tensor(STOP_IDS),
        "stat_error": lanes["stat_error"][0],
    }
    wanted = wanted_inputs(rule)
    return state, call | optional | {name: values for name, values in ruled.items() if wanted[name]}


def moved(call: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}


def guarded_state(state: RowState, memory: GuardedMemory, device: torch.device) -> RowState:
    """The state on `device` between guard zones. Between the rows of 2-D fields lie 5 elements of no row."""
    fields = {}
    for name, field in vars(state).items():
        stride = (field.shape[1] + 5, 1) if field.dim() == 2 else (1,)
        fields[name] = memory.empty(tuple(field.shape), stride, field.dtype, device).copy_(field)
    return RowState(**fields)


def compare_states(ours: RowState, expected: RowState, note: str = "") -> None:
    for name in ("tokens", "unmask_step", "unmask_confidence", *ROW_FIELDS):
        same_bits(f"state.{name}{note}", getattr(ours, name), getattr(expected, name))


def equals_reference(
    ops: Ops, device: torch.device, seed: int, name: str, B: int, W: int, rule: UnmaskRule, kind: str
) -> None:
    state, call = random_call(generator(seed, name), B, W, rule)
    memory = GuardedMemory()
    ours, ours_call = guarded_state(state, memory, device), moved(call, device)
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
    state, call = random_call(generator(seed, name), B, W, rule)
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
    random = generator(seed, name)

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=random) < share

    eligible = chance(0.5, B, W)
    tokens = torch.where(eligible, MASK, torch.randint(4, 9, (B, W), generator=random))
    source = DraftSource(
        token=torch.randint(4, 9, (B, W), generator=random),
        score=torch.randint(0, W, (B, W), generator=random) / W,
        confidence=torch.rand(B, W, generator=random),
        tried=torch.zeros(B, dtype=torch.int32),
        accepted=torch.zeros(B, dtype=torch.int32),
    )
    flags = {"ready": chance(0.9, B), "drafting": chance(0.9, B), "selects": chance(0.9, B)}
    by_draft = {
        "token": torch.where(chance(0.1, B, D, W), 9, source.token[:, None]),
        "score": torch.where(chance(0.02, B, D, W), math.nan, source.score[:, None]),
        "confidence": torch.rand(B, D, W, generator=random),
    }
    memory = GuardedMemory()
    ours = DraftSource(**{key: memory.copy(x.to(device)) for key, x in vars(source).items()})
    on_device = {key: x.to(device) for key, x in {"eligible": eligible, **flags, **by_draft}.items()}
    with poisoned(memory):
        held = ops.draft_build(ours, tokens.to(device), on_device["eligible"], on_device["ready"], D=D)
        written = ops.verify(ours, held, **on_device, mask_id=MASK)
    memory.check()
    same_bits("held", held, reference.draft_build(source, tokens, eligible, flags["ready"], D=D))
    expected = reference.verify(source, held.cpu(), **by_draft, eligible=eligible, **flags, mask_id=MASK)
    for key, value in expected._asdict().items():
        same_bits(key, getattr(written, key), value)
    for key, value in vars(source).items():
        same_bits(f"source.{key}", getattr(ours, key), value)
