"""The ops for a CPU equal their references on the ops' own random calls: ids exactly, floats within the error bound.

Whole decodes are in tests/decoding/test_cpu_decodes.py.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import math
import pickle
import random

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the random calls are those of the kernels' tests, which import Triton")
from attention_cases import (
    MODES,
    Case,
    assert_not_finite_where,
    assert_same_bits,
    fields,
    live_positions,
    not_finite,
)
from attention_cases import random_case as attention_case
from attention_oracle import by_the_loop, may_be_nan
from confidence_cases import FLOATS, STATISTICS, assert_equals_reference, assert_identical, everything, rows_of
from confidence_cases import random_case as confidence_case
from drafts_cases import random_case as drafts_case
from unmask_cases import STATE_FIELDS, assert_same, one_row
from unmask_cases import Case as UnmaskCase
from unmask_cases import random_case as unmask_case

from dlm_kernels import cpu, reference
from dlm_kernels.cpu import noise, sight
from dlm_kernels.reference import noise as random_numbers
from dlm_kernels.reference.confidence import Confidence
from dlm_kernels.rules import UnmaskRule
from dlm_kernels.state import DENOISE
from dlm_kernels.testing import GuardedMemory, no_worse_than_torch, poisoned
from dlm_kernels.testing.attention_calls import GUARD, paged, score_floor

# block_attention


def attend(case: Case) -> Tensor:
    """What the op makes of a call, its buffers poisoned."""
    memory = GuardedMemory()
    with poisoned(memory):
        out = cpu.block_attention(*case.arguments, **case.options)
    memory.check()
    return out


def check_attention(case: Case, dtype: torch.dtype, floor: float = 1e-6) -> None:
    """Within the error bound of the loop over visible keys, zero where dead, and stored as the reference stores."""
    ours, low = case.to(dtype), case.to(dtype)
    out, low_out, exact, may = attend(ours), low.reference(), by_the_loop(case), may_be_nan(case, keys=True)
    assert out.shape == case.q.shape and out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert_not_finite_where(out, exact, may)
    options = {"half_steps": False, "may_be_nan": may, "means_of": case.v}
    no_worse_than_torch("out", out, low_out, exact, floor=floor, **options)
    w = fields(case)
    for b in range(case.q.shape[0]):
        dead = sorted(set(range(case.q.shape[2])) - set(live_positions(w, b)))
        assert not out[b, :, dead].any(), "a dead position is not zero"
    for mine, theirs in zip(ours.buffers, low.buffers, strict=True):
        assert_same_bits(mine, theirs)


CAMPAIGN = 5000  # random calls of each op
FEATURES = [(), ("kept",), ("sliding",), ("shared",), ("kept", "sliding", "shared"), ("fp8",), ("page_size",)]
FEATURES += [("kept", "sliding", "shared", "page_size")]


@pytest.mark.parametrize("features", FEATURES, ids="+".join)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", [0, sight.CALL], ids=["rows alone", "rows together"])
def test_attention_is_a_softmax_over_the_visible_keys(
    mode: str, features: tuple[str, ...], call: int, monkeypatch
) -> None:
    """Hidden slots and dead positions hold NaN; one call in four has a NaN or an infinity in a live place too."""
    monkeypatch.setattr(sight, "CALL", call)
    for seed in range(10):
        check_random_attention(mode, features, seed)


def check_random_attention(mode: str, features: tuple[str, ...], seed: int) -> None:
    rng = random.Random(f"{mode} {features} {seed}")
    case = attention_case(
        rng.randrange(2**31),
        B=rng.choice((1, 2, 3, 6)),
        W=rng.choice((1, 5, 16, 33)),
        D=rng.choice((1, 16, 24)),
        mode=mode,
        capacity=rng.choice((17, 40, 80)),
        full_rows=rng.random() < 0.3,
        **{name: 16 if name == "page_size" else True for name in features},
    )
    case = not_finite(case, rng) if seed % 4 == 3 else case
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    check_attention(case, dtype, score_floor(case.q, case.k, case.k_buffer, case.k_scale, case.scale))


@pytest.mark.campaign
@pytest.mark.parametrize("call", [0, sight.CALL], ids=["rows alone", "rows together"])
def test_attention_is_that_on_thousands_of_random_calls(call: int, monkeypatch) -> None:
    monkeypatch.setattr(sight, "CALL", call)
    for seed in range(CAMPAIGN // 2):
        rng = random.Random(seed)
        check_random_attention(rng.choice(MODES), rng.choice(FEATURES), 1000 + seed)


@pytest.mark.parametrize("mode", MODES)
def test_attention_in_float64(mode: str) -> None:
    for seed in range(5):
        case = attention_case(seed, mode=mode, B=3)
        run = case.to(torch.float64)
        torch.testing.assert_close(attend(run), by_the_loop(case), rtol=1e-12, atol=1e-13)


def stored_case(mode: str, replaced: tuple[int, int], slots: range, kv_len: int, dead: int | None = None) -> Case:
    """A lone row of four positions stored in `slots`, behind or among cached ones."""
    case = attention_case(
        5, B=1, W=4, G=2, H_kv=2, mode=mode, cache=True, full_rows=True, kv_lens=(kv_len,), replaced=(replaced,)
    )
    case.window.q_block.copy_(torch.tensor([1, 1, 2, 2])), case.window.q_pos.copy_(torch.arange(4))
    if dead is not None:
        case.window.q_block[0, dead] = -1
    case.window.kv_slot.copy_(torch.tensor(slots))
    for new in (case.q, case.k, case.v):
        new.copy_(torch.randn_like(new).half())
    return case


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("replaced", "slots", "kv_len", "is_view"),
    [
        ((0, 0), range(20, 24), 20, True),
        ((8, 12), range(8, 12), 20, True),
        ((0, 4), range(3, -1, -1), 20, True),
        ((8, 12), range(20, 24), 20, False),
        ((0, 0), range(21, 25), 20, False),
    ],
    ids=["appended", "replaced", "in reverse", "a hole", "a gap"],
)
def test_a_lone_row_whose_window_is_stored_reads_the_cache_as_it_lies(mode, replaced, slots, kv_len, is_view) -> None:
    case = stored_case(mode, replaced, slots, kv_len)
    check_attention(case, torch.float32)
    run = case.to(torch.float32)
    attend(run)
    (product,) = vars(run.window)["_sight"].products
    assert product.joins != is_view
    check_attention(stored_case(mode, replaced, slots, kv_len, dead=1), torch.float32)


@pytest.mark.parametrize(("kv_lens", "products"), [((30, 40, 50), 1), ((0, 0, 0), 1), ((5, 1900, 5), 2)])
def test_rows_share_a_product_unless_the_padding_costs_more(kv_lens: tuple[int, ...], products: int) -> None:
    options = {"cache": True, "mode": "full", "full_rows": True, "capacity": 2000, "kv_lens": kv_lens}
    case = attention_case(3, B=3, W=8, G=4, H_kv=2, **options)
    check_attention(case, torch.float32)
    attend(run := case.to(torch.float32))
    assert len(vars(run.window)["_sight"].products) == products


def test_a_window_that_was_written_between_two_calls_is_looked_at_again() -> None:
    options = {"mode": "block", "cache": True, "full_rows": True, "kv_lens": (20, 31)}
    for name, value in (("kv_len", 3), ("q_len", 2), ("q_block", 0), ("replaced", 2), ("kv_slot", -1)):
        case = attention_case(11, B=2, W=9, **options).to(torch.float32)
        for tensor in (case.q, case.k, case.v, *case.buffers):
            tensor.nan_to_num_(0.5, 0.5, 0.5)
        attend(case)
        seen = vars(case.window)["_sight"]
        attend(case)
        assert vars(case.window)["_sight"] is seen
        getattr(case.window, name)[0] = value
        torch.testing.assert_close(attend(case), case.reference())
        assert vars(case.window)["_sight"] is not seen
    assert "_sight" not in vars(dataclasses.replace(case.window))
    for mode in ("causal", "shadow"):
        case = rows_case(mode, (8, 8), 20, (0, 0), 20).to(torch.float32)
        attend(case)
        case.window.q_pos[0] = torch.tensor([3, 3, 4, 4, 1, 1, 2, 9])
        torch.testing.assert_close(attend(case), case.reference())


def rows_case(
    mode: str, q_lens: tuple[int, ...], kv_len: int, replaced: tuple[int, int], slot: int | None, capacity: int = 40
) -> Case:
    """Rows of the first `q_lens` of eight positions in three blocks, stored from `slot` on (None: not), over the same
    slots; what is neither live nor seen is not finite."""
    B = len(q_lens)
    case = attention_case(
        7, B=B, W=8, G=2, H_kv=2, mode=mode, cache=True, capacity=capacity, q_lens=q_lens, kv_lens=(kv_len,) * B,
        replaced=(replaced,) * B,
    )  # fmt: skip
    w = case.window
    w.q_pos.copy_(torch.arange(8) % 5 + 3), w.q_block.copy_(torch.tensor([1, 1, 1, 2, 2, 2, 4, 4]))
    w.kv_slot.copy_(torch.full((8,), -1) if slot is None else torch.arange(8) + slot)
    for new, dead in ((case.q, math.nan), (case.k, math.inf), (case.v, math.inf)):
        new.copy_(torch.randn_like(new).half())
        new.masked_fill_(~case.live[:, None, :, None], dead)
    return case


RANGES = {
    "an empty cache": (0, (0, 0), 0, 40),
    "an empty cache and no store": (0, (0, 0), None, 40),
    "appended": (20, (0, 0), 20, 40),
    "not stored": (20, (0, 0), None, 40),
    "a gap": (20, (9, 3), 22, 40),
    "replaced at the start": (20, (0, 5), 0, 40),
    "replaced in the middle": (20, (8, 13), 8, 40),
    "replaced at the end": (20, (15, 20), 15, 40),
    "more replaced than stored": (20, (6, 17), 9, 40),
    "replaced beyond the prefix": (20, (15, 40), 20, 40),
    "replaced behind the prefix": (20, (30, 40), 20, 40),
    "all replaced": (20, (0, 30), 12, 40),
    "replaced and not stored": (20, (8, 13), None, 40),
    "the whole cache": (28, (20, 28), 20, 28),
    "the whole cache in two pieces": (28, (8, 13), None, 28),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RANGES)
def test_rows_that_are_alike_are_one_product_of_exactly_what_they_see(name: str, mode: str, monkeypatch) -> None:
    kv_len, replaced, slot, capacity = RANGES[name]
    monkeypatch.setattr(sight, "_unlike", None)
    for q_lens in ((8, 8, 8), (5, 5, 5), (0, 8, 8), (5, 0, 5), (0, 0, 5), (0, 0, 0), (1,)):
        # What is stored from the first replaced slot on must be replaced.
        end = max(replaced[1], replaced[0] + max(q_lens)) if slot == replaced[0] < replaced[1] else replaced[1]
        case = rows_case(mode, q_lens, kv_len, (replaced[0], end), slot, capacity)
        check_attention(case, torch.float32)
        attend(run := case.to(torch.bfloat16))
        products = vars(run.window)["_sight"].products
        assert len(products) == any(q_lens)
        assert all(product.dead_keys is None and product.dead_queries is None for product in products)
        if q_lens == (5, 5, 5) and name in ("appended", *(x for x in RANGES if x.startswith("replaced at"))):
            assert not products[0].joins


def layers_of(case: Case, dtype: torch.dtype) -> list[Case]:
    """Three calls with one window: other keys in other caches, seen at the same slots."""
    first = case.to(dtype)
    rolled = [[x.roll(n, 3) for x in (first.q, first.k, first.v, *first.buffers)] for n in (0, 1, 2)]
    return [Case(*tensors, first.window, first.scale, None, None, first.sliding_window) for tensors in rolled]


def check_pages(case: Case, pages: Case, dtype: torch.dtype = torch.float32) -> None:
    """Over pages all layers have the bits of a cache in one piece, and store the same; no other page is written."""
    for ours, theirs in zip(layers_of(pages, dtype), layers_of(case, dtype), strict=True):
        before = [x.clone() for x in ours.buffers]
        assert_same_bits(attend(ours), attend(theirs))
        table, page_size = ours.window.page_table, ours.caches[0].shape[2]
        for was, mine, cache in zip(before, ours.caches, theirs.caches, strict=True):
            whole = torch.nn.functional.pad(
                cache, (0, 0, 0, table.shape[1] * page_size - cache.shape[2]), value=math.nan
            )
            for (row, index), page in zip(itertools.product(*map(range, table.shape)), table.flatten(), strict=True):
                if 0 <= page < len(mine):
                    expected = whole[row, :, index * page_size : (index + 1) * page_size]
                    assert_same_bits(mine[page], expected)
                    was[page, :, GUARD:-GUARD] = expected
        for was, mine in zip(before, ours.buffers, strict=True):
            assert_same_bits(mine, was)


@pytest.mark.parametrize("features", [x for x in FEATURES if not {"fp8", "page_size"} & {*x}], ids="+".join)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", [0, sight.CALL], ids=["rows alone", "rows together"])
def test_pages_give_the_bits_of_a_cache_in_one_piece(
    mode: str, features: tuple[str, ...], call: int, monkeypatch
) -> None:
    """Of pages that lie anywhere; hidden slots, dead positions and pages that nobody needs hold NaN."""
    monkeypatch.setattr(sight, "CALL", call)
    monkeypatch.setattr(reference, "block_attention", None)
    for seed in range(10):
        rng = random.Random(f"pages {mode} {features} {seed}")
        case = attention_case(
            rng.randrange(2**31),
            B=rng.choice((1, 2, 3, 6)),
            W=rng.choice((1, 5, 16, 33)),
            D=rng.choice((1, 16, 24, 64)),
            mode=mode,
            cache=True,
            capacity=rng.choice((17, 40, 80, 130)),
            full_rows=rng.random() < 0.5,
            **dict.fromkeys(features, True),
        )
        dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[seed % 4]
        check_pages(case, paged(case, rng.choice((16, 32, 64)), rng), dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RANGES)
def test_rows_that_are_alike_have_those_bits_too(name: str, mode: str, monkeypatch) -> None:
    kv_len, replaced, slot, capacity = RANGES[name]
    monkeypatch.setattr(sight, "_unlike", None)
    for q_lens in ((8, 8, 8), (5, 0, 5), (0, 0, 5), (0, 0, 0), (8,)):
        end = max(replaced[1], replaced[0] + max(q_lens)) if slot == replaced[0] < replaced[1] else replaced[1]
        case = rows_case(mode, q_lens, kv_len, (replaced[0], end), slot, capacity)
        check_pages(case, paged(case, 16))


def test_rows_that_share_pages_have_the_bits_of_copies() -> None:
    """Of the prefix that is common to all rows: its pages stand in every row of the table."""
    for mode, kv_len, page_size in itertools.product(MODES, (32, 40, 47), (16, 32)):
        case = rows_case(mode, (8, 8, 8), kv_len, (33, 41), 33 if kv_len > 32 else 32, capacity=60)
        rows = case.window.cache_row.long()
        for buffer in case.buffers:
            buffer[rows, :, GUARD : GUARD + 32] = buffer[rows[0], :, GUARD : GUARD + 32].clone()
        pages, common = paged(case, page_size), 32 // page_size
        freed = pages.window.page_table[rows[1:], :common].flatten().tolist()
        pages.window.page_table[rows[1:], :common] = pages.window.page_table[rows[0], :common]
        for buffer in pages.buffers:
            buffer[freed] = math.nan
        check_pages(case, pages)


def test_a_page_table_that_was_written_between_two_calls_is_looked_at_again() -> None:
    """Pages change their places in the pool, and the table says so: written through torch, through an array, or new."""
    writes = [
        lambda case, table: case.window.page_table.copy_(table),
        lambda case, table: case.window.page_table.numpy().__setitem__(..., table.numpy()),
        lambda case, table: setattr(case, "window", dataclasses.replace(case.window, page_table=table)),
    ]
    for write in writes:
        case = paged(rows_case("block", (8, 8), 20, (0, 0), 20), 16).to(torch.float32)
        expected, pages = attend(case), len(case.k_buffer)
        table = case.window.page_table
        write(case, torch.where((table >= 0) & (table < pages), (table + 1) % pages, table))
        case.k_buffer, case.v_buffer = (buffer.roll(1, 0) for buffer in case.buffers)
        assert_same_bits(attend(case), expected)


def test_pages_of_any_strides_need_no_copy() -> None:
    """Keys as a slice of one pool of all layers, values with the heads behind the slots."""
    case = attention_case(15, B=2, W=9, H_kv=2, G=2, mode="block", cache=True, full_rows=True)
    pages = paged(case, 16).to(torch.float32)
    plain = dataclasses.replace(pages, window=dataclasses.replace(pages.window))
    layers = torch.stack([pages.k_buffer, torch.full_like(pages.k_buffer, math.nan)], 3)
    pages.k_buffer = layers[:, :, :, 0]
    pages.v_buffer = pages.v_buffer.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_bits(attend(pages), attend(plain))
    for mine, theirs in zip(pages.buffers, plain.buffers, strict=True):
        assert_same_bits(mine, theirs)
    assert layers[:, :, :, 1].isnan().all()


def test_rows_of_which_one_is_odd_are_looked_at_one_by_one(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(sight, "_unlike", lambda *arguments, f=sight._unlike: calls.append(1) or f(*arguments))

    def dead(place: int):
        return lambda case: case.window.q_block[1].__setitem__(place, -1)

    def written(name: str, value: int | list[int]):
        return lambda case: getattr(case.window, name).__setitem__(1, torch.tensor(value))

    changes = {
        "first position dead": dead(0),
        "a position dead": dead(3),
        "last position dead": dead(7),
        "fewer positions": written("q_len", 4),
        "a shorter prefix": written("kv_len", 19),
        "replaced": written("replaced", [2, 4]),
        "stored elsewhere": written("kv_slot", list(range(21, 29))),
        "not stored": written("kv_slot", -1),
        "stored in part": written("kv_slot", [20, 21, -1, 23, -1, -1, 26, 27]),
        "scattered": written("kv_slot", [20, 22, 21, 23, 24, 25, 26, 27]),
        "first position not stored": lambda case: case.window.kv_slot.__setitem__((slice(None), 0), -1),
        "a sliding window": lambda case: setattr(case, "sliding_window", 6),
        "kept": lambda case: setattr(
            case, "window", dataclasses.replace(case.window, kept=torch.arange(40).expand(3, 40).contiguous() % 3 > 0)
        ),
    }
    for mode, call in itertools.product(MODES, (0, sight.CALL)):
        monkeypatch.setattr(sight, "CALL", call)
        for name, change in changes.items():
            case = rows_case(mode, (8, 8, 8), 20, (0, 0), 20)
            change(case)
            for new, value in ((case.q, math.nan), (case.k, math.inf), (case.v, math.inf)):
                new.masked_fill_(~case.live[:, None, :, None], value)
            calls.clear()
            check_attention(case, torch.float32)
            assert calls, name


def test_rows_of_a_batch_may_have_other_blocks_and_other_positions() -> None:
    blocks, positions = torch.tensor([0, 5, 5, 5, 5, 3, 3, 9]), torch.tensor([4, 4, 3, 1, 0, 9, 9, 9])
    for mode in MODES:
        for name, value in (("q_block", blocks), ("q_pos", positions)):
            case = rows_case(mode, (8, 8), 20, (0, 0), 20)
            getattr(case.window, name)[1] = value
            check_attention(case, torch.float32)


def changed(case: Case, **changes) -> tuple[tuple, dict]:
    """The arguments of the call, some of them changed."""
    names = ("q", "k", "v", "k_cache", "v_cache", "window")
    arguments = dict(zip(names, case.arguments, strict=True)) | case.options | changes
    return tuple(arguments.pop(name) for name in names), arguments


def test_a_call_that_differs_from_an_accepted_one_is_checked() -> None:
    """With the same window, and with another one of the same numbers."""
    case = dataclasses.replace(rows_case("block", (8, 8), 20, (0, 0), 20).to(torch.float32), scale=1.0)
    w, (k_cache, v_cache) = case.window, case.caches
    other = dataclasses.replace(w)
    strided = torch.empty(2, 16, dtype=torch.int32)[:, ::2].copy_(w.q_pos)
    refused = {
        "q": [case.q.half(), case.q.to("meta"), case.q[..., :8], case.q[:1]],
        "k": [case.k.half(), case.k[:, :1], case.k[:, :, :7], case.k.to("meta"), case.k.mT.contiguous().mT],
        "v": [case.v.half(), case.v[:, :1], case.v.to("meta"), case.v.mT.contiguous().mT],
        "k_cache": [
            None,
            v_cache,
            k_cache.half(),
            k_cache[:, :1],
            k_cache[:, :, :0],
            k_cache[:1].expand(4, -1, -1, -1),
        ],
        "v_cache": [None, k_cache, v_cache.half(), v_cache[:, :, 1:], v_cache.to("meta")],
        "scale": [True, math.nan, math.inf, "1"],
        "sliding_window": [True, 0, 1.0],
        "v_scale": [torch.ones(2)],
        "window": [
            dataclasses.replace(w, q_pos=strided),
            dataclasses.replace(w, kept=torch.ones(2, 39, dtype=torch.bool)),
            dataclasses.replace(w, **{name: x[:1] for name, x in w.tensors().items()}),
        ],
    }
    for name, values in refused.items():
        for value in values:
            for window in (w, other):
                # True equals 1, and is refused all the same.
                accepted = dataclasses.replace(case, sliding_window=1 if name == "sliding_window" else None)
                attend(accepted)
                arguments, options = changed(accepted, **({"window": window} | {name: value}))
                with pytest.raises((ValueError, TypeError)) as expected:
                    reference.block_attention(*arguments, **options)
                with pytest.raises(expected.type) as found:
                    cpu.block_attention(*arguments, **options)
                assert str(found.value) == str(expected.value) or arguments[0].is_meta


def test_a_window_of_the_same_numbers_sees_the_same(monkeypatch) -> None:
    case = rows_case("block", (8, 8), 20, (0, 0), 20).to(torch.float32)
    attend(case)
    again, mode = (case.to(torch.float32) for _ in range(2))
    attend(again)
    (first,), (second,) = (vars(x.window)["_sight"].products for x in (case, again))
    assert first is second and vars(case.window)["_sight"].memory is not vars(again.window)["_sight"].memory
    mode.window = dataclasses.replace(mode.window, mode="causal")
    torch.testing.assert_close(attend(mode), mode.reference())
    monkeypatch.setattr(sight, "KEPT", -1)
    for x in (again, case):
        x.window = dataclasses.replace(x.window, kv_len=x.window.kv_len - 1)
        attend(x)
    assert vars(case.window)["_sight"].products[0] is not vars(again.window)["_sight"].products[0]


@pytest.mark.parametrize(
    "copied", [dataclasses.replace, copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_what_is_written_past_torch_is_seen(copied) -> None:
    """Through an array, through `.data` and by other memory, in a window and in a copy of one."""
    elsewhere = torch.tensor([3, 20], dtype=torch.int32)
    for write in (
        lambda x: x.numpy().__setitem__(0, 3),
        lambda x: x.data.__setitem__(0, 3),
        lambda x: setattr(x, "data", elsewhere),
        lambda x: x.set_(elsewhere),
    ):
        case = rows_case("full", (8, 8), 20, (0, 0), 20).to(torch.float32)
        attend(case)
        window, case.window = case.window, copied(case.window)
        assert vars(case.window).get("_sight") is None or case.window.kv_len is window.kv_len
        attend(case)
        write(case.window.kv_len)
        torch.testing.assert_close(attend(case), case.reference())


@pytest.mark.parametrize("cache", [True, False])
def test_a_rows_bits_do_not_depend_on_what_its_neighbours_hold(cache: bool) -> None:
    for seed in range(8):
        case = attention_case(seed, B=3, cache=cache, mode=MODES[seed % 4], q_lens=None).to(torch.float32)
        for b in range(3):
            other = case.to(torch.float32)
            for new in (other.q, other.k, other.v):
                new[[x for x in range(3) if x != b]] = math.nan
            for buffer in other.buffers:
                buffer[[r for r in range(buffer.shape[0]) if r != other.window.cache_row[b]]] = math.inf
            assert_same_bits(attend(other)[b], attend(case.to(torch.float32))[b])


def test_a_query_whose_scores_are_all_minus_infinity_gets_nan_and_not_zeros() -> None:
    for kv_len in (3, 40):
        case = attention_case(3, B=1, W=4, H_kv=1, G=1, mode="full", cache=True, full_rows=True, kv_lens=(kv_len,))
        case.window.q_block.fill_(0), case.window.kv_slot.fill_(-1), case.window.replaced.zero_()
        case.q.zero_(), case.v.fill_(1.0), case.v_buffer.fill_(1.0), case.k.fill_(-1e25), case.k_buffer.fill_(-1e25)
        case.q[0, 0, 2] = 1e25
        out = attend(case.to(torch.float32))
        assert out[0, 0, :, 0].isnan().tolist() == [False, False, True, False]
        assert (out[0, 0, [0, 1, 3]] == 1).all()
        case.v[..., 0] = math.nan
        out = attend(case.to(torch.float32))
        assert out[0, 0, 2].isnan().all() and (out[0, 0, [0, 1, 3], 1:] == 1).all()


def test_values_of_zero_are_zeros_and_not_nan() -> None:
    case = attention_case(3, B=2, W=4, mode="block", cache=True, full_rows=True)
    case.v.zero_(), case.v_buffer.masked_fill_(~case.v_buffer.isnan(), 0.0)
    assert not attend(case.to(torch.float32)).any()


def test_strided_views_need_no_copy() -> None:
    """q, k and v as slices of one fused projection, the caches as slices of one buffer of all layers."""
    case = attention_case(15, B=2, W=9, H_kv=2, G=2, mode="block", cache=True, full_rows=True)
    fused = torch.cat([tensor.transpose(1, 2).flatten(2) for tensor in (case.q, case.k, case.v)], 2)
    q, k, v = (part.unflatten(2, (-1, 16)).transpose(1, 2) for part in fused.split([64, 32, 32], 2))
    strided = dataclasses.replace(case, q=q, k=k, v=v)
    layers = [torch.stack([buffer, torch.full_like(buffer, math.nan)], 3) for buffer in case.buffers]
    strided.k_buffer, strided.v_buffer = (buffer[:, :, :, 0] for buffer in layers)
    check_attention(strided, torch.float32)


def test_a_gradient_is_the_references() -> None:
    case = attention_case(4, B=2, W=9, cache=False, mode="block").to(torch.float32)
    gradients = []
    for op in (cpu.block_attention, reference.block_attention):
        new = [x.nan_to_num(0, 0, 0).requires_grad_() for x in (case.q, case.k, case.v)]
        op(*new, None, None, case.window, scale=0.3).sum().backward()
        gradients.append([x.grad for x in new])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and gradients[0][1].any()


# confidence


def check_confidence(logits: Tensor, **arguments) -> Confidence:
    """Equal to the reference by its bound, in poisoned memory, with the inputs as they were."""
    given = {"logits": logits} | {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in given.items()}
    memory = GuardedMemory()
    with poisoned(memory):
        ours = cpu.confidence(logits, **arguments)
    memory.check()
    assert_equals_reference(ours, logits, **arguments)
    for name, x in given.items():
        assert_same_bits(x, before[name])
    return ours


@pytest.mark.parametrize("part", range(8))
def test_confidence_equals_the_reference_on_random_calls(part: int) -> None:
    """Ties, banned ids, biases, NaN and infinities, rows that are absent, named twice or not needed, every output."""
    for seed in range(40 * part, 40 * part + 40):
        logits, arguments = confidence_case(seed, most_rows=8)
        check_confidence(logits, **arguments)


@pytest.mark.campaign
def test_confidence_equals_the_reference_on_thousands_of_random_calls() -> None:
    for seed in range(1000, 1000 + CAMPAIGN):
        logits, arguments = confidence_case(seed, most_rows=8)
        check_confidence(logits, **arguments)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_a_divergence_from_what_holds_no_distribution_is_infinite(soft_cap: float | None) -> None:
    logits = torch.randn(5, 50)
    previous = logits + 0.1
    previous[1, :20], previous[2, 3], previous[3, 4] = torch.finfo(torch.float32).min, 3e38, math.nan
    logsumexp = torch.full((5,), 4.0)
    logsumexp[4] = math.inf
    arguments = {"soft_cap": soft_cap, "previous": previous, "previous_logsumexp": logsumexp}
    found = check_confidence(logits, outputs=("kl",), **arguments)
    assert found.kl.isinf().tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("chunk", [1, 300, 1000])
def test_rows_may_be_cut_into_chunks_anywhere(chunk: int, monkeypatch) -> None:
    for seed in range(40):
        logits, arguments = confidence_case(seed, vocabularies=(97, 256), most_rows=9)
        whole = cpu.confidence(logits, **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("dlm_kernels.cpu.confidence"), "CHUNK", chunk)
            assert_identical(cpu.confidence(logits, **arguments), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_confidence_equals_the_reference_on_a_real_vocabulary(dtype: torch.dtype) -> None:
    logits = (torch.randn(3, 126464) * 3).to(dtype)
    logits[0, 126463] = logits[1, 126336] = 40.0
    logits[2, [70, 126000]] = 41.0
    check_confidence(logits, outputs=STATISTICS, banned=torch.tensor([126336]))
    assert cpu.confidence(logits).token[2] == 70 and cpu.confidence(logits).second_token[2] == 126000


@pytest.mark.parametrize(("tied", "expected"), [((3, 5, 9), (3, 5)), ((70, 1, 300), (1, 70)), ((399, 0), (0, 399))])
def test_ties_go_to_the_lowest_ids(tied: tuple[int, ...], expected: tuple[int, int]) -> None:
    logits = torch.zeros(1, 400)
    logits[0, list(tied)] = 2.0
    result = cpu.confidence(logits)
    assert (result.token.item(), result.second_token.item()) == expected
    banned = cpu.confidence(logits, banned=torch.tensor([expected[0], 0 if 0 in tied else -1]))
    assert banned.token.item() == expected[1]


def test_the_32_largest_banned_leave_the_33rd_and_34th() -> None:
    logits = torch.randn(2, 1025)
    order = logits.topk(34).indices
    result = cpu.confidence(logits, banned=order[:, :32].clone())
    assert torch.equal(torch.stack([result.token, result.second_token], 1), order[:, 32:])
    everything_banned = cpu.confidence(torch.zeros(1, 5), banned=torch.arange(5))
    assert everything_banned.error.item() == 1 and everything_banned.confidence.item() == 0


@pytest.mark.parametrize(
    "row",
    [[math.nan, 1.0, 2.0], [1.0, math.inf, 2.0], [-math.inf] * 3, [1.0, 2.0, math.nan], [-3e38] * 3, [1.0, 3e38, 2.0]],
    ids=["nan first", "+inf", "all -inf", "nan last", "all finfo.min", "finite but too large"],
)
def test_a_row_without_a_meaning_is_zeros_and_an_error(row: list[float]) -> None:
    result = cpu.confidence(torch.tensor([row, [0.0, 1.0, 0.0]]), **everything(2, 3, "cpu"))
    assert result.error.tolist() == [1, 0]
    assert result.token[0] == result.sampled_token[0] == 0 and result.second_token[0] == -1
    assert all(getattr(result, name)[0] == 0 for name in FLOATS)
    assert result.token[1] == 1


def test_a_row_that_is_not_needed_is_not_read() -> None:
    logits = torch.full((2, 70), math.nan)
    logits[1] = 0.0
    result = cpu.confidence(logits, rows=torch.tensor([-1, 1, -1], dtype=torch.int32), **everything(3, 70, "cpu"))
    assert result.error.tolist() == [0, 0, 0]
    ids = (result.token, result.second_token, result.sampled_token)
    assert all(x.tolist()[::2] == [-1, -1] for x in ids)
    assert all(getattr(result, name).tolist()[::2] == [0, 0] for name in FLOATS)


def test_confidence_of_no_row_and_of_no_logits() -> None:
    empty = cpu.confidence(torch.zeros(0, 7), rows=torch.tensor([-1, 0, -1], dtype=torch.int32), outputs=STATISTICS)
    expected = reference.confidence(
        torch.zeros(0, 7), rows=torch.tensor([-1, 0, -1], dtype=torch.int32), outputs=STATISTICS
    )
    assert_identical(empty, expected)
    assert cpu.confidence(torch.zeros(0, 7)).token.shape == (0,)


def test_a_row_alone_has_the_bits_of_the_row_in_a_batch() -> None:
    logits = torch.randn(4, 700) * 3
    arguments = everything(4, 700, "cpu")
    together = cpu.confidence(logits, **arguments)
    for n in range(4):
        alone = {
            name: value[n : n + 1] if isinstance(value, Tensor) and name != "seed" else value
            for name, value in arguments.items()
        }
        assert_identical(cpu.confidence(logits[n : n + 1], **alone), rows_of(together, slice(n, n + 1)))


def test_an_output_draws_by_its_own_seed() -> None:
    logits = torch.randn(3, 700) * 0.1
    arguments = everything(5, 700, "cpu") | {"rows": torch.tensor([2, -1, 0, 0, 1], dtype=torch.int32)}
    one = cpu.confidence(logits, **arguments)
    assert_identical(cpu.confidence(logits, **arguments | {"seed": arguments["seed"].repeat(5)}), one)
    arguments["seed"] = torch.tensor([5, 6, -1, 0x123456789ABCDEF0, -(2**63)])
    together = cpu.confidence(logits, **arguments)
    assert torch.equal(together.sampled_token, reference.confidence(logits, **arguments).sampled_token)
    for n in range(5):
        alone = {name: value[n : n + 1] if isinstance(value, Tensor) else value for name, value in arguments.items()}
        assert_identical(cpu.confidence(logits, **alone), rows_of(together, slice(n, n + 1)))


@pytest.mark.parametrize("seeds", [0, 1])
def test_no_rows_take_no_seed_or_one(seeds: int) -> None:
    arguments = {"outputs": ("sampled",), "seed": torch.zeros(seeds, dtype=torch.int64)}
    arguments |= {"sample_temperature": torch.ones(0), "noise": torch.zeros(0, 3, dtype=torch.int32)}
    assert cpu.confidence(torch.zeros(0, 7), **arguments).sampled_token.shape == (0,)


@pytest.mark.parametrize("size", [1.0, 2.0**26, 2.0**40])
def test_a_draw_is_the_references_even_where_rounding_makes_ties(size: float) -> None:
    """Scores of 2^26 are 8 apart, so that a noise above 4 rounds a score up to its neighbour; at 2^40 none does."""
    logits = size + torch.randint(-4, 1, (64, 33)) * max(1.0, size * 2**-23)
    arguments = {
        "outputs": ("sampled",),
        "sample_temperature": torch.ones(64),
        "seed": torch.tensor([3]),
        "noise": torch.arange(192, dtype=torch.int32).view(64, 3),
    }
    ours, theirs = (op.confidence(logits, **arguments) for op in (cpu, reference))
    assert torch.equal(ours.sampled_token, theirs.sampled_token)
    assert (ours.sampled_token != ours.token).any() == (size < 2**40)


@pytest.mark.parametrize("logits", [[-19.0, 0.0], [2.0**28 + 32, 2.0**28 + 64], [2.0**20 - 19, 2.0**20]])
def test_an_id_far_below_the_best_is_drawn_where_the_noise_is_extreme(logits: list[float], monkeypatch) -> None:
    """The largest noise for id 0 and the smallest for id 1: 16.6 and -2.8. At 2^28 both scores round to one number."""

    def extreme(ids: Tensor) -> Tensor:
        return torch.where(ids == 0, 16.6, -2.8)

    monkeypatch.setattr(noise, "gumbel", lambda k0, k1, ids, dtype: extreme(torch.from_numpy(ids)))
    monkeypatch.setattr(random_numbers, "gumbel", lambda key, ids, dtype: extreme(ids))
    counters = {"seed": torch.tensor([0]), "noise": torch.zeros(1, 3, dtype=torch.int32)}
    arguments = {"outputs": ("sampled",), "sample_temperature": torch.ones(1), **counters}
    for op in (cpu, reference):
        assert op.confidence(torch.tensor([logits]), **arguments).sampled_token.item() == 0


def test_the_noise_is_the_references_bit_for_bit() -> None:
    seeds = (0, -1, 2**62 + 12345, -(2**62) + 7)
    counters = torch.randint(-(2**31), 2**31 - 1, (50, 3)).to(torch.int32)
    ids = torch.randint(0, 2**30, (50,))
    for seed in (*(torch.tensor([x]) for x in seeds), torch.randint(-(2**62), 2**62, (50,))):
        key = random_numbers.row_key(seed, counters)
        k0, k1 = noise.row_key(seed, counters)
        assert key[:, 0].tolist() == k0.tolist() and key[:, 1].tolist() == k1.tolist()
        for dtype in (torch.float32, torch.float64):
            expected = random_numbers.gumbel(key, ids[:, None], dtype)[:, 0]
            assert torch.equal(noise.gumbel(k0, k1, ids.numpy(), dtype), expected)


# The other ops, and what all ops refuse


def test_the_other_ops_are_the_references() -> None:
    for seed in range(10):
        drafts = drafts_case(seed)
        assert torch.equal(drafts.build(cpu.draft_build), drafts.build())
        ours, theirs = drafts.copy().verify(cpu.verify), drafts.copy().verify()
        for mine, expected in zip(ours, theirs, strict=True):
            assert_same_bits(mine, expected)


def test_tensors_on_another_device_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="confidence: backend 'cpu' takes tensors on a CPU, got tensors on meta; .*"):
        cpu.confidence(torch.zeros(2, 5, device="meta"))


def test_every_argument_may_be_given_by_its_name() -> None:
    assert_identical(cpu.confidence(logits=torch.eye(3)), cpu.confidence(torch.eye(3)))


def test_errors_are_those_of_the_reference() -> None:
    case = attention_case(1, B=1, W=3, cache=False).to(torch.float32)
    for op in (cpu, reference):
        with pytest.raises(TypeError, match="block_attention: q must be one of"):
            op.block_attention(case.q.int(), case.k, case.v, None, None, case.window, scale=1.0)
        with pytest.raises(ValueError, match="confidence: outputs must be distinct names"):
            op.confidence(torch.zeros(2, 5), outputs=("third",))


def test_what_is_traced_gets_the_shapes_of_the_reference() -> None:
    with FakeTensorMode() as mode:
        stats = cpu.confidence(mode.from_tensor(torch.randn(3, 70)), outputs=("second",))
    assert stats.token.shape == (3,) and stats.token.dtype == torch.int64 and stats.margin.dtype == torch.float32


# unmask

USUAL_RULES = {
    "llada": UnmaskRule("none", quota=True),
    "fast-dllm": UnmaskRule("threshold", inclusive=True, cache="refresh"),
    "fast-dllm-factor": UnmaskRule("factor", cache="once", stop="after_block"),
    "fast-dllm-v2": UnmaskRule("threshold", cache="commit", first_token=True, stop="all_stop"),
    "sdar": UnmaskRule("none", quota=True, cache="once", stop="never"),
    "sdar-entropy": UnmaskRule("entropy", inclusive=True, cache="commit"),
    "entropy": UnmaskRule("entropy", runs=True),
    "llada2.1": UnmaskRule("threshold", edit=True, cache="commit", stop="after_block"),
    "d2f": UnmaskRule("threshold", pipeline=True, scope="each", cache="fused", stop="appends"),
    "pipeline": UnmaskRule("factor", pipeline=True, scope="first", stop="after_block"),
}


def check_unmask(case: UnmaskCase, note: object) -> None:
    """The bits of the reference, in guarded memory with strided rows, with the inputs as they were."""
    expected, memory = case.copy().run(), GuardedMemory()
    ours = case.map(lambda _, tensor: memory.spread(tensor, shift=2))
    with poisoned(memory):
        result = ours.run(cpu.unmask)
    memory.check()
    assert_same(result, expected, f"{note} {case.rule} {case.args['kind']}")
    for name in STATE_FIELDS:
        assert_same_bits(getattr(result[0], name), getattr(expected[0], name))
    for name, x in ours.args.items():
        if isinstance(x, Tensor):
            assert_same_bits(x, case.args[name])


@pytest.mark.parametrize("part", range(4))
def test_unmask_equals_the_reference_on_random_calls(part: int) -> None:
    """Every rule, phase and stop; ties, NaN, broken statistics, rows that sit out, lanes outside the canvas."""
    check_random_unmask(range(200 * part, 200 * part + 200))


def check_random_unmask(seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        check_unmask(unmask_case(seed, B=rng.choice((1, 3, 6)), long=rng.random() < 0.1), f"seed {seed}")


@pytest.mark.campaign
def test_unmask_equals_the_reference_on_thousands_of_random_calls() -> None:
    check_random_unmask(range(1000, 1000 + CAMPAIGN))


@pytest.mark.parametrize("rule", USUAL_RULES.values(), ids=USUAL_RULES)
def test_the_rules_of_most_decoders_are_this_backends_own(rule: UnmaskRule, monkeypatch) -> None:
    """Equal to the reference, which is not what computes them."""
    module = importlib.import_module("dlm_kernels.cpu.unmask")
    monkeypatch.setattr(module, "reference", None)
    for seed in range(40):
        check_unmask(unmask_case(seed, B=1 + seed % 3, rule=rule, long=seed % 8 == 0), f"seed {seed}")
    check_unmask(unmask_case(1, B=module.MOST_ROWS, rule=rule), "as many rows as there may be")
    with pytest.raises(AttributeError, match="unmask"):
        unmask_case(1, B=module.MOST_ROWS + 1, rule=rule).run(cpu.unmask)
    monkeypatch.setattr(module, "MOST_LANES", 1)
    with pytest.raises(AttributeError, match="unmask"):
        unmask_case(1, B=2, rule=rule).run(cpu.unmask)


def test_unmask_of_many_rows_and_of_none() -> None:
    for B in (0, 65, 150):
        check_unmask(unmask_case(3, B=B or 1).map(lambda name, x, B=B: x if B or name == "stop_ids" else x[:0]), B)


def test_what_unmask_writes_is_counted_as_a_change() -> None:
    case = unmask_case(0, rule=USUAL_RULES["sdar"])
    before = {name: x._version for name, x in vars(case.state).items()}
    case.run(cpu.unmask)
    assert all(x._version > before[name] for name, x in vars(case.state).items())


def test_unmask_refuses_what_the_reference_refuses_and_writes_nothing() -> None:
    case = unmask_case(0, rule=USUAL_RULES["sdar"])
    before, wrong = case.copy(), dataclasses.replace(case, args=case.args | {"pred": case.args["pred"].int()})
    for op in (cpu.unmask, reference.unmask):
        with pytest.raises(TypeError, match="unmask: pred must be torch.int64, got torch.int32"):
            wrong.run(op)
    assert_same((case.state, torch.ones(1)), (before.state, torch.ones(1)))


def test_a_gradient_of_what_unmask_records_is_the_references() -> None:
    case = unmask_case(0, rule=USUAL_RULES["sdar"]).copy()
    case.args["confidence"].nan_to_num_(0.5, 0.5, 0.5).requires_grad_()
    state, written = case.run(cpu.unmask)
    state.unmask_confidence.sum().backward()
    assert written.any() and torch.equal(case.args["confidence"].grad, written.float())


def test_what_is_traced_gets_the_lanes_of_the_reference() -> None:
    case = unmask_case(0, rule=USUAL_RULES["sdar"])
    with FakeTensorMode() as mode:
        _, written = case.map(lambda _, x: mode.from_tensor(x)).run(cpu.unmask)
    assert written.shape == case.args["score"].shape and written.dtype == torch.bool


@pytest.mark.parametrize("inclusive", [False, True])
def test_a_score_at_its_limit_is_the_references(inclusive: bool) -> None:
    """Every lane's score is its threshold, the limit of its run and of its edit; a factor's limit is one of fp32."""
    rules = (UnmaskRule("threshold", inclusive=inclusive, runs=True), UnmaskRule("none", runs=True))
    rules += (dataclasses.replace(USUAL_RULES["llada2.1"], inclusive=inclusive),)
    for seed in range(30):
        for rule in rules:
            case = unmask_case(seed, rule=rule)
            case.args["score"] = torch.full_like(case.args["score"], 0.5)
            for name in ("value", "run_value", "edit_value"):
                if case.args[name] is not None:
                    case.args[name] = torch.full_like(case.args[name], 0.5)
            check_unmask(case, f"seed {seed}")
        factor = torch.rand(1)
        scores = 1 - factor / torch.arange(2, 10)
        options = {"kmin": 0, "value": factor, "score": scores[None], "rank": -torch.arange(8.0)[None]}
        case = one_row("########", (0, 8), DENOISE, UnmaskRule("factor"), "w" * 8, **options)
        assert case.copy().run(cpu.unmask)[1].all()
        check_unmask(case, f"factor {factor.item()}")


@pytest.mark.parametrize("rule", ["d2f", "pipeline"])
def test_a_pipelines_empty_region_and_its_least_numbers_are_the_references(rule: str) -> None:
    for seed in range(40):
        case = unmask_case(seed, rule=USUAL_RULES[rule])
        if seed % 2:
            # The block before the region would begin before the canvas, and holds a mask.
            case.state.block_start.clamp_(max=1)
            case.state.block_end.copy_(case.state.block_start)
            case.state.tokens[:, 0], case.args["append_masks"] = 7, torch.zeros_like(case.args["append_masks"])
        else:
            case.args["activate_masks"].fill_(-1)
        check_unmask(case, f"seed {seed}")


def test_a_state_that_asks_for_a_gradient_is_written_where_none_is_taken() -> None:
    case = unmask_case(0, rule=USUAL_RULES["sdar"])
    expected = case.copy().run()
    case.state.unmask_confidence.requires_grad_()
    with torch.no_grad():
        assert_same(case.run(cpu.unmask), expected)
