"""What the tests of patched models share: a configuration, the arguments of a short decode, and plain forwards."""

from __future__ import annotations

import torch
from helpers import EOS, MASK, random_prompts

import dlm_fast

FULL = dlm_fast.DiffusionConfig(mask_token_id=MASK, eos_token_ids=(EOS,), visibility="full")
PLAIN = {"prompts": [[5, 6]], "max_new_tokens": 3}


def ids(*lengths: int) -> torch.Tensor:
    return torch.tensor(random_prompts(list(lengths)))


def logits(model, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits
