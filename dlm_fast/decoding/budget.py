"""What a decode takes of the memory of its devices, before anything is allocated.

The decode is opened and its widest steps are run on fake tensors, which have shapes and no numbers. What is alive at
the worst moment is counted.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlm_kernels import RowState, reference

from ..models.cache import Paging
from ..patching import PatchHandle
from ..policies import Sampling
from .memory import GIB
from .plan import Bucket, Plan
from .shapes import Grid
from .step import Decode, denoise_step, open_decode, step_of

# The parts that are taken all the time, and those of which only the largest is.
LASTING, PASSING = ("weights", "cache", "state", "history"), ("admission", "refresh", "logits")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a session takes of each device, by what takes them.

    Attributes:
        parts: for each device, bytes by part: "weights", which are there already; "cache", keys and values; "state",
            canvases, numbers and what policies remember; "history", distributions of the step before; "admission", the
            state of rows that come in; "refresh", the hidden states of the widest step and what its layers make of
            them; "logits", those of the widest step, with the filters and what policies make of them. Of the last three
            only one is taken at a time.
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
            listed = ", ".join(f"{name} {parts[name] / GIB:.3f}" for name in (*LASTING, *PASSING) if parts.get(name))
            lines.append(f"{device}: {self.total(device) / GIB:.3f} GiB ({listed})")
        return "\n".join(lines)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, of those that were made inside.

    Attributes:
        now: bytes on each device.
        peak: the most there were, since `now` was last taken for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[torch.device] = Counter()
        self.peak: Counter[torch.device] = Counter()
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                self._made(tensor)
        return out

    def _made(self, tensor: Tensor) -> None:
        storage, device = tensor.untyped_storage(), tensor.device
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now[device] -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now[device] += size
        self.peak[device] = max(self.peak[device], self.now[device])

    def start(self) -> Counter[torch.device]:
        """Takes what there is now for the peak; returns it."""
        self.peak = Counter(self.now)
        return Counter(self.now)


def memory_plan(handle: PatchHandle, plan: Plan, grid: Grid, sampling: Sampling, paging: Paging | None) -> MemoryPlan:
    """What a decode takes of the memory, with the numbers of rows that ask for as much as any."""
    parts: dict[torch.device, Counter[str]] = {plan.first.device: Counter()}

    def note(name: str, sizes: Mapping[torch.device, int]) -> None:
        for device, size in sizes.items():
            found = parts.setdefault(device, Counter())
            found[name] = max(found[name], size)

    note("weights", weights_of(handle))
    live, (dry, seen) = Live(), _dry(handle)
    # Constants keep the views that steps ask for, and fake ones are for nobody else.
    plan = dataclasses.replace(plan, constants=dataclasses.replace(plan.constants))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), live:
        # 1. What lasts.
        B, cache = plan.first.shape[0], None
        if plan.cache.stores:
            cache = handle.adapter.new_cache(handle.model, plan.copies * B, plan.capacity, paging)
        cached = Counter(live.now)
        note("cache", cached)
        decode = open_decode(dry, plan, RowState.empty(B, plan.width, plan.first.device), sampling, cache)
        opened = live.now - cached
        history = Counter()
        if decode.forward.history is not None:
            for tensor in vars(decode.forward.history).values():
                history[tensor.device] += tensor.nbytes
        note("history", history)
        constants = Counter({plan.first.device: _bytes_of(plan.constants, sampling)})
        note("state", opened - history + constants)
        note("admission", opened)

        # 2. What the widest steps take besides.
        for bucket in widest(plan, grid):
            before = live.start()
            seen.clear()
            seen.update(live=live, before=before)
            _step(decode, bucket)
            note("logits", live.peak - before)
            note("refresh", seen.get("hidden", Counter()))
    return MemoryPlan(parts)


def widest(plan: Plan, grid: Grid) -> list[Bucket]:
    """The buckets of a grid of which some take most of everything."""
    found = []
    for kind, widths in grid.counts.items():
        shapes = [(counts[-1], width) for width, counts in widths.items() if width]
        if shapes:
            lanes = grid.lanes[kind][-1]
            most = {max(shapes, key=lambda shape: shape[0] * shape[1]), max(shapes)}
            found += [Bucket(kind, rows, width, lanes, grid.drafts if kind == "denoise" else 1) for rows, width in most]
    return found


def _step(decode: Decode, bucket: Bucket) -> None:
    """A step on fake tensors; of a policy that reads numbers, as far as its forward and its statistics."""
    B = decode.state.tokens.shape[0]
    rows = None if bucket.rows == B else torch.arange(bucket.rows, device=decode.state.tokens.device)
    try:
        denoise_step(decode, bucket, rows)
    except RuntimeError:
        part = decode if rows is None else decode.of_rows(rows)
        step = step_of(part.plan, part.state, part.sampling, bucket)
        if bucket.kind == "refresh" and part.plan.prefill_rule is not None:
            part.forward.prefill(step)
        else:
            part.forward.look(step, part.forward.run(step))


def _dry(handle: PatchHandle) -> tuple[PatchHandle, dict[str, Any]]:
    """The handle with ops that take no memory beside their results, and a record of what forwards took."""
    seen: dict[str, Any] = {}

    def block_attention(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)

    def confidence(logits: Tensor, *, previous: Tensor | None = None, **kwargs: Any) -> Any:
        # A few words of the vocabulary have statistics of the same shapes.
        few = None if previous is None else previous[:, :4]
        return reference.confidence(logits[:, :4], previous=few, **kwargs)

    def window_hidden(*args: Any) -> Tensor:
        hidden = handle.adapter.window_hidden(*args)
        live, before = seen["live"], seen["before"]
        seen["hidden"] = seen.get("hidden", Counter()) | (live.peak - before)
        live.peak = Counter(live.now)
        return hidden

    dry = copy.copy(handle)
    dry.adapter = types.SimpleNamespace(**{**vars(handle.adapter), "window_hidden": window_hidden})
    dry.ops = dataclasses.replace(handle.ops, block_attention=block_attention, confidence=confidence)
    return dry, seen


def _bytes_of(*values: Any) -> int:
    """Bytes of the tensors that are fields of some dataclasses."""
    return sum(field.nbytes for value in values for field in vars(value).values() if isinstance(field, Tensor))


def weights_of(handle: PatchHandle) -> Counter[torch.device]:
    """Bytes of a model's tensors on each device; tensors that share memory count once."""
    sizes, seen = Counter(), set()
    for tensor in _tensors(handle.model):
        storage = tensor.untyped_storage()
        if (tensor.device, storage.data_ptr()) not in seen:
            seen.add((tensor.device, storage.data_ptr()))
            sizes[tensor.device] += storage.nbytes()
    return sizes


def _tensors(model: torch.nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a model; of one that is spread over ranks, the share of this one."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor.to_local() if hasattr(tensor, "to_local") else tensor
