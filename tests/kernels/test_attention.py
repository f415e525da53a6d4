"""`block_attention`: who sees whom, by pictures; the reference against a loop over visible keys; the kernel within the
error bound.

Caches that are paged or fp8 are in test_attention_caches.py, what may not change a bit in test_attention_invariance.py,
errors, launches and addresses in test_attention_launcher.py.
"""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch

triton = pytest.importorskip(
    "triton", reason="without Triton, the attention kernel cannot be compared with its reference"
)
from attention_cases import (
    GUARD,
    MODES,
    TOY,
    TOYS,
    Case,
    assert_same_bits,
    check_against_the_loop,
    not_finite,
    random_case,
)
from attention_oracle import by_the_loop, cached_slots, fields, live_positions, place, stored_by_the_loop

from dlm_kernels import Window
from dlm_kernels.attention import launch as kernel
from dlm_kernels.device import target_of
from dlm_kernels.testing import no_worse_than_torch
from dlm_kernels.testing.attention_calls import paged
from dlm_kernels.tiles import ATTENTION_CANDIDATES, ATTENTION_TILES

# What each of four queries sees: five cached slots, a sixth beyond kv_len | the window. Queries 4..7 in blocks 1 1 2 2
# but where changed.
ALL = "11111. "
PICTURES: dict[str, tuple[dict, tuple[str, ...]]] = {
    "full": (dict(), (ALL + "1111",) * 4),
    "causal": (dict(mode="causal"), (ALL + "1...", ALL + "11..", ALL + "111.", ALL + "1111")),
    "causal, positions in any order": (
        dict(mode="causal", q_pos=[6, 4, 9, 5]),
        (ALL + "11.1", ALL + ".1..", ALL + "1111", ALL + ".1.1"),
    ),
    "block": (dict(mode="block"), (ALL + "11..", ALL + "11..", ALL + "1111", ALL + "1111")),
    "shadow: no twin of an earlier block": (
        dict(mode="shadow", q_pos=[4, 5, 4, 5]),
        (ALL + "11..", ALL + "11..", ALL + ".111", ALL + "1.11"),
    ),
    "no prefix": (dict(kv_len=0), ("...... 1111",) * 4),
    "slots replaced": (dict(replaced=[1, 3]), ("1..11. 1111",) * 4),
    "replaced beyond the prefix": (dict(replaced=[4, 12]), ("1111.. 1111",) * 4),
    "slots not kept": (dict(kept=[1, 0, 1, 0, 1, 1]), ("1.1.1. 1111",) * 4),
    "slots not kept, replaced": (dict(kept=[0, 1, 1, 0, 1, 1], replaced=[0, 2]), ("..1.1. 1111",) * 4),
    "two live queries": (dict(q_len=2), (ALL + "11..", ALL + "11..", "...... ....", "...... ....")),
    "a row that sits out": (dict(q_len=0), ("...... ....",) * 4),
    "a dead position": (dict(q_block=[1, -1, 2, 2]), (ALL + "1.11", "...... ....", ALL + "1.11", ALL + "1.11")),
    "a dead position, causal": (
        dict(q_block=[1, -1, 2, 2], mode="causal"),
        (ALL + "1...", "...... ....", ALL + "1.1.", ALL + "1.11"),
    ),
    "sliding over the last cached key": (dict(sliding_window=2), ("....1. 1111",) * 4),
    "sliding, every query alike": (
        dict(sliding_window=4, mode="causal"),
        ("..111. 1...", "..111. 11..", "..111. 111.", "..111. 1111"),
    ),
    "sliding past the cache": (dict(sliding_window=1), ("...... 1111",) * 4),
    "sliding over everything": (dict(sliding_window=1000), (ALL + "1111",) * 4),
    "sliding and replaced": (dict(sliding_window=4, replaced=[3, 4]), ("..1.1. 1111",) * 4),
    "everything": (
        dict(mode="block", kept=[1, 1, 1, 0, 1, 1], replaced=[2, 3], sliding_window=5, q_len=3),
        (".1..1. 11..", ".1..1. 11..", ".1..1. 111.", "...... ...."),
    ),
}


