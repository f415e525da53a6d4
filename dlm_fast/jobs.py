"""A file of prompts in, a file of results out: resumable, and never half-written under its final name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from .generate import DecodeError, GenerateOutput, generate


class JobError(ValueError):
    """A job that cannot start or go on; the message names the file and the rule."""


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The lines of a prompts.jsonl: {"prompt": text, chat or ids} or {"canvas": ids}, and an optional "id"."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"--input {path} cannot be read: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise JobError(f"--input {path}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict) or ("prompt" in record) == ("canvas" in record):
            raise JobError(f"--input {path}, line {number}: must be an object with exactly one of 'prompt' and 'canvas'")
        records.append(record)
    if not records:
        raise JobError(f"--input {path} has no prompts")
    return records


def result_lines(output: GenerateOutput, first_index: int, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One plain-data record per row of `output`, in order."""
    for b, record in enumerate(records):
        yield {
            "index": first_index + b,
            **({"id": record["id"]} if "id" in record else {}),
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
        raise JobError(f"{partial} is from a run with other {', '.join(differs)}; use the same settings, or --restart to discard it")
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
            rows = {"prompts": given} if kind == "prompt" else {"canvas": given, "max_new_tokens": None}
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
        raise JobError(f"{output} is complete, but the model's logits must be finite with a token to draw, and were not in rows {failed}")
    return resumed
