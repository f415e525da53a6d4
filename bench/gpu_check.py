"""`gpu-check`: ceilings, then correctness, then the times of what is correct."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path

import dlm_fast  # first: in a checkout it puts the dlm_kernels that lies beside it in place
import torch
from dlm_fast import Ops

from . import check_attention, check_confidence, check_decode, check_unmask, machine, report, speed_attention, speed_ops, speed_step
from .checks import GPU, OPS, Check, Sizes, compile_side_by_side, run
from .shapes import GPU_SHAPES, Shapes
from .speed import OURS, Bench, Timing, time_shapes
from .timing import REPLAYS, Budget, CudaTimer, short

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


def gpu_check(out: Path, seed: int | None, seconds: float, compile_threads: int) -> int:
    """Runs everything on the current CUDA device. Returns the exit status: 0 green, 1 red."""
    began, started = time.monotonic(), datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    device = torch.device("cuda", torch.cuda.current_device())
    budget = Budget(seconds, COMPILE_SECONDS)
    facts = machine.device_facts(device) | {"versions": machine.versions(), "commit": machine.commit()}

    def say(line: str) -> None:
        print(line, flush=True)

    say(f"{facts['device']}, driver {facts['driver']}, " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()))
    say(f"commit {facts['commit']}, seed {seed}, {started}")

    ceilings = None
    say("\nceilings, measured now")
    try:
        from .ceilings import measure_ceilings  # imports Triton

        ceilings = measure_ceilings(device)
        for name, value in dataclasses.asdict(ceilings).items():
            say(f"    {name:20} {value:10.4g}")
    except Exception as error:  # correctness can be checked all the same
        say(f"    FAILED: {short(error)}")

    say("\ncorrectness")
    timings: list[Timing] = []
    try:
        ops = dlm_fast.triton_ops()
    except Exception as error:
        checks = {op: [Check(op, "import", "FAILED", short(error), 0.0)] for op in OPS}
        say(f"the kernels cannot be imported: {short(error)}")
    else:
        with torch.no_grad():
            checks = check_all(ops, device, GPU, seed, say, compile_threads)
            say(f"\ntimes ({time.monotonic() - began:.0f} s so far)")
            if ceilings is None:
                say("    none: without measured ceilings no time means anything")
            else:
                say(report.timing_header())
                bench = Bench(device, CudaTimer(device), budget, ceilings, facts["l2_bytes"], REPLAYS)
                timings = time_all(bench, ops, GPU_SHAPES, checks, say)
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
    say("\n" + ("green" if result["ok"] else "RED: no number above may be quoted") + f", {result['seconds']:.0f} s")
    line = report.dumps(result)
    (out / "gpu-check.json").write_text(line + "\n", encoding="utf-8")
    say(line)
    return 0 if result["ok"] else 1
