"""An endless, resumable stream of encoded training samples."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from ..disk import check_output, replacing
from ..limits import number, whole
from ..training.bounds import MAX_SEED, place
from .tasks import TASKS, Sample, generate_sample
from .tokenizer import answer_text, build_tokenizer, prompt_text

TASK_NAMES = tuple(TASKS)


@dataclass(frozen=True)
class Encoded:
    """One sample as token ids.

    Attributes:
        task: index into TASK_NAMES.
        prompt: ids of the prompt, which ends with <sep>.
        answer: ids of the answer, which ends with its only <eos>.
    """

    task: int
    prompt: list[int]
    answer: list[int]


class SampleStream:
    """An endless stream of samples from the training split.

    `state` and `load_state` carry the stream over a restart. The state is text, since checkpoints hold no pickles.

    Args:
        seed: random seed.
        weights: shares of tasks, in place of the tasks' own shares.
        easy: share of easy samples, in tasks that have easy samples.
    """

    def __init__(self, seed: int, weights: dict[str, float] | None = None, *, easy: float = 0.0):
        self._rng = random.Random(f"training samples {seed}")
        shares = {name: task.weight for name, task in TASKS.items()} | (weights or {})
        unknown = sorted(set(shares) - set(TASKS))
        if unknown:
            raise ValueError(f"training: weight must name one of {', '.join(TASKS)}, got {unknown}")
        for name, share in shares.items():
            number("training", f"weight of {name}", share, 0)
        if sum(shares.values()) <= 0:
            raise ValueError(f"training: weights must be at least 0 and not all 0, got {shares}")
        number("training", "easy", easy, 0, 1)
        self._easy = easy
        self._shares = [shares[name] for name in TASK_NAMES]
        self._encode = build_tokenizer().backend_tokenizer.encode

    def next_sample(self) -> Sample:
        """The next sample of the stream, as text."""
        (task,) = self._rng.choices(TASK_NAMES, self._shares)
        return generate_sample(task, self._rng, easy=self._rng.random() < self._easy)

    def next(self) -> Encoded:
        """The next sample of the stream, as token ids."""
        sample = self.next_sample()
        prompt = self._encode(prompt_text(sample.prompt)).ids
        return Encoded(TASK_NAMES.index(sample.task), prompt, self._encode(answer_text(sample.answer)).ids)

    def random(self) -> float:
        """A uniform number in [0, 1) from the stream's own generator, for choices about its samples."""
        return self._rng.random()

    def choice(self, options):
        """One of `options`, drawn from the stream's own generator."""
        return self._rng.choice(options)

    def state(self) -> str:
        """The generator's state as JSON."""
        return json.dumps(self._rng.getstate())

    def load_state(self, text: str) -> None:
        """Continues where the stream stood that returned `text` as its state."""
        version, internal, gauss = json.loads(text)
        self._rng.setstate((version, tuple(internal), gauss))


def _task_weight(text: str) -> tuple[str, float]:
    """Task and weight of TASK=WEIGHT."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be TASK=WEIGHT, got {text!r}")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"WEIGHT must be a number, got {text!r}") from None


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds the option --weight, whose value is a list of (task, weight)."""
    parser.add_argument(
        "--weight",
        dest="weights",
        type=_task_weight,
        action="append",
        default=[],
        metavar="TASK=WEIGHT",
        help="a task's share of samples, instead of its own; may be repeated",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m dlm_fast.training samples`."""
    parser.add_argument("--out", type=Path, required=True, help="file to write: {task, prompt, answer} lines")
    parser.add_argument("--n", type=int, required=True, help="samples")
    parser.add_argument("--seed", type=int, default=0, help="which samples")
    parser.add_argument("--easy", type=float, default=0.0, help="share of easy samples, in tasks that have them")
    add_weights(parser)


def write_samples(path: Path, n: int, *, seed: int, easy: float = 0.0, weights: dict[str, float] | None = None) -> None:
    """Writes the first `n` samples of a stream as JSON lines {task, prompt, answer}."""
    place("samples", "out", path)
    path = Path(path)
    whole("samples", "n", n, 1)
    whole("samples", "seed", seed, 0, MAX_SEED)
    check_output("samples", "out", path)
    stream = SampleStream(seed, weights, easy=easy)
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for _ in range(n):
            file.write(json.dumps(vars(stream.next_sample())) + "\n")


def run(values: argparse.Namespace) -> None:
    """Runs `python -m dlm_fast.training samples`."""
    write_samples(values.out, values.n, seed=values.seed, easy=values.easy, weights=dict(values.weights))
