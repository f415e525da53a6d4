"""Trains the heads of `learn2pd` and `learned-commit` on a model's own full decodes, by supervision.

The model decodes training prompts with one token per step; the target of a masked position at a step is whether its
prediction already equals the token that this decode ends with (Learn2PD, arXiv:2509.25188; its optimizer: AdamW, 3e-3,
binary cross entropy). The policy of arXiv:2512.09106 is trained by reinforcement there; here it has these same targets.

A head that writes several tokens a step visits states that one token per step never does. So there is a second round:
the head decodes the same prompts, and its states up to the first token that differs from the full decode join the first
ones (after DAgger, Ross et al. 2011).

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

import dlm_fast
from dlm_fast.policies import Choice, Policy, View
from dlm_fast.policies.heads import KINDS, Head, save_head
from dlm_fast.policies.learned import block_time, of_block

from ..tiny.tasks import TASKS, Sample, generate_sample

PRESETS = {"filter": "learn2pd", "commit": "learned-commit"}
# Among these the accept threshold is chosen (see `choose_threshold`).
THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
EXPLORE = 0.5  # the head's threshold in the second round: it visits bolder states than those it will decode through
BATCH = 32
CHECK = 0.25  # share of the prompts that is kept from training and chooses the threshold


@dataclasses.dataclass(frozen=True)
class Recorder(Policy):
    """Keeps, on the host, what every step saw of its blocks, and changes nothing."""

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
    """What a head reads and what it should say: N steps of a row's block, each [N, block_length], time [N].

    right: bool, the prediction is the final token. counts: bool, masked, and the final token is known.
    """

    confidence: Tensor
    eligible: Tensor
    time: Tensor
    right: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.time)

    def inputs(self, kind: str) -> tuple[Tensor, ...]:
        return (self.confidence,) if kind == "filter" else (self.confidence, self.eligible, self.time)

    def __getitem__(self, index: Tensor) -> States:
        return States(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


def joined(states: list[States]) -> States:
    """All states, one list after the other."""
    return States(*(torch.cat([getattr(s, f.name) for s in states]) for f in dataclasses.fields(States)))


def draw_prompts(tasks: list[str], count: int, seed: int) -> list[Sample]:
    """`count` prompts of the training split, the tasks in turn."""
    rng = random.Random(f"policy {seed}")
    return [generate_sample(tasks[i % len(tasks)], rng, "train") for i in range(count)]


def batches(samples: list[Sample]) -> list[list[Sample]]:
    """Answers of like length together: a batch costs what its longest row does."""
    samples = sorted(samples, key=lambda sample: (len(sample.answer), sample.prompt))
    return [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]


def decode(model: nn.Module, samples: list[Sample], **options: Any) -> dlm_fast.GenerateOutput:
    return dlm_fast.generate(model, [[{"role": "user", "content": sample.prompt}] for sample in samples], **options)


@dataclasses.dataclass(frozen=True)
class Full:
    """How a full decode of a prompt ended: its canvas, whether the answer is right, and the forwards it took."""

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
    """The states of full decodes, one token per step; with a head, those that it visits while it agrees with the full
    decodes.

    fulls: the full decodes by prompt: written without a head, read with one.
    """
    mask_id = dlm_fast.handle_of(model).diffusion.mask_token_id
    found = []
    # After a written EOS the block is still filled, so that all of its targets are known.
    common = {"max_new_tokens": max_new_tokens, "block_length": block_length, "stop": "after_block"}
    for batch in batches(samples):
        recorder = Recorder()
        if head is None:
            out = decode(model, batch, preset="llada", policy=recorder, **common)
            for sample, canvas, text, nfe in zip(batch, out.canvas, out.text, out.nfe):
                fulls[sample.prompt] = Full(canvas, TASKS[sample.task].check(sample.prompt, text), nfe)
        else:
            decode(
                model, batch, preset=PRESETS[head.kind], head=head, accept_threshold=EXPLORE, policy=recorder, **common
            )
        canvases = [fulls[sample.prompt].canvas for sample in batch]
        final = torch.full((len(batch), max(map(len, canvases)) + block_length), mask_id)
        for row, canvas in zip(final, canvases):
            row[: len(canvas)] = canvas
        for seen in recorder.seen:
            held = F.pad(seen["tokens"], (0, block_length), value=mask_id)
            agrees = ((held == final) | (held == mask_id) | (final == mask_id)).all(1) & seen["selects"]
            target = final.gather(1, seen["start"].long()[:, None] + torch.arange(block_length))
            counts = seen["eligible"] & (target != mask_id)
            step = States(seen["confidence"], seen["eligible"], seen["time"], seen["token"] == target, counts)
            found.append(step[agrees & counts.any(1)])
    return joined(found)


def loss_of(head: Head, states: States, wrong_weight: float) -> Tensor:
    """Mean binary cross entropy over masked positions; a prediction that is not final counts `wrong_weight` times."""
    loss = F.binary_cross_entropy_with_logits(
        head.logits(*states.inputs(head.kind)), states.right.float(), reduction="none"
    )
    weight = states.counts * torch.where(states.right, 1.0, wrong_weight)
    return (loss * weight).sum() / weight.sum()


def fit(
    head: Head, states: States, *, steps: int, batch: int, learning_rate: float, wrong_weight: float, seed: int
) -> list[float]:
    """Trains the head in place with AdamW, its rate falling to 0 linearly; the loss of every step."""
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
    """An untrained head, the same for the same seed."""
    kept = torch.random.get_rng_state()
    torch.manual_seed(seed)
    head = KINDS[kind](block_length, width, trained_on=trained_on, seed=seed, step=step)
    torch.random.set_rng_state(kept)
    return head


@torch.no_grad()
def accuracy(head: Head, states: States, threshold: float) -> dict[str, float]:
    """Precision and recall of "write it" on these states, the share of predictions that are final, and the loss.

    base_loss: of always saying that share.
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
    """Exact match and forwards per answer of a decoder on prompts."""
    right = nfe = 0
    for batch in batches(samples):
        out = decode(model, batch, preset=preset, **options)
        right += sum(TASKS[sample.task].check(sample.prompt, text) for sample, text in zip(batch, out.text))
        nfe += sum(out.nfe)
    return {"exact_match": right / len(samples), "nfe": nfe / len(samples)}


