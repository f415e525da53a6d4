"""patch and unpatch: what runs inside, what stays outside, and what is refused."""

from __future__ import annotations

import copy

import dlm_fast
import pytest
import torch
from dlm_fast.models.native import ATTENTION_NAME
from dlm_fast.patching import attach
from helpers import EOS, MASK, assert_no_worse_than_torch, native_model, random_prompts, toy
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

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
    assert_no_worse_than_torch(inside, before, exact, floor=1e-5)
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
    torch.testing.assert_close(absolute, own_forward(native_model(), tokens, blocks_see([p // 4 for p in range(11)])), atol=2e-5, rtol=1e-4)
    relative = toy("block", block_length=4, block_alignment="rel")
    expected = own_forward(native_model(), tokens, blocks_see([0] * 3 + [1 + (p - 3) // 4 for p in range(3, 11)]))
    torch.testing.assert_close(logits(relative, tokens, prompt_lengths=torch.tensor([3])), expected, atol=2e-5, rtol=1e-4)
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
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None))
    mistral = MistralForCausalLM(MistralConfig(**tiny, num_key_value_heads=2, intermediate_size=32, pad_token_id=None))
    for model in (gpt2, mistral, nn.Linear(2, 2)):
        with pytest.raises(NotImplementedError, match=rf"unsupported model class {type(model).__name__}; supported are LlamaForCausalLM, Qwen2"):
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
    with pytest.raises(NotImplementedError, match="layer 1 must have an unmodified LlamaAttention, got LlamaAttention with a replaced forward"):
        dlm_fast.patch(model)
    del attention.forward
    model.model.layers[0].self_attn = nn.Identity()
    with pytest.raises(NotImplementedError, match="layer 0 must have an unmodified LlamaAttention, got Identity"):
        dlm_fast.patch(model)
    assert model.config._attn_implementation == "eager" and not model.model._forward_pre_hooks


def test_a_sliding_window_is_refused():
    config = Qwen2Config(
        vocab_size=48, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        use_sliding_window=True, sliding_window=8, max_window_layers=0, pad_token_id=None, bos_token_id=None,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="layer 0 has sliding_window=8; only full attention is supported"):
        dlm_fast.patch(Qwen2ForCausalLM(config))


def test_an_unknown_backend_is_refused_and_nothing_is_patched():
    model = native_model()
    with pytest.raises(ValueError, match="backend must be one of auto, triton, reference or an Ops, got backend='cuda'"):
        dlm_fast.patch(model, backend="cuda")
    with dlm_fast.patch(model, backend="reference"):
        pass


def test_what_our_attention_would_ignore_is_refused():
    model, tokens = toy("full"), ids(4)
    with pytest.raises(NotImplementedError, match=r"attention_mask must be \[B, L\], got shape \(1, 1, 4, 4\)"):
        model(tokens, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 4\), got \(1, 3\)"):
        model(tokens, attention_mask=torch.ones(1, 3))
    with pytest.raises(NotImplementedError, match="packed sequences"):
        model(tokens, position_ids=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(ValueError, match="prompt_lengths has a meaning for block-causal models and those of an isolated prompt only, this one is 'full'"):
        model(tokens, prompt_lengths=torch.tensor([2]))


def test_earlier_keys_are_refused_rather_than_forgotten():
    model, tokens = native_model(), ids(6)
    past = model(tokens[:, :4], use_cache=True).past_key_values
    with dlm_fast.patch(model, backend="reference"), pytest.raises(NotImplementedError, match="a plain forward takes no earlier keys, got 4"):
        model(tokens[:, 4:], past_key_values=past)


def test_transformers_own_generate_inside_patch_is_right_or_refused():
    """Its second step hands over a cache: our plain forward keeps none, so it must say so rather than forget the prompt."""
    model, tokens = native_model(), ids(4)
    expected = model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=EOS)
    with dlm_fast.patch(model, backend="reference"):
        assert torch.equal(model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=EOS), expected)
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
        ({"block_length": 0}, "block_length must be at least 1, got block_length=0"),
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


def test_a_patched_model_may_share_the_process_with_a_loaded_one():
    one, other = native_model(seed=1), toy("full", seed=2)
    before = dlm_fast.generate(other, **PLAIN).canvas[0]
    with attach(one, backend="reference", diffusion=FULL, plain_mode="full"):
        dlm_fast.generate(one, **PLAIN)
    assert torch.equal(dlm_fast.generate(other, **PLAIN).canvas[0], before)
