"""Whether a launch that is made directly is the one that Triton's public launch would have made:
`python tests/support/direct_launches.py`, without TRITON_INTERPRET.

Every pair of options of every launcher (launch_cases.py) is called several times, with tensors in aligned memory and in
memory that is not, in every order. What is passed to the launch in C must each time be what is passed when nothing is
remembered: the machine code, the grid and all arguments, a tensor by its pointer. Prints, as JSON, what was compared
and what differs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from launch_cases import CALLS, covering
from standin import launch_nothing
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction

from dlm_kernels import plans

launched: list[tuple] = []
searches = 0


def plain(value: Any) -> Any:
    """What a launch is passed, as it counts: a tensor is its pointer, and objects of Triton their class."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    known = (int, float, str, type(None))
    return value if isinstance(value, known) else type(value).__name__


def note(*arguments: Any) -> None:
    x, y, z, stream, variant, *rest = arguments
    launched.append((x, y, z, stream, variant, *map(plain, rest)))


def count_searches() -> None:
    run = JITFunction.run

    def counted(self, *args, **kwargs):
        global searches
        searches += 1
        return run(self, *args, **kwargs)

    JITFunction.run = counted


class Memory:
    """What makes tensors while a call is put together and made: the i-th tensor is every time the same. It begins at a
    multiple of 16 bytes or, where `shifted`, one element behind."""

    def __init__(self) -> None:
        self.buffers: dict[tuple, Tensor] = {}
        self.asked, self.shifted = 0, False
        self.zeros = torch.zeros

    @contextlib.contextmanager
    def used(self, shifted: bool) -> Iterator[None]:
        self.asked, self.shifted = 0, shifted
        makers = {name: getattr(torch, name) for name in ("empty", "zeros", "ones", "full")}
        clone = Tensor.clone
        torch.empty = torch.zeros = torch.ones = self.of
        torch.full = lambda size, value, **options: self.of(size, **options)
        Tensor.clone = lambda tensor: self.of(tensor.shape, dtype=tensor.dtype)
        try:
            yield
        finally:
            Tensor.clone = clone
            for name, maker in makers.items():
                setattr(torch, name, maker)

    def of(self, *sizes: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        shape = tuple(sizes[0]) if sizes and not isinstance(sizes[0], int) else sizes
        dtype = dtype or torch.float32
        count, step = 1, dtype.itemsize
        for size in shape:
            count *= size
        self.asked += 1
        name = (self.asked, count, dtype)
        if name not in self.buffers:
            self.buffers[name] = self.zeros((count + 1) * step + 16, dtype=torch.uint8)
        buffer = self.buffers[name]
        begin = -buffer.data_ptr() % 16 + step * self.shifted
        return buffer[begin : begin + count * step].view(dtype).view(shape)


def calls_of_all() -> list[Any]:
    names = ("attention", "confidence", "unmask", "drafts", "noise")
    modules = [importlib.import_module(f"dlm_kernels.{name}.launch") for name in names]
    return [value for module in modules for value in vars(module).values() if isinstance(value, plans.Calls)]


def sequence(call: Callable[[], Any], memory: Memory, remember: bool) -> Iterator[list[tuple]]:
    """What is launched by one call after the other."""
    for shifted in (False, False, True, True, False, True, False):
        if not remember:
            for calls in calls_of_all():
                calls.by_key.clear()
        launched.clear()
        with memory.used(shifted):
            call()
        yield list(launched)


def main() -> None:
    launch_nothing(90, note)
    count_searches()
    memory = Memory()
    compared = direct = 0
    differing: list[str] = []
    for name, (options, allowed, call) in CALLS.items():
        for choice in covering(options, 2, allowed):
            alone = list(sequence(lambda: call(choice), memory, remember=False))
            before = searches
            known = list(sequence(lambda: call(choice), memory, remember=True))
            launches = sum(map(len, known))
            compared += launches
            direct += launches - (searches - before)
            if known != alone:
                differing.append(f"{name} {choice}")
    found = {"compared": compared, "direct": direct, "differing": differing[:20], "settings": settings(memory)}
    print(json.dumps(found))


def settings(memory: Memory) -> dict[str, bool]:
    """Whether a launch goes through Triton's search again while a setting asks for that, and directly afterwards."""
    options, _, call = CALLS["uniform_scores"]
    choice = {name: values[0] for name, values in options.items()}
    kernel = importlib.import_module("dlm_kernels.noise.kernel").uniform_scores_kernel

    def searched() -> bool:
        before = searches
        with memory.used(shifted=False):
            call(choice)
        return searches > before

    searched()
    found = {"known": not searched()}
    hooked: list[int] = []
    kernel.add_pre_run_hook(lambda *_, **__: hooked.append(1))
    found["pre-run hook"] = searched() and searched() and len(hooked) == 2
    kernel.pre_run_hooks.clear()
    found["pre-run hook is gone"] = not searched()
    knobs.runtime.debug = True
    found["debug"] = searched() and not searched()
    knobs.runtime.debug = False
    found["debug is off"] = not searched()
    knobs.runtime.add_stages_inspection_hook = lambda *_: ("key", "hash")
    found["inspection"] = searched() and searched()
    knobs.runtime.add_stages_inspection_hook = None
    found["inspection is over"] = not searched()
    entered: list[Any] = []

    def enter(metadata: Any) -> None:
        entered.append(metadata)

    knobs.runtime.launch_enter_hook.add(enter)
    searched()
    # The launch in C calls the hooks, which it is passed.
    found["launch hooks"] = "HookChain" in launched[-1]
    knobs.runtime.launch_enter_hook.remove(enter)
    for calls in calls_of_all():
        calls.by_key.clear()
    plans.IS_KNOWN = False
    found["unknown Triton"] = searched() and searched()
    return found


if __name__ == "__main__":
    main()
