"""Trains the heads of `learn2pd` and `learned-commit` by supervision, on full decodes of the model that they serve.

In a full decode the model writes one token per step. The target of a masked position at a step is whether the model's
prediction already equals the token with which the full decode ends. This is Learn2PD, arXiv:2509.25188, with its
optimizer (AdamW at 3e-3, binary cross-entropy). The paper of `learned-commit`, arXiv:2512.09106, trains its head by
reinforcement; here that head has the same targets.

A head that writes several tokens per step visits states that a full decode never visits. Therefore a second round lets
the head decode the prompts again. The states that the head visits before its first token that differs from the full
decode join the states of the first round (after DAgger, Ross et al. 2011).

    python -m dlm_fast.training policy --kind filter --model tiny-full \\
        --out dlm_fast/tiny/checkpoints/heads/tiny-filter.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import disk
from ..generate import GenerateOutput, generate
from ..limits import MAX_WHOLE, whole
from ..loading import load
from ..patching import handle_of
from ..policies import Choice, Policy, View
from ..policies.heads import KINDS, MAX_SIZE, Head, save_head
from ..policies.learned import block_time, of_block
from ..tiny.tasks import TASKS, Sample, generate_sample
from . import bounds

PRESETS = {"filter": "learn2pd", "commit": "learned-commit"}
# The accept thresholds among which `choose_threshold` chooses.
THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
EXPLORE = 0.5  # the head's threshold in the second round, so that it visits bolder states than in later decodes
BATCH = 32  # prompts that are decoded together
# Bounds of prompts, and of states in an optimizer step, which are held in memory; and of rounds over all prompts.
MAX_STATES, MAX_ROUNDS = 2**20, 64
CHECK = 0.25  # share of the prompts that is kept from training, to choose the threshold and to measure the head


@dataclasses.dataclass(frozen=True)
class Recorder(Policy):
    """Keeps on the host what every step saw of its blocks, and changes nothing.

    Attributes:
        seen: for every step, the tensors that `choose` names.
    """

    seen: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)

    def choose(self, view: View, choice: Choice) -> Choice:
        numbers = {
            "confidence": of_block(view, torch.where(view.eligible, view.confidence, 0.0)),
            "eligible": of_block(view, view.eligible),
            "token": of_block(view, view.token),
            "time": block_time(view),
            "start": view.state.block_start,
            "tokens": view.state.tokens,
            "selects": view.selects,
        }
        self.seen.append({name: tensor.cpu().clone() for name, tensor in numbers.items()})
        return choice


@dataclasses.dataclass(frozen=True)
class States:
    """What a head reads and what the head should say, for N steps of a row's block.

    Attributes:
        confidence: [N, block_length] fp32 probability of each prediction, 0 where nothing is masked.
        eligible: [N, block_length] bool, the position is masked.
        time: [N] fp32 steps that the block has taken, over the block's length.
        right: [N, block_length] bool, the prediction is the final token.
        counts: [N, block_length] bool, the position is masked and its final token is known.
    """

    confidence: Tensor
    eligible: Tensor
    time: Tensor
    right: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.time)

    def inputs(self, kind: str) -> tuple[Tensor, ...]:
        """The arguments of a head of this kind."""
        return (self.confidence,) if kind == "filter" else (self.confidence, self.eligible, self.time)

    def __getitem__(self, index: Tensor) -> States:
        return States(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


def joined(states: list[States]) -> States:
    """All states as one."""
    return States(*(torch.cat([getattr(s, f.name) for s in states]) for f in dataclasses.fields(States)))


def draw_prompts(tasks: list[str], count: int, seed: int) -> list[Sample]:
    """`count` samples of the training split, drawn from the tasks in turn."""
    rng = random.Random(f"policy {seed}")
    return [generate_sample(tasks[i % len(tasks)], rng, "train") for i in range(count)]


def batches(samples: list[Sample]) -> list[list[Sample]]:
    """The samples in batches of similar answer lengths, since a batch costs what its longest row costs."""
    samples = sorted(samples, key=lambda sample: (len(sample.answer), sample.prompt))
    return [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]


def decode(model: nn.Module, samples: list[Sample], **options: Any) -> GenerateOutput:
    """Decodes the prompts of some samples, each as a chat of one turn."""
    return generate(model, [[{"role": "user", "content": sample.prompt}] for sample in samples], **options)


@dataclasses.dataclass(frozen=True)
class Full:
    """How the full decode of a prompt ended.

    Attributes:
        canvas: the final canvas.
        right: whether the answer is correct.
        nfe: number of forwards.
    """

    canvas: Tensor
    right: bool
    nfe: int


def record(
    model: nn.Module,
    samples: list[Sample],
    *,
    fulls: dict[str, Full],
    max_new_tokens: int,
    block_length: int,
    head: Head | None = None,
) -> States:
    """The states of decodes of some samples.

    Without a head the decodes are full ones, and are written to `fulls` by their prompts. With a head the states are
    those that the head visits while the canvas agrees with the full decode, which is read from `fulls`.
    """
    mask_id = handle_of(model).diffusion.mask_token_id
    states = []
    # With this stop rule the block is filled after a written EOS too, so that all targets of the block are known.
    common = {"max_new_tokens": max_new_tokens, "block_length": block_length, "stop": "after_block"}
    for batch in batches(samples):
        # 1. Decode.
        recorder = Recorder()
        if head is None:
            out = decode(model, batch, preset="llada", policy=recorder, **common)
            for sample, canvas, text, nfe in zip(batch, out.canvas, out.text, out.nfe):
                fulls[sample.prompt] = Full(canvas, TASKS[sample.task].check(sample.prompt, text), nfe)
        else:
            decode(
                model, batch, preset=PRESETS[head.kind], head=head, accept_threshold=EXPLORE, policy=recorder, **common
            )

        # 2. The final canvases, with masks behind their ends.
        canvases = [fulls[sample.prompt].canvas for sample in batch]
        final = torch.full((len(batch), max(map(len, canvases)) + block_length), mask_id)
        for row, canvas in zip(final, canvases):
            row[: len(canvas)] = canvas

        # 3. The states of rows that agree with their final canvas and have a position that counts.
        for seen in recorder.seen:
            tokens = F.pad(seen["tokens"], (0, block_length), value=mask_id)
            agrees = ((tokens == final) | (tokens == mask_id) | (final == mask_id)).all(1) & seen["selects"]
            target = final.gather(1, seen["start"].long()[:, None] + torch.arange(block_length))
            counts = seen["eligible"] & (target != mask_id)
            step = States(seen["confidence"], seen["eligible"], seen["time"], seen["token"] == target, counts)
            states.append(step[agrees & counts.any(1)])
    return joined(states)


def loss_of(head: Head, states: States, wrong_weight: float) -> Tensor:
    """Mean binary cross-entropy over the positions that count; a prediction that is not final counts `wrong_weight`."""
    loss = F.binary_cross_entropy_with_logits(
        head.logits(*states.inputs(head.kind)), states.right.float(), reduction="none"
    )
    weight = states.counts * torch.where(states.right, 1.0, wrong_weight)
    return (loss * weight).sum() / weight.sum()


def fit(
    head: Head, states: States, *, steps: int, batch: int, learning_rate: float, wrong_weight: float, seed: int
) -> list[float]:
    """Trains the head in place with AdamW, whose rate falls linearly to 0; returns the loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    head.train().requires_grad_(True)
    losses = []
    for _ in range(steps):
        loss = loss_of(head, states[torch.randint(len(states), (batch,), generator=generator)], wrong_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    head.eval().requires_grad_(False)
    return losses


def new_head(kind: str, block_length: int, width: int, trained_on: str, seed: int, step: int) -> Head:
    """An untrained head; `seed` decides its weights, and torch's generator stays as it was."""
    rng_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    head = KINDS[kind](block_length, width, trained_on=trained_on, seed=seed, step=step)
    torch.random.set_rng_state(rng_state)
    return head


@torch.no_grad()
def accuracy(head: Head, states: States, threshold: float) -> dict[str, float]:
    """Precision and recall of the decision to write, on some states, with the loss of the head.

    "base_rate" is the share of predictions that are final, and "base_loss" is the loss of a head that always says this
    share.
    """
    accepted = (head(*states.inputs(head.kind)) > threshold) & states.counts
    right = states.right & states.counts
    hits, base = (accepted & right).sum().item(), (right.sum() / states.counts.sum()).item()
    rate = torch.tensor(min(max(base, 1e-6), 1 - 1e-6))
    return {
        "precision": hits / max(1, accepted.sum().item()),
        "recall": hits / max(1, right.sum().item()),
        "base_rate": base,
        "loss": loss_of(head, states, 1.0).item(),
        "base_loss": -(rate * rate.log() + (1 - rate) * (1 - rate).log()).item(),
    }


def quality(model: nn.Module, samples: list[Sample], *, preset: str, **options: Any) -> dict[str, float]:
    """Exact match and forwards per answer of a decoder, on some samples."""
    correct = nfe = 0
    for batch in batches(samples):
        out = decode(model, batch, preset=preset, **options)
        correct += sum(TASKS[sample.task].check(sample.prompt, text) for sample, text in zip(batch, out.text))
        nfe += sum(out.nfe)
    return {"exact_match": correct / len(samples), "nfe": nfe / len(samples)}


def choose_threshold(rows: dict[float, dict[str, float]]) -> float:
    """The threshold with the fewest forwards whose exact match is at most one point below the best one.

    Ties go to the highest threshold.
    """
    best_match = max(row["exact_match"] for row in rows.values())
    candidates = [value for value, row in rows.items() if row["exact_match"] >= best_match - 0.01 - 1e-9]
    return min(candidates, key=lambda value: (rows[value]["nfe"], -value))


def train(
    model: nn.Module,
    kind: str,
    *,
    trained_on: str = "",
    tasks: list[str] | None = None,
    block_length: int = 8,
    max_new_tokens: int = 64,
    prompts: int = 600,
    width: int = 32,
    rounds: int = 2,
    steps: int = 1500,
    batch: int = 256,
    learning_rate: float = 3e-3,
    wrong_weight: float = 1.0,
    seed: int = 0,
) -> tuple[Head, dict[str, Any]]:
    """A trained head with its threshold, and a report of what was measured on prompts that are kept from training.

    Args:
        model: a model from `dlm_fast.load`, of full visibility and with a tokenizer.
        kind: kind of the head, "filter" or "commit".
        trained_on: name of the model, for the head's file.
        tasks: names of the tasks that prompts are drawn from; None = all tasks.
        block_length: block length with which the head decodes.
        max_new_tokens: response tokens of each prompt.
        prompts: number of prompts, of which a quarter is kept from training.
        width: size of the head's hidden layer.
        rounds: number of rounds; 1 = states of full decodes alone, 2 = also the states that the head visits.
        steps: optimizer steps of a round.
        batch: states in an optimizer step.
        learning_rate: rate of the first step.
        wrong_weight: how many times more it costs to write a token that is not final than to leave out a final one.
        seed: random seed of prompts, weights and batches.
    Raises:
        ValueError: an argument is out of range. The message names the argument.
    """
    # 1. Check the arguments.
    bounds.choice("training", "kind", kind, KINDS)
    handle_of(model)  # which refuses what `load` has not opened
    positions = model.config.max_position_embeddings
    if tasks is not None:
        bounds.names("training", "tasks", tasks, TASKS)
    for name, value, low, high in (
        ("prompts", prompts, 8, MAX_STATES),
        ("rounds", rounds, 1, MAX_ROUNDS),
        ("steps", steps, 1, MAX_WHOLE),
        ("batch", batch, 1, MAX_STATES),
        ("block_length", block_length, 1, MAX_SIZE),
        ("width", width, 1, MAX_SIZE),
        ("max_new_tokens", max_new_tokens, 1, positions),
        ("seed", seed, 0, bounds.MAX_SEED),
    ):
        whole("training", name, value, low, high)
    bounds.positive("training", "learning_rate", learning_rate)
    bounds.positive("training", "wrong_weight", wrong_weight)
    if not isinstance(trained_on, str):
        raise ValueError(f"training: trained_on must be a name, got trained_on={trained_on!r}")
    new_head(kind, block_length, width, trained_on, seed, steps)  # a head checks its sizes when it is made

    # 2. Draw prompts, and keep some from training.
    samples = draw_prompts(list(TASKS) if tasks is None else tasks, prompts, seed)
    check_indices = random.Random(f"policy check {seed}").sample(range(prompts), max(1, int(CHECK * prompts)))
    check_samples = [samples[i] for i in sorted(check_indices)]
    training_samples = [samples[i] for i in range(prompts) if i not in set(check_indices)]
    common = {"max_new_tokens": max_new_tokens, "block_length": block_length}
    optimizer = {
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "wrong_weight": wrong_weight,
        "seed": seed,
    }

    # 3. Train a new head in every round, on the states of all rounds so far.
    fulls: dict[str, Full] = {}
    report: dict[str, Any] = {"kind": kind, "rounds": []}
    states: list[States] = []
    check_states: list[States] = []
    head: Head | None = None
    for _ in range(rounds):
        states.append(record(model, training_samples, head=head, fulls=fulls, **common))
        check_states.append(record(model, check_samples, head=head, fulls=fulls, **common))
        head = new_head(kind, block_length, width, trained_on, seed, steps)
        losses = fit(head, joined(states), **optimizer)
        last_loss = sum(losses[-20:]) / len(losses[-20:])
        report["rounds"].append({"states": len(states[-1]), "first_loss": losses[0], "last_loss": last_loss})

    # 4. Choose the threshold, and measure the head beside two other decoders.
    by_threshold = {
        v: quality(model, check_samples, preset=PRESETS[kind], head=head, accept_threshold=v, **common)
        for v in THRESHOLDS
    }
    head.accept_threshold = choose_threshold(by_threshold)
    report |= {"threshold": head.accept_threshold, "by_threshold": by_threshold}
    report["check"] = [accuracy(head, s, head.accept_threshold) for s in check_states]
    check_fulls = [fulls[sample.prompt] for sample in check_samples]
    report["one token per step"] = {
        "exact_match": sum(full.right for full in check_fulls) / len(check_samples),
        "nfe": sum(full.nfe for full in check_fulls) / len(check_samples),
    }
    report["fast-dllm 0.9"] = quality(model, check_samples, preset="fast-dllm", **common)
    return head, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m dlm_fast.training policy`."""
    parser.add_argument(
        "--kind", choices=sorted(KINDS), required=True, help="filter: of learn2pd; commit: of learned-commit"
    )
    parser.add_argument(
        "--model", default="tiny-full", help="an embedded model or a checkpoint folder, of full visibility"
    )
    parser.add_argument("--out", type=Path, required=True, help="the head's file, *.safetensors")
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK", help="of the prompts"
    )
    parser.add_argument(
        "--prompts", type=int, default=600, help="of the training split; a quarter chooses the threshold"
    )
    parser.add_argument("--block-length", type=int, default=8, help="that the head decodes with")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=32, help="of the head's hidden layer")
    parser.add_argument(
        "--rounds", type=int, default=2, help="2: train again with the states that the head itself visits"
    )
    parser.add_argument("--steps", type=int, default=1500, help="of AdamW, each round")
    parser.add_argument("--batch", type=int, default=256, help="states in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at the first step, falling to 0")
    parser.add_argument("--wrong-weight", type=float, default=1.0, help="cost of writing a token that is not final")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, weights and batches")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")


def run(args: argparse.Namespace) -> None:
    """Runs `python -m dlm_fast.training policy`: trains a head, writes its file, and prints a report.

    The last line is the report as JSON.
    """
    # 1. Train, and write the file.
    started = time.perf_counter()
    whole("training", "threads", args.threads, 1, bounds.MAX_THREADS)
    disk.check_output("training", "out", args.out)
    torch.set_num_threads(args.threads)
    model = load(args.model)
    names = ("tasks", "block_length", "max_new_tokens", "prompts", "width", "rounds", "steps", "batch", "learning_rate")
    options = {name: getattr(args, name) for name in (*names, "wrong_weight", "seed")}
    head, report = train(model, args.kind, trained_on=Path(args.model).name, **options)
    save_head(head, args.out)

    # 2. Print the report.
    for number, row in enumerate(report["rounds"], 1):
        print(f"round {number}: {row['states']} states more, loss {row['first_loss']:.4f} -> {row['last_loss']:.4f}")
    for where, a in zip(("full decodes", *("its own path",) * args.rounds), report["check"]):
        print(
            f"kept prompts, {where}: precision {a['precision']:.4f}, recall {a['recall']:.4f} "
            f"(final {a['base_rate']:.3f}), "
            f"loss {a['loss']:.4f} (of always saying that share {a['base_loss']:.4f})"
        )
    for value, row in report["by_threshold"].items():
        chosen = "  <- chosen" if value == report["threshold"] else ""
        print(f"threshold {value:4}: exact match {row['exact_match']:6.1%}, NFE {row['nfe']:5.2f}{chosen}")
    for name in ("one token per step", "fast-dllm 0.9"):
        print(f"{name}: exact match {report[name]['exact_match']:6.1%}, NFE {report[name]['nfe']:5.2f}")
    seconds = time.perf_counter() - started
    print(f"{args.out}: {sum(p.numel() for p in head.parameters())} parameters, {seconds:.0f} s")
    print(json.dumps(report | {"out": str(args.out), "seconds": seconds}))
