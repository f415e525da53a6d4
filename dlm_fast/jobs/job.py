"""The run of a job: which lines are there already, and the decode of the others, batch after batch."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .. import fingerprint
from ..call import Call, read_call, settled
from ..decoding.memory import open_batch
from ..generate import generate
from ..limits import shown
from ..output import DecodeCancelled, DecodeError, DecodeOutOfMemory, GenerateOutput
from ..patching import PatchHandle, handle_of
from ..policies.heads import FIELDS, load_head
from ..version import __version__
from .lines import LINE_SETTINGS, Line, check_settings, named
from .partial import JobError, Partial, check_places

SIGNATURE = inspect.signature(generate)
# What a job gives `generate` itself, so that no setting may be called like it.
OWN_ARGUMENTS = (
    "model",
    "prompts",
    "canvas",
    "attention_mask",
    "request_ids",
    "batch_size",
    "on_step",
    "cancel",
    "tokenizer",
)
# How many lines are read at a time, and what an error calls the only row.
_READ_TOGETHER = 256
_ROW = re.compile(r"\b(prompts|canvas)\[0\]")
FAILED = "the model's logits were no numbers to draw from, or the decode made no progress"


def run(
    model: nn.Module,
    lines: Sequence[Line],
    output: Path,
    *,
    settings: Mapping[str, Any],
    batch_size: int,
    source: Mapping[str, Any] | None = None,
    strict: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    wrap_prompt: Callable[[Any], Any] = lambda prompt: prompt,
    cancel: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda message: None,
) -> int:
    """Decodes lines in batches into the file `output`; returns how many results came from a broken run.

    The file has one JSON line per line of the job, in order. Until all of them are there, results go to
    `<output>.partial`, which is synced after every batch; one rename gives the output its name. A result depends only
    on the line, the line's index, which keys the noise, and what the header of the partial file holds: settings,
    weights, configuration, tokenizer, backend, device and versions. A run resumes what a broken run with the same
    header left, line by line: a line that was changed or added since is decoded, and all others are taken as they are.

    All lines are checked before the first forward. One that cannot be decoded has finish "error" and its "error" in
    the output, beside those that can, unless the job is `strict`.

    Args:
        model: as for `generate`.
        lines: what `read_lines` or `lines_of` returned.
        output: the file to write.
        settings: keyword arguments of `generate`, as plain data. What they leave to the model is settled first, so that
            the header holds what the run was decoded with.
        batch_size: how many lines are decoded together.
        source: what else the results depend on, as plain data.
        strict: whether a line that cannot be decoded keeps the job from starting.
        restart: whether the results of a broken run are discarded.
        overwrite: whether an existing output is replaced.
        wrap_prompt: a function that is applied to every "prompt", as a chat template needs.
        cancel: as for `generate`.
        progress: a function that is called with the number of finished lines and the number of all lines.
        warn: a function that is called with what is wrong with some of the lines, before anything is decoded.
    Raises:
        JobError: the output exists; or the partial file is of another run, of another process or no such file; or no
            line can be decoded, or with `strict` one cannot; or, once the output is complete, some lines have finish
            "error".
        BatchTooLarge: the largest batch cannot fit the memory, before anything is decoded; or another one, if less is
            free by then.
        DecodeCancelled: `cancel` was set. The batches that are finished stay in the partial file.
        OSError: the disk refuses.
    """
    # 1. Check the job, and every line, before anything is written.
    check_places(output, overwrite=overwrite)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise JobError(f"--batch-size must be at least 1, got {batch_size}")
    handle = handle_of(model)
    if handle.max_rows is not None and batch_size > handle.max_rows:
        raise JobError(f"--batch-size must be at most the model's max_rows={handle.max_rows}, got {batch_size}")
    settings = _settings(handle, settings)
    lines, rows = _checked(model, lines, settings, wrap_prompt)
    bad = [line for line in lines if line.problem is not None]
    if bad and (strict or len(bad) == len(lines)):
        raise JobError(f"{len(bad)} of {len(lines)} lines cannot be decoded: {named(bad)}")
    if bad:
        warn(f"{len(bad)} of {len(lines)} lines cannot be decoded and get finish 'error': {named(bad)}")
    header = {**_header(model, handle), "settings": settings, **(source or {})}
    if isinstance(settings.get("head"), str):
        # A head is opened once: it is what the header says, whatever happens to its file.
        head = load_head(settings["head"], device=next(model.parameters()).device)
        header["head"] = fingerprint.of_tensors(
            {**head.state_dict(), **{name: getattr(head, name) for name in FIELDS}}.items()
        )
        settings = {**settings, "head": head}
    keys = [_key(index, line) for index, line in enumerate(lines)]

    def positions(index: int) -> int:
        line = lines[index]
        return len(rows[index]) + (line.setting(settings, "max_new_tokens") if line.kind == "prompt" else 0)

    with Partial(output) as partial:
        # 2. Find what a broken run left. Under the lock the output is looked for again.
        check_places(output, overwrite=overwrite)
        partial.begin(json.loads(json.dumps(header)), restart=restart)
        done = [line.problem is not None or key in partial.places for line, key in zip(lines, keys)]
        resumed = sum(key in partial.places for line, key in zip(lines, keys) if line.problem is None)
        progress(sum(done), len(lines))

        # 3. Decode the other lines. A batch holds prompts only or canvases only.
        batches = list(_batches(lines, done, batch_size))
        if batches:  # the largest is refused now, or never
            largest = max(batches, key=lambda batch: len(batch) * max(positions(index) for index in batch))
            call = _read(model, _arguments_of(largest, lines, rows, settings))
            open_batch(handle, call.batch.opened, call.preset, handle.diffusion, call.device)
        for batch in batches:
            results = _decode(model, batch, lines, rows, settings, cancel)
            partial.append((keys[index], result) for index, result in zip(batch, results))
            for index in batch:
                done[index] = True
            progress(sum(done), len(lines))

        # 4. All results in order, under the output's name.
        failed: list[Line] = []

        def results_in_order() -> Iterator[dict[str, Any]]:
            failed.clear()
            for index, (line, key) in enumerate(zip(lines, keys)):
                result = _refused(index, line) if line.problem is not None else partial.line(key)
                if result["finish"] == "error":
                    failed.append(dataclasses.replace(line, problem=result["error"]))
                yield result

        partial.finish(results_in_order, overwrite=overwrite)

    # 5. Say so if a line failed.
    if failed:
        raise JobError(
            f"{output} is complete, but {len(failed)} of {len(lines)} lines have finish 'error': {named(failed)}"
        )
    return resumed


def result_line(output: GenerateOutput, b: int, index: int, line: Line) -> dict[str, Any]:
    """The result of row `b` as plain data, for the line of this index."""
    result = {
        "index": index,
        **line.repeated(),
        "text": output.text[b] if output.text is not None else None,
        "ids": output.sequences[b].tolist(),
        "finish": output.finish[b],
        "nfe": output.nfe[b],
        "query_tokens": output.query_tokens[b],
        "tpf": round(output.tpf[b], 6),
    }
    return {**result, "error": FAILED} if output.finish[b] == "error" else result


def _refused(index: int, line: Line) -> dict[str, Any]:
    """The result of a line that cannot be decoded."""
    repeated = {}
    for name, value in line.repeated().items():
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # the problem of the line, or another one
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            repeated[name] = value
    nothing = {"text": None, "ids": [], "finish": "error", "nfe": 0, "query_tokens": 0, "tpf": 0.0}
    problem = str(line.problem).encode("utf-8", "backslashreplace").decode()
    return {"index": index, **repeated, **nothing, "error": problem}


def _settings(handle: PatchHandle, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The job's settings, settled, which must be plain data. Raises JobError."""
    taken = sorted(set(settings) & set(OWN_ARGUMENTS))
    if taken:
        raise JobError(f"settings must leave {', '.join(OWN_ARGUMENTS)} to the job, got {', '.join(taken)}")
    found = settled(handle, settings)
    check_settings("generate", found)
    for name, value in found.items():
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise JobError(
                f"settings must be plain data, by which a resumed run is compared, got {name}={shown(value)}: {error}"
            ) from None
    return found


