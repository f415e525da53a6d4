"""What is printed, and the JSON document."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from .checks import Check
from .speed import Timing, losses

SCHEMA = 2  # of every result file; `compare` and `gates` read this one only


def check_lines(op: str, checks: Sequence[Check]) -> list[str]:
    """One line for an op, and one for everything in it that is not green."""
    counts = {status: sum(c.status == status for c in checks) for status in ("passed", "FAILED", "skipped")}
    verdict = "green" if is_green(checks) else "RED"
    seconds = sum(c.seconds for c in checks)
    lines = [
        f"{op:16} {verdict:6} {counts['passed']:4} passed {counts['FAILED']:4} FAILED {counts['skipped']:4} skipped {seconds:7.1f} s"
    ]
    lines += [f"    {c.status} {c.name}: {c.detail}" for c in checks if c.status != "passed"]
    return lines


def is_green(checks: Sequence[Check]) -> bool:
    """Nothing failed, and something was checked."""
    return any(c.status == "passed" for c in checks) and not any(c.status == "FAILED" for c in checks)


COLUMNS = (("p50 us", 10), ("p20", 10), ("p80", 10), ("share", 7), ("vs ours", 8))


def timing_header() -> str:
    return " " * 48 + "".join(f"{title:>{width}}" for title, width in COLUMNS)


def timing_lines(rows: Sequence[Timing]) -> list[str]:
    """One shape: a heading, and a line for each candidate."""
    first = rows[0]
    heading = f"{first.op}  {first.model}  {first.shape}"
    if first.floor_us is not None:
        heading += f"  floor {first.floor_us:.4g} us, {first.sets} input sets ({'cold' if first.cold else 'warm'})"
    if first.noise is not None:
        heading += f", noise {first.noise:.1%}"
    if first.note:
        heading += f"  [{first.note}]"
    lines = [heading]
    for row in rows:
        if row.status != "ok":
            lines.append(f"  {row.candidate:46}{row.status}: {row.reason}")
            continue
        cells = (
            f"{row.p50_us:.4g}",
            f"{row.p20_us:.4g}",
            f"{row.p80_us:.4g}",
            f"{row.share:.2f}",
            "-" if row.speedup is None else f"{row.speedup:.2f}x",
        )
        lines.append(f"  {row.candidate:46}" + "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS)))
    return lines


def loss_lines(rows: Sequence[Timing]) -> list[str]:
    """The shapes where a baseline beats us, or a line that says there is none among those measured."""
    lost = losses(rows)
    unmeasured = sum(row.status != "ok" for row in rows)
    lines = [f"{r.op}  {r.model}  {r.shape}: {r.candidate} takes {r.speedup:.2f} of our time" for r in lost] or [
        "none of the measured rows"
    ]
    return [*lines, f"({unmeasured} rows without a time: FAILED or SKIPPED above)"] if unmeasured else lines


def document(
    *,
    command: str,
    machine: dict[str, Any],
    seed: int,
    started: str,
    seconds: float,
    ceilings: dict[str, float] | None,
    checks: dict[str, list[Check]],
    timings: Sequence[Timing],
) -> dict[str, Any]:
    """The whole result of a run on a GPU as plain data; `ok` is what the exit status says: every op that was checked is green."""
    ops = {
        op: {
            "green": is_green(done),
            "seconds": rounded(sum(c.seconds for c in done)),
            "passed": [c.name for c in done if c.status == "passed"],
            "failed": {c.name: c.detail for c in done if c.status == "FAILED"},
            "skipped": {c.name: c.detail for c in done if c.status == "skipped"},
        }
        for op, done in checks.items()
    }
    return {
        "command": command,
        "schema": SCHEMA,
        "measured": True,
        "ok": bool(ops) and all(entry["green"] for entry in ops.values()),
        "time": started,
        "seconds": rounded(seconds),
        "seed": seed,
        **machine,
        "ceilings": None if ceilings is None else {name: rounded(value) for name, value in ceilings.items()},
        "checks": ops,
        "timings": [
            {name: rounded(value) for name, value in dataclasses.asdict(row).items() if value not in (None, "", {})}
            for row in timings
        ],
        "losses": [
            {"op": r.op, "model": r.model, "shape": r.shape, "candidate": r.candidate, "speedup": rounded(r.speedup)}
            for r in losses(timings)
        ],
    }


def rounded(value: Any) -> Any:
    """Five digits of a float: more are noise, and every one is stored."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def dumps(result: dict[str, Any]) -> str:
    """One line of JSON; NaN and infinities would not be JSON and raise."""
    return json.dumps(result, allow_nan=False, separators=(",", ":"))
