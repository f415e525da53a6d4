"""The files that a job writes until it is complete: `<output>.partial`, and `<output>.rank<r>.partial` of other ranks.

The first line is the header, which says what the results depend on: settings, weights, tokenizer, backend, versions.
Every other line is a result with the key of the line that it answers, and a checksum. Results stand in the order in
which they were finished; a damaged one is as if it were not there. One process at a time holds a file, by a lock, and
who holds `<output>.partial` holds the job.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .. import disk

# What every header begins with, which is also the number of this format. A file that begins otherwise is not ours.
_MARK_NAME = "dlm-fast job"
_MARK = f'{{"{_MARK_NAME}": 1'
# How many bytes of a result are read at a time.
_READ_TOGETHER = 2**14


class JobError(ValueError):
    """A job cannot start or go on, or is complete with lines that failed; the message names the file and the rule."""


def partial_path(output: Path, rank: int = 0) -> Path:
    """Where the results of an output, or those of one of several ranks, stand until all of them are there."""
    return output.with_name(output.name + (f".rank{rank}.partial" if rank else ".partial"))


def ranks_left(output: Path) -> list[int]:
    """The ranks other than 0 of which there are results, whichever run has left them."""
    paths = map(Path, glob.glob(f"{glob.escape(str(output))}.rank*.partial"))
    found = (re.fullmatch(r"\.rank([1-9]\d*)\.partial", path.name.removeprefix(output.name)) for path in paths)
    return sorted(int(match[1]) for match in found if match)


class Keys:
    """What tells the results of a job's lines from all others, 16 bytes a line."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes) // 16

    def append(self, key: str | None) -> None:
        """Adds the key of the next line; None = it has no result."""
        self._bytes += bytes(16) if key is None else bytes.fromhex(key)

    def __getitem__(self, index: int) -> str | None:
        key = bytes(self._bytes[16 * index : 16 * index + 16])
        return key.hex() if any(key) else None


