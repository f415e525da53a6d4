"""From the arguments of `generate` to checked canvases, and from a finished canvas to a response."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlm_kernels.checks.confidence import MAX_BANNED
from dlm_kernels.checks.unmask import MAX_STOP_IDS

from .diffusion import DiffusionConfig
from .limits import heat, listed, shown
from .presets import Preset
from .presets.caches import CACHES
from .presets.options import part_of
from .prompts import read_rows
from .stops import StopStrings, read_stop_strings, text_of


@dataclasses.dataclass(frozen=True)
class Requests:
    """A checked batch; every list has one entry per row.

    Attributes:
        canvases: token ids with masks, 1-D int64 on the CPU: what was asked for.
        opened: the canvases as the loop decodes them, which differ where a last block is filled up to a whole one.
        prompt_lengths: position at which the row's response begins.
        min_new_tokens: response tokens before which no EOS is drawn.
        temperature: temperature of the draws, 0 = greedy.
        top_k: filter of the draws, 0 = off.
        top_p: filter of the draws, 1.0 = off.
        seeds: random seed of the row's draws.
        request_ids: number that keys the row's noise.
        stop_strings: strings that end the row's text; None without any.
        banned_token_ids: ids that are never drawn, besides the mask id.
        eos_token_ids: ids that end a text.
    """

    canvases: list[Tensor]
    opened: list[Tensor]
    prompt_lengths: list[int]
    min_new_tokens: list[int]
    temperature: list[float]
    top_k: int
    top_p: float
    seeds: list[int]
    request_ids: list[int]
    stop_strings: list[StopStrings | None]
    banned_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]

    def of_rows(self, rows: Sequence[int]) -> Requests:
        """Some of the rows, in this order."""
        return dataclasses.replace(self, **{name: [getattr(self, name)[row] for row in rows] for name in _PER_ROW})

    def idle(self, canvases: list[Tensor]) -> Requests:
        """Canvases that ask for nothing of their own, with what all rows of the batch have in common."""
        B = len(canvases)
        return dataclasses.replace(
            self,
            canvases=canvases,
            opened=canvases,
            prompt_lengths=[len(canvas) for canvas in canvases],
            min_new_tokens=[0] * B,
            temperature=[0.0] * B,
            seeds=[0] * B,
            request_ids=[0] * B,
            stop_strings=[None] * B,
        )

    @classmethod
    def joined(cls, parts: Sequence[Requests]) -> Requests:
        """The rows of batches of one decoder, one batch after another."""
        fields = {name: [row for part in parts for row in getattr(part, name)] for name in _PER_ROW}
        return dataclasses.replace(parts[0], **fields)


_PER_ROW = (
    "canvases", "opened", "prompt_lengths", "min_new_tokens", "temperature", "seeds", "request_ids", "stop_strings",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Room:
    """How long a row may be, and who says so.

    Attributes:
        positions: the most positions of a row.
        words: what an error calls them.
    """

    positions: int
    words: str

    @classmethod
    def of(cls, model: int, limit: int | None) -> Room:
        """The room of a model of so many positions that was opened with `max_positions=limit`."""
        if limit is None:
            return cls(model, f"the model's {model} positions")
        return cls(limit, f"max_positions={limit} that the model was opened with")


def _fail(rule: str) -> None:
    raise ValueError(f"generate: {rule}")


def _listed(name: str, what: str, value: Any) -> list:
    """The items of a list, tensor or array. Strings and mappings are refused, though they can be iterated over."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        return listed("generate", name, value)
    if isinstance(value, (str, bytes, bytearray, Mapping, Tensor, np.ndarray)) or not isinstance(value, Iterable):
        raise TypeError(f"generate: {name} must be {what}, got {name}={shown(value)}")
    return list(value)


