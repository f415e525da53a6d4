"""Models as the remote code of the public repositories builds them: their module trees, parameter names and classes.

    owner = opened(published.write("llada", folder))      a LLaDAModelLM with the checkpoint's tensors

The tree grows from the names of the checkpoint's tensors. The forward is the family's float64 forward
(family_oracles.py) over the parameters as they are, with the rotary frequencies of the model's own buffer where it has
one, so that an update in place and an uninitialised buffer change what the model says. Nothing of the project is used.
"""

from __future__ import annotations

import dataclasses
import json
import types
import warnings
from typing import Any

import family_oracles
import torch
from published import Published
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

# What remote code passes on to the configuration of transformers; it sets all other fields itself.
PASSED_ON = ("architectures", "auto_map", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")


def set_fields(config: PretrainedConfig, **values: Any) -> None:
    """The `__init__` of a configuration class of remote code: every field of config.json becomes an attribute.

    A class without an `__init__` of its own gets one from transformers, which does other things.
    """
    for name, value in values.items():
        if name not in (*PASSED_ON, "rope_scaling", "model_type", "dtype", "torch_dtype"):
            setattr(config, name, value)
    if values.get("rope_scaling", False) is not False:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a name that remote code uses and transformers left
            config.rope_scaling = values["rope_scaling"]
    PretrainedConfig.__init__(config, **{name: values[name] for name in PASSED_ON if name in values})


def config_class(model_type: str) -> type[PretrainedConfig]:
    """The configuration class of a model type."""
    return named_class(f"Config_{model_type}", PretrainedConfig, model_type=model_type, __init__=set_fields)


class Rotary(nn.Module):
    """A rotary module, whose frequencies no checkpoint holds."""

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.register_buffer("inv_freq", frequencies.float(), persistent=False)


class RemoteModel(nn.Module):
    """A model of remote code, and no class of transformers.

    Attributes:
        config: its configuration.
        checkpoint: the checkpoint that it was read from, without the tensors.
    """

    def __init__(self, checkpoint: Published) -> None:
        super().__init__()
        values = {name: value for name, value in checkpoint.config.items() if name != "model_type"}
        self.config = config_class(checkpoint.config["model_type"])(**values)
        self.config._name_or_path = str(checkpoint.folder)
        self.checkpoint = dataclasses.replace(checkpoint, tensors={})
        for name, tensor in checkpoint.tensors.items():
            path, _, leaf = name.rpartition(".")
            module = self._grown(path)
            if name.endswith("expert_bias"):
                module.register_buffer(leaf, tensor.clone())
            else:
                module.register_parameter(leaf, nn.Parameter(tensor.clone()))
        form = family_oracles.ARCHITECTURES[checkpoint.family](checkpoint.config)
        if checkpoint.family != "llada":  # LLaDA's code computes its angles as it goes
            root = self._grown(form.names["norm"].rpartition(".")[0])
            root.rotary_emb = Rotary(form.frequencies)

    def _grown(self, path: str) -> nn.Module:
        """The module at a dotted path, which grows where there is none."""
        module: nn.Module = self
        for name in path.split("."):
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module._modules[name]
        return module

    def forward(self, input_ids: Tensor, block: Tensor | None = None) -> types.SimpleNamespace:
        """Logits [B, L, V]; `block` says who sees whom, as in family_oracles."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        now = dataclasses.replace(self.checkpoint, tensors=tensors)
        frequencies = next((tensor for name, tensor in tensors.items() if name.endswith("inv_freq")), None)
        rows = [family_oracles.logits(now, row, block, frequencies) for row in input_ids]
        return types.SimpleNamespace(logits=torch.stack(rows).to(next(self.parameters()).dtype))


def named_class(name: str, base: type, **attributes: Any) -> type:
    """A subclass of this name, which stands in this module so that its objects can be pickled."""
    if name not in globals():
        globals()[name] = type(name, (base,), {"__module__": __name__, **attributes})
    return globals()[name]


def opened(checkpoint: Published) -> RemoteModel:
    """The model of a checkpoint, in eval mode, as an object of a class with the published name."""
    model = named_class(checkpoint.config["architectures"][0], RemoteModel)(checkpoint).eval()
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig(
            **json.loads((checkpoint.folder / "generation_config.json").read_text())
        )
    return model
