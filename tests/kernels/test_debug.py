"""The debug mode, and what every check says of an argument of a wrong type."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from named_errors import unnamed
from torch._subclasses.fake_tensor import FakeTensorMode

import dlm_kernels
from dlm_kernels import RowState, UnmaskRule, Window, cpu, reference
from dlm_kernels.checks import contents, debug
from dlm_kernels.checks.drafts import MAX_DRAFTS
from dlm_kernels.checks.written import check_written
from dlm_kernels.reference import DraftSource
from dlm_kernels.state import amend


def window(**changes) -> Window:
    """Two rows of three positions, stored behind the four slots that each row sees."""
    fields = {
        "q_pos": [[4, 5, 6]] * 2, "q_block": [[1, 1, 1]] * 2, "q_len": [3, 2], "kv_slot": [[4, 5, 6]] * 2,
        "kv_len": [4, 4], "replaced": [[0, 0]] * 2, "cache_row": [0, 1],
    } | changes  # fmt: skip
    kept = {"kept": torch.tensor(fields.pop("kept"))} if "kept" in fields else {}
    return Window(
        mode="block", **kept, **{name: torch.tensor(value, dtype=torch.int32) for name, value in fields.items()}
    )


def tensors() -> list[torch.Tensor]:
    """Random queries, keys and values of two rows, and caches of seven slots."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in [(2, 2, 3, 16)] * 3 + [(2, 2, 7, 16)] * 2]


def attend(op, window: Window) -> torch.Tensor:
    return op(*tensors(), window, scale=0.25)


BACKENDS = [pytest.param(reference.block_attention, id="reference"), pytest.param(cpu.block_attention, id="cpu")]


def test_the_mode_is_off_until_it_is_turned_on():
    code = "import sys, dlm_kernels.checks.debug as d; print(d.is_on(), 'dlm_kernels.checks.contents' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_a_block_ends_with_the_mode_that_it_began_with():
    assert debug.is_on()
    with dlm_kernels.debug(False):
        assert not debug.is_on()
        with pytest.raises(RuntimeError), dlm_kernels.debug(True):
            assert debug.is_on()
            raise RuntimeError
        assert not debug.is_on()
    assert debug.is_on()
    dlm_kernels.debug(False)
    assert not debug.is_on()
    with pytest.raises(TypeError, match="debug: on must be a bool, got on=1"):
        dlm_kernels.debug(1)


@pytest.mark.parametrize("op", BACKENDS)
def test_a_window_is_read_and_not_changed(op):
    with dlm_kernels.debug(False):
        expected = attend(op, window())
    assert torch.equal(attend(op, window()), expected)


BAD_WINDOWS = {
    "window.q_len must be in [0, W] with W=3, got window.q_len=4 in row 1": dict(q_len=[3, 4]),
    "window.q_block must be a block or -1, got window.q_block=-2 in row 0, place 1": dict(q_block=[[1, -2, 1]] * 2),
    "window.kv_len must be in [0, S_max] with S_max=7, got window.kv_len=8 in row 0": dict(kv_len=[8, 4]),
    "window.cache_row must be in [0, R) with R=2, got window.cache_row=-1 in row 1": dict(cache_row=[0, -1]),
    "window.kv_slot must be in [0, S_max) with S_max=7, or -1, got window.kv_slot=7 in row 1, place 1": dict(
        kv_slot=[[4, 5, 6], [4, 7, 6]]
    ),
    "window.kv_slot must be a slot that no other position stores, got window.kv_slot=5 in row 0, place 2": dict(
        kv_slot=[[4, 5, 5]] * 2
    ),
    "window.kv_slot must be a slot that no other position stores, got window.kv_slot=4 in row 1, place 0": dict(
        cache_row=[1, 1]
    ),
    "window.kv_slot must be hidden from every row that reads it (kv_len, replaced, kept), "
    "got window.kv_slot=4 in row 1, place 0": dict(kv_len=[4, 5]),
}


@pytest.mark.parametrize("message", BAD_WINDOWS)
@pytest.mark.parametrize("op", BACKENDS)
def test_what_a_window_must_hold_is_refused_by_name_and_row(op, message):
    attend(op, window())  # the op for a CPU checks no call twice that looks like one before
    with pytest.raises(ValueError) as error:
        attend(op, window(**BAD_WINDOWS[message]))
    assert str(error.value) == f"block_attention: {message}"


