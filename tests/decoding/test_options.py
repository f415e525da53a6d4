"""An option that is given is read: what a decoder does not read is refused, what a decoder reads changes some decode,
and bounds are named.

The first claim is one table (`dlm_fast/presets/options.py`). Whether the table is true is tried out here: for every
preset and every option, an option that is accepted must change some decode of a toy, and one that is refused must
change none. The default suite tries one pair in 41; this command tries all pairs:

    python -m pytest -m campaign tests/decoding/test_options.py
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import MASK, native_model, options_of, random_prompts, toy
from variants import variants

import dlm_fast
from dlm_fast import policies
from dlm_fast.decoding import measure
from dlm_fast.limits import MAX_DRAFTS, MAX_WHOLE
from dlm_fast.patching import attach
from dlm_fast.presets import FIELDS, PRESETS, Preset, options, resolve

DECODERS = [name for name, preset in PRESETS.items() if preset.supported]
EOS = (1, 2, 3)
PROMPTS, NEW = [3, 1, 6], [7, 11, 3]
# Options for presets that the options of other tests never bring to what a number decides.
TRIED = {
    "ccd": {"block_length": 9, "steps_per_block": None},
    "ccd-ds": {"block_length": 9, "steps_per_block": None},
    "fast-dllm-v2": {"sub_block_length": 4},
    "sched": {"high": 1.5, "low": 0.2, "max_change": 1.0, "patience": 0},
    "dinfer-vicinity": {"vicinity": 1},
    "wino": {"verify_threshold": 0.6, "block_length": 11},
    "local-leap": {"threshold": 0.5, "relaxed_threshold": 0.05, "distance": 2},
    "dllm-var": {"append_threshold": 0.3},
}


def leftmost(view: policies.View, choice: policies.Choice) -> torch.Tensor:
    return view.best(torch.ones_like(view.step), score=-view.position.float())


# Values to try, the preset's own among them or not.
VALUES: dict[str, tuple] = {
    "schedule": ("block", "canvas", "pipeline"),
    "block_length": (1, 3),
    "sub_block_length": (1, 2, 3),
    "horizon": (None, 0, 1, 5),
    "vicinity": (0, 2),
    "warmup_steps": (0, 3),
    "refresh_interval": (None, 1, 2),
    "commit_delay": (1, 3),
    "append_threshold": (0.1, 1.0),
    "activate_threshold": (0.0, 0.3, 1.0),
    "scope": (None, "first", "each"),
    "cache": ("none", "prefix", "dual", "once", "scattered", "commit", "fused", "delayed"),
    "rule": ("quota", "threshold", "factor", "entropy", "schedule", "bernoulli"),
    "score": ("confidence", "margin", "neg_entropy", "random", "position"),
    "rank": (None, "confidence", "margin", "neg_entropy", "random", "position"),
    "order_temperature": (0.5, 5.0),
    "threshold": (0.02, 0.2, 0.6, -2.5, -1.0),
    "factor": (0.1, 3.0),
    "entropy_bound": (0.0, 5.0),
    "run_threshold": (None, 0.0, 0.05, -3.0),
    "min_unmask": (None, 1, 2, 3),
    "steps_per_block": (1, 2, 9),
    "quota_of": ("masks", "block"),
    "remainder": ("first", "even"),
    "last_block": ("crop", "whole"),
    "schedule_eps": (0.01, 0.7),
    "cfg_scale": (0.0, 1.5),
    "policies": ((), (policies.Function(leftmost),)),
    "drafts": (1, 3),
    "stop": ("never", "after_block", "closed", "all_stop", "appends", "fill"),
    "slack": (0.0, 0.5),
    "alpha": (0.0, 0.9),
    "relaxed_threshold": (0.0, 0.5),
    "distance": (0, 1),
    "sigma": (0.3, 50.0),
    "kl_threshold": (1e-6, 10.0),
    "kl_history": (1, 3),
    "credit_decay": (0.0, 1.0),
    "credit_power": (0.1, 3.0),
    "credit_weight": (0.0, 5.0),
    "answer_start": (None, 0, 4),
    "gap_thresholds": ((0.3, 0.2, 0.1), (99.0, 99.0, 99.0)),
    "curve": ("cosine", "linear", "exponential"),
    "high": (0.5, 50.0),
    "low": (0.05, 3.0),
    "rate": (0.1, 20.0),
    "min_progress": (0.0, 0.8),
    "patience": (0, 2),
    "max_change": (0.0, 1.0),
    "reduce": ("mean", "median", "quantile", "min"),
    "verify_threshold": (0.0, 0.3, 1.0),
    "edit_threshold": (0.0, 0.3, 1.0),
    "max_post_edits": (0, 1, 5),
    "repeat_penalty": (0.0, 5.0),
    "delete_id": (2, 7, 15, 29),
    "split_id": (6, 25, 44, 47),
    "refresh_entropy": (0.0, 9.0),
    "accept_threshold": (0.1, 0.9),
}
FLAGS = (False, True)


@functools.cache
def model_of(visibility: str, logits_row: str, seed: int, sharp: bool):
    """A toy; a sharp toy is so sure of everything that its confidences are 1 and its entropies 0."""
    model = copy.deepcopy(native_model(seed=seed, heads=2, kv_heads=1, layers=2))
    if sharp:
        with torch.no_grad():
            model.lm_head.weight.mul_(1000)
    diffusion = dlm_fast.DiffusionConfig(
        mask_token_id=MASK,
        eos_token_ids=EOS,
        visibility=visibility,
        block_length=4,
        block_alignment="rel",
        logits_row=logits_row,
    )
    attach(model, backend="reference", diffusion=diffusion, plain_mode=visibility)
    return model


def row_of(name: str, option: str) -> str:
    return "previous" if PRESETS[name].first_token or option == "first_token" else "self"


def contexts(name: str, option: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Options of the preset, and arguments of `generate`, under which to try an option."""
    preset, needed = PRESETS[name], options_of(name)
    row = row_of(name, option)
    eager, shy = ({**needed, **variant} for variant in variants(name))
    eager, shy = eager | TRIED.get(name, {}), shy | TRIED.get(name, {})
    numbers = preset.options()
    if option == "strict_reference" and preset.rule == "schedule":
        eager["steps_per_block"] = 20
    if option in ("quota_of", "remainder") and preset.drafts == 1:
        eager["steps_per_block"] = shy["steps_per_block"] = needed["steps_per_block"] = 3
        if preset.schedule != "canvas":
            # A whole block behind a prompt of its own has as many masks as positions.
            eager["last_block"] = shy["last_block"] = needed["last_block"] = "crop"
    if option == "remainder" and preset.drafts == 1:
        # Seven over five steps are 2, 2, 1, 1, 1 or 2, 1, 2, 1, 1; four over three are the same either way.
        changes = {"steps_per_block": 5} | ({"block_length": 7} if preset.schedule != "canvas" else {})
        eager, shy, needed = eager | changes, shy | changes, needed | changes
    if option == "rate":
        eager["curve"] = shy["curve"] = "exponential"
    yield eager, {"row": row, "seed": 0}
    yield shy, {"row": row, "seed": 0}
    certain = {"slack": 0.0, "relaxed_threshold": 1.0}
    certain = {**needed, **{n: v for n, v in certain.items() if n in numbers}}
    if preset.rule == "threshold":
        certain["threshold"] = 0.0 if preset.score == "neg_entropy" else 1.0
    yield certain, {"row": row, "seed": 0, "sharp": True}
    if not any(policy.greedy_only for policy in preset.policies):
        yield eager, {"row": row, "seed": 0, "top_k": 4, "top_p": 0.6}
    if preset.drafts == 1 and not any(policy.greedy_only for policy in preset.policies):
        yield eager, {"row": row, "seed": 0, "temperature": [0.7, 1.5, 0.0], "top_k": 3, "top_p": 0.7}
        yield shy, {"row": row, "seed": 2, "temperature": [0.0, 0.7, 1.5], "top_k": 8, "top_p": 0.5}


