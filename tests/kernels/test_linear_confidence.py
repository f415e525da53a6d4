"""`linear_confidence`: its reference is `confidence` of the product, the kernel is its reference, and no row depends on
another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dlm_kernels import reference

pytest.importorskip("triton", reason="without Triton, the kernel cannot be compared with its reference")
from confidence_cases import (
    FLOATS,
    STATISTICS,
    assert_equals_reference,
    assert_identical,
    everything,
    faster_interpreter,
    random_linear_case,
    recorded,
    rows_of,
    run_linear,
)

import dlm_kernels.linear_confidence as kernel
from dlm_kernels.tiles import (
    LINEAR_CONFIDENCE_PARTS,
    LinearConfidenceTile,
    linear_confidence_parts,
    linear_confidence_tile,
)

TILE = LinearConfidenceTile(BLOCK_M=4, BLOCK_V=16, BLOCK_H=16, num_warps=1, num_stages=1, part_tiles=2)
PART = TILE.BLOCK_V * TILE.part_tiles
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
both = pytest.mark.parametrize(
    "op", [reference.linear_confidence, kernel.linear_confidence], ids=["reference", "kernel"]
)


@pytest.fixture(autouse=True)
def fast():
    with faster_interpreter():
        yield


def quarters(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small multiples of 1/4: sums of their products are exact in fp32, in any order."""
    return (torch.randint(-6, 7, shape) / 4).to(device, dtype)


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.float() @ weight.float().T


@both
def test_hand_worked_rows(op, device):
    hidden = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], device=device)
    weight = torch.tensor([[0.0, math.log(2)], [math.log(3), 0.0], [0.0, 0.0]], device=device)
    result = op(hidden, weight, outputs=STATISTICS, banned=torch.tensor([2], device=device))
    assert result.token.tolist() == [1, 1, 0] and result.second_token.tolist() == [0, 0, 1]
    assert result.confidence.tolist() == pytest.approx([3 / 5, 3 / 6, 1 / 3])
    assert result.logsumexp.tolist() == pytest.approx([math.log(5), math.log(6), math.log(3)])


