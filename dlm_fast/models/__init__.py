"""Models: the table of published families, which of transformers' classes each is, and how such a class runs a window
of tokens against our cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ..ops import Ops
from . import native
from .cache import KVCache, Paging
from .native import AttentionCall


class Adapter(Protocol):
    """What a file of classes gives: plain functions, each of a model of one of these classes.

    A published family needs no such file, but a row of `families.FAMILIES`. For a class of transformers that `native`
    does not serve, write a file with these functions and list the file in `ADAPTERS`.

    Attributes:
        CLASSES: the model classes, each with the class of its attention modules.
    """

    CLASSES: dict[type[nn.Module], type[nn.Module]]

    def probe(self, kind: type[nn.Module]) -> None:
        """Raises NotImplementedError where the installed transformers cannot be driven for a class."""

    def verify(self, model: nn.Module) -> None:
        """Raises NotImplementedError for a model that was altered in a way that our attention would ignore."""

    def base_model(self, model: nn.Module) -> nn.Module:
        """The stack without its head: the module whose forward takes `dlm_call`."""

    def head_dims(self, model: nn.Module) -> set[int]:
        """The head sizes of the model's layers."""

    def unfusable(self, model: nn.Module) -> str | None:
        """Why the layers of a model cannot be fused; None = they can."""

    def fused_forwards(self, model: nn.Module, ops: Ops) -> dict[nn.Module, Callable[..., Tensor]]:
        """The forwards that fuse the layers of a model, by the module to which each is bound."""

    def compute_dtype(self, model: nn.Module) -> torch.dtype:
        """The dtype of hidden states, keys and values."""

    def new_cache(self, model: nn.Module, rows: int, capacity: int, paging: Paging | None = None) -> KVCache:
        """Key/value buffers for every layer, in the dtype that the model computes in and on the layer's device."""

    def window_hidden(self, model: nn.Module, input_ids: Tensor, call: AttentionCall) -> Tensor:
        """Last hidden states [B, W, d] of a window of tokens [B, W] against the cache; the head is not applied."""

    def head(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, d]."""

    def altered(self, model: nn.Module, call: AttentionCall) -> str | None:
        """What altered the patched model, if a layer did not attend through `call`; None if all layers did."""


ADAPTERS: tuple[Adapter, ...] = (native,)


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter whose classes include `type(model)`.

    Raises NotImplementedError, naming the supported classes, where there is none.
    """
    for adapter in ADAPTERS:
        if type(model) in adapter.CLASSES:
            return adapter
    supported = ", ".join(cls.__name__ for adapter in ADAPTERS for cls in adapter.CLASSES)
    hint = ""
    if hasattr(model, "merge_and_unload"):
        hint = "; merge the adapter first (model.merge_and_unload())"
    elif hasattr(model, "_orig_mod"):
        hint = "; patch the model that was compiled (model._orig_mod), and compile it after that"
    raise NotImplementedError(
        f"dlm_fast: unsupported model class {type(model).__name__}; supported are {supported}, got a "
        f"{type(model).__name__}{hint}"
    )
