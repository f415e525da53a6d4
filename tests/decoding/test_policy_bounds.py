"""Every decoder makes progress and ends: bounds on what its steps do to the masks, measured on whole decodes of toy
models."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from helpers import EOS, MASK, native_model, random_prompts, toy
from variants import variants

import dlm_fast
from dlm_fast.decoding.progress import Rounds
from dlm_fast.patching import attach
from dlm_fast.presets import PRESETS

BLOCK, PROMPTS, NEW = 4, [1, 6], [10, 5]


# Decoders with a bound of their own; all the others write at least one token a step.
OWN_BOUND = ("freedave", "freedave-block", "dream-origin", "rcr", "wino", "llada2.1", "llada2.2", "diffusion-gemma")
PLANNED = (
    "llada", "dream", "dream-origin",
    "fast-dllm", "fast-dllm-factor", "fast-dllm-prefix", "fast-dllm-dual", "fast-dllm-v2",
    "dinfer", "dinfer-hierarchy", "dinfer-credit", "dinfer-vicinity", "dllm-rl", "d3llm", "dparallel", "dllm-var",
    "d2f", "nbdiff", "efficient-dlm", "trado", "sdar", "sdar-dynamic", "sdar-sequential", "sdar-entropy",
    "llada2", "llada2-quota", "llada2.1", "llada2.2",
    "eb-sampler", "klass", "ccd", "ccd-ds", "prophet", "sched", "rcr", "wino", "saber", "local-leap",
    "certainty-prior", "streaming-dllm", "dpad", "freecache", "dkv-cache", "entropy-cache",
    "learn2pd", "learned-commit", "freedave", "freedave-block",
)  # fmt: skip
# Steps of a block beyond its length and its edits.
AFTER_EDITS = {"llada2.1": 1, "llada2.2": 2}
WRITES_EVERY_STEP = [name for name in dict.fromkeys((*PLANNED, *PRESETS)) if name not in OWN_BOUND]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A row after a step: masks in its canvas and in its block, denoise steps, forwards, and its block."""

    masks: int
    block_masks: int
    step: int
    nfe: int
    block: int


@functools.lru_cache(maxsize=16)
def model_of(visibility: str, alignment: str, logits_row: str):
    diffusion = dlm_fast.DiffusionConfig(
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
        visibility=visibility,
        block_length=BLOCK,
        block_alignment=alignment,
        logits_row=logits_row,
    )
    model = native_model(seed=3, heads=2, kv_heads=1)
    attach(model, backend="reference", diffusion=diffusion, plain_mode=visibility)
    return model


