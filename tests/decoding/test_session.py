"""Sessions: slots that stay full. A row is decoded as alone, whatever came before it, beside it and after it."""

from __future__ import annotations

import gc
import math
import random
import threading

import pytest
import torch
from helpers import EOS, MASK, RUNNABLE, VOCAB, bolder, model_for, options_of, random_prompts, toy, toy_tokenizer
from opened import random_grid
from torch import nn

import dlm_fast
from dlm_fast import Completion, DecodeCancelled, DecodeInterrupted, Request, Session
from dlm_fast.decoding import pages as pools
from dlm_fast.decoding import progress
from dlm_fast.decoding.step import Decode
from dlm_fast.presets import resolve

CASES = 500
# What is fast is tried most.
BACKENDS = ("cpu", "cpu", "reference")
# Presets that share the beginnings of prompts.
SHARING = ("sdar", "llada2", "d2f", "fast-dllm-v2")


def of_row(row: Completion) -> tuple:
    tensors = (row.ids, row.canvas, row.unmask_step)
    return (*(x.tolist() for x in tensors), row.nfe, row.query_tokens, row.finish)


def lone(model, request: Request, options: dict) -> tuple:
    """The row that `generate` gives the request alone."""
    names = ("max_new_tokens", "min_new_tokens", "temperature", "seed")
    own = {name: value for name in names if (value := getattr(request, name)) is not None}
    out = dlm_fast.generate(
        model, [request.prompt], **{**options, **own}, request_ids=[request.request_id], eos_token_ids=[EOS]
    )
    tensors = (out.sequences, out.canvas, out.unmask_step)
    return (*(rows[0].tolist() for rows in tensors), out.nfe[0], out.query_tokens[0], out.finish[0])


def can_draw(preset: str) -> bool:
    chosen = resolve(preset, dlm_fast.PRESETS[preset].visibility, options_of(preset))
    return chosen.drafts == 1 and not any(policy.greedy_only for policy in chosen.policies)


def poisoned(session: Session) -> None:
    """Fills all of the cache that no row holds with NaN, after every step."""
    runner = session._runner
    cache = runner.slots.cache
    if cache is None or runner.pages is None:
        return
    free = [page for page in range(runner.pages.count) if not runner.pages._holders[page]]
    for layer in cache.layers:
        layer.keys[free], layer.values[free] = math.nan, math.nan