def picture_case(
    q_len: int = 4, kv_len: int = 5, mode: str = "full", sliding_window: int | None = None, **changes
) -> Case:
    """Queries of zeros, so every visible key has one weight; key number n carries the n-th unit vector as its value."""
    capacity, D = 16, 32
    rows = {"q_pos": [4, 5, 6, 7], "q_block": [1, 1, 2, 2], "kv_slot": [-1] * 4, "replaced": [0, 0]} | changes
    if "kept" in rows:
        rows["kept"] = rows["kept"] + [1] * (capacity - 6)
    ints = {
        name: torch.tensor([row], dtype=torch.bool if name == "kept" else torch.int32) for name, row in rows.items()
    }
    lens = {
        name: torch.tensor([n], dtype=torch.int32)
        for name, n in (("q_len", q_len), ("kv_len", kv_len), ("cache_row", 0))
    }
    k_buffer, v_buffer = (torch.zeros(1, 1, capacity + 2 * GUARD, D, dtype=torch.float64) for _ in range(2))
    v_buffer[0, 0, GUARD:-GUARD, :capacity] = torch.eye(capacity)
    q, k, v = (torch.zeros(1, 1, 4, D, dtype=torch.float64) for _ in range(3))
    v[0, 0, :, capacity : capacity + 4] = torch.eye(4)
    return Case(q, k, v, k_buffer, v_buffer, Window(mode=mode, **ints, **lens), 1.0, sliding_window=sliding_window)


