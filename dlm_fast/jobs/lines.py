"""The lines of a job: what each asks for, and what is wrong with it."""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from os import fstat
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from ..files import check_depth
from ..limits import MAX_STOP_STRING_LENGTH, MAX_STOP_STRINGS, heat, shown, whole
from .partial import JobError

# The settings that a line may have of its own, each with the value that holds where neither line nor job has one.
LINE_SETTINGS: dict[str, Any] = {"max_new_tokens": 128, "min_new_tokens": 0, "temperature": 0.0, "seed": 0}
LINE_KEYS = ("prompt", "canvas", "id", "meta", "system", "stop", *LINE_SETTINGS)
# What a line of the output says itself.
RESULT_KEYS = ("index", "text", "ids", "finish", "nfe", "query_tokens", "tpf", "error")
# How many lines an error names.
NAMED = 20
MARK = b"\xef\xbb\xbf"  # of the order of bytes, which editors write at the beginning of a file


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a job.

    Attributes:
        where: what an error calls the line, as "line 7".
        record: the line's object; empty where there is none.
        problem: why the line cannot be decoded; None = nothing is known against it.
    """

    where: str
    record: Mapping[str, Any]
    problem: str | None = None

    @property
    def kind(self) -> str:
        return "prompt" if "prompt" in self.record else "canvas"

    @property
    def stop(self) -> Sequence[str] | None:
        """The line's own stop strings; None = those of the job."""
        stop = self.record.get("stop")
        return [stop] if isinstance(stop, str) else stop

    def repeated(self) -> dict[str, Any]:
        """What the line's result repeats: id, meta, and the keys that a line has beside ours."""
        return {name: value for name, value in self.record.items() if name in ("id", "meta") or name not in LINE_KEYS}

    def setting(self, settings: Mapping[str, Any], name: str) -> Any:
        """A setting of this line: the line's own value, or else the job's."""
        value = settings.get(name)
        return self.record.get(name, LINE_SETTINGS[name] if value is None else value)


class Source(Protocol):
    """What lines are read from, any of them at any time."""

    def __len__(self) -> int: ...

    def line(self, index: int) -> Line: ...


