"""`gpu-check`, and `kernels` on a GPU: ceilings, then correctness, then the times of what is correct."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dlm_fast  # first: in a checkout it puts the dlm_kernels that lies beside it in place
from dlm_fast import Ops

from . import machine, report, shards
from .checks import attention as check_attention
from .checks import confidence as check_confidence
from .checks import decode as check_decode
from .checks import layers as check_layers
from .checks import unmask as check_unmask
from .checks.run import GPU, NOT_RUN, OPS, Case, Check, Sizes, run, sound
from .record import Record
from .shapes import CHECK_SHAPES, Shapes
from .speed import attention as speed_attention
from .speed import forms as speed_forms
from .speed import layers as speed_layers
from .speed import ops as speed_ops
from .speed import slots as speed_slots
from .speed import step as speed_step
from .speed import unmask_forms as speed_unmask_forms
from .speed.run import OURS, Bench, Ceilings, Shape, Timing, time_shapes
from .timing import REPLAYS, Budget, Candidate, CudaTimer, short

# The ops in the order in which they are checked: the cheap and basic ones come first.
CASES = {
    "confidence": check_confidence,
    "unmask": check_unmask,
    "layers": check_layers,
    "block_attention": check_attention,
    "decode": check_decode,
}
# What is timed: its shapes, and the ops whose checks must be green before. What a gate is about comes first, because
# time may run out. The forms of attention and of `unmask` are also checked at every shape, by `Work.check`.
TIMINGS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "attention-decode": (speed_attention.decode_shapes, ("block_attention",)),
    "attention-ragged": (speed_attention.ragged_shapes, ("block_attention",)),
    "attention-prefill": (speed_attention.prefill_shapes, ("block_attention",)),
    "confidence": (speed_ops.confidence_shapes, ("confidence",)),
    "unmask": (speed_ops.unmask_shapes, ("unmask",)),
    "unmask-forms": (speed_unmask_forms.shapes, ("unmask",)),
    "layers": (speed_layers.shapes, ("layers",)),
    "step": (speed_step.shapes, OPS),
    "attention-forms": (speed_forms.shapes, ("block_attention",)),
    "slots": (speed_slots.shapes, OPS),
}
COMPILE_SECONDS = 100.0
CASE_SECONDS = 120.0
CasesOf = Callable[[Ops, torch.device, Sizes, int, Collection[str]], list[tuple[str, Case]]]


def needed_checks(timings: Collection[str]) -> tuple[str, ...]:
    """The ops that have to be green before these timings are taken."""
    return tuple(op for op in OPS if any(op in TIMINGS[name][1] for name in timings))


def cases_of(
    ops: Ops, device: torch.device, sizes: Sizes, seed: int, wanted: Collection[str] = OPS
) -> list[tuple[str, Case]]:
    """Every case of the wanted ops, with its op. A GPU and the interpreter run the same cases, at other sizes.

    A name stands once in an op: two cases of one name draw the same random numbers, so they are the same case.
    """
    found: dict[tuple[str, str], tuple[str, Case]] = {}
    for op, module in CASES.items():
        every = 1 if op == "decode" else sizes.every
        for n, case in enumerate(module.cases(ops, device, sizes, seed) if op in wanted else ()):
            if n % every == 0:
                found.setdefault((op, case[0]), (op, case))
    return list(found.values())


def check_all(
    ops: Ops,
    device: torch.device,
    sizes: Sizes,
    seed: int,
    say: Callable[[str], None],
    wanted: Collection[str] = OPS,
) -> dict[str, list[Check]]:
    """Every check of the wanted ops, one after the other in this process."""
    cases, done = cases_of(ops, device, sizes, seed, wanted), {}
    for op in dict.fromkeys(op for op, _ in cases):
        done[op] = run(op, [case for of, case in cases if of == op], device)
        for line in report.check_lines(op, done[op]):
            say(line)
    return done


@dataclasses.dataclass(frozen=True)
class Rig:
    """What a run runs on. `cuda_rig` is the real one; a test may build a small one on the CPU.

    Attributes:
        facts: device, driver, versions and commit, for the report.
        ops: makes the ops (this may raise).
        ceilings: measures the ceilings (this may raise).
        prepare: takes samples of a candidate.
        processes: how many processes run the checks side by side; `ops` and `cases` are pickled for them. 0 = this
            process alone.
        compile_seconds: what compiling the baselines may take in all.
        case_seconds: a check that takes longer costs its process.
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
    processes: int
    compile_seconds: float
    case_seconds: float = CASE_SECONDS
    cases: CasesOf = cases_of


