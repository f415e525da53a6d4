"""What a service needs of `generate`: lists of any length, a decode that can be cancelled, and sizes that are refused
before anything is allocated for them."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
from collections.abc import Iterable

import pytest
import torch
from helpers import (
    EOS,
    MASK,
    RUNNABLE,
    VOCAB,
    bolder,
    model_for,
    native_model,
    options_of,
    random_prompts,
    save_toy_checkpoint,
    toy,
    toy_tokenizer,
)

import dlm_fast
from dlm_fast import cli
from dlm_fast.decoding import memory
from dlm_fast.generate import (
    BatchTooLarge,
    DecodeCancelled,
    DecodeError,
    DecodeInterrupted,
    DecodeOutOfMemory,
    GenerateOutput,
)
from dlm_fast.limits import MAX_STOP_STRINGS, MAX_STOP_STRING_LENGTH
from dlm_kernels.state import DONE

CPU = torch.device("cpu")
PER_ROW = ("canvas", "sequences", "finish", "nfe", "query_tokens", "tpf", "unmask_step")
# One preset for each schedule and kind of cache, with drafts, pipelines, guidance, shadows and first tokens.
KINDS = (
    "llada", "dream", "fast-dllm-prefix", "fast-dllm-dual", "freecache", "dkv-cache", "sdar", "fast-dllm-v2", "d2f",
    "d3llm", "freedave", "freedave-block", "wino",
)  # fmt: skip


def same(output: GenerateOutput, rows: Iterable[int], other: GenerateOutput, others: Iterable[int] | None = None) -> bool:
    """Whether two outputs say the same of some rows: everything but confidences bit for bit."""
    for row, its in zip(rows, rows if others is None else others, strict=True):
        for name in PER_ROW:
            ours, theirs = getattr(output, name)[row], getattr(other, name)[its]
            ours, theirs = (value.tolist() if isinstance(value, torch.Tensor) else value for value in (ours, theirs))
            if ours != theirs:
                return False
        torch.testing.assert_close(output.confidence[row], other.confidence[its], atol=1e-4, rtol=0)
    return True


def call(preset: str, rows: int = 5) -> tuple[torch.nn.Module, list[list[int]], dict]:
    """A model, prompts and settings of a short decode."""
    lengths = [5, 3, 9, 1, 7, 4, 2][:rows]
    settings = {"preset": preset, "max_new_tokens": [6, 11, 4, 9, 7, 3, 8][:rows], **options_of(preset)}
    return model_for(preset, eos=()), random_prompts(lengths), {**settings, **bolder(preset)}


# Lists of any length


@pytest.mark.parametrize("preset", KINDS)
def test_rows_do_not_depend_on_the_batch_size(preset):
    model, prompts, settings = call(preset)
    whole = dlm_fast.generate(model, prompts, **settings)
    for size in (1, 2, 5, 99):
        out = dlm_fast.generate(model, prompts, batch_size=size, **settings)
        assert same(out, range(5), whole), size
        assert out.computed_tokens >= sum(out.query_tokens) and out.preset == whole.preset
    assert dlm_fast.generate(model, prompts, batch_size=1, **settings).computed_tokens == sum(
        dlm_fast.generate(model, prompts[b : b + 1], **settings | {"max_new_tokens": new}).computed_tokens
        for b, new in enumerate(settings["max_new_tokens"])
    )


def test_draws_texts_and_every_argument_of_a_row_go_with_the_row():
    model, tok = toy("full"), toy_tokenizer()
    prompts = ["ab", "hello", "a b c", "x", "stop here"]
    settings = {
        "tokenizer": tok, "max_new_tokens": [6, 11, 4, 9, 7], "min_new_tokens": [0, 3, 1, 0, 7],
        "temperature": [0.0, 0.9, 1.3, 0.5, 0.0], "top_k": 12, "seed": 5, "stop_strings": ["a", "q"], "block_length": 4,
    }  # fmt: skip
    whole = dlm_fast.generate(model, prompts, **settings)
    named = dlm_fast.generate(model, prompts, **settings, request_ids=[0, 1, 2, 3, 4])
    for size in (1, 2, 3):
        out = dlm_fast.generate(model, prompts, batch_size=size, **settings)
        assert same(out, range(5), whole) and same(out, range(5), named)
        assert out.text == whole.text
    ids = dlm_fast.generate(model, prompts, batch_size=2, **settings, request_ids=[4, 3, 2, 1, 0])
    assert ids.text == dlm_fast.generate(model, prompts, **settings, request_ids=[4, 3, 2, 1, 0]).text != whole.text
    canvas = [[5, MASK, 7, MASK], [MASK] * 3, [9, 9]]
    one, two = (dlm_fast.generate(model, canvas=canvas, batch_size=size) for size in (None, 2))
    assert same(one, range(3), two)
    assert dlm_fast.generate(model, [], batch_size=3).sequences == []


def test_every_row_is_checked_before_the_first_forward():
    model, prompts = toy("full"), random_prompts([3] * 6)
    with pytest.raises(ValueError, match=r"prompts\[6\] must hold ids"):
        dlm_fast.generate(model, [*prompts, [VOCAB]], batch_size=2, max_new_tokens=4)
    assert dlm_fast.handle_of(model).attention_calls == 0


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", True, [2]])
def test_a_batch_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="generate: batch_size must be a whole number >= 1 or None, got batch_size="):
        dlm_fast.generate(toy("full"), [[5]], batch_size=size)


def breaking(model: torch.nn.Module, poison: int) -> None:
    """Makes the logits of a row that holds the token `poison` NaN."""
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = torch.nan


def test_rows_that_fail_do_not_stop_later_batches():
    model, prompts = toy("full", eos=()), [[5, 6], [7], [40, 3], [8], [9], [40]]
    whole = dlm_fast.generate(model, prompts, max_new_tokens=4)
    breaking(model, 40)
    with pytest.raises(DecodeError, match=r"NaN, \+inf or no candidate in rows \[2, 5\]") as caught:
        dlm_fast.generate(model, prompts, max_new_tokens=4, batch_size=2, banned_token_ids=[40])
    assert caught.value.rows == [2, 5]
    assert [n for n, finish in enumerate(caught.value.output.finish) if finish == "error"] == [2, 5]
    good = [0, 1, 3, 4]
    alone = dlm_fast.generate(model, [prompts[b] for b in good], max_new_tokens=4, banned_token_ids=[40])
    assert same(caught.value.output, good, alone, range(4))
    assert len(whole.finish) == len(caught.value.output.finish) == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_stops_a_later_batch_loses_no_earlier_row(error, monkeypatch):
    model, prompts, settings = call("fast-dllm-dual", 7)
    whole = dlm_fast.generate(model, prompts, **settings)
    first = dlm_fast.generate(model, prompts[:3], **settings | {"max_new_tokens": settings["max_new_tokens"][:3]})
    handle, forwards = dlm_fast.handle_of(model), 0
    hidden = handle.window_hidden

    def stops(*arguments):
        nonlocal forwards
        forwards += 1
        if forwards > sum(first.shapes.values()) + 2:
            raise error("no more")
        return hidden(*arguments)

    monkeypatch.setattr(handle, "window_hidden", stops)
    with pytest.raises(error) as caught:
        dlm_fast.generate(model, prompts, batch_size=3, **settings)
    assert isinstance(caught.value, DecodeInterrupted if error is KeyboardInterrupt else DecodeOutOfMemory)
    output, rows = caught.value.output, caught.value.rows
    assert rows == [n for n, finish in enumerate(output.finish) if finish == "unfinished"] and {0, 1, 2}.isdisjoint(
        rows
    )
    done = [row for row in range(7) if row not in rows]
    assert same(output, done, whole)
    # The last batch was not begun: its canvas is as it was asked.
    assert output.canvas[6].tolist() == prompts[6] + [MASK] * 8 and output.nfe[6] == 0
    assert output.sequences[6].tolist() == []


# Cancelling


@pytest.mark.parametrize("preset", KINDS)
def test_a_decode_is_cancelled_after_any_step_and_keeps_what_is_finished(preset):
    model, prompts, settings = call(preset)
    for size in (None, 2):
        whole = dlm_fast.generate(model, prompts, batch_size=size, **settings)
        steps = sum(whole.shapes.values())
        for last in range(1, steps + 1):
            cancel, taken = threading.Event(), 0

            def count(state) -> None:
                nonlocal taken
                taken += 1
                if taken == last:
                    cancel.set()

            try:
                out = dlm_fast.generate(model, prompts, batch_size=size, cancel=cancel, on_step=count, **settings)
                assert last == steps and same(out, range(5), whole)
                continue
            except DecodeCancelled as error:
                output, rows = error.output, error.rows
                assert str(error) == f"generate: cancelled, with {len(rows)} of 5 rows not done"
            assert taken == last == sum(output.shapes.values()) < steps
            assert rows == [n for n, finish in enumerate(output.finish) if finish == "unfinished"] != []
            done = [row for row in range(5) if row not in rows]
            assert same(output, done, whole)
            for row in rows:
                # What is there was written by the same steps as without a cancel.
                assert len(output.canvas[row]) == len(whole.canvas[row])
                assert output.nfe[row] <= whole.nfe[row]


def test_another_thread_cancels_and_the_next_call_is_clean():
    model, prompts, settings = call("llada", 4)
    settings["max_new_tokens"] = [2, 100, 100, 100]
    whole = dlm_fast.generate(model, prompts, **settings)
    cancel, begun = threading.Event(), threading.Event()

    def waits(state) -> None:
        if (state.phase == DONE).any():
            begun.set()
            cancel.wait()

    def cancels() -> None:
        begun.wait()
        cancel.set()

    thread = threading.Thread(target=cancels)
    thread.start()
    with pytest.raises(DecodeCancelled) as caught:
        dlm_fast.generate(model, prompts, cancel=cancel, on_step=waits, **settings)
    thread.join()
    assert caught.value.output.finish == ["length", *["unfinished"] * 3] and caught.value.rows == [1, 2, 3]
    assert same(caught.value.output, [0], whole)
    cancel.clear()
    assert same(dlm_fast.generate(model, prompts, cancel=cancel, **settings), range(4), whole)


def test_a_call_that_was_cancelled_before_it_began_takes_no_step():
    model, cancel = toy("full"), threading.Event()
    cancel.set()
    for size in (None, 1):
        with pytest.raises(DecodeCancelled, match="with 2 of 2 rows not done") as caught:
            dlm_fast.generate(model, [[5], [6, 7]], max_new_tokens=3, cancel=cancel, batch_size=size)
        assert [row.tolist() for row in caught.value.output.canvas] == [[5, *[MASK] * 3], [6, 7, *[MASK] * 3]]
    assert dlm_fast.handle_of(model).attention_calls == 0
    assert dlm_fast.generate(model, canvas=[[5, 6]], cancel=cancel).finish == ["length"]  # there is nothing to do


@pytest.mark.parametrize("cancel", [5, True, "now", threading.Event, lambda: True])
def test_what_cannot_cancel_is_refused(cancel):
    if cancel is threading.Event:
        pytest.skip("a class has is_set too")
    with pytest.raises(TypeError, match=r"cancel must have is_set\(\), as a threading.Event has, got cancel="):
        dlm_fast.generate(toy("full"), [[5]], cancel=cancel)


# Sizes


@pytest.mark.parametrize(
    "changes, message",
    [
        *(({"max_new_tokens": 10**n}, "must fit the model's 256 positions, got") for n in (3, 7, 9, 30)),
        *(({"max_new_tokens": [4, 10**n]}, r"prompts\[1\] with its new tokens must fit") for n in (7, 9, 30)),
        ({"max_new_tokens": 10**5000}, "a whole number of"),
        ({"min_new_tokens": 10**30}, "min_new_tokens must be at most"),
        ({"preset": "freedave", "drafts": 10**6}, "drafts must be a whole number <= 64"),
        ({"steps_per_block": 10**9}, "steps_per_block must be a whole number <= "),
        ({"block_length": 10**9}, "block_length must be a whole number <= "),
        ({"block_length": 10**7, "last_block": "whole"}, "with its last whole block must fit"),
        ({"prompts": [[5] * 10**6, [6]]}, r"prompts\[0\] with its new tokens must fit"),
        ({"prompts": torch.full((2, 10**6), 5)}, r"prompts\[0\] with its new tokens must fit"),
        ({"stop_strings": ["a"] * 10**6, "tokenizer": toy_tokenizer()}, "stop_strings must be at most"),
        ({"stop_strings": ["a" * 10**6], "tokenizer": toy_tokenizer()}, "stop_strings must be strings of at most"),
        ({"batch_size": 10**9}, "batch_size must be a whole number <= "),
        ({"top_k": 10**30}, None),  # it filters nothing
    ],
)  # fmt: skip
def test_sizes_are_refused_before_anything_is_allocated_for_them(changes, message):
    model = toy("full")
    settings = {
        "prompts": [[5, 6, 7], [6]],
        "max_new_tokens": 4,
        **options_of(changes.get("preset", "llada")),
        **changes,
    }
    begun = time.process_time()
    if message is None:
        dlm_fast.generate(model, **settings)
        return
    with pytest.raises(ValueError, match=message):
        dlm_fast.generate(model, **settings)
    assert time.process_time() - begun < 1


def test_as_many_stop_strings_as_are_allowed_are_served():
    model = toy("full")
    stops = ["#" * MAX_STOP_STRING_LENGTH, *(f"{n}" for n in range(MAX_STOP_STRINGS - 1))]
    dlm_fast.generate(model, [[5]], max_new_tokens=4, tokenizer=toy_tokenizer(), stop_strings=stops)


def test_a_block_far_longer_than_the_canvas_takes_no_memory_of_its_length(peak):
    model = toy("full", backend="cpu")
    settings = {"max_new_tokens": 8, "block_length": 2**24}
    short = peak(lambda: dlm_fast.generate(model, [[5]], **settings | {"block_length": 8}))
    assert peak(lambda: dlm_fast.generate(model, [[5]], **settings)) == short


# Memory


@pytest.fixture
def peak():
    """A function that runs a call and says how many bytes of tensors it held at once."""

    def measured(run) -> int:
        gc.collect()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
            run()
        events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            most = max(most, live)
        return most

    return measured


@pytest.fixture
def bounds(monkeypatch):
    """What the loop compared with the free memory, in order."""
    found, compare = [], memory._compare

    def compared(*arguments) -> None:
        found.append(arguments[-1])
        compare(*arguments)

    monkeypatch.setattr(memory, "_compare", compared)
    monkeypatch.setattr(memory, "SMALL", -1)
    return found


SHAPES = [([5], 16), ([40, 3, 17, 60, 9], 48), ([8] * 12, [4] * 11 + [120])]


@pytest.mark.parametrize("preset", RUNNABLE)
def test_no_batch_takes_less_than_the_bound(preset, peak, bounds):
    model = model_for(preset, backend="cpu")
    for lengths, new in SHAPES:
        settings = {"preset": preset, "max_new_tokens": new, **options_of(preset)}
        bounds.clear()
        taken = peak(lambda: dlm_fast.generate(model, random_prompts(lengths), **settings))
        canvases, rest = (parts[CPU].total() for parts in bounds)
        # Two of the three copies of the canvases live as long as the decode.
        assert rest + 2 * canvases // 3 <= taken


@pytest.mark.parametrize("preset", RUNNABLE)
def test_the_bound_of_a_small_batch_is_never_above_the_number_that_calls_it_small(preset, bounds, monkeypatch):
    most, numbers = memory._most_bytes, []
    monkeypatch.setattr(memory, "_most_bytes", lambda *of: numbers.append(most(*of)) or numbers[-1])
    model = model_for(preset)
    for lengths, new in SHAPES:
        bounds.clear()
        numbers.clear()
        cancel = threading.Event()
        cancel.set()
        with pytest.raises(DecodeCancelled):
            dlm_fast.generate(
                model, random_prompts(lengths), preset=preset, max_new_tokens=new, cancel=cancel, **options_of(preset)
            )
        for parts in bounds:
            assert sum(taken.total() for taken in parts.values()) <= numbers[0]


@pytest.mark.parametrize("preset, part", [("fast-dllm-dual", "keys and values"), ("sdar", "keys and values")])
def test_the_bound_of_keys_and_values_is_what_is_allocated(preset, part, bounds):
    model = model_for(preset, layers=3)
    handle, caches = dlm_fast.handle_of(model), []
    new_cache = handle.adapter.new_cache
    for rows, new in ((1, 16), (5, 40)):
        bounds.clear()
        dlm_fast.generate(model, random_prompts([7] * rows), preset=preset, max_new_tokens=new, **options_of(preset))
        length = 7 + new
        if dlm_fast.PRESETS[preset].last_block == "whole":
            length = 7 + -(-new // 4) * 4
        cache = new_cache(model, rows, length)
        caches.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
        assert bounds[-1][CPU][part] == caches[-1]


@pytest.mark.parametrize(
    "preset, tightness", [("llada", 0.3), ("fast-dllm-dual", 0.5), ("sdar", 0.5), ("klass", 0.5), ("wino", 0.3)]
)
def test_the_bound_of_a_batch_of_many_logits_or_keys_is_near_what_is_taken(preset, tightness, peak, bounds):
    """The rest is a copy of the logits in an op, and what the layers hold."""
    model = model_for(preset, backend="cpu", layers=12)
    lengths = [100] * 8
    settings = {"preset": preset, "max_new_tokens": 100, **options_of(preset, 100), "stop": "never"}
    cancel, taken = threading.Event(), 0

    def few(state) -> None:
        nonlocal taken
        taken += 1
        if taken == 3:
            cancel.set()

    def decode() -> None:
        with pytest.raises(DecodeCancelled):
            dlm_fast.generate(model, random_prompts(lengths), cancel=cancel, on_step=few, **settings)

    most = peak(decode)
    canvases, rest = (parts[CPU].total() for parts in bounds)
    print(preset, (rest + 2 * canvases // 3) / most)
    assert tightness * most <= rest + 2 * canvases // 3 <= most
