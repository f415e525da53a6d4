"""`unmask`: selection and transitions by hand, reference against a per-row transcription, kernel against reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from unmask_cases import (
    MASK,
    STATE_FIELDS,
    Case,
    assert_kernel_equals_reference,
    assert_same,
    drawn,
    one_row,
    oracle,
    random_case,
)

from dlm_kernels import RowState, UnmaskInputs, UnmaskRule, reference
from dlm_kernels.checks.unmask import LANES, OPTIONAL, ROWS
from dlm_kernels.checks.written import check_written
from dlm_kernels.reference.select import quota, select
from dlm_kernels.rules import CACHE_OPS, PASSES, REMASKS, SCOPES, STOPS
from dlm_kernels.state import COMMIT, DENOISE, DONE, ERROR_LOGITS, REFRESH
from dlm_kernels.testing.unmask_calls import GARBAGE_TOKEN
from dlm_kernels.unmask import unmask
from dlm_kernels.unmask.launch import BLOCK_L

# Hand-worked: which lanes are chosen.

SCORES = (0.5, 0.9, 0.25, 0.9, 0.95)
SELECTIONS = [
    ("a schedule takes the best, ties to the lowest lane", "none", {}, SCORES, None, 0.0, 2, {4, 1}),
    ("a schedule takes no more than there are", "none", {}, SCORES, None, 0.0, 9, {0, 1, 2, 3, 4}),
    ("equal to the threshold does not pass", "threshold", {}, SCORES, None, 0.9, 1, {4}),
    ("equal to the threshold passes if inclusive", "threshold", {"inclusive": True}, SCORES, None, 0.9, 1, {1, 3, 4}),
    ("the best is forced if none passes", "threshold", {}, SCORES, None, 0.99, 1, {4}),
    ("nothing is forced at kmin 0", "threshold", {}, SCORES, None, 0.99, 0, set()),
    ("fewer than kmin pass: the kmin best", "threshold", {}, SCORES, None, 0.92, 3, {4, 1, 3}),
    ("more than kmin pass: all that pass", "threshold", {}, SCORES, None, 0.4, 1, {0, 1, 3, 4}),
    ("the forced lanes go by rank, the test by score", "threshold", {}, SCORES, (5, 4, 3, 2, 1), 0.99, 2, {0, 1}),
    (
        "NaN and -inf are last, by lane",
        "none",
        {},
        (math.nan, -math.inf, -9.0, math.nan, -math.inf),
        None,
        0.0,
        3,
        {2, 0, 1},
    ),
    ("-0.0 ties with 0.0", "none", {}, (-0.0, 0.0, -0.0, 0.0, -1.0), None, 0.0, 2, {0, 1}),
    # limits of factor 1: 1/2, 2/3, 3/4, 4/5, 5/6
    ("factor in rank order", "factor", {}, SCORES, None, 1.0, 1, {4, 1, 3}),
    ("factor stops at the first failure", "factor", {}, (0.9, 0.1, 0.95, 0.95, 0.95), (5, 4, 3, 2, 1), 1.0, 1, {0}),
    ("factor takes the best if the first fails", "factor", {}, (0.1, 0.2, 0.3, 0.3, 0.0), None, 1.0, 1, {2}),
    ("factor equal to its limit passes", "factor", {}, (0.5, 0.0, 0.0, 0.0, 0.0), None, 1.0, 0, {0}),
    # entropies 1/8, 1/4, 1/2, 1, 2 of lanes 0 to 4
    ("the entropy budget excludes the largest so far", "entropy", {}, SCORES, (5, 4, 3, 2, 1), 0.375, 1, {0, 1, 2}),
    ("the largest need not be the last position's", "entropy", {}, SCORES, (4, 3, 2, 1, 5), 0.2, 1, {4, 0}),
    ("a budget of zero takes one", "entropy", {}, SCORES, (1, 2, 3, 4, 5), 0.0, 0, {4}),
    ("the inclusive budget is strict", "entropy", {"inclusive": True}, SCORES, (5, 4, 3, 2, 1), 0.375, 1, {0}),
    (
        "a budget below the first entropy still gives one",
        "entropy",
        {"inclusive": True},
        SCORES,
        (5, 4, 3, 2, 1),
        0.0,
        1,
        {0},
    ),
    ("an infinite budget takes all", "entropy", {}, SCORES, (5, 4, 3, 2, 1), math.inf, 0, {0, 1, 2, 3, 4}),
    ("nothing passes a NaN budget", "entropy", {}, SCORES, (5, 4, 3, 2, 1), math.nan, 0, set()),
]


@pytest.mark.parametrize(
    "name, passes, options, score, rank, value, kmin, expected", SELECTIONS, ids=[s[0] for s in SELECTIONS]
)
def test_selection_by_hand(name, passes, options, score, rank, value, kmin, expected):
    chosen = select(
        UnmaskRule(passes, **options),
        torch.ones(1, 5, dtype=torch.bool),
        torch.tensor([score]),
        torch.tensor([value]),
        torch.tensor([kmin], dtype=torch.int32),
        None if rank is None else torch.tensor([rank], dtype=torch.float32),
        torch.tensor([[0.125, 0.25, 0.5, 1.0, 2.0]]),
    )
    assert {lane for lane in range(5) if chosen[0, lane]} == expected


# name, rule, more arguments of `select` (of one row), expected; six lanes, all eligible but lane 2
LIMITS = [
    ("too few pass: the fallback best, not the kmin best",
     UnmaskRule("threshold"), dict(kmin=3, fallback=1, value=0.85), {4}),
    ("enough pass: the fallback does not matter",
     UnmaskRule("threshold"), dict(kmin=2, fallback=5, value=0.85), {1, 4}),
    ("at most max_unmask of those that pass, the best",
     UnmaskRule("threshold"), dict(kmin=1, max_unmask=2, value=0.5), {1, 4}),
    ("at most max_unmask of the fallback",
     UnmaskRule("none"), dict(kmin=4, max_unmask=3), {1, 4, 5}),
    ("at most max_unmask of a prefix",
     UnmaskRule("factor"), dict(kmin=0, max_unmask=1, value=0.5), {4}),
    ("max_unmask 0 writes nothing",
     UnmaskRule("none"), dict(kmin=4, max_unmask=0), set()),
    ("a threshold for every lane",
     UnmaskRule("threshold"), dict(kmin=0, value=[0.9, 0.95, 0.0, 0.6, 0.94, 0.9]), {3, 4}),
    ("the best of every run above run_value",
     UnmaskRule("threshold", runs=True), dict(kmin=1, value=0.92, run_value=0.8), {1, 4}),
    ("equal to run_value is not above it",
     UnmaskRule("none", runs=True), dict(kmin=0, run_value=0.9), {4}),
    ("runs come on top of max_unmask",
     UnmaskRule("none", runs=True), dict(kmin=1, max_unmask=1, run_value=0.5), {1, 4}),
    ("the best of a run goes by rank, its test by score",
     UnmaskRule("none", runs=True), dict(kmin=0, run_value=0.6, rank=[9.0, 1, 0, 1, 1, 9]), {5}),
]  # fmt: skip


@pytest.mark.parametrize("name, rule, arguments, expected", LIMITS, ids=[case[0] for case in LIMITS])
def test_limits_and_additions_by_hand(name, rule, arguments, expected):
    dtypes = dict.fromkeys(("kmin", "fallback", "max_unmask"), torch.int32)
    tensors = {
        name: torch.tensor([x], dtype=dtypes.get(name, torch.float32))
        for name, x in ({"value": 0.0} | arguments).items()
    }
    eligible = torch.tensor([[True, True, False, True, True, True]])
    chosen = select(rule, eligible, torch.tensor([[0.5, 0.9, 1.0, 0.7, 0.95, 0.8]]), **tensors)
    assert {lane for lane in range(6) if chosen[0, lane]} == expected


@pytest.mark.parametrize(
    "m0, S, expected", [(8, 4, [2, 2, 2, 2]), (10, 4, [3, 3, 2, 2]), (2, 4, [1, 1, 1, 1]), (3, 0, [3, 3])]
)
def test_quota_spreads_the_masks_over_the_steps_and_is_at_least_one(m0, S, expected):
    step = torch.arange(len(expected), dtype=torch.int32)
    given = quota(torch.full_like(step, m0), step, torch.full_like(step, S))
    assert given.tolist() == expected


# Hand-worked: what a row does next. g given, w written, # masked, S written stop, s given stop, . past the canvas. Lane
# j predicts pred[j].

# name: canvas, block, phase, cache, stop, pred, kmin -> canvas, phase, block, block_masks, block_step
TRANSITIONS = {
    "masks left: the row goes on": (
        "gg####", (2, 6), DENOISE, "none", "closed", "wwww", 2, "ggww##", DENOISE, (2, 6), 4, 2),
    "the last mask of the canvas": (
        "gg####", (2, 6), DENOISE, "none", "closed", "wwww", 4, "ggwwww", DONE, (2, 6), 4, 2),
    "the next block, none": (
        "g#######", (1, 4), DENOISE, "none", "closed", "wwww", 3, "gwww####", DENOISE, (4, 8), 4, 0),
    "blocks without masks are skipped": (
        "#gggggggg#", (0, 1), DENOISE, "none", "closed", "wwww", 1, "wgggggggg#", DENOISE, (9, 10), 1, 0),
    "a skip keeps the alignment": (
        "#ggggg##g", (0, 1), DENOISE, "none", "closed", "wwww", 1, "wggggg##g", DENOISE, (5, 9), 2, 0),
    "the last block is cut at the end of the canvas": (
        "##g###..##", (0, 3), DENOISE, "none", "closed", "wwww", 2, "wwg###..##", DENOISE, (3, 6), 3, 0),
    "masks past the canvas do not count": (
        "##..##", (0, 2), DENOISE, "none", "closed", "wwww", 2, "ww..##", DONE, (0, 2), 2, 2),
    "the next block, refresh": (
        "#####", (0, 4), DENOISE, "refresh", "closed", "wwww", 4, "wwww#", REFRESH, (4, 5), 1, 0),
    "a refresh is denoise step 0": (
        "#####", (0, 4), REFRESH, "refresh", "closed", "wwww", 1, "w####", DENOISE, (0, 4), 4, 2),
    "a refresh may finish its block": (
        "#####", (0, 4), REFRESH, "refresh", "closed", "wwww", 4, "wwww#", REFRESH, (4, 5), 1, 0),
    "a prefill selects nothing": (
        "#####", (0, 4), REFRESH, "commit", "closed", "wwww", 4, "#####", DENOISE, (0, 4), 4, 1),
    "a prefill before a given block": (
        "gggg#", (0, 4), REFRESH, "commit", "closed", "wwww", 4, "gggg#", COMMIT, (0, 4), 0, 1),
    "a finished block is committed first": (
        "#####", (0, 4), DENOISE, "commit", "closed", "wwww", 4, "wwww#", COMMIT, (0, 4), 4, 2),
    "the last block is not committed": (
        "wwww#", (4, 5), DENOISE, "commit", "closed", "wwww", 1, "wwwww", DONE, (4, 5), 1, 2),
    "after a commit, the very next block": (
        "wwww##gg##", (0, 4), COMMIT, "commit", "closed", "wwww", 4, "wwww##gg##", DENOISE, (4, 8), 2, 0),
    "a given block is committed too": (
        "wwwwgggg##", (0, 4), COMMIT, "commit", "closed", "wwww", 4, "wwwwgggg##", COMMIT, (4, 8), 0, 0),
    "a commit at the end of the canvas": (
        "wwww..", (0, 4), COMMIT, "commit", "closed", "wwww", 4, "wwww..", DONE, (0, 4), 0, 1),
    "closed: a stop token with no mask before it": (
        "######", (0, 4), DENOISE, "none", "closed", "wSww", 2, "wS####", DONE, (0, 4), 4, 2),
    "closed: an earlier step's stop token counts": (
        "##S###", (0, 4), DENOISE, "none", "closed", "wwww", 2, "wwS###", DONE, (0, 4), 3, 2),
    "closed: a mask before the stop token": (
        "##S###", (0, 4), DENOISE, "none", "closed", "wwww", 1, "w#S###", DENOISE, (0, 4), 3, 2),
    "closed: given stop tokens do not count": (
        "s####", (0, 4), DENOISE, "none", "closed", "wwww", 1, "sw###", DENOISE, (0, 4), 3, 2),
    "after_block: the block is finished first": (
        "####", (0, 4), DENOISE, "none", "after_block", "Swww", 2, "Sw##", DENOISE, (0, 4), 4, 2),
    "after_block: then the row ends": (
        "S#####", (0, 4), DENOISE, "none", "after_block", "wwww", 3, "Swww##", DONE, (0, 4), 3, 2),
    "after_block: given stop tokens do not count": (
        "s#####", (0, 4), DENOISE, "none", "after_block", "wwww", 3, "swww##", DENOISE, (4, 6), 2, 0),
    "never: stop tokens are text": (
        "######", (0, 4), DENOISE, "none", "never", "SSSS", 4, "SSSS##", DENOISE, (4, 6), 2, 0),
    "a stop token outside the block does not count": (
        "S###gggg#", (1, 4), DENOISE, "none", "closed", "wwww", 3, "Swwwgggg#", DENOISE, (8, 9), 1, 0),
    "a stopped row is not committed": (
        "######", (0, 4), DENOISE, "commit", "closed", "Swww", 4, "Swww##", DONE, (0, 4), 4, 2),
    "all_stop: a block of stop tokens, the given ones included": (
        "s#####", (0, 4), DENOISE, "none", "all_stop", "SSSS", 3, "sSSS##", DONE, (0, 4), 3, 2),
    "all_stop: one other token": (
        "w#####", (0, 4), DENOISE, "none", "all_stop", "SSSS", 3, "wSSS##", DENOISE, (4, 6), 2, 0),
    "all_stop: the block is finished first": (
        "######", (0, 4), DENOISE, "none", "all_stop", "SSSS", 3, "SSS###", DENOISE, (0, 4), 4, 2),
    "all_stop: a block of given stop tokens and nothing written": (
        "ssss##", (0, 4), DENOISE, "none", "all_stop", "SSSS", 3, "ssss##", DENOISE, (4, 6), 2, 0),
    "once: the refresh step is denoise step 0 of the row": (
        "#####", (0, 4), REFRESH, "once", "closed", "wwww", 1, "w####", DENOISE, (0, 4), 4, 2),
    "once: no other block has one": (
        "#####", (0, 4), DENOISE, "once", "closed", "wwww", 4, "wwww#", DENOISE, (4, 5), 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSITIONS)
def test_transition_by_hand(name):
    canvas, block, phase, cache, stop, pred, kmin, *after = TRANSITIONS[name]
    canvas_after, phase_after, block_after, masks_after, block_step_after = after
    state, _ = one_row(canvas, block, phase, UnmaskRule("none", cache=cache, stop=stop), pred, kmin).run()
    assert drawn(state) == canvas_after.split(".")[0]
    assert state.phase.item() == phase_after
    assert (state.block_start.item(), state.block_end.item()) == block_after
    assert (state.block_masks.item(), state.block_step.item()) == (masks_after, block_step_after)
    assert (state.nfe.item(), state.query_tokens.item(), state.error.item()) == (1, 4, 0)


def simple_row(**args) -> Case:
    return one_row("gg####", (2, 6), DENOISE, UnmaskRule("none"), "wwww", **args)


def test_a_write_records_the_step_and_the_confidence_and_is_returned():
    state, changed = simple_row(kmin=2).run()
    assert state.unmask_step[0].tolist() == [-1, -1, 3, 3, -1, -1]
    assert state.unmask_confidence[0].tolist() == [0, 0, 0.5, 0.5, 0, 0]
    assert state.step.item() == 4
    assert changed.tolist() == [[True, True, False, False]]


def test_an_unusable_statistic_ends_the_row_and_writes_nothing():
    case = simple_row(stat_error=[0, 0, 4, 0])
    before = case.state.clone()
    state, changed = case.run()
    assert (state.phase.item(), state.error.item(), state.nfe.item(), state.step.item()) == (DONE, ERROR_LOGITS, 1, 3)
    assert (
        torch.equal(state.tokens, before.tokens)
        and torch.equal(state.unmask_step, before.unmask_step)
        and not changed.any()
    )


def test_an_unusable_statistic_of_a_lane_that_is_not_masked_does_not_matter():
    case = one_row("gg#w##", (2, 6), DENOISE, UnmaskRule("none"), "wwww", stat_error=[0, 4, 0, 0])
    assert case.run()[0].error.item() == 0


MISFITS = [
    (DENOISE, "refresh", "refresh"),
    (COMMIT, "refresh", "commit"),
    (REFRESH, "denoise", "refresh"),
    (COMMIT, "denoise", "none"),
    (DONE, "denoise", "none"),
    (DONE, "refresh", "commit"),
]


@pytest.mark.parametrize("phase, kind, cache", MISFITS)
def test_a_row_that_needs_another_kind_of_step_is_unchanged(phase, kind, cache):
    case = one_row("gg####", (2, 6), phase, UnmaskRule("none", cache=cache), "wwww")
    case.args["kind"] = kind
    assert_same(case.copy().run(), (case.state, torch.zeros(1, 4, dtype=torch.bool)))


SITTING_OUT = {
    "the row sat the forward out": dict(query_len=0),
    "the block is longer than the lanes": dict(pred="www"),
    "the lanes begin behind the block": dict(lane_start=3),
    "the lanes end before the block": dict(lane_start=1),
}


@pytest.mark.parametrize("name", SITTING_OUT)
def test_a_row_that_cannot_take_part_is_unchanged(name):
    args = {"pred": "wwww"} | SITTING_OUT[name]
    case = one_row("gg####", (2, 6), DENOISE, UnmaskRule("none"), **args)
    assert_same(case.copy().run(), (case.state, torch.zeros(case.args["score"].shape, dtype=torch.bool)))


# Random cases.


def test_reference_equals_the_per_row_transcription_on_random_cases():
    phases: set[tuple[int, int]] = set()
    seen: set[object] = set()
    for seed in range(3000):
        case = random_case(seed, B=2, long=seed % 20 == 0, canvas=BLOCK_L)
        before, expected = case.state.phase.tolist(), oracle(case)
        assert_same(case.run(), expected, f"seed {seed} {case.rule}")
        phases |= set(zip(before, case.state.phase.tolist(), strict=True))
        rule = case.rule
        seen |= {rule.passes, rule.scope, rule.remask, rule.cache, rule.stop} | {
            name for name, x in vars(rule).items() if x is True
        }
    moves = {(phase, after) for phase in (REFRESH, DENOISE, COMMIT) for after in (REFRESH, DENOISE, COMMIT, DONE)}
    moves = moves - {(COMMIT, REFRESH)} | {(DONE, DONE)}
    assert moves <= phases, f"the cases never took {moves - phases}"
    options = {"inclusive", "quota", "pipeline", "runs", "edit", "renoise", "first_token"}
    assert {*PASSES, *SCOPES, *REMASKS, *CACHE_OPS, *STOPS, *options} <= seen


def hard_canvases(case: Case) -> dict[str, object]:
    """What could mislead the op in a call's canvases and regions, by name, and whether this call has that."""
    state, args = case.state, case.args
    regions = [state.tokens[b, state.block_start[b] : state.block_end[b]] == MASK for b in range(len(state.phase))]
    lane_start = state.block_start if args["lane_start"] is None else args["lane_start"]
    position = torch.arange(state.tokens.shape[1])
    behind = position >= state.block_end[:, None]
    masked, written = state.tokens == MASK, state.unmask_step >= 0
    is_stop = torch.isin(state.tokens, args["stop_ids"])
    return {
        "a region full of masks": any(region.all() for region in regions),
        "a region without masks": any(not region.any() for region in regions),
        "a region with some": any(region.any() and not region.all() for region in regions),
        "masks before the region": (masked & (position < state.block_start[:, None])).any(),
        "masks behind the canvas": (masked & (position >= state.canvas_len[:, None])).any(),
        "an infilled canvas": (masked & behind).any() and (~masked & behind).any(),
        "a written stop token": (is_stop & written).any(),
        "a given stop token": (is_stop & ~written).any(),
        "no stop token": len(args["stop_ids"]) == 0,
        "lanes before the region": (lane_start < state.block_start).any(),
        "lanes before the canvas": (lane_start < 0).any(),
        "a region that does not fit": (lane_start > state.block_start).any(),
    } | {f"phase {phase}": (state.phase == phase).any() for phase in range(REFRESH, DONE + 1)}


