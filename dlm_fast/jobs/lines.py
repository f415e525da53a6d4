"""The lines of a job: what each asks for, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import check_depth
from ..limits import heat, shown, whole
from .partial import JobError

# The settings that a line may have of its own, each with the value that holds where neither line nor job has one.
LINE_SETTINGS: dict[str, Any] = {"max_new_tokens": 128, "min_new_tokens": 0, "temperature": 0.0}
LINE_KEYS = ("prompt", "canvas", "id", "meta", *LINE_SETTINGS)
# What a line of the output says itself.
RESULT_KEYS = ("index", "text", "ids", "finish", "nfe", "query_tokens", "tpf", "error")
# How many lines an error names.
NAMED = 20


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

    def repeated(self) -> dict[str, Any]:
        """What the line's result repeats: id, meta, and the keys that a line has beside ours."""
        return {name: value for name, value in self.record.items() if name in ("id", "meta") or name not in LINE_KEYS}

    def setting(self, settings: Mapping[str, Any], name: str) -> Any:
        """A setting of this line: the line's own value, or else the job's."""
        value = settings.get(name)
        return self.record.get(name, LINE_SETTINGS[name] if value is None else value)


def read_lines(path: Path, settings: Mapping[str, Any] | None = None, *, keep_keys: bool = False) -> list[Line]:
    """The lines of a JSON-lines file in UTF-8: {"prompt": text, chat or ids} or {"canvas": ids}. Blank lines are none.

    A line may also have "id" and "meta", which are any JSON and which the line's result repeats. And a line may have
    "max_new_tokens" (beside a prompt), "min_new_tokens" and "temperature", which replace the job's `settings` for that
    line. With `keep_keys` a line may have other keys, which its result repeats.

    What is wrong with one line is the line's `problem`. What is wrong with the file raises JobError, which names the
    file, the line (from 1) and the rule: unknown keys, an id that two lines have, no line, or none that can be decoded.
    """
    name = f"--input {path}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JobError(f"{name} cannot be read: {error}") from error
    # A record ends at \n and nowhere else: JSON may hold characters that `splitlines` takes for the end of a line.
    raws = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = []
    for number, raw in enumerate(raws, 1):
        if raw.strip():
            lines.append(_line(f"line {number}", *_record(raw)))
    return _checked(name, lines, settings or {}, keep_keys)


def lines_of(
    records: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
    *,
    keep_keys: bool = False,
    name: str = "records",
) -> list[Line]:
    """The lines of records that are in no file; the rules are those of `read_lines`."""
    lines = [_line(f"{name}[{index}]", record, _shape_problem(record)) for index, record in enumerate(records)]
    return _checked(name, lines, settings or {}, keep_keys)


def named(lines: Sequence[Line]) -> str:
    """The problems of lines as one text, each with its line."""
    texts = [f"{line.where}: {line.problem}" for line in lines[:NAMED]]
    return "; ".join(texts + [f"and {len(lines) - NAMED} more"] * (len(lines) > NAMED))


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


def _checked(name: str, lines: list[Line], settings: Mapping[str, Any], keep_keys: bool) -> list[Line]:
    """The lines with the problems of their settings. Raises JobError for what concerns the whole file."""
    # 1. Keys: whether they are to be repeated is one decision for all lines.
    unknown = [(line, sorted(set(line.record) - set(LINE_KEYS))) for line in lines if line.problem is None]
    refused = [(line, keys) for line, keys in unknown if keys and not keep_keys]
    if refused:
        known = "prompt or canvas, id, meta (repeated in the result), " + ", ".join(LINE_SETTINGS)
        others = f" (and {len(refused) - 1} lines more)" if len(refused) > 1 else ""
        raise JobError(
            f"{name}, {refused[0][0].where}: unknown keys {refused[0][1]}{others}; a line may have {known}; "
            "--keep-keys repeats others in the results"
        )
    taken = [(line, key) for line, keys in unknown for key in keys if key in RESULT_KEYS]
    if taken:
        raise JobError(f"{name}, {taken[0][0].where}: the key {taken[0][1]!r} is one of the result's own")

    # 2. Ids, by which results are told apart.
    first: dict[str, Line] = {}
    for line in lines:
        if line.record.get("id") is None:
            continue
        before = first.setdefault(json.dumps(line.record["id"], sort_keys=True, default=repr), line)
        if before is not line:
            raise JobError(f"{name}: {before.where} and {line.where} have the same id {line.record['id']!r}")

    # 3. Settings of the lines.
    checked = [
        line if line.problem is not None else dataclasses.replace(line, problem=_setting_problem(line, settings))
        for line in lines
    ]
    if not checked:
        raise JobError(f"{name} has no prompts")
    if all(line.problem is not None for line in checked):
        raise JobError(f"{name} has no line that can be decoded: {named(checked)}")
    return checked


def _setting_problem(line: Line, settings: Mapping[str, Any]) -> str | None:
    """What is wrong with what a line says beside its prompt; None = nothing."""
    record = line.record
    if "canvas" in record and "max_new_tokens" in record:
        return "max_new_tokens goes with a prompt; a canvas says itself where tokens are wanted"
    for name, value in record.items():
        try:
            text = json.dumps({name: value}, ensure_ascii=False, allow_nan=False)
            if name not in ("prompt", "canvas"):  # the tokenizer says what is wrong with a text
                text.encode()
        except (ValueError, TypeError) as error:
            return f"{name} must be JSON that a file in UTF-8 can hold: {error}"
    try:
        check_settings("", record)
    except ValueError as error:
        return str(error).removeprefix(": ")
    max_new, min_new = (line.setting(settings, name) for name in ("max_new_tokens", "min_new_tokens"))
    has_length = "max_new_tokens" in record or "min_new_tokens" in record
    if has_length and "prompt" in record and min_new > max_new:
        return f"min_new_tokens must be at most max_new_tokens, got {min_new} > {max_new}"
    return None