@pytest.mark.parametrize("op", ["reference", "kernel"])
@pytest.mark.parametrize("cache", ["contiguous", "paged", "fp8"])
@pytest.mark.parametrize("picture", PICTURES)
def test_who_sees_whom(picture: str, cache: str, op: str, device: torch.device) -> None:
    changes, expected = PICTURES[picture]
    case = picture_case(**changes)
    if cache == "paged":
        case = paged(case, 16)
    if cache == "fp8":
        case.k_scale, case.v_scale = torch.ones(1), torch.ones(1)
    out = getattr(case.to(torch.float32, device), op)()[0, 0].cpu()
    drawn = ["".join("1" if weight > 0 else "." for weight in row) for row in out[:, [*range(6), *range(16, 20)]]]
    assert [f"{row[:6]} {row[6:]}" for row in drawn] == list(expected)
    assert not out[:, 6:16].any() and not out[:, 20:].any()
    shares = torch.tensor([1.0 if "1" in row else 0.0 for row in expected])
    torch.testing.assert_close(out.sum(1), shares, rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", ["reference", "kernel"])
def test_weights_are_the_softmax_of_the_scaled_scores(op: str, device: torch.device) -> None:
    # One cached key of score 0 and value 8, the query's own key of score scale * ln 9 = ln 3 and value 16.
    case = picture_case(q_len=1, kv_len=1)
    case.v_buffer.zero_(), case.v.zero_()
    case.scale, case.q[..., 0], case.k[..., 0] = 0.5, 1.0, math.log(9.0)
    case.v_buffer[0, 0, GUARD, 3], case.v[0, 0, 0, 3] = 8.0, 16.0
    out = getattr(case.to(torch.float32, device), op)()
    assert out[0, 0, 0, 3].item() == pytest.approx(8 * 0.25 + 16 * 0.75, abs=1e-5)
    assert out.sum().item() == pytest.approx(14.0, abs=1e-5)


@pytest.mark.parametrize("op", ["reference", "kernel"])
def test_live_positions_with_a_slot_are_stored_and_nothing_else_is_written(op: str, device: torch.device) -> None:
    case = picture_case(q_len=3, q_block=[0, -1, 0, 0], kv_slot=[5, 6, 7, 8], replaced=[1, 2])
    case.k.add_(3.0), case.v.add_(5.0)
    before, case = case, case.to(torch.float32, device)
    getattr(case, op)()
    for after, old, new in zip(case.buffers, before.buffers, (before.k, before.v), strict=True):
        expected = old.clone()
        expected[0, 0, GUARD + 5], expected[0, 0, GUARD + 7] = new[0, 0, 0], new[0, 0, 2]
        assert_same_bits(after.double().cpu(), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "features",
    [(), ("kept",), ("sliding",), ("shared",), ("kept", "sliding", "shared")],
    ids="+".join,
)
def test_reference_is_a_softmax_over_the_visible_keys(mode: str, features: tuple[str, ...]) -> None:
    for seed in range(3):
        case = random_case(seed, mode=mode, **dict.fromkeys(features, True))
        run = case.to(torch.float64)
        torch.testing.assert_close(run.reference(), by_the_loop(case), rtol=1e-12, atol=1e-13)
        for mine, expected in zip(run.buffers, stored_by_the_loop(case) if run.buffers else (), strict=True):
            assert_same_bits(mine, expected)


def test_random_calls_hold_numbers_where_the_loop_reads_and_nan_elsewhere() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        features = {name: rng.random() < 0.4 for name in ("kept", "sliding", "fp8", "shared")}
        case = random_case(seed, mode=rng.choice(MODES), cache=True, page_size=rng.choice((None, 16)), **features)
        w, hidden = fields(case), torch.ones(case.k_buffer.shape[::2][:2], dtype=torch.bool)
        for b, row in enumerate(w["cache_row"]):
            assert case.live[b].nonzero()[:, 0].tolist() == live_positions(w, b)
            for slot in cached_slots(case, w, b):
                first, third = place(w, row, slot, case.caches[0].shape[2])
                hidden[first, GUARD + third] = False
        for buffer in case.buffers:
            assert torch.equal(buffer.isnan(), hidden[:, None, :, None].expand_as(buffer))


# Every grouping and padded head dim, window widths off by one from the tile, every feature, with and without a cache.
SHAPES = [
    dict(D=16, G=1, W=17, mode="full", H_kv=2),
    dict(D=32, G=4, W=16, mode="causal", B=2, H_kv=1),
    dict(D=80, G=7, W=15, mode="block", B=1, H_kv=1, kept=True),
    dict(D=128, G=1, W=33, mode="causal", B=2, H_kv=1, sliding=True),
    dict(D=32, G=7, W=17, mode="block", B=1, H_kv=1),
    dict(D=48, G=3, W=5, mode="full", H_kv=1, shared=True),
    dict(D=16, G=2, W=16, mode="shadow", H_kv=1),
    dict(D=16, G=7, W=17, mode="causal", B=1, H_kv=1, cache=False),
    dict(D=32, G=1, W=33, mode="block", B=2, H_kv=2, cache=False),
    dict(D=16, G=3, W=17, mode="shadow", H_kv=1, cache=False),
    dict(D=16, G=5, W=1, mode="full", cache=False),
    dict(D=256, G=2, W=3, B=1, H_kv=1),
    dict(D=512, G=1, W=2, B=1, H_kv=1),
]


def name_of(shape: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items())


def shaped(seed: int, shape: dict) -> Case:
    return random_case(seed, **{"cache": True, **shape})


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_kernel_is_no_worse_than_the_reference_and_stores_exactly(shape: dict, device: torch.device) -> None:
    check_against_the_loop(shaped(3, shape), torch.float32, device)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[6], SHAPES[8]], ids=name_of)
def test_kernel_is_no_worse_than_the_reference_in_half_precision(shape: dict, device: torch.device) -> None:
    check_against_the_loop(shaped(5, shape), torch.float16, device)


@pytest.mark.parametrize("kv_len", [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 80])
def test_prefix_lengths_around_tile_and_split_boundaries(kv_len: int, device: torch.device) -> None:
    case = random_case(7, B=1, W=3, G=2, H_kv=1, cache=True, mode="block", full_rows=True)
    for buffer in case.buffers:
        buffer[:, :, GUARD:-GUARD] = torch.randn_like(buffer[:, :, GUARD:-GUARD]).half()
    case.window.kv_len.fill_(kv_len), case.window.kv_slot.fill_(-1)
    case.window.replaced.copy_(
        torch.tensor([[0, 0] if kv_len % 2 else [0, 33]])
    )  # even ones: the first tiles are all hidden
    for buffer in case.buffers:
        buffer[:, :, GUARD + kv_len : -GUARD] = math.nan
    check_against_the_loop(case, torch.float32, device)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 48, 49, 65])
