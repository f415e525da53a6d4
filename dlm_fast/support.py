"""The support table: which published families open, as data, as text and as docs/models.md, which is generated from it
(`dlm-fast inspect --families --markdown`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .models.families import FAMILIES, NATIVE, REFUSED
from .models.family import Decoder, Family

INTRODUCTION = """\
# Models

This page is generated from the table of families by `dlm-fast inspect --families --markdown > docs/models.md`; a test
compares the two. The table itself is [`dlm_fast/models/families.py`](../dlm_fast/models/families.py).

`dlm_fast.load(name)` takes a folder, an id of the Hub or the name of an embedded model. It tells the family by
`config.json`, builds the family's class of transformers and gives every stored tensor its native name. No code of a
checkpoint runs, pickles are not opened, and a tensor without a place is an error. The mask, the end of a text and how
the model sees come from the call, the section `dlm`, config.json, generation_config.json, the tokenizer, and the
family, in this order; `dlm-fast inspect MODEL` shows each with its place before anything is loaded.
[adding-a-model.md](adding-a-model.md) says how a family is added, and what a model of your own must say.

**No public weights were opened for this page**: neither network nor GPU was at hand. What is proved was proved with
tiny random checkpoints in the published layouts (their fields of config.json, names of tensors and tokenizer files).
"""


def support() -> dict[str, list[dict[str, Any]]]:
    """The table as plain data: families that open, transformers' own classes, and families that do not open."""
    return {
        "families": [_family(family) for family in FAMILIES],
        "native": [_family(family) for family in NATIVE],
        "unsupported": [
            {"name": name, "model_types": list(types), "reason": reason} for name, types, reason in REFUSED
        ],
    }


def _family(family: Family) -> dict[str, Any]:
    decoders = [] if family.decoder is None else [{"name": None, **family.decoder.as_dict()}]
    decoders += [{"name": pattern, **decoder.as_dict()} for pattern, decoder in family.decoders]
    return {
        "name": family.name,
        "checkpoints": family.checkpoints,
        "class": family.native.__name__,
        "model_types": list(family.model_types),
        "told_by": family.told_by,
        "decoders": decoders,
        "proof": family.proof,
        "unproven": family.unproven,
    }


def lines() -> Iterator[str]:
    """The table as text."""
    table = support()
    for row in (*table["families"], *table["native"]):
        yield f"{row['name']}: {row['checkpoints']}"
        yield f"  class     {row['class']}, told by {_told(row, str)}"
        yield f"  decoder   {_decoders(row, str) or 'by the visibility of the model'}"
        yield f"  proved    {row['proof'] or 'nothing'}"
        if row["unproven"]:
            yield f"  unproven  {row['unproven']}"
    for row in table["unsupported"]:
        yield f"{row['name']}: refused (model_type {', '.join(row['model_types'])}), since {row['reason']}"


def markdown() -> str:
    """docs/models.md."""
    table = support()
    families = _table(
        ("family", "checkpoints", "class", "told by", "decoder", "proved", "unproven"),
        (
            (
                row["name"],
                row["checkpoints"],
                _code(row["class"]),
                _told(row, _code),
                _decoders(row, _link) or "by visibility",
                _proved(row),
                row["unproven"],
            )
            for row in table["families"]
        ),
    )
    proofs = []
    for proof in dict.fromkeys(row["proof"] for row in table["families"]):
        names = ", ".join(row["name"] for row in table["families"] if row["proof"] == proof)
        proofs.append(f"- {proof[:1].upper() + proof[1:] or 'Nothing'}: {names}.")
    native = _table(
        ("class", "`model_type`", "proved"),
        ((_code(row["class"]), ", ".join(map(_code, row["model_types"])), _proved(row)) for row in table["native"]),
    )
    refused = _table(
        ("family", "`model_type`", "why"),
        ((row["name"], ", ".join(map(_code, row["model_types"])), row["reason"]) for row in table["unsupported"]),
    )
    parts = [
        INTRODUCTION,
        "## Families that open\n",
        *families,
        "\nA decoder is what `generate` uses where the call names no preset ([decoders.md](decoders.md)). What is",
        "unproven was assumed, and `load` warns of it.\n",
        "### What is proved, and how\n",
        *proofs,
        "\nThe checkpoints are made by [`tests/support/published.py`](../tests/support/published.py), the independent",
        "forwards by [`tests/support/family_oracles.py`](../tests/support/family_oracles.py), and the published loops",
        "are transcribed in [`tests/support/transcriptions/`](../tests/support/transcriptions).\n",
        "## Classes of transformers\n",
        "A model in transformers' own layout opens where config.json has a section `dlm`, or the call says",
        "`diffusion=`: what training here writes, what `save_pretrained` of a loaded model writes, and your own.\n",
        *native,
        "\n## Families that do not open\n",
        *refused,
    ]
    return "\n".join(parts) + "\n"


def _told(row: Mapping[str, Any], show: Callable[[str], str]) -> str:
    """How the family is told from a config.json."""
    kinds = "model_type " + " or ".join(map(show, row["model_types"]))
    return f"{kinds}, {row['told_by']}" if row["told_by"] else kinds


def _decoders(row: Mapping[str, Any], show: Callable[[str], str]) -> str:
    """The decoders of a family with their settings; one that only the name of a checkpoint tells, with that name."""
    texts = []
    for decoder in row["decoders"]:
        settings = dict(decoder["options"])
        for name, default in (("temperature", Decoder.temperature), ("top_p", Decoder.top_p)):
            if decoder[name] != default:
                settings[name] = decoder[name]
        text = show(decoder["preset"]) + "".join(f", {name} {value!r}" for name, value in settings.items())
        if decoder["name"] is not None:
            name = decoder["name"].removeprefix("(?i)").replace("\\", "")  # a pattern of a literal text
            text += f" where the name has {name!r}"
        texts.append(text)
    return "; ".join(texts)


def _proved(row: Mapping[str, Any]) -> str:
    """What the proof is of: the first word of each of its sentences."""
    return ", ".join(part.split()[0] for part in row["proof"].split("; ") if part) or "nothing"


def _code(text: str) -> str:
    return f"`{text}`"


def _link(preset: str) -> str:
    return f"[`{preset}`](decoders.md#the-table)"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ("-",) * len(header), *rows)]
