"""Presets beside the loops that their authors publish, where a reader of those loops would expect them to agree. Worked out by hand."""

from __future__ import annotations

import dlm_fast
import pytest
from helpers import MASK, random_prompts, toy

# Of 9 positions, 6 the prompt, a token a forward. delay 1: the first forward caches the prompt, the second recomputes the block, the
# third everything. delay 2: the second caches the prompt, so it is of everything too.
D3LLM = [(1, None, 9 + 3 + 3), (1, 3, 9 + 3 + 9), (1, 2, 9 + 9 + 3), (2, None, 9 + 9 + 3), (2, 3, 9 + 9 + 9), (3, None, 9 + 9 + 9)]


@pytest.mark.parametrize("delay, interval, positions", D3LLM)
def test_d3llm_counts_forwards_from_one_and_waits_before_it_caches_the_prompt(delay, interval, positions):
    options = dict(block_length=3, max_new_tokens=3, threshold=-1e-9, stop="never")
    out = dlm_fast.generate(
        toy("full"), random_prompts([6]), preset="d3llm", commit_delay=delay, refresh_interval=interval, **options
    )
    assert (out.nfe, out.query_tokens) == ([3], [positions])


def test_d3llm_commits_a_block_by_the_forward_that_recomputes_it():
    # 2 + 2 + 2 positions, a token a forward, blocks opened one after the other. Forward 1 caches the prompt, 2 finishes the first block,
    # 3 recomputes everything while it waits, 4 recomputes both blocks and commits it.
    options = dict(block_length=2, max_new_tokens=4, threshold=-1e-9, append_threshold=1.0, stop="never")
    out = dlm_fast.generate(toy("full"), random_prompts([2]), preset="d3llm", commit_delay=1, refresh_interval=None, **options)
    assert (out.nfe, out.query_tokens) == ([4], [6 + 4 + 6 + 4])


# A block of 4 over 2 steps writes 2 and 2, though the prompt leaves it 2 or 3 masks: SDAR's and LLaDA2's schedule is of a block's length.
SHARED = [(2, [0, 0], 1), (1, [0, 0, 1], 2), (3, [0], 1), (4, [0, 0, 1, 1], 2)]
BY_QUOTA = {
    "sdar": {}, "sdar-dynamic": {"threshold": 1.0}, "sdar-sequential": {}, "trado": {"threshold": 1.0}, "llada2-quota": {"threshold": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("preset", BY_QUOTA)
@pytest.mark.parametrize("given, steps, denoised", SHARED)
def test_a_block_that_the_prompt_shares_is_scheduled_as_a_whole_one(preset, given, steps, denoised):
    model = toy("block", block_length=4, block_alignment="abs")
    options = {"preset": preset, "steps_per_block": 2, "stop": "never"} | BY_QUOTA[preset]
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
        out = dlm_fast.generate(toy("full"), canvas=canvas, preset="llada", block_length=4, steps_per_block=3, quota_of=quota_of)
        assert sorted(step for step in out.unmask_step[0].tolist()[:4] if step >= 0) == steps
    with pytest.raises(ValueError, match="quota_of must be one of masks, block, got quota_of='steps'"):
        dlm_fast.generate(model, prompt, preset="sdar", quota_of="steps")
