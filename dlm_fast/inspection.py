"""See before you load: what the files of a checkpoint say of it, and what `load` and `generate` would make of that.

Only headers of weights are read, also of a repository of the Hub.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import account_for_adapter
from .call import check_greedy
from .diffusion import DiffusionConfig
from .files import ADAPTER_CONFIG, CheckpointError, described, name_of
from .limits import shown
from .loading import FLOATS, Checkpoint, float_dtype, float_kinds, open_checkpoint
from .models.family import FACTS, Decoder, head_dim_of
from .models.tensors import Account, empty_model
from .presets import Preset, resolve
from .presets.page import settings_that_differ
from .requests import check_commands, check_support

# Positions of the row for which the memory of a cache is said.
ROW = 4096
# Tokens of a response of `generate` where the call says no number.
RESPONSE = 128
# How many tensors of a kind are named.
NAMED = 8
# What may be wrong with a tensor: the model has no tensor for it, or no file has it, or its shape is another.
KINDS = ("missing", "unexpected", "misshaped")
# Settings that are ids of the tokenizer.
IDS = ("mask_token_id", "eos_token_ids", "pad_token_id")


def inspect_checkpoint(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    diffusion: DiffusionConfig | Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    adapter: str | Path | bool | None = None,
) -> dict[str, Any]:
    """What `load` would open and `generate` would use, as plain data; no weight is read.

    The arguments are those of `load`. Of a repository of the Hub that the cache does not hold, the configuration and
    the tokenizer are fetched, and of its weights the headers alone.

    Returns:
        A dict with the keys "checkpoint", "path", "family", "model", "settings" (every one with its source),
        "tokenizer", "decoder", "tensors", "unread" (fields of config.json that nothing read), "quantisation",
        "adapter", "memory", and "refused": why `load` or `generate` would refuse, [] if they would not.
    Raises:
        CheckpointError, ValueError, NotImplementedError: the files say too little or contradict one another, as `load`
            would say.
    """
    if dtype is not None and dtype not in FLOATS.values():
        raise TypeError(
            f"inspect: dtype must be None (as stored) or a float of 16, 32 or 64 bits, got dtype={shown(dtype)}"
        )
    if adapter is not None and adapter is not False and (not isinstance(adapter, (str, Path)) or adapter == ""):
        raise TypeError(f"inspect: adapter must be a folder, False or None, got adapter={shown(adapter)}")
    hints = name_of(adapter) if adapter else ""
    with described(path_or_id, revision) as (source, at):
        found = open_checkpoint(source, revision=at, diffusion=diffusion, hints=hints)
        account, model = found.account(), empty_model(found.family.native, found.config)
        tensors = _tensors(found, account)
        added = None if not adapter else _adapter(adapter, found, model)
        kept, floats = _dtypes(found, account, dtype)
        decoder = _decoder(found)
        besides = (found.path / ADAPTER_CONFIG).is_file() and adapter is None
    refused = [text for part in (tensors, added, floats, decoder) if part is not None for text in part.pop("refused")]
    if besides:
        refused.append(f"{ADAPTER_CONFIG} lies beside the weights, so that adapter must say whether it is applied")
    quantised = found.values.get("quantization_config")
    return {
        "checkpoint": str(path_or_id) if revision is None else f"{path_or_id} at revision {revision}",
        "family": {
            "name": found.family.name,
            "told_by": _told_by(found),
            "proof": found.family.proof,
            "unproven": found.family.unproven,
        },
        "model": _model(found, model),
        "settings": _settings(found),
        "tokenizer": _tokenizer(found.tokenizer),
        "decoder": decoder,
        "tensors": tensors,
        "unread": list(found.unread),
        "quantisation": dict(quantised) if isinstance(quantised, Mapping) else quantised,
        "adapter": added,
        "memory": _memory(found, model, account, kept, floats, decoder),
        "refused": refused,
    }


def _told_by(found: Checkpoint) -> str:
    """How the family was told."""
    kind = f"model_type {found.values.get('model_type')!r}"
    return f"{kind}, {found.family.told_by}" if found.family.told_by else kind


def _model(found: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """The native class and its sizes."""
    config = found.config
    experts = getattr(config, "num_experts", None) or getattr(config, "n_routed_experts", None)
    return {
        "class": found.family.native.__name__,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head_dim_of(config),
        "vocab": config.vocab_size,
        "positions": config.max_position_embeddings,
        "experts": experts,
        "experts_per_token": config.num_experts_per_tok if experts else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _settings(found: Checkpoint) -> dict[str, dict[str, Any]]:
    """Every setting of the model with its source, and with its text where it is an id of the tokenizer."""
    rows, names = found.settings.as_dict(), (*IDS, "visibility", "block_length", *FACTS)
    settings = {name: dict(rows[name]) for name in dict.fromkeys(names) if name in rows}
    for name in IDS:
        row = settings.get(name)
        if row is not None:
            ids = row["value"] if isinstance(row["value"], list) else [row["value"]]
            row["text"] = [_text(found.tokenizer, token) for token in ids]
    return settings


def _text(tokenizer: Any, token: int | None) -> str | None:
    """The token of an id; None where the tokenizer has no such id."""
    if tokenizer is None or token is None or not 0 <= token < len(tokenizer):
        return None
    return tokenizer.convert_ids_to_tokens(token)


def _tokenizer(tokenizer: Any) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    template = getattr(tokenizer, "chat_template", None) is not None
    return {"class": type(tokenizer).__name__, "tokens": len(tokenizer), "chat_template": template}


def _decoder(found: Checkpoint) -> dict[str, Any]:
    """What `generate` uses where the call names no preset."""
    settings, diffusion = found.settings, found.settings.diffusion
    decoder, source = settings.decoder, settings.sources.get("decoder", f"visibility {diffusion.visibility!r}")
    if decoder is None:
        decoder = Decoder("llada" if diffusion.visibility == "full" else "sdar")
    row: dict[str, Any] = {**decoder.as_dict(), "source": source, "refused": []}
    try:
        chosen = resolve(decoder.preset, diffusion.visibility, dict(decoder.options))
        check_support(chosen, diffusion)
        check_greedy(chosen, [decoder.temperature], 0, decoder.top_p)
        check_commands(chosen, found.config.vocab_size)
    except (ValueError, NotImplementedError) as error:
        return {**row, "refused": [f"generate without a preset: {error}"], "cache": None, "positions": None}
    return {
        **row,
        "schedule": chosen.schedule,
        "cache": chosen.cache,
        "stores": chosen.operation.stores,
        "rule": chosen.rule,
        "positions": _block_length(chosen, diffusion),
        "exactness": chosen.exactness,
        "settings": settings_that_differ(chosen),
    }


def _block_length(preset: Preset, diffusion: DiffusionConfig) -> int:
    """Positions of a block; where everything is one block, those of a response of `generate`."""
    length = preset.block_length or diffusion.block_length
    return RESPONSE if preset.single_block or length is None else length


def _kinds(missing: Iterable[str], unexpected: Iterable[str], misshaped: Iterable[str], of: str = "") -> dict[str, Any]:
    """The tensors that are not accounted for, by kind."""
    row: dict[str, Any] = {"refused": []}
    tensors = dict(zip(KINDS, (missing, unexpected, misshaped)))
    for kind, names in tensors.items():
        named = list(dict.fromkeys(names))
        row[kind] = {"count": len(named), "names": named[:NAMED]}
        if named:
            row["refused"].append(f"{len(named)} tensors {of}are {kind}, the first {named[0]}")
    return row


def _tensors(found: Checkpoint, account: Account) -> dict[str, Any]:
    """The stored tensors, and those that have no place in the model, or no tensor for their place."""
    count = {"stored": len(found.stored), "files": len({stored.file for stored in found.stored.values()})}
    if found.quantised:  # what a quantisation stores is known to transformers alone
        return {**count, "checked": False, **_kinds((), (), ())}
    missing = (f"{name} in no file" for name in account.missing)
    return {**count, "checked": True, **_kinds(missing, account.unexpected, account.misshaped)}


def _adapter(adapter: str | Path | bool, found: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """The adapter's tensors, and those that have no place in the model, or no tensor for their place."""
    account = account_for_adapter(adapter, found.family, found.config, model, found.stored)
    row = _kinds(account.missing, account.unexpected, account.misshaped, "of the adapter ")
    return {
        "path": str(adapter),
        "base": account.config.get("base_model_name_or_path"),
        "rank": account.config.get("r"),
        "stored": len(account.stored),
        "placed": len(account.stored) - len(account.unexpected) - len(account.misshaped),
        **row,
    }


