"""`gpu-check`, and `kernels` on a GPU: ceilings, then correctness, then the times of what is correct."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Callable, Collection, Sequence
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
    gates,
    machine,
    report,
    speed_attention,
    speed_forms,
    speed_linear,
    speed_ops,
    speed_step,
)
from .checks import GPU, OPS, Check, Sizes, compile_side_by_side, run
from .shapes import CHECK_SHAPES, Shapes
from .speed import OURS, Bench, Ceilings, Timing, time_shapes
from .timing import REPLAYS, Budget, Candidate, CudaTimer, short

# Cheap and basic first.
CASES = {"confidence": check_confidence, "unmask": check_unmask, "block_attention": check_attention, "decode": check_decode}
# What is timed: its shapes, and the ops whose checks must be green for that. What a gate is about comes first: time may run out. The
# forms of attention and linear_confidence are also checked at every shape, by `Work.check`.
TIMINGS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "attention-decode": (speed_attention.decode_shapes, ("block_attention",)),
    "attention-ragged": (speed_attention.ragged_shapes, ("block_attention",)),
    "attention-prefill": (speed_attention.prefill_shapes, ("block_attention",)),
    "confidence": (speed_ops.confidence_shapes, ("confidence",)),
    "unmask": (speed_ops.unmask_shapes, ("unmask",)),
    "step": (speed_step.shapes, OPS),
    "linear-confidence": (speed_linear.shapes, ("confidence",)),
    "attention-forms": (speed_forms.shapes, ("block_attention",)),
}
COMPILE_SECONDS = 100.0


def needed_checks(timings: Collection[str]) -> tuple[str, ...]:
    """The ops that have to be green before these are timed."""
    return tuple(op for op in OPS if any(op in TIMINGS[name][1] for name in timings))


def check_all(
    ops: Ops,
    device: torch.device,
    sizes: Sizes,
    seed: int,
    say: Callable[[str], None],
    compile_threads: int = 0,
    wanted: Collection[str] = OPS,
) -> dict[str, list[Check]]:
    """Every check of the wanted ops; the same code for a GPU and for the interpreter, at other sizes."""
    done = {}
    for op, module in CASES.items():
        if op not in wanted:
            continue
        every = 1 if op == "decode" else sizes.every
        cases = [case for n, case in enumerate(module.cases(ops, device, sizes, seed)) if n % every == 0]
        if compile_threads and op != "decode":
            compile_side_by_side(cases, compile_threads)
        done[op] = run(op, cases, device)
        for line in report.check_lines(op, done[op]):
            say(line)
    return done


def time_all(
    bench: Bench,
    ops: Ops,
    shapes: Shapes,
    checks: dict[str, list[Check]],
    say: Callable[[str], None],
    wanted: Collection[str] = tuple(TIMINGS),
) -> list[Timing]:
    """Times what is correct; what is not gets a row that says so."""
    rows: list[Timing] = []

    def show(shape_rows: list[Timing]) -> None:
        for line in report.timing_lines(shape_rows):
            say(line)

    for op, (shapes_of, needed) in TIMINGS.items():
        if op not in wanted:
            continue
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


def cuda_rig(compile_threads: int, shapes: Shapes = CHECK_SHAPES, compile_seconds: float = COMPILE_SECONDS) -> Rig:
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
        shapes=shapes,
        l2_bytes=facts["l2_bytes"],
        replays=REPLAYS,
        compile_threads=compile_threads,
        compile_seconds=compile_seconds,
    )


def gpu_check(
    rig: Rig,
    out: Path | None,
    seed: int | None,
    seconds: float,
    command: str = "gpu-check",
    wanted: Sequence[str] = tuple(TIMINGS),
    finish: Callable[[dict[str, Any]], None] = lambda result: None,
) -> int:
    """Prints everything and returns the exit status: 0 green, 1 red.

    Args:
        out: folder for `command`.json; None = print only. wanted: names of TIMINGS; only the ops that they need are checked.
        finish: called with the document before it is printed (plots).
    """
    began, started = time.monotonic(), datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    budget = Budget(seconds, rig.compile_seconds)

    def say(line: str) -> None:
        print(line, flush=True)

    facts = rig.facts
    needed = OPS if command == "gpu-check" else needed_checks(wanted)
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
        checks = {op: [Check(op, "import", "FAILED", short(error), 0.0)] for op in needed}
        say(f"the kernels cannot be imported: {short(error)}")
    else:
        with torch.no_grad():
            checks = check_all(ops, rig.device, rig.sizes, seed, say, rig.compile_threads, needed)
            say(f"\ntimes ({time.monotonic() - began:.0f} s so far)")
            if ceilings is None:
                say("    none: without measured ceilings no time means anything")
            else:
                say(report.timing_header())
                bench = Bench(rig.device, rig.prepare, budget, ceilings, rig.l2_bytes, rig.replays)
                timings = time_all(bench, ops, rig.shapes, checks, say, wanted)
    say("\nwhere a baseline is faster")
    for line in report.loss_lines(timings):
        say("    " + line)

    result = report.document(
        command=command,
        machine=facts,
        seed=seed,
        started=started,
        seconds=time.monotonic() - began,
        ceilings=ceilings and dataclasses.asdict(ceilings),
        checks=checks,
        timings=timings,
    )
    say("\ngates")
    for line in gates.lines(gates.evaluate(result)):
        say("    " + line)
    line = report.dumps(result)
    if out is not None:
        (out / f"{command}.json").write_text(line + "\n", encoding="utf-8")
    finish(result)
    say("\n" + ("green" if result["ok"] else "RED") + f", {result['seconds']:.0f} s")
    say(line)
    return 0 if result["ok"] else 1
