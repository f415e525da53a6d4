"""`dlm-fast demo`: the embedded models decode held-out prompts, first before your eyes and then for a table."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import nn

from dlm_kernels import RowState

from ..generate import GenerateOutput, generate
from ..loading import load
from ..patching import handle_of
from .tasks import TASKS, Sample, held_out

MAX_NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of the demo's table.

    Attributes:
        model: name of an embedded model.
        preset: name of a preset.
        options: options of the preset that the run replaces.
        note: what the decoder does, in a few words.
    """

    model: str
    preset: str
    options: dict[str, Any]
    note: str


RUNS = (
    Run("tiny-full", "llada", {"block_length": 8}, "one token per step"),
    Run("tiny-full", "llada", {"block_length": 8, "steps_per_block": 2}, "four tokens per step, no threshold"),
    Run("tiny-full", "fast-dllm", {"block_length": 8}, "threshold 0.9"),
    Run("tiny-full", "fast-dllm-dual", {"block_length": 8}, "threshold 0.9, dual cache (approximate)"),
    Run("tiny-isolated", "fast-dllm", {"block_length": 8}, "threshold 0.9, prompt isolated"),
    Run("tiny-isolated", "fast-dllm-dual", {"block_length": 8}, "threshold 0.9, prompt isolated, dual cache"),
    Run("tiny-block", "sdar", {}, "one token per step, exact cache"),
    Run("tiny-block", "llada2", {"threshold": 0.9}, "threshold 0.9, one block at a time, exact cache"),
    Run("tiny-block", "d2f", {}, "threshold 0.9, blocks in a pipeline, exact cache"),
)


def chat(prompt: str) -> list[dict[str, str]]:
    """A chat of one turn, the form that the embedded models were trained on."""
    return [{"role": "user", "content": prompt}]


def samples(per_task: int, seed: int) -> list[Sample]:
    """`per_task` held-out samples of every task; `seed` says which ones."""
    return [sample for task in TASKS for sample in held_out(task, per_task, seed)]


def measure(model: nn.Module, run: Run, prompts: Sequence[Sample], batch_size: int) -> dict[str, Any]:
    """Decodes the prompts of some samples, and averages what was decoded.

    The averages are exact match, NFE, query tokens, TPF (tokens before the EOS / NFE) and tokens per second.
    """
    # 1. Decode. A batch costs what its longest row costs, so rows of similar length go together. The batches change no
    # result.
    outputs: list[GenerateOutput] = []
    prompts = sorted(prompts, key=lambda sample: len(sample.answer))
    for start in range(0, len(prompts), batch_size):
        chats = [chat(sample.prompt) for sample in prompts[start : start + batch_size]]
        outputs.append(generate(model, chats, preset=run.preset, max_new_tokens=MAX_NEW_TOKENS, **run.options))

    # 2. Average.
    texts = [text for out in outputs for text in out.text]
    correct = [TASKS[sample.task].check(sample.prompt, text) for sample, text in zip(prompts, texts)]
    nfe = sum(sum(out.nfe) for out in outputs)
    tokens = sum(len(ids) for out in outputs for ids in out.sequences)
    seconds = sum(out.wall_time for out in outputs)
    by_task = {task: [c for sample, c in zip(prompts, correct) if sample.task == task] for task in TASKS}
    return {
        "model": run.model,
        "preset": run.preset,
        "options": run.options,
        "note": run.note,
        "exact_match": sum(correct) / len(correct),
        "exact_match_by_task": {task: sum(c) / len(c) for task, c in by_task.items() if c},
        "nfe": nfe / len(correct),
        "query_tokens": sum(sum(out.query_tokens) for out in outputs) / len(correct),
        "tpf": tokens / nfe,
        "tokens_per_s": tokens / seconds,
        "prompts": len(correct),
    }