def cuda_rig(
    processes: int,
    shapes: Shapes = CHECK_SHAPES,
    compile_seconds: float = COMPILE_SECONDS,
    case_seconds: float = CASE_SECONDS,
    commit: str | None = None,
    facts: dict[str, Any] | None = None,
) -> Rig:
    """The current CUDA device, the Triton kernels, and the sizes of published models.

    Args:
        commit: the checkout's commit, for a checkout in which git does not know the commit.
        facts: more facts of the run.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    known = machine.commit()
    facts = machine.device_facts(device) | {"versions": machine.versions()} | (facts or {})
    facts["commit"] = commit if known == machine.UNKNOWN and commit else known

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
        processes=processes,
        compile_seconds=compile_seconds,
        case_seconds=case_seconds,
    )


def check_side_by_side(
    rig: Rig, ops: Ops, seed: int, wanted: Collection[str], record: Record, say: Callable[[str], None]
) -> None:
    """Runs every check of the wanted ops in the rig's processes; prints a line as each check begins, and one as it
    ends."""
    cases = rig.cases(ops, rig.device, rig.sizes, seed, wanted)
    jobs = [shards.Job(op, name) for op, (name, _) in cases]
    for op in dict.fromkeys(job.group for job in jobs):
        record.plan_checks(op, [job.name for job in jobs if job.group == op])
    make = partial(_in_a_process if rig.processes else _runner, rig.cases, rig.ops, rig.device, rig.sizes, seed, wanted)
    for event in shards.run(jobs, make, processes=rig.processes, job_seconds=rig.case_seconds):
        op, name = jobs[event.index].group, jobs[event.index].name
        if event.kind == "begun":
            record.begin_check(op, name)
            say(f"begins  {op}  {name}")
            continue
        status = NOT_RUN if event.kind == "not run" else "FAILED"
        check = event.result if event.kind == "ended" else Check(op, name, status, event.reason, event.seconds)
        record.check(check)
        say(f"{check.status:8}{op}  {name}  {check.seconds:.1f} s" + (f": {check.detail}" if check.detail else ""))
    say("")
    for op, done in record.of_ops().items():
        for line in report.check_lines(op, done):
            say(line)


def _runner(
    cases: CasesOf, make_ops: Callable[[], Ops], device: torch.device, sizes: Sizes, seed: int, wanted: Collection[str]
) -> shards.Work:
    """What runs a case by its place among all cases, and says whether the process can run another case."""
    known = cases(make_ops(), device, sizes, seed, wanted)

    def work(index: int) -> tuple[Check, bool]:
        op, case = known[index]
        with torch.no_grad():
            (check,) = run(op, [case], device)
        if check.status == "FAILED" and not sound(device):
            return dataclasses.replace(
                check, detail=f"{check.detail} (the GPU did not answer its process after that)"
            ), False
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the processes share the memory
        return check, True

    return work


def _in_a_process(cases: CasesOf, make_ops: Callable[[], Ops], device: torch.device, *arguments: Any) -> shards.Work:
    """`_runner` for one process of many."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return _runner(cases, make_ops, device, *arguments)


def time_all(
    bench: Bench, ops: Ops, shapes: Shapes, wanted: Sequence[str], record: Record, say: Callable[[str], None]
) -> None:
    """Times what is correct, in the order wanted, and prints a line as each row is measured. What is not correct gets a
    row that says so."""
    checks = record.of_ops()
    record.plan_timings(
        (shape.op, shape.model, shape.label) for op in wanted for shape in TIMINGS[op][0](None, None, shapes)
    )

    def show(rows: list[Timing]) -> None:
        for row in rows:
            record.timing(row)
        for line in report.timing_lines(rows):
            say(line)

    def begin(shape: Shape) -> None:
        record.begin_timing(shape.op, shape.model, shape.label)

    for op in wanted:
        shapes_of, needed = TIMINGS[op]
        red = [name for name in needed if not report.is_green(checks.get(name, []))]
        if red:
            show([Timing(op, "any", "any", OURS, "SKIPPED", f"correctness of {', '.join(red)} is red")])
        else:
            time_shapes(bench, shapes_of(bench, ops, shapes), show, begin)


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
        out: folder for `command`.jsonl, which is written line by line, and for `command`.json at the end; None =
            nothing is written.
        wanted: names of TIMINGS in the order in which they are timed. "gpu-check" checks every op whatever is timed;
            another command checks the ops that these timings need.
        finish: called with the document before the document is printed (plots).
    """
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    budget = Budget(seconds, rig.compile_seconds)

    def say(line: str) -> None:
        print(line, flush=True)

    facts = rig.facts
    needed = OPS if command == "gpu-check" else needed_checks(wanted)
    record = Record(None if out is None else out / f"{command}.jsonl")
    record.begin(command, started, seed, facts)
    for line in report.heading_lines(record.head):
        say(line)

    ceilings = None
    say("\nceilings, measured now")
    try:
        ceilings = rig.ceilings()
        record.measured(ceilings)
        for line in report.ceiling_lines(dataclasses.asdict(ceilings)):
            say(line)
    except Exception as error:  # without ceilings, correctness can be checked all the same
        say(f"    FAILED: {short(error)}")

    say("\ncorrectness")
    try:
        ops = rig.ops()
    except Exception as error:  # a kernel module that does not even import is as red as one that computes nonsense
        for op in needed:
            record.plan_checks(op, ["import"])
            record.check(Check(op, "import", "FAILED", short(error), 0.0))
        say(f"the kernels cannot be imported: {short(error)}")
    else:
        check_side_by_side(rig, ops, seed, needed, record, say)
        say(f"\ntimes ({record.seconds:.0f} s so far)")
        if ceilings is None:
            say("    none: without measured ceilings no time means anything")
        else:
            say(report.timing_header())
            bench = Bench(rig.device, rig.prepare, budget, ceilings, rig.l2_bytes, rig.replays)
            with torch.no_grad():
                time_all(bench, ops, rig.shapes, wanted, record, say)
    record.end()
    result = record.document()
    for line in report.closing_lines(result, record.rows()):
        say(line)
    line = report.dumps(result)
    if out is not None:
        (out / f"{command}.json").write_text(line + "\n", encoding="utf-8")
    finish(result)
    say("\n" + report.verdict_line(result))
    say(line)
    return 0 if result["ok"] else 1
