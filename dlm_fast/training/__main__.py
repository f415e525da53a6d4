"""Command line of the training package: python -m dlm_fast.training --model full --out runs/full"""

from __future__ import annotations

import argparse
from pathlib import Path

from dlm_fast.training.model import KINDS
from dlm_fast.training.train import Settings, Trainer


def _task_weight(text: str) -> tuple[str, float]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be TASK=WEIGHT, got {text!r}")
    return name, float(value)


def parse(arguments: list[str] | None = None) -> Settings:
    """Settings from command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m dlm_fast.training",
        description="Train a 0.9 M parameter diffusion language model on synthetic tasks, on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=KINDS, required=True, help="what a position may attend to")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and trained model")
    parser.add_argument("--steps", type=int, default=6000, help="length of the schedule")
    parser.add_argument("--seed", type=int, default=0, help="of weights, samples and masks")
    parser.add_argument("--tokens-per-step", type=int, default=4096, help="positions in one batch")
    parser.add_argument("--muon-lr", type=float, default=Settings.muon_lr, help="peak rate of hidden matrices")
    parser.add_argument("--adam-lr", type=float, default=Settings.adam_lr, help="peak rate of all else")
    parser.add_argument("--decay", type=float, default=Settings.decay, help="share of steps the rate falls over")
    parser.add_argument("--easy", type=float, default=Settings.easy, help="share of easy samples, in tasks that have them")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--minutes", type=float, help="stop after this long, keeping the schedule; resume later")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0, help="time between checkpoints")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of the log")
    parser.add_argument("--init", type=Path, help="folder of a block-causal run whose weights a full model starts from")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--fp32", dest="bf16", action="store_false", help="no bf16 autocast")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run eagerly")
    parser.add_argument(
        "--weight", dest="weights", type=_task_weight, action="append", default=[], metavar="TASK=WEIGHT",
        help="a task's share of samples, instead of its own; may be repeated",
    )  # fmt: skip
    values = vars(parser.parse_args(arguments))
    return Settings(**values | {"weights": dict(values["weights"])})


if __name__ == "__main__":
    Trainer(parse()).run()
