"""Loss and accuracy of training runs as a picture, from the logs of the runs.

The picture is drawn by `python -m dlm_fast.training curves runs/full/log.jsonl runs/block/log.jsonl --out curves.png`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import disk
from . import runlog
from .bounds import place
from .networks import require


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, less a last line that was cut off.

    Raises ValueError for a file that is no log. The message names the file and the line.
    """
    try:
        records = runlog.read_log(Path(path), "curves", follow=True)
    except FileNotFoundError as error:
        raise ValueError(f"curves: logs must be files that can be read, got {str(path)!r}: {error}") from error
    for number, record in enumerate(records, 1):
        where, accuracy = f"curves: {path}, line {number}", record.get("accuracy", 0.0)
        if not _is_number(record.get("loss")):
            raise ValueError(f"{where}: loss must be a number, got loss={record.get('loss')!r}")
        if not all(map(_is_number, accuracy.values() if isinstance(accuracy, dict) else [accuracy])):
            raise ValueError(f"{where}: accuracy must be a number, or one for each task, got accuracy={accuracy!r}")
    if not records:
        raise ValueError(f"curves: {path} must have a line, got none")
    return records


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) != math.inf


def series(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The curves (step, accuracy) of a log, by the task's name, or by "all" where the log has one number."""
    by_name: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        accuracy = record.get("accuracy")
        if accuracy is None:
            continue
        for name, value in (accuracy if isinstance(accuracy, dict) else {"all": accuracy}).items():
            by_name.setdefault(name, []).append((record["step"], value))
    return by_name


def plot(logs: Sequence[str | Path], out: str | Path) -> None:
    """Writes one picture to `out`: losses on the left, accuracies on masked tokens on the right.

    The suffix of `out` decides the kind of the picture. For one run the right part shows the accuracy of every task;
    for several runs that part shows one curve per run, the accuracy over all tasks or else the mean over the tasks.
    """
    # 1. Read the logs.
    if not isinstance(logs, (list, tuple)) or not logs:
        raise ValueError(f"curves: logs must be a list of at least one log, got logs={logs!r}")
    for name, value in (("out", out), *(("logs", path) for path in logs)):
        place("curves", name, value)
    disk.check_output("curves", "out", Path(out), *map(Path, logs))
    runs = {_name(path, logs): read_log(path) for path in logs}
    require("matplotlib", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if Path(out).suffix[1:].lower() not in kinds:
        raise ValueError(f"curves: out must end in one of {', '.join(sorted(kinds))}, got out={str(out)!r}")

    # 2. Draw.
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    for name, records in runs.items():
        losses.plot([r["step"] for r in records], [r["loss"] for r in records], label=name)
        by_task = series(records)
        if len(runs) == 1:
            for task, points in sorted(by_task.items()):
                accuracies.plot(*zip(*points), label=task, linewidth=2.5 if task == "all" else 1.0)
        elif by_task:
            accuracies.plot(*zip(*(by_task.get("all") or _mean(by_task))), label=name)

    # 3. Label, and write.
    losses.set(
        xlabel="step",
        ylabel="loss",
        yscale="log" if all(r["loss"] > 0 for records in runs.values() for r in records) else "linear",
    )
    accuracies.set(xlabel="step", ylabel="accuracy on masked tokens")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    with disk.replacing(Path(out)) as partial:
        figure.savefig(partial, dpi=150, format=Path(out).suffix[1:].lower())


def _name(path: str | Path, logs: Sequence[str | Path]) -> str:
    """The name of a run: its folder's name, or the log's whole path where two folders have one name."""
    names = [Path(other).resolve().parent.name for other in logs]
    name = Path(path).resolve().parent.name
    return name if names.count(name) == 1 else str(path)


def _mean(by_task: dict[str, list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean of the tasks' curves, step by step."""
    by_step: dict[int, list[float]] = {}
    for points in by_task.values():
        for step, value in points:
            by_step.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m dlm_fast.training curves`."""
    parser.add_argument("logs", nargs="+", type=Path, help="log.jsonl of one or several runs")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, e.g. curves.png or curves.svg")


def run(values: argparse.Namespace) -> None:
    """Runs `python -m dlm_fast.training curves`."""
    plot(values.logs, values.out)
