"""How a time is taken: CUDA-graph replays over rotating inputs, candidates that take turns, medians with their
spread."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

REPLAYS = 24
# Beyond this many copies of the inputs, an input that is too small to leave the L2 cache is timed in it, and its row
# says "warm".
MAX_SETS = 64


@dataclasses.dataclass(frozen=True)
class Stats:
    """Microseconds a call over `replays` samples."""

    p50: float
    p20: float
    p80: float
    replays: int


def stats(samples: Sequence[float]) -> Stats:
    """Median, 20th and 80th percentile (linear between samples) of at least one sample."""
    if not samples:
        raise ValueError("stats: needs at least one sample, got none")
    ordered = sorted(samples)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Stats(statistics.median(ordered), percentile(0.2), percentile(0.8), len(ordered))


def rotation(bytes_per_set: int, l2_bytes: int) -> tuple[int, bool]:
    """How many sets of inputs to rotate through, and whether together they are at least twice the L2 cache ("cold")."""
    wanted = max(3, math.ceil(2 * l2_bytes / max(1, bytes_per_set)))
    return min(wanted, MAX_SETS), wanted <= MAX_SETS


@dataclasses.dataclass
class Candidate:
    """One implementation of the work of a row.

    Attributes:
        name: "ours" or the baseline's name.
        calls: one closure for each set of inputs; a sample runs all of them once.
        graph: whether the calls are captured into one CUDA graph; False = the host launches them, as it would in use
            (the implementation reads the device).
        before: runs before every sample and is not timed (it restores what the calls change).
        warm: what warms up instead of the calls, for calls that take seconds; they are then not run before a sample.
        compiles: whether the implementation goes through torch.compile, and so draws on the budget for compiling.
    """

    name: str
    calls: list[Callable[[], object]]
    graph: bool = True
    before: Callable[[], object] | None = None
    warm: Callable[[], object] | None = None
    compiles: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a candidate: a time, or the reason why there is no time."""

    status: str  # "ok", "FAILED" or "SKIPPED"
    stats: Stats | None = None
    reason: str = ""


class OutOfTime(Exception):
    """A part of the measurement that the time budget no longer allows."""


class Budget:
    """The seconds that are left for the whole command and, among these, for compiling baselines."""

    def __init__(self, seconds: float, compile_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.deadline = clock() + seconds
        self.compile_left = compile_seconds

    def left(self) -> float:
        return self.deadline - self.clock()

    def need(self, seconds: float, what: str) -> None:
        """Raises OutOfTime unless that many seconds are left."""
        if self.left() < seconds:
            raise OutOfTime(f"time budget: {what} needs about {seconds:.0f} s, {max(0.0, self.left()):.0f} s are left")


def short(error: BaseException) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measure(
    candidates: Sequence[Candidate],
    prepare: Callable[[Candidate], Callable[[], float]],
    budget: Budget,
    replays: int = REPLAYS,
) -> dict[str, Outcome]:
    """Times the candidates in turn (A, B, A, B, ...), so that whatever drifts drifts for all of them.

    Args:
        prepare: warms a candidate up and returns a function that takes one sample, in microseconds a call.
    Returns:
        One outcome for each candidate. A candidate that fails has an outcome that says so, and the others go on.
    """
    outcomes: dict[str, Outcome] = {}
    samplers: dict[str, Callable[[], float]] = {}
    for candidate in candidates:
        if candidate.compiles and budget.compile_left <= 0:
            outcomes[candidate.name] = Outcome("SKIPPED", reason="time budget: nothing is left for compiling baselines")
            continue
        started = budget.clock()
        try:
            samplers[candidate.name] = prepare(candidate)
        except Exception as error:  # a baseline that cannot run here is a finding, not the end of the run
            outcomes[candidate.name] = Outcome("FAILED", reason=short(error))
        if candidate.compiles:
            budget.compile_left -= budget.clock() - started
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(replays):
        for name, sampler in samplers.items():
            if name in outcomes:
                continue
            try:
                samples[name].append(sampler())
            except Exception as error:
                outcomes[name] = Outcome("FAILED", reason=short(error))
    for name in samplers:
        outcomes.setdefault(
            name, Outcome("ok", stats(samples[name])) if samples[name] else Outcome("FAILED", reason="no samples")
        )
    return {candidate.name: outcomes[candidate.name] for candidate in candidates}


class CudaTimer:
    """`prepare` on a GPU: it warms a candidate up, captures its calls, and times replays with device events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, candidate: Candidate) -> Callable[[], float]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2 if candidate.warm is None else 0):
                if candidate.before is not None:
                    candidate.before()
                for call in candidate.calls:
                    call()
            if candidate.warm is not None:
                candidate.warm()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        if candidate.before is not None:
            candidate.before()
            torch.cuda.synchronize(self.device)

        def run_all() -> None:
            for call in candidate.calls:
                call()

        launch = run_all
        if candidate.graph:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run_all()
            launch = graph.replay
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def sample() -> float:
            if candidate.before is not None:
                candidate.before()
            torch.cuda.synchronize(self.device)
            start.record()
            launch()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1000 / len(candidate.calls)

        if candidate.warm is None:
            sample()
        return sample
