"""`python -m bench gpu-check --out DIR` and `python -m bench quality`, from a checkout."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 every check is green, 1 one is red, 2 it could not run at all."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("gpu-check", help="are the kernels right on this GPU, and how fast are they")
    check.add_argument("--out", type=Path, required=True, help="folder for gpu-check.json; made if it does not exist")
    check.add_argument("--seed", type=int, default=None, help="of the random inputs, to repeat a run (default: a fresh one)")
    check.add_argument(
        "--seconds", type=float, default=450, help="after these, what has not been timed is reported as skipped (default: 450)"
    )
    check.add_argument(
        "--compile-threads", type=int, default=8, help="threads that compile kernels ahead of the checks; 0 = none (default: 8)"
    )
    quality = commands.add_parser("quality", help="exact match against forwards, for every preset on the embedded models (CPU will do)")
    quality.add_argument("--out", type=Path, default=RESULTS, help="folder for quality.json, .md and .png (default: bench/results)")
    quality.add_argument("--per-task", type=int, default=100, help="held-out prompts of every task (default: 100)")
    quality.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    quality.add_argument("--batch-size", type=int, default=25, help="prompts decoded together (default: 25)")
    quality.add_argument("--models", nargs="+", metavar="NAME", default=None, help="embedded models (default: all)")
    quality.add_argument("--presets", nargs="+", metavar="NAME", default=None, help="presets (default: all)")
    quality.add_argument("--from", nargs="+", type=Path, metavar="FILE", default=[], dest="earlier", help="results to take measured settings from")
    given = parser.parse_args(arguments)
    if given.command == "quality":
        return _quality(given)

    import torch

    if not torch.cuda.is_available():
        print("gpu-check: needs a CUDA GPU, and torch sees none here; nothing was measured", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("gpu-check: unset TRITON_INTERPRET: it would run the kernels on the CPU", file=sys.stderr)
        return 2
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu-check: --out {given.out}: {error}", file=sys.stderr)
        return 2
    from .gpu_check import cuda_rig, gpu_check

    return gpu_check(cuda_rig(given.compile_threads), given.out, given.seed, given.seconds)


def _quality(given: argparse.Namespace) -> int:
    from dlm_fast.presets import PRESETS

    from . import quality

    for name, known in (("models", quality.MODELS), ("presets", tuple(PRESETS))):
        wrong = [value for value in getattr(given, name) or () if value not in known]
        if wrong:
            print(f"quality: --{name} must be among {', '.join(known)}, got {', '.join(wrong)}", file=sys.stderr)
            return 2
    if min(given.per_task, given.batch_size) < 1:
        print("quality: --per-task and --batch-size must be at least 1", file=sys.stderr)
        return 2
    document = quality.run(
        given.out, per_task=given.per_task, seed=given.seed, batch_size=given.batch_size, models=given.models or quality.MODELS,
        presets=given.presets, earlier=given.earlier,
    )  # fmt: skip
    print(quality.table(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
