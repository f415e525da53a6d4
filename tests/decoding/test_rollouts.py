"""Trajectories as a trainer reads them, and weights that change between two calls of a session."""

from __future__ import annotations

import pytest
import torch
from helpers import HOST_SIDE, MASK, RUNNABLE, bolder, model_for, options_of, random_prompts, toy

import dlm_fast

PROMPTS = random_prompts([3, 6, 5])
REVISING = [name for name in RUNNABLE if dlm_fast.PRESETS[name].families & {"revise", "edit"}]
FIRST = [name for name in RUNNABLE if dlm_fast.PRESETS[name].first_token]
FILLING = [name for name in RUNNABLE if dlm_fast.PRESETS[name].stop == "fill"]

OTHERS = {*REVISING, *FIRST, *FILLING, *HOST_SIDE}


def decoded(preset: str, n: int = 2, **options):
    """Rows of a session with a slot for each, and (step, tokens) of every row after every step."""
    seen: list[tuple[list[int], torch.Tensor]] = []
    options = {**options_of(preset), **bolder(preset), **options}
    model = model_for(preset)
    with dlm_fast.Session(
        model, preset, slots=n * len(PROMPTS), max_positions=32, max_new_tokens=11, temperature=None, **options
    ) as session:
        rows = session.generate(PROMPTS, n=n, on_step=lambda s: seen.append((s.step.tolist(), s.tokens.clone())))
    return rows, seen


def unlike(rows, seen) -> list[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Row, step, rebuilt canvas and canvas seen, where the two differ."""
    found = dlm_fast.trajectories(rows)
    differ = []
    for steps, tokens in seen:
        for r, canvas in enumerate(found.before(torch.tensor(steps), MASK)):
            length = int(found.length[r])
            if not torch.equal(canvas[:length], tokens[r, :length].cpu()):
                differ.append((r, steps[r], canvas[:length], tokens[r, :length].cpu()))
    return differ


@pytest.mark.parametrize("preset", [name for name in RUNNABLE if name not in OTHERS])
def test_rebuilt_canvases_are_those_that_the_decoder_saw(preset):
    rows, seen = decoded(preset)
    assert len(seen) > 3 and unlike(rows, seen) == []


@pytest.mark.parametrize("preset", FIRST)
def test_a_first_token_that_a_commit_wrote_has_the_number_of_the_step_behind_it(preset):
    rows, seen = decoded(preset)
    for r, step, rebuilt, saw in unlike(rows, seen):
        (position,) = (rebuilt != saw).nonzero().flatten().tolist()
        assert rebuilt[position] == MASK and rows[r].unmask_step[position] == step
        assert (position - rows[r].prompt_length) % 4 == 0


@pytest.mark.parametrize("preset", ["rcr", "wino", "saber", "llada2.1"])
def test_of_a_preset_that_takes_tokens_back_the_last_write_of_a_position_counts(preset):
    rows, seen = decoded(preset)
    for _, _, rebuilt, saw in unlike(rows, seen):
        assert bool(((rebuilt == saw) | (rebuilt == MASK)).all())
    assert torch.equal(dlm_fast.trajectories(rows).before(2**20, MASK)[0][: len(rows[0].canvas)], rows[0].canvas)


def test_rows_are_stacked_in_their_order_and_padded_behind():
    rows, _ = decoded("llada", eos_token_ids=[])
    found = dlm_fast.trajectories(rows, pad_token_id=7)
    assert found.index.tolist() == [0, 0, 1, 1, 2, 2] and found.prompt_length.tolist() == [3, 3, 6, 6, 5, 5]
    assert found.length.tolist() == [len(row.canvas) for row in rows] == [14, 14, 17, 17, 16, 16]
    assert found.end.tolist() == found.length.tolist() and found.steps.tolist() == [11] * 6
    assert found.tokens.shape == (6, 17) and found.tokens[0, 14:].tolist() == [7, 7, 7]
    for r, row in enumerate(rows):
        part = slice(0, len(row.canvas))
        assert torch.equal(found.tokens[r, part], row.canvas)
        assert torch.equal(found.unmask_step[r, part], row.unmask_step)
        assert torch.equal(found.confidence[r, part], row.confidence)
        assert found.written[r].sum() == 11 and not found.written[r, : row.prompt_length].any()
    assert torch.equal(found.before(0, MASK) == MASK, found.written)
    assert (found.tokens.dtype, found.unmask_step.dtype, found.confidence.dtype) == (
        torch.int64,
        torch.int32,
        torch.float32,
    )


def test_the_confidence_of_a_draw_is_its_probability_by_a_forward_over_the_canvas_before():
    model = toy("full")
    session = dlm_fast.Session(model, "llada", slots=3, max_positions=32, max_new_tokens=8, block_length=4, seed=5)
    found = dlm_fast.trajectories(session.generate([{"prompt": p, "temperature": 1.0} for p in PROMPTS]))
    real = torch.arange(found.tokens.shape[1]) < found.length[:, None]
    for step in range(int(found.steps.max())):
        with torch.no_grad():
            logits = model(found.before(step, MASK), attention_mask=real.long()).logits
        now = found.unmask_step == step
        says = logits.softmax(-1).gather(-1, found.tokens[..., None])[..., 0]
        torch.testing.assert_close(found.confidence[now], says[now], atol=1e-5, rtol=1e-4)


def test_a_request_that_was_refused_is_a_row_of_no_positions():
    session = dlm_fast.Session(toy("full"), "llada", slots=2, max_positions=32, max_new_tokens=8)
    found = dlm_fast.trajectories(session.generate([PROMPTS[0], [9] * 40]))
    assert found.length.tolist() == [11, 0] and found.steps[1] == 0 and not found.written[1].any()
    nothing = dlm_fast.trajectories([])
    assert nothing.tokens.shape == (0, 0) and nothing.before(0, MASK).shape == (0, 0)


def test_arguments_that_make_no_canvas_are_refused_by_name():
    rows, _ = decoded("llada", n=1)
    found = dlm_fast.trajectories(rows)
    with pytest.raises(TypeError, match="completions must be Completions"):
        dlm_fast.trajectories(["a"])
    for step in (-1, torch.tensor([0, 1]), torch.tensor([0, -1, 0])):
        with pytest.raises(ValueError, match="before: step must be"):
            found.before(step, MASK)
    with pytest.raises(TypeError, match="before: step must be of integers"):
        found.before(torch.zeros(3), MASK)
