"""Optimizers and learning rates that pretraining and distillation share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

CHECKPOINT_NAME = "checkpoint.safetensors"
LOG_NAME = "log.jsonl"
# seed * SEED_STRIDE + step seeds the masks and the dropout of a step, so that a resumed run needs no generator's state.
SEED_STRIDE = 1_000_003
# What each optimizer keeps of a parameter once it has changed the parameter, with a tensor of the dtype and the shape.
STATES: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "adamw": {
        "step": lambda parameter: torch.empty((), dtype=torch.float32, device="meta"),
        "exp_avg": lambda parameter: parameter,
        "exp_avg_sq": lambda parameter: parameter,
    },
    "muon": {"momentum_buffer": lambda parameter: parameter},
}


def learning_rate_scale(step: int, *, steps: int, warmup: int, decay: float) -> float:
    """The share of the peak rate with which step number `step` (from 0) trains; with decay 0 the rate never falls."""
    falling = (steps - step) / (decay * steps) if decay else 1.0
    return min(1.0, (step + 1) / warmup, falling)


def build_optimizers(
    parameters: Iterable[nn.Parameter], layers: nn.Module, *, adamw: dict[str, Any], muon: dict[str, Any] | None
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of `parameters`, by name: Muon for the matrices in `layers`, and AdamW for all other parameters.

    Without `muon`, which holds the arguments of Muon, AdamW gets all parameters.
    """
    trained = list(parameters)
    in_layers = {id(p) for p in layers.parameters()} if muon is not None else set()
    hidden = [p for p in trained if p.ndim == 2 and id(p) in in_layers]
    chosen = {id(p) for p in hidden}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW([p for p in trained if id(p) not in chosen], **adamw)
    }
    if muon is not None:
        optimizers["muon"] = torch.optim.Muon(hidden, momentum=0.95, **muon)
    return optimizers
