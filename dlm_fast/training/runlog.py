"""The log of a run: one JSON line every few steps, means since the line before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .masking import Masked


class RunLog:
    """Sums of a run between two lines. tasks: names that Masked.task counts; with none, accuracy is one number.

    A line has step, seconds, tokens (canvas positions so far), loss, accuracy (share of masked answer tokens, up to and
    with the first EOS, whose top token is right; "all" and by task) and, where there is a teacher, agreement (share of
    masked tokens on which student and teacher have the same top token).
    """

    def __init__(self, path: Path, tasks: tuple[str, ...]) -> None:
        self.path, self.tasks = path, tasks
        self._reset()

    def _reset(self) -> None:
        self._loss, self._steps, self._agreed, self._masked = 0.0, 0, 0.0, 0
        # Row 0: masked answer tokens, row 1: those that are right. Column 0: all tasks, then one a task.
        self._right = torch.zeros(2, 1 + len(self.tasks))

    def add_step(self, loss: float) -> None:
        """Counts an optimizer step."""
        self._loss += loss
        self._steps += 1

    def add_tokens(self, batch: Masked, student: Tensor, teacher: Tensor | None) -> None:
        """Counts a batch's masked tokens, from their logits [N, V]."""
        top = student.argmax(-1)
        right = (top == batch.targets)[batch.in_answer].float().cpu()
        column = batch.task[batch.in_answer].cpu() + 1
        self._right[:, 0] += torch.tensor([len(right), right.sum()])
        named = (column > 0).float()  # a sample without a task counts in "all" alone
        self._right[0].index_add_(0, column, named)
        self._right[1].index_add_(0, column, right * named)
        if teacher is not None:
            self._agreed += (top == teacher.argmax(-1)).sum().item()
            self._masked += len(top)

    def write(self, *, step: int, seconds: float, tokens: int, to_disk: bool = True) -> dict[str, Any]:
        """Appends a line, starts new sums, and returns the line's record."""
        count, right = self._right
        accuracy = [round(value, 4) for value in (right / count.clamp(min=1)).tolist()]
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
            with open(self.path, "a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        return record

    def forget_after(self, step: int) -> None:
        """Drops the lines of later steps: a run that goes on from a checkpoint makes them again."""
        forget_after(self.path, step)


def forget_after(path: Path, step: int) -> None:
    """Drops the lines of a log that are of later steps, and a last one that was cut off."""
    if not path.exists():
        return
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    del last  # what follows the last line's end: nothing, or a line that was never finished
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")
    partial.replace(path)
