"""Models that were loaded with remote code are decoded through a native twin that shares their parameters, and are
themselves left as they are.

The models are tiny and random, with the published module trees and names (tests/support/remote_models.py); their
forwards are the independent float64 ones (tests/support/family_oracles.py).
"""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
import types
import warnings
import weakref
from pathlib import Path

import family_oracles
import published
import pytest
import remote_models
import torch
from helpers import native_model, toy_tokenizer
from torch import Tensor, nn

import dlm_fast
from dlm_fast import CheckpointError
from dlm_fast.loading import load_tokenizer
from dlm_fast.models.families import family_of

# What only the name of a checkpoint tells.
NAMED = {"a2d-qwen3": "Qwen3-mdlm", "a2d-qwen2": "Qwen2-mdlm", "a2d-llama": "Llama-mdlm"}
MOE = ("llada2", "llada-moe", "sdar-moe", "rnd1")
PROMPT = 6
PROMPTS = ["the inner one", "a", "here is more than that"]


def write(family: str, folder: Path, **changes) -> published.Published:
    return published.write(family, folder / NAMED.get(family, family), **changes)


def patch(owner: nn.Module, **kwargs):
    """`dlm_fast.patch` with the tokenizer of the owner's checkpoint."""
    if isinstance(owner, remote_models.RemoteModel):
        kwargs.setdefault("tokenizer", tokenizer_of(owner.checkpoint))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is unproven")
        warnings.filterwarnings("ignore", message=".*holds the experts of a layer as one stack")
        return dlm_fast.patch(owner, backend="reference", **kwargs)


def tokenizer_of(checkpoint: published.Published):
    return load_tokenizer(checkpoint.folder, family_of(checkpoint.config))


def ids_of(checkpoint: published.Published, length: int = 24) -> list[int]:
    """A sequence whose first mask stands behind the prompt, with masks here and there."""
    masks = {PROMPT, PROMPT + 1, PROMPT + 5, length - 3}
    return [checkpoint.mask_id if i in masks else 2 + 7 * i % 90 for i in range(length)]


def plain(handle: dlm_fast.PatchHandle, ids: list[int]) -> Tensor:
    """The logits [L, V] of a plain forward of the twin."""
    lengths = {"prompt_lengths": torch.tensor([PROMPT])} if handle.plain_mode == "block" else {}
    with torch.no_grad():
        return handle.model(torch.tensor([ids]), **lengths).logits[0]


