"""What a checkpoint must say about itself so that it can be decoded by diffusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .limits import shown, whole

VISIBILITIES = ("full", "block")
ALIGNMENTS = ("abs", "rel", "both")
LOGITS_ROWS = ("self", "previous")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion part of a model's configuration; the key `dlm` of its config.json.

    Attributes:
        mask_token_id: id of [MASK].
        eos_token_ids: ids that end a response.
        visibility: what a position sees: "full" = every position (LLaDA, Dream); "block" = its own block and all
            earlier blocks (SDAR, LLaDA2, D2F). Only with "block" is a key/value cache exact.
        block_length: number of positions in a block, as in training; None = any length, for visibility "full".
        block_alignment: where blocks begin: "abs" = at multiples of block_length (SDAR, LLaDA2); "rel" = at the end of
            the prompt, which is then one bidirectional block (D2F); "both" = at the end of the prompt in both
            directions, so that the prompt is cut into blocks too (dLLM's BD3-LM).
        logits_row: whose logits predict a position: "self" = its own; "previous" = those of the position before it, in
            models that were made from autoregressive ones (Dream, Fast-dLLM v2). Position 0 is predicted by its own.
        prompt_isolated: whether the prompt sees itself only, while the response sees everything; for visibility "full".
        causal_prefix: whether the prompt and finished blocks see causally, so that the block in work alone sees itself
            and everything before it; for visibility "block" (Nemotron-Labs-Diffusion, NBDiff).

    An isolated prompt is everything before the first mask. In a canvas to fill in, everything from the first mask on is
    response, also the given tokens there. A decoder with a cache computes an isolated prompt once per row, and the keys
    of the prompt are exact for good; docs/exactness.md says which decoders are exact by this.

    Behind a causal prefix the row of the last finished position predicts the position after it, whatever `logits_row`
    says of the block in work.
    """

    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    visibility: str
    block_length: int | None = None
    block_alignment: str = "rel"
    logits_row: str = "self"
    prompt_isolated: bool = False
    causal_prefix: bool = False

    def __post_init__(self) -> None:
        def fail(rule: str) -> None:
            raise ValueError(f"DiffusionConfig: {rule}")

        if not _is_id(self.mask_token_id):
            fail(f"mask_token_id must be an id >= 0, got mask_token_id={shown(self.mask_token_id)}")
        if not isinstance(self.eos_token_ids, (list, tuple)) or not all(map(_is_id, self.eos_token_ids)):
            fail(f"eos_token_ids must be a list of ids >= 0, got eos_token_ids={shown(self.eos_token_ids)}")
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        if self.mask_token_id in self.eos_token_ids:
            fail(f"eos_token_ids must not hold the mask id, got eos_token_ids={self.eos_token_ids}")
        if self.visibility not in VISIBILITIES:
            fail(f"visibility must be one of {', '.join(VISIBILITIES)}, got visibility={shown(self.visibility)}")
        if self.block_alignment not in ALIGNMENTS:
            fail(
                f"block_alignment must be one of {', '.join(ALIGNMENTS)}, got "
                f"block_alignment={shown(self.block_alignment)}"
            )
        if self.logits_row not in LOGITS_ROWS:
            fail(f"logits_row must be one of {', '.join(LOGITS_ROWS)}, got logits_row={shown(self.logits_row)}")
        whole("DiffusionConfig", "block_length", self.block_length, 1, none=True)
        if self.visibility == "block" and self.block_length is None:
            fail("visibility 'block' needs a block_length, got block_length=None")
        for name in ("prompt_isolated", "causal_prefix"):
            if not isinstance(getattr(self, name), bool):
                fail(f"{name} must be true or false, got {name}={shown(getattr(self, name))}")
        if self.prompt_isolated and self.visibility != "full":
            fail(f"prompt_isolated goes with visibility 'full', got visibility={shown(self.visibility)}")
        if self.prompt_isolated and self.block_alignment != "rel":
            fail(f"prompt_isolated goes with block_alignment 'rel', got block_alignment={shown(self.block_alignment)}")
        if self.causal_prefix and self.visibility != "block":
            fail(f"causal_prefix goes with visibility 'block', got visibility={shown(self.visibility)}")

    @property
    def plain_mode(self) -> str:
        """How a plain forward (`model(input_ids)`) sees: "full", "block" or "isolated"."""
        return "isolated" if self.prompt_isolated else self.visibility

    @property
    def predicts_next(self) -> bool:
        """Whether the row of the last finished position predicts the position after it."""
        return self.logits_row == "previous" or self.causal_prefix

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiffusionConfig:
        """The configuration in the `dlm` section of a config.json. An unknown key raises ValueError."""
        if not isinstance(values, Mapping):
            raise ValueError(
                f"DiffusionConfig: the section must be an object of names and values, got dlm={shown(values)}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = set(values) - known
        if unknown:
            raise ValueError(
                f"DiffusionConfig: unknown keys {sorted(unknown)}; known are {sorted(known)}, got {sorted(values)}"
            )
        missing = {"mask_token_id", "eos_token_ids", "visibility"} - set(values)
        if missing:
            raise ValueError(f"DiffusionConfig: missing keys {sorted(missing)}, got {sorted(values)}")
        return cls(**{name: values[name] for name in known if name in values})


def given_fields(diffusion: Any) -> dict[str, Any]:
    """The fields of `DiffusionConfig` that an argument `diffusion` gives: a configuration, some fields, or nothing.

    Raises TypeError for another type, and ValueError for a field that the class does not have.
    """
    if diffusion is None:
        return {}
    if isinstance(diffusion, DiffusionConfig):
        return dataclasses.asdict(diffusion)
    if not isinstance(diffusion, Mapping):
        raise TypeError(
            f"load: diffusion must be a DiffusionConfig, a mapping of its fields or None, got "
            f"diffusion={shown(diffusion)}"
        )
    known = [field.name for field in dataclasses.fields(DiffusionConfig)]
    unknown = sorted(set(diffusion) - set(known))
    if unknown:
        raise ValueError(f"load: diffusion must hold fields of DiffusionConfig ({', '.join(known)}), got {unknown}")
    return dict(diffusion)


def check_vocabulary(diffusion: DiffusionConfig, vocab_size: int) -> None:
    """Raises ValueError unless a vocabulary of `vocab_size` ids holds the mask and every EOS.

    Raises TypeError if `diffusion` is no DiffusionConfig.
    """
    if not isinstance(diffusion, DiffusionConfig):
        raise TypeError(f"dlm_fast: diffusion must be a DiffusionConfig, got {type(diffusion).__name__}")
    for name, ids in (("mask_token_id", [diffusion.mask_token_id]), ("eos_token_ids", diffusion.eos_token_ids)):
        outside = [i for i in ids if i >= vocab_size]
        if outside:
            raise ValueError(
                f"DiffusionConfig: {name} must be below the model's vocab_size={vocab_size}, got {outside[0]}"
            )