@pytest.mark.parametrize(
    "fields",
    [
        dict(q_len=[3, 2], kv_slot=[[4, 5, 6], [4, 5, 99]]),  # the third position of the second row is dead
        dict(kv_slot=[[4, 5, 6], [4, 5, 4]]),
        dict(kv_len=[4, 6], q_len=[3, 0]),  # the row sits the forward out
        dict(kv_len=[7, 7], replaced=[[4, 7]] * 2),
        dict(kv_len=[7, 7], kept=[[True] * 4 + [False] * 3] * 2),
    ],
)
def test_what_no_op_looks_at_may_be_anything(fields):
    attend(reference.block_attention, window(**fields))


def test_pages_that_are_used_must_be_there_and_a_page_of_two_rows_is_stored_once():
    pages = [torch.zeros(3, 2, 16, 16) for _ in range(2)]
    q = torch.zeros(2, 2, 3, 16)

    def attend_pages(table: list[list[int]], **fields) -> None:
        paged = dataclasses.replace(window(**fields), page_table=torch.tensor(table, dtype=torch.int32))
        reference.block_attention(q, q, q, *(page.clone() for page in pages), paged, scale=1.0)

    attend_pages([[0, 99], [1, -1]])  # no slot of the second pages is used
    attend_pages([[0, 2], [0, 2]], q_len=[3, 0])
    with pytest.raises(
        ValueError, match=r"page_table must be in \[0, num_pages\) .* got window.page_table=3 in cache row 1"
    ):
        attend_pages([[0, 99], [3, -1]])
    with pytest.raises(ValueError, match="kv_slot must be a slot that no other position stores, .* in row 1, place 0"):
        attend_pages([[0, 2], [0, 2]])


def test_a_traced_call_is_not_read():
    bad = window(q_len=[9, 9])
    with FakeTensorMode() as mode:
        fake = Window(mode="block", **{name: mode.from_tensor(tensor) for name, tensor in bad.tensors().items()})
        q = torch.zeros(2, 2, 3, 16)
        assert reference.block_attention(q, q, q, None, None, fake, scale=1.0).shape == q.shape
    torch._dynamo.reset()
    compiled = torch.compile(reference.block_attention, backend="eager", fullgraph=True)
    assert torch.equal(attend(compiled, window()), attend(reference.block_attention, window()))
    meta = Window(mode="block", **{name: tensor.to("meta") for name, tensor in bad.tensors().items()})
    q = torch.zeros(2, 2, 3, 16, device="meta")
    assert reference.block_attention(q, q, q, None, None, meta, scale=1.0).is_meta


def test_every_op_is_read_but_those_with_a_result_for_every_number():
    of_a_layer = {"rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu"}
    assert {*contents.READERS} == {*cpu.__all__} - {"confidence", "uniform_scores"} - of_a_layer


# Memory.


def test_views_that_interleave_share_no_memory():
    both = torch.zeros(3, 2, 4, 8, 16)
    check_written("op", {"k": both[:, 0], "v": both[:, 1]})
    check_written("op", {"k": both[..., ::2], "v": both[..., 1::2]})
    check_written("op", {"k": both.transpose(0, 3)[0], "v": both.transpose(0, 3)[1]})


def test_views_that_overlap_in_part_share_memory():
    both = torch.zeros(3, 2, 4, 8, 16)
    for other in (both[:, 0, :, :, 1:], both[1:, 0], both.flatten()[3:19], both[:, :, 0].transpose(0, 1)):
        with pytest.raises(
            ValueError, match="^op: (k and v|v and k) are written in place and must not share memory, got"
        ):
            check_written("op", {"k": both[:, 0], "v": other})
    rows = torch.zeros(20, dtype=torch.int32)
    with pytest.raises(
        ValueError, match="a and b are written in place and must not share memory, got b 8 bytes behind a"
    ):
        check_written("op", {"a": rows[:4], "b": rows[2:6]})


