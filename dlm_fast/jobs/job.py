"""The run of a job: which lines are there already, and the decode of the others, in slots that stay full."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from .. import fingerprint
from ..call import check_cancel, settled
from ..decoding.progress import StepsCancelled, StepTooLarge
from ..limits import shown
from ..models.parallel import ranks_of
from ..output import Completion, GenerateOutput, stopped
from ..patching import PatchHandle, handle_of
from ..policies.heads import FIELDS, load_head
from ..running import Row, Runner
from ..version import __version__
from .lines import Line, Named, check_settings
from .partial import Found, JobError, Keys, Partial, check_places, partial_path, ranks_left
from .ranks import Ranks
from .rows import OWN_ARGUMENTS, Rows, Sizes

FAILED = "the model's logits were no numbers to draw from, or the decode made no progress"
# Results go to the disk when so many have gathered, or so many seconds have gone by since the last ones went.
GATHERED, SECONDS = 16, 1.0


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
    ranks: Ranks | None = None,
    cancel: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda message: None,
) -> int:
    """Decodes lines into the file `output`; returns how many results came from a broken run.

    The file has one JSON line per line of the job, in order. Until all of them are there, results go to
    `<output>.partial` in the order in which they are finished, and are synced when 16 have gathered or a second has
    gone by; one rename gives the output its name. A result depends only on the line, the line's index, which keys the
    noise, and what the header of the partial file holds: settings, weights, configuration, tokenizer, backend, device
    and versions. A run resumes what a broken run with the same header left, line by line: a line that was changed or
    added since is decoded, and all others are taken as they are.

    All lines are checked before the first forward. One that cannot be decoded has finish "error" and its "error" in
    the output, beside those that can, unless the job is `strict`.

    What is kept of all lines together is about 55 bytes of each, and what is wrong with those that have a problem; a
    line is read again when a slot takes it.

    Args:
        model: as for `generate`. Of a tensor parallel model every rank decodes all lines, and the first one writes.
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
        ranks: the place of this process among those that decode the job together, which have joined; each has the whole
            model, and calls this with the same arguments. Rank r decodes the lines whose index is r modulo their
            number, into a partial file of its own; the first rank writes the output from all of them. Whatever number
            of ranks a broken run had, its results are resumed. Default: this process alone.
        cancel: as for `generate`.
        progress: a function that is called with the number of finished lines and the number of all lines, of this rank.
        warn: a function that is called with what is wrong with some of the lines, before anything is decoded.
    Raises:
        JobError: the output exists; or the partial file is of another run, of another process or no such file; or no
            line can be decoded, or with `strict` one cannot; or the input was changed meanwhile; or another rank has
            ended; or, once the output is complete, some lines have finish "error".
        BatchTooLarge: the longest lines cannot fit the memory together, before anything is decoded.
        DecodeCancelled, DecodeOutOfMemory, DecodeInterrupted: as `generate`; `output` is a list of `Completion`, the
            rows in work. Lines that are finished stay in the partial file.
        OSError: the disk refuses.
    """
    # 1. Check the job, and every line, before anything is written.
    check_places(output, overwrite=overwrite)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise JobError(f"--batch-size must be at least 1, got {batch_size}")
    check_cancel(cancel)
    handle = handle_of(model)
    if handle.max_rows is not None and batch_size > handle.max_rows:
        raise JobError(f"--batch-size must be at most the model's max_rows={handle.max_rows}, got {batch_size}")
    settings = _settings(handle, settings)
    ranks = Ranks() if ranks is None or ranks_of(model) > 1 else ranks
    rows = Rows(model, settings, wrap_prompt)
    keys, problems, sizes = _checked(lines, rows, batch_size, strict, warn)
    header = {**_header(model, handle), "settings": settings, **(source or {})}
    if isinstance(settings.get("head"), str):
        # A head is opened once: it is what the header says, whatever happens to its file.
        head = load_head(settings["head"], device=next(model.parameters()).device)
        header["head"] = fingerprint.of_tensors(
            {**head.state_dict(), **{name: getattr(head, name) for name in FIELDS}}.items()
        )
        rows = Rows(model, {**settings, "head": head}, wrap_prompt)
    header = json.loads(json.dumps(header))
    runner = sizes.open(rows, [rows.read(lines[index], index).opened[0] for index in sizes.longest])

    with contextlib.closing(Found(keys)) as found, contextlib.ExitStack() as held:
        # 2. Find what a broken run left. The first rank holds the job, and all look for results when all hold their
        # files, and decode when all have looked. Under the lock the output is looked for again.
        partial: Partial | None = None
        if ranks_of(model) == 1 or dist.get_rank() == 0:
            partial = _opened(held, output, found, header, ranks, restart=restart, overwrite=overwrite)
        others = [rank for rank in range(ranks.count) if rank != ranks.rank]
        others = sorted({*others, *ranks_left(output)} - {ranks.rank})
        for rank in others if partial is not None else ():
            found.read(partial_path(output, rank))
        ranks.meet()
        done = bytearray(keys[index] is None or index in found for index in range(len(lines)))
        if ranks_of(model) > 1:  # all ranks decode the same lines
            shared = [bytes(done)]
            dist.broadcast_object_list(shared, src=0, device=rows.decoder.device)
            done = bytearray(shared[0])
        resumed, share = found.count, ranks.share(len(lines))
        finished = sum(done[share.start :: share.step])
        progress(finished, len(share))

        # 3. Decode the other lines.
        def line_of(index: int) -> Line:
            line = lines[index]
            if line.problem is not None or _key(index, line) != keys[index]:
                raise JobError(f"{line.where} was changed while the job ran; what was finished is kept")
            return line

        def taken() -> Iterator[Row]:
            for index in share:
                if not done[index]:
                    yield Row(rows.read(line_of(index), index), index)

        def write(results: list[Completion]) -> None:
            nonlocal finished
            if partial is not None:
                partial.append((row.index, _result(row, line_of(row.index))) for row in results)
            finished += len(results)
            progress(finished, len(share))

        _decode(runner, taken(), write, cancel)
        ranks.meet()
        if partial is None or not ranks.leads:
            return resumed

        # 4. All results in order, under the output's name.
        for rank in others:
            found.read(partial_path(output, rank))
        absent = next((index for index in range(len(lines)) if keys[index] is not None and index not in found), None)
        if absent is not None:
            raise JobError(
                f"{lines[absent].where} has no result after all ranks have ended; do all of them see the folder "
                f"{output.absolute().parent}?"
            )
        failed = Named()

        def results_in_order() -> Iterator[dict[str, Any]]:
            for index in range(len(lines)):
                problem = problems.get(index)
                result = found.line(index) if problem is None else _refused(index, lines[index], problem)
                if result["finish"] == "error":
                    failed.add(lines[index], result["error"])
                yield result

        partial.finish(results_in_order(), [partial_path(output, rank) for rank in others], overwrite=overwrite)

    # 5. Say so if a line failed.
    if failed:
        raise JobError(f"{output} is complete, but {failed.count} of {len(lines)} lines have finish 'error': {failed}")
    return resumed


def _opened(
    held: contextlib.ExitStack,
    output: Path,
    found: Found,
    header: Mapping[str, Any],
    ranks: Ranks,
    *,
    restart: bool,
    overwrite: bool,
) -> Partial:
    """The partial file of this rank, held until `held` is closed; no rank writes before the first one has the job."""
    if ranks.leads:
        partial = held.enter_context(Partial(output, found))
        check_places(output, overwrite=overwrite)
        left_over = partial.is_left_over()
        partial.begin(header, restart=restart, left_over=left_over)
        for rank in ranks_left(output):
            with contextlib.closing(Found(found.keys)) as of_rank, Partial(output, of_rank, rank) as other:
                other.begin(header, restart=restart, left_over=left_over)
                if restart or left_over:
                    other.unlink()
    ranks.meet()
    if not ranks.leads:
        partial = held.enter_context(Partial(output, found, ranks.rank))
        partial.begin(header, restart=False)
    ranks.meet()
    return partial


def _decode(runner: Runner, source: Iterable[Row], write: Callable[[list[Completion]], None], cancel: Any) -> None:
    """Decodes rows, and writes each when it is done, some together. Whatever ends this, all that is done is written."""
    gathered: list[Completion] = []
    written = time.monotonic()

    def flush() -> None:
        nonlocal written
        if gathered:
            write(gathered)
            gathered.clear()
        written = time.monotonic()

    runner.cancelled = None if cancel is None else cancel.is_set
    try:
        try:
            for row, _ in runner.run(source):
                gathered.append(row)
                if len(gathered) >= GATHERED or time.monotonic() - written >= SECONDS:
                    flush()
        finally:
            flush()
    except (StepTooLarge, StepsCancelled, KeyboardInterrupt) as error:
        found = [row for row, _ in runner.stopped()]
        gathered += [row for row in found if row.finish != "unfinished"]
        flush()
        rest = [row for row in found if row.finish == "unfinished"]
        raise stopped(error, rest, runner.shapes) from error.__cause__ or error


def _checked(
    lines: Sequence[Line], rows: Rows, batch_size: int, strict: bool, warn: Callable[[str], None]
) -> tuple[Keys, dict[int, str], Sizes]:
    """What tells the lines apart, all problems that `generate` would find, and how long the rows are; no forward is
    made. Raises JobError."""
    keys, problems, bad = Keys(), {}, Named()
    sizes = Sizes(len(lines), batch_size)
    mask_id = rows.decoder.handle.diffusion.mask_token_id
    for index, line in enumerate(lines):
        problem = line.problem
        if problem is None:
            try:
                sizes.add(index, rows.read(line, index), mask_id, line.kind == "canvas")
            except Exception as error:  # also what a tokenizer, a chat template or `wrap_prompt` raises
                problem = rows.problem(line, error)
        keys.append(_key(index, line) if problem is None else None)
        if problem is not None:
            problems[index] = problem
            bad.add(line, problem)
    if bad and (strict or bad.count == len(lines)):
        raise JobError(f"{bad.count} of {len(lines)} lines cannot be decoded: {bad}")
    if bad:
        warn(f"{bad.count} of {len(lines)} lines cannot be decoded and get finish 'error': {bad}")
    return keys, problems, sizes


def result_line(output: GenerateOutput, b: int, index: int, line: Line) -> dict[str, Any]:
    """The result of row `b` as plain data, for the line of this index."""
    text = output.text[b] if output.text is not None else None
    numbers = output.nfe[b], output.query_tokens[b], output.tpf[b]
    return _as_data(index, line, text, output.sequences[b].tolist(), output.finish[b], *numbers)


def _result(row: Completion, line: Line) -> dict[str, Any]:
    """The result of a row as plain data."""
    return _as_data(row.index, line, row.text, row.ids.tolist(), row.finish, row.nfe, row.query_tokens, row.tpf)


def _as_data(
    index: int, line: Line, text: str | None, ids: list[int], finish: str, nfe: int, query_tokens: int, tpf: float
) -> dict[str, Any]:
    result = {
        "index": index,
        **line.repeated(),
        "text": text,
        "ids": ids,
        "finish": finish,
        "nfe": nfe,
        "query_tokens": query_tokens,
        "tpf": round(tpf, 6),
    }
    return {**result, "error": FAILED} if finish == "error" else result


def _refused(index: int, line: Line, problem: str) -> dict[str, Any]:
    """The result of a line that cannot be decoded."""
    repeated = {}
    for name, value in line.repeated().items():
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # the problem of the line, or another one
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            repeated[name] = value
    nothing = {"text": None, "ids": [], "finish": "error", "nfe": 0, "query_tokens": 0, "tpf": 0.0}
    return {"index": index, **repeated, **nothing, "error": problem.encode("utf-8", "backslashreplace").decode()}


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
