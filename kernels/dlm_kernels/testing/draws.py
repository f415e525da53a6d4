"""Which draws of `confidence` can be compared: not those that hang on the rounding of a score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..reference import noise as random_numbers

# Two float64 scores this far apart are told apart by any rounding of fp32 scores near 50.
CLEAR_DRAW = 1e-3


def clear_draws(call: Mapping[str, Any]) -> Tensor:
    """[N] bool: the output does not hang on rounding, as nothing is drawn (a greedy row, an absent one, one candidate)
    or the two best scores lie `CLEAR_DRAW` apart in float64.

    Args:
        call: the arguments of `confidence` by name, with logits and what "sampled" needs. A row whose scores are no
            numbers counts as clear: it is an error of its own, which is compared as such.
    """
    logits = call["logits"]
    (R, V), device = logits.shape, logits.device
    temperature = call["sample_temperature"].double()
    N = len(temperature)
    rows = call.get("rows")
    rows = torch.arange(R, device=device) if rows is None else rows.long()
    ids = torch.arange(V, device=device)

    # 1. The logits of every output in float64, with biases and cap.
    x = logits[rows.clamp(0, R - 1)].double()
    if call.get("bias") is not None:
        inside = (call["bias_ids"] >= 0) & (call["bias_ids"] < V)
        added = torch.where(inside, call["bias"], 0.0).double()
        x = x.scatter_add(1, torch.where(inside, call["bias_ids"], 0), added)
    x = torch.where(x <= -1e30, -math.inf, x)
    cap = call.get("soft_cap")
    if cap is not None:
        x = torch.where(x > -math.inf, cap * torch.tanh(x / cap), x)

    # 2. The scores that the draw compares, without the banned ids.
    key = random_numbers.row_key(call["seed"], call["noise"])
    scores = x / torch.where(temperature > 0, temperature, 1.0)[:, None]
    scores = scores + random_numbers.gumbel(key, ids, torch.float64)
    banned = call.get("banned")
    if banned is not None and banned.shape[-1]:
        is_banned = (ids == banned.expand(N, banned.shape[-1])[..., None]).any(1)
        scores = scores.masked_fill(is_banned, -math.inf)

    # 3. The two best.
    absent = (rows < 0) | (rows >= R)
    if V == 1:
        return torch.ones(N, dtype=torch.bool, device=device)
    best = torch.where(scores.isnan(), -math.inf, scores).topk(2, dim=1).values
    apart = (best[:, 1] == -math.inf) | (best[:, 0] - best[:, 1] > CLEAR_DRAW)
    return (temperature == 0) | absent | apart
