"""The shapes of a decode: few, planned for its rows; whatever they are, and whoever the neighbours, a row is decoded as
it is alone."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from helpers import RUNNABLE, bolder, model_for, options_of, random_prompts, toy
from opened import random_grid

import dlm_fast
from dlm_fast import DecodeInterrupted, DecodeOutOfMemory
from dlm_fast.decoding import progress, shapes
from dlm_fast.decoding.plan import open_rows
from dlm_fast.decoding.shapes import MOST_SHAPES, Grid, grid_of
from dlm_fast.policies import Policy
from dlm_kernels.state import DONE

CASES = 500


def lone(model, prompts: list, row: int, options: dict) -> dlm_fast.GenerateOutput:
    mine = {name: value[row : row + 1] if isinstance(value, list) else value for name, value in options.items()}
    return dlm_fast.generate(model, [prompts[row]], **mine, request_ids=[row])


def of_row(out: dlm_fast.GenerateOutput, row: int) -> tuple:
    tensors = (out.canvas, out.unmask_step, out.sequences)
    return (*(rows[row].tolist() for rows in tensors), out.nfe[row], out.query_tokens[row], out.finish[row])


def check_case(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch by a random grid against its rows alone; the cache rows of rows that are done hold NaN."""
    rng = random.Random(seed)
    preset = RUNNABLE[seed % len(RUNNABLE)]
    model, B = model_for(preset), rng.randint(2, 7)
    prompts = random_prompts([rng.randint(1, 12) for _ in range(B)], seed)
    options = {"preset": preset, "max_new_tokens": [rng.randint(1, 17) for _ in range(B)], **options_of(preset)}
    options |= bolder(preset) if rng.random() < 0.5 else {}
    order = rng.sample(range(B), B)
    opened = []
    init = progress.Progress.__init__

    def watched(self, decode, grid):
        opened.append(decode)
        cache = decode.forward.cache
        for layer in cache.layers if cache is not None else ():
            layer.keys.fill_(math.nan)
            layer.values.fill_(math.nan)
        init(self, decode, random_grid(rng, grid, B))

    def poison(state) -> None:
        cache, done = opened[0].forward.cache, (state.phase == DONE).nonzero().flatten()
        for layer in cache.layers if cache is not None else ():
            layer.keys[done], layer.values[done] = math.nan, math.nan

    with monkeypatch.context() as patched:
        patched.setattr(progress.Progress, "__init__", watched)
        shuffled = {
            name: [value[b] for b in order] if isinstance(value, list) else value for name, value in options.items()
        }
        out = dlm_fast.generate(model, [prompts[b] for b in order], **shuffled, request_ids=order, on_step=poison)
    for place, row in enumerate(order):
        alone = lone(model, prompts, row, options)
        assert of_row(out, place) == of_row(alone, 0), f"seed {seed} {preset} row {row} of {B}"


@pytest.mark.parametrize("seed", range(len(RUNNABLE)), ids=RUNNABLE)
def test_a_row_is_decoded_as_alone_in_any_bucket_with_any_neighbours_in_any_order(seed, monkeypatch):
    check_case(seed, monkeypatch)


@pytest.mark.campaign
def test_a_row_is_decoded_as_alone_in_hundreds_of_batches(monkeypatch):
    for seed in range(CASES):
        check_case(seed, monkeypatch)


