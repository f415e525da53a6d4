"""Fused layers: what they compute, where they step aside for transformers' own, and how they come and go."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from helpers import native_model, toy
from patched import FULL, PLAIN, ids, logits
from torch import nn
from transformers import Glm4MoeForCausalLM, LlamaForCausalLM

import dlm_fast
from dlm_fast.models import fused, native
from dlm_fast.ops import LAYER_OPS, REFERENCE, choose
from dlm_fast.patching import attach

KINDS = pytest.mark.parametrize("kind", native.CLASSES, ids=lambda kind: kind.__name__)
DTYPES = pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)


def model_of(kind: type[nn.Module], dtype: torch.dtype = torch.float32, **fields: object) -> nn.Module:
    """A random model of two layers whose norms and biases are not those of a fresh one."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "head_dim": 32, "intermediate_size": 96}
    model = kind(kind.config_class(**{**native._TINY, **sizes, **fields}))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    return model.to(dtype).eval().requires_grad_(False)


class Calls:
    """The ops of a backend, each counted."""

    def __init__(self, ops=REFERENCE) -> None:
        self.found = dict.fromkeys(LAYER_OPS, 0)
        self.ops = dataclasses.replace(ops, **{name: self._counted(name, getattr(ops, name)) for name in LAYER_OPS})

    def _counted(self, name, op):
        def counted(*args, **kwargs):
            self.found[name] += 1
            return op(*args, **kwargs)

        return counted


def patched(model: nn.Module, ops=REFERENCE, **options):
    return attach(model, backend=ops, diffusion=None, plain_mode="full", **options)


def plain(model: nn.Module, tokens: torch.Tensor, **kwargs) -> torch.Tensor:
    return logits(model, tokens, use_cache=False, **kwargs)


@DTYPES
@KINDS
@pytest.mark.parametrize("fields", [{}, {"use_qk_norm": False}, {"partial_rotary_factor": 1.0}], ids=str)
def test_fused_layers_give_the_bits_of_transformers_own(kind, dtype, fields):
    """In a batch with padding, whose positions do not begin at zero."""
    model, tokens = model_of(kind, dtype, **fields), ids(11, 11)
    mask = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])
    given = {"attention_mask": mask, "position_ids": mask.cumsum(1) + 2**17}
    with patched(model, fuse_layers=False) as handle:
        assert handle.unfused == "asked for"
        expected = plain(model, tokens, **given)
    for backend in (REFERENCE, choose("cpu", "cpu")):
        calls = Calls(backend)
        with patched(model, calls.ops, fuse_layers=True) as handle:
            assert handle.unfused is None
            assert torch.equal(plain(model, tokens, **given), expected)
        assert calls.found["rms_norm"] == 3 and calls.found["add_rms_norm"] == calls.found["qk_norm_rope"] == 2
        assert calls.found["swiglu"] == sum(type(layer.mlp) in DENSE for layer in model.model.layers)
    assert not any("forward" in module.__dict__ for module in model.modules())


DENSE = {parts.mlp for parts in fused.PARTS.values()}


@pytest.mark.parametrize("preset", ["llada", "d2f", "fast-dllm-dual"])
def test_a_decode_writes_the_tokens_of_transformers_own_layers(preset):
    visibility = dlm_fast.PRESETS[preset].visibility
    settings = {"preset": preset, "max_new_tokens": 16, "block_length": 8}
    if visibility == "block":
        settings.pop("block_length")
    own = dlm_fast.load(f"tiny-{visibility}", device="cpu", fuse_layers=False)
    ours = dlm_fast.load(f"tiny-{visibility}", device="cpu")
    assert dlm_fast.explain(ours)["layers"] == "fused"
    assert dlm_fast.explain(own)["layers"] == "of transformers: asked for"
    outs = [dlm_fast.generate(model, [[5, 6, 7], [8, 9]], **settings) for model in (own, ours)]
    assert outs[0].nfe == outs[1].nfe
    assert all(map(torch.equal, outs[0].canvas, outs[1].canvas))


def with_hook(module: nn.Module, seen: list) -> None:
    module.register_forward_hook(lambda *_: seen.append(module))


