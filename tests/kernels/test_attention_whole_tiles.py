"""`block_attention`: key tiles of a split that are seen whole come first and have no mask.

Every row of a call here has lengths of its own: prefixes that end in, at and next to the borders of tiles and splits,
and replaced slots that begin and end there. Every hidden slot holds NaN, so a tile that is taken for whole and is not
shows in the results, and a tile that is whole and is not taken for it shows in the order of the sums.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

pytest.importorskip("triton", reason="without Triton, there is no attention kernel that has tiles")
from attention_cases import GUARD, TOY, Case, assert_same_bits, check_against_the_loop, random_case
from attention_oracle import cached_slots, fields, place

from dlm_kernels.attention.launch import AttentionTile
from dlm_kernels.testing.attention_calls import paged

# Splits of four tiles of 16 or two of 32; prefixes beyond 128 slots have splits of 128.
NARROW = dataclasses.replace(TOY, SPLIT=64)
WIDE = dataclasses.replace(TOY, SPLIT=64, BLOCK_N=32, SWAP=True)
KV_LENS = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 128, 129, 170)
REPLACED = (
    *((0, 0), (5, 5), (9, 3), (32, 32), (64, 64), (180, 180)),  # none
    *((18, 21), (16, 24), (20, 32), (16, 32), (15, 33), (31, 32), (32, 33), (0, 1), (0, 16)),  # in and at tiles
    *((63, 64), (64, 65), (60, 70), (0, 64), (64, 128), (48, 64), (64, 80), (40, 100), (128, 160)),  # and splits
    *((0, 170), (150, 180), (169, 180), (63, 180)),  # beyond the prefix
)
ROWS = tuple(itertools.product(KV_LENS, REPLACED))
CAPACITY = 180


def borders(seed: int, every: int = 10, **options) -> Case:
    """One query a row; a row for every prefix with every range of replaced slots, or for one in `every` of them."""
    kv_lens, replaced = zip(*ROWS[seed % every :: every], strict=True)
    B = len(kv_lens)
    shape = dict(B=B, W=1, H_kv=1, G=1, capacity=CAPACITY, q_lens=(1,) * B, mode="full")
    return random_case(seed, cache=True, kv_lens=kv_lens, replaced=replaced, **shape, **options)


FEATURES = {
    "plain": dict(every=2),
    "kept": dict(kept=True),
    "sliding to a tile's border": dict(sliding=17),
    "sliding into a tile": dict(sliding=40),
    "sliding over a split": dict(sliding=66),
    "pages of 16": dict(page_size=16),
    "pages of 64": dict(page_size=64),
    "fp8": dict(fp8=True),
    "fp8, pages of 16": dict(fp8=True, page_size=16),
    "everything": dict(fp8=True, page_size=64, kept=True, sliding=66),
}
tiles = pytest.mark.parametrize("tile", [NARROW, WIDE], ids=["narrow", "wide, swapped"])


@tiles
@pytest.mark.parametrize("feature", FEATURES)
def test_prefixes_and_replaced_slots_at_every_border(feature: str, tile: AttentionTile, device: torch.device) -> None:
    seed = list(FEATURES).index(feature)
    check_against_the_loop(borders(seed, **FEATURES[feature]), torch.float32, device, tile)


def whole_tiles(slots: set[int], BLOCK_N: int) -> list[int]:
    """The key tiles of which every slot is seen."""
    return [t for t in range(-(-CAPACITY // BLOCK_N)) if slots.issuperset(range(t * BLOCK_N, (t + 1) * BLOCK_N))]


@tiles
@pytest.mark.parametrize("page_size, value", [(None, math.nan), (None, math.inf), (None, -math.inf), (16, math.nan)])
def test_what_is_not_finite_in_a_whole_tile_is_carried_into_the_results(
    page_size: int | None, value: float, tile: AttentionTile, device: torch.device
) -> None:
    """A value in the last slot of a row's first whole tile, or a key in the first slot of its last one."""
    case = borders(5, every=6, page_size=page_size)
    w, changed = fields(case), 0
    for b in range(case.q.shape[0]):
        whole = whole_tiles(set(cached_slots(case, w, b)), tile.BLOCK_N)
        if whole and b % 3:
            slot = whole[0] * tile.BLOCK_N + tile.BLOCK_N - 1 if b % 2 else whole[-1] * tile.BLOCK_N
            first, third = place(w, w["cache_row"][b], slot, case.caches[0].shape[2])
            case.buffers[b % 2][first, 0, GUARD + third, 5] = value
            changed += 1
    assert changed > 20
    check_against_the_loop(case, torch.float32, device, tile)


