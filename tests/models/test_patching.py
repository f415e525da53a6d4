"""patch and unpatch: what runs inside, what stays outside, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import multiprocessing
import pickle
import threading

import pytest
import torch
from helpers import EOS, MASK, native_model, random_prompts, save_toy_checkpoint, toy
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import dlm_fast
from dlm_fast import models
from dlm_fast.models.native import ATTENTION_NAME
from dlm_fast.ops import choose
from dlm_fast.patching import attach
from dlm_fast.training.networks import checkpoint_activations
from dlm_kernels.testing import no_worse_than_torch

FULL = dlm_fast.DiffusionConfig(mask_token_id=MASK, eos_token_ids=(EOS,), visibility="full")
PLAIN = {"prompts": [[5, 6]], "max_new_tokens": 3}


def ids(*lengths: int) -> torch.Tensor:
    return torch.tensor(random_prompts(list(lengths)))


def logits(model, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits


def own_forward(model, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Logits of the unpatched model, told who sees whom by a 4-D mask (an addend of eager attention)."""
    return logits(model, tokens, attention_mask=torch.where(visible[:, None], 0.0, -1e9))


def blocks_see(block: list[int]) -> torch.Tensor:
    order = torch.tensor(block)
    return (order[None, :] <= order[:, None])[None]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
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


def test_gradients_flow_through_the_reference_backend():
    model = native_model()
    with dlm_fast.patch(model, backend="reference"):
        model(ids(5)).logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.layers[0].self_attn.parameters())


def test_patching_one_instance_leaves_every_other_alone():
    model = native_model()
    twin = LlamaForCausalLM(model.config).eval()  # shares the config object
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


def test_layers_that_are_not_numbered_as_they_stand_are_refused():
    model = native_model(layers=3)
    del model.model.layers[0]
    with pytest.raises(
        NotImplementedError,
        match=r"the layers must be numbered 0 to 2 as in config.num_hidden_layers, got layer_idx=\[1, 2\]",
    ):
        dlm_fast.patch(model)


def test_a_compiled_model_is_refused_with_what_to_do():
    compiled = torch.compile(native_model(), backend="eager")
    with pytest.raises(
        NotImplementedError,
        match=r"unsupported model class OptimizedModule; .*; patch the model that was compiled \(model._orig_mod\)",
    ):
        dlm_fast.patch(compiled)
    with pytest.raises(
        ValueError, match=r"OptimizedModule is not patched; give the model that was compiled \(model._orig_mod\)"
    ):
        dlm_fast.generate(torch.compile(toy("full"), backend="eager"), **PLAIN)


# Copies.


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_is_patched_by_a_handle_of_its_own(duplicate):
    model, tokens = toy("full"), ids(6)
    logits(model, tokens)
    twin = duplicate(model)
    handle, own = dlm_fast.handle_of(model), dlm_fast.handle_of(twin)
    assert own is not handle and own.model is twin and own.adapter is handle.adapter and own.attention_calls == 0
    assert own.diffusion == handle.diffusion and twin.config is not model.config
    assert torch.equal(logits(twin, tokens), logits(model, tokens)) and own.attention_calls == 2
    assert torch.equal(dlm_fast.generate(twin, **PLAIN).canvas[0], dlm_fast.generate(model, **PLAIN).canvas[0])

    bidirectional, causal = logits(model, tokens), logits(native_model(), tokens)
    own.unpatch()
    assert torch.equal(logits(twin, tokens), causal) and torch.equal(logits(model, tokens), bidirectional)
    assert not twin.model._forward_pre_hooks and not twin.model._forward_hooks
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    handle.unpatch()
    assert torch.equal(logits(model, tokens), causal)


def test_a_copy_of_a_loaded_model_brings_its_tokenizer(tmp_path):
    save_toy_checkpoint(tmp_path)
    model = dlm_fast.load(tmp_path, backend="reference", device="cpu")
    for twin in (copy.deepcopy(model), pickled(model)):
        assert (
            dlm_fast.generate(twin, ["abc"], max_new_tokens=3).text
            == dlm_fast.generate(model, ["abc"], max_new_tokens=3).text
        )


def test_a_copy_saves_the_checkpoint_that_the_original_would(tmp_path):
    save_toy_checkpoint(tmp_path / "toy")
    model = dlm_fast.load(tmp_path / "toy", backend="reference", device="cpu")
    copy.deepcopy(model).save_pretrained(tmp_path / "again")
    again = dlm_fast.load(tmp_path / "again", backend="reference", device="cpu")
    assert torch.equal(dlm_fast.generate(again, **PLAIN).canvas[0], dlm_fast.generate(model, **PLAIN).canvas[0])