DECODES: dict[Any, Any] = {}


def outcome(preset: Preset, row: str, seed: int, sharp: bool = False, **arguments: Any) -> Any:
    """What a decode gives, or the error that says why there is none."""
    key = (repr(preset), row, seed, sharp, repr(arguments))
    if key not in DECODES:
        try:
            model = model_of(preset.visibility, row, seed, sharp)
            out = dlm_fast.generate(
                model, random_prompts(PROMPTS, seed), preset=preset, max_new_tokens=NEW, **arguments
            )
        except (ValueError, dlm_fast.DecodeError) as error:
            DECODES[key] = str(error)
        else:
            rows = [tuple(t.tolist()) for values in (out.canvas, out.unmask_step, out.confidence) for t in values]
            DECODES[key] = (rows, out.nfe, out.query_tokens)
    return DECODES[key]


def values_of(option: str, preset: Preset) -> tuple:
    if option == "head":
        return tuple(lambda *seen, scale=scale: scale * seen[0] for scale in (0.3, 3.0))
    return VALUES.get(option, FLAGS)


def check_pair(name: str, option: str) -> None:
    """If the option is accepted, some value changes some decode, unless the preset can have no other value. If the
    option is refused, no value changes any decode."""
    base, accepted, changed = PRESETS[name], False, False
    for given, arguments in contexts(name, option):
        before = base.replace(**given)
        for value in values_of(option, base):
            if before.options()[option] == value:
                continue
            try:
                after = before.replace(**{option: value})
            except ValueError:
                continue
            ours, theirs = outcome(after, **arguments), outcome(before, **arguments)
            if isinstance(theirs, str) or isinstance(ours, str):
                continue
            if options.unread(after, [option], base):
                assert ours == theirs, f"{name}: {option}={value!r} is refused and has an effect, {given}, {arguments}"
                break
            accepted = True
            changed |= ours != theirs
        if changed:
            return
    assert changed or not accepted, f"{name}: {option} is accepted and has no effect"