class Lines(Sequence[Line]):
    """The lines of a job, each of which is read when it is asked for: what is kept of one is its place.

    Attributes:
        problems: what is wrong with lines, by their index.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.problems: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}, got {index}")
        index %= len(self)
        line = self._source.line(index)
        return dataclasses.replace(line, problem=self.problems.get(index, line.problem))


class _Records:
    """Records that are in no file."""

    def __init__(self, records: Sequence[Mapping[str, Any]], name: str) -> None:
        self._records, self._name = records, name

    def __len__(self) -> int:
        return len(self._records)

    def line(self, index: int) -> Line:
        record = self._records[index]
        return _line(f"{self._name}[{index}]", record, _shape_problem(record))


class _File:
    """The lines of an open file, by their places."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name, self._file = name, file
        self._places, self._numbers = array.array("q"), array.array("q")
        place = 0
        try:
            # A record ends at \n and nowhere else: JSON may hold characters that others take for the end of a line.
            for number, raw in enumerate(file, 1):
                start, place = place, place + len(raw)
                skipped = len(MARK) if number == 1 and raw.startswith(MARK) else 0
                if raw[skipped:].strip():
                    self._places.append(start + skipped)
                    self._numbers.append(number)
        except OSError as error:
            raise JobError(f"{name} cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self._places)

    def line(self, index: int) -> Line:
        try:
            self._file.seek(self._places[index])
            raw = self._file.readline().removesuffix(b"\n")
        except OSError as error:
            raise JobError(f"{self._name} cannot be read: {error}") from error
        return _line(f"line {self._numbers[index]}", *_record(raw))


def read_lines(path: Path, settings: Mapping[str, Any] | None = None, *, keep_keys: bool = False) -> Lines:
    """The lines of a JSON-lines file in UTF-8: {"prompt": text, chat or ids} or {"canvas": ids}. Blank lines are none.

    A line may also have "id" and "meta", which are any JSON and which the line's result repeats. And a line may have
    "max_new_tokens" (beside a prompt), "min_new_tokens", "temperature", "seed" and "stop" (a string or a list of
    strings), which replace the job's `settings` for that line, and "system", a text that goes before its prompt as a
    system message. With `keep_keys` a line may have other keys, which its result repeats.

    What is wrong with one line is the line's `problem`. What is wrong with the file raises JobError, which names the
    file, the line (from 1) and the rule: unknown keys, an id that two lines have, no line, or none that can be decoded.

    The file stays open, and a line is read again when it is decoded. What can be read only once, such as a pipe, is
    copied to a file without a name first.
    """
    name = f"--input {path}"
    try:
        file: BinaryIO = open(path, "rb")
        if not stat.S_ISREG(fstat(file.fileno()).st_mode):
            with file as pipe:
                file = tempfile.TemporaryFile()
                shutil.copyfileobj(pipe, file)
            file.seek(0)
    except OSError as error:
        raise JobError(f"{name} cannot be read: {error}") from error
    return _checked(name, Lines(_File(name, file)), settings or {}, keep_keys)


def lines_of(
    records: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
    *,
    keep_keys: bool = False,
    name: str = "records",
) -> Lines:
    """The lines of records that are in no file; the rules are those of `read_lines`."""
    return _checked(name, Lines(_Records(records, name)), settings or {}, keep_keys)


class Named:
    """The problems of lines as one text, each with its line; of many, the first are named."""

    def __init__(self) -> None:
        self.count = 0
        self._texts: list[str] = []

    def add(self, line: Line, problem: str | None) -> None:
        self.count += 1
        if self.count <= NAMED:
            self._texts.append(f"{line.where}: {problem}")

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        return "; ".join(self._texts + [f"and {self.count - NAMED} more"] * (self.count > NAMED))


def check_settings(owner: str, settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting out of range, of those that a line may have."""
    for name, low in (("max_new_tokens", 1), ("min_new_tokens", 0)):
        if name in settings:
            whole(owner, name, settings[name], low)
    if "temperature" in settings:
        heat(owner, "temperature", settings["temperature"])


def _line(where: str, record: Any, problem: str | None) -> Line:
    """A line; of one that is no request at all, what its result can repeat is all that counts."""
    if problem is not None:
        record = {name: record[name] for name in ("id", "meta") if isinstance(record, Mapping) and name in record}
    return Line(where, record, problem)


def _record(raw: bytes) -> tuple[Any, str | None]:
    """The object of a line, and what is wrong with it."""
    try:
        record = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON in UTF-8: {error}"
    return record, _shape_problem(record)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _shape_problem(record: Any) -> str | None:
    if not isinstance(record, Mapping) or ("prompt" in record) == ("canvas" in record):
        return "must be an object with exactly one of 'prompt' and 'canvas'"
    try:
        check_depth(record)
    except ValueError as error:
        return str(error)
    kind = "prompt" if "prompt" in record else "canvas"
    if isinstance(record[kind], Mapping) and "role" in record[kind]:
        return f"{kind} must be text, a chat or token ids, got one message of a chat, which is a list of them"
    if record[kind] is None or isinstance(record[kind], (bool, int, float)):
        return f"{kind} must be text, a chat or token ids, got {shown(record[kind])}"
    return None


def _checked(name: str, lines: Lines, settings: Mapping[str, Any], keep_keys: bool) -> Lines:
    """The lines with the problems of their settings. Raises JobError for what concerns the whole file."""
    # 1. Every line once. Of their ids the hashes are kept, which are few bytes.
    refused: tuple[Line, list[str]] | None = None
    taken: tuple[Line, str] | None = None
    others, ids, bad = -1, array.array("Q"), Named()
    for index, line in enumerate(lines):
        ids.append(_hash(_id(line)))
        problem = line.problem
        if problem is None:
            # Whether keys are to be repeated is one decision for all lines.
            unknown = sorted(set(line.record) - set(LINE_KEYS))
            if unknown and not keep_keys:
                refused, others = refused or (line, unknown), others + 1
            taken = taken or next(((line, key) for key in unknown if key in RESULT_KEYS), None)
            problem = _setting_problem(line, settings)
        if problem is not None:
            lines.problems[index] = problem
            bad.add(line, problem)

    # 2. What is wrong with all of them.
    if refused is not None:
        known = "prompt or canvas, id, meta (repeated in the result), system, stop, " + ", ".join(LINE_SETTINGS)
        more = f" (and {others} lines more)" if others else ""
        raise JobError(
            f"{name}, {refused[0].where}: unknown keys {refused[1]}{more}; a line may have {known}; "
            "--keep-keys repeats others in the results"
        )
    if taken is not None:
        raise JobError(f"{name}, {taken[0].where}: the key {taken[1]!r} is one of the result's own")
    for first, second in _of_one_hash(ids):
        before, line = lines[first], lines[second]
        if _id(before) == _id(line):
            raise JobError(f"{name}: {before.where} and {line.where} have the same id {line.record['id']!r}")
    if not lines:
        raise JobError(f"{name} has no prompts")
    if bad.count == len(lines):
        raise JobError(f"{name} has no line that can be decoded: {bad}")
    return lines


def _id(line: Line) -> str | None:
    """The id of a line as text, by which results are told apart."""
    value = line.record.get("id")
    try:
        return None if value is None else json.dumps(value, sort_keys=True, default=repr)
    except (TypeError, ValueError, RecursionError):  # the problem of the line
        return None


def _hash(text: str | None) -> int:
    """A number of 64 bits for a text; 0 for none."""
    if text is None:
        return 0
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def _of_one_hash(hashes: array.array) -> Iterator[tuple[int, int]]:
    """Pairs of places of one hash other than 0, the first that repeats another one first."""
    values = np.frombuffer(hashes, dtype=np.uint64) if hashes else np.zeros(0, np.uint64)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    repeats = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)) + 1
    for place in sorted(repeats.tolist(), key=lambda place: order[place]):
        first = int(np.searchsorted(ordered, ordered[place]))
        for before in range(first, place):
            yield int(order[before]), int(order[place])


def _setting_problem(line: Line, settings: Mapping[str, Any]) -> str | None:
    """What is wrong with what a line says beside its prompt; None = nothing."""
    record = line.record
    for name, use in (("max_new_tokens", "says itself where tokens are wanted"), ("system", "has no beginning")):
        if "canvas" in record and name in record:
            return f"{name} goes with a prompt; a canvas {use}"
    for name, value in record.items():
        try:
            text = json.dumps({name: value}, ensure_ascii=False, allow_nan=False)
            if name not in ("prompt", "canvas"):  # the tokenizer says what is wrong with a text
                text.encode()
        except (ValueError, TypeError) as error:
            return f"{name} must be JSON that a file in UTF-8 can hold: {error}"
    try:
        check_settings("", record)
        if "seed" in record:
            whole("", "seed", record["seed"], 0, 2**63 - 1)
    except ValueError as error:
        return str(error).removeprefix(": ")
    max_new, min_new = (line.setting(settings, name) for name in ("max_new_tokens", "min_new_tokens"))
    has_length = "max_new_tokens" in record or "min_new_tokens" in record
    if has_length and "prompt" in record and min_new > max_new:
        return f"min_new_tokens must be at most max_new_tokens, got {min_new} > {max_new}"
    if "system" in record and not isinstance(record["system"], str):
        return f"system must be a text, got system={shown(record['system'])}"
    return _stop_problem(record["stop"]) if "stop" in record else None


def _stop_problem(stop: Any) -> str | None:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(string, str) and string for string in strings):
        return f"stop must be a non-empty string or a list of them, got stop={shown(stop)}"
    longest = max(map(len, strings), default=0)
    if len(strings) > MAX_STOP_STRINGS or longest > MAX_STOP_STRING_LENGTH:
        return (
            f"stop must be at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_STRING_LENGTH} characters, got "
            f"{len(strings)} of up to {longest}"
        )
    return None
