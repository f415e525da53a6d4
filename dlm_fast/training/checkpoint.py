"""Checkpoints that survive an interrupted save: one safetensors file, which is replaced as a whole or not at all."""

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
    """A checkpoint could not be written; the checkpoint before is still there as a whole."""


def save(
    path: Path,
    model: nn.Module | Mapping[str, Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    metadata: dict[str, str],
) -> None:
    """Writes weights, the state of optimizers, and text metadata to one file.

    Args:
        path: the file.
        model: a module, or named tensors of a module (in a LoRA run, the trained tensors).
        optimizers: the optimizers, by name.
        metadata: text by name.
    Raises:
        CheckpointWriteError: the disk refuses. `path` still holds the checkpoint before, and no other file is left.
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
        remainder = "the checkpoint before is intact" if path.exists() else "there is none before it"
        raise CheckpointWriteError(f"checkpoint: {path} could not be written, {remainder}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(
    path: Path, model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer], *, partial: bool = False
) -> dict[str, str]:
    """Loads what `save` wrote into the model and the optimizers, in place; returns the metadata.

    With `partial` the file may hold only some of the model's tensors, namely the trained ones. The file must never hold
    a tensor that the model does not have.
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
    """The text metadata alone, so that they can be checked before anything is changed."""
    with open(path, "rb") as handle:
        header_length = int.from_bytes(handle.read(8), "little")
        return json.loads(handle.read(header_length)).get("__metadata__", {})


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a checkpoint."""
    # The file is read once. safe_open would open the file again for the tensors, and if a run replaced the file in
    # between, an old header would meet new data.
    content = path.read_bytes()
    header_length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + header_length]).get("__metadata__", {}), safetensors.torch.load(content)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