def show(model: nn.Module, sample: Sample, preset: str, options: dict[str, Any], console: Console) -> bool:
    """Decodes one prompt, live on a terminal and as plain lines elsewhere; returns whether the answer is correct."""
    handle = handle_of(model)
    tokenizer, diffusion = handle.tokenizer, handle.diffusion
    console.print(Text.assemble(("prompt  ", "bold"), sample.prompt))

    def render(state: RowState) -> Text:
        """The answer so far, in which the tokens of the last step are bold and a mask is a dot."""
        row = state.tokens[0].tolist()
        steps = state.unmask_step[0].tolist()
        line = Text()
        for token, step in zip(row, steps):
            if token == diffusion.mask_token_id:
                line.append("·", style="dim")
            elif step >= 0:
                if token in diffusion.eos_token_ids:
                    break
                newest = step == int(state.step[0]) - 1
                line.append(tokenizer.decode([token]), style="bold green" if newest else "")
        return line

    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:

            def on_step(state: RowState) -> None:
                live.update(render(state), refresh=True)

            out = generate(
                model, [chat(sample.prompt)], preset=preset, max_new_tokens=MAX_NEW_TOKENS, on_step=on_step, **options
            )
            live.update(Text(out.text[0].strip()), refresh=True)
    else:
        out = generate(model, [chat(sample.prompt)], preset=preset, max_new_tokens=MAX_NEW_TOKENS, **options)
        console.print(Text.assemble(("answer  ", "bold"), out.text[0].strip()))
    correct = TASKS[sample.task].check(sample.prompt, out.text[0])
    verdict = "right" if correct else "wrong"
    console.print(f"        {verdict}, {len(out.sequences[0])} tokens in {out.nfe[0]} forwards ({preset})", style="dim")
    return correct


def run(
    *,
    per_task: int = 15,
    seed: int = 0,
    batch_size: int = 16,
    backend: str = "auto",
    device: str | None = None,
    quiet: bool = False,
) -> dict:
    """Runs the whole demo. Returns {"decoders": [...]}, with one entry per row of the table that is printed.

    Args:
        per_task: number of held-out prompts of each task, which every decoder decodes.
        seed: which held-out prompts.
        batch_size: number of prompts that are decoded together.
        backend: as for `load`.
        device: as for `load`.
        quiet: whether nothing is printed (for --json).
    """
    # 1. Open the models.
    stream = sys.stderr if quiet else sys.stdout
    # Without a terminal there is no width to fit, so that plain lines are not broken.
    console = Console(file=stream, highlight=False, quiet=quiet, width=None if stream.isatty() else 120)
    models = {name: load(name, backend=backend, device=device) for name in dict.fromkeys(r.model for r in RUNS)}
    handle = handle_of(models["tiny-full"])
    console.print(f"ops: {handle.ops.name} ({handle.ops.reason})\n")

    # 2. Decode three prompts before the reader's eyes.
    for task in ("add", "word", "shuffle"):
        show(models["tiny-full"], held_out(task, 1, seed + 1)[0], "fast-dllm", {"block_length": 8}, console)
        console.print()

    # 3. Measure every decoder on the same prompts.
    prompts = samples(per_task, seed)
    console.print(
        f"{len(prompts)} held-out prompts, {per_task} of each of {len(TASKS)} tasks, "
        f"at most {MAX_NEW_TOKENS} new tokens:"
    )
    rows = []
    for decoder in RUNS:
        with console.status(f"{decoder.model} {decoder.preset}: {decoder.note}"):
            rows.append(measure(models[decoder.model], decoder, prompts, batch_size))

    # 4. Print the table.
    table = Table("model", "decoder", "", box=None, pad_edge=False)
    for heading in ("exact match", "NFE", "TPF", "tokens/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["model"],
            row["preset"],
            row["note"],
            f"{row['exact_match']:.1%}",
            f"{row['nfe']:.1f}",
            f"{row['tpf']:.2f}",
            f"{row['tokens_per_s']:.0f}",
        )
    console.print(table)
    console.print(
        "NFE: forwards per prompt, refreshes and commits included. TPF: tokens before EOS per forward.", style="dim"
    )
    return {"decoders": rows}
