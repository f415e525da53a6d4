"""A trained student as a checkpoint folder that `dlm_fast.load` opens."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..diffusion import DiffusionConfig
from .checkpoint import CheckpointWriteError


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with its LoRA layers folded in, in float32 and then rounded to their dtype; the model is not
    changed.

    bf16 weights of 1e-2 plus an update of 1e-5 would round the update away if it were added in bf16.
    """
    state = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    layers = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }
    for name, layer in layers.items():
        for part in ("weight", "bias"):
            if f"{name}.base_layer.{part}" in state:
                state[f"{name}.{part}"] = state.pop(f"{name}.base_layer.{part}")
        weight = state[f"{name}.weight"]
        merged = weight.float()
        for adapter in layer.active_adapters:
            merged = (
                merged
                + (layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()) * layer.scaling[adapter]
            )
        state[f"{name}.weight"] = merged.to(weight.dtype)
    return {name: value.detach() for name, value in state.items()}


def write_student(
    model: nn.Module,
    folder: Path,
    *,
    diffusion: DiffusionConfig,
    tokenizer: Any,
    dtype: torch.dtype,
    adapter: Any = None,
) -> None:
    """Writes config with its `dlm` section, safetensors in `dtype`, tokenizer, and on request the adapter in
    folder/adapter.

    model: a transformers model, with or without LoRA layers in it; unchanged. adapter: a PeftModel. Files are replaced
    one by one once all are written and synced. Raises CheckpointWriteError when the disk refuses.
    """
    config = copy.deepcopy(model.config)
    config.dlm = dataclasses.asdict(diffusion)
    with torch.device("meta"):
        student = type(model)(config)
    student.load_state_dict(
        {name: value.to("cpu", dtype) for name, value in merged_weights(model).items()}, assign=True
    )
    student.tie_weights()
    student.generation_config = model.generation_config
    partial = folder / "student.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        student.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if adapter is not None:
            # The vocabulary is the base model's; left to find that out, peft asks the Hub.
            adapter.save_pretrained(partial / "adapter", save_embedding_layers=False)
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())
        for path in sorted(partial.iterdir()):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointWriteError(f"export: {folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
