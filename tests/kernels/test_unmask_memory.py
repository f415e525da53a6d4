"""`unmask` across its tiles: regions in registers and in memory, as long as they may be, one launch each."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from unmask_cases import (
    MASK,
    STATE_FIELDS,
    Case,
    assert_kernel_equals_reference,
    assert_same,
    one_row,
    random_case,
    run_case,
)

from dlm_kernels import RowState, UnmaskRule
from dlm_kernels.rules import PASSES
from dlm_kernels.state import DENOISE
from dlm_kernels.tiles import UnmaskTile
from dlm_kernels.unmask import launch as module
from dlm_kernels.unmask import unmask
from dlm_kernels.unmask.launch import MAX_W


def test_kernel_equals_reference_from_memory_across_its_tiles(device):
    boundary = sum(run_case(seed, device)["boundary"] for seed in range(7000, 7120))
    assert boundary >= 60


LONG_RULES = [UnmaskRule(passes) for passes in PASSES] + [
    UnmaskRule("threshold", pipeline=True, scope="each", cache="fused", stop="appends"),
    UnmaskRule("entropy", pipeline=True, scope="first", cache="delayed", stop="fill"),
    UnmaskRule("none", quota=True, runs=True, remask="wino"),
]


def long_case(rule: UnmaskRule, W: int, seed: int) -> Case:
    """A row that selects in a region of W lanes, half of them masked in some fifty runs, its scores full of ties."""
    case = random_case(seed, B=1, rule=rule, lanes=W)
    state, args, rng = case.state, case.args, torch.Generator().manual_seed(seed)
    state.phase.fill_(DENOISE)
    state.canvas_len.fill_(state.tokens.shape[1])
    state.block_start.fill_(0)
    state.block_end.fill_(W)
    runs = (torch.rand(1, 50, generator=rng) < 0.5).repeat_interleave(W // 50 + 1, 1)[:, :W]
    state.tokens[:, :W] = torch.where(runs, MASK, state.tokens[:, :W].clamp(max=MASK - 1))
    state.unmask_step[state.tokens == MASK] = -1
    lanes = {
        name: torch.randint(0, W // 2, (1, W), generator=rng) / W
        for name in ("score", "rank", "entropy", "remask_score")
    }
    lanes |= {"pred": torch.randint(0, MASK, (1, W), generator=rng), "confidence": torch.rand(1, W, generator=rng)}
    case.args |= {name: x for name, x in lanes.items() if args.get(name) is not None}
    three = torch.tensor([3], dtype=torch.int32)
    case.args |= dict(kind="denoise", query_len=three, min_unmask=three, steps=three, block_length=three + W // 9)
    case.args |= dict.fromkeys(("stat_error", "lane_start", "exits", "max_steps", "max_unmask", "allowed"))
    if rule.passes == "entropy":
        case.args["value"] = torch.tensor([W / 20])
    return case


@pytest.mark.parametrize("rule", LONG_RULES, ids=lambda rule: f"{rule.passes}-{rule.scope}-{rule.remask}")
def test_kernel_equals_reference_in_longer_regions_in_registers(rule, device):
    for W, seed in ((33, 6000), (129, 6001)):
        assert_kernel_equals_reference(long_case(rule, W, seed).copy(device), f"W={W}")


@pytest.mark.parametrize(
    "W, rule",
    [(1025, 0), (2047, 4), (2048, 1), (2049, 2), (4095, 6), (4096, 3), (4097, 5), (8191, 2), (MAX_W, 3)],
    ids=lambda x: str(x),
)
def test_kernel_equals_reference_in_regions_as_long_as_they_may_be(W, rule, device):
    assert_kernel_equals_reference(long_case(LONG_RULES[rule], W, W).copy(device), f"W={W}")


def test_what_a_factor_sorts_in_memory_stops_at_the_first_failure_wherever_it_is(device):
    """Scores just above their limits up to one place, so that the prefix ends in every tile and at its edges."""
    for places in (0, 1, 7, 8, 9, 15, 16, 31, 40):
        case = one_row("#" * 40, (0, 40), DENOISE, UnmaskRule("factor"), "w" * 40, kmin=0, value=1.0)
        place = torch.randperm(40, generator=torch.Generator().manual_seed(places))
        limit = 1 - 1 / (place + 2.0)
        case.args |= dict(score=torch.where(place < places, limit, limit - 0.5)[None], rank=-place.float()[None])
        assert_kernel_equals_reference(case.copy(device), f"{places} places", UnmaskTile(64, 1, 8))
        assert case.run()[1].sum() == places


def test_a_row_alone_equals_the_row_in_the_batch_from_memory(device):
    with mock.patch.object(module, "unmask_tile", lambda W: UnmaskTile(64, 1, 8)):
        for seed in range(2100, 2108):
            case = random_case(seed, lanes=20).copy(device)
            alone = [
                case.map(lambda name, x, b=b: (x if name == "stop_ids" else x[b : b + 1]).clone()) for b in range(3)
            ]
            together, changed = case.run(unmask)
            for b, row in enumerate(alone):
                expected = RowState(**{name: getattr(together, name)[b : b + 1] for name in STATE_FIELDS})
                assert_same(row.run(unmask), (expected, changed[b : b + 1]), f"seed {seed} row {b}")


@pytest.mark.usefixtures("without_debug")
@pytest.mark.parametrize("W, passes, allocations", [(40, "factor", 1), (MAX_W, "threshold", 1), (MAX_W, "factor", 2)])
def test_a_call_is_one_launch_and_its_allocations(W, passes, allocations, device):
    case = one_row("####", (0, 4), DENOISE, UnmaskRule(passes), "w" * W).copy(device)
    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    with (
        mock.patch.object(module, "unmask_kernel", Counted(module.unmask_kernel)),
        mock.patch.object(module, "unmask_memory_kernel", Counted(module.unmask_memory_kernel)),
        mock.patch.object(torch, "empty", side_effect=torch.empty) as empty,
    ):
        case.run(unmask)
    assert launches == [(1,)] and empty.call_count == allocations


def test_more_lanes_than_the_widest_tile_is_an_error_of_the_kernel_only():
    W = MAX_W + 1
    case = one_row("gg####", (2, 6), DENOISE, UnmaskRule("none"), "w" * W)
    case.copy().run()
    with pytest.raises(ValueError, match=f"must have W <= {W - 1}, got W={W}"):
        case.run(unmask)
