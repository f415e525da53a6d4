"""The proof without a GPU: what the machine code of every shipped configuration shows, compiled for six targets.

    python -m dlm_kernels.static [--json] [--kernel NAME] [--target 90] [--jobs N]

Triton compiles for a target that is not there, so registers, spills, shared memory, the kind of tensor-core instruction
and the instructions per vocabulary element are facts on any machine. Time and bandwidth are not: those need a GPU.
Races are looked for in the interpreter (tests/support/races.py) and, in shared memory, on a GPU
(`python -m bench sanitize`).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import sass
from .tiles import TARGETS

# What is compiled for unless another target is asked for: the targets that have tiles of their own. The others in
# `TARGETS` run the same configurations.
CAPABILITIES = tuple(sorted(set(TARGETS.values())))

# KiB that one program may use: CUDA C++ Programming Guide, "Compute Capabilities", maximum shared memory per thread
# block.
SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}

# Columns of tensor memory (sm_100), all of it.
TENSOR_MEMORY_LIMIT = 512

# SASS instructions per vocabulary element on sm_90. With more, the reduction does not keep up with an H100's memory.
INSTRUCTIONS_PER_ELEMENT_LIMIT = 10.5

# The module of each op, whose `compile_cases(capability)` lists what the op's launcher may launch.
ROOMS = ("attention", "confidence", "unmask", "drafts", "noise", "layers")
KERNEL_MODULES = {name: f"{__package__}.{name}.cases" for name in ROOMS}


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """One configuration that a launcher may launch.

    Attributes:
        kernel: the op's name, or the names of the op and of its stage.
        config: what tells this configuration from the kernel's others, in a few words.
        fn: the `@triton.jit` function.
        signature: every argument's Triton type: "*bf16", "*i64", "i32", "fp32", "constexpr", or a tuple of types.
        constexprs: the value of every "constexpr" argument.
        divisible_by_16: arguments that the launcher passes as multiples of 16 (pointers: 16-byte aligned), which Triton
            would infer at launch; "strides.0" is the first item of a tuple argument. Without them loads are scalar.
        num_warps, num_stages: launch options.
        elements_per_iteration: vocabulary elements that one program consumes in one iteration of its vocabulary loop;
            None where there is no such loop.
        maxnreg: launch option, the registers of a thread at most; None lets ptxas decide, which may prefer spills to
            few programs.
        mma: kind of tensor-core instruction that the configuration was designed for ("wgmma"); None accepts any.
        fusion: launch option enable_fp_fusion, whether a product and a sum may become one fused operation.
    """

    kernel: str
    config: str
    fn: JITFunction
    signature: dict[str, object]
    constexprs: dict[str, object]
    divisible_by_16: tuple[str, ...]
    num_warps: int
    num_stages: int
    elements_per_iteration: int | None = None
    maxnreg: int | None = None
    mma: str | None = None
    fusion: bool = True


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """What the machine code of one configuration for one target shows.

    Attributes:
        kernel, config: of the case. target: "sm_90".
        registers: per thread.
        spills: bytes of spill stores and loads in the code, as ptxas counts them.
        stack_bytes: local memory of a thread (STACK + LOCAL of cuobjdump). 0 proves that there are no spills; other
            values need not be spills, as the slow path of `sin` keeps an array there.
        shared_bytes: shared memory of a program, dynamic and static. From sm_90 on, the static part includes the 1 KiB
            that the system reserves, so the number errs to the safe side.
        tensor_memory: columns (sm_100), else 0.
        mma: "wgmma", "tcgen05", "mma.sync" or "none". designed_mma: what the case wants it to be, or None.
        instructions_per_element: instructions in the machine's vocabulary loop x threads / elements consumed, or None.
        widest_load: bits of the widest load from global memory by a thread.
        instructions, barriers: of the whole code.
        loops: instructions and barriers of the loops that stream (`sass.streaming_loops`), once through each. Those of
            attention go through tiles of keys: cached ones that are seen whole, cached ones with a mask, the window's.
        tiles: the case's constexprs named BLOCK_*.
    """

    kernel: str
    config: str
    target: str
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    tensor_memory: int
    mma: str
    instructions_per_element: float | None
    widest_load: int
    instructions: int
    barriers: int
    loops: list[tuple[int, int]]
    tiles: dict[str, int]
    designed_mma: str | None = None


def _tool(name: str) -> str:
    """Path of a CUDA binary that ships in Triton's wheel, or of the one its TRITON_*_PATH setting names."""
    try:
        return getattr(knobs.nvidia, name).path
    except (AttributeError, RuntimeError):
        folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        raise RuntimeError(
            f"static: {name} not found; the official Triton wheels for Linux have it in {folder} "
            f"(triton {triton.__version__})"
        ) from None


