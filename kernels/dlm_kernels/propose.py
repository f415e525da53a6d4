"""Entries for the tile table, proposed by compiling candidates: what fits, without a GPU.

    python -m dlm_kernels.propose --kernel attention --config "bf16 D=128 G=4 full cache 128x64" --target 90 \\
        [--set BLOCK_M=64,128] [--jobs N]

A candidate is a shipped configuration with other tile numbers, and its machine code decides. Nothing that spills or
exceeds a target's shared memory is proposed. The others are ordered by the instruction that they were designed for,
then by the warps that an SM can hold. Only a GPU can tell the first few apart, so a proposal is where a measurement
begins, not its result.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import itertools
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence

from . import static
from .static import CompileCase, CompileResult

# For each kernel, the numbers that a table entry consists of and the values worth trying.
AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "attention": {
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_N": (16, 32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "confidence": {"COLUMNS": (256, 512, 1024, 2048), "num_warps": (4, 8, 16), "num_stages": (1,)},
    "unmask": {"num_warps": (1, 2, 4, 8, 16, 32)},
}
LAUNCH_OPTIONS = ("num_warps", "num_stages")

# What one SM has: shared memory in KiB, resident warps (CUDA C++ Programming Guide, "Compute Capabilities") and, on
# every target, 65,536 registers.
SM_SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
SM_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
SM_REGISTERS = 65536


@dataclasses.dataclass(frozen=True)
class Proposal:
    """One candidate and what its machine code shows.

    Attributes:
        numbers: the entry's numbers by name.
        result: what `static.compile_case` says of the candidate, None if that does not compile.
        reason: why the candidate must not ship, or why it does not compile; empty if it may ship.
        programs: programs that fit on one SM at once, by registers, warps and shared memory.
        warps: the warps of those programs together.
    """

    numbers: Mapping[str, int]
    result: CompileResult | None
    reason: str
    programs: int = 0
    warps: int = 0

    @property
    def fits(self) -> bool:
        return not self.reason


def candidates(case: CompileCase, axes: Mapping[str, Sequence[int]]) -> list[tuple[dict[str, int], CompileCase]]:
    """`case` with every combination of numbers. Raises ValueError for a number that the kernel does not have."""
    for name in axes:
        if name not in LAUNCH_OPTIONS and name not in case.constexprs:
            raise ValueError(
                f"propose: {case.kernel} has no number {name}; it has {', '.join((*_numbers(case), *LAUNCH_OPTIONS))}"
            )
    made = []
    for values in itertools.product(*axes.values()):
        numbers = dict(zip(axes, values))
        options = {name: numbers[name] for name in LAUNCH_OPTIONS if name in numbers}
        constexprs = case.constexprs | {name: value for name, value in numbers.items() if name not in LAUNCH_OPTIONS}
        if "COLUMNS" in numbers:  # decides what a trip of the loop consumes, and how many trips a vocabulary takes
            elements = (
                case.elements_per_iteration
                and case.elements_per_iteration * numbers["COLUMNS"] // case.constexprs["COLUMNS"]
            )
            constexprs["COLUMN_TILES"] = max(
                1, case.constexprs["COLUMN_TILES"] * case.constexprs["COLUMNS"] // numbers["COLUMNS"]
            )
            options["elements_per_iteration"] = elements
        made.append((numbers, dataclasses.replace(case, constexprs=constexprs, **options)))
    return made


def _numbers(case: CompileCase) -> list[str]:
    return [name for name, value in case.constexprs.items() if type(value) is int and name.isupper()]


def residency(result: CompileResult, num_warps: int) -> int:
    """Programs of this machine code that one SM holds at once."""
    capability = int(result.target.removeprefix("sm_"))
    # A warp gets its registers in units of 256.
    per_warp = -(-result.registers * 32 // 256) * 256
    by_registers = SM_REGISTERS // per_warp // num_warps
    by_shared = SM_SHARED[capability] * 1024 // max(1, result.shared_bytes)
    return min(by_registers, by_shared, SM_WARPS[capability] // num_warps)


def judged(numbers: dict[str, int], case: CompileCase, capability: int) -> Proposal:
    """A candidate, compiled."""
    try:
        result = static.compile_case(case, capability)
    except RuntimeError as error:  # that Triton refuses a tile is an answer too
        return Proposal(numbers, None, " ".join(str(error).split())[:160])
    broken = [text.partition(": ")[2] for text in static.violations([result])]
    if broken:
        return Proposal(numbers, result, "; ".join(broken))
    programs = residency(result, case.num_warps)
    return Proposal(numbers, result, "", programs, programs * case.num_warps)


def ranked(proposals: Sequence[Proposal], mma: str) -> list[Proposal]:
    """What may ship comes first, by designed instruction, instructions per element and resident warps."""

    def key(proposal: Proposal) -> tuple:
        result = proposal.result
        if not proposal.fits or result is None:
            return (1,)
        return (0, result.mma != mma, result.instructions_per_element or 0.0, -proposal.warps, result.registers)

    return sorted(proposals, key=key)


def propose(
    kernel: str, config: str, capability: int, axes: Mapping[str, Sequence[int]] | None = None, jobs: int = 1
) -> tuple[CompileCase, list[Proposal]]:
    """Compiles the candidates of one shipped configuration, best first.

    Args:
        kernel, config: names of a shipped configuration (`dlm-fast compile-report` lists them).
        axes: replaces the kernel's AXES, number by number.
    Raises:
        ValueError: unknown kernel, config or number.  RuntimeError: as static.compile_case.
    """
    if kernel not in static.KERNEL_MODULES:
        raise ValueError(f"propose: kernel must be one of {', '.join(static.KERNEL_MODULES)}, got {kernel!r}")
    if capability not in static.CAPABILITIES:
        raise ValueError(f"propose: target must be one of {', '.join(map(str, static.CAPABILITIES))}, got {capability}")
    shipped = {f"{case.config}": case for case in static.shipped(kernel, capability)}
    if config not in shipped:
        raise ValueError(
            f"propose: {kernel} has no configuration {config!r} on sm_{capability}; it has {', '.join(shipped)}"
        )
    case = shipped[config]
    chosen = {
        name: values for name, values in AXES.get(kernel, {}).items() if name in (*case.constexprs, *LAUNCH_OPTIONS)
    }
    tasks = [(numbers, candidate, capability) for numbers, candidate in candidates(case, {**chosen, **(axes or {})})]
    shipped_one = judged({}, case, capability)
    if jobs <= 1:
        found = [judged(*task) for task in tasks]
    else:
        # Cases hold functions that do not pickle, so a forked child finds a case by its place in the list.
        global _TASKS
        _TASKS = tasks
        with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
            found = list(pool.map(_task, range(len(tasks))))
    return case, ranked(found, shipped_one.result.mma if shipped_one.result else "none")


_TASKS: list[tuple[dict[str, int], CompileCase, int]] = []


def _task(index: int) -> Proposal:
    return judged(*_TASKS[index])


def table(case: CompileCase, proposals: Sequence[Proposal]) -> str:
    """Aligned text, one line a candidate; the shipped one is marked."""
    names = list(proposals[0].numbers) if proposals else []
    header = ["", *names, "registers", "shared", "programs/SM", "warps/SM", "mma", "load", "instr/element", "verdict"]
    shipped = {**case.constexprs, "num_warps": case.num_warps, "num_stages": case.num_stages}
    rows = [header]
    for proposal in proposals:
        result = proposal.result
        mark = "shipped" if all(shipped[name] == value for name, value in proposal.numbers.items()) else ""
        seen = ["-"] * 7
        if result is not None:
            element = "-" if result.instructions_per_element is None else f"{result.instructions_per_element:.2f}"
            seen = [result.registers, result.shared_bytes, proposal.programs or "-", proposal.warps or "-", result.mma,
                    f"{result.widest_load}-bit", element]  # fmt: skip
        rows.append([mark, *map(str, proposal.numbers.values()), *map(str, seen), proposal.reason or "fits"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)) + "  " + row[-1] for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the candidates of a configuration, best first. With --json the last line of stdout is one JSON object."""
    purpose = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m dlm_kernels.propose", description=purpose, allow_abbrev=False)
    parser.add_argument("--kernel", required=True, help="op whose table entry is looked for")
    parser.add_argument("--config", required=True, help="a configuration that it ships, as compile-report names it")
    parser.add_argument("--target", required=True, help="compute capability, e.g. 90")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=V,V", help="values of one number; may be repeated"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last line")
    given = parser.parse_args(arguments)
    try:
        axes = {}
        for item in given.set:
            name, equals, values = item.partition("=")
            if not equals or not all(value.isdigit() for value in values.split(",")):
                raise ValueError(f"propose: --set must be NAME=NUMBER,NUMBER, got {item!r}")
            axes[name] = tuple(int(value) for value in values.split(","))
        target = given.target.removeprefix("sm_")
        if not target.isdigit():
            raise ValueError(f"propose: --target must be a compute capability, got {given.target!r}")
        case, proposals = propose(given.kernel, given.config, int(target), axes, given.jobs)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(case, proposals))
    if given.json:
        found = [dataclasses.asdict(proposal) for proposal in proposals]
        print(
            json.dumps({"kernel": given.kernel, "config": given.config, "target": f"sm_{target}", "candidates": found})
        )
    return 0 if any(proposal.fits for proposal in proposals) else 1


if __name__ == "__main__":
    # The module runs under its own name, as in static: kernel modules and worker processes import that one.
    sys.exit(importlib.import_module("dlm_kernels.propose").main())
