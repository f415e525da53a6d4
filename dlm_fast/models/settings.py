"""How a checkpoint is decoded: every setting with the place that it comes from.

The places are asked in one order: the argument of the call, the section `dlm` of config.json, the fields of
config.json, generation_config.json, the tokenizer, the family's constants. null counts as absent.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ..diffusion import DiffusionConfig
from ..files import CheckpointError
from ..limits import number, shown
from .family import FACTS, Decoder, Family


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a checkpoint is decoded.

    Attributes:
        diffusion: the diffusion configuration.
        decoder: the decoder of `generate` where the call names no preset; None = by the model's visibility.
        pad_token_id: id of the padding; None = no file says.
        sources: for every setting the place that it comes from.
    """

    diffusion: DiffusionConfig
    decoder: Decoder | None
    pad_token_id: int | None
    sources: Mapping[str, str]

    def section(self) -> dict[str, Any]:
        """The section `dlm` of a config.json that says all of this."""
        section = {**dataclasses.asdict(self.diffusion), "eos_token_ids": list(self.diffusion.eos_token_ids)}
        return section if self.decoder is None else {**section, "decoder": self.decoder.as_dict()}

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Every setting with its source, as plain data."""
        values = {**self.section(), "pad_token_id": self.pad_token_id}
        return {name: {"value": values.get(name), "source": source} for name, source in self.sources.items()}


def section_settings(section: Any) -> Settings:
    """The settings that a section `dlm` says alone, without the files of a checkpoint."""
    values, decoder = read_section(section)
    sources = dict.fromkeys([*values, *(["decoder"] if decoder else [])], "config, section dlm")
    return Settings(DiffusionConfig.from_dict(values), decoder, None, sources)


def read_section(section: Any) -> tuple[dict[str, Any], Decoder | None]:
    """The fields of `DiffusionConfig` and the decoder that a section `dlm` of a config.json says.

    Raises ValueError for an unknown key or a decoder that is none.
    """
    if not isinstance(section, Mapping):
        raise ValueError(
            f"DiffusionConfig: the section must be an object of names and values, got dlm={shown(section)}"
        )
    values = dict(section)
    decoder = values.pop("decoder", None)
    unknown = sorted(set(values) - set(FACTS))
    if unknown:
        known = sorted([*FACTS, "decoder"])
        raise ValueError(f"DiffusionConfig: unknown keys {unknown}; known are {known}, got {unknown} in section dlm")
    if decoder is None:
        return values, None
    known = [field.name for field in dataclasses.fields(Decoder)]
    if not isinstance(decoder, Mapping) or not set(decoder) <= set(known) or not isinstance(decoder.get("preset"), str):
        raise ValueError(f"DiffusionConfig: decoder must be an object of {', '.join(known)}, got decoder={decoder!r}")
    if not isinstance(decoder.get("options", {}), Mapping):
        raise ValueError(f"DiffusionConfig: decoder.options must be an object, got options={decoder['options']!r}")
    number("DiffusionConfig", "decoder.temperature", decoder.get("temperature", 0.0), 0)
    number("DiffusionConfig", "decoder.top_p", decoder.get("top_p", 1.0), 0, 1)
    if decoder.get("top_p") == 0:
        raise ValueError("DiffusionConfig: decoder.top_p must be above 0, got top_p=0")
    return values, Decoder(**decoder)


@dataclasses.dataclass
class Places:
    """The files of a checkpoint that say how it is decoded.

    Attributes:
        checkpoint: name of the checkpoint, the last part of its path or id.
        vocab_size: number of ids of the model.
        config: values of config.json.
        generation: values of generation_config.json.
        tokenizer: the tokenizer; None = the checkpoint has none.
        given: fields that the call gave.
        adapter: name of the adapter that is put on the model; "" = none.
    """

    checkpoint: str
    vocab_size: int
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tokenizer: Any
    given: Mapping[str, Any]
    adapter: str = ""


# Adapters that change how a model sees, told by their names: facts, and the decoder that they are for.
ADAPTERS: tuple[tuple[str, Mapping[str, Any], Decoder], ...] = (
    (r"(?i)d2f", {"visibility": "block", "block_alignment": "rel", "block_length": 32}, Decoder("d2f")),
)


class _Search:
    """The search for the settings, which notes where each was found."""

    def __init__(self, family: Family, places: Places) -> None:
        self.family, self.places = family, places
        section = places.config.get("dlm")
        self.section, self.decoder = read_section({} if section is None else section)
        self.found: dict[str, Any] = {}
        self.sources: dict[str, str] = {}

    def take(self, name: str, value: Any, source: str) -> None:
        """Settles a setting that is not settled yet; None settles nothing."""
        if value is not None and name not in self.found:
            self.found[name] = value
            self.sources[name] = source

    def facts(self) -> None:
        """What was given, what the section says, and what the family says of all its checkpoints."""
        family, places = self.family, self.places
        for name in FACTS:
            self.take(name, places.given.get(name), "argument diffusion")
        self.of_adapter()
        for name in FACTS:
            self.take(name, self.section.get(name), "config.json, section dlm")
        for name, fields in family.fields.items():
            for field in fields:
                self.take(name, places.config.get(field), f"config.json, {field}")
                self.take(name, places.generation.get(field), f"generation_config.json, {field}")
        for pattern, facts in family.named:
            match = re.search(pattern, places.checkpoint)
            if match:
                source = f"the name {places.checkpoint!r}"
                for name, value in {**facts, **{k: int(v) for k, v in match.groupdict().items()}}.items():
                    self.take(name, value, source)
                break
        for name, value in family.facts.items():
            self.take(name, value, f"family {family.name}")
        for name, value in family.fallback.items():
            self.take(name, value, f"family {family.name}, since no file and no name says otherwise")

    def of_adapter(self) -> None:
        """What the name of an adapter says."""
        for pattern, facts, decoder in ADAPTERS:
            if self.places.adapter and re.search(pattern, self.places.adapter):
                source = f"the name of the adapter {self.places.adapter!r}"
                for name, value in facts.items():
                    self.take(name, value, source)
                if self.found["visibility"] == facts["visibility"]:
                    self.decoder = decoder
                    self.sources["decoder"] = source

    def of_family(self) -> Decoder | None:
        """The family's published decoder, unless the model was told to see otherwise than the family does."""
        named = next((facts for pattern, facts in self.family.named if re.search(pattern, self.places.checkpoint)), {})
        expected = self.family.facts.get("visibility", named.get("visibility"))
        if expected is not None and self.found["visibility"] != expected:
            self.sources["decoder"] = f"family {self.family.name} has one for visibility {expected!r} alone"
            return None
        return self.family.decoder_of(self.places.checkpoint)

    def mask(self) -> None:
        """The mask's id, and what must agree with it."""
        family, places, tokenizer = self.family, self.places, self.places.tokenizer
        self.take("mask_token_id", places.config.get("mask_token_id"), "config.json, mask_token_id")
        self.take("mask_token_id", places.generation.get("mask_token_id"), "generation_config.json, mask_token_id")
        self.take("mask_token_id", getattr(tokenizer, "mask_token_id", None), "tokenizer, mask_token")
        known = None if family.mask_token is None else token_id(tokenizer, family.mask_token)
        self.take("mask_token_id", known, f"tokenizer, the token {family.mask_token!r} of family {family.name}")
        if "mask_token_id" not in self.found:
            token = "" if family.mask_token is None else f", the family's token {family.mask_token!r} in the tokenizer"
            raise CheckpointError(
                f"load: no mask id was found for {places.checkpoint!r}; asked were the argument diffusion, the section "
                "dlm of config.json, mask_token_id in config.json and generation_config.json, the tokenizer's "
                f"mask_token{token}; say diffusion={{'mask_token_id': ...}}, got none"
            )
        mask_id = self.found["mask_token_id"]
        self.check_id("mask_token_id", mask_id, self.sources["mask_token_id"])
        named = getattr(tokenizer, "mask_token_id", None)
        if named is not None and named != mask_id:
            raise ValueError(
                f"load: mask_token_id must be the tokenizer's, {named} ({tokenizer.mask_token!r}), got "
                f"mask_token_id={mask_id} of the diffusion configuration ({self.sources['mask_token_id']})"
            )
        if known is not None and known != mask_id and "mask_token_id" not in places.given:
            raise ValueError(
                f"load: mask_token_id must be {known}, which is {family.mask_token!r} in the tokenizer, got "
                f"mask_token_id={mask_id} ({self.sources['mask_token_id']}); if that is right, say "
                f"diffusion={{'mask_token_id': {mask_id}}}"
            )

    def check_id(self, name: str, value: Any, source: str) -> None:
        """Raises ValueError unless a setting is an id of the vocabulary."""
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"load: {name} must be an id >= 0, got {name}={shown(value)} ({source})")
        if value >= self.places.vocab_size:
            size = self.places.vocab_size
            raise ValueError(f"load: {name} must be below the model's vocab_size={size}, got {value} ({source})")

    def ends(self) -> None:
        """The ids that end a response: all that a file names, and the token that ends a turn of the chat template."""
        if "eos_token_ids" in self.found:
            return
        places, tokenizer = self.places, self.places.tokenizer
        ids: dict[int, str] = {}
        for source, values in (("config.json", places.config), ("generation_config.json", places.generation)):
            named = values.get("eos_token_id")
            for value in named if isinstance(named, (list, tuple)) else [named]:
                if value is not None:
                    self.check_id("eos_token_id", value, f"{source}, eos_token_id")
                    ids.setdefault(value, f"{source}, eos_token_id")
        turn = end_of_turn(tokenizer)
        if turn is not None:
            ids.setdefault(turn, "tokenizer, the end of a turn in the chat template")
        if getattr(tokenizer, "eos_token_id", None) is not None:
            ids.setdefault(tokenizer.eos_token_id, "tokenizer, eos_token")
        for token in self.family.eos_tokens:
            known = token_id(tokenizer, token)
            if known is not None:
                ids.setdefault(known, f"tokenizer, the token {token!r} of family {self.family.name}")
        ids.pop(self.found["mask_token_id"], None)
        self.found["eos_token_ids"] = tuple(ids)
        self.sources["eos_token_ids"] = "; ".join(f"{i}: {source}" for i, source in ids.items()) or "no file names one"

    def pad(self) -> int | None:
        for source, values in (
            ("config.json, pad_token_id", self.places.config),
            ("generation_config.json, pad_token_id", self.places.generation),
        ):
            self.take("pad_token_id", values.get("pad_token_id"), source)
        self.take("pad_token_id", getattr(self.places.tokenizer, "pad_token_id", None), "tokenizer, pad_token")
        pad = self.found.get("pad_token_id")
        if pad is not None and pad != -1:  # transformers' word for no padding
            self.check_id("pad_token_id", pad, self.sources["pad_token_id"])
        return pad

    def missing(self) -> None:
        """Raises CheckpointError where nothing says how the model sees."""
        if "visibility" not in self.found:
            named = "".join(f", the name ({pattern.removeprefix('(?i)')})" for pattern, _ in self.family.named)
            raise CheckpointError(
                f"load: nothing says how {self.places.checkpoint!r} sees (visibility 'full' or 'block'); asked were "
                f"the argument diffusion, the section dlm of config.json{named}; say diffusion={{'visibility': ...}}, "
                "got none"
            )


