"""Masked batches: which tokens of a batch are masked, and the weight, target and logits row of each masked token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion import DiffusionConfig
from .dataset import Canvases
from .forcing import Noise, bernoulli, block_rates, predicting_row
from .visibility import block_labels


@dataclass
class Masked:
    """A masked batch: B canvases of L positions, with N masked tokens that count.

    The masked tokens are in the order of row and position.

    Attributes:
        tokens: [B, L] int64 token ids, some of which are the mask.
        prompt: [B] int64 length of the prompt.
        length: [B] int64 length of the canvas.
        row: [N] int64 canvas of each masked token.
        position: [N] int64 position of each masked token.
        targets: [N] int64 correct token.
        rate: [N] fp32 masking rate of the token's block.
        weight: [N] fp32 weight of the token in the loss.
        half: [N] int64 which of two complementary canvases masks the token, 0 or 1.
        in_answer: [N] bool whether the token stands in the answer, the first EOS included.
        task: [N] int64 index of the task, -1 = none.
    """

    tokens: Tensor
    prompt: Tensor
    length: Tensor
    row: Tensor
    position: Tensor
    targets: Tensor
    rate: Tensor
    weight: Tensor
    half: Tensor
    in_answer: Tensor
    task: Tensor

    def to(self, device: torch.device) -> Masked:
        return Masked(**{name: value.to(device) for name, value in vars(self).items()})

    def logits_index(self, logits_row: str) -> Tensor:
        """[N] index, into the B * L rows of logits, of the row that predicts each masked token."""
        return self.row * self.tokens.shape[1] + predicting_row(self.position, logits_row)


@dataclass(frozen=True)
class Masking:
    """How an objective masks canvases.

    Attributes:
        objective: one of `forcing.OBJECTIVES`.
        noise: masking rates.
        diffusion: the student's diffusion configuration, whose blocks are masked.
        filler_weight: weight of an EOS after the first one; 1 as published.
        trajectory: (low, high) of the share of a block that objective "trajectory" masks. The share is drawn from
            U(low + (high - low) * progress, high).
        first_block_length: block length at the start of objective "trajectory", from where the length grows to the
            student's; None = the student's block length throughout.
    """

    objective: str
    noise: Noise
    diffusion: DiffusionConfig
    filler_weight: float = 1.0
    trajectory: tuple[float, float] = (0.0, 0.8)
    first_block_length: int | None = None

    def __call__(self, canvases: Canvases, generator: torch.Generator, progress: float = 0.0) -> Masked:
        """Masks a batch; `progress` is the share of the training that is done."""
        # 1. The answer's positions and blocks.
        L = canvases.tokens.shape[1]
        place = torch.arange(L)
        answer = (place >= canvases.prompt[:, None]) & (place < canvases.length[:, None])
        block = self._answer_block(canvases, L, progress)
        last_block = block.gather(1, canvases.first_eos[:, None])[:, 0]

        # 2. D2F: a rate for every block, and one canvas.
        if self.objective == "forcing":
            num_blocks = torch.where(answer, block, 0).amax(1) + 1
            rates = block_rates(num_blocks, self.noise, generator, starts=last_block + 1)
            rate = rates.gather(1, block.clamp(min=0, max=rates.shape[1] - 1)).where(answer, 0.0)
            return self._pick(canvases, bernoulli(rate, generator), rate, half=None)

        # 3. The other objectives: candidates, those that the first half masks, and later masks that do not count.
        current_block = (torch.rand(len(block), 1, generator=generator) * (last_block + 1)[:, None]).long()
        if self.objective == "certainty":
            # A row is masked as a whole, or in one block as a decoder would meet the block. In the second case all
            # positions after the block are masks that do not count.
            by_block = torch.rand(len(block), 1, generator=generator) < self.noise.settled
            candidate = answer & (~by_block | (block == current_block))
            later_masks = answer & by_block & (block > current_block)
            chosen = bernoulli(torch.full(candidate.shape, self.noise.rate), generator)
        else:
            candidate, later_masks = answer & (block == current_block), answer & (block > current_block)
            low, high = self.trajectory
            t = (low + (high - low) * progress) + (high - low) * (1 - progress) * torch.rand(
                len(block), 1, generator=generator
            )
            # Within the block, the first int((1 - t) * length) tokens in the teacher's order are not masked.
            order = torch.where(candidate, canvases.rank, 2**40).argsort(1).argsort(1)
            chosen = order >= ((1 - t) * candidate.sum(1, keepdim=True)).long()

        # 4. Two complementary canvases.
        halves = [candidate & chosen, candidate & ~chosen]
        both_canvases = Canvases(
            **{
                name: None if value is None else value.repeat(2, *[1] * (value.dim() - 1))
                for name, value in vars(canvases).items()
            }
        )
        half = torch.arange(2).repeat_interleave(len(block))
        rate = torch.ones(both_canvases.tokens.shape)
        return self._pick(both_canvases, torch.cat(halves), rate, half=half, hidden=later_masks.repeat(2, 1))

    def _answer_block(self, canvases: Canvases, L: int, progress: float) -> Tensor:
        """[B, L] the number of each answer position's block, from 0; below 0 in the prompt, and anything in padding."""
        length = self.diffusion.block_length
        if self.first_block_length is not None:
            length = round(self.first_block_length + (length - self.first_block_length) * progress)
        blocks = dataclasses.replace(self.diffusion, visibility="block", block_length=length, prompt_isolated=False)
        labels, _ = block_labels(canvases.prompt, canvases.length, L, blocks)
        return labels.long() - labels.long().gather(1, canvases.prompt[:, None])

    def _pick(
        self, canvases: Canvases, masked: Tensor, rate: Tensor, *, half: Tensor | None, hidden: Tensor | None = None
    ) -> Masked:
        """The batch in which the positions `masked` count, and the positions `hidden` are masks that do not count."""
        row, position = masked.nonzero(as_tuple=True)
        in_answer = position <= canvases.first_eos[row]
        return Masked(
            tokens=torch.where(
                masked if hidden is None else masked | hidden, self.diffusion.mask_token_id, canvases.tokens
            ),
            prompt=canvases.prompt,
            length=canvases.length,
            row=row,
            position=position,
            targets=canvases.tokens[row, position],
            rate=rate[row, position],
            weight=torch.where(in_answer, 1.0, self.filler_weight),
            half=torch.zeros_like(row) if half is None else half[row],
            in_answer=in_answer,
            task=canvases.task[row],
        )
