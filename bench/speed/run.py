"""From candidates to rows: every shape that is timed becomes rows, also where something fails or the time is up."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..checks.run import sound
from ..floors import Cost
from ..timing import Budget, Candidate, OutOfTime, measure, rotation, short

OURS, AGAIN = "ours", "ours, again"


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this GPU does at best, measured in the same run.

    Attributes:
        copy_tb_s: device-to-device copy, bytes read plus bytes written.
        gemm_tflop_s: bf16 product of random matrices.
        empty_kernel_us: an empty Triton kernel in a graph of many.
        empty_graph_us: replay of a graph that holds one empty kernel.
        empty_launch_us: an empty Triton kernel launched by the host.
    """

    copy_tb_s: float
    gemm_tflop_s: float
    empty_kernel_us: float
    empty_graph_us: float
    empty_launch_us: float

    def floor_us(self, cost: Cost) -> float:
        """Least time of that work, with every part of it at its ceiling."""
        return cost.floor_us(self.copy_tb_s, self.gemm_tflop_s)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a row times.

    Attributes:
        candidates: "ours" comes first.
        cost: what no implementation can do without.
        sets: how many sets of inputs the calls rotate through.
        cold: whether the sets together exceed the L2 cache.
        note: what a reader must know about the shape.
        check: raises if ours is wrong here, for shapes that the op's checks do not cover.
        replays: samples of each candidate; None = as many as everywhere.
    """

    candidates: list[Candidate]
    cost: Cost
    sets: int
    cold: bool
    note: str = ""
    check: Callable[[], None] | None = None
    replays: int | None = None


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape: how its work is built, and roughly how long building and timing it takes.

    Attributes:
        cost: the cost of the `Work`, known before the work is built.
        facts: the shape as data, for the gates.
        seconds: what building and timing takes.
    """

    op: str
    model: str
    label: str
    build: Callable[[], Work]
    cost: Cost
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 3.0


@dataclasses.dataclass(frozen=True)
class Timing:
    """One row of the report.

    Attributes:
        speedup: this candidate's time over ours; above 1, ours is faster.
        facts: the shape as data.
    """

    op: str
    model: str
    shape: str
    candidate: str
    status: str
    reason: str = ""
    p50_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    replays: int | None = None
    floor_us: float | None = None
    share: float | None = None
    speedup: float | None = None
    noise: float | None = None
    sets: int | None = None
    cold: bool | None = None
    graph: bool | None = None
    nbytes: float | None = None
    flops: float | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


@dataclasses.dataclass
class Bench:
    """Where timings run: the device, how a candidate is prepared, and the time that is left.

    Attributes:
        lost: the shape at which the device stopped to answer; "": the device answers.
    """

    device: torch.device
    prepare: Callable[[Candidate], Callable[[], float]]
    budget: Budget
    ceilings: Ceilings
    l2_bytes: int
    replays: int
    lost: str = ""

    def rotation(self, bytes_per_set: int) -> tuple[int, bool]:
        return rotation(bytes_per_set, self.l2_bytes)


def time_shapes(
    bench: Bench,
    shapes: Iterable[Shape],
    on_rows: Callable[[list[Timing]], None] = lambda rows: None,
    on_begin: Callable[[Shape], None] = lambda shape: None,
) -> list[Timing]:
    """Times every shape. A shape that cannot be built or has no time left is a row too."""
    done: list[Timing] = []
    for shape in shapes:
        on_begin(shape)
        rows = _attempt(bench, shape)
        if any(row.status == "FAILED" for row in rows) and not sound(bench.device):
            bench.lost = f"{shape.op} {shape.model} {shape.label}"
        on_rows(rows)
        done += rows
    if not bench.lost:
        _clean_up(bench)
    return done


def _attempt(bench: Bench, shape: Shape) -> list[Timing]:
    def untimed(status: str, reason: str) -> list[Timing]:
        return [Timing(shape.op, shape.model, shape.label, OURS, status, reason, facts=shape.facts)]

    if bench.lost:
        return untimed("SKIPPED", f"the GPU does not answer this process since {bench.lost}")
    try:
        _clean_up(bench)
        bench.budget.need(shape.seconds, f"{shape.op} {shape.label}")
        return _time(bench, shape)
    except OutOfTime as reason:
        return untimed("SKIPPED", str(reason))
    except Exception as error:  # out of memory while building, or a wrong result
        return untimed("FAILED", short(error))


def _clean_up(bench: Bench) -> None:
    """Frees what the last shape held, and forgets what was compiled: past 8 shapes of one function, torch stops
    compiling that function."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if bench.device.type == "cuda":
        gc.collect()  # a patched model and its handle refer to each other
        torch.cuda.empty_cache()


def _time(bench: Bench, shape: Shape) -> list[Timing]:
    work = shape.build()
    if work.check is not None:
        work.check()
    floor_us = bench.ceilings.floor_us(work.cost)
    # Ours twice, first and last: the difference is what a difference between two candidates must exceed.
    again = dataclasses.replace(work.candidates[0], name=AGAIN)
    outcomes = measure([*work.candidates, again], bench.prepare, bench.budget, work.replays or bench.replays)
    ours, repeated = outcomes[work.candidates[0].name].stats, outcomes.pop(AGAIN).stats
    noise = abs(repeated.p50 / ours.p50 - 1) if ours and repeated else None
    rows = []
    for candidate in work.candidates:
        outcome = outcomes[candidate.name]
        taken = outcome.stats
        measured = {}
        if taken is not None:
            measured = {
                "p50_us": taken.p50,
                "p20_us": taken.p20,
                "p80_us": taken.p80,
                "replays": taken.replays,
                "share": floor_us / taken.p50,
                "speedup": taken.p50 / ours.p50 if ours else None,
            }
        rows.append(
            Timing(
                shape.op,
                shape.model,
                shape.label,
                candidate.name,
                outcome.status,
                outcome.reason,
                floor_us=floor_us,
                noise=noise,
                sets=work.sets,
                cold=work.cold,
                graph=candidate.graph,
                nbytes=work.cost.nbytes,
                flops=work.cost.flops,
                facts=shape.facts,
                note=work.note,
                **measured,
            )
        )
    return rows


def losses(rows: Iterable[Timing]) -> list[Timing]:
    """The rows in which a baseline is faster than ours by more than the noise."""
    return [
        r
        for r in rows
        if r.speedup is not None
        and r.candidate != OURS
        and not r.candidate.startswith("ours")
        and r.speedup < 1 - (r.noise or 0)
    ]
