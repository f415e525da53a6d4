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
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

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


class RemoteModel(PreTrainedModel):
    """A model of remote code.

    Attributes:
        config: its configuration.
        checkpoint: the checkpoint that it was read from, without the tensors.
    """

    def __init__(self, config: PretrainedConfig, checkpoint: Published) -> None:
        super().__init__(config)
        self.checkpoint = dataclasses.replace(checkpoint, tensors={})
        for name, tensor in checkpoint.tensors.items():
            path, _, leaf = name.rpartition(".")
            empty = torch.empty(tensor.shape)
            if name.endswith("expert_bias"):
                self._grown(path).register_buffer(leaf, empty)
            else:
                self._grown(path).register_parameter(leaf, nn.Parameter(empty))
        form = family_oracles.ARCHITECTURES[checkpoint.family](checkpoint.config)
        if checkpoint.family != "llada":  # LLaDA's code computes its angles as it goes
            root = self._grown(form.names["norm"].rpartition(".")[0])
            root.rotary_emb = Rotary(form.frequencies)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing is drawn: every weight comes from the checkpoint."""

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
        network = family_oracles.Network(dataclasses.replace(self.checkpoint, tensors=tensors))
        for name, tensor in tensors.items():
            if name.endswith("inv_freq"):
                network.form = dataclasses.replace(network.form, frequencies=tensor.double())
        rows = [network.sequence(row, block)[0] for row in input_ids]
        return types.SimpleNamespace(logits=torch.stack(rows).to(next(self.parameters()).dtype))


def named_class(name: str, base: type, **attributes: Any) -> type:
    """A subclass of this name, which stands in this module so that its objects can be pickled."""
    if name not in globals():
        globals()[name] = type(name, (base,), {"__module__": __name__, **attributes})
    return globals()[name]


def class_and_config(checkpoint: Published) -> tuple[type[RemoteModel], PretrainedConfig]:
    """The model's class, of the published name, and its configuration."""
    kind = config_class(checkpoint.config["model_type"])
    config = kind(**{name: value for name, value in checkpoint.config.items() if name != "model_type"})
    return named_class(checkpoint.config["architectures"][0], RemoteModel, config_class=kind), config


def opened(checkpoint: Published) -> RemoteModel:
    """The model of a checkpoint, in eval mode, as the code builds it where no file lacks anything."""
    kind, config = class_and_config(checkpoint)
    config.name_or_path = str(checkpoint.folder)
    model = kind(config, checkpoint).eval()
    model.load_state_dict(checkpoint.tensors)
    if (checkpoint.folder / "generation_config.json").is_file():
        values = json.loads((checkpoint.folder / "generation_config.json").read_text())
        model.generation_config = GenerationConfig(**values)
    return model


def from_pretrained(checkpoint: Published) -> RemoteModel:
    """The model of a checkpoint as transformers reads it, which leaves some buffers uninitialised."""
    kind, config = class_and_config(checkpoint)
    return kind.from_pretrained(checkpoint.folder, checkpoint, config=config)
