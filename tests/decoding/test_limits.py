"""What a service needs of `generate`: lists of any length, a decode that can be cancelled, and sizes that are refused
before anything is allocated for them."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterable

import pytest
import torch
from helpers import (
    MASK,
    RUNNABLE,
    VOCAB,
    bolder,
    facts_of,
    model_for,
    native_model,
    options_of,
    random_prompts,
    save_toy_checkpoint,
    toy,
    toy_tokenizer,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
from dlm_fast.limits import MAX_STOP_STRING_LENGTH, MAX_STOP_STRINGS
from dlm_kernels.state import DONE

CPU = torch.device("cpu")
PER_ROW = ("canvas", "sequences", "finish", "nfe", "query_tokens", "tpf", "unmask_step")
# One preset for each schedule and kind of cache, with drafts, pipelines, guidance, shadows and first tokens.
KINDS = (
    "llada", "dream", "fast-dllm-prefix", "fast-dllm-dual", "freecache", "dkv-cache", "sdar", "fast-dllm-v2", "d2f",
    "d3llm", "freedave", "freedave-block", "wino",
)  # fmt: skip


def same(
    output: GenerateOutput, rows: Iterable[int], other: GenerateOutput, others: Iterable[int] | None = None
) -> bool:
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


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors on the CPU that calls under it have made and still hold, after every op.

    Attributes:
        most: the most bytes at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most, self._held = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.device == CPU and type(made) is torch.Tensor:
                storage = made.untyped_storage()
                if storage._cdata not in given:
                    self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._held = {key: entry for key, entry in self._held.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._held.values()))
        return out


def peak(run: Callable[[], object]) -> int:
    """How many bytes of tensors a call holds at once."""
    with Held() as held:
        run()
    return held.most


# Lists of any length


@pytest.mark.parametrize("preset", KINDS)
def test_rows_do_not_depend_on_the_batch_size(preset):
    model, prompts, settings = call(preset)
    whole = dlm_fast.generate(model, prompts, **settings)
    for size in (1, 2, 5, 99):
        out = dlm_fast.generate(model, prompts, batch_size=size, **settings)
        assert same(out, range(5), whole), size
        assert out.computed_tokens >= sum(out.query_tokens) and out.preset == whole.preset
    # The shapes are planned once for all rows, and so fit each of them a little worse than shapes of its own.
    alone = sum(
        dlm_fast.generate(model, prompts[b : b + 1], **settings | {"max_new_tokens": new}).computed_tokens
        for b, new in enumerate(settings["max_new_tokens"])
    )
    one_by_one = dlm_fast.generate(model, prompts, batch_size=1, **settings).computed_tokens
    assert alone <= one_by_one <= 1.1 * alone


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


def test_a_block_far_longer_than_the_canvas_takes_no_memory_of_its_length():
    model = toy("full", backend="cpu")
    settings = {"max_new_tokens": 8, "block_length": 2**24}
    short = peak(lambda: dlm_fast.generate(model, [[5]], **settings | {"block_length": 8}))
    assert peak(lambda: dlm_fast.generate(model, [[5]], **settings)) == short


# Memory


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


def first_steps(model: torch.nn.Module, prompts: list[list[int]], **settings) -> None:
    """The first steps of a decode, in which the bound must hold."""
    cancel, taken = threading.Event(), 0

    def few(state) -> None:
        nonlocal taken
        taken += 1
        if taken == 3:
            cancel.set()

    with contextlib.suppress(DecodeCancelled):
        dlm_fast.generate(model, prompts, cancel=cancel, on_step=few, **settings)


@pytest.mark.parametrize("preset", RUNNABLE)
def test_no_batch_takes_less_than_the_bound(preset, bounds, monkeypatch):
    """And the bound is never above the number by which a batch is known to be small."""
    most, numbers = memory.most_bytes, []
    monkeypatch.setattr(memory, "most_bytes", lambda *of: numbers.append(most(*of)) or numbers[-1])
    model = model_for(preset, backend="cpu")
    for lengths, new in SHAPES:
        bounds.clear()
        settings = {"preset": preset, "max_new_tokens": new, **options_of(preset)}
        taken = peak(lambda: first_steps(model, random_prompts(lengths), **settings))
        canvases, rest = (parts[CPU].total() for parts in bounds)
        # Two of the three copies of the canvases live as long as the decode.
        assert rest + 2 * canvases // 3 <= taken
        assert max(canvases, rest) <= numbers[-1]


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


def wide_toy(preset: str, layers: int, vocabulary: int) -> torch.nn.Module:
    """A toy whose keys and values, or whose logits, are most of what a batch takes."""
    model, chosen = native_model(layers=layers), dlm_fast.PRESETS[preset]
    model.resize_token_embeddings(vocabulary)
    model.eval()
    diffusion = dlm_fast.DiffusionConfig(
        mask_token_id=MASK, eos_token_ids=(), visibility=chosen.visibility, block_length=4, **facts_of(preset)
    )
    dlm_fast.patch(model, diffusion=diffusion, backend="cpu")
    return model


@pytest.mark.parametrize(
    "preset, layers, vocabulary, tightness",
    [
        ("fast-dllm-dual", 12, VOCAB, 0.5), ("sdar", 12, VOCAB, 0.7), ("llada", 2, 8000, 0.6),
        ("klass", 2, 8000, 0.6), ("wino", 2, 8000, 0.6), ("fast-dllm-dual", 2, 8000, 0.6),
    ],
)  # fmt: skip
def test_the_bound_of_a_batch_of_many_keys_or_logits_is_near_what_is_taken(
    preset, layers, vocabulary, tightness, bounds
):
    """The rest is what the layers hold, and the work of the ops on a part of the logits."""
    model, prompts = wide_toy(preset, layers, vocabulary), random_prompts([60] * 4)
    settings = {"preset": preset, "max_new_tokens": 64, **options_of(preset, 64)}
    most = peak(lambda: first_steps(model, prompts, **settings))
    canvases, rest = (parts[CPU].total() for parts in bounds)
    assert tightness * most <= rest + 2 * canvases // 3 <= most


def short_of(monkeypatch, free: int | None) -> None:
    """Leaves so many bytes free, of which every batch must ask."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(memory, "SMALL", -1)