def trace(name: str, options: dict, alignment: str = "rel") -> list[list[Snapshot]]:
    """Row by row, what every step of a decode left."""
    if name not in PRESETS:
        pytest.skip(f"preset {name} does not exist yet; its bound would be checked here")
    preset = PRESETS[name]
    absolute = preset.visibility == "block" and alignment == "abs"
    starts = [p // BLOCK * BLOCK if absolute else p for p in PROMPTS]
    ends = [p + n for p, n in zip(PROMPTS, NEW)]
    if preset.last_block == "whole":
        ends = [start + -(-(end - start) // BLOCK) * BLOCK for start, end in zip(starts, ends)]
    rows = [[Snapshot(end - p, -1, 0, 0, start)] for p, start, end in zip(PROMPTS, starts, ends)]

    def record(state) -> None:
        position = torch.arange(state.tokens.shape[1])
        masked = (state.tokens == MASK) & (position < state.canvas_len[:, None])
        inside = (position >= state.block_start[:, None]) & (position < state.block_end[:, None])
        numbers = (masked.sum(1), (masked & inside).sum(1), state.step, state.nfe, state.block_start)
        for row, values in zip(rows, zip(*(n.tolist() for n in numbers))):
            row.append(Snapshot(*values))

    if preset.visibility == "full" and "block_length" in preset.options() and preset.schedule != "canvas":
        options = {"block_length": BLOCK, **options}
    model = model_of(preset.visibility, alignment, "previous" if preset.first_token else "self")
    dlm_fast.generate(model, random_prompts(PROMPTS), max_new_tokens=NEW, preset=name, on_step=record, **options)
    return rows


@pytest.mark.parametrize("name", WRITES_EVERY_STEP)
def test_every_denoise_step_leaves_fewer_masks(name):
    for options in variants(name):
        for row in trace(name, options):
            for before, after in zip(row, row[1:]):
                assert after.step == before.step or after.masks < before.masks, options
            assert row[-1].step <= row[0].masks


@pytest.mark.parametrize("drafts", [2, 3, 8])
@pytest.mark.parametrize("name", ["freedave", "freedave-block"])
def test_only_the_step_that_opens_a_block_of_drafts_writes_nothing(name, drafts):
    for row in trace(name, {"drafts": drafts, "stop": "never"}):
        assert row[-1].masks == 0 and row[-1].step <= row[0].masks
        for taken in steps_by_block(row).values():
            assert all(after.masks < before.masks for before, after in zip(taken, taken[1:]))


def test_dream_origin_ends_after_its_schedule():
    for steps in (1, 3, 40):
        assert all(row[-1].step <= steps for row in trace("dream-origin", {"steps_per_block": steps}))


def steps_by_block(row: list[Snapshot]) -> dict[int, list[Snapshot]]:
    """The denoise steps of a row by the block that they worked on: how the block stood after each step."""
    blocks: dict[int, list[Snapshot]] = {}
    for before, after in zip(row, row[1:]):
        if after.step > before.step:
            blocks.setdefault(before.block, []).append(after)
    return blocks


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9])
def test_rcr_fills_a_block_in_its_number_of_steps(steps):
    for row in trace("rcr", {"steps_per_block": steps, "stop": "never"}):
        assert row[-1].masks == 0
        for taken in steps_by_block(row).values():
            assert len(taken) <= steps


@pytest.mark.parametrize(
    "options", [{"threshold": 0.05, "verify_threshold": 1.0}, {"threshold": 0.3}, {"threshold": 0.999}]
)
def test_wino_writes_more_than_it_takes_back(options):
    for row in trace("wino", {"block_length": 9, "stop": "never", **options}):
        assert row[-1].masks == 0
        left = row[0].masks
        for taken in steps_by_block(row).values():
            for number, after in enumerate(taken, 1):
                assert after.masks <= left - number
            assert len(taken) <= left - taken[-1].masks <= 9
            left = taken[-1].masks


@pytest.mark.parametrize("alignment", ["abs", "rel"])
@pytest.mark.parametrize(
    "options", [{}, {"threshold": 0.05}, {"threshold": 0.999, "edit_threshold": 0.3}, {"max_post_edits": 0}]
)
def test_joint_threshold_ends_within_its_edits(options, alignment):
    edits = options.get("max_post_edits", 16)
    for row in trace("llada2.1", {"stop": "never", **options}, alignment):
        assert row[-1].masks == 0
        for taken in steps_by_block(row).values():
            assert len(taken) <= BLOCK + edits + AFTER_EDITS["llada2.1"]


@pytest.mark.parametrize("alignment", ["abs", "rel"])
@pytest.mark.parametrize("edits", [0, 3])
def test_insertions_and_deletions_end_within_their_edits(edits, alignment):
    for delete_id, split_id in ((2, 3), (15, 31), (10, 22)):
        commands = {"delete_id": delete_id, "split_id": split_id, "max_post_edits": edits, "stop": "never"}
        for row in trace("llada2.2", commands, alignment):
            assert row[-1].masks == 0
            for taken in steps_by_block(row).values():
                assert len(taken) <= BLOCK + edits + AFTER_EDITS["llada2.2"]


@pytest.mark.parametrize("alignment", ["abs", "rel"])
@pytest.mark.parametrize("name", [name for name in PLANNED if name in PRESETS and PRESETS[name].visibility == "block"])
def test_a_block_costs_at_most_its_masks_a_commit_and_a_prefill(name, alignment):
    if name in OWN_BOUND:
        pytest.skip(f"{name} edits its blocks; its bound is a test of its own")
    blocks = max(NEW) // BLOCK + 2
    for row in trace(name, {}, alignment):
        assert row[-1].nfe <= row[0].masks + blocks + 1


class Opened(Exception):
    """A decode, stopped before its first step."""


@pytest.mark.parametrize("alignment", ["abs", "rel"])
@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.supported])
def test_the_safety_net_lies_above_the_bound(name, alignment, monkeypatch):
    """What ends a decoder that makes no progress must not end one that takes as long as it may, however many blocks
    there are."""

    def stop(self):
        raise Opened(self.decode)

    monkeypatch.setattr(Rounds, "run", stop)
    preset, length = PRESETS[name], 100
    model = model_of(preset.visibility, alignment, "previous" if preset.first_token else "self")
    for options in variants(name) if preset.drafts == 1 else [{}]:
        if preset.visibility == "full" and "block_length" in preset.options() and preset.schedule != "canvas":
            options = {"block_length": BLOCK, **options}
        if name == "llada2.2":
            options = {"delete_id": 2, "split_id": 3, **options}
        with pytest.raises(Opened) as opened:
            dlm_fast.generate(model, random_prompts([6]), max_new_tokens=length, preset=name, **options)
        (decode,) = opened.value.args
        # Prompt tokens may begin the first block, and the last be cut short.
        blocks = -(-length // decode.plan.block_length) + 1
        edits = max((getattr(policy, "max_post_edits", 0) for policy in decode.plan.preset.policies), default=0)
        in_a_block = dict.fromkeys(("rcr", "dream-origin"), int(decode.sampling.steps[0]))
        in_a_block |= {editor: decode.plan.block_length + edits + after for editor, after in AFTER_EDITS.items()}
        bound = blocks * in_a_block[name] if name in in_a_block else length
        assert decode.sampling.max_steps[0] >= bound, options


def test_every_preset_has_a_bound():
    assert set(PRESETS) <= set(WRITES_EVERY_STEP) | set(OWN_BOUND)


@pytest.mark.parametrize(
    "preset, options",
    [
        ("dinfer-credit", {"rule": "quota", "steps_per_block": 8, "credit_weight": 5.0}),
        ("dinfer-credit", {"rule": "threshold", "threshold": 0.99, "credit_weight": 5.0}),
    ],
)
def test_a_bias_counts_in_what_orders_as_in_what_is_tested(preset: str, options: dict) -> None:
    """Where there is no rank, the score orders. Named as the rank, the score must order in the same way, biased as it
    is."""
    prompts = random_prompts([3, 2, 4, 1], 5)
    for seed in range(4):
        model = toy("full", seed=seed)
        runs = [
            dlm_fast.generate(model, prompts, preset=preset, block_length=8, max_new_tokens=16, **options, **rank)
            for rank in ({}, {"rank": "confidence"})
        ]
        for name in ("unmask_step", "canvas"):
            ours, theirs = (torch.cat(getattr(run, name)) for run in runs)
            assert torch.equal(ours, theirs), f"{name}, seed {seed}"
