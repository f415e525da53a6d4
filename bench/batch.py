"""What a batch costs beside its rows: positions computed beside those that the rows need, and one call beside its rows
one by one.

The work is a mix of lengths: prompt and response are log-normal, as those of an evaluation or a rollout are. Every
batch size decodes the same requests, in static batches, and so do slots that are refilled; so what the rows need is the
same, and so are the tokens. EOS is banned, so that each response has its full length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlm_fast import GenerateOutput, generate
from dlm_fast.presets import PRESETS
from dlm_kernels import RowState

from . import batch_report
from .models import Subject
from .quality import LEFT_OUT, NEEDED, write
from .report import rounded
from .slots import SLOTS, STATIC, Decoded, Recorder, SlotDecoder
from .timing import Budget, short
from .turns import Clock, in_turns

MEDIAN, PROMPT_SIGMA, NEW_SIGMA = 120, 0.6, 0.8
SHOWN = (
    "fast-dllm-dual", "fast-dllm-prefix", "freecache", "fast-dllm", "dkv-cache", "d2f", "llada2", "sdar", "llada",
)  # fmt: skip
# Presets that a random model cannot run: those that need another model or trained heads.
UNFIT = (*LEFT_OUT, *NEEDED)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens follow it."""

    number: int
    prompt: list[int]
    new_tokens: int

    @property
    def length(self) -> int:
        return len(self.prompt) + self.new_tokens


