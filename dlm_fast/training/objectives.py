"""The two objectives of pretraining: canvases, masks, visibility and weights of the loss.

The loss of both objectives is a weighted mean of the cross-entropy over masked response tokens. Every masked token
counts alike, without LLaDA's factor 1/t, so the loss is not the bound of the likelihood. An <eos> after the first one
counts a tenth, since such tokens are easy and many.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tiny.data import TASK_NAMES, Encoded, SampleStream
from ..tiny.tokenizer import EOS_ID, MASK_ID, PAD_ID, VOCAB_SIZE

FILLER_WEIGHT = 0.1  # weight of an <eos> after the first one
LATER_WEIGHT = 0.25  # weight of masked tokens after the block that is denoised
MIN_RATE = 0.02  # smallest masking rate t


@dataclass
class Batch:
    """The input of one training step.

    Attributes:
        tokens: [B, L] int64 token ids, some of which are the mask.
        position_ids: [B, L] int64 rotary position of each token.
        targets: [B, L] int64 correct token.
        visible: [B or 1, 1, L, L] bool, True where the query (dim 2) may attend to the key (dim 3).
        weight: [B, L] fp32 weight of the token in the loss, 0 where the token has no loss.
        task: [B, L] int64 index into TASK_NAMES.
    """

    tokens: Tensor
    position_ids: Tensor
    targets: Tensor
    visible: Tensor
    weight: Tensor
    task: Tensor


def _dump(samples: list[Encoded]) -> list[dict]:
    return [dataclasses.asdict(sample) for sample in samples]


def _load(samples: list[dict], limit: int) -> list[Encoded]:
    """Samples of at most `limit` tokens. Raises ValueError or TypeError for anything else."""
    loaded = [Encoded(**sample) for sample in samples]
    for sample in loaded:
        numbers = [sample.task, *sample.prompt, *sample.answer]
        if not all(type(value) is int for value in numbers) or not 0 <= sample.task < len(TASK_NAMES):
            raise ValueError(f"a sample must be of one of {len(TASK_NAMES)} tasks, got {numbers}")
        ids = sample.prompt + sample.answer
        if not sample.prompt or not sample.answer or not all(0 <= token < VOCAB_SIZE for token in ids):
            raise ValueError(f"prompt and answer must be ids in [0, {VOCAB_SIZE}), got {ids}")
        if len(ids) > limit:
            raise ValueError(f"prompt and answer must be at most {limit} tokens, got {len(ids)}")
    return loaded


class FullBatches:
    """Batches of the full-attention objective, whose canvases are filled up with <eos> and have one length per batch.

    All positions see one another, but an isolated prompt sees only itself. With probability `tight` a sample takes the
    shortest canvas that holds the sample, and otherwise any canvas that does: a decoder's canvas is longer than the
    answer, so the model must know long tails of <eos>.

    Three quarters of the canvases are masked as a block-by-block decoder meets them: the blocks before one block are
    clean, that block is masked at rate t, and the blocks after that block are all masked. The other canvases are masked
    at rate t in the whole response (LLaDA, arXiv:2502.09992).
    """

    canvas_lengths = (48, 64, 80, 96, 128)
    block_lengths = (4, 8, 16, 32)
    tight = 0.7
    semi_autoregressive = 0.75

    def __init__(self, stream: SampleStream, tokens_per_step: int, *, prompt_isolated: bool = False):
        self._stream = stream
        self._tokens_per_step = tokens_per_step
        self._prompt_isolated = prompt_isolated
        self._waiting: dict[int, list[Encoded]] = {length: [] for length in self.canvas_lengths}

    def next(self, generator: torch.Generator) -> Batch:
        """The next batch; `generator` draws its masks."""
        while True:
            sample = self._stream.next()
            needed = len(sample.prompt) + len(sample.answer)
            fitting = [length for length in self.canvas_lengths if length >= needed]
            length = fitting[0] if self._stream.random() < self.tight else self._stream.choice(fitting)
            self._waiting[length].append(sample)
            if len(self._waiting[length]) >= self._tokens_per_step // length:
                samples, self._waiting[length] = self._waiting[length], []
                return full_batch(
                    samples,
                    length,
                    generator,
                    self.block_lengths,
                    semi_autoregressive=self.semi_autoregressive,
                    prompt_isolated=self._prompt_isolated,
                )

    def state(self) -> str:
        """The samples that wait for a full batch of their canvas length, as JSON."""
        return json.dumps({length: _dump(samples) for length, samples in self._waiting.items()})

    def read_state(self, text: str) -> dict[int, list[Encoded]]:
        """What a state says. Raises an error for text that is no state of this object."""
        waiting = {int(length): _load(samples, int(length)) for length, samples in json.loads(text).items()}
        if tuple(sorted(waiting)) != self.canvas_lengths:
            raise ValueError(f"canvas lengths must be {self.canvas_lengths}, got {sorted(waiting)}")
        for length, samples in waiting.items():
            if len(samples) >= self._tokens_per_step // length:
                raise ValueError(f"samples of length {length} must be fewer than a batch, got {len(samples)}")
        return waiting

    def load_state(self, text: str) -> None:
        """Continues where the object stood that returned `text` as its state."""
        self._waiting = self.read_state(text)


def full_batch(
    samples: list[Encoded],
    canvas_length: int,
    generator: torch.Generator,
    block_lengths: tuple[int, ...],
    *,
    semi_autoregressive: float,
    prompt_isolated: bool = False,
) -> Batch:
    """A batch of canvases [prompt | answer <eos> <eos> ...] of `canvas_length` tokens, masked as `FullBatches` says."""
    # 1. Canvases.
    rows = len(samples)
    targets = torch.full((rows, canvas_length), EOS_ID)
    for row, sample in enumerate(samples):
        ids = sample.prompt + sample.answer
        targets[row, : len(ids)] = torch.tensor(ids)
    prompt_length = torch.tensor([[len(sample.prompt)] for sample in samples])
    first_eos = prompt_length + torch.tensor([[len(sample.answer) - 1] for sample in samples])
    position = torch.arange(canvas_length)[None]

    # 2. Masks. The rates are stratified, so that every batch covers the whole range of t.
    rate = (torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)) / rows
    rate = (MIN_RATE + (1 - MIN_RATE) * rate)[:, None]
    chosen = torch.rand(rows, canvas_length, generator=generator) < rate

    block_length = torch.tensor(block_lengths)[torch.randint(len(block_lengths), (rows, 1), generator=generator)]
    # The block of the first <eos> is the last one, since a decoder stops there.
    num_blocks = (first_eos - prompt_length) // block_length + 1
    block = (torch.rand(rows, 1, generator=generator) * num_blocks).long()
    block_start = prompt_length + block * block_length
    by_block = torch.rand(rows, 1, generator=generator) < semi_autoregressive
    later_masks = by_block & (position >= block_start + block_length)
    candidate = torch.where(by_block, position >= block_start, position >= prompt_length)
    is_masked = (candidate & chosen) | later_masks

    # 3. Weights and visibility.
    weight = is_masked.float()
    weight[later_masks] = LATER_WEIGHT
    weight[position > first_eos] *= FILLER_WEIGHT
    task = torch.tensor([[sample.task] for sample in samples]).expand(rows, canvas_length)
    in_prompt = position < prompt_length
    visible = (
        in_prompt[:, None, :] | ~in_prompt[:, :, None]
        if prompt_isolated
        else torch.ones(1, canvas_length, canvas_length, dtype=torch.bool)
    )
    return Batch(
        tokens=torch.where(is_masked, MASK_ID, targets),
        position_ids=position.expand(rows, canvas_length),
        targets=targets,
        visible=visible[:, None],
        weight=weight,
        task=task,
    )


class BlockCausalBatches:
    """Batches of the block-causal objective: rows of one length, packed with [prompt | clean blocks | noisy copies].

    The response is cut into blocks from its own start. Every block of a noisy copy has its own masking rate, and sees
    the prompt and the clean blocks before it, so that one forward denoises all blocks (the two-copy layout of BD3-LMs,
    arXiv:2503.09573). Two noisy copies share one clean copy, which costs less than two rows.
    """

    row_length = 256
    block_lengths = (8, 16)
    noisy_copies = 2
    all_masked = 0.2  # share of blocks that are wholly masked, as every block is at its start

    def __init__(self, stream: SampleStream, tokens_per_step: int):
        self._stream = stream
        self._rows = tokens_per_step // self.row_length
        self._left_over: list[tuple[Encoded, int]] = []

    def next(self, generator: torch.Generator) -> Batch:
        """The next batch; `generator` draws its masks."""
        rows: list[list[tuple[Encoded, int]]] = [[] for _ in range(self._rows)]
        free_positions = [self.row_length] * self._rows
        pending, self._left_over = self._left_over, []
        # A sample that fits into no row opens the next batch. If such samples were dropped, long samples would be rare.
        while not self._left_over:
            if not pending:
                pending.append((self._stream.next(), self._stream.choice(self.block_lengths)))
            sample, block_length = pending.pop()
            needed = block_causal_length(sample, block_length, self.noisy_copies)
            row = next((row for row in range(self._rows) if free_positions[row] >= needed), None)
            if row is None:
                self._left_over.append((sample, block_length))
            else:
                rows[row].append((sample, block_length))
                free_positions[row] -= needed
        return block_causal_batch(
            rows, self.row_length, generator, noisy_copies=self.noisy_copies, all_masked=self.all_masked
        )

    def state(self) -> str:
        """The sample that opens the next batch, as JSON."""
        return json.dumps([(dataclasses.asdict(sample), length) for sample, length in self._left_over])

    def read_state(self, text: str) -> list[tuple[Encoded, int]]:
        """What a state says. Raises an error for text that is no state of this object."""
        pairs = [(sample, length) for sample, length in json.loads(text)]
        samples = _load([sample for sample, _ in pairs], self.row_length)
        if len(pairs) > 1 or any(length not in self.block_lengths for _, length in pairs):
            raise ValueError(f"at most one sample must wait, in blocks of {self.block_lengths}, got {len(pairs)}")
        return [(sample, length) for sample, (_, length) in zip(samples, pairs)]

    def load_state(self, text: str) -> None:
        """Continues where the object stood that returned `text` as its state."""
        self._left_over = self.read_state(text)


def block_causal_length(sample: Encoded, block_length: int, noisy_copies: int) -> int:
    """Number of positions that one sample takes in a packed row."""
    response = -(-len(sample.answer) // block_length) * block_length
    # The last block has no clean copy, since no block comes after the last one to read the copy.
    return len(sample.prompt) + (response - block_length) + noisy_copies * response


def block_causal_visible(segment: Tensor, copy: Tensor, block: Tensor) -> Tensor:
    """[B, 1, L, L] bool: who sees whom in packed rows, from three [B, L] int64 labels of every position.

    `segment` numbers the samples of a row from 0, and is -1 in padding. `copy` is 0 in the prompt and in the clean
    response, and 1, 2, ... in the noisy copies. `block` numbers the blocks of a response, and is -1 in the prompt. With
    a prompt p, one clean block c0 and the noisy blocks n0 and n1, where block_length is 1:

        keys       p  c0 n0 n1
        query p    1  0  0  0
        query c0   1  1  0  0
        query n0   1  0  1  0
        query n1   1  1  0  1

    A position of padding sees itself, since a row without any key would give NaN.
    """
    query_copy, key_copy = copy[:, :, None], copy[:, None, :]
    query_block, key_block = block[:, :, None], block[:, None, :]
    query_segment, key_segment = segment[:, :, None], segment[:, None, :]
    same_copy = query_copy == key_copy
    clean_prefix = (key_copy == 0) & (key_block < query_block)
    visible = clean_prefix | (same_copy & (query_block == key_block))
    visible &= (query_segment == key_segment) & (query_segment >= 0)
    return (visible | torch.eye(segment.shape[1], dtype=torch.bool))[:, None]


def block_causal_batch(
    rows: list[list[tuple[Encoded, int]]],
    row_length: int,
    generator: torch.Generator,
    *,
    noisy_copies: int,
    all_masked: float,
) -> Batch:
    """A batch of rows that are packed with (sample, block_length) and masked as `BlockCausalBatches` says."""
    # 1. Pack the rows, with the labels of every position.
    shape = (len(rows), row_length)
    targets = torch.full(shape, PAD_ID)
    position_ids = torch.zeros(shape, dtype=torch.long)
    segment = torch.full(shape, -1)
    copy = torch.zeros(shape, dtype=torch.long)
    block = torch.zeros(shape, dtype=torch.long)
    task = torch.zeros(shape, dtype=torch.long)
    base_weight = torch.zeros(shape)
    for row, packed in enumerate(rows):
        start = 0
        for number, (sample, block_length) in enumerate(packed):
            prompt_length = len(sample.prompt)
            response_length = -(-len(sample.answer) // block_length) * block_length
            filler = response_length - len(sample.answer)
            response = torch.tensor(sample.answer + [EOS_ID] * filler)
            response_position = torch.arange(prompt_length, prompt_length + response_length)
            response_block = torch.arange(response_length) // block_length
            response_weight = torch.tensor([1.0] * len(sample.answer) + [FILLER_WEIGHT] * filler)
            clean_length = response_length - block_length

            end = start + block_causal_length(sample, block_length, noisy_copies)
            segment[row, start:end] = number
            task[row, start:end] = sample.task
            targets[row, start : start + prompt_length] = torch.tensor(sample.prompt)
            position_ids[row, start : start + prompt_length] = torch.arange(prompt_length)
            block[row, start : start + prompt_length] = -1
            start += prompt_length
            for index, length in enumerate([clean_length] + [response_length] * noisy_copies):
                span = slice(start, start + length)
                targets[row, span] = response[:length]
                position_ids[row, span] = response_position[:length]
                block[row, span] = response_block[:length]
                copy[row, span] = index
                if index > 0:
                    base_weight[row, span] = response_weight
                start += length

    # 2. Masks: one rate per (row, segment, copy, block), which each position looks up by its labels.
    labels = (int(segment.max()) + 1, noisy_copies + 1, int(block.max()) + 1)
    rate_shape = (shape[0], *labels)
    rate = MIN_RATE + (1 - MIN_RATE) * torch.rand(rate_shape, generator=generator)
    rate[torch.rand(rate_shape, generator=generator) < all_masked] = 1.0
    row_index = torch.arange(shape[0])[:, None]
    position_rate = rate[row_index, segment.clamp(min=0), copy, block.clamp(min=0)]
    is_masked = (copy > 0) & (torch.rand(shape, generator=generator) < position_rate)
    return Batch(
        tokens=torch.where(is_masked, MASK_ID, targets),
        position_ids=position_ids,
        targets=targets,
        visible=block_causal_visible(segment, copy, block),
        weight=base_weight * is_masked,
        task=task,
    )
