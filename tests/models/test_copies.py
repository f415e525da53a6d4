"""Copies of a patched model: copied, pickled, saved and spawned, each is patched by a handle of its own."""

from __future__ import annotations

import copy
import multiprocessing
import pickle

import pytest
import torch
from helpers import native_model, save_toy_checkpoint, toy
from patched import PLAIN, ids, logits

import dlm_fast


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_is_patched_by_a_handle_of_its_own(duplicate):
    model, tokens = toy("full"), ids(6)
    logits(model, tokens)
    twin = duplicate(model)
    handle, twin_handle = dlm_fast.handle_of(model), dlm_fast.handle_of(twin)
    assert twin_handle is not handle and twin_handle.model is twin
    assert twin_handle.adapter is handle.adapter and twin_handle.attention_calls == 0
    assert twin_handle.diffusion == handle.diffusion and twin.config is not model.config
    assert torch.equal(logits(twin, tokens), logits(model, tokens)) and twin_handle.attention_calls == 2
    assert torch.equal(dlm_fast.generate(twin, **PLAIN).canvas[0], dlm_fast.generate(model, **PLAIN).canvas[0])

    bidirectional, causal = logits(model, tokens), logits(native_model(), tokens)
    twin_handle.unpatch()
    assert torch.equal(logits(twin, tokens), causal) and torch.equal(logits(model, tokens), bidirectional)
    assert not twin.model._forward_pre_hooks and not twin.model._forward_hooks
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    handle.unpatch()
    assert torch.equal(logits(model, tokens), causal)


def test_a_copy_of_a_loaded_model_brings_its_tokenizer(tmp_path):
    save_toy_checkpoint(tmp_path)
    model = dlm_fast.load(tmp_path, backend="reference", device="cpu")
    for twin in (copy.deepcopy(model), pickled(model)):
        assert (
            dlm_fast.generate(twin, ["abc"], max_new_tokens=3).text
            == dlm_fast.generate(model, ["abc"], max_new_tokens=3).text
        )


def test_a_copy_saves_the_checkpoint_that_the_original_would(tmp_path):
    save_toy_checkpoint(tmp_path / "toy")
    model = dlm_fast.load(tmp_path / "toy", backend="reference", device="cpu")
    copy.deepcopy(model).save_pretrained(tmp_path / "again")
    again = dlm_fast.load(tmp_path / "again", backend="reference", device="cpu")
    assert torch.equal(dlm_fast.generate(again, **PLAIN).canvas[0], dlm_fast.generate(model, **PLAIN).canvas[0])


def decode_in_a_process(model, results) -> None:
    results.put(dlm_fast.generate(model, **PLAIN).canvas[0].tolist())


def test_a_spawned_process_decodes_the_model_it_is_given():
    model, context = toy("full"), multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=decode_in_a_process, args=(model, results))
    process.start()
    found = results.get(timeout=120)
    process.join()
    assert found == dlm_fast.generate(model, **PLAIN).canvas[0].tolist()
