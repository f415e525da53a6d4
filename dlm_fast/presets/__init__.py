"""Decoder presets: every published decoder is a row of one table."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..policies import as_policies
from .options import unread
from .preset import FIELDS, Preset
from .table import PRESETS

__all__ = ["FIELDS", "PRESETS", "Preset", "describe", "resolve"]


def resolve(preset: str | Preset | None, visibility: str, overrides: dict[str, Any], policy: Any = None) -> Preset:
    """A preset by name (default: "llada" or "sdar", by the model's visibility) with some of its options replaced.

    policy: what `generate(policy=...)` was given; it acts after the preset's own policies.

    Raises NotImplementedError for a preset of a model family that is not here; ValueError for an unknown preset or
    option, for an option that the decoder does not read (`presets/options.py`), for a combination that makes no sense,
    and where the preset's visibility is not the model's.
    """
    if preset is None:
        preset = "llada" if visibility == "full" else "sdar"
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got preset={preset!r}")
        preset = PRESETS[preset]
    own = as_policies(overrides["policies"], "policies") if "policies" in overrides else preset.policies
    policies = own + as_policies(policy)
    known = {*FIELDS, *(field.name for each in policies for field in dataclasses.fields(each))}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(
            f"generate: unknown options {', '.join(unknown)}; options of preset {preset.name} are "
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
    chosen = preset.replace(**{**overrides, "policies": policies})
    idle = unread(chosen, overrides, preset)
    if idle:
        raise ValueError(f"generate: {'; '.join(idle)}")
    return chosen


def describe(preset: Preset) -> dict[str, Any]:
    """The preset as plain data, its policies by name with their numbers."""
    row = {field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)}
    row["policies"] = [{"name": type(policy).__name__, **_plain(policy)} for policy in preset.policies]
    return row


def _plain(policy: Any) -> dict[str, Any]:
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    return {
        name: getattr(value, "__name__", repr(value)) if callable(value) else value for name, value in fields.items()
    }
