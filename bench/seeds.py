"""How much the seed matters: the whole recipe of the embedded pair, shortened, once for each seed.

A run pretrains a teacher, writes samples, distills a student, and decodes held-out prompts with both. Short runs answer
worse than the embedded models and probably scatter more.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import dlm_fast
from dlm_fast.loading import checkpoint_path
from dlm_fast.tiny import data
from dlm_fast.tiny.tasks import held_out
from dlm_fast.training.__main__ import build_parser
from dlm_fast.training.distill import Distiller
from dlm_fast.training.distill_settings import DistillSettings
from dlm_fast.training.train import Settings, Trainer

from . import quality
from .machine import commit, versions

SETTINGS = {
    "teacher": ("fast-dllm", {"block_length": 8}),
    "student": ("d2f", {}),
    "student, one block at a time": ("llada2", {"threshold": 0.9}),
}


@dataclasses.dataclass(frozen=True)
class Short:
    """A shortened run: optimizer steps and canvas positions a step of both trainings, samples, and prompts a task.

    A shortened run has fewer tasks too: on nine tasks, so little training leaves hardly an answer right.
    """

    steps: int = 700
    distill_steps: int = 100
    tokens_per_step: int = 4096
    samples: int = 10000
    per_task: int = 100
    tasks: tuple[str, ...] = ("word", "reverse")
    threads: int = 1
    compile: bool = True


def run_seed(seed: int, short: Short, folder: Path) -> dict[str, Any]:
    """Trains a teacher and a student from nothing and decodes with both; returns the exact match and the forwards of
    each."""
    started = time.perf_counter()
    weights = {task: 0.0 for task in data.TASK_NAMES if task not in short.tasks}
    teacher = Settings(
        folder / "full",
        steps=short.steps,
        seed=seed,
        tokens_per_step=short.tokens_per_step,
        weights=weights,
        threads=short.threads,
        compile=short.compile,
    )
    Trainer(teacher).run()
    samples = folder / "samples.jsonl"
    data.write_samples(samples, short.samples, seed=seed, weights=weights)
    student = DistillSettings(
        str(teacher.out),
        samples,
        folder / "block",
        **recipe(),
        steps=short.distill_steps,
        seed=seed,
        tokens_per_step=short.tokens_per_step,
        threads=short.threads,
    )
    Distiller(student).run()
    prompts = {task: held_out(task, short.per_task, seed=0) for task in short.tasks}
    found: dict[str, Any] = {"seed": seed, "seconds": 0.0}
    for name, (preset, options) in SETTINGS.items():
        model = dlm_fast.load(teacher.out if name == "teacher" else student.out)
        row = quality.measure(model, quality.Setting(name, preset, options), prompts, batch_size=25)
        found[name] = {key: row[key] for key in ("exact_match", "exact_match_by_task", "nfe", "query_tokens")}
    return found | {"seconds": time.perf_counter() - started}


def recipe() -> dict[str, Any]:
    """The options of the embedded student's first distillation (its training.json), without those that a shortened run
    sets."""
    command = json.loads((checkpoint_path("tiny-block") / "training.json").read_text())["distill"][0]
    values = vars(build_parser().parse_args(["distill", *command]))
    shortened = {"model", "data", "out", "steps", "seed", "tokens_per_step", "threads"}
    return {
        field.name: values[field.name] for field in dataclasses.fields(DistillSettings) if field.name not in shortened
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of each model's exact match and forwards."""
    return {
        name: {
            f"{what}_{kind}": function([run[name][what] for run in runs])
            for what in ("exact_match", "nfe")
            for kind, function in (("mean", statistics.mean), ("std", statistics.stdev))
        }
        for name in SETTINGS
    }


def run(out: Path, seeds: list[int], short: Short, folder: Path) -> dict[str, Any]:
    """Runs every seed and writes out/seeds.json after each; `folder` takes the files of the runs."""
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        runs.append(run_seed(seed, short, folder / f"seed-{seed}"))
        document = {
            "command": "seeds",
            "commit": commit(),
            "versions": versions(),
            "short": dataclasses.asdict(short),
            "runs": runs,
        }
        if len(runs) > 1:
            document["summary"] = summary(runs)
        quality.write(out / "seeds.json", json.dumps(document, indent=1) + "\n")
    return document


def lines(document: dict[str, Any]) -> list[str]:
    """What `python -m bench seeds` prints."""
    found = []
    for name in SETTINGS:
        each = ", ".join(f"{run[name]['exact_match']:.1%}" for run in document["runs"])
        found.append(f"{name}: {each}")
        if "summary" in document:
            row = document["summary"][name]
            found[-1] += (
                f"; mean {row['exact_match_mean']:.1%}, standard deviation {100 * row['exact_match_std']:.1f} points; "
                f"NFE {row['nfe_mean']:.2f} +- {row['nfe_std']:.2f}"
            )
    return found
