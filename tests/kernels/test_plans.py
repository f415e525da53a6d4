"""What the launchers remember of calls: a remembered call is checked, launched and answered as one that is not."""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import math
import random
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the launchers launch Triton kernels")
import fuzz_ops
from fuzz_ops import CLASSES, OPS, Call, leaves, replaced, valid_call
from torch._subclasses.fake_tensor import FakeTensorMode
from uninterpreted import said

import dlm_kernels
from dlm_kernels import Window, device, plans
from dlm_kernels.tiles import UNMASK_TILES, ConfidenceTile

SUPPORT = Path(__file__).resolve().parents[1] / "support"
# By op: the module of its launcher, the name of its calls there and that of its check.
LAUNCHERS = {
    "block_attention": ("attention", "_calls", "check_arguments"),
    "confidence": ("confidence", "_calls", "check_arguments"),
    "unmask": ("unmask", "_calls", "check_arguments"),
    "draft_build": ("drafts", "_build_calls", "check_build"),
    "verify": ("drafts", "_verify_calls", "check_verify"),
    "uniform_scores": ("noise", "_calls", "check_noise"),
    "rms_norm": ("layers", "_calls_of_norm", "check_rms_norm"),
    "add_rms_norm": ("layers", "_calls_of_sum", "check_add_rms_norm"),
    "qk_norm_rope": ("layers", "_calls_of_rope", "check_qk_norm_rope"),
    "swiglu": ("layers", "_calls_of_swiglu", "check_swiglu"),
}


def module_of(op: str) -> Any:
    return importlib.import_module(f"dlm_kernels.{LAUNCHERS[op][0]}.launch")


def calls_of(op: str) -> plans.Calls:
    return getattr(module_of(op), LAUNCHERS[op][1])


def forget() -> None:
    for op in OPS:
        calls_of(op).by_key.clear()


@pytest.fixture(autouse=True)
def nothing_is_known(without_debug: None) -> Iterator[None]:
    """Every test starts without memories and leaves none; the debug mode, which checks every call, is off."""
    forget()
    yield
    forget()


