"""Triton's launch path without a GPU: a stand-in for the driver, and launches that are recorded instead of made.

What a launcher passes is specialised by Triton as on a GPU (types, alignment, ones, None); what Triton would compile is
what is recorded. This is for processes of their own, without TRITON_INTERPRET: see tests/kernels/test_launch.py.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime import JITFunction, driver

from dlm_kernels.static import CompileCase


@dataclasses.dataclass(frozen=True)
class Variant:
    """One machine code: all that Triton distinguishes.

    Attributes:
        aligned: paths of the arguments that are known multiples of 16.
    """

    function: str
    signature: tuple[tuple[str, object], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: frozenset[str]
    num_warps: int
    num_stages: int
    maxnreg: int | None


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: its machine code and its grid."""

    variant: Variant
    grid: tuple[int, ...]


class StandIn:
    """As much of a Triton driver as a launch asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def _name(function: JITFunction, path: tuple[int, ...]) -> str:
    return ".".join([function.arg_names[path[0]], *map(str, path[1:])])


def variant_of(function: JITFunction, signature, constants, attributes, options) -> Variant:
    """The machine code of what Triton is about to compile. `constants` and `attributes` are keyed by place, as Triton
    keys them."""
    return Variant(
        function.__name__,
        tuple((name, kind) for name, kind in signature.items()),
        tuple(sorted((_name(function, path), value) for path, value in constants.items())),
        frozenset(
            _name(function, path) for path, attribute in attributes.items() if ["tt.divisibility", 16] in attribute
        ),
        options["num_warps"],
        options["num_stages"],
        options["maxnreg"],
    )


def variant_of_case(case: CompileCase) -> Variant:
    """The machine code that the static report compiles for a case."""
    places = {name: (case.fn.arg_names.index(name),) for name in case.constexprs}
    return Variant(
        case.fn.__name__,
        tuple((name, case.signature[name]) for name in case.fn.arg_names),
        tuple(sorted((_name(case.fn, places[name]), value) for name, value in case.constexprs.items())),
        frozenset(case.divisible_by_16),
        case.num_warps,
        case.num_stages,
        case.maxnreg,
    )


def make_ir(function: JITFunction, signature, constants, attributes, options, target: GPUTarget) -> None:
    """Runs Triton's front end alone, which raises what it has against the code of a kernel, as it would before any
    compilation."""
    context = ir.context()
    ir.load_dialects(context)
    backend = make_backend(target)
    backend.load_dialects(context)
    source = ASTSource(function, signature, constants, attributes)
    source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def record(capability: int, front_end: bool = False) -> list[Launch]:
    """From now on no kernel is compiled or launched; the list grows by what would have been. With `front_end`, every
    machine code goes through Triton's front end."""
    launches: list[Launch] = []
    made: list[Variant] = []
    seen: set[Variant] = set()
    driver.set_active(StandIn(capability))
    run = JITFunction.run

    def compile_nothing(self, key, signature, device, constants, options, attributes, warmup):
        variant = variant_of(self, signature, constants, attributes, vars(options))
        if front_end and variant not in seen:
            make_ir(self, signature, constants, attributes, options, driver.active.get_current_target())
        seen.add(variant)
        made.append(variant)

    def run_nothing(self, *args, grid, warmup, **kwargs):
        run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(made.pop(), tuple(grid)))

    JITFunction._do_compile = compile_nothing
    JITFunction.run = run_nothing
    assert triton.runtime.driver.active.get_current_target().arch == capability
    return launches


def launch_nothing(capability: int, launched: Callable[..., None] = lambda *_: None) -> None:
    """From now on no kernel is compiled, and instead of being launched its arguments are passed to `launched`: all that
    the launch in C is given. What Triton does in Python is done, by its own classes."""
    from dlm_kernels import device

    driver.set_active(StandIn(capability))
    device.capability_of = lambda op, tensor, kernel: device.target_of(op, tensor.device)

    def compile_nothing(self, key, signature, device, constants, options, attributes, warmup):
        variant = variant_of(self, signature, constants, attributes, vars(options))
        self.device_caches[device][0][key] = made = _compiled(self, variant, driver.active.target, launched)
        return made

    JITFunction._do_compile = compile_nothing


def _compiled(
    function: JITFunction, variant: Variant, target: GPUTarget, launched: Callable[..., None]
) -> CompiledKernel:
    """A kernel as Triton keeps it after its first launch, without machine code. Its function is its variant."""
    launcher = object.__new__(CudaLauncher)
    vars(launcher).update(
        launch=launched, arg_annotations=None, kernel_signature=None, num_ctas=1, global_scratch_size=0,
        global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1, launch_cooperative_grid=False,
        launch_pdl=False,
    )  # fmt: skip
    kernel = object.__new__(CompiledKernel)
    vars(kernel).update(
        src=types.SimpleNamespace(fn=function), metadata=types.SimpleNamespace(target=target), name=variant.function,
        module=variant, function=variant, packed_metadata=(), _run=launcher,
    )  # fmt: skip
    return kernel
