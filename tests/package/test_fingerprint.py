"""Fingerprints: every difference that changes a decode changes them, and nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from helpers import native_model, toy, toy_tokenizer

from dlm_fast import fingerprint

ROOT = Path(__file__).resolve().parents[2]

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_sum_of_changes_cancels(dtype):
    values = torch.randn(40, 16, dtype=dtype)
    before = fingerprint.of_tensors([("w", values)])
    changes = [
        lambda w: w[:, 1::2].neg_(),
        lambda w: w[:, 3].neg_(),
        lambda w: w[:, ::2].mul_(2),
        lambda w: w.neg_(),
        lambda w: w[:2].neg_(),
        lambda w: w.copy_(w.flip(0)),
    ]
    found = set()
    for change in changes:
        changed = values.clone()
        change(changed)
        found.add(fingerprint.of_tensors([("w", changed)]))
    assert len(found) == len(changes) and before not in found


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
    for name in ("split_special_tokens", "clean_up_tokenization_spaces"):
        other = toy_tokenizer()
        setattr(other, name, not getattr(other, name))
        assert fingerprint.of_tokenizer(one) != fingerprint.of_tokenizer(other)
    same.add_tokens(["new"])
    assert fingerprint.of_tokenizer(one) != fingerprint.of_tokenizer(same)


def test_an_adapter_beside_the_weights_counts_by_its_scale():
    peft = pytest.importorskip("peft")

    def adapted(alpha: int) -> torch.nn.Module:
        torch.manual_seed(0)
        return peft.get_peft_model(native_model(), peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"]))

    assert fingerprint.of_model(adapted(4)) == fingerprint.of_model(adapted(4)) != fingerprint.of_model(adapted(8))


def test_a_fingerprint_is_the_same_in_another_process(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from helpers import toy, toy_tokenizer;"
        "from dlm_fast import fingerprint as f; print(f.of_model(toy('full')), f.of_tokenizer(toy_tokenizer()))"
    )
    support = Path(helpers.__file__).parent
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "kernels"])),
    }
    found = subprocess.run(
        [sys.executable, "-c", code, support], capture_output=True, text=True, env=environment, check=True
    ).stdout.split()
    assert found == [fingerprint.of_model(toy("full")), fingerprint.of_tokenizer(toy_tokenizer())]