@pytest.mark.parametrize(
    "preset", ["fast-dllm-dual", "fast-dllm-prefix", "fast-dllm", "sdar", "d2f", "d3llm", "freedave"]
)
@pytest.mark.parametrize("rows", [1, 5, 24])
def test_a_decode_has_few_shapes_and_one_shape_less_waste_than_one_for_all(preset, rows, monkeypatch):
    model, rng = model_for(preset), random.Random(rows)
    prompts = random_prompts([rng.randint(1, 40) for _ in range(rows)])
    options = {"preset": preset, "max_new_tokens": [rng.randint(1, 60) for _ in range(rows)], **options_of(preset)}
    out = dlm_fast.generate(model, prompts, **options)
    assert 1 <= len(out.shapes) <= MOST_SHAPES
    assert out.computed_tokens == sum(s.rows * s.width * s.drafts * n for s, n in out.shapes.items())
    assert out.computed_tokens >= sum(out.query_tokens)
    one_for_all = lambda plan, state, fixed, **options: Grid(  # noqa: E731
        {"refresh": {plan.refresh_width: (rows,)}, "denoise": {plan.denoise_width: (rows,)}},
        dict.fromkeys(("refresh", "denoise"), (plan.lanes,)), plan.preset.drafts, False, fixed,
    )  # fmt: skip
    monkeypatch.setattr(progress, "grid_of", one_for_all)
    before = dlm_fast.generate(model, prompts, **options)
    assert [of_row(before, row) for row in range(rows)] == [of_row(out, row) for row in range(rows)]
    assert out.computed_tokens <= before.computed_tokens
    if rows == 24:
        assert out.computed_tokens < 0.8 * before.computed_tokens


# An eighth of the lengths that `bench batch` measures, of published blocks, and of what a step costs a GPU besides its
# positions: what these may waste.
WASTE = {"fast-dllm-dual": 2.0, "fast-dllm-prefix": 2.5, "fast-dllm": 1.5, "sdar": 1.4, "llada2": 1.4, "d2f": 2.0}


@pytest.mark.parametrize("preset", WASTE)
def test_a_batch_of_mixed_lengths_computes_little_more_than_its_rows_need(preset, monkeypatch):
    monkeypatch.setattr(progress, "fixed_positions", lambda *of: shapes.WEIGHTS_READ["cuda"] // 8)
    draws = torch.Generator().manual_seed(0)
    prompts, new = (
        (15 * torch.exp(sigma * torch.randn(16, generator=draws))).round().int().clamp(min=1).tolist()
        for sigma in (0.6, 0.8)
    )
    options = {"preset": preset, "max_new_tokens": new, "stop": "never", **options_of(preset)}
    # The region of a pipeline grows to all of its row where a random model passes no threshold.
    options |= bolder(preset) if preset == "d2f" else {}
    out = dlm_fast.generate(model_for(preset), random_prompts(prompts), **options)
    assert out.computed_tokens <= WASTE[preset] * sum(out.query_tokens)
    assert len(out.shapes) <= MOST_SHAPES


def needs_of(widths: list[int]) -> list[tuple[int, int, int, bool]]:
    return [(width, row, 1, False) for row, width in enumerate(widths)]


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_divided_among_the_shapes_at_the_least_cost(seed):
    rng = random.Random(seed)
    widths = {w: tuple(sorted(set(rng.choices((1, 2, 4, 6), k=3)))) for w in sorted(rng.sample(range(1, 60), 3))}
    grid = Grid({"denoise": widths}, {"denoise": (64,)}, 1, False, fixed=rng.choice((0, 10, 100)))
    needs = needs_of([rng.randint(1, max(widths)) for _ in range(rng.randint(1, 7))])
    steps = grid.steps("denoise", needs)
    assert sorted(row for _, rows in steps for row in rows) == list(range(len(needs)))
    for bucket, rows in steps:
        assert len(rows) <= bucket.rows in widths[bucket.width]
        assert all(needs[row][0] <= bucket.width for row in rows)

    def least(left: list[int]) -> int:
        """By trying every first step: of the widest row's width, and as many of the next rows as it takes."""
        if not left:
            return 0
        width = min(w for w in widths if w >= left[0])
        return min(grid.fixed + n * width + least(left[n:]) for n in widths[width])

    cost = sum(grid.fixed + bucket.rows * bucket.width for bucket, _ in steps)
    assert cost == least(sorted((need[0] for need in needs), reverse=True))


def test_thousands_of_rows_are_divided():
    grid = Grid({"denoise": {32: (1, 2, 4, 8)}}, {"denoise": (32,)}, 1, False, fixed=64)
    steps = grid.steps("denoise", needs_of([32] * 5000))
    assert sum(len(rows) for _, rows in steps) == 5000


def test_the_widths_of_a_grid_are_those_that_waste_least():
    found = shapes._classes(Counter([1] * 5 + [2] * 5 + [10] * 3 + [11]), 3)
    assert found == [([11], 5 * 10 + 5 * 9 + 3), ([2, 11], 5 + 3), ([1, 2, 11], 3)]


def test_a_row_that_always_refreshes_does_not_starve_the_others():
    model, phases = toy("full", eos=()), []
    out = dlm_fast.generate(
        model,
        random_prompts([4, 4, 4]),
        preset="fast-dllm-dual",
        refresh_interval=1,
        max_new_tokens=[24, 4, 4],
        block_length=4,
        threshold=1.0,
        on_step=lambda state: phases.append((state.phase == DONE).tolist()),
    )
    done = [next(n for n, row in enumerate(phases) if row[b]) for b in range(3)]
    assert done[1] < done[0] and done[2] < done[0] and set(out.finish) == {"length"}


# What goes wrong in the middle of a decode


def test_out_of_memory_names_the_step_and_what_fitted_and_loses_no_finished_row(monkeypatch):
    model = toy("full", eos=())
    handle = dlm_fast.handle_of(model)
    prompts, options = (
        random_prompts([3, 3, 3, 20]),
        {"preset": "llada", "max_new_tokens": [2, 2, 12, 12], "block_length": 4},
    )
    whole = dlm_fast.generate(model, prompts, **options)
    hidden, calls = handle.window_hidden, []

    def short_of_memory(input_ids, window, cache):
        calls.append(input_ids.shape)
        if len(calls) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(input_ids, window, cache)

    monkeypatch.setattr(handle, "window_hidden", short_of_memory)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"out of memory in a denoise step of \d+ rows x \d+ positions"
    ) as caught:
        dlm_fast.generate(model, prompts, **options)
    assert isinstance(caught.value, DecodeOutOfMemory) and "the largest step that fitted had" in str(caught.value)
    output = caught.value.output
    assert output.finish[:2] == ["length", "length"] and caught.value.rows == [2, 3]
    assert output.finish[2:] == ["unfinished"] * 2
    assert [row.tolist() for row in output.sequences[:2]] == [row.tolist() for row in whole.sequences[:2]]
    monkeypatch.undo()
    again = dlm_fast.generate(model, prompts, **options)
    assert [of_row(again, row) for row in range(4)] == [of_row(whole, row) for row in range(4)]


