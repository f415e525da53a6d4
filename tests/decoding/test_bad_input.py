"""What bad input must say: every argument of `generate` by its name, its rule and the value that was given."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import MASK, VOCAB, native_model, toy

import dlm_fast
from dlm_fast.patching import handle_of

BAD = [
    ({"preset": "lada"}, ValueError, r"preset must be one of llada, .* got preset='lada'"),
    ({"preset": 5}, TypeError, r"preset must be a name of dlm_fast.PRESETS or a Preset, got preset=5"),
    ({"on_step": 5}, TypeError, r"on_step must be a function of the state, got on_step=5"),
    ({"tokenizer": 5}, TypeError, r"tokenizer must be a transformers tokenizer, got tokenizer=5"),
    (
        {"preset": "sdar"},
        ValueError,
        r"preset sdar decodes models of visibility 'block', this model is 'full'; use llada",
    ),
    ({"block_length": 0}, ValueError, r"block_length must be a whole number >= 1 or None, got block_length=0"),
    ({"block_length": 2.5}, ValueError, r"block_length must be a whole number.*2.5"),
    ({"steps_per_block": 0}, ValueError, r"steps_per_block must be a whole number >= 1 or None, got steps_per_block=0"),
    ({"min_unmask": 0}, ValueError, r"min_unmask must be a whole number >= 1.*got min_unmask=0"),
    ({"threshold": -1.0}, ValueError, r"threshold must be a number in \[0, 1\], got threshold=-1.0"),
    ({"threshold": 90}, ValueError, r"threshold must be a number in \[0, 1\], got threshold=90"),
    ({"threshold": math.nan}, ValueError, r"threshold must be a number in \[0, 1\], got threshold=nan"),
    ({"factor": "x"}, ValueError, r"factor must be a finite number >= 0, got factor='x'"),
    (
        {"rule": "best"},
        ValueError,
        r"rule must be one of quota, threshold, factor, entropy, schedule, bernoulli, renoise, got rule='best'",
    ),
    ({"score": "p"}, ValueError, r"score must be one of .* got score='p'"),
    (
        {"stop": "soon"},
        ValueError,
        r"stop must be one of never, closed, after_block, all_stop, appends, fill, got stop='soon'",
    ),
    ({"cache": "commit"}, ValueError, r"cache='commit' needs a block-causal model"),
    ({"rule": "entropy", "score": "random"}, ValueError, r"rule='entropy' needs an order by score, got score='random'"),
    ({"blocklength": 8}, ValueError, r"unknown options blocklength; options of preset llada are .*block_length"),
    ({"prompts": [[]]}, ValueError, r"prompts\[0\] must have at least one token, got an empty one"),
    ({"prompts": [[5], [4, MASK]]}, ValueError, rf"prompts\[1\] must not contain the mask id {MASK}; .* canvas="),
    ({"prompts": [[VOCAB]]}, ValueError, rf"prompts\[0\] must hold ids in \[0, {VOCAB}\), got {VOCAB}"),
    ({"prompts": [[-1]]}, ValueError, r"prompts\[0\] must hold ids in .*got -1"),
    ({"prompts": ["hello"]}, ValueError, r"prompts of text need a tokenizer"),
    (
        {"prompts": [[{"role": "user", "content": "hi"}]]},
        ValueError,
        r"prompts of chats need a tokenizer with a chat template",
    ),
    ({"prompts": None}, ValueError, r"exactly one of prompts and canvas must be given"),
    ({"canvas": [[5, MASK]]}, ValueError, r"exactly one of prompts and canvas must be given"),
    (
        {"prompts": None, "canvas": [[]], "max_new_tokens": None},
        ValueError,
        r"canvas\[0\] must have at least one token, got an empty one",
    ),
    ({"max_new_tokens": 0}, ValueError, r"max_new_tokens must be a finite number >= 1, got max_new_tokens=0"),
    ({"max_new_tokens": 2.0}, TypeError, r"max_new_tokens must be a whole number, got max_new_tokens=2.0"),
    (
        {"max_new_tokens": [3, 4]},
        ValueError,
        r"max_new_tokens must be one value or one per row, got 2 values for 1 rows",
    ),
    (
        {"max_new_tokens": 1000},
        ValueError,
        r"prompts\[0\] with its new tokens must fit the model's 256 positions, got 1003",
    ),
    (
        {"max_new_tokens": 10**30},
        ValueError,
        r"prompts\[0\] with its new tokens must fit the model's 256 positions, got 10+3$",
    ),
    (
        {"max_new_tokens": {8: 1}},
        TypeError,
        r"max_new_tokens must be a whole number or one per row, got max_new_tokens=\{8: 1\}",
    ),
    ({"max_new_tokens": {8}}, TypeError, r"max_new_tokens must be in the order of the rows, got max_new_tokens=\{8\}"),
    (
        {"max_new_tokens": b"a"},
        TypeError,
        r"max_new_tokens must be a whole number or one per row, got max_new_tokens=b'a'",
    ),
    ({"max_new_tokens": True}, TypeError, r"max_new_tokens must be a whole number, got max_new_tokens=True"),
    (
        {"prompts": None, "canvas": [[5, MASK]], "max_new_tokens": None, "min_new_tokens": 2**40},
        ValueError,
        r"min_new_tokens must be at most the model's 256 positions, got 1099511627776 in row 0",
    ),
    ({"min_new_tokens": 99}, ValueError, r"min_new_tokens must be at most max_new_tokens, got 99 > 8 in row 0"),
    ({"temperature": -0.1}, ValueError, r"temperature must be a finite number >= 0, got temperature=-0.1"),
    (
        {"prompts": None, "canvas": [[5, MASK]], "max_new_tokens": 4},
        ValueError,
        r"max_new_tokens goes with prompts.*got max_new_tokens=4",
    ),
    ({"temperature": math.nan}, ValueError, r"temperature must be a finite number >= 0, got temperature=nan"),
    ({"temperature": 1e-9}, ValueError, r"temperature must be 0 or in \[1e-06, 1e\+06\], got temperature=1e-09"),
    ({"temperature": 10**400}, ValueError, r"temperature must be a finite number >= 0, got temperature=10"),
    ({"temperature": [None]}, TypeError, r"temperature must be a number, got temperature=None"),
    ({"temperature": "hot"}, TypeError, r"temperature must be a number or one per row, got temperature='hot'"),
    ({"top_p": 0}, ValueError, r"top_p must be a number in \(0, 1\] \(1 = off\), got top_p=0"),
    ({"top_p": 1.01}, ValueError, r"top_p must be a number in \(0, 1\] \(1 = off\), got top_p=1.01"),
    ({"top_k": -1}, ValueError, r"top_k must be a whole number >= 0 \(0 = off\), got top_k=-1"),
    (
        {"threshold": 0.1},
        ValueError,
        r"threshold has no effect with rule='quota' \(preset llada\): it is read by rule='threshold'",
    ),
    ({"seed": -1}, ValueError, r"seed must be a whole number in \[0, 2\^63\), got seed=-1"),
    ({"seed": 1.5}, ValueError, r"seed must be a whole number .*got seed=1.5"),
    ({"request_ids": [2**31]}, ValueError, r"request_ids must be below 2\^31, got 2147483648"),
    ({"request_ids": 5}, TypeError, r"request_ids must be a list of one whole number per row, got request_ids=5"),
    ({"request_ids": [5, 6]}, ValueError, r"request_ids must be one per row, got 2 values for 1 rows"),
    ({"request_ids": ["a"]}, TypeError, r"request_ids must be a whole number, got request_ids='a'"),
    ({"stop_strings": None}, TypeError, r"stop_strings must be a list of strings, got stop_strings=None"),
    ({"stop_strings": {"ab": 1}}, TypeError, r"stop_strings must be a list of strings, got stop_strings=\{'ab': 1\}"),
    ({"stop_strings": [5]}, ValueError, r"stop_strings must be non-empty strings, got \[5\]"),
    ({"stop_strings": "ab"}, TypeError, r"stop_strings must be a list of strings, got the string 'ab'"),
    ({"stop_strings": [""]}, ValueError, r"stop_strings must be non-empty strings, got \[''\]"),
    ({"stop_strings": ["ab"]}, ValueError, r"stop_strings need a tokenizer"),
    ({"banned_token_ids": [VOCAB]}, ValueError, rf"banned_token_ids must hold ids in \[0, {VOCAB}\), got {VOCAB}"),
    ({"banned_token_ids": None}, TypeError, r"banned_token_ids must be a list of token ids, got banned_token_ids=None"),
    ({"banned_token_ids": "ab"}, TypeError, r"banned_token_ids must be a list of token ids, got banned_token_ids='ab'"),
    ({"eos_token_ids": 5}, TypeError, r"eos_token_ids must be a list of token ids, got eos_token_ids=5"),
    (
        {"eos_token_ids": torch.tensor(5)},
        TypeError,
        r"eos_token_ids must be a list of token ids, got eos_token_ids=tensor\(5\)",
    ),
    ({"eos_token_ids": [2.0]}, TypeError, r"eos_token_ids must be token ids, got 2.0"),
    ({"banned_token_ids": ["a"]}, TypeError, r"banned_token_ids must be token ids, got 'a'"),
    ({"banned_token_ids": list(range(2, 46))}, ValueError, r"banned_token_ids must hold at most 31 ids, got 44"),
    (
        {"banned_token_ids": list(range(2, 33)), "min_new_tokens": 1},
        ValueError,
        r"banned_token_ids must hold at most 30 ids .*got 31",
    ),
    ({"eos_token_ids": [MASK]}, ValueError, rf"eos_token_ids must not hold the mask id {MASK}"),
    ({"eos_token_ids": list(range(1, 20))}, ValueError, r"eos_token_ids must hold at most 16 ids, got 19"),
]


@pytest.mark.parametrize(
    "changes, error, message", BAD, ids=[" ".join(f"{k}={v!r}" for k, v in bad[0].items())[:50] for bad in BAD]
)
def test_bad_input_names_argument_rule_and_value(changes, error, message):
    model = toy("full")
    with pytest.raises(error, match=message):
        dlm_fast.generate(model, **{"prompts": [[5, 6, 7]], "max_new_tokens": 8, **changes})
    assert handle_of(model).attention_calls == 0  # nothing was decoded


@pytest.mark.parametrize("model", [5, None, "tiny-full"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(
        TypeError, match=rf"model must be a model from dlm_fast.load, or patched by dlm_fast.patch, got model={model!r}"
    ):
        dlm_fast.generate(model, [[5]])


def test_a_model_that_is_not_patched_or_has_no_diffusion_configuration_is_refused():
    model = native_model()
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM is not patched; use dlm_fast.load\(path\) or dlm_fast.patch\(model\)"
    ):
        dlm_fast.generate(model, [[5]])
    with dlm_fast.patch(model), pytest.raises(ValueError, match=r"no diffusion configuration; pass diffusion="):
        dlm_fast.generate(model, [[5]])