def hard_inputs(case: Case) -> dict[str, object]:
    """The same for what a call is told."""
    args, W = case.args, case.args["score"].shape[1]
    found = {
        "a row that sits out": (args["query_len"] == 0).any(),
        "a block length of 0": (args["block_length"] == 0).any(),
        "minus zero": ((args["score"] == 0) & args["score"].signbit()).any(),
        "garbage": (args["pred"] == GARBAGE_TOKEN).any(),
        "a broken statistic": args["stat_error"] is not None and (args["stat_error"] == 1).any(),
        "a threshold for every lane": args["value"].dim() == 2,
    }
    for name in OPTIONAL:
        found |= {f"{name} given": args[name] is not None, f"{name} left out": args[name] is None}
    for name in ("value", "run_value", "edit_value", "remask_value", "score", "entropy"):
        values = torch.zeros(1) if args[name] is None else args[name]
        found |= {f"{name} NaN": values.isnan().any()}
        found |= {f"{name} {x}": (values == x).any() for x in (math.inf, -math.inf)}
    for name in ("fallback", "max_unmask", "remask_count"):
        values = [] if args[name] is None else args[name].tolist()
        found |= {f"{name} {n}": number in values for n, number in (("-1", -1), ("0", 0), ("W", W))}
    return found


def test_random_calls_draw_every_hard_input():
    drawn_names: set[str] = set()
    for seed in range(1200):
        case = random_case(seed)
        found = hard_canvases(case) | hard_inputs(case)
        drawn_names |= {name for name, is_found in found.items() if is_found}
    assert not {*found} - drawn_names, f"never drawn: {sorted({*found} - drawn_names)}"