@pytest.mark.parametrize("preset, free", [("fast-dllm-dual", 3_000_000), ("sdar", 600_000), ("llada", 3_000_000)])
def test_a_batch_that_cannot_fit_is_refused_with_its_parts_and_the_rows_that_would(preset, free, monkeypatch):
    model, prompts = wide_toy(preset, 2, 8000), random_prompts([60] * 12)
    settings = {"preset": preset, "max_new_tokens": 64, **options_of(preset, 64)}
    short_of(monkeypatch, free)
    said = r"a batch must fit the free memory of cpu, got 12 rows of up to 124 positions, which take at least 0\.0"
    said += r"\d GiB \(.*logits 0\.0\d.*\) where 0\.00 GiB are free; batch_size=\d+ would fit"
    with pytest.raises(BatchTooLarge, match=said) as caught:
        dlm_fast.generate(model, prompts, **settings)
    assert isinstance(caught.value, ValueError) and dlm_fast.handle_of(model).attention_calls == 0
    size = int(str(caught.value).split("batch_size=")[1].split()[0])
    assert 1 <= size < 12
    first_steps(model, prompts, batch_size=size, **settings)
    with pytest.raises(BatchTooLarge):
        dlm_fast.generate(model, prompts, batch_size=4 * size, **settings)
    short_of(monkeypatch, 10_000)
    with pytest.raises(BatchTooLarge, match="not even batch_size=1 would fit"):
        dlm_fast.generate(model, prompts, **settings)
    short_of(monkeypatch, None)  # nobody says what is free
    first_steps(model, prompts, **settings)


