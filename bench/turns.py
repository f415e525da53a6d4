"""Seconds of whole decodes: user-CPU time on a CPU, events on a GPU; candidates take turns in one process."""

from __future__ import annotations

import dataclasses
import resource
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .timing import Budget, short


def _user_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


class Clock:
    """Takes the seconds of a call on a device.

    On a CPU these are seconds of user time of all threads: other processes of the machine do not count, and neither
    does the system's time, which the allocator spends. On a GPU they are what two events enclose, the host's waits
    included, as a caller would wait.

    The kernel splits a process's time into the user's and the system's by where its ticks of some milliseconds found
    it, so that user time alone says nothing of a call of less: on a CPU a call is made again until `LEAST` seconds
    have passed in all, and a call takes its share of them. Calls must come out the same each time.
    """

    LEAST = 0.02

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def name(self) -> str:
        return "CUDA events" if self.device.type == "cuda" else "user-CPU time"

    def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """The seconds of a call, and what the last one returned."""
        if self.device.type != "cuda":
            before, calls, seconds = _user_seconds(), 0, 0.0
            while seconds < self.LEAST:
                result = call()
                calls, seconds = calls + 1, _user_seconds() - before
            return seconds / calls, result
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000, result


@dataclasses.dataclass
class Samples:
    """What came of a candidate.

    Attributes:
        seconds: one number for each turn.
        status: "ok", "FAILED" or "SKIPPED".
        reason: why there is no time, or why there are fewer turns than asked for.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    status: str = "ok"
    reason: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    clock: Callable[[Callable[[], Any]], tuple[float, Any]],
    budget: Budget,
    turns: int,
    *,
    check: Callable[[str, Any], str | None] = lambda name, result: None,
    hear: Callable[[str, float], None] = lambda name, seconds: None,
) -> dict[str, Samples]:
    """Times the calls in turn (A, B, A, B, ...), so that whatever drifts drifts for all of them.

    A call that raises is FAILED, and so is one whose result `check` finds wrong; the others go on. A call for which no
    time is left is SKIPPED, or keeps the turns that it had.

    Args:
        check: why a result is wrong; None = the result is right.
        hear: is told every sample as it is taken.
    """
    found = {name: Samples() for name in calls}
    walls: dict[str, float] = {}
    for _ in range(turns):
        for name, call in calls.items():
            samples = found[name]
            if samples.status != "ok":
                continue
            if budget.left() < walls.get(name, 0.0) or budget.left() <= 0:
                samples.reason = f"time budget: {len(samples.seconds)} of {turns} turns"
                samples.status = "ok" if samples.seconds else "SKIPPED"
                continue
            began = budget.clock()
            try:
                seconds, result = clock(call)
                wrong = check(name, result)
            except Exception as error:  # a candidate that cannot run here is a finding, not the end of the run
                wrong = short(error)
            walls[name] = budget.clock() - began
            if wrong is not None:
                found[name] = Samples(status="FAILED", reason=wrong)
                continue
            samples.seconds.append(seconds)
            hear(name, seconds)
    return found