def settle(family: Family, places: Places) -> Settings:
    """The settings of a checkpoint.

    Raises CheckpointError where a setting is found nowhere, and ValueError for one that is out of range or contradicts
    the tokenizer.
    """
    search = _Search(family, places)
    search.facts()
    search.mask()
    search.ends()
    search.missing()
    try:
        diffusion = DiffusionConfig(**{name: search.found[name] for name in FACTS if name in search.found})
    except ValueError as error:
        named = next((name for name in FACTS if f"got {name}=" in str(error)), None)
        source = search.sources.get(named)
        raise ValueError(f"load: {error}" + (f" ({source})" if source else "")) from error
    pad = search.pad()
    decoder, source = search.decoder, "config.json, section dlm"
    if decoder is None:
        decoder, source = search.of_family(), f"family {family.name}"
    if decoder is not None:
        search.sources.setdefault("decoder", source)
    for field in dataclasses.fields(DiffusionConfig):
        search.sources.setdefault(field.name, "default")
    return Settings(diffusion, decoder, pad, search.sources)


def token_id(tokenizer: Any, token: str) -> int | None:
    """The id of a token in a tokenizer's vocabulary; None where the vocabulary has no such token."""
    if tokenizer is None:
        return None
    return tokenizer.get_vocab().get(token)


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind what the assistant says; None where there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    said = "dlm"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template may refuse such a chat, and then says nothing of how a turn ends
        return None
    _, found, behind = text.rpartition(said)
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not found:
        return None
    return next((special[token] for token in sorted(special, key=len, reverse=True)
                 if behind.lstrip().startswith(token)), None)  # fmt: skip
