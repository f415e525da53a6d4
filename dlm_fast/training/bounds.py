"""Bounds of the settings of a training, and the errors that name them.

Sizes are checked before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..limits import number, shown

# The largest seed: seed * SEED_STRIDE + step must be a seed of torch, which has 64 bits.
MAX_SEED = 2**32 - 1
MAX_THREADS = 1024
# The largest rank of LoRA, which is more than the sides of most layers.
MAX_RANK = 4096
# The largest number of positions in a step of pretraining. The mask of a step takes 256 bytes for each position.
MAX_TOKENS = 2**20


def choice(owner: str, name: str, value: Any, allowed: Iterable[str | None]) -> None:
    """Raises ValueError unless the value is one of the names (or None, if None is among them)."""
    allowed = tuple(allowed)
    if not (value is None or isinstance(value, str)) or value not in allowed:
        names = ", ".join(str(name) for name in allowed)
        raise ValueError(f"{owner}: {name} must be one of {names}, got {name}={shown(value)}")


def positive(owner: str, name: str, value: Any, high: float | None = None) -> None:
    """Raises ValueError unless the value is a finite number above 0, and at most `high`."""
    number(owner, name, value, 0, *(() if high is None else (high,)))
    if not value > 0:
        raise ValueError(f"{owner}: {name} must be positive, got {name}={shown(value)}")


def place(owner: str, name: str, value: Any, *, none: bool = False) -> None:
    """Raises TypeError or ValueError unless the value is the path of a file or folder (or None, if `none`)."""
    if value is None and none:
        return
    if not isinstance(value, (str, Path)):
        raise TypeError(f"{owner}: {name} must be a path, got {name}={shown(value)}")
    if not str(value) or "\0" in str(value):
        raise ValueError(f"{owner}: {name} must be a path, got {name}={str(value)!r}")


def names(owner: str, name: str, value: Any, allowed: Iterable[str] | None = None) -> None:
    """Raises ValueError unless the value is a list or tuple of names, at least one, each among `allowed`."""
    known = None if allowed is None else tuple(allowed)
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    if not is_list or not all(isinstance(item, str) and item and (known is None or item in known) for item in value):
        rule = "at least one name" if known is None else f"at least one of {', '.join(known)}"
        raise ValueError(f"{owner}: {name} must be {rule}, got {name}={shown(value)}")
