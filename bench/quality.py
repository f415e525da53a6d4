"""Quality against cost: every preset on held-out prompts of the embedded models.

A point is a preset with its options: exact match against forwards per answer (NFE) and against positions computed
(query tokens). Everything is counted, nothing is timed, and greedy decoding of seeded prompts makes the numbers
reproducible.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import dlm_fast
from dlm_fast.diffusion import DiffusionConfig
from dlm_fast.files import CHECKPOINTS, EMBEDDED, checkpoint_path
from dlm_fast.presets import PRESETS
from dlm_fast.tiny.tasks import TASKS, Sample, held_out

from .machine import commit, versions
from .quality_report import plot, table

MODELS = EMBEDDED
MAX_NEW_TOKENS = 64
BLOCK_LENGTH = 8  # of models of full visibility, which were trained with any length; tiny-block has a length of its own
# What cannot run on these models, and why; every other preset is run.
LEFT_OUT = {
    "fast-dllm-v2": "needs a model whose rows predict the next position",
    "nbdiff": "needs a model whose rows predict the next position",
    "nemotron": "needs a model with a causal prefix",
    "llada2.2": "needs a model with commands to insert and delete",
    "diffusion-gemma": "needs a uniform-noise model",
}
# What a preset needs to run here at all.
NEEDED: dict[str, dict[str, Any]] = {
    "learn2pd": {"head": "tiny-filter", "eotp": True},
    "learned-commit": {"head": "tiny-commit"},
}
# Settings beyond the defaults, of tiny-full and tiny-block.
SWEEPS: dict[str, Sequence[dict[str, Any]]] = {
    "llada": ({"steps_per_block": 4}, {"steps_per_block": 2}),
    "dream": ({"steps_per_block": 16},),
    "fast-dllm": ({"threshold": 0.5}, {"threshold": 0.7}, {"score": "margin"}),
    "fast-dllm-factor": ({"factor": 3.0},),
    "eb-sampler": ({"entropy_bound": 0.5},),
    "learn2pd": ({"eotp": False},),
    "sdar": ({"steps_per_block": 4}, {"steps_per_block": 2}),
    "llada2": ({"threshold": 0.5}, {"threshold": 0.7}, {"threshold": 0.9}),
    "d2f": (
        {"threshold": 0.5},
        {"threshold": 0.7},
        {"threshold": 0.95},
        {"append_threshold": 0.5},
        {"append_threshold": 1.0, "activate_threshold": 1.0},
    ),
}
# This model adds only what an isolated prompt changes: the uncached loops, and decoders that keep a prompt's keys.
ONLY = {
    "tiny-isolated": (
        "llada", "fast-dllm", "fast-dllm-prefix", "fast-dllm-dual", "freecache", "dinfer", "dkv-cache", "d3llm",
        "dllm-var",
    ),
}  # fmt: skip
# Fractions of the prompts, so that all of it takes about half an hour of one core: a tenth for decoders of one forward
# per position of the canvas, a fifth for those of one per token or nearly so; half for variations that no comparison of
# the report is about.
CANVAS = ("dream", "dream-origin", "rnd1")
SLOW = (
    "llada", "klass", "ccd", "ccd-ds", "rcr", "saber", "wino", "certainty-prior", "dkv-cache", "entropy-cache",
    "freedave", "freedave-block", "sdar-sequential", "llada2.1", "bd3lm", "stable-diffcoder",
)  # fmt: skip
VARIATIONS = (
    "fast-dllm-factor", "dinfer", "dinfer-hierarchy", "dinfer-credit", "dinfer-vicinity", "dparallel", "dllm-rl",
    "eb-sampler", "prophet", "sched", "local-leap", "streaming-dllm", "dpad",
)  # fmt: skip
PARTS = {**dict.fromkeys(CANVAS, 10), **dict.fromkeys(SLOW, 5), **dict.fromkeys(VARIATIONS, 2)}
# One token per step, which all other settings are held to; this one is measured on every prompt.
BASELINE = ("tiny-full", "llada", {"block_length": BLOCK_LENGTH})


class QualityError(ValueError):
    """A result file that does not fit the request; the message names the rule."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A point: a model, a preset, and which options of the preset are changed."""

    model: str
    preset: str
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return json.dumps([self.model, self.preset, self.options], sort_keys=True)

    @property
    def label(self) -> str:
        return label(self.preset, self.options)

    def prompts(self, per_task: int) -> int:
        """How many prompts of every task the setting is measured on."""
        parts = 1 if (self.model, self.preset, self.options) == BASELINE else PARTS.get(self.preset, 1)
        return -(-per_task // parts)


def label(preset: str, options: dict[str, Any]) -> str:
    """A preset and its changed options, without those that every row has."""
    common = {"block_length": BLOCK_LENGTH, **NEEDED.get(preset, {})}
    changed = {name: value for name, value in options.items() if name not in common or value != common[name]}
    return " ".join([preset, *(f"{name}={value}" for name, value in changed.items())])


def visibility_of(model: str) -> str:
    """The visibility of an embedded model, read from its config.json: the weights need not be opened to list what is
    run on them."""
    config = json.loads((checkpoint_path(model) / "config.json").read_text())
    return DiffusionConfig.from_dict(config["dlm"]).visibility


def settings(models: Iterable[str] = MODELS, presets: Iterable[str] | None = None) -> list[Setting]:
    """Every setting of the chosen models and presets, in the order of the tables."""
    chosen = list(PRESETS) if presets is None else list(presets)
    found = []
    for model in models:
        visibility = visibility_of(model)
        for name in chosen:
            preset = PRESETS[name]
            if preset.visibility != visibility or name in LEFT_OUT or name not in ONLY.get(model, (name,)):
                continue
            block = {"block_length": BLOCK_LENGTH} if visibility == "full" and preset.schedule != "canvas" else {}
            sweep = () if model in ONLY else SWEEPS.get(name, ())
            found += [Setting(model, name, {**block, **NEEDED.get(name, {}), **changed}) for changed in ({}, *sweep)]
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """A mean and its standard error."""
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, n - 1) / n)


