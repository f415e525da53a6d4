"""Prompts and answers from JSON lines, tokenised as by `generate`, and the canvases that an optimizer step trains on.

A line has one of three forms:

    {"prompt": "Add 2 and 3", "answer": "5"}                                text, as one user turn of the chat template
    {"prompt": [{"role": "user", "content": "..."}], "answer": "..."}       a chat
    {"prompt_ids": [5, 6, 7], "answer_ids": [8, 9, 1]}                      token ids

A line may also have "task", a name by which accuracy is logged, and "order" (see `read_dataset`).
"""

from __future__ import annotations

import hashlib
import json
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import disk
from ..diffusion import DiffusionConfig
from ..limits import MAX_WHOLE, shown
from .bounds import choice

KEYS = {"prompt", "answer", "prompt_ids", "answer_ids", "task", "order"}
CHUNK = 1000  # number of lines that are tokenised in one call
BLANK = " \t\r"  # the characters of a blank line, as JSON has blanks


class DatasetError(ValueError):
    """A data file cannot be trained on; the message names file, line and rule."""


@dataclass(frozen=True)
class Sample:
    """One prompt and its answer as token ids.

    Attributes:
        prompt: ids of the prompt.
        answer: ids of the answer, which ends with its only EOS.
        task: index into `Dataset.tasks`; -1 = none.
        order: the step at which a teacher wrote each answer position; None = not known.
    """

    prompt: list[int]
    answer: list[int]
    task: int
    order: list[int] | None


@dataclass(frozen=True)
class Dataset:
    """What a data file holds.

    Attributes:
        samples: the samples, in the file's order.
        tasks: names of the tasks.
        digest: SHA-256 of the file's bytes.
        dropped: number of lines that were left out.
    """

    samples: list[Sample]
    tasks: tuple[str, ...]
    digest: str
    dropped: int


