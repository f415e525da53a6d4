"""`python -m bench compare A.json B.json`: what got slower and what got faster between two result files of one kind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from . import record
from .report import SCHEMA

COMMANDS = ("kernels", "gpu-check")
SAME_MACHINE = ("device", "capability", "driver", "versions")
Key = tuple[str, str, str, str]


class ResultError(ValueError):
    """A file that is no result, or two files that cannot be compared; the message says which rule is broken and what
    was found."""


def load(path: Path) -> dict[str, Any]:
    """A result file of `kernels` or `gpu-check`: the document, or the lines (.jsonl) of a run that may have been cut
    off.

    Raises:
        ResultError: the file is no such result.
    """
    try:
        is_lines = path.suffix == ".jsonl"
        document = record.read(path).document() if is_lines else json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror or error}") from None
    except record.LineError as error:
        raise ResultError(f"{path}: {error}") from None
    except ValueError:
        raise ResultError(f"{path}: must be JSON") from None
    if not isinstance(document, dict) or document.get("command") not in COMMANDS:
        found = document.get("command") if isinstance(document, dict) else type(document).__name__
        raise ResultError(f"{path}: command must be one of {', '.join(COMMANDS)}, got {found!r}")
    if document.get("schema") != SCHEMA:
        raise ResultError(f"{path}: schema must be {SCHEMA}, got {document.get('schema')!r}")
    return document


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row that both files have a time for.

    Attributes:
        ratio: B's time over A's; above 1, B is slower.
        noise: what both files say of the row's noise, added up, as a share of its time.
    """

    key: Key
    a_us: float
    b_us: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.b_us / self.a_us

    def verdict(self, tolerance: float) -> str:
        allowed = tolerance + self.noise
        return "slower" if self.ratio > 1 + allowed else "faster" if self.ratio < 1 / (1 + allowed) else "same"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two files say of each other.

    Attributes:
        differences: facts of the machine that differ, "name: A, B".
        pairs: rows with a time in both files.
        only: rows of one file alone, with the letter of that file.
        lost: rows that had a time in A and FAILED in B, with the reason.
        untimed: the other rows without a time in one file or in both.
    """

    differences: list[str]
    pairs: list[Pair]
    only: list[tuple[str, Key]]
    lost: list[tuple[Key, str]]
    untimed: list[Key]


def compare(a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    """Compares row by row. Raises ResultError for files of different commands, and for a file in which nothing was
    measured."""
    if a["command"] != b["command"]:
        raise ResultError(f"both files must be of one command, got A: {a['command']}, B: {b['command']}")
    for letter, document in (("A", a), ("B", b)):
        if not document.get("measured"):
            raise ResultError(f"{letter} must hold measured times; it was made without a GPU and holds computed floors")
    differences = [f"{name}: {a.get(name)}, {b.get(name)}" for name in SAME_MACHINE if a.get(name) != b.get(name)]
    rows_a, rows_b = _rows(a), _rows(b)
    pairs, lost, untimed = [], [], []
    for key in (key for key in rows_a if key in rows_b):
        row_a, row_b = rows_a[key], rows_b[key]
        if row_a["status"] == row_b["status"] == "ok":
            noise = _noise(row_a) + _noise(row_b)
            pairs.append(Pair(key, row_a["p50_us"], row_b["p50_us"], noise))
        elif row_a["status"] == "ok" and row_b["status"] == "FAILED":
            lost.append((key, row_b.get("reason", "")))
        else:
            untimed.append(key)
    only = [("A", key) for key in rows_a if key not in rows_b] + [("B", key) for key in rows_b if key not in rows_a]
    return Comparison(differences, pairs, only, lost, untimed)


def _rows(document: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {(row["op"], row["model"], row["shape"], row["candidate"]): row for row in document["timings"]}


def _noise(row: dict[str, Any]) -> float:
    """What a difference must exceed: the difference of ours against ours in this shape, or the spread of the row itself
    if the spread is larger."""
    return max(row.get("noise", 0.0), (row["p80_us"] - row["p20_us"]) / 2 / row["p50_us"])


def _name(key: Key) -> str:
    return "  ".join(key)


def report(found: Comparison, tolerance: float, across_devices: bool) -> tuple[list[str], int]:
    """The text and the exit status: 0 no row is slower, 1 a row is slower or lost its time, 2 nothing was compared."""
    lines = [f"the machines differ in {difference}" for difference in found.differences]
    status = 0
    if found.differences and not across_devices:
        lines.append(
            "no ratios: times of different machines do not compare kernels (--across-devices prints them all the same)"
        )
        status = 2
    else:
        verdicts = {pair.key: pair.verdict(tolerance) for pair in found.pairs}
        lines.append(f"{'B/A':>7} {'noise':>7} {'A us':>10} {'B us':>10}")
        for pair in sorted(found.pairs, key=lambda pair: -pair.ratio):
            times = f"{pair.ratio:7.3f} {pair.noise:7.1%} {pair.a_us:10.4g} {pair.b_us:10.4g}"
            lines.append(f"{times}  {verdicts[pair.key]:6}  {_name(pair.key)}")
        counts = {word: sum(v == word for v in verdicts.values()) for word in ("slower", "same", "faster")}
        lines.append(
            ", ".join(f"{count} {word}" for word, count in counts.items()) + f", beyond noise + {tolerance:.0%}"
        )
        status = 1 if counts["slower"] or found.lost else 0
    lines += [f"FAILED in B, timed in A: {_name(key)}: {reason}" for key, reason in found.lost]
    lines += [f"only in {letter}: {_name(key)}" for letter, key in found.only]
    if found.untimed:
        lines.append(f"{len(found.untimed)} rows without a time in A or in B")
    return lines, status
