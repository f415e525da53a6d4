"""Options for what a published loop does: LLaDA's two EOS options, Fast-dLLM's last rank, RND1's schedule."""

from __future__ import annotations

import collections

import pytest
import torch
from helpers import EOS, MASK, VOCAB, native_model, random_prompts, toy

import dlm_fast
from dlm_fast.policies import AdaptiveThreshold
from dlm_fast.presets import PRESETS

ENDS = (EOS, *range(2, 12))


def steps_of(out) -> list[int]:
    """How many tokens each denoise step of the first row wrote."""
    counts = collections.Counter(step for step in out.unmask_step[0].tolist() if step >= 0)
    return [counts[step] for step in range(max(counts) + 1)]


@pytest.mark.parametrize(
    "name, visibility, facts",
    [
        ("llada", "full", {}),
        ("dream", "full", {"logits_row": "previous"}),
        ("wino", "full", {}),
        ("klass", "full", {}),
        ("eb-sampler", "full", {}),
        ("prophet", "full", {}),
        ("ccd-ds", "full", {}),
        ("sdar", "block", {}),
        ("d2f", "block", {}),
        ("freedave-block", "block", {}),
        ("llada2.1", "block", {}),
        ("fast-dllm-v2", "block", {"logits_row": "previous"}),
        ("nemotron", "block", {"causal_prefix": True}),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_excluded_eos_is_never_written(name, visibility, facts, temperature):
    """The EOS is the first of the ids that end a text; another one, as the end of a turn, may be written (LLaDA)."""
    if PRESETS[name].drafts > 1 and temperature:
        pytest.skip("drafts are greedy")
    options = {"preset": name, "max_new_tokens": 16, "temperature": temperature}
    prompts = [[20, 21], [30, 31, 32, 33, 34]]

    def written(out) -> list[int]:
        return [token for row, p in zip(out.canvas, prompts) for token in row.tolist()[len(p) :]]

    plain = dlm_fast.generate(toy(visibility, eos=(), **facts), prompts, **options)
    (end, _), (turn, _) = collections.Counter(written(plain)).most_common(2)
    model = toy(visibility, eos=(end, turn), **facts)
    out = dlm_fast.generate(model, prompts, exclude_eos=True, **options)
    assert end not in written(out)
    only = dlm_fast.generate(toy(visibility, eos=(end,), **facts), prompts, exclude_eos=True, **options)
    assert only.finish == ["length"] * 2 and all(len(ids) == 16 for ids in only.sequences)


def test_the_end_of_a_turn_is_no_excluded_eos():
    prompts, options = random_prompts([4] * 12), {"preset": "llada", "max_new_tokens": 8, "stop": "never"}
    out = dlm_fast.generate(toy("full", eos=(EOS, *range(2, 16))), prompts, exclude_eos=True, **options)
    assert "eos" in out.finish and not any(EOS in row.tolist() for row in out.canvas)


@pytest.mark.parametrize("name", ["klass", "eb-sampler", "llada"])
def test_an_excluded_eos_leaves_the_kernels_numbers_as_the_references(name):
    pytest.importorskip("triton")
    settings = {"preset": name, "max_new_tokens": 6, "exclude_eos": True, "block_length": 6}
    settings |= {"kl_threshold": 1.0, "threshold": 0.1} if name == "klass" else {}
    ours, theirs = (
        dlm_fast.generate(toy("full", eos=ENDS, layers=1, backend=backend), [[20, 21, 22]], **settings)
        for backend in ("triton", "reference")
    )
    assert ours.canvas[0].tolist() == theirs.canvas[0].tolist() and ours.nfe == theirs.nfe
    torch.testing.assert_close(ours.confidence[0], theirs.confidence[0], rtol=1e-4, atol=1e-5)


def test_an_excluded_eos_leaves_the_softmax_and_a_banned_one_stays_in_it():
    native, prompt = native_model(), random_prompts([3])[0]
    with torch.no_grad():
        row = native(torch.tensor([[*prompt, MASK]]), attention_mask=torch.zeros(1, 1, 4, 4)).logits[0, 3]
    end = int(row.index_fill(0, torch.tensor([MASK]), -torch.inf).argmax())
    model = toy("full", eos=(end, EOS))
    token = int(row.index_fill(0, torch.tensor([MASK, end]), -torch.inf).argmax())
    without = row.index_fill(0, torch.tensor([end]), -torch.inf)

    def decoded(**options) -> tuple[int, float]:
        out = dlm_fast.generate(model, [prompt], preset="llada", max_new_tokens=1, **options)
        return out.canvas[0][3].item(), out.confidence[0][3].item()

    excluded, banned = decoded(exclude_eos=True), decoded(banned_token_ids=[end])
    assert excluded == (token, pytest.approx(without.softmax(-1)[token].item(), abs=1e-5))
    assert banned == (token, pytest.approx(row.softmax(-1)[token].item(), abs=1e-5))
    assert excluded[1] > banned[1] + 1e-3


def test_a_suppressed_eos_comes_last_and_passes_no_test():
    out = dlm_fast.generate(
        toy("full", eos=ENDS), [[20, 21, 22]], preset="llada", suppress_eos=True, max_new_tokens=12, stop="never"
    )
    tokens, steps = out.canvas[0].tolist()[3:], out.unmask_step[0].tolist()[3:]
    written = [token for _, token in sorted(zip(steps, tokens))]
    assert any(token in ENDS for token in written)
    assert written[0] not in ENDS and written[-1] in ENDS
    both = dlm_fast.generate(
        toy("full", eos=ENDS), [[20, 21, 22]], preset="llada", suppress_eos=True, exclude_eos=True, max_new_tokens=12,
        stop="never",
    )  # fmt: skip
    order = [token for _, token in sorted(zip(both.unmask_step[0].tolist()[3:], both.canvas[0].tolist()[3:]))]
    assert ENDS[0] not in order and order[0] not in ENDS and order[-1] in ENDS
    bold = {"preset": "fast-dllm", "block_length": 12, "threshold": 0.0, "max_new_tokens": 12, "stop": "never"}
    together = dlm_fast.generate(toy("full", eos=ENDS), [[20, 21, 22]], **bold)
    apart = dlm_fast.generate(toy("full", eos=ENDS), [[20, 21, 22]], suppress_eos=True, **bold)
    assert steps_of(together) == [12] and len(steps_of(apart)) > 1


@pytest.mark.parametrize(
    "given, message",
    [
        ({"logits_eos_inf": True}, "unknown options logits_eos_inf; logits_eos_inf is here exclude_eos; options of"),
        ({"confidence_eos_eot_inf": True}, "confidence_eos_eot_inf is here suppress_eos; options of preset llada"),
        (
            {"gen_length": 9, "steps": 3},
            "gen_length is here max_new_tokens; steps is here steps_per_block",
        ),
        ({"published_factor": True}, r"published_factor has no effect with rule='quota' \(preset llada\)"),
        (
            {"rule": "factor", "published_factor": True, "min_unmask": None},
            "published_factor goes without a quota, got min_unmask=None",
        ),
        ({"remainder": "last"}, "remainder must be one of first, even, got remainder='last'"),
        (
            {"remainder": "even"},
            "remainder has no effect with .*: it is read by rule 'quota', or min_unmask=None, with",
        ),
    ],
)
def test_a_name_of_another_loop_and_an_option_without_effect_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        dlm_fast.generate(toy("full"), [[5, 6]], preset="llada", max_new_tokens=4, **given)


def test_the_published_factor_rule_takes_the_last_rank_though_it_fails():
    # Nothing of a toy passes so small a factor: one token a step, and as published the last two together.
    model, prompt = toy("full", eos=()), random_prompts([3])
    settings = {"preset": "fast-dllm-factor", "factor": 1e-6}
    for new, ours, published in ((1, [1], [1]), (2, [1, 1], [2]), (4, [1, 1, 1, 1], [1, 1, 2])):
        out = dlm_fast.generate(model, prompt, max_new_tokens=new, **settings)
        theirs = dlm_fast.generate(model, prompt, max_new_tokens=new, published_factor=True, **settings)
        assert (steps_of(out), steps_of(theirs)) == (ours, published)
    # A policy that moves the factor is asked first.
    adaptive = dlm_fast.generate(
        model, prompt, max_new_tokens=4, published_factor=True, policy=AdaptiveThreshold(), **settings
    )
    assert steps_of(adaptive) == [1, 1, 2]


def test_an_even_remainder_is_spread_over_all_steps():
    settings = {"preset": "llada", "block_length": 7, "max_new_tokens": 7, "steps_per_block": 5}
    model, prompt = toy("full", eos=()), random_prompts([3])
    assert steps_of(dlm_fast.generate(model, prompt, **settings)) == [2, 2, 1, 1, 1]
    assert steps_of(dlm_fast.generate(model, prompt, remainder="even", **settings)) == [2, 1, 2, 1, 1]
    # More steps than masks: one token a step.
    many = {**settings, "steps_per_block": 50}
    assert steps_of(dlm_fast.generate(model, prompt, remainder="even", **many)) == [1] * 7
    rnd1 = dlm_fast.generate(model, prompt, preset="rnd1", steps_per_block=3, max_new_tokens=VOCAB)
    assert steps_of(rnd1) == [VOCAB // 3] * 3
    block = toy("block", block_length=5, eos=())
    of_block = {"preset": "sdar", "max_new_tokens": 5, "steps_per_block": 3}
    assert steps_of(dlm_fast.generate(block, prompt, remainder="even", **of_block)) == [2, 2, 1]
