"""What a session takes of the memory of its devices, before anything is allocated, and the refusal of one that cannot
fit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..models.cache import Paging
from ..patching import PatchHandle
from .memory import GIB
from .plan import Plan
from .shapes import Grid

# Which parts of the memory are taken at the same time as all others, and of which only the largest is.
LASTING, PASSING = ("weights", "cache", "state", "history"), ("refresh", "logits")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a session takes of each device, by what takes them.

    Attributes:
        parts: for each device, bytes by part: "weights", which are there already; "cache", keys and values; "state",
            canvases and numbers of the rows; "history", distributions of the step before; "refresh", the hidden states
            of the widest step and what its layers make of them; "logits", those of the widest step and what statistics
            and filters of the vocabulary need besides. A step does not take the last two at the same time.
    """

    parts: Mapping[torch.device, Mapping[str, int]]

    def total(self, device: torch.device | str | None = None) -> int:
        """The most bytes that are taken of a device at a time; of all devices by default."""
        if device is None:
            return sum(map(self.total, self.parts))
        parts = self.parts[torch.device(device)]
        return sum(parts.get(name, 0) for name in LASTING) + max(parts.get(name, 0) for name in PASSING)

    def __str__(self) -> str:
        lines = []
        for device, parts in self.parts.items():
            listed = ", ".join(f"{name} {size / GIB:.3f}" for name, size in parts.items() if size)
            lines.append(f"{device}: {self.total(device) / GIB:.3f} GiB ({listed})")
        return "\n".join(lines)


def memory_plan(handle: PatchHandle, plan: Plan, grid: Grid, paging: Paging | None, filters: bool) -> MemoryPlan:
    """What a decode takes of the memory, by its sizes."""
    main = plan.first.device
    parts: dict[torch.device, Counter[str]] = {main: Counter()}
    for device, size in weights_of(handle).items():
        parts.setdefault(device, Counter())["weights"] += size
    if plan.cache.stores:
        with FakeTensorMode():
            rows = plan.copies * plan.first.shape[0]
            cache = handle.adapter.new_cache(handle.model, rows, plan.capacity, paging)
            for layer in cache.layers:
                for buffer in (layer.keys, layer.values):
                    parts.setdefault(buffer.device, Counter())["cache"] += buffer.nbytes
    return MemoryPlan(parts)


def weights_of(handle: PatchHandle) -> Counter[torch.device]:
    """Bytes of a model's tensors on each device; tensors that share memory count once."""
    sizes, seen = Counter(), set()
    for tensor in [*handle.model.parameters(), *handle.model.buffers()]:
        storage = tensor.untyped_storage()
        if (tensor.device, storage.data_ptr()) not in seen:
            seen.add((tensor.device, storage.data_ptr()))
            sizes[tensor.device] += storage.nbytes()
    return sizes


def fitted(runner, memory, capacity) -> MemoryPlan:
    return memory_plan(runner.decoder.handle, runner.plan, runner.grid, runner.paging, False)