def test_window_lengths_around_tile_boundaries(rows: int, mode: str, device: torch.device) -> None:
    check_against_the_loop(
        random_case(rows, B=1, W=rows, G=1, H_kv=1, mode=mode, full_rows=True, capacity=20), torch.float32, device
    )


@pytest.mark.parametrize("mode", ["causal", "block", "shadow"])
def test_tiles_without_a_visible_key_come_first(mode: str, device: torch.device) -> None:
    """The first queries see the last keys only, behind hidden slots: an online softmax starts from nothing several
    times over."""
    case = random_case(9, B=1, W=40, G=1, H_kv=1, mode=mode, cache=True, capacity=80, full_rows=True)
    window = case.window
    window.q_pos.copy_(torch.arange(60, 20, -1)), window.q_block.copy_(torch.arange(40, 0, -1))
    window.kv_len.fill_(70), window.replaced.copy_(torch.tensor([[0, 69]])), window.kv_slot.fill_(-1)
    for new in (case.q, case.k, case.v):
        new.copy_(torch.randn_like(new).half())
    for buffer in case.buffers:
        buffer.fill_(math.nan)[:, :, GUARD + 69] = 1.0
    check_against_the_loop(case, torch.float32, device)


@pytest.mark.parametrize(
    "tiles", TOYS, ids=["plain", "swapped", "wide", "prefill from 17 rows on", "prefill from 25 rows on"]
)
def test_tiles_do_not_change_what_is_computed(tiles: tuple, device: torch.device) -> None:
    case = random_case(
        10,
        B=2,
        W=17,
        G=2,
        H_kv=1,
        mode="shadow",
        page_size=16,
        kept=True,
        q_lens=(17, 11),
        kv_lens=(77, 33),
    )
    check_against_the_loop(case, torch.float32, device, tiles[0], prefill=tiles[1])


@pytest.mark.parametrize("PREFILL_ROWS", [48, 64], ids=["prefill", "split"])
def test_a_tile_may_hold_a_shadow_and_what_it_is_not_the_shadow_of(PREFILL_ROWS: int, device: torch.device) -> None:
    """Positions 0..39 of one block, then copies of 0..23 in another: the third tile of queries has both, the first of
    keys their twins."""
    case = random_case(14, B=1, W=64, G=1, H_kv=1, mode="shadow", cache=False, full_rows=True)
    case.window.q_pos.copy_(torch.tensor([*range(40), *range(24)]))
    case.window.q_block.copy_(torch.tensor([3] * 40 + [4] * 24))
    for new in (case.q, case.k, case.v):
        new.copy_(torch.randn_like(new).half())
    check_against_the_loop(case, torch.float32, device, dataclasses.replace(TOY, PREFILL_ROWS=PREFILL_ROWS))


@pytest.mark.parametrize("cache", [True, False])
def test_rows_of_many_queries_and_of_few_share_a_call(cache: bool, device: torch.device) -> None:
    """At the public launcher's own threshold: 512 query rows are split, 513 are not."""
    lengths = dict(q_lens=(171, 170, 3), kv_lens=(30, 40, 20))
    case = random_case(12, B=3, W=171, G=3, H_kv=1, mode="causal", cache=cache, capacity=300, **lengths)
    ours = case.to(torch.float32, device)
    out = kernel.block_attention(*ours.arguments, **ours.options)
    exact = case.to(torch.float64).reference()
    no_worse_than_torch("out", out, case.to(torch.float32).reference(), exact, half_steps=False)


PATHS: dict[str, dict] = {
    "one split": dict(kv_lens=(20, 31), mode="full"),
    "several splits": dict(kv_lens=(80, 65), mode="block"),
    "no cache": dict(cache=False, mode="causal"),
    "prefill": dict(W=20, q_lens=(20, 17), kv_lens=(80, 33), mode="causal"),
    "shadow": dict(kv_lens=(40, 80), mode="shadow"),
    "fp8": dict(kv_lens=(80, 20), mode="block", fp8=True),
    "pages": dict(kv_lens=(80, 20), mode="full", page_size=16, kept=True),
    "sliding": dict(kv_lens=(80, 60), mode="full", sliding=40),
    "everything": dict(kv_lens=(80, 60), mode="shadow", sliding=60, fp8=True, page_size=32, kept=True, W=20),
}