def test_the_canvases_of_a_batch_are_refused_before_they_are_allocated(monkeypatch):
    model = toy("full")
    short_of(monkeypatch, 2_000_000)
    prompts = [[5]] * 20_000
    with pytest.raises(BatchTooLarge, match="got 20000 rows of up to 33 positions"):
        dlm_fast.generate(model, prompts, max_new_tokens=32)
    monkeypatch.setattr(memory, "plan_of_rows", lambda *of: pytest.fail("a batch was opened"))
    short_of(monkeypatch, 100)
    with pytest.raises(BatchTooLarge, match="not even batch_size=1 would fit"):
        dlm_fast.generate(model, prompts, max_new_tokens=32)


def test_the_memory_is_looked_at_before_the_first_step_and_serves_all_rows(monkeypatch):
    model, prompts, settings = call("fast-dllm-dual")
    whole, free = dlm_fast.generate(model, prompts, **settings), [10**9]
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[0])
    monkeypatch.setattr(memory, "SMALL", -1)

    def takes(state) -> None:
        free[0] = 10  # another process

    # The buffers are there, and are those of all rows.
    assert same(dlm_fast.generate(model, prompts, batch_size=2, on_step=takes, **settings), range(5), whole)
    with pytest.raises(BatchTooLarge, match="a batch must fit the free memory of cpu, got 2 rows"):
        dlm_fast.generate(model, prompts, batch_size=2, **settings)


def test_what_is_free_is_the_least_that_the_machine_and_the_groups_leave(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:  700 kB\nHugePages_Total:  0\n")
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_groups", list)
    assert memory.free_bytes(CPU) == 700 * 1024
    new, old = tmp_path / "new", tmp_path / "old"
    stats = "anon 9\ninactive_file 5\nactive_file 7", "total_active_file 3"
    for folder, files in {
        new: {"memory.max": "500000", "memory.current": "400000", "memory.stat": stats[0]},
        old: {"memory.limit_in_bytes": "9000000", "memory.usage_in_bytes": "8990000", "memory.stat": stats[1]},
    }.items():
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text + "\n")
    two = new, "memory.max", "memory.current", ("inactive_file", "active_file")
    one = old, "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
    monkeypatch.setattr(memory, "_groups", lambda: [two, one])
    assert memory.free_bytes(CPU) == 10003
    (new / "memory.max").write_text("max\n")
    (old / "memory.usage_in_bytes").unlink()
    assert memory.free_bytes(CPU) == 700 * 1024
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "none")
    assert memory.free_bytes(CPU) is None
    assert memory.free_bytes(torch.device("meta")) is None


def test_the_groups_of_a_process_are_found_up_to_the_root(monkeypatch):
    lines = "4:memory:/a/b\n3:cpuset:/a\n0::/slice/unit\n"
    monkeypatch.setattr(memory.Path, "read_text", lambda path: lines)
    memory._groups.cache_clear()
    found = [str(folder.relative_to(memory.CGROUPS)) for folder, *_ in memory._groups()]
    memory._groups.cache_clear()
    assert found == ["memory/a/b", "memory/a", "memory", "slice/unit", "slice", "."]


def test_small_batches_do_not_ask_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: pytest.fail("asked"))
    dlm_fast.generate(toy("full"), random_prompts([5] * 8), max_new_tokens=16)


# Limits that a model is opened with


