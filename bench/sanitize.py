"""`python -m bench sanitize`: the kernels' checks at small size under NVIDIA's compute-sanitizer, in a process for each
tool.

    memcheck   reads and writes outside of allocations, misaligned ones, failing CUDA calls
    racecheck  unordered accesses of shared memory
    initcheck  reads of device memory that nobody wrote
    synccheck  barriers that not all of a program's threads reach

The allocator's caching is switched off, because inside a cached block no access is out of bounds. All tools but
initcheck look at our kernels only. initcheck has to see who writes, so it watches all kernels, and its reports that lie
in kernels of others are counted separately.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dlm_fast import Ops

    from .checks.run import Case
    from .shapes import Shapes

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERROR_STATUS = 97  # what compute-sanitizer exits with if it found something; a status of our own checks is 0 or 1
PRINT_LIMIT = 500
TARGET_COMMAND = "sanitize-target"
# What is checked only where it is timed: see `Work.check`.
CHECKED_WHERE_TIMED = ("attention-forms", "unmask-forms")


class SanitizeError(RuntimeError):
    """The sanitizer cannot be run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One report: its first line, and the function in which the report lies ("" if it names none)."""

    text: str
    function: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one tool said.

    Attributes:
        ok: the tool ran to its end and found nothing in our kernels, and their checks passed under it.
        errors: the count of the tool's summary; None = the tool printed no summary.
        findings: the reports that were printed.
        elsewhere: how many of the findings lie in kernels that are not ours.
        reason: why the verdict is not ok.
    """

    tool: str
    ok: bool
    errors: int | None
    findings: list[Finding]
    elsewhere: int
    reason: str


def find() -> str:
    """Path of compute-sanitizer: on PATH, or in the toolkit that CUDA_HOME names. Raises SanitizeError."""
    home = os.environ.get("CUDA_HOME")
    for folder in (None, home and str(Path(home) / "bin"), home and str(Path(home) / "compute-sanitizer")):
        path = shutil.which("compute-sanitizer", path=folder) if folder or folder is None else None
        if path:
            return path
    raise SanitizeError(
        "compute-sanitizer must be on PATH or under CUDA_HOME, found neither "
        f"(CUDA_HOME={'unset' if home is None else home}); it is part of the CUDA toolkit"
    )


def kernel_names() -> list[str]:
    """Names of the functions that our launchers launch. Imports Triton."""
    import dlm_fast  # noqa: F401  first: in a checkout it puts the dlm_kernels that lies beside it in place
    from dlm_kernels import static

    return sorted({case.fn.__name__ for op in static.KERNEL_MODULES for case in static.shipped(op, 90)})


def command(sanitizer: str, tool: str, kernels: Sequence[str], seed: int) -> list[str]:
    """The command line of one tool."""
    line = [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR_STATUS), "--print-limit", str(PRINT_LIMIT)]
    line += ["--show-backtrace", "device", "--target-processes", "application-only"]
    if tool == "memcheck":
        line += ["--report-api-errors", "no"]  # torch and Triton raise what a call returns, and the checks are red then
    if tool != "initcheck":
        line += ["--kernel-name", ",".join(f"kns={name}" for name in kernels)]
    line += [sys.executable, "-m", "bench", TARGET_COMMAND, "--seed", str(seed)]
    # Poison is a write: under it no output and no workspace would be unwritten.
    return line + (["--plain-memory"] if tool == "initcheck" else [])


_SUMMARY = re.compile(r"^=+ (?:RACECHECK SUMMARY: (\d+) hazards? displayed|ERROR SUMMARY: (\d+) errors?)", re.MULTILINE)
_KINDS = (
    "Invalid|Uninitialized|Race reported|Potential|Barrier|Misaligned|Program hit|Missing|Out-of-range|Malloc|Divergent"
)
_FINDING = re.compile(rf"^=+ (?:Error: |Warning: )?((?:{_KINDS})\b.*)$")
_AT = re.compile(r"(?:\bat |\bin )(?:0x[0-9a-f]+ in )?([A-Za-z_][\w:<>~]*)(?:\(|\+0x|\b)")
_BROKEN = re.compile(r"^=+ (?:Internal Sanitizer Error|Error: (?!Race)).*$", re.MULTILINE)


