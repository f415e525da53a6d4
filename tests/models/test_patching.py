"""patch and unpatch: what runs inside, and what stays outside."""

from __future__ import annotations

import copy
import inspect
import threading

import pytest
import torch
from helpers import EOS, MASK, native_model, toy
from patched import FULL, PLAIN, ids, logits
from transformers import (
    LlamaForCausalLM,
)

import dlm_fast
from dlm_fast import models
from dlm_fast.models.native import ATTENTION_NAME
from dlm_fast.patching import attach
from dlm_fast.training.networks import checkpoint_activations
from dlm_kernels.testing import no_worse_than_torch


def own_forward(model, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Logits of the unpatched model, told who sees whom by a 4-D mask (an addend of eager attention)."""
    return logits(model, tokens, attention_mask=torch.where(visible[:, None], 0.0, -1e9))


def blocks_see(block: list[int]) -> torch.Tensor:
    order = torch.tensor(block)
    return (order[None, :] <= order[:, None])[None]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (7, 1)])
def test_a_plain_forward_inside_patch_equals_the_original(family, backend, heads, kv_heads, device):
    model = native_model(family, heads=heads, kv_heads=kv_heads).to(device)
    tokens = ids(17, 17, 17).to(device)
    before = logits(model, tokens)
    exact = logits(copy.deepcopy(model).double(), tokens)
    with dlm_fast.patch(model, backend=backend) as handle:
        inside = logits(model, tokens)
        assert handle.attention_calls == len(model.model.layers) == 2
    no_worse_than_torch("logits", inside, before, exact, floor=1e-5, half_steps=False)
    assert torch.equal(logits(model, tokens), before)


def test_the_counter_counts_every_layer_of_every_forward():
    model = toy("full", layers=3)
    handle = dlm_fast.handle_of(model)
    logits(model, ids(5))
    assert handle.attention_calls == 3
    out = dlm_fast.generate(model, [[4, 5]], max_new_tokens=4)
    assert handle.attention_calls == 3 + 3 * out.nfe[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_seen_by_nobody(side):
    model = native_model()
    tokens = ids(6)[0]
    short, pad = tokens[:4], torch.full((2,), 9)
    padded = torch.cat([pad, short] if side == "left" else [short, pad])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, 0, 0], [1] * 6])
    real = slice(2, 6) if side == "left" else slice(0, 4)
    with dlm_fast.patch(model, backend="reference"):
        batch = logits(model, torch.stack([padded, tokens]), attention_mask=mask)
        alone = logits(model, short[None])
    torch.testing.assert_close(batch[0, real], alone[0], atol=2e-5, rtol=1e-4)
    before = logits(model, torch.stack([padded, tokens]), attention_mask=mask)
    torch.testing.assert_close(batch[mask.bool()], before[mask.bool()], atol=2e-5, rtol=1e-4)


def test_a_patched_model_of_full_visibility_is_bidirectional_in_a_plain_forward():
    model = toy("full")
    tokens = ids(9)
    expected = own_forward(native_model(), tokens, torch.ones(1, 9, 9, dtype=torch.bool))
    torch.testing.assert_close(logits(model, tokens), expected, atol=2e-5, rtol=1e-4)


def test_a_patched_block_causal_model_shows_its_blocks_in_a_plain_forward():
    tokens = ids(11)
    absolute = logits(toy("block", block_length=4, block_alignment="abs"), tokens)
    torch.testing.assert_close(
        absolute, own_forward(native_model(), tokens, blocks_see([p // 4 for p in range(11)])), atol=2e-5, rtol=1e-4
    )
    relative = toy("block", block_length=4, block_alignment="rel")
    expected = own_forward(native_model(), tokens, blocks_see([0] * 3 + [1 + (p - 3) // 4 for p in range(3, 11)]))
    torch.testing.assert_close(
        logits(relative, tokens, prompt_lengths=torch.tensor([3])), expected, atol=2e-5, rtol=1e-4
    )
    # Without prompt_lengths the prompt is what precedes the first mask.
    masked = tokens.clone()
    masked[0, 3] = MASK
    expected = own_forward(native_model(), masked, blocks_see([0] * 3 + [1 + (p - 3) // 4 for p in range(3, 11)]))
    torch.testing.assert_close(logits(relative, masked), expected, atol=2e-5, rtol=1e-4)


def test_patch_keeps_transformers_causal_visibility_whatever_the_diffusion_configuration():
    model, tokens = native_model(), ids(8)
    before = logits(model, tokens)
    with dlm_fast.patch(model, diffusion=FULL, backend="reference"):
        torch.testing.assert_close(logits(model, tokens), before, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_flow_through_the_backends_in_torch(backend):
    model = native_model()
    with dlm_fast.patch(model, backend=backend):
        model(ids(5)).logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.layers[0].self_attn.parameters())


def test_patching_one_instance_leaves_every_other_alone():
    model = native_model()
    twin = LlamaForCausalLM(model.config).eval()  # this model shares the config object
    assert twin.config is model.config
    config, modules, forwards = dict(vars(model.config)), dict(model.named_modules()), LlamaForCausalLM.forward
    before = logits(twin, ids(6))
    with dlm_fast.patch(model, backend="reference") as handle:
        assert torch.equal(logits(twin, ids(6)), before) and handle.attention_calls == 0
        assert twin.config._attn_implementation == "eager" and model.config._attn_implementation == ATTENTION_NAME
        assert LlamaForCausalLM.forward is forwards
    assert vars(model.config) == config and model.config is twin.config
    assert dict(model.named_modules()) == modules


def test_unpatching_restores_everything_even_after_an_exception():
    model = native_model()
    before, attributes = logits(model, ids(6)), set(vars(model))
    with pytest.raises(KeyError), dlm_fast.patch(model, diffusion=FULL, backend="reference"):
        dlm_fast.generate(model, **PLAIN)
        raise KeyError
    assert set(vars(model)) == attributes and not model.model._forward_pre_hooks
    assert all(m.config is model.config for m in model.modules() if getattr(m, "config", None) is not None)
    assert torch.equal(logits(model, ids(6)), before)
    with dlm_fast.patch(model, diffusion=FULL, backend="reference"):
        assert dlm_fast.generate(model, **PLAIN).nfe == [3]


def test_a_decode_that_fails_leaves_the_patch_usable():
    model = toy("full")

    def explode(state):
        raise OSError("no")

    with pytest.raises(OSError):
        dlm_fast.generate(model, on_step=explode, **PLAIN)
    assert dlm_fast.generate(model, **PLAIN).nfe == [3]


PASSED_BY = r"every layer of a patched LlamaForCausalLM must attend through dlm_fast, and was passed by in layers "


def set_another_attention(model) -> None:
    model.set_attn_implementation("sdpa")


def replace_a_forward(model) -> None:
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)


@pytest.mark.parametrize(
    "alter, restore, what",
    [
        (
            set_another_attention,
            lambda model: model.set_attn_implementation(ATTENTION_NAME),
            r"\[0, 1\] of 2, its attention implementation is 'sdpa'",
        ),
        (
            replace_a_forward,
            lambda model: delattr(model.model.layers[1].self_attn, "forward"),
            r"\[1\] of 2, the forward of layer 1's self_attn was",
        ),
    ],
)
@pytest.mark.parametrize("visibility", ["full", "block"])
def test_a_forward_that_passes_our_attention_by_raises_and_is_never_causal_in_silence(alter, restore, what, visibility):
    model, tokens = toy(visibility), ids(6)
    expected, decoded = logits(model, tokens), dlm_fast.generate(model, **PLAIN).canvas[0]
    alter(model)
    for call in (lambda: model(tokens), lambda: model.model(tokens), lambda: dlm_fast.generate(model, **PLAIN)):
        with pytest.raises(RuntimeError, match=PASSED_BY + what):
            call()
    restore(model)
    assert torch.equal(logits(model, tokens), expected)
    assert torch.equal(dlm_fast.generate(model, **PLAIN).canvas[0], decoded)


def test_a_model_that_is_unpatched_while_it_decodes_raises():
    model = toy("full")
    handle = dlm_fast.handle_of(model)

    def leave(state):
        if "_dlm_fast_patch" in model.__dict__:
            handle.unpatch()

    with pytest.raises(
        RuntimeError,
        match=PASSED_BY + r"\[0, 1\] of 2, its attention implementation is 'eager' \(.* or unpatched meanwhile\)",
    ):
        dlm_fast.generate(model, on_step=leave, **PLAIN)


def test_a_model_that_is_unpatched_inside_a_plain_forward_raises_and_is_restored():
    model, tokens = toy("full"), ids(6)
    handle = dlm_fast.handle_of(model)

    def from_elsewhere(*_):
        thread = threading.Thread(target=handle.unpatch)
        thread.start()
        thread.join()

    hook = model.model.layers[1].register_forward_pre_hook(from_elsewhere)
    with pytest.raises(RuntimeError, match=PASSED_BY + r"\[1\] of 2"):
        model(tokens)
    hook.remove()
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks
    assert torch.equal(logits(model, tokens), logits(native_model(), tokens))


def test_a_forward_that_fails_leaves_nothing_behind():
    model = toy("full")
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    dlm_fast.handle_of(model).unpatch()
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks


def test_threads_and_nested_decodes_each_count_their_own_layers():
    model, tokens, failed = toy("full", layers=3), ids(5), []
    expected, decoded = logits(model, tokens), dlm_fast.generate(model, **PLAIN)
    handle = dlm_fast.handle_of(model)
    before, nested = handle.attention_calls, []

    def inside(state):
        nested.append(logits(model, tokens))

    def work():
        for _ in range(5):
            out = dlm_fast.generate(model, on_step=inside, **PLAIN)
            if not torch.equal(out.canvas[0], decoded.canvas[0]):
                failed.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and all(torch.equal(found, expected) for found in nested)
    assert handle.attention_calls - before == 3 * (4 * 5 * decoded.nfe[0] + len(nested))


def test_gradient_checkpointing_computes_layers_twice_and_changes_no_gradient():
    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model = native_model().train()
        if checkpointed:
            checkpoint_activations(model)
        with dlm_fast.patch(model, backend="reference") as handle:
            model(ids(5)).logits.sum().backward()
            assert handle.attention_calls == 2
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plain_forward_under_autocast_is_as_near_to_the_original_as_transformers_own(dtype):
    model, tokens = native_model(), ids(17)
    model.set_attn_implementation("sdpa")
    exact = logits(copy.deepcopy(model).double(), tokens)
    with torch.autocast("cpu", dtype):
        before = logits(model, tokens)
        with dlm_fast.patch(model, backend="reference"):
            inside = logits(model, tokens)
            model(tokens).logits.float().sum().backward()
    assert inside.dtype == before.dtype == dtype
    no_worse_than_torch("logits", inside, before, exact, half_steps=False)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.layers[0].self_attn.parameters())


@pytest.mark.parametrize("capability", [87, 103, 121])
def test_a_gpu_that_borrows_tiles_decodes_with_those_of_its_family(capability, monkeypatch):
    device_module = pytest.importorskip("dlm_kernels.device", reason="the kernels need Triton")
    monkeypatch.setattr(device_module, "INTERPRETED", capability)
    settings = {"max_new_tokens": 4, "preset": "llada"}
    ours = dlm_fast.generate(toy(backend="triton"), [[5, 6, 7]], **settings)
    assert ours.sequences[0].tolist() == dlm_fast.generate(toy(), [[5, 6, 7]], **settings).sequences[0].tolist()


def test_explain_says_which_op_runs_and_why():
    facts = dlm_fast.explain(toy("block", backend="auto"))
    assert facts["model"] == "LlamaForCausalLM" and facts["visibility"] == facts["plain_forward"] == "block"
    assert facts["backend"] == "cpu" and "Triton kernels need a CUDA device" in facts["reason"]
    assert facts["ops"]["block_attention"] == "dlm_kernels.cpu.attention.block_attention"
    assert facts["ops"]["unmask"] == "dlm_kernels.cpu.unmask.unmask"
    with pytest.raises(ValueError, match="not patched"):
        dlm_fast.explain(native_model())


def test_the_diffusion_configuration_is_read_from_the_config():
    model = native_model()
    model.config.dlm = {"mask_token_id": MASK, "eos_token_ids": [EOS], "visibility": "full"}
    with dlm_fast.patch(model, backend="reference") as handle:
        assert handle.diffusion == FULL and handle.plain_mode == "causal"
        assert dlm_fast.generate(model, **PLAIN).nfe == [3]


def test_a_patched_model_may_share_the_process_with_a_loaded_one():
    patched, loaded = native_model(seed=1), toy("full", seed=2)
    before = dlm_fast.generate(loaded, **PLAIN).canvas[0]
    with attach(patched, backend="reference", diffusion=FULL, plain_mode="full"):
        dlm_fast.generate(patched, **PLAIN)
    assert torch.equal(dlm_fast.generate(loaded, **PLAIN).canvas[0], before)


@pytest.mark.parametrize("adapter", models.ADAPTERS, ids=lambda adapter: adapter.__name__)
def test_a_family_has_every_part_of_an_adapter(adapter):
    """The protocol is what the loop and the patch ask of a family: its functions, with these parameters."""
    parts = {name: part for name, part in vars(models.Adapter).items() if inspect.isfunction(part) and name[0] != "_"}
    assert len(parts) == 11 and adapter.CLASSES
    for name, part in parts.items():
        expected = list(inspect.signature(part).parameters)[1:]  # a module's function has no self
        assert list(inspect.signature(getattr(adapter, name)).parameters) == expected, name


@pytest.mark.parametrize("kind", models.native.CLASSES, ids=lambda kind: kind.__name__)
def test_a_transformers_that_cannot_be_driven_is_refused_by_a_probe(kind, monkeypatch):
    """What the classes of transformers must do is tried on a tiny model; no version is refused by its number."""
    probe = models.native.probe.__wrapped__
    state = torch.random.get_rng_state()
    probe(kind)
    assert torch.equal(torch.random.get_rng_state(), state)
    layer = models.native.CLASSES[kind]
    forward = layer.forward

    def forgets_keywords(self, *args, dlm_call=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", forgets_keywords)
    with pytest.raises(
        NotImplementedError, match=rf"{kind.__name__} of transformers .* cannot be driven: RuntimeError"
    ):
        probe(kind)

    def turns_queries(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states * (1 + (kwargs.get("dlm_call") is not None)), *args, **kwargs)

    monkeypatch.setattr(layer, "forward", turns_queries)
    with pytest.raises(NotImplementedError, match="cannot be driven: its hidden states differ by"):
        probe(kind)
