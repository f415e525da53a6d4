"""Distillation of a diffusion model, by D2F's objective or one of two others (see forcing.py).

    python -m dlm_fast.training distill --model MODEL --data DATA.jsonl --out STUDENT --block-length 16

Teacher and student read the same masked canvas. The teacher sees as it was trained to see, without dropout; D2F's
student sees block-causally. With LoRA the teacher is the student's network with the adapter off. A run can be stopped
and resumed, and ends with the weights of an unbroken run, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import disk
from ..diffusion import DiffusionConfig
from ..limits import whole
from ..models import adapter_for
from . import bounds, checkpoint, runlog
from .dataset import CanvasShape, Steps, read_dataset
from .distill_settings import DistillSettings, add_arguments, settings_of
from .export import write_student
from .forcing import certainty_loss, forcing_loss
from .masking import Masked, Masking
from .networks import (
    RowLogits,
    check_targets,
    check_vocabularies,
    checkpoint_activations,
    digests_of,
    open_model,
    require,
    stored_dtype,
)
from .optimization import CHECKPOINT_NAME, LOG_NAME, SEED_STRIDE, build_optimizers, learning_rate_scale
from .runlog import RunLog
from .visibility import attention_mask, block_labels

KIND = "distillation"
# The metadata of a checkpoint of this kind.
FIELDS = {"kind", "settings", "digests", "processes", "step", "position", "seconds", "tokens", "scaler"}

__all__ = ["DistillSettings", "Distiller", "add_arguments", "run"]


class Distiller:
    """One run of a distillation.

    `step` makes one optimizer step, `run` trains to the end, `save` writes a checkpoint, and `export` writes the
    student. The package peft makes the LoRA layers. The package accelerate does mixed precision and several processes
    (data parallel); a run of one process in fp32 does not use accelerate, so that the result does not depend on whether
    accelerate is installed.

    Raises:
        ValueError: a setting, the data, the log or the checkpoint to resume is refused. The message names the setting,
            or the file and what in the file is wrong.
        FileExistsError: `out` has a checkpoint, and the run does not resume.
        FileNotFoundError: the run resumes, and `out` has no checkpoint.
    """

    def __init__(self, settings: DistillSettings) -> None:
        # 1. The process, its device, and the checkpoint to resume.
        self.settings = settings
        disk.check_folder("distill", "out", Path(settings.out))
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._accelerator = self._start_accelerator()
        self.processes = self._accelerator.num_processes if self._accelerator else 1
        self.rank = self._accelerator.process_index if self._accelerator else 0
        self.device = self._accelerator.device if self._accelerator else self._choose_device()
        self.attention = settings.attention or ("flex_attention" if self.device.type == "cuda" else "sdpa")
        if self.attention == "flex_attention" and self.device.type == "cpu":
            raise ValueError(
                "distill: attention must be sdpa on a CPU, where flex_attention has no backward, got "
                "attention='flex_attention'"
            )
        self.checkpoint_path = Path(settings.out) / CHECKPOINT_NAME
        has_checkpoint = os.path.lexists(self.checkpoint_path)
        if settings.resume and not has_checkpoint:
            raise FileNotFoundError(f"distill: resume needs a checkpoint, got none at {self.checkpoint_path}")
        if not settings.resume and has_checkpoint:
            raise FileExistsError(f"distill: out must hold no checkpoint unless resuming, got {self.checkpoint_path}")

        # 2. Student and teacher.
        dtype = (
            torch.float32
            if settings.full_finetune
            else (None if settings.dtype == "stored" else getattr(torch, settings.dtype))
        )
        self.model, self.teacher_diffusion, self.tokenizer = open_model(
            settings.model, self.device, dtype, self.attention
        )
        self.export_dtype = stored_dtype(settings.model) or self.model.dtype
        self.digests: dict[str, str | None] = {"stored dtype": str(self.export_dtype)}
        self.digests |= digests_of(self.model, self.teacher_diffusion, self.tokenizer)
        self.diffusion = self._student_diffusion(self.teacher_diffusion)
        self._teacher, self.peft = None, None
        self._prepare_networks()
        limit = self.model.config.max_position_embeddings
        if settings.max_length > limit:
            raise ValueError(
                f"distill: max_length must fit the model's {limit} positions, got max_length={settings.max_length}"
            )

        # 3. Data: samples, the canvases of every step, and their masks.
        if self.diffusion.block_alignment == "both":
            raise ValueError("distill: block_alignment must be 'abs' or 'rel', got block_alignment='both'")
        length, absolute = self.diffusion.block_length, self.diffusion.block_alignment == "abs"
        shape = CanvasShape(length, absolute, settings.max_length, settings.extra_blocks)
        ranked = settings.objective == "trajectory"
        vocab_size = self.model.config.vocab_size
        self.dataset = read_dataset(
            settings.data,
            self.tokenizer,
            self.diffusion,
            shape,
            vocab_size=vocab_size,
            too_long=settings.too_long,
            needs_order=ranked,
        )
        self.steps = Steps(
            self.dataset,
            shape,
            eos_id=self.diffusion.eos_token_ids[0],
            tokens_per_step=settings.tokens_per_step,
            micro_batches=settings.micro_batches,
            seed=settings.seed,
            ranked=ranked,
        )
        self.masking = Masking(
            settings.objective,
            settings.noise,
            self.diffusion,
            settings.filler_weight,
            first_block_length=settings.first_block_length,
        )

        # 4. Counters.
        self.step_number, self.seconds, self.tokens = 0, 0.0, 0
        self.digests["data"] = self.dataset.digest

        # 5. Optimizers, the log, and the state of the run that is resumed.
        self.optimizers = self._build_optimizers()
        self._student: nn.Module = self._rows
        if self._accelerator:
            prepared = self._accelerator.prepare(self._rows, *self.optimizers.values())
            self._student, self.optimizers = prepared[0], dict(zip(self.optimizers, prepared[1:]))
        self.log = RunLog(Path(settings.out) / LOG_NAME, self.dataset.tasks)
        self._seconds_before = 0.0
        if settings.resume:
            self._load()
        elif self.rank == 0:
            # A run that broke off before its first checkpoint has left lines.
            runlog.rewrite(self.log.path, runlog.records_until(self.log.path, 0))

    def _start_accelerator(self) -> Any:
        """The accelerator of mixed precision and of several processes; None where neither is wanted."""
        settings = self.settings
        if settings.precision == "fp32" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return None
        if settings.device not in (None, "cpu", "cuda"):
            raise ValueError(
                f"distill: device must be cpu or cuda where accelerate chooses it, got device={settings.device!r}"
            )
        accelerate = require("accelerate", "mixed precision or more than one process")
        precision = "no" if settings.precision == "fp32" else settings.precision
        accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=settings.device == "cpu")
        kind = accelerator.distributed_type.value
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise NotImplementedError(
                f"distill: only data parallelism is supported (one process, MULTI_GPU, MULTI_CPU), got {kind}"
            )
        return accelerator

    def _choose_device(self) -> torch.device:
        name = self.settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"distill: device must be a device that torch can use, got device={name!r}: {reason}"
            ) from error

    def _student_diffusion(self, teacher: DiffusionConfig) -> DiffusionConfig:
        """The student's diffusion configuration: the teacher's, with what settings and objective change."""
        settings = self.settings
        visibility = settings.visibility or ("block" if settings.objective == "forcing" else teacher.visibility)
        block_length = settings.block_length or teacher.block_length
        if block_length is None:
            raise ValueError(
                f"distill: block_length must be given where {settings.model} names none, got block_length=None"
            )
        changes: dict[str, Any] = {
            "visibility": visibility,
            "block_length": block_length,
            "block_alignment": settings.block_alignment
            or ("rel" if settings.objective == "forcing" else teacher.block_alignment),
        }
        if visibility == "block":
            changes["prompt_isolated"] = False
        return dataclasses.replace(teacher, **changes)

    def _prepare_networks(self) -> None:
        """Prepares student and teacher for training.

        The teacher is another checkpoint, or a frozen copy of the student, or the student with its adapter off; with
        hard targets there is no teacher.
        """
        # 1. The teacher, if it is a network of its own.
        settings = self.settings
        needs_teacher = settings.objective == "forcing" and not settings.hard_targets
        if settings.teacher is not None:
            dtype = None if settings.dtype == "stored" else getattr(torch, settings.dtype)
            teacher = open_model(settings.teacher, self.device, dtype, self.attention)
            self.digests |= {f"teacher's {name}": digest for name, digest in digests_of(*teacher).items()}
            check_vocabularies(
                (self.model, self.diffusion, self.tokenizer), teacher, (settings.model, settings.teacher)
            )
            self._teacher, self.teacher_diffusion = (
                RowLogits(teacher[0].requires_grad_(False).eval(), compiled=settings.compile),
                teacher[1],
            )
        elif needs_teacher and settings.full_finetune:
            frozen, _, _ = open_model(settings.model, self.device, torch.float32, self.attention)
            self._teacher = RowLogits(frozen.requires_grad_(False).eval(), compiled=settings.compile)

        # 2. The student, with LoRA layers unless all weights are trained.
        if not settings.full_finetune:
            peft = require("peft", "LoRA (anything but --full-finetune)")
            check_targets(self.model, settings.lora_targets)
            torch.manual_seed(settings.seed)
            lora = peft.LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,
                lora_dropout=settings.lora_dropout,
                target_modules=list(settings.lora_targets),
                bias="none",
                task_type="CAUSAL_LM",
            )
            self.peft = peft.get_peft_model(self.model, lora)
        if settings.gradient_checkpointing:
            checkpoint_activations(self.model)
        self.model.train()
        self._rows = RowLogits(self.model, compiled=settings.compile)
        self._needs_teacher = needs_teacher

    def _build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        settings = self.settings
        return build_optimizers(
            (p for p in self.model.parameters() if p.requires_grad),
            adapter_for(self.model).base_model(self.model).layers,
            adamw={"lr": settings.lr, "betas": tuple(settings.betas), "weight_decay": settings.weight_decay},
            muon={"lr": settings.muon_lr, "weight_decay": settings.weight_decay}
            if settings.optimizer == "muon"
            else None,
        )

    def student_logits(self, batch: Masked) -> Tensor:
        """Logits [N, V] of the student for the masked tokens of a batch."""
        return self._logits(self._student, batch, self.diffusion)

    @torch.no_grad()
    def teacher_logits(self, batch: Masked) -> Tensor | None:
        """Logits [N, V] of the teacher for the masked tokens of a batch; None if the objective has no teacher.

        The teacher runs without dropout and with its own visibility.
        """
        if not self._needs_teacher:
            return None
        if self._teacher is not None:
            return self._logits(self._teacher, batch, self.teacher_diffusion)
        self.model.eval()
        try:
            with self.peft.disable_adapter():
                return self._logits(self._rows, batch, self.teacher_diffusion)
        finally:
            self.model.train()

    def _logits(self, network: nn.Module, batch: Masked, diffusion: DiffusionConfig) -> Tensor:
        blocks, mode = block_labels(batch.prompt, batch.length, batch.tokens.shape[1], diffusion)
        mask = attention_mask(blocks, mode, self.attention)
        with self._accelerator.autocast() if self._accelerator else contextlib.nullcontext():
            return network(batch.tokens, mask, batch.logits_index(diffusion.logits_row))

    def loss(self, batch: Masked, student: Tensor, teacher: Tensor | None) -> Tensor:
        """The loss of a masked batch by the run's objective."""
        settings = self.settings
        if settings.objective == "forcing":
            return forcing_loss(
                student,
                teacher,
                batch.targets,
                batch.rate,
                batch.weight,
                inverse_rate_weight=settings.inverse_rate_weight,
                temperature=settings.temperature,
            )
        return certainty_loss(
            student,
            batch.targets,
            batch.half,
            batch.weight,
            entropy_weight=settings.entropy_weight,
            entropy_temperature=settings.entropy_temperature,
            scale=0.5 if settings.objective == "certainty" else 0.25,
        )

    def step(self) -> float:
        """Makes one optimizer step; returns the loss of this process."""
        settings = self.settings

        # 1. Masked batches of this process. The step number seeds masks and dropout, so that a resumed run needs no
        # generator's state.
        seed = settings.seed * SEED_STRIDE + self.step_number * self.processes + self.rank
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.rank):
            self.steps.skip()
        canvases = self.steps.next()
        for _ in range(self.processes - self.rank - 1):
            self.steps.skip()
        batches = [self.masking(part, generator, self.step_number / settings.steps) for part in canvases]
        batches = [batch for batch in batches if len(batch.row)] or batches[:1]
        weights = [batch.weight.sum().item() for batch in batches]

        # 2. Learning rates of this step.
        scale = learning_rate_scale(
            self.step_number, steps=settings.steps, warmup=settings.warmup, decay=settings.decay
        )
        for name, peak in (("adamw", settings.lr), ("muon", settings.muon_lr)):
            for group in self.optimizers[name].param_groups if name in self.optimizers else ():
                group["lr"] = peak * scale

        # 3. Gradients, batch by batch. Dropout has another seed than the masks, since equal draws would drop the masked
        # places.
        torch.manual_seed(-1 - seed)
        total = 0.0
        for number, (batch, weight) in enumerate(zip(batches, weights)):
            is_last = number == len(batches) - 1
            with (
                self._accelerator.no_sync(self._student)
                if self._accelerator and not is_last
                else contextlib.nullcontext()
            ):
                total += self._backward(batch.to(self.device), weight / (sum(weights) or 1.0))

        # 4. The optimizer step, with clipped gradients.
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self._accelerator:
            self._accelerator.clip_grad_norm_(parameters, settings.clip)
        else:
            nn.utils.clip_grad_norm_(parameters, settings.clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

        # 5. Counters.
        self.tokens += self.processes * sum(int(part.length.sum()) for part in canvases)
        self.step_number += 1
        self.log.add_step(total)
        return total

    def _backward(self, batch: Masked, share: float) -> float:
        """Adds the gradients of one micro-batch, whose loss counts as `share` of the step's; returns that loss."""
        teacher = self.teacher_logits(batch)
        student = self.student_logits(batch)
        loss = self.loss(batch, student, teacher) * share
        if self._accelerator:
            self._accelerator.backward(loss)
        else:
            loss.backward()
        self.log.add_tokens(batch, student.detach(), teacher)
        return loss.item()

    def save(self) -> None:
        """Writes the checkpoint: trained weights, optimizers, and the place in the data.

        Raises checkpoint.CheckpointWriteError.
        """
        if self.rank:
            return
        scaler = getattr(self._accelerator, "scaler", None)
        metadata = {
            "settings": json.dumps(self.settings.fixed()),
            "kind": KIND,
            "digests": json.dumps(self.digests),
            "processes": str(self.processes),
            "step": str(self.step_number),
            "position": json.dumps(self.steps.position),
            "seconds": json.dumps(self.seconds),
            "tokens": json.dumps(self.tokens),
            "scaler": json.dumps(scaler.state_dict() if scaler else None),
        }
        checkpoint.save(self.checkpoint_path, self._trained(), self.optimizers, metadata)

    def _trained(self) -> dict[str, Tensor]:
        """The trained parameters, by name.

        A checkpoint holds these instead of the module's state, since tied weights are one parameter and the folder of
        the model has the frozen weights.
        """
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _load(self) -> None:
        """Continues from the checkpoint, once all of it is compared with what this run trains, and by what."""
        # 1. Compare.
        settings = self.settings
        found = checkpoint.read(self.checkpoint_path)
        found.check_kind("distill", KIND, FIELDS)
        checkpoint.compare("distill", found.mapping("settings"), settings.fixed())
        checkpoint.compare("distill", found.mapping("digests"), self.digests, what="content of ")
        checkpoint.compare("distill", {"processes": found.value("processes")}, {"processes": self.processes})
        step, seconds = found.whole("step", settings.steps), found.number("seconds")
        position, tokens = self.steps.after(step, self.processes)
        for name, value in (("position", list(position)), ("tokens", tokens)):
            if found.value(name) != value:
                found.refuse(name, f"{value} after step {step}", found.value(name))
        scaler, saved_scaler = getattr(self._accelerator, "scaler", None), found.value("scaler")
        check_scaler(found, saved_scaler, scaler.state_dict() if scaler else None)
        checkpoint.check(found, self._trained(), self.optimizers, step, scaled=bool(scaler))
        records = runlog.records_until(self.log.path, step) if self.rank == 0 else []

        # 2. Load.
        if self.rank == 0:
            runlog.rewrite(self.log.path, records)
        checkpoint.load(found, self._trained(), self.optimizers)
        self.step_number, self.tokens, self.steps.position = step, tokens, position
        self.seconds = self._seconds_before = seconds
        if saved_scaler:
            scaler.load_state_dict(saved_scaler)

    def export(self) -> None:
        """Writes the student, with LoRA merged, as a checkpoint folder that `dlm_fast.load` opens."""
        if self.rank:
            return
        adapter = self.peft if self.settings.save_adapter else None
        write_student(
            self.model,
            Path(self.settings.out),
            diffusion=self.diffusion,
            tokenizer=self.tokenizer,
            dtype=self.export_dtype,
            adapter=adapter,
        )

    def run(self) -> None:
        """Trains to settings.steps or for settings.minutes, and exports the student after the last step.

        Meanwhile checkpoints and a log are written.
        """
        # 1. Train.
        settings = self.settings
        Path(settings.out).mkdir(parents=True, exist_ok=True)
        started = last_saved = time.monotonic()
        with tqdm(
            total=settings.steps, initial=self.step_number, desc="distilling", mininterval=5, disable=self.rank > 0
        ) as progress:
            while self.step_number < settings.steps:
                self.step()
                progress.update()
                now = time.monotonic()
                self.seconds = self._seconds_before + now - started
                if self.step_number % settings.log_every == 0 or self.step_number == settings.steps:
                    record = self.log.write(
                        step=self.step_number, seconds=self.seconds, tokens=self.tokens, to_disk=self.rank == 0
                    )
                    progress.set_postfix(loss=f"{record['loss']:.4f}")
                if now - last_saved > 60 * settings.checkpoint_minutes:
                    self.save()
                    last_saved = now
                if settings.minutes is not None and self._agree(now - started > 60 * settings.minutes):
                    break

        # 2. Write the last checkpoint, and the student once it is trained.
        self.save()
        if self.step_number >= settings.steps:
            self.export()

    def _agree(self, stop: bool) -> bool:
        """Whether the first process stops, for all processes.

        Clocks differ, and a process that went on alone would wait for the other processes for ever.
        """
        if self.processes == 1:
            return stop
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([stop])[0]


def check_scaler(found: checkpoint.Checkpoint, saved: Any, current: dict[str, Any] | None) -> None:
    """Raises CheckpointError unless a checkpoint has the state of this run's scaler of losses, or none like the run."""
    if not saved and not current:
        return
    if not isinstance(saved, dict) or current is None or saved.keys() != current.keys():
        found.refuse("scaler", f"numbers for {', '.join(current)}" if current else "null", saved)
    for name, value in saved.items():
        if isinstance(current[name], int):
            whole(found.owner, f"scaler[{name!r}]", value)
        else:
            bounds.positive(found.owner, f"scaler[{name!r}]", value)


def run(values: argparse.Namespace) -> None:
    """Runs `python -m dlm_fast.training distill`."""
    Distiller(settings_of(values)).run()