def _run_tool(name: str, *arguments: str) -> str:
    result = subprocess.run([_tool(name), *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"static: {name} failed with status {result.returncode}: {result.stderr.strip()}")
    return result.stdout + (result.stderr if name.startswith("ptxas") else "")


def _refuse_what_changes_the_code() -> None:
    if knobs.runtime.interpret or not isinstance(tl.sum, JITFunction):
        raise RuntimeError(
            "static: Triton's interpreter is on, so nothing compiles; run in a process without TRITON_INTERPRET"
        )
    if knobs.compilation.override or knobs.nvidia.disable_ptxas_opt or knobs.nvidia.ptxas_options:
        raise RuntimeError(
            "static: unset TRITON_KERNEL_OVERRIDE, DISABLE_PTXAS_OPT and PTXAS_OPTIONS: they change the code"
        )


def _attributes(case: CompileCase) -> dict[tuple[int, ...], list[list[object]]]:
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for name in case.divisible_by_16:
        argument, *path = name.split(".")
        if argument not in case.fn.arg_names:
            raise ValueError(
                f"{case.kernel} {case.config}: divisible_by_16 must name arguments of the function, got {name!r}"
            )
        attributes[(case.fn.arg_names.index(argument), *map(int, path))] = [["tt.divisibility", 16]]
    return attributes


def _check(case: CompileCase) -> None:
    if not isinstance(case.fn, JITFunction):
        raise RuntimeError(
            f"{case.kernel} {case.config}: fn must be a @triton.jit function, got {type(case.fn).__name__}; "
            "if it is an interpreted one, run in a process without TRITON_INTERPRET"
        )
    if set(case.signature) != set(case.fn.arg_names):
        odd = sorted(set(case.signature) ^ set(case.fn.arg_names))
        raise ValueError(
            f"{case.kernel} {case.config}: signature must name exactly the function's arguments, differs in {odd}"
        )
    declared = {name for name, kind in case.signature.items() if kind == "constexpr"}
    if declared != set(case.constexprs):
        odd = sorted(declared ^ set(case.constexprs))
        raise ValueError(
            f"{case.kernel} {case.config}: constexprs must be exactly the 'constexpr' arguments, differs in {odd}"
        )


def _spill_bytes(ptx: str, capability: int, fusion: bool, stack: int) -> int:
    """Bytes of spill stores and loads of a kernel that uses `stack` bytes of local memory. Only ptxas tells spills from
    arrays, and its count is not kept in the binary, so ptxas runs again."""
    target = f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"
    ptxas = "ptxas_blackwell" if capability >= 100 else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        # Triton 3.7 passes the option, 3.6 does not: the run that needs the same stack is the one that made the binary.
        for allocation in (["--regAllocOptLevel=2"], []):
            options = ["-v", "-lineinfo", *([] if fusion else ["--fmad=false"]), *allocation, target]
            log = _run_tool(ptxas, *options, str(source), "-o", f"{source}.cubin")
            counts = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
            if counts and int(counts[1]) == stack:
                return int(counts[2]) + int(counts[3])
    return stack  # ptxas gives no account of the local memory, which is then taken for spills


def compile_case(case: CompileCase, capability: int) -> CompileResult:
    """Compiles one configuration for one target, with no driver and no GPU, and reads its machine code.

    Raises:
        RuntimeError: the interpreter is on; a CUDA binary of Triton's wheel is missing; the kernel does not compile.
        ValueError: a target that is not in TARGETS, or a case that does not fit its function.
    """
    # 1. Compile.
    _refuse_what_changes_the_code()
    if capability not in TARGETS:
        raise ValueError(
            f"compile_case: capability must be one of {', '.join(map(str, sorted(TARGETS)))}, got {capability}"
        )
    _check(case)
    source = ASTSource(case.fn, case.signature, constexprs=case.constexprs, attrs=_attributes(case))
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg}
    options["enable_fp_fusion"] = case.fusion
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # raised by any stage of Triton, and said again with the name of the case
        raise RuntimeError(f"{case.kernel} {case.config} on sm_{capability} does not compile: {error}") from error
    metadata = compiled.metadata

    # 2. Read the machine code.
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run_tool("cuobjdump", "--dump-resource-usage", str(cubin))
        instructions, labels = sass.parse(_run_tool("nvdisasm", "-c", "-ndf", str(cubin)), metadata.name)
    match = re.search(rf"Function {re.escape(metadata.name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"static: cuobjdump printed no resource usage of {metadata.name}: {usage.strip()}")
    registers, stack, static_shared, local = map(int, match.groups())

    # 3. Count.
    loops, per_element = sass.loops(instructions, labels), None
    if case.elements_per_iteration is not None:
        per_element = _instructions_per_element(case, loops, compiled.asm["ttir"], 32 * metadata.num_warps)
    spills = 0
    if stack + local:
        spills = _spill_bytes(compiled.asm["ptx"], capability, metadata.enable_fp_fusion, stack + local)
    return CompileResult(
        kernel=case.kernel,
        config=case.config,
        target=f"sm_{capability}",
        registers=registers,
        spills=spills,
        stack_bytes=stack + local,
        shared_bytes=metadata.shared + static_shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        mma=sass.mma_kind(instructions),
        instructions_per_element=per_element,
        widest_load=sass.widest_load(instructions),
        instructions=len(instructions),
        barriers=sass.barriers(instructions),
        loops=[(loop.instructions, loop.barriers) for loop in sass.streaming_loops(loops)],
        tiles={
            name: value
            for name, value in case.constexprs.items()
            if name.startswith("BLOCK_") and isinstance(value, int)
        },
        designed_mma=case.mma,
    )


def _instructions_per_element(case: CompileCase, loops: list[sass.Loop], ttir: str, threads: int) -> float:
    """Instructions of the vocabulary loop x threads / elements that the loop consumes. The vocabulary loop is the loop
    that loads most; of several that load the same, the longest."""
    loop = max(loops, key=lambda loop: (loop.load_bytes, loop.instructions), default=sass.Loop(0, 0))
    iteration_bytes = sass.ttir_loop_bytes(ttir)
    if not loop.load_bytes or not iteration_bytes:
        raise RuntimeError(
            f"{case.kernel} {case.config}: elements_per_iteration is given, but no loop loads from global memory"
        )
    unrolled = max(1, round(loop.load_bytes * threads / iteration_bytes))
    return loop.instructions * threads / (case.elements_per_iteration * unrolled)


@functools.cache
def _shipped(module: str, capability: int) -> tuple[CompileCase, ...]:
    return tuple(importlib.import_module(module).compile_cases(TARGETS[capability]))


def shipped(kernel: str, capability: int) -> tuple[CompileCase, ...]:
    """The configurations that the launcher of an op may launch on a GPU of this capability."""
    return _shipped(KERNEL_MODULES[kernel], capability)


def _compile_shipped(task: tuple[str, int, int]) -> CompileResult:
    module, index, capability = task
    return compile_case(_shipped(module, capability)[index], capability)


def report(
    capabilities: Sequence[int] = CAPABILITIES, kernels: Iterable[str] | None = None, jobs: int | None = None
) -> list[CompileResult]:
    """Every shipped configuration, compiled for every target.

    Args:
        capabilities: compute capabilities, out of `tiles.TARGETS`.
        kernels: names of ops (modules) or of cases; None: all.
        jobs: processes; None: one for every core. The result does not depend on it, nor on what Triton's cache holds.

    Raises:
        ValueError: unknown capability or kernel, or two shipped configurations of one name.  RuntimeError: as
        compile_case.
    """
    _refuse_what_changes_the_code()
    for capability in capabilities:
        if capability not in TARGETS:
            raise ValueError(
                f"report: capabilities must be out of {', '.join(map(str, sorted(TARGETS)))}, got {capability}"
            )
    wanted = None if kernels is None else set(kernels)
    tasks, known = [], set(KERNEL_MODULES)
    for capability in capabilities:
        seen: set[tuple[str, str]] = set()
        for op, module in KERNEL_MODULES.items():
            for index, case in enumerate(_shipped(module, capability)):
                if (case.kernel, case.config) in seen:
                    raise ValueError(f"report: two shipped configurations are named {case.kernel} {case.config}")
                seen.add((case.kernel, case.config))
                known.add(case.kernel)
                if wanted is None or wanted & {op, case.kernel}:
                    tasks.append((module, index, capability))
    if wanted is not None and wanted - known:
        raise ValueError(
            f"report: kernels must be out of {', '.join(sorted(known))}, got {', '.join(sorted(wanted - known))}"
        )

    workers = min(jobs or os.cpu_count() or 1, len(tasks))
    if workers <= 1:
        return [_compile_shipped(task) for task in tasks]
    # The processes are forked, so that no main module runs again and torch is imported once. The children touch no CUDA
    # and no thread pool.
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_compile_shipped, tasks))


