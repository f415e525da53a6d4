"""Learned heads that no one trained, what they are given, and a model to decode with them."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import save_toy_checkpoint
from torch import nn

import dlm_fast
from dlm_fast.policies import heads
from dlm_fast.training import policy as training

BLOCK = 4
PRESET_OF = {"filter": "learn2pd", "commit": "learned-commit"}
KINDS = tuple(PRESET_OF)


def random_head(kind: str, block_length: int = BLOCK, *, seed: int = 0, scale: float = 4.0, **facts) -> heads.Head:
    """A head that no one trained, with weights that spread so that it says anything between 0 and 1."""
    head = training.new_head(kind, block_length, 8, "nothing", seed, 0)
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale / parameter.shape[-1] ** 0.5)
    for name, value in facts.items():
        setattr(head, name, value)
    return head.eval().requires_grad_(False)


def inputs_of(kind: str, rows: int, seed: int = 0, block_length: int = BLOCK) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(rows, block_length, generator=generator)
    masked = torch.rand(rows, block_length, generator=generator) < 0.7
    time = torch.randint(0, block_length + 1, (rows,), generator=generator) / block_length
    confidence = torch.where(masked, confidence, 0.0)
    return (confidence,) if kind == "filter" else (confidence, masked, time)


def toy_with_a_tokenizer(path: Path) -> nn.Module:
    """A toy, saved at `path` and loaded: its answers are nonsense, but its full decodes are as good a target as any."""
    save_toy_checkpoint(path, layers=1, heads=2, kv_heads=1)
    return dlm_fast.load(path, device="cpu", backend="reference")