@pytest.mark.campaign
def test_campaign_reference_equals_the_transcription_and_the_kernel_equals_the_reference(device):
    for seed in range(10_000, 14_000):
        case = random_case(seed, long=seed % 4 == 0)
        expected = oracle(case)
        if seed % 4 == 0:
            assert_same(case.copy(device).run(unmask), expected, f"kernel, seed {seed} {case.rule}")
        assert_same(case.run(), expected, f"reference, seed {seed} {case.rule}")


@pytest.mark.parametrize(
    "seeds", [range(first, first + 20) for first in range(5000, 5200, 20)], ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}"
)
def test_kernel_equals_reference_on_strided_rows_and_touches_nothing_else(seeds, device):
    for seed in seeds:
        assert_kernel_equals_reference(
            random_case(seed, B=2, long=seed % 10 == 0, canvas=BLOCK_L).copy(device), f"seed {seed}"
        )


def test_a_stop_token_ends_a_row_wherever_the_call_names_that_token(device):
    """The kernel keeps the first few stop tokens in registers."""
    cases = 0
    for seed in range(6000, 6200):
        case = random_case(seed, B=2)
        held, stop = case.args["stop_ids"], case.rule.stop
        ends = case.copy().run()[0].phase
        case.args["stop_ids"] = held[:0]
        if stop in ("never", "fill") or len(held) != 1 or torch.equal(case.copy().run()[0].phase, ends):
            continue
        cases += 1
        for place in range(16):
            stop_ids = torch.arange(100, 100 + place + seed % (17 - place))
            case.args["stop_ids"] = torch.cat([stop_ids[:place], held, stop_ids[place:]])[:16]
            assert_kernel_equals_reference(case.copy(device), f"seed {seed}, stop token {place}")
    assert cases >= 3


