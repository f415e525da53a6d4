"""The decoders of `e2e`: published loops, what ours decodes beside each of them, and autoregressive decoding; and
whether ours is right."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

import dlm_fast

from .checks.decode import CLEAR
from .loops import ATTENTION, Committed, Dual, Loop, Prefix, Recompute, Task, UpToBlock, idle
from .models import Subject
from .timing import short
from .turns import Clock

SHORT_BLOCKS = 2  # of the decodes that warm up and check
BARE_SECONDS = 0.3  # for which bare forwards are repeated, at least


@dataclasses.dataclass(frozen=True)
class Published:
    """A published loop, and which preset of ours decodes the same.

    Attributes:
        name: what the tables call it.
        make: makes it of a model and a task; `watch` says whether its gaps are recorded.
        preset, options: ours; a quota of as many tokens a step is added.
        cached: whether the loop keeps keys.
    """

    name: str
    make: Callable[..., Loop]
    preset: str
    options: dict[str, Any]
    cached: bool

    @property
    def ours(self) -> str:
        return f"ours, {self.preset}"

    @property
    def same_windows(self) -> bool:
        """Whether ours computes the same windows: it keeps keys if the loop does."""
        return self.cached == dlm_fast.PRESETS[self.preset].operation.stores


LOOPS = {
    "full": (
        Published("recompute", Recompute, "llada", {}, cached=False),
        Published("prefix cache", Prefix, "fast-dllm-prefix", {"rule": "quota"}, cached=True),
        Published("dual cache", Dual, "fast-dllm-dual", {"rule": "quota"}, cached=True),
    ),
    "block": (
        Published("recompute", partial(Recompute, block_causal=True), "sdar", {}, cached=False),
        Published("recompute to the block", partial(UpToBlock, block_causal=True), "sdar", {}, cached=False),
        Published("block cache", Committed, "sdar", {}, cached=True),
    ),
}  # fmt: skip
GREEDY = {"greedy, dynamic cache": "dynamic", "greedy, static cache": "static"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is decoded.

    Attributes:
        visibilities: of the models, in this order.
        rows: batch sizes.
        prompt, new_tokens, per_step: positions of each prompt, positions to fill, tokens a step.
        turns: how often each decode is timed.
        mixed: requests of mixed lengths that are decoded in one call and one by one; 0 = none.
        backend: of ours.
        slot_mixed: requests of mixed lengths that are decoded in slots and in static batches; 0 = none.
    """

    visibilities: tuple[str, ...]
    rows: tuple[int, ...]
    prompt: int
    new_tokens: int
    per_step: int
    turns: int
    mixed: int
    backend: str
    seed: int = 0
    slot_mixed: int = 0

    def check(self, subject: Subject) -> str | None:
        """Why the subject cannot be decoded so."""
        block = subject.block_length
        if block % self.per_step or self.new_tokens % block:
            return (
                f"--new-tokens must be a multiple of the blocks of {block} of {subject.name}, and those of --per-step, "
                f"got {self.new_tokens} and {self.per_step}"
            )
        if self.prompt + self.new_tokens > subject.positions:
            return (
                f"--prompt and --new-tokens must fit the {subject.positions} positions of {subject.name}, got "
                f"{self.prompt} and {self.new_tokens}"
            )
        return None

    def brief(self, task: Task) -> Task:
        """The first blocks of a task."""
        return dataclasses.replace(task, new_tokens=min(task.new_tokens, SHORT_BLOCKS * task.block_length))

    def task(self, subject: Subject, rows: int) -> Task:
        """The prompts of `rows` rows, of one length each."""
        rng = random.Random(self.seed)
        prompts = [subject.prompt(self.prompt, rng) for _ in range(rows)]
        mask = subject.diffusion.mask_token_id
        return Task(
            prompts=torch.tensor(prompts, device=subject.device),
            new_tokens=self.new_tokens,
            block_length=subject.block_length,
            per_step=self.per_step,
            mask_id=mask,
            banned=(mask, subject.eos),
        )


@dataclasses.dataclass(frozen=True)
class Instances:
    """The instances of a subject over the same parameters.

    Attributes:
        loops: what the published loops run.
        ours: patched.
        greedy: what transformers' own `generate` runs; causal.
    """

    subject: Subject
    loops: nn.Module
    ours: nn.Module
    greedy: nn.Module

    @classmethod
    def of(cls, subject: Subject, backend: str) -> Instances:
        return cls(subject, subject.with_attention(ATTENTION), subject.ours(backend), subject.with_attention("sdpa"))


def decode_ours(model: nn.Module, task: Task, published: Published, steps_run: dict[str, int]) -> Tensor:
    """The canvases [B, L] by our preset. Notes in `steps_run` how many forwards a row took part in."""
    out = dlm_fast.generate(model, task.prompts.cpu(), max_new_tokens=task.new_tokens, **_arguments(task, published))
    steps_run[published.ours] = max(out.nfe)
    return torch.stack(out.canvas)


