"""Fingerprints: every difference that changes a decode changes them, and nothing else does."""

from __future__ import annotations

import pytest
import torch
from helpers import toy, toy_tokenizer

from dlm_fast import fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_every_single_bit_counts(dtype, size):
    values = torch.zeros(size, dtype=dtype)
    before = fingerprint.of_tensors([("w", values)])
    raw = values.view(torch.uint8)
    for place in {0, len(raw) // 2, len(raw) - 1}:
        for bit in (0,) if dtype == torch.bool else (0, 7):
            raw[place] ^= 1 << bit
            assert fingerprint.of_tensors([("w", values)]) != before
            raw[place] ^= 1 << bit
    assert fingerprint.of_tensors([("w", values)]) == before


def test_the_order_of_numbers_and_the_place_of_a_tensor_count():
    a, b = torch.randn(40), torch.randn(40)
    print_of = fingerprint.of_tensors
    assert print_of([("x", a), ("y", b)]) == print_of([("y", b), ("x", a)]) != print_of([("x", b), ("y", a)])
    assert print_of([("x", a)]) != print_of([("x", a.flip(0))]) and print_of([("x", a)]) != print_of([("z", a)])
    assert print_of([("x", a)]) != print_of([("x", a.reshape(8, 5))]) != print_of([("x", a.view(torch.int32))])
    assert print_of([("x", a)]) != print_of([("x", a[:39])])
    strided = torch.stack([a, b], 1)[:, 0]
    assert print_of([("x", strided)]) == print_of([("x", a)])


def test_a_part_of_a_storage_counts_by_its_numbers():
    values = torch.randn(9)
    assert fingerprint.of_tensors([("x", values[1:])]) == fingerprint.of_tensors([("x", values[1:].clone())])


def test_chunks_do_not_change_the_fingerprint(monkeypatch):
    values = torch.randn(1001)
    whole = fingerprint.of_tensors([("w", values)])
    monkeypatch.setattr(fingerprint, "_CHUNK", 7)
    assert fingerprint.of_tensors([("w", values)]) == whole


def test_a_tensor_that_is_made_of_others_counts_by_these():
    from torch.testing._internal.two_tensor import TwoTensor

    a, b = torch.randn(6), torch.randn(6)
    print_of = fingerprint.of_tensors
    assert print_of([("x", TwoTensor(a, b))]) == print_of([("x", TwoTensor(a.clone(), b.clone()))])
    assert print_of([("x", TwoTensor(a, b))]) != print_of([("x", TwoTensor(a, b + 1))]) != print_of([("x", a)])
    assert print_of([("x", object())]) == print_of([("x", object())]) != print_of([("x", 3)]) != print_of([("x", 4)])


def test_a_model_counts_by_weights_and_configuration():
    one, same, other = toy("full"), toy("full"), toy("full", seed=1)
    assert fingerprint.of_model(one) == fingerprint.of_model(same) != fingerprint.of_model(other)
    same.config.rope_parameters = {**same.config.rope_parameters, "rope_theta": 777.0}
    assert fingerprint.of_model(one) != fingerprint.of_model(same)


def test_a_tokenizer_counts_by_what_it_encodes_and_writes_and_not_by_its_last_call():
    assert fingerprint.of_tokenizer(None) is None
    one, same, other = toy_tokenizer(), toy_tokenizer(), toy_tokenizer()
    same(["a", "abc"], truncation=True, max_length=2)
    assert fingerprint.of_tokenizer(one) == fingerprint.of_tokenizer(same)
    other.chat_template = "{{ messages }}"
    assert fingerprint.of_tokenizer(one) != fingerprint.of_tokenizer(other)
    same.add_tokens(["new"])
    assert fingerprint.of_tokenizer(one) != fingerprint.of_tokenizer(same)
