"""Whether the weights of a model are those of an earlier look, as far as that can be told without reading them."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

# How often an optimizer changed what a storage holds. Fused optimizers, torch's own among them, change tensors in place
# and do not count it in `_version` (torch 2.13). By storage, since other tensors may be views of it.
_STEPPED: dict[StorageWeakRef, int] = {}
_WATCHED = False


def watch_optimizers() -> None:
    """From now on counts what optimizers change; a second call does nothing more."""
    global _WATCHED
    if not _WATCHED:
        _WATCHED = True
        register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: torch.optim.Optimizer, *ignored: Any) -> None:
    for storage in [storage for storage in _STEPPED if storage.expired()]:
        del _STEPPED[storage]
    storages = {_storage_of(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    for storage in storages - {None}:
        _STEPPED[storage] = _STEPPED.get(storage, 0) + 1


def version_of(tensor: Tensor) -> tuple[int, int] | None:
    """How often a tensor was changed in place, by ops and by steps of optimizers; None for a tensor of the inference
    mode, which does not count it.

    A change through `.data`, or by a kernel that torch does not know, is not counted.
    """
    return None if tensor.is_inference() else (tensor._version, _STEPPED.get(_storage_of(tensor), 0))


class Look:
    """The parameters, buffers and adapters of a model at one time.

    A look keeps weak references to tensors and to their memory, so that what is made later at the address of something
    freed is not taken for it.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = list(itertools.chain(model.parameters(), model.buffers()))
        versions = [version_of(tensor) for tensor in tensors]
        self._known = None not in versions
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._rest = (versions, [_storage_of(tensor) for tensor in tensors], _adapters_of(model))

    def equals(self, other: Look) -> bool:
        """Whether all tensors count their changes, and none was changed or replaced between two looks."""
        if not (self._known and other._known and self._rest == other._rest):
            return False
        pairs = zip(self._tensors, other._tensors, strict=True)
        return all(mine() is not None and mine() is its() for mine, its in pairs)


def _storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """What tells the memory of a tensor; None for a class of tensors that has none of its own."""
    try:
        return StorageWeakRef((tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage())
    except (RuntimeError, NotImplementedError):
        return None


def _adapters_of(model: nn.Module) -> list[str]:
    """Which adapters of peft are in use, how strong, and which were merged into the weight, which peft does through
    `.data`."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    return [repr([getattr(layer, name, None) for name in names]) for layer in layers]
