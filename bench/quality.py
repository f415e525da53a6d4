"""Quality against cost: every preset on held-out prompts of the embedded models.

A point is a preset with its options: exact match against forwards per answer (NFE) and against positions computed (query tokens).
Everything is counted, nothing is timed, and greedy decoding of seeded prompts makes the numbers reproducible.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import dlm_fast
import torch
import transformers
from dlm_fast.presets import PRESETS
from dlm_fast.tasks import TASKS, Sample, held_out
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .machine import commit, versions

MODELS = ("tiny-full", "tiny-block")
MAX_NEW_TOKENS = 64
BLOCK_LENGTH = 8  # of tiny-full, which was trained with any; tiny-block has its own
BASELINES = {"tiny-full": "llada", "tiny-block": "sdar"}
# What cannot run on these models, and why; every other preset is run.
LEFT_OUT = {
    "fast-dllm-v2": "needs a model whose rows predict the next position",
    "nbdiff": "needs a model whose rows predict the next position",
    "learn2pd": "needs a trained filter",
    "llada2.2": "needs a model with commands to insert and delete",
    "diffusion-gemma": "needs a uniform-noise model",
}
# Settings beyond the defaults.
SWEEPS: dict[str, Sequence[dict[str, Any]]] = {
    "llada": ({"steps_per_block": 4}, {"steps_per_block": 2}, {"block_length": 16}, {"block_length": 32}),
    "fast-dllm": ({"threshold": 0.5}, {"threshold": 0.7}, {"threshold": 0.95}, {"score": "margin"}),
    "fast-dllm-factor": ({"factor": 0.3}, {"factor": 3.0}),
    "eb-sampler": ({"entropy_bound": 0.01}, {"entropy_bound": 0.5}),
    "dparallel": ({"threshold": -0.1},),
    "dream": ({"steps_per_block": 16},),
    "sched": ({"max_change": 1.0},),
    "rcr": ({"steps_per_block": 4},),
    "dkv-cache": ({"refresh_interval": 2},),
    "sdar": ({"steps_per_block": 4}, {"steps_per_block": 2}),
    "llada2": ({"threshold": 0.5}, {"threshold": 0.7}, {"threshold": 0.9}),
    "d2f": (
        {"append_threshold": 1.0, "activate_threshold": 1.0},
        {"append_threshold": 0.5},
        {"append_threshold": 0.9},
        {"threshold": 0.7},
        {"threshold": 0.95},
        {"cache": "none"},
    ),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A point: a model, a preset, and what of the preset is changed."""

    model: str
    preset: str
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return json.dumps([self.model, self.preset, self.options], sort_keys=True)

    @property
    def label(self) -> str:
        return " ".join([self.preset, *(f"{name}={value}" for name, value in self.options.items() if name != "block_length" or value != BLOCK_LENGTH)])


def settings(models: Iterable[str] = MODELS, presets: Iterable[str] | None = None) -> list[Setting]:
    """Every setting of the chosen models and presets, baselines first."""
    chosen = list(PRESETS) if presets is None else list(presets)
    found = []
    for model in models:
        visibility = dlm_fast.patching.handle_of(dlm_fast.load(model)).diffusion.visibility
        for name in chosen:
            preset = PRESETS[name]
            if preset.visibility != visibility or name in LEFT_OUT:
                continue
            own = {"block_length": BLOCK_LENGTH} if visibility == "full" and preset.schedule != "canvas" else {}
            found += [Setting(model, name, {**own, **more}) for more in ({}, *SWEEPS.get(name, ()))]
    return found


def measure(model: torch.nn.Module, setting: Setting, prompts: dict[str, list[Sample]], batch_size: int) -> dict[str, Any]:
    """Decodes every prompt, task by task, and averages over all of them."""
    right: dict[str, float] = {}
    nfe = query_tokens = tokens = count = 0
    started = time.perf_counter()
    for task, samples in prompts.items():
        hits = 0
        # A batch costs what its longest row does: rows of like length go together, which changes no result.
        samples = sorted(samples, key=lambda sample: len(sample.answer))
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            chats = [[{"role": "user", "content": sample.prompt}] for sample in batch]
            out = dlm_fast.generate(model, chats, preset=setting.preset, max_new_tokens=MAX_NEW_TOKENS, **setting.options)
            hits += sum(TASKS[task].check(sample.prompt, text) for sample, text in zip(batch, out.text))
            nfe, query_tokens = nfe + sum(out.nfe), query_tokens + sum(out.query_tokens)
            tokens, count = tokens + sum(len(ids) for ids in out.sequences), count + len(batch)
        right[task] = hits / len(samples)
    return {
        **dataclasses.asdict(setting),
        "exactness": PRESETS[setting.preset].exactness,
        "exact_match": sum(right[task] * len(prompts[task]) for task in prompts) / count,
        "exact_match_by_task": right,
        "nfe": nfe / count,
        "query_tokens": query_tokens / count,
        "tpf": tokens / nfe,
        "prompts": count,
        "seconds": time.perf_counter() - started,
    }


def finished(files: Iterable[Path], per_task: int, seed: int) -> dict[str, dict[str, Any]]:
    """Settings that earlier runs with the same prompts have measured, by key."""
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        document = json.loads(file.read_text())
        if (document["per_task"], document["seed"]) != (per_task, seed):
            raise ValueError(
                f"quality: {file} must hold per_task={per_task}, seed={seed}, got per_task={document['per_task']}, seed={document['seed']}"
            )
        for row in document["settings"]:
            rows[Setting(row["model"], row["preset"], row["options"]).key] = row
    return rows


