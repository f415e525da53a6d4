"""Models as a distillation uses them: opened for training, compared by vocabulary, run for chosen rows of logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import fingerprint, patching
from ..diffusion import DiffusionConfig
from ..files import checkpoint_path, stored_dtypes, weight_files
from ..loading import FLOATS, float_kinds, load
from ..models import adapter_for


class VocabularyError(ValueError):
    """Teacher and student have different vocabularies."""


class RowLogits(nn.Module):
    """A model that computes the logits of chosen rows only.

    The logits of all rows would be large: a vocabulary of 126,464 and a canvas of 512 make a quarter of a gigabyte in
    float32.
    """

    def __init__(self, model: nn.Module, *, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self._hidden = torch.compile(self._hidden_states, dynamic=True) if compiled else self._hidden_states

    def _hidden_states(self, tokens: Tensor, mask: Any) -> Tensor:
        # transformers hands a 4-D mask through untouched, and would mask causally without a mask.
        return (
            adapter_for(self.model)
            .base_model(self.model)(input_ids=tokens, attention_mask=mask, use_cache=False)
            .last_hidden_state
        )

    def forward(self, tokens: Tensor, mask: Any, index: Tensor) -> Tensor:
        """Logits [N, V] of the rows `index` [N] of the B * L rows of tokens [B, L]."""
        hidden = self._hidden(tokens, mask)
        return adapter_for(self.model).head(self.model, hidden.flatten(0, 1)[index])


def require(module: str, purpose: str) -> Any:
    """An optional package. Raises ModuleNotFoundError, which says how to install the package."""
    try:
        return __import__(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ModuleNotFoundError(
            f"training: {purpose} needs {module}: pip install 'dlm-fast[train]'", name=module
        ) from error


def open_model(
    path: str, device: torch.device, dtype: torch.dtype | None, attention: str
) -> tuple[nn.Module, DiffusionConfig, Any]:
    """An unpatched transformers model for training, its diffusion configuration, and its tokenizer.

    Raises what `load` raises.
    """
    model = load(path, device=device, dtype=dtype, backend="reference")
    handle = patching.handle_of(model)
    handle.unpatch()
    model.set_attn_implementation(attention)
    return model, handle.diffusion, handle.tokenizer


def check_vocabularies(student: tuple, teacher: tuple, names: tuple[str, str]) -> None:
    """Raises VocabularyError unless student and teacher have the same number of ids, the same tokens and the same mask.

    Student and teacher are given as (model, diffusion, tokenizer), and `names` are their names for the error.
    """

    def fail(what: str, of_student: Any, of_teacher: Any) -> None:
        raise VocabularyError(
            f"distill: teacher and student must have the same vocabulary, got another one: {what} of the teacher "
            f"{names[1]} is {of_teacher}, of the student {names[0]} {of_student}"
        )

    sizes = student[0].config.vocab_size, teacher[0].config.vocab_size
    if sizes[0] != sizes[1]:
        fail("size", *sizes)
    if student[1].mask_token_id != teacher[1].mask_token_id:
        fail("mask id", student[1].mask_token_id, teacher[1].mask_token_id)
    if student[2] is not None and teacher[2] is not None:
        ids, other_ids = student[2].get_vocab(), teacher[2].get_vocab()
        different_tokens = sorted(
            token for token in ids.keys() | other_ids.keys() if ids.get(token) != other_ids.get(token)
        )
        if different_tokens:
            fail(
                f"id of {different_tokens[0]!r} ({len(different_tokens)} tokens differ)",
                ids.get(different_tokens[0]),
                other_ids.get(different_tokens[0]),
            )


def stored_dtype(path: str) -> torch.dtype | None:
    """The dtype in which a checkpoint folder's weights are stored; None if the weights have several dtypes."""
    folder = checkpoint_path(path)
    kinds = list(float_kinds(folder, stored_dtypes(weight_files(folder))))
    return FLOATS[kinds[0]] if len(kinds) == 1 else None


def digests_of(model: nn.Module, diffusion: DiffusionConfig, tokenizer: Any) -> dict[str, str | None]:
    """What a run reads of an opened checkpoint, as fingerprints: "model" and "tokenizer".

    The fingerprints are of what was opened and not of files, so that a folder with other names or another cut of its
    shards is the same checkpoint, while no file that changes the run can change unseen. "model" is weights,
    configuration, the way in which the model is decoded, and the generation configuration, which a student inherits;
    "tokenizer" includes the chat template.
    """
    generation = model.generation_config.to_dict()
    generation.pop("transformers_version", None)
    described = [fingerprint.of_model(model), dataclasses.asdict(diffusion), generation]
    return {"model": fingerprint.of_json(described), "tokenizer": fingerprint.of_tokenizer(tokenizer)}


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raises ValueError unless each of `targets` names linear layers of the model, where peft is content with one."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(
                f"distill: lora_targets must name linear layers of the model, {', '.join(known)}, got {target!r}"
            )


def checkpoint_activations(model: nn.Module) -> None:
    """Makes the backward pass compute every layer's activations again. transformers has renamed the method for this."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
