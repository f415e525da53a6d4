"""A row of `block_attention` has the same bits alone and in any batch, bucket, cache row, capacity and paging."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "triton", reason="without Triton, there is no attention kernel whose rows could depend on one another"
)
from attention_cases import GUARD, Case, assert_same_bits, cached_slots, fields, live_positions, random_case

from dlm_kernels.attention import launch as kernel
from dlm_kernels.device import target_of
from dlm_kernels.testing.attention_calls import paged

# One call for every feature, rows off by one from the tiles, three rows of different lengths.
FEATURES = {
    "full": dict(mode="full", W=17, G=1),
    "causal, D=48": dict(mode="causal", W=9, G=2, D=48),
    "block, G=7": dict(mode="block", W=5, G=7),
    "shadow": dict(mode="shadow", W=17, G=2),
    "no cache": dict(mode="block", W=17, G=3, cache=False),
    "kept": dict(mode="full", W=9, G=2, kept=True),
    "block, G=1": dict(mode="block", W=17, G=1),
    "sliding": dict(mode="full", W=9, G=4, sliding=41),
    "fp8": dict(mode="block", W=9, G=2, fp8=True, H_kv=2),
    "whole tiles around replaced slots": dict(
        mode="full", W=9, G=2, kv_lens=(170, 128, 65), replaced=((32, 40), (16, 70), (0, 17)), capacity=180
    ),
    "one long row": dict(mode="block", W=25, G=2, q_lens=(25, 9, 24)),
    "two long rows": dict(mode="shadow", W=50, G=1, q_lens=(50, 49, 48), kept=True, cache=True),
    "everything": dict(mode="shadow", W=17, G=2, kept=True, sliding=57, fp8=True),
}
every_feature = pytest.mark.parametrize("feature", FEATURES)
some_features = pytest.mark.parametrize("feature", ["causal, D=48", "no cache", "one long row", "everything"])
cached_features = pytest.mark.parametrize(
    "feature", ["full", "shadow", "fp8", "whole tiles around replaced slots", "two long rows", "everything"]
)


def case_of(feature: str, seed: int, **changes) -> Case:
    """Three rows that differ in all their lengths; every one has live positions, and with a cache the first spans
    several tiles.

    The first such call from the seed on: chance hides and kills much.
    """
    chosen = {"B": 3, "H_kv": 1, "cache": True, "kv_lens": (70, 33, 16), **FEATURES[feature], **changes}
    W = chosen["W"]
    while True:
        case = random_case(seed, **{"q_lens": (W, W // 2 + 1, W - 1), **chosen})
        w = fields(case)
        is_alive = all(len(live_positions(w, b)) > 1 for b in range(chosen["B"]))
        if is_alive and (case.k_buffer is None or len(cached_slots(case, w, 0)) > 16):
            return case
        seed += 1000


def row_alone(case: Case, b: int, rng: random.Random) -> Case:
    """Row b in a call of its own: a bucket, a cache and a page table that are just large enough; pages elsewhere."""
    w = fields(case)
    W, row = max(1, w["q_len"][b]), w["cache_row"][b]
    window = case.change_window(lambda name, t: t if name == "page_table" else t[b : b + 1])
    window = dataclasses.replace(window, cache_row=torch.zeros_like(window.cache_row))
    trimmed = {name: getattr(window, name)[:, :W].contiguous() for name in ("q_pos", "q_block", "kv_slot")}
    window = dataclasses.replace(window, **trimmed)
    new = (tensor[b : b + 1, :, :W] for tensor in (case.q, case.k, case.v))
    alone = dataclasses.replace(case, window=window)
    alone.q, alone.k, alone.v = new
    if case.k_buffer is not None:
        capacity = 1 + max([0, w["kv_len"][b] - 1, *(w["kv_slot"][b][j] for j in live_positions(w, b))])
        alone.k_buffer, alone.v_buffer = (t[row : row + 1, :, : capacity + 2 * GUARD].clone() for t in case.buffers)
        for buffer in alone.buffers:
            buffer[:, :, -GUARD:] = math.nan
        if case.window.kept is not None:
            alone.window = dataclasses.replace(window, kept=window.kept[:, :capacity].contiguous())
    return alone


def widened(tensor: Tensor, dim: int, value: float, by: int = 33) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] += by
    wide = tensor.new_full(shape, value)
    wide.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return wide


def in_a_wider_bucket(case: Case) -> Case:
    """The same rows in a bucket 33 wider and caches 33 longer, all of it dead, hidden and NaN."""
    new = (widened(tensor, 2, math.nan) for tensor in (case.q, case.k, case.v))
    longer = {"q_pos": 3, "q_block": 3, "kv_slot": 3, "kept": 1}
    window = case.change_window(lambda name, t: widened(t, 1, longer[name]) if name in longer else t)
    wide = dataclasses.replace(case, window=window)
    wide.q, wide.k, wide.v = new
    if case.k_buffer is not None:
        wide.k_buffer, wide.v_buffer = (widened(buffer, 2, math.nan) for buffer in case.buffers)
    return wide


@every_feature
def test_row_alone_equals_row_in_batch(feature: str, device: torch.device) -> None:
    case = case_of(feature, seed=0)
    batch = case.to(torch.float32, device)
    together = batch.kernel()
    for b in range(3):
        alone = row_alone(case, b, random.Random(b)).to(torch.float32, device)
        assert_same_bits(alone.kernel()[0], together[b, :, : alone.q.shape[2]])
        for mine, theirs in zip(alone.buffers, batch.buffers, strict=True):
            row = theirs[case.window.cache_row[b], :, GUARD : mine.shape[2] - GUARD]
            assert_same_bits(mine[0, :, GUARD:-GUARD], row)


@pytest.mark.parametrize(
    "feature", ["block, G=7", "fp8", "whole tiles around replaced slots", "one long row", "no cache", "everything"]
)
def test_neither_bucket_width_nor_capacity_changes_a_bit(feature: str, device: torch.device) -> None:
    case = case_of(feature, seed=5, B=2)
    W = case.q.shape[2]
    wide = in_a_wider_bucket(case).to(torch.float32, device).kernel()
    assert_same_bits(wide[:, :, :W], case.to(torch.float32, device).kernel())
    assert not wide[:, :, W:].any()


@some_features
def test_a_row_does_not_see_its_neighbours(feature: str, device: torch.device) -> None:
    case = case_of(feature, seed=45).to(torch.float32, device)
    changed = case.to(torch.float32, device)
    for tensor in (changed.q, changed.k, changed.v):
        tensor[1:] = torch.randn_like(tensor[1:])
    mine = int(case.window.cache_row[0])
    for buffer in changed.buffers:
        others = [row for row in range(buffer.shape[0]) if row != mine]
        buffer[others] = torch.randn_like(buffer[others].float()).to(buffer.dtype)
    changed.window.q_len[1:], changed.window.kv_len[1:], changed.window.kv_slot[1:] = case.q.shape[2], 80, -1
    assert_same_bits(changed.kernel()[0], case.kernel()[0])


@some_features
def test_which_batch_row_and_cache_row_hold_a_row_does_not_matter(feature: str, device: torch.device) -> None:
    case = case_of(feature, seed=132).to(torch.float32, device)
    moved = case.to(torch.float32, device)
    moved.q, moved.k, moved.v = (tensor.roll(1, 0) for tensor in (case.q, case.k, case.v))
    moved.window = moved.change_window(lambda name, t: t.roll(1, 0))
    if case.k_buffer is not None:
        moved.k_buffer, moved.v_buffer = (buffer.roll(1, 0) for buffer in moved.buffers)
        moved.window.cache_row.add_(1).remainder_(moved.k_buffer.shape[0])
    assert_same_bits(moved.kernel(), case.kernel().roll(1, 0))
    for mine, theirs in zip(moved.buffers, case.buffers, strict=True):
        assert_same_bits(mine, theirs.roll(1, 0))


@cached_features
def test_pages_give_the_bits_of_a_contiguous_cache(feature: str, device: torch.device) -> None:
    page_size = (16, 32, 64)[list(FEATURES).index(feature) % 3]
    case = case_of(feature, seed=112)
    pages = paged(case, page_size, random.Random(page_size))
    ours, theirs = pages.to(torch.float32, device), case.to(torch.float32, device)
    assert_same_bits(ours.kernel(), theirs.kernel())
    w = fields(case)
    for b, row in enumerate(w["cache_row"]):
        for s in cached_slots(case, w, b) + [
            w["kv_slot"][b][j] for j in live_positions(w, b) if w["kv_slot"][b][j] >= 0
        ]:
            page, at = int(pages.window.page_table[row, s // page_size]), GUARD + s % page_size
            for mine, contiguous in zip(ours.buffers, theirs.buffers, strict=True):
                assert_same_bits(mine[page, :, at], contiguous[row, :, GUARD + s])


@pytest.mark.parametrize("places", [0, 2, 4, 6])
@pytest.mark.parametrize("feature", ["full", "causal, D=48", "everything"])
def test_groups_that_take_turns_in_the_workspace_have_the_same_bits(
    feature: str, places: int, device: torch.device
) -> None:
    """Of three batch rows of two KV heads of two tiles, groups of one tile, of some rows and of one head."""
    case = case_of(feature, seed=113, H_kv=2).to(torch.float32, device)
    D = case.q.shape[3]
    at_once, grouped = case.to(torch.float32, device), case.to(torch.float32, device)
    assert_same_bits(grouped.kernel(workspace_bytes=places * 2 * 16 * (D + 2) * 4), at_once.kernel())
    for mine, theirs in zip(grouped.buffers, at_once.buffers, strict=True):
        assert_same_bits(mine, theirs)


SHIPPED = [(64, 1), (128, 1), (128, 4), (128, 7), (256, 2), (512, 1)]


@pytest.mark.gpu("on tensor cores too, neither the bucket nor the capacity nor the batch changes a bit of a row")
@pytest.mark.parametrize("D, G", SHIPPED)
def test_shipped_tiles_are_row_invariant_on_a_gpu(D: int, G: int, device: torch.device) -> None:
    case = random_case(53, B=3, W=33, H_kv=2, G=G, D=D, mode="block", cache=True, SPLIT=512, capacity=1100)
    tile = kernel.attention_tile(target_of("test", device), D=D, G=G, dtype=torch.bfloat16)
    together = case.to(torch.bfloat16, device).kernel(tile)
    assert_same_bits(in_a_wider_bucket(case).to(torch.bfloat16, device).kernel(tile)[:, :, :33], together)
    for b in range(3):
        alone = row_alone(case, b, random.Random(b)).to(torch.bfloat16, device)
        assert_same_bits(alone.kernel(tile)[0], together[b, :, : alone.q.shape[2]])
