"""`confidence` by one program a row and by one a part of it: the same bits. And what a call launches and allocates."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlm_kernels import reference

pytest.importorskip("triton", reason="without Triton, the confidence kernel cannot be compared with its reference")
from confidence_cases import (
    OUTPUTS,
    STATISTICS,
    assert_equals_reference,
    assert_identical,
    changed,
    draws,
    everything,
    faster_interpreter,
    random_case,
    recorded,
    rows_of,
    run_kernel,
    toy_tile,
)

from dlm_kernels.confidence import launch as kernel
from dlm_kernels.tiles import CONFIDENCE_PARTS, CONFIDENCE_TILES, confidence_parts

COLUMNS, PART_TILES = 4, 2
TILE = 4 * COLUMNS  # fp32 ids
PART = TILE * PART_TILES
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
both = pytest.mark.parametrize("op", [reference.confidence, kernel.confidence], ids=["reference", "kernel"])
forms = pytest.mark.parametrize("split", [False, True], ids=["unsplit", "split"])


@pytest.fixture(autouse=True)
def fast():
    with faster_interpreter():
        yield


def run(logits: Tensor, split: bool, **arguments: object) -> reference.Confidence:
    return run_kernel(logits, COLUMNS, part_tiles=PART_TILES, split=split, **arguments)


def both_forms(logits: Tensor, **arguments: object) -> reference.Confidence:
    """The result of the split form, which is that of the unsplit one bit for bit."""
    unsplit, split = run(logits, False, **arguments), run(logits, True, **arguments)
    assert_identical(unsplit, split)
    return split


# Equal bits, and equal to the reference.


@pytest.mark.parametrize(
    "V", [PART - 1, PART, PART + 1, 2 * PART - 1, 2 * PART, 2 * PART + 1, PART + TILE - 1, PART + TILE + 1]
)
def test_split_equals_unsplit_bitwise_and_the_reference_off_by_one_from_every_boundary(V, device):
    logits = torch.randn(2, V, device=device) * 4
    arguments = everything(2, V, device, greedy_every=2) | {"banned": torch.randint(-1, V, (2, 2), device=device)}
    arguments["banned"][0] = logits[0].topk(2).indices
    arguments |= {"outputs": OUTPUTS, "previous": logits + torch.randn(2, V, device=device), "soft_cap": 20.0}
    arguments["previous_logsumexp"] = arguments["previous"].logsumexp(1)
    arguments |= {"bias_ids": torch.randint(-1, V, (2, 3), device=device), "bias": torch.randn(2, 3, device=device) * 4}
    assert_equals_reference(both_forms(logits, **arguments), logits, **arguments)


@pytest.mark.parametrize("seed", range(100, 112))
def test_split_equals_unsplit_bitwise_on_random_calls(seed, device):
    logits, arguments = random_case(seed, device, vocabularies=(97, 127, 128, 129, 161), most_rows=3)
    assert_equals_reference(both_forms(logits, **arguments), logits, **arguments)


@pytest.mark.parametrize("num_warps", [2, 4])
@pytest.mark.parametrize("seed", range(200, 206))
def test_split_equals_unsplit_bitwise_where_a_column_is_that_of_one_of_several_warps(seed, num_warps, device):
    logits, arguments = random_case(seed, device, vocabularies=(97, 128, 257, 513), most_rows=2)
    unsplit, split = (
        run_kernel(logits, 32, part_tiles=1, num_warps=num_warps, split=split, **arguments) for split in (False, True)
    )
    assert_identical(unsplit, split)
    assert_equals_reference(split, logits, **arguments)


@pytest.mark.parametrize("seed", range(8))
def test_banned_ids_among_ties_of_the_best_hide_neither_token_nor_runner_up_nor_draw(seed, device):
    V, N = 3 * PART + 5, 4
    logits = (torch.randn(N, V, device=device) * 1.5).round()
    arguments = everything(N, V, device)
    free = both_forms(logits, **arguments)
    # What wins without a ban, and ids of the winners' groups, columns and values.
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :12]
    near = (free.token[:, None] + torch.tensor([1, -1, TILE, -TILE, PART], device=device)).clamp(-1, V)
    candidates = torch.cat([best, near, free.sampled_token[:, None], free.second_token[:, None]], dim=1)
    banned = candidates[:, torch.randperm(candidates.shape[1])[: 1 + 2 * seed]]
    arguments |= {"banned": banned.contiguous()}
    result = both_forms(logits, **arguments)
    assert not (banned == result.token[:, None]).any() and not (banned == result.sampled_token[:, None]).any()
    assert_equals_reference(result, logits, **arguments)


@forms
def test_a_banned_runner_up_in_the_winners_column_is_passed_over(split, device):
    logits = torch.randn(2, 2 * PART, device=device)
    # The winner and what is banned lie in one column, of two tiles or of one.
    logits[:, 5], logits[0, 5 + TILE], logits[1, 6], logits[:, 5 + 3 * COLUMNS] = 9.0, 8.0, 8.0, 7.0
    banned = torch.tensor([[5 + TILE], [6]], device=device)
    result = run(logits, split, banned=banned)
    assert result.token.tolist() == [5, 5] and result.second_token.tolist() == [5 + 3 * COLUMNS] * 2


@forms
def test_a_banned_draw_is_drawn_again_without_that_id(split, device):
    V, N = 3 * PART + 5, 12
    logits = torch.randn(N, V, device=device) * 0.1
    arguments = draws(N, V, 1.0, device)
    free = run(logits, split, **arguments)
    # Only what was drawn is banned: the winner does not tell of it.
    banned = torch.where(free.sampled_token != free.token, free.sampled_token, -1)
    assert (banned >= 0).sum() > N // 2
    arguments |= {"banned": banned[:, None]}
    result = run(logits, split, **arguments)
    assert not (result.sampled_token == banned).any() and torch.equal(result.token, free.token)
    assert_equals_reference(result, logits, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_shipped_tile_splits_a_real_vocabulary_without_changing_a_bit(dtype, device):
    logits = (torch.randn(1, 126464, device=device) * 3).to(dtype)
    logits[0, 126463] = 40.0
    arguments = {"outputs": STATISTICS, "banned": torch.tensor([126336], device=device)}
    unsplit, split = (run_kernel(logits, split=split, **arguments) for split in (False, True))
    assert_identical(unsplit, split)
    assert_equals_reference(split, logits, **arguments)


@forms
def test_a_row_alone_equals_the_row_in_a_batch_bitwise(split, device):
    V, N = 3 * PART + 5, 3
    logits = torch.randn(N, V, device=device) * 3
    arguments = everything(N, V, device)
    together = run(logits, split, **arguments)
    for n in range(N):
        alone = {
            name: value[n : n + 1] if isinstance(value, Tensor) and name != "seed" else value
            for name, value in arguments.items()
        }
        # Alone by the other form: what the number of rows decides.
        assert_identical(run(logits[n : n + 1], not split, **alone), rows_of(together, slice(n, n + 1)))


@forms
def test_pivots_far_apart_do_not_overflow_where_parts_meet(split, device):
    """2e36 times the 32 or more that an equal part sums to is beyond fp32, times a weight of 0."""
    logits = torch.full((2, 3 * PART), -9e29, device=device)
    logits[0, PART : 2 * PART] = 9e29
    logits[1, -1] = 9e29
    arguments = {"outputs": STATISTICS, "temperature": torch.full((2,), 1e-6, device=device)}
    result = run(logits, split, **arguments)
    assert result.error.tolist() == [0, 0] and result.token.tolist() == [PART, 3 * PART - 1]
    assert result.entropy.tolist() == pytest.approx([math.log(PART), 0.0])
    assert result.confidence.tolist() == pytest.approx([1 / PART, 1.0])


# Hostile rows.


@forms
def test_parts_of_minus_infinity_first_last_and_alone_change_nothing(split, device):
    V = 3 * PART
    logits = torch.full((4, V), -math.inf, device=device)
    logits[0, 2 * PART + 1 :] = torch.arange(PART - 1.0, device=device)
    logits[1, :5] = torch.arange(5.0, device=device)
    logits[2, PART + 3] = -500.0
    result = run(logits, split, outputs=STATISTICS)
    assert result.token.tolist() == [V - 1, 4, PART + 3, 0] and result.second_token.tolist() == [V - 2, 3, -1, -1]
    assert result.error.tolist() == [0, 0, 0, 1]
    assert_equals_reference(result, logits, outputs=STATISTICS)


@forms
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_logit_in_any_part_is_an_error_of_its_row(value, split, device):
    logits = torch.randn(4, 3 * PART, device=device)
    for row, where in enumerate((0, PART, 3 * PART - 1)):
        logits[row, where] = value
    result = run(logits, split, banned=torch.tensor([0, PART], device=device))
    assert result.error.tolist() == [1, 1, 1, 0] and result.second_token[:3].unique().tolist() == [-1]


@forms
def test_banned_winners_of_every_part_leave_the_next_ones(split, device):
    V = 4 * PART
    logits = torch.zeros(1, V, device=device)
    first = torch.arange(0, V, PART, device=device) + 7
    logits[0, first], logits[0, first + 1] = 9.0, torch.tensor([1.0, 2.0, 4.0, 3.0], device=device)
    arguments = {"outputs": STATISTICS, "banned": first}
    result = run(logits, split, **arguments)
    assert [result.token.item(), result.second_token.item()] == (first + 1)[[2, 3]].tolist()
    assert_equals_reference(result, logits, **arguments)


@forms
def test_ties_across_parts_go_to_the_lowest_ids(split, device):
    logits = torch.zeros(3, 3 * PART, device=device)
    logits[0, [PART - 1, PART, 2 * PART]] = 2.0
    logits[1, [2 * PART, 2 * PART + 5]] = 2.0
    result = run(logits, split)
    assert result.token.tolist() == [PART - 1, 2 * PART, 0] and result.second_token.tolist() == [PART, 2 * PART + 5, 1]


@forms
def test_rows_that_are_not_needed_or_not_there_are_not_read(split, device):
    logits = torch.full((2, 2 * PART), math.nan, device=device)
    logits[1] = 0.0
    rows = torch.tensor([-1, 1, 5], dtype=torch.int32, device=device)
    result = run(logits, split, rows=rows, **everything(3, 2 * PART, device))
    assert result.error.tolist() == [0, 0, 1] and result.token.tolist() == [-1, 0, 0]
    assert result.second_token.tolist() == [-1, 1, -1] and result.second_logit.abs().sum() == 0


@forms
def test_token_and_runner_up_among_many_ties_are_the_first_two_of_a_sort(split, device):
    logits = (torch.randn(2, 3 * PART + 1, device=device) * 2).round()
    result = run(logits, split)
    best_two = logits.sort(dim=1, descending=True, stable=True).indices[:, :2]
    assert torch.equal(torch.stack([result.token, result.second_token], 1), best_two)


@forms
def test_token_and_runner_up_have_the_bias_and_the_cap(split, device):
    logits = torch.randn(1, 3 * PART, device=device)
    ids = torch.tensor([[PART, 5, 5]], device=device)
    arguments = {"bias_ids": ids, "bias": torch.tensor([[9.0, 4.0, 4.0]], device=device), "soft_cap": 6.0}
    result = run(logits, split, **arguments)
    assert sorted([result.token.item(), result.second_token.item()]) == [5, PART] and result.logit.max() < 6
    assert_equals_reference(result, logits, **arguments)


# Parts and launches.


@pytest.mark.parametrize("V", [1, 50257, 126464, 151936, 262144, 2**30 - 1])
def test_parts_cover_a_vocabulary_and_are_at_most_32(V):
    for (_, itemsize), tile in CONFIDENCE_TILES.items():
        part_tiles, parts = confidence_parts(V, tile, itemsize)
        part = part_tiles * tile.columns * 16 // itemsize
        assert (parts - 1) * part < V <= parts * part and parts <= CONFIDENCE_PARTS
        assert part_tiles & (part_tiles - 1) == 0 and (part == 16384 or V > 32 * 16384)


def test_many_rows_are_one_launch_and_few_are_two_and_nothing_else_but_allocations(device):
    programs = kernel.PROGRAMS_PER_SM * kernel._multiprocessors(device)
    with changed(kernel, _tile=lambda *_, **__: toy_tile(COLUMNS, PART_TILES)):
        for N, V, split in ((programs, PART + 1, False), (programs - 1, PART, False), (programs - 1, PART + 1, True)):
            logits = torch.zeros(N, V, device=device)
            with recorded() as calls:
                kernel.confidence(logits, outputs=("second", "entropy"))
            # token, logit, second_token, second_logit, entropy, confidence, margin, error; values and ids of the parts
            results, partials = 8, 2 * split
            expected = ["aten.empty"] * (results + partials) + ["_confidence_kernel"] + ["_merge_kernel"] * split
            assert calls == expected, (N, V)


def test_no_rows_launch_nothing(device):
    logits = torch.zeros(0, 10, device=device)
    with recorded() as calls:
        result = kernel.confidence(logits)
    assert set(calls) == {"aten.empty"} and result.token.shape == (0,)


# The same order in machine code.

COMPILE = """
import collections, json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dlm_kernels.confidence.cases import compile_cases
from dlm_kernels.static import _attributes

