"""Noise and losses of the distillations: D2F's asymmetric one, certainty forcing, and pseudo-trajectories.

    forcing     Discrete diffusion forcing (D2F, arXiv:2508.09192): every block of the answer is masked at its own rate,
                rates do not fall from block to block, and a block-causal student imitates a full-attention teacher on
                the same canvas.
    certainty   Certainty-forcing distillation (dParallel, arXiv:2509.26488): half of the answer is masked, and the
                other half is masked in a second copy. The loss is the cross-entropy, and the entropy of the tokens that
                are predicted correctly already.
    trajectory  Pseudo-trajectory distillation (d3LLM): a block is masked in the order in which a teacher filled the
                block.

Every random number is drawn on the CPU, from the generator of the call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

OBJECTIVES = ("forcing", "certainty", "trajectory")


@dataclass(frozen=True)
class Noise:
    """How answers are masked.

    Attributes:
        low: smallest masking rate of a block, for "forcing"; 0.2 as published.
        high: largest masking rate of a block, for "forcing"; 0.7 as published.
        settled: probability that the blocks before a random block are clean, as in the canvas that a decoder meets when
            the decoder opens a block; 0 as published.
        fresh: share of the settled canvases in which all blocks after the random block are wholly masked, as a decoder
            appends blocks.
        rate: masking rate of "certainty".
    """

    low: float = 0.2
    high: float = 0.7
    settled: float = 0.0
    fresh: float = 0.0
    rate: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= 1:
            raise ValueError(f"distill: noise must have 0 < low <= high <= 1, got low={self.low}, high={self.high}")
        for name in ("settled", "fresh"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"distill: {name} must be in [0, 1], got {name}={getattr(self, name)}")
        if not 0 < self.rate < 1:
            raise ValueError(f"distill: rate must be in (0, 1), got rate={self.rate}")


def block_rates(
    num_blocks: Tensor, noise: Noise, generator: torch.Generator, *, starts: Tensor | None = None
) -> Tensor:
    """Masking rate of every answer block, [B, max(num_blocks)] fp32, of which row b uses the first num_blocks[b].

        p_1 ~ U(low, high)        p_(j+1) = p_j + U(0, (high - p_1) / (M - 1))        M = num_blocks[b]

    So the rates of a row never fall and stay within [low, high] (D2F). In a `settled` row the blocks before a random
    block have rate 0; in a row that is also `fresh`, the blocks after that block have rate 1. The random block is one
    of the first starts[b] blocks, or without `starts` any block.
    """
    B, max_blocks = len(num_blocks), int(num_blocks.max())
    draws = torch.rand(B, max_blocks, generator=generator, dtype=torch.float64)
    row_draws = torch.rand(B, 3, generator=generator, dtype=torch.float64)
    first_rate = noise.low + (noise.high - noise.low) * draws[:, :1]
    step = (noise.high - first_rate) / (num_blocks[:, None] - 1).clamp(min=1)
    # The bound holds for real numbers. A sum of rounded steps may exceed the bound by a few ulp, hence the clamp.
    rates = torch.cat([first_rate, first_rate + (step * draws[:, 1:]).cumsum(1)], 1).clamp(max=noise.high)
    index = torch.arange(max_blocks)
    current_block = (row_draws[:, :1] * (num_blocks if starts is None else starts)[:, None]).long()
    is_settled = row_draws[:, 1:2] < noise.settled
    is_fresh = is_settled & (row_draws[:, 2:] < noise.fresh)
    rates = torch.where(is_settled & (index < current_block), 0.0, rates)
    return torch.where(is_fresh & (index > current_block), 1.0, rates).float()


def bernoulli(rates: Tensor, generator: torch.Generator) -> Tensor:
    """A bool tensor of the shape of `rates`, in which an entry is True with the probability that `rates` has there."""
    return torch.rand(rates.shape, generator=generator) < rates


def predicting_row(position: Tensor, logits_row: str) -> Tensor:
    """Which row of the logits predicts a position.

    That is the position's own row ("self"), or the row before the position ("previous"); position 0 has its own row.
    """
    return (position - 1).clamp(min=0) if logits_row == "previous" else position


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """sum(values * weight) / sum(weight); 0 if no token counts."""
    total = weight.sum()
    return (values * weight).sum() / torch.where(total > 0, total, 1.0)


def token_loss(student: Tensor, targets: Tensor, teacher: Tensor | None, *, temperature: float = 1.0) -> Tensor:
    """[N] fp32: cross-entropy of each token with the teacher's distribution, or with the target if there is no teacher.

        soft    -sum_v softmax(teacher / T)_v log softmax(student / T)_v * T^2
        hard    -log softmax(student)_target

    The factor T^2 keeps the size of the gradient (Hinton et al., arXiv:1503.02531).

    Args:
        student: [N, V] logits.
        targets: [N] correct tokens.
        teacher: [N, V] logits; None = hard targets.
        temperature: T.
    """
    if teacher is None:
        return F.cross_entropy(student.float(), targets, reduction="none")
    if teacher.shape != student.shape:
        raise ValueError(
            f"distill: teacher and student must have the same vocabulary, got {teacher.shape[-1]} and "
            f"{student.shape[-1]}"
        )
    wanted = torch.softmax(teacher.float() / temperature, -1)
    return -(wanted * torch.log_softmax(student.float() / temperature, -1)).sum(-1) * temperature**2


def forcing_loss(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    rate: Tensor,
    weight: Tensor,
    *,
    inverse_rate_weight: bool = True,
    temperature: float = 1.0,
) -> Tensor:
    """D2F's loss: the weighted mean of the masked tokens' cross-entropies, each divided by the rate of its block.

    Args:
        student: [N, V] logits of the rows that predict the N masked tokens.
        teacher: [N, V] logits of these rows; None = hard targets.
        targets: [N] correct tokens.
        rate: [N] masking rate of each token's block.
        weight: [N] weight of each token.
        inverse_rate_weight: whether cross-entropies are divided by the rate.
        temperature: temperature of teacher and student.
    """
    loss = token_loss(student, targets, teacher, temperature=temperature)
    return weighted_mean(loss / rate if inverse_rate_weight else loss, weight)


def certainty_loss(
    student: Tensor,
    targets: Tensor,
    half: Tensor,
    weight: Tensor,
    *,
    entropy_weight: float,
    entropy_temperature: float,
    scale: float,
) -> Tensor:
    """scale * sum over both halves of (mean cross-entropy + entropy_weight * mean entropy of the correct tokens).

    The halves are the two complementary canvases. A token is correct if the student's most likely token is the target.

    Args:
        student: [N, V] logits.
        targets: [N] correct tokens.
        half: [N] which of the two canvases masks the token, 0 or 1.
        weight: [N] weight of each token.
        entropy_weight: weight of the entropy beside the cross-entropy.
        entropy_temperature: the entropy is that of softmax(student / entropy_temperature), in nats.
        scale: factor of the whole loss, 1/2 in dParallel and 1/4 in d3LLM.
    """
    cross_entropy = token_loss(student, targets, None)
    is_correct = student.detach().argmax(-1) == targets
    log_p = torch.log_softmax(student.float() / entropy_temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    total = cross_entropy.new_zeros(())
    for number in (0, 1):
        half_weight = weight * (half == number)
        total = total + weighted_mean(cross_entropy, half_weight)
        total = total + entropy_weight * weighted_mean(entropy, half_weight * is_correct)
    return scale * total