def _per_row(name: str, value: Any, B: int, kind: type, low: float, *, scalar: bool = True) -> list:
    """One number per row, each at least `low`; with `scalar`, one number for all rows will do too."""
    what = "a whole number" if kind is int else "a number"
    is_single = isinstance(value, numbers.Number) or isinstance(value, (Tensor, np.ndarray)) and not value.ndim
    if is_single and scalar:
        values = [value] * B
    elif isinstance(value, (set, frozenset)):
        raise TypeError(f"generate: {name} must be in the order of the rows, got {name}={shown(value)}")
    else:
        values = _listed(name, f"{what} or one per row" if scalar else f"a list of one {what[2:]} per row", value)
    if len(values) != B:
        _fail(
            f"{name} must be {'one value or one per row' if scalar else 'one per row'}, got {len(values)} values for "
            f"{B} rows"
        )
    checked = []
    for item in values:
        item = listed("generate", name, item) if isinstance(item, (Tensor, np.ndarray)) else item
        if (
            isinstance(item, bool)
            or not isinstance(item, numbers.Real)
            or (kind is int and not isinstance(item, numbers.Integral))
        ):
            raise TypeError(f"generate: {name} must be {what}, got {name}={shown(item)}")
        try:
            number = kind(item)
        except OverflowError:  # a whole number beyond every float
            number = math.inf
        if not number >= low or number == math.inf:
            _fail(f"{name} must be a finite number >= {low:g}, got {name}={shown(item)}")
        checked.append(number)
    return checked


def check_support(preset: Preset, diffusion: DiffusionConfig) -> None:
    """Raises ValueError where the preset needs other rows of logits, or other keys, than the model has."""
    if preset.first_token and not diffusion.predicts_next:
        _fail(
            f"preset {preset.name} writes the token after the last finished row (first_token), which needs logits_row "
            f"'previous' or causal_prefix=True, got {diffusion.logits_row!r} and causal_prefix=False"
        )
    if preset.shadow and diffusion.logits_row != "self":
        _fail(
            f"preset {preset.name} hides a position from its own row, which needs logits_row 'self', got "
            f"{diffusion.logits_row!r}"
        )
    if preset.pipeline and diffusion.causal_prefix:
        _fail(
            f"preset {preset.name} decodes several blocks at once, of which a model with causal_prefix=True opens only "
            f"one to itself; use a decoder of one block at a time, got schedule={preset.schedule!r}"
        )
    if preset.operation.stores and "edit" in preset.families and diffusion.causal_prefix:
        needs_cache = any(
            (caches := part_of(policy).caches) and not caches(CACHES["none"]) for policy in preset.policies
        )
        advice = "use another preset" if needs_cache else "use cache='none'"
        _fail(
            f"preset {preset.name} keeps a block's keys from its last denoise forward, and a model with "
            f"causal_prefix=True needs those of a causal forward; {advice}, got cache={preset.cache!r}"
        )


def check_commands(preset: Preset, vocab_size: int) -> None:
    """Raises ValueError where the preset's commands to edit are no ids of the vocabulary (LLaDA2.2)."""
    for policy in preset.policies:
        for name in ("delete_id", "split_id"):
            command = getattr(policy, name, None)
            if command is not None and command >= vocab_size:
                _fail(f"{name} must be below the model's vocab_size={vocab_size}, got {name}={command}")