def limited(kind: str, path, **limits) -> torch.nn.Module:
    """A model with limits: a patched one, a loaded one, a copy or a pickle."""
    if kind == "load":
        save_toy_checkpoint(path)
        return dlm_fast.load(path, device="cpu", **limits)
    model = native_model()
    diffusion = dlm_fast.DiffusionConfig(mask_token_id=MASK, eos_token_ids=(), visibility="full")
    dlm_fast.patch(model, diffusion=diffusion, backend="reference", **limits)
    return {"patch": lambda m: m, "copy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}[kind](model)


@pytest.mark.parametrize("kind", ["load", "patch", "copy", "pickle"])
def test_a_model_keeps_the_limits_that_it_was_opened_with(kind, tmp_path):
    model = limited(kind, tmp_path, max_positions=12, max_rows=2)
    shown = dlm_fast.explain(model)
    assert (shown["max_positions"], shown["max_rows"]) == (12, 2)
    assert dlm_fast.generate(model, [[5] * 8, [6]], max_new_tokens=4).finish
    words, rows = (f"{name} that the model was opened with" for name in ("max_positions=12", "max_rows=2"))
    for arguments, message in [
        ({"prompts": [[5] * 9], "max_new_tokens": 4}, rf"prompts\[0\] with its new tokens must fit {words}, got 13"),
        ({"canvas": [[MASK] * 13]}, rf"canvas\[0\] with its new tokens must fit {words}, got 13"),
        ({"canvas": [[MASK]], "min_new_tokens": 13}, rf"min_new_tokens must be at most {words}, got 13 in row 0"),
        (
            {"prompts": [[5] * 4], "max_new_tokens": 6, "block_length": 16, "last_block": "whole"},
            rf"prompts\[0\] with its last whole block must fit {words}, got 20",
        ),
        ({"prompts": [[5]] * 3, "max_new_tokens": 4}, f"than {rows}, got 3 rows; say batch_size=2"),
        ({"prompts": [[5]], "max_new_tokens": 4, "batch_size": 3}, f"batch_size must be <= {rows}, got batch_size=3"),
    ]:
        with pytest.raises(ValueError, match=message):
            dlm_fast.generate(model, **arguments)
    prompts = random_prompts([3, 4, 5])
    out = dlm_fast.generate(model, prompts, max_new_tokens=4, batch_size=2)
    free = limited(kind, tmp_path)
    assert same(out, range(3), dlm_fast.generate(free, prompts, max_new_tokens=4))
    assert dlm_fast.explain(free)["max_rows"] is None


@pytest.mark.parametrize("kind", ["load", "patch"])
@pytest.mark.parametrize("name", ["max_positions", "max_rows"])
@pytest.mark.parametrize("value", [0, -3, 1.5, "8", True, [4]])
def test_a_limit_that_is_none_is_refused(kind, name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"{kind}: {name} must be a whole number >= 1 or None, got {name}="):
        limited(kind, tmp_path, **{name: value})


@pytest.mark.parametrize("kind", ["load", "patch"])
def test_no_limit_is_above_what_the_model_has(kind, tmp_path):
    limited(kind, tmp_path, max_positions=256)
    with pytest.raises(ValueError, match=f"{kind}: max_positions must be a whole number <= 256 or None, got max_pos"):
        limited(kind, tmp_path, max_positions=257)


def test_the_command_line_hands_limits_on(tmp_path, capsys):
    save_toy_checkpoint(tmp_path / "model")
    argv = ["generate", "--model", str(tmp_path / "model"), "--device", "cpu", "--max-new-tokens", "4"]
    assert cli.main([*argv, "--prompt", "ab", "--max-positions", "8", "--max-rows", "1"]) == 0
    capsys.readouterr()
    for flags, message in [
        (["--prompt", "ab", "--max-positions", "7"], "must fit max_positions=7 that the model was opened with, got 8"),
        (["--prompt", "a", "--prompt", "b", "--max-rows", "1"], "max_rows=1 that the model was opened with, got"),
        (["--prompt", "a", "--max-rows", "0"], "load: max_rows must be a whole number >= 1"),
    ]:
        assert cli.main([*argv, *flags]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "model"), "--max-rows", "1"]) == 0
    assert cli.main(["doctor", "--max-rows", "1"]) == 1
    assert "--max-rows goes with a model, got doctor" in capsys.readouterr().err
