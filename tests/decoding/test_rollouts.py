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


# Weights that change between two calls


def session_of(model, share: bool) -> dlm_fast.Session:
    return dlm_fast.Session(
        model, slots=2, max_positions=128, max_new_tokens=6, share_prefixes=share, page_size=32, temperature=1.0
    )


def canvases(session, **options) -> list[list[int]]:
    return [row.canvas.tolist() for row in session.generate(random_prompts([45]), n=2, **options)]


def step_of(optimizer: type, **options):
    def change(model) -> None:
        model(torch.tensor([[5, 6, 7, 8]])).logits.logsumexp(-1).sum().backward()
        optimizer(model.parameters(), lr=0.1, **options).step()

    return change


def replace_the_head(model) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())


def replace_twice(model) -> None:
    """The second parameter may get the address of the one before the first."""
    for factor in (1.5, 1.5):
        layer = model.model.layers[0].self_attn.k_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach() * factor)


def give_other_data(model) -> None:
    for parameter in model.model.layers[0].self_attn.parameters():
        parameter.data = parameter.data * 1.5


def load_a_state(model) -> None:
    model.load_state_dict({name: value * 1.25 for name, value in model.state_dict().items()})


def tie(model) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def change_the_tied_weight(model) -> None:
    tie(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)


def change_in_inference_mode(model) -> None:
    with torch.inference_mode():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)


def add_an_adapter(model) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, model)
    model.eval()


CHANGES = {
    "sgd": step_of(torch.optim.SGD),
    "adamw": step_of(torch.optim.AdamW),
    "fused adamw": step_of(torch.optim.AdamW, fused=True),
    "replaced head": replace_the_head,
    "replaced twice": replace_twice,
    "other data": give_other_data,
    "loaded state": load_a_state,
    "tied": tie,
    "tied and changed": change_the_tied_weight,
    "inference mode": change_in_inference_mode,
    "adapter": add_an_adapter,
}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_call_after_a_change_of_weights_gives_what_a_fresh_session_gives(name, share):
    model = toy("block", block_alignment="abs", backend="cpu")
    session = session_of(model, share)
    before = canvases(session)
    assert canvases(session) == before
    CHANGES[name](model)
    after = canvases(session)
    assert after == canvases(session_of(model, False)) != before


def test_prompts_are_kept_where_nothing_was_changed_and_forgotten_after_a_change():
    model = toy("block", block_alignment="abs", backend="cpu")
    session = session_of(model, True)
    work = [[row.query_tokens for row in session.generate([PROMPTS[0] + [9] * 90])] for _ in range(2)]
    assert work[1][0] < work[0][0]
    step_of(torch.optim.AdamW, fused=True)(model)
    again = [row.query_tokens for row in session.generate([PROMPTS[0] + [9] * 90])]
    session.forget_prefixes()
    forgotten = [row.query_tokens for row in session.generate([PROMPTS[0] + [9] * 90])]
    kept = [row.query_tokens for row in session.generate([PROMPTS[0] + [9] * 90])]
    assert min(again[0], forgotten[0]) > kept[0]


def test_prompts_are_forgotten_where_a_change_through_data_is_announced():
    model = toy("block", block_alignment="abs", backend="cpu")
    session = session_of(model, True)
    canvases(session)
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(1.5)
    session.forget_prefixes()
    assert canvases(session) == canvases(session_of(model, False))


@pytest.mark.parametrize("change", ["merge", "unmerge", "disable", "scale"])
def test_prompts_are_forgotten_where_an_adapter_is_merged_or_switched(change):
    pytest.importorskip("peft")
    model = toy("block", block_alignment="abs", backend="cpu")
    add_an_adapter(model)
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    if change == "unmerge":
        [layer.merge() for layer in layers]
    session = session_of(model, True)
    before = canvases(session)
    for layer in layers:
        {
            "merge": layer.merge,
            "unmerge": layer.unmerge,
            "disable": lambda layer=layer: layer.enable_adapters(False),
            "scale": lambda layer=layer: layer.scale_layer(3.0),
        }[change]()
    work = [row.query_tokens for row in session.generate(random_prompts([70]))]
    fresh = session_of(model, True)
    assert work == [row.query_tokens for row in fresh.generate(random_prompts([70]))]
    assert canvases(session) == canvases(session_of(model, False))
    assert (canvases(session) == before) == ("merge" in change)


def test_prompts_are_not_kept_between_calls_where_weights_do_not_count_their_changes():
    with torch.inference_mode():
        model = toy("block", block_alignment="abs", backend="cpu")
    session = session_of(model, True)
    canvases(session)
    with torch.inference_mode():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    assert canvases(session) == canvases(session_of(model, False))