def says(owner: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return owner(torch.tensor([ids])).logits


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest logit."""
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


@pytest.fixture
def owner(tmp_path, request):
    """A model of one family, LLaDA where a test names none."""
    return remote_models.opened(write(getattr(request, "param", "llada"), tmp_path))


# What the twin computes


@pytest.mark.parametrize("family", sorted(published.FAMILIES))
def test_the_twin_computes_what_its_owner_computes(tmp_path, family):
    checkpoint = write(family, tmp_path)
    owner, ids = remote_models.opened(checkpoint), ids_of(checkpoint)
    handle = patch(owner)
    block = family_oracles.blocks(checkpoint, len(ids), PROMPT)
    with torch.no_grad():
        expected = owner(torch.tensor([ids]), block).logits[0]
    assert relative(plain(handle, ids), expected) < 1e-5
    assert type(handle.model) is family_of(checkpoint.config).native


@pytest.mark.parametrize("family", sorted(published.FAMILIES))
def test_the_settings_are_those_of_the_same_checkpoint_opened_by_load(tmp_path, family):
    checkpoint = write(family, tmp_path)
    handle = patch(remote_models.opened(checkpoint))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is unproven")
        loaded = dlm_fast.handle_of(dlm_fast.load(checkpoint.folder, backend="reference", device="cpu"))
    assert handle.diffusion == loaded.diffusion and handle.settings == loaded.settings
    assert handle.family == loaded.family and handle.plain_mode == loaded.plain_mode


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "llada2", "fast-dllm-v2", "nemotron"])
def test_a_decode_of_the_owner_is_that_of_the_checkpoint_opened_by_load(tmp_path, family):
    checkpoint = write(family, tmp_path)
    owner, prompts = remote_models.opened(checkpoint), [*PROMPTS[:2], [5, 6, 7]]
    patch(owner)
    loaded = dlm_fast.load(checkpoint.folder, backend="reference", device="cpu")
    ours, expected = (dlm_fast.generate(model, prompts, max_new_tokens=9, seed=3) for model in (owner, loaded))
    assert [row.tolist() for row in ours.canvas] == [row.tolist() for row in expected.canvas]
    assert ours.text == expected.text and ours.nfe == expected.nfe


def test_the_owners_configuration_counts_where_transformers_wrote_another_base_beside_it(tmp_path):
    checkpoint = write("sdar", tmp_path)
    owner = remote_models.opened(checkpoint)
    owner.config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
    assert patch(owner).model.config.rope_parameters["rope_theta"] == checkpoint.config["rope_theta"]


def test_diffusion_may_be_some_fields_or_all_of_them(tmp_path):
    checkpoint = write("sdar", tmp_path, mask_token_id=published.ABSENT)
    owner = remote_models.opened(checkpoint)
    with pytest.raises(ValueError, match=r"^patch: no mask id was found for 'sdar'; asked were"):
        patch(owner, tokenizer=None)
    with patch(owner, diffusion={"mask_token_id": 7}, tokenizer=None) as handle:
        assert handle.diffusion.mask_token_id == 7 and handle.settings.sources["mask_token_id"] == "argument diffusion"
    diffusion = dlm_fast.DiffusionConfig(mask_token_id=7, eos_token_ids=(1,), visibility="full")
    with patch(owner, diffusion=diffusion, tokenizer=None) as handle:
        assert handle.diffusion is diffusion
    with pytest.raises(ValueError, match="patch: diffusion must hold fields of DiffusionConfig .* got .'mask_id'"):
        patch(owner, diffusion={"mask_id": 7})
    with pytest.raises(TypeError, match="patch: diffusion must be a DiffusionConfig, a mapping of its fields or None"):
        patch(owner, diffusion=7)


def test_a_saved_twin_opens(tmp_path):
    checkpoint = write("llada2", tmp_path)
    handle = patch(remote_models.opened(checkpoint))
    handle.model.save_pretrained(tmp_path / "saved")
    again = dlm_fast.handle_of(dlm_fast.load(tmp_path / "saved", backend="reference", device="cpu"))
    ids = ids_of(checkpoint)
    assert torch.equal(plain(again, ids), plain(handle, ids)) and again.diffusion == handle.diffusion


# What the two share


@pytest.mark.parametrize(
    "owner", ["llada", "dream", "sdar", "fast-dllm-v2", "nemotron", "stable-diffcoder"], indirect=True
)
def test_every_parameter_of_a_dense_twin_is_its_owners_own(owner):
    handle = patch(owner)
    theirs = {id(parameter) for parameter in owner.parameters()}
    assert {id(parameter) for parameter in handle.model.parameters()} == theirs
    size = sum(p.numel() * p.element_size() for p in owner.parameters())
    assert dlm_fast.explain(owner)["twin"] == {
        "class": type(handle.model).__name__,
        "shared_bytes": size,
        "copied_bytes": 0,
    }


@pytest.mark.parametrize("owner", MOE, indirect=True)
def test_the_copies_of_experts_are_stated_before_they_are_made(owner):
    experts = [p for name, p in owner.named_parameters() if ".experts." in name]
    size = sum(p.numel() * p.element_size() for p in experts)
    with pytest.warns(UserWarning, match=rf"copies them: {size:,} bytes \(0.00 GiB\) beside the model's own"):
        handle = dlm_fast.patch(owner, tokenizer=tokenizer_of(owner.checkpoint), backend="reference")
    assert dlm_fast.explain(owner)["twin"]["copied_bytes"] == handle.link.copied_bytes == size
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*owner.parameters(), *owner.buffers())}
    stacks = [name for name, p in handle.model.named_parameters() if p.untyped_storage().data_ptr() not in storages]
    assert stacks and all(re.search(r"\.experts\.(gate_up|down)_proj$", name) for name in stacks)

    handle.unpatch()
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="copies them"):
        warnings.simplefilter("error")
        dlm_fast.patch(owner, tokenizer=tokenizer_of(owner.checkpoint), backend="reference")


@pytest.mark.parametrize("owner", ["llada2"], indirect=True)
def test_the_parts_of_a_fused_tensor_are_views_of_its_rows(owner):
    twin = patch(owner).model
    fused = owner.get_parameter("model.layers.0.attention.query_key_value.weight")
    attention = twin.model.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(torch.cat([part.detach() for part in parts]), fused.detach())
    address = fused.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() == address for part in parts)
    bias = owner.get_buffer("model.layers.1.mlp.gate.expert_bias")
    assert twin.model.layers[1].mlp.gate.e_score_correction_bias is bias


@pytest.mark.parametrize(
    "owner, name",
    [
        ("llada", "model.transformer.blocks.1.ff_proj.weight"),
        ("llada", "model.transformer.ff_out.weight"),
        ("fast-dllm-v2", "model.embed_tokens.weight"),
        ("llada2", "model.layers.0.attention.query_key_value.weight"),
        ("llada2", "model.layers.1.mlp.gate.expert_bias"),
    ],
    indirect=["owner"],
)
def test_an_update_in_place_is_seen(tmp_path, owner, name):
    ids, handle = ids_of(owner.checkpoint), patch(owner)
    before = plain(handle, ids)
    tensor = dict((*owner.named_parameters(), *owner.named_buffers()))[name]
    with torch.no_grad():
        tensor.add_(torch.randn_like(tensor))
    block = family_oracles.blocks(owner.checkpoint, len(ids), PROMPT)
    with torch.no_grad():
        expected = owner(torch.tensor([ids]), block).logits[0]
    assert relative(plain(handle, ids), expected) < 1e-5 and relative(before, expected) > 1e-3
    dlm_fast.generate(owner, [[5, 6, 7]], max_new_tokens=4)


def test_a_step_of_an_optimizer_is_seen(owner):
    ids, handle = ids_of(owner.checkpoint), patch(owner)
    optimizer = torch.optim.AdamW(owner.parameters(), lr=0.1)
    owner(torch.tensor([ids])).logits.square().mean().backward()
    optimizer.step()
    assert relative(plain(handle, ids), says(owner, ids)[0]) < 1e-5
    dlm_fast.generate(owner, [[5, 6, 7]], max_new_tokens=4)


# What was replaced

LAYER = "model.transformer.blocks.0."


def replace_a_parameter(owner) -> None:
    module = owner.get_submodule(LAYER + "q_proj")
    module.weight = nn.Parameter(module.weight.detach().clone())


def wrap_the_storage_anew(owner) -> None:
    module = owner.get_submodule(LAYER + "q_proj")
    module.weight = nn.Parameter(module.weight.detach())


def replace_a_module(owner) -> None:
    new = nn.Module().eval()
    new.weight = nn.Parameter(torch.zeros(32, 32))
    owner.get_submodule(LAYER[:-1]).q_proj = new


def cast(owner) -> None:
    owner.to(torch.bfloat16)


def assign(owner) -> None:
    owner.load_state_dict({name: tensor.clone() for name, tensor in owner.state_dict().items()}, assign=True)


def add(owner) -> None:
    owner.get_submodule(LAYER + "q_proj").bias = nn.Parameter(torch.zeros(32))


def remove(owner) -> None:
    del owner.get_submodule(LAYER + "q_proj").weight


@pytest.mark.parametrize(
    "alter, what",
    [
        (replace_a_parameter, LAYER + "q_proj.weight was replaced"),
        (wrap_the_storage_anew, LAYER + "q_proj.weight was replaced"),
        (replace_a_module, LAYER + "q_proj.weight was replaced"),
        (cast, "model.transformer.wte.weight was replaced"),
        (assign, "model.transformer.wte.weight was replaced"),
        (add, LAYER + "q_proj.bias was added"),
        (remove, LAYER + "q_proj.weight was removed"),
    ],
)
def test_a_replaced_parameter_is_refused_by_name(owner, alter, what):
    patch(owner)
    alter(owner)
    message = f"a LLaDAModelLM must be as it was .* and {re.escape(what)}; unpatch it and patch it again"
    with pytest.raises(RuntimeError, match=message):
        dlm_fast.generate(owner, [[5, 6]], max_new_tokens=3)


def test_a_model_that_was_cast_is_patched_again(owner):
    patch(owner)
    owner.double()
    dlm_fast.handle_of(owner).unpatch()
    handle, ids = patch(owner), ids_of(owner.checkpoint)
    assert handle.model.lm_head.weight.dtype == torch.float64
    assert relative(plain(handle, ids), says(owner, ids)[0]) < 1e-6
    dlm_fast.generate(owner, [[5, 6]], max_new_tokens=3)


@pytest.mark.parametrize("owner", ["llada2"], indirect=True)
def test_a_changed_expert_is_refused_by_name(owner):
    patch(owner)
    dlm_fast.generate(owner, [[5, 6]], max_new_tokens=3)
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    with torch.no_grad():
        owner.get_parameter(name).mul_(2)
    with pytest.raises(
        RuntimeError, match=f"and {re.escape(name)}, of which the twin has a copy, was changed in place"
    ):
        dlm_fast.generate(owner, [[5, 6]], max_new_tokens=3)


@pytest.mark.parametrize("owner", ["llada2"], indirect=True)
def test_an_expert_that_a_fused_optimizer_changed_is_refused_by_name(owner):
    patch(owner)
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    expert = owner.get_parameter(name).requires_grad_(True)
    expert.grad = torch.ones_like(expert)
    torch.optim.AdamW([expert], lr=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match=f"and {re.escape(name)}, of which the twin has a copy, was changed"):
        dlm_fast.generate(owner, [[5, 6]], max_new_tokens=3)


@pytest.mark.parametrize("owner", ["sdar"], indirect=True)
@pytest.mark.parametrize("fused", [False, True])
def test_a_session_of_the_owner_decodes_the_weights_of_every_step_of_an_optimizer(owner, fused):
    patch(owner)
    prompt, common = [5 + i % 40 for i in range(45)], {"slots": 2, "max_positions": 96, "max_new_tokens": 6}
    session = dlm_fast.Session(owner, share_prefixes=True, page_size=32, **common)

    def canvas(session: dlm_fast.Session) -> list[int]:
        return session.generate([prompt])[0].canvas.tolist()

    before = canvas(session)
    for parameter in owner.requires_grad_(True).parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    torch.optim.AdamW(owner.parameters(), lr=0.3, fused=fused).step()
    assert canvas(session) == canvas(dlm_fast.Session(owner, **common)) != before
    replace_a_head(owner)
    with pytest.raises(RuntimeError, match="lm_head.weight was replaced; unpatch it and patch it again"):
        session.generate([prompt])


def replace_a_head(owner: nn.Module) -> None:
    owner.lm_head.weight = nn.Parameter(owner.lm_head.weight.detach().clone())


# The owner stays as it is


def picture(model: nn.Module) -> dict:
    """Everything that an object and its modules hold, by identity."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            found[name, key] = [(part, id(item)) for part, item in parts]
    found["config"] = sorted((key, repr(value)) for key, value in vars(model.config).items())
    found["keys"] = list(model.state_dict())
    found["grad"] = [(p.requires_grad, p._version) for p in model.parameters()]
    found["class"] = sorted(vars(type(model)))
    return found


@pytest.mark.parametrize("owner", ["llada", "dream", "sdar", "llada2"], indirect=True)
def test_the_owner_is_bitwise_as_before_and_holds_nothing_of_ours(owner):
    ids = ids_of(owner.checkpoint)
    before, outputs = picture(owner), says(owner, ids)
    with pytest.raises(KeyError), patch(owner):
        assert picture(owner) == before and torch.equal(says(owner, ids), outputs)
        dlm_fast.generate(owner, PROMPTS[:1], max_new_tokens=4)
        assert picture(owner) == before and torch.equal(says(owner, ids), outputs)
        raise KeyError
    assert picture(owner) == before and torch.equal(says(owner, ids), outputs)
    with pytest.raises(ValueError, match=f"{type(owner).__name__} is not patched"):
        dlm_fast.generate(owner, [[5]], max_new_tokens=2)


def test_a_patch_that_fails_leaves_the_owner_as_it_was(owner):
    before = picture(owner)
    with pytest.raises(ValueError, match="eos_token_ids must be below the model's vocab_size=128, got 500"):
        patch(owner, diffusion={"eos_token_ids": [500]})
    assert picture(owner) == before
    with pytest.raises(ValueError, match="is not patched"):
        dlm_fast.handle_of(owner)


def test_two_models_of_one_class_decode_apart_and_in_threads(tmp_path):
    checkpoints = [write("llada", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    owners = [remote_models.opened(checkpoint) for checkpoint in checkpoints]
    assert type(owners[0]) is type(owners[1])
    ids = ids_of(checkpoints[0])
    outputs = [says(owner, ids) for owner in owners]
    handle = patch(owners[0])
    with pytest.raises(ValueError, match="is not patched"):
        dlm_fast.handle_of(owners[1])
    other = patch(owners[1])
    assert other.model is not handle.model
    decoded = [dlm_fast.generate(owner, [[5, 6, 7]], max_new_tokens=6).canvas[0] for owner in owners]
    assert not torch.equal(*decoded)
    failed = []

    def work(number: int) -> None:
        for _ in range(3):
            canvas = dlm_fast.generate(owners[number], [[5, 6, 7]], max_new_tokens=6).canvas[0]
            if not torch.equal(canvas, decoded[number]) or not torch.equal(says(owners[number], ids), outputs[number]):
                failed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    handle.unpatch()
    assert torch.equal(dlm_fast.generate(owners[1], [[5, 6, 7]], max_new_tokens=6).canvas[0], decoded[1])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_owner_takes_no_twin_along(owner, duplicate):
    size = len(pickle.dumps(owner))
    patch(owner)
    assert len(pickle.dumps(owner)) == size
    other = duplicate(owner)
    with pytest.raises(ValueError, match="is not patched"):
        dlm_fast.handle_of(other)
    ids = ids_of(owner.checkpoint)
    assert torch.equal(says(other, ids), says(owner, ids))
    assert other.get_parameter(LAYER + "q_proj.weight") is not owner.get_parameter(LAYER + "q_proj.weight")


def test_a_copy_of_the_twin_is_a_native_model_of_its_own(owner):
    twin, ids = patch(owner).model, ids_of(owner.checkpoint)
    other = copy.deepcopy(twin)
    expected = plain(dlm_fast.handle_of(twin), ids)
    replace_a_parameter(owner)
    with torch.no_grad():
        owner.get_parameter("model.transformer.ff_out.weight").zero_()
    assert torch.equal(plain(dlm_fast.handle_of(other), ids), expected)
    dlm_fast.generate(other, [[5, 6]], max_new_tokens=3)
    dlm_fast.handle_of(other).unpatch()


def test_unpatching_frees_the_twin_and_the_patch_keeps_no_owner_alive(tmp_path):
    owner = remote_models.opened(write("llada", tmp_path))
    handle = patch(owner)
    twin = weakref.ref(handle.model)
    handle.unpatch()
    gc.collect()
    assert twin() is None and handle.model is owner
    with pytest.raises(RuntimeError, match="not patched by this handle"):
        handle.unpatch()

    handle = patch(owner)
    with pytest.raises(RuntimeError, match="already patched; unpatch it first"):
        patch(owner)
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None
    dlm_fast.generate(handle.model, [[5, 6]], max_new_tokens=3)  # the twin has the parameters still


def test_a_model_that_is_unpatched_while_it_decodes_raises(owner):
    handle = patch(owner)

    def leave(state):
        if handle.link is not None:
            handle.unpatch()

    with pytest.raises(RuntimeError, match="this LLaDAModelLM was unpatched, which freed its native twin"):
        dlm_fast.generate(owner, [[5, 6]], max_new_tokens=3, on_step=leave)


def test_the_twin_is_in_the_owners_mode(owner):
    handle = patch(owner.train())
    assert all(module.training for module in handle.model.modules())
    with pytest.raises(ValueError, match=r"must be in eval mode, got training=True; call model.eval\(\)"):
        dlm_fast.generate(owner, [[5, 6]], max_new_tokens=3)
    owner.eval()
    dlm_fast.generate(owner, [[5, 6]], max_new_tokens=3)
    assert not any(module.training for module in handle.model.modules())


def test_requires_grad_stays(tmp_path):
    owner = remote_models.opened(write("sdar", tmp_path))
    frozen = owner.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad_(False)
    twin = patch(owner).model
    assert [name for name, p in twin.named_parameters() if not p.requires_grad] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    assert twin.get_parameter("model.layers.0.self_attn.q_proj.weight") is frozen


# Uninitialised rotary frequencies


@pytest.mark.parametrize("garbage", [0.0, float("nan"), 1e9])
def test_uninitialised_rotary_frequencies_of_the_owner_are_named_and_the_twin_is_right(tmp_path, garbage):
    checkpoint = write("dream", tmp_path)
    owner, ids = remote_models.opened(checkpoint), ids_of(checkpoint)
    expected = family_oracles.logits(checkpoint, ids)
    owner.model.rotary_emb.inv_freq.fill_(garbage)
    for layer in owner.model.layers.children():  # Dream's attentions have such buffers too
        layer.self_attn.rotary_emb = remote_models.Rotary(owner.model.rotary_emb.inv_freq.clone())
    assert not relative(says(owner, ids)[0], expected) < 0.01
    named = r"the buffer \S*rotary_emb.inv_freq and 2 more of this DreamModel does not hold the rotary .* To repair"
    with pytest.warns(UserWarning, match=named) as caught:
        handle = dlm_fast.patch(owner, backend="reference")
    assert relative(plain(handle, ids), expected) < 1e-5
    repair = str(caught[0].message).rpartition("To repair the model: ")[2]
    exec(repair, {"model": owner, "dlm_fast": dlm_fast})
    assert relative(says(owner, ids)[0], expected) < 1e-5


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "llada2"])
def test_a_model_that_from_pretrained_opened_is_decoded_as_its_files_say(tmp_path, family):
    """Transformers 5 leaves the frequencies uninitialised, so that the memory may hold anything, or by chance them."""
    checkpoint = write(family, tmp_path)
    owner, ids = remote_models.from_pretrained(checkpoint), ids_of(checkpoint)
    block = family_oracles.blocks(checkpoint, len(ids), PROMPT)
    expected = family_oracles.logits(checkpoint, ids, block)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = dlm_fast.patch(owner, tokenizer=tokenizer_of(checkpoint), backend="reference")
    assert relative(plain(handle, ids), expected) < 1e-5
    with torch.no_grad():
        is_right = relative(owner(torch.tensor([ids]), block).logits[0], expected) < 1e-5
    assert is_right != any("does not hold the rotary frequencies" in str(warning.message) for warning in caught)
    dlm_fast.generate(owner, PROMPTS[:1], max_new_tokens=4)


def test_rotary_frequencies_that_a_cast_rounded_are_not_called_uninitialised(tmp_path):
    owner = remote_models.opened(write("dream", tmp_path)).to(torch.bfloat16)
    assert owner.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dlm_fast.patch(owner, backend="reference")


# What is refused


def test_tensors_that_are_not_those_of_the_family_are_named(owner):
    name = LAYER + "q_proj.weight"
    weight = owner.get_parameter(name)
    owner.get_submodule(LAYER + "q_proj").weight = None
    with pytest.raises(
        CheckpointError, match="^patch: the LLaDAModelLM has missing keys: model.transformer.blocks.0.q_proj.weight"
    ):
        patch(owner)
    owner.get_submodule(LAYER + "q_proj").weight = nn.Parameter(torch.zeros(31, 32))
    with pytest.raises(
        CheckpointError,
        match=rf"mismatched keys: {name} in LLaDAModelLM of shape \[31, 32\], expected \[32, 32\]",
    ):
        patch(owner)
    owner.get_submodule(LAYER + "q_proj").weight = weight
    owner.get_submodule(LAYER + "q_proj").lora_A = nn.Parameter(torch.zeros(2, 32))
    with pytest.raises(CheckpointError, match=rf"unexpected keys: {LAYER}q_proj.lora_A in LLaDAModelLM"):
        patch(owner)


@pytest.mark.parametrize("owner", ["fast-dllm-v2"], indirect=True)
def test_two_tensors_that_the_configuration_ties_are_refused(owner):
    owner.lm_head = nn.Module()
    owner.lm_head.weight = nn.Parameter(owner.model.embed_tokens.weight.detach().clone())
    with pytest.raises(CheckpointError, match="ties lm_head.weight to model.embed_tokens.weight, and they are two"):
        patch(owner)
    owner.lm_head.weight = owner.model.embed_tokens.weight
    assert patch(owner).model.lm_head.weight is owner.model.embed_tokens.weight


def test_hooks_of_accelerate_and_replaced_forwards_are_refused_by_name(owner):
    module = owner.get_submodule(LAYER + "q_proj")
    module._hf_hook = object()
    where = f"module '{LAYER}q_proj' of this LLaDAModelLM"
    with pytest.raises(NotImplementedError, match=f"{where} has a hook of accelerate"):
        patch(owner)
    del module._hf_hook
    module.forward = lambda x: x
    with pytest.raises(NotImplementedError, match=f"{where} has a replaced forward"):
        patch(owner)
    del module.forward
    owner.forward = types.MethodType(type(owner).forward, owner)
    with pytest.raises(NotImplementedError, match="this LLaDAModelLM has a replaced forward"):
        patch(owner)


def test_forward_hooks_do_not_run_in_a_decode_and_are_named(owner):
    seen = []
    owner.get_submodule(LAYER + "q_proj").register_forward_hook(lambda *args: seen.append(args))
    with pytest.warns(UserWarning, match=f"forward hooks of module '{LAYER}q_proj' .* do not run in a decode"):
        dlm_fast.patch(owner, backend="reference")
    dlm_fast.generate(owner, [[5, 6]], max_new_tokens=3)
    assert not seen


class Packed(nn.Parameter):
    """A parameter of a quantisation."""


def test_quantised_and_dispatched_owners_are_refused_by_name(owner):
    module = owner.get_submodule(LAYER + "q_proj")
    weight = module.weight
    module.weight = Packed(weight.detach())
    with pytest.raises(NotImplementedError, match=f"must be plain floats, got {LAYER}q_proj.weight as .*load"):
        patch(owner)
    module.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match=f"must be plain floats, got {LAYER}q_proj.weight as .*int8"):
        patch(owner)
    module.weight = nn.Parameter(torch.zeros(32, 32, device="meta"))
    with pytest.raises(NotImplementedError, match=f"must lie on one device, got {LAYER}q_proj.weight on meta"):
        patch(owner)
    module.weight = weight
    owner.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(NotImplementedError, match="must be plain floats, got a quantization_config"):
        patch(owner)


