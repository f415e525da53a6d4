"""Jobs that are broken when so many of their lines are done, in this process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dlm_fast.jobs import rows
from dlm_fast.running import Runner


class Interrupted(Exception):
    pass


@contextlib.contextmanager
def watched(
    *, on_row: Callable[[int], None] = lambda index: None, on_result: Callable[[int], None] = lambda count: None
) -> Iterator[None]:
    """Calls `on_row` with the index of every line that a slot takes, and `on_result` with the number of results so far
    before each is handed to the job."""

    class Watched(Runner):
        def run(self, source: Iterable[Any], *, at_once: bool = True) -> Iterator[Any]:
            def rows_told() -> Iterator[Any]:
                for row in source:
                    on_row(row.number)
                    yield row

            for count, result in enumerate(super().run(rows_told(), at_once=at_once)):
                on_result(count)
                yield result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "Runner", Watched)
        yield


@contextlib.contextmanager
def broken_after(results: int, error: BaseException | None = None) -> Iterator[None]:
    """A job raises when it has so many results and would get one more."""

    def check(count: int) -> None:
        if count == results:
            raise error or Interrupted("power cut")

    with watched(on_result=check):
        yield


def kept(partial: Path) -> list[int]:
    """The indices of the lines whose results are in a partial file, in their order there."""
    entries = map(json.loads, partial.read_bytes().split(b"\n")[1:-1])
    return [entry["line"]["index"] for entry in entries if "line" in entry]
