"""The file that a job writes until it is complete: `<output>.partial`.

The first line is the header, which says what the results depend on: settings, weights, tokenizer, backend, versions.
Every other line is a result with the key of the line that it answers, and a checksum. Results stand in the order in
which they were decoded; a damaged one is as if it were not there. One process at a time holds the file, by a lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .. import disk

# What every header begins with, which is also the number of this format. A file that begins otherwise is not ours.
_MARK_NAME = "dlm-fast job"
_MARK = f'{{"{_MARK_NAME}": 1'


class JobError(ValueError):
    """A job cannot start or go on, or is complete with lines that failed; the message names the file and the rule."""


def partial_path(output: Path) -> Path:
    """Where the results of an output stand until all of them are there."""
    return output.with_name(output.name + ".partial")


def check_places(output: Path, *, source: Path | None = None, overwrite: bool = False) -> None:
    """Raises JobError where a job could not write `output`, or would destroy the file `source` that it reads.

    Called before anything is opened that takes time.
    """
    if not output.name or output.is_dir():
        raise JobError(f"--output must be a file, got the folder {output}")
    if not output.parent.is_dir():
        raise JobError(f"--output {output}: the folder {output.parent} does not exist")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise JobError(f"--output {output}: the folder {output.parent} cannot be written to (Permission denied)")
    if source is not None:
        for path in (output, partial_path(output), _finished_path(output)):
            if path.resolve() == source.resolve() or path.exists() and source.exists() and path.samefile(source):
                raise JobError(f"--output {output} would replace --input {source}; give another name")
    if os.path.lexists(output):
        if not overwrite:
            raise JobError(f"--output {output} exists; use --overwrite to replace it")
        if output.is_symlink() or not output.is_file():
            raise JobError(f"--output {output} exists and is no regular file, which --overwrite does not replace")


class Partial:
    """The partial file of one output, held by this process.

    Attributes:
        path: the file.
        output: the file that it becomes.
        places: for each key of a result that is there, the place of its line in the file.
    """

    def __init__(self, output: Path) -> None:
        """Opens or makes the file and locks it. Raises JobError unless the file is ours and nobody else holds it."""
        self.output, self.path = output, partial_path(output)
        self.places: dict[str, int] = {}
        self._finishing: Any = None  # what a finished file of ours is known by: device and inode
        self._file: BinaryIO = self._locked()
        try:
            self._header = self._read()
        except BaseException:
            self._file.close()
            raise

    def _locked(self) -> BinaryIO:
        while True:
            try:
                file = os.fdopen(disk.open_regular(self.path, os.O_RDWR | os.O_CREAT), "r+b", buffering=0)
            except disk.NotRegularError as error:
                raise JobError(f"{error}; a job writes its results there, so move it away") from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if disk.names(self.path, file.fileno()):
                    return file
            except BlockingIOError:
                file.close()
                raise JobError(f"--output {self.output}: another process is writing {self.path}") from None
            except OSError as error:
                if not os.fstat(file.fileno()).st_size:
                    self.path.unlink(missing_ok=True)
                file.close()
                raise JobError(f"--output {self.output}: {self.path} cannot be locked: {error}") from error
            except BaseException:
                file.close()
                raise
            file.close()  # its holder has finished it and taken it away since it was opened

    def _read(self) -> dict[str, Any] | None:
        """The header; None if the file is new, and empty if it is damaged."""
        self._end = 0
        header: dict[str, Any] | None = None
        self._file.seek(0)
        with open(os.dup(self._file.fileno()), "rb") as lines:
            for raw in lines:
                place = self._end
                if place == 0 and not _may_be_header(raw):
                    raise JobError(
                        f"{self.path} is not what a job of this version leaves (its first line is no header); move it "
                        "away"
                    )
                if not raw.endswith(b"\n"):
                    break
                self._end += len(raw)
                if place == 0:
                    header = _parsed(raw) or {}
                    continue
                entry = _parsed(raw) or {}
                self._finishing = entry.get("finishing", self._finishing)
                key, line = entry.get("key"), entry.get("line")
                if isinstance(key, str) and isinstance(line, dict) and entry.get("check") == _check(key, line):
                    self.places.setdefault(key, place)
        return header

    def begin(self, header: Mapping[str, Any], *, restart: bool) -> None:
        """Goes on with the results that are there, or begins anew.

        Raises JobError if they are of a run with another header, and `restart` does not say to discard them.
        """
        if self._header is not None and not restart and not self._is_left_over():
            saved = {name: value for name, value in self._header.items() if name != _MARK_NAME}
            names = sorted(name for name in {**saved, **header} if saved.get(name) != header.get(name))
            if not names:
                return
            what = f"is from a run with other {', '.join(names)}" if saved else "has a damaged header"
            raise JobError(f"{self.path} {what}; use the same, or --restart to discard it")
        if self._finishing is not None:
            self._forget_finished()
        self._file.seek(0)
        self._file.truncate()
        self.places, self._end = {}, 0
        self._write(json.dumps({_MARK_NAME: 1, **header}, ensure_ascii=False).encode() + b"\n")

    def _is_left_over(self) -> bool:
        """Whether the output has all of these results already: a run was killed between its last two steps."""
        if not self.places or not self.output.is_file():
            return False
        with open(self.output, "rb") as output:
            lines = sorted((self.line(key) for key in self.places), key=lambda line: line["index"])
            return all(output.readline() == encoded(line) for line in lines) and not output.read(1)

    def append(self, results: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Writes results, each with its key, and waits until they are on the disk."""
        place, entries = self._end, []
        for key, line in results:
            raw = encoded({"key": key, "check": _check(key, line), "line": line})
            self.places[key] = place
            entries.append(raw)
            place += len(raw)
        self._write(b"".join(entries))

    def _write(self, data: bytes) -> None:
        self._file.seek(self._end)
        self._file.truncate()  # what follows the last whole line was cut off
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        os.fsync(self._file.fileno())
        self._end += len(data)

    def line(self, key: str) -> dict[str, Any]:
        """The result with this key, read from the file."""
        self._file.seek(self.places[key])
        with open(os.dup(self._file.fileno()), "rb") as lines:
            return json.loads(lines.readline())["line"]

    def finish(self, lines: Callable[[], Iterable[Mapping[str, Any]]], *, overwrite: bool) -> None:
        """Gives `lines`, all of them and in order, the output's name, and takes the partial file away.

        Raises JobError if an output has appeared meanwhile and is not to be replaced; then the partial file is kept.
        """
        finished = _finished_path(self.output)
        self._forget_finished()
        try:
            target = disk.create(finished, lambda begun: not begun.read(1))
        except disk.NotRegularError as error:
            raise JobError(f"{error}; a job writes its output there first, so move it away") from None
        try:
            found = os.fstat(target)
            self._write(encoded({"finishing": [found.st_dev, found.st_ino]}))
            with os.fdopen(target, "wb") as file:
                for line in lines():
                    file.write(encoded(line))
                file.flush()
                os.fsync(file.fileno())
            disk.rename(finished, self.output, replace=overwrite)
        except FileExistsError:
            finished.unlink(missing_ok=True)
            raise JobError(
                f"--output {self.output} has appeared while the job ran; use --overwrite to replace it (all "
                f"results are in {self.path})"
            ) from None
        except BaseException:
            finished.unlink(missing_ok=True)
            raise
        if disk.names(self.path, self._file.fileno()):
            self.path.unlink()

    def _forget_finished(self) -> None:
        """Takes away what a run of ours that was killed has left of the finished file."""
        finished = _finished_path(self.output)
        try:
            found = os.lstat(finished)
            both_names = os.path.lexists(self.output) and os.path.samestat(found, os.lstat(self.output))
            if both_names or self._finishing == [found.st_dev, found.st_ino]:
                finished.unlink()
        except FileNotFoundError:
            return

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._end == 0 and disk.names(self.path, self._file.fileno()):
            self.path.unlink()  # made here, and nothing was written
        self._file.close()


def encoded(line: Mapping[str, Any]) -> bytes:
    """A line of a file of results."""
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _check(key: str, line: Mapping[str, Any]) -> str:
    """What a result and its key must add up to, so that a damaged one is noticed."""
    return hashlib.sha256(key.encode() + encoded(line)).hexdigest()[:16]


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _may_be_header(raw: bytes) -> bool:
    """Whether a first line is a header, or the beginning of one that was cut off."""
    mark = _MARK.encode()
    return raw.startswith(mark) or not raw.endswith(b"\n") and mark.startswith(raw)


def _finished_path(output: Path) -> Path:
    return output.with_name(output.name + ".finished")
