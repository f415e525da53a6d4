"""Checkpoints that survive an interrupted save: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def save(
    path: Path, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], metadata: dict[str, str]
) -> None:
    """Writes weights, optimizer state and text metadata to `path`.

    Raises OSError, or safetensors' own error, when the disk refuses; `path` then still holds the
    checkpoint before.
    """
    tensors = {f"model.{name}": tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    for optimizer_name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{optimizer_name}.{index}.{key}"] = value.detach().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, str]:
    """Loads what `save` wrote into the model and optimizers, in place; returns the metadata."""
    # One read: safe_open opens the file again for its tensors, and a run that replaces the file in between
    # would pair the old header with the new data.
    content = path.read_bytes()
    header_length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + header_length]).get("__metadata__", {})
    tensors = safetensors.torch.load(content)
    model.load_state_dict(_below(tensors, "model."))
    for optimizer_name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(tensors, f"{optimizer_name}.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return metadata


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
