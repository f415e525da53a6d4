"""Checkpoints that survive an interrupted save: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written; the one before is still there, whole."""


def save(
    path: Path,
    model: nn.Module | Mapping[str, Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    metadata: dict[str, str],
) -> None:
    """Writes weights, optimizer state and text metadata to `path`.

    model: a module, or the named tensors of one (of a LoRA run, those that are trained).
    Raises CheckpointWriteError when the disk refuses; `path` then still holds the checkpoint before, and nothing else
    is left behind.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = {f"model.{name}": tensor.detach().contiguous() for name, tensor in state.items()}
    for optimizer_name, optimizer in optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                tensors[f"{optimizer_name}.{index}.{key}"] = value.detach().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        kept = "the checkpoint before is intact" if path.exists() else "there is none before it"
        raise CheckpointWriteError(f"checkpoint: {path} could not be written, {kept}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(
    path: Path, model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer], *, partial: bool = False
) -> dict[str, str]:
    """Loads what `save` wrote into the model and optimizers, in place; returns the metadata.

    partial: the file may hold some of the model's tensors only, those that are trained; it must hold no others.
    """
    metadata, tensors = _read(path)
    result = model.load_state_dict(_below(tensors, "model."), strict=not partial)
    if result.unexpected_keys:
        raise ValueError(
            f"checkpoint: {path} must hold tensors of this model only, got {sorted(result.unexpected_keys)[:4]}"
        )
    for optimizer_name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(tensors, f"{optimizer_name}.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata alone, to be checked before anything is changed."""
    with open(path, "rb") as handle:
        header_length = int.from_bytes(handle.read(8), "little")
        return json.loads(handle.read(header_length)).get("__metadata__", {})


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    # One read: safe_open opens the file again for its tensors, and a run that replaces the file in between
    # would pair the old header with the new data.
    content = path.read_bytes()
    header_length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + header_length]).get("__metadata__", {}), safetensors.torch.load(content)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