def in_order(case: Case, tile: AttentionTile, values: torch.Tensor) -> torch.Tensor:
    """What a row's only query gets where every weight is 1 and the middle slot of tile t holds values[t], the others 0:
    added in float32, tile by tile, first those of a split that are whole."""
    w, BLOCK_N = fields(case), tile.BLOCK_N
    rows = []
    for b in range(case.q.shape[0]):
        slots, kv_len = set(cached_slots(case, w, b)), w["kv_len"][b]
        start, end = w["replaced"][b]
        base = 0 if case.sliding_window is None else max(0, kv_len - case.sliding_window + 1) // BLOCK_N * BLOCK_N
        length = tile.SPLIT * max(1, -(-(kv_len - base) // (tile.SPLIT * tile.MAX_SPLITS)))
        total = torch.zeros(values.shape[1])
        for begin in range(base, kv_len, length):
            own = range(begin // BLOCK_N, -(-min(begin + length, kv_len) // BLOCK_N))
            whole = [t for t in whole_tiles(slots, BLOCK_N) if t in own and w.get("kept") is None]
            behind = [t for t in whole if start < end and t * BLOCK_N >= end]
            before = [t for t in whole if t not in behind]
            first = behind if len(behind) > len(before) else before
            part = torch.zeros(values.shape[1])
            for t in [*first, *(t for t in own if t not in first)]:
                part = part + values[t] * (t * BLOCK_N + BLOCK_N // 2 in slots)
            total = total + part
        rows.append(total / torch.tensor(len(slots) + 1.0))
    return torch.stack(rows)


@tiles
@pytest.mark.parametrize("feature", ["plain", "kept", "sliding into a tile", "sliding over a split", "pages of 16"])
def test_whole_tiles_come_first_and_the_others_in_their_order(
    feature: str, tile: AttentionTile, device: torch.device
) -> None:
    """Numbers of which only some orders keep the small ones: 2^24 + 1 is 2^24 in float32."""
    case = borders(7, **{**FEATURES[feature], "every": 6, "kept": False, "page_size": None})
    w, BLOCK_N = fields(case), tile.BLOCK_N
    if feature == "kept":  # with `kept` no tile counts as whole, though it may hide nothing
        case.window = dataclasses.replace(case.window, kept=torch.ones(case.q.shape[0], CAPACITY, dtype=torch.bool))
        w = fields(case)
    generator = torch.Generator().manual_seed(11)
    numbers = torch.tensor([2.0**24, -(2.0**24), 1.0, 3.0, 2.0**25, -(2.0**25)])
    values = numbers[torch.randint(len(numbers), (-(-CAPACITY // BLOCK_N), 16), generator=generator)]
    case.q.zero_(), case.k.zero_(), case.v.zero_()
    case.window.kv_slot.fill_(-1)
    for b, row in enumerate(w["cache_row"]):
        for slot in cached_slots(case, w, b):
            number = values[slot // BLOCK_N] if slot % BLOCK_N == BLOCK_N // 2 else torch.zeros(16)
            case.k_buffer[row, 0, GUARD + slot], case.v_buffer[row, 0, GUARD + slot] = 0.0, number.double()
    expected = in_order(case, tile, values)
    page_size = FEATURES[feature].get("page_size")
    run = (case if page_size is None else paged(case, page_size)).to(torch.float32, device)
    assert_same_bits(run.kernel(tile)[:, 0, 0].cpu() + 0.0, expected + 0.0)


def test_rows_reach_what_they_are_for() -> None:
    """Whole tiles before and behind replaced slots, more of either; none; splits replaced as a whole."""
    found = set()
    case = borders(3, every=1)
    w = fields(case)
    for b, (kv_len, (start, end)) in enumerate(ROWS):
        whole = whole_tiles(set(cached_slots(case, w, b)), 16)
        length = 64 if kv_len <= 128 else 128
        for begin in range(0, kv_len, length):
            own = [t for t in whole if begin <= t * 16 < begin + length]
            behind = sum(start < end <= t * 16 for t in own)
            found.add((behind > 0, len(own) - behind > 0, (behind > len(own) - behind) - (behind < len(own) - behind)))
            if start <= begin and begin + length <= end:
                found.add("replaced")
    sides = {(False, False, 0), (True, False, 1), (False, True, -1), (True, True, 1), (True, True, 0), (True, True, -1)}
    assert found >= sides | {"replaced"}, found
