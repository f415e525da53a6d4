"""`confidence` with what earlier steps left: a sparse bias on the logits, and the divergence from the previous
step's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dlm_kernels import reference
from dlm_kernels.reference.confidence import Confidence

pytest.importorskip("triton", reason="without Triton, the confidence kernel cannot be compared with its reference")
from confidence_cases import (
    COLUMNS,
    STATISTICS,
    assert_equals_reference,
    assert_identical,
    draws,
    everything,
    faster_interpreter,
    rows_of,
    run_kernel,
)

from dlm_kernels.confidence import launch as kernel

LN2, LN3 = math.log(2), math.log(3)
GROUP = 4  # fp32 logits of a column's load
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def fast():
    with faster_interpreter():
        yield


both = pytest.mark.parametrize("op", [reference.confidence, kernel.confidence], ids=["reference", "kernel"])


def biased(ids: list[list[int]], values: list[list[float]], device: torch.device) -> dict[str, Tensor]:
    return {
        "bias_ids": torch.tensor(ids, device=device),
        "bias": torch.tensor(values, device=device, dtype=torch.float32),
    }


def after(previous: Tensor, temperature: Tensor | None = None) -> dict[str, object]:
    """The arguments of "kl" after a step that had these logits."""
    scaled = previous.float() if temperature is None else previous.float() / temperature[:, None]
    return {"outputs": ("kl",), "previous": previous, "previous_logsumexp": scaled.logsumexp(1)}


@both
def test_a_bias_moves_logits_before_anything_else(op, device) -> None:
    logits = torch.tensor([[0, LN2, 0, 0], [0, LN2, 0, 0], [0, LN2, 0, 0]], device=device)
    bias = biased([[2, -1], [1, 9], [1, 3]], [[LN3, 7.0], [-2 * LN2, 7.0], [LN2, -math.inf]], device)
    query = torch.tensor([2, 1, 3], device=device)
    result = op(logits, outputs=(*STATISTICS, "query"), query=query, **bias)
    assert result.token.tolist() == [2, 0, 1]
    assert result.second_token.tolist() == [1, 2, 0]
    assert result.logit.tolist() == pytest.approx([LN3, 0, 2 * LN2])
    assert result.confidence.tolist() == pytest.approx([3 / 7, 2 / 7, 4 / 6])
    assert result.query_confidence.tolist() == pytest.approx([3 / 7, 1 / 7, 0])
    assert result.logsumexp.tolist() == pytest.approx([math.log(7), math.log(3.5), math.log(6)])
    assert result.entropy[2].item() == pytest.approx(math.log(6) - 4 / 6 * 2 * LN2)
    assert result.error.tolist() == [0, 0, 0]


@both
def test_kl_is_the_divergence_from_the_previous_step(op, device) -> None:
    logits = torch.tensor([[0, LN3], [0, LN3], [0, 0], [0, -math.inf], [0, LN3]], device=device)
    previous = torch.tensor([[0, 0], [0, LN3], [-math.inf, 0], [0, -math.inf], [1.0, 2.0]], device=device)
    logsumexp = torch.tensor([LN2, math.log(4), 0, 0, math.inf], device=device)
    result = op(logits, outputs=("kl",), previous=previous, previous_logsumexp=logsumexp)
    floored = 0.5 * (-LN2 - math.log(1e-12)) - 0.5 * LN2
    assert result.kl.tolist() == pytest.approx([0.75 * LN3 - LN2, 0, floored, 0, math.inf], abs=1e-6)
    assert (result.kl >= 0).all() and result.error.sum() == 0


@both
def test_kl_is_taken_at_the_temperature_and_with_the_bias(op, device) -> None:
    logits, previous = torch.tensor([[0, LN2]], device=device), torch.tensor([[0, 0.0]], device=device)
    temperature = torch.tensor([0.5], device=device)
    arguments = {"temperature": temperature, **after(previous, temperature)}
    assert op(logits, **arguments).kl.item() == pytest.approx(0.2 * math.log(0.4) + 0.8 * math.log(1.6))
    levelled = op(logits, **arguments, **biased([[1]], [[-LN2]], device))
    assert levelled.kl.item() == pytest.approx(0, abs=1e-6) and levelled.confidence.item() == pytest.approx(0.5)


@both
def test_a_bias_without_a_meaning_is_an_error_of_its_row_only(op, device) -> None:
    logits = torch.zeros(5, 9, device=device)
    ids = [[4, 1], [4, 1], [4, -1], [4, 9], [4, 1]]
    values = [[0, math.nan], [math.inf, 0], [0, math.nan], [0, math.inf], [2e30, 0]]
    result = op(logits, outputs=STATISTICS, **biased(ids, values, device))
    assert result.error.tolist() == [1, 1, 0, 0, 1]
    assert result.confidence[2:4].tolist() == pytest.approx([1 / 9, 1 / 9])


@both
def test_a_bias_cannot_make_a_token_of_minus_infinity_and_can_make_minus_infinity(op, device) -> None:
    logits = torch.tensor([[-math.inf, 1.0, 0.0], [-3e38, 1.0, 0.0], [2.0, 1.0, 0.0]], device=device)
    result = op(logits, **biased([[0], [0], [0]], [[1e29], [1e29], [-2e30]], device))
    assert result.token.tolist() == [1, 1, 1] and result.second_token.tolist() == [2, 2, 2]
    assert result.error.tolist() == [0, 0, 0]


@both
@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e31])
@pytest.mark.parametrize("where", [0, 150, 299])
def test_a_previous_row_that_is_no_distribution_gives_infinity_and_no_error(op, bad, where, soft_cap, device) -> None:
    logits = torch.zeros(4, 300, device=device)
    logits[1, where] = -math.inf  # probability 0 does not hide it
    previous = torch.zeros(4, 300, device=device)
    previous[1:3, where] = bad
    arguments = after(previous) | {
        "previous_logsumexp": torch.tensor([math.log(300), 1.0, 1.0, math.nan], device=device)
    }
    result = op(logits, soft_cap=soft_cap, **arguments)
    assert result.kl.tolist() == pytest.approx([0, math.inf, math.inf, math.inf], abs=1e-5)
    assert result.error.tolist() == [0, 0, 0, 0] and result.confidence[2].item() == pytest.approx(1 / 300)


@both
def test_previous_rows_that_are_not_needed_do_not_matter(op, device) -> None:
    logits, previous = torch.randn(3, 70, device=device), torch.full((3, 70), math.nan, device=device)
    previous[1] = logits[1]
    rows = torch.tensor([-1, 1, 3, 1], dtype=torch.int32, device=device)
    result = op(logits, rows=rows, **after(previous))
    assert result.error.tolist() == [0, 0, 1, 0]
    assert result.kl.tolist() == pytest.approx([0] * 4, abs=1e-5)


def dense_bias(bias_ids: Tensor, bias: Tensor, V: int) -> Tensor:
    """[N, V] the bias of every id; ids outside the vocabulary go to a last column that is cut off."""
    dense = torch.zeros(len(bias), V + 1, dtype=torch.float64)
    inside = (bias_ids >= 0) & (bias_ids < V)
    return dense.scatter_add(1, torch.where(inside, bias_ids, V), bias.double())[:, :V]


@pytest.mark.parametrize("V", [2, 97, 1025])
def test_reference_with_a_bias_equals_itself_on_biased_logits(V) -> None:
    N, K = 8, 5
    logits = torch.randn(N, V, dtype=torch.float64) * 3
    bias_ids, bias = torch.randint(-1, V + 2, (N, K)), torch.randn(N, K) * 5
    arguments = everything(N, V, torch.device("cpu")) | {"banned": torch.randint(V, (N, 1)), "soft_cap": 20.0}
    ours = reference.confidence(logits, bias_ids=bias_ids, bias=bias, **arguments)
    plain = reference.confidence(logits + dense_bias(bias_ids, bias, V), **arguments)
    for name in Confidence._fields:
        if getattr(ours, name) is not None:
            torch.testing.assert_close(getattr(ours, name), getattr(plain, name), msg=name)
    assert V == 2 or not torch.equal(ours.token, reference.confidence(logits, **arguments).token)


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_reference_kl_equals_dense_probabilities(soft_cap) -> None:
    N, V = 10, 300
    logits, previous = torch.randn(N, V, dtype=torch.float64) * 4, torch.randn(N, V, dtype=torch.float64) * 8
    logits[::3, 50:90] = previous[1::3, 80:120] = -math.inf
    temperature = torch.rand(N) + 0.5

    def probabilities(values: Tensor) -> Tensor:
        values = (
            values
            if soft_cap is None
            else torch.where(values.isinf(), values, soft_cap * torch.tanh(values / soft_cap))
        )
        return torch.softmax(values / temperature[:, None], 1)

    capped = (
        previous
        if soft_cap is None
        else torch.where(previous.isinf(), previous, soft_cap * torch.tanh(previous / soft_cap))
    )
    logsumexp = (capped / temperature[:, None]).logsumexp(1).float()
    ours = reference.confidence(
        logits,
        outputs=("kl",),
        temperature=temperature,
        soft_cap=soft_cap,
        previous=previous,
        previous_logsumexp=logsumexp,
    )
    p, q = probabilities(logits), probabilities(previous)
    expected = torch.special.xlogy(p, p).sum(1) - (p * q.clamp(min=1e-12).log()).sum(1)
    torch.testing.assert_close(ours.kl, expected, atol=1e-5, rtol=0, check_dtype=False)  # previous_logsumexp is fp32
    # KLASS's code has 1e-12 inside both logarithms and no floor: up to ln 2 apart where q is small, nowhere else.
    published = (p * ((p + 1e-12).log() - (q + 1e-12).log())).sum(1)
    assert ((ours.kl - published).abs() <= (p * (q < 1e-9)).sum(1) * LN2 + 1e-2 * published).all()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("V", [97, 1023, 1024, 1025, 4097])
def test_kernel_with_a_bias_equals_reference_across_tiles(V, columns, device) -> None:
    columns = 128 if V > 1025 and columns < 1024 else columns  # the interpreter pays per tile
    logits = torch.randn(4, V, device=device) * 4
    order = logits.topk(5).indices
    arguments = everything(4, V, device, greedy_every=2)
    arguments["banned"] = order[:, 4:].contiguous()
    bias_ids = torch.randint(-1, V, (4, 7), device=device)
    bias = torch.randn(4, 7, device=device)
    bias_ids[0, :3] = order[0, :3]  # the first falls behind the second
    bias[0, :3] = torch.tensor([-30.0, 0.0, 0.0])
    bias_ids[1, :3] = order[1, :3]  # the third passes both
    bias[1, :3] = torch.tensor([0.0, 0.0, 30.0])
    bias_ids[2, 0], bias[2, 0] = order[2, 4], 40.0  # a banned id gets the largest logit
    bias_ids[3, 6], bias[3, 6] = arguments["query"][3], 20.0
    arguments |= {"bias_ids": bias_ids, "bias": bias}
    ours = run_kernel(logits, columns, **arguments)
    assert ours.token[:3].tolist() == [order[0, 1], order[1, 2], ours.token[2]] and ours.token[2] != order[2, 4]
    assert ours.sampled_token[2] != order[2, 4] and ours.confidence[2] < 1e-3
    assert_equals_reference(ours, logits, **arguments)


@pytest.mark.parametrize("columns", COLUMNS)
def test_a_bias_on_either_side_of_every_boundary_is_found(columns, device) -> None:
    tile, V = columns * GROUP, 2 * max(COLUMNS) * GROUP + 5
    places = sorted(
        {place for edge in (0, tile, 2 * tile, V) for place in (edge - 1, edge, edge + GROUP) if 0 <= place < V}
    )
    places = torch.tensor(places, device=device)
    N = len(places)
    row = torch.zeros(1, V, device=device).expand(N, V)
    zeros = run_kernel(row, columns, bias_ids=places[:, None].contiguous(), bias=torch.full((N, 1), 2.0, device=device))
    assert torch.equal(zeros.token, places)
    assert torch.equal(zeros.second_token, (places == 0).long())
    assert zeros.confidence.tolist() == pytest.approx([math.exp(2) / (V - 1 + math.exp(2))] * N)
    # All of them at once: the lowest two of equal logits.
    together = run_kernel(
        row[:1], columns, bias_ids=places[None].contiguous(), bias=torch.full((1, N), 2.0, device=device)
    )
    assert [together.token.item(), together.second_token.item()] == places[:2].tolist()


@pytest.mark.parametrize("columns", COLUMNS)
def test_a_negative_bias_on_the_winner_leaves_its_group_lane_and_tile_intact(columns, device) -> None:
    logits = torch.zeros(1, 400, device=device)
    logits[0, 65], logits[0, 66], logits[0, 129], logits[0, 300] = 5.0, 4.0, 3.0, 2.0
    lowered = [(1, (66, 129)), (2, (129, 300)), (3, (300, 0))]
    for count, expected in lowered:
        bias = biased([[65, 66, 129][:count]], [[-6.0] * count], device)
        result = run_kernel(logits, columns, **bias)
        assert (result.token.item(), result.second_token.item()) == expected


def test_biases_of_no_id_change_nothing(device) -> None:
    logits, arguments = torch.randn(3, 700, device=device), everything(3, 700, device)
    nowhere = {
        "bias_ids": torch.tensor([[-1, 700]] * 3, device=device),
        "bias": torch.full((3, 2), math.nan, device=device),
    }
    ours, plain = run_kernel(logits, 16, **arguments, **nowhere), run_kernel(logits, 16, **arguments)
    for name in Confidence._fields:
        if getattr(plain, name) is not None:
            torch.testing.assert_close(getattr(ours, name), getattr(plain, name), msg=name)


def test_64_biases_and_repeated_ids_are_all_added(device) -> None:
    logits = torch.randn(2, 700, device=device)
    bias_ids = torch.stack([torch.randperm(700, device=device)[:64], torch.tensor([5, 600] * 32, device=device)])
    arguments = {"outputs": STATISTICS, "bias_ids": bias_ids, "bias": torch.rand(2, 64, device=device)}
    ours = run_kernel(logits, 16, **arguments)
    both_added = logits.double().cpu() + dense_bias(bias_ids.cpu(), arguments["bias"].cpu(), 700)
    assert ours.logit.tolist() == pytest.approx(both_added.amax(1).tolist())
    assert_equals_reference(ours, logits, **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_bias_is_added_in_fp32(dtype, device) -> None:
    logits = torch.full((1, 200), 64.0, device=device, dtype=dtype)
    result = run_kernel(logits, 16, **biased([[137]], [[2.0**-10]], device))
    assert result.token.item() == 137 and result.logit.item() == 64 + 2.0**-10


def test_a_bias_decides_what_is_drawn(device) -> None:
    N, V = 12, 300
    logits, arguments = torch.randn(N, V, device=device), draws(12, 300, 1.0, device)
    plain = run_kernel(logits, 16, **arguments).sampled_token
    wanted = torch.randint(V, (N, 1), device=device)
    ids = torch.cat((wanted, plain[:, None]), 1)
    raised = torch.tensor([[60.0, 0.0]] * N, device=device)
    assert torch.equal(run_kernel(logits, 16, bias_ids=ids, bias=raised, **arguments).sampled_token, wanted[:, 0])
    lowered = run_kernel(logits, 16, bias_ids=ids, bias=torch.tensor([[0.0, -60.0]] * N, device=device), **arguments)
    assert (lowered.sampled_token != plain).all()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("V", [2, 97, 1023, 1024, 1025, 4097])
def test_kernel_kl_equals_reference_across_tiles(V, columns, device) -> None:
    columns = 128 if V > 1025 and columns < 1024 else columns  # the interpreter pays per tile
    logits = torch.randn(4, V, device=device) * 4
    previous = logits.clone()
    previous[1] += 0.05 * torch.randn(V, device=device)
    previous[2], previous[3] = -logits[2], 0.0
    temperature = torch.rand(4, device=device) + 0.5
    arguments = everything(4, V, device) | {"temperature": temperature}
    arguments |= after(previous, temperature) | {"outputs": (*arguments["outputs"], "kl")}
    ours = run_kernel(logits, columns, **arguments)
    assert ours.kl[0] < 1e-4 and (ours.kl >= 0).all()
    assert_equals_reference(ours, logits, **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("soft_cap", [None, 2.0, 30.0])
def test_kernel_kl_equals_reference_with_hostile_values(dtype, soft_cap, device) -> None:
    logits, previous = (
        (torch.randn(6, 400, device=device) * 10).to(dtype),
        (torch.randn(6, 400, device=device) * 10).to(dtype),
    )
    logits[0, :390] = logits[1, 10:] = logits[2, ::2] = -math.inf
    previous[0, 395:] = previous[1, :200] = previous[3, ::3] = previous[4] = -math.inf
    previous[5, 7] = 300.0  # everything else lies below the floor
    arguments = after(previous) | {"soft_cap": soft_cap}
    ours = run_kernel(logits, 16, **arguments)
    assert (ours.kl == math.inf).tolist() == [False] * 4 + [True, False]
    assert_equals_reference(ours, logits, **arguments)


def test_a_small_divergence_is_not_lost_in_rounding(device) -> None:
    logits = torch.randn(4, 5000, device=device) * 3
    previous = logits + 0.01 * torch.randn(4, 5000, device=device)
    ours = run_kernel(logits, 64, **after(previous))
    exact = reference.confidence(logits.double(), **after(previous) | {"previous": previous.double()})
    assert ((ours.kl - exact.kl).abs() < 3e-6).all() and (exact.kl > 1e-5).all()


def test_previous_may_have_strides_of_its_own(device) -> None:
    logits, wide = torch.randn(3, 250, device=device), torch.full((3, 2, 300), math.nan, device=device)
    wide[:, 1, 7:257] = torch.randn(3, 250, device=device)
    view = wide[:, 1, 7:257]
    assert_identical(run_kernel(logits, 16, **after(view)), run_kernel(logits, 16, **after(view.contiguous())))


def test_rows_take_previous_by_row_and_bias_by_output(device) -> None:
    logits, previous = torch.randn(3, 300, device=device), torch.randn(3, 300, device=device)
    rows = torch.tensor([2, -1, 0, 2], dtype=torch.int32, device=device)
    bias = biased([[7], [8], [9], [10]], [[9.0], [9.5], [10.0], [11.0]], device)
    result = run_kernel(logits, 16, rows=rows, **after(previous), **bias)
    assert result.token.tolist() == [7, -1, 9, 10] and result.kl[1] == 0
    assert_equals_reference(result, logits, rows=rows, **after(previous), **bias)


def test_a_row_alone_equals_the_row_in_a_batch_bitwise_with_bias_and_kl(device) -> None:
    N, V = 4, 700
    logits, previous = torch.randn(N, V, device=device) * 3, torch.randn(N, V, device=device)
    arguments = everything(N, V, device)
    arguments |= after(previous, arguments["temperature"]) | {"outputs": (*arguments["outputs"], "kl")}
    arguments |= {"bias_ids": torch.randint(-1, V, (N, 6), device=device), "bias": torch.randn(N, 6, device=device) * 4}
    together = run_kernel(logits, 32, **arguments)
    for n in range(N):
        of_row = {
            name: value[n : n + 1] for name, value in arguments.items() if isinstance(value, Tensor) and name != "seed"
        }
        assert_identical(run_kernel(logits[n : n + 1], 32, **arguments | of_row), rows_of(together, slice(n, n + 1)))


def test_kl_does_not_depend_on_what_else_is_requested(device) -> None:
    logits, previous = torch.randn(3, 500, device=device), torch.randn(3, 500, device=device)
    alone = run_kernel(logits, 16, **after(previous))
    full = run_kernel(logits, 16, **after(previous) | {"outputs": (*STATISTICS, "kl")})
    assert torch.equal(alone.kl, full.kl) and torch.equal(alone.confidence, full.confidence)


BIAS = {"bias_ids": torch.zeros(2, 1, dtype=torch.int64), "bias": torch.zeros(2, 1)}
PREVIOUS = {"outputs": ("kl",), "previous": torch.zeros(2, 3), "previous_logsumexp": torch.zeros(2)}


@both
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bias_ids": BIAS["bias_ids"]}, ValueError, "must be given together, got bias_ids=torch.int64.*bias=None"),
        ({"bias": BIAS["bias"]}, ValueError, "bias_ids and bias must be given together, got bias_ids=None"),
        (BIAS | {"bias": torch.zeros(2, 2)}, ValueError, r"bias must have shape \(2, 1\), got \(2, 2\)"),
        (BIAS | {"bias_ids": torch.zeros(1, dtype=torch.int64)}, ValueError, "bias_ids must have shape"),
        (BIAS | {"bias_ids": torch.zeros(2, 1, dtype=torch.int32)}, TypeError, "bias_ids must be torch.int64"),
        (BIAS | {"bias": torch.zeros(2, 1, dtype=torch.float64)}, TypeError, "bias must be torch.float32"),
        (BIAS | {"bias": torch.zeros(1, 1).expand(2, 1)}, ValueError, "bias must be contiguous"),
        (
            {"bias_ids": torch.zeros(2, 0, dtype=torch.int64), "bias": torch.zeros(2, 0)},
            ValueError,
            "1 to 64 ids a row, got K=0",
        ),
        ({"bias_ids": torch.zeros(2, 65, dtype=torch.int64), "bias": torch.zeros(2, 65)}, ValueError, "got K=65"),
        ({"outputs": ("kl",)}, ValueError, "previous is required only with 'kl'"),
        (PREVIOUS | {"previous_logsumexp": None}, ValueError, "previous_logsumexp is required only with 'kl'"),
        (PREVIOUS | {"outputs": ()}, ValueError, "previous is used only with 'kl' in outputs"),
        (
            PREVIOUS | {"previous": torch.zeros(2, 3).half()},
            TypeError,
            "previous must have the logits' dtype torch.float32",
        ),
        (
            PREVIOUS | {"previous": torch.zeros(2, 4)},
            ValueError,
            r"previous must have the logits' shape \[2, 3\], got \[2, 4\]",
        ),
        (PREVIOUS | {"previous": torch.zeros(3, 2).T}, ValueError, "previous must have last stride 1"),
        (PREVIOUS | {"previous_logsumexp": torch.zeros(3)}, ValueError, "previous_logsumexp must have shape"),
    ],
)
def test_a_call_that_is_not_defined_is_refused(op, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        op(torch.zeros(2, 3), **arguments)
