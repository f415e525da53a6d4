"""What a launch loads and stores without an order between, told from a run in Triton's interpreter:
`python -m pytest --races`.

The interpreter runs the programs of a launch one after the other, and in each a tile operation as one; a GPU does
neither, so a kernel whose result depends on that order is right here and wrong there. Every address that an operation
loads or stores is remembered, and two accesses to one address, at least one of them a store, are a race unless an order
is known:

- Programs. Nothing orders two programs of one launch. An address that one stores, another may neither load nor store,
  were it the same value.
- Barriers. Inside a program `tl.debug_barrier` orders all that precedes it before all that follows, and nothing else
  does: reductions, sorts, dots and changes of layout have barriers in most machine code, but no one promises them, and
  a tile that lies in one warp needs none.
- Threads. Each thread sees its own accesses in order.
  A scalar is loaded by every thread, and stored by one, always the same. Scalar stores are therefore in order, and with
  them the scalar loads of a line that ends in a scalar store, `tl.store(p, tl.load(p) + 1)`: what the other threads
  load there nobody uses. A scalar load on a line of its own is in order with no store.
  The lanes of a tile lie in threads as Triton decides for each operation, even where the pointers are equal, so two
  tiles are in order in one case only: loaded and then stored in place, through the same pointers, lane by lane, in the
  same call of the same device function, where a reader sees both. That what is stored, or whether, is told from what
  was loaded there, so that the thread that stores waits for it, is not checked: this is the one rule that trusts the
  author. Two lanes of one store never meet at one address.

Also found: an access outside the storage of every tensor of the launch. Atomics are not modelled, and reported.

Limits. Only what ran is seen: the branches, masks and lengths of the test. Loads whose value nobody uses count as
loads. The order that other dependencies of the data give (a store that a sum over a load decides) does not count. Two
launches are in order, as on one stream. Storages are told apart by their tensors: what a kernel is not given as a
tensor it may not touch.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Hashable, Iterator
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter

ROOT = Path(__file__).resolve().parents[2]
# What is replaced while races are watched.
HOOKS = {
    "InterpreterBuilder": (
        "set_grid_idx", "create_masked_load", "create_masked_store", "create_barrier", "create_atomic_rmw",
        "create_atomic_cas",
    ),
    "GridExecutor": ("__call__", "_init_args_hst"),
}  # fmt: skip


# Granules are kept in chunks of 2^CHUNK_BITS.
CHUNK_BITS = 16
# Whose an access is. A tile's threads have a number from 1 on.
EVERY_THREAD = -1
STORING_THREAD = 0


class RaceError(AssertionError):
    """A launch has races; the message names the lines, the argument and the element of each."""


@dataclasses.dataclass
class Access:
    """One tile or scalar operation of one program."""

    program: tuple[int, int, int]
    line: tuple[str, int]
    stores: bool
    threads: int

    def __str__(self) -> str:
        path, number = self.line
        return f"{os.path.relpath(path, ROOT) if path.startswith(f'{ROOT}{os.sep}') else path}:{number}"

    def precedes(self, later: Access) -> bool:
        """Is the order of the two known, though no barrier lies between?"""
        in_place = not self.stores and later.stores
        return self.threads == later.threads and (
            self.threads == STORING_THREAD or in_place and self.threads != EVERY_THREAD
        )


@dataclasses.dataclass
class _Storage:
    begin: int
    end: int
    granule: int  # bytes: the smallest element of a tensor of the storage
    slot: int  # of its first granule
    tensors: list[tuple[str, torch.Tensor]]

    def name(self, address: int) -> str:
        """The element of an argument that lies at the address."""
        for name, tensor in self.tensors:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            offset = (address - tensor.data_ptr()) // tensor.element_size()
            if 0 <= offset <= last:
                return f"{name}[{offset}]"
        return f"{self.tensors[0][0]}'s storage at byte {address - self.begin}"


class Detector:
    """What one launch has done so far, and what was found and counted in all launches.

    Operations are numbered from 1. For each granule of the launch's storages, four numbers, 0 for none: the last store,
    the last load, a load since the last barrier by other threads than the last one, and a load by an earlier program
    than the last one.
    """

    def __init__(self) -> None:
        self.launches = self.loaded_lanes = self.stored_lanes = self.barriers = 0
        self._found: dict[Hashable, str] = {}
        self._accesses: list[Access | None] = [None]
        self._threads: dict[Hashable, int] = {}
        # Scalar loads of the line that is being run, and races that they have if no scalar store follows on it.
        self._line: tuple[str, int] | None = None
        self._line_loads: list[Access] = []
        self._undecided: list[tuple[Access, Hashable, str]] = []

    # A launch.

    def begin_launch(self, kernel: str, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self.launches += 1
        self._kernel = kernel
        self._program = (0, 0, 0)
        self._accesses = [None]
        self._program_start = self._fence = 0
        by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in tensors:
            if tensor.numel():
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        self._storages: list[_Storage] = []
        slots = 0
        for begin, members in sorted(by_storage.items()):
            end = begin + members[0][1].untyped_storage().nbytes()
            granule = min(tensor.element_size() for _, tensor in members)
            self._storages.append(_Storage(begin, end, granule, slots, members))
            slots += -(-(end - begin) // granule)
        self._begins = np.array([storage.begin for storage in self._storages], np.uint64)
        # Of a storage only the chunks that are accessed are kept; -1: not yet.
        self._chunks = np.full((slots >> CHUNK_BITS) + 1, -1, np.int64)
        self._kept, self._numbers = 0, np.zeros((4, 0), np.int32)
        self._grow(min(len(self._chunks), 4))

    def end_launch(self) -> list[str]:
        self._order()
        found = list(self._found.values())
        self._found.clear()
        return found

    def begin_program(self, program: tuple[int, int, int]) -> None:
        self._program = program
        self._program_start = len(self._accesses) - 1
        self._order()

    def barrier(self) -> None:
        """The one operation that orders what precedes it before what follows."""
        self.barriers += 1
        self._order()

    def _order(self) -> None:
        self._decide()
        self._fence = len(self._accesses) - 1
        self._threads.clear()

    # An operation.

    def load(self, frame: FrameType, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        access, number = self._enter(frame, addresses, size, stores=False)
        self.loaded_lanes += np.count_nonzero(mask)
        for storage, slots in self._touched(access, addresses, mask, size):
            kept = self._kept_at(slots)
            stored = self._stored[kept]
            if stored.any():
                self._meet(access, storage, slots, stored)
            loaded = self._loaded[kept]
            if loaded.any():
                before = (loaded > 0) & (loaded <= self._program_start)
                self._loaded_before[kept[before]] = loaded[before]
                self._keep_apart(access, kept, loaded)
            self._loaded[kept] = number

    def store(self, frame: FrameType, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        access, number = self._enter(frame, addresses, size, stores=True)
        self.stored_lanes += np.count_nonzero(mask)
        for storage, slots in self._touched(access, addresses, mask, size):
            kept = self._kept_at(slots)
            for earlier in (self._stored, self._loaded, self._loaded_apart, self._loaded_before):
                numbers = earlier[kept]
                if numbers.any():
                    self._meet(access, storage, slots, numbers)
            self._stored[kept] = number

    def atomic(self, frame: FrameType) -> None:
        access, _ = self._enter(frame, np.zeros(1, np.uint64), 1, stores=True)
        self._report(access, f"{access} is atomic, which is not modelled")

    def _enter(self, frame: FrameType, addresses: np.ndarray, size: int, stores: bool) -> tuple[Access, int]:
        line = (frame.f_code.co_filename, frame.f_lineno)
        if line != self._line:
            self._decide()
            self._line = line
        if addresses.size > 1:
            key = (frame, size, addresses.shape, addresses.tobytes())
            access = Access(self._program, line, stores, self._threads.setdefault(key, len(self._threads) + 1))
        elif stores:
            access = Access(self._program, line, stores, STORING_THREAD)
            for load in self._line_loads:
                load.threads = STORING_THREAD
            self._undecided.clear()
        else:
            access = Access(self._program, line, stores, EVERY_THREAD)
            self._line_loads.append(access)
        self._accesses.append(access)
        return access, len(self._accesses) - 1

    def _touched(
        self, access: Access, addresses: np.ndarray, mask: np.ndarray, size: int
    ) -> Iterator[tuple[_Storage, np.ndarray]]:
        """The storages that an operation touches, and which slots of each."""
        addresses = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)]
        if not addresses.size:
            return
        if (
            access.stores
            and not (np.diff(addresses.view(np.int64)) > 0).all()
            and np.unique(addresses).size < addresses.size
        ):
            self._report(access, f"two lanes of the store in {access} meet at one address")
        low, high = np.searchsorted(self._begins, [addresses.min(), addresses.max()], "right") - 1
        for index in range(low, high + 1):
            here = addresses
            if low != high:
                here = addresses[np.searchsorted(self._begins, addresses, "right") - 1 == index]
            storage = self._storages[index] if index >= 0 else None
            outside = here if storage is None else here[here + np.uint64(size) > storage.end]
            if outside.size:
                self._report(
                    access, f"{access} {_verb(access)} outside of every tensor of the launch, at {int(outside[0]):#x}"
                )
                here = here[:0] if storage is None else here[here + np.uint64(size) <= storage.end]
            if not here.size:
                continue
            offsets = (here - np.uint64(storage.begin)).astype(np.int64)
            if size % storage.granule or (offsets % storage.granule).any():
                raise NotImplementedError(
                    f"{access}: an access of {size} bytes that cuts elements of {storage.granule} bytes"
                )
            slots = storage.slot + offsets // storage.granule
            if size > storage.granule:
                slots = (slots[:, None] + np.arange(size // storage.granule)).ravel()
            yield storage, slots

    def _kept_at(self, slots: np.ndarray) -> np.ndarray:
        """Where the numbers of the slots are kept."""
        chunks = slots >> CHUNK_BITS
        begins = self._chunks[chunks]
        if (begins < 0).any():
            new = np.unique(chunks[begins < 0])
            if self._kept + len(new) > len(self._stored) >> CHUNK_BITS:
                self._grow(2 * (self._kept + len(new)))
            self._chunks[new] = np.arange(self._kept, self._kept + len(new)) << CHUNK_BITS
            self._kept += len(new)
            begins = self._chunks[chunks]
        return begins + (slots & ((1 << CHUNK_BITS) - 1))

    def _grow(self, chunks: int) -> None:
        old = self._numbers[:, : self._kept << CHUNK_BITS]
        self._numbers = np.zeros((4, chunks << CHUNK_BITS), np.int32)
        self._numbers[:, : old.shape[1]] = old
        self._stored, self._loaded, self._loaded_apart, self._loaded_before = self._numbers

    def _keep_apart(self, access: Access, kept: np.ndarray, loaded: np.ndarray) -> None:
        """Of all loads since the barrier two are kept, so that no store is in order with both unless it is with all:
        the last one and one by other threads."""
        for number in np.unique(loaded[loaded > self._fence]).tolist():
            # A scalar load is every thread's or, as its line may yet show, the storing thread's.
            if self._accesses[number].threads != (STORING_THREAD if access.threads == EVERY_THREAD else access.threads):
                self._loaded_apart[kept[loaded == number]] = number

    def _meet(self, access: Access, storage: _Storage, slots: np.ndarray, earlier: np.ndarray) -> None:
        """Reports the races of an operation with those that were at its slots earlier."""
        for number in np.unique(
            earlier[(earlier > self._fence) | ((earlier > 0) & (earlier <= self._program_start))]
        ).tolist():
            first = self._accesses[number]
            between = number <= self._program_start
            if not between and first.precedes(access):
                continue
            slot = int(slots[np.argmax(earlier == number)])
            where = storage.name(storage.begin + (slot - storage.slot) * storage.granule)
            key = (between, first.line, first.stores, access.line, access.stores)
            text = f"{access} {_verb(access)} {where}, which {first} has {'stored' if first.stores else 'loaded'}"
            text += f" in program {first.program}" if between else ", with no barrier between"
            if not between and first.threads == STORING_THREAD and access.threads == EVERY_THREAD:
                self._undecided.append((access, key, text))
            else:
                self._report(access, text, key)

    def _decide(self) -> None:
        """The line ends here: its scalar loads were for every thread."""
        for access, key, text in self._undecided:
            self._report(access, text, key)
        self._undecided.clear()
        self._line_loads.clear()
        self._line = None

    def _report(self, access: Access, text: str, key: Hashable = None) -> None:
        """Once a pair of lines, whatever the programs and the elements."""
        self._found.setdefault(key or text, f"{self._kernel}, program {access.program}: {text}")


def _verb(access: Access) -> str:
    return "stores" if access.stores else "loads"


# Innermost last: a test of the detector watches for itself, and what it provokes is not the session's.
_watching: list[Detector] = []


@functools.cache
def _is_machinery(code: CodeType) -> bool:
    return code.co_filename == __file__ or code.co_filename.startswith(os.path.dirname(triton.__file__) + os.sep)


def _device_frame() -> FrameType:
    """The innermost frame of device code that is no part of Triton."""
    frame = sys._getframe(2)
    while _is_machinery(frame.f_code):
        frame = frame.f_back
    return frame


def _tensors(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    value = interpreter._unwrap_tensor(value)
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for index, member in enumerate(value):
            yield from _tensors(f"{name}[{index}]", member)
    elif hasattr(value, "data_ptr") or hasattr(value, "base"):
        raise NotImplementedError(f"races: {name} must be a tensor or a tuple of tensors, got {type(value).__name__}")


def _size(pointers: interpreter.TensorHandle) -> int:
    return interpreter._get_np_dtype(pointers.get_element_ty()).itemsize


def _replacements() -> dict[tuple[str, str], object]:
    original = {
        (owner, name): getattr(getattr(interpreter, owner), name) for owner, names in HOOKS.items() for name in names
    }

    def set_grid_idx(self, x, y, z):
        _watching[-1].begin_program((x, y, z))
        return original["InterpreterBuilder", "set_grid_idx"](self, x, y, z)

    def create_masked_load(self, ptrs, mask, *args, **kwargs):
        _watching[-1].load(_device_frame(), ptrs.data, mask.data, _size(ptrs))
        return original["InterpreterBuilder", "create_masked_load"](self, ptrs, mask, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        _watching[-1].store(_device_frame(), ptrs.data, mask.data, _size(ptrs))
        return original["InterpreterBuilder", "create_masked_store"](self, ptrs, value, mask, *args, **kwargs)

    def create_barrier(self):
        _watching[-1].barrier()
        return original["InterpreterBuilder", "create_barrier"](self)

    def create_atomic_rmw(self, *args, **kwargs):
        _watching[-1].atomic(_device_frame())
        return original["InterpreterBuilder", "create_atomic_rmw"](self, *args, **kwargs)

    def create_atomic_cas(self, *args, **kwargs):
        _watching[-1].atomic(_device_frame())
        return original["InterpreterBuilder", "create_atomic_cas"](self, *args, **kwargs)

    def init_args(self, args, kwargs):
        found = original["GridExecutor", "_init_args_hst"](self, args, kwargs)
        named = [*zip(self.arg_names, found[0]), *found[1].items()]
        _watching[-1].begin_launch(self.fn.__name__, [pair for name, value in named for pair in _tensors(name, value)])
        return found

    def launch(self, *args, **kwargs):
        try:
            result = original["GridExecutor", "__call__"](self, *args, **kwargs)
        finally:
            found = _watching[-1].end_launch()
            # Raised in place of the kernel's own error, too, which stays its context: the race may be its cause.
            if found:
                raise RaceError("\n".join(found))
        return result

    replacements = (
        set_grid_idx, create_masked_load, create_masked_store, create_barrier, create_atomic_rmw, create_atomic_cas,
        launch, init_args,
    )  # fmt: skip
    return dict(zip(original, replacements, strict=True))


@contextlib.contextmanager
def watch() -> Iterator[Detector]:
    """Launches under it raise RaceError at their end if they have races. Not for two threads at once, as the
    interpreter is not.

    Raises RuntimeError: kernels are not interpreted, or by an interpreter without what is watched.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("races: kernels must run in Triton's interpreter; set TRITON_INTERPRET=1")
    for owner, names in HOOKS.items():
        for name in names:
            if not hasattr(getattr(interpreter, owner, None), name):
                raise RuntimeError(f"races: the interpreter of triton {triton.__version__} has no {owner}.{name}")
    with contextlib.ExitStack() as stack:
        if not _watching:
            for (owner, name), replacement in _replacements().items():
                stack.callback(setattr, getattr(interpreter, owner), name, getattr(getattr(interpreter, owner), name))
                setattr(getattr(interpreter, owner), name, replacement)
        _watching.append(Detector())
        stack.callback(_watching.pop)
        yield _watching[-1]


class Session:
    """The part of a test run under --races: it says what was watched, and does not pass if that is nothing. Processes
    of pytest-xdist say it to the one that started them."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.of_workers: collections.Counter[str] = collections.Counter()

    def seen(self) -> collections.Counter[str]:
        names = ("launches", "loaded_lanes", "stored_lanes", "barriers")
        return self.of_workers + collections.Counter({name: int(getattr(self.detector, name)) for name in names})

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["races"] = dict(self.seen())
        elif exitstatus == pytest.ExitCode.OK and not (self.seen()["loaded_lanes"] and self.seen()["stored_lanes"]):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        # A process that died says nothing; its test has failed.
        self.of_workers.update(getattr(node, "workeroutput", {}).get("races", {}))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        seen = self.seen()
        lanes = f"{seen['loaded_lanes']} lanes loaded, {seen['stored_lanes']} stored"
        terminalreporter.write_line(
            f"races looked for in {seen['launches']} launches, {lanes}, {seen['barriers']} barriers"
        )
