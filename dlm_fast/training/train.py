"""Trains one tiny model on a CPU in about an hour: Muon and AdamW, constant rate then linear to zero."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from dlm_fast.training import checkpoint
from dlm_fast.training.data import TASK_NAMES, SampleStream
from dlm_fast.training.model import KINDS, build_model, export, full_from_block_causal
from dlm_fast.training.objectives import Batch, BlockCausalBatches, FullBatches

CHECKPOINT_NAME = "checkpoint.safetensors"
LOG_NAME = "log.jsonl"


@dataclass
class Settings:
    """Everything that decides the trained weights, and where they go.

    The learning rate is constant after `warmup` steps, then falls linearly to 0 over the last `decay` share
    of `steps`; changing `steps` on resume therefore costs nothing before the fall has begun. `minutes`
    stops a run early with a checkpoint and leaves the schedule alone. The bf16 and compiled variants round
    differently, so a run is reproducible only with the same settings and thread count.
    """

    model: str
    out: Path
    steps: int = 6000
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
    init: Path | None = None
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model not in KINDS:
            raise ValueError(f"training: model must be one of {', '.join(KINDS)}, got model={self.model!r}")
        for name in ("steps", "threads", "log_every", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"training: {name} must be positive, got {name}={getattr(self, name)}")
        if self.tokens_per_step < 256:
            raise ValueError(
                f"training: tokens_per_step must be at least one row of 256, got tokens_per_step={self.tokens_per_step}"
            )
        if not 0 < self.decay <= 1:
            raise ValueError(f"training: decay must be in (0, 1], got decay={self.decay}")


def learning_rate_scale(step: int, *, steps: int, warmup: int, decay: float) -> float:
    """The share of the peak rate that step number `step` (from 0) trains with."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def build_optimizers(model: nn.Module, settings: Settings) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices between the layers, AdamW for embedding, head and norms."""
    hidden = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    hidden_ids = {id(parameter) for parameter in hidden}
    others = [parameter for parameter in model.parameters() if id(parameter) not in hidden_ids]
    return {
        "muon": torch.optim.Muon(hidden, lr=settings.muon_lr, weight_decay=0.05, momentum=0.95),
        "adamw": torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    }


