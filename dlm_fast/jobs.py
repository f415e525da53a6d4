"""Jobs: from a file of prompts to a file of results.

A job that was interrupted can be resumed, and a file that is not complete never has its final name.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .generate import DecodeError, DecodeOutOfMemory, GenerateOutput, check_greedy, generate, settled
from .limits import heat, whole
from .patching import handle_of
from .presets import resolve

# The settings that a line may have of its own, each with the value that holds where neither line nor job has one.
LINE_SETTINGS: dict[str, Any] = {"max_new_tokens": 128, "min_new_tokens": 0, "temperature": 0.0}
# The arguments of `generate`; every other setting of a job is an option of the preset.
ARGUMENTS = frozenset(inspect.signature(generate).parameters)
LINE_KEYS = ("prompt", "canvas", "id", "meta", *LINE_SETTINGS)


class JobError(ValueError):
    """A job cannot start or go on; the message names the file and the rule."""


def read_prompts(path: Path, settings: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file of prompts: {"prompt": text, chat or ids} or {"canvas": ids}.

    A line may also have "id" and "meta", which are any JSON and which the line's result repeats. And a line may have
    "max_new_tokens" (beside a prompt), "min_new_tokens" and "temperature", which replace the job's `settings` for that
    line. Other keys are refused. Raises JobError, which names the file, the line (from 1) and the rule.
    """
    try:
        # JSON may hold characters that `splitlines` takes for the end of a line.
        lines = path.read_text(encoding="utf-8").split("\n")
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
    """Raises ValueError for a key that no line may have, and for a setting out of range."""
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
    for name, low in (("max_new_tokens", 1), ("min_new_tokens", 0)):
        if name in record:
            whole(where, name, record[name], low)
    if "temperature" in record:
        heat(where, "temperature", record["temperature"])
    max_new, min_new = (_of_line(record, settings, name) for name in ("max_new_tokens", "min_new_tokens"))
    has_length = "max_new_tokens" in record or "min_new_tokens" in record
    if has_length and "prompt" in record and min_new > max_new:
        raise ValueError(f"{where}: min_new_tokens must be at most max_new_tokens, got {min_new} > {max_new}")


def _of_line(record: dict[str, Any], settings: Mapping[str, Any], name: str) -> Any:
    """A setting of one line: the line's own value, or else the job's."""
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
                settings["top_p"],
            )
        except ValueError as error:
            raise JobError(f"the line of index {index}: {error}") from error


def result_lines(output: GenerateOutput, first_index: int, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The results of a batch as plain data, one per row and in order; `first_index` is the index of the first row."""
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
    """The number of finished lines in the partial file of a broken run; -1 if the file has no header.

    The file is cut after its last whole line. Raises JobError if the header names other settings.
    """
    whole_lines: list[bytes] = []
    for raw in partial.read_bytes().splitlines(keepends=True):
        if not raw.endswith(b"\n"):
            break
        try:
            json.loads(raw)
        except ValueError:
            break
        whole_lines.append(raw)
    if not whole_lines:
        return -1
    saved_header = json.loads(whole_lines[0])
    if saved_header != header:
        differences = sorted(k for k in {**saved_header, **header} if saved_header.get(k) != header.get(k))
        raise JobError(
            f"{partial} is from a run with other {', '.join(differences)}; use the same settings, or --restart to "
            "discard it"
        )
    with partial.open("r+b") as file:
        file.truncate(sum(map(len, whole_lines)))
    return len(whole_lines) - 1


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
    """Decodes `records` in batches into the file `output`; returns how many lines came from a broken run.

    The file has one JSON line per record, in order. Lines go to `<output>.partial`, which is synced after every batch,
    and one rename gives the file its final name once all lines are there. A line depends only on the record, the
    settings and the record's index, which keys the noise, so that a resumed run writes the same file as an unbroken
    one.

    Args:
        model: as for `generate`.
        records: lines as `read_prompts` returns them, each with its own settings.
        output: the file to write.
        settings: keyword arguments of `generate`. What they leave to the model is settled first, so that the header
            of the partial file holds what the run was decoded with.
        batch_size: how many records are decoded together.
        source: what else the lines depend on, as plain data (the model's path, for example). A run is resumed only if
            its settings and its source are those of the broken run.
        restart: whether the lines of a broken run are thrown away.
        overwrite: whether an existing output is replaced.
        wrap_prompt: a function that is applied to every "prompt", as a chat template needs.
        progress: a function that is called with the number of finished lines and the number of all lines.
    Raises:
        JobError: the output exists, or the partial file is of other settings; or, once the output is complete, the
            logits of some rows were unusable (finish "error").
        OSError: the disk refuses.
    """
    # 1. Check the job, and find where a broken run stopped.
    partial = output.with_name(output.name + ".partial")
    if output.exists() and not overwrite:
        raise JobError(f"--output {output} exists; use --overwrite to replace it")
    if batch_size < 1:
        raise JobError(f"--batch-size must be at least 1, got {batch_size}")
    settings = settled(handle_of(model), settings)
    digest = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
    header = json.loads(json.dumps({"input": digest, "settings": settings, **(source or {})}))
    _check_draws(model, records, settings)
    finished_lines = -1
    if partial.exists() and not restart:
        finished_lines = _resume(partial, header)
    resumed = max(finished_lines, 0)

    # 2. Decode batch after batch into the partial file. A batch holds prompts only or canvases only.
    with partial.open("wb" if finished_lines < 0 else "ab") as file:

        def write(lines: list[dict[str, Any]]) -> None:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

        if finished_lines < 0:
            write([header])
        progress(resumed, len(records))
        start = resumed
        while start < len(records):
            kind = "prompt" if "prompt" in records[start] else "canvas"
            stop = start
            while stop < len(records) and stop < start + batch_size and kind in records[stop]:
                stop += 1
            chunk = records[start:stop]
            inputs = [wrap_prompt(record[kind]) if kind == "prompt" else record[kind] for record in chunk]
            names = [name for name in LINE_SETTINGS if any(name in record for record in chunk)]
            arguments = {name: [_of_line(record, settings, name) for record in chunk] for name in names}
            arguments |= {"prompts": inputs} if kind == "prompt" else {"canvas": inputs, "max_new_tokens": None}
            of_all = settings
            if kind == "canvas" and any("prompt" in record for record in records):
                # What becomes of a last block is a matter of the job's prompts; a canvas has its own end.
                of_all = {name: value for name, value in settings.items() if name != "last_block"}
            try:
                result = generate(model, **{**of_all, **arguments}, request_ids=range(start, stop))
            except DecodeOutOfMemory:
                raise
            except DecodeError as error:
                # The rows beside a failed row are good. A failed row's line says finish "error", and stage 4 raises.
                result = error.output
            write(list(result_lines(result, start, chunk)))
            start = stop
            progress(start, len(records))

    # 3. Copy all lines but the header to a file that then gets the final name.
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

    # 4. Raise if a row failed.
    if failed:
        raise JobError(
            f"{output} is complete, but the model's logits must be finite with a token to draw, and were not in rows "
            f"{failed}"
        )
    return resumed