def check_case(seed: int, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    rng = random.Random(seed)
    preset = RUNNABLE[seed % len(RUNNABLE)]
    model, count = model_for(preset, backend=rng.choice(BACKENDS)), rng.randint(3, 9)
    options = {**options_of(preset), **(bolder(preset) if rng.random() < 0.5 else {})}
    draws = can_draw(preset)
    requests = [
        Request(
            prompt,
            max_new_tokens=rng.choice([None, rng.randint(1, 17)]),
            min_new_tokens=rng.choice([None, 1]),
            temperature=rng.choice([0.7, 1.3]) if draws and rng.random() < 0.3 else None,
            seed=rng.choice([None, rng.randrange(2**40)]),
            request_id=rng.randrange(1000),
            id=number,
        )
        for number, prompt in enumerate(random_prompts([rng.randint(1, 40) for _ in range(count)], seed))
    ]
    slots, page_size = rng.choice([1, 3, 8]), 32
    session = Session(
        model, preset, slots=slots, max_positions=64, max_new_tokens=17, page_size=page_size, seed=7,
        cache_positions=rng.choice([None, 64, 128]) if dlm_fast.PRESETS[preset].operation.stores else None, **options,
    )  # fmt: skip
    options |= {"preset": preset, "max_new_tokens": 17, "seed": 7}
    expected = [lone(model, request, options) for request in requests]
    with monkeypatch.context() as patched:
        init, take = progress.Progress.__init__, pools.Pages.take

        def watched(self, decode, grid):
            cache = decode.forward.cache
            for layer in cache.layers if cache is not None else ():
                layer.keys.fill_(math.nan)
                layer.values.fill_(math.nan)
            init(self, decode, random_grid(rng, grid, slots))

        def scattered(self, number, **options):
            rng.shuffle(self._free)
            return take(self, number, **options)

        patched.setattr(progress.Progress, "__init__", watched)
        patched.setattr(pools.Pages, "take", scattered)
        for order in (rng.sample(range(count), count) for _ in range(calls)):
            rows = session.generate([requests[n] for n in order], on_step=lambda state: poisoned(session))
            for number, row in zip(order, rows):
                assert row.id == number
                assert of_row(row) == expected[number], f"seed {seed} {preset} row {number} of {count} in {slots} slots"
    assert not session._runner.in_work and (
        session._runner.pages is None or session._runner.pages.free == session._runner.pages.count
    )


@pytest.mark.parametrize("seed", range(len(RUNNABLE)), ids=RUNNABLE)
def test_a_row_is_decoded_as_alone_in_any_slot_with_any_pages(seed, monkeypatch):
    check_case(seed, monkeypatch, calls=1 + seed % 2)


@pytest.mark.campaign
def test_rows_are_decoded_as_alone_in_hundreds_of_sessions(monkeypatch):
    for seed in range(CASES):
        check_case(seed, monkeypatch, calls=2)


# Requests and results


def session_of(preset: str = "sdar", **arguments) -> Session:
    options = {**options_of(preset), "slots": 3, "max_positions": 64, "max_new_tokens": 12, "page_size": 32}
    options |= {"cache_positions": 256} if dlm_fast.PRESETS[preset].operation.stores else {}
    return Session(model_for(preset, backend="cpu"), preset, **{**options, **arguments})


def test_results_come_in_the_order_of_the_requests_and_streamed_ones_as_they_finish():
    session, prompts = session_of(), random_prompts([5, 3, 9, 1, 7])
    requests = [Request(p, max_new_tokens=new) for p, new in zip(prompts, (12, 2, 4, 1, 3))]
    rows = session.generate(requests)
    assert [row.index for row in rows] == [0, 1, 2, 3, 4]
    streamed = list(session.generate(requests, stream=True))
    assert [index for index, _ in streamed] != sorted(index for index, _ in streamed)
    assert {index: of_row(row) for index, row in streamed} == {row.index: of_row(row) for row in rows}


def test_a_request_may_be_a_prompt_a_mapping_or_a_request_and_is_read_when_a_slot_is_free():
    session, taken = session_of(slots=2), []

    def requests():
        for number, item in enumerate([[5, 6], {"prompt": [5, 6], "id": "b"}, Request([5, 6], id="c"), [5, 6]]):
            taken.append(number)
            yield item

    first = next(session.generate(requests(), stream=True))
    assert taken == [0, 1] and first[0] == 0
    # The generator was dropped, and its slots are free.
    gc.collect()
    rows = session.generate(requests(), n=1)
    assert [row.id for row in rows] == [None, "b", "c", None]
    assert len({tuple(row.ids.tolist()) for row in rows}) == 1


def test_answers_to_one_prompt_have_noise_of_their_own_that_a_key_names():
    session = session_of("llada", temperature=1.0)
    rows = session.generate([[5, 6, 7], [8, 9]], n=3)
    assert [(row.index, row.sample) for row in rows] == [(i, s) for i in (0, 1) for s in (0, 1, 2)]
    assert len({tuple(row.canvas.tolist()) for row in rows}) == 6
    again = session.generate([Request([8, 9], request_id=3)], n=3)
    assert [of_row(row) for row in again] == [of_row(row) for row in rows[3:]]


def test_a_bad_request_fails_alone_and_says_why():
    session = session_of(max_positions=32, cache_positions=32)
    requests = [
        [5, 6], [VOCAB], {"prompt": [5], "max_tokens": 3}, Request([5], max_new_tokens=13), [7] * 30,
        Request(canvas=[5, MASK]), {}, Request([5], temperature=-1), Request([5], seed=2**63), 7, [8, 9],
        Request([5], canvas=[5, MASK]), Request([5], stop_strings=["a"]),
    ]  # fmt: skip
    rows = session.generate(requests)
    errors = [row.error for row in rows]
    assert [row.finish == "error" for row in rows] == [error is not None for error in errors]
    assert errors[0] is None and errors[10] is None
    for row, said in {
        1: "prompt must hold ids in [0, 48), got 48",
        2: "a request may have canvas, id, max_new_tokens, min_new_tokens, prompt, request_id, seed, stop_strings, "
        "temperature, got max_tokens",
        3: "max_new_tokens=12 positions from its first mask on, got 13",
        4: "at most max_positions=32 positions, got",
        5: "canvas needs a session with infill=True",
        6: "exactly one of prompt and canvas",
        7: "temperature must be a finite number >= 0, got temperature=-1",
        8: "seed must be a whole number in [0, 2^63), got seed=9223372036854775808",
        9: "prompt must be a string, a chat or token ids, got",
        11: "exactly one of prompt and canvas",
        12: "stop_strings need a tokenizer",
    }.items():
        assert said in errors[row], (row, errors[row])
    assert not any(row.canvas.numel() for row in rows if row.finish == "error")


def test_canvases_are_filled_in_beside_prompts():
    session, canvas = session_of("llada2", infill=True), [5, 6, MASK, MASK, 7, 8, 9, 10, 11, 12, MASK]
    filled, prompted = session.generate([Request(canvas=canvas), [5, 6, 7]])
    out = dlm_fast.generate(model_for("llada2"), canvas=[canvas], preset="llada2", **options_of("llada2"))
    assert filled.canvas.tolist() == out.canvas[0].tolist() and filled.nfe == out.nfe[0]
    assert prompted.canvas.tolist()[:3] == [5, 6, 7]
    refused = session.generate([Request(canvas=canvas, max_new_tokens=3), Request(canvas=[MASK] * 13)])
    assert "max_new_tokens goes with a prompt" in refused[0].error
    assert "got 13" in refused[1].error


def test_a_row_that_makes_no_progress_is_an_error_of_its_own():
    model = model_for("llada")

    def never(view, choice):
        odd = (view.state.tokens[:, 0] == 9)[:, None]
        return choice.only(view.eligible & ~odd)

    session = Session(model, "llada", slots=2, max_positions=32, max_new_tokens=4, policy=never, block_length=4)
    rows = session.generate([[5, 6], [9, 6], [7, 7], [9, 9], [5, 5]])
    assert [row.finish == "error" for row in rows] == [False, True, False, True, False]
    assert "no end within max_steps=" in rows[1].error


# Texts and blocks


@pytest.mark.parametrize("preset", ["sdar", "llada2", "d2f", "llada", "llada2.1"])
def test_the_texts_of_blocks_add_up_to_the_text(preset):
    tok, told, rng = toy_tokenizer(), {}, random.Random(3)
    session = session_of(preset, tokenizer=tok, stop_strings=["a", "qz", "1f"])
    prompts = ["".join(rng.choice("abcdefgh 123") for _ in range(rng.randint(1, 9))) for _ in range(12)]
    rows = session.generate(prompts, on_block=lambda block: told.setdefault(block.index, []).append(block))
    for row in rows:
        blocks = told[row.index]
        assert "".join(block.text for block in blocks) == row.text
        assert [block.last for block in blocks] == [False] * (len(blocks) - 1) + [True]
        assert torch.cat([block.ids for block in blocks]).tolist()[: len(row.ids)] == row.ids.tolist()
    if preset == "sdar":
        assert max(map(len, told.values())) > 2


def test_stop_strings_are_those_of_the_request_or_of_the_session():
    tok = toy_tokenizer()
    session = session_of("llada", tokenizer=tok, stop_strings=["zz"])
    plain = session.generate(["abc", "def"])
    stops = [row.text[1] for row in plain]
    requests = [Request("abc", stop_strings=[stops[0]]), "abc", Request("def", stop_strings=[stops[1], "@"])]
    rows = session.generate(requests)
    assert rows[0].text == plain[0].text[: plain[0].text.index(stops[0])] and rows[0].finish == "stop"
    assert rows[1].text == plain[0].text
    assert rows[2].text == plain[1].text[: plain[1].text.index(stops[1])]


# Ends before the end


def test_a_closed_iterator_frees_its_slots_and_keeps_what_was_finished():
    session, prompts = session_of(slots=4), random_prompts([4] * 8)
    requests = [Request(p, max_new_tokens=1 if n < 4 else 12) for n, p in enumerate(prompts)]
    rows = session.generate(iter(requests), stream=True)
    index, first = next(rows)
    with pytest.raises(RuntimeError, match="generate must end, or its iterator be closed, before the next call"):
        session.generate([[5]])
    with pytest.raises(RuntimeError, match="close must follow the end of generate"):
        session.close()
    rows.close()
    assert [row.index for row in session.undelivered] == [1, 2, 3]
    expected = session.generate(requests)
    assert [of_row(row) for row in [first, *session.undelivered]] == [of_row(expected[index])]
    pages = session._runner.pages
    assert pages.free == pages.count


@pytest.mark.parametrize("stream", [False, True])
def test_an_interrupt_keeps_finished_rows_and_those_in_work(stream):
    session, prompts = session_of(slots=2), random_prompts([4] * 5)
    requests = [Request(p, max_new_tokens=new) for p, new in zip(prompts, (2, 12, 12, 12, 12))]
    whole = session.generate(requests)
    steps = []

    def interrupt(state) -> None:
        steps.append(state)
        if len(steps) == 8:
            raise KeyboardInterrupt

    got = []
    with pytest.raises(DecodeInterrupted) as caught:
        for _, row in session.generate(requests, stream=stream, on_step=interrupt):
            got.append(row)
    rows = got + caught.value.output
    assert [row.index for row in rows] == [0, 1, 2]
    assert of_row(rows[0]) == of_row(whole[0])
    assert [row.finish for row in rows[1:]] == ["unfinished"] * 2 and caught.value.rows == [1, 2]
    assert [of_row(row) for row in session.generate(requests)] == [of_row(row) for row in whole]


def test_a_call_is_cancelled_between_two_steps():
    session, cancel = session_of(slots=2), threading.Event()
    with pytest.raises(DecodeCancelled) as caught:
        session.generate(random_prompts([4] * 5), cancel=cancel, on_step=lambda state: cancel.set())
    assert [row.finish for row in caught.value.output] == ["unfinished"] * 2


# Slots stay full


def test_a_free_slot_takes_the_next_prompt_and_delays_others_by_one_round():
    session, prompts = session_of(slots=3), random_prompts([6] * 9)
    read, occupied, order = [], [], []

    def requests():
        for number, prompt in enumerate(prompts):
            read.append(number)
            yield Request(prompt, max_new_tokens=3 if number else 12)

    def watch(state) -> None:
        order.append(int(state.step[0]))
        if len(read) < len(prompts):
            occupied.append(int((state.phase != 3).sum()))

    session.generate(requests(), on_step=watch)
    # While prompts wait, a slot is empty only in the last step of its row.
    assert min(occupied) >= 1 and sum(occupied) > 2 * len(occupied)
    # The long row, in slot 0, sits out one step at most between two of its own.
    steps = order[: order.index(max(order)) + 1]
    assert all(c > a for a, c in zip(steps, steps[2:]))


def test_three_hundred_calls_grow_nothing():
    session = session_of("d2f", slots=2)

    def tensors() -> int:
        gc.collect()
        return sum(1 for x in gc.get_objects() if isinstance(x, torch.Tensor))

    for _ in range(3):
        session.generate(random_prompts([4, 9, 2]), on_block=lambda block: None)
    before, pages = tensors(), session._runner.slots.cache.layers[0].keys.data_ptr()
    for number in range(300):
        session.generate([Request(prompt, max_new_tokens=2) for prompt in random_prompts([4], seed=number)])
    assert abs(tensors() - before) < 10
    assert session._runner.slots.cache.layers[0].keys.data_ptr() == pages


# Pages


def test_a_row_waits_for_pages_and_one_that_can_never_have_them_is_refused():
    session = session_of(slots=4, max_positions=128, max_new_tokens=12, cache_positions=96)
    prompts = random_prompts([50, 50, 80, 110, 20, 20])
    occupied = []
    rows = session.generate(prompts, on_step=lambda state: occupied.append(int((state.phase != 3).sum())))
    assert "must fit the cache, of 3 pages of 32 positions, got one of" in rows[3].error
    assert [row.finish == "error" for row in rows] == [False, False, False, True, False, False]
    # The row of 50 and the row of 80 need two and three pages of three.
    assert max(occupied) == 2 and session._runner.pages.free == 3


@pytest.mark.parametrize("seed", range(20))
def test_pages_are_free_when_nobody_holds_them_and_prefixes_are_those_that_were_kept(seed):
    rng = random.Random(seed)
    pool = pools.Pages(pools.Paging(4, 12))
    rows, contents = [], {}
    for _ in range(300):
        if rng.random() < 0.5:
            ids = tuple(rng.randint(0, 1) for _ in range(rng.randint(1, 20)))
            block = rng.choice([1, 2, 4])
            offset = rng.randint(0, 3)
            prefix = pool.find("k", ids, block, offset)
            assert prefix.length <= len(ids) and (not prefix.length or (prefix.length - offset) % block == 0)
            held = [*prefix.pages, *([] if prefix.rest is None else [prefix.rest])]
            for place in range(prefix.length):
                assert contents[held[place // 4]][place % 4] == ids[: place + 1]
            pool.hold(held)
            own = pool.take(pool.needed(len(ids) + 3) - len(prefix.pages))
            if own is None:
                pool.give(held)
                continue
            if prefix.rest is not None:
                pool.give([prefix.rest])
            mine = [*prefix.pages, *own]
            for page in own:
                contents[page] = {}
            for place in range(len(prefix.pages) * 4, len(ids)):
                contents[mine[place // 4]][place % 4] = ids[: place + 1]
            rows.append(mine)
            pool.keep("k", ids, mine)
        elif rows:
            pool.give(rows.pop(rng.randrange(len(rows))))
        used = {page for row in rows for page in row}
        assert len(used) + pool.free >= 12 - pool.kept and pool.free <= 12 - len(used)
    for row in rows:
        pool.give(row)
    assert pool.free == 12
    pool.forget()
    assert pool.free == 12 and pool.kept == 0 and not any(pool._holders)


# Shared beginnings


@pytest.mark.parametrize("preset", SHARING)
@pytest.mark.parametrize("alignment", ["abs", "rel", "both"])
def test_shared_beginnings_change_no_token(preset, alignment):
    rng = random.Random(preset)
    model, options = aligned(preset, alignment), options_of(preset)
    shared = [rng.randint(2, 40) for _ in range(45)]
    prompts = [
        shared[: rng.choice([45, 45, 31, 20])] + [rng.randint(2, 40) for _ in range(rng.randint(0, 9))]
        for _ in range(14)
    ]
    prompts += [prompts[0], prompts[0], shared]
    plain = dlm_fast.generate(model, prompts, preset=preset, max_new_tokens=9, **options)
    settings = {"max_positions": 96, "max_new_tokens": 9, "page_size": 32, "share_prefixes": True, **options}
    for slots, cache_positions, calls in ((1, None, 1), (3, 200, 1), (8, None, 2)):
        session = Session(model, preset, slots=slots, cache_positions=cache_positions, **settings)
        for _ in range(calls):
            rows = session.generate(prompts, on_step=lambda state, session=session: poisoned(session))
            assert [row.canvas.tolist() for row in rows] == [canvas.tolist() for canvas in plain.canvas]
            assert [row.nfe for row in rows] <= plain.nfe
        if slots < 8:
            continue  # so few pages may keep nothing
        saved = sum(plain.query_tokens) - sum(row.query_tokens for row in rows)
        # Prompts that are one block are shared as a whole, and not where their last row predicts what follows.
        whole = alignment == "rel"
        assert saved > (0 if whole else 100) or (whole and preset == "fast-dllm-v2" and not saved)


def aligned(preset: str, alignment: str) -> nn.Module:
    facts = {"logits_row": "previous"} if preset == "fast-dllm-v2" else {}
    return toy("block", block_alignment=alignment, backend="cpu", **facts)


def test_a_prefix_that_twenty_questions_share_is_computed_once():
    model = toy("block", block_alignment="abs", positions=2048, backend="cpu")
    rng = random.Random(0)
    prefix = [rng.randint(2, 40) for _ in range(1000)]
    questions = [prefix + [rng.randint(2, 40) for _ in range(rng.randint(5, 12))] for _ in range(20)]
    settings = {"slots": 8, "max_positions": 1100, "max_new_tokens": 8, "block_length": 4}
    plain = Session(model, "sdar", **settings).generate(questions)
    session = Session(model, "sdar", share_prefixes=True, **settings)
    rows = session.generate(questions)
    assert [row.canvas.tolist() for row in rows] == [row.canvas.tolist() for row in plain]
    saved = sum(row.query_tokens for row in plain) - sum(row.query_tokens for row in rows)
    assert saved == 19 * 1000
    # A second call finds it there, and a weight that was changed makes it anew.
    again = session.generate(questions[:1])
    assert again[0].query_tokens <= rows[1].query_tokens
    with torch.no_grad():
        model.lm_head.weight.mul_(1.0)
    assert session.generate(questions[:1])[0].query_tokens == plain[0].query_tokens


@pytest.mark.parametrize("preset", ["llada", "fast-dllm-dual", "freecache"])
def test_presets_that_see_behind_the_prompt_share_nothing(preset):
    with pytest.raises(ValueError, match=f"share_prefixes needs a block-causal model.*got preset {preset}"):
        Session(toy("full"), preset, share_prefixes=True, max_positions=64, max_new_tokens=8)


@pytest.mark.parametrize("preset", ["d2f", "sdar", "llada2", "llada", "dream", "fast-dllm-v2"])
def test_a_host_that_is_a_round_behind_serves_the_same_rows(preset, monkeypatch):
    """On a GPU the host learns one round late that a row is done, and the next one comes while others are under way."""
    shares = {"share_prefixes": True} if preset in SHARING else {}
    prompts = random_prompts([4, 30, 9, 2, 17, 5, 30, 1])
    requests = [Request(p, max_new_tokens=new) for p, new in zip(prompts, (3, 12, 5, 8, 1, 12, 12, 2))]
    requests += requests[1:3]
    whole = session_of(preset, cache_positions=None).generate(requests)
    monkeypatch.setattr(
        progress.Rounds, "may_be_late", property(lambda self: True, lambda self, late: None), raising=False
    )
    for slots in (1, 3):
        rows = session_of(preset, slots=slots, cache_positions=None, **shares).generate(requests)
        assert [row.canvas.tolist() for row in rows] == [row.canvas.tolist() for row in whole]
        assert shares or [of_row(row) for row in rows] == [of_row(row) for row in whole]


# What may happen in between


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_on_the_way_into_a_slot_leaves_nothing_there(when, monkeypatch):
    session, requests = session_of(slots=2), random_prompts([4, 9, 2, 5])
    whole = session.generate(requests)
    take, calls = Decode.take_rows, []

    def interrupted(self, rows, part):
        calls.append(rows)
        if when == "after":
            take(self, rows, part)
        if len(calls) == 2:
            raise KeyboardInterrupt
        if when == "before":
            take(self, rows, part)

    with monkeypatch.context() as patched:
        patched.setattr(Decode, "take_rows", interrupted)
        with pytest.raises(DecodeInterrupted) as caught:
            session.generate(requests)
    rows = caught.value.output
    assert [row.index for row in rows] == list(range(len(rows))) and rows[-1].finish == "unfinished"
    assert rows[-1].nfe == 0 and rows[-1].canvas.tolist()[: len(requests[len(rows) - 1])] == requests[len(rows) - 1]
    pages = session._runner.pages
    assert pages.free == pages.count and session._runner.slots.free == [0, 1]
    assert [of_row(row) for row in session.generate(requests)] == [of_row(row) for row in whole]


def test_what_a_function_of_the_user_raises_is_seen_and_the_session_goes_on():
    session, requests = session_of(slots=2), random_prompts([4, 9, 2])
    whole = session.generate(requests)
    for name in ("on_step", "on_block"):
        with pytest.raises(ZeroDivisionError):
            session.generate(requests, **{name: lambda state: 1 / 0})
        assert [of_row(row) for row in session.generate(requests)] == [of_row(row) for row in whole]


def test_a_session_serves_calls_inside_the_inference_mode_and_outside():
    session, requests = session_of("d2f", slots=2), random_prompts([4, 9, 2])
    with torch.inference_mode():
        first = session.generate(requests)
    second = session.generate(requests)
    with torch.inference_mode():
        third = session.generate(requests, stream=True)
        third = [row for _, row in sorted(third, key=lambda pair: pair[0])]
    assert [of_row(row) for row in first] == [of_row(row) for row in second] == [of_row(row) for row in third]


def test_a_model_that_was_unpatched_or_cast_is_refused():
    session = session_of()
    session.generate([[5, 6]])
    session._model.double()
    with pytest.raises(RuntimeError, match=r"the model was cast from torch.float32 to torch.float64"):
        session.generate([[5, 6]])
    session._model.float()
    session.generate([[5, 6]])
    dlm_fast.handle_of(session._model).unpatch()
    with pytest.raises(ValueError, match="is not patched"):
        session.generate([[5, 6]])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"slots": 0}, "Session: slots must be a whole number >= 1, got slots=0"),
        ({"page_size": 48}, "Session: page_size must be a power of two >= 32, got page_size=48"),
        ({"max_positions": 257}, "Session: max_positions must be a whole number <= 256 or None, got max_positions=257"),
        ({"max_new_tokens": 64}, "Session: max_new_tokens must be below max_positions=64, got max_new_tokens=64"),
        ({"lengths": [(60, 12)]}, r"Session: lengths must be pairs .* got \(60, 12\)"),
        ({"threshold": 0.5}, "threshold"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"infill": 1}, "Session: infill must be true or false, got infill=1"),
        ({"memory": 0}, "Session: memory must be a whole number >= 1 or None, got memory=0"),
    ],
)
def test_what_a_session_cannot_be_is_refused_by_name(arguments, said):
    with pytest.raises(ValueError, match=said):
        session_of(**arguments)


def test_a_cache_of_fewer_positions_goes_with_a_preset_that_keeps_keys():
    with pytest.raises(ValueError, match="cache_positions goes with a preset that keeps keys, got cache='none'"):
        session_of("llada", cache_positions=64)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"n": 0}, ValueError, "generate: n must be a whole number >= 1, got n=0"),
        ({"stream": 1}, ValueError, "generate: stream must be true or false"),
        ({"on_block": 3}, TypeError, "generate: on_block must be a function of a block, got on_block=3"),
        ({"cancel": object()}, TypeError, r"generate: cancel must have is_set\(\)"),
    ],
)
def test_what_a_call_cannot_be_is_refused_by_name(arguments, error, said):
    with pytest.raises(error, match=said):
        session_of().generate([[5, 6]], **arguments)


@pytest.mark.parametrize("requests", ["abc", {"prompt": [5]}, Request([5]), 5, None])
def test_requests_are_an_iterable_of_them(requests):
    with pytest.raises(TypeError, match="generate: requests must be an iterable of requests, got requests="):
        session_of().generate(requests)
