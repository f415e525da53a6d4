"""A denoise step of every preset: it reads nothing on the host and is one graph of few launches, its rows do not depend
on each other, and one loop and one table serve all presets."""

from __future__ import annotations

import ast
import dataclasses
import traceback
import types
from pathlib import Path

import pytest
import torch
from helpers import HOST_SIDE, RUNNABLE, VOCAB, model_for, native_model, options_of, random_prompts, toy
from opened import faked, opened
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dlm_fast
from dlm_fast import presets
from dlm_fast.decoding.progress import run_steps
from dlm_fast.decoding.step import denoise_step, open_decode
from dlm_fast.models import adapter_for
from dlm_fast.ops import REFERENCE
from dlm_fast.patching import attach
from dlm_fast.policies.constants import Constants
from dlm_fast.presets import PRESETS, caches, resolve
from dlm_kernels import RowState, Window
from dlm_kernels.state import DENOISE, DONE, REFRESH, amend

ON_THE_DEVICE = [name for name in RUNNABLE if name not in HOST_SIDE]


@pytest.mark.parametrize(
    "preset, temperature, backend",
    [
        *((name, temperature, "reference") for name in ON_THE_DEVICE for temperature in (0.0, 1.0)),
        *((name, 0.0, "triton") for name in ("fast-dllm-dual", "d2f", "wino", "dkv-cache", "freedave-block")),
    ],
)
def test_a_denoise_step_reads_nothing_on_the_host(preset, temperature, backend):
    """FakeTensorMode has no values to read: item, tolist, bool, nonzero and boolean indexing raise."""
    if backend == "triton":
        pytest.importorskip("triton")
    chosen = resolve(preset, PRESETS[preset].visibility, options_of(preset))
    if temperature and (chosen.drafts > 1 or any(policy.greedy_only for policy in chosen.policies)):
        pytest.skip("greedy only")
    diffusion, plan, state, sampling = opened(chosen, temperature)
    # A class of models is tried once, and on real tensors.
    attach(native_model(), backend=backend, diffusion=diffusion, plain_mode=chosen.visibility)
    model = native_model().requires_grad_(False)
    adapter_for(model).probe(type(model))  # which runs a model once, with values
    with FakeTensorMode() as fake:
        for module in model.modules():
            for values in (module._parameters, module._buffers):
                values.update({name: fake.from_tensor(tensor) for name, tensor in values.items() if tensor is not None})

        handle = attach(model, backend=backend, diffusion=diffusion, plain_mode=chosen.visibility)
        decode = open_decode(handle, *(faked(values, fake) for values in (plan, state, sampling)))
        for kind in ("refresh", "denoise") if plan.refresh_width else ("denoise",):
            denoise_step(decode, plan.bucket(kind, drafts=chosen.drafts if kind == "denoise" else 1))
        with pytest.raises(Exception, match="_local_scalar_dense|(?i:data.dependent)"):
            decode.state.phase.tolist()


class Launches(TorchDispatchMode):
    """Counts torch ops that launch something, outside the model and the three ops."""

    def __init__(self) -> None:
        super().__init__()
        self.outside, self.ops, self.inside = 0, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.inside and not function.is_view and not function.overloadpacket.__name__.startswith("empty"):
            self.outside += 1
        return function(*args, **(kwargs or {}))

    def within(self, function, name=None):
        def counted(*args, **kwargs):
            self.ops += [name] if name else []
            self.inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.inside -= 1

        return counted