def violations(results: Iterable[CompileResult]) -> list[str]:
    """One sentence for everything in `results` that must not ship; empty if all is well."""
    found = []
    for result in results:
        name = f"{result.kernel} {result.config} on {result.target}"
        limit = SHARED_LIMIT[int(result.target.removeprefix("sm_"))] * 1024
        if result.spills:
            found.append(f"{name}: spills must be 0, got {result.spills} bytes of spill stores and loads")
        if result.shared_bytes > limit:
            found.append(f"{name}: shared memory must be at most {limit} bytes, got {result.shared_bytes}")
        if result.tensor_memory > TENSOR_MEMORY_LIMIT:
            found.append(
                f"{name}: tensor memory must be at most {TENSOR_MEMORY_LIMIT} columns, got {result.tensor_memory}"
            )
        if result.designed_mma is not None and result.mma != result.designed_mma:
            found.append(
                f"{name}: tensor-core instructions must be {result.designed_mma}, as designed, got {result.mma}"
            )
        per_element = result.instructions_per_element
        if result.target == "sm_90" and per_element is not None and per_element > INSTRUCTIONS_PER_ELEMENT_LIMIT:
            limit = INSTRUCTIONS_PER_ELEMENT_LIMIT
            found.append(f"{name}: instructions per element must be at most {limit}, got {per_element:.2f}")
    return found


