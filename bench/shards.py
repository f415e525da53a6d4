"""Jobs in processes side by side. A job that kills its process, hangs in it or leaves it unsound costs that process and
is named; the other jobs go on in a new process.

This module knows neither torch nor what a job does, so a process starts as fast as what it imports. A process ends with
the one that started it, however that one ends.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

START_SECONDS = 180.0  # for a process to import what it needs
MOST_LOST = 8  # processes that one group of jobs may cost before its other jobs are left out
JOIN_SECONDS = 10.0  # for killed processes to be gone
# Processes are never forked: a fork of a process that has used CUDA cannot use CUDA.
_SPAWN = multiprocessing.get_context("spawn")

Work = Callable[[int], tuple[Any, bool]]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is done, by its name.

    Attributes:
        group: jobs that are alike; where many of them break their process, the others of the group are not tried.
    """

    group: str
    name: str


@dataclasses.dataclass(frozen=True)
class Event:
    """What happened to a job.

    Attributes:
        kind: "begun"; then "ended" with the job's `result`, or "lost" with the `reason` why its process is gone. "not
            run": the job never began.
        index: which of the jobs.
        seconds: since the job began.
    """

    kind: str
    index: int
    result: Any = None
    reason: str = ""
    seconds: float = 0.0


def run(
    jobs: Sequence[Job],
    make: Callable[[], Work],
    *,
    processes: int,
    job_seconds: float,
    start_seconds: float = START_SECONDS,
    most_lost: int = MOST_LOST,
) -> Iterator[Event]:
    """Does the jobs in order, as many at a time as there are processes, and yields what happens as it happens.

    Args:
        make: called once in every process; what it returns does a job by its index and says (result, whether the
            process is still sound). `make` is pickled, so it is a function of a module, or a partial of one.
        processes: 0 = this process does all jobs, and nothing guards it.
        job_seconds: a job that has not ended by then is lost.
        start_seconds: a process that has not started by then is lost.
        most_lost: once a group has lost so many processes, the other jobs of the group are not run.
    """
    if processes == 0:
        work = make()
        for index in range(len(jobs)):
            yield Event("begun", index)
            yield Event("ended", index, result=work(index)[0])
        return
    waiting = collections.deque(range(len(jobs)))
    lost: collections.Counter[str] = collections.Counter()
    failed = "none was started"
    shards = [_Shard(make) for _ in range(min(processes, len(jobs)))]
    ended: list[_Shard] = []
    try:
        while shards:
            multiprocessing.connection.wait([shard.connection for shard in shards], timeout=0.2)
            for shard in list(shards):
                message = shard.message(start_seconds if shard.job is None else job_seconds)
                if message is None:
                    continue
                kind, result, sound = message
                index, seconds = shard.job, time.monotonic() - shard.since
                if index is None and kind != "ready":
                    failed = result  # another process would not start either
                elif kind == "ended":
                    yield Event("ended", index, result=result, seconds=seconds)
                elif kind == "died":
                    yield Event("lost", index, reason=result, seconds=seconds)
                if not sound:
                    shards.remove(shard)
                    ended.append(shard)
                    shard.end()
                    if index is None:
                        continue
                    group = jobs[index].group
                    lost[group] += 1
                    if lost[group] == most_lost:
                        left_out = [n for n in waiting if jobs[n].group == group]
                        waiting = collections.deque(n for n in waiting if jobs[n].group != group)
                        for n in left_out:
                            yield Event("not run", n, reason=f"{most_lost} others of {group} broke their process")
                    if len(shards) < len(waiting):
                        shards.append(_Shard(make))
                elif waiting:
                    index = waiting.popleft()
                    yield Event("begun", index)
                    shard.begin(index)
                else:
                    shards.remove(shard)
                    ended.append(shard)
                    shard.end()
        for index in waiting:
            yield Event("not run", index, reason=f"no process is left to run it: {failed}")
    finally:
        for shard in shards:
            shard.end()
        deadline = time.monotonic() + JOIN_SECONDS  # a driver may hold on to a process for longer
        for shard in [*ended, *shards]:
            shard.process.join(max(0.0, deadline - time.monotonic()))


class _Shard:
    """One process, seen from the process that started it.

    Attributes:
        job: the job that the process is at, and since when; None: the process is starting.
    """

    def __init__(self, make: Callable[[], Work]) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs, make), daemon=True)
        self.job: int | None = None
        self.since = time.monotonic()
        self.process.start()
        theirs.close()  # then the end of the process is the end of the connection

    def begin(self, index: int) -> None:
        self.job, self.since = index, time.monotonic()
        with contextlib.suppress(OSError):  # the process is gone, which its next message says
            self.connection.send(index)

    def message(self, limit: float) -> tuple[str, Any, bool] | None:
        """(kind, result or reason, whether the process is sound), or None while there is nothing to say."""
        # Asked now, because a message that came while other processes were attended to is no time-out.
        if self.connection.poll():
            try:
                return self.connection.recv()
            except (EOFError, OSError):
                self.process.join(JOIN_SECONDS)
                return "died", f"its process died: {_ending(self.process.exitcode)}", False
        if time.monotonic() - self.since > limit:
            return "died", f"no end after {limit:g} s: its process was killed", False
        return None

    def end(self) -> None:
        """Ends the process without waiting for it, because the jobs of the other processes go on."""
        self.process.kill()
        self.connection.close()


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        return signal.Signals(-status).name
    return f"exit status {status}"


def _serve(connection: multiprocessing.connection.Connection, make: Callable[[], Work]) -> None:
    """What runs in the process."""
    faulthandler.enable()  # a crash then says on stderr where it happened
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work = make()
    except Exception as error:
        connection.send(("unfit", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False))
        return
    connection.send(("ready", None, True))
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(("ended", *work(connection.recv())))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