def _dtypes(
    found: Checkpoint, account: Account, dtype: torch.dtype | None
) -> tuple[torch.dtype | None, dict[str, Any]]:
    """The dtype that the weights would have, and what is stored, by dtype; None where `load` would refuse."""
    stored: dict[str, dict[str, int]] = {}
    for tensor in found.stored.values():
        row = stored.setdefault(tensor.dtype, {"tensors": 0, "values": 0})
        row["tensors"] += 1
        row["values"] += math.prod(tensor.shape)
    for name, row in stored.items():
        row["bytes"] = row["values"] * _bits(name) // 8
    row: dict[str, Any] = {"stored": stored, "refused": []}
    if found.quantised:
        return dtype, row
    parts = account.parts.items()
    dtypes = {part.name: part.stored.dtype for name, part in parts if name not in account.buffers}
    try:
        if dtype is not None:
            float_kinds(found.path.name, dtypes)
            return dtype, row
        return float_dtype(found.path.name, dtypes), row
    except CheckpointError as error:
        row["refused"].append(str(error).removeprefix("load: "))
        return None, row


def _bits(dtype: str) -> int:
    """Bits of a value, by the name of its dtype in safetensors: BF16, I8, F8_E4M3, BOOL."""
    number = re.search(r"\d+", dtype)
    return int(number.group()) if number else 8


