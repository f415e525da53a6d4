"""What a run has found so far, in memory and line by line in a file, so that a run that is cut off loses nothing.

A line is a JSON object; its `line` says what it is, and its `at` how many seconds after the start it was written:

    run              command, schema, time, seed, machine
    ceilings         values
    checks planned   op, names                          timings planned  shapes ([op, model, shape] each)
    check begins     op, name                           timing begins    op, model, shape
    check            a `Check`                          timing           a `Timing`
    end
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import report
from .checks.run import NOT_RUN, Check
from .speed.run import OURS, Ceilings, Timing

Shape = tuple[str, str, str]  # op, model, label


class LineError(ValueError):
    """A file that does not hold the lines of a run; the message says which line is wrong."""


class Record:
    """Everything that a run has found. A run starts with an empty one; `read` makes one from a run's file.

    Attributes:
        head: what the line `run` says.
        checks, timings: in the order in which they came.
        seconds: when the last line was written, after the start.
        ended: whether the run came to its end.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`path` is the file, which is replaced; None = in memory only."""
        self.head: dict[str, Any] = {}
        self.ceilings: dict[str, float] | None = None
        self.checks: list[Check] = []
        self.timings: list[Timing] = []
        self.seconds = 0.0
        self.ended = False
        self._planned: dict[str, list[str]] = {}
        self._shapes: list[Shape] = []
        self._begun: set[tuple[str, ...]] = set()
        self._clock, self._start = clock, clock()
        # Buffered by line: a line that is written is in the hands of the system, whatever becomes of this process.
        self._file = None if path is None else open(path, "w", encoding="utf-8", buffering=1)

    def begin(self, command: str, started: str, seed: int, machine: dict[str, Any]) -> None:
        self._say("run", command=command, schema=report.SCHEMA, time=started, seed=seed, machine=machine)

    def measured(self, ceilings: Ceilings) -> None:
        values = {name: report.rounded(value) for name, value in dataclasses.asdict(ceilings).items()}
        self._say("ceilings", values=values)

    def plan_checks(self, op: str, names: Iterable[str]) -> None:
        """Names the checks of an op before the first of them begins. A check without a result in the file was then not
        run."""
        self._say("checks planned", op=op, names=list(names))

    def plan_timings(self, shapes: Iterable[Shape]) -> None:
        self._say("timings planned", shapes=[list(shape) for shape in shapes])

    def begin_check(self, op: str, name: str) -> None:
        self._say("check begins", op=op, name=name)

    def check(self, check: Check) -> None:
        self._say("check", **dataclasses.asdict(check))

    def begin_timing(self, op: str, model: str, shape: str) -> None:
        self._say("timing begins", op=op, model=model, shape=shape)

    def timing(self, row: Timing) -> None:
        self._say("timing", **report.row(row))

    def end(self) -> None:
        self._say("end")
        if self._file is not None:
            self._file.close()

    def _say(self, line: str, **values: Any) -> None:
        message = {"line": line, "at": round(self._clock() - self._start, 2), **values}
        if self._file is not None:
            self._file.write(report.dumps(message) + "\n")
        self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        """Takes in a line, whether the line was just written or is read from a file."""
        values = dict(message)
        line, self.seconds = values.pop("line"), values.pop("at")
        if line == "run":
            self.head = values
        elif line == "ceilings":
            self.ceilings = values["values"]
        elif line == "checks planned":
            self._planned[values["op"]] = values["names"]
        elif line == "timings planned":
            self._shapes = [tuple(shape) for shape in values["shapes"]]
        elif line == "check":
            self.checks.append(Check(**values))
        elif line == "timing":
            self.timings.append(Timing(**values))
        elif line == "end":
            self.ended = True
        elif line in ("check begins", "timing begins"):
            self._begun.add(tuple(values.values()))
        else:
            raise ValueError(line)

    def of_ops(self) -> dict[str, list[Check]]:
        """The checks by op, in the order planned; a check without a result says whether it had begun."""
        done = {(check.op, check.name): check for check in self.checks}
        found = {}
        for op, names in self._planned.items():
            missing = {name: "began, and never ended" if (op, name) in self._begun else "never began" for name in names}
            found[op] = [done.get((op, name)) or Check(op, name, NOT_RUN, missing[name], 0.0) for name in names]
        return found

    def rows(self) -> list[Timing]:
        """The rows of times; a run that was cut off also has a row for every shape that it did not come to."""
        if self.ended:
            return self.timings
        done = {(row.op, row.model, row.shape) for row in self.timings}
        red = {row.op for row in self.timings if row.shape == "any"}  # one row for all of its shapes
        cut = [shape for shape in self._shapes if shape not in done and shape[0] not in red]
        reasons = {
            shape: "began, and the run was cut off" if shape in self._begun else "the run was cut off" for shape in cut
        }
        return [*self.timings, *(Timing(*shape, OURS, "SKIPPED", reason) for shape, reason in reasons.items())]

    def lines(self) -> list[str]:
        """The run as text, as the run printed itself, but without the checks that passed."""
        lines = [*report.heading_lines(self.head), "", "ceilings"]
        lines += report.ceiling_lines(self.ceilings or {}) or ["    not measured"]
        lines += [
            "",
            "correctness",
            *(line for op, done in self.of_ops().items() for line in report.check_lines(op, done)),
        ]
        lines += ["", "times", report.timing_header()]
        rows = self.rows()
        for shape in dict.fromkeys((row.op, row.model, row.shape) for row in rows):
            lines += report.timing_lines([row for row in rows if (row.op, row.model, row.shape) == shape])
        return [*lines, *report.closing_lines(self.document(), rows)]

    def document(self) -> dict[str, Any]:
        """The result as one JSON document, whether the run came to its end or not."""
        return report.document(
            command=self.head["command"],
            machine=self.head["machine"],
            seed=self.head["seed"],
            started=self.head["time"],
            seconds=self.seconds,
            ended=self.ended,
            ceilings=self.ceilings,
            checks=self.of_ops(),
            timings=self.rows(),
        )


def read(path: Path) -> Record:
    """The record of a file. A last line that was cut off is left out. Raises OSError and LineError."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split(
        "\n"
    )  # behind the last newline: nothing, or what was cut off
    record = Record()
    for number, text in enumerate(lines, 1):
        try:
            record._hear(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LineError(f"line {number} must be one of a run's, got {text[:100]!r}") from None
    if not record.head:
        raise LineError("must hold the lines of a run, got none that begins one")
    return record