PASSED = ["input_layernorm", "post_attention_layernorm", "self_attn", "self_attn.q_norm", "self_attn.k_norm", "mlp"]
PASSED += ["mlp.act_fn"]
CALLED = ["", "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


@pytest.mark.parametrize("name", PASSED + CALLED)
@pytest.mark.parametrize("when", ["before the patch", "after the patch"])
def test_every_hook_runs(name, when):
    """A hook on what fused layers do not call makes the layer run as transformers has it: before the patch all layers,
    after the patch this one."""
    model, seen, tokens = native_model("qwen3").requires_grad_(False), [], ids(7)
    with patched(model, fuse_layers=False):
        expected = plain(model, tokens)
    module = model.model.layers[1].get_submodule(name)
    if when == "before the patch":
        with_hook(module, seen)
    calls = Calls()
    with patched(model, calls.ops) as handle:
        if when == "after the patch":
            with_hook(module, seen)
        assert torch.equal(plain(model, tokens), expected)
        fewer = {"before the patch": 0, "after the patch": 1}[when] if name in PASSED else 2
        assert seen == [module] and calls.found["add_rms_norm"] == fewer
        assert (handle.unfused is None) == (name in CALLED or when == "after the patch")


def hooked(layer: nn.Module) -> None:
    layer.mlp.register_forward_pre_hook(lambda *_: None)


def replaced_forward(layer: nn.Module) -> None:
    layer.input_layernorm.forward = lambda hidden: hidden


def another_norm(layer: nn.Module) -> None:
    layer.post_attention_layernorm = nn.LayerNorm(layer.input_layernorm.weight.shape[0])


def gelu(layer: nn.Module) -> None:
    layer.mlp.act_fn = nn.GELU()


def norm_of_float64(layer: nn.Module) -> None:
    layer.input_layernorm.double()


def another_layer(layer: nn.Module) -> None:
    layer.__class__ = type("OurLayer", (type(layer),), {})


def moved_by_accelerate(layer: nn.Module) -> None:
    layer.forward = layer.forward


def another_epsilon(layer: nn.Module) -> None:
    layer.self_attn.k_norm.variance_epsilon = 1.0


def no_epsilon(layer: nn.Module) -> None:
    layer.input_layernorm.variance_epsilon = 0.0


@pytest.mark.parametrize(
    "change, reason",
    [
        (hooked, "layer 1 has a mlp with hooks"),
        (replaced_forward, "layer 1 has a input_layernorm whose forward was replaced or compiled"),
        (another_norm, "layer 1 has a LayerNorm as post_attention_layernorm, where a Qwen3RMSNorm was expected"),
        (gelu, "layer 1 has a GELU as act_fn, where a SiLU was expected"),
        (norm_of_float64, "layer 1 has a norm of torch.float64 in a model of torch.float32"),
        (another_layer, "layer 1 is a OurLayer"),
        (moved_by_accelerate, "layer 1 has a replaced forward"),
        (another_epsilon, "layer 1 has a q_norm and a k_norm of different epsilon"),
        (no_epsilon, "layer 1 has a norm with epsilon 0.0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_layers_that_are_not_known_run_as_they_are_or_are_refused(change, reason):
    model = native_model("qwen3").requires_grad_(False)
    change(model.model.layers[1])
    with pytest.raises(NotImplementedError, match=f"cannot be fused: {reason}.*got fuse_layers=True"):
        dlm_fast.patch(model, fuse_layers=True)
    with dlm_fast.patch(model):
        assert reason in dlm_fast.explain(model)["layers"]
    assert "forward" not in model.model.layers[0].__dict__


def silent_activation(layer: nn.Module) -> None:
    layer.mlp.act_fn.forward = lambda x: x * 0


def no_norm(layer: nn.Module) -> None:
    layer.input_layernorm = nn.Identity()


@pytest.mark.parametrize(
    "change",
    [replaced_forward, gelu, another_epsilon, no_norm, silent_activation],
    ids=lambda change: change.__name__,
)
def test_a_module_that_is_replaced_after_the_patch_computes(change):
    model, tokens = native_model("qwen3").requires_grad_(False), ids(7)
    changed = copy.deepcopy(model)
    change(changed.model.layers[1])
    with patched(changed, fuse_layers=False):
        expected = plain(changed, tokens)
    with patched(model, fuse_layers=True):
        before = plain(model, tokens)
        change(model.model.layers[1])
        assert torch.equal(plain(model, tokens), expected) and not torch.equal(before, expected)


def test_a_transformers_whose_layers_compute_something_else_is_not_fused(monkeypatch):
    kind = next(iter(native.CLASSES))
    layer = next(iter(fused.PARTS))
    forward = layer.forward

    def twice(self, hidden_states, *args, **kwargs):
        return 2 * forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", twice)
    assert "with fused layers its hidden states differ by" in native.probe_fused.__wrapped__(kind)
    monkeypatch.setattr(native, "probe_fused", native.probe_fused.__wrapped__)
    with pytest.raises(NotImplementedError, match="cannot be fused: of transformers .* its hidden states differ by"):
        dlm_fast.patch(native_model(), fuse_layers=True)


def test_caches_of_transformers_and_masks_of_four_dimensions_go_through_its_own_layers():
    model, tokens, calls = native_model().requires_grad_(False), ids(7), Calls()
    with patched(model, calls.ops):
        expected = plain(model, tokens)
        out = model(tokens, use_cache=True)
        assert torch.equal(out.logits, expected) and out.past_key_values.get_seq_length() == 7
        assert calls.found["add_rms_norm"] == 2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_are_those_of_transformers_own_layers(backend):
    def gradients(fuse_layers: bool) -> list[torch.Tensor]:
        model = native_model("qwen3")
        with dlm_fast.patch(model, backend=backend, fuse_layers=fuse_layers):
            model(ids(9), use_cache=False).logits.square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    for ours, own in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, own, rtol=0, atol=1e-6 * own.abs().max().item())


def test_a_gradient_in_triton_is_refused_as_without_fused_layers():
    with (
        dlm_fast.patch(native_model(), backend="triton") as handle,
        pytest.raises(NotImplementedError, match="has no backward"),
    ):
        assert handle.unfused is None
        handle.model(ids(5), use_cache=False)


def test_autocast_runs_transformers_own_layers():
    model, tokens, calls = native_model().requires_grad_(False), ids(7), Calls()
    with torch.autocast("cpu", torch.bfloat16):
        with patched(model, fuse_layers=False):
            expected = plain(model, tokens)
        with patched(model, calls.ops):
            assert torch.equal(plain(model, tokens), expected)
    assert not any(calls.found.values())


def test_a_copy_and_a_pickle_have_fused_layers_of_their_own():
    model = toy("full")
    expected = dlm_fast.generate(model, **PLAIN).canvas[0]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        layer = other.model.layers[0]
        assert layer.__dict__["forward"].args == (layer,)
        assert torch.equal(dlm_fast.generate(other, **PLAIN).canvas[0], expected)
        with torch.no_grad():
            layer.mlp.down_proj.weight.zero_()
        assert not torch.equal(logits(other, ids(5)), logits(model, ids(5)))
        dlm_fast.handle_of(other).unpatch()
        assert not any("forward" in module.__dict__ for module in other.modules())
    assert torch.equal(dlm_fast.generate(model, **PLAIN).canvas[0], expected)


def test_a_forward_that_was_bound_after_the_patch_stays():
    model, tokens = native_model().requires_grad_(False), ids(7)
    before = plain(model, tokens)
    layer, seen = model.model.layers[0], []
    handle = dlm_fast.patch(model, diffusion=FULL)
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: seen.append(0) or inner(*args, **kwargs)
    plain(model, tokens)
    handle.unpatch()
    assert torch.equal(plain(model, tokens), before) and seen == [0, 0]


def test_fuse_layers_must_be_said_plainly():
    for entry, argument in ((dlm_fast.patch, native_model()), (dlm_fast.load, "tiny-full")):
        with pytest.raises(ValueError, match="fuse_layers must be true, false or None, got fuse_layers='yes'"):
            entry(argument, fuse_layers="yes")


@pytest.mark.parametrize("name", ["post_attention_layernorm", "self_attn.q_norm"])
def test_a_norm_of_another_dtype_after_the_patch_is_transformers_matter(name):
    model, tokens, said = native_model("qwen3").requires_grad_(False).bfloat16(), ids(7), []
    for fuse_layers in (False, True):
        with patched(model, fuse_layers=fuse_layers), pytest.raises(Exception) as error:
            model.model.layers[1].get_submodule(name).float()
            plain(model, tokens)
        model.bfloat16()
        said.append(str(error.value))
    assert said[0] == said[1]


def test_hidden_states_and_attentions_are_captured_and_fused_layers_go_on_afterwards():
    model, tokens, calls = native_model("qwen3").requires_grad_(False), ids(7), Calls()
    with patched(model, fuse_layers=False):
        expected = model(tokens, use_cache=False, output_hidden_states=True, output_attentions=True)
    for again in range(2):
        with patched(model, calls.ops, fuse_layers=True):
            found = model(tokens, use_cache=False, output_hidden_states=True, output_attentions=True)
            assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
            assert found.attentions == expected.attentions and calls.found["add_rms_norm"] == 2 * again
            assert torch.equal(plain(model, tokens), expected.logits)
            assert calls.found["add_rms_norm"] == 2 * (again + 1)


def test_activations_are_checkpointed_as_transformers_does():
    def runs(fuse_layers: bool) -> int:
        model, seen = native_model("qwen3").train(), []
        model.gradient_checkpointing_enable()
        model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: seen.append(0))
        with dlm_fast.patch(model, backend="reference", fuse_layers=fuse_layers):
            model(ids(5), use_cache=False).logits.sum().backward()
        return len(seen)

    assert runs(True) == runs(False) == 2


def test_fields_that_change_after_the_patch_are_read():
    model, tokens = model_of(Glm4MoeForCausalLM), ids(9)
    with patched(model, fuse_layers=True):
        model.model.layers[1].self_attn.use_qk_norm = False
        found = plain(model, tokens)
    with patched(model, fuse_layers=False):
        assert torch.equal(plain(model, tokens), found)
    model = native_model("qwen3").requires_grad_(False)
    with patched(model, fuse_layers=True), pytest.raises(NotImplementedError, match="sliding_window is not supported"):
        model.model.layers[1].self_attn.sliding_window = 4
        plain(model, tokens)


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(9, 2, 64).transpose(0, 1),
        lambda: torch.randn(1, 9, 64).expand(3, -1, -1),
        lambda: torch.randn(2, 64, 9).transpose(1, 2),
    ],
    ids=["rows first", "repeated", "columns first"],
)
def test_embeddings_may_be_any_view(view):
    model, embeds, found = model_of(LlamaForCausalLM), view(), []
    for fuse_layers in (False, True):
        with patched(model, fuse_layers=fuse_layers), torch.no_grad():
            found.append(model(inputs_embeds=embeds, use_cache=False).logits)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_wrapper_around_the_last_norms_forward_runs_the_class_after_the_patch():
    calls, model, tokens = Calls(), native_model().requires_grad_(False), ids(7)
    handle = patched(model, calls.ops)
    inner = model.model.norm.forward
    model.model.norm.forward = lambda hidden: inner(hidden)
    handle.unpatch()
    plain(model, tokens)
    assert not any(calls.found.values())


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Glm4MoeForCausalLM], ids=lambda kind: kind.__name__)
def test_the_kernels_of_a_layer_give_the_logits_of_its_references(kind, layer_kernels, device):
    pytest.importorskip("triton")
    triton = choose("triton", device)
    model, tokens = model_of(kind).to(device), ids(9).to(device)
    calls = Calls(triton)
    with patched(model, fuse_layers=False):
        expected = plain(model, tokens)
    with patched(model, calls.ops), torch.no_grad():
        found = plain(model, tokens)
    assert calls.found["add_rms_norm"] == calls.found["qk_norm_rope"] == 2 and calls.found["rms_norm"] == 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
