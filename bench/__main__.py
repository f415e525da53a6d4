"""`python -m bench gpu-check --out DIR`, from a checkout."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


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
    given = parser.parse_args(arguments)

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


if __name__ == "__main__":
    raise SystemExit(main())
