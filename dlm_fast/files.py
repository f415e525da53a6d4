"""Checkpoints as files: where the embedded checkpoints lie, and which files are never opened."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "tiny" / "checkpoints"
EMBEDDED = ("tiny-full", "tiny-isolated", "tiny-block")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class CheckpointError(ValueError):
    """A folder or file cannot be opened as a checkpoint; the message names the file and the rule."""


def checkpoint_path(name_or_path: str | Path) -> Path:
    """The folder of an embedded model (`EMBEDDED`), or of a checkpoint on disk."""
    path = Path(name_or_path)
    if str(name_or_path) in EMBEDDED and not path.exists():
        path = CHECKPOINTS / str(name_or_path)
    if not path.is_dir():
        raise CheckpointError(
            f"load: path must be a checkpoint folder or one of {', '.join(EMBEDDED)}, got {str(name_or_path)!r}"
        )
    return path
