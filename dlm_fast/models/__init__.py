"""Model adapters: how each Hugging Face family runs a window of tokens against our cache. One file a family."""

from __future__ import annotations

from types import ModuleType

from torch import nn

from . import native

ADAPTERS: tuple[ModuleType, ...] = (native,)


def adapter_for(model: nn.Module) -> ModuleType:
    """The adapter whose classes include `type(model)`. Raises NotImplementedError naming what is supported."""
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
        f"dlm_fast: unsupported model class {type(model).__name__}; supported are {supported}{hint}"
    )
