"""What a session takes of the memory: planned before anything is allocated, and refused where it cannot fit."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import EOS, MASK, options_of, random_prompts, toy
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import dlm_fast
from dlm_fast import BatchTooLarge, Session, sizing
from dlm_fast.decoding import measure, progress
from dlm_fast.decoding.budget import MemoryPlan

CPU = torch.device("cpu")


def model_of(preset: str) -> LlamaForCausalLM:
    """A model whose hidden states, keys and logits are of sizes that tell."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3000, hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    visibility = dlm_fast.PRESETS[preset].visibility
    length = 32 if visibility == "block" else None
    dlm_fast.patch(
        model,
        diffusion=dlm_fast.DiffusionConfig(
            mask_token_id=MASK, eos_token_ids=(EOS,), visibility=visibility, block_length=length
        ),
    )
    return model


def peak(run) -> int:
    """The most bytes that the CPU's allocator held at a time beyond those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now = most = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def without_weights(plan: MemoryPlan) -> int:
    return plan.total(CPU) - plan.parts[CPU]["weights"]


@pytest.mark.parametrize(
    ("preset", "arguments"),
    [
        ("llada", {}),
        ("fast-dllm-dual", {}),
        ("fast-dllm-prefix", {"top_p": 0.9, "temperature": 0.8}),
        ("klass", {}),
        ("d2f", {}),
        ("sdar", {"cache_positions": 1200}),
    ],
)
def test_the_plan_is_within_a_tenth_of_the_peak(preset, arguments):
    model = model_of(preset)
    options = {"block_length": 32} if dlm_fast.PRESETS[preset].visibility == "full" else {}
    session = Session(model, preset, slots=4, max_positions=512, max_new_tokens=64, **options, **arguments)
    planned = without_weights(session.plan())
    assert session._runner.slots is None  # nothing was allocated
    prompts = random_prompts([448] * 6)
    found = peak(lambda: session.generate(prompts, on_step=None))
    assert found / 1.1 <= planned <= 1.1 * found, (planned, found, str(session.plan()))


def test_the_parts_of_a_plan_are_those_of_the_sizes():
    model = model_of("klass")
    session = Session(model, "klass", slots=4, max_positions=256, max_new_tokens=64, block_length=32)
    parts = session.plan().parts[CPU]
    assert parts["weights"] == sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    # The distributions of a block, in the model's dtype, and their logsumexp.
    assert parts["history"] == 4 * 32 * (3000 + 1) * 4
    dual = Session(model, "fast-dllm-dual", slots=4, max_positions=256, max_new_tokens=64, block_length=32)
    assert dual.plan().parts[CPU]["cache"] == 2 * 2 * 4 * 192 * 256 * 4
    half = Session(model, "fast-dllm-dual", slots=4, max_positions=256, cache_positions=512, block_length=32)
    assert half.plan().parts[CPU]["cache"] == 2 * 2 * 192 * 512 * 4 + 4 * 4 * 4  # and the page table


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_budget_that_is_too_small_is_refused_and_what_would_fit_fits(backend):
    model, settings = model_of("fast-dllm-dual"), {"max_positions": 512, "max_new_tokens": 64, "block_length": 32}
    whole = Session(model, "fast-dllm-dual", slots=8, **settings)
    most = whole.plan().total(CPU)
    Session(model, "fast-dllm-dual", slots=8, memory=most, **settings)
    with pytest.raises(BatchTooLarge, match=r"must fit .* GiB of cpu, got 8 slots of 512 positions") as caught:
        Session(model, "fast-dllm-dual", slots=8, memory=most - 10**6, **settings)
    positions = int(re.search(r"cache_positions=(\d+) would fit", str(caught.value)).group(1))
    session = Session(model, "fast-dllm-dual", slots=8, memory=most - 10**6, cache_positions=positions, **settings)
    rows = session.generate(random_prompts([440, 30, 300, 100]))
    assert [row.finish for row in rows] == ["length"] * 4
    with pytest.raises(BatchTooLarge, match="not even slots=1 would fit"):
        Session(model, "fast-dllm-dual", slots=8, memory=10**6, **settings)


def test_what_is_free_bounds_a_session(monkeypatch):
    model, settings = model_of("llada"), {"max_positions": 512, "max_new_tokens": 512 - 1, "block_length": 32}
    needed = Session(model, "llada", slots=8, **settings).plan()
    monkeypatch.setattr(sizing, "free_bytes", lambda device: without_weights(needed))
    Session(model, "llada", slots=8, **settings)
    monkeypatch.setattr(sizing, "free_bytes", lambda device: without_weights(needed) // 3)
    with pytest.raises(BatchTooLarge, match=r"slots=\d would fit|not even slots=1"):
        Session(model, "llada", slots=8, **settings)


def test_steps_whose_logits_would_be_too_large_are_of_fewer_rows(monkeypatch):
    model, prompts = toy(), random_prompts([5] * 8)
    settings = {"preset": "eb-sampler", "max_new_tokens": 16, **options_of("eb-sampler")}
    whole = dlm_fast.generate(model, prompts, **settings)
    lanes = max(shape.lanes for shape in whole.shapes)
    monkeypatch.setattr(progress, "LOGITS", 3 * lanes * 48 * 4)
    parts = dlm_fast.generate(model, prompts, **settings)
    assert max(shape.rows for shape in parts.shapes) == 3 < max(shape.rows for shape in whole.shapes)
    assert [row.tolist() for row in parts.canvas] == [row.tolist() for row in whole.canvas]


@pytest.mark.parametrize("preset", ["llada", "dream"])
def test_filters_of_few_rows_at_a_time_are_those_of_all(preset, monkeypatch):
    model, prompts = toy(), random_prompts([5, 3, 8, 2])
    settings = {"preset": preset, "max_new_tokens": 12, "temperature": [0.9, 0.0, 1.2, 0.5], "top_k": 9, "top_p": 0.8}
    settings |= {**options_of(preset), "banned_token_ids": [7], "min_new_tokens": [0, 3, 5, 0]}
    whole = dlm_fast.generate(model, prompts, **settings)
    for rows in (1, 5):
        monkeypatch.setattr(measure, "FILTERED", rows * 48 * measure.FILTER_BYTES)
        parts = dlm_fast.generate(model, prompts, **settings)
        assert [row.tolist() for row in parts.canvas] == [row.tolist() for row in whole.canvas]
