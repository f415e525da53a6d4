"""Rows of token ids, from what a user hands to `generate` as prompts or as a canvas."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .limits import listed, shown

# What a tokenizer may return beside ids and attention mask, and what does not change the meaning of the ids.
IGNORED_KEYS = ("token_type_ids", "special_tokens_mask", "offset_mapping", "length")
NOUNS = {"prompts": "prompts", "canvas": "canvases"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt or canvas.

    Attributes:
        ids: token ids.
        text: whether the user gave a string or a chat, and not ids.
    """

    ids: list[int]
    text: bool = False


def read_rows(name: str, source: Any, attention_mask: Any, tokenizer: Any) -> list[Row]:
    """The rows of `generate`'s argument `name` ("prompts" or "canvas"), in every form that its docstring lists.

    Raises ValueError or TypeError, each naming the argument and what was got.
    """
    # 1. A tokenizer's result, or an array of ids.
    if isinstance(source, Mapping):
        return _read_encoding(name, source, attention_mask, tokenizer)
    if _is_array(source):
        rows = _array_ids(name, source, 1, 2)
        if source.ndim == 1:
            raise ValueError(
                f"generate: {name} must be a list of {NOUNS[name]}, got one row of token ids; did you mean [{name}]?"
            )
        return _without_pads(name, rows, attention_mask, tokenizer)

    # 2. A list of rows, and not one row or one chat.
    if isinstance(source, (str, bytes, bytearray)):
        raise ValueError(f"generate: {name} must be a list of {NOUNS[name]}, got a single {type(source).__name__}")
    if (
        not isinstance(source, Iterable)
        or isinstance(source, (set, frozenset))
        or isinstance(source, np.ndarray)
        and not source.ndim
    ):
        raise TypeError(f"generate: {name} must be a list of {NOUNS[name]}, got {_got(source)}")
    items = list(source)
    if items and all(_is_id(item) or _is_array(item) and item.ndim == 0 for item in items):
        raise ValueError(
            f"generate: {name} must be a list of {NOUNS[name]}, got one list of token ids; did you mean [{name}]?"
        )
    if items and all(_is_message(item) for item in items):
        raise ValueError(f"generate: {name} must be a list of {NOUNS[name]}, got one chat; did you mean [chat]?")

    # 3. Each row of the list, less what the mask calls padding.
    rows = [_read_row(f"{name}[{b}]", item, tokenizer) for b, item in enumerate(items)]
    if attention_mask is None:
        return rows
    if any(isinstance(item, Mapping) and item.get("attention_mask") is not None for item in items):
        raise ValueError(f"generate: attention_mask must be given once, got one in {name} too")
    if any(row.text for row in rows):
        raise ValueError("generate: attention_mask must go with token ids, got one with text, which has no padding")
    return [Row(ids) for ids in _unpadded(name, [row.ids for row in rows], attention_mask)]


def _read_row(where: str, item: Any, tokenizer: Any) -> Row:
    """One row of a list; `where` names the row in errors, as "prompts[2]"."""
    if isinstance(item, str):
        if tokenizer is None:
            raise ValueError(
                "generate: prompts of text need a tokenizer; the checkpoint has none, pass tokenizer= or token ids"
            )
        return Row(_encoded(where, lambda: tokenizer(item)["input_ids"]), text=True)
    if _is_message(item):
        raise ValueError(
            f"generate: {where} must be a string, a chat or token ids, got one message of a chat; a chat is a list of "
            "them"
        )
    if isinstance(item, Mapping):
        rows = _read_encoding(where, item, None, tokenizer)
        if len(rows) != 1:
            raise ValueError(f"generate: {where} must hold one row of input_ids, got {len(rows)}")
        return rows[0]
    if _is_array(item):
        return Row(_array_ids(where, item, 1))
    if isinstance(item, (bytes, bytearray, memoryview, set, frozenset)) or not isinstance(item, Iterable):
        raise TypeError(f"generate: {where} must be a string, a chat or token ids, got {_got(item)}")
    parts = list(item)
    if parts and all(isinstance(part, Mapping) for part in parts):
        return Row(_encode_chat(where, parts, tokenizer), text=True)
    for part in parts:
        if not _is_id(part):
            raise TypeError(
                f"generate: {where} must be a string, a chat or token ids, got an item of type {type(part).__name__}"
            )
    return Row([int(part) for part in parts])


def _encode_chat(where: str, messages: list[Mapping[str, Any]], tokenizer: Any) -> list[int]:
    """Token ids of a chat, by the tokenizer's chat template."""
    for message in messages:
        if not _is_message(message):
            raise ValueError(
                f"generate: {where} must be a chat of messages with a role, got one with the keys {_keys(message)}"
            )
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("generate: prompts of chats need a tokenizer with a chat template")

    def encode() -> list[int]:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return _encoded(where, encode)


def _encoded(where: str, encode: Callable[[], Any]) -> list[int]:
    """The ids that `encode` returns. Whatever the tokenizer raises becomes a ValueError that names the row."""
    try:
        ids = list(encode())
    except Exception as error:  # a template is code, and may raise anything
        raise ValueError(
            f"generate: {where} must be what the tokenizer can encode, got {type(error).__name__}: {error}"
        ) from error
    if not all(map(_is_id, ids)):
        raise TypeError(
            f"generate: {where} must become a list of token ids, got input_ids of the tokenizer that are none"
        )
    return ids