def test_an_interrupted_decode_returns_the_rows_that_were_finished():
    model, seen = toy("full", eos=()), []

    def interrupt(state) -> None:
        seen.append(state)
        if (state.phase == DONE).any():
            raise KeyboardInterrupt

    options = {"preset": "llada", "max_new_tokens": [2, 20], "block_length": 4}
    with pytest.raises(KeyboardInterrupt, match="interrupted, with 1 of 2 rows not done") as caught:
        dlm_fast.generate(model, random_prompts([3, 3]), on_step=interrupt, **options)
    assert isinstance(caught.value, DecodeInterrupted) and caught.value.rows == [1]
    whole = dlm_fast.generate(model, random_prompts([3, 3]), **options)
    assert caught.value.output.finish == ["length", "unfinished"]
    assert caught.value.output.sequences[0].tolist() == whole.sequences[0].tolist()


@pytest.mark.parametrize("step", [0, 1, 5])
def test_after_a_policy_that_raises_the_next_call_is_clean(step):
    model, prompts = toy("full", eos=()), random_prompts([3, 7, 5])
    options = {"preset": "fast-dllm-dual", "max_new_tokens": [9, 14, 3], "block_length": 4}
    expected = dlm_fast.generate(model, prompts, **options)
    calls = []

    def breaks(view, choice):
        calls.append(view.rows.tolist())
        if len(calls) > step:
            raise ZeroDivisionError("a policy of mine")
        return choice

    with pytest.raises(ZeroDivisionError, match="a policy of mine"):
        dlm_fast.generate(model, prompts, policy=breaks, **options)
    again = dlm_fast.generate(model, prompts, **options)
    assert [of_row(again, row) for row in range(3)] == [of_row(expected, row) for row in range(3)]