def mix(subject: Subject, count: int, seed: int) -> tuple[list[Request], int]:
    """`count` requests of log-normal lengths, and how many of them had to be cut to the model's longest row."""
    lengths, ids = random.Random(seed), random.Random(f"prompts {seed}")

    def draw(sigma: float) -> int:
        return max(1, round(lengths.lognormvariate(math.log(MEDIAN), sigma)))

    requests, cut = [], 0
    for number in range(count):
        wanted = draw(PROMPT_SIGMA), draw(NEW_SIGMA)
        # A canvas may be filled up to a whole block.
        prompt = min(wanted[0], subject.positions // 2)
        new_tokens = min(wanted[1], subject.positions - prompt - subject.block_length)
        cut += (prompt, new_tokens) != wanted
        requests.append(Request(number, subject.prompt(prompt, ids), new_tokens))
    return requests, cut


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A preset on a patched model, for requests in static batches. `cancel` is that of `generate`."""

    preset: str
    subject: Subject
    model: nn.Module
    cancel: Any = None

    def __call__(self, requests: Sequence[Request], rows: int) -> list[GenerateOutput]:
        """Decodes the requests in their order, `rows` a call."""
        return [self.call(requests[start : start + rows]) for start in range(0, len(requests), rows)]

    def call(self, requests: Sequence[Request], on_step: Callable[[RowState], None] | None = None) -> GenerateOutput:
        """Decodes all of the requests together."""
        return generate(
            self.model,
            [request.prompt for request in requests],
            preset=self.preset,
            max_new_tokens=[request.new_tokens for request in requests],
            request_ids=[request.number for request in requests],
            banned_token_ids=[self.subject.eos],
            on_step=on_step,
            cancel=self.cancel,
        )


@dataclasses.dataclass(frozen=True)
class Counts:
    """What all calls of a batch size computed, or one call of a session.

    Attributes:
        rows: rows of a call, or slots.
        computed: positions that were computed, padding and rows that sat out included.
        needed: positions that the rows took part with (`GenerateOutput.query_tokens`).
        forwards: steps that the loop ran.
        nfe: forwards that the rows took part in, added up.
        shapes: shapes of steps, the most of any call.
        differing: requests that got other tokens, forwards or positions than by the first batch size: 0, unless two
            candidates nearly tied.
    """

    rows: int
    computed: int
    needed: int
    forwards: int
    nfe: int
    shapes: int
    differing: int

    @property
    def ratio(self) -> float:
        return self.computed / self.needed


Row = tuple[list[int], int, int]


def rows_of(outputs: Sequence[GenerateOutput | Decoded]) -> list[Row]:
    """Tokens, NFE and query tokens of every request."""
    return [
        (canvas.tolist(), nfe, tokens) for o in outputs for canvas, nfe, tokens in zip(o.canvas, o.nfe, o.query_tokens)
    ]


def counts(outputs: Sequence[GenerateOutput | Decoded], rows: int, first: Sequence[Row]) -> Counts:
    """Adds up what the calls of a batch size say of themselves. `first`: `rows_of` the first batch size."""
    found = rows_of(outputs)
    return Counts(
        rows=rows,
        computed=sum(o.computed_tokens for o in outputs),
        needed=sum(needed for _, _, needed in found),
        forwards=sum(sum(o.shapes.values()) for o in outputs),
        nfe=sum(nfe for _, nfe, _ in found),
        shapes=max(len(o.shapes) for o in outputs),
        differing=sum(a != b for a, b in zip(found, first)),
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """How requests are cut into calls.

    Attributes:
        rows: rows of a call.
        order: "given", or "sorted" by the length of prompt and response together.
    """

    rows: int
    order: str

    @property
    def name(self) -> str:
        return f"{self.rows} a call, {self.order}"


def calls(count: int) -> list[Call]:
    """The ways to decode `count` requests: one by one, in static batches of an eighth, a quarter and a half of them, in
    one call. What is alone or all together has no order."""
    between = [rows for rows in dict.fromkeys((count // 8, count // 4, count // 2)) if rows > 1]
    ways = [Call(rows, order) for rows in between for order in ("given", "sorted")]
    return list(dict.fromkeys([Call(1, "given"), *ways, Call(count, "given")]))


def warm(decode: Decoder, requests: Sequence[Request]) -> None:
    """Decodes one request before anything is timed. A decoder that cannot run says so when it is timed."""
    with contextlib.suppress(Exception):
        decode(requests[:1], 1)


def timed(
    decode: Decoder, requests: Sequence[Request], clock: Clock, budget: Budget, turns: int, ways: Sequence[Call]
) -> list[dict[str, Any]]:
    """A row for each way, taken in turn: seconds, tokens a second, and the time over that of the requests one by
    one."""
    by_length = sorted(requests, key=lambda request: request.length)
    warm(decode, requests)
    orders = {"given": requests, "sorted": by_length}
    work = {way.name: partial(decode, orders[way.order], way.rows) for way in ways}
    found = in_turns(work, clock, budget, turns)
    tokens = sum(request.new_tokens for request in requests)
    alone = next((found[way.name] for way in ways if way.rows == 1), None)
    rows = []
    for way in ways:
        samples = found[way.name]
        row = {"preset": decode.preset, **dataclasses.asdict(way), "status": samples.status, "reason": samples.reason}
        if samples.seconds:
            row["seconds"] = [rounded(seconds) for seconds in samples.seconds]
            row["tokens_per_s"] = rounded(tokens / samples.median)
            if alone is not None and alone.seconds:
                row["over_alone"] = rounded(samples.median / alone.median)
        rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        subjects: the model of each visibility, made when it is asked for.
        presets: decoders, in the order of the tables.
        rows: rows of a call, of the counts; the first is what the others are compared with.
        requests: how many requests are counted, and how many of them are timed; 0 = none.
        slots: numbers of slots, of the counts; the first is timed beside static batches of as many rows.
        slot_requests: how many requests are timed so; 0 = none.
        turns: how often each time is taken.
    """

    subjects: Callable[[str], Subject]
    presets: Sequence[str]
    rows: Sequence[int]
    requests: int
    timed_requests: int
    slots: Sequence[int]
    slot_requests: int
    turns: int
    seed: int
    backend: str


def run(
    work: Work, facts: dict[str, Any], clock: Clock, budget: Budget, say: Callable[[str], None], out: Path | None
) -> dict[str, Any]:
    """Counts and times every preset, and writes batch.json after each one."""
    document: dict[str, Any] = {
        "command": "batch",
        **facts,
        "clock": clock.name,
        "mix": {"median": MEDIAN, "prompt_sigma": PROMPT_SIGMA, "new_sigma": NEW_SIGMA, "seed": work.seed},
        "requests": work.requests,
        "timed_requests": work.timed_requests,
        "slot_requests": work.slot_requests,
        "counts": [],
        "times": [],
        "slots": [],
        "timelines": [],
    }
    for preset in work.presets:
        subject = work.subjects(PRESETS[preset].visibility)
        most = max(work.requests, work.timed_requests, work.slot_requests)
        requests, cut = mix(subject, most, work.seed)
        decode = Decoder(preset, subject, subject.ours(work.backend))
        say(f"{preset} on {subject.name}, {described(requests, cut)}")
        if work.requests:
            say(batch_report.count_header())
        sessions = Sessions(decode, requests)
        for row in counted(decode, requests[: work.requests], work.rows, budget, sessions, work.slots):
            document["counts"].append(row)
            for line in batch_report.count_lines(row):
                say(line)
        if work.timed_requests:
            ways = calls(work.timed_requests)
            times = timed(decode, requests[: work.timed_requests], clock, budget, work.turns, ways)
            document["times"] += times
            for line in batch_report.time_lines(times):
                say(line)
        if work.slot_requests and work.slots:
            _beside_slots(document, sessions, requests[: work.slot_requests], clock, budget, work, say)
        if out is not None:
            write(out / "batch.json", json.dumps(document, indent=1) + "\n")
    return document


class Sessions:
    """The sessions of a preset, one for each number of slots, which all of its measurements share."""

    def __init__(self, decode: Decoder, requests: Sequence[Request]) -> None:
        self.decode, self.requests = decode, requests
        self._made: dict[int, SlotDecoder] = {}

    def __call__(self, slots: int) -> SlotDecoder:
        if slots not in self._made:
            decode = self.decode
            self._made[slots] = SlotDecoder(decode.preset, decode.subject, decode.model, self.requests, slots)
        return self._made[slots]


def _beside_slots(
    document: dict[str, Any],
    sessions: Sessions,
    requests: Sequence[Request],
    clock: Clock,
    budget: Budget,
    work: Work,
    say: Callable[[str], None],
) -> None:
    """Times slots beside static batches of as many rows, and records one run of each."""
    number = work.slots[0]
    try:
        slots = sessions(number)
        row = against_static(sessions.decode, slots, requests, clock, budget, work.turns)
    except Exception as error:  # a session that cannot be made here is a finding, not the end of the run
        name = sessions.decode.preset
        row = {"preset": name, "slots": number, "requests": len(requests), "status": "FAILED", "reason": short(error)}
    document["slots"].append(row)
    for line in batch_report.slot_lines(row):
        say(line)
    if row["status"] == "ok" and budget.left() > 0:
        document["timelines"].append(timeline(sessions.decode, slots, requests))


def described(requests: Sequence[Request], cut: int) -> str:
    """The lengths of the requests, in a few words."""
    prompts, new = [len(r.prompt) for r in requests], [r.new_tokens for r in requests]
    shown = [f"{min(x)} to {max(x)} (median {statistics.median(x):.0f})" for x in (prompts, new)]
    clipped = f", {cut} of them cut to what the model holds" if cut else ""
    return f"{len(requests)} requests: prompts of {shown[0]}, {shown[1]} new tokens{clipped}"


def counted(
    decode: Decoder,
    requests: Sequence[Request],
    rows: Sequence[int],
    budget: Budget,
    sessions: Sessions | None = None,
    slots: Sequence[int] = (),
) -> Iterator[dict[str, Any]]:
    """A row for each batch size, and for each number of slots."""
    first: list[Row] | None = None
    for way, size in [*((STATIC, size) for size in rows), *((SLOTS, size) for size in slots)] if requests else ():
        row: dict[str, Any] = {"preset": decode.preset, "way": way, "rows": size, "status": "ok", "reason": ""}
        if budget.left() <= 0:
            yield row | {"status": "SKIPPED", "reason": "time budget"}
            continue
        try:
            outputs = decode(requests, size) if way == STATIC else sessions(size)(requests)
        except Exception as error:  # a decoder that cannot run here is a finding, not the end of the run
            yield row | {"status": "FAILED", "reason": short(error)}
            continue
        first = rows_of(outputs) if first is None else first
        found = counts(outputs, size, first)
        yield row | dataclasses.asdict(found) | {"ratio": rounded(found.ratio)}


def against_static(
    decode: Decoder,
    slots: SlotDecoder,
    requests: Sequence[Request],
    clock: Clock,
    budget: Budget,
    turns: int,
    hear: Callable[[str, float], None] = lambda name, seconds: None,
) -> dict[str, Any]:
    """The seconds of static batches and of as many slots, taken in turn, and `slots_over_static`: the tokens a second
    of the one over those of the other. In float32 there is no time of slots that give a request other tokens, forwards
    or positions."""
    found: dict[str, list[Row]] = {}
    exact = decode.subject.dtype == torch.float32

    def wrong(name: str, outputs: Sequence[Any]) -> str | None:
        found[name] = rows_of(outputs)
        if name == STATIC or STATIC not in found or not exact:
            return None
        differing = sum(a != b for a, b in zip(found[STATIC], found[name]))
        return f"{differing} requests got other tokens, NFE or query tokens" if differing else None

    warm(decode, requests)
    row: dict[str, Any] = {"preset": decode.preset, "slots": slots.slots, "requests": len(requests)}
    work = {STATIC: partial(decode, requests, slots.slots), SLOTS: partial(slots, requests)}
    try:
        slots(requests[:1])
    except Exception as error:
        return row | {"status": "FAILED", "reason": short(error)}
    samples = in_turns(work, clock, budget, turns, check=wrong, hear=hear)
    worst = next((s for s in samples.values() if s.status != "ok"), samples[SLOTS])
    row |= {"status": worst.status, "reason": worst.reason}
    tokens = sum(request.new_tokens for request in requests)
    for name, taken in samples.items():
        if taken.seconds:
            row[f"{name}_seconds"] = [rounded(seconds) for seconds in taken.seconds]
            row[f"{name}_tokens_per_s"] = rounded(tokens / taken.median)
    if all(taken.seconds for taken in samples.values()):
        row["slots_over_static"] = rounded(samples[STATIC].median / samples[SLOTS].median)
    return row


def timeline(decode: Decoder, slots: SlotDecoder, requests: Sequence[Request]) -> dict[str, Any]:
    """Rows in work and tokens written over time, in static batches and in slots, of one run of each."""
    found: dict[str, Any] = {"preset": decode.preset, "slots": slots.slots, "requests": len(requests)}
    static = Recorder()
    for start in range(0, len(requests), slots.slots):
        decode.call(requests[start : start + slots.slots], on_step=static.call())
    through = Recorder()
    slots(requests, on_step=through)
    points = {STATIC: static.points, SLOTS: through.points}
    return found | {"points": {name: [[rounded(t), rows, n] for t, rows, n in taken] for name, taken in points.items()}}


def together(
    decode: Decoder, requests: Sequence[Request], clock: Clock, budget: Budget, turns: int
) -> dict[str, float | None]:
    """One call over its rows one by one, in time; and the positions that the call computes over those that its rows
    need. None = there was no time. Raises RuntimeError where the decoder fails."""
    sizes, outputs = {"alone": 1, "together": len(requests)}, {}

    def keep(name: str, result: list[GenerateOutput]) -> None:
        outputs[name] = result

    warm(decode, requests)
    work = {name: partial(decode, requests, rows) for name, rows in sizes.items()}
    found = in_turns(work, clock, budget, turns, check=keep)
    if failed := next((samples.reason for samples in found.values() if samples.status == "FAILED"), None):
        raise RuntimeError(failed)
    if not all(samples.seconds for samples in found.values()):
        return {"together_over_alone": None, "computed_over_needed": None}
    return {
        "together_over_alone": found["together"].median / found["alone"].median,
        "computed_over_needed": counts(outputs["together"], len(requests), rows_of(outputs["alone"])).ratio,
    }
