"""Fingerprints: what was decoded or trained with what, by content and not by name.

A job or a training goes on only with the weights, the tokenizer and the configuration that it began with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

# How many bytes of a tensor are copied to the host at a time, and by how many threads.
_CHUNK, _THREADS = 2**25, 8
# What a tokenizer's encoder keeps of the last call.
_STATE = ("padding", "truncation")
# Attributes of a tokenizer, besides its encoder, that change ids or texts.
_MANNERS = (
    "split_special_tokens",
    "clean_up_tokenization_spaces",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
)


def of_model(model: nn.Module) -> str:
    """Fingerprint of a model's parameters, stored buffers, modules and configuration, wherever the model lies.

    The model is read once. The fingerprint does not depend on the device or on the file names.
    """
    config = getattr(model, "config", None)
    return of_json(
        {
            "weights": of_tensors(model.state_dict().items()),
            "modules": [[name, *_manner(module)] for name, module in model.named_modules()],
            "config": None if config is None else _described(config),
        }
    )


def _manner(module: nn.Module) -> list[Any]:
    """What a module computes with besides its tensors, as far as it says so: an adapter's scale, for example."""
    names = ("scaling", "active_adapters", "disable_adapters", "merged")
    plain = {name: repr(getattr(module, name)) for name in names if hasattr(module, name)}
    return [type(module).__name__, module.extra_repr(), plain]


def of_tensors(named: Iterable[tuple[str, Any]]) -> str:
    """Fingerprint of named tensors: names, dtypes, shapes and bits.

    What is plain data counts by its value, and any other object by its class. A tensor that is made of others, as those
    of some quantisations are, counts by these.
    """
    entries = sorted(named, key=lambda pair: pair[0])
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:  # a hash lets other threads run
        found = list(threads.map(_entry, [value for _, value in entries]))
    return of_json([[name, entry] for (name, _), entry in zip(entries, found)])


def _entry(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    described = [type(value).__name__, str(value.dtype), list(value.shape)]
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [*described, *(_entry(getattr(value, name)) for name in names)]
    return [*described[1:], _digest(value)]


def of_tokenizer(tokenizer: Any) -> str | None:
    """Fingerprint of how a tokenizer encodes, decodes and writes chats; None without a tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        encoder = sorted(getattr(tokenizer, "get_vocab", dict)().items())
    else:
        # The last call's padding and truncation are state of the tokenizer, and every call sets them anew.
        encoder = {name: value for name, value in json.loads(backend.to_str()).items() if name not in _STATE}
    return of_json(
        {
            "class": type(tokenizer).__name__,
            "encoder": encoder,
            "template": getattr(tokenizer, "chat_template", None),
            "special": {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()},
            "manners": {name: getattr(tokenizer, name, None) for name in _MANNERS},
        }
    )


def of_json(value: Any) -> str:
    """SHA-256 of plain data, in hexadecimal; what JSON does not know counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()


def _described(config: Any) -> dict[str, Any]:
    """What of a transformers configuration changes a forward, and not where it was found or by what it is computed."""
    values = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "attn_implementation", "_attn_implementation", "dtype"):
        values.pop(name, None)
    return values


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, row by row."""
    flat, digest = tensor.detach().contiguous().reshape(-1).view(torch.uint8), hashlib.sha256()
    for begin in range(0, flat.numel(), _CHUNK):
        digest.update(flat[begin : begin + _CHUNK].cpu().numpy())
    return digest.hexdigest()
