"""Presets beside the loops that their authors publish: numbers of those loops, worked out by hand."""

from __future__ import annotations

import types

import pytest
import torch
from helpers import EOS, MASK, VOCAB, random_prompts, toy

import dlm_fast
from dlm_fast.policies.indel import InsertDelete, _Row, _Slot
from dlm_fast.presets import PRESETS

# Of 9 positions, 6 the prompt, a token a forward. delay 1: the first forward caches the prompt, the second recomputes
# the block, the third everything. delay 2: the second caches the prompt, so it is of everything too.
D3LLM = [
    (1, None, 9 + 3 + 3),
    (1, 3, 9 + 3 + 9),
    (1, 2, 9 + 9 + 3),
    (2, None, 9 + 9 + 3),
    (2, 3, 9 + 9 + 9),
    (3, None, 9 + 9 + 9),
]


@pytest.mark.parametrize("delay, interval, positions", D3LLM)
def test_d3llm_counts_forwards_from_one_and_waits_before_it_caches_the_prompt(delay, interval, positions):
    options = dict(block_length=3, max_new_tokens=3, threshold=-1e-9, stop="never")
    out = dlm_fast.generate(
        toy("full"), random_prompts([6]), preset="d3llm", commit_delay=delay, refresh_interval=interval, **options
    )
    assert (out.nfe, out.query_tokens) == ([3], [positions])


def test_d3llm_commits_a_block_by_the_forward_that_recomputes_it():
    # 2 + 2 + 2 positions, a token a forward, blocks opened one after the other. Forward 1 caches the prompt, 2 finishes
    # the first block, 3 recomputes everything while it waits, 4 recomputes both blocks and commits it.
    options = dict(block_length=2, max_new_tokens=4, threshold=-1e-9, append_threshold=1.0, stop="never")
    out = dlm_fast.generate(
        toy("full"), random_prompts([2]), preset="d3llm", commit_delay=1, refresh_interval=None, **options
    )
    assert (out.nfe, out.query_tokens) == ([4], [6 + 4 + 6 + 4])


# A block of 4 over 2 steps writes 2 and 2, though the prompt leaves it 1 to 3 masks: the schedule is of a block's
# length.
SHARED = [(2, [0, 0], 1), (1, [0, 0, 1], 2), (3, [0], 1), (4, [0, 0, 1, 1], 2)]
BY_QUOTA = {
    "sdar": {},
    "sdar-sequential": {},
    "sdar-dynamic": {"threshold": 1.0},
    "trado": {"threshold": 1.0},
    "llada2-quota": {"threshold": 1.0},
}


@pytest.mark.parametrize("preset", BY_QUOTA)
@pytest.mark.parametrize("given, steps, denoised", SHARED)
def test_a_block_that_the_prompt_shares_is_scheduled_as_a_whole_one(preset, given, steps, denoised):
    model = toy("block", block_length=4, block_alignment="abs")
    options = {"preset": preset, "steps_per_block": 2, "stop": "never", "cache": "commit"} | BY_QUOTA[preset]
    out = dlm_fast.generate(model, random_prompts([given]), max_new_tokens=len(steps), **options)
    assert sorted(out.unmask_step[0].tolist()[given:]) == steps
    assert out.nfe == [denoised + (given == 4)]  # and a prefill where the prompt is a block of its own


def test_a_later_block_with_given_tokens_is_scheduled_as_a_whole_one():
    # Blocks [0, 4), [4, 8) and [8, 9): each takes 2, 1 and 1 positions, as far as it has masks.
    canvas = [[5, 6, MASK, MASK, MASK, 7, MASK, MASK, MASK]]
    model = toy("block", block_length=4, block_alignment="abs")
    out = dlm_fast.generate(model, canvas=canvas, preset="sdar-sequential", steps_per_block=3, stop="never")
    assert out.unmask_step[0].tolist() == [-1, -1, 0, 0, 1, -1, 1, 2, 3]


def test_what_a_quota_is_of_is_an_option():
    model, prompt = toy("block", block_length=4, block_alignment="abs"), random_prompts([2])
    options = dict(preset="sdar", steps_per_block=2, max_new_tokens=2, quota_of="masks")
    assert sorted(dlm_fast.generate(model, prompt, **options).unmask_step[0].tolist()[2:]) == [0, 1]
    # 3 masks over 3 steps are 1, 1, 1; a block of 4 is 2, 1, 1.
    canvas = [[MASK, 5, MASK, MASK, MASK]]
    for quota_of, steps in (("masks", [0, 1, 2]), ("block", [0, 0, 1])):
        out = dlm_fast.generate(
            toy("full"), canvas=canvas, preset="llada", block_length=4, steps_per_block=3, quota_of=quota_of
        )
        assert sorted(step for step in out.unmask_step[0].tolist()[:4] if step >= 0) == steps
    with pytest.raises(ValueError, match="quota_of must be one of masks, block, got quota_of='steps'"):
        dlm_fast.generate(model, prompt, preset="sdar", quota_of="steps")


