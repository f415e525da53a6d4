"""One family of published diffusion language models: how its files are told and read, and how it is decoded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..diffusion import DiffusionConfig
from ..files import CheckpointError
from .fields import Fields

# The largest number of experts in all layers together, of which each has a name.
MAX_EXPERTS = 2**17
FACTS = tuple(field.name for field in dataclasses.fields(DiffusionConfig))


# Rows of a stored tensor that become a tensor of the native class: its name and how many rows of it, from the native
# configuration.
Cut = Callable[[Any], Iterable[tuple[str, int]]]


def head_dim_of(config: Any) -> int:
    """The size of a head, by a native configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_sizes(config: Any) -> None:
    """Raises ValueError for heads that no attention has, and for more experts than a model can have a list of."""
    heads, of_keys, size = config.num_attention_heads, config.num_key_value_heads, head_dim_of(config)
    if heads % of_keys:
        raise ValueError(
            f"config.json: num_key_value_heads must divide {heads} heads, got num_key_value_heads={of_keys}"
        )
    if size < 2 or size % 2:
        raise ValueError(f"config.json: head_dim must be even, since positions turn pairs, got head_dim={size}")
    experts = getattr(config, "num_experts", None) or getattr(config, "n_routed_experts", None) or 0
    per_token, groups = getattr(config, "num_experts_per_tok", 1), getattr(config, "n_group", 1)
    if experts and per_token > experts:
        raise ValueError(
            f"config.json: num_experts_per_tok must be at most {experts} experts, got num_experts_per_tok={per_token}"
        )
    # The router ranks groups by the two best experts of each.
    if groups > 1 and (experts % groups or experts < 2 * groups):
        raise ValueError(
            f"config.json: n_group must cut {experts} experts into groups of at least 2, got n_group={groups}"
        )
    of_groups = getattr(config, "topk_group", 1)
    if of_groups > groups or per_token * groups > experts * of_groups > 0:
        raise ValueError(
            f"config.json: topk_group must be at most n_group={groups} and leave {per_token} experts to choose, got "
            f"topk_group={of_groups}"
        )
    if experts * config.num_hidden_layers > MAX_EXPERTS:
        raise ValueError(
            f"config.json: num_experts must be at most {MAX_EXPERTS} in all layers together, got num_experts={experts} "
            f"in each of {config.num_hidden_layers}"
        )


def said_by(error: Exception) -> str:
    """An error about config.json as a part of another one: a named one as it is, any other one of transformers with its
    class."""
    text = str(error)
    return text.removeprefix("config.json: ") if text.startswith("config.json: ") else f"got {error!r}"


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A published decoder with its settings: what `generate` uses where the call names no preset.

    Attributes:
        preset: name of a preset.
        options: options of the preset that the publication sets.
        temperature: temperature of the draws, 0 = greedy.
        top_p: mass of the most likely tokens that are drawn from, 1 = all.
    """

    preset: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    temperature: float = 0.0
    top_p: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """The decoder as plain data, as the section `dlm` of a config.json holds it."""
        return {**dataclasses.asdict(self), "options": dict(self.options)}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
        name: as published; `load` and `explain` show it.
        checkpoints: public checkpoints of the family.
        model_types: the `model_type` of its config.json, one of these.
        native: the class of transformers that computes the same.
        build: the native configuration's values, from the fields of config.json. It refuses by name what the class
            cannot express.
        keys: pairs of a pattern and its replacement, applied one after another to every tensor's name.
        fused: stored tensors that are several of the native class's, by a pattern of the name after `keys`.
        where: what must hold besides, of the values of config.json, where one model_type names several architectures.
        told_by: `where` in words.
        facts: fields of `DiffusionConfig` that are the same for all of its checkpoints.
        fields: fields of config.json that hold a fact, where their names are not those of `DiffusionConfig`.
        mask_token: text of the mask in the family's tokenizers, where no file says which token the mask is.
        eos_tokens: texts of the tokens that end a response, where no file says so.
        named: facts that only the name of a checkpoint tells: pairs of a pattern and facts, of which the first that
            matches counts. A fact that also stands in `config.json` is read there.
        fallback: facts that hold where neither a file nor the name says otherwise; `explain` says so.
        decoder: the published decoder and its settings.
        decoders: decoders of checkpoints that only the name tells: pairs of a pattern and a decoder.
        tokenizer: the class that opens the tokenizer files, where they name a class of remote code.
        proof: what shows that the row is right.
        unproven: what is not known for certain; `load` warns of it. "" = nothing.
    """

    name: str
    checkpoints: str
    model_types: tuple[str, ...]
    native: type[nn.Module]
    build: Callable[[Fields], dict[str, Any]]
    keys: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, Cut] = dataclasses.field(default_factory=dict)
    where: Callable[[Mapping[str, Any]], bool] = lambda values: True
    told_by: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    mask_token: str | None = None
    eos_tokens: tuple[str, ...] = ()
    named: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    fallback: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decoder: Decoder | None = None
    decoders: tuple[tuple[str, Decoder], ...] = ()
    tokenizer: type | None = None
    proof: str = ""
    unproven: str = ""

    def matches(self, values: Mapping[str, Any]) -> bool:
        """Whether the values of a config.json are of the family."""
        return values.get("model_type") in self.model_types and self.where(values)

    def read(self, values: Mapping[str, Any]) -> tuple[Any, list[str]]:
        """The native configuration of a config.json, and the fields about the model that nothing read.

        Raises NotImplementedError for a field that the native class cannot express, and CheckpointError for fields that
        describe no model.
        """
        fields = Fields(self.name, self.native, values)
        try:
            fields.check()
            arguments = self.build(fields)
            config = self.native.config_class(**arguments)
            check_sizes(config)
        except (CheckpointError, NotImplementedError):
            raise
        except Exception as error:
            raise CheckpointError(
                f"load: config.json describes no {self.native.config_class.model_type} model: {said_by(error)}"
            ) from error
        facts = {*FACTS, *(name for names in self.fields.values() for name in names)}
        return config, [name for name in fields.unread() if name not in facts]

    def renamed(self, name: str) -> str:
        """The native name of a stored tensor, or of a module of it."""
        for pattern, replacement in self.keys:
            name = re.sub(pattern, replacement, name)
        return name

    def parts(self, name: str, config: Any) -> list[tuple[str, int | None, int | None]]:
        """The native tensors that a stored tensor holds: name, first row and the row behind the last (None = all)."""
        name = self.renamed(name)
        for pattern, cut in self.fused.items():
            match = re.search(pattern, name)
            if match:
                parts, start = [], 0
                for part, rows in cut(config):
                    parts.append((name[: match.start()] + part + name[match.end() :], start, start + rows))
                    start += rows
                return parts
        return [(name, None, None)]

    def decoder_of(self, checkpoint: str) -> Decoder | None:
        """The published decoder of a checkpoint of this name."""
        return next((decoder for pattern, decoder in self.decoders if re.search(pattern, checkpoint)), self.decoder)