def token_losses(model: nn.Module, batch: Batch, *, bf16: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted mean loss, and per token the cross-entropy (nats) and whether the top token is right.

    Both per-token results are [B, L] and detached.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(
            input_ids=batch.tokens,
            position_ids=batch.position_ids,
            # transformers hands a 4-D mask to SDPA untouched; with none, it would mask causally.
            attention_mask=batch.visible,
            use_cache=False,
        ).logits
    logits = logits.float()
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    cross_entropy = cross_entropy.view_as(batch.weight)
    loss = (cross_entropy * batch.weight).sum() / batch.weight.sum()
    return loss, cross_entropy.detach(), logits.detach().argmax(-1) == batch.targets


class Trainer:
    """One run: model, optimizers, data stream and log."""

    def __init__(self, settings: Settings):
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.step = 0
        self.loss_average: float | None = None
        self.model = self._first_model()
        self.optimizers = build_optimizers(self.model, settings)
        self.stream = SampleStream(settings.seed, settings.weights, easy=settings.easy)
        batches = FullBatches if settings.model == "full" else BlockCausalBatches
        self.batches = batches(self.stream, settings.tokens_per_step)
        self.checkpoint_path = settings.out / CHECKPOINT_NAME
        if settings.resume:
            self._load()
        elif self.checkpoint_path.exists():
            raise FileExistsError(f"training: out must hold no checkpoint unless resuming, got {self.checkpoint_path}")
        self._losses: Callable = token_losses
        if settings.compile:
            self._losses = torch.compile(token_losses, dynamic=False)
        self._task_sums = torch.zeros(3, len(TASK_NAMES))

    def _first_model(self) -> PreTrainedModel:
        settings = self.settings
        if settings.init is None or settings.resume:
            return build_model(settings.model, seed=settings.seed)
        if settings.model != "full":
            raise ValueError(f"training: init must start a full model from a block-causal one, got model={settings.model!r}")
        source = build_model("block-causal", seed=settings.seed)
        checkpoint.load(settings.init / CHECKPOINT_NAME, source, {})
        batch = BlockCausalBatches(SampleStream(settings.seed), settings.tokens_per_step).next(torch.Generator().manual_seed(0))
        return full_from_block_causal(source, batch)

    def save(self) -> None:
        """Writes the checkpoint: weights, optimizers, step and data stream."""
        metadata = {
            "model": self.settings.model,
            "seed": str(self.settings.seed),
            "step": str(self.step),
            "loss_average": json.dumps(self.loss_average),
            "stream": self.stream.state(),
            "batches": self.batches.state(),
        }
        checkpoint.save(self.checkpoint_path, self.model, self.optimizers, metadata)

    def _load(self) -> None:
        metadata = checkpoint.load(self.checkpoint_path, self.model, self.optimizers)
        if metadata["model"] != self.settings.model or metadata["seed"] != str(self.settings.seed):
            raise ValueError(
                f"training: model and seed must be the checkpoint's, {metadata['model']} and {metadata['seed']}, "
                f"got model={self.settings.model!r}, seed={self.settings.seed}"
            )
        self.step = int(metadata["step"])
        self.loss_average = json.loads(metadata["loss_average"])
        self.stream.load_state(metadata["stream"])
        self.batches.load_state(metadata["batches"])

    def train_step(self) -> float:
        """One optimizer step; returns its loss."""
        settings = self.settings
        # Masks are seeded by the step, so that resuming needs no generator state.
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
        batch = self.batches.next(generator)
        scale = learning_rate_scale(self.step, steps=settings.steps, warmup=settings.warmup, decay=settings.decay)
        for name, peak in (("muon", settings.muon_lr), ("adamw", settings.adam_lr)):
            for group in self.optimizers[name].param_groups:
                group["lr"] = peak * scale
        loss, cross_entropy, is_right = self._losses(self.model, batch, bf16=settings.bf16)
        loss.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        self._count(batch, cross_entropy, is_right)
        self.step += 1
        value = loss.item()
        self.loss_average = value if self.loss_average is None else 0.98 * self.loss_average + 0.02 * value
        return value

    def _count(self, batch: Batch, cross_entropy: Tensor, is_right: Tensor) -> None:
        # Tokens of full weight only: filler and hopelessly early tokens would hide the rest.
        counted = batch.weight == 1
        task = batch.task[counted]
        for row, values in enumerate((torch.ones_like(cross_entropy), cross_entropy, is_right.float())):
            self._task_sums[row].index_add_(0, task, values[counted])

    def _log(self, seconds: float) -> None:
        count, cross_entropy, right = self._task_sums / self._task_sums[0].clamp(min=1)
        record = {
            "step": self.step,
            "seconds": round(seconds, 1),
            "loss": round(self.loss_average, 4),
            "cross_entropy": {name: round(cross_entropy[i].item(), 4) for i, name in enumerate(TASK_NAMES)},
            "accuracy": {name: round(right[i].item(), 4) for i, name in enumerate(TASK_NAMES)},
        }
        self._task_sums.zero_()
        with open(self.settings.out / LOG_NAME, "a") as log:
            log.write(json.dumps(record) + "\n")

    def run(self) -> None:
        """Trains to `steps` or for `minutes`, checkpointing; exports the model when the steps are done."""
        settings = self.settings
        settings.out.mkdir(parents=True, exist_ok=True)
        started = last_saved = time.monotonic()
        with tqdm(total=settings.steps, initial=self.step, desc=settings.model, mininterval=5) as progress:
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
        self.save()
        if self.step >= settings.steps:
            export(self.model, settings.out)
