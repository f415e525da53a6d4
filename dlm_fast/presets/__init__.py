"""Presets: every published decoder is a row of one table."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..limits import shown
from ..policies import as_policies
from .options import unread
from .preset import FIELDS, Preset
from .table import PRESETS

__all__ = ["FIELDS", "PRESETS", "Preset", "describe", "resolve"]

# What the published loops call an option, and what it is here, for the error about an unknown option.
OTHER_NAMES = {
    "alg": "the preset with its options rule and score",
    "alg_temp": "order_temperature",
    "block_size": "block_length",
    "causal_commit": "causal_prefix of the model's DiffusionConfig",
    "causal_context": "causal_prefix of the model's DiffusionConfig",
    "confidence_eos_eot_inf": "suppress_eos",
    "denoising_steps": "steps_per_block",
    "gen_length": "max_new_tokens",
    "logits_eos_inf": "exclude_eos",
    "remasking": "score",
    "seeded": "first_token",
    "small_block_size": "sub_block_length",
    "steps": "steps_per_block (the steps of one block)",
}


def resolve(preset: str | Preset | None, visibility: str, overrides: dict[str, Any], policy: Any = None) -> Preset:
    """The decoder that a call asks for: a preset with some of its options replaced.

    Args:
        preset: a name, a `Preset`, or None for the default of the model's visibility ("llada" or "sdar").
        visibility: the model's visibility, "full" or "block".
        overrides: the options that the call replaces, by name.
        policy: the policies of `generate(policy=...)`, which act after the preset's own policies.
    Raises:
        ValueError: the preset or an option is unknown, an option is not read by the decoder (`presets/options.py`), a
            combination makes no sense, or the preset's visibility is not the model's.
        TypeError: `preset` or `policy` is of a wrong type.
        NotImplementedError: the preset is for a model family that is not here yet.
    """
    # 1. Find the preset.
    if preset is None:
        preset = "llada" if visibility == "full" else "sdar"
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got preset={preset!r}")
        preset = PRESETS[preset]
    if not isinstance(preset, Preset):
        raise TypeError(f"preset must be a name of dlm_fast.PRESETS, a Preset or None, got preset={shown(preset)}")

    # 2. Check that every option is known, and that the preset fits the model.
    preset_policies = as_policies(overrides["policies"], "policies") if "policies" in overrides else preset.policies
    policies = preset_policies + as_policies(policy)
    known = {*FIELDS, *(field.name for each in policies for field in dataclasses.fields(each))}
    unknown = sorted(set(overrides) - known)
    if unknown:
        here = "".join(f"; {name} is here {OTHER_NAMES[name]}" for name in unknown if name in OTHER_NAMES)
        raise ValueError(
            f"generate: unknown options {', '.join(unknown)}{here}; options of preset {preset.name} are "
            f"{', '.join(preset.options())}"
        )
    if not preset.supported:
        raise NotImplementedError(f"preset {preset.name} needs {preset.needs}; its rule is UnmaskRule(renoise=True)")
    if preset.visibility != visibility:
        fitting = ", ".join(p.name for p in PRESETS.values() if p.visibility == visibility)
        raise ValueError(
            f"preset {preset.name} decodes models of visibility {preset.visibility!r}, this model is {visibility!r}; "
            f"use {fitting}"
        )

    # 3. Replace the options, and check that the decoder reads every one of them.
    chosen = preset.replace(**{**overrides, "policies": policies})
    reasons = unread(chosen, overrides, preset)
    if reasons:
        raise ValueError(f"generate: {'; '.join(reasons)}")
    return chosen


def describe(preset: Preset) -> dict[str, Any]:
    """The preset as plain data; a policy is its class's name with the policy's numbers."""
    row = {field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)}
    row["policies"] = [{"name": type(policy).__name__, **_plain(policy)} for policy in preset.policies]
    return row


def _plain(policy: Any) -> dict[str, Any]:
    """The numbers of a policy, by name; a function is shown by its own name."""
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    return {
        name: getattr(value, "__name__", repr(value)) if callable(value) else value for name, value in fields.items()
    }