@pytest.mark.parametrize("preset", ["llada", "fast-dllm-dual", "sdar", "d2f"])
def test_a_denoise_step_is_the_model_three_ops_and_at_most_forty_small_launches(preset):
    """In a captured graph a small launch costs a microsecond or two, so forty of them cost a percent of an 8B model's
    step. docs/launches.md counts those of every preset."""
    chosen = resolve(preset, PRESETS[preset].visibility, options_of(preset))
    diffusion, plan, state, sampling = opened(chosen)
    counter = Launches()
    names = ("block_attention", "confidence", "unmask")
    ops = dataclasses.replace(REFERENCE, **{name: counter.within(getattr(REFERENCE, name), name) for name in names})
    model = native_model().requires_grad_(False)
    handle = attach(model, backend=ops, diffusion=diffusion, plain_mode=chosen.visibility)
    adapter = {name: counter.within(getattr(handle.adapter, name)) for name in ("new_cache", "window_hidden", "head")}
    handle.adapter = types.SimpleNamespace(**{**vars(handle.adapter), **adapter})
    decode = open_decode(handle, plan, state, sampling)
    if plan.refresh_width:
        denoise_step(decode, plan.bucket("refresh"))
    counter.ops.clear()
    with torch.no_grad(), counter:
        denoise_step(decode, plan.bucket("denoise"))
    assert counter.ops == ["block_attention"] * model.config.num_hidden_layers + ["confidence", "unmask"]
    assert counter.outside <= (40 if plan.defers else 30)


