"""The race detector: toy kernels with one race of each kind, their twins without, and a shipped kernel that loses a
barrier."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="these tests run Triton kernels")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("races are told by Triton's interpreter, not on a GPU", allow_module_level=True)

import drafts_cases
import races
import triton.language as tl
from triton.runtime import interpreter

from dlm_kernels.drafts import kernel as drafts_device
from dlm_kernels.drafts import launch as drafts

SOURCE = Path(__file__).read_text().splitlines()


@triton.jit
def shift(x_ptr, BARRIER: tl.constexpr):
    lane = tl.arange(0, 16)
    x = tl.load(x_ptr + lane + 1)  # shift loads
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + lane, x)  # shift stores


@triton.jit
def publish(x_ptr, out_ptr, BARRIER: tl.constexpr):
    lane = tl.arange(0, 16)
    tl.store(x_ptr + lane, lane)  # publish stores
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + lane, tl.load(x_ptr + 15 - lane))  # publish loads


@triton.jit
def overwrite(x_ptr, BARRIER: tl.constexpr):
    lane = tl.arange(0, 16)
    tl.store(x_ptr + lane, lane)  # overwrite stores
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + 15, 1)  # overwrite stores again


@triton.jit
def sum_then_store(x_ptr, BARRIER: tl.constexpr):
    total = tl.sum(tl.load(x_ptr + tl.arange(0, 16)))  # sum_then_store loads
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + 3, total)  # sum_then_store stores


@triton.jit
def counted(x_ptr, BARRIER: tl.constexpr):
    count = tl.load(x_ptr)  # counted loads
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr, count + 1)  # counted stores


@triton.jit
def told(x_ptr, out_ptr, BARRIER: tl.constexpr):
    tl.store(x_ptr, 5)  # told stores
    if BARRIER:
        tl.debug_barrier()
    told = tl.load(x_ptr)  # told loads
    tl.store(out_ptr + tl.arange(0, 16), told)


@triton.jit
def _moved(x_ptr, lane):
    return tl.load(x_ptr + lane)  # helper loads


@triton.jit
def helped(x_ptr, BARRIER: tl.constexpr):
    lane = tl.arange(0, 16)
    x = _moved(x_ptr, lane)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + lane, x + 1)  # helped stores


@triton.jit
def reread(x_ptr, out_ptr, BARRIER: tl.constexpr):
    lane = tl.arange(0, 16)
    tl.store(x_ptr + lane, lane)  # reread stores
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + lane, tl.load(x_ptr + lane))  # reread loads


# kernel: what the earlier line does, the later line, and the element that they share
INSIDE = {
    "a tile stored over lanes that another has loaded": (shift, "shift loads", "shift stores", "x_ptr[1]"),
    "a tile loaded from lanes that another has stored": (publish, "publish stores", "publish loads", "x_ptr[15]"),
    "a scalar stored over a tile": (overwrite, "overwrite stores", "overwrite stores again", "x_ptr[15]"),
    "a reduction between, which is no barrier": (
        sum_then_store,
        "sum_then_store loads",
        "sum_then_store stores",
        "x_ptr[3]",
    ),
    "a scalar that all threads load and one stores": (counted, "counted loads", "counted stores", "x_ptr[0]"),
    "a scalar that one stores and all threads load": (told, "told stores", "told loads", "x_ptr[0]"),
    "the same lanes, loaded in another function": (helped, "helper loads", "helped stores", "x_ptr[0]"),
    "the same lanes, stored and loaded again": (reread, "reread stores", "reread loads", "x_ptr[0]"),
}


def line_of(comment: str) -> str:
    (number,) = (number for number, line in enumerate(SOURCE, 1) if line.endswith(f"  # {comment}"))
    return f"tests/kernels/test_races.py:{number} "


def launch(kernel, *, programs: int = 1, **constants) -> races.Detector:
    tensors = {name: torch.zeros(64, dtype=torch.int32) for name in kernel.arg_names if name.endswith("_ptr")}
    with races.watch() as detector:
        kernel[(programs,)](**tensors, **constants)
    return detector


@pytest.mark.parametrize("name", INSIDE)
def test_a_race_between_threads_is_reported_with_both_lines_and_the_element(name):
    kernel, first, second, element = INSIDE[name]
    with pytest.raises(races.RaceError) as found:
        launch(kernel, BARRIER=False)
    (text,) = str(found.value).splitlines()
    assert line_of(first) in f"{text} " and line_of(second) in text and f" {element}, " in text
    assert text.endswith("no barrier between")


@pytest.mark.parametrize("name", INSIDE)
def test_its_twin_with_a_barrier_is_not(name):
    detector = launch(INSIDE[name][0], BARRIER=True)
    assert detector.launches == detector.barriers == 1
    assert detector.loaded_lanes + detector.stored_lanes >= 2


@triton.jit
def in_place(x_ptr):
    lane = tl.arange(0, 16)
    for begin in range(0, 32, 16):
        x = tl.load(x_ptr + begin + lane)
        tl.store(x_ptr + begin + lane, x + 1)
    tl.store(x_ptr + 40, tl.load(x_ptr + 40) + 1)
    tl.store(x_ptr + 41, tl.load(x_ptr + 40))
    tl.store(x_ptr + 40, 0)


def test_what_one_thread_does_in_order_is_no_race():
    detector = launch(in_place)
    assert (detector.loaded_lanes, detector.stored_lanes) == (32 + 2, 32 + 3)


@triton.jit
def two_loads_one_store(x_ptr):
    lane = tl.arange(0, 16)
    x = tl.load(x_ptr + lane)
    y = tl.load(x_ptr + 15 - lane)  # reversed loads
    z = tl.load(x_ptr + lane)
    tl.store(x_ptr + lane, x + y + z)  # stores over both


def test_a_later_load_by_the_storing_thread_does_not_hide_one_by_another():
    with pytest.raises(races.RaceError) as found:
        launch(two_loads_one_store)
    (text,) = str(found.value).splitlines()
    assert line_of("reversed loads") in f"{text} " and line_of("stores over both") in text


@triton.jit
def counted_among_copies(x_ptr, out_ptr):
    count = tl.load(x_ptr)  # every thread loads
    tl.store(out_ptr + 0, tl.load(x_ptr))
    tl.store(out_ptr + 1, tl.load(x_ptr))
    tl.store(out_ptr + 2, tl.load(x_ptr))
    tl.store(x_ptr, count + 1)  # one stores after all


def test_later_loads_by_the_thread_that_stores_scalars_do_not_hide_one_by_all():
    with pytest.raises(races.RaceError) as found:
        launch(counted_among_copies)
    (text,) = str(found.value).splitlines()
    assert line_of("every thread loads") in f"{text} " and line_of("one stores after all") in text


@triton.jit
def across(x_ptr, out_ptr, distance, BARRIER: tl.constexpr):
    lane = tl.arange(0, 16)
    tl.store(x_ptr + tl.where(lane < 8, lane, distance + lane), 1)  # across two tensors
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + 32, tl.load(out_ptr + 9))  # of the second


def test_one_operation_may_touch_two_tensors():
    x, out = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    distance = (out.data_ptr() - x.data_ptr()) // 4
    with races.watch():
        with pytest.raises(races.RaceError, match=r"loads out_ptr\[9\], which") as found:
            across[(1,)](x, out, distance, BARRIER=False)
        (text,) = str(found.value).splitlines()
        assert line_of("across two tensors").strip() in text and line_of("of the second") in text
        across[(1,)](x, out, distance, BARRIER=True)


@triton.jit
def by_program(x_ptr, out_ptr, READS: tl.constexpr, SHARED: tl.constexpr):
    program = tl.program_id(0)
    lane = tl.arange(0, 8)
    if READS:
        tl.store(out_ptr + program * 8 + lane, tl.load(x_ptr + lane))  # every program loads
        tl.debug_barrier()
        tl.store(x_ptr + (0 if SHARED else 8 + program * 8) + lane, lane)  # every program stores
    else:
        tl.store(out_ptr + (0 if SHARED else program * 8) + lane, lane * 0)  # the same value is stored


@pytest.mark.parametrize(
    "reads, first, second",
    [
        (True, "every program stores", "every program loads"),
        (False, "the same value is stored", "the same value is stored"),
    ],
)
def test_programs_of_a_launch_share_no_address_that_one_stores(reads, first, second):
    with pytest.raises(races.RaceError) as found:
        launch(by_program, programs=3, READS=reads, SHARED=True)
    text = str(found.value)
    assert line_of(first) in text and line_of(second) in text
    assert "by_program, program (1, 0, 0)" in text and "in program (0, 0, 0)" in text
    launch(by_program, programs=3, READS=reads, SHARED=False)
    launch(by_program, programs=1, READS=reads, SHARED=True)


@triton.jit
def last_stores(x_ptr, out_ptr, LAST: tl.constexpr):
    program = tl.program_id(0)
    tl.store(out_ptr + program, tl.load(x_ptr))  # all but the last only load
    if program == LAST:
        tl.debug_barrier()
        tl.store(x_ptr, 1)  # the last stores what it has loaded, too


def test_a_load_by_the_storing_program_does_not_hide_one_by_another():
    with pytest.raises(races.RaceError) as found:
        launch(last_stores, programs=3, LAST=2)
    (text,) = str(found.value).splitlines()
    assert line_of("all but the last only load") in text and "in program (1, 0, 0)" in text
    launch(last_stores, programs=1, LAST=0)


@triton.jit
def meeting(x_ptr, EACH: tl.constexpr):
    lane = tl.arange(0, 16)
    tl.store(x_ptr + lane // EACH, lane)  # lanes meet


def test_two_lanes_of_a_store_at_one_address_are_a_race():
    with pytest.raises(races.RaceError, match="two lanes of the store in .* meet at one address") as found:
        launch(meeting, EACH=2)
    assert line_of("lanes meet") in str(found.value)
    launch(meeting, EACH=1)


@triton.jit
def narrow_and_wide(x_ptr, bytes_ptr):
    tl.store(bytes_ptr + 5, 1)  # a byte
    tl.store(x_ptr + tl.arange(0, 2), 0)  # the word of it


def test_elements_of_two_sizes_meet_in_one_storage():
    words = torch.zeros(4, dtype=torch.int32)
    with races.watch(), pytest.raises(races.RaceError) as found:
        narrow_and_wide[(1,)](words, words.view(torch.uint8))
    assert line_of("a byte") in str(found.value) and line_of("the word of it") in str(found.value)


@triton.jit
def copied(x_ptr, out_ptr, n):
    lane = tl.arange(0, 16)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane, mask=lane < n, other=0), mask=lane < n)  # copied


def test_masked_lanes_touch_nothing_and_lanes_outside_of_every_tensor_are_reported():
    x, out = torch.zeros(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    with races.watch() as detector:
        copied[(1,)](x, out, 6)
        assert (detector.loaded_lanes, detector.stored_lanes) == (6, 6)
        # Lanes 6 and 7 lie in memory of ours behind the tensors that the kernel is given.
        room = torch.zeros(2, 8, dtype=torch.int32)
        short = [torch.frombuffer(row.numpy(), dtype=torch.int32, count=6) for row in room]
        with pytest.raises(races.RaceError, match="outside of every tensor of the launch") as found:
            copied[(1,)](*short, 8)
    assert line_of("copied") in str(found.value)


@triton.jit
def added(x_ptr):
    tl.atomic_add(x_ptr, 1)  # atomic


def test_an_atomic_is_not_modelled_and_is_reported():
    with pytest.raises(races.RaceError, match="is atomic, which is not modelled") as found:
        launch(added)
    assert line_of("atomic") in f"{found.value} ".replace(" is atomic", "  is atomic")


def test_nothing_is_watched_outside_and_a_race_is_found_once():
    launch_hook = interpreter.GridExecutor.__call__
    with races.watch():
        with pytest.raises(races.RaceError):
            shift[(1,)](torch.zeros(64), BARRIER=False)
        shift[(1,)](torch.zeros(64), BARRIER=True)
    assert interpreter.GridExecutor.__call__ is launch_hook


def test_an_interpreter_without_a_hook_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_barrier")
    with pytest.raises(RuntimeError, match="has no InterpreterBuilder.create_barrier"), races.watch():
        pass


def test_compiled_kernels_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"), races.watch():
        pass


PROBE = """
import torch, triton
import triton.language as tl