def parse(tool: str, status: int, output: str, kernels: Collection[str]) -> Verdict:
    """The verdict of a run, from its exit status, all that it printed, and the names of our functions.

    A tool is clean only if it said so: no summary, an error of the tool itself, or fewer printed reports than counted
    ones make a run red.
    """
    findings: list[Finding] = []
    lines = output.splitlines()
    for number, line in enumerate(lines):
        match = _FINDING.match(line)
        if match:
            following = "\n".join([line, *lines[number + 1 : number + 3]])
            named = [name for name in _AT.findall(following) if any(ours in name for ours in kernels)] or _AT.findall(
                following
            )
            findings.append(Finding(match[1].strip(), named[0] if named else ""))
    counts = [int(a or b) for a, b in _SUMMARY.findall(output)]
    errors = sum(counts) if counts else None
    elsewhere = [f for f in findings if f.function and not any(name in f.function for name in kernels)]
    ours = len(findings) - len(elsewhere)
    broken = _BROKEN.search(output)
    reason = ""
    if errors is None:
        reason = f"it printed no summary (exit status {status})"
    elif ours:
        reason = f"{ours} reports in our kernels, first: {next(f.text for f in findings if f not in elsewhere)}"
    elif errors > len(findings):
        reason = f"{errors} counted, {len(findings)} printed: the others may lie in our kernels"
    elif broken:
        reason = " ".join(broken[0].strip("= ").split())
    elif status not in (0, ERROR_STATUS) or (status == ERROR_STATUS and not errors):
        reason = f"exit status {status}: the checks failed under it"
    elif "sanitize-target: green" not in output:
        reason = "the checks did not end green under it"
    return Verdict(tool, not reason, errors, findings, len(elsewhere), reason)


def run(sanitizer: str, tool: str, kernels: Sequence[str], seed: int, log: Path | None, root: Path) -> Verdict:
    """Runs one tool to its end."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    line = command(sanitizer, tool, kernels, seed)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(line, cwd=root, env=environment, check=False, **pipes)
    if log is not None:
        log.write_text(done.stdout, encoding="utf-8")
    return parse(tool, done.returncode, done.stdout, kernels)


def check_target(seed: int, plain_memory: bool) -> int:
    """What runs under the tool: the checks of every op at toy size, without whole decodes. Exit status: 0 green, 1
    red."""
    import torch

    import dlm_fast

    from . import gpu_check, report, shapes
    from .checks import attention as check_attention
    from .checks import confidence as check_confidence
    from .checks import layers as check_layers
    from .checks import run as checks
    from .checks import unmask as check_unmask

    if plain_memory:
        for module in (check_attention, check_confidence, check_unmask, check_layers):
            module.poisoned = lambda memory: contextlib.nullcontext()
    dtypes = (torch.bfloat16, torch.float32)
    sizes = dataclasses.replace(checks.TOY, attention_dtypes=dtypes, logits_dtypes=dtypes, every=3)
    device = torch.device("cuda", torch.cuda.current_device())
    wanted = [op for op in gpu_check.CASES if op != "decode"]
    with torch.no_grad():
        done = gpu_check.check_all(dlm_fast.triton_ops(), device, sizes, seed, print, wanted=wanted)
        for op in CHECKED_WHERE_TIMED:
            done[op] = checks.run(op, shape_checks(op, dlm_fast.triton_ops(), device, shapes.TOY_SHAPES), device)
            for line in report.check_lines(op, done[op]):
                print(line)
    green = all(report.is_green(of_op) for of_op in done.values())
    print("sanitize-target: green" if green else "sanitize-target: RED", flush=True)
    return 0 if green else 1


def shape_checks(op: str, ops: Ops, device: torch.device, chosen: Shapes) -> Iterator[Case]:
    """The check that comes with every shape of an op, as cases of their own."""
    from . import gpu_check
    from .speed.run import Bench, Ceilings
    from .timing import Budget

    # Nothing is timed: neither a budget nor a ceiling is asked for.
    bench = Bench(device, lambda candidate: lambda: 0.0, Budget(math.inf, 0), Ceilings(*[math.nan] * 5), 1, 1)
    for shape in gpu_check.TIMINGS[op][0](bench, ops, chosen):
        yield shape.label, lambda shape=shape: shape.build().check()


def document(verdicts: Sequence[Verdict], machine: dict[str, Any], seed: int, schema: int) -> dict[str, Any]:
    tools = {v.tool: {name: value for name, value in dataclasses.asdict(v).items() if name != "tool"} for v in verdicts}
    return {
        "command": "sanitize",
        "schema": schema,
        "ok": all(v.ok for v in verdicts),
        "seed": seed,
        **machine,
        "tools": tools,
    }
