"""What a user asks for, checked and turned into canvases; and what a finished canvas says."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from dlm_kernels import RowState
from dlm_kernels.reference.confidence import MAX_BANNED, MAX_TEMPERATURE, MIN_TEMPERATURE
from dlm_kernels.reference.unmask_arguments import MAX_STOP_IDS
from dlm_kernels.state import DONE
from torch import Tensor

from .diffusion import DiffusionConfig
from .presets import Preset


@dataclasses.dataclass(frozen=True)
class Requests:
    """A checked batch. `canvases` are 1-D int64 on the CPU; `prompt_lengths[b]` is where row b's response begins."""

    canvases: list[Tensor]
    prompt_lengths: list[int]
    min_new_tokens: list[int]
    temperature: list[float]
    top_k: int
    top_p: float
    seed: int
    request_ids: list[int]
    stop_strings: tuple[str, ...]
    banned_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]


def _fail(rule: str) -> None:
    raise ValueError(f"generate: {rule}")


def _per_row(name: str, value: Any, B: int, kind: type, low: float) -> list:
    """A scalar for every row, or one value per row; each at least `low`."""
    if isinstance(value, str) or not (isinstance(value, numbers.Number) or hasattr(value, "__iter__")):
        raise TypeError(f"generate: {name} must be {'a whole number' if kind is int else 'a number'} or one per row, got {name}={value!r}")
    scalar = isinstance(value, (numbers.Number, Tensor)) and not (isinstance(value, Tensor) and value.dim())
    values = [value] * B if scalar else list(value)
    if len(values) != B:
        _fail(f"{name} must be one value or one per row, got {len(values)} values for {B} rows")
    out = []
    for v in values:
        v = v.item() if isinstance(v, Tensor) else v
        if isinstance(v, bool) or not isinstance(v, numbers.Real) or (kind is int and not isinstance(v, numbers.Integral)):
            raise TypeError(f"generate: {name} must be {'a whole number' if kind is int else 'a number'}, got {name}={v!r}")
        if not v >= low or math.isinf(v):
            _fail(f"{name} must be a finite number >= {low:g}, got {name}={v}")
        out.append(kind(v))
    return out


def check_support(preset: Preset, diffusion: DiffusionConfig) -> None:
    """Raises ValueError where `preset` does not fit the model's rows."""
    if preset.seeded and diffusion.logits_row != "previous":
        _fail(f"preset {preset.name} writes the token after the last row, which needs logits_row 'previous', got {diffusion.logits_row!r}")
    if preset.shadow and diffusion.logits_row != "self":
        _fail(f"preset {preset.name} hides a position from its own row, which needs logits_row 'self', got {diffusion.logits_row!r}")