def test_the_reference_is_confidence_of_the_product_in_chunks_of_rows_and_ids(monkeypatch):
    import sys

    module = sys.modules["dlm_kernels.reference.linear_confidence"]
    monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    monkeypatch.setattr(module, "CHUNK_IDS", 7)
    for seed in range(12):
        hidden, weight, arguments = random_linear_case(seed)
        ours = reference.linear_confidence(hidden.double(), weight.double(), **arguments)
        assert_identical(ours, reference.confidence(hidden.double() @ weight.double().T, **arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("V", [1, 15, 17, PART - 1, PART, PART + 1, 2 * PART - 1, 2 * PART, 2 * PART + 1])
def test_kernel_equals_reference_off_by_one_from_every_boundary(V, dtype, device):
    hidden, weight = quarters(5, 33, device=device, dtype=dtype), quarters(V, 33, device=device, dtype=dtype)
    logits = product(hidden, weight)
    arguments = everything(5, V, device, greedy_every=2) | {
        "soft_cap": 20.0,
        "banned": torch.randint(-1, V, (5, 2), device=device),
    }
    arguments["banned"][0] = logits[0].topk(2).indices if V > 2 else -1
    result = run_linear(hidden, weight, TILE, **arguments)
    assert_equals_reference(result, logits, **arguments)
    for name, values in reference.linear_confidence(hidden, weight, **arguments)._asdict().items():
        if name in ("token", "second_token", "error"):
            assert torch.equal(getattr(result, name), values), name


@pytest.mark.parametrize("seed", range(16))
def test_kernel_equals_reference_on_random_calls(seed, device):
    hidden, weight, arguments = random_linear_case(seed, device)
    assert_equals_reference(run_linear(hidden, weight, TILE, **arguments), product(hidden, weight), **arguments)


def test_kernel_equals_reference_by_the_shipped_tile(device):
    for dtype in (torch.float16, torch.float32):
        hidden, weight = quarters(2, 80, device=device, dtype=dtype), quarters(1030, 80, device=device, dtype=dtype)
        result = run_linear(hidden, weight, outputs=STATISTICS)
        assert_equals_reference(result, product(hidden, weight), outputs=STATISTICS)


def test_logits_are_not_rounded_to_the_inputs_dtype(device):
    weight = torch.zeros(40, 2, device=device, dtype=torch.float16)
    weight[7, 0] = weight[30, 0] = 64.0
    weight[30, 1] = 2**-6
    hidden = torch.ones(1, 2, device=device, dtype=torch.float16)  # 64 and 64 + 1/64, the same number in fp16
    result = run_linear(hidden, weight, TILE)
    assert (result.token.item(), result.second_token.item(), result.logit.item()) == (30, 7, 64 + 2**-6)


def test_a_row_alone_equals_the_row_in_any_batch_bitwise(device):
    N, V = 9, 2 * PART + 3
    hidden, weight = torch.randn(N, 40, device=device), torch.randn(V, 40, device=device)
    arguments = everything(N, V, device)
    together = run_linear(hidden, weight, TILE, **arguments)
    order = torch.tensor([8, 3, 3, 0, 7, 5], device=device)
    for index in (torch.tensor([4], device=device), torch.tensor([8], device=device), order):
        some = {
            name: value[index] if isinstance(value, Tensor) and name != "seed" else value
            for name, value in arguments.items()
        }
        expected = rows_of(together, index)
        assert_identical(run_linear(hidden, weight, TILE, rows=index.int(), **some), expected)
        assert_identical(run_linear(hidden[index], weight, TILE, **some), expected)


def test_what_else_is_requested_changes_nothing(device):
    hidden, weight = torch.randn(3, 20, device=device), torch.randn(70, 20, device=device)
    arguments = everything(3, 70, device)
    full, lean = (
        run_linear(hidden, weight, TILE, **arguments),
        run_linear(hidden, weight, TILE, outputs=(), temperature=arguments["temperature"]),
    )
    assert torch.equal(full.token, lean.token) and torch.equal(full.confidence, lean.confidence)


def test_ties_across_tiles_and_parts_go_to_the_lowest_ids(device):
    V = 3 * PART
    weight = torch.zeros(V, 1, device=device)
    for tied in (
        (5, 6, 40),
        (TILE.BLOCK_V - 1, TILE.BLOCK_V),
        (PART - 1, PART, 2 * PART),
        (2 * PART + 17, 2 * PART + 18),
    ):
        weight[:] = 0.0
        weight[list(tied)] = 2.0
        result = run_linear(torch.ones(1, 1, device=device), weight, TILE)
        assert (result.token.item(), result.second_token.item()) == tied[:2]
    result = run_linear(torch.zeros(1, 1, device=device), weight, TILE)
    assert (result.token.item(), result.second_token.item()) == (0, 1)


def test_banned_winners_of_every_part_leave_the_next_ones(device):
    V = 3 * PART
    weight = torch.zeros(V, 1, device=device)
    first = torch.arange(0, V, PART, device=device) + 7
    weight[first, 0], weight[first + 1, 0] = 9.0, torch.tensor([1.0, 4.0, 2.0], device=device)
    result = run_linear(torch.ones(1, 1, device=device), weight, TILE, outputs=STATISTICS, banned=first)
    assert (result.token.item(), result.second_token.item()) == (PART + 8, 2 * PART + 8)
    assert_equals_reference(result, weight.T, outputs=STATISTICS, banned=first)


def test_logits_below_the_limit_count_as_minus_infinity_whole_parts_first(device):
    V = 2 * PART + 4
    weight, hidden = (
        torch.zeros(V, 2, device=device),
        torch.tensor([[2.0**60, 1.0], [0.0, 1.0], [-(2.0**60), 0.0]], device=device),
    )
    weight[: 2 * PART, 0], weight[2 * PART :, 1] = -(2.0**60), torch.arange(4.0, device=device)
    result = run_linear(hidden, weight, TILE, outputs=STATISTICS)
    assert result.token.tolist() == [V - 1, V - 1, 0] and result.error.tolist() == [0, 0, 1]
    assert_equals_reference(result, product(hidden, weight), outputs=STATISTICS)
    weight[:, 0] = -(2.0**60)
    assert run_linear(hidden, weight, TILE).error.tolist() == [1, 0, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_hidden_value_is_an_error_of_its_row_only(value, device):
    hidden, weight = quarters(6, 8, device=device), quarters(PART + 1, 8, device=device)
    hidden[2, 3] = value
    result = run_linear(hidden, weight, TILE, **everything(6, PART + 1, device))
    assert result.error.tolist() == [0, 0, 1, 0, 0, 0]
    assert all(getattr(result, name)[2] == 0 for name in FLOATS) and result.token[2] == result.sampled_token[2] == 0


def test_rows_that_are_not_needed_or_not_there_are_not_read(device):
    hidden, weight = torch.full((3, 8), math.nan, device=device), quarters(PART + 1, 8, device=device)
    hidden[1] = 1.0
    rows = torch.tensor(
        [-1, 1, 3, -4, -1, -1, -1, -1, -1], dtype=torch.int32, device=device
    )  # a tile that needs nothing, too
    result = run_linear(hidden, weight, TILE, rows=rows, **everything(9, PART + 1, device))
    assert result.error.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert result.token.tolist()[4:] == result.second_token.tolist()[4:] == [-1] * 5 and result.confidence[1] > 0


def test_strided_views_are_read_in_place(device):
    storage, weights = quarters(3, 2, 50, device=device), quarters(70, 30, device=device)
    hidden, weight = storage[:, 1, 5:25], weights[:, 7:27]
    strided, plain = run_linear(hidden, weight, TILE), run_linear(hidden.contiguous(), weight.contiguous(), TILE)
    assert_identical(strided, plain)


def test_two_launches_and_nothing_else_but_allocations(device):
    hidden, weight = torch.zeros(70, 8, device=device), torch.zeros(5000, 8, device=device)
    with recorded() as calls:
        kernel.linear_confidence(hidden, weight)
    assert calls == ["aten.empty"] * 9 + [
        "_linear_confidence_kernel",
        "_merge_kernel",
    ]  # 7 results, values and ids of the parts


def test_no_rows_launch_nothing(device):
    hidden, weight = torch.zeros(0, 8, device=device), torch.zeros(50, 8, device=device)
    with recorded() as calls:
        assert kernel.linear_confidence(hidden, weight).token.shape == (0,)
    assert set(calls) == {"aten.empty"}
    assert reference.linear_confidence(hidden, weight).token.shape == (0,)


@pytest.mark.parametrize("V", [1, 126464, 151936, 262144, 2**30 - 1])
def test_partials_are_a_small_share_of_the_logits(V):
    for itemsize in (2, 4):
        tile = linear_confidence_tile(itemsize)
        part_tiles, parts = linear_confidence_parts(V, tile)
        assert (
            parts - 1
        ) * part_tiles * tile.BLOCK_V < V <= parts * part_tiles * tile.BLOCK_V and parts <= LINEAR_CONFIDENCE_PARTS
        assert V == 1 or 13 * 4 * parts < 0.03 * itemsize * V


@both
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "linear_confidence: hidden must be one of"),
        (
            {"weight": torch.zeros(3, 4, dtype=torch.float16)},
            TypeError,
            "weight must have the dtype of hidden, torch.float32, got torch.float16",
        ),
        ({"hidden": torch.zeros(4)}, ValueError, r"hidden must be \[R, H\], got shape \[4\]"),
        (
            {"weight": torch.zeros(3, 5)},
            ValueError,
            r"hidden must be \[R, H\] and weight \[V, H\] .* got shapes \[2, 4\] and \[3, 5\]",
        ),
        ({"weight": torch.zeros(4, 3).T}, ValueError, "weight must have last stride 1"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "1 <= V"),
        (
            {"outputs": ("kl",)},
            ValueError,
            "'kl' needs the previous step's logits, which this op never writes: use confidence",
        ),
        ({"outputs": ("third",)}, ValueError, "outputs must be distinct names"),
        (
            {"outputs": ("sampled",)},
            ValueError,
            "linear_confidence: sample_temperature is required only with 'sampled'",
        ),
        ({"query": torch.zeros(2, dtype=torch.int64)}, ValueError, "query is used only with 'query'"),
        ({"banned": torch.zeros(33, dtype=torch.int64)}, ValueError, "at most 32"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, TypeError, "rows must be torch.int32"),
        ({"soft_cap": -1.0}, ValueError, "linear_confidence: soft_cap must be"),
        ({"bias": torch.zeros(2, 1)}, TypeError, "unexpected keyword argument 'bias'"),
        ({"top_k": 3}, TypeError, "unexpected keyword argument 'top_k'"),
    ],
)
def test_a_call_that_is_not_defined_is_refused(op, change, error, message):
    with pytest.raises(error, match=message):
        op(**{"hidden": torch.zeros(2, 4), "weight": torch.zeros(3, 4)} | change)


def test_the_kernel_refuses_float64():
    with pytest.raises(TypeError, match="hidden must be one of"):
        kernel.linear_confidence(torch.zeros(2, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64))
