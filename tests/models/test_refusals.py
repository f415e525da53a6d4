"""What `patch` refuses, by name and before anything is patched, and what a patched model refuses to compute."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from helpers import EOS, MASK, native_model, toy
from patched import FULL, PLAIN, ids, logits
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
from dlm_fast.ops import choose


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
        ValueError, match="backend must be one of auto, triton, cpu, reference or an Ops, got backend='cuda'"
    ):
        dlm_fast.patch(model, backend="cuda")
    with dlm_fast.patch(model, backend="reference"):
        pass


@pytest.mark.parametrize("device", ["cuda:0", "meta"])
def test_the_ops_for_a_cpu_are_refused_for_a_model_that_is_elsewhere(device):
    with pytest.raises(ValueError, match=f"ops: backend 'cpu' needs a model on a CPU, got one on {device}"):
        choose("cpu", device)


def test_what_is_neither_a_gpu_nor_a_cpu_gets_the_reference():
    assert choose("cpu", "cpu") is dlm_fast.CPU and choose("auto", "cpu").name == "cpu"
    chosen = choose("auto", "meta")
    assert chosen.name == "reference" and "neither Triton kernels nor the ops for a CPU" in chosen.reason


@pytest.mark.parametrize("capability, backend", [(75, "auto"), (75, "triton"), (70, "triton"), (110, "auto")])
def test_a_gpu_without_kernels_is_refused_when_the_backend_is_chosen(capability, backend, monkeypatch):
    """The refusal is neither a quiet fall back to the reference, nor does it wait for the first forward."""
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


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_earlier_keys_are_refused_rather_than_forgotten(name):
    model, tokens = native_model(), ids(6)
    if name not in inspect.signature(type(model.model).forward).parameters and name == "cache":
        pytest.skip("the name of transformers 5.24")
    past = model(tokens[:, :4], use_cache=True).past_key_values
    with (
        dlm_fast.patch(model, backend="reference"),
        pytest.raises(NotImplementedError, match="a plain forward takes no earlier keys, got 4"),
    ):
        model(tokens[:, 4:], **{name: past})


def test_transformers_own_generate_inside_patch_is_right_or_refused():
    """The second step of transformers' generate hands over a cache. Our plain forward keeps none, so it must say so
    rather than forget the prompt."""
    model, tokens = native_model(), ids(4)
    expected = model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=EOS)
    with dlm_fast.patch(model, backend="reference"):
        assert torch.equal(
            model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=EOS), expected
        )
        with pytest.raises(NotImplementedError, match="takes no earlier keys"):
            model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=EOS)


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
        ({"block_alignment": "left"}, "block_alignment must be one of abs, rel, both, got block_alignment='left'"),
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


def test_a_model_without_numbers_is_refused_by_patch_and_before_a_decode():
    model, loaded, steps = native_model(), toy("full"), []
    model.lm_head.to("meta")
    loaded.lm_head.to("meta")
    rule = "model must have its numbers, got lm_head.weight on device 'meta', which has none"
    with pytest.raises(ValueError, match=f"patch: {rule}"):
        dlm_fast.patch(model, diffusion=FULL, backend="reference")
    with pytest.raises(ValueError, match=f"generate: {rule}"):
        dlm_fast.generate(loaded, [[5, 6]], on_step=steps.append)
    assert not steps


def test_a_model_without_parameters_is_refused():
    model = native_model()
    for module in model.modules():
        module._parameters.clear()
    with pytest.raises(ValueError, match="patch: model must have parameters, got a LlamaForCausalLM without any"):
        dlm_fast.patch(model, diffusion=FULL, backend="reference")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_model_that_was_cast_to_float64_decodes(backend):
    expected = dlm_fast.generate(toy("full", backend=backend), [[5, 6]], max_new_tokens=4)
    found = dlm_fast.generate(toy("full", backend=backend).to(torch.float64), [[5, 6]], max_new_tokens=4)
    assert found.sequences[0].tolist() == expected.sequences[0].tolist()


@pytest.mark.parametrize("model", [None, [], "tiny-full", 5, object()])
def test_what_is_no_model_is_named(model):
    with pytest.raises(TypeError, match="patch: model must be a model of transformers, got model="):
        dlm_fast.patch(model)
    for ask in (dlm_fast.handle_of, dlm_fast.explain):
        with pytest.raises(TypeError, match="model must be a model from dlm_fast.load, or patched .*, got model="):
            ask(model)


def test_what_is_no_tokenizer_is_named():
    with pytest.raises(TypeError, match="patch: tokenizer must be a transformers tokenizer or None, got tokenizer=5"):
        dlm_fast.patch(native_model(), diffusion=FULL, tokenizer=5)
