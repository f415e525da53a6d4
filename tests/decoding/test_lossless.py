"""A decoder is exact if it writes the same tokens as the decoder that it is exact to, in float32: on random models, and
on held-out prompts of the tiny models.

The tiny models' decisions are far from ties. Random models are compared in float32 too, where a near-tie may flip, so
their seeds are fixed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_prompts, toy

import dlm_fast
from dlm_fast.decoding.drafts import Drafts
from dlm_fast.decoding.progress import Rounds
from dlm_fast.presets import PRESETS
from dlm_fast.tiny.tasks import TASKS, held_out
from dlm_kernels import RowState

# (preset, its options, what it equals, options of that one)
BLOCK = {"block_length": 8}
PAIRS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("freedave", BLOCK, "llada", BLOCK | {"cache": "dual"}),
    ("freedave", BLOCK | {"drafts": 2}, "llada", BLOCK | {"cache": "dual"}),
    ("freedave", BLOCK | {"score": "margin"}, "llada", BLOCK | {"cache": "dual", "score": "margin"}),
    ("freedave-block", {}, "sdar", {}),
    ("freedave-block", {"drafts": 3}, "sdar", {"cache": "none"}),
    ("d2f", {}, "d2f", {"cache": "none"}),
    (
        "d2f",
        {"append_threshold": 0.5, "threshold": 0.5},
        "d2f",
        {"append_threshold": 0.5, "threshold": 0.5, "cache": "none"},
    ),
    # Blocks that wait for the block before them are decoded one at a time.
    ("d2f", {"append_threshold": 1.0, "activate_threshold": 1.0}, "llada2", {"threshold": 0.9}),
    *(
        (name, {}, name, {"cache": "none"})
        for name in ("sdar-dynamic", "sdar-sequential", "sdar-entropy", "llada2", "llada2-quota", "efficient-dlm")
    ),
]
IDS = [f"{a} {' '.join(f'{k}={v}' for k, v in x.items())}" for a, x, _, _ in PAIRS]


def same_text(model, prompts, pair, **settings) -> tuple[Any, Any]:
    preset, options, static, static_options = pair
    ours = dlm_fast.generate(model, prompts, preset=preset, **options, **settings)
    exact = dlm_fast.generate(model, prompts, preset=static, **static_options, **settings)
    # Behind the first EOS the rows may stop at different places.
    assert [ids.tolist() for ids in ours.sequences] == [ids.tolist() for ids in exact.sequences]
    assert ours.finish == exact.finish
    return ours, exact


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
def test_tokens_are_those_of_the_static_decoder_on_random_models(pair):
    for seed in range(4):
        model = toy(
            PRESETS[pair[0]].visibility,
            block_length=3 + seed,
            seed=seed,
            kv_heads=1 + seed % 2,
            family=("llama", "qwen3")[seed % 2],
        )
        same_text(model, random_prompts([2, 7, 5], seed), pair, max_new_tokens=[11, 6, 9])


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return {
        "full": dlm_fast.load("tiny-full", backend="reference"),
        "block": dlm_fast.load("tiny-block", backend="reference"),
    }


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
def test_tokens_are_those_of_the_static_decoder_on_the_tiny_models(pair, tiny):
    chats = [[{"role": "user", "content": sample.prompt}] for task in TASKS for sample in held_out(task, 2, seed=11)]
    ours, exact = same_text(tiny[PRESETS[pair[0]].visibility], chats, pair, max_new_tokens=40)
    if pair[0].startswith("freedave"):
        assert sum(ours.nfe) < sum(exact.nfe)


def test_drafts_that_are_rarely_accepted_are_given_up():
    state = RowState.empty(3, 8, "cpu")
    given = Drafts.empty(state, lanes=4)
    given.tried.copy_(torch.tensor([8, 8, 7]))
    given.accepted.copy_(torch.tensor([1, 2, 0]))
    assert given.suspended().tolist() == [True, False, False]


def test_a_row_without_drafts_computes_its_window_once(monkeypatch):
    monkeypatch.setattr(Drafts, "suspended", lambda self: torch.ones_like(self.tried, dtype=torch.bool))
    model, prompts = toy("block", eos=()), random_prompts([4, 2])
    published = ("freedave-block", {}, "sdar", {"cache": "commit"})
    out, static = same_text(model, prompts, published, max_new_tokens=9)
    # One canvas a step: a block's first forward writes nothing, and its last mask needs none.
    assert (out.nfe, out.query_tokens) == (static.nfe, static.query_tokens)


@pytest.mark.parametrize(
    "decoder", [{"preset": "d2f", "append_threshold": 0.1, "threshold": 0.2}, {"preset": "sdar"}, {"preset": "llada2"}]
)
def test_a_width_that_is_a_step_behind_still_holds_every_row(decoder, monkeypatch):
    """On a GPU the host reads widths one step late and adds a block; the tokens are the same in the wider bucket."""
    model, prompts = toy("block", eos=()), random_prompts([3, 6, 1])
    options = {**decoder, "max_new_tokens": [9, 14, 5]}
    handle = dlm_fast.handle_of(model)
    exact = dlm_fast.generate(model, prompts, **options)
    calls = handle.attention_calls
    monkeypatch.setattr(Rounds, "may_be_late", property(lambda self: True, lambda self, late: None), raising=False)
    behind = dlm_fast.generate(model, prompts, **options)
    # There is one step at the end that nobody needs, and none in which a row finds its bucket too narrow.
    assert handle.attention_calls - calls == calls + model.config.num_hidden_layers
    assert [row.tolist() for row in behind.canvas] == [row.tolist() for row in exact.canvas]
    assert (behind.nfe, behind.query_tokens) == (exact.nfe, exact.query_tokens)