def table(results: Sequence[CompileResult]) -> str:
    """The results as aligned text, one line each; "loops" are instructions/barriers of the loops that
    stream."""
    header = (
        "kernel", "config", "target", "registers", "spills", "stack", "shared", "mma", "load", "barriers", "loops",
        "instr/element",
    )  # fmt: skip
    rows = [
        (
            result.kernel, result.config, result.target, str(result.registers), str(result.spills),
            str(result.stack_bytes), str(result.shared_bytes), result.mma,
            f"{result.widest_load}-bit" if result.widest_load else "-",
            str(result.barriers),
            " ".join(f"{instructions}/{barriers}" for instructions, barriers in result.loops) or "-",
            "-" if result.instructions_per_element is None else f"{result.instructions_per_element:.2f}",
        )
        for result in results
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    formats = [f"{{:{'<' if column in (0, 1, 2, 7) else '>'}{width}}}" for column, width in enumerate(widths)]
    return "\n".join("  ".join(formats).format(*row).rstrip() for row in (header, *rows))


def print_table(results: Sequence[CompileResult]) -> None:
    """Prints `table` and a last line that counts."""
    targets, found = len({result.target for result in results}), len(violations(results))
    print(table(results))
    print(f"{len(results)} binaries, {targets} targets, triton {triton.__version__}: {found or 'no'} violations")


def as_dict(result: CompileResult) -> dict[str, object]:
    """The result as JSON has it."""
    return dataclasses.asdict(result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report, and returns status 1 if a configuration must not ship. With --json the last line of stdout is
    one JSON object."""
    purpose = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m dlm_kernels.static", description=purpose, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object, last line")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="this op or kernel only; may be repeated")
    parser.add_argument("--target", action="append", metavar="90", help="this compute capability only; may be repeated")
    parser.add_argument("--jobs", type=int, default=None, metavar="N", help="processes (default: one for every core)")
    options = parser.parse_args(arguments)
    try:
        capabilities = [int(target.removeprefix("sm_")) for target in options.target or ()] or CAPABILITIES
        results = report(capabilities, options.kernel, options.jobs)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(results)
    found = violations(results)
    for violation in found:
        print(violation, file=sys.stderr)
    if options.json:
        print(json.dumps({"kernels": [as_dict(result) for result in results]}))
    return 1 if found else 0


if __name__ == "__main__":
    # The module runs under its own name, which its worker processes and the kernel modules import.
    sys.exit(importlib.import_module("dlm_kernels.static").main())