def encode_prompt(prompt: Any, tokenizer: Any) -> list[int]:
    """Token ids of a string, a chat (list of {"role", "content"}) or a sequence of ids."""
    if isinstance(prompt, str):
        if tokenizer is None:
            _fail("prompts of text need a tokenizer; the checkpoint has none, pass tokenizer= or token ids")
        return list(tokenizer(prompt)["input_ids"])
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1 or prompt.dtype.is_floating_point:
            raise TypeError(f"generate: a prompt tensor must be 1-D token ids, got shape {tuple(prompt.shape)}, {prompt.dtype}")
        return prompt.tolist()
    items = list(prompt)
    if items and all(isinstance(m, dict) for m in items):
        if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
            _fail("prompts of chats need a tokenizer with a chat template")
        text = tokenizer.apply_chat_template(items, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for item in items:
        if isinstance(item, bool) or not isinstance(item, numbers.Integral):
            raise TypeError(f"generate: a prompt must be a string, a chat or token ids, got an item of type {type(item).__name__}")
    return [int(i) for i in items]


def read(
    diffusion: DiffusionConfig,
    *,
    vocab_size: int,
    max_positions: int,
    tokenizer: Any,
    prompts: Sequence[Any] | None,
    canvas: Sequence[Any] | Tensor | None,
    max_new_tokens: Any,
    min_new_tokens: Any,
    temperature: Any,
    top_k: int,
    top_p: float,
    seed: int,
    request_ids: Sequence[int] | None,
    stop_strings: Sequence[str],
    banned_token_ids: Sequence[int],
    eos_token_ids: Sequence[int] | None,
) -> Requests:
    """Checks every argument of `generate` before anything is decoded. Raises ValueError or TypeError."""
    if (prompts is None) == (canvas is None):
        _fail("exactly one of prompts and canvas must be given")
    if isinstance(prompts, (str, dict)):
        _fail(f"prompts must be a list of prompts, got a single {type(prompts).__name__}")
    given = prompts if canvas is None else canvas
    rows = [encode_prompt(row, tokenizer) for row in given]
    B = len(rows)
    mask_id = diffusion.mask_token_id
    if canvas is not None and max_new_tokens is not None:
        _fail(f"max_new_tokens goes with prompts; a canvas says itself where tokens are wanted, got max_new_tokens={max_new_tokens!r}")
    new = _per_row("max_new_tokens", 128 if max_new_tokens is None else max_new_tokens, B, int, 1)
    least = _per_row("min_new_tokens", min_new_tokens, B, int, 0)
    eos = _ids("eos_token_ids", diffusion.eos_token_ids if eos_token_ids is None else eos_token_ids, vocab_size)
    banned = _ids("banned_token_ids", banned_token_ids, vocab_size)
    if mask_id in eos:
        _fail(f"eos_token_ids must not hold the mask id {mask_id}")
    if len(eos) > MAX_STOP_IDS:
        _fail(f"eos_token_ids must hold at most {MAX_STOP_IDS} ids, got {len(eos)}")
    room = MAX_BANNED - 1 - (len(eos) if any(least) else 0)
    if len(banned) > room:
        why = " (an EOS held back by min_new_tokens counts)" if any(least) else ""
        _fail(f"banned_token_ids must hold at most {room} ids{why}, got {len(banned)}")

    canvases, prompt_lengths = [], []
    for b, ids in enumerate(rows):
        name = "prompts" if canvas is None else "canvas"
        if not ids:
            _fail(f"{name}[{b}] must have at least one token, got an empty one")
        wrong = [i for i in ids if not 0 <= i < vocab_size]
        if wrong:
            _fail(f"{name}[{b}] must hold ids in [0, {vocab_size}), got {wrong[0]}")
        if canvas is None and mask_id in ids:
            _fail(f"prompts[{b}] must not contain the mask id {mask_id}; to fill masks inside a text use canvas=")
        prompt_lengths.append(len(ids) if canvas is None else (ids.index(mask_id) if mask_id in ids else len(ids)))
        canvases.append(torch.tensor(ids + ([mask_id] * new[b] if canvas is None else []), dtype=torch.int64))
        if len(canvases[-1]) > max_positions:
            _fail(f"{name}[{b}] with its new tokens must fit the model's {max_positions} positions, got {len(canvases[-1])}")
        if canvas is None and least[b] > new[b]:
            _fail(f"min_new_tokens must be at most max_new_tokens, got {least[b]} > {new[b]} in row {b}")
    if isinstance(stop_strings, str):
        raise TypeError(f"generate: stop_strings must be a list of strings, got the string {stop_strings!r}")
    if any(not isinstance(s, str) or not s for s in stop_strings):
        _fail(f"stop_strings must be non-empty strings, got {list(stop_strings)!r}")
    if stop_strings and tokenizer is None:
        _fail("stop_strings need a tokenizer; the checkpoint has none, pass tokenizer=")
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**63:
        _fail(f"seed must be a whole number in [0, 2^63), got seed={seed!r}")
    ids = list(range(B)) if request_ids is None else _per_row("request_ids", list(request_ids), B, int, 0)
    if any(i >= 2**31 for i in ids):
        _fail(f"request_ids must be below 2^31, got {max(ids)}")
    heat = _per_row("temperature", temperature, B, float, 0.0)
    for t in heat:
        if t and not MIN_TEMPERATURE <= t <= MAX_TEMPERATURE:
            _fail(f"temperature must be 0 or in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}], got temperature={t:g}")
    if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or top_k < 0:
        _fail(f"top_k must be a whole number >= 0 (0 = off), got top_k={top_k!r}")
    if isinstance(top_p, bool) or not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1:
        _fail(f"top_p must be a number in (0, 1] (1 = off), got top_p={top_p!r}")
    return Requests(
        canvases=canvases,
        prompt_lengths=prompt_lengths,
        min_new_tokens=least,
        temperature=heat,
        top_k=int(top_k),
        top_p=float(top_p),
        seed=int(seed),
        request_ids=ids,
        stop_strings=tuple(stop_strings),
        banned_token_ids=banned,
        eos_token_ids=eos,
    )


def _ids(name: str, values: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    out = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"generate: {name} must be token ids, got {value!r}")
        if not 0 <= value < vocab_size:
            _fail(f"{name} must hold ids in [0, {vocab_size}), got {value}")
        out.append(int(value))
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class Response:
    """A row's response: ids and text up to the first EOS or stop string, why it ended, and how many ids were written."""

    ids: Tensor
    text: str | None
    finish: str
    written: int


def response(batch: Requests, b: int, tokens: Tensor, unmask_step: Tensor, tokenizer: Any, diffusion: DiffusionConfig) -> Response:
    """The response of row b from its canvas [L]: its filled positions up to the first EOS that was written."""
    start, end, finish = batch.prompt_lengths[b], len(batch.canvases[b]), "length"
    ids = tokens[start:end].tolist()
    written = (unmask_step[start:end] >= 0).tolist()
    for j, token in enumerate(ids):
        if token == diffusion.mask_token_id or (written[j] and token in batch.eos_token_ids):
            end, finish = start + j, "eos" if written[j] else "length"
            break
    ids = ids[: end - start]
    text = tokenizer.decode(ids, skip_special_tokens=True) if tokenizer is not None else None
    cut = min((text.index(s) for s in batch.stop_strings if s in text), default=None) if batch.stop_strings else None
    if cut is not None:
        keep = 0
        while keep < len(ids) and len(tokenizer.decode(ids[: keep + 1], skip_special_tokens=True)) <= cut:
            keep += 1
        ids, text, finish = ids[:keep], text[:cut], "stop"
    return Response(torch.tensor(ids, dtype=torch.int64), text, finish, sum(written[: len(ids)]))


class StopStrings:
    """Ends a row once a stop string appears in its filled, contiguous text. Reads the canvas on the host after each step."""

    def __init__(self, batch: Requests, tokenizer: Any, diffusion: DiffusionConfig) -> None:
        self.batch, self.tokenizer, self.diffusion = batch, tokenizer, diffusion

    def __call__(self, state: RowState) -> None:
        tokens, steps, phase = state.tokens.cpu(), state.unmask_step.cpu(), state.phase.tolist()
        for b in range(len(self.batch.canvases)):
            if phase[b] != DONE and response(self.batch, b, tokens[b], steps[b], self.tokenizer, self.diffusion).finish == "stop":
                state.phase[b] = DONE
