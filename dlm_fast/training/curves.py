"""Loss and accuracy of training runs as a picture, from the logs of the runs.

The picture is drawn by `python -m dlm_fast.training curves runs/full/log.jsonl runs/block/log.jsonl --out curves.png`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .networks import require


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl. Raises ValueError for a file that is no log, naming file and line."""
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            missing = {"step", "loss"} - record.keys()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"curves: {path}, line {number}: must be a JSON object: {error}") from error
        if missing:
            raise ValueError(f"curves: {path}, line {number}: has no {sorted(missing)}")
        records.append(record)
    if not records:
        raise ValueError(f"curves: {path} has no lines")
    return records


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
    if not logs:
        raise ValueError("curves: at least one log must be given")
    runs = {_name(path, logs): read_log(path) for path in logs}
    require("matplotlib", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
    figure.savefig(out, dpi=150)


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
