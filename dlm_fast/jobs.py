"""A file of prompts in, a file of results out: resumable, and never half-written under its final name."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .generate import DecodeError, GenerateOutput, check_greedy, generate
from .limits import heat, whole
from .patching import handle_of
from .presets import resolve

# What a line may say for itself, and what holds where neither it nor the job's settings do.
LINE_SETTINGS: dict[str, Any] = {"max_new_tokens": 128, "min_new_tokens": 0, "temperature": 0.0}
# Of `generate`; whatever else its settings hold is an option of the preset.
ARGUMENTS = frozenset(inspect.signature(generate).parameters)
LINE_KEYS = ("prompt", "canvas", "id", "meta", *LINE_SETTINGS)


class JobError(ValueError):
    """A job that cannot start or go on; the message names the file and the rule."""


def read_prompts(path: Path, settings: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The lines of a prompts.jsonl: {"prompt": text, chat or ids} or {"canvas": ids}.

    Optional keys: "id" and "meta", any JSON, which the line's result repeats; "max_new_tokens" (of a prompt),
    "min_new_tokens" and "temperature", which replace the job's `settings` for that line. Every line is checked for
    them; other keys are refused.
    """
    try:
        lines = path.read_text(encoding="utf-8").split(
            "\n"
        )  # JSON may hold what `splitlines` takes for the end of a line
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"--input {path} cannot be read: {error}") from error
    records = []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise JobError(f"--input {path}, line {place}: not JSON: {error}") from error
        if not isinstance(record, dict) or ("prompt" in record) == ("canvas" in record):
            raise JobError(f"--input {path}, line {place}: must be an object with exactly one of 'prompt' and 'canvas'")
        try:
            _check_line(f"--input {path}, line {place}", record, settings or {})
        except ValueError as error:
            raise JobError(str(error)) from error
        records.append(record)
    if not records:
        raise JobError(f"--input {path} has no prompts")
    return records


