"""What a run prints, and its JSON document."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from . import gates
from .checks.run import NOT_RUN, Check
from .speed.run import Timing, losses

NAMED = 16  # checks that were not run, of those with one reason: as many as are at it at once when a run is cut off
SCHEMA = 2  # of every result file; `compare` and `gates` read this one only


def heading_lines(head: dict[str, Any]) -> list[str]:
    """What the run was on; `head` is that of a `Record`."""
    facts = head["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [
        f"{facts['device']}, driver {facts['driver']}, {versions}",
        f"commit {facts['commit']}, seed {head['seed']}, {head['time']}",
    ]


def check_lines(op: str, checks: Sequence[Check]) -> list[str]:
    """One line for an op, one for each of its checks that is red or skipped, and one for those that were not run for
    one reason."""
    counts = {status: sum(c.status == status for c in checks) for status in ("passed", "FAILED", "skipped", NOT_RUN)}
    verdict = "green" if is_green(checks) else "RED"
    seconds = sum(c.seconds for c in checks)
    not_passed = "".join(f" {counts[status]:4} {status}" for status in ("FAILED", "skipped"))
    not_passed += f" {counts[NOT_RUN]:4} {NOT_RUN}" if counts[NOT_RUN] else ""
    lines = [f"{op:16} {verdict:6} {counts['passed']:4} passed{not_passed} {seconds:7.1f} s"]
    lines += [f"    {c.status} {c.name}: {c.detail}" for c in checks if c.status in ("FAILED", "skipped")]
    for reason in dict.fromkeys(c.detail for c in checks if c.status == NOT_RUN):
        names = [c.name for c in checks if (c.status, c.detail) == (NOT_RUN, reason)]
        unnamed = f"; {len(names) - NAMED} more" if names[NAMED:] else ""
        lines.append(f"    {NOT_RUN}, {reason}: {'; '.join(names[:NAMED])}{unnamed}")
    return lines


def is_green(checks: Sequence[Check]) -> bool:
    """Nothing failed, nothing was left out, and something was checked."""
    return any(c.status == "passed" for c in checks) and not any(c.status in ("FAILED", NOT_RUN) for c in checks)


COLUMNS = (("p50 us", 10), ("p20", 10), ("p80", 10), ("share", 7), ("vs ours", 8))


def timing_header() -> str:
    return " " * 48 + "".join(f"{title:>{width}}" for title, width in COLUMNS)


def timing_lines(rows: Sequence[Timing]) -> list[str]:
    """The lines of one shape: a heading, and a line for each candidate."""
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
    """The shapes where a baseline beats us, or a line that says that none was measured."""
    lost = losses(rows)
    unmeasured = sum(row.status != "ok" for row in rows)
    lines = [f"{r.op}  {r.model}  {r.shape}: {r.candidate} takes {r.speedup:.2f} of our time" for r in lost] or [
        "none of the measured rows"
    ]
    return [*lines, f"({unmeasured} rows without a time: FAILED or SKIPPED above)"] if unmeasured else lines


def closing_lines(result: dict[str, Any], rows: Sequence[Timing]) -> list[str]:
    """What the rows come to: where a baseline is faster, and the gates."""
    lines = ["", "where a baseline is faster", *("    " + line for line in loss_lines(rows))]
    return [*lines, "", "gates", *("    " + line for line in gates.lines(gates.evaluate(result)))]


def verdict_line(result: dict[str, Any]) -> str:
    cut = "" if result["ended"] else ", cut off"
    return ("green" if result["ok"] else "RED") + f", {result['seconds']:.0f} s{cut}"


def document(
    *,
    command: str,
    machine: dict[str, Any],
    seed: int,
    started: str,
    seconds: float,
    ended: bool,
    ceilings: dict[str, float] | None,
    checks: dict[str, list[Check]],
    timings: Sequence[Timing],
) -> dict[str, Any]:
    """The whole result of a run on a GPU as plain data. `ok` is what the exit status says: every op that was to be
    checked is green. `ended` says that the run came to its end."""
    ops = {
        op: {
            "green": is_green(done),
            "seconds": rounded(sum(c.seconds for c in done)),
            "passed": [c.name for c in done if c.status == "passed"],
            "failed": {c.name: c.detail for c in done if c.status == "FAILED"},
            "skipped": {c.name: c.detail for c in done if c.status == "skipped"},
            "not_run": {c.name: c.detail for c in done if c.status == NOT_RUN},
        }
        for op, done in checks.items()
    }
    return {
        "command": command,
        "schema": SCHEMA,
        "measured": True,
        "ended": ended,
        "ok": bool(ops) and all(entry["green"] for entry in ops.values()),
        "time": started,
        "seconds": rounded(seconds),
        "seed": seed,
        **machine,
        "ceilings": ceilings,
        "checks": ops,
        "timings": [row(timing) for timing in timings],
        "losses": [
            {"op": r.op, "model": r.model, "shape": r.shape, "candidate": r.candidate, "speedup": rounded(r.speedup)}
            for r in losses(timings)
        ],
    }


def row(timing: Timing) -> dict[str, Any]:
    """The fields of a row, without those that do not apply."""
    return {name: rounded(value) for name, value in dataclasses.asdict(timing).items() if value not in (None, "", {})}


def ceiling_lines(ceilings: Mapping[str, float]) -> list[str]:
    return [f"    {name:20} {value:10.4g}" for name, value in ceilings.items()]


def rounded(value: Any) -> Any:
    """A float with five digits: further digits are noise, and every digit is stored."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def dumps(result: dict[str, Any]) -> str:
    """One line of JSON. NaN and infinities are no JSON, so they raise."""
    return json.dumps(result, allow_nan=False, separators=(",", ":"))