@pytest.mark.parametrize("seed", range(7000, 7006))
def test_kernel_equals_reference_with_as_many_lanes_as_the_registers_hold(seed, device):
    case = random_case(seed, B=1, lanes=(129, 200, 256)[seed % 3])
    assert_kernel_equals_reference(case.copy(device), f"seed {seed}")


@pytest.mark.parametrize(
    "op, seeds", [(reference.unmask, range(2000, 2060)), (unmask, range(2001, 2009))], ids=["reference", "kernel"]
)
def test_a_row_alone_equals_the_row_in_the_batch(op, seeds, device):
    for seed in seeds:
        case = random_case(seed, long=seed % 4 == 0).copy(device)
        alone = [case.map(lambda name, x, b=b: (x if name == "stop_ids" else x[b : b + 1]).clone()) for b in range(3)]
        together, changed = case.run(op)
        for b, row in enumerate(alone):
            expected = RowState(**{name: getattr(together, name)[b : b + 1] for name in STATE_FIELDS})
            assert_same(row.run(op), (expected, changed[b : b + 1]), f"seed {seed} row {b}")


def test_whole_decodes_end_and_leave_done_rows_alone():
    """With limits that allow progress: a position a step at least, one fewer masked again, no edit."""
    for seed in range(120):
        case = random_case(seed)
        B, W = case.args["score"].shape
        state, rule, rng = case.state, case.rule, torch.Generator().manual_seed(seed)
        state.phase.fill_(DENOISE if rule.cache == "none" else REFRESH)
        if rule.pipeline:  # the whole rest of the row may be in the region
            for end in (state.canvas_len, state.block_end):
                end.copy_(torch.minimum(end, state.block_start + W))
        case.args |= dict(query_len=torch.ones(B, dtype=torch.int32), min_unmask=case.args["min_unmask"].clamp(min=1))
        case.args |= dict.fromkeys(
            ("stat_error", "allowed", "fallback", "max_unmask", "max_steps", "lane_start", "exits", "rank")
        )
        for name, limit in (("edit_value", 2.0), ("remask_count", int(rule.remask == "wino"))):
            if case.args.get(name) is not None:
                case.args[name].fill_(limit)
        for _ in range(8 * state.tokens.shape[1] + 8):
            if (state.phase == DONE).all():
                break
            case.args["kind"] = "refresh" if (state.phase == REFRESH).any() else "denoise"
            case.args |= {name: torch.rand(B, W, generator=rng) for name in ("score", "confidence", "entropy")}
            case.args["pred"] = torch.randint(0, MASK, (B, W), generator=rng)
            if rule.renoise:
                case.args["exits"] = torch.rand(B, generator=rng) < 0.3
                case.args["refill"] = torch.randint(0, MASK, (B, W), generator=rng)
            before = state.clone()
            case.run()
            selected = (state.step > before.step) & in_block_masks(before)
            fewer = (state.tokens == MASK).sum(1) < (before.tokens == MASK).sum(1)
            assert (fewer | ~selected | rule.renoise).all(), f"seed {seed} {rule}"
            done = before.phase == DONE
            for name in STATE_FIELDS:
                assert torch.equal(getattr(state, name)[done], getattr(before, name)[done]), f"seed {seed} {name}"
        else:
            raise AssertionError(f"seed {seed}: the rows never finished under {rule}, {state}")