def _check_line(where: str, record: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that a line does not have, and for a setting out of range."""
    unknown = sorted(set(record) - set(LINE_KEYS))
    if unknown:
        known = "prompt or canvas, id, meta (repeated in the result), " + ", ".join(LINE_SETTINGS)
        raise ValueError(f"{where}: unknown keys {unknown}; a line may have {known}")
    if "canvas" in record and "max_new_tokens" in record:
        raise ValueError(f"{where}: max_new_tokens goes with a prompt; a canvas says itself where tokens are wanted")
    for name in ("id", "meta"):
        try:
            json.dumps(record.get(name), ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise ValueError(f"{where}: {name} must be JSON that a file in UTF-8 can hold: {error}") from None
    for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0)):
        if name in record:
            whole(where, name, record[name], least)
    if "temperature" in record:
        heat(where, "temperature", record["temperature"])
    most, least = (_of_line(record, settings, name) for name in ("max_new_tokens", "min_new_tokens"))
    says = "max_new_tokens" in record or "min_new_tokens" in record
    if says and "prompt" in record and least > most:
        raise ValueError(f"{where}: min_new_tokens must be at most max_new_tokens, got {least} > {most}")


def _of_line(record: dict[str, Any], settings: Mapping[str, Any], name: str) -> Any:
    """A setting of one line: its own, or the job's."""
    value = settings.get(name)
    return record.get(name, LINE_SETTINGS[name] if value is None else value)


def _check_draws(model: nn.Module, records: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Raises JobError for the first line whose temperature the decoder refuses."""
    options = {name: value for name, value in settings.items() if name not in ARGUMENTS}
    visibility = handle_of(model).diffusion.visibility
    preset = resolve(settings.get("preset"), visibility, options, settings.get("policy"))
    for index, record in enumerate(records):
        try:
            check_greedy(
                preset,
                [_of_line(record, settings, "temperature")],
                settings.get("top_k", 0),
                settings.get("top_p", 1.0),
            )
        except ValueError as error:
            raise JobError(f"the line of index {index}: {error}") from error


def result_lines(output: GenerateOutput, first_index: int, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One plain-data record per row of `output`, in order."""
    for b, record in enumerate(records):
        yield {
            "index": first_index + b,
            **{name: record[name] for name in ("id", "meta") if name in record},
            "text": output.text[b] if output.text is not None else None,
            "ids": output.sequences[b].tolist(),
            "finish": output.finish[b],
            "nfe": output.nfe[b],
            "query_tokens": output.query_tokens[b],
            "tpf": round(output.tpf[b], 6),
        }


def _resume(partial: Path, header: dict[str, Any]) -> int:
    """Number of finished lines in a broken run's partial file, which is cut after its last whole line."""
    kept: list[bytes] = []
    for raw in partial.read_bytes().splitlines(keepends=True):
        if not raw.endswith(b"\n"):
            break
        try:
            json.loads(raw)
        except ValueError:
            break
        kept.append(raw)
    if not kept:
        return -1
    found = json.loads(kept[0])
    if found != header:
        differs = sorted(k for k in {**found, **header} if found.get(k) != header.get(k))
        raise JobError(
            f"{partial} is from a run with other {', '.join(differs)}; use the same settings, or --restart to discard "
            "it"
        )
    with partial.open("r+b") as file:
        file.truncate(sum(map(len, kept)))
    return len(kept) - 1


def run(
    model: nn.Module,
    records: list[dict[str, Any]],
    output: Path,
    *,
    settings: dict[str, Any],
    batch_size: int,
    source: dict[str, Any] | None = None,
    restart: bool = False,
    overwrite: bool = False,
    wrap_prompt: Callable[[Any], Any] = lambda prompt: prompt,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Decodes `records` in batches into `output`, one JSON line per record in order; returns how many were resumed.

    Lines go to `<output>.partial`, synced after every batch, and move to `output` in one rename once all are there: a
    file under its final name is complete. A line depends on the settings and its index only (noise is keyed by the
    index), so a resumed run writes the same file as an unbroken one.

    Args:
        records: as `read_prompts` gives them, a line's own settings included.
        settings: keyword arguments of `generate`. wrap_prompt: applied to each "prompt" (chat templates).
        source: what else the lines depend on (plain data, e.g. the model's path); a run is resumed only with the same.
    Raises:
        JobError: the output exists, a partial file of other settings; or, once the output is complete, rows in it whose
            logits were unusable (finish "error"). OSError: as the disk says.
    """
    partial = output.with_name(output.name + ".partial")
    if output.exists() and not overwrite:
        raise JobError(f"--output {output} exists; use --overwrite to replace it")
    if batch_size < 1:
        raise JobError(f"--batch-size must be at least 1, got {batch_size}")
    digest = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
    header = json.loads(json.dumps({"input": digest, "settings": settings, **(source or {})}))
    _check_draws(model, records, settings)
    done = -1
    if partial.exists() and not restart:
        done = _resume(partial, header)
    resumed = max(done, 0)
    with partial.open("wb" if done < 0 else "ab") as file:

        def write(lines: list[dict[str, Any]]) -> None:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

        if done < 0:
            write([header])
        progress(resumed, len(records))
        start = resumed
        while start < len(records):
            kind = "prompt" if "prompt" in records[start] else "canvas"
            stop = start
            while stop < len(records) and stop < start + batch_size and kind in records[stop]:
                stop += 1
            chunk = records[start:stop]
            given = [wrap_prompt(r[kind]) if kind == "prompt" else r[kind] for r in chunk]
            own = [name for name in LINE_SETTINGS if any(name in record for record in chunk)]
            rows = {name: [_of_line(record, settings, name) for record in chunk] for name in own}
            rows |= {"prompts": given} if kind == "prompt" else {"canvas": given, "max_new_tokens": None}
            try:
                out = generate(model, **{**settings, **rows}, request_ids=range(start, stop))
            except DecodeError as error:
                # The rows beside a failed one are good; its own line says finish "error", and the job ends with one.
                out = error.output
            write(list(result_lines(out, start, chunk)))
            start = stop
            progress(start, len(records))
    finished = output.with_name(output.name + ".finished")
    failed: list[int] = []
    try:
        with partial.open("rb") as source_file, finished.open("wb") as target:
            source_file.readline()
            for line in source_file:
                record = json.loads(line)
                if record["finish"] == "error":
                    failed.append(record["index"])
                target.write(line)
            target.flush()
            os.fsync(target.fileno())
        os.replace(finished, output)
    except BaseException:
        finished.unlink(missing_ok=True)
        raise
    partial.unlink()
    if failed:
        raise JobError(
            f"{output} is complete, but the model's logits must be finite with a token to draw, and were not in rows "
            f"{failed}"
        )
    return resumed