def test_a_memory_without_one_entry_per_row_is_refused():
    class Forgetful(Policy):
        def memory(self, setting, state):
            return {"counts": torch.zeros(3, 2), "shared": torch.zeros(())}

    model = toy("full", eos=())
    with pytest.raises(
        ValueError, match=r"policy Forgetful must keep one entry per row .* memory\['counts'\].*\[3, 2\]"
    ):
        dlm_fast.generate(model, random_prompts([3, 4]), policy=Forgetful(), max_new_tokens=4)


def test_a_policy_may_count_in_what_no_row_owns():
    class Counts(Policy):
        def memory(self, setting, state):
            return {"steps": 0}

        def after(self, view, choice, written):
            view.memory["steps"] += 1
            counted.append(view.memory["steps"])

    model, counted = toy("full", eos=()), []
    options = {"max_new_tokens": [3, 9, 30], "preset": "llada", "block_length": 4}
    out = dlm_fast.generate(model, random_prompts([3, 30, 5]), policy=Counts(), **options)
    assert counted == list(range(1, sum(out.shapes.values()) + 1))


@pytest.mark.parametrize(
    "preset, cache", [("sdar", "fused"), ("sdar", "commit"), ("llada", "none"), ("freecache", "once")]
)
def test_a_policy_asks_for_refreshes_only_where_keys_grow_stale(preset, cache):
    class Refreshes(Policy):
        def refreshes(self, view, choice, written):
            return view.block_step >= 0

    model = model_for(preset)
    with pytest.raises(
        ValueError, match="policy Refreshes asks for refreshes, which go with cache 'prefix'.*got cache="
    ):
        dlm_fast.generate(
            model,
            random_prompts([3]),
            preset=preset,
            policy=Refreshes(),
            cache=cache,
            max_new_tokens=8,
            **options_of(preset),
        )


def test_a_policy_sees_which_rows_a_step_computes_and_its_memory_follows_them():
    class Counted(Policy):
        def memory(self, setting, state):
            return {"steps": torch.zeros(state.tokens.shape[0], dtype=torch.int32), "seen": []}

        def after(self, view, choice, written):
            view.keep("steps", view.memory["steps"] + 1)
            view.memory["seen"].append(view.rows.tolist())
            kept.update(zip(view.rows.tolist(), view.memory["steps"].tolist()))

    model, kept = toy("full", eos=()), {}
    out = dlm_fast.generate(
        model, random_prompts([3, 30, 5]), policy=Counted(), max_new_tokens=[3, 9, 30], preset="llada", block_length=4
    )
    assert [kept[row] for row in range(3)] == out.nfe
    assert any(shape.rows < 3 for shape in out.shapes)


def test_in_16_bit_a_rows_bits_do_not_hang_on_what_the_neighbours_hold():
    # The same lengths and the same fixed schedule give the same shapes, whatever the other rows' tokens are.
    model = toy("full", eos=()).to(torch.bfloat16)
    options = {"preset": "llada", "block_length": 4, "max_new_tokens": [8, 12, 5]}
    mine, others = random_prompts([6])[0], (random_prompts([3, 9], 1), random_prompts([3, 9], 2))
    outs = [dlm_fast.generate(model, [mine, *other], **options) for other in others]
    assert outs[0].shapes == outs[1].shapes
    assert of_row(outs[0], 0) == of_row(outs[1], 0)
    assert torch.equal(outs[0].confidence[0], outs[1].confidence[0])


def test_grids_of_models_of_any_size_are_few_shapes():
    for parameters in (1, 10**6, 10**9, 10**11):
        for device in ("cpu", "cuda", "mps"):
            fixed = shapes.fixed_positions(device, parameters)
            assert 8 <= fixed <= 4096
            for B, refresh, budget in itertools.product((1, 3, 64, 1000), (40, 900), (MOST_SHAPES, 8, 4)):
                expected = {"refresh": Counter({30: 1, refresh: 2}), "denoise": Counter({32: 9})}
                grid = shapes._counts(expected, B, budget, fixed)
                assert sum(len(counts) for widths in grid.values() for counts in widths.values()) <= budget
                assert max(grid["refresh"]) == refresh and max(grid["denoise"]) == 32
                assert all(counts[0] == 1 for widths in grid.values() for counts in widths.values())


