"""The log of a run: one JSON line every few steps, with the means since the line before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import disk
from .masking import Masked


class RunLog:
    """The log of a distillation, with sums that collect what happens between two lines.

    A line has these entries:

        step       number of the step
        seconds    duration of the run so far
        tokens     canvas positions so far
        loss       mean loss
        accuracy   share of masked answer tokens, the first EOS included, whose most likely token is correct: one
                   number, or "all" and one number per task
        agreement  share of masked tokens on which student and teacher have one most likely token, if there is a teacher

    Args:
        path: the file.
        tasks: names of the tasks, which `Masked.task` is an index into.
    """

    def __init__(self, path: Path, tasks: tuple[str, ...]) -> None:
        self.path, self.tasks = path, tasks
        self._reset()

    def _reset(self) -> None:
        self._loss, self._steps, self._agreed, self._masked = 0.0, 0, 0.0, 0
        # Row 0 counts masked answer tokens, and row 1 counts the correct ones of these. Column 0 is for all tasks, and
        # every other column is for one task.
        self._right = torch.zeros(2, 1 + len(self.tasks))

    def add_step(self, loss: float) -> None:
        """Adds the loss of an optimizer step."""
        self._loss += loss
        self._steps += 1

    def add_tokens(self, batch: Masked, student: Tensor, teacher: Tensor | None) -> None:
        """Counts a batch's masked tokens, from the logits [N, V] that predict them."""
        top = student.argmax(-1)
        is_correct = (top == batch.targets)[batch.in_answer].float().cpu()
        column = batch.task[batch.in_answer].cpu() + 1
        self._right[:, 0] += torch.tensor([len(is_correct), is_correct.sum()])
        has_task = (column > 0).float()  # a sample without a task counts for all tasks only
        self._right[0].index_add_(0, column, has_task)
        self._right[1].index_add_(0, column, is_correct * has_task)
        if teacher is not None:
            self._agreed += (top == teacher.argmax(-1)).sum().item()
            self._masked += len(top)

    def write(self, *, step: int, seconds: float, tokens: int, to_disk: bool = True) -> dict[str, Any]:
        """Appends a line, starts new sums, and returns the line's record."""
        count, correct = self._right
        accuracy = [round(value, 4) for value in (correct / count.clamp(min=1)).tolist()]
        by_task = {"all": accuracy[0]} | {name: accuracy[i] for i, name in enumerate(self.tasks, 1) if count[i]}
        record: dict[str, Any] = {
            "step": step,
            "seconds": round(seconds, 1),
            "tokens": tokens,
            "loss": round(self._loss / max(self._steps, 1), 5),
            "accuracy": by_task if self.tasks else accuracy[0],
        }
        if self._masked:
            record["agreement"] = round(self._agreed / self._masked, 4)
        self._reset()
        if to_disk:
            append(self.path, record)
        return record


def append(path: Path, record: dict[str, Any]) -> None:
    """Appends a record to a log as one line. Raises OSError."""
    disk.append(path, json.dumps(record) + "\n")


def read_log(path: Path, owner: str = "log", *, follow: bool = False) -> list[dict[str, Any]]:
    """The records of a log, whose lines end at \\n and nowhere else; a last line that was cut off is left out.

    Args:
        path: the file.
        owner: who speaks in errors.
        follow: whether the file may be a link.
    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is no regular file, or a line is no record of a step. The message names file and line.
    """
    try:
        *lines, _ = disk.read(path, follow=follow).split(b"\n")  # behind the last line's end stands what was cut off
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{owner}: {path} must be a log that can be read, got {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, bool) or not isinstance(step, int):
            raise ValueError(
                f"{owner}: {path}, line {number}: must be a JSON object with a whole number step, got {line[:80]!r}"
            )
        records.append(record)
    return records


def records_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of steps up to `step`; none where there is no log. Raises ValueError as `read_log` does."""
    try:
        return [record for record in read_log(path) if record["step"] <= step]
    except FileNotFoundError:
        return []


def rewrite(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Makes these records the log. A run that goes on from a checkpoint writes the lines of later steps again."""
    if not records and not path.exists():
        return
    with disk.replacing(path) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
