"""Requests of mixed lengths by a session whose slots are refilled, beside static batches of as many rows and beside the
requests one by one: whole decodes of a random model of published shape.

The weights are made so that a random model decodes like a trained one (`models`). In 16 bits a request may get other
tokens in other steps, so that tokens are compared in float32 only, as on a CPU.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from dlm_fast import Ops

from .. import batch, floors, models
from ..shapes import Model, Shapes
from ..slots import SlotDecoder
from ..timing import Candidate
from .run import OURS, Bench, Shape, Work

PRESET = "fast-dllm-dual"
STATIC, ALONE = "static batches", "one by one"
# What all of a row may take: a decode that is not done by then is cancelled, and has no time.
SECONDS = 80.0
BRIEF = 8  # new tokens of the requests that warm up


def shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    """One shape: of the first dense model with full visibility."""
    model = next((m for m in chosen.models if m.family is not None and m.visibility == "full"), None)
    if model is None:
        return
    count, slots, new_tokens = chosen.slots
    label = f"{count} requests, {slots} slots, at most {new_tokens} new tokens"
    facts = {"kind": "slots", "requests": count, "slots": slots, "new_tokens": new_tokens}
    cost = floors.requests(model, [len(r.prompt) + r.new_tokens for r in mixed(None, chosen.slots)])
    build = partial(_work, bench, ops, model, chosen.slots)
    yield Shape("slots", model.name, label, build, cost, facts, seconds=SECONDS)


class _Lengths:
    """A subject as far as the lengths of a mix ask for it."""

    positions, block_length = models.POSITIONS, 32

    def prompt(self, length: int, rng: Any) -> list[int]:
        return [2] * length


def mixed(subject: models.Subject | None, sizes: tuple[int, int, int]) -> list[batch.Request]:
    """The requests; without a subject their lengths alone."""
    count, _, most = sizes
    requests, _ = batch.mix(_Lengths() if subject is None else subject, count, seed=0)
    return [dataclasses.replace(request, new_tokens=min(request.new_tokens, most)) for request in requests]


class Deadline:
    """Is set when a row's time is up; what `generate` takes as `cancel`."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def is_set(self) -> bool:
        return self._clock() > self._end


def _work(bench: Bench, ops: Ops, model: Model, sizes: tuple[int, int, int]) -> Work:
    deadline = Deadline(SECONDS)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    weights = models.random_weights(model, bench.device, dtype, models.SURE)
    subject = models.subject(model, weights, "full")
    requests, slots = mixed(subject, sizes), sizes[1]
    decode = batch.Decoder(PRESET, subject, subject.ours(ops), cancel=deadline)
    session = SlotDecoder(PRESET, subject, decode.model, requests, slots, cancel=deadline)
    brief = [dataclasses.replace(request, new_tokens=min(request.new_tokens, BRIEF)) for request in requests[:slots]]

    def check() -> None:
        outputs = session(brief)
        if dtype == torch.float32:
            _same(outputs, decode(brief, 1))

    def candidate(name: str, call: Callable[[Sequence[batch.Request]], Any]) -> Candidate:
        return Candidate(name, [partial(call, requests)], graph=False, warm=partial(call, brief))

    candidates = [
        candidate(OURS, session),
        candidate(f"{STATIC} of {slots}", partial(_decode, decode, slots)),
        candidate(ALONE, partial(_decode, decode, 1)),
    ]
    cost = floors.requests(model, [request.length for request in requests])
    note = f"{PRESET}, random weights, one run each; the floor computes every position once"
    return Work(candidates, cost, 1, True, note, check, replays=1)


def _decode(decode: batch.Decoder, rows: int, requests: Sequence[batch.Request]) -> Any:
    return decode(requests, rows)


def _same(outputs: Sequence[Any], alone: Sequence[Any]) -> None:
    differing = sum(a != b for a, b in zip(batch.rows_of(outputs), batch.rows_of(alone)))
    if differing:
        raise AssertionError(f"{differing} requests got other tokens, NFE or query tokens in slots than alone")