def decode_in_a_process(model, results) -> None:
    results.put(dlm_fast.generate(model, **PLAIN).canvas[0].tolist())


def test_a_spawned_process_decodes_the_model_it_is_given():
    model, context = toy("full"), multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=decode_in_a_process, args=(model, results))
    process.start()
    found = results.get(timeout=120)
    process.join()
    assert found == dlm_fast.generate(model, **PLAIN).canvas[0].tolist()


# Modes and dtypes.


def test_a_decode_in_training_mode_is_refused():
    model = toy("full")
    model.train()
    with pytest.raises(ValueError, match=r"the model must be in eval mode, got training=True; call model.eval\(\)"):
        dlm_fast.generate(model, **PLAIN)
    model.eval().model.layers[1].mlp.train()
    with pytest.raises(
        ValueError,
        match=r"the model must be in eval mode, got training=True in model.layers.1.mlp; call model.eval\(\)",
    ):
        dlm_fast.generate(model, **PLAIN)
    model.eval()
    assert dlm_fast.generate(model, **PLAIN).nfe == [3]


def test_attention_dropout_is_refused_not_ignored():
    model = native_model()
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with dlm_fast.patch(model, backend="reference"):
        logits(model, ids(4))
        with pytest.raises(NotImplementedError, match=r"dropout must be 0, got dropout=0.1; call model.eval\(\)"):
            model.train()(ids(4))


def test_a_decode_under_autocast_is_refused():
    model = toy("full")
    expected = dlm_fast.generate(model, **PLAIN).canvas[0]
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(
            ValueError, match=r"autocast must be off, got torch.autocast\('cpu', torch.bfloat16\); decode under"
        ):
            dlm_fast.generate(model, **PLAIN)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(dlm_fast.generate(model, **PLAIN).canvas[0], expected)


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


def test_patching_twice_and_unpatching_twice_are_errors():
    model = native_model()
    handle = dlm_fast.patch(model, backend="reference")
    with pytest.raises(RuntimeError, match="already patched; unpatch it first"):
        dlm_fast.patch(model)
    handle.unpatch()
    with pytest.raises(RuntimeError, match="not patched by this handle"):
        handle.unpatch()
    with dlm_fast.patch(model, backend="reference"), pytest.raises(RuntimeError, match="not patched by this handle"):
        handle.unpatch()


def test_an_unknown_class_is_refused_by_name():
    tiny = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=48, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
    )
    mistral = MistralForCausalLM(MistralConfig(**tiny, num_key_value_heads=2, intermediate_size=32, pad_token_id=None))
    for model in (gpt2, mistral, nn.Linear(2, 2)):
        with pytest.raises(
            NotImplementedError,
            match=rf"unsupported model class {type(model).__name__}; supported are LlamaForCausalLM, Qwen2",
        ):
            dlm_fast.patch(model)


def test_a_subclass_is_not_taken_for_its_parent():
    class Altered(LlamaForCausalLM):
        pass

    with pytest.raises(NotImplementedError, match="unsupported model class Altered"):
        dlm_fast.patch(Altered(native_model().config))


def test_an_altered_attention_module_is_refused_and_nothing_is_patched():
    model = native_model()
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward
    with pytest.raises(
        NotImplementedError,
        match="layer 1 must have an unmodified LlamaAttention, got LlamaAttention with a replaced forward",
    ):
        dlm_fast.patch(model)
    del attention.forward
    model.model.layers[0].self_attn = nn.Identity()
    with pytest.raises(NotImplementedError, match="layer 0 must have an unmodified LlamaAttention, got Identity"):
        dlm_fast.patch(model)
    assert model.config._attn_implementation == "eager" and not model.model._forward_pre_hooks


def test_a_sliding_window_is_refused():
    config = Qwen2Config(
        vocab_size=48, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
        use_sliding_window=True, sliding_window=8, max_window_layers=0, pad_token_id=None, bos_token_id=None,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="layer 0 has sliding_window=8; only full attention is supported"):
        dlm_fast.patch(Qwen2ForCausalLM(config))


def test_an_unknown_backend_is_refused_and_nothing_is_patched():
    model = native_model()
    with pytest.raises(
        ValueError, match="backend must be one of auto, triton, reference or an Ops, got backend='cuda'"
    ):
        dlm_fast.patch(model, backend="cuda")
    with dlm_fast.patch(model, backend="reference"):
        pass


