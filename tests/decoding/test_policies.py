"""Presets and policies of one's own, and what makes no sense: it is refused, with its reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import MASK, options_of, random_prompts, toy

import dlm_fast
from dlm_fast import policies
from dlm_fast.presets import PRESETS, Preset, resolve


def test_a_preset_of_ones_own_runs_through_the_same_loop():
    mine = Preset(
        "mine",
        "here",
        "exact: nothing is approximated",
        "full",
        "none",
        rule="threshold",
        threshold=0.2,
        score="margin",
        block_length=3,
    )
    out = dlm_fast.generate(toy(), random_prompts([4]), preset=mine, max_new_tokens=7)
    assert out.preset == mine and MASK not in out.canvas[0]


# Policies of one's own


def test_a_function_may_say_which_positions_are_written():
    def rightmost(view, choice):
        return view.best(torch.ones_like(view.step), score=view.position.float())

    out = dlm_fast.generate(
        toy(eos=()), random_prompts([2, 5]), preset="llada", policy=rightmost, max_new_tokens=5, block_length=5
    )
    assert [steps[-5:].tolist() for steps in out.unmask_step] == [[4, 3, 2, 1, 0]] * 2


def test_a_function_may_return_a_score():
    out = dlm_fast.generate(
        toy(eos=()),
        random_prompts([3]),
        preset="llada",
        policy=lambda view, choice: -view.position.float(),
        max_new_tokens=5,
        block_length=5,
    )
    assert out.unmask_step[0][-5:].tolist() == [0, 1, 2, 3, 4]


def test_a_policy_may_keep_memory_between_steps():
    @dataclasses.dataclass(frozen=True)
    class EveryOther(policies.Policy):
        """Writes in odd steps of the row only."""

        def memory(self, setting, state):
            return {"calls": torch.zeros(state.tokens.shape[0], dtype=torch.int32)}

        def choose(self, view, choice):
            calls = view.keep("calls", view.memory["calls"] + 1)
            return choice.only(view.best((calls % 2 == 0).int()))

    out = dlm_fast.generate(
        toy(eos=()), random_prompts([3]), preset="llada", policy=EveryOther(), max_new_tokens=4, block_length=4
    )
    assert sorted(out.unmask_step[0][-4:].tolist()) == [1, 3, 5, 7] and out.nfe == [8]


def test_policies_compose_in_order():
    def invert(view, choice):
        return dataclasses.replace(choice, score=-choice.score)

    model, prompts = toy(eos=()), random_prompts([3])
    plain = dlm_fast.generate(model, prompts, max_new_tokens=6)
    twice = dlm_fast.generate(model, prompts, max_new_tokens=6, policy=[invert, invert])
    assert plain.canvas[0].tolist() == twice.canvas[0].tolist()


def test_a_policy_that_writes_nothing_raises_and_loses_nothing():
    def lazy(view, choice):
        return choice.only(view.eligible & (view.position < 5))

    with pytest.raises(
        dlm_fast.DecodeError,
        match=r"a policy must fill its blocks, got no end within max_steps=\d+ denoise steps in rows \[1\]",
    ) as error:
        dlm_fast.generate(toy(eos=()), random_prompts([2, 3]), policy=lazy, max_new_tokens=3, block_length=3)
    assert error.value.rows == [1] and error.value.output.finish == ["length", "error"]
    assert (error.value.output.unmask_step[1] >= 0).sum() == 2


BAD_POLICIES = [
    (
        lambda view, choice: None,
        TypeError,
        r"policy must return a Choice or a bool or float32 tensor \(1, 3\), got None",
    ),
    (lambda view, choice: view.eligible[:, :1], TypeError, r"policy must return .* got \(1, 1\), torch.bool"),
    (7, TypeError, r"policy must be a Policy, a function .* got policy=7"),
    (policies.Prophet, TypeError, r"policy must be a Policy, a function"),
]


@pytest.mark.parametrize("policy, kind, message", BAD_POLICIES)
def test_a_wrong_policy_is_named(policy, kind, message):
    with pytest.raises(kind, match=message):
        dlm_fast.generate(toy(), random_prompts([2]), policy=policy, max_new_tokens=3, block_length=3)


def test_an_exit_ends_the_row_where_its_masks_are_computed_and_the_block_elsewhere():
    eager = policies.Sched(high=0.0, low=0.0, max_change=1.0)
    for visibility, cache, expected in (
        ("full", "none", [1]),
        ("full", "prefix", [1]),
        ("full", "dual", [3]),
        ("block", "commit", [6]),
    ):
        options = {"block_length": 4} if visibility == "full" else {}
        out = dlm_fast.generate(
            toy(visibility, eos=()),
            random_prompts([3]),
            preset=None,
            policies=eager,
            cache=cache,
            max_new_tokens=10,
            **options,
        )
        assert out.nfe == expected, cache
        assert MASK not in out.canvas[0]


# What makes no sense is refused, with its reason

NONSENSE = [
    ("llada", {"cache": "fused"}, "cache='fused' of one block at a time needs a block-causal model"),
    ("d2f", {"cache": "commit"}, "schedule='pipeline' goes with cache"),
    ("d2f", {"rule": "quota"}, "needs a flat test"),
    ("d2f", {"stop": "all_stop"}, "which a pipeline does not wait for"),
    ("llada", {"stop": "fill"}, "stop='fill' is a pipeline's"),
    ("llada", {"rule": "schedule"}, "a schedule over the whole canvas"),
    ("dream", {"cache": "prefix"}, "schedule='canvas' goes with cache 'none', got cache='prefix'"),
    ("sdar", {"cfg_scale": 1.0}, "whose keys a block-causal cache does not hold"),
    ("sdar", {"cache": "prefix"}, "a block-causal model has an exact one"),
    ("rcr", {"stop": "closed"}, "before a token that would still be taken back"),
    ("rcr", {"cache": "scattered"}, "would leave its reused keys behind"),
    ("rcr", {"policies": (policies.RunningConfidence(), policies.JointThreshold())}, "would undo each other"),
    ("freedave", {"policies": policies.RunningConfidence(), "stop": "after_block"}, "assume that masks only shrink"),
    ("freedave", {"policies": policies.Sched()}, "lossless and an early exit is not"),
    ("freedave", {"steps_per_block": 2}, "verify a static decoder of one token per step"),
    ("freedave", {"cache": "none"}, "share the keys outside their block"),
    ("d2f", {"policies": policies.LocalLeap()}, "moves under the memory of a policy"),
    ("wino", {"cache": "dual"}, "shadow rows go with cache='none'"),
    ("fast-dllm", {"vicinity": 4}, "vicinity widens cache='dual'"),
    ("llada2.1", {"stop": "closed"}, "before a token that would still be taken back"),
    ("efficient-dlm", {"sub_block_cache": True}, "needs cache='commit' and a sub_block_length"),
]


@pytest.mark.parametrize("preset, options, reason", NONSENSE)
def test_a_combination_that_makes_no_sense_is_refused_with_its_reason(preset, options, reason):
    with pytest.raises(ValueError, match=reason):
        resolve(preset, PRESETS[preset].visibility, options)


@pytest.mark.parametrize(
    "preset, row, message",
    [("nbdiff", "self", "needs logits_row 'previous'"), ("wino", "previous", "needs logits_row 'self'")],
)
def test_a_preset_that_does_not_fit_the_models_rows_is_refused(preset, row, message):
    with pytest.raises(ValueError, match=message):
        dlm_fast.generate(toy(PRESETS[preset].visibility, logits_row=row), random_prompts([2]), preset=preset)


def test_a_family_that_is_not_here_yet_is_named():
    with pytest.raises(NotImplementedError, match="preset diffusion-gemma needs a uniform-noise model"):
        dlm_fast.generate(toy(), random_prompts([2]), preset="diffusion-gemma")
    assert PRESETS["diffusion-gemma"].unmask_rule().renoise


def test_drafts_refuse_a_temperature():
    with pytest.raises(ValueError, match=r"drafts are lossless for greedy decoding only, got temperature=0.5"):
        dlm_fast.generate(toy(), random_prompts([2]), preset="freedave", temperature=0.5)


@pytest.mark.parametrize("more", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}])
def test_insert_and_delete_refuse_what_they_would_ignore(more):
    with pytest.raises(ValueError, match="preset llada2.2 decodes greedily, got temperature="):
        dlm_fast.generate(toy("block"), random_prompts([2]), preset="llada2.2", **options_of("llada2.2"), **more)


@pytest.mark.parametrize(
    "preset, options, message",
    [
        ("learn2pd", {"block_length": 4}, "needs a trained filter, pass head="),
        ("learned-commit", {"block_length": 4}, "needs a trained policy, pass head="),
        ("dinfer-credit", {"block_length": 65}, "needs block_length <= 64, got block_length=65"),
        ("llada2.2", {}, "needs delete_id= and split_id="),
    ],
)
def test_what_a_policy_lacks_is_named_before_anything_is_decoded(preset, options, message):
    steps = []
    model = toy(PRESETS[preset].visibility)
    with pytest.raises(ValueError, match=message):
        dlm_fast.generate(model, random_prompts([2]), preset=preset, on_step=steps.append, max_new_tokens=70, **options)
    assert not steps