def test_experts_that_do_not_count_their_changes_are_refused(tmp_path):
    checkpoint = write("llada2", tmp_path)
    with torch.inference_mode():
        owner = remote_models.opened(checkpoint)
    with pytest.raises(NotImplementedError, match="got the inference tensor model.layers.1.mlp.experts.0.gate_proj"):
        patch(owner)


def test_wrappers_say_what_to_do(owner):
    compiled = torch.compile(owner, backend="eager")
    with pytest.raises(NotImplementedError, match=r"OptimizedModule; .* patch the model that was compiled"):
        patch(compiled)
    patch(owner)
    with pytest.raises(ValueError, match=r"OptimizedModule is not patched; give the model that was compiled"):
        dlm_fast.generate(compiled, [[5, 6]], max_new_tokens=3)

    class PeftModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.config, self.merge_and_unload = owner, owner.config, lambda: owner

    with pytest.raises(NotImplementedError, match="PeftModel; .* merge the adapter first"):
        patch(PeftModel())


def test_a_field_that_the_native_class_cannot_express_is_refused_by_name(tmp_path):
    owner = remote_models.opened(write("llada", tmp_path))
    owner.config.block_type = "sequential"
    with pytest.raises(NotImplementedError, match="^patch: block_type must be 'llama', got block_type='sequential'"):
        patch(owner)


def test_families_that_do_not_open_say_why_and_unknown_classes_are_refused(owner):
    for model_type, message in (("wedlm", "patch: WeDLM does not open"), ("gpt9", "unsupported model class Other")):
        other = remote_models.named_class("Other", nn.Module)()
        other.config = remote_models.config_class(model_type)()
        with pytest.raises(NotImplementedError, match=message):
            patch(other)


def test_a_tokenizer_may_be_given_with_a_native_model():
    model, tokenizer = native_model(), toy_tokenizer()
    with dlm_fast.patch(model, tokenizer=tokenizer, backend="reference") as handle:
        assert handle.tokenizer is tokenizer and handle.link is None and dlm_fast.explain(model)["twin"] is None