@pytest.mark.parametrize(
    "preset, backend",
    [("fast-dllm-dual", "reference"), ("d2f", "reference"), ("d2f", "triton"), ("freedave-block", "triton")],
)
def test_a_denoise_step_compiles_to_one_graph_that_does_the_same(preset, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    chosen = resolve(preset, PRESETS[preset].visibility, options_of(preset))

    @torch.no_grad()
    def state_after(step) -> RowState:
        diffusion, plan, state, sampling = opened(chosen)
        handle = attach(
            native_model().requires_grad_(False), backend=backend, diffusion=diffusion, plain_mode=chosen.visibility
        )
        decode = open_decode(handle, plan, state, sampling)
        for kind in ("refresh", "denoise", "denoise"):
            step(decode, plan.bucket(kind, drafts=chosen.drafts if kind == "denoise" else 1))
        return state

    torch._dynamo.reset()
    expected, found = (
        state_after(denoise_step),
        state_after(torch.compile(denoise_step, backend="aot_eager", fullgraph=True)),
    )
    for field in dataclasses.fields(RowState):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name


class Writes(TorchDispatchMode):
    """The functions in which any tensor of a state is written."""

    def __init__(self, state: RowState, writers: dict) -> None:
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in vars(state).values()}
        self.writers, self.found = writers, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for argument, tensor in zip(function._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                if tensor.untyped_storage().data_ptr() in self.storages:
                    frames = (frame for frame, _ in traceback.walk_stack(None))
                    self.found.add(
                        next((self.writers[f.f_code] for f in frames if f.f_code in self.writers), "another")
                    )
        return function(*args, **(kwargs or {}))


def test_amend_changes_the_rows_it_is_told_and_refuses_what_it_would_have_to_cast():
    state = RowState.empty(3, 4, "cpu")
    rows = torch.tensor([True, False, True])
    amend(state, rows, phase=DONE, tokens=torch.tensor([[1], [2], [3]]))
    assert state.phase.tolist() == [DONE, REFRESH, DONE] and state.tokens.tolist() == [[1] * 4, [0] * 4, [3] * 4]
    for wrong in (2.7, True, torch.zeros(3), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"amend: step must be (a tensor or a whole number|torch.int32), got"):
            amend(state, rows, step=wrong)
    with pytest.raises(ValueError, match="amend: a value must be named by a field of RowState, got steps"):
        amend(state, rows, steps=1)


@pytest.mark.parametrize("preset", RUNNABLE)
def test_a_state_is_written_by_unmask_and_by_amend(preset):
    """Whatever a decoder does to a row besides unmasking goes through one function."""
    chosen = resolve(
        preset, PRESETS[preset].visibility, options_of(preset) | ({"eotp": True} if preset == "learn2pd" else {})
    )
    diffusion, plan, state, sampling = opened(chosen)
    handle = attach(
        native_model().requires_grad_(False), backend="reference", diffusion=diffusion, plain_mode=chosen.visibility
    )
    decode = open_decode(handle, plan, state, sampling)
    constants = {name: x.clone() for name, x in vars(plan.constants).items() if isinstance(x, torch.Tensor)}
    # A step of some rows is written back as a whole.
    known = {amend: "amend", REFERENCE.unmask: "unmask", RowState.put_rows: "put_rows"}
    with Writes(state, {function.__code__: name for function, name in known.items()}) as writes:
        run_steps(decode, None)
    amends = chosen.refresh_interval or chosen.warmup_steps or preset in ("entropy-cache", "learn2pd", "llada2.2")
    assert writes.found - {"put_rows"} == ({"unmask", "amend"} if amends else {"unmask"})
    assert (state.phase == DONE).all()
    for name, before in constants.items():
        assert torch.equal(getattr(plan.constants, name), before), f"a step wrote the constants {name}"


def test_constants_are_views_and_a_part_that_is_too_long_is_refused():
    constants = Constants.of(rows=4, length=2000, horizon=None, device=torch.device("cpu"))
    assert constants.places(3, 5).tolist() == constants.counted(3, 5).tolist() == [5, 6, 7]
    assert constants.zeros(2, 3, dtype=torch.float32).tolist() == [[0.0] * 3] * 2
    assert constants.nothing(2).tolist() == [-1, -1]
    storages = {x.untyped_storage().data_ptr() for x in (constants.places(9), constants.indices)}
    assert len(storages) == 1
    for part in (constants.places, constants.nothing, constants.zeros):
        assert part(4 * 2000).shape == (8000,)
        with pytest.raises(AssertionError):
            part(4 * 2000 * 2 + 1)


@pytest.mark.parametrize("preset", RUNNABLE)
def test_a_batch_of_unequal_rows_equals_its_rows_alone(preset):
    model, prompts, new = model_for(preset), random_prompts([3, 6, 1]), [9, 5, 13]
    together = dlm_fast.generate(model, prompts, max_new_tokens=new, preset=preset, **options_of(preset))
    for row, (prompt, length) in enumerate(zip(prompts, new)):
        alone = dlm_fast.generate(
            model, [prompt], max_new_tokens=length, preset=preset, request_ids=[row], **options_of(preset)
        )
        assert alone.canvas[0].tolist() == together.canvas[row].tolist()
        assert (alone.nfe[0], alone.query_tokens[0]) == (together.nfe[row], together.query_tokens[row])
        assert alone.unmask_step[0].tolist() == together.unmask_step[row].tolist()


# Rows that sit a step out, and what they cost


def watched(preset: str, options: dict | None = None):
    """A decode before its first step; the windows that its forwards will have, and the rows that will be measured."""
    chosen = resolve(preset, PRESETS[preset].visibility, options_of(preset) | (options or {}))
    diffusion, plan, state, sampling = opened(chosen)
    windows: list[Window] = []
    measured: list[list[int]] = []

    def confidence(logits, *, rows, **arguments):
        measured.append(rows[rows >= 0].tolist())
        return REFERENCE.confidence(logits, rows=rows, **arguments)

    ops = dataclasses.replace(REFERENCE, confidence=confidence)
    handle = attach(
        native_model().requires_grad_(False), backend=ops, diffusion=diffusion, plain_mode=chosen.visibility
    )
    hidden = handle.window_hidden
    handle.window_hidden = lambda input_ids, window, cache: windows.append(window) or hidden(input_ids, window, cache)
    return open_decode(handle, plan, state, sampling), windows, measured


def rows_of(values, row: int) -> dict[str, list]:
    """What the fields of the state hold of one row."""
    return {f.name: getattr(values, f.name)[row].tolist() for f in dataclasses.fields(values)}


def test_a_row_wider_than_its_bucket_sits_the_step_out():
    decode, windows, measured = watched("d2f")
    denoise_step(decode, decode.plan.bucket("refresh"))
    state = decode.state
    state.phase.fill_(DENOISE)
    # The middle row has two blocks in its region: 6 positions, and a bucket of 4.
    state.block_end.copy_(state.block_start + torch.tensor([4, 6, 4]))
    before = rows_of(state, 1)
    measured.clear()
    denoise_step(decode, decode.plan.bucket("denoise", width=4, lanes=6))
    assert windows[-1].q_len.tolist() == [4, 0, 4]
    assert windows[-1].kv_slot[1].tolist() == [-1] * 4
    assert rows_of(state, 1) == before
    assert {row // 6 for rows in measured for row in rows} == {0, 2}
    # In a bucket of its own width it takes part.
    denoise_step(decode, decode.plan.bucket("denoise", width=6, lanes=6))
    assert windows[-1].q_len.tolist()[1] == 6 and state.step[1] == before["step"] + 1


@pytest.mark.parametrize("kind", ["refresh", "denoise"])
@pytest.mark.parametrize(
    "preset", ["fast-dllm-prefix", "fast-dllm-dual", "klass", "d2f", "dkv-cache", "sdar", "streaming-dllm", "freedave"]
)
def test_a_row_that_needs_another_kind_of_step_sits_it_out(preset, kind):
    decode, windows, measured = watched(preset, {"cache": "dual"} if preset == "klass" else {})
    if decode.plan.refresh_width:
        denoise_step(decode, decode.plan.bucket("refresh"))
    state = decode.state
    takes_part, sits_out = (REFRESH, DENOISE) if kind == "refresh" else (DENOISE, REFRESH)
    state.phase.copy_(torch.tensor([takes_part, sits_out, DONE]))
    before = [rows_of(state, row) for row in (1, 2)]
    measured.clear()
    drafts = decode.plan.preset.drafts if kind == "denoise" else 1
    denoise_step(decode, decode.plan.bucket(kind, drafts=drafts))
    window = windows[-1]
    q_len, kv_len = (lengths.view(3, drafts).tolist() for lengths in (window.q_len, window.kv_len))
    assert min(q_len[0]) > 0 and q_len[1:] == kv_len[1:] == [[0] * drafts] * 2
    assert (window.kv_slot[drafts:] == -1).all()
    # Dead lanes of the bucket are embedded and rotated all the same.
    assert (window.q_pos >= 0).all() and (window.q_pos < state.tokens.shape[1]).all()
    assert [rows_of(state, row) for row in (1, 2)] == before
    # A prefill measures nothing. Lanes may be those of the block or of the row.
    selects = not (kind == "refresh" and decode.plan.preset.cache == "commit")
    assert {row // (decode.plan.lanes * drafts) for rows in measured for row in rows} == ({0} if selects else set())


def test_only_the_first_draft_of_a_row_stores_its_keys():
    decode, windows, _ = watched("freedave-block", {"drafts": 3})
    for kind, drafts in (("refresh", 1), ("denoise", 3)):
        denoise_step(decode, decode.plan.bucket(kind, drafts=drafts))
    window = windows[-1]
    assert window.q_len.tolist() == [4] * 9
    assert torch.equal(window.kv_slot[::3], window.q_pos[::3].int())
    assert (window.kv_slot.view(3, 3, -1)[:, 1:] == -1).all()


def test_a_row_that_sits_out_keeps_the_logits_it_is_compared_with():
    decode, _, _ = watched("klass", {"cache": "dual"})
    denoise_step(decode, decode.plan.bucket("refresh"))
    decode.state.phase.copy_(torch.tensor([DENOISE, REFRESH, DONE]))
    before = {name: values.view(3, 4, -1).clone() for name, values in vars(decode.forward.history).items()}
    denoise_step(decode, decode.plan.bucket("denoise"))
    for name, values in vars(decode.forward.history).items():
        after = values.view(3, 4, -1)
        assert torch.equal(after[1:], before[name][1:]) and not torch.equal(after[0], before[name][0]), name


def test_top_p_keeps_an_id_if_those_before_it_have_exactly_top_p_of_the_mass(monkeypatch):
    model = toy(eos=())
    handle = dlm_fast.handle_of(model)
    # A quarter of the mass each: numbers that every float holds exactly.
    equal = torch.full((VOCAB,), float("-inf")).index_fill(0, torch.tensor([7, 9, 20, 30]), 0.0)
    head = lambda model, hidden: equal.expand(*hidden.shape[:-1], VOCAB)  # noqa: E731
    monkeypatch.setattr(handle, "adapter", types.SimpleNamespace(**{**vars(handle.adapter), "head": head}))
    for top_p, kept in ((0.24, [7]), (0.25, [7, 9]), (0.5, [7, 9, 20]), (0.74, [7, 9, 20]), (0.75, [7, 9, 20, 30])):
        out = dlm_fast.generate(
            model, random_prompts([2]), max_new_tokens=40, block_length=4, temperature=1.0, top_p=top_p
        )
        assert sorted(set(out.canvas[0][2:].tolist())) == kept, top_p


def test_no_preset_is_named_outside_the_table():
    """Adding a row touches no code of the loop, because no code of the loop asks which preset it runs."""
    package = Path(dlm_fast.__file__).parent
    for path in (package / "generate.py", *sorted((package / "decoding").glob("*.py"))):
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & set(PRESETS), path.name


def same_decodes(found: dlm_fast.GenerateOutput, expected: dlm_fast.GenerateOutput) -> None:
    for name in ("canvas", "unmask_step"):
        assert [x.tolist() for x in getattr(found, name)] == [x.tolist() for x in getattr(expected, name)], name
    assert (found.nfe, found.query_tokens) == (expected.nfe, expected.query_tokens)


RULES = ({"rule": "quota"}, {"rule": "threshold", "threshold": 0.05})


def test_a_cache_is_added_by_one_row_of_the_table(monkeypatch):
    """This one keeps keys and never reads them: its tokens are those of a decoder without a cache."""

    def everything(at: caches.Place) -> caches.Extent:
        zero = torch.zeros_like(at.start)
        return caches.Extent(zero, at.length, zero)

    canvas = caches.Refresh(stop=lambda at: at.length, width=lambda sizes: sizes.canvas)
    row = caches.CacheOperation(
        "all, unread", "refresh", everything, lambda sizes: sizes.canvas, canvas, grows_stale=True
    )
    monkeypatch.setitem(caches.CACHES, "unread", row)
    model, prompts = toy(eos=()), random_prompts([3, 6, 1])
    settings = {"preset": "llada", "max_new_tokens": [9, 5, 13], "block_length": 4, "stop": "never"}
    expected = [dlm_fast.generate(model, prompts, cache="none", **settings, **rule) for rule in RULES]
    assert expected[0].nfe != expected[1].nfe
    for rule, output in zip(RULES, expected):
        same_decodes(dlm_fast.generate(model, prompts, cache="unread", refresh_interval=2, **settings, **rule), output)
    with pytest.raises(ValueError, match="drafts share the keys outside their block"):
        dlm_fast.generate(model, prompts, cache="unread", drafts=2, **settings)


@pytest.mark.parametrize(
    "preset, visibility", [("fast-dllm-dual", "full"), ("dkv-cache", "full"), ("llada2", "block"), ("d2f", "block")]
)
def test_nothing_asks_for_a_cache_by_its_name(preset, visibility, monkeypatch):
    """A copy of a row under another name, which is refused and decoded as the row is."""
    chosen = PRESETS[preset]
    monkeypatch.setitem(caches.CACHES, "another", caches.CACHES[chosen.cache])
    renamed = dataclasses.replace(chosen, cache="another")
    model, prompts = toy(visibility, eos=()), random_prompts([3, 6, 1])
    settings = options_of(preset) | {"max_new_tokens": [9, 5, 13]}
    same_decodes(
        dlm_fast.generate(model, prompts, preset=renamed, **settings),
        dlm_fast.generate(model, prompts, preset=preset, **settings),
    )


def test_every_preset_says_where_it_is_from_and_what_it_equals():
    for name, preset in PRESETS.items():
        assert name == preset.name == name.lower() and " " not in name
        assert preset.source and preset.exactness.split(":")[0] in ("exact", "approximate")
        assert presets.describe(preset)["name"] == name