def read(
    diffusion: DiffusionConfig,
    *,
    vocab_size: int,
    max_positions: int,
    limit: int | None = None,
    tokenizer: Any,
    prompts: Sequence[Any] | None,
    canvas: Sequence[Any] | Tensor | None,
    attention_mask: Any = None,
    max_new_tokens: Any,
    min_new_tokens: Any,
    temperature: Any,
    top_k: int,
    top_p: float,
    seed: Any,
    request_ids: Sequence[int] | None,
    stop_strings: Sequence[str] | StopStrings,
    banned_token_ids: Sequence[int],
    eos_token_ids: Sequence[int] | None,
) -> Requests:
    """The batch that the arguments of `generate` describe; every argument is checked before anything is decoded.

    The arguments are those of `generate`. Besides, `diffusion` is the model's diffusion configuration, `vocab_size` and
    `max_positions` are the sizes of its vocabulary and its longest row, and `limit` the `max_positions` that it was
    opened with. Raises ValueError or TypeError.
    """
    # 1. Rows of token ids, from prompts or from canvases.
    if (prompts is None) == (canvas is None):
        _fail(f"exactly one of prompts and canvas must be given, got {'both' if canvas is not None else 'neither'}")
    if tokenizer is not None and not (callable(tokenizer) and callable(getattr(tokenizer, "decode", None))):
        raise TypeError(f"generate: tokenizer must be a transformers tokenizer, got tokenizer={shown(tokenizer)}")
    if tokenizer is not None:
        text_of(tokenizer, [])  # what cannot decode is found before the decode
    name, source = ("prompts", prompts) if canvas is None else ("canvas", canvas)
    rows = read_rows(name, source, attention_mask, tokenizer)
    B = len(rows)

    # 2. Lengths of the responses, and special ids.
    mask_id = diffusion.mask_token_id
    if canvas is not None and max_new_tokens is not None:
        _fail(
            "max_new_tokens goes with prompts; a canvas says itself where tokens are wanted, got "
            f"max_new_tokens={shown(max_new_tokens)}"
        )
    max_new = _per_row("max_new_tokens", 128 if max_new_tokens is None else max_new_tokens, B, int, 1)
    min_new = _per_row("min_new_tokens", min_new_tokens, B, int, 0)
    eos = _ids("eos_token_ids", diffusion.eos_token_ids if eos_token_ids is None else eos_token_ids, vocab_size)
    banned = _ids("banned_token_ids", banned_token_ids, vocab_size)
    if mask_id in eos:
        _fail(f"eos_token_ids must not hold the mask id {mask_id}, got eos_token_ids={shown(eos)}")
    if len(eos) > MAX_STOP_IDS:
        _fail(f"eos_token_ids must hold at most {MAX_STOP_IDS} ids, got {len(eos)}")
    most = MAX_BANNED - 1 - (len(eos) if any(min_new) else 0)
    if len(banned) > most:
        why = " (an EOS held back by min_new_tokens counts)" if any(min_new) else ""
        _fail(f"banned_token_ids must hold at most {most} ids{why}, got {len(banned)}")

    # 3. Canvases.
    room, canvases, prompt_lengths = Room.of(max_positions, limit), [], []
    for b, (ids, text) in enumerate((row.ids, row.text) for row in rows):
        if not ids:
            _fail(f"{name}[{b}] must have at least one token, got an empty one")
        length = len(ids) + (max_new[b] if canvas is None else 0)
        if length > room.positions:
            said = f" (max_new_tokens={shown(max_new[b])})" if canvas is None else ""
            _fail(f"{name}[{b}] with its new tokens must fit {room.words}, got {shown(length)}{said}")
        wrong_ids = [i for i in ids if not 0 <= i < vocab_size]
        if wrong_ids:
            _fail(f"{name}[{b}] must hold ids in [0, {vocab_size}), got {shown(wrong_ids[0])}")
        if canvas is None and mask_id in ids:
            _fail(f"prompts[{b}] must not contain the mask id {mask_id}; to fill masks inside a text use canvas=")
        if canvas is not None and text and mask_id not in ids:
            _fail(
                f"canvas[{b}] must hold the mask token {_token(tokenizer, mask_id)!r} where text is wanted, got a text "
                "without it"
            )
        prompt_lengths.append(len(ids) if canvas is None else (ids.index(mask_id) if mask_id in ids else len(ids)))
        canvases.append(torch.tensor(ids + ([mask_id] * max_new[b] if canvas is None else []), dtype=torch.int64))
        if canvas is None and min_new[b] > max_new[b]:
            _fail(f"min_new_tokens must be at most max_new_tokens, got {shown(min_new[b])} > {max_new[b]} in row {b}")
        if min_new[b] > room.positions:
            _fail(f"min_new_tokens must be at most {room.words}, got {shown(min_new[b])} in row {b}")

    # 4. Numbers of the draws.
    seeds = [seed] * B if isinstance(seed, (numbers.Number, str)) or seed is None else _per_row("seed", seed, B, int, 0)
    for value in seeds or [seed]:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= value < 2**63:
            _fail(f"seed must be a whole number in [0, 2^63), got seed={shown(value)}")
    stops = stop_strings
    if not isinstance(stops, StopStrings):  # they may have been read before
        stops = read_stop_strings(stops, tokenizer, mask_id)
    ids = list(range(B)) if request_ids is None else _per_row("request_ids", request_ids, B, int, 0, scalar=False)
    if any(i >= 2**31 for i in ids):
        _fail(f"request_ids must be below 2^31, got {shown(max(ids))}")
    temperatures = _per_row("temperature", temperature, B, float, 0.0)
    for value in temperatures:
        heat("generate", "temperature", value)
    if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or top_k < 0:
        _fail(f"top_k must be a whole number >= 0 (0 = off), got top_k={shown(top_k)}")
    if isinstance(top_p, bool) or not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1:
        _fail(f"top_p must be a number in (0, 1] (1 = off), got top_p={shown(top_p)}")
    return Requests(
        canvases=canvases,
        opened=canvases,
        prompt_lengths=prompt_lengths,
        min_new_tokens=min_new,
        temperature=temperatures,
        top_k=int(top_k),
        top_p=float(top_p),
        seeds=[int(value) for value in seeds],
        request_ids=ids,
        stop_strings=[stops] * B,
        banned_token_ids=banned,
        eos_token_ids=eos,
    )