def test_the_grid_of_a_long_canvas_is_planned_from_few_of_its_blocks(monkeypatch):
    counted = Counter()
    positions = shapes._positions
    monkeypatch.setattr(shapes, "_positions", lambda *given: (counted.update(["calls"]), positions(*given))[1])
    model = toy("block")
    handle = dlm_fast.patching.handle_of(model)
    mask = handle.diffusion.mask_token_id
    for length in (16, 6000):
        canvases = [torch.full((length,), mask), torch.full((4,), mask)]
        plan, state = open_rows(canvases, dlm_fast.PRESETS["d2f"], handle.diffusion, torch.device("cpu"))
        grid = grid_of(plan, state, 256)
        assert all(max(widths) >= plan.bucket(kind).width for kind, widths in grid.counts.items())
    assert counted["calls"] <= 2 * 2 * len(shapes.PIPELINE_BLOCKS) * shapes.PLANNED_BLOCKS


@pytest.mark.parametrize("preset", ["llada", "fast-dllm-dual", "klass", "sdar", "d2f", "freedave"])
def test_a_decode_in_inference_mode_is_the_same(preset):
    options = {"preset": preset, "max_new_tokens": [9, 4, 13], **options_of(preset)}
    model, prompts = model_for(preset), random_prompts([5, 1, 8])
    with torch.inference_mode():
        inside = dlm_fast.generate(model, prompts, **options)
    outside = dlm_fast.generate(model, prompts, **options)
    assert [of_row(inside, row) for row in range(3)] == [of_row(outside, row) for row in range(3)]


def test_what_a_step_shows_can_be_kept_written_and_trained_on():
    kept = []
    model = toy("full", eos=())
    hook = model.model.register_forward_hook(lambda module, args, out: kept.append(out.last_hidden_state.clone()))
    out = dlm_fast.generate(
        model, random_prompts([3]), max_new_tokens=4, preset="llada", block_length=4,
        on_step=lambda state: kept.append(state.unmask_confidence.clone()),
    )  # fmt: skip
    hook.remove()
    weights = [torch.ones_like(x, requires_grad=True) for x in kept]
    sum((weight * x).sum() for weight, x in zip(weights, kept)).backward()
    assert len(kept) == 2 * out.nfe[0] and all(torch.equal(w.grad, x) for w, x in zip(weights, kept))
    for x in kept:
        x.zero_()


def test_the_result_says_which_shapes_ran():
    out = dlm_fast.generate(toy("full", eos=()), random_prompts([3]), max_new_tokens=4, preset="llada", block_length=4)
    ((shape, steps),) = out.shapes.items()
    assert isinstance(shape, tuple) and shape == ("denoise", 1, 7, 4, 1) and steps == 4


def test_the_shapes_of_rows_that_come_and_go_are_few_and_cost_less_than_those_of_a_batch():
    rng = random.Random(0)
    widths = Counter({32 * n: rng.randrange(1, 9) for n in range(1, 30)})
    expected = {"refresh": Counter(widths), "denoise": Counter({width: 4 * n for width, n in widths.items()})}
    for B in (1, 8, 32):
        costs = []
        for plan in (shapes._counts, shapes._counts_of_rounds):
            counts = plan({kind: Counter(widths) for kind, widths in expected.items()}, B, MOST_SHAPES, 228)
            assert sum(len(rows) for widths in counts.values() for rows in widths.values()) <= MOST_SHAPES
            assert all(list(widths) == sorted(widths) and max(widths) == 32 * 29 for widths in counts.values())
            grid = Grid(counts, {"refresh": (32,), "denoise": (32,)}, 1, False, 228)
            cost = 0.0
            for kind, known in expected.items():
                rounds = shapes._rounds(kind, known, B)
                served = sum(grid.cost(kind, tuple(grid.class_of(kind, width) for width in rows)) for rows in rounds)
                cost += served * known.total() / sum(map(len, rounds))
            costs.append(cost)
        assert costs[1] <= costs[0]
