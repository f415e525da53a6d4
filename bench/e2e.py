"""Whole decodes beside the loops that papers publish: the same weights, the same tokens a step, taken in turn.

Every decoder fills `new_tokens` positions, `per_step` of them in a step, with EOS banned. Ours must write the tokens of
the loop that it is compared with, in float32, before it has a time. A batch of `SLOTTED` rows is decoded by a session
of as many slots too.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlm_fast import Session
from dlm_fast.patching import handle_of

from . import batch, batch_report, e2e_report, report
from .decoders import (
    GREEDY,
    LOOPS,
    Instances,
    Published,
    Setting,
    bare_forward,
    bare_token,
    check,
    decode_greedy,
    decode_ours,
    decode_slots,
    differing,
    session_of,
)
from .loops import Task
from .models import Subject
from .timing import Budget, short
from .turns import Clock, Samples, in_turns

CHECKED_LAYERS = 2  # of a random model in 16 bits, which is checked in float32
# The loop that the ratio "vs_recompute" is of: exact, as ours is, and the tokens are the same.
RECOMPUTE = ("block", "recompute")
MIXED_PRESET = "fast-dllm-dual"
NO_MIX: dict[str, float | None] = {
    "together_over_alone": None,
    "computed_over_needed": None,
    "slots_over_static": None,
}
SLOTTED = 8  # slots of a session, and rows of the batch that a session decodes too


@dataclasses.dataclass(frozen=True)
class Measured:
    """A decoder of one model and batch size.

    Attributes:
        kind: "loop", "ours" or "greedy".
        ops: the backend of ours.
        forwards: forwards that each row took part in.
        forward_ms: milliseconds of the decoder's forward alone, as transformers runs it; of ours, that of the loop with
            the same windows.
    """

    model: str
    visibility: str
    rows: int
    candidate: str
    kind: str
    ops: str
    samples: Samples
    tokens: int
    forwards: int
    forward_ms: float | None

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.samples.median if self.samples.seconds else None

    @property
    def ms_per_step(self) -> float | None:
        return 1000 * self.samples.median / self.forwards if self.samples.seconds and self.forwards else None

    def row(self) -> dict[str, Any]:
        """As plain data, without what does not apply."""
        values = {
            "model": self.model,
            "visibility": self.visibility,
            "rows": self.rows,
            "candidate": self.candidate,
            "kind": self.kind,
            "ops": self.ops if self.kind == "ours" else "",
            "status": self.samples.status,
            "reason": self.samples.reason,
            "tokens_per_s": self.tokens_per_s,
            "ms_per_step": self.ms_per_step,
            "forward_ms": self.forward_ms,
            "forwards": self.forwards,
        }
        kept = {name: report.rounded(value) for name, value in values.items() if value not in (None, "")}
        return kept | {"seconds": [report.rounded(value) for value in self.samples.seconds]}


@dataclasses.dataclass(frozen=True)
class Compared:
    """Tokens a second of ours over those of another decoder.

    Attributes:
        cached: whether the other one keeps keys.
        same_tokens: whether the two write the same tokens.
        ratio: None = one of the two has no time.
        slots: whether ours is a session.
    """

    model: str
    visibility: str
    rows: int
    ours: str
    other: str
    cached: bool
    same_tokens: bool
    ratio: float | None
    slots: bool = False

    def row(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": report.rounded(self.ratio)}


class Bout:
    """The decoders of one model at one batch size.

    Attributes:
        ours: the names of ours, each once for all loops that decode the same as one preset.
        slotted: of each name of ours, that of the session which decodes the same; none but for `SLOTTED` rows.
        red: why a decoder has no time.
        forwards: forwards that each row of a decoder took part in, as far as the decoder ran.
    """

    def __init__(self, instances: Instances, setting: Setting, rows: int, wrong: dict[str, str | None]) -> None:
        """`wrong` says beside which loop ours failed its check."""
        self.instances, self.setting, self.rows = instances, setting, rows
        self.subject, self.task = instances.subject, setting.task(instances.subject, rows)
        self.published = LOOPS[self.subject.diffusion.visibility]
        self.ours = tuple(dict.fromkeys(p.ours for p in self.published))
        self.slotted = {name: in_slots(name) for name in self.ours} if rows == SLOTTED else {}
        self.red = {p.ours: wrong[p.name] for p in self.published if wrong[p.name] is not None}
        self.red |= {self.slotted[name]: reason for name, reason in self.red.items() if name in self.slotted}
        self._sessions: dict[str, Session] = {}
        self.forwards: dict[str, int] = dict.fromkeys(GREEDY, setting.new_tokens)
        self._tokens: dict[str, Tensor] = {}

    def calls(self, task: Task) -> dict[str, Callable[[], Tensor]]:
        """What decodes a task, by every decoder that is not red."""
        loops = {p.name: partial(self._loop, p, task) for p in self.published}
        ours = {p.ours: partial(decode_ours, self.instances.ours, task, p, self.forwards) for p in self.published}
        slots = {self.slotted[p.ours]: partial(self._slots, p, task) for p in self.published if self.slotted}
        greedy = {name: partial(decode_greedy, self.instances.greedy, task, cache) for name, cache in GREEDY.items()}
        return {name: call for name, call in (loops | ours | slots | greedy).items() if name not in self.red}

    def _loop(self, published: Published, task: Task) -> Tensor:
        loop = published.make(self.instances.loops, task)
        loop.run()
        self.forwards[published.name] = loop.forwards
        return loop.tokens

    def _slots(self, published: Published, task: Task) -> Tensor:
        """By a session whose buffers serve every call."""
        if published.ours not in self._sessions:
            self._sessions[published.ours] = session_of(self.instances.ours, self.task, published)
        tokens, forwards = decode_slots(self._sessions[published.ours], task)
        self.forwards[self.slotted[published.ours]] = forwards
        return tokens

    def warm_up(self) -> None:
        """Short decodes, before anything is timed."""
        for name, call in self.calls(self.setting.brief(self.task)).items():
            try:
                call()
            except Exception as error:  # it cannot run here; the others go on
                self.red[name] = short(error)

    def wrong(self, name: str, tokens: Tensor) -> str | None:
        """Why what was timed is wrong. Ours must have the loop's tokens, unless 16 bits round them differently."""
        self._tokens[name] = tokens = tokens.cpu()
        if name not in (*self.ours, *self.slotted.values()) or self.subject.dtype != torch.float32:
            return None
        for published in self.published:
            of_loop = self._tokens.get(published.name)
            if (
                name not in (published.ours, self.slotted.get(published.ours))
                or of_loop is None
                or of_loop.equal(tokens)
            ):
                continue
            loop = published.make(self.instances.loops, self.task, watch=True)
            loop.run()
            if (reason := differing(tokens, loop)) is not None:
                return f"beside {published.name}: {reason}"
        return None

    def bare(self, names: Sequence[str], clock: Clock, budget: Budget) -> dict[str, float]:
        """Milliseconds of the forwards alone, of decoders among `names`."""
        found: dict[str, float] = {}
        for published in self.published:
            if published.name in names and budget.left() > 0:
                found[published.name] = bare_forward(self.instances.loops, self.task, published, clock)
                if published.same_windows:
                    same = (published.ours, self.slotted.get(published.ours, published.ours))
                    found |= dict.fromkeys(same, found[published.name])
        if budget.left() > 0:
            found |= dict.fromkeys(GREEDY, bare_token(self.instances.loops, self.task, clock))
        return found

    def measure(self, clock: Clock, budget: Budget, hear: Callable[[str, float], None]) -> list[Measured]:
        """Times every decoder, in turn."""
        self.warm_up()
        found = in_turns(self.calls(self.task), clock, budget, self.setting.turns, check=self.wrong, hear=hear)
        found |= {name: Samples(status="FAILED", reason=reason) for name, reason in self.red.items()}
        bare = self.bare([name for name, samples in found.items() if samples.seconds], clock, budget)
        kinds = {p.name: "loop" for p in self.published}
        kinds |= dict.fromkeys((*self.ours, *self.slotted.values()), "ours")
        return [
            Measured(
                model=self.subject.name,
                visibility=self.subject.diffusion.visibility,
                rows=self.rows,
                candidate=name,
                kind=kind,
                ops=handle_of(self.instances.ours).ops.name,
                samples=found[name],
                tokens=self.rows * self.setting.new_tokens,
                forwards=self.forwards.get(name, 0),
                forward_ms=bare.get(name),
            )
            for name, kind in (kinds | dict.fromkeys(GREEDY, "greedy")).items()
        ]


