"""What a batch needs of the memory of its devices, as a lower bound, and the refusal of a batch that cannot fit.

The bound counts what the loop allocates for certain, without the weights: the canvases; the buffers that live as long
as the decode (keys and values, the distributions of the step before, the shares of a schedule); and the hidden states
and logits of the first steps. What layers and ops need besides is not counted, so that no batch is refused that fits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dlm_kernels import RowState

from ..diffusion import DiffusionConfig
from ..models.cache import Paging
from ..models.parallel import least_of_ranks
from ..patching import PatchHandle
from ..presets import Preset
from .plan import Bucket, Plan, placed_rows, plan_of_rows
from .progress import planned_grid
from .shapes import Grid, first_steps

# For each device, bytes by what takes them.
Parts = dict[torch.device, Counter[str]]

GIB = 2**30
# A batch that surely needs less is not compared with the free memory, which costs the host as much as a small step.
SMALL = 2**26
# Bytes of a position of a canvas: its token, step and confidence. The host reads the canvases in one copy, the device
# holds another and the numbers of the decode (`Constants`).
CANVAS = 16
# The most rows that a refusal advises.
MOST_ADVISED = 1024
# Stands for the free memory of a device where nobody says how much is free.
UNKNOWN = 2**62
CGROUPS, MEMORY = Path("/sys/fs/cgroup"), Path("/proc/meminfo")


class BatchTooLarge(ValueError):
    """A batch that cannot fit the memory of a device. The message says what takes how much, and how many rows fit."""


def open_batch(
    handle: PatchHandle,
    canvases: list[Tensor],
    rows: int,
    preset: Preset,
    diffusion: DiffusionConfig,
    device: torch.device,
) -> tuple[Plan, Grid]:
    """The plan and the shapes of a decode of canvases, `rows` of them at a time.

    Raises BatchTooLarge before anything is allocated that does not fit.
    """
    batch = Batch(handle, canvases, rows, preset, diffusion, device)
    is_compared = most_bytes(handle, preset, diffusion, rows, batch.longest) > SMALL
    if is_compared:
        _compare(batch, _canvas_parts(batch))
    plan, grid, state = batch.opened()
    if is_compared:
        _compare(batch, batch.parts(plan, grid, state))
    return plan, grid


def check_steps(batch: Batch, plan: Plan, grid: Grid, paging: Paging | None) -> None:
    """Raises BatchTooLarge if rows cannot fit that begin together in the slots of a plan, one for each slot."""
    if most_bytes(batch.handle, batch.preset, batch.diffusion, batch.rows, batch.longest) > SMALL:
        state = placed_rows(batch.canvases, plan.width, plan.block_length, plan.preset, plan.diffusion)
        _compare(batch, step_parts(batch.handle, plan, state, grid, paging))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Canvases that are decoded `rows` at a time."""

    handle: PatchHandle
    canvases: list[Tensor]
    rows: int
    preset: Preset
    diffusion: DiffusionConfig
    device: torch.device

    @property
    def longest(self) -> int:
        return max(map(len, self.canvases), default=0)

    def opened(self) -> tuple[Plan, Grid, RowState]:
        """The plan, the shapes, and the initial state of all canvases."""
        plan, state = plan_of_rows(self.canvases, self.preset, self.diffusion, self.rows, self.device)
        return plan, planned_grid(self.handle, plan, state), state

    def parts(self, plan: Plan, grid: Grid, state: RowState) -> Parts:
        """What the decode takes: at the worst its longest rows begin together."""
        if self.rows < len(self.canvases):
            worst = sorted(range(len(self.canvases)), key=lambda row: len(self.canvases[row]))[-self.rows :]
            state = state.of_rows(torch.tensor(worst))
        return step_parts(self.handle, plan, state, grid)


def most_bytes(handle: PatchHandle, preset: Preset, diffusion: DiffusionConfig, rows: int, L: int) -> int:
    """A number of bytes that what is counted here never exceeds for `rows` rows of `L` positions."""
    model, config, head_dim = handle.model, handle.model.config, max(handle.adapter.head_dims(handle.model))
    numbers = 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim + 5 * config.hidden_size
    numbers = L * (numbers + 3 * config.vocab_size) * handle.adapter.compute_dtype(model).itemsize
    steps = max(preset.steps_per_block or 0, preset.block_length or 0, diffusion.block_length or 0, L)
    return rows * (4 * CANVAS * L + numbers + 4 * steps)


def _canvas_parts(batch: Batch) -> Parts:
    """What the canvases of a batch take."""
    size = CANVAS * batch.longest
    parts: Parts = defaultdict(Counter)
    parts[torch.device("cpu")]["canvases"] += size * len(batch.canvases)
    parts[batch.device]["canvases"] += 2 * size * batch.rows
    return parts


