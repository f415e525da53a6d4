"""Pretrains a tiny full-attention model on a CPU, in about an hour.

The optimizers are Muon and AdamW, at a constant rate that then falls linearly to zero. The block-causal objective comes
first, because a forward makes several times as many predictions with this objective; then the model learns to see the
whole canvas. Both objectives train one network, and only the masks are different.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import disk, fingerprint
from ..limits import flag, number, whole
from ..tiny.data import TASK_NAMES, SampleStream, add_weights
from ..tiny.model import build_model, export
from ..tiny.tasks import TASKS
from ..tiny.tokenizer import build_tokenizer
from . import bounds, checkpoint, runlog
from .export import replace_files
from .objectives import Batch, BlockCausalBatches, FullBatches
from .optimization import CHECKPOINT_NAME, LOG_NAME, SEED_STRIDE, build_optimizers, learning_rate_scale

# The settings that a resumed run may change.
FREE = {"out", "threads", "minutes", "checkpoint_minutes", "log_every", "resume"}
KIND = "pretraining"
# The metadata of a checkpoint of this kind.
FIELDS = {"kind", "settings", "digests", "step", "loss_average", "stream", "batches"}


@dataclass
class Settings:
    """Everything that decides the trained weights, and where the weights go.

    Runs in bf16 and compiled runs round differently, so two runs end with equal weights only if their settings and
    their numbers of threads are equal.

    Attributes:
        out: folder for checkpoint, log and trained model.
        prompt_isolated: whether the prompt does not see the response, in the full-attention objective.
        steps: number of optimizer steps in the schedule.
        block_causal: share of the steps, the first ones, that train the block-causal objective.
        seed: random seed of weights, samples and masks.
        tokens_per_step: positions in a batch.
        muon_lr: peak rate of Muon, which trains the hidden matrices.
        adam_lr: peak rate of AdamW, which trains everything else.
        warmup: steps over which the rate rises.
        decay: share of the steps, the last ones, over which the rate falls linearly to 0.
        bf16: whether forwards run under bf16 autocast.
        compile: whether the model is compiled.
        threads: number of CPU threads.
        minutes: time after which the run stops with a checkpoint, without a change of the schedule; None = never.
        checkpoint_minutes: time between checkpoints.
        log_every: steps between lines of the log.
        resume: whether the run continues from the checkpoint in `out`.
        easy: share of easy samples, in tasks that have easy samples.
        weights: shares of tasks, in place of the tasks' own shares.
    """

    out: Path
    prompt_isolated: bool = False
    steps: int = 8000
    block_causal: float = 0.6
    seed: int = 0
    tokens_per_step: int = 4096
    muon_lr: float = 0.006
    adam_lr: float = 2e-3
    warmup: int = 100
    decay: float = 0.65
    bf16: bool = True
    compile: bool = True
    threads: int = 1
    minutes: float | None = None
    checkpoint_minutes: float = 3.0
    log_every: int = 50
    resume: bool = False
    easy: float = 0.4
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bounds.place("training", "out", self.out)
        self.out = Path(self.out)
        for name in ("steps", "log_every", "warmup"):
            whole("training", name, getattr(self, name), 1)
        whole("training", "threads", self.threads, 1, bounds.MAX_THREADS)
        whole("training", "seed", self.seed, 0, bounds.MAX_SEED)
        # A step has at least one row of the block-causal objective.
        whole("training", "tokens_per_step", self.tokens_per_step, BlockCausalBatches.row_length, bounds.MAX_TOKENS)
        for name in ("muon_lr", "adam_lr"):
            bounds.positive("training", name, getattr(self, name))
        bounds.positive("training", "decay", self.decay, 1)
        for name in ("block_causal", "easy"):
            number("training", name, getattr(self, name), 0, 1)
        number("training", "minutes", self.minutes, 0, none=True)
        number("training", "checkpoint_minutes", self.checkpoint_minutes, 0)
        for name in ("prompt_isolated", "bf16", "compile", "resume"):
            flag("training", name, getattr(self, name))
        if not isinstance(self.weights, dict) or not all(isinstance(name, str) for name in self.weights):
            raise ValueError(f"training: weights must be a share for each task's name, got weights={self.weights!r}")

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run that it continues.

        The other settings say where a run computes, how often the run reports, and when the run stops.
        """
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE}

    @property
    def block_causal_steps(self) -> int:
        """Number of steps of the block-causal objective, which come first."""
        return round(self.block_causal * self.steps)


