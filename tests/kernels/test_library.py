"""The launchers as PyTorch operators: what tracing sees is what eager does, mutation included."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import dlm_fast

pytest.importorskip("triton", reason="the operators run Triton kernels")

# Importing a launcher registers its operator.
from helpers import toy

import dlm_kernels.drafts.launch
import dlm_kernels.noise.launch  # noqa: F401
from dlm_kernels import RowState, UnmaskInputs, UnmaskRule, Window, reference
from dlm_kernels.attention import block_attention
from dlm_kernels.confidence import confidence
from dlm_kernels.layers import add_rms_norm, qk_norm_rope, rms_norm, swiglu
from dlm_kernels.library import operator
from dlm_kernels.testing import layers_calls
from dlm_kernels.unmask import unmask

OPS = torch.ops.dlm_kernels


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def window_of(q_len: list[int], W: int, device, **fields) -> Window:
    """A window of W positions behind four cached ones."""
    B = len(q_len)

    def int32(values) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=device)

    lane = torch.arange(W, dtype=torch.int32, device=device).expand(B, W)
    fields = {"mode": "block"} | fields
    return Window(
        q_pos=(lane + 4).contiguous(), q_block=(lane // 2).contiguous(), q_len=int32(q_len),
        kv_slot=(lane + 4).contiguous(), kv_len=int32([4] * B), replaced=int32([[0, 0]] * B),
        cache_row=int32(range(B)), **fields,
    )  # fmt: skip


def attention_call(device, **fields):
    B, H, H_kv, W, D = 2, 4, 2, 5, 16
    q = torch.randn(B, W, H, D, device=device).transpose(1, 2)
    k, v = (torch.randn(B, W, H_kv, D, device=device).transpose(1, 2) for _ in range(2))
    caches = [torch.randn(B, H_kv, 16, D, device=device) for _ in range(2)]
    return q, k, v, *caches, window_of([5, 3], W, device, **fields)


def unmask_call(device):
    B, L, W = 2, 12, 4
    state = RowState.empty(B, L, device)
    state.tokens.fill_(9)
    for name, value in {"canvas_len": L, "block_end": W, "block_masks": W, "phase": 1}.items():
        getattr(state, name).fill_(value)
    int32 = {"dtype": torch.int32, "device": device}
    inputs = UnmaskInputs(
        query_len=torch.full((B,), W, **int32),
        pred=torch.randint(0, 8, (B, W), device=device),
        score=torch.rand(B, W, device=device),
        confidence=torch.rand(B, W, device=device),
        value=torch.full((B,), 0.5, device=device),
        min_unmask=torch.ones(B, **int32),
        steps=torch.full((B,), 4, **int32),
        block_length=torch.full((B,), W, **int32),
        mask_id=9,
        stop_ids=torch.tensor([8], device=device),
    )
    return state, UnmaskRule("threshold"), inputs


def layers_call(device) -> tuple[dict, dict, dict]:
    """The arguments of a norm of a sum, of a rotation with everything, and of an activation."""
    generator = torch.Generator().manual_seed(0)
    heads = dict(B=2, W=3, H=4, H_kv=2, D=16, R=8, normed=True, scaled=True, dtype=torch.float32)
    calls = (
        layers_calls.random_norm(generator, (2, 3, 20), torch.float32),
        layers_calls.random_heads(generator, **heads),
        layers_calls.random_mlp(generator, (2, 3, 40), torch.float32),
    )
    return tuple(
        {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.items()} for call in calls
    )


def flat(*values) -> list:
    """Operator arguments: dataclasses field by field."""
    out = []
    for value in values:
        out += (
            [getattr(value, f.name) for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else [value]
        )
    return out


def mutated(op) -> list[str]:
    return [argument.name for argument in op.default._schema.arguments if argument.alias_info is not None]


def test_an_operator_mutates_what_its_launcher_writes_and_nothing_else():
    assert mutated(OPS.block_attention) == ["k_cache", "v_cache"]
    assert mutated(OPS.confidence) == mutated(OPS.draft_build) == mutated(OPS.uniform_scores) == []
    assert all(mutated(getattr(OPS, op)) == [] for op in ("rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu"))
    assert mutated(OPS.unmask) == [f"state_{field.name}" for field in dataclasses.fields(RowState)]
    assert mutated(OPS.verify) == [f"source_{field.name}" for field in dataclasses.fields(reference.DraftSource)]


def test_an_operator_takes_a_dataclass_field_by_field():
    arguments = OPS.unmask.default._schema.arguments
    given = {"state": RowState, "rule": UnmaskRule, "inputs": UnmaskInputs}
    names = [f"{name}_{field.name}" for name, kind in given.items() for field in dataclasses.fields(kind)]
    assert [argument.name for argument in arguments] == [*names, "kind"]
    optional = {argument.name for argument in arguments if str(argument.type) == "Optional[Tensor]"}
    assert optional == {f"inputs_{field.name}" for field in dataclasses.fields(UnmaskInputs) if field.default is None}


@pytest.mark.parametrize("fields", [{}, {"mode": "full"}, {"kept": True}])
def test_opcheck_of_block_attention(device, fields):
    if "kept" in fields:
        fields = {"kept": torch.rand(2, 16, device=device) < 0.5}
    torch.library.opcheck(
        OPS.block_attention.default, (*flat(*attention_call(device, **fields)), 0.25, None, None, None)
    )


@pytest.mark.parametrize("outputs", [(), ("second", "logsumexp", "entropy")])
def test_opcheck_of_confidence(device, outputs):
    logits = torch.randn(3, 70, device=device)
    op = OPS.confidence.default
    rows = torch.tensor([2, -1], dtype=torch.int32, device=device)
    given = {
        "logits": logits,
        "rows": rows,
        "outputs": list(outputs),
        "banned": torch.tensor([5], device=device),
    }
    torch.library.opcheck(op, tuple(given.get(argument.name) for argument in op._schema.arguments))


def test_opcheck_of_drafts(device):
    B, D, W = 2, 3, 5
    lanes = torch.randint(0, 9, (B, W), device=device)
    counts = [torch.zeros(B, dtype=torch.int32, device=device) for _ in range(2)]
    source = reference.DraftSource(
        lanes.clone(), torch.rand(B, W, device=device), torch.rand(B, W, device=device), *counts
    )
    eligible, rows = torch.rand(B, W, device=device) < 0.5, torch.ones(B, dtype=torch.bool, device=device)
    torch.library.opcheck(OPS.draft_build.default, (*flat(source), lanes, eligible, rows, D))
    held = torch.randint(0, 9, (B, D, W), device=device)
    scores = [torch.rand(B, D, W, device=device) for _ in range(2)]
    torch.library.opcheck(OPS.verify.default, (*flat(source), held, held + 1, *scores, eligible, rows, rows, rows, 0))


def test_opcheck_of_uniform_scores(device):
    counters = torch.randint(0, 9, (5, 3), dtype=torch.int32, device=device)
    torch.library.opcheck(OPS.uniform_scores.default, (torch.tensor([7], device=device), counters))


def test_opcheck_of_the_ops_of_a_layer(device):
    norm, heads, mlp = layers_call(device)
    torch.library.opcheck(OPS.rms_norm.default, (norm["x"], norm["weight"], norm["eps"]))
    torch.library.opcheck(OPS.add_rms_norm.default, tuple(norm.values()))
    torch.library.opcheck(OPS.swiglu.default, tuple(mlp.values()))
    op = OPS.qk_norm_rope.default
    torch.library.opcheck(op, tuple(heads[argument.name] for argument in op._schema.arguments))
    del heads["q_weight"], heads["k_weight"], heads["eps"], heads["q_scale"]
    torch.library.opcheck(op, tuple(heads.get(argument.name) for argument in op._schema.arguments))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_equals_an_eager_one_at_every_length_with_one_graph(device, backend):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def layer(x, residual, weight, q, k, cos, sin, gate, up):
        total, normed = add_rms_norm(rms_norm(x, weight, eps=1e-6) * 2, residual, weight, eps=1e-6)
        turned = qk_norm_rope(q, k, cos, sin)
        return total + normed, turned.q, turned.k.transpose(2, 3), swiglu(gate, up)

    compiled = torch.compile(layer, backend=counting if backend == "eager" else backend, fullgraph=True, dynamic=True)
    norm, heads, mlp = layers_call(device)
    of = norm | heads | mlp
    for length in (3, 2):
        given = [of[name] for name in ("x", "residual", "weight", "q", "k", "cos", "sin", "gate", "up")]
        given = [x[:, :length].clone(memory_format=torch.contiguous_format) if x.dim() > 1 else x for x in given]
        for ours, eager in zip(compiled(*given), layer(*given), strict=True):
            assert torch.equal(ours, eager) and ours.stride() == eager.stride()
    assert len(graphs) == (backend == "eager")


def test_opcheck_of_unmask(device):
    torch.library.opcheck(OPS.unmask.default, (*flat(*unmask_call(device)), "denoise"))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_attention_equals_eager_and_stores_the_same_keys(device, backend):
    def layer(q, k, v, k_cache, v_cache, window):
        return block_attention(2 * q, k, v, k_cache, v_cache, window, scale=0.25) + 1

    q, k, v, k_cache, v_cache, window = attention_call(device)
    caches = k_cache.clone(), v_cache.clone()
    expected = layer(q, k, v, k_cache, v_cache, window)
    found = torch.compile(layer, backend=backend, fullgraph=True)(q, k, v, *caches, window)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
    assert torch.equal(caches[0], k_cache) and torch.equal(caches[1], v_cache)


def test_compiled_confidence_equals_eager_at_every_number_of_rows_with_one_graph(device):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(logits):
        found = confidence(logits, outputs=("second", "entropy"))
        return found.token + 1, found.entropy * 2, found.kl

    compiled = torch.compile(step, backend=counting, fullgraph=True, dynamic=True)
    for N in (2, 3, 7):
        logits = torch.randn(N, 70, device=device)
        for ours, eager in zip(compiled(logits), step(logits)):
            assert ours is eager is None or torch.equal(ours, eager)
    assert len(graphs) == 1


def test_compiled_unmask_advances_the_same_state(device):
    state, rule, inputs = unmask_call(device)
    other = state.clone()

    def step(state, inputs):
        return ~unmask(state, rule, inputs, kind="denoise")

    expected = step(state, inputs)
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(other, inputs)
    assert torch.equal(found, expected)
    for field in dataclasses.fields(RowState):
        assert torch.equal(getattr(other, field.name), getattr(state, field.name)), field.name
    assert not torch.equal(state.tokens, torch.full_like(state.tokens, 9))


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("visibility", ["full", "block"])
def test_a_patched_model_compiles_to_one_graph_for_any_number_of_forwards(device, backend, visibility):
    model = toy(visibility, backend=backend).to(device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.randint(2, 20, (2, 9), device=device)
    counters.clear()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        eager_calls = dlm_fast.handle_of(model).attention_calls
        for _ in range(12):
            assert torch.equal(compiled(ids, use_cache=False).logits, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert dlm_fast.handle_of(model).attention_calls == eager_calls == 2


def test_a_decode_of_a_stack_compiled_in_place_equals_an_eager_one(device):
    model = toy("block", backend="reference").to(device)
    prompts = [[4, 5, 6], [7]]
    expected = dlm_fast.generate(model, prompts, max_new_tokens=9)
    eager_calls = dlm_fast.handle_of(model).attention_calls
    model.model.compile(backend="eager", fullgraph=True, dynamic=True)
    found = dlm_fast.generate(model, prompts, max_new_tokens=9)
    assert [row.tolist() for row in found.canvas] == [
        row.tolist() for row in expected.canvas
    ] and found.nfe == expected.nfe
    assert dlm_fast.handle_of(model).attention_calls == 2 * eager_calls


def test_a_compiled_model_whose_attention_is_changed_raises_too(device):
    model = toy("full", backend="reference").to(device)
    compiled = {fullgraph: torch.compile(model, backend="eager", fullgraph=fullgraph) for fullgraph in (False, True)}
    ids = torch.randint(2, 20, (2, 9), device=device)
    expected = model(ids, use_cache=False).logits
    for forward in compiled.values():
        torch.testing.assert_close(forward(ids, use_cache=False).logits, expected)
    model.set_attn_implementation("sdpa")
    for forward in compiled.values():
        with pytest.raises(Exception, match="every layer of a patched LlamaForCausalLM must attend through dlm_fast"):
            forward(ids, use_cache=False)


def test_fake_tensors_get_the_shapes_and_strides_of_real_ones(device):
    given = attention_call(device)
    real = block_attention(*given, scale=0.25)
    logits = torch.randn(3, 70, device=device)
    stats = confidence(logits, outputs=("second",))
    calls = layers_call(device)
    norm, heads, mlp = calls
    real_layer = (*add_rms_norm(**norm), *qk_norm_rope(**heads), swiglu(**mlp))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        *tensors, window = given
        fake_window = Window(**{
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in ((f.name, getattr(window, f.name)) for f in dataclasses.fields(Window))
        })  # fmt: skip
        fake = block_attention(*(mode.from_tensor(tensor) for tensor in tensors), fake_window, scale=0.25)
        fake_stats = confidence(mode.from_tensor(logits), outputs=("second",))
        norm, heads, mlp = (
            {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
            for call in calls
        )
        # By keywords alone.
        fake_layer = (*add_rms_norm(**norm), *qk_norm_rope(**heads), swiglu(**mlp))
    for ours, eager in zip((fake, *fake_layer), (real, *real_layer), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (eager.shape, eager.stride(), eager.dtype)
    for name, value in stats._asdict().items():
        other = getattr(fake_stats, name)
        assert (value is None) == (other is None), name
        assert value is None or (other.shape, other.dtype) == (value.shape, value.dtype), name


def test_a_compiled_call_raises_what_an_eager_one_does(device):
    q, k, v, k_cache, v_cache, window = attention_call(device)
    with pytest.raises(Exception, match="block_attention: k_cache and v_cache must be given together"):
        torch.compile(
            lambda q: block_attention(q, k, v, k_cache, None, window, scale=1.0), backend="eager", fullgraph=True
        )(q)


def test_a_launcher_whose_arguments_no_schema_has_is_refused():
    def launcher(x: torch.Tensor, table: dict[str, int]) -> torch.Tensor:
        return x

    with pytest.raises(TypeError, match="operator: argument table has the type dict"):
        operator(fake=launcher)(launcher)


@pytest.mark.usefixtures("without_debug")
@pytest.mark.gpu("a captured step replays, and inductor compiles around the operators without a graph break")
def test_cuda_graphs_and_inductor(device):
    q, k, v, k_cache, v_cache, window = attention_call(device)

    def layer(q):
        return block_attention(q, k, v, k_cache, v_cache, window, scale=0.25) * 2

    expected = layer(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(q)
    graph.replay()
    assert torch.equal(captured, expected)
    assert torch.equal(torch.compile(layer, fullgraph=True)(q), expected)