def test_sharing_memory_is_having_an_element_in_common():
    generator = torch.Generator().manual_seed(0)

    def number(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    def layout() -> tuple[list[int], list[int]]:
        shape, strides, inside = [], [], number(1, 2)
        for _ in range(number(1, 2, 3)):
            shape.append(number(1, 2, 3, 4))
            strides.append(inside)
            inside = inside * shape[-1] + number(0, 0, 1, 5)
        return shape, strides

    buffer, shared = torch.zeros(600), 0
    for _ in range(2000):
        first, other = (buffer.as_strided(*layout(), number(*range(40))) for _ in range(2))
        places = [
            {
                x.storage_offset() + sum(map(int.__mul__, at, x.stride()))
                for at in itertools.product(*map(range, x.shape))
            }
            for x in (first, other)
        ]
        try:
            check_written("op", {"a": first, "b": other})
        except ValueError:
            shared += 1
            assert places[0] & places[1]
        else:
            assert not places[0] & places[1]
    assert 200 < shared < 1800


def test_a_tensor_whose_own_elements_meet_is_refused():
    with pytest.raises(
        ValueError, match="a is written in place and must have memory of its own for each of its 6 elements"
    ):
        check_written("op", {"a": torch.zeros(9).as_strided((2, 3), (1, 1))})


# Types.


@pytest.mark.parametrize("wrong", [None, [1], np.zeros(2), "x", 5, pytest.param(10**5000, id="a long int")])
@pytest.mark.parametrize("name", ["q_pos", "q_block", "q_len", "kv_slot", "kv_len", "replaced", "cache_row"])
def test_a_window_of_no_tensors_is_refused_by_name(name, wrong):
    with pytest.raises(TypeError) as error:
        dataclasses.replace(window(), **{name: wrong})
    assert unnamed(error.value, name) is None


def test_flags_of_a_rule_are_bools():
    for wrong in (1, "yes", None, torch.tensor(True)):
        with pytest.raises(TypeError, match="UnmaskRule: quota must be a bool, got quota="):
            UnmaskRule("none", quota=wrong)
    with pytest.raises(TypeError, match="UnmaskRule: passes must be a str, got passes="):
        UnmaskRule(np.array(["none", "none"]))


def test_the_sizes_of_an_empty_state_are_whole_numbers():
    for B, L, error in ((-1, 4, ValueError), (2, 2.5, TypeError), (True, 4, TypeError), (2, 2**31, ValueError)):
        with pytest.raises(error, match=r"RowState.empty: [BL] must be .*, got [BL]="):
            RowState.empty(B, L, "cpu")


def test_amend_writes_nothing_unless_every_value_fits():
    state, rows = RowState.empty(2, 4, "cpu"), torch.tensor([True, False])
    for wrong in (dict(step=2.0), dict(step=True), dict(step=2**31), dict(step=torch.zeros(3).int()), dict(spoon=1)):
        with pytest.raises((TypeError, ValueError)) as error:
            amend(state, rows, phase=3, **wrong)
        assert unnamed(error.value, next(iter(wrong))) is None
    for wrong in (None, [True, False], rows.int(), rows[:1]):
        with pytest.raises((TypeError, ValueError), match="amend: rows must"):
            amend(state, wrong, phase=3)
    assert not state.phase.any()
    amend(state, rows, phase=3, tokens=torch.tensor([1, 2, 3, 4]))
    assert state.phase.tolist() == [3, 0] and state.tokens.tolist() == [[1, 2, 3, 4], [0] * 4]


def test_a_draft_too_many_is_refused():
    W = 2
    floats = [torch.zeros(1, W) for _ in range(2)]
    counts = [torch.zeros(1, dtype=torch.int32) for _ in range(2)]
    source = DraftSource(torch.zeros(1, W, dtype=torch.int64), *floats, *counts)
    lanes, row = torch.ones(1, W, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    tokens = torch.zeros(1, W, dtype=torch.int64)
    assert reference.draft_build(source, tokens, lanes, row, D=MAX_DRAFTS).shape == (1, MAX_DRAFTS, W)
    with pytest.raises(ValueError, match=f"draft_build: D must be at most {MAX_DRAFTS}, got D={MAX_DRAFTS + 1}"):
        reference.draft_build(source, tokens, lanes, row, D=MAX_DRAFTS + 1)
    held = torch.zeros(1, MAX_DRAFTS + 1, W, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"verify: held must hold at most {MAX_DRAFTS} drafts, got shape"):
        reference.verify(
            source,
            held,
            held,
            held.float(),
            held.float(),
            eligible=lanes,
            ready=row,
            drafting=row,
            selects=row,
            mask_id=5,
        )