def with_last_blocks(batch: Requests, preset: Preset, diffusion: DiffusionConfig, room: Room) -> Requests:
    """The batch of prompts as the preset decodes it, by its option `last_block`.

    "whole" fills `opened` up with masks to whole blocks. "drop" shortens `canvases` too, since nobody writes the rest.
    Raises ValueError if a row would be too long, or would have nothing to decode.
    """
    length = preset.block_length or diffusion.block_length
    if preset.last_block == "crop" or preset.single_block or length is None:
        return batch
    absolute = diffusion.visibility == "block" and diffusion.block_alignment == "abs"
    canvases, opened = [], []
    for b, (canvas, prompt) in enumerate(zip(batch.canvases, batch.prompt_lengths)):
        start = 0 if absolute else prompt
        cut = (len(canvas) - start) % length  # positions of a last block that is cut
        end = len(canvas) - cut + (length if cut and preset.last_block == "whole" else 0)
        if end > room.positions:
            _fail(
                f"prompts[{b}] with its last whole block must fit {room.words}, got {end}; "
                "last_block='crop' ends the last block at max_new_tokens"
            )
        if end <= prompt:
            _fail(
                f"max_new_tokens must reach the end of a block with last_block='drop', got {len(canvas) - prompt} in "
                f"row {b}, whose first block of {length} ends {start + length - prompt} positions behind the prompt"
            )
        whole = torch.full((max(end - len(canvas), 0),), diffusion.mask_token_id, dtype=torch.int64)
        canvases.append(canvas[:end])
        opened.append(torch.cat([canvas, whole])[:end])
    return dataclasses.replace(batch, canvases=canvases, opened=opened)


def _ids(name: str, values: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """The token ids of an argument, each checked against the vocabulary."""
    ids = []
    for value in _listed(name, "a list of token ids", values):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"generate: {name} must be token ids, got {shown(value)}")
        if not 0 <= value < vocab_size:
            _fail(f"{name} must hold ids in [0, {vocab_size}), got {shown(value)}")
        ids.append(int(value))
    return tuple(ids)


def _token(tokenizer: Any, token_id: int) -> Any:
    """A token as text, or the token's id where the tokenizer has no text for the token."""
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    return token_id if convert is None else convert(token_id)


@dataclasses.dataclass(frozen=True)
class Response:
    """A row's response up to the first EOS or stop string.

    Attributes:
        ids: the fewest ids that spell the text, 1-D int64.
        text: the text; None without a tokenizer.
        finish: why the response ended: "eos", "stop" or "length".
        written: how many of the ids the decoder wrote.
    """

    ids: Tensor
    text: str | None
    finish: str
    written: int


def response(
    batch: Requests, b: int, tokens: Tensor, unmask_step: Tensor, tokenizer: Any, diffusion: DiffusionConfig
) -> Response:
    """The response of row b, from the row's canvas `tokens` [L] and `unmask_step` [L].

    The response holds the filled positions up to the first EOS that was written, or up to a stop string.
    """
    # 1. The end of the ids: the first mask, the first written EOS, or the first special token that is a stop string.
    start, end, finish = batch.prompt_lengths[b], len(batch.canvases[b]), "length"
    ids = tokens[start:end].tolist()
    written = (unmask_step[start:end] >= 0).tolist()
    stops = batch.stop_strings[b]
    for j, token in enumerate(ids):
        if token == diffusion.mask_token_id:
            end = start + j
        elif written[j] and token in batch.eos_token_ids:
            end, finish = start + j, "eos"
        elif stops is not None and token in stops.ids:
            end, finish = start + j, "stop"
        else:
            continue
        break
    ids = ids[: end - start]

    # 2. The text, cut by a stop string.
    text = text_of(tokenizer, ids) if tokenizer is not None else None
    cut = stops.find(text) if stops is not None else None
    if cut is not None:
        ids, text, finish = ids[: stops.spelling(ids, text[:cut])], text[:cut], "stop"
    return Response(torch.tensor(ids, dtype=torch.int64), text, finish, sum(written[: len(ids)]))