def _memory(
    found: Checkpoint,
    model: nn.Module,
    account: Account,
    dtype: torch.dtype | None,
    floats: dict[str, Any],
    decoder: Mapping[str, Any],
) -> dict[str, Any]:
    """Bytes of the weights, of the keys and values of a row of `ROW` positions, and of the logits of a block."""
    config = found.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(tensor.nbytes for name, tensor in model.state_dict().items() if name in account.buffers)
    by_dtype = {_short(kind): parameters * kind.itemsize + buffers for kind in (torch.bfloat16, torch.float32)}
    if dtype is not None:
        by_dtype[_short(dtype)] = parameters * dtype.itemsize + buffers
    weights = None if found.quantised or dtype is None else by_dtype[_short(dtype)]
    if found.quantised:
        weights, by_dtype = sum(row["bytes"] for row in floats["stored"].values()), {}
    size = 2 if dtype is None else dtype.itemsize
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim_of(config) * ROW * size
    positions = decoder["positions"]
    return {
        "dtype": None if dtype is None else _short(dtype),
        "weights": weights,
        "weights_by_dtype": by_dtype,
        **floats,
        "cache": {"positions": ROW, "bytes": cache, "stored": bool(decoder.get("stores"))},
        "logits": {
            "positions": positions,
            "bytes": None if positions is None else positions * config.vocab_size * size,
        },
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """What `inspect_checkpoint` returned, as text."""
    family, model, decoder, memory = (report[name] for name in ("family", "model", "decoder", "memory"))
    yield report["checkpoint"]
    yield from _row("family", f"{family['name']} ({family['told_by']})")
    yield from _row("proved", f"{family['proof']}; with tiny random checkpoints" if family["proof"] else "nothing")
    if family["unproven"]:
        yield from _row("unproven", family["unproven"])
    experts = f", {model['experts_per_token']} of {model['experts']} experts a token" if model["experts"] else ""
    yield from _row(
        "class",
        f"{model['class']}: {model['layers']} layers, hidden {model['hidden']}, {model['heads']} heads of "
        f"{model['head_dim']} ({model['kv_heads']} of keys and values), vocabulary {model['vocab']}{experts}; "
        f"{model['parameters']:,} parameters",
    )
    for name, setting in report["settings"].items():
        yield from _row(name, f"{_value(setting)} ({setting['source']})")
    tokenizer = report["tokenizer"]
    template = "a chat template" if tokenizer and tokenizer["chat_template"] else "no chat template"
    yield from _row(
        "tokenizer", f"{tokenizer['class']}, {tokenizer['tokens']} tokens, {template}" if tokenizer else "none"
    )
    options = "".join(f", {name}={value!r}" for name, value in decoder["options"].items())
    yield from _row(
        "decoder",
        f"preset {decoder['preset']}{options}, temperature {decoder['temperature']:g}, top_p {decoder['top_p']:g} "
        f"({decoder['source']})",
    )
    if decoder["cache"] is not None:
        yield from _row(
            "",
            f"schedule {decoder['schedule']}, rule {decoder['rule']}, cache {decoder['cache']}; {decoder['exactness']}"
            f"; settings: {decoder['settings'].replace('`', '')}",
        )
    yield from _row("tensors", _tensor_text(report))
    for kind in KINDS:
        for name in report["tensors"][kind]["names"]:
            yield from _row("", f"{kind}: {name}")
    yield from _row("unread", ", ".join(report["unread"]) or "no field of config.json")
    yield from _row("quantised", "no" if report["quantisation"] is None else _quantisation(report["quantisation"]))
    yield from _adapter_lines(report["adapter"])
    yield from _memory_lines(memory, decoder)
    for reason in report["refused"]:
        yield from _row("refused", reason)


def _row(name: str, text: str) -> Iterator[str]:
    """A name and its text, which goes on below itself where it is long."""
    for index, part in enumerate(textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)):
        yield f"  {name if index == 0 else '':17}{part}"


