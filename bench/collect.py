"""Which machine code the checks and timings of `gpu-check` ask for, found out without a GPU: the cases of `gpu-check`
run on CPU tensors, with a driver that stands in for a GPU's, and what Triton would compile is collected instead of
launched.

This runs in a process of its own, without TRITON_INTERPRET, because what stands in for a GPU stays in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction, driver

import dlm_fast  # first: in a checkout it puts the dlm_kernels that lies beside it in place
import dlm_kernels.device
from dlm_fast import Ops
from dlm_kernels import reference
from dlm_kernels.testing import Failure

from . import ceilings, gpu_check
from .checks import run as checks
from .checks.run import Sizes
from .shapes import Shapes
from .speed import forms as speed_forms
from .speed import unmask_forms as speed_unmask_forms
from .speed.run import OURS, Bench, Ceilings
from .timing import Budget

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MULTIPROCESSORS = 132  # of an H100 SXM and an H200: how often a row of logits is split follows from it
JUDGES = (
    "same_bits", "no_worse_than_torch", "compare", "compare_states", "compare_norms", "compare_rotations",
    "compare_activations",
)  # fmt: skip
# Hidden and intermediate sizes are no part of a machine code, except that they are multiples of 16, and except for the
# small ops of a layer, which are followed at their own sizes.
THINNER, UNTHINNED = 16, ("layers",)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One machine code.

    Attributes:
        asked_by: the first case that asks for this machine code.
    """

    source: ASTSource
    options: Any
    target: GPUTarget
    asked_by: str

    @property
    def name(self) -> str:
        return f"{self.source.fn.__name__} for sm_{self.target.arch}, asked for by {self.asked_by}"


class Collector:
    """Stands in for a GPU from the moment it is made.

    Attributes:
        variants: every machine code that was asked for since then, each once.
        asking: the case that runs now.
    """

    def __init__(self) -> None:
        self.variants: dict[tuple[str, str, int], Variant] = {}
        self.asking = ""
        self.capability = 0
        collector = self

        def collect(self, key, signature, device, constants, options, attributes, warmup):
            source = ASTSource(self, signature, constants, attributes)
            variant = Variant(source, options, collector.get_current_target(), collector.asking)
            collector.variants.setdefault((source.hash(), options.hash(), collector.capability), variant)
            self.device_caches[device][0][key] = made = _Unlaunched()
            return made

        JITFunction._do_compile = collect
        driver.set_active(self)
        dlm_kernels.device.capability_of = lambda op, tensor, kernel: self.capability
        torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
            multi_processor_count=MULTIPROCESSORS, major=self.capability // 10, minor=self.capability % 10
        )
        torch.cuda.mem_get_info = lambda device=None: (1 << 40, 1 << 40)
        torch.Generator = _CPUGenerator

    # As much of a Triton driver as a launch asks for. Triton keeps compiled kernels by device, so every capability is a
    # device of its own.

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return GPU


class _Unlaunched:
    """What a launch takes for a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: object) -> None:
        return None

    def run(self, *arguments: object) -> None:
        return None


class _OnTheCPU(TorchFunctionMode):
    """Makes on the CPU whatever is asked for on a GPU. With `blank`, random inputs are not even drawn."""

    def __init__(self, blank: bool) -> None:
        super().__init__()
        self.blank = blank

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _device_constructors() and kwargs.get("device") is None:
            kwargs["device"] = CPU  # also inside `with device:`, which would name the GPU later
        args = tuple(CPU if _is_gpu(value) else value for value in args)
        kwargs = {name: CPU if _is_gpu(value) else value for name, value in kwargs.items()}
        if self.blank and func is torch.randn:
            func = torch.empty
        return func(*args, **kwargs)


def _is_gpu(value: object) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


class _CPUGenerator(torch.Generator):
    def __new__(cls, device: object = CPU) -> torch.Generator:
        return super().__new__(cls, CPU)


def checks_and_timings(
    collector: Collector, capability: int, sizes: Sizes, shapes: Shapes, seed: int, ops: tuple[str, ...] = checks.OPS
) -> Iterator[tuple[str, str]]:
    """Runs every case of the ops' checks, and ours at every shape that is timed if these checks are green. Nothing is
    judged.

    Yields:
        (case, why the case could not be followed to its end), and the reason is "" for most cases.
    """
    collector.capability = capability
    for module in (*gpu_check.CASES.values(), speed_forms, speed_unmask_forms):
        for name in JUDGES:
            if hasattr(module, name):
                setattr(module, name, lambda *arguments, **options: None)
    triton_ops = dlm_fast.triton_ops()
    for op in ops:
        # A decode goes on from what its ops computed: there the reference does the work, behind ours.
        found = gpu_check.cases_of(_doubled(triton_ops) if op == "decode" else triton_ops, GPU, sizes, seed, (op,))
        for _, (name, case) in found:
            yield _follow(collector, f"{op}: {name}", case, blank=False)
    bench = _OneSet(GPU, lambda candidate: lambda: 0.0, Budget(1e9, 0), Ceilings(1, 1, 1, 1, 1), 1, 1)
    thin = [
        dataclasses.replace(m, layers=1, hidden=m.hidden // THINNER, intermediate=m.intermediate // THINNER)
        for m in shapes.models
    ]
    for timed, (shapes_of, needed) in gpu_check.TIMINGS.items():
        if not set(needed) <= set(ops):
            continue
        models = shapes.models if timed in UNTHINNED else tuple(thin)
        # As of the checks, a decode goes on from what its ops computed.
        timed_ops = _doubled(triton_ops) if timed == "slots" else triton_ops
        for shape in shapes_of(bench, timed_ops, dataclasses.replace(shapes, models=models)):

            def ours(shape=shape) -> None:
                work = shape.build()
                if work.check is not None:
                    with contextlib.suppress(Failure):  # nothing was computed
                        work.check()
                for candidate in work.candidates:
                    if candidate.name == OURS or candidate.name.startswith(f"{OURS},"):
                        (candidate.warm or candidate.calls[0])()

            yield _follow(collector, f"timing: {timed} {shape.model} {shape.label}", ours, blank=True)
    yield _follow(collector, "ceilings", lambda: ceilings.launch_empty(torch.zeros(1, device=GPU)), blank=False)


def _follow(collector: Collector, name: str, case: Callable[[], None], blank: bool) -> tuple[str, str]:
    collector.asking, reason = name, ""
    try:
        with torch.no_grad(), _OnTheCPU(blank):
            case()
    except Exception as error:  # this includes a check that is skipped: its kernels are not known
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return name, reason


class _OneSet(Bench):
    def rotation(self, bytes_per_set: int) -> tuple[int, bool]:
        return 1, True


def _doubled(ops: Ops) -> Ops:
    """Ops that call ours, which compute nothing here, and then return what the reference computes."""

    def both(name: str) -> Callable:
        ours, expected = getattr(ops, name), getattr(reference, name)

        def call(*arguments: Any, **options: Any) -> Any:
            ours(*arguments, **options)
            return expected(*arguments, **options)

        return call

    names = [field.name for field in dataclasses.fields(Ops) if hasattr(reference, field.name)]
    return dataclasses.replace(ops, **{name: both(name) for name in names})