def in_block_masks(state: RowState) -> Tensor:
    """Rows whose block holds a mask."""
    position = torch.arange(state.tokens.shape[1])
    return (
        (state.tokens == MASK) & (position >= state.block_start[:, None]) & (position < state.block_end[:, None])
    ).any(1)


def test_reference_reads_nothing_on_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for seed in range(40):
        case = random_case(seed)
        with FakeTensorMode() as fake:
            case.map(lambda _, x, fake=fake: fake.from_tensor(x)).run()


def test_an_empty_batch_does_nothing():
    for op in (reference.unmask, unmask):
        random_case(0).map(lambda name, x: x if name == "stop_ids" else x[:0]).run(op)


@pytest.mark.parametrize("op", [reference.unmask, unmask], ids=["reference", "kernel"])
def test_a_state_whose_fields_have_no_memory_of_their_own_is_refused_before_anything_is_written(op):
    case = random_case(0)
    before = case.state.clone()
    B, L = case.state.tokens.shape
    wanting = torch.zeros(B, L, requires_grad=True)
    bad = {
        "step and nfe are written in place and must not share memory": dict(nfe=case.state.step),
        "unmask_step is written in place and must not be expanded": dict(
            unmask_step=case.state.unmask_step[:1].expand(B, L)
        ),
        "unmask_confidence is written in place and must not require a gradient": dict(unmask_confidence=wanting),
    }
    for message, fields in bad.items():
        with pytest.raises(ValueError, match=f"^unmask: {message}"):
            dataclasses.replace(case, state=dataclasses.replace(case.state, **fields)).run(op)
    for field in dataclasses.fields(before):
        assert torch.equal(getattr(case.state, field.name), getattr(before, field.name)), field.name