# What was launched: the kernel, the grid, the call's tensors by their pointers, and all other arguments.
_launched: list[tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any]]] = []


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of being launched, a launch is noted in `_launched`."""

    def run(self: plans.Plan, where: Tensor, tensors: list, outputs: list, pointers: tuple) -> None:
        places = [(id(tensor), tensor.device) for tensor in tensors]
        places += [(i, output.shape, output.dtype) for i, output in enumerate(outputs)]
        for launch in self.launches:
            given = {name: places[place] for name, place in launch.places.items()}
            _launched.append((launch.kernel.fn.__name__, launch.grid, given, launch.values))

    monkeypatch.setattr(plans.Plan, "run", run)


def built(call: Call) -> Call:
    """The call with its dataclasses made."""
    return {
        name: CLASSES[name](**value) if name in CLASSES and type(value) is dict else value
        for name, value in call.items()
    }


def unbuilt(call: Call) -> Call:
    """The call with its dataclasses taken apart."""
    return {name: vars(value) if name in CLASSES else value for name, value in call.items()}


def verdict(op: str, call: Call) -> Any:
    """What the launcher makes of a call: the words of its error, or what it launches."""
    _launched.clear()
    try:
        fuzz_ops.function(op, "triton")(**call)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return list(_launched)


def is_taken(op: str, call: Call) -> bool:
    return not isinstance(verdict(op, call), str)


def with_field(call: Call, path: str, value: Any) -> Call:
    """The built call with one argument or field of another value, past every check of a constructor."""
    name, _, field = path.partition(".")
    if not field:
        return call | {name: value}
    changed = copy.copy(call[name])
    object.__setattr__(changed, field, value)
    return call | {name: changed}


class Subclass(Tensor):
    """A tensor of another class."""


class OtherWindow(Window):
    """A window that says something else of itself."""

    @property
    def shape(self) -> tuple[int, int]:
        return 7, 7


DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.float8_e4m3fn,
)  # fmt: skip


def other_tensors(value: Tensor) -> Iterator[Tensor]:
    """Tensors that differ from one in one thing: its type, gradient, dtype, device, layout, shape or strides."""
    yield value.as_subclass(Subclass)
    yield torch.nn.Parameter(value, requires_grad=False)
    if value.is_floating_point() and value.dtype != torch.float8_e4m3fn:
        yield value.clone().requires_grad_()
        yield torch.nn.Parameter(value)
        yield value.to_sparse()
    yield from (value.to(dtype) for dtype in DTYPES if dtype != value.dtype)
    yield value.to("meta")
    yield value[None]
    yield value[..., None]
    for dim, size in enumerate(value.shape):
        yield value.narrow(dim, 0, 0)
        yield value.narrow(dim, 0, 1)
        bytes_of = value.view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value
        yield torch.cat([bytes_of, bytes_of.narrow(dim, 0, 1)], dim).view(value.dtype)
        if size > 1:
            yield value.narrow(dim, 0, 1).expand_as(value)
            # Longer steps along this dimension and those before it.
            wider = list(value.shape)
            wider[dim] *= 2
            yield torch.zeros(wider, dtype=value.dtype).narrow(dim, 0, size)
            yield torch.zeros(wider, dtype=value.dtype)[(*[slice(None)] * dim, slice(None, None, 2))]
    for dim in range(value.dim() - 1):
        yield value.transpose(dim, dim + 1).contiguous().transpose(dim, dim + 1)
        if value.shape[dim] == value.shape[dim + 1]:
            yield value.transpose(dim, dim + 1)


def other_values(path: str, value: Any) -> Iterator[Any]:
    """Values that an argument might have instead, the most alike first."""
    if isinstance(value, Tensor):
        yield from other_tensors(value)
        yield from (value.tolist(), value.shape, 1.0)
        if value.dtype != torch.float8_e4m3fn:
            yield value.numpy()
    elif isinstance(value, bool):
        yield from (not value, int(value), float(value), np.bool_(value), torch.tensor(value))
    elif isinstance(value, (int, float)):
        yield from (int(value), float(value), bool(value), np.float64(value), torch.tensor(value))
        yield from (np.int64(value), np.float32(value))
        yield from (value + 1, -value, 0, 0.0, 1, True, 1.0, 2.0, 31, 32, 10**400, 1e39, 2**31, 2**31 - 1)
        yield from (math.nan, math.inf, -math.inf, [value])
    elif isinstance(value, str):
        yield from ("full", "causal", "block", "shadow", "refresh", "denoise", value.encode(), (value,), [value])
    elif path == "outputs":
        yield from (list(value), (*value, *value[:1]), value[::-1], value[1:], set(value), dict.fromkeys(value))
        yield from (("second",), "second", [["second"]], ("third",))
    yield from (None, 0, 1, True, "x", (), [], {}, torch.tensor(1.0), torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_after_a_good_call_every_other_one_is_refused_as_by_the_check_alone(op: str, graded: bool, launched: None):
    compared = refused = 0
    for seed in range(6):
        call = built(valid_call(op, random.Random(f"plans {op} {seed}")))
        changes = [
            (path, other) for path, value in leaves(unbuilt(call)).items() for other in other_values(path, value)
        ]
        for name in CLASSES:
            if name in call:
                changes += [(name, other) for other in (None, {}, vars(call[name]), copy.copy(call[name]))]
        if "window" in call:
            other = copy.copy(call["window"])
            object.__setattr__(other, "__class__", OtherWindow)
            changes.append(("window", other))
        altered = [with_field(call, path, other) for path, other in changes]
        # An optional tensor in the place of another one.
        optional = [path for path, value in leaves(unbuilt(call)).items() if value is None]
        tensors = [(path, value) for path, value in leaves(unbuilt(call)).items() if isinstance(value, Tensor)]
        for to, (path, value) in itertools.product(optional, tensors):
            changes.append((f"{path} as {to}", value))
            altered.append(with_field(with_field(call, path, None), to, value))
        for (path, other), changed in zip(changes, altered, strict=True):
            with torch.set_grad_enabled(graded):
                forget()
                alone = verdict(op, changed)
                forget()
                good = verdict(op, call)
                assert not isinstance(good, str)
                assert verdict(op, changed) == alone, f"{op} seed {seed}: {path}={other!r}"
                # What was refused or accepted leaves the good call as it was.
                assert verdict(op, call) == good
            compared += 1
            refused += isinstance(alone, str)
    assert refused > compared // 3 and compared > 50


@pytest.mark.parametrize("op", OPS)
def test_after_a_good_call_damaged_ones_are_refused_as_by_the_check_alone(op: str, launched: None):
    for seed in range(4):
        rng = random.Random(f"damages {op} {seed}")
        call = valid_call(op, rng)
        for kind, found in fuzz_ops.damages(op, call, rng).items():
            for damage in found:

                def of_damaged() -> Any:
                    try:
                        return verdict(op, built(damage.call))
                    except Exception as error:  # a constructor's
                        return f"{type(error).__name__}: {error}"

                forget()
                alone = of_damaged()
                forget()
                assert is_taken(op, built(call))
                assert of_damaged() == alone, f"{op} seed {seed}: {kind} {damage.path}"


def grow(value: Tensor) -> None:
    value.resize_(2 * value.shape[0], *value.shape[1:])


def wider_steps(value: Tensor) -> None:
    size = value.shape
    value.set_(torch.zeros(2 * value.numel() + 2, dtype=value.dtype).untyped_storage(), 0, size, (2,) * len(size))


def turned(value: Tensor) -> None:
    value.swapdims_(0, -1)


def wants_gradient(value: Tensor) -> None:
    value.requires_grad_()


@pytest.mark.parametrize("change", [grow, wider_steps, turned, wants_gradient])
@pytest.mark.parametrize("op", OPS)
def test_a_tensor_changed_in_place_is_another_one(op: str, change: Callable[[Tensor], None], launched: None):
    changed = 0
    for seed in range(3):
        drawn = leaves(valid_call(op, random.Random(f"{op} {seed}")))
        for path in (path for path, value in drawn.items() if isinstance(value, Tensor)):
            forget()
            call = built(valid_call(op, random.Random(f"{op} {seed}")))
            assert is_taken(op, call)
            name, _, field = path.partition(".")
            tensor = getattr(call[name], field) if field else call[name]
            try:
                change(tensor)
            except RuntimeError:
                continue  # not every tensor takes every change
            known = verdict(op, call)
            forget()
            assert known == verdict(op, call), f"{op} seed {seed}: {path}"
            changed += 1
    # The numbers of `uniform_scores` are whole, and want no gradient.
    assert changed or (op == "uniform_scores" and change is wants_gradient)


@pytest.mark.parametrize("op", OPS)
def test_a_view_of_negatives_is_refused_by_name(op: str, launched: None):
    refused = 0
    for seed in range(3):
        call = built(valid_call(op, random.Random(f"negatives {op} {seed}")))
        for path, value in leaves(unbuilt(call)).items():
            if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float16):
                continue
            view = value.clone().neg_()._neg_view()
            assert view.is_neg()
            assert is_taken(op, call)
            said_of = verdict(op, with_field(call, path, view))
            assert said_of.startswith(f"ValueError: {op}: ") and "resolve_neg" in said_of
            assert path.rpartition(".")[2] in said_of
            refused += 1
    assert refused or op == "uniform_scores"


@pytest.mark.parametrize("op", fuzz_ops.WRITTEN)
def test_memory_is_looked_at_in_every_call(op: str, launched: None):
    """The same call in other memory: the written tensors share it, or one begins within another."""
    for seed in range(20):
        call = valid_call(op, random.Random(f"memory {op} {seed}"))
        if None in [leaves(call)[path] for path in fuzz_ops.WRITTEN[op]]:
            continue
        assert is_taken(op, built(call))
        written = {path: leaves(call)[path] for path in fuzz_ops.WRITTEN[op]}
        pairs = 0
        for path, value in written.items():
            for other, its in written.items():
                if path == other or its.shape != value.shape or its.dtype != value.dtype:
                    continue
                shared = verdict(op, built(replaced(call, path, its.as_strided(its.shape, its.stride()))))
                assert "must not share memory" in str(shared), (path, other)
                pairs += 1
                extent = 1 + sum((count - 1) * step for count, step in zip(its.shape, its.stride()))
                room = torch.zeros(2 * extent, dtype=its.dtype)
                near = [room.as_strided(its.shape, its.stride(), offset) for offset in (0, extent - 1)]
                far = [room.as_strided(its.shape, its.stride(), offset) for offset in (0, extent)]
                for places, meets in ((near, True), (far, False), (near, True)):
                    moved = built(replaced(replaced(call, path, places[0]), other, places[1]))
                    assert ("must not share memory" in str(verdict(op, moved))) == meets, (path, other)
        assert pairs
        return
    raise AssertionError("no call that writes")


@pytest.mark.parametrize("op", OPS)
def test_a_known_call_is_not_checked_again_but_in_the_debug_mode(op: str, launched: None, monkeypatch):
    module, check = module_of(op), LAUNCHERS[op][2]
    checked: list[int] = []
    original = getattr(module, check)
    monkeypatch.setattr(module, check, lambda *args, **kwargs: (checked.append(1), original(*args, **kwargs)))
    call = valid_call(op, random.Random(f"{op} 0"))
    for _ in range(3):
        assert is_taken(op, built(call))
        assert len(checked) == 1
    # Other memory, and other numbers.
    other = {name: copy.deepcopy(value) for name, value in call.items()}
    assert is_taken(op, built(other))
    assert is_taken(op, built(other))
    writes = any(leaves(call)[path] is not None for path in fuzz_ops.WRITTEN.get(op, ()))
    assert len(checked) == 1 + writes
    before = len(checked)
    with dlm_kernels.debug(True):
        assert is_taken(op, built(other))
        assert is_taken(op, built(other))
    assert len(checked) == before + 2


@pytest.mark.parametrize("op", OPS)
def test_a_known_call_has_the_results_of_an_unknown_one(op: str):
    for seed in range(4):
        call = valid_call(op, random.Random(f"results {op} {seed}"))
        results = []
        for known in (False, False, True, True):
            if not known:
                forget()
            mine = copy.deepcopy(call)
            found = fuzz_ops.run(op, "triton", mine)
            tensors = [found] if isinstance(found, Tensor) else [each for each in found if each is not None]
            tensors += [value for path, value in leaves(mine).items() if path in fuzz_ops.WRITTEN.get(op, ())]
            results.append([each.contiguous().view(torch.uint8) for each in tensors if each is not None])
        for other in results[1:]:
            assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True)), (op, seed)


def test_calls_whose_arguments_may_say_anything_are_not_remembered(launched: None):
    logits = torch.zeros(3, 33)
    plain = {"logits": logits, "outputs": ("second",)}
    for other in (
        {"logits": logits.as_subclass(Subclass), "outputs": ("second",)},
        {"logits": logits, "outputs": {"second", "entropy"}},
        {"logits": logits, "outputs": {"second": 1}},
    ):
        assert is_taken("confidence", other)
        assert not calls_of("confidence").by_key
    assert is_taken("confidence", plain) and len(calls_of("confidence").by_key) == 1
    with FakeTensorMode():
        fake = {"seed": torch.zeros(1, dtype=torch.int64), "noise": torch.zeros(4, 3, dtype=torch.int32)}
        assert is_taken("uniform_scores", fake)
    assert not calls_of("uniform_scores").by_key
    call = built(valid_call("block_attention", random.Random("0")))
    other = with_field(call, "window.mode", call["window"].mode)
    object.__setattr__(other["window"], "__class__", type("SameWindow", (Window,), {}))
    assert is_taken("block_attention", other) and not calls_of("block_attention").by_key
    assert is_taken("block_attention", call) and len(calls_of("block_attention").by_key) == 1


@pytest.mark.parametrize("op", OPS)
def test_another_kernel_is_launched_in_its_turn(op: str, launched: None, monkeypatch):
    """Plans are made for kernels and tiles, which tests and benches exchange."""
    module, call = module_of(op), built(valid_call(op, random.Random("0")))
    before = verdict(op, call)
    with monkeypatch.context() as patched:
        for name, value in vars(module).copy().items():
            if isinstance(value, triton.runtime.jit.KernelInterface):
                patched.setattr(module, name, types.SimpleNamespace(fn=types.SimpleNamespace(__name__="another")))
        assert [name for name, *_ in verdict(op, call)] == ["another"] * len(before)
    assert verdict(op, call) == before


def test_another_tile_is_launched_in_its_turn(launched: None, monkeypatch):
    confidence, unmask = module_of("confidence"), module_of("unmask")
    call = built(valid_call("confidence", random.Random("0"))) | {"logits": torch.zeros(3, 50)}
    call |= {"previous": torch.zeros(3, 50)} if call["previous"] is not None else {}
    before = verdict("confidence", call)
    assert [name for name, *_ in before] == ["_confidence_kernel"]
    for parts_apart in (True, False):
        with monkeypatch.context() as patched:
            patched.setattr(confidence, "_tile", lambda *_, **__: ConfidenceTile(columns=1, num_warps=1, part_tiles=1))
            patched.setattr(confidence, "_multiprocessors", lambda device: 9 if parts_apart else 0)
            found = verdict("confidence", call)
        assert [name for name, *_ in found] == ["_confidence_kernel"] + ["_merge_kernel"] * parts_apart
        assert {values["PARTS"] for *_, values in found} == {13}
    assert verdict("confidence", call) == before

    call = built(valid_call("unmask", random.Random("0")))
    before = verdict("unmask", call)
    with monkeypatch.context() as patched:
        patched.setattr(unmask, "unmask_tile", lambda W: UNMASK_TILES[-1])
        assert [name for name, *_ in verdict("unmask", call)] == ["unmask_memory_kernel"]
    assert verdict("unmask", call) == before

    call = built(valid_call("block_attention", random.Random("0")))
    call |= {name: call[name].half() for name in "qkv"} | dict.fromkeys(("k_cache", "v_cache", "k_scale", "v_scale"))
    for name in ("kept", "page_table"):
        call = with_field(call, f"window.{name}", None)
    before = verdict("block_attention", call)
    with monkeypatch.context() as patched:
        patched.setattr(device, "INTERPRETED", 80)
        assert isinstance(before, list) and verdict("block_attention", call) != before
    assert verdict("block_attention", call) == before


def test_memories_are_bounded(launched: None, monkeypatch):
    monkeypatch.setattr(plans, "MOST_CALLS", 3)
    monkeypatch.setattr(plans, "MOST_MEMORIES", 4)
    seed = torch.tensor([7])
    for N in range(1, 12):
        assert is_taken("uniform_scores", {"seed": seed, "noise": torch.zeros(N, 3, dtype=torch.int32)})
        assert len(calls_of("uniform_scores").by_key) <= 3
    call = valid_call("verify", random.Random("0"))
    copies = []
    for _ in range(9):
        copies.append(copy.deepcopy(call))
        assert is_taken("verify", built(copies[-1]))
    (known,) = calls_of("verify").by_key.values()
    assert 0 < len(known.memories) <= 4


@pytest.mark.parametrize("op", OPS)
def test_no_tensor_is_kept_alive(op: str):
    call = built(valid_call(op, random.Random(f"{op} 1")))
    result = fuzz_ops.function(op, "triton")(**call)
    tensors = [result] if isinstance(result, Tensor) else [each for each in result if each is not None]
    tensors += [value for value in leaves(unbuilt(call)).values() if isinstance(value, Tensor)]
    references = [weakref.ref(tensor) for tensor in tensors]
    assert len(calls_of(op).by_key) == 1
    del call, result, tensors
    gc.collect()
    assert [reference for reference in references if reference() is not None] == []


def test_threads_share_what_is_known(launched: None, monkeypatch):
    monkeypatch.setattr(plans, "MOST_CALLS", 2)
    monkeypatch.setattr(plans, "MOST_MEMORIES", 1)
    cases = []
    for op in ("verify", "uniform_scores", "block_attention"):
        call = valid_call(op, random.Random(f"threads {op}"))
        path = {"verify": "source.tried", "uniform_scores": "noise", "block_attention": "k"}[op]
        damaged = built(replaced(call, path, leaves(call)[path].half()))
        cases += [(op, built(each), None) for each in (call, copy.deepcopy(call))]
        cases.append((op, damaged, verdict(op, damaged)))
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            op, call, expected = rng.choice(cases)
            try:
                fuzz_ops.function(op, "triton")(**call)
                found = None
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            if found != expected:
                wrong.append(f"{op}: {found}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(expected is None or "half" in expected or "float16" in expected for _, _, expected in cases)
    assert not wrong


def test_a_direct_launch_is_the_one_that_triton_would_have_made():
    found = said(str(SUPPORT / "direct_launches.py"))
    assert found["differing"] == []
    assert found["compared"] > 1000 and found["direct"] > 0.9 * found["compared"]
    assert found["settings"] and all(found["settings"].values()), found["settings"]


# Functions that a warm call calls, in Python and in C: a measure of what the host does that is the same every time.
# Before calls were remembered: 215 and 260 of `block_attention`, 210 and 154 of `confidence`, 218 of `unmask`.
FUNCTIONS = {
    "block_attention, one launch": 85,
    "block_attention, two launches": 100,
    "Window": 25,
    "confidence, two launches": 95,
    "confidence, one launch": 75,
    "unmask": 110,
    "draft_build": 70,
    "verify": 85,
    "uniform_scores": 55,
    "rms_norm": 55,
    "add_rms_norm": 62,
    "qk_norm_rope": 72,
    "swiglu": 55,
}


def test_a_warm_call_does_little_on_the_host():
    found = said(str(SUPPORT / "host_cost.py"), "--calls", "1", "--json")["microseconds"]
    counted = {name: numbers["functions"] for name, numbers in found.items()}
    assert {name: counted[name] for name in FUNCTIONS if counted[name] > FUNCTIONS[name]} == {}
    assert all(counted[name] > FUNCTIONS[name] / 3 for name in FUNCTIONS), counted
