"""Jobs in processes of their own, which are killed, told to end, run against each other, or left without room."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dlm_fast import cli

LINES = 60


class Process:
    """A forked process that runs the command line. `wait` says how it ended, and what it wrote to stderr."""

    def __init__(self, argv: list[str], *, room: int | None = None) -> None:
        self._read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch has threads, which do nothing now
            self.pid = os.fork()
        if not self.pid:
            self._run(argv, write, room)
        os.close(write)

    def _run(self, argv: list[str], write: int, room: int | None) -> None:
        """What the forked process does, and no more: nothing of the test session may end in it."""
        status = 70
        try:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            if room is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            generate = cli.COMMANDS["generate"]

            def announced(args: argparse.Namespace) -> dict[str, Any]:
                sys.stderr.write("begins\n")
                sys.stderr.flush()
                return generate(args)

            cli.COMMANDS["generate"] = announced
            status = cli.main(argv)
            sys.stderr.flush()
        finally:
            os._exit(status)

    def began(self) -> None:
        """Waits until the command runs."""
        assert os.read(self._read, len("begins\n"))

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        with os.fdopen(self._read, "rb") as stream:
            text = stream.read().decode()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), text


class Jobs:
    """A job of many lines, what it writes unbroken, and what was seen when it was broken.

    Attributes:
        seen: how many of what has happened.
        wrong: what must not have happened.
    """

    def __init__(self, model: Path, other_model: Path, folder: Path) -> None:
        self.model, self.other_model, self.folder = model, other_model, folder
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.partial = folder / "out.jsonl.partial"
        records = [{"prompt": [2 + (7 * i + j) % 40 for j in range(1 + i % 5)], "id": i} for i in range(LINES)]
        self.input.write_text("".join(json.dumps(record) + "\n" for record in records))
        self.seen: dict[str, int] = {}
        self.wrong: list[str] = []
        started = time.perf_counter()
        self.whole = self.unbroken(self.argv())
        self.seconds = time.perf_counter() - started
        self.other = self.unbroken(self.argv("--seed", "1"))
        assert self.whole != self.other

    def argv(self, *flags: str, model: Path | None = None) -> list[str]:
        where = ["--model", str(model or self.model), "--input", str(self.input), "--output", str(self.output)]
        how = ["--max-new-tokens", "6", "--temperature", "0.7", "--batch-size", "2", "--device", "cpu"]
        return ["generate", *where, *how, *flags]

    def unbroken(self, argv: list[str]) -> bytes:
        status, text = Process(argv).wait()
        assert status == 0, text
        content = self.output.read_bytes()
        self.output.unlink()
        return content

    def count(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)

    def clear(self) -> None:
        for path in self.folder.glob("out*"):
            path.unlink()

    def completes(self, where: str) -> None:
        """The job ends well now, and has written what an unbroken one writes."""
        if self.output.exists():  # it was killed after its output had got the name
            self.check(self.output.read_bytes() == self.whole, f"{where}: an output that is not whole")
            self.count("killed after the end")
        else:
            resumed = len(self.partial.read_bytes().splitlines()) - 1 if self.partial.exists() else 0
            self.count("resumed" if resumed > 0 else "begun anew")
            status, text = Process(self.argv()).wait()
            self.check(status == 0, f"{where}: {text[-300:]}")
            self.check(self.output.exists() and self.output.read_bytes() == self.whole, f"{where}: other bytes")
        self.clear()

    def kill(self, draw: random.Random) -> None:
        """One job, killed at up to three random moments, with another model at its name in between, and completed."""
        for _ in range(draw.randint(1, 3)):
            if self.output.exists():
                break
            process = Process(self.argv())
            time.sleep(draw.uniform(0, 1.1 * self.seconds))
            process.signal(signal.SIGKILL)
            self.count("kills" if process.wait()[0] == -signal.SIGKILL else "ended before the kill")
            if self.partial.exists() and not self.output.exists() and draw.random() < 0.25:
                before = self.partial.read_bytes()
                status, text = Process(self.argv(model=self.other_model)).wait()
                if before.count(b"\n"):  # there is a header, with the weights in it
                    self.check(status == 1 and "other weights" in text, f"another model: {text[-300:]}")
                    self.check(self.partial.read_bytes() == before, "another model: the partial file changed")
                    self.count("other weights refused")
                else:
                    self.clear()
        self.completes("kill")

    def pair(self, draw: random.Random) -> None:
        """Two processes with one output, of the same job or of two."""
        flags = draw.choice([[], ["--overwrite"], ["--overwrite", "--restart"]])
        seeds = draw.choice([(0, 0), (0, 1)])
        first = Process(self.argv(*flags, "--seed", str(seeds[0])))
        time.sleep(draw.choice([0, draw.uniform(0, 1.2 * self.seconds)]))
        ends = [Process(self.argv(*flags, "--seed", str(seeds[1]))).wait(), first.wait()][::-1]
        self.count("pairs")
        expected = [self.other if seed else self.whole for seed in seeds]
        well = [content for (status, _), content in zip(ends, expected) if status == 0]
        self.check(bool(well), f"pair: nobody ended well: {ends}")
        for status, text in ends:
            if status:
                known = ("another process is writing", "exists; use --overwrite", "has appeared", "is from a run with")
                self.check(status == 1 and any(words in text for words in known), f"pair: {text[-300:]}")
                self.count("refused")
        content = self.output.read_bytes() if self.output.exists() else b""
        self.check(content in well, "pair: the output is of no process that ended well")
        self.check("--overwrite" in flags or len(well) == 1, "pair: both say that the output is theirs")
        self.check(not self.partial.exists(), "pair: a partial file is left")
        self.clear()

    def full_disk(self, draw: random.Random) -> None:
        """A disk that takes no file longer than some length."""
        status, text = Process(self.argv(), room=draw.randint(1, len(self.whole) - 1)).wait()
        self.check(status == 1 and "File too large" in text, f"full disk: {status} {text[-300:]}")
        self.check(not self.output.exists(), "full disk: an output that cannot be whole")
        self.count("full disks")
        self.completes("full disk")

    def told_to_end(self, number: int, begun: bool) -> None:
        """A signal, before the first batch or after it."""
        process = Process(self.argv())
        process.began()
        with _late(process, self.seconds * 20):
            while begun and not (self.partial.exists() and self.partial.read_bytes().count(b"\n") > 3):
                time.sleep(0.001)
        process.signal(number)
        status, text = process.wait()
        self.check(status == 128 + number, f"signal {number}: exit status {status}")
        self.check("what was finished is kept" in text, f"signal {number}: {text[-300:]}")
        self.count("signals")
        self.completes(f"signal {number}")


@contextlib.contextmanager
def _late(process: Process, seconds: float) -> Iterator[None]:
    """Kills a process that takes too long."""
    timer = threading.Timer(seconds, lambda: process.signal(signal.SIGKILL))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def campaign(jobs: Jobs, *, kills: int, pairs: int, disks: int, seed: int, progress: Callable[[], None]) -> None:
    """Breaks jobs at random; `jobs.seen` and `jobs.wrong` say what happened."""
    draw = random.Random(seed)
    while jobs.seen.get("kills", 0) < kills:
        jobs.kill(draw)
        progress()
    for _ in range(pairs):
        jobs.pair(draw)
        progress()
    for _ in range(disks):
        jobs.full_disk(draw)
        progress()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for begun in (False, True):
            jobs.told_to_end(number, begun)
            progress()
