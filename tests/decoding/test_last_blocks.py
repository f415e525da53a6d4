"""Last blocks that max_new_tokens cuts: decoded whole and then cut, decoded short, or dropped."""

from __future__ import annotations

import pytest
import torch
from helpers import EOS, MASK, bolder, facts_of, options_of, random_prompts, toy, toy_tokenizer

import dlm_fast
from dlm_fast.policies import Function
from dlm_fast.presets import PRESETS
from dlm_fast.presets.preset import LAST_BLOCKS

LENGTH = 4
WHOLE = [name for name, preset in PRESETS.items() if preset.last_block == "whole"]


def model_of(name: str, alignment: str = "rel", eos: tuple[int, ...] = (), **kwargs) -> torch.nn.Module:
    facts = {"block_length": LENGTH, "block_alignment": alignment, **facts_of(name)}
    return toy(PRESETS[name].visibility, eos=eos, **facts, **kwargs)


def settings_of(name: str) -> dict:
    return {"preset": name, "stop": "never"} | options_of(name, LENGTH) | bolder(name)


def end_of(prompt: int, new: int, alignment: str) -> int:
    """Where the block ends that the last new token is in."""
    start = 0 if alignment == "abs" else prompt
    return start + -(-(prompt + new - start) // LENGTH) * LENGTH


def test_the_presets_of_whole_last_blocks_are_those_whose_loops_decode_them():
    assert set(WHOLE) == {
        "sdar", "sdar-dynamic", "sdar-sequential", "sdar-entropy", "trado", "llada2", "llada2-quota", "llada2.1",
        "llada2.2", "freedave-block", "fast-dllm-v2", "nbdiff", "efficient-dlm", "nemotron", "d2f", "dllm-var",
    }  # fmt: skip
    others = {preset.last_block for name, preset in PRESETS.items() if name not in WHOLE}
    assert others == {"crop"} and "drop" in LAST_BLOCKS


@pytest.mark.parametrize("alignment", ["abs", "rel"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_shorter_limit_cuts_the_same_tokens(name, alignment):
    if PRESETS[name].visibility == "full" and alignment == "abs":
        pytest.skip("blocks of full visibility begin at the prompt's end")
    model, settings = model_of(name, alignment), settings_of(name)
    prompts = random_prompts([2, 4, 5])
    for new in (1, 3, 5, 8):
        out = dlm_fast.generate(model, prompts, max_new_tokens=new, **settings)
        filled = [end_of(len(prompt), new, alignment) - len(prompt) for prompt in prompts]
        whole = dlm_fast.generate(model, prompts, max_new_tokens=filled, **settings)
        assert (out.nfe, out.query_tokens, out.finish) == (whole.nfe, whole.query_tokens, ["length"] * 3)
        for b, prompt in enumerate(prompts):
            length = len(prompt) + new
            for field in ("canvas", "unmask_step", "confidence"):
                ours, theirs = getattr(out, field)[b], getattr(whole, field)[b]
                assert ours.tolist() == theirs[:length].tolist() and len(ours) == length
            assert out.sequences[b].tolist() == out.canvas[b].tolist()[len(prompt) :]
            assert out.tpf[b] == new / out.nfe[b]


def test_a_last_block_that_is_cut_is_decoded_as_if_it_went_on():
    # A block of three positions and one of four end differently.
    model, prompt = model_of("llada2", "abs", seed=2), random_prompts([4], 2)
    decoded = {
        last: dlm_fast.generate(model, prompt, preset="llada2", stop="never", max_new_tokens=3, last_block=last).canvas[
            0
        ]
        for last in ("crop", "whole")
    }
    longer = dlm_fast.generate(model, prompt, preset="llada2", stop="never", max_new_tokens=4).canvas[0]
    assert decoded["whole"].tolist() == longer.tolist()[:7] != decoded["crop"].tolist()


@pytest.mark.parametrize("name", ["d2f", "sdar", "llada2", "d3llm", "llada", "dllm-var"])
def test_a_dropped_block_is_left_out_of_the_output(name):
    model, prompts, settings = model_of(name), random_prompts([2, 5]), settings_of(name)
    out = dlm_fast.generate(model, prompts, max_new_tokens=[9, 6], last_block="drop", **settings)
    exact = dlm_fast.generate(model, prompts, max_new_tokens=[8, 4], **settings)
    for field in ("canvas", "unmask_step", "sequences", "confidence"):
        assert [row.tolist() for row in getattr(out, field)] == [row.tolist() for row in getattr(exact, field)]
    assert (out.nfe, out.finish) == (exact.nfe, ["length", "length"])
    if PRESETS[name].last_block == "whole":
        # Nothing is seen behind a block, so the published tokens are the first of ours.
        more = dlm_fast.generate(model, prompts, max_new_tokens=[9, 6], **settings)
        assert all(a.tolist() == b.tolist()[: len(a)] for a, b in zip(out.canvas, more.canvas))


def test_what_becomes_of_a_last_block_is_refused_by_name_where_it_cannot_be():
    model, prompt = model_of("sdar"), random_prompts([3])

    def refused(message: str, **arguments) -> None:
        with pytest.raises(ValueError, match=message):
            dlm_fast.generate(**{"model": model, "prompts": prompt, "preset": "sdar", **arguments})
        assert dlm_fast.handle_of(model).attention_calls == 0

    refused(
        r"max_new_tokens must reach the end of a block with last_block='drop', got 3 in row 0, whose first block of 4 "
        "ends 4 positions behind the prompt",
        max_new_tokens=3,
        last_block="drop",
    )
    refused(
        r"prompts\[0\] with its last whole block must fit the model's 256 positions, got 259; last_block='crop' ends",
        max_new_tokens=253,
    )
    refused("last_block must be one of crop, whole, drop, got last_block='half'", last_block="half")
    refused(
        "last_block goes with prompts; a canvas ends where it ends, got last_block='whole'",
        prompts=None,
        canvas=[[5, MASK]],
        last_block="whole",
    )
    full = toy("full")
    with pytest.raises(ValueError, match="last_block has no effect with schedule='canvas'"):
        dlm_fast.generate(full, prompt, preset="dream", last_block="whole")
    # The limit fits where the last block is cut.
    assert len(dlm_fast.generate(model, prompt, preset="sdar", max_new_tokens=253, last_block="crop").canvas[0]) == 256


@pytest.mark.parametrize("name", ["sdar", "llada2", "d2f", "nemotron"])
def test_a_canvas_is_neither_filled_up_nor_cut(name):
    model, canvas = model_of(name), [[5, 6, MASK, MASK, MASK, 7, MASK]]
    lengths = []
    out = dlm_fast.generate(
        model, canvas=canvas, on_step=lambda state: lengths.append(state.canvas_len.tolist()), **settings_of(name)
    )
    assert len(out.canvas[0]) == 7 and MASK not in out.canvas[0].tolist() and {7} == {n for (n,) in lengths}


def test_the_state_of_a_step_holds_the_whole_last_block():
    lengths, model = [], model_of("sdar")
    out = dlm_fast.generate(
        model, random_prompts([3]), preset="sdar", stop="never", max_new_tokens=5,
        on_step=lambda state: lengths.append(state.canvas_len.tolist()),
    )  # fmt: skip
    assert {11} == {n for (n,) in lengths} and len(out.canvas[0]) == 8


@pytest.mark.parametrize("name", ["sdar", "d2f", "llada2.1", "nemotron"])
def test_an_eos_behind_the_limit_ends_no_text(name):
    found = 0
    for seed in range(12):
        model = model_of(name, seed=seed)
        prompt, settings = random_prompts([3], seed), settings_of(name)
        whole = dlm_fast.generate(model, prompt, max_new_tokens=8, **settings).canvas[0].tolist()
        behind = [token for token in whole[9:] if token not in whole[:9]]
        if not behind:
            continue
        found += 1
        stop = {"stop": "after_block"} if name == "llada2.1" else {"stop": "closed"}
        out = dlm_fast.generate(model, prompt, max_new_tokens=6, eos_token_ids=behind[:1], **settings | stop)
        assert out.finish == ["length"] and out.canvas[0].tolist() == whole[:9]
        inside = dlm_fast.generate(model, prompt, max_new_tokens=6, eos_token_ids=[whole[8]], **settings | stop)
        assert inside.finish == ["eos"]
    assert found >= 3


@pytest.mark.parametrize("name", ["sdar", "d2f", "llada2.1", "nemotron"])
def test_a_stop_string_behind_the_limit_ends_no_text(name):
    found, tokenizer = 0, toy_tokenizer()
    for seed in range(12):
        model = model_of(name, seed=seed)
        prompt, settings = random_prompts([3], seed), settings_of(name) | {"tokenizer": tokenizer}
        whole = dlm_fast.generate(model, prompt, max_new_tokens=8, **settings)
        text = tokenizer.decode(whole.canvas[0].tolist()[3:])
        behind = [c for c in text[6:] if c not in text[:6]]
        if EOS in whole.canvas[0].tolist() or not behind:
            continue
        found += 1
        out = dlm_fast.generate(model, prompt, max_new_tokens=6, stop_strings=behind[:1], **settings)
        assert (out.finish, out.text) == (["length"], [text[:6]])
        both = dlm_fast.generate(model, prompt, max_new_tokens=6, stop_strings=[text[5] + behind[0]], **settings)
        assert (both.finish, both.text) == (["length"], [text[:6]])
        inside = dlm_fast.generate(model, prompt, max_new_tokens=6, stop_strings=[text[5]], **settings)
        assert inside.finish == ["stop"]
    assert found >= 3


def test_a_row_that_fails_shows_only_what_was_asked_for():
    stuck = Function(lambda view, choice: choice.only(torch.zeros_like(view.eligible)))
    with pytest.raises(dlm_fast.DecodeError) as failure:
        dlm_fast.generate(model_of("llada2"), random_prompts([3]), preset="llada2", policy=stuck, max_new_tokens=5)
    assert failure.value.output.finish == ["error"] and len(failure.value.output.canvas[0]) == 8


def test_the_smallest_number_of_tokens_reaches_as_far_as_the_limit():
    model = model_of("sdar", eos=tuple(range(2, 17)))
    out = dlm_fast.generate(model, random_prompts([3]), preset="sdar", max_new_tokens=6, min_new_tokens=6)
    assert out.finish == ["length"] and len(out.sequences[0]) == 6
    with pytest.raises(ValueError, match="min_new_tokens must be at most max_new_tokens, got 7 > 6 in row 0"):
        dlm_fast.generate(model, random_prompts([3]), preset="sdar", max_new_tokens=6, min_new_tokens=7)


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_a_block_length_of_the_call_replaces_the_models_own(length):
    prompts = random_prompts([2, 5])
    for name in ("sdar", "llada2", "d2f", "fast-dllm-v2", "nemotron", "freedave-block"):
        for alignment in ("abs", "rel"):
            facts = {"block_alignment": alignment, **facts_of(name)}
            settings = {"preset": name, "stop": "never", "max_new_tokens": 7} | bolder(name)
            ours = dlm_fast.generate(toy("block", block_length=4, **facts), prompts, block_length=length, **settings)
            theirs = dlm_fast.generate(toy("block", block_length=length, **facts), prompts, **settings)
            assert [row.tolist() for row in ours.canvas] == [row.tolist() for row in theirs.canvas]
            assert (ours.nfe, ours.query_tokens) == (theirs.nfe, theirs.query_tokens)
