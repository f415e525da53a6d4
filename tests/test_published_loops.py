"""Presets beside the loops that their authors publish, where a reader of those loops would expect them to agree. Worked out by hand."""

from __future__ import annotations

import dlm_fast
import pytest
from helpers import random_prompts, toy

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