@pytest.mark.parametrize("swap", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_stands_where_the_formula_has_it_and_nowhere_else(
    path: str, swap: bool, device: torch.device
) -> None:
    options = dict(W=9, q_lens=(9, 8)) | PATHS[path]
    tile = dataclasses.replace(
        TOY, SWAP=swap, PREFILL_ROWS=16 if path in ("prefill", "everything") else TOY.PREFILL_ROWS
    )
    for seed in range(3):
        case = not_finite(random_case(seed, B=2, H_kv=1, G=2, **options), random.Random(seed))
        check_against_the_loop(case, torch.float32, device, tile, prefill=TOY)


@pytest.mark.parametrize("kv_len", [3, 40])
def test_a_query_whose_scores_are_all_minus_infinity_gets_nan_and_not_zeros(kv_len: int, device: torch.device) -> None:
    case = random_case(3, B=1, W=4, H_kv=1, G=1, mode="full", cache=True, full_rows=True, kv_lens=(kv_len,))
    case.window.q_block.fill_(0), case.window.kv_slot.fill_(-1), case.window.replaced.zero_()
    case.q.fill_(1.0), case.k.fill_(-1.0), case.v.fill_(1.0), case.k_buffer.fill_(-1.0), case.v_buffer.fill_(1.0)
    case.q[0, 0, 2, 5] = math.inf
    low = case.to(torch.float32, device)
    for out in (low.kernel(), low.reference()):
        assert out[0, 0, :, 0].isnan().tolist() == [False, False, True, False]
        assert (out[0, 0, [0, 1, 3]] == 1).all()
    case.q[0, 0, 2] = 1e25
    case.k.fill_(-1e25), case.k_buffer.fill_(-1e25)
    case.q[0, 0, [0, 1, 3]] = 0.0
    low = case.to(torch.float32, device)
    for out in (low.kernel(), low.reference()):  # every score of the query overflows
        assert out[0, 0, :, 0].isnan().tolist() == [False, False, True, False]
        assert (out[0, 0, [0, 1, 3]] == 1).all()


def test_scores_near_the_lowest_number_of_float32_are_weighed_like_others(device: torch.device) -> None:
    """-2e38 and -1e38 are finite: the softmax of them is 0 and 1, in one split as in two."""
    for kv_len in (3, 40):
        case = random_case(3, B=1, W=1, H_kv=1, G=1, mode="full", cache=True, full_rows=True, kv_lens=(kv_len,))
        case.window.q_block.fill_(0), case.window.kv_slot.fill_(-1), case.window.replaced.zero_()
        case.q.zero_(), case.k.zero_(), case.k_buffer.zero_(), case.v.fill_(1.0), case.v_buffer.fill_(2.0)
        case.q[..., 0], case.k[..., 0], case.k_buffer[..., 0] = 1e19, -1e19, -2e19
        case.scale = 1.0
        low = case.to(torch.float32, device)
        assert (low.kernel() == 1).all() and (low.reference() == 1).all()


def test_strided_views_need_no_copy(device: torch.device) -> None:
    """q, k and v as slices of one fused projection [B, W, (H + 2 H_kv) D], the caches as slices of one buffer of all
    layers."""
    case = random_case(15, B=2, W=9, H_kv=2, G=2, mode="block", cache=True)
    fused = torch.cat([tensor.transpose(1, 2).flatten(2) for tensor in (case.q, case.k, case.v)], 2)
    q, k, v = (part.unflatten(2, (-1, 16)).transpose(1, 2) for part in fused.split([64, 32, 32], 2))
    assert not q.is_contiguous() and q.stride(2) == 128
    strided = dataclasses.replace(case, q=q, k=k, v=v)
    layers = [torch.stack([buffer, torch.full_like(buffer, math.nan)], 3) for buffer in case.buffers]
    strided.k_buffer, strided.v_buffer = (buffer[:, :, :, 0] for buffer in layers)
    check_against_the_loop(strided, torch.float32, device)


def test_query_tile_height_does_not_change_a_result_beyond_rounding(device: torch.device) -> None:
    # Bits may differ (numpy multiplies differently by shape), which is why no tile depends on the bucket.
    case = random_case(29, B=1, W=17, H_kv=1, G=4, mode="block", cache=True)
    exact = by_the_loop(case)
    for BLOCK_M in (16, 64):
        out = case.to(torch.float32, device).kernel(dataclasses.replace(TOY, BLOCK_M=BLOCK_M))
        torch.testing.assert_close(out.double().cpu(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kv_len", [511, 513])
def test_the_public_launcher_splits_at_its_own_tile_sizes(kv_len: int, device: torch.device) -> None:
    case = random_case(31, B=1, W=33, H_kv=1, G=4, D=32, mode="causal", cache=True, capacity=600, SPLIT=kv_len)
    case.window.kv_len.fill_(kv_len), case.window.kv_slot.fill_(-1)
    case.k_buffer.nan_to_num_(0.25), case.v_buffer.nan_to_num_(1.0)
    ours = case.to(torch.float32, device)
    out = kernel.block_attention(*ours.arguments, **ours.options)
    exact = case.to(torch.float64).reference()
    no_worse_than_torch("out", out, case.to(torch.float32).reference(), exact, half_steps=False)


def test_the_tile_of_a_model_reaches_every_head_dim() -> None:
    for D in (*range(16, 257, 16), 512):
        for capability in ATTENTION_TILES:
            tile = kernel.attention_tile(capability, D=D, G=1, dtype=torch.bfloat16)
            assert tile.SPLIT % tile.BLOCK_N == 0


def test_candidate_tiles_are_others_than_the_launchers_and_cut_the_same_rows() -> None:
    assert set(ATTENTION_CANDIDATES) == set(ATTENTION_TILES)
    for capability, places in ATTENTION_CANDIDATES.items():
        for (D, column), candidates in places.items():
            shipped = kernel.attention_tile(capability, D=D, G=(1, 4)[column], dtype=torch.bfloat16)
            assert len({shipped, *candidates}) == 1 + len(candidates)
            for tile in candidates:
                assert tile.SPLIT % tile.BLOCK_N == 0 and tile.SPLIT < shipped.SPLIT
                # The prefill takes over at the same length, and the workspace holds whole query tiles up to it.
                assert tile.PREFILL_ROWS == shipped.PREFILL_ROWS and tile.PREFILL_ROWS % tile.BLOCK_M == 0


def test_a_candidate_is_within_the_bound_where_its_splits_become_longer(device: torch.device) -> None:
    """Prefixes of SPLIT and of SPLIT * MAX_SPLITS slots, and of one more."""
    tile = dataclasses.replace(ATTENTION_CANDIDATES[90][128, 1][0], BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)
    SPLIT, most = tile.SPLIT, tile.SPLIT * tile.MAX_SPLITS
    for kv_len in (SPLIT, SPLIT + 1, most, most + 1):
        case = random_case(
            31, B=1, W=3, H_kv=1, G=7, mode="block", cache=True, capacity=kv_len + 8, SPLIT=SPLIT, kv_lens=(kv_len,)
        )
        check_against_the_loop(case, torch.float32, device, tile)


SHIPPED = [(64, 1), (128, 1), (128, 4), (128, 7), (256, 2), (512, 1)]


@pytest.mark.gpu(
    "with the tiles as shipped, every mode in bfloat16 and float16 is within the error bound on tensor cores"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("D, G", SHIPPED)
def test_shipped_tiles_on_a_gpu(D: int, G: int, mode: str, dtype: torch.dtype, device: torch.device) -> None:
    case = random_case(53, B=3, W=33, H_kv=2, G=G, D=D, mode=mode, cache=True, SPLIT=512, capacity=1100, kept=True)
    tile = kernel.attention_tile(target_of("test", device), D=D, G=G, dtype=dtype)
    check_against_the_loop(case.to(dtype).to(torch.float64), dtype, device, tile)
