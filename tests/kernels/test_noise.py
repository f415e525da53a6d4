"""`uniform_scores`: kernel against reference, bit for bit; its numbers are tested in test_confidence.py."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from dlm_kernels import reference
from dlm_kernels.testing import GuardedMemory, poisoned, same_bits
from dlm_kernels.tiles import NOISE_TILE

pytest.importorskip("triton", reason="without Triton there is no kernel to compare with the reference")

from dlm_kernels.noise import launch as noise

BLOCK_N = NOISE_TILE[0]
OPS = pytest.mark.parametrize("op", [reference.uniform_scores, noise.uniform_scores], ids=["reference", "kernel"])
EXTREMES = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)


def counters(N: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[N, 3] random counters, every third number an extreme one."""
    generator = torch.Generator().manual_seed(N)
    drawn = torch.randint(-(2**31), 2**31, (N, 3), generator=generator).int()
    extreme = EXTREMES[torch.randint(0, len(EXTREMES), (N, 3), generator=generator)]
    return torch.where(torch.rand(N, 3, generator=generator) < 1 / 3, extreme, drawn).to(device)


def seeds_of(N: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[N] random seeds, the first ones extreme."""
    drawn = torch.randint(-(2**62), 2**62, (N,), generator=torch.Generator().manual_seed(N))
    extremes = torch.tensor([-(2**63), -1, 0, 2**63 - 1])[:N]
    return torch.cat([extremes, drawn[len(extremes) :]]).to(device)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 0x123456789ABCDEF0, "each"])
@pytest.mark.parametrize("N", [1, BLOCK_N - 1, BLOCK_N, BLOCK_N + 1, 3 * BLOCK_N + 5])
def test_the_kernel_equals_the_reference_and_touches_nothing_else(N, seed, device):
    seeds = seeds_of(N, device) if seed == "each" else torch.tensor([seed], device=device)
    drawn = counters(N, device)
    memory = GuardedMemory()
    ours = memory.copy(seeds), memory.copy(drawn)
    with poisoned(memory):
        scores = noise.uniform_scores(*ours)
    memory.check()
    same_bits("scores", scores, reference.uniform_scores(seeds, drawn))
    same_bits("seed (an input)", ours[0], seeds)
    same_bits("noise (an input)", ours[1], drawn)


@OPS
def test_a_number_is_a_function_of_its_counter_alone(op, device):
    seed, drawn = torch.tensor([7], device=device), counters(BLOCK_N + 9, device)
    scores = op(seed, drawn)
    assert ((scores > 0) & (scores < 1)).all()
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0)).to(device)
    same_bits("shuffled", op(seed, drawn[order]), scores[order])
    same_bits("alone", op(seed, drawn[5:6]), scores[5:6])


@OPS
def test_a_number_is_drawn_by_its_own_seed(op, device):
    N = BLOCK_N + 9
    seeds, drawn = seeds_of(N, device), counters(N, device)
    scores = op(seeds, drawn)
    for n in (0, 5, BLOCK_N - 1, BLOCK_N, N - 1):
        same_bits("alone", op(seeds[n : n + 1], drawn[n : n + 1]), scores[n : n + 1])
        same_bits("by one seed", op(seeds[n : n + 1], drawn)[n], scores[n])
    assert len(set(op(seeds, drawn[:1].repeat(N, 1)).tolist())) > N - 3


@OPS
def test_as_many_equal_seeds_are_one_seed(op, device):
    seed, drawn = torch.tensor([0x123456789ABCDEF0], device=device), counters(BLOCK_N + 9, device)
    same_bits("scores", op(seed.repeat(len(drawn)), drawn), op(seed, drawn))


@OPS
@pytest.mark.parametrize("seeds", [0, 1])
def test_no_counters_give_no_numbers(op, seeds):
    assert op(torch.zeros(seeds, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int32)).shape == (0,)


def test_the_op_is_one_launch_and_one_allocation(device):
    seed, drawn, launches = torch.tensor([7], device=device), counters(BLOCK_N + 1, device), []
    kernel, counted = noise.uniform_scores_kernel, mock.MagicMock()
    counted.__getitem__.side_effect = lambda grid: launches.append(grid) or kernel[grid]
    allocations = mock.patch.object(torch, "empty", side_effect=torch.empty)
    with mock.patch.object(noise, "uniform_scores_kernel", counted), allocations as empty:
        noise.uniform_scores(seed, drawn)
    assert launches == [(2,)] and empty.call_count == 1


ERRORS = [
    ({"seed": torch.zeros(1)}, TypeError, "seed must be torch.int64, got torch.float32"),
    (
        {"seed": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        r"seed must have shape \(1,\) or \(2,\), got \(3,\) \(N = 2\)",
    ),
    ({"seed": torch.zeros(0, dtype=torch.int64)}, ValueError, r"seed must have shape \(1,\) or \(2,\), got \(0,\)"),
    ({"seed": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"seed must have shape .*, got \(2, 1\)"),
    (
        {"seed": torch.zeros(2, dtype=torch.int64), "noise": torch.zeros(1, 3, dtype=torch.int32)},
        ValueError,
        r"seed must have shape \(1,\), got \(2,\) \(N = 1\)",
    ),
    ({"seed": torch.zeros(4, dtype=torch.int64)[::2]}, ValueError, r"seed must be contiguous, got strides \(2,\)"),
    (
        {"seed": torch.zeros(1, dtype=torch.int64, device="meta")},
        ValueError,
        "seed must be on cpu like noise, got meta",
    ),
    ({"noise": torch.zeros(2, 3)}, TypeError, "noise must be torch.int32, got torch.float32"),
    ({"noise": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, r"noise must be \[N, 3\], got shape \(2, 4\)"),
    (
        {"noise": torch.zeros(3, 2, dtype=torch.int32).t()},
        ValueError,
        r"noise must be contiguous, got strides \(1, 2\)",
    ),
]


@OPS
@pytest.mark.parametrize("change, error, message", ERRORS, ids=[e[2][:16] for e in ERRORS])
def test_a_wrong_argument_is_named(op, change, error, message):
    with pytest.raises(error, match=f"^uniform_scores: {message}"):
        op(**({"seed": torch.tensor([0]), "noise": torch.zeros(2, 3, dtype=torch.int32)} | change))