def test_memory_is_shared_by_where_tensors_begin_and_not_by_their_count_of_elements():
    bytes_ = torch.zeros(64, dtype=torch.uint8)
    longs, ints = bytes_.view(torch.int64), bytes_.view(torch.int32)
    check_written("op", {"a": longs[4:6], "b": ints[4:6]})  # from byte 32 and from byte 16
    with pytest.raises(ValueError, match="^op: a and b are written in place and must not share memory"):
        check_written("op", {"a": longs[2:4], "b": ints[4:6]})  # both from byte 16


def test_every_input_is_checked_as_lanes_or_rows_and_described():
    names = [field.name for field in dataclasses.fields(UnmaskInputs)]
    assert {*LANES, *ROWS} == {*names} - {"mask_id", "stop_ids"} and not {*LANES} & {*ROWS}
    assert all(f"\n        {name}: " in UnmaskInputs.__doc__ for name in names)


def row_with(args: dict[str, object]) -> Case:
    case = simple_row()
    case.args |= args
    return case


ERRORS = [
    (
        dict(score=torch.zeros(1, 4, dtype=torch.float64)),
        TypeError,
        "unmask: score must be torch.float32, got torch.float64",
    ),
    (dict(pred=torch.zeros(1, 4, dtype=torch.int32)), TypeError, "unmask: pred must be torch.int64, got torch.int32"),
    (dict(query_len=torch.zeros(1)), TypeError, "unmask: query_len must be torch.int32, got torch.float32"),
    (dict(rank=torch.zeros(1, 5)), ValueError, r"unmask: rank must have shape \(1, 4\), got \(1, 5\)"),
    (dict(value=torch.zeros(2)), ValueError, r"unmask: value must have shape \(1,\), got \(2,\)"),
    (
        dict(confidence=torch.zeros(1, 8)[:, ::2]),
        ValueError,
        r"last dimension of confidence must have stride 1, got strides \(8, 2\)",
    ),
    (
        dict(score=torch.zeros(4)),
        ValueError,
        r"unmask: score must be 2-D and at least one position wide, got shape \(4,\)",
    ),
    (dict(stop_ids=torch.arange(17)), ValueError, r"unmask: stop_ids must be \[K\] with K <= 16, got shape \(17,\)"),
    (
        dict(stop_ids=torch.zeros(1, dtype=torch.int32)),
        TypeError,
        "unmask: stop_ids must be torch.int64, got torch.int32",
    ),
    (dict(kind="narrow"), ValueError, "unmask: kind must be one of refresh, denoise, got kind='narrow'"),
    (dict(kind="refresh"), ValueError, "unmask: kind 'refresh' needs a rule.cache other than 'none'"),
    (dict(value=torch.zeros(1, 4)), ValueError, r"unmask: value must have shape \(1,\), got \(1, 4\)"),
    (dict(allowed=torch.zeros(1, 4)), TypeError, "unmask: allowed must be torch.bool, got torch.float32"),
    (
        dict(lane_start=torch.zeros(1, dtype=torch.int64)),
        TypeError,
        "unmask: lane_start must be torch.int32, got torch.int64",
    ),
    (dict(exits=torch.zeros(2, dtype=torch.bool)), ValueError, r"unmask: exits must have shape \(1,\), got \(2,\)"),
    (
        dict(delay=torch.zeros(1, dtype=torch.int32)),
        ValueError,
        "unmask: delay must be None for UnmaskRule.*, got delay=a tensor",
    ),
    (dict(mask_id=-1), ValueError, r"unmask: mask_id must be in \[0, 2\^31\), got mask_id=-1"),
    (dict(mask_id=7.0), TypeError, "unmask: mask_id must be an int, got float"),
    (dict(score=torch.zeros(1, 4, device="meta")), ValueError, "unmask: score must be on cpu like tokens, got meta"),
]


@pytest.mark.parametrize("op", [reference.unmask, unmask], ids=["reference", "kernel"])
@pytest.mark.parametrize("args, error, message", ERRORS, ids=[e[2][:60] for e in ERRORS])
def test_a_wrong_argument_is_named(op, args, error, message):
    with pytest.raises(error, match=message):
        row_with(args).run(op)


NEEDS = {
    "entropy": UnmaskRule("entropy"),
    "run_value": UnmaskRule("none", runs=True),
    "edit_value": UnmaskRule("none", edit=True, stop="never"),
    "refill": UnmaskRule("none", renoise=True, stop="never"),
    "remask_score": UnmaskRule("none", remask="saber"),
    "append_masks": UnmaskRule("none", pipeline=True, scope="each"),
    "first_token": UnmaskRule("none", cache="commit", first_token=True),
}


@pytest.mark.parametrize("op", [reference.unmask, unmask], ids=["reference", "kernel"])
@pytest.mark.parametrize("name", NEEDS)
def test_an_argument_that_the_rule_needs_is_named(op, name):
    case = simple_row()
    case.rule = NEEDS[name]
    with pytest.raises(ValueError, match=f"unmask: {name} must be given for .*, got {name}=None"):
        case.run(op)
