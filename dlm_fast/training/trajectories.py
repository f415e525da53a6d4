"""Adds to a data file the order in which a teacher fills its answers, for the objective "trajectory".

The teacher writes one token per step. In a pseudo-trajectory (d3LLM) the masks of a training canvas follow the
teacher's order, while the answer is the data's.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from .. import disk
from ..generate import generate
from ..limits import whole
from ..loading import load
from ..patching import handle_of
from . import bounds
from .dataset import BLANK, CanvasShape, Dataset, DatasetError, read_dataset, read_lines


def teacher_orders(model: nn.Module, dataset: Dataset, *, block_length: int, batch_size: int) -> list[list[int]]:
    """For each sample, the denoise step at which the teacher wrote each position.

    The positions are those of the whole blocks that hold the sample's answer. The teacher, a model from
    `dlm_fast.load`, writes an answer of its own block by block, one token per step. The teacher does not stop at an
    EOS, since the sample's answer may be longer than the teacher's.
    """
    # 1. A decoder of one token per step.
    decoder: dict[str, Any] = {"preset": "sdar", "steps_per_block": block_length}
    if handle_of(model).diffusion.visibility == "full":
        decoder |= {"preset": "llada", "block_length": block_length}

    # 2. Decode in batches of similar lengths.
    orders: list[list[int]] = [[] for _ in dataset.samples]
    by_length = sorted(
        range(len(dataset.samples)), key=lambda i: len(dataset.samples[i].prompt) + len(dataset.samples[i].answer)
    )
    for begin in tqdm(range(0, len(by_length), batch_size), desc="trajectories", mininterval=5):
        chosen = by_length[begin : begin + batch_size]
        samples = [dataset.samples[i] for i in chosen]
        max_new = [block_length * math.ceil(len(sample.answer) / block_length) for sample in samples]
        out = generate(
            model, [sample.prompt for sample in samples], max_new_tokens=max_new, eos_token_ids=[], **decoder
        )
        for i, sample, steps in zip(chosen, samples, out.unmask_step):
            orders[i] = steps[len(sample.prompt) :].tolist()
    return orders


def write_orders(
    model: str,
    data: Path,
    out: Path,
    *,
    block_length: int,
    max_length: int,
    batch_size: int = 32,
    device: str | None = None,
) -> None:
    """Copies the JSON lines of `data` to `out`, each with an "order".
    The output is replaced as a whole, once all orders are known. Raises DatasetError as `read_dataset` does, and
    ValueError for an argument out of range; the message names the argument.
    """
    for name, value in (("data", data), ("out", out)):
        bounds.place("trajectories", name, value)
    data, out = Path(data), Path(out)
    for name, value in (("block_length", block_length), ("max_length", max_length), ("batch_size", batch_size)):
        whole("trajectories", name, value, 1)
    disk.check_output("trajectories", "out", out, data)
    teacher = load(model, device=device)
    handle = handle_of(teacher)
    limit = teacher.config.max_position_embeddings
    if max_length > limit:
        raise ValueError(
            f"trajectories: max_length must fit the model's {limit} positions, got max_length={max_length}"
        )
    shape = CanvasShape(block_length, False, max_length, 0.0)
    dataset = read_dataset(data, handle.tokenizer, handle.diffusion, shape, vocab_size=teacher.config.vocab_size)
    orders = teacher_orders(teacher, dataset, block_length=block_length, batch_size=batch_size)
    lines, digest = read_lines(data)
    if digest != dataset.digest:
        raise DatasetError(f"trajectories: data must stay as it is, got other lines in {data} than at the start")
    records = [json.loads(line) for line in lines if line.strip(BLANK)]
    with disk.replacing(out) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(
            json.dumps(record | {"order": order}) + "\n" for record, order in zip(records, orders, strict=True)
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m dlm_fast.training trajectories`."""
    parser.add_argument("--model", required=True, help="checkpoint folder of the teacher")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines of prompt and answer")
    parser.add_argument("--out", type=Path, required=True, help="file to write: the same lines, each with its order")
    parser.add_argument("--block-length", type=int, default=32, help="blocks in which the teacher fills its answer")
    parser.add_argument("--max-length", type=int, default=512, help="most positions of a canvas")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts decoded together")
    parser.add_argument("--device", help="default: a GPU if there is one")


def run(values: argparse.Namespace) -> None:
    """Runs `python -m dlm_fast.training trajectories`."""
    write_orders(
        values.model,
        values.data,
        values.out,
        block_length=values.block_length,
        max_length=values.max_length,
        batch_size=values.batch_size,
        device=values.device,
    )