# 40 positions, 8 the prompt, two blocks of 16, a token a step; denoise steps compute the block and one position on
# either side, where there is one: 18 and 17.
@pytest.mark.parametrize("warmup, full", [(0, 1), (1, 2), (2, 3), (20, 21)])
def test_dinfer_warms_up_by_forwards_that_fill_no_cache_and_then_fills_it(warmup, full):
    options = dict(block_length=16, threshold=1.0, vicinity=1, max_new_tokens=32, stop="never")
    out = dlm_fast.generate(toy("full"), random_prompts([8]), preset="dinfer-vicinity", warmup_steps=warmup, **options)
    first = min(full, 16)
    second = max(full - 16, 1)  # its first forward is full anyway
    assert out.nfe == [32]
    assert out.query_tokens == [first * 40 + (16 - first) * 18 + second * 40 + (16 - second) * 17]


# LLaDA2.2's insert and delete, step by step: a block, what each position prefers (best first), and what SGLang makes of
# them.
DELETE, SPLIT = 2, 3


def edited(
    tokens: list[int], prefers: list[list[int]], original: set[int], seen: bool = False, history: dict | None = None
) -> tuple[list[int], dict[int, set[int]]]:
    """One step of a block whose first position is given: the tokens of the block after the step, and what was written
    at each position so far."""
    policy = InsertDelete(delete_id=DELETE, split_id=SPLIT)
    row = _Row([_Slot(token, j == 0, j in original, -1, 0.0) for j, token in enumerate(tokens)])
    row.seen |= {tuple(tokens)} if seen else set()
    row.history.update({j: set(drawn) for j, drawn in (history or {}).items()})
    logits = torch.zeros(1, len(tokens), VOCAB)
    for j, ids in enumerate(prefers):
        # The later a position, the surer it is.
        logits[0, j, ids] = torch.tensor([4.0 + j - rank for rank in range(len(ids))])
    view = types.SimpleNamespace(
        setting=types.SimpleNamespace(
            mask_id=MASK,
            sampling=types.SimpleNamespace(banned=torch.tensor([MASK]), eos=torch.tensor([EOS]), no_eos_before=None),
        ),
        state=types.SimpleNamespace(step=torch.tensor([7])),
        position=torch.arange(len(tokens))[None],
        logits=logits,
    )
    policy._step(view, row, 0, len(tokens), threshold=0.5)
    return [slot.token for slot in row.slots], dict(row.history)


def test_llada22_remembers_what_was_written_at_a_place_not_what_a_token_has_been():
    # 5 is deleted and 6, now 7, moves to its place: that has had 5 and DELETE written, the next one 6 and 7, and the
    # last one 8.
    drawn = {1: {5}, 2: {6}, 3: {8}}
    tokens, history = edited([9, 5, 6, 8], [[9], [DELETE], [7], [8]], original={1, 2, 3}, history=drawn)
    assert tokens == [9, 7, 8, MASK] and history == {1: {5, DELETE}, 2: {6, 7}, 3: {8}}
    # And nothing of what it held without being written: a prompt's token, the mask.
    assert edited([9, MASK, MASK], [[9], [5], [6]], original={1, 2})[1] == {1: {5}, 2: {6}}


def test_llada22_leaves_a_content_that_comes_again_by_its_least_certain_change():
    prefers = [[9], [5, 6], [7, 8]]
    assert edited([9, 4, 4], prefers, original={1, 2})[0] == [9, 5, 7]
    assert edited([9, 4, 4], prefers, original={1, 2}, seen=True, history={1: {5}, 2: {7}})[0] == [9, 6, 7]
    # An introduced mask that is predicted to stay one is no change, however uncertain.
    tokens, history = edited(
        [9, MASK, 4], [[9], [MASK, 6], [7, 8]], original={2}, seen=True, history={1: {MASK}, 2: {7}}
    )
    assert tokens == [9, MASK, 8] and history == {1: {MASK}, 2: {7, 8}}


def test_llada22_never_leaves_an_original_mask_a_mask():
    tokens, history = edited([9, MASK, 4], [[9], [5, MASK, 6], [4]], original={1}, seen=True, history={1: {5}})
    assert tokens == [9, 6, 4] and history == {1: {5, 6}}


def test_llada22_edits_as_long_as_sglang_unless_told_otherwise():
    assert PRESETS["llada2.2"].options()["max_post_edits"] == 16


def test_llada21s_repeat_penalty_looks_inside_the_block_only():
    # Blocks of one position have nothing to their left; in blocks of two, every second position has.
    def decoded(length: int, penalty: float) -> list[int]:
        model = toy("block", block_length=length, block_alignment="abs", seed=1)
        options = dict(preset="llada2.1", repeat_penalty=penalty, max_new_tokens=6, stop="never")
        return dlm_fast.generate(model, random_prompts([2], 1), **options).canvas[0].tolist()[2:]

    assert decoded(1, 1e3) == decoded(1, 0.0) == [6] * 6
    assert decoded(2, 1e3) != decoded(2, 0.0)
