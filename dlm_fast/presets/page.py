"""docs/decoders.md, generated from the table of presets: `dlm-fast presets --markdown`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from . import FIELDS, PRESETS, Preset, describe
from .caches import CACHES
from .preset import LAST_BLOCKS, QUOTAS, REMAINDERS, RULES, SCHEDULES, SCORES, STOPS

INTRODUCTION = """\
# Decoders

This page is generated from the table of presets by `dlm-fast presets --markdown > docs/decoders.md`; a test compares
the two. The table itself is [`dlm_fast/presets/table.py`](../dlm_fast/presets/table.py), what each option is stands
in the docstring of `Preset` in [`dlm_fast/presets/preset.py`](../dlm_fast/presets/preset.py), what their names mean is
below, and the words are explained in [words.md](words.md).

A decoder is a row of a table: what is visible, how blocks are scheduled, what is cached, which masked positions a step
writes, and what modifies that. One loop runs every row, in batches of unequal rows, each decision per row and on the
device. Any option can be replaced in the call (`generate(..., preset="d2f", append_threshold=0.5)`, and on the command
line `--set append_threshold=0.5`). What makes no sense together is refused with its reason, and so is an option that
the decoder would not read.

D2F is the pipeline: finished blocks are committed by the same forward that denoises the next ones, and a block starts
before the one before it is finished. Forwards of a batch hold each row's own blocks, and nothing waits for the slowest
row.

- **model** is the visibility a checkpoint was trained with: full (bidirectional) or block (block-causal).
- **exact** means the tokens of the decoder's own uncached loop; **approximate** means that keys are older than the
  tokens they stand for. What each row's tokens equal is said below the first table.
- **policy** names the class in [`dlm_fast/policies/`](../dlm_fast/policies/__init__.py) that modifies the rule.
- **settings** are the options whose value differs from the default of `Preset`.
"""

# What the columns of the first table say already.
_COLUMNS = ("schedule", "cache", "rule", "policies")


MEANINGS = {
    "schedule": SCHEDULES,
    "last_block: what becomes of a last block that max_new_tokens cuts": LAST_BLOCKS,
    "cache: what is kept between forwards": {name: cache.keeps for name, cache in CACHES.items()},
    "rule: which masked positions a step writes": RULES,
    "score and rank": SCORES,
    "quota_of: what a quota spreads over its steps": QUOTAS,
    "remainder: which steps of a quota take one more": REMAINDERS,
    "stop: when a row ends": STOPS,
}


def _meanings(title: str, meanings: dict[str, str]) -> list[str]:
    """The names of an option as a list."""
    return [f"**{title}**\n", *(f"- `{name}`: {meaning}" for name, meaning in meanings.items()), ""]


def markdown() -> str:
    """The page: one line a preset, then what its tokens equal, then the settings in which it differs."""
    presets = tuple(PRESETS.values())
    decoders = _table(
        ("preset", "model", "schedule", "cache", "rule", "policy", "exact?", "needs", "source"),
        (_decoder(preset) for preset in presets),
    )
    settings = _table(("preset", "settings"), ((f"`{p.name}`", settings_that_differ(p)) for p in presets))
    tokens = []
    for sentence in dict.fromkeys(preset.exactness for preset in presets):
        names = ", ".join(f"`{preset.name}`" for preset in presets if preset.exactness == sentence)
        tokens.append(f"- {sentence}: {names}.")
    parts = [
        INTRODUCTION,
        "## The table\n",
        *decoders,
        "\n## What the tokens of a decoder equal\n",
        *tokens,
        "\n## What the names mean\n",
        *(line for title, meanings in MEANINGS.items() for line in _meanings(title, meanings)),
        "## Settings that differ from the defaults\n",
        f"The defaults: {_listed((name, value) for name, value in _defaults().items() if name not in _COLUMNS)}.",
        "The numbers of a policy stand behind its name.\n",
        *settings,
    ]
    return "\n".join(parts) + "\n"


def _decoder(preset: Preset) -> tuple[str, ...]:
    row = describe(preset)
    drafts = f"{row['drafts']} drafts" if row["drafts"] > 1 else ""
    policy = ", ".join(policy["name"] for policy in row["policies"]) or drafts
    rule = row["rule"] + (f" on {row['score']}" if row["score"] != "confidence" else "")
    exactness = row["exactness"].partition(":")[0]
    choices = (row["visibility"], row["schedule"], row["cache"], rule, policy, exactness)
    return (f"`{row['name']}`", *choices, row["needs"], row["source"])


def _defaults() -> dict[str, Any]:
    fields = {field.name: field.default for field in dataclasses.fields(Preset) if field.name in FIELDS}
    return {name: value for name, value in fields.items() if value is not dataclasses.MISSING}


def settings_that_differ(preset: Preset) -> str:
    """The options in which a preset differs from the defaults of `Preset`, and the numbers of its policies."""
    row, defaults = describe(preset), _defaults()
    differs = [(name, row[name]) for name in defaults if name not in _COLUMNS and row[name] != defaults[name]]
    texts = [_listed(differs)] if differs else []
    for policy in row["policies"]:
        numbers = _listed((name, value) for name, value in policy.items() if name != "name")
        texts.append(f"{policy['name']}({numbers})" if numbers else policy["name"])
    return "; ".join(texts) or "the defaults"


def _listed(options: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in options)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ("-",) * len(header), *rows)]