def session_of(model: nn.Module, task: Task, published: Published) -> dlm_fast.Session:
    """A session of our preset with a slot for each row of a task."""
    rows, prompt = task.prompts.shape
    return dlm_fast.Session(
        model,
        slots=rows,
        max_positions=prompt + task.new_tokens,
        max_new_tokens=task.new_tokens,
        lengths=[(prompt, task.new_tokens)] * rows,
        **_arguments(task, published),
    )


def decode_slots(session: dlm_fast.Session, task: Task) -> tuple[Tensor, int]:
    """The canvases [B, L] by a session, and how many forwards a row took part in."""
    rows = session.generate([{"prompt": p, "max_new_tokens": task.new_tokens} for p in task.prompts.cpu()])
    if wrong := next((row.error for row in rows if row.error is not None), None):
        raise RuntimeError(wrong)
    return torch.stack([row.canvas for row in rows]), max(row.nfe for row in rows)


def _arguments(task: Task, published: Published) -> dict[str, Any]:
    """Our preset with a quota of as many tokens a step as the task's, and its options."""
    preset = dlm_fast.PRESETS[published.preset]
    options = {"block_length": task.block_length} if preset.visibility == "full" else {}
    banned = [i for i in task.banned if i != task.mask_id]
    found = {"preset": preset, "steps_per_block": task.steps, "banned_token_ids": banned}
    return found | options | published.options


def decode_greedy(model: nn.Module, task: Task, cache: str) -> Tensor:
    """transformers' own autoregressive decoding, a token a forward. Nothing is compiled."""
    eos = next(i for i in task.banned if i != task.mask_id)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=task.new_tokens,
        min_new_tokens=task.new_tokens,
        suppress_tokens=[task.mask_id],
        eos_token_id=eos,
        pad_token_id=eos,
        cache_implementation=cache,
        disable_compile=True,
    )
    given = torch.ones_like(task.prompts)
    return model.generate(task.prompts, attention_mask=given, generation_config=config)


def differing(ours: Tensor, loop: Loop) -> str | None:
    """Why the tokens of ours are wrong; None = they are those of the loop.

    A row may differ if the loop, which is watched, decided something in it by a gap that two float32 computations can
    close; half of the rows must be equal.
    """
    differs = (ours.cpu() != loop.tokens.cpu()).sum(1)
    for row, count in enumerate(differs.tolist()):
        if count and float(loop.gap[row]) > CLEAR:
            return f"row {row}: {count} tokens differ from the loop's, which decided nothing by less than {CLEAR:g}"
    if 2 * int((differs > 0).sum()) > len(differs):
        return (
            f"{int((differs > 0).sum())} of {len(differs)} rows differ from the loop's, which nearly tied in each: too "
            "few to compare"
        )
    return None


def check(instances: Instances, task: Task) -> dict[str, str | None]:
    """Why ours is wrong beside each loop, None where ours is right."""
    found: dict[str, str | None] = {}
    for published in LOOPS[instances.subject.diffusion.visibility]:
        try:
            loop = published.make(instances.loops, task, watch=True)
            loop.run()
            found[published.name] = differing(decode_ours(instances.ours, task, published, {}), loop)
        except Exception as error:
            found[published.name] = short(error)
    return found


def bare_ms(run: Callable[[], int], clock: Clock) -> float:
    """Milliseconds of a forward; `run` runs some and returns how many."""
    run()
    seconds, forwards, began = 0.0, 0, time.monotonic()
    while not forwards or time.monotonic() - began < BARE_SECONDS:
        took, count = clock(run)
        seconds, forwards = seconds + took, forwards + count
    return 1000 * seconds / forwards


@torch.no_grad()
def bare_forward(model: nn.Module, task: Task, published: Published, clock: Clock) -> float:
    """Milliseconds of the loop's own forwards and nothing else, in the block in the middle."""
    loop = published.make(model, task)
    start = task.starts[len(task.starts) // 2]
    loop.open(start)

    def run() -> int:
        before = loop.forwards
        loop.block(start, idle)
        if published.make is Committed:
            loop.keys.crop(start)
        return loop.forwards - before

    return bare_ms(run, clock)


@torch.no_grad()
def bare_token(model: nn.Module, task: Task, clock: Clock) -> float:
    """Milliseconds of a forward of one position over the keys before it, in the middle of the response."""
    loop = Committed(model, task)
    place = task.starts[len(task.starts) // 2]
    loop.open(place)
    loop.keys.how = "beside"

    def run() -> int:
        loop.forward(place, place + 1)
        return 1

    return bare_ms(run, clock)
