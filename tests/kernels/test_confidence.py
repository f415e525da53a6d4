"""`confidence`: a hand-worked table, the reference against an independent transcription, the kernel against the
reference, properties."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from dlm_kernels import reference
from dlm_kernels.reference import noise as generator

triton = pytest.importorskip(
    "triton", reason="without Triton, the confidence kernel cannot be compared with its reference"
)
import triton.language as tl
from confidence_cases import (
    COLUMNS,
    FLOATS,
    STATISTICS,
    assert_equals_reference,
    assert_identical,
    draws,
    everything,
    faster_interpreter,
    random_case,
    rows_of,
    run_kernel,
)

from dlm_kernels.confidence import launch as kernel
from dlm_kernels.confidence import row as device_code

# NumPy, under the interpreter, warns of the infinities and NaNs of hostile rows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def fast():
    with faster_interpreter():
        yield


# Hand-worked.

LN2, LN3 = math.log(2), math.log(3)


@pytest.mark.parametrize("op", [reference.confidence, kernel.confidence])
def test_hand_worked_rows(op, device) -> None:
    logits = torch.tensor([[0, LN2, 0, 0], [LN3, LN3, 0, 0], [-math.inf, 0, -math.inf, -math.inf]], device=device)
    result = op(logits, outputs=STATISTICS)
    assert result.token.tolist() == [1, 0, 1]
    assert result.second_token.tolist() == [0, 1, -1]
    assert result.confidence.tolist() == pytest.approx([0.4, 0.375, 1.0])
    assert result.margin.tolist() == pytest.approx([0.2, 0.0, 1.0], abs=1e-6)
    assert result.logsumexp.tolist() == pytest.approx([math.log(5), math.log(8), 0.0], abs=1e-6)
    assert result.entropy.tolist() == pytest.approx([math.log(5) - 0.4 * LN2, math.log(8) - 0.75 * LN3, 0.0], abs=1e-6)
    assert result.second_logit[2] == -math.inf
    assert result.error.tolist() == [0, 0, 0]


@pytest.mark.parametrize("op", [reference.confidence, kernel.confidence])
def test_a_banned_id_cannot_win_but_stays_in_the_sum(op, device) -> None:
    logits = torch.tensor([[0, LN2, 0, LN3]], device=device)
    result = op(logits, outputs=STATISTICS, banned=torch.tensor([3, -1], device=device))
    assert (result.token.item(), result.second_token.item()) == (1, 0)
    assert result.confidence.item() == pytest.approx(2 / 7)
    assert result.logsumexp.item() == pytest.approx(math.log(7))


@pytest.mark.parametrize("op", [reference.confidence, kernel.confidence])
def test_temperature_changes_probabilities_and_not_logits(op, device) -> None:
    result = op(torch.tensor([[0, LN2, 0]], device=device), temperature=torch.tensor([0.5], device=device))
    assert result.confidence.item() == pytest.approx(4 / 6)
    assert result.logit.item() == pytest.approx(LN2)


@pytest.mark.parametrize("op", [reference.confidence, kernel.confidence])
@pytest.mark.parametrize(
    "row",
    [[math.nan, 1.0, 2.0], [1.0, math.inf, 2.0], [-math.inf] * 3, [1.0, 2.0, math.nan], [-3e38] * 3, [1.0, 3e38, 2.0]],
    ids=["nan first", "+inf", "all -inf", "nan last", "all finfo.min", "finite but too large"],
)
def test_a_row_without_a_meaning_is_zeros_and_an_error(op, row, device) -> None:
    logits = torch.tensor([row, [0.0, 1.0, 0.0]], device=device)
    result = op(logits, **everything(2, 3, device))
    assert result.error.tolist() == [1, 0]
    assert result.token[0] == result.sampled_token[0] == 0 and result.second_token[0] == -1
    assert all(getattr(result, name)[0] == 0 for name in FLOATS)
    assert result.token[1] == 1


@pytest.mark.parametrize("op", [reference.confidence, kernel.confidence])
def test_bad_values_on_the_device_are_errors_of_their_row_only(op, device) -> None:
    arguments = everything(6, 3, device)
    arguments["temperature"] = torch.tensor([1.0, 0.0, math.nan, 1.0, 1.0, 1.0], device=device)
    arguments["sample_temperature"] = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0, 0.0], device=device)
    arguments["query"] = torch.tensor([0, 0, 0, 0, 3, 2], device=device)
    rows = torch.tensor([2, 0, 0, 0, 0, 1], dtype=torch.int32, device=device)
    result = op(torch.zeros(2, 3, device=device), rows=rows, **arguments)
    assert result.error.tolist() == [1, 1, 1, 1, 1, 0]
    assert result.query_confidence[5].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("op", [reference.confidence, kernel.confidence])
def test_a_row_that_is_not_needed_is_not_read(op, device) -> None:
    logits = torch.full((2, 70), math.nan, device=device)
    logits[1] = 0.0
    rows = torch.tensor([-1, 1, -1], dtype=torch.int32, device=device)
    result = op(logits, rows=rows, **everything(3, 70, device))
    assert result.error.tolist() == [0, 0, 0]
    assert (
        result.token.tolist()[::2]
        == result.second_token.tolist()[::2]
        == result.sampled_token.tolist()[::2]
        == [-1, -1]
    )
    assert all(getattr(result, name).tolist()[::2] == [0, 0] for name in FLOATS)


# The reference equals an independent transcription.


def transcription(row: Tensor, banned: set[int], temperature: float) -> tuple[int, int, float, float, float, float]:
    """The definitions, one row at a time: softmax and a sort."""
    p = torch.softmax(row / temperature, 0)
    order = sorted(
        (i for i in range(len(row)) if i not in banned and row[i] > -math.inf), key=lambda i: (-row[i].item(), i)
    )
    first, second = order[0], order[1] if len(order) > 1 else -1
    entropy = -sum(value * math.log(value) for value in p.tolist() if value > 0)
    margin = p[first].item() - (p[second].item() if second >= 0 else 0.0)
    return first, second, p[first].item(), margin, entropy, torch.logsumexp(row / temperature, 0).item()


@pytest.mark.parametrize("V", [2, 97, 1025])
def test_reference_equals_softmax_and_a_sort(V) -> None:
    logits = (torch.randn(12, V, dtype=torch.float64) * 3).round(decimals=1)
    logits[::3, ::2] = -math.inf
    banned = torch.randint(-1, V - 1, (12, 3))
    temperature = torch.rand(12) + 0.5
    result = reference.confidence(logits, outputs=STATISTICS, banned=banned, temperature=temperature)
    for n in range(12):
        if result.error[n]:
            assert all(logits[n, v] == -math.inf or v in banned[n].tolist() for v in range(V))
            continue
        expected = transcription(logits[n], set(banned[n].tolist()), temperature[n].item())
        assert (result.token[n].item(), result.second_token[n].item()) == expected[:2]
        ours = (result.confidence[n], result.margin[n], result.entropy[n], result.logsumexp[n])
        assert [value.item() for value in ours] == pytest.approx(expected[2:], abs=1e-12)
    assert result.error.sum() < 6


def test_soft_cap_is_applied_before_the_temperature() -> None:
    logits = torch.randn(4, 50, dtype=torch.float64) * 40
    temperature = torch.full((4,), 0.5)
    capped = 30 * torch.tanh(logits / 30)
    ours = reference.confidence(logits, outputs=STATISTICS, temperature=temperature, soft_cap=30.0)
    plain = reference.confidence(capped, outputs=STATISTICS, temperature=temperature)
    assert torch.equal(ours.token, logits.argmax(1))
    for name in ("logit", "logsumexp", "entropy", "confidence", "margin"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name))


# The kernel equals the reference.


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("V", [2, 97, 1023, 1024, 1025, 4097])
def test_kernel_equals_reference_across_tiles(V, columns, device) -> None:
    columns = 128 if V > 1025 and columns < 1024 else columns  # the interpreter pays per tile
    logits = torch.randn(2, V, device=device) * 4
    arguments = everything(2, V, device, greedy_every=2) | {"banned": torch.randint(-1, V, (2, 2), device=device)}
    arguments["banned"][0] = logits[0].topk(2).indices if V > 2 else -1
    assert_equals_reference(run_kernel(logits, columns, **arguments), logits, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernel_equals_reference_on_a_real_vocabulary(dtype, device) -> None:
    logits = (torch.randn(2, 126464, device=device) * 3).to(dtype)
    logits[0, 126463] = 40.0
    logits[1, 126336] = 40.0
    arguments = {"outputs": STATISTICS, "banned": torch.tensor([126336], device=device)}
    assert_equals_reference(run_kernel(logits, **arguments), logits, **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_logits_are_upcast_and_never_rounded_to(dtype, device) -> None:
    logits = (torch.randn(3, 1025, device=device) * 4).to(dtype)
    ours = run_kernel(logits, 16, outputs=STATISTICS)
    assert_equals_reference(ours, logits, outputs=STATISTICS)
    assert torch.equal(ours.logit, logits.float().amax(1))


@pytest.mark.parametrize("soft_cap", [2.0, 30.0])
def test_kernel_equals_reference_with_a_soft_cap(soft_cap, device) -> None:
    logits = torch.randn(4, 300, device=device) * 20
    logits[1, 5:] = -math.inf
    arguments = everything(4, 300, device) | {"soft_cap": soft_cap}
    assert_equals_reference(run_kernel(logits, 16, **arguments), logits, **arguments)


@pytest.mark.parametrize("seed", range(24))
def test_kernel_equals_reference_on_random_calls(seed, device) -> None:
    logits, arguments = random_case(seed, device)
    assert_equals_reference(run_kernel(logits, COLUMNS[seed % 3], **arguments), logits, **arguments)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(
    ("tied", "expected"),
    [
        ((3, 5, 9), (3, 5)),
        ((1, 70), (1, 70)),
        ((70, 1, 300), (1, 70)),
        ((255, 256), (255, 256)),
        ((6, 70, 134), (6, 70)),
    ],
    ids=["in a group", "in tiles", "three tiles", "either side of a boundary", "one column, three tiles"],
)
def test_ties_go_to_the_lowest_ids_within_and_across_tiles(tied, expected, columns, device) -> None:
    logits = torch.zeros(1, 400, device=device)
    logits[0, list(tied)] = 2.0
    result = run_kernel(logits, columns)
    assert (result.token.item(), result.second_token.item()) == expected
    assert result.margin.item() == 0


# Values that differ in few bits or compare as equal: zeros of both signs, denormals, the least normal numbers.
NEIGHBOURS = (-0.0, 0.0, 1e-45, -1e-45, 3e-45, 1e-39, -1e-39, 1.1754944e-38, -1.1754944e-38, -math.inf, 1.0, 1.0000001)


@pytest.mark.parametrize("split", [False, True], ids=["unsplit", "split"])
@pytest.mark.parametrize("num_warps", [1, 2, 4])
def test_equal_and_almost_equal_logits_are_ordered_as_a_stable_sort_orders_them(num_warps, split, device) -> None:
    values = torch.tensor(NEIGHBOURS, device=device)
    logits = values[torch.randint(0, len(NEIGHBOURS), (12, 200))]
    for n in range(len(NEIGHBOURS)):  # the n largest values are met in few rows
        logits[n] = torch.where(logits[n] > values.sort().values[n], -math.inf, logits[n])
    logits[2, 77], logits[3, :] = -0.0, -0.0
    result = run_kernel(logits, 16, part_tiles=2, num_warps=num_warps, split=split, outputs=STATISTICS)
    order = logits.sort(dim=1, descending=True, stable=True).indices
    fails = logits.amax(1) == -math.inf
    assert result.error.tolist() == fails.int().tolist() and not fails.all()
    assert torch.equal(result.token[~fails], order[~fails, 0])
    two = ~fails & ((logits > -math.inf).sum(1) > 1)
    assert torch.equal(result.second_token[two], order[two, 1])
    assert_equals_reference(result, logits, outputs=STATISTICS)


@pytest.mark.parametrize("columns", COLUMNS)
def test_a_row_of_equal_logits_gives_ids_0_and_1(columns, device) -> None:
    result = run_kernel(torch.full((1, 500), -1.5, device=device), columns, outputs=STATISTICS)
    assert (result.token.item(), result.second_token.item()) == (0, 1)
    assert result.entropy.item() == pytest.approx(math.log(500))


@pytest.mark.parametrize("columns", COLUMNS)
def test_the_32_largest_banned_leave_the_33rd_and_34th(columns, device) -> None:
    logits = torch.randn(1, 1025, device=device)
    logits[0, 64:72] += 10  # whole groups of banned ids
    order = logits[0].topk(34).indices
    result = run_kernel(logits, columns, banned=order[:32].clone())
    assert [result.token.item(), result.second_token.item()] == order[32:].tolist()


@pytest.mark.parametrize("split", [False, True], ids=["unsplit", "split"])
def test_any_number_of_banned_ids_leaves_the_next_two(split, device) -> None:
    logits = torch.randn(1, 300, device=device)
    order = logits[0].sort(descending=True).indices
    for number in range(33):
        # The largest, the largest but the winner, or every second one, in any order, among ids that ban nothing.
        largest = (order[:number], order[1 : number + 1], order[: 2 * number : 2])[number % 3]
        banned = largest[torch.randperm(number)]
        banned[number // 3 : number // 2] = (-1, 300, 2**40)[number % 3]
        left = [v for v in order.tolist() if v not in banned.tolist()]
        result = run_kernel(logits, 64, part_tiles=1, num_warps=2, split=split, banned=banned)
        assert [result.token.item(), result.second_token.item()] == left[:2]


@pytest.mark.parametrize("columns", COLUMNS)
def test_a_banned_maximum_hides_nothing_in_its_group_or_lane(columns, device) -> None:
    logits = torch.zeros(2, 400, device=device)
    logits[:, 65], logits[:, 66], logits[:, 129] = (
        5.0,
        4.0,
        3.0,
    )  # 65 and 66 in one group; 129 in the same column at 16 columns
    banned = torch.tensor([[65, -1], [65, 66]], device=device)
    result = run_kernel(logits, columns, banned=banned)
    assert result.token.tolist() == [66, 129]
    assert result.second_token.tolist() == [129, 0]


def test_everything_banned_is_an_error(device) -> None:
    arguments = {"banned": torch.arange(5, device=device), "outputs": STATISTICS}
    result = run_kernel(torch.zeros(1, 5, device=device), **arguments)
    assert result.error.item() == 1 and result.confidence.item() == 0
    assert_identical(result, reference.confidence(torch.zeros(1, 5, device=device), **arguments))


def test_whole_tiles_of_minus_infinity_before_the_first_logit_change_nothing(device) -> None:
    logits = torch.full((2, 400), -math.inf, device=device)
    logits[0, 390:] = torch.arange(10.0)
    logits[1, 399] = -500.0
    result = run_kernel(logits, 16, outputs=STATISTICS)
    assert result.token.tolist() == [399, 399] and result.second_token.tolist() == [398, -1]
    assert result.confidence[1] == 1 and result.entropy[1] == 0
    assert_equals_reference(result, logits, outputs=STATISTICS)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("where", [0, 200, 399])
def test_one_bad_logit_anywhere_is_found(value, where, device) -> None:
    logits = torch.randn(2, 400, device=device)
    logits[1, where] = value
    result = run_kernel(logits, 16, banned=torch.tensor([where], device=device))
    assert result.error.tolist() == [0, 1] and result.confidence[1] == 0


# Layout: strides, rows, batches.


def test_strided_rows_are_read_in_place(device) -> None:
    storage = torch.randn(3, 2, 300, device=device)
    view = storage[:, 1, 7:260]
    assert_identical(run_kernel(view, 16), run_kernel(view.contiguous(), 16))


def test_one_row_expanded_is_every_row(device) -> None:
    row = torch.randn(1, 130, device=device)
    assert run_kernel(row.expand(3, 130), 16).token.tolist() == [row.argmax().item()] * 3


def test_rows_select_repeat_and_skip(device) -> None:
    logits = torch.randn(4, 300, device=device)
    rows = torch.tensor([2, -1, 0, 2], dtype=torch.int32, device=device)
    result = run_kernel(logits, 16, rows=rows)
    all_rows = run_kernel(logits, 16)
    assert torch.equal(result.confidence[[0, 2, 3]], all_rows.confidence[[2, 0, 2]])
    assert result.token[1] == -1 and result.confidence[1] == 0


def test_a_row_alone_equals_the_row_in_a_batch_bitwise(device) -> None:
    logits = torch.randn(4, 700, device=device) * 3
    arguments = everything(4, 700, device)
    together = run_kernel(logits, 32, **arguments)
    for n in range(4):
        alone = {
            name: value[n : n + 1] if isinstance(value, Tensor) and name != "seed" else value
            for name, value in arguments.items()
        }
        assert_identical(run_kernel(logits[n : n + 1], 32, **alone), rows_of(together, slice(n, n + 1)))


def test_a_result_does_not_depend_on_what_else_is_requested(device) -> None:
    logits = torch.randn(3, 500, device=device)
    arguments = everything(3, 500, device)
    full = run_kernel(logits, 16, **arguments)
    lean = run_kernel(logits, 16, outputs=(), temperature=arguments["temperature"])
    assert torch.equal(lean.confidence, full.confidence) and torch.equal(lean.token, full.token)


def test_adding_a_power_of_two_to_the_logits_changes_only_logits(device) -> None:
    logits = (torch.randn(3, 500, device=device) * 8).round() / 8
    a, b = run_kernel(logits, 16, outputs=STATISTICS), run_kernel(logits + 16, 16, outputs=STATISTICS)
    assert torch.equal(a.token, b.token) and torch.equal(a.second_token, b.second_token)
    for name in ("confidence", "margin", "entropy"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-6)


def test_a_certain_token_has_confidence_exactly_one(device) -> None:
    logits = torch.zeros(2, 300, device=device)
    logits[0, 7], logits[1, 299] = 200.0, 123.456
    result = run_kernel(logits, 16, outputs=STATISTICS, temperature=torch.tensor([1.0, 0.7], device=device))
    assert result.confidence.tolist() == result.margin.tolist() == [1, 1]
    assert result.entropy.tolist() == pytest.approx([0, 0], abs=1e-6) and (result.entropy >= 0).all()


def test_no_rows_launch_nothing(device) -> None:
    result = run_kernel(torch.zeros(0, 10, device=device))
    assert result.token.shape == result.confidence.shape == (0,)


# Noise.


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_equals_the_known_answers_of_random123(counter, key, expected) -> None:
    assert generator.philox_4x32_10(torch.tensor(counter), torch.tensor(key)).tolist() == expected


def test_token_bits_equal_the_murmur3_finaliser_in_python_integers() -> None:
    def fmix32(h: int) -> int:
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    assert fmix32(1) == 0x514E28B7  # known answer
    key, ids = torch.tensor([[0xFFFFFFFF, 0xDEADBEEF], [3, 0]]), torch.tensor([0, 1, 126463, 2**30])
    expected = [[fmix32((fmix32(v ^ k0) + k1) % 2**32) for v in ids.tolist()] for k0, k1 in key.tolist()]
    assert generator.bits(key, ids).tolist() == expected


@triton.jit
def _bits_kernel(seed_ptr, seed_stride, noise_ptr, bits_ptr, uniform_ptr, V, BLOCK_V: tl.constexpr):
    n = tl.program_id(0)
    ids = tl.arange(0, BLOCK_V)
    k0, k1 = device_code._noise_key(seed_ptr, seed_stride, noise_ptr, n)
    tl.store(bits_ptr + n * V + ids, device_code._noise_bits(ids, k0, k1).to(tl.int64), mask=ids < V)
    tl.store(uniform_ptr + n * V + ids, device_code._uniform(ids, k0, k1), mask=ids < V)


@pytest.mark.parametrize("seed", [[0], [-1], [0x123456789ABCDEF0], [7, -(2**63), 0x123456789ABCDEF0]])
def test_the_kernels_random_bits_and_uniforms_equal_the_references(seed, device) -> None:
    seed = torch.tensor(seed, device=device)
    noise = torch.tensor([[0, 0, 0], [1, 2, 3], [-1, 2**31 - 1, -(2**31)]], dtype=torch.int32, device=device)
    bits = torch.empty(3, 1000, dtype=torch.int64, device=device)
    uniform = torch.empty(3, 1000, device=device)
    _bits_kernel[(3,)](seed, int(len(seed) > 1), noise, bits, uniform, 1000, BLOCK_V=1024)
    key, ids = generator.row_key(seed, noise), torch.arange(1000, device=device)
    assert torch.equal(bits, generator.bits(key, ids))
    assert torch.equal(uniform, generator.uniform(key, ids))


def test_uniforms_are_exact_in_fp32_and_strictly_between_0_and_1() -> None:
    words = torch.tensor([0, 1, 511, 512, 0xFFFFFFFF, 0x7FFFFFFF])
    single, double = (generator._to_unit_interval(words, dtype) for dtype in (torch.float32, torch.float64))
    assert torch.equal(single.double(), double)
    assert single.min() == 2**-24 and single.max() == 1 - 2**-24


def test_uniforms_pass_a_chi_square_along_ids_rows_and_steps() -> None:
    N, V = 512, 256
    rows = torch.arange(N, dtype=torch.int32)
    for column in range(3):
        noise = torch.zeros(N, 3, dtype=torch.int32)
        noise[:, column] = rows
        values = generator.uniform(generator.row_key(torch.tensor([7]), noise), torch.arange(V))
        assert abs(values.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / values.numel())
        counts = torch.bincount((values * 64).long().flatten(), minlength=64).double()
        chi_square = ((counts - N * V / 64) ** 2 / (N * V / 64)).sum().item()
        assert 20 < chi_square < 120  # 63 degrees of freedom: mean 63, standard deviation 11
        assert abs(torch.corrcoef(torch.stack((values[:, :-1].flatten(), values[:, 1:].flatten())))[0, 1]) < 0.012


def test_gumbel_noise_has_the_mean_and_variance_of_its_law() -> None:
    noise = torch.zeros(256, 3, dtype=torch.int32)
    noise[:, 1] = torch.arange(256)
    values = generator.gumbel(generator.row_key(torch.tensor([3]), noise), torch.arange(512))
    assert values.mean().item() == pytest.approx(0.5772, abs=0.015)
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=0.04)
    assert values.isfinite().all()


def test_order_scores_are_uniform_and_not_the_token_noise() -> None:
    seed, noise = torch.tensor([11]), torch.zeros(4096, 3, dtype=torch.int32)
    noise[:, 1] = torch.arange(4096)
    scores = generator.uniform_scores(seed, noise)
    assert scores.dtype == torch.float32 and 0 < scores.min() and scores.max() < 1
    counts = torch.bincount((scores * 16).long(), minlength=16).double()
    assert ((counts - 256) ** 2 / 256).sum().item() < 45  # 15 degrees of freedom
    assert not torch.isin(
        generator._row_words(seed, noise, generator.ORDER_STREAM)[:, 0], generator.row_key(seed, noise)
    ).any()


# Sampling.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_frequencies_are_the_softmax(temperature) -> None:
    N, logits = 20000, torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    result = reference.confidence(logits.expand(N, 5), banned=torch.tensor([3]), **draws(N, 5, temperature))
    allowed = torch.tensor([0, 1, 2, 4])
    expected = torch.zeros(5).index_copy(0, allowed, torch.softmax(logits[allowed] / temperature, 0))
    frequency = torch.bincount(result.sampled_token, minlength=5) / N
    assert (frequency - expected).abs().max() < 0.015 and frequency[3] == 0


def test_kernel_samples_what_the_reference_samples(device) -> None:
    N, V = 40, 97
    logits = torch.randn(N, V, device=device) * 2
    arguments = draws(N, V, 0.8, device) | {"banned": logits.argmax(1)[:, None].contiguous()}
    ours = run_kernel(logits, 16, **arguments)
    noise = generator.gumbel(
        generator.row_key(arguments["seed"], arguments["noise"]), torch.arange(V, device=device), torch.float64
    )
    best = (logits.double() / 0.8 + noise).scatter(1, arguments["banned"], -math.inf).topk(2)
    clear = best.values[:, 0] - best.values[:, 1] > 1e-4
    assert torch.equal(ours.sampled_token[clear], best.indices[clear, 0]) and clear.sum() >= 0.99 * N
    assert ours.sampled_token.unique().numel() > 20


@pytest.mark.parametrize("columns", COLUMNS)
def test_draws_do_not_depend_on_the_tile_or_the_batch(columns, device) -> None:
    logits = torch.randn(4, 700, device=device)
    arguments = everything(4, 700, device)
    order = torch.tensor([3, 1, 0], device=device)
    some = {
        name: value[order] if isinstance(value, Tensor) and name != "seed" else value
        for name, value in arguments.items()
    }
    expected = run_kernel(logits, 128, **arguments).sampled_token[order]
    assert torch.equal(run_kernel(logits, columns, rows=order.int(), **some).sampled_token, expected)


def test_zero_sampling_temperature_is_the_token_itself(device) -> None:
    logits = torch.randn(4, 300, device=device)
    result = run_kernel(logits, 16, **draws(4, 300, 0.0, device))
    assert torch.equal(result.sampled_token, result.token) and torch.equal(result.sampled_confidence, result.confidence)


def test_another_seed_position_step_or_request_draws_anew(device) -> None:
    logits = torch.zeros(4, 1000, device=device)
    arguments = draws(4, 1000, 1.0, device)
    arguments["noise"] = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.int32, device=device)
    first = run_kernel(logits, 64, **arguments).sampled_token.tolist()
    other = run_kernel(logits, 64, **arguments | {"seed": torch.tensor([6], device=device)}).sampled_token.tolist()
    assert len(set(first + other)) == 8


RUNS = {
    "reference": reference.confidence,
    "split": functools.partial(run_kernel, columns=16),
    "whole": functools.partial(run_kernel, columns=64),
}
runs = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


@runs
def test_as_many_equal_seeds_are_one_seed(run, device) -> None:
    logits, arguments = torch.randn(5, 300, device=device), everything(5, 300, device)
    each = arguments | {"seed": arguments["seed"].repeat(5)}
    assert_identical(run(logits, **each), run(logits, **arguments))


@runs
def test_an_output_draws_by_its_own_seed(run, device) -> None:
    """The seeds, like the noise, have an output's place and not a logits row's."""
    logits = torch.randn(3, 300, device=device) * 0.1
    arguments = everything(5, 300, device) | {
        "rows": torch.tensor([2, -1, 0, 0, 1], dtype=torch.int32, device=device),
        "seed": torch.tensor([5, 6, -1, 0x123456789ABCDEF0, -(2**63)], device=device),
    }
    together = run(logits, **arguments)
    for n in range(5):
        alone = {name: value[n : n + 1] if isinstance(value, Tensor) else value for name, value in arguments.items()}
        assert_identical(run(logits, **alone), rows_of(together, slice(n, n + 1)))


@runs
def test_rows_that_differ_in_their_seed_alone_draw_anew(run, device) -> None:
    arguments = draws(8, 1000, 1.0, device) | {"noise": torch.zeros(8, 3, dtype=torch.int32, device=device)}
    # Some differ in the upper half alone.
    seeds = torch.tensor([0, 1, -1, 2**32, 2**33, 2**63 - 1, -(2**63), -(2**32)], device=device)
    drawn = run(torch.zeros(8, 1000, device=device), **arguments | {"seed": seeds}).sampled_token
    assert drawn.unique().numel() == 8


@runs
@pytest.mark.parametrize("seeds", [0, 1])
def test_no_rows_take_no_seed_or_one(run, seeds, device) -> None:
    arguments = draws(0, 10, 1.0, device) | {"seed": torch.zeros(seeds, dtype=torch.int64, device=device)}
    assert run(torch.zeros(0, 10, device=device), **arguments).sampled_token.shape == (0,)


# Refusals.


@pytest.mark.parametrize("op", [reference.confidence, kernel.confidence])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "logits must be one of"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits must be \[R, V\]"),
        ({"logits": torch.zeros(3, 2).T}, ValueError, "last stride 1"),
        ({"outputs": ("third",)}, ValueError, "outputs must be distinct names"),
        ({"outputs": "second"}, ValueError, "outputs must be distinct names"),
        ({"outputs": ("sampled",)}, ValueError, "sample_temperature is required"),
        ({"seed": torch.tensor([1])}, ValueError, "seed is used only with 'sampled'"),
        ({"outputs": ("query",)}, ValueError, "query is required"),
        ({"banned": torch.zeros(33, dtype=torch.int64)}, ValueError, "at most 32"),
        ({"banned": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "banned must have shape"),
        ({"banned": torch.zeros(1, dtype=torch.int32)}, TypeError, "banned must be torch.int64"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, TypeError, "rows must be torch.int32"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must have shape"),
        ({"temperature": torch.ones(4)[::2]}, ValueError, "temperature must be contiguous"),
        ({"soft_cap": 0.0}, ValueError, "soft_cap must be"),
        ({"soft_cap": True}, ValueError, "soft_cap must be"),
    ],
)
def test_a_call_that_is_not_defined_is_refused(op, change, error, message) -> None:
    with pytest.raises(error, match=message):
        op(**{"logits": torch.zeros(2, 3)} | change)


@pytest.mark.parametrize("op", [reference.confidence, kernel.confidence])
@pytest.mark.parametrize(
    ("N", "seed", "error", "message"),
    [
        (2, torch.zeros(3, dtype=torch.int64), ValueError, r"shape \(1,\) or \(2,\), got \(3,\) \(N = 2\)"),
        (2, torch.zeros(0, dtype=torch.int64), ValueError, r"shape \(1,\) or \(2,\), got \(0,\) \(N = 2\)"),
        (2, torch.zeros(2, 1, dtype=torch.int64), ValueError, r"shape \(1,\) or \(2,\), got \(2, 1\) \(N = 2\)"),
        (1, torch.zeros(2, dtype=torch.int64), ValueError, r"shape \(1,\), got \(2,\) \(N = 1\)"),
        (2, torch.zeros(4, dtype=torch.int64)[::2], ValueError, r"contiguous, got strides \(2,\)"),
        (2, torch.zeros(1, dtype=torch.int64).expand(2), ValueError, r"contiguous, got strides \(0,\)"),
        (2, torch.zeros(2, dtype=torch.int32), TypeError, "torch.int64, got torch.int32"),
    ],
)
def test_seeds_that_are_neither_one_nor_one_for_each_output_are_refused(op, N, seed, error, message) -> None:
    # As many logits rows as there are wrong seeds: outputs count, not those.
    rows = torch.zeros(N, dtype=torch.int32)
    with pytest.raises(error, match=f"^confidence: seed must (be|have) {message}"):
        op(torch.zeros(3, 5), rows=rows, **draws(N, 5, 1.0) | {"seed": seed})


def test_the_kernel_refuses_float64() -> None:
    with pytest.raises(TypeError, match="logits must be one of"):
        kernel.confidence(torch.zeros(2, 3, dtype=torch.float64))