def token_losses(model: nn.Module, batch: Batch, *, bf16: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted mean loss, the cross-entropy of each token in nats, and whether each most likely token is correct.

    The last two results are [B, L] and detached.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(
            input_ids=batch.tokens,
            position_ids=batch.position_ids,
            # transformers hands a 4-D mask to SDPA untouched, and would mask causally without a mask.
            attention_mask=batch.visible,
            use_cache=False,
        ).logits
    logits = logits.float()
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    cross_entropy = cross_entropy.view_as(batch.weight)
    loss = (cross_entropy * batch.weight).sum() / batch.weight.sum()
    return loss, cross_entropy.detach(), logits.detach().argmax(-1) == batch.targets


class Trainer:
    """One run of a pretraining, with its model, optimizers, data stream and log.

    Raises:
        ValueError: the log or the checkpoint to resume is refused. The message names the file and what is wrong.
        FileExistsError: `out` has a checkpoint, and the run does not resume.
        FileNotFoundError: the run resumes, and `out` has no checkpoint.
    """

    def __init__(self, settings: Settings):
        # 1. Model and optimizers.
        disk.check_folder("training", "out", settings.out)
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.step = 0
        self.loss_average: float | None = None
        # A run may fork into both visibilities, so the model that a resume compares has the visibility of the trunk.
        self.digests = {
            "model": fingerprint.of_model(build_model(seed=settings.seed)),
            "tokenizer": fingerprint.of_tokenizer(build_tokenizer()),
            "tasks": fingerprint.of_json({name: task.weight for name, task in TASKS.items()}),
        }
        self.model = build_model(seed=settings.seed, prompt_isolated=settings.prompt_isolated)
        self.optimizers = build_optimizers(
            self.model.parameters(),
            self.model.model.layers,
            adamw={"lr": settings.adam_lr, "betas": (0.9, 0.98), "weight_decay": 0.0},
            muon={"lr": settings.muon_lr, "weight_decay": 0.05},
        )

        # 2. Data.
        self.stream = SampleStream(settings.seed, settings.weights, easy=settings.easy)
        self.batches = {
            "block-causal": BlockCausalBatches(self.stream, settings.tokens_per_step),
            "full": FullBatches(self.stream, settings.tokens_per_step, prompt_isolated=settings.prompt_isolated),
        }

        # 3. The checkpoint, which a resumed run needs and another run must not have.
        self.checkpoint_path = settings.out / CHECKPOINT_NAME
        if settings.resume:
            self._load()
        elif os.path.lexists(self.checkpoint_path):
            raise FileExistsError(f"training: out must hold no checkpoint unless resuming, got {self.checkpoint_path}")
        else:
            # A run that broke off before its first checkpoint has left lines.
            runlog.rewrite(settings.out / LOG_NAME, runlog.records_until(settings.out / LOG_NAME, 0))

        # 4. The loss, and its sums for the log.
        self._losses: Callable = token_losses
        if settings.compile:
            self._losses = torch.compile(token_losses, dynamic=False)
        self._task_sums = torch.zeros(3, len(TASK_NAMES))

    def save(self) -> None:
        """Writes the checkpoint: weights, optimizers, step and data stream."""
        metadata = {
            "kind": KIND,
            "settings": json.dumps(self.settings.fixed()),
            "digests": json.dumps(self.digests),
            "step": str(self.step),
            "loss_average": json.dumps(self.loss_average),
            "stream": self.stream.state(),
            "batches": json.dumps({name: batches.state() for name, batches in self.batches.items()}),
        }
        checkpoint.save(self.checkpoint_path, self.model.state_dict(), self.optimizers, metadata)

    def _load(self) -> None:
        """Continues from the checkpoint, once all of it is compared with what this run trains, and by what."""
        # 1. Compare.
        settings, log_path = self.settings, self.settings.out / LOG_NAME
        try:
            found = checkpoint.read(self.checkpoint_path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"training: resume needs a checkpoint, got none at {self.checkpoint_path}"
            ) from None
        found.check_kind("training", KIND, FIELDS)
        step = found.whole("step", settings.steps)
        saved, current = found.mapping("settings"), settings.fixed()
        # In the block-causal objective every prompt is isolated, so at the end of that objective a run may fork: one
        # ending has an isolated prompt, and the other has not.
        if step <= settings.block_causal_steps and isinstance(saved.get("prompt_isolated"), bool):
            saved["prompt_isolated"] = current["prompt_isolated"]
        checkpoint.compare("training", saved, current)
        checkpoint.compare("training", found.mapping("digests"), self.digests, what="content of ")
        loss_average = found.number("loss_average") if step else found.value("loss_average")
        if not step and loss_average is not None:
            found.refuse("loss_average", "null before the first step", loss_average)
        stream, batches = found.metadata["stream"], found.mapping("batches")
        _check_stream(found)
        if batches.keys() != self.batches.keys():
            found.refuse("batches", f"of {', '.join(self.batches)}", sorted(batches))
        for name, text in batches.items():
            try:
                self.batches[name].read_state(text)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                found.refuse("batches", f"samples that wait for a batch ({error})", text)
        checkpoint.check(found, self.model.state_dict(), self.optimizers, step)
        records = runlog.records_until(log_path, step)

        # 2. Load.
        runlog.rewrite(log_path, records)
        checkpoint.load(found, self.model.state_dict(), self.optimizers)
        self.step, self.loss_average = step, loss_average
        self.stream.load_state(stream)
        for name, text in batches.items():
            self.batches[name].load_state(text)

    def train_step(self) -> float:
        """Makes one optimizer step; returns the loss of the step."""
        settings = self.settings

        # 1. The batch. The step number seeds the masks, so that a resumed run needs no generator's state.
        generator = torch.Generator().manual_seed(settings.seed * SEED_STRIDE + self.step)
        objective = "block-causal" if self.step < settings.block_causal_steps else "full"
        batch = self.batches[objective].next(generator)

        # 2. Learning rates, gradients, and the optimizer step.
        scale = learning_rate_scale(self.step, steps=settings.steps, warmup=settings.warmup, decay=settings.decay)
        for name, peak in (("muon", settings.muon_lr), ("adamw", settings.adam_lr)):
            for group in self.optimizers[name].param_groups:
                group["lr"] = peak * scale
        loss, cross_entropy, is_correct = self._losses(self.model, batch, bf16=settings.bf16)
        loss.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

        # 3. Counters.
        self._count(batch, cross_entropy, is_correct)
        self.step += 1
        value = loss.item()
        self.loss_average = value if self.loss_average is None else 0.98 * self.loss_average + 0.02 * value
        return value

    def _count(self, batch: Batch, cross_entropy: Tensor, is_correct: Tensor) -> None:
        """Adds the tokens of full weight to the sums of the log.

        The other tokens, which are filler or come far too early, would hide these tokens.
        """
        counted = batch.weight == 1
        task = batch.task[counted]
        for row, values in enumerate((torch.ones_like(cross_entropy), cross_entropy, is_correct.float())):
            self._task_sums[row].index_add_(0, task, values[counted])

    def _log(self, seconds: float) -> None:
        """Appends a line to the log, and starts new sums."""
        count, cross_entropy, correct = self._task_sums / self._task_sums[0].clamp(min=1)
        record = {
            "step": self.step,
            "seconds": round(seconds, 1),
            "loss": round(self.loss_average, 4),
            "cross_entropy": {
                name: round(cross_entropy[i].item(), 4) for i, name in enumerate(TASK_NAMES) if self._task_sums[0, i]
            },
            "accuracy": {
                name: round(correct[i].item(), 4) for i, name in enumerate(TASK_NAMES) if self._task_sums[0, i]
            },
        }
        self._task_sums.zero_()
        runlog.append(self.settings.out / LOG_NAME, record)

    def run(self) -> None:
        """Trains to `steps` or for `minutes` with checkpoints, and exports the model after the last step."""
        # 1. Train.
        settings = self.settings
        settings.out.mkdir(parents=True, exist_ok=True)
        started = last_saved = time.monotonic()
        with tqdm(total=settings.steps, initial=self.step, desc="pretraining", mininterval=5) as progress:
            while self.step < settings.steps:
                self.train_step()
                progress.update()
                now = time.monotonic()
                if self.step % settings.log_every == 0:
                    progress.set_postfix(loss=f"{self.loss_average:.4f}")
                    self._log(now - started)
                if now - last_saved > 60 * settings.checkpoint_minutes:
                    self.save()
                    last_saved = now
                if settings.minutes is not None and now - started > 60 * settings.minutes:
                    break

        # 2. Write the last checkpoint, and the model once it is trained.
        self.save()
        if self.step >= settings.steps:
            replace_files(settings.out, lambda partial: export(self.model, partial))


def _check_stream(found: checkpoint.Checkpoint) -> None:
    """Raises CheckpointError unless a checkpoint has the state of a stream's generator."""
    value = found.value("stream")
    try:
        version, internal, gauss = value
        number("training", "stream", gauss, none=True)
        random.Random().setstate((version, tuple(internal), gauss))
    except (ValueError, TypeError, OverflowError) as error:
        found.refuse("stream", f"the state of a generator ({error})", value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m dlm_fast.training pretrain`."""
    add, default = parser.add_argument, Settings
    add("--out", type=Path, required=True, help="folder for checkpoint, log and trained model")
    add("--prompt-isolated", action="store_true", help="the prompt does not see the response")
    add("--steps", type=int, default=default.steps, help="length of the schedule")
    add(
        "--block-causal",
        type=float,
        default=default.block_causal,
        help="share of steps, the first, that train block-causally",
    )
    add("--seed", type=int, default=default.seed, help="of weights, samples and masks")
    add("--tokens-per-step", type=int, default=default.tokens_per_step, help="positions in one batch")
    add("--muon-lr", type=float, default=default.muon_lr, help="peak rate of hidden matrices")
    add("--adam-lr", type=float, default=default.adam_lr, help="peak rate of all else")
    add("--warmup", type=int, default=default.warmup, help="steps over which the rate rises")
    add("--decay", type=float, default=default.decay, help="share of steps the rate falls over")
    add("--easy", type=float, default=default.easy, help="share of easy samples, in tasks that have them")
    add("--threads", type=int, default=default.threads, help="CPU threads")
    add("--minutes", type=float, help="stop after this long, keeping the schedule; resume later")
    add("--checkpoint-minutes", type=float, default=default.checkpoint_minutes, help="time between checkpoints")
    add("--log-every", type=int, default=default.log_every, help="steps between lines of the log")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--fp32", dest="bf16", action="store_false", help="no bf16 autocast")
    add("--no-compile", dest="compile", action="store_false", help="run eagerly")
    add_weights(parser)


def settings_of(values: argparse.Namespace) -> Settings:
    """The settings of parsed arguments."""
    options = {field.name: getattr(values, field.name) for field in dataclasses.fields(Settings)}
    return Settings(**options | {"weights": dict(values.weights)})


def run(values: argparse.Namespace) -> None:
    """Runs `python -m dlm_fast.training pretrain`."""
    Trainer(settings_of(values)).run()