class Found:
    """Where the results of a job stand, in one or several files.

    Attributes:
        keys: the keys of the job's lines.
        count: how many results there are.
    """

    def __init__(self, keys: Keys) -> None:
        self.keys, self.count = keys, 0
        self._places = array.array("q", [-1]) * len(keys)
        self._numbers = array.array("I", [0]) * len(keys)
        self._files: list[int] = []

    def __contains__(self, index: int) -> bool:
        return self._places[index] >= 0

    def open(self, descriptor: int) -> int:
        """A number for a file that results are read from."""
        self._files.append(os.dup(descriptor))
        return len(self._files) - 1

    def add(self, number: int, index: int, place: int) -> None:
        """Notes a result in a file, unless there is one already."""
        if self._places[index] < 0:
            self._places[index], self._numbers[index] = place, number
            self.count += 1

    def take(self, number: int, key: Any, line: Mapping[str, Any], place: int) -> None:
        """Notes what stands in a file, if it is the result of a line of this job."""
        index = line.get("index")
        if type(index) is int and 0 <= index < len(self.keys) and self.keys[index] == key:
            self.add(number, index, place)

    def line(self, index: int) -> dict[str, Any]:
        """The result of a line, read from its file."""
        # Not by the position of the file, which moves with what is written.
        file, place, parts = self._files[self._numbers[index]], self._places[index], []
        while not parts or b"\n" not in parts[-1]:
            parts.append(os.pread(file, _READ_TOGETHER, place))
            place += len(parts[-1])
            if not parts[-1]:
                raise JobError("a partial file was cut while the job ran")
        return json.loads(b"".join(parts).split(b"\n", 1)[0])["line"]

    def read(self, path: Path) -> None:
        """Notes the results in a file that another process may hold, as far as they are whole; none if it is gone."""
        try:
            descriptor = disk.open_regular(path, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            number = self.open(descriptor)
            for place, entry, _ in _entries(descriptor):
                if place and _is_result(entry):
                    self.take(number, entry["key"], entry["line"], place)
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Forgets all results."""
        self.close()
        self.__init__(self.keys)

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())


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
    """The partial file of one output, or of one of its ranks, held by this process.

    Attributes:
        path: the file.
        output: the file that it becomes.
        found: where the results of the job stand.
    """

    def __init__(self, output: Path, found: Found, rank: int = 0) -> None:
        """Opens or makes the file and locks it. Raises JobError unless the file is ours and nobody else holds it."""
        self.output, self.path, self.found = output, partial_path(output, rank), found
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
        self._number = self.found.open(self._file.fileno())
        for place, entry, raw in _entries(self._file.fileno()):
            if place == 0 and not _may_be_header(raw):
                raise JobError(
                    f"{self.path} is not what a job of this version leaves (its first line is no header); move it away"
                )
            if not raw.endswith(b"\n"):
                break
            self._end += len(raw)
            if place == 0:
                header = entry
                continue
            self._finishing = entry.get("finishing", self._finishing)
            if _is_result(entry):
                self.found.take(self._number, entry["key"], entry["line"], place)
        return header

    def begin(self, header: Mapping[str, Any], *, restart: bool, left_over: bool = False) -> None:
        """Goes on with the results that are there, or begins anew.

        Raises JobError if they are of a run with another header, and `restart` does not say to discard them, nor
        `left_over` that the output has them already.
        """
        if self._header is not None and not restart:
            saved = {name: value for name, value in self._header.items() if name != _MARK_NAME}
            names = sorted(name for name in {**saved, **header} if saved.get(name) != header.get(name))
            if not names and not left_over:
                return
            if not left_over:
                what = f"is from a run with other {', '.join(names)}" if saved else "has a damaged header"
                raise JobError(f"{self.path} {what}; use the same, or --restart to discard it")
        if self._finishing is not None:
            self._forget_finished()
        self.found.clear()
        self._number = self.found.open(self._file.fileno())
        self._file.seek(0)
        self._file.truncate()
        self._end = 0
        self._write(json.dumps({_MARK_NAME: 1, **header}, ensure_ascii=False).encode() + b"\n")

    def is_left_over(self) -> bool:
        """Whether the output has all of these results already: a run was killed between its last two steps."""
        try:
            with open(self.output, "rb") as output:
                if not _is_file(output, self._finishing):
                    return False
                places = array.array("q")
                for place, _ in _raws(output):
                    places.append(place)
                for place, entry, _ in _entries(self._file.fileno()):
                    if not place or not _is_result(entry):
                        continue
                    index = entry["line"].get("index")
                    if type(index) is not int or not 0 <= index < len(places):
                        return False
                    output.seek(places[index])
                    if output.readline() != encoded(entry["line"]):
                        return False
        except OSError:
            return False
        return True

    def append(self, results: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Writes results, each with the index of its line, and waits until they are on the disk."""
        place, entries, places = self._end, [], []
        for index, line in results:
            key = self.found.keys[index]
            raw = encoded({"key": key, "check": _check(key, line), "line": line})
            places.append((index, place))
            entries.append(raw)
            place += len(raw)
        self._write(b"".join(entries))
        for index, place in places:
            self.found.add(self._number, index, place)

    def _write(self, data: bytes) -> None:
        self._file.seek(self._end)
        self._file.truncate()  # what follows the last whole line was cut off
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        os.fsync(self._file.fileno())
        self._end += len(data)

    def finish(self, lines: Iterable[Mapping[str, Any]], others: Iterable[Path], *, overwrite: bool) -> None:
        """Gives `lines`, all of them and in order, the output's name, and takes the partial files away: the `others`,
        of ranks that have ended, and this one last, which says that the results are there.

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
                for line in lines:
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
        for path in others:
            path.unlink(missing_ok=True)
        self.unlink()

    def unlink(self) -> None:
        """Takes the file away, unless its name is another's by now."""
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
        with contextlib.suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_UN)  # who reads results has descriptors that would keep the lock
        self._file.close()


def encoded(line: Mapping[str, Any]) -> bytes:
    """A line of a file of results."""
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _check(key: str, line: Mapping[str, Any]) -> str:
    """What a result and its key must add up to, so that a damaged one is noticed."""
    return hashlib.sha256(key.encode() + encoded(line)).hexdigest()[:16]


def _raws(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from its beginning, each with its place."""
    place = 0
    file.seek(0)
    for raw in file:
        yield place, raw
        place += len(raw)


def _entries(descriptor: int) -> Iterator[tuple[int, dict[str, Any], bytes]]:
    """The lines of a partial file, each with its place: its object, empty if it is damaged, and its bytes."""
    with open(os.dup(descriptor), "rb") as file:
        for place, raw in _raws(file):
            yield place, (_parsed(raw) if raw.endswith(b"\n") else None) or {}, raw


def _is_result(entry: Mapping[str, Any]) -> bool:
    """Whether a line of a partial file is a result as it was written."""
    key, line = entry.get("key"), entry.get("line")
    return isinstance(key, str) and isinstance(line, dict) and entry.get("check") == _check(key, line)


def _is_file(file: BinaryIO, known: Any) -> bool:
    """Whether an open file has this device and inode."""
    found = os.fstat(file.fileno())
    return known == [found.st_dev, found.st_ino]


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