def in_slots(name: str) -> str:
    """What a session that decodes as ours of this name is called."""
    return f"{name}, {SLOTTED} slots"


def compared(measured: Sequence[Measured]) -> list[Compared]:
    """Ours beside the loops whose tokens it writes, and beside autoregressive decoding, which writes others."""
    first = measured[0]
    speed = {m.candidate: m.tokens_per_s for m in measured}
    published = LOOPS[first.visibility]
    names = tuple(dict.fromkeys(p.ours for p in published))
    pairs = [(p.ours, p.name, p.cached, True, False) for p in published]
    pairs += [(name, other, True, False, False) for name in names for other in GREEDY]
    if in_slots(names[0]) in speed:
        pairs += [(in_slots(p.ours), p.name, p.cached, True, True) for p in published]
    found = []
    for ours, other, cached, same, slots in pairs:
        ratio = speed[ours] / speed[other] if speed[ours] and speed[other] else None
        found.append(Compared(first.model, first.visibility, first.rows, ours, other, cached, same, ratio, slots))
    return found


def ratios(pairs: Sequence[Compared], mixed: dict[str, float | None]) -> dict[str, float | None]:
    """The numbers that the command ends with: the exact cache over recomputing everything, the worst ratio over the
    published cached loops, of a batch and of slots, and what a batch costs. None = not measured."""
    of_loops = [pair for pair in pairs if pair.same_tokens]
    kinds = {
        "recompute": [pair for pair in of_loops if (pair.visibility, pair.other) == RECOMPUTE],
        "cached": [pair for pair in of_loops if pair.cached],
    }
    found: dict[str, float | None] = {}
    for name, chosen in kinds.items():
        for rows, slots in ((1, False), (SLOTTED, False), (SLOTTED, True)):
            values = [pair.ratio for pair in chosen if (pair.rows, pair.slots) == (rows, slots)]
            whole = bool(values) and None not in values
            found[f"tokens_per_s_vs_{name}_b{rows}{'_slots' if slots else ''}"] = (
                report.rounded(min(values)) if whole else None
            )
    return found | {name: report.rounded(value) for name, value in mixed.items()}