def choose_threshold(rows: dict[float, dict[str, float]]) -> float:
    """The threshold with the fewest forwards among those at most a point of exact match below the best (ties: the
    highest)."""
    best = max(row["exact_match"] for row in rows.values())
    good = [value for value, row in rows.items() if row["exact_match"] >= best - 0.01 - 1e-9]
    return min(good, key=lambda value: (rows[value]["nfe"], -value))


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
    """A trained head with its threshold, and what was measured: per round, on prompts that it did not train on.

    Args:
        model: from `dlm_fast.load`, of full visibility, with a tokenizer. kind: "filter" or "commit". trained_on: its
            name.
        tasks: to draw prompts from, default all. prompts: how many, a quarter of them kept from training.
        rounds: 1: states of full decodes alone; 2: also those that the head visits. steps: of AdamW, each with `batch`
            states.
        wrong_weight: what writing a token that is not final costs more than not writing one that is.
    Raises:
        ValueError: an argument out of range, by name.
    """
    if kind not in KINDS:
        raise ValueError(f"training: kind must be one of {', '.join(KINDS)}, got kind={kind!r}")
    if prompts < 8:
        raise ValueError(f"training: prompts must be at least 8, got prompts={prompts}")
    for name, value in (
        ("rounds", rounds),
        ("steps", steps),
        ("batch", batch),
        ("block_length", block_length),
        ("width", width),
    ):
        if value < 1:
            raise ValueError(f"training: {name} must be at least 1, got {name}={value}")
    if not wrong_weight > 0:
        raise ValueError(f"training: wrong_weight must be above 0, got wrong_weight={wrong_weight}")
    samples = draw_prompts(list(TASKS) if tasks is None else tasks, prompts, seed)
    kept = random.Random(f"policy check {seed}").sample(range(prompts), max(1, int(CHECK * prompts)))
    held = [samples[i] for i in sorted(kept)]
    trained = [samples[i] for i in range(prompts) if i not in set(kept)]
    common = {"max_new_tokens": max_new_tokens, "block_length": block_length}
    optimizer = {
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "wrong_weight": wrong_weight,
        "seed": seed,
    }
    fulls: dict[str, Full] = {}
    report: dict[str, Any] = {"kind": kind, "rounds": []}
    states: list[States] = []
    check: list[States] = []
    head: Head | None = None
    for _ in range(rounds):
        states.append(record(model, trained, head=head, fulls=fulls, **common))
        check.append(record(model, held, head=head, fulls=fulls, **common))
        head = new_head(kind, block_length, width, trained_on, seed, steps)
        losses = fit(head, joined(states), **optimizer)
        last = sum(losses[-20:]) / len(losses[-20:])
        report["rounds"].append({"states": len(states[-1]), "first_loss": losses[0], "last_loss": last})
    by_threshold = {
        v: quality(model, held, preset=PRESETS[kind], head=head, accept_threshold=v, **common) for v in THRESHOLDS
    }
    head.accept_threshold = choose_threshold(by_threshold)
    report |= {"threshold": head.accept_threshold, "by_threshold": by_threshold}
    report["check"] = [accuracy(head, s, head.accept_threshold) for s in check]
    kept_fulls = [fulls[sample.prompt] for sample in held]
    report["one token per step"] = {
        "exact_match": sum(full.right for full in kept_fulls) / len(held),
        "nfe": sum(full.nfe for full in kept_fulls) / len(held),
    }  # fmt: skip
    report["fast-dllm 0.9"] = quality(model, held, preset="fast-dllm", **common)
    return head, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m dlm_fast.training policy`."""
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
    """Trains a head, writes its file, and prints what was measured; the last line is JSON."""
    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    model = dlm_fast.load(args.model)
    names = ("tasks", "block_length", "max_new_tokens", "prompts", "width", "rounds", "steps", "batch", "learning_rate")
    options = {name: getattr(args, name) for name in (*names, "wrong_weight", "seed")}
    head, report = train(model, args.kind, trained_on=Path(args.model).name, **options)
    save_head(head, args.out)
    for number, row in enumerate(report["rounds"], 1):
        print(f"round {number}: {row['states']} states more, loss {row['first_loss']:.4f} -> {row['last_loss']:.4f}")
    for where, a in zip(("full decodes", *("its own path",) * args.rounds), report["check"]):
        print(
            f"kept prompts, {where}: precision {a['precision']:.4f}, recall {a['recall']:.4f} (final "
            f"{a['base_rate']:.3f}), "
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
