"""Noise and losses of the distillations: D2F's asymmetric one, certainty forcing, and pseudo-trajectories.

    forcing     Discrete diffusion forcing (D2F, arXiv:2508.09192): every block of the answer is masked at its own rate,
                rates do not fall from block to block, and a block-causal student imitates a full-attention teacher on
                the same canvas.
    certainty   Certainty-forcing distillation (dParallel, arXiv:2509.26488): half of the answer masked, the other half
                in a second copy; cross-entropy, and the entropy of the tokens that are right already.
    trajectory  Pseudo-trajectory distillation (d3LLM): a block masked in the order in which a teacher filled it.

Everything random is drawn from the generator that is given, on the CPU.
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
        low, high: bounds of a block's masking rate ("forcing"). The published recipe: 0.2, 0.7.
        settled: probability that a canvas is one a decoder meets at the start of a block: the blocks before a random
            one are clean.
            0: never, as published.
        fresh: of those, the share in which all blocks after that one are wholly masked, as a decoder appends them. 0:
            none.
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

    so rates never fall and stay within [low, high]; D2F. In a `settled` row the blocks before a random one have rate 0,
    and if it is `fresh` too those after it have rate 1. That block is one of the first starts[b]; None: of all.
    """
    B, most = len(num_blocks), int(num_blocks.max())
    draw = torch.rand(B, most, generator=generator, dtype=torch.float64)
    state = torch.rand(B, 3, generator=generator, dtype=torch.float64)
    first = noise.low + (noise.high - noise.low) * draw[:, :1]
    step = (noise.high - first) / (num_blocks[:, None] - 1).clamp(min=1)
    # The bound is one of real numbers: a sum of rounded steps may pass it by a few ulp.
    rates = torch.cat([first, first + (step * draw[:, 1:]).cumsum(1)], 1).clamp(max=noise.high)
    index = torch.arange(most)
    current = (state[:, :1] * (num_blocks if starts is None else starts)[:, None]).long()
    settled = state[:, 1:2] < noise.settled
    fresh = settled & (state[:, 2:] < noise.fresh)
    rates = torch.where(settled & (index < current), 0.0, rates)
    return torch.where(fresh & (index > current), 1.0, rates).float()


def bernoulli(rates: Tensor, generator: torch.Generator) -> Tensor:
    """A bool tensor, True with the probability at the same place of `rates`."""
    return torch.rand(rates.shape, generator=generator) < rates


def predicting_row(position: Tensor, logits_row: str) -> Tensor:
    """Which row of the logits predicts a position: its own ("self") or the one before ("previous"; position 0 has its
    own)."""
    return (position - 1).clamp(min=0) if logits_row == "previous" else position


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """sum(values * weight) / sum(weight); 0 where no token counts, which teaches nothing."""
    total = weight.sum()
    return (values * weight).sum() / torch.where(total > 0, total, 1.0)


def token_loss(student: Tensor, targets: Tensor, teacher: Tensor | None, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of each token, [N] fp32: against the teacher's distribution, or against the target where there is
    no teacher.

        soft    -sum_v softmax(teacher / T)_v log softmax(student / T)_v * T^2
        hard    -log softmax(student)_target

    student, teacher: logits [N, V]. targets: [N]. T^2 keeps the size of the gradient (Hinton et al., arXiv:1503.02531).
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
    """D2F's loss over the masked tokens: the weighted mean of their cross-entropy, each divided by the rate of its
    block.

    Args:
        student, teacher: [N, V] logits of the rows that predict the N masked tokens; teacher None: hard targets.
        targets: [N] true tokens. rate: [N] masking rate of each token's block. weight: [N].
        inverse_rate_weight: False: no division, every masked token counts alike.
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
    """scale * sum over both complementary halves of (mean CE + entropy_weight * mean entropy of the right tokens).

    A token is right if the student's top token is the target; the entropy is that of softmax(student /
    entropy_temperature), nats.

    Args:
        student: [N, V] logits. targets: [N]. half: [N], 0 or 1, which of the two canvases masks the token. weight: [N].
        scale: 1/2 in dParallel, 1/4 in d3LLM.
    """
    cross_entropy = token_loss(student, targets, None)
    right = student.detach().argmax(-1) == targets
    log_p = torch.log_softmax(student.float() / entropy_temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    total = cross_entropy.new_zeros(())
    for number in (0, 1):
        here = weight * (half == number)
        total = total + weighted_mean(cross_entropy, here) + entropy_weight * weighted_mean(entropy, here * right)
    return scale * total
