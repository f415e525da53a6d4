"""Everything that decides a distilled student, and its command-line options."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..limits import flag, number, whole
from . import bounds
from .forcing import OBJECTIVES, Noise
from .optimization import CHECKPOINT_NAME, LOG_NAME
from .visibility import IMPLEMENTATIONS

PRECISIONS = ("fp32", "bf16", "fp16")
DTYPES = ("stored", "float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "muon")
# The settings that a resumed run may change: where the run computes (which may change the rounding), how often the run
# reports, and when the run stops. The names of folders and files are free too: their content is compared.
FREE = {"model", "teacher", "data", "out", "resume", "minutes", "checkpoint_minutes", "log_every", "threads"}
FREE |= {"device", "save_adapter"}


@dataclass
class DistillSettings:
    """Settings of one distillation.

    The defaults of LoRA, masking rates, loss and optimizer are those that D2F published for LLaDA; the defaults of
    precision, schedule, block length and extra blocks are ours. Compiled, mixed-precision and multi-process runs round
    differently, so two runs end with equal weights only if their settings, processes and threads are equal.

    Attributes:
        model: checkpoint folder of the student, and of the teacher unless `teacher` is set.
        data: JSON lines of prompts and answers (see dataset.py).
        out: folder for checkpoint, log and student.
        teacher: another checkpoint folder with the same vocabulary; None = the student's own weights before training.
        objective: "forcing" (D2F), "certainty" (dParallel) or "trajectory" (d3LLM).
        visibility: visibility of the student; None = "block" for forcing, and else the model's own.
        block_length: number of tokens in a block; None = the model's own.
        block_alignment: where blocks begin, "rel" or "abs"; None = "rel" for forcing, and else the model's own.
        hard_targets: whether the answer's tokens are the targets, instead of the teacher's distribution.
        temperature: temperature of teacher and student in the soft loss.
        inverse_rate_weight: whether a token's loss is divided by the masking rate of its block.
        filler_weight: weight of an EOS after the first one.
        low: smallest masking rate of a block.
        high: largest masking rate of a block.
        settled: probability that the blocks before a random block are clean.
        fresh: share of the settled canvases in which all blocks after the random block are wholly masked.
        mask_rate: masking rate of objective "certainty".
        entropy_weight: weight of the entropy in objectives "certainty" and "trajectory".
        entropy_temperature: temperature of the entropy in objectives "certainty" and "trajectory".
        first_block_length: block length at the start of objective "trajectory", from where it grows; None = no growth.
        full_finetune: whether all weights are trained, in float32, instead of LoRA layers.
        lora_rank: rank of the LoRA updates.
        lora_alpha: LoRA updates are scaled by lora_alpha / lora_rank.
        lora_dropout: dropout of the LoRA layers' input.
        lora_targets: names of the layers that get LoRA.
        optimizer: "adamw", or "muon" for the matrices between the layers and AdamW for the rest.
        lr: peak rate of AdamW.
        muon_lr: peak rate of Muon.
        betas: the two betas of AdamW.
        weight_decay: weight decay of both optimizers.
        clip: norm to which gradients are clipped.
        warmup: steps over which the rate rises.
        decay: share of the steps, the last ones, over which the rate falls linearly to 0; 0 = the rate never falls.
        steps: number of optimizer steps.
        tokens_per_step: canvas positions of a step, in each process.
        micro_batches: number of parts in which a step is computed.
        max_length: largest number of positions of a canvas.
        extra_blocks: probability of a further block of EOS after the answer (`CanvasShape.extra`).
        too_long: what happens to a sample that exceeds max_length, "raise" or "drop".
        seed: random seed of order, masks, LoRA and dropout.
        precision: "fp32", or mixed precision with "bf16" or "fp16".
        dtype: dtype of the frozen weights under LoRA, "stored" or the name of a dtype.
        attention: "sdpa" or "flex_attention"; None = flex_attention on a GPU, and else sdpa.
        gradient_checkpointing: whether the backward pass computes activations again.
        compile: whether the model is compiled.
        device: device of the run; None = a GPU if there is one.
        threads: number of CPU threads; None = torch's own choice.
        minutes: time after which the run stops with a checkpoint, without a change of the schedule; None = never.
        checkpoint_minutes: time between checkpoints.
        log_every: steps between lines of the log.
        resume: whether the run continues from the checkpoint in `out`.
        save_adapter: whether the LoRA adapter alone is written too.
    """

    model: str
    data: Path
    out: Path
    teacher: str | None = None
    objective: str = "forcing"
    visibility: str | None = None
    block_length: int | None = None
    block_alignment: str | None = None
    hard_targets: bool = False
    temperature: float = 1.0
    inverse_rate_weight: bool = True
    filler_weight: float = 1.0
    low: float = Noise.low
    high: float = Noise.high
    settled: float = Noise.settled
    fresh: float = Noise.fresh
    mask_rate: float = Noise.rate
    entropy_weight: float = 2.0
    entropy_temperature: float = 0.5
    first_block_length: int | None = None
    full_finetune: bool = False
    lora_rank: int = 32
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    optimizer: str = "adamw"
    lr: float = 1e-5
    muon_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    warmup: int = 50
    decay: float = 1.0
    steps: int = 1000
    tokens_per_step: int = 2560
    micro_batches: int = 5
    max_length: int = 512
    extra_blocks: float = 0.25
    too_long: str = "raise"
    seed: int = 0
    precision: str = "fp32"
    dtype: str = "stored"
    attention: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    device: str | None = None
    threads: int | None = None
    minutes: float | None = None
    checkpoint_minutes: float = 3.0
    log_every: int = 20
    resume: bool = False
    save_adapter: bool = False

    def __post_init__(self) -> None:
        def fail(rule: str) -> None:
            raise ValueError(f"distill: {rule}")

        for name in ("model", "data", "out", "teacher"):
            bounds.place("distill", name, getattr(self, name), none=name == "teacher")
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("visibility", ("full", "block", None)),
            ("block_alignment", ("rel", "abs", None)),
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
            ("dtype", DTYPES),
            ("attention", (*IMPLEMENTATIONS, None)),
            ("too_long", ("raise", "drop")),
        ):
            bounds.choice("distill", name, getattr(self, name), allowed)
        for name in ("steps", "warmup", "tokens_per_step", "micro_batches", "max_length", "log_every"):
            whole("distill", name, getattr(self, name), 1)
        for name in ("block_length", "first_block_length"):
            whole("distill", name, getattr(self, name), 1, none=True)
        whole("distill", "lora_rank", self.lora_rank, 1, bounds.MAX_RANK)
        whole("distill", "threads", self.threads, 1, bounds.MAX_THREADS, none=True)
        whole("distill", "seed", self.seed, 0, bounds.MAX_SEED)
        for name in ("lr", "muon_lr", "clip", "temperature", "entropy_temperature", "lora_alpha"):
            bounds.positive("distill", name, getattr(self, name))
        for name in ("entropy_weight", "weight_decay", "checkpoint_minutes"):
            number("distill", name, getattr(self, name), 0)
        number("distill", "minutes", self.minutes, 0, none=True)
        for name in ("decay", "extra_blocks", "filler_weight", "low", "high", "settled", "fresh", "mask_rate"):
            number("distill", name, getattr(self, name), 0, 1)
        number("distill", "lora_dropout", self.lora_dropout, 0, 1)
        if self.lora_dropout == 1:
            fail(f"lora_dropout must be below 1, got lora_dropout={self.lora_dropout}")
        if self.mask_rate in (0, 1):
            fail(f"mask_rate must be above 0 and below 1, got mask_rate={self.mask_rate}")
        if not isinstance(self.betas, (list, tuple)) or len(self.betas) != 2:
            fail(f"betas must be two numbers, got betas={self.betas!r}")
        for beta in self.betas:
            number("distill", "betas", beta, 0, 1)
        if 1 in self.betas:
            fail(f"betas must be below 1, got betas={self.betas!r}")
        bounds.names("distill", "lora_targets", self.lora_targets)
        for field in dataclasses.fields(self):
            if field.type == "bool":
                flag("distill", field.name, getattr(self, field.name))
        if self.device is not None and (not isinstance(self.device, str) or not self.device):
            fail(f"device must be the name of a device or None, got device={self.device!r}")
        if self.optimizer == "muon" and not self.full_finetune:
            fail("optimizer 'muon' trains whole matrices and goes with full_finetune, got LoRA")
        if self.optimizer == "muon" and self.precision == "fp16":
            # accelerate moves the loss scale after each optimizer's step, so the second would unscale its gradients
            # twice.
            fail("optimizer 'muon' goes with precision fp32 or bf16, got precision=fp16")
        if self.save_adapter and self.full_finetune:
            fail("save_adapter goes with LoRA, got full_finetune")
        if self.full_finetune and self.dtype not in ("stored", "float32"):
            fail(f"full_finetune trains float32 weights (a small step would be rounded away), got dtype={self.dtype}")
        if self.first_block_length is not None and self.objective != "trajectory":
            fail(
                "first_block_length goes with objective 'trajectory', "
                f"got first_block_length={self.first_block_length}, objective={self.objective!r}"
            )
        if self.teacher is not None and (self.objective != "forcing" or self.hard_targets):
            fail(
                "teacher is read by objective 'forcing' with soft targets only, "
                f"got objective={self.objective!r}, hard_targets={self.hard_targets}"
            )
        self.model, self.teacher = str(self.model), None if self.teacher is None else str(self.teacher)
        for name in ("model", "teacher"):
            value = getattr(self, name)
            if value is not None and Path(value).resolve() == Path(self.out).resolve():
                fail(f"out must be another folder than {name}, which the student would replace, got out={self.out}")
        if Path(self.data).resolve() in (Path(self.out, name).resolve() for name in (CHECKPOINT_NAME, LOG_NAME)):
            fail(
                f"data must be another file than checkpoint and log, which the run writes, got data={str(self.data)!r}"
            )
        self.noise  # noqa: B018  a Noise checks its numbers when it is made

    @property
    def noise(self) -> Noise:
        """How answers are masked."""
        return Noise(self.low, self.high, self.settled, self.fresh, self.mask_rate)

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run that it continues, as plain JSON values."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


HELP = {
    "model": "checkpoint folder of the student, and of the teacher unless --teacher; its config.json needs a dlm "
    "section",
    "data": "JSON lines of prompt and answer",
    "out": "folder for checkpoint, log and student",
    "teacher": "another checkpoint folder with the same vocabulary; default: the student's own weights as they were",
    "objective": "forcing: D2F. certainty: dParallel. trajectory: d3LLM (needs an order on every line)",
    "visibility": "of the student; default: block for forcing, else the model's own",
    "block_length": "tokens of a block; default: the model's",
    "block_alignment": "where blocks begin: rel = at the end of the prompt, abs = at multiples of the length; default: "
    "rel for forcing, else the model's own",
    "hard_targets": "the answer's tokens instead of the teacher's distribution",
    "temperature": "of teacher and student in the soft loss",
    "inverse_rate_weight": "do not divide a token's loss by the masking rate of its block",
    "filler_weight": "weight of EOS after the first",
    "low": "least masking rate of a block", "high": "greatest masking rate of a block",
    "settled": "probability that the blocks before a random one are clean, as in a decoder",
    "fresh": "of those, the share in which all later blocks are wholly masked",
    "mask_rate": "masking rate of certainty",
    "entropy_weight": "of certainty and trajectory", "entropy_temperature": "of certainty and trajectory",
    "first_block_length": "of trajectory: block length at the start, growing to --block-length",
    "full_finetune": "train all weights in float32, not LoRA; they are exported in the dtype they are stored in",
    "lora_rank": "rank of the updates", "lora_alpha": "updates are scaled by alpha / rank", "lora_dropout": "of their "
    "input",
    "lora_targets": "names of the layers that get LoRA",
    "optimizer": "muon: Muon for the matrices between the layers, AdamW for the rest",
    "lr": "peak rate of AdamW", "muon_lr": "peak rate of Muon", "betas": "of AdamW", "weight_decay": "of both",
    "clip": "norm that gradients are clipped to", "warmup": "steps over which the rate rises",
    "decay": "share of steps, the last, over which the rate falls linearly to 0; 0 = constant",
    "steps": "optimizer steps", "tokens_per_step": "canvas positions of a step, in each process",
    "micro_batches": "parts a step is computed in: less memory, and less padding",
    "max_length": "most positions of a canvas",
    "extra_blocks": "probability of a block of EOS after the answer, and of another; 1 = up to max_length",
    "too_long": "what to do with a sample that exceeds max_length",
    "seed": "of order, masks, LoRA and dropout",
    "precision": "bf16, fp16: mixed precision (needs accelerate)", "dtype": "of the frozen weights under LoRA",
    "attention": "default: flex_attention on a GPU, sdpa on a CPU",
    "gradient_checkpointing": "recompute activations in the backward pass", "compile": "torch.compile the model",
    "device": "default: a GPU if there is one", "threads": "CPU threads",
    "minutes": "stop after this long with a checkpoint; resume later", "checkpoint_minutes": "time between checkpoints",
    "log_every": "steps between lines of the log", "resume": "continue from the checkpoint in --out",
    "save_adapter": "also write the LoRA adapter alone, to OUT/adapter",
}  # fmt: skip
CHOICES = {
    "objective": OBJECTIVES, "visibility": ("full", "block"), "block_alignment": ("rel", "abs"),
    "optimizer": OPTIMIZERS,
    "precision": PRECISIONS, "dtype": DTYPES, "attention": IMPLEMENTATIONS, "too_long": ("raise", "drop"),
}  # fmt: skip
TYPES = {
    "float": float,
    "float | None": float,
    "int": int,
    "int | None": int,
    "str": str,
    "str | None": str,
    "Path": Path,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m dlm_fast.training distill`, one for each field of DistillSettings."""
    for field in dataclasses.fields(DistillSettings):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        options: dict[str, Any] = {"dest": field.name, "help": HELP[field.name]}
        if field.type == "bool":
            flag = "--no-" + flag[2:] if default else flag
            parser.add_argument(flag, action="store_false" if default else "store_true", **options)
        elif field.type.startswith("tuple"):
            kind = float if "float" in field.type else str
            parser.add_argument(flag, nargs=2 if kind is float else "+", type=kind, default=default, **options)
        else:
            required = default is dataclasses.MISSING
            options |= {"required": True} if required else {"default": default}
            parser.add_argument(flag, type=TYPES[field.type], choices=CHOICES.get(field.name), **options)


def settings_of(values: argparse.Namespace) -> DistillSettings:
    """The settings of parsed arguments."""
    options = {field.name: getattr(values, field.name) for field in dataclasses.fields(DistillSettings)}
    return DistillSettings(**options | {name: tuple(options[name]) for name in ("betas", "lora_targets")})