def sums(ttgir):
    layouts = dict(re.findall(r"^(#\\w+) = (.*)$", ttgir, re.M))
    found = set()
    for body, operand in re.findall(r'"tt.reduce"(.*?)\\}\\) : \\((tensor<.*?>)\\) ->', ttgir, re.S):
        for name in sorted(layouts, key=len, reverse=True):
            operand = operand.replace(name, layouts[name])
        if "arith.addf" in body and not operand.startswith("tensor<1x"):
            found.add(operand)
    return sorted(found)

def arithmetic(ptx):
    loop = max(re.split(r"^\\$L__BB\\d+_\\d+:", ptx, flags=re.M), key=lambda block: block.count("ex2."))
    return sorted(collections.Counter(re.findall(r"\\b((?:fma|mul|add|sub|ex2|max)\\.[\\w.]*f32)", loop)).items())

cases = {case.config: case for case in compile_cases(90)}
for dtype in ("bf16", "fp32"):
    for config in (f"{dtype} second+logsumexp+entropy", f"{dtype} second+logsumexp+entropy split"):
        case = cases[config]
        source = ASTSource(case.fn, case.signature, constexprs=case.constexprs, attrs=_attributes(case))
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
        print(json.dumps([sums(code["ttgir"]), arithmetic(code["ptx"])]))
"""


def test_both_forms_compile_to_sums_over_the_same_layouts_and_to_the_same_arithmetic_in_the_loop():
    """The interpreter adds in one order whatever is compiled. On a GPU a sum over columns follows its layout, and the
    compiler fuses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "kernels"), str(root), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found[0] == found[1] and found[2] == found[3]
    assert all(len(sums) == 4 and sum(count for _, count in arithmetic) > 100 for sums, arithmetic in found)
    # Of the columns, registers and lanes are reduced first, and then the warps, all their sums at once.
    for sums, _ in found:
        columns, warps = sums[1], sums[3]
        assert columns.startswith("tensor<4x8x32xf32") and "register = [[1, 0, 0], [2, 0, 0]]" in columns
        assert re.search(r"lane = \[(\[0, 0, \d+\](, )?){5}\], warp = \[(\[0, \d, 0\](, )?){3}\]", columns)
        assert warps.count("tensor<8xf32, ") == 3