def share_error(share: float, n: int) -> float:
    """Standard error of a share of n prompts, after two prompts of either kind are added (Agresti and Coull 1998): the
    error is not 0 where all are right."""
    p = (share * n + 2) / (n + 4)
    return math.sqrt(p * (1 - p) / (n + 4))


def measure(
    model: torch.nn.Module, setting: Setting, prompts: dict[str, list[Sample]], batch_size: int
) -> dict[str, Any]:
    """Decodes every prompt, task by task, and averages over all of them."""
    right: dict[str, float] = {}
    nfe: list[int] = []
    query_tokens: list[int] = []
    tokens = 0
    started, cpu = time.perf_counter(), time.process_time()
    for task, samples in prompts.items():
        hits = 0
        # A batch costs what its longest row costs, so rows of like length go together, which changes no result.
        samples = sorted(samples, key=lambda sample: len(sample.answer))
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            chats = [[{"role": "user", "content": sample.prompt}] for sample in batch]
            out = dlm_fast.generate(
                model, chats, preset=setting.preset, max_new_tokens=MAX_NEW_TOKENS, **setting.options
            )
            hits += sum(TASKS[task].check(sample.prompt, text) for sample, text in zip(batch, out.text))
            nfe, query_tokens = nfe + out.nfe, query_tokens + out.query_tokens
            tokens += sum(len(ids) for ids in out.sequences)
        right[task] = hits / len(samples)
    count = len(nfe)
    exact_match = sum(right[task] * len(prompts[task]) for task in prompts) / count
    row = {
        **dataclasses.asdict(setting),
        "label": setting.label,
        "exactness": PRESETS[setting.preset].exactness,
        "exact_match": exact_match,
        "exact_match_se": share_error(exact_match, count),
        "exact_match_by_task": right,
    }
    for name, values in (("nfe", nfe), ("query_tokens", query_tokens)):
        row[name], row[f"{name}_se"] = mean_and_error(values)
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    return {**row, "tpf": tokens / sum(nfe), "prompts": count, **seconds}


def conditions(per_task: int, seed: int) -> dict[str, Any]:
    """What a result file must share with a run that goes on with it."""
    return {
        "per_task": per_task,
        "seed": seed,
        "max_new_tokens": MAX_NEW_TOKENS,
        "tasks": list(TASKS),
        "weights": weights(),
    }