@pytest.mark.parametrize("capability, backend", [(75, "auto"), (75, "triton"), (70, "triton"), (110, "auto")])
def test_a_gpu_without_kernels_is_refused_when_the_backend_is_chosen(capability, backend, monkeypatch):
    """Never a quiet fall back to the reference, and never at the first forward."""
    device_module = pytest.importorskip("dlm_kernels.device", reason="the kernels need Triton")
    known = "8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 10.3, 12.0, 12.1"
    message = (
        rf"backend '{backend}': there are no Triton kernels for compute capability {capability / 10} \(.*\), "
        rf"only for {known}; .*backend='reference'"
    )
    monkeypatch.setattr(device_module, "_capability", lambda index: capability)
    with pytest.raises(NotImplementedError, match=message):
        choose(backend, "cuda:0")
    monkeypatch.setattr(device_module, "INTERPRETED", capability)
    model = native_model()
    if backend == "triton":
        with pytest.raises(NotImplementedError, match=message):
            dlm_fast.patch(model, backend=backend)
    with dlm_fast.patch(model, backend="reference"):
        model(torch.tensor([[5, 6]]))


@pytest.mark.parametrize("capability", [87, 103, 121])
def test_a_gpu_that_borrows_tiles_decodes_with_those_of_its_family(capability, monkeypatch):
    device_module = pytest.importorskip("dlm_kernels.device", reason="the kernels need Triton")
    monkeypatch.setattr(device_module, "INTERPRETED", capability)
    settings = {"max_new_tokens": 4, "preset": "llada"}
    ours = dlm_fast.generate(toy(backend="triton"), [[5, 6, 7]], **settings)
    assert ours.sequences[0].tolist() == dlm_fast.generate(toy(), [[5, 6, 7]], **settings).sequences[0].tolist()


def test_a_head_size_without_a_kernel_is_refused_by_patch_and_is_the_references_alone():
    pytest.importorskip("triton")
    model = native_model(head_dim=20)
    refusal = (
        "no Triton attention kernel for head_dim=20, only for multiples of 16 up to 256, and 512; .*backend='reference'"
    )
    with pytest.raises(NotImplementedError, match=refusal):
        dlm_fast.patch(model, backend="triton")
    before = model(torch.tensor([[5, 6, 7]])).logits
    with dlm_fast.patch(model, backend="reference"):
        torch.testing.assert_close(model(torch.tensor([[5, 6, 7]])).logits, before)


def test_what_our_attention_would_ignore_is_refused():
    model, tokens = toy("full"), ids(4)
    with pytest.raises(NotImplementedError, match=r"attention_mask must be \[B, L\], got shape \(1, 1, 4, 4\)"):
        model(tokens, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 4\), got \(1, 3\)"):
        model(tokens, attention_mask=torch.ones(1, 3))
    with pytest.raises(NotImplementedError, match="packed sequences"):
        model(tokens, position_ids=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(
        ValueError,
        match="prompt_lengths has a meaning for block-causal models and those of an isolated prompt only, "
        "this one is 'full'",
    ):
        model(tokens, prompt_lengths=torch.tensor([2]))


def test_earlier_keys_are_refused_rather_than_forgotten():
    model, tokens = native_model(), ids(6)
    past = model(tokens[:, :4], use_cache=True).past_key_values
    with (
        dlm_fast.patch(model, backend="reference"),
        pytest.raises(NotImplementedError, match="a plain forward takes no earlier keys, got 4"),
    ):
        model(tokens[:, 4:], past_key_values=past)


def test_transformers_own_generate_inside_patch_is_right_or_refused():
    """Its second step hands over a cache: our plain forward keeps none, so it must say so rather than forget the
    prompt."""
    model, tokens = native_model(), ids(4)
    expected = model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=EOS)
    with dlm_fast.patch(model, backend="reference"):
        assert torch.equal(
            model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=EOS), expected
        )
        with pytest.raises(NotImplementedError, match="takes no earlier keys"):
            model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=EOS)


def test_explain_says_which_op_runs_and_why():
    facts = dlm_fast.explain(toy("block", backend="auto"))
    assert facts["model"] == "LlamaForCausalLM" and facts["visibility"] == facts["plain_forward"] == "block"
    assert facts["backend"] == "reference" and "Triton kernels need a CUDA device" in facts["reason"]
    assert facts["ops"]["block_attention"] == "dlm_kernels.reference.attention.block_attention"
    with pytest.raises(ValueError, match="not patched"):
        dlm_fast.explain(native_model())