def has_alternative(name: str, option: str) -> bool:
    """Whether the preset can have another value of the option in any context; where it cannot, there is nothing to
    compare."""
    for given, _ in contexts(name, option):
        before = PRESETS[name].replace(**given)
        for value in values_of(option, before):
            if before.options()[option] != value:
                with contextlib.suppress(ValueError):
                    before.replace(**{option: value})
                    return True
    return False


PAIRS = [(name, option) for name in DECODERS for option in PRESETS[name].options()]
# The default run tries one pair of every 41, the campaign all pairs.
SAMPLE = [next(pair for pair in PAIRS[place:] if has_alternative(*pair)) for place in range(0, len(PAIRS) - 41, 41)]


@pytest.mark.parametrize("name, option", SAMPLE)
def test_what_is_accepted_has_an_effect_and_what_is_refused_has_none(name, option):
    check_pair(name, option)
    DECODES.clear()


@pytest.mark.campaign
@pytest.mark.parametrize("name", DECODERS)
def test_campaign_of_every_option_of_every_preset(name):
    wrong = []
    for preset, option in PAIRS:
        if preset == name:
            try:
                check_pair(name, option)
            except AssertionError as error:
                wrong.append(str(error).splitlines()[0])
    DECODES.clear()
    assert not wrong, "\n".join(wrong)


REFUSED = [
    (
        "llada",
        {"threshold": 0.1},
        "threshold has no effect with rule='quota' (preset llada): it is read by rule='threshold'",
    ),
    (
        "llada",
        {"steps_per_block": 2, "factor": 1.0},
        "factor has no effect with rule='quota' (preset llada): it is read by rule='factor'",
    ),
    ("fast-dllm", {"threshold": 0.9, "entropy_bound": 0.1}, "entropy_bound has no effect with rule='threshold'"),
    ("fast-dllm", {"steps_per_block": 4}, "steps_per_block has no effect with rule='threshold', min_unmask=1"),
    (
        "sdar",
        {"horizon": None},
        "horizon has no effect with visibility='block', schedule='block', cache='fused' (preset sdar)",
    ),
    ("d3llm", {"activate_threshold": 0.5}, "activate_threshold has no effect with schedule='pipeline', scope='first'"),
    (
        "klass",
        {"inclusive": True},
        "inclusive has no effect with policy KLStability (preset klass), which decides that itself",
    ),
    ("learned-commit", {"rule": "quota"}, "rule has no effect with policy LearnedCommit"),
    ("saber", {"threshold": 0.5}, "threshold has no effect with policy Backtrack"),
    ("sched", {"rate": 2.0}, "rate has no effect here (preset sched): it is read by curve='exponential'"),
    ("dream", {"block_length": 4}, "block_length has no effect with schedule='canvas' (preset dream)"),
    (
        "freedave",
        {"suppress_eos": True},
        "drafts verify the order of the score: no rank, suppress_eos or run_threshold",
    ),
    ("llada2.2", {"cache": "none"}, "policy InsertDelete goes with cache 'commit', got cache='none'"),
    (
        "entropy-cache",
        {"cache": "none"},
        "policy EntropyRefresh goes with cache 'prefix', 'dual' or 'scattered', got cache='none'",
    ),
    ("local-leap", {"rule": "quota"}, "policy LocalLeap goes with rule 'threshold', got rule='quota'"),
    ("ccd", {"sub_block_length": 2}, "policy ConsistentTrajectory chooses in the whole block, got sub_block_length=2"),
    (
        "fast-dllm",
        {"score": "position"},
        "rule='threshold' tests a score, and a position is none; to go from the left use rank='position'",
    ),
]


