"""Fingerprints: what was decoded or trained with what, by content and not by name.

A job or a training goes on only with the weights, the tokenizer and the configuration that it began with. Fingerprints
tell accidents apart, such as a folder that was trained again. They are no protection against a forger.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# An odd number whose multiples run through all 64-bit numbers in no visible order (2^64 divided by the golden ratio).
_STRIDE = 0x9E3779B97F4A7C15 - 2**64
# How many 64-bit words are summed at a time, which bounds the memory: 32 MiB for each of a few temporaries.
_CHUNK = 2**22
_STATE = ("padding", "truncation")


def of_model(model: nn.Module) -> str:
    """Fingerprint of a model's parameters, stored buffers and configuration, wherever the model lies.

    The model is read once, on its device. The fingerprint does not depend on the device or on the file names.
    """
    config = getattr(model, "config", None)
    described = None if config is None else of_json(_described(config))
    return of_json({"weights": of_tensors(model.state_dict().items()), "config": described})


def of_tensors(named: Iterable[tuple[str, Any]]) -> str:
    """Fingerprint of named tensors: names, dtypes, shapes and bits.

    What is plain data counts by its value, and any other object by its class. A tensor that is made of others, as those
    of some quantisations are, counts by these.
    """
    return of_json([[name, _entry(value)] for name, value in sorted(named, key=lambda pair: pair[0])])


def _entry(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    described = [type(value).__name__, str(value.dtype), list(value.shape)]
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [*described, *(_entry(getattr(value, name)) for name in names)]
    return [*described[1:], _bits(value)]


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
            "cleans": getattr(tokenizer, "clean_up_tokenization_spaces", None),
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


def _bits(tensor: Tensor) -> int:
    """A sum over the bits of a tensor: its 64-bit words, each times an odd number of the word's place, modulo 2^64.

    Every single bit that differs changes the sum. Whole-number arithmetic makes the sum the same on every device.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()  # torch views whole words only where the storage has a word's begin
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    total = sum(byte << 8 * place for place, byte in enumerate(flat[whole:].tolist()))  # less than a word
    for begin in range(0, words.numel(), _CHUNK):
        part = words[begin : begin + _CHUNK]
        places = torch.arange(begin, begin + part.numel(), dtype=torch.int64, device=tensor.device)
        total += int((part * (places.mul_(_STRIDE) | 1)).sum())
    return total % 2**64
