"""Slots beside static batches: requests of mixed lengths by a session whose slots are refilled as rows finish, and by
calls that take as many rows and wait for the longest of them.

Both take the requests in the order in which they came. Both must give a request what it gets alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dlm_fast import Completion, Session
from dlm_fast.presets import PRESETS
from dlm_kernels import RowState
from dlm_kernels.state import DONE

from .models import Subject

if TYPE_CHECKING:
    from .batch import Request

STATIC, SLOTS = "static", "slots"
Point = tuple[float, int, int]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What a session made of a list of requests, in their order; as much of a `GenerateOutput` as is counted.

    Attributes:
        shapes: steps of every shape that this list took.
        computed_tokens: positions of all these steps.
    """

    canvas: list[torch.Tensor]
    nfe: list[int]
    query_tokens: list[int]
    shapes: dict[Any, int]
    computed_tokens: int


class SlotDecoder:
    """A preset on a patched model, for requests that go through slots. The session and its buffers serve all calls."""

    def __init__(
        self,
        preset: str,
        subject: Subject,
        model: nn.Module,
        requests: Sequence[Request],
        slots: int,
        cancel: Any = None,
    ) -> None:
        """`requests` are as those that will come: the session is as large as they need, and their lengths are those
        that its shapes are planned for. `cancel` is that of `generate`."""
        self.preset, self.slots, self._cancel = preset, slots, cancel
        self._copies = 2 if PRESETS[preset].cfg_scale else 1
        # A last block may be decoded whole.
        most = max(request.length for request in requests) + subject.block_length
        self.session = Session(
            model,
            preset,
            slots=slots,
            max_positions=min(most, subject.positions),
            max_new_tokens=max(request.new_tokens for request in requests),
            lengths=[(len(request.prompt), request.new_tokens) for request in requests],
            banned_token_ids=[subject.eos],
        )

    def __call__(self, requests: Sequence[Request], on_step: Callable[[RowState], None] | None = None) -> list[Decoded]:
        """Decodes the requests in their order; a list, as that of the calls of static batches."""
        before = Counter(self.session.shapes)
        rows: list[Completion] = self.session.generate(
            [
                {"prompt": request.prompt, "max_new_tokens": request.new_tokens, "request_id": request.number}
                for request in requests
            ],
            on_step=on_step,
            cancel=self._cancel,
        )
        if wrong := next((row.error for row in rows if row.error is not None), None):
            raise RuntimeError(wrong)
        ran = Counter(self.session.shapes) - before
        computed = sum(self._copies * b.rows * b.width * b.drafts * steps for b, steps in ran.items())
        return [
            Decoded(
                [row.canvas for row in rows],
                [row.nfe for row in rows],
                [row.query_tokens for row in rows],
                dict(ran),
                computed,
            )
        ]


class Recorder:
    """Rows in work and tokens written, step by step; `on_step` of a decode. It reads the state, so that a decode that
    is recorded is slower than one that is timed.

    Attributes:
        points: (seconds since the start, rows that take steps, tokens written so far) after every step.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self._start = clock, clock()
        self.points: list[Point] = []
        self._written: torch.Tensor | None = None
        self._tokens = 0

    def call(self) -> Recorder:
        """Another call begins: the rows of its state are not those before."""
        self._written = None
        return self

    def __call__(self, state: RowState) -> None:
        written, done = (state.unmask_step >= 0).sum(1).cpu(), (state.phase == DONE).cpu()
        if self._written is None:
            self._tokens += int(written.sum())
        else:
            # A slot that was done and holds another row now counts from nothing. A row that was written over by one of
            # as many tokens that is done after a step is not seen, and its few tokens are missing.
            other = self._done & (written != self._written)
            self._tokens += int(torch.where(other, written, written - self._written).sum())
        self._written, self._done = written, done
        self.points.append((self.clock() - self._start, int((~done).sum()), self._tokens))


def occupancy(points: Sequence[Sequence[float]], slots: int) -> float:
    """The share of slots that have a row, over time."""
    if not points:
        return 0.0
    # Rows in work after a step are those of the time until the next one ends.
    spans = [(end[0] - begin[0], begin[1]) for begin, end in zip(points, points[1:])]
    total = sum(seconds for seconds, _ in spans)
    return sum(seconds * rows for seconds, rows in spans) / (total * slots) if total else points[0][1] / slots
