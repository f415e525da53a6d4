"""`block_attention` over paged and fp8 caches: the reference against the loop, the kernel against both, and the bytes
that are stored."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="without Triton, the attention kernel cannot be compared with its reference")
import ptx
from attention_cases import GUARD, MODES, Case, assert_same_bits, check_against_the_loop, fields, random_case
from attention_oracle import E4M3, by_the_loop, cached_slots, e4m3, stored_by_the_loop

from dlm_kernels.attention import cache as cache_module
from dlm_kernels.device import target_of
from dlm_kernels.testing.attention_calls import FP8, paged

CACHES = {
    "pages of 16": dict(page_size=16),
    "pages of 32": dict(page_size=32),
    "pages of 64": dict(page_size=64, capacity=100),
    "fp8": dict(fp8=True),
    "fp8, pages of 16": dict(fp8=True, page_size=16),
}
ops = pytest.mark.parametrize("op", ["reference", "kernel"])
every_cache = pytest.mark.parametrize("cache", CACHES)


@pytest.mark.parametrize("features", [(), ("kept",), ("sliding", "shared")], ids="+".join)
@every_cache
def test_reference_is_a_softmax_over_the_visible_keys(cache: str, features: tuple[str, ...]) -> None:
    for seed, mode in enumerate(MODES):
        case = random_case(seed, mode=mode, **CACHES[cache], **dict.fromkeys(features, True))
        run = case.to(torch.float64)
        if case.k_scale is not None:
            run.k_buffer, run.v_buffer = (buffer.to(FP8) for buffer in case.buffers)
        torch.testing.assert_close(run.reference(), by_the_loop(case), rtol=1e-12, atol=1e-13)
        for mine, expected in zip(run.buffers, stored_by_the_loop(case), strict=True):
            assert_same_bits(mine.double(), expected)


@pytest.mark.parametrize("mode", MODES)
@every_cache
def test_kernel_is_no_worse_than_the_reference_and_stores_exactly(cache: str, mode: str, device: torch.device) -> None:
    case = random_case(3, B=2, W=9, H_kv=2, G=2, mode=mode, **CACHES[cache])
    check_against_the_loop(case, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("features", [("kept",), ("sliding", "shared"), ("kept", "sliding")], ids="+".join)
@pytest.mark.parametrize("cache", ["pages of 16", "fp8, pages of 16"])
def test_features_combine(cache: str, features: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> None:
    case = random_case(5, B=2, W=17, H_kv=1, G=1, D=48, mode="shadow", **CACHES[cache], **dict.fromkeys(features, True))
    check_against_the_loop(case, dtype, device)


@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize("kv_len", [1, 15, 16, 17, 32, 33, 65])
def test_prefix_lengths_around_page_boundaries(kv_len: int, page_size: int, device: torch.device) -> None:
    case = random_case(7, B=1, W=3, G=2, H_kv=1, cache=True, mode="causal", full_rows=True)
    for buffer in case.buffers:
        buffer[:, :, GUARD : GUARD + kv_len] = torch.randn_like(buffer[:, :, :kv_len]).half()
        buffer[:, :, GUARD + kv_len :] = math.nan
    case.window.kv_len.fill_(kv_len), case.window.replaced.zero_()
    case.window.kv_slot.copy_(torch.arange(kv_len, kv_len + 3))  # the window is appended, perhaps across two pages
    check_against_the_loop(paged(case, page_size), torch.float32, device)


@ops
def test_rows_may_share_the_pages_of_a_common_prefix(op: str, device: torch.device) -> None:
    """Two rows of the page table begin with the same two pages: as two copies of them would be."""
    case = random_case(11, B=2, W=5, G=2, H_kv=1, cache=True, mode="full", full_rows=True)
    w = fields(case)
    case.window.kv_len.fill_(40), case.window.replaced.zero_()
    case.window.kv_slot.copy_(torch.arange(40, 45).expand(2, 5))
    for buffer in case.buffers:
        common = torch.randn_like(buffer[0]).half().double()
        buffer[w["cache_row"]] = common
        buffer[:, :, GUARD + 40 :] = math.nan
    copies = paged(case, 16)
    first, second = w["cache_row"]
    shared = copies.to(torch.float64)
    freed = shared.window.page_table[second, :2].tolist()
    shared.window.page_table[second, :2] = shared.window.page_table[first, :2]
    for buffer in shared.buffers:
        buffer[freed] = math.nan
    shared, copies = shared.to(torch.float32, device), copies.to(torch.float32, device)
    assert_same_bits(getattr(shared, op)(), getattr(copies, op)())


@ops
def test_pages_lie_anywhere_in_the_pool(op: str, device: torch.device) -> None:
    case = random_case(13, B=2, W=9, G=2, H_kv=2, mode="block", page_size=16)
    moved = case.to(torch.float64)
    order = torch.randperm(case.k_buffer.shape[0])
    moved.k_buffer, moved.v_buffer = (buffer[order.argsort()] for buffer in case.buffers)
    table, pages = case.window.page_table.long(), len(order)
    is_page = (table >= 0) & (table < pages)
    assert is_page.any()
    moved.window.page_table.copy_(torch.where(is_page, order[table.clamp(0, pages - 1)], table))
    ours, theirs = moved.to(torch.float32, device), case.to(torch.float32, device)
    assert_same_bits(getattr(ours, op)(), getattr(theirs, op)())
    for mine, buffer in zip(ours.buffers, theirs.buffers, strict=True):
        assert_same_bits(mine[order.to(device)], buffer)


def test_the_loop_rounds_to_e4m3_as_torch_does_where_torch_does_not_overflow() -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite() & (halves.abs() <= 448)].float()
    assert_same_bits(e4m3(halves), halves.to(FP8).double())
    assert e4m3(torch.tensor([449.0, -1e30, math.inf])).tolist() == [448.0, -448.0, 448.0]
    assert e4m3(torch.tensor([math.nan])).isnan().all()


def storing(values: Tensor, scale: float, dtype: torch.dtype) -> Case:
    """One row that stores `values` [n] as keys and their negatives as values, sixteen to a slot."""
    n = -(-len(values) // 16)
    padded = torch.zeros(16 * n, dtype=torch.float64)
    padded[: len(values)] = values.double()
    k = padded.view(1, 1, n, 16)
    ints = {"q_pos": torch.arange(n), "q_block": torch.zeros(n), "kv_slot": torch.arange(n), "replaced": torch.zeros(2)}
    ints = {name: x.int()[None] for name, x in ints.items()}
    lens = {name: torch.tensor([x], dtype=torch.int32) for name, x in (("q_len", n), ("kv_len", 0), ("cache_row", 0))}
    window = random_case(0, B=1, W=1).window
    window = dataclasses.replace(window, **ints, **lens, mode="full")
    buffers = [torch.full((1, 1, n + 2 * GUARD, 16), math.nan, dtype=torch.float64) for _ in range(2)]
    scales = torch.tensor([scale]), torch.tensor([scale])
    return Case(torch.zeros_like(k), k, -k, *buffers, window, 1.0, *scales).to(dtype)


@ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**-10, 500.0])
def test_stored_bytes_are_the_nearest_even_e4m3(
    scale: float, dtype: torch.dtype, op: str, device: torch.device
) -> None:
    """At every number of e4m3, at every midpoint between two of them, and next to both; beyond the largest; at zero of
    either sign."""
    between = (E4M3[1:] + E4M3[:-1]) / 2
    exact = torch.cat([E4M3, between, torch.tensor([464.0, 480.0, 1e4])]) * scale
    values = exact.to(dtype)
    values = values[values.isfinite() & (values < torch.finfo(dtype).max)]
    above, below = (torch.nextafter(values, torch.tensor(to, dtype=dtype)) for to in (1e4, -1e4))
    values = torch.cat([values, above, below])
    case = storing(torch.cat([values, -values]), scale, dtype)
    expected = stored_by_the_loop(case)
    run = case.to(dtype, device)
    getattr(run, op)()
    for mine, numbers in zip(run.buffers, expected, strict=True):
        assert_same_bits(mine.double().cpu(), numbers)


@ops
def test_what_is_not_a_number_is_stored_as_such_and_infinity_saturates(op: str, device: torch.device) -> None:
    run = storing(torch.tensor([math.nan, math.inf, -math.inf, 1.0]), 1.0, torch.float32).to(torch.float32, device)
    getattr(run, op)()
    stored = run.caches[0][0, 0, 0, :4].float().cpu()
    assert stored[0].isnan() and stored[1:].tolist() == [448.0, -448.0, 1.0]


@ops
def test_the_windows_own_keys_are_attended_unquantised(op: str, device: torch.device) -> None:
    case = random_case(17, B=1, W=4, G=1, H_kv=1, mode="full", fp8=True, full_rows=True)
    case.window.kv_len.zero_(), case.window.replaced.zero_(), case.window.kv_slot.copy_(torch.arange(4))
    coarse = dataclasses.replace(case, k_scale=torch.tensor([100.0]), v_scale=torch.tensor([100.0]))
    fine = dataclasses.replace(case, k_scale=torch.tensor([0.01]), v_scale=torch.tensor([0.01]))
    coarse, fine = coarse.to(torch.float32, device), fine.to(torch.float32, device)
    assert_same_bits(getattr(coarse, op)(), getattr(fine, op)())
    assert (coarse.k_buffer.float() != fine.k_buffer.float()).any()


@ops
def test_every_head_has_its_own_scales(op: str, device: torch.device) -> None:
    """A head's keys and values over its scale, then times its scale: powers of two leave no bit changed."""
    case = random_case(19, B=1, W=5, G=2, H_kv=2, mode="full", fp8=True, full_rows=True)
    case.k_scale, case.v_scale = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0])
    rescaled = case.to(torch.float64)
    rescaled.k_scale, rescaled.v_scale = torch.tensor([0.5, 4.0]), torch.tensor([2.0, 8.0])
    for cache_case in (case, rescaled):  # numbers that no scale used here rounds or saturates
        for buffer, unit in zip(cache_case.buffers, (cache_case.k_scale, cache_case.v_scale), strict=True):
            generator = torch.Generator().manual_seed(5)
            seen = ~buffer.isnan()
            numbers = torch.randint(-7, 8, buffer.shape, generator=generator).double() / unit.double()[:, None, None]
            buffer.copy_(torch.where(seen, numbers, math.nan))
    ours, theirs = rescaled.to(torch.float32, device), case.to(torch.float32, device)
    torch.testing.assert_close(getattr(ours, op)(), getattr(theirs, op)(), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu(
    "paged and fp8 caches are within the error bound, and their bytes exact, in bfloat16 and float16 at shipped tiles"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D, G", [(64, 1), (128, 4), (128, 7), (256, 2)])
@every_cache
def test_shipped_tiles_on_a_gpu(cache: str, D: int, G: int, dtype: torch.dtype, device: torch.device) -> None:
    from dlm_kernels.attention import launch as kernel

    case = random_case(23, B=3, W=33, H_kv=2, G=G, D=D, mode="block", SPLIT=512, **{**CACHES[cache], "capacity": 1100})
    rounded = case.to(dtype)
    for name in ("q", "k", "v"):
        setattr(case, name, getattr(rounded, name).double())
    check_against_the_loop(case, dtype, device, kernel.attention_tile(target_of("test", device), D=D, G=G, dtype=dtype))


def test_the_cases_here_reach_what_they_are_for() -> None:
    """Pages that nobody needs, slots that nobody sees, and fp8 numbers that saturate or are subnormal do come up."""
    rng = random.Random(0)
    cases = [random_case(rng.randrange(10**6), mode="block", fp8=True, page_size=16) for _ in range(20)]
    assert any((case.window.page_table >= len(case.k_buffer)).any() for case in cases)
    assert any(len(cached_slots(case, fields(case), 0)) < int(case.window.kv_len[0]) for case in cases)
    stored = torch.cat([buffer.flatten() for case in cases for buffer in case.buffers])
    assert (stored.abs() == 448).any() and ((stored.abs() < 2.0**-6) & (stored != 0)).any()


@pytest.mark.parametrize(
    "code, dtype", [("_E4M3_TO_F16", torch.float16), ("_E4M3_TO_BF16", torch.bfloat16)], ids=["float16", "bfloat16"]
)
def test_compiled_code_decodes_every_byte_in_every_place_as_torch_does(code: str, dtype: torch.dtype) -> None:
    """The instructions that compiled code runs in place of the interpreter's: every byte in each place of a word, among
    the smallest, the largest and NaN."""
    byte, others = torch.arange(256), torch.tensor([0x00, 0xFF, 0x7F, 0x80, 0x01, 0x7E])
    places = [torch.cartesian_prod(*[byte if i == place else others for i in range(4)]) for place in range(4)]
    bytes_of_words = torch.cat(places).to(torch.uint8)
    words = bytes_of_words.numpy().view(np.uint32)[:, 0]
    low, high = ptx.run(getattr(cache_module, code).value, words)
    found = torch.from_numpy(np.stack([low, high], 1).view(np.int16)).view(dtype).double()
    expected = bytes_of_words.view(FP8).double() / cache_module.E4M3_UNIT.value
    assert_same_bits(found, expected)