@functools.cache
def weights() -> str:
    """A hash of 16 hexadecimal digits over what the embedded models and heads hold: results of other weights do not go
    with these."""
    files = sorted(CHECKPOINTS.glob("*/*.safetensors"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]


def read(file: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """A result file. Raises QualityError if the file is no result, or is one of other prompts."""
    try:
        document = json.loads(file.read_text())
        rows = {Setting(row["model"], row["preset"], row["options"]).key for row in document["settings"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QualityError(f"quality: {file} must be a quality.json of this command: {error!r}") from None
    if len(rows) != len(document["settings"]):
        raise QualityError(
            f"quality: {file} must hold every setting once, got {len(document['settings'])} rows of {len(rows)}"
        )
    for name, value in wanted.items():
        if document.get(name) != value:
            raise QualityError(f"quality: {file} must hold {name}={value}, got {name}={document.get(name)}")
    return document


def finished(files: Iterable[Path], per_task: int, seed: int) -> dict[str, dict[str, Any]]:
    """Settings that earlier runs with the same prompts have measured, by key."""
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        for row in read(file, conditions(per_task, seed))["settings"]:
            rows[Setting(row["model"], row["preset"], row["options"]).key] = row
    return rows


def drawn(per_task: int, seed: int) -> dict[str, list[Sample]]:
    """`per_task` held-out prompts of every task; a smaller number gives the first of the prompts that a larger one
    gives."""
    return {task: held_out(task, per_task, seed) for task in TASKS}


class Models:
    """The embedded models, opened when they are first asked for."""

    def __init__(self) -> None:
        transformers.utils.logging.disable_progress_bar()  # transformers' bar would run through our lines
        self._loaded: dict[str, torch.nn.Module] = {}

    def __getitem__(self, name: str) -> torch.nn.Module:
        if name not in self._loaded:
            self._loaded[name] = dlm_fast.load(name)
        return self._loaded[name]


def run(
    out: Path,
    *,
    per_task: int,
    seed: int,
    batch_size: int,
    models: Sequence[str],
    presets: Sequence[str] | None,
    earlier: Sequence[Path],
) -> dict[str, Any]:
    """Measures every setting that `earlier` results do not hold. quality.json is written after each setting, the table
    and the plot at the end."""
    wanted = settings(models, presets)
    done = finished(earlier, per_task, seed)
    prompts, opened = drawn(per_task, seed), Models()
    rows: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": "quality",
        **conditions(per_task, seed),
        "left_out": LEFT_OUT,
        "commit": commit(),
        "versions": versions(),
    }
    document = {**facts, "settings": rows}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("quality", total=len(wanted))
        for setting in wanted:
            bar.update(task, description=f"{setting.model} {setting.label}"[:60])
            row = done.get(setting.key)
            if row is None:
                some = {task: samples[: setting.prompts(per_task)] for task, samples in prompts.items()}
                row = measure(opened[setting.model], setting, some, batch_size)
                if not sys.stderr.isatty():
                    print(line(row), file=sys.stderr, flush=True)
            rows.append(row)
            write(out / "quality.json", json.dumps(document, indent=1) + "\n")
            bar.advance(task)
    write(out / "quality.md", table(document))
    plot(document, out / "quality.png")
    return document


def check(file: Path, *, count: int, batch_size: int, choice: int = 0) -> list[str]:
    """Measures `count` settings of a result file again, on the file's own prompts, and says of each whether it is
    within the stated noise.

    The prompts are the same and decoding is greedy, so only rounding may differ: by at most one stated standard error.
    `choice` seeds which settings are measured. Every line begins with "same" or "DIFFERS".
    """
    document = read(file, {name: value for name, value in conditions(0, 0).items() if name not in ("per_task", "seed")})
    prompts, opened, lines = drawn(document["per_task"], document["seed"]), Models(), []
    known = {setting.key for setting in settings()}
    rows = [row for row in document["settings"] if Setting(row["model"], row["preset"], row["options"]).key in known]
    if not rows:
        raise QualityError(
            f"quality: {file} must hold a setting that this version runs, got {len(document['settings'])} others"
        )
    for row in random.Random(choice).sample(rows, min(count, len(rows))):
        setting = Setting(row["model"], row["preset"], row["options"])
        some = {task: samples[: row["prompts"] // len(TASKS)] for task, samples in prompts.items()}
        again = measure(opened[setting.model], setting, some, batch_size)
        found = {name: (row[name], again[name], row[f"{name}_se"]) for name in ("exact_match", "nfe", "query_tokens")}
        same = all(abs(a - b) <= noise for a, b, noise in found.values())
        changes = ", ".join(f"{name} {a:.4g} -> {b:.4g} (se {noise:.2g})" for name, (a, b, noise) in found.items())
        lines.append(f"{'same' if same else 'DIFFERS':8}{setting.model} {setting.label}: {changes}")
    return lines


def write(path: Path, text: str) -> None:
    """Replaces the file, once all of the text is written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def line(row: dict[str, Any]) -> str:
    cost = f"NFE {row['nfe']:6.2f}  query tokens {row['query_tokens']:8.1f}  {row['cpu_seconds']:.0f} CPU s"
    return f"{row['model']:14}{row['label']:50}{row['exact_match']:7.1%} of {row['prompts']:4}  {cost}"