def step_parts(handle: PatchHandle, plan: Plan, state: RowState, grid: Grid, paging: Paging | None = None) -> Parts:
    """What the buffers and the first steps of a decode of these rows take; `state` is on the host."""
    preset, config, B = plan.preset, handle.model.config, plan.first.shape[0]
    main, dtype, copies = plan.first.device, handle.adapter.compute_dtype(handle.model), plan.copies
    parts: Parts = defaultdict(Counter)
    if plan.cache.stores:
        with FakeTensorMode():
            for layer in handle.adapter.new_cache(handle.model, copies * B, plan.capacity, paging).layers:
                for buffer in (layer.keys, layer.values):
                    parts[buffer.device]["keys and values"] += buffer.nbytes
    if any("kl" in policy.outputs for policy in preset.policies):
        parts[main]["distributions of the step before"] += B * plan.lanes * config.vocab_size * dtype.itemsize
    if preset.by_share:
        parts[main]["shares of the schedule"] += 4 * B * plan.steps
    if plan.previous:
        parts[main]["hidden states"] += B * config.hidden_size * dtype.itemsize

    def held(step: tuple[Bucket, bool]) -> tuple[int, int]:
        """Bytes of hidden states and of logits."""
        bucket, chooses = step
        logits = (1 + (copies > 1 or preset.shadow)) * bucket.lanes * chooses
        sizes = copies * bucket.width * config.hidden_size, logits * config.vocab_size
        return tuple(bucket.rows * size * dtype.itemsize for size in sizes)

    hidden, logits = max(map(held, first_steps(plan, state, grid)), key=sum, default=(0, 0))
    parts[main] += Counter({"hidden states": hidden, "logits": logits})
    return parts


def _compare(batch: Batch, parts: Parts) -> None:
    """Raises BatchTooLarge if a device has not the memory for what the parts say."""
    found = {place: free_bytes(place) for place in parts}
    # Ranks that decided each by its own memory would wait for each other: one decodes, and another has refused.
    agreed = least_of_ranks(batch.handle.model, [UNKNOWN if size is None else size for size in found.values()])
    free = {place: None if size == UNKNOWN else size for place, size in zip(found, agreed)}
    short = [place for place, taken in parts.items() if free[place] is not None and taken.total() > free[place]]
    if not short:
        return

    def fits(rows: int) -> bool:
        """Whether another batch of the longest rows fits as it is opened and afterwards."""
        other = dataclasses.replace(batch, canvases=[max(batch.canvases, key=len)] * rows, rows=rows)

        def is_free(parts: Parts) -> bool:
            return all(free.get(place) is None or taken.total() <= free[place] for place, taken in parts.items())

        return is_free(_canvas_parts(other)) and is_free(other.parts(*other.opened()))

    # The advice holds whichever rows are decoded together: so many of the longest fit.
    place = short[0]
    count = min(batch.rows - 1, batch.rows * free[place] // parts[place].total(), MOST_ADVISED)
    while count and not fits(count):
        count = count * 3 // 4
    taken = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts[place].most_common())
    raise BatchTooLarge(
        f"generate: a batch must fit the free memory of {place}, got {batch.rows} rows of up to {batch.longest} "
        f"positions, which take at least {parts[place].total() / GIB:.2f} GiB ({taken}) where {free[place] / GIB:.2f} "
        f"GiB are free; {f'batch_size={count} would fit' if count else 'not even batch_size=1 would fit'}"
    )


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a device has left for tensors; None where nobody says. Of a CPU, what the machine and the control
    groups of this process leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds and no tensor uses is free for tensors too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    return min((free for free in (_free_of_machine(), *_free_of_groups()) if free is not None), default=None)


def _free_of_machine() -> int | None:
    values = _fields(MEMORY)
    return values["MemAvailable:"] * 1024 if "MemAvailable:" in values else None


def _free_of_groups() -> list[int]:
    """Bytes that each control group with a limit has left, what it could drop from the file cache included."""
    found = []
    for folder, limit, used, cached in _groups():
        try:
            most, now = int((folder / limit).read_text()), int((folder / used).read_text())
        except (OSError, ValueError):  # no such file, or the limit "max"
            continue
        fields = _fields(folder / "memory.stat")
        found.append(most - now + sum(fields.get(name, 0) for name in cached))
    return found


@functools.cache
def _groups() -> list[tuple[Path, str, str, tuple[str, str]]]:
    """The control groups that this process is in, with the names of their files: of version 2, and of version 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if not kinds:
            root, names = CGROUPS, ("memory.max", "memory.current", ("inactive_file", "active_file"))
        elif "memory" in kinds.split(","):
            root = CGROUPS / "memory"
            cached = ("total_inactive_file", "total_active_file")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", cached)
        else:
            continue
        inner = root / path.lstrip("/")
        # A container sees its own group as the root, whatever the path is outside.
        found += [(folder, *names) for folder in (inner, *inner.parents) if folder == root or root in folder.parents]
    return found


def _fields(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file of the kernel; empty where there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, value, *_ in map(str.split, lines) if value.isdecimal()}