class Lines:
    """The rows of a run, each written as it is found, so that a run that is cut off loses nothing."""

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._start = clock, clock()
        self._file = None if path is None else path.open("w", encoding="utf-8", buffering=1)

    def __call__(self, line: str, **values: Any) -> None:
        if self._file is not None:
            message = {"line": line, "at": round(self._clock() - self._start, 2), **values}
            self._file.write(report.dumps(message) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclasses.dataclass(frozen=True)
class Rig:
    """What a run runs on, and how it tells what it finds.

    Attributes:
        subjects: makes the model of a visibility.
        checked: makes the model that ours is checked on, in float32: the same one, or, of a random model of 16 bits,
            one of fewer layers.
        mixed: makes the model of the mix of lengths.
        say: prints a line.
        tell: writes a row.
    """

    subjects: Callable[[str], Subject]
    checked: Callable[[str], Subject]
    mixed: Callable[[], Subject]
    clock: Clock
    budget: Budget
    say: Callable[[str], None]
    tell: Lines


def run(rig: Rig, setting: Setting, facts: dict[str, Any]) -> tuple[dict[str, float | None], bool]:
    """Everything. Returns the ratios, and whether nothing of ours FAILED."""
    rig.tell("run", command="e2e", clock=rig.clock.name, setting=dataclasses.asdict(setting), **facts)
    pairs: list[Compared] = []
    ok = True
    for visibility in setting.visibilities:
        wrong = _check(rig, setting, visibility)
        instances = Instances.of(rig.subjects(visibility), setting.backend)
        for rows in setting.rows:
            if rig.budget.left() <= 0:
                rig.say(f"{instances.subject.name} ({visibility}), B={rows}: SKIPPED, time budget")
                rig.tell("skipped", visibility=visibility, rows=rows)
                continue
            hear = partial(_sample, rig.tell, visibility, rows)
            measured = Bout(instances, setting, rows, wrong[rows]).measure(rig.clock, rig.budget, hear)
            found = compared(measured)
            ok = ok and not any(m.kind == "ours" and m.samples.status == "FAILED" for m in measured)
            pairs += found
            for m in measured:
                rig.tell("row", **m.row())
            for pair in found:
                rig.tell("comparison", **pair.row())
            for line in ["", *e2e_report.table(measured, found)]:
                rig.say(line)
    try:
        mixed = _mixed_lengths(rig, setting)
    except Exception as error:
        rig.say(f"mixed lengths: FAILED: {short(error)}")
        mixed, ok = NO_MIX, False
    found_ratios = ratios(pairs, mixed)
    for line in ["", "where we lose", *(f"    {line}" for line in e2e_report.losses(pairs, mixed))]:
        rig.say(line)
    rig.tell("end", ratios=found_ratios, ok=ok)
    return found_ratios, ok


def _sample(tell: Lines, visibility: str, rows: int, candidate: str, seconds: float) -> None:
    tell("sample", visibility=visibility, rows=rows, candidate=candidate, seconds=report.rounded(seconds))


def _check(rig: Rig, setting: Setting, visibility: str) -> dict[int, dict[str, str | None]]:
    """Checks ours at every batch size: why it is wrong beside each loop."""
    instances, found = Instances.of(rig.checked(visibility), setting.backend), {}
    subject = instances.subject
    what = f"{subject.name} ({visibility}), {subject.model.config.num_hidden_layers} layers, float32"
    for rows in setting.rows:
        found[rows] = check(instances, setting.brief(setting.task(subject, rows)))
        rig.tell("check", model=what, visibility=visibility, rows=rows, wrong=found[rows])
        for name, reason in found[rows].items():
            rig.say(f"{what}, B={rows}, beside {name}: {reason or 'the same tokens'}")
    return found


def _mixed_lengths(rig: Rig, setting: Setting) -> dict[str, float | None]:
    """What one call of requests of mixed lengths costs beside its rows, and what slots are to static batches (see
    `batch`). Raises RuntimeError where ours fails."""
    if not setting.mixed and not setting.slot_mixed:
        return NO_MIX
    if rig.budget.left() <= 0:
        rig.say("mixed lengths: SKIPPED, time budget")
        return NO_MIX
    subject, found = rig.mixed(), dict(NO_MIX)
    decode = batch.Decoder(MIXED_PRESET, subject, subject.ours(setting.backend))
    if setting.mixed:
        requests, cut = batch.mix(subject, setting.mixed, setting.seed)
        found |= batch.together(decode, requests, rig.clock, rig.budget, setting.turns)
        shown = {name: "no time" if value is None else f"{value:.2f}" for name, value in found.items()}
        rig.say(f"\n{MIXED_PRESET} on {subject.name}, {batch.described(requests, cut)}")
        rig.say(f"    one call over its rows one by one: {shown['together_over_alone']}")
        rig.say(f"    positions computed over needed: {shown['computed_over_needed']}")
    if setting.slot_mixed:
        requests, cut = batch.mix(subject, setting.slot_mixed, setting.seed)
        rig.say(f"\n{MIXED_PRESET} on {subject.name}, {batch.described(requests, cut)}")
        slots = batch.Sessions(decode, requests)(SLOTTED)
        row = batch.against_static(decode, slots, requests, rig.clock, rig.budget, setting.turns)
        rig.tell("slots", **row)
        for line in batch_report.slot_lines(row):
            rig.say(line)
        if row["status"] == "FAILED":
            raise RuntimeError(row["reason"])
        found["slots_over_static"] = row.get("slots_over_static")
    return found