@pytest.mark.parametrize(
    "name, given, message", REFUSED, ids=[f"{name} {' '.join(given)}" for name, given, _ in REFUSED]
)
def test_what_would_change_nothing_is_refused_with_the_reason(name, given, message):
    with pytest.raises(ValueError) as caught:
        resolve(name, PRESETS[name].visibility, given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name, given",
    [
        ("llada", {"rule": "threshold", "threshold": 0.5}),
        ("sdar-dynamic", {"steps_per_block": 2}),  # its min_unmask is None: the quota
        ("dllm-rl", {"cache": "dual", "horizon": None}),  # this cache allows no horizon
        ("freedave", {"rule": "threshold", "threshold": 0.5, "drafts": 1}),  # this rule allows no drafts
        ("sched", {"curve": "exponential", "rate": 2.0}),
        ("prophet", {"rule": "threshold", "threshold": 0.5, "steps_per_block": 4}),  # the policy reads the schedule
    ],
)
def test_options_are_judged_together(name, given):
    assert resolve(name, PRESETS[name].visibility, given).options().items() >= given.items()


def test_a_policy_of_ones_own_may_read_any_option():
    chosen = resolve("llada", "full", {"threshold": 0.5, "inclusive": True}, policy=leftmost)
    assert chosen.threshold == 0.5


def test_every_option_has_an_entry():
    assert set(FIELDS) == set(options.RULE) | set(options.STRUCTURE)
    found = {cls for cls in vars(policies).values() if isinstance(cls, type) and issubclass(cls, policies.Policy)}
    assert found - {policies.Policy, policies.Function} == set(options.PARTS)


def test_a_preset_made_by_hand_may_hold_numbers_that_it_does_not_read_but_no_unknown_ones():
    assert PRESETS["llada"].replace(threshold=0.3).replace(rule="threshold").threshold == 0.3
    with pytest.raises(ValueError, match="preset llada: unknown options thresold; options are .*threshold"):
        PRESETS["llada"].replace(thresold=0.3)


EXTREME = (
    -1, 0, 2**31 - 1, 2**31, 2**32 + 3, 2**63, 10**400, 10**5000, MAX_WHOLE, MAX_WHOLE + 1, MAX_DRAFTS, -(2**40),
    1.5, 1e39, -1e39, 5e-324, float("inf"), float("-inf"), float("nan"),
    True, "x", None, [], (1,), {},
)  # fmt: skip


def readers(option: str) -> list[str]:
    """Two presets that read an option."""
    has = [name for name in DECODERS if option in PRESETS[name].options()]
    return [name for name in has if option == "rate" or not options.unread(PRESETS[name], [option], PRESETS[name])][:2]


@pytest.mark.parametrize("option", sorted({option for name in DECODERS for option in PRESETS[name].options()}))
def test_an_extreme_value_is_refused_by_name_or_decodes(option):
    for name in readers(option):
        preset, needed = PRESETS[name], options_of(name)
        curve = {"curve": "exponential"} if option == "rate" else {}
        for value in EXTREME:
            if option == "max_post_edits" and value == MAX_WHOLE:
                continue  # edits that go on for as long as they may
            model = model_of(preset.visibility, row_of(name, option), 0, False)
            try:
                out = dlm_fast.generate(
                    model, [[7, 8, 9]], preset=name, max_new_tokens=6, **{**needed, **curve, option: value}
                )
            except (ValueError, TypeError) as error:
                assert option in str(error), f"{name}: {error}"
                continue
            assert out.finish[0] in ("eos", "length")
            is_switch = isinstance(preset.options()[option], bool)
            assert not isinstance(value, bool) or is_switch or option == "head", (
                f"{name}: {option}={value!r} is accepted"
            )


