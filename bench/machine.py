"""What the numbers were taken on: the device, its driver, versions, the commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"


def versions() -> dict[str, str]:
    """Versions of python and of the packages that decide results; "unknown" where one is not installed."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or UNKNOWN}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = UNKNOWN
    return found


def commit() -> str:
    """The checkout's commit, "-dirty" if tracked files differ from it; "unknown" without git."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if head is None:
        return UNKNOWN
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head + ("-dirty" if changed else "")


def sources() -> str:
    """A hash of the checkout's Python files, which says without git whether two checkouts are of one commit."""
    digest = hashlib.sha256()
    for folder in ("kernels", "dlm_fast", "bench"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, capability and sizes of a CUDA device, and the driver's version."""
    properties = torch.cuda.get_device_properties(device)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver.splitlines()[0].strip() if driver else UNKNOWN,
    }


def _output(*command: str) -> str | None:
    """What a command wrote to stdout, or None if the command is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