def test_the_diffusion_configuration_is_read_from_the_config():
    model = native_model()
    model.config.dlm = {"mask_token_id": MASK, "eos_token_ids": [EOS], "visibility": "full"}
    with dlm_fast.patch(model, backend="reference") as handle:
        assert handle.diffusion == FULL and handle.plain_mode == "causal"
        assert dlm_fast.generate(model, **PLAIN).nfe == [3]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"mask_token_id": -1}, "mask_token_id must be an id >= 0, got mask_token_id=-1"),
        ({"eos_token_ids": [MASK]}, "eos_token_ids must not hold the mask id"),
        ({"visibility": "causal"}, "visibility must be one of full, block, got visibility='causal'"),
        ({"visibility": "block"}, "visibility 'block' needs a block_length, got block_length=None"),
        ({"mask_token_id": True}, "mask_token_id must be an id >= 0, got mask_token_id=True"),
        ({"eos_token_ids": 1}, "eos_token_ids must be a list of ids >= 0, got eos_token_ids=1"),
        ({"eos_token_ids": None}, "eos_token_ids must be a list of ids >= 0, got eos_token_ids=None"),
        ({"eos_token_ids": [True]}, r"eos_token_ids must be a list of ids >= 0, got eos_token_ids=\[True\]"),
        ({"block_length": 0}, "block_length must be a whole number >= 1 or None, got block_length=0"),
        ({"block_length": "4"}, "block_length must be a whole number >= 1 or None, got block_length='4'"),
        ({"block_length": 4.5}, "block_length must be a whole number >= 1 or None, got block_length=4.5"),
        ({"block_length": True}, "block_length must be a whole number >= 1 or None, got block_length=True"),
        (
            {"block_length": 10**12},
            "block_length must be a whole number <= 16777216 or None, got block_length=1000000000000",
        ),
        ({"block_alignment": "left"}, "block_alignment must be one of abs, rel, got block_alignment='left'"),
        ({"logits_row": "next"}, "logits_row must be one of self, previous, got logits_row='next'"),
        ({"blocks": 3}, "unknown keys \\['blocks'\\]"),
    ],
)
def test_a_bad_diffusion_configuration_names_rule_and_value(values, message):
    good = {"mask_token_id": MASK, "eos_token_ids": [EOS], "visibility": "full"}
    with pytest.raises(ValueError, match=message):
        dlm_fast.DiffusionConfig.from_dict({**good, **values})
    with pytest.raises(ValueError, match="missing keys \\['visibility'\\]"):
        dlm_fast.DiffusionConfig.from_dict({"mask_token_id": MASK, "eos_token_ids": [EOS]})
    assert dlm_fast.DiffusionConfig.from_dict({**good, "logits_row": "previous"}).logits_row == "previous"


def test_a_diffusion_section_that_is_no_object_is_named():
    for section in ([1], "full", 3):
        with pytest.raises(ValueError, match="the section must be an object of names and values, got"):
            dlm_fast.DiffusionConfig.from_dict(section)


@pytest.mark.parametrize(
    "name, ids", [("mask_token_id", {"mask_token_id": 48}), ("eos_token_ids", {"eos_token_ids": (EOS, 48)})]
)
def test_ids_that_the_vocabulary_does_not_hold_are_refused_and_nothing_is_patched(name, ids):
    model = native_model()
    with pytest.raises(ValueError, match=f"{name} must be below the model's vocab_size=48, got 48"):
        dlm_fast.patch(model, diffusion=dataclasses.replace(FULL, **ids))
    with pytest.raises(TypeError, match="diffusion must be a DiffusionConfig, got dict"):
        dlm_fast.patch(model, diffusion={"mask_token_id": 0})
    assert model.config._attn_implementation == "eager"


def test_a_patched_model_may_share_the_process_with_a_loaded_one():
    one, other = native_model(seed=1), toy("full", seed=2)
    before = dlm_fast.generate(other, **PLAIN).canvas[0]
    with attach(one, backend="reference", diffusion=FULL, plain_mode="full"):
        dlm_fast.generate(one, **PLAIN)
    assert torch.equal(dlm_fast.generate(other, **PLAIN).canvas[0], before)


@pytest.mark.parametrize("adapter", models.ADAPTERS, ids=lambda adapter: adapter.__name__)
def test_a_family_has_every_part_of_an_adapter(adapter):
    """The protocol is what the loop and the patch ask of a family: its functions, by these parameters."""
    parts = {name: part for name, part in vars(models.Adapter).items() if inspect.isfunction(part) and name[0] != "_"}
    assert len(parts) == 8 and adapter.CLASSES
    for name, part in parts.items():
        expected = list(inspect.signature(part).parameters)[1:]  # a module's function has no self
        assert list(inspect.signature(getattr(adapter, name)).parameters) == expected, name