def run(
    out: Path, *, per_task: int, seed: int, batch_size: int, models: Sequence[str], presets: Sequence[str] | None, earlier: Sequence[Path]
) -> dict[str, Any]:
    """Measures every setting that `earlier` results do not hold; writes quality.json after each, then the table and the plot."""
    transformers.utils.logging.disable_progress_bar()  # its bar for loading weights would run through ours
    wanted = settings(models, presets)
    done = finished(earlier, per_task, seed)
    prompts = {task: held_out(task, per_task, seed) for task in TASKS}
    rows: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    facts = {"command": "quality", "per_task": per_task, "seed": seed, "max_new_tokens": MAX_NEW_TOKENS, "left_out": LEFT_OUT}
    facts |= {"commit": commit(), "versions": versions()}
    loaded: dict[str, torch.nn.Module] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("quality", total=len(wanted))
        for setting in wanted:
            bar.update(task, description=f"{setting.model} {setting.label}"[:60])
            row = done.get(setting.key)
            if row is None:
                if setting.model not in loaded:
                    loaded[setting.model] = dlm_fast.load(setting.model)
                row = measure(loaded[setting.model], setting, prompts, batch_size)
                if not sys.stderr.isatty():
                    print(line(row), file=sys.stderr, flush=True)
            rows.append(row)
            document = {**facts, "settings": rows}
            write(out / "quality.json", json.dumps(document, indent=1) + "\n")
            bar.advance(task)
    write(out / "quality.md", table(document))
    plot(document, out / "quality.png")
    return document


def write(path: Path, text: str) -> None:
    """Replaces the file only once all of it is written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def line(row: dict[str, Any]) -> str:
    setting = Setting(row["model"], row["preset"], row["options"])
    return f"{row['model']:11}{setting.label:50}{row['exact_match']:7.1%}  NFE {row['nfe']:6.2f}  query tokens {row['query_tokens']:8.1f}  {row['seconds']:.0f} s"


def table(document: dict[str, Any]) -> str:
    """The settings of every model as a Markdown table, in the order of NFE."""
    lines = [
        f"Exact match on {document['per_task']} held-out prompts a task ({len(TASKS)} tasks, seed {document['seed']}), greedy; NFE and query",
        "tokens (positions computed) are means per prompt and count prefills, refreshes and commits. `python -m bench quality`.",
        "",
    ]
    for model in dict.fromkeys(row["model"] for row in document["settings"]):
        lines += [f"## {model}", "", "| preset | exact match | worst task | NFE | query tokens | exactness |", "|-|-|-|-|-|-|"]
        for row in sorted((r for r in document["settings"] if r["model"] == model), key=lambda r: r["nfe"]):
            label = Setting(row["model"], row["preset"], row["options"]).label
            worst = min(row["exact_match_by_task"], key=row["exact_match_by_task"].get)
            exactness = row["exactness"].split(":")[0]
            cells = (label, f"{row['exact_match']:.1%}", f"{worst} {row['exact_match_by_task'][worst]:.0%}", f"{row['nfe']:.2f}")
            lines.append(f"| {' | '.join(cells)} | {row['query_tokens']:.0f} | {exactness} |")
        lines.append("")
    lines += ["Not run: " + "; ".join(f"{name} ({why})" for name, why in document["left_out"].items()) + ".", ""]
    return "\n".join(lines)


def frontier(rows: Sequence[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """The rows that no other beats in both cost and exact match, by cost."""
    best, kept = -1.0, []
    for row in sorted(rows, key=lambda r: (r[cost], -r["exact_match"])):
        if row["exact_match"] > best:
            best = row["exact_match"]
            kept.append(row)
    return kept


def plot(document: dict[str, Any], path: Path) -> None:
    """One panel per model and cost: every setting a point, those that nothing beats named and joined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in document["settings"]))
    costs = (("nfe", "forwards per answer (NFE)"), ("query_tokens", "positions computed per answer (query tokens)"))
    figure, axes = pyplot.subplots(len(models), len(costs), figsize=(15, 6.2 * len(models)), squeeze=False)
    for axis_row, model in zip(axes, models):
        rows = [row for row in document["settings"] if row["model"] == model]
        for axis, (cost, title) in zip(axis_row, costs):
            for exactness, marker, color in (("exact", "o", "tab:blue"), ("approximate", "^", "tab:orange")):
                points = [row for row in rows if row["exactness"].startswith(exactness)]
                x, y = [row[cost] for row in points], [100 * row["exact_match"] for row in points]
                axis.scatter(x, y, marker=marker, color=color, alpha=0.7, label=f"{exactness} decoders")
            best = frontier(rows, cost)
            axis.plot([row[cost] for row in best], [100 * row["exact_match"] for row in best], color="0.6", linewidth=1, zorder=0)
            named = {id(row): row for row in (*best, *(row for row in rows if not set(row["options"]) - {"block_length"}))}
            for row in named.values():
                label = Setting(row["model"], row["preset"], row["options"]).label
                axis.annotate(label, (row[cost], 100 * row["exact_match"]), fontsize=6, xytext=(3, 3), textcoords="offset points")
            axis.set(xscale="log", xlabel=title, ylabel="exact match, %", title=model)
            axis.grid(alpha=0.3)
            axis.legend(loc="lower right", fontsize=8)
    figure.suptitle(f"{document['per_task']} held-out prompts a task, {len(TASKS)} tasks, seed {document['seed']}, greedy; line: what nothing beats")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
