"""Options of every preset with which little passes, and with which much does."""

from __future__ import annotations

import torch

from dlm_fast.presets import PRESETS
from dlm_fast.presets.options import unread


def sharp_filter(confidence: torch.Tensor) -> torch.Tensor:
    """A learned filter that no one trained: it accepts what is more confident than its neighbours together."""
    around = torch.nn.functional.pad(confidence, (1, 1))
    return torch.sigmoid(20 * (confidence - around[:, :-2] - around[:, 2:]))


def sharp_policy(confidence: torch.Tensor, eligible: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The same as a learned policy, which grows bolder."""
    return sharp_filter(confidence) * (0.5 + time[:, None]).clamp(max=1)


# Options with which little passes, and with which much does; a decoder that has no such number runs as it is.
EAGER_AND_SHY = {
    "threshold": ({"threshold": 0.1}, {"threshold": 0.999}),
    "neg_entropy": ({"threshold": -2.5}, {"threshold": -1e-3}),
    "entropy": ({"entropy_bound": 5.0}, {"entropy_bound": 0.0}),
    "factor": ({"factor": 3.0}, {"factor": 0.01}),
    "quota": ({"steps_per_block": 2}, {}),
    "schedule": ({"steps_per_block": 3}, {"steps_per_block": 40}),
    "bernoulli": ({"steps_per_block": 3}, {"steps_per_block": 40}),
}
EXTRA = {
    "learn2pd": (
        {"head": sharp_filter, "accept_threshold": 0.5, "eotp": True},
        {"head": sharp_filter, "accept_threshold": 0.999},
    ),
    "learned-commit": (
        {"head": sharp_policy, "accept_threshold": 0.1},
        {"head": sharp_policy, "accept_threshold": 0.999},
    ),
    "klass": ({"kl_threshold": 10.0, "kl_history": 1}, {"kl_threshold": 1e-9}),
    "ccd": ({}, {"steps_per_block": 20}),
    "ccd-ds": ({}, {"steps_per_block": 20}),
    "prophet": ({"gap_thresholds": (3.0, 1.0, 0.2)}, {"gap_thresholds": (99.0, 99.0, 99.0)}),
    "sched": ({"high": 2.0, "low": 0.2, "max_change": 0.5}, {"high": 99.0, "low": 99.0}),
    "rcr": ({"steps_per_block": 3}, {"steps_per_block": 9}),
    "wino": ({"verify_threshold": 0.99}, {"verify_threshold": 0.5}),
    "entropy-cache": ({"refresh_entropy": 0.5}, {"refresh_entropy": 9.0}),
    "llada2.1": ({"edit_threshold": 0.0}, {"edit_threshold": 0.5, "threshold": 0.3}),
    "streaming-dllm": ({"horizon": 3}, {"horizon": 0}),
    "dpad": ({"horizon": 7}, {"horizon": 2}),
}


def variants(name: str) -> list[dict]:
    """The preset's options: eager, and shy."""
    if name not in PRESETS:
        return [{}]
    preset = PRESETS[name]
    common = EAGER_AND_SHY[
        "neg_entropy" if preset.rule == "threshold" and preset.score == "neg_entropy" else preset.rule
    ]
    common = [{option: a[option] for option in a if not unread(preset, [option], preset)} for a in common]
    return [a | b for a, b in zip(common, EXTRA.get(name, ({}, {})))]