def _header(model: nn.Module, handle: PatchHandle) -> dict[str, Any]:
    """What results depend on beside lines and settings."""
    packages = ["torch", "transformers", *(["triton"] if handle.ops.name == "triton" else [])]
    return {
        "weights": fingerprint.of_model(model),
        "diffusion": None if handle.diffusion is None else dataclasses.asdict(handle.diffusion),
        "tokenizer": fingerprint.of_tokenizer(handle.tokenizer),
        "backend": handle.ops.name,
        "layers": "of transformers" if handle.unfused else "fused",
        "device": next(model.parameters()).device.type,
        "version": __version__,
        **{f"version of {name}": importlib.metadata.version(name) for name in packages},
    }


def _key(index: int, line: Line) -> str:
    """What tells the result of a line from all others: the line's place and its content."""
    content = json.dumps([index, line.record], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _batches(lines: Sequence[Line], done: Sequence[bool], batch_size: int) -> Iterator[list[int]]:
    """The indices of the lines that are decoded together, in order."""
    batch: list[int] = []
    for index, line in enumerate(lines):
        if done[index]:
            continue
        if batch and (len(batch) == batch_size or lines[batch[0]].kind != line.kind):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _arguments(lines: Sequence[Line], settings: Mapping[str, Any], rows: Sequence[Any]) -> dict[str, Any]:
    """The arguments of `generate` for lines of one kind, whose prompts or canvases are `rows`."""
    own = [name for name in LINE_SETTINGS if any(name in line.record for line in lines)]
    arguments = {**settings, **{name: [line.setting(settings, name) for line in lines] for name in own}}
    if lines[0].kind == "prompt":
        return {**arguments, "prompts": rows}
    # What becomes of a last block is a matter of the job's prompts; a canvas has its own end.
    arguments.pop("last_block", None)
    return {**arguments, "canvas": rows, "max_new_tokens": None}


def _arguments_of(
    batch: list[int], lines: Sequence[Line], rows: Sequence[Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of `generate` for the lines of a batch."""
    arguments = _arguments([lines[index] for index in batch], settings, [rows[index] for index in batch])
    return {**arguments, "request_ids": batch}


def _decode(
    model: nn.Module,
    batch: list[int],
    lines: Sequence[Line],
    rows: Sequence[Any],
    settings: Mapping[str, Any],
    cancel: Any,
) -> list[dict[str, Any]]:
    """The results of a batch, in its order."""
    try:
        output = generate(model, **_arguments_of(batch, lines, rows, settings), cancel=cancel)
    except (DecodeOutOfMemory, DecodeCancelled):
        raise
    except DecodeError as error:
        # The rows beside a failed row are good. A failed row's line says finish "error".
        output = error.output
    return [result_line(output, b, index, lines[index]) for b, index in enumerate(batch)]


def _checked(
    model: nn.Module, lines: Sequence[Line], settings: Mapping[str, Any], wrap_prompt: Callable[[Any], Any]
) -> tuple[list[Line], list[Any]]:
    """The lines with all problems that `generate` would find, and their token ids; no forward is made.

    Many lines are read at a time, and one by one only where one of them has a problem.
    """
    checked, rows = list(lines), [None] * len(lines)

    def read(indices: list[int]) -> None:
        inputs = [lines[index].record[lines[index].kind] for index in indices]
        if lines[indices[0]].kind == "prompt":
            inputs = [wrap_prompt(prompt) for prompt in inputs]
        arguments = _arguments([lines[index] for index in indices], settings, inputs)
        batch = _read(model, arguments).batch
        for index, canvas, length in zip(indices, batch.canvases, batch.prompt_lengths):
            ids = canvas[:length] if lines[index].kind == "prompt" else canvas
            rows[index] = ids.numpy().astype(np.int32)  # of many lines, so that they are kept small

    _read(model, {**settings, "prompts": []})  # what is wrong with the settings is no line's problem

    for batch in _batches(lines, [line.problem is not None for line in lines], _READ_TOGETHER):
        try:
            read(batch)
        except Exception:  # also what a tokenizer, a chat template or `wrap_prompt` raises
            for index in batch:
                try:
                    read([index])
                except Exception as error:
                    problem = _ROW.sub(lines[index].kind, str(error)).removeprefix("generate: ")
                    if not isinstance(error, (ValueError, TypeError)):
                        problem = f"{type(error).__name__}: {problem}"
                    checked[index] = dataclasses.replace(lines[index], problem=problem)
    return checked, rows


def _read(model: nn.Module, arguments: Mapping[str, Any]) -> Call:
    """A call of `generate` with these arguments, which is not made."""
    bound = SIGNATURE.bind(model, **arguments)
    bound.apply_defaults()
    values = {name: value for name, value in bound.arguments.items() if name not in ("on_step", "cancel", "batch_size")}
    options = values.pop("options")
    return read_call(**values, **options)
