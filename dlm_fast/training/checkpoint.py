"""Checkpoints that survive an interrupted save: one safetensors file, which is replaced as a whole or not at all.

A run resumes only from what it left. What is read of a checkpoint is compared with a checksum, and all of it with what
the run trains, before anything of the run is changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import disk, fingerprint
from ..files import CheckpointError
from ..limits import number, whole
from .optimization import STATES

# The metadata that `save` adds: a checksum of all else, and the trained tensors that no optimizer has changed so far.
CHECKSUM, UNSTEPPED = "checksum", "unstepped"


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the checkpoint before is still there as a whole."""


def save(
    path: Path,
    trained: Mapping[str, Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    metadata: Mapping[str, str],
) -> None:
    """Writes trained tensors, the state of optimizers, and text metadata to one file.

    Args:
        path: the file.
        trained: the trained tensors, by name.
        optimizers: the optimizers, by name.
        metadata: text by name.
    Raises:
        CheckpointWriteError: the disk refuses. `path` still holds the checkpoint before, and no other file is left.
    """
    tensors = {f"model.{name}": tensor.detach().contiguous() for name, tensor in trained.items()}
    unstepped = []
    for optimizer_name, optimizer in optimizers.items():
        states = optimizer.state_dict()["state"]
        for index in range(len(_parameters(optimizer))):
            if index not in states:
                unstepped.append(f"{optimizer_name}.{index}")
            for key, value in states.get(index, {}).items():
                tensors[f"{optimizer_name}.{index}.{key}"] = value.detach().contiguous()
    content = {**metadata, UNSTEPPED: json.dumps(unstepped)}
    content[CHECKSUM] = _checksum(content, tensors)
    try:
        with disk.replacing(path) as partial:
            save_file(tensors, partial, metadata=content)
    except (OSError, SafetensorError) as error:
        remainder = "the checkpoint before is intact" if path.exists() else "there is none before it"
        raise CheckpointWriteError(f"checkpoint: {path} could not be written, {remainder}: {error}") from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read; nothing of it is in use yet.

    Attributes:
        path: the file.
        metadata: text by name, less the checksum.
        tensors: the tensors, by the names that `save` gives them.
    """

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    @property
    def owner(self) -> str:
        """Who speaks in errors about a value of the metadata."""
        return f"checkpoint: {self.path}"

    def check_kind(self, owner: str, kind: str, fields: set[str]) -> None:
        """Raises CheckpointError unless this is a checkpoint of a kind of run, with the metadata of that kind."""
        if self.metadata.get("kind") != kind:
            raise CheckpointError(
                f"{owner}: out must hold a checkpoint of a {kind} to resume, got another one at {self.path}, of kind "
                f"{self.metadata.get('kind')!r}"
            )
        names = fields | {UNSTEPPED}
        if set(self.metadata) != names:
            raise CheckpointError(f"{self.owner}: metadata must be {sorted(names)}, got {sorted(self.metadata)}")

    def value(self, name: str) -> Any:
        """A value of the metadata, which is JSON of finite numbers."""
        text = self.metadata[name]
        try:
            return json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.owner}: {name} must be JSON, got {name}={text[:80]!r}: {error}") from error

    def whole(self, name: str, high: int) -> int:
        """A whole number of the metadata, which must be in [0, high]."""
        value = self.value(name)
        whole(self.owner, name, value, 0, high)
        return value

    def number(self, name: str) -> float:
        """A finite number of the metadata, which must be at least 0."""
        value = self.value(name)
        number(self.owner, name, value, 0)
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object of the metadata."""
        value = self.value(name)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.owner}: {name} must be a JSON object, got a {type(value).__name__}")
        return value

    def refuse(self, name: str, rule: str, value: Any) -> None:
        """Raises CheckpointError for a value of the metadata."""
        raise CheckpointError(f"{self.owner}: {name} must be {rule}, got {name}={str(value)[:200]}")