def _read_encoding(name: str, encoding: Mapping[str, Any], attention_mask: Any, tokenizer: Any) -> list[Row]:
    """The rows of a tokenizer's result: the ids where the attention mask is 1."""
    # 1. Check the keys, and find the mask.
    if "input_ids" not in encoding:
        raise TypeError(
            f"generate: {name} must be a list or a tokenizer's result with input_ids, got a mapping with the keys "
            f"{_keys(encoding)}"
        )
    unknown = {key: None for key in encoding if key not in ("input_ids", "attention_mask", *IGNORED_KEYS)}
    if unknown:
        raise TypeError(
            f"generate: {name} must hold input_ids and attention_mask, got the keys {_keys(unknown)} beside them"
        )
    ids, mask = encoding["input_ids"], encoding.get("attention_mask")
    if mask is not None and attention_mask is not None:
        raise ValueError(f"generate: attention_mask must be given once, got one in {name} too")
    mask = attention_mask if mask is None else mask

    # 2. Read the ids, which are those of several rows or of one row.
    if _is_array(ids):
        rows, is_one_row = _array_ids(f"{name}['input_ids']", ids, 1, 2), ids.ndim == 1
    elif isinstance(ids, (list, tuple)):
        is_one_row = bool(ids) and all(map(_is_id, ids))
        if any(isinstance(row, str) for row in ids):
            raise TypeError(f"generate: {name}['input_ids'] must be token ids, got a str")
        rows = (
            list(ids)
            if is_one_row
            else [_read_row(f"{name}['input_ids'][{b}]", row, None).ids for b, row in enumerate(ids)]
        )
    else:
        raise TypeError(f"generate: {name}['input_ids'] must be token ids, got {_got(ids)}")
    if is_one_row:
        rows, mask = [[int(token) for token in rows]], None if mask is None else [_nested(mask)]
    return _without_pads(name, rows, mask, tokenizer)


def _without_pads(name: str, rows: list[list[int]], attention_mask: Any, tokenizer: Any) -> list[Row]:
    """Rows that stood in a rectangle, less what `attention_mask` calls padding.

    Without a mask, a row that begins or ends with the tokenizer's pad id is refused, since the row may be padded.
    """
    if attention_mask is not None:
        return [Row(ids) for ids in _unpadded(name, rows, attention_mask)]
    pad = getattr(tokenizer, "pad_token_id", None)
    for b, ids in enumerate(rows):
        if ids and pad is not None and pad in (ids[0], ids[-1]):
            raise ValueError(
                f"generate: {name}[{b}] must come with attention_mask=, got the tokenizer's pad id {pad} at an end of "
                "it; pass the tokenizer's whole result or its mask (all ones if these are no pads)"
            )
    return [Row(ids) for ids in rows]


def _unpadded(name: str, rows: list[list[int]], attention_mask: Any) -> list[list[int]]:
    """For each row the ids where the mask is 1, which must be one unbroken stretch."""
    mask = _nested(attention_mask)
    lengths = [len(ids) for ids in rows]
    is_nested = isinstance(mask, list) and all(isinstance(row, list) for row in mask)
    if not is_nested or [len(row) for row in mask] != lengths:
        got = [len(row) for row in mask] if is_nested else mask
        raise ValueError(
            f"generate: attention_mask must have the shape of the ids, rows of lengths {lengths}, got {shown(got)}"
        )
    stretches = []
    for b, (ids, row) in enumerate(zip(rows, mask)):
        wrong_values = [value for value in row if not isinstance(value, numbers.Integral) or value not in (0, 1)]
        if wrong_values:
            raise ValueError(f"generate: attention_mask must hold 0 and 1, got {shown(wrong_values[0])} in row {b}")
        ones = [j for j, value in enumerate(row) if value]
        start, end = (ones[0], ones[-1] + 1) if ones else (0, 0)
        if end - start != len(ones):
            raise ValueError(
                "generate: attention_mask must be 1 from a row's first token to its last, got a 0 between them in row "
                f"{b}"
            )
        stretches.append(ids[start:end])
    return stretches


def _is_array(value: Any) -> bool:
    # An array of objects or strings is read as a list of rows.
    return isinstance(value, Tensor) or isinstance(value, np.ndarray) and value.dtype.kind not in "OUS"


def _is_id(value: Any) -> bool:
    # The question of an abstract class takes several times as long, and a prompt may have a million ids.
    return type(value) is int or isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _array_ids(where: str, array: Tensor | np.ndarray, *dims: int) -> list:
    """A tensor or array of token ids as nested lists; `dims` are the numbers of dimensions that are allowed."""
    dtype = array.dtype
    if isinstance(array, Tensor):
        is_whole = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    else:
        is_whole = dtype.kind in "iu"
    if array.ndim not in dims or not is_whole:
        shape = " or ".join(f"{dim}-D" for dim in dims)
        raise TypeError(f"generate: {where} must be {shape} token ids, got shape {tuple(array.shape)}, {dtype}")
    return listed("generate", where, array)


def _nested(mask: Any, depth: int = 2) -> Any:
    """The mask as lists, nested as deep as a mask may be."""
    if isinstance(mask, (Tensor, np.ndarray)):
        return listed("generate", "attention_mask", mask)
    if isinstance(mask, (list, tuple)):
        return [_nested(row, depth - 1) if depth and hasattr(row, "__len__") else row for row in mask]
    return mask


def _keys(mapping: Mapping[Any, Any]) -> str:
    """The keys of a mapping, for an error."""
    return ", ".join(map(str, mapping)) or "none"


def _got(value: Any) -> str:
    """A value as an error shows what was got: a number as it is, anything else by its type."""
    return shown(value) if value is None or isinstance(value, numbers.Number) else f"a {type(value).__name__}"
