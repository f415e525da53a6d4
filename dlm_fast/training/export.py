"""Writes a trained student as a checkpoint folder that `dlm_fast.load` opens."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import disk
from ..diffusion import DiffusionConfig
from .checkpoint import CheckpointWriteError


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with its LoRA layers merged; the model is not changed.

    Weights and updates are added in float32, and then rounded to the dtype of the weights. An addition in bf16 would
    round away an update of 1e-5 to a weight of 1e-2.
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
    """Writes the student's config with its `dlm` section, its weights as safetensors, and its tokenizer.

    Args:
        model: a transformers model, with or without LoRA layers; the model is not changed.
        folder: the folder.
        diffusion: the student's diffusion configuration.
        tokenizer: the tokenizer; None = none is written.
        dtype: dtype of the written weights.
        adapter: a PeftModel whose adapter is written to folder/adapter; None = no adapter is written.
    Raises:
        CheckpointWriteError: the disk refuses.
    """
    # 1. The student, as a model without LoRA layers.
    config = copy.deepcopy(model.config)
    config.dlm = dataclasses.asdict(diffusion)
    with torch.device("meta"):
        student = type(model)(config)
    student.load_state_dict(
        {name: value.to("cpu", dtype) for name, value in merged_weights(model).items()}, assign=True
    )
    student.tie_weights()
    student.generation_config = model.generation_config

    # 2. Its files.
    def write(partial: Path) -> None:
        student.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if adapter is not None:
            # Without this argument, peft asks the Hub whether the vocabulary is the base model's.
            adapter.save_pretrained(partial / "adapter", save_embedding_layers=False)

    replace_files(folder, write)


def replace_files(folder: Path, write: Callable[[Path], object]) -> None:
    """Replaces files of a folder one by one, once all new files are written and synced.

    No link is followed: a link that has the name of a new file or folder is replaced, and what the link leads to stays.

    Args:
        folder: the folder.
        write: a function that writes the new files to the empty folder that it is given.
    Raises:
        CheckpointWriteError: the disk refuses, or the partial folder's name is taken by something that is no folder.
    """
    partial = folder / "student.partial"
    if partial.is_symlink() or partial.exists() and not partial.is_dir():
        raise CheckpointWriteError(f"export: {partial} must be a folder or a new name, got another thing of that name")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        for path in partial.rglob("*"):
            disk.sync(path)
        for path in sorted(partial.iterdir()):
            target = folder / path.name
            if target.is_symlink():
                target.unlink()
            elif target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        disk.sync(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointWriteError(f"export: {folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
