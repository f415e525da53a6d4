"""An endless, resumable stream of encoded training samples."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from dlm_fast.tasks import TASKS, generate_sample
from dlm_fast.training.tokenizer import answer_text, build_tokenizer, prompt_text

TASK_NAMES = tuple(TASKS)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sample: `prompt` ends with <sep>, `answer` with its only <eos>."""

    task: int  # index into TASK_NAMES
    prompt: list[int]
    answer: list[int]


class SampleStream:
    """Fresh train-split samples, tasks drawn with the given weights, an `easy` share of them easy.

    `state()` and `load_state()` carry the stream over a restart: text, since checkpoints hold no pickles.
    """

    def __init__(self, seed: int, weights: dict[str, float] | None = None, *, easy: float = 0.0):
        self._rng = random.Random(f"training samples {seed}")
        shares = {name: task.weight for name, task in TASKS.items()} | (weights or {})
        unknown = sorted(set(shares) - set(TASKS))
        if unknown:
            raise ValueError(f"training: weight must name one of {', '.join(TASKS)}, got {unknown}")
        if min(shares.values()) < 0 or sum(shares.values()) <= 0:
            raise ValueError(f"training: weights must be at least 0 and not all 0, got {shares}")
        if not 0 <= easy <= 1:
            raise ValueError(f"training: easy must be in [0, 1], got easy={easy}")
        self._easy = easy
        self._shares = [shares[name] for name in TASK_NAMES]
        self._encode = build_tokenizer().backend_tokenizer.encode

    def next(self) -> Encoded:
        """The next sample of the stream."""
        (task,) = self._rng.choices(range(len(TASK_NAMES)), self._shares)
        sample = generate_sample(TASK_NAMES[task], self._rng, easy=self._rng.random() < self._easy)
        prompt = self._encode(prompt_text(sample.prompt)).ids
        return Encoded(task, prompt, self._encode(answer_text(sample.answer)).ids)

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
        """Continues where the stream that gave `text` stood."""
        version, internal, gauss = json.loads(text)
        self._rng.setstate((version, tuple(internal), gauss))