@pytest.mark.parametrize(
    "name, given, message",
    [
        (
            "dllm-rl",
            {"horizon": 2**32 + 3},
            "preset dllm-rl: horizon must be a whole number <= 16777216 or None, got horizon=4294967299",
        ),
        (
            "fast-dllm-dual",
            {"vicinity": 2**31 - 1},
            "vicinity must be a whole number <= 16777216, got vicinity=2147483647",
        ),
        (
            "fast-dllm",
            {"threshold": 10**400},
            "threshold must be a number in [0, 1], got threshold=a whole number of 1329 bits",
        ),
        ("fast-dllm", {"threshold": 90}, "threshold must be a number in [0, 1], got threshold=90"),
        ("freedave", {"drafts": 10**6}, "drafts must be a whole number <= 64, got drafts=1000000"),
        ("local-leap", {"distance": True}, "policy LocalLeap: distance must be a whole number >= 0, got distance=True"),
        ("klass", {"kl_history": 0}, "policy KLStability: kl_history must be a whole number >= 1, got kl_history=0"),
        ("prophet", {"gap_thresholds": (1, 2)}, "gap_thresholds must be three numbers, got gap_thresholds=(1, 2)"),
        ("llada", {"suppress_eos": 1}, "suppress_eos must be true or false, got suppress_eos=1"),
        ("dream", {"schedule_eps": 0}, "schedule_eps must be a number > 0, got schedule_eps=0"),
        (
            "dream",
            {"order_temperature": 1e-30},
            "order_temperature must be 0 or in [1e-06, 1e+06], got order_temperature=1e-30",
        ),
    ],
)
def test_a_bound_is_named(name, given, message):
    with pytest.raises(ValueError) as caught:
        resolve(name, PRESETS[name].visibility, given)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["fast-dllm", "llada2", "dinfer-credit"])
def test_filters_change_nothing_at_temperature_0_and_cost_nothing(name, monkeypatch):
    model, given = toy(PRESETS[name].visibility), {**options_of(name), "threshold": 0.4}
    settings = {"preset": name, "max_new_tokens": NEW, **given}
    plain = dlm_fast.generate(model, random_prompts(PROMPTS), **settings)
    mixed = dlm_fast.generate(
        model, random_prompts(PROMPTS), **settings, temperature=[0.0, 1.0, 0.0], top_p=0.5, top_k=4
    )
    monkeypatch.setattr(dlm_fast.decoding.measure, "filtered", None)  # nothing is sorted
    filtered = dlm_fast.generate(model, random_prompts(PROMPTS), **settings, top_p=0.5, top_k=4)
    for field in ("canvas", "unmask_step", "confidence"):
        assert [row.tolist() for row in getattr(filtered, field)] == [row.tolist() for row in getattr(plain, field)]
        assert all(torch.equal(getattr(mixed, field)[row], getattr(plain, field)[row]) for row in (0, 2))
    assert filtered.nfe == plain.nfe and mixed.nfe[::2] == plain.nfe[::2]
    assert mixed.canvas[1].tolist() != plain.canvas[1].tolist()


@pytest.mark.parametrize("name", [name for name in DECODERS if PRESETS[name].greedy_filters])
def test_presets_whose_published_loop_filters_greedy_rows_say_so(name):
    assert {"dream", "dream-origin", "d2f", "rcr", "rnd1"} == {
        n for n, preset in PRESETS.items() if preset.greedy_filters
    }
    model, settings = toy(PRESETS[name].visibility), {"preset": name, "max_new_tokens": NEW, **options_of(name)}
    plain, filtered, told = (
        [row.tolist() for row in dlm_fast.generate(model, random_prompts(PROMPTS), **settings, **filters).confidence]
        for filters in ({}, {"top_p": 0.3}, {"top_p": 0.3, "greedy_filters": False})
    )
    assert plain == told != filtered


def test_the_nucleus_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()

    def kept(top_p: float = 1.0, top_k: int = 0, temperature: float = 1.0, drawn: bool = True) -> list[int]:
        sampling = types.SimpleNamespace(top_p=top_p, top_k=top_k)
        nothing = torch.full((1, 1), -1)
        heat, needed, narrowed = torch.tensor([temperature]), torch.tensor([True]), torch.tensor([drawn])
        left = measure.filtered(logits, PRESETS["llada"], sampling, heat, nothing, needed, narrowed)
        return (left > -torch.inf).nonzero()[:, 1].tolist()

    # An id stays while those better than it have at most top_p: the one that crosses it, and at equality the next one
    # too.
    assert kept(top_p=0.49) == [0] and kept(top_p=0.5) == [0, 1] and kept(top_p=0.51) == [0, 1]
    assert kept(top_p=0.75) == [0, 1, 2] and kept(top_p=0.8) == [0, 1, 2] and kept(top_p=0.875) == [0, 1, 2, 3]
    assert kept(top_p=0.5, temperature=0.25) == [0] and kept(top_k=3) == [0, 1, 2, 3] and kept(top_k=2) == [0, 1]
    assert kept(top_p=0.5, drawn=False) == [0, 1, 2, 3]