@dataclass(frozen=True)
class CanvasShape:
    """How long a sample's canvas is: the prompt, as many whole blocks as the answer needs, and perhaps more blocks.

    Further blocks hold nothing but EOS. A decoder meets such blocks, since it opens blocks before it knows that the
    answer has ended.

    Attributes:
        block_length: number of tokens in a block.
        absolute: whether blocks are cut from position 0, instead of from the end of the prompt.
        max_length: largest number of positions of a canvas.
        extra: probability of one further block, of a second one after the first, and so on; 1 = every canvas is as long
            as max_length allows.
    """

    block_length: int
    absolute: bool
    max_length: int
    extra: float

    def needed(self, prompt: int, answer: int) -> int:
        """Number of positions of the shortest canvas for a prompt and an answer of these lengths."""
        start = 0 if self.absolute else prompt
        return start + -(-(prompt + answer - start) // self.block_length) * self.block_length

    def lengths(self, shortest: Tensor, generator: torch.Generator) -> Tensor:
        """Drawn lengths [N] of canvases whose shortest lengths are `shortest` [N] int64."""
        room = (self.max_length - shortest) // self.block_length
        # The number of further blocks is the number of heads before the first tail.
        heads = torch.rand(len(shortest), 64, generator=generator) < self.extra
        further_blocks = heads.cumprod(1).sum(1) if self.extra < 1 else room
        return shortest + torch.minimum(further_blocks, room) * self.block_length


def _fail(path: Path, line: int, rule: str) -> None:
    raise DatasetError(f"dataset: {path}, line {line}: {rule}")


def _parse(path: Path, number: int, text: str) -> dict[str, Any]:
    """The record of one line, with every key checked."""
    # 1. An object with known keys, of one form.
    try:
        record = json.loads(text)
        # An escape may stand for half of a character, which no tokenizer can encode.
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        _fail(path, number, f"must be JSON of whole characters, got {text[:80]!r}: {error}")
    if not isinstance(record, dict):
        _fail(path, number, f"must be a JSON object, got {type(record).__name__}")
    unknown = sorted(set(record) - KEYS)
    if unknown:
        _fail(path, number, f"must have no unknown keys, got {unknown}; known are {sorted(KEYS)}")
    as_text, as_ids = {"prompt", "answer"} & set(record), {"prompt_ids", "answer_ids"} & set(record)
    if as_text and as_ids:
        _fail(path, number, f"must be text or token ids, got both: {sorted(as_text | as_ids)}")
    for name in ("prompt_ids", "answer_ids") if as_ids else ("prompt", "answer"):
        if name not in record:
            _fail(path, number, f"must have {name!r}, got {sorted(record)}")
        if not record[name] or (isinstance(record[name], str) and not record[name].strip()):
            _fail(path, number, f"{name} must not be empty, got {record[name]!r}")

    # 2. Values of the right types.
    if not as_ids and not isinstance(record["answer"], str):
        _fail(path, number, f"answer must be text, got {type(record['answer']).__name__}")
    prompt = record.get("prompt")
    is_chat = isinstance(prompt, list) and all(
        isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content")) for m in prompt
    )
    if not as_ids and not isinstance(prompt, str) and not is_chat:
        _fail(
            path, number, f"prompt must be text or a list of messages with role and content, got {str(prompt)[:80]!r}"
        )
    for name in ("prompt_ids", "answer_ids", "order"):
        values = record.get(name, [])
        if not isinstance(values, list) or any(
            isinstance(v, bool) or not isinstance(v, numbers.Integral) for v in values
        ):
            _fail(path, number, f"{name} must be a list of whole numbers, got {str(values)[:80]}")
    if any(not 0 <= step <= MAX_WHOLE for step in record.get("order", [])):
        _fail(path, number, f"order must hold steps in [0, {MAX_WHOLE}], got {str(record['order'])[:80]}")
    if not isinstance(record.get("task", ""), str):
        _fail(path, number, f"task must be a name, got {record['task']!r}")
    return record


def _render(path: Path, number: int, record: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
    """Prompt and answer as the text that is tokenised, by the chat template where the tokenizer has one."""
    prompt, answer = record["prompt"], record["answer"]
    if getattr(tokenizer, "chat_template", None) is None:
        if not isinstance(prompt, str):
            _fail(path, number, "prompt must be text where the tokenizer has no chat template, got a chat")
        return prompt, answer
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    # `generate` renders a chat in the same way.
    try:
        opened = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        closed = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
    except Exception as error:  # a template is code, and may raise anything
        _fail(path, number, f"prompt must be what the chat template can write, got {type(error).__name__}: {error}")
    if not closed.startswith(opened):
        _fail(
            path,
            number,
            "answer must stand after the prompt that the chat template opens for generation, got another text; give "
            "prompt_ids and answer_ids",
        )
    return opened, closed[len(opened) :]


def _close(path: Path, number: int, answer: list[int], diffusion: DiffusionConfig, *, as_ids: bool) -> list[int]:
    """The answer with exactly one EOS, which is its last token."""
    eos = [i for i, token in enumerate(answer) if token in diffusion.eos_token_ids]
    if not eos:
        return [*answer, diffusion.eos_token_ids[0]]
    # A template may go on after the EOS, with a newline for example; a decoder has stopped at the EOS.
    if eos[0] == 0 or (as_ids and eos[0] != len(answer) - 1):
        _fail(
            path,
            number,
            f"answer must have its EOS {answer[eos[0]]} at its end only, got it at place {eos[0]} of {len(answer)}",
        )
    return answer[: eos[0] + 1]


def read_dataset(
    path: str | Path,
    tokenizer: Any,
    diffusion: DiffusionConfig,
    shape: CanvasShape,
    *,
    vocab_size: int,
    too_long: str = "raise",
    needs_order: bool = False,
) -> Dataset:
    """Reads and checks every line of a data file.

    Args:
        path: the file.
        tokenizer: the model's tokenizer; None = every line must hold token ids.
        diffusion: the model's diffusion configuration.
        shape: how long canvases are.
        vocab_size: number of ids in the vocabulary.
        too_long: what happens to a sample whose canvas exceeds shape.max_length: "raise" = an error, "drop" = the
            sample is left out and counted. No sample is ever truncated.
        needs_order: whether every line must have an "order", the step at which a teacher wrote each answer token, with
            at least as many numbers as the answer has tokens, the EOS included. `dlm_fast.training.trajectories` makes
            orders.
    Raises:
        DatasetError: a line breaks a rule. The message names the file, the line (from 1) and the rule.
    """
    # 1. Read the file.
    path = Path(path)
    choice("distill", "too_long", too_long, ("raise", "drop"))
    if not diffusion.eos_token_ids:
        raise DatasetError("dataset: eos_token_ids of the model must have an id, since an answer must end, got none")
    lines, digest = read_lines(path)

    # 2. Check every sample against the model and the shape of canvases.
    names: dict[str, int] = {}
    samples: list[Sample] = []
    dropped = 0
    for number, record, prompt, answer in _tokenised(path, lines, tokenizer, diffusion):
        for name, ids in (("prompt", prompt), ("answer", answer)):
            wrong = [i for i in ids if not 0 <= i < vocab_size]
            if wrong:
                _fail(path, number, f"{name} must hold ids in [0, {vocab_size}), got {shown(wrong[0])}")
            if not ids:
                _fail(path, number, f"{name} must become tokens, got none")
            if diffusion.mask_token_id in ids:
                _fail(path, number, f"{name} must not contain the mask id {diffusion.mask_token_id}, got one that does")
        if not shape.absolute and len(prompt) + shape.block_length > shape.max_length and too_long == "raise":
            _fail(
                path,
                number,
                f"block_length must fit between the prompt and max_length, got block_length={shape.block_length}, "
                f"a prompt of {len(prompt)} tokens and max_length={shape.max_length}",
            )
        needed = shape.needed(len(prompt), len(answer))
        if needed > shape.max_length:
            if too_long == "raise":
                _fail(
                    path,
                    number,
                    f"prompt and answer must fit max_length={shape.max_length} in whole blocks of "
                    f"{shape.block_length}, got {len(prompt)} + {len(answer)} tokens, which take {needed}",
                )
            dropped += 1
            continue
        order = record.get("order")
        if needs_order and (order is None or len(order) < len(answer)):
            got = "none" if order is None else f"{len(order)}"
            _fail(path, number, f"order must have a step for each of the answer's {len(answer)} tokens, got {got}")
        task = names.setdefault(record["task"], len(names)) if "task" in record else -1
        samples.append(Sample(prompt, answer, task, order))
    if not samples:
        raise DatasetError(f"dataset: {path} must have a sample to train on, got none ({dropped} dropped as too long)")
    return Dataset(samples, tuple(names), digest, dropped)


def read_lines(path: Path) -> tuple[list[str], str]:
    """The lines of a data file, which end at \\n and nowhere else, and the SHA-256 of the file's bytes.

    A byte order mark before the first line is left out. Raises DatasetError.
    """
    try:
        content = disk.read(path, follow=True)
    except OSError as error:
        raise DatasetError(f"dataset: data must be a file that can be read, got {str(path)!r}: {error}") from error
    try:
        return content.decode("utf-8-sig").split("\n"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as error:
        # The error counts from behind a byte order mark, which holds no end of a line.
        number = error.object[: error.start].count(b"\n") + 1
        raise DatasetError(f"dataset: {path}, line {number}: must be UTF-8, got {error}") from error


def _tokenised(
    path: Path, lines: list[str], tokenizer: Any, diffusion: DiffusionConfig
) -> Iterator[tuple[int, dict[str, Any], list[int], list[int]]]:
    """(line number, record, prompt ids, answer ids) of every line that is not blank."""
    for begin in tqdm(range(0, len(lines), CHUNK), desc="reading", mininterval=5, disable=len(lines) < 10 * CHUNK):
        records = [
            (begin + i + 1, _parse(path, begin + i + 1, text))
            for i, text in enumerate(lines[begin : begin + CHUNK])
            if text.strip(BLANK)
        ]
        texts = [
            (n, *_render(path, n, record, _needed(path, n, tokenizer))) for n, record in records if "prompt" in record
        ]
        ids: dict[int, tuple[list[int], list[int]]] = {}
        if texts:
            special = getattr(tokenizer, "chat_template", None) is None
            try:
                prompts = tokenizer([prompt for _, prompt, _ in texts], add_special_tokens=special)["input_ids"]
                answers = tokenizer([answer for _, _, answer in texts], add_special_tokens=False)["input_ids"]
            except Exception as error:  # whatever a tokenizer raises
                raise DatasetError(
                    f"dataset: {path}, lines {texts[0][0]} to {texts[-1][0]}: must be what the tokenizer can encode, "
                    f"got {type(error).__name__}: {error}"
                ) from error
            ids = {n: pair for (n, _, _), pair in zip(texts, zip(prompts, answers))}
        for n, record in records:
            as_ids = n not in ids
            prompt, answer = (record["prompt_ids"], record["answer_ids"]) if as_ids else ids[n]
            yield n, record, list(prompt), _close(path, n, list(answer), diffusion, as_ids=as_ids)


def _needed(path: Path, number: int, tokenizer: Any) -> Any:
    """The tokenizer, which a line of text needs."""
    if tokenizer is None:
        _fail(path, number, "text needs a tokenizer, got a checkpoint without one; give prompt_ids and answer_ids")
    return tokenizer


@dataclass
class Canvases:
    """A batch of finished canvases, [prompt | answer | EOS ...], padded on the right.

    Attributes:
        tokens: [B, L] int64 token ids; padding holds EOS.
        prompt: [B] int64 length of the prompt.
        length: [B] int64 length of the canvas.
        first_eos: [B] int64 position of the answer's EOS.
        task: [B] int64 index of the task, -1 = none.
        rank: [B, L] int64 place of each answer position in the order in which a teacher wrote the answer, -1 elsewhere;
            None where no order is wanted.
    """

    tokens: Tensor
    prompt: Tensor
    length: Tensor
    first_eos: Tensor
    task: Tensor
    rank: Tensor | None

    def to(self, device: torch.device) -> Canvases:
        return Canvases(**{name: None if value is None else value.to(device) for name, value in vars(self).items()})


class Steps:
    """The canvases of each optimizer step, in an order that (seed, epoch) decides.

    A step is a random set of samples of about `tokens_per_step` positions. The set is cut by length into micro-batches,
    so that padding is small while chance alone decides which samples meet in a step. The attribute `position` is
    (epoch, step of the epoch); setting `position` resumes a run.

    Args:
        dataset: the samples.
        shape: how long canvases are.
        eos_id: id of the EOS that fills a canvas.
        tokens_per_step: number of positions in a step.
        micro_batches: number of batches that a step is cut into.
        seed: random seed.
        ranked: whether canvases have a `rank`, made of the samples' orders. Positions behind the end of an order follow
            from left to right.
    """

    def __init__(
        self,
        dataset: Dataset,
        shape: CanvasShape,
        *,
        eos_id: int,
        tokens_per_step: int,
        micro_batches: int,
        seed: int,
        ranked: bool = False,
    ) -> None:
        self.dataset, self.shape, self.eos_id, self.ranked = dataset, shape, eos_id, ranked
        self.tokens_per_step, self.micro_batches, self.seed = tokens_per_step, micro_batches, seed
        self.position = (0, 0)
        self._epoch = -1
        self._shortest = torch.tensor([shape.needed(len(s.prompt), len(s.answer)) for s in dataset.samples])
        if tokens_per_step < shape.max_length:
            raise ValueError(
                f"distill: tokens_per_step must hold a canvas of max_length={shape.max_length}, "
                f"got tokens_per_step={tokens_per_step}"
            )

    def _plan(self, epoch: int) -> None:
        """Draws an epoch: the order of the samples, the lengths of their canvases, and where each step begins."""
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 - 1 - epoch)
        self._order = torch.randperm(len(self.dataset.samples), generator=generator)
        self._lengths = self.shape.lengths(self._shortest[self._order], generator)
        self._starts = [0]
        filled = 0
        for index, length in enumerate(self._lengths.tolist()):
            if filled + length > self.tokens_per_step:
                self._starts.append(index)
                filled = 0
            filled += length
        self._starts.append(len(self._order))
        # The last samples of an epoch would be a small step with much noisier gradients, so they join the step before.
        if len(self._starts) > 2 and filled < self.tokens_per_step // 2:
            del self._starts[-2]
        self._epoch = epoch

    def next(self) -> list[Canvases]:
        """The micro-batches of the next step."""
        begin, end = self._advance()
        chosen = torch.arange(begin, end)[self._lengths[begin:end].argsort(stable=True)]
        return [self._canvases(part) for part in self._cut(chosen)]

    def after(self, steps: int, processes: int) -> tuple[tuple[int, int], int]:
        """Where a run of some processes stands after some steps: the position, and the canvas positions so far.

        The canvas positions are counted as a run counts them, by the canvases of its first process.
        """
        before, self.position = self.position, (0, 0)
        tokens = 0
        for number in range(steps * processes):
            begin, end = self._advance()
            if number % processes == 0:
                tokens += processes * int(self._lengths[begin:end].sum())
        position, self.position = self.position, before
        return position, tokens

    def skip(self) -> None:
        """Leaves the next step to another process."""
        self._advance()

    def _advance(self) -> tuple[int, int]:
        """First sample of the next step and first sample after the step; moves `position` on."""
        epoch, step = self.position
        if epoch != self._epoch:
            self._plan(epoch)
        self.position = (epoch, step + 1) if step + 2 < len(self._starts) else (epoch + 1, 0)
        return self._starts[step], self._starts[step + 1]

    def _cut(self, chosen: Tensor) -> list[Tensor]:
        """Splits samples that are sorted by length into micro-batches of about equal area."""
        area = self._lengths[chosen].cumsum(0)
        number = (area - 1) * self.micro_batches // int(area[-1])
        return [chosen[number == n] for n in number.unique().tolist()]

    def _canvases(self, chosen: Tensor) -> Canvases:
        """The canvases of the samples at some places of the epoch's order."""
        samples = [self.dataset.samples[i] for i in self._order[chosen].tolist()]
        length = self._lengths[chosen]
        tokens = torch.full((len(samples), int(length.max())), self.eos_id)
        rank = torch.full(tokens.shape, -1) if self.ranked else None
        for row, sample in enumerate(samples):
            ids = sample.prompt + sample.answer
            tokens[row, : len(ids)] = torch.tensor(ids)
            if rank is not None:
                start, count = len(sample.prompt), int(length[row]) - len(sample.prompt)
                steps = torch.tensor((sample.order + [2**30] * count)[:count])
                rank[row, start : start + count] = steps.argsort(stable=True).argsort()
        prompt = torch.tensor([len(s.prompt) for s in samples])
        first_eos = prompt + torch.tensor([len(s.answer) - 1 for s in samples])
        return Canvases(tokens, prompt, length, first_eos, torch.tensor([s.task for s in samples]), rank)
