"""What bad input must say: every argument of `generate` by its name, its rule and the value that was given."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MASK, VOCAB, native_model, toy, toy_tokenizer
from named_errors import unnamed

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
        r"prompts\[0\] with its new tokens must fit the model's 256 positions, got 10+3 \(max_new_tokens=10+\)$",
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
    (
        {"temperature": 10**400},
        ValueError,
        r"temperature must be a finite number >= 0, got temperature=a whole number of 1329 bits",
    ),
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


def nested(depth: int) -> list:
    """A list in a list in a list."""
    return [nested(depth - 1)] if depth else [5]


def itself() -> list:
    """A list that holds itself."""
    values: list = []
    values.append(values)
    return values


def unspeakable() -> Any:
    """A value whose repr raises."""

    class Value:
        def __repr__(self) -> str:
            raise RuntimeError("not to be shown")

    return Value()


# Values of every kind, each made anew for a call. For some arguments some of them are right.
KINDS: dict[str, Callable[[], Any]] = {
    "None": lambda: None, "empty list": list, "list of None": lambda: [None], "list of an empty list": lambda: [[]],
    "mapping": lambda: {"a": 1}, "empty mapping": dict, "bytes": lambda: b"ab", "bytearray": lambda: bytearray(b"a"),
    "memoryview": lambda: memoryview(b"abc"), "bool": lambda: True, "NaN": lambda: math.nan, "inf": lambda: math.inf,
    "-inf": lambda: -math.inf, "huge": lambda: 10**400, "not writable": lambda: 10**5000, "-huge": lambda: -(10**5000),
    "fraction": lambda: 2.5, "negative": lambda: -1, "complex": lambda: 1j, "empty string": str, "string": lambda: "zz",
    "lone surrogate": lambda: "\ud800", "lone surrogates": lambda: ["\ud800"], "object": object, "class": lambda: dict,
    "function": lambda: lambda: 1, "ellipsis": lambda: ..., "set": lambda: {1, 2}, "frozenset": lambda: frozenset([3]),
    "generator": lambda: (x for x in [1, 2, 3]), "range": lambda: range(3), "tuple": lambda: (1, 2),
    "0-D tensor": lambda: torch.tensor(3), "0-D float": lambda: torch.tensor(3.5),
    "2-D floats": lambda: torch.ones(2, 2),
    "2-D tensor": lambda: torch.ones(2, 2).long(), "3-D tensor": lambda: torch.ones(1, 1, 3).long(),
    "bool tensor": lambda: torch.ones(1, 3, dtype=torch.bool), "meta": lambda: torch.ones(1, 3, device="meta").long(),
    "0-D meta": lambda: torch.tensor(1, device="meta"), "grad": lambda: torch.ones(1, 3, requires_grad=True),
    "sparse": lambda: torch.ones(1, 3).long().to_sparse(), "NumPy float": lambda: np.float32(1.5),
    "NumPy int": lambda: np.int64(3), "NumPy NaN": lambda: np.float64("nan"), "array": lambda: np.ones((2, 2)),
    "objects": lambda: np.array([None, "a"], dtype=object), "0-D array": lambda: np.array(3),
    "strings": lambda: np.array(["a"]),
    "unsigned": lambda: np.array([[2**63 + 5]], dtype=np.uint64), "list of a fraction": lambda: [1.5],
    "list of a bool": lambda: [True], "list of a negative": lambda: [-1], "list of a huge": lambda: [10**5000],
    "list of NaN": lambda: [math.nan], "list of mappings": lambda: [{"a": 1}], "message": lambda: [{"role": "user"}],
    "chat of None": lambda: [[{"role": "user", "content": None}]], "nested": lambda: nested(3),
    "deep": lambda: nested(900), "itself": itself, "unspeakable": unspeakable,
}  # fmt: skip
ARGUMENTS = [name for name in inspect.signature(dlm_fast.generate).parameters if name not in ("model", "options")]


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_every_argument_of_every_kind_is_taken_or_refused_by_name(argument):
    model = toy("full")
    base = {
        "tokenizer": toy_tokenizer(),
        **({} if argument == "canvas" else {"prompts": [[5, 6, 7]], "max_new_tokens": 3}),
    }
    refused = 0
    for kind, value in KINDS.items():
        if (argument, kind) == ("on_step", "class"):
            continue  # Python cannot say what a class of C takes
        before = handle_of(model).attention_calls
        try:
            dlm_fast.generate(model, **{**base, argument: value()})
        except Exception as error:
            assert unnamed(error, argument) is None, f"{kind}: {unnamed(error, argument)}"
            assert handle_of(model).attention_calls == before, f"{kind} is refused after a forward"
            refused += 1
    assert refused > len(KINDS) / 2


class Liar:
    """A tokenizer that is none.

    Attributes:
        ids: what it says that a text's ids are.
        text: what it says that a text is.
    """

    def __init__(self, ids: Any = (5,), text: Any = "a") -> None:
        self.ids, self.text = ids, text

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": self.ids}

    def decode(self, ids: list[int], **arguments: Any) -> Any:
        if isinstance(self.text, Exception):
            raise self.text
        return self.text


@pytest.mark.parametrize(
    "tokenizer, argument",
    [
        *((Liar(ids), "prompts") for ids in ([VOCAB], [-1], [2.5], [None], None, 5, "ab", [[5]], [10**5000], [True])),
        *((Liar(text=text), "tokenizer") for text in (None, 5, b"a", ["a"], ValueError("no"), KeyError("no"))),
    ],
)
def test_a_tokenizer_that_lies_is_refused(tokenizer, argument):
    model = toy("full")
    with pytest.raises((ValueError, TypeError)) as caught:
        dlm_fast.generate(model, ["a"], tokenizer=tokenizer, max_new_tokens=2)
    assert unnamed(caught.value, argument) is None, str(caught.value)
    assert handle_of(model).attention_calls == 0


class Silent(dlm_fast.policies.Policy):
    """A policy that forgets to return its choice."""

    def choose(self, view, choice):
        return None


@pytest.mark.parametrize(
    "policy",
    [
        lambda view, choice: None,
        lambda view, choice: 5,
        lambda view, choice: choice.pred,
        lambda view, choice: choice.score.double(),
        lambda view, choice: choice.score[:, :1],
        lambda view, choice: choice.score.tolist(),
        lambda view: view,
        lambda: None,
        Silent(),
        [Silent()],
        lambda view, choice: dataclasses.replace(choice, pred=choice.pred + VOCAB),
        lambda view, choice: dataclasses.replace(choice, pred=choice.pred - 10**9),
    ],
)
def test_a_policy_that_returns_no_choice_is_refused(policy, without_debug):
    with pytest.raises((ValueError, TypeError)) as caught:
        dlm_fast.generate(toy("full"), [[5, 6]], max_new_tokens=6, block_length=4, policy=policy)
    assert unnamed(caught.value, "policy") is None, str(caught.value)


@pytest.mark.parametrize(
    "field, value", [("score", torch.ones(1, 4).double()), ("pred", torch.ones(1, 4)), ("value", torch.ones(2))]
)
def test_a_choice_with_a_wrong_field_is_refused_by_the_field(field, value):
    with pytest.raises((ValueError, TypeError)) as caught:
        settings = {"max_new_tokens": 6, "block_length": 4}
        dlm_fast.generate(
            toy("full"), [[5, 6]], policy=lambda view, choice: dataclasses.replace(choice, **{field: value}), **settings
        )
    assert unnamed(caught.value, field) is None, str(caught.value)


@pytest.mark.parametrize("function", [lambda: None, lambda one, two: None, 5, "print"])
def test_an_on_step_of_other_arguments_is_refused(function):
    model = toy("full")
    with pytest.raises(TypeError, match="generate: on_step must be a function of the state, got on_step="):
        dlm_fast.generate(model, [[5]], on_step=function, max_new_tokens=2)
    assert handle_of(model).attention_calls == 0
    dlm_fast.generate(model, [[5]], on_step=[].append, max_new_tokens=2)