@triton.jit
def shift(x_ptr):
    lane = tl.arange(0, 16)
    x = tl.load(x_ptr + lane + 1)
    tl.store(x_ptr + lane, x)

def test_racy():
    shift[(1,)](torch.zeros(64))
"""


@pytest.mark.parametrize("processes", [[], ["-n", "1"]], ids=["", "in a process of pytest-xdist"])
def test_under_the_option_a_race_fails_its_test(tmp_path, processes):
    if processes:
        pytest.importorskip("xdist")
    (tmp_path / "test_probe.py").write_text(PROBE)
    # conftest.py is found from the files that are run: here, from a copy beside the probe.
    here = Path(__file__).resolve().parents[1]
    (tmp_path / "conftest.py").write_text((here / "conftest.py").read_text())
    options = ["-q", "-p", "no:cacheprovider", "-c", here.parent / "pyproject.toml", "--races", *processes]
    command, environment = (
        [sys.executable, "-m", "pytest", *options, tmp_path],
        {**os.environ, "PYTHONPATH": str(here / "support")},
    )
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout + result.stderr
    assert "test_probe.py:9 stores x_ptr[1], which " in result.stdout
    assert "races looked for in 1 launches, 16 lanes loaded, 16 stored, 0 barriers" in result.stdout


def test_a_run_that_watched_nothing_does_not_pass():
    def status(detector: races.Detector, before: int) -> int:
        session = SimpleNamespace(exitstatus=before, config=SimpleNamespace())
        races.Session(detector).pytest_sessionfinish(session, before)
        return session.exitstatus

    passed, interrupted = pytest.ExitCode.OK, pytest.ExitCode.INTERRUPTED
    assert status(races.Detector(), passed) == pytest.ExitCode.TESTS_FAILED
    assert status(races.Detector(), interrupted) == interrupted
    assert status(launch(in_place), passed) == passed


def without_barrier(module: ModuleType, after: str, tmp_path: Path) -> ModuleType:
    """The device module without the barrier that follows the line `after`."""
    source = Path(module.__file__).read_text()
    cut = source.replace(f"{after}\n        tl.debug_barrier()\n", f"{after}\n")
    assert cut != source
    path = tmp_path / Path(module.__file__).name
    path.write_text(cut)
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.without_barrier", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_a_shipped_kernel_without_its_barrier_is_reported(tmp_path, monkeypatch):
    after = "        # The next source, once every warp has read its part of this one."
    cut = without_barrier(drafts_device, after, tmp_path)
    case = drafts_cases.random_case(3)
    with races.watch():
        case.copy(torch.device("cpu")).verify(drafts.verify)
        monkeypatch.setattr(drafts, "verify_kernel", cut.verify_kernel)
        with pytest.raises(races.RaceError, match=r"source_score_ptr\[\d+\], which .*select.py:\d+ has loaded"):
            case.copy(torch.device("cpu")).verify(drafts.verify)
