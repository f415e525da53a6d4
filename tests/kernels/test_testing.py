"""What other tests and the check on a GPU rely on: memory that tells, bounds that hold, draws that may be compared."""

from __future__ import annotations

import math

import pytest
import torch

from dlm_kernels.testing import Failure, GuardedMemory, clear_draws, no_worse_than_torch, poisoned, same_bits

DTYPES = (
    torch.float32,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
)


@pytest.mark.parametrize("shift, beside_row", [(0, 5), (2, 5), (2, -1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_write_between_rows_is_seen_whatever_is_written(dtype: torch.dtype, shift: int, beside_row: int) -> None:
    for value in (0.0, math.nan) if dtype.is_floating_point else (0, 1):
        memory = GuardedMemory()
        rows = memory.spread(torch.ones(2, 3, 5).to(dtype), shift=shift)
        assert rows.stride() == (7 * 9, 9, 1) and (rows.float() == 1).all()
        memory.check()
        beside = rows.as_strided((1,), (1,), rows.storage_offset() + beside_row)
        if math.isnan(value):
            beside.view(torch.uint8).fill_(0xFF)  # a NaN, but not the one that lies there
        else:
            beside.fill_(value)
        if dtype == torch.bool and value:  # True is what lies there
            continue
        with pytest.raises(Failure, match="1 elements between the rows of a strided tensor were overwritten"):
            memory.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_torch_leaves_uninitialised_is_poisoned(dtype: torch.dtype) -> None:
    with poisoned(memory := GuardedMemory()):
        made = torch.empty(2, 3, dtype=dtype), torch.ones(1, dtype=dtype).new_empty(4)
    for tensor in made:
        assert tensor.isnan().all() if dtype.is_floating_point else (tensor != 0).all()
    assert len(memory.buffers) == 2
    memory.buffers[1][0][0] = 0
    with pytest.raises(Failure, match="1 bytes next to allocation 1"):
        memory.check()


def test_one_nan_is_as_good_as_another_only_if_that_is_asked_for() -> None:
    ours = torch.tensor([0x7FC00000, 0], dtype=torch.int32).view(torch.float32)
    other = torch.tensor([0x7FC00001, 0], dtype=torch.int32).view(torch.float32)
    same_bits("x", ours, other, any_nan=True)
    with pytest.raises(Failure, match="x: 1 of 2 differ, first at"):
        same_bits("x", ours, other)
    with pytest.raises(Failure, match="x: 1 of 1 differ"):
        same_bits("x", torch.tensor([0.0]), torch.tensor([-0.0]), any_nan=True)


def test_one_by_one_a_large_error_of_torchs_excuses_no_other_result() -> None:
    exact = torch.tensor([1.0, 1.0]).double()
    low, ours = torch.tensor([1.01, 1.0]), torch.tensor([1.0, 1.01])
    no_worse_than_torch("x", ours, low, exact)
    no_worse_than_torch("x", torch.tensor([1.015, 1.0]), low, exact, one_by_one=True)
    with pytest.raises(Failure, match="x: error 0.01 against float64"):
        no_worse_than_torch("x", ours, low, exact, one_by_one=True)


def test_without_half_steps_the_bound_is_torchs_error() -> None:
    exact = torch.tensor([1.75]).double()
    ours, low = torch.tensor([1.75 + 2**-10]).half(), torch.tensor([1.75]).half()
    no_worse_than_torch("x", ours, low, exact)
    with pytest.raises(Failure, match="x: error 0.000977 against float64, torch's largest is 0 "):
        no_worse_than_torch("x", ours, low, exact, half_steps=False)


def test_what_may_be_nan_may_be_and_nothing_else() -> None:
    exact = torch.tensor([1.0, 2.0, math.inf]).double()
    excused = torch.tensor([True, False, False])
    options = {"may_be_nan": excused, "half_steps": False}
    low = torch.tensor([math.nan, 2.0, math.nan])
    no_worse_than_torch("x", torch.tensor([math.nan, 2.0, math.nan]), low, exact, **options)
    with pytest.raises(Failure, match="1 of 3 are NaN or infinite and should not be"):
        no_worse_than_torch("x", torch.tensor([1.0, math.nan, math.nan]), low, exact, **options)
    with pytest.raises(Failure, match="1 of 3 are finite and should be NaN or infinite"):
        no_worse_than_torch("x", torch.tensor([1.0, 2.0, 3.0]), low, exact, **options)
    with pytest.raises(Failure, match="where not finite"):
        no_worse_than_torch("x", torch.tensor([1.0, 2.0, math.nan]), low, exact)
    # Of what is left, torch's error is 0; it is found by what the results are means of.
    ours = torch.tensor([math.nan, 2.001, math.nan]).half()
    with pytest.raises(Failure, match="x: error 0.00195"):
        no_worse_than_torch("x", ours, low.half(), exact, **options)
    no_worse_than_torch("x", ours, low.half(), exact, means_of=torch.tensor([4.0, math.nan]), **options)


def test_a_draw_is_clear_if_it_is_greedy_or_absent_or_won_by_a_margin() -> None:
    N, V = 6, 50
    call = {
        "logits": torch.randn(N, V),
        "rows": torch.tensor([0, 1, -1, 9, 2, 3], dtype=torch.int32),
        "sample_temperature": torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        "seed": torch.tensor([3]),
        "noise": torch.arange(3 * N, dtype=torch.int32).view(N, 3),
        "banned": torch.tensor([7]),
    }
    call["logits"][1, 7] = 100.0  # banned
    call["logits"][2, 11] = 100.0
    assert clear_draws(call)[[0, 2, 3, 4]].all()
    # The scores of two ids of one row, brought together.
    from dlm_kernels.reference import noise

    gumbel = noise.gumbel(noise.row_key(call["seed"], call["noise"]), torch.arange(V), torch.float64)
    call["logits"] = call["logits"].double()
    call["logits"][3, 4] = 90.0
    call["logits"][3, 5] = 90.0 + gumbel[5, 4] - gumbel[5, 5] + 5e-4
    assert not clear_draws(call)[5]
    assert clear_draws(call | {"banned": torch.tensor([4])})[5]
