"""A batch before its first step, as `generate` would hand it to the loop, and other shapes for its steps."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from helpers import EOS, MASK, VOCAB, facts_of, random_prompts
from torch._subclasses.fake_tensor import FakeTensorMode

import dlm_fast
from dlm_fast.decoding.plan import open_rows
from dlm_fast.decoding.shapes import Grid
from dlm_fast.draws import sampling_of
from dlm_fast.policies.constants import Constants
from dlm_fast.presets import Preset
from dlm_fast.requests import read


def faked(values: Any, fake: FakeTensorMode) -> Any:
    """A plan, a state or a sampling with fake tensors."""
    fields = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    fakes = {name: fake.from_tensor(value) for name, value in fields.items() if isinstance(value, torch.Tensor)}
    fakes |= {name: faked(value, fake) for name, value in fields.items() if isinstance(value, Constants)}
    return dataclasses.replace(values, **fakes)


def opened(chosen: Preset, temperature: float = 0.0):
    """Three rows on their canvases, before the first step."""
    diffusion = dlm_fast.DiffusionConfig(
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
        visibility=chosen.visibility,
        block_length=4,
        **facts_of(chosen.name),
    )
    batch = read(
        diffusion, vocab_size=VOCAB, max_positions=256, tokenizer=None,
        prompts=random_prompts([5, 3, 9]), canvas=None, request_ids=None, max_new_tokens=6, min_new_tokens=2,
        temperature=temperature, top_k=0, top_p=1.0, seed=0,
        stop_strings=(), banned_token_ids=(5,), eos_token_ids=None,
    )  # fmt: skip
    plan, state = open_rows(batch.opened, chosen, diffusion, torch.device("cpu"))
    return diffusion, plan, state, sampling_of(batch, plan, torch.device("cpu"))


def random_grid(rng: random.Random, planned: Grid, B: int) -> Grid:
    """Any grid by which every row can be served: other widths, and other row counts."""
    counts = {}
    for kind, widths in planned.counts.items():
        most = max(widths)
        # The drafts are of whole blocks, and so is a window of them.
        fewer = 0 if planned.drafts > 1 and kind == "denoise" else rng.randint(0, 3)
        chosen = sorted({*(rng.randint(1, most) for _ in range(fewer)), most})
        counts[kind] = {
            width: tuple(sorted(set(rng.choices(range(1, B + 1), k=rng.randint(1, 3))))) for width in chosen
        }
    return Grid(counts, planned.lanes, planned.drafts, planned.narrow, rng.choice((0, 8, 300)))
