"""`gpu-check`: ceilings, then correctness, then the times of what is correct."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dlm_fast  # first: in a checkout it puts the dlm_kernels that lies beside it in place
import torch
from dlm_fast import Ops

from . import (
    check_attention,
    check_confidence,
    check_decode,
    check_unmask,
    machine,
    report,
    speed_attention,
    speed_ops,
    speed_step,
)
from .checks import GPU, OPS, Check, Sizes, compile_side_by_side, run
from .shapes import GPU_SHAPES, Shapes
from .speed import OURS, Bench, Ceilings, Timing, time_shapes
from .timing import REPLAYS, Budget, Candidate, CudaTimer, short

# Cheap and basic first. What is timed needs the checks of these ops.
CASES = {"confidence": check_confidence, "unmask": check_unmask, "block_attention": check_attention, "decode": check_decode}
TIMINGS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "block_attention": (speed_attention.shapes, ("block_attention",)),
    "confidence": (speed_ops.confidence_shapes, ("confidence",)),
    "unmask": (speed_ops.unmask_shapes, ("unmask",)),
    "step": (speed_step.shapes, OPS),
}
COMPILE_SECONDS = 100.0


def check_all(
    ops: Ops, device: torch.device, sizes: Sizes, seed: int, say: Callable[[str], None], compile_threads: int = 0
) -> dict[str, list[Check]]:
    """Every check of every op; the same code for a GPU and for the interpreter, at other sizes."""
    done = {}
    for op, module in CASES.items():
        every = 1 if op == "decode" else sizes.every
        cases = [case for n, case in enumerate(module.cases(ops, device, sizes, seed)) if n % every == 0]
        if compile_threads and op != "decode":
            compile_side_by_side(cases, compile_threads)
        done[op] = run(op, cases, device)
        for line in report.check_lines(op, done[op]):
            say(line)
    return done


def time_all(bench: Bench, ops: Ops, shapes: Shapes, checks: dict[str, list[Check]], say: Callable[[str], None]) -> list[Timing]:
    """Times what is correct; what is not gets a row that says so."""
    rows: list[Timing] = []

    def show(shape_rows: list[Timing]) -> None:
        for line in report.timing_lines(shape_rows):
            say(line)

    for op, (shapes_of, needed) in TIMINGS.items():
        red = [name for name in needed if not report.is_green(checks.get(name, []))]
        if red:
            skipped = [Timing(op, "any", "any", OURS, "SKIPPED", f"correctness of {', '.join(red)} is red")]
            show(skipped)
            rows += skipped
            continue
        rows += time_shapes(bench, shapes_of(bench, ops, shapes), show)
    return rows


@dataclasses.dataclass(frozen=True)
class Rig:
    """What a run runs on. `cuda_rig` is the real one; a test may build a small one on the CPU.

    Attributes:
        facts: device, driver, versions and commit, for the report. ops: makes the ops (it may raise).
        ceilings: measures them (it may raise). prepare: takes samples of a candidate.
        compile_threads: compile kernels ahead of their checks; 0 = none do. compile_seconds: for the baselines in all.
    """

    device: torch.device
    facts: dict[str, Any]
    ops: Callable[[], Ops]
    ceilings: Callable[[], Ceilings]
    prepare: Callable[[Candidate], Callable[[], float]]
    sizes: Sizes
    shapes: Shapes
    l2_bytes: int
    replays: int
    compile_threads: int
    compile_seconds: float


def cuda_rig(compile_threads: int) -> Rig:
    """The current CUDA device, the Triton kernels, and the sizes of published models."""
    device = torch.device("cuda", torch.cuda.current_device())
    facts = machine.device_facts(device) | {"versions": machine.versions(), "commit": machine.commit()}

    def ceilings() -> Ceilings:
        from .ceilings import measure_ceilings  # imports Triton

        return measure_ceilings(device)

    return Rig(
        device=device,
        facts=facts,
        ops=dlm_fast.triton_ops,
        ceilings=ceilings,
        prepare=CudaTimer(device),
        sizes=GPU,
        shapes=GPU_SHAPES,
        l2_bytes=facts["l2_bytes"],
        replays=REPLAYS,
        compile_threads=compile_threads,
        compile_seconds=COMPILE_SECONDS,
    )


def gpu_check(rig: Rig, out: Path, seed: int | None, seconds: float) -> int:
    """Prints everything, writes `out`/gpu-check.json, and returns the exit status: 0 green, 1 red."""
    began, started = time.monotonic(), datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    budget = Budget(seconds, rig.compile_seconds)

    def say(line: str) -> None:
        print(line, flush=True)

    facts = rig.facts
    say(f"{facts['device']}, driver {facts['driver']}, " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()))
    say(f"commit {facts['commit']}, seed {seed}, {started}")

    ceilings = None
    say("\nceilings, measured now")
    try:
        ceilings = rig.ceilings()
        for name, value in dataclasses.asdict(ceilings).items():
            say(f"    {name:20} {value:10.4g}")
    except Exception as error:  # correctness can be checked all the same
        say(f"    FAILED: {short(error)}")

    say("\ncorrectness")
    timings: list[Timing] = []
    try:
        ops = rig.ops()
    except Exception as error:  # a kernel module that does not even import is as red as one that computes nonsense
        checks = {op: [Check(op, "import", "FAILED", short(error), 0.0)] for op in OPS}
        say(f"the kernels cannot be imported: {short(error)}")
    else:
        with torch.no_grad():
            checks = check_all(ops, rig.device, rig.sizes, seed, say, rig.compile_threads)
            say(f"\ntimes ({time.monotonic() - began:.0f} s so far)")
            if ceilings is None:
                say("    none: without measured ceilings no time means anything")
            else:
                say(report.timing_header())
                bench = Bench(rig.device, rig.prepare, budget, ceilings, rig.l2_bytes, rig.replays)
                timings = time_all(bench, ops, rig.shapes, checks, say)
    say("\nwhere a baseline is faster")
    for line in report.loss_lines(timings):
        say("    " + line)

    result = report.document(
        machine=facts,
        seed=seed,
        started=started,
        seconds=time.monotonic() - began,
        ceilings=ceilings and dataclasses.asdict(ceilings),
        checks=checks,
        timings=timings,
    )
    say("\n" + ("green" if result["ok"] else "RED") + f", {result['seconds']:.0f} s")
    line = report.dumps(result)
    (out / "gpu-check.json").write_text(line + "\n", encoding="utf-8")
    say(line)
    return 0 if result["ok"] else 1