def compare(owner: str, saved: Mapping[str, Any], current: Mapping[str, Any], *, what: str = "") -> None:
    """Raises CheckpointError unless the values of the run are those that the checkpoint was made with.

    `what` stands before the names in the error, as in "content of ".
    """
    for name in sorted(saved.keys() | current.keys()):
        if name not in saved or name not in current or saved[name] != current[name]:
            raise CheckpointError(
                f"{owner}: {what}{name} must be the checkpoint's, {saved.get(name)!r}, got {name}={current.get(name)!r}"
            )


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint once, so that metadata and tensors are those of one file.

    Raises:
        FileNotFoundError: there is no file.
        CheckpointError: the file is no regular file, or not what `save` wrote, down to the last bit.
    """
    try:
        content = disk.read(path)
    except FileNotFoundError:
        raise
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"checkpoint: {path} must be a file that can be read, got {error!r}") from error
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise CheckpointError(
            f"checkpoint: {path} must be a whole safetensors file, got {len(content)} bytes, and a header of {length}"
        )
    try:
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint: {path} must be a safetensors file, got another one: {error!r}") from error
    if CHECKSUM not in metadata:
        raise CheckpointError(
            f"checkpoint: {path} must be a checkpoint with a checksum, got a file with the metadata {sorted(metadata)}"
        )
    checksum = metadata.pop(CHECKSUM)
    if checksum != _checksum(metadata, tensors):
        raise CheckpointError(
            f"checkpoint: {path} must have the content that was written, got a file with another checksum than "
            f"{checksum!r}"
        )
    return Checkpoint(path, metadata, tensors)


def check(
    found: Checkpoint,
    trained: Mapping[str, Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    step: int,
    *,
    scaled: bool = False,
) -> None:
    """Raises CheckpointError unless a checkpoint's tensors are what a run has trained after so many steps.

    Names, dtypes and shapes are compared, of the trained tensors and of every state of every optimizer, and all numbers
    must be finite.

    Args:
        found: the checkpoint.
        trained: the run's trained tensors, by name.
        optimizers: the run's optimizers, by name.
        step: the checkpoint's number of steps.
        scaled: whether a scaler of losses may have skipped steps of the optimizers.
    """
    # 1. The names: all trained tensors, and all states of the parameters that an optimizer has changed.
    expected = {f"model.{name}": tensor for name, tensor in trained.items()}
    places = {
        f"{name}.{index}": (name, parameter)
        for name, optimizer in optimizers.items()
        for index, parameter in enumerate(_parameters(optimizer))
    }
    unstepped = found.value(UNSTEPPED)
    if not isinstance(unstepped, list) or not all(isinstance(name, str) and name in places for name in unstepped):
        found.refuse(UNSTEPPED, "a list of parameters of the optimizers", unstepped)
    stepped = {place: places[place] for place in places.keys() - set(unstepped)}
    if stepped and not step:
        found.refuse(UNSTEPPED, "all parameters before step 1", unstepped)
    idle = optimizers.keys() - {name for name, _ in stepped.values()}
    if idle and step and not scaled:
        found.refuse(UNSTEPPED, f"some parameters of {', '.join(sorted(idle))} at most after step {step}", unstepped)
    for place, (name, parameter) in stepped.items():
        expected |= {f"{place}.{key}": state(parameter) for key, state in STATES[name].items()}
    missing, unexpected = sorted(expected.keys() - found.tensors.keys()), sorted(found.tensors.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{found.owner}: tensors must be those of this run, got none for {len(missing)} ({missing[:4]}), and "
            f"{len(unexpected)} besides ({unexpected[:4]})"
        )

    # 2. Every tensor.
    for name, tensor in found.tensors.items():
        like = expected[name]
        if tensor.dtype != like.dtype or tensor.shape != like.shape:
            rule, got = (f"{tuple(t.shape)} {t.dtype}" for t in (like, tensor))
            raise CheckpointError(f"{found.owner}: tensor {name} must be {rule}, got {got}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{found.owner}: tensor {name} must be finite, got NaN or inf")
        key = name.rpartition(".")[2] if not name.startswith("model.") else ""
        if key == "step" and tensor.item() not in range(1, step + 1):
            raise CheckpointError(f"{found.owner}: tensor {name} must be a step in [1, {step}], got {tensor.item()}")
        if key == "exp_avg_sq" and not (tensor >= 0).all():
            raise CheckpointError(f"{found.owner}: tensor {name} must be at least 0, got {tensor.min().item()}")


def load(found: Checkpoint, trained: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Loads a checkpoint that `check` has nothing against into the trained tensors and the optimizers, in place."""
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(found.tensors[f"model.{name}"])
    for optimizer_name, optimizer in optimizers.items():
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in found.tensors.items():
            owner, place, *key = name.split(".")
            if owner == optimizer_name:
                states.setdefault(int(place), {})[key[0]] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of an optimizer, in the order by which its state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Fingerprint of all that a checkpoint holds."""
    return fingerprint.of_json({"metadata": dict(metadata), "tensors": fingerprint.of_tensors(tensors.items())})


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no finite number")
