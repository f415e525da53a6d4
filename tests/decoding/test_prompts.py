"""What may be handed to `generate` as prompts or canvas, which ids that is, and what anything else is told."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from helpers import MASK, toy, toy_tokenizer

import dlm_fast
from dlm_fast.patching import handle_of

TEXTS = ["ab", "abcde", "q"]
NEW = {"max_new_tokens": 3}


def padded_tokenizer(side: str = "right"):
    tokenizer = toy_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "=", side
    return tokenizer


def rows(given=None, tokenizer=None, **kwargs) -> list[list[int]]:
    settings = kwargs if "canvas" in kwargs else {**NEW, **kwargs}
    return [row.tolist() for row in dlm_fast.generate(toy("full"), given, tokenizer=tokenizer, **settings).canvas]


@pytest.mark.parametrize("tensors", ["pt", "np", None])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizers_result_is_its_ids_where_the_mask_is_one(side, tensors):
    tokenizer = padded_tokenizer(side)
    encoding = tokenizer(TEXTS, padding=True, return_tensors=tensors)
    expected = rows(TEXTS, tokenizer)

    assert rows(encoding, tokenizer) == expected
    assert rows(dict(encoding), tokenizer) == expected
    assert rows(encoding["input_ids"], tokenizer, attention_mask=encoding["attention_mask"]) == expected
    assert rows(tokenizer(TEXTS), tokenizer) == expected  # of unequal lengths, no padding


def test_the_hugging_face_chat_flow_equals_the_chat():
    tokenizer = padded_tokenizer("left")
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    whole = rows(chats, tokenizer)

    assert rows(
        tokenizer.apply_chat_template(chats[1], add_generation_prompt=True, return_tensors="pt"), tokenizer
    ) == [whole[1]]
    assert rows(tokenizer.apply_chat_template(chats[1], add_generation_prompt=True), tokenizer) == [whole[1]]
    several = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    assert rows(several, tokenizer) == whole


def test_one_prompt_may_be_a_tokenizers_result_or_an_array():
    tokenizer = padded_tokenizer()
    ids = tokenizer(TEXTS[1])["input_ids"]
    expected = rows([TEXTS[1]], tokenizer)
    forms = [
        tokenizer(TEXTS[1]),
        tokenizer(TEXTS[1], return_tensors="pt"),
        np.array(ids),
        np.array(ids, np.uint16),
        torch.tensor(ids).int(),
    ]

    assert rows(tokenizer(TEXTS[1]), tokenizer) == expected
    assert all(rows([form], tokenizer) == expected for form in forms)
    assert rows([*forms, tuple(ids)], tokenizer) == expected * 6
    assert rows(np.array([ids, ids[::-1]]), tokenizer)[0] == expected[0]
    assert rows((form for form in forms[:2]), tokenizer) == rows(forms[:2], tokenizer)


def test_a_canvas_takes_the_same_forms():
    tokenizer = padded_tokenizer()
    texts = ["a[MASK]", "b[MASK][MASK]d", "[MASK]"]
    encoding = tokenizer(texts, padding=True, return_tensors="pt")
    expected = rows(canvas=list(tokenizer(texts)["input_ids"]))

    assert rows(canvas=texts, tokenizer=tokenizer) == rows(canvas=encoding, tokenizer=tokenizer) == expected
    assert rows(canvas=encoding["input_ids"].numpy(), attention_mask=encoding["attention_mask"]) == expected


def test_pads_are_taken_where_nobody_can_know_or_the_mask_says_so():
    tokenizer = padded_tokenizer()
    ids = tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    pad = tokenizer.pad_token_id

    assert rows(ids)[0][:5] == ids[0].tolist()  # no tokenizer, so no pad id
    assert rows(ids, tokenizer, attention_mask=torch.ones_like(ids))[0][:5] == ids[0].tolist()
    assert rows([[pad, 5, pad]], tokenizer)[0][:3] == [pad, 5, pad]  # a list says itself how long it is
    assert rows(torch.tensor([[5, pad, 6]]), tokenizer)[0][:3] == [5, pad, 6]


CHAT = [{"role": "user", "content": "hi"}]
TENSOR = torch.tensor([[5, 6, 7], [8, 9, 10]])
WRONG = [
    # What stands for a list of prompts and is none.
    ({"prompts": 5}, TypeError, r"prompts must be a list of prompts, got 5$"),
    ({"prompts": True}, TypeError, r"prompts must be a list of prompts, got True"),
    ({"prompts": "hello"}, ValueError, r"prompts must be a list of prompts, got a single str"),
    ({"prompts": b"hello"}, ValueError, r"prompts must be a list of prompts, got a single bytes"),
    ({"prompts": {"a"}}, TypeError, r"prompts must be a list of prompts, got a set"),
    ({"prompts": torch.tensor(5)}, TypeError, r"prompts must be 1-D or 2-D token ids, got shape \(\), torch.int64"),
    (
        {"prompts": torch.zeros(1, 2, 3).long()},
        TypeError,
        r"prompts must be 1-D or 2-D token ids, got shape \(1, 2, 3\)",
    ),
    (
        {"prompts": TENSOR.float()},
        TypeError,
        r"prompts must be 1-D or 2-D token ids, got shape \(2, 3\), torch.float32",
    ),
    ({"prompts": TENSOR > 5}, TypeError, r"prompts must be 1-D or 2-D token ids, got shape \(2, 3\), torch.bool"),
    ({"prompts": np.zeros((2, 3))}, TypeError, r"prompts must be 1-D or 2-D token ids, got shape \(2, 3\), float64"),
    ({"prompts": [5, 6, 7]}, ValueError, r"got one list of token ids; did you mean \[prompts\]\?"),
    ({"prompts": list(torch.tensor([5, 6]))}, ValueError, r"got one list of token ids; did you mean \[prompts\]\?"),
    ({"prompts": torch.tensor([5, 6])}, ValueError, r"got one row of token ids; did you mean \[prompts\]\?"),
    ({"prompts": CHAT}, ValueError, r"prompts must be a list of prompts, got one chat; did you mean \[chat\]\?"),
    ({"prompts": CHAT[0]}, TypeError, r"tokenizer's result with input_ids, got a mapping with the keys role, content"),
    ({"prompts": {"ids": [[5]]}}, TypeError, r"tokenizer's result with input_ids, got a mapping with the keys ids"),
    (
        {"prompts": collections.UserDict()},
        TypeError,
        r"tokenizer's result with input_ids, got a mapping with the keys none",
    ),
    ({"prompts": {"input_ids": [[5]], "pixel_values": 0}}, TypeError, r"got the keys pixel_values beside them"),
    ({"prompts": {"input_ids": 5}}, TypeError, r"prompts\['input_ids'\] must be token ids, got 5"),
    (
        {"prompts": {"input_ids": [[5.5]]}},
        TypeError,
        r"prompts\['input_ids'\]\[0\] must be .*got an item of type float",
    ),
    # One of its items.
    ({"prompts": [[5], None]}, TypeError, r"prompts\[1\] must be a string, a chat or token ids, got None"),
    ({"prompts": [[5], 6]}, TypeError, r"prompts\[1\] must be a string, a chat or token ids, got 6"),
    ({"prompts": [b"hello"]}, TypeError, r"prompts\[0\] must be a string, a chat or token ids, got a bytes"),
    ({"prompts": [bytearray(b"hello")]}, TypeError, r"prompts\[0\] must be .*got a bytearray"),
    ({"prompts": [{5, 6}]}, TypeError, r"prompts\[0\] must be .*got a set"),
    ({"prompts": [[1.5]]}, TypeError, r"prompts\[0\] must be a string, a chat or token ids, got an item of type float"),
    ({"prompts": [[True]]}, TypeError, r"prompts\[0\] must be .*got an item of type bool"),
    (
        {"prompts": [torch.tensor([1.0])]},
        TypeError,
        r"prompts\[0\] must be 1-D token ids, got shape \(1,\), torch.float32",
    ),
    ({"prompts": [TENSOR]}, TypeError, r"prompts\[0\] must be 1-D token ids, got shape \(2, 3\), torch.int64"),
    ({"prompts": [{"input_ids": TENSOR}]}, ValueError, r"prompts\[0\] must hold one row of input_ids, got 2"),
    (
        {"prompts": [[5], CHAT[0]]},
        ValueError,
        r"prompts\[1\] must be .*got one message of a chat; a chat is a list of them",
    ),
    (
        {"prompts": [[{"content": "hi"}]]},
        ValueError,
        r"prompts\[0\] must be a chat of messages with a role, got one with the keys content",
    ),
    # Padding.
    (
        {"attention_mask": TENSOR[:, :2] * 0 + 1},
        ValueError,
        r"attention_mask must have the shape of the ids, .*\[3, 3\], got \[2, 2\]",
    ),
    ({"attention_mask": [1, 1, 1]}, ValueError, r"attention_mask must have the shape of the ids.*got \[1, 1, 1\]"),
    ({"attention_mask": 1}, ValueError, r"attention_mask must have the shape of the ids.*got 1$"),
    (
        {"attention_mask": [[1, 0, 1], [1, 1, 1]]},
        ValueError,
        r"attention_mask must be 1 from a row's first token to its last, .* in row 0",
    ),
    ({"attention_mask": [[1, 1, 1], [1, 2, 1]]}, ValueError, r"attention_mask must hold 0 and 1, got 2 in row 1"),
    ({"attention_mask": TENSOR.float() * 0}, ValueError, r"attention_mask must hold 0 and 1, got 0.0 in row 0"),
    (
        {"attention_mask": [[1, 1, 1], [0, 0, 0]]},
        ValueError,
        r"prompts\[1\] must have at least one token, got an empty one",
    ),
    (
        {"prompts": [[5], [6, 7]], "attention_mask": [[1, 1], [1, 1]]},
        ValueError,
        r"rows of lengths \[1, 2\], got \[2, 2\]",
    ),
    ({"prompts": [[5], "a"], "attention_mask": [[1], [1]]}, ValueError, r"prompts of text need a tokenizer"),
    (
        {"prompts": {"input_ids": TENSOR, "attention_mask": TENSOR}, "attention_mask": TENSOR},
        ValueError,
        r"must be given once",
    ),
    (
        {"prompts": [{"input_ids": [5], "attention_mask": [1]}], "attention_mask": [[1]]},
        ValueError,
        r"must be given once, got one in prompts too",
    ),
    ({"prompts": {"input_ids": ["ab"]}}, TypeError, r"prompts\['input_ids'\] must be token ids, got a str"),
    ({"prompts": np.array("ab")}, TypeError, r"prompts must be a list of prompts, got a ndarray"),
]


@pytest.mark.parametrize(
    "changes, error, message", WRONG, ids=[" ".join(f"{k}={v!r}" for k, v in wrong[0].items())[:60] for wrong in WRONG]
)
def test_what_is_no_list_of_prompts_is_refused_by_name_and_nothing_is_decoded(changes, error, message):
    model = toy("full")
    with pytest.raises(error, match=message):
        dlm_fast.generate(model, **{"prompts": TENSOR, **NEW, **changes})
    assert handle_of(model).attention_calls == 0


@pytest.mark.parametrize(
    "wrong", [[5, MASK], CHAT, MASK, [None], b"a", {"ids": [5]}, torch.tensor([5, MASK])], ids=repr
)
def test_a_canvas_is_refused_as_a_prompt_would_be(wrong):
    with pytest.raises((TypeError, ValueError), match=r"generate: canvas(\[0\])? must be"):
        dlm_fast.generate(toy("full"), canvas=wrong)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_tensor_without_its_mask_is_refused(side):
    tokenizer = padded_tokenizer(side)
    ids = tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    message = (
        r"prompts\[0\] must come with attention_mask=, "
        rf"got the tokenizer's pad id {tokenizer.pad_token_id} at an end of it; pass"
    )
    for padded in (ids, ids.numpy(), {"input_ids": ids}, {"input_ids": ids.tolist()}):
        with pytest.raises(ValueError, match=message):
            rows(padded, tokenizer)


@pytest.mark.parametrize("text", ["ab", "a<mask>"])
def test_a_text_canvas_without_the_mask_token_says_that_nothing_is_to_be_filled(text):
    with pytest.raises(
        ValueError, match=r"canvas\[1\] must hold the mask token '\[MASK\]' where text is wanted, got a text without it"
    ):
        rows(canvas=["a[MASK]", text], tokenizer=toy_tokenizer())


def test_what_a_tokenizer_or_its_template_refuses_is_named():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') if messages[0]['role'] != 'user' }}"
    with pytest.raises(
        ValueError, match=r"prompts\[1\] must be what the tokenizer can encode, got TemplateError: no such role"
    ):
        rows([[5], [{"role": "tool", "content": "a"}]], tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[0\] must be what the tokenizer can encode, got "):
        rows(["\ud800"], tokenizer)


def test_a_mask_beside_text_is_refused():
    with pytest.raises(
        ValueError, match=r"attention_mask must go with token ids, got one with text, which has no padding"
    ):
        rows(["ab"], toy_tokenizer(), attention_mask=[[1, 1]])