def _value(setting: Mapping[str, Any]) -> str:
    """The value of a setting; an id with its token."""
    value = setting["value"]
    if "text" not in setting:
        return str(value)
    ids = value if isinstance(value, list) else [value]
    return ", ".join(str(i) if text is None else f"{i} {text!r}" for i, text in zip(ids, setting["text"])) or "none"


def _tensor_text(report: Mapping[str, Any]) -> str:
    tensors = report["tensors"]
    counts = [f"{tensors[kind]['count']} {kind}" for kind in KINDS if tensors[kind]["count"]]
    fit = ", ".join(counts) or "every one has its place"
    if not tensors["checked"]:
        fit = "not checked, since only transformers knows what a quantisation stores"
    files = "1 file" if tensors["files"] == 1 else f"{tensors['files']} files"
    return f"{tensors['stored']} in {files}, {fit}"


def _quantisation(section: Any) -> str:
    method = section.get("quant_method") if isinstance(section, Mapping) else section
    return f"yes, quant_method {method!r}"


def _adapter_lines(adapter: Mapping[str, Any] | None) -> Iterator[str]:
    if adapter is None:
        yield from _row("adapter", "none")
        return
    yield from _row(
        "adapter",
        f"{adapter['path']} for {adapter['base']!r}, rank {adapter['rank']}: {adapter['placed']} of "
        f"{adapter['stored']} tensors have their place",
    )
    for kind in KINDS:
        for name in adapter[kind]["names"]:
            yield from _row("", f"{kind}: {name}")


def _memory_lines(memory: Mapping[str, Any], decoder: Mapping[str, Any]) -> Iterator[str]:
    stored = ", ".join(f"{_size(row['bytes'])} in {name}" for name, row in memory["stored"].items())
    loaded = ", ".join(f"{_size(size)} in {name}" for name, size in memory["weights_by_dtype"].items())
    yield from _row("weights", f"{stored} as stored" + (f"; loaded {loaded}" if loaded else ""))
    cache, logits = memory["cache"], memory["logits"]
    dtype = memory["dtype"] or "bfloat16"
    uses = "" if cache["stored"] else f", which preset {decoder['preset']} does not keep"
    yield from _row("keys and values", f"{_size(cache['bytes'])} in {dtype} for a row of {cache['positions']:,}{uses}")
    if logits["bytes"] is not None:
        yield from _row("logits", f"{_size(logits['bytes'])} in {dtype} for a block of {logits['positions']}")


def _size(count: int) -> str:
    """A number of bytes with a unit."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
