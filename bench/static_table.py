"""What the machine code of the kernels shows, compiled without a GPU: `dlm_kernels.static` in a process of its own.

The process is its own because Triton decides at import whether it interprets or compiles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dlm_fast  # noqa: F401  in a checkout it puts the dlm_kernels that lies beside it in place
import dlm_kernels


class StaticError(RuntimeError):
    """The static table could not be made; the message says why."""


def static_table(targets: Sequence[str], kernels: Sequence[str], jobs: int | None) -> dict[str, Any]:
    """Registers, spills, shared memory, tensor-core instruction and instructions an element of every configuration.

    Args:
        targets: compute capabilities ("90"); empty = all.
        kernels: names that `dlm_kernels.static` takes; empty = all.
        jobs: processes; None = one for every core.
    Returns:
        {"text": the table, "kernels": its rows, "violations": what must not ship, "only": kernels}.
    Raises:
        StaticError: an unknown target or kernel, no Triton, or a configuration that does not compile.
    """
    command = [sys.executable, "-m", "dlm_kernels.static", "--json"]
    command += [word for target in targets for word in ("--target", target)]
    command += [word for kernel in kernels for word in ("--kernel", kernel)]
    command += [] if jobs is None else ["--jobs", str(jobs)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = str(Path(dlm_kernels.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, environment.get("PYTHONPATH")]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return parse(done.returncode, done.stdout, done.stderr) | {"only": list(kernels)}


def parse(status: int, output: str, errors: str) -> dict[str, Any]:
    """The rows and the text in what `dlm_kernels.static --json` printed."""
    if status not in (0, 1):
        raise StaticError(f"static: exit status {status}: {' '.join(errors.split())[-600:]}")
    text, _, last = output.rstrip("\n").rpartition("\n")
    try:
        rows = json.loads(last)["kernels"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise StaticError(f"static: its last line must be one JSON object with `kernels`, got {last[:200]!r}") from None
    violations = [line for line in errors.splitlines() if " must be " in line] if status == 1 else []
    if status == 1 and not violations:
        raise StaticError(f"static: exit status 1 without a violation: {' '.join(errors.split())[-600:]}")
    return {"text": text, "kernels": rows, "violations": violations}
