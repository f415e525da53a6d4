"""Every published family opens by its files alone: same logits as an independent forward, settings with their sources,
adapters, copies, and an error with a name for whatever is wrong.

The checkpoints are tiny and random, in the published layouts (tests/support/published.py); their forwards in float64
are written from the architectures' descriptions (tests/support/family_oracles.py).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import family_oracles
import published
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dlm_fast
from dlm_fast import PRESETS, CheckpointError
from dlm_fast.models import families
from dlm_fast.models.families import FAMILIES
from dlm_fast.presets import resolve
from dlm_kernels import Window

NAMES = sorted(published.FAMILIES)
MOE = ("llada2", "llada-moe", "sdar-moe", "rnd1")
# What only the name of a checkpoint tells.
NAMED = {"a2d-qwen3": "Qwen3-mdlm", "a2d-qwen2": "Qwen2-mdlm", "a2d-llama": "Llama-mdlm"}
IDS = [5, 40, 99, 7, 108, 108, 23, 61, 108, 2, 77, 108, 108, 90, 14, 108, 33, 108, 8, 104, 55, 108, 12, 3]
GIVEN = [40, 99, 7, 23]  # a prompt without any family's mask
PROMPT = 6  # real tokens before the first block, where blocks begin behind the prompt


def write(family: str, folder: Path, **changes) -> published.Published:
    return published.write(family, folder / NAMED.get(family, family), **changes)


def load(path, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is unproven")
        return dlm_fast.load(path, backend="reference", device="cpu", **kwargs)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest logit."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def sequence(model) -> list[int]:
    """Some ids whose first mask is behind the prompt, where a causal prefix ends."""
    return [*IDS[:PROMPT], dlm_fast.handle_of(model).diffusion.mask_token_id, *IDS[PROMPT + 1 :]]


def plain(model) -> Tensor:
    """The logits [L, V] of a plain forward."""
    lengths, ids = {}, sequence(model)
    if dlm_fast.handle_of(model).plain_mode == "block":
        lengths = {"prompt_lengths": torch.tensor([PROMPT])}
    with torch.no_grad():
        return model(torch.tensor([ids]), **lengths).logits[0]


def whole(block: Tensor, start: int = 0) -> Window:
    """The window of all positions from `start` on, each in its block, over the keys before it."""
    position = torch.arange(start, start + len(block), dtype=torch.int32)[None]
    return Window(
        q_pos=position,
        q_block=block[None].int().contiguous(),
        q_len=torch.tensor([len(block)], dtype=torch.int32),
        kv_slot=position,
        kv_len=torch.tensor([start], dtype=torch.int32),
        replaced=torch.zeros(1, 2, dtype=torch.int32),
        cache_row=torch.zeros(1, dtype=torch.int32),
        mode="block",
    )


def cached(model, block: Tensor) -> Tensor:
    """The logits [L, V] of one forward a block, over the keys of all blocks before it."""
    handle, ids, rows = dlm_fast.handle_of(model), sequence(model), []
    L = len(ids)
    cache = handle.adapter.new_cache(model, 1, L)
    starts = [0, *(block.diff().nonzero().flatten() + 1).tolist(), L]
    for start, end in zip(starts, starts[1:]):
        with torch.no_grad():
            hidden = handle.window_hidden(torch.tensor([ids[start:end]]), whole(block[start:end], start), cache)
            rows.append(handle.adapter.head(model, hidden[0]))
    return torch.cat(rows)


@pytest.fixture(params=NAMES)
def checkpoint(request, tmp_path):
    return write(request.param, tmp_path)


# The forward


def test_the_logits_are_those_of_an_independent_forward(checkpoint):
    model = load(checkpoint.folder)
    block = family_oracles.blocks(checkpoint, len(IDS), PROMPT)
    expected = family_oracles.logits(checkpoint, sequence(model), block)
    assert relative(plain(model), expected) < 1e-5
    # The same check fails for the model as transformers would run it, which is causal.
    ids = sequence(model)
    dlm_fast.handle_of(model).unpatch()
    with torch.no_grad():
        assert relative(model(torch.tensor([ids])).logits[0], expected) > 0.1


@pytest.mark.parametrize("family", [name for name in NAMES if published.FAMILIES[name].visibility == "block"])
def test_the_logits_over_a_cache_are_those_of_an_independent_forward(tmp_path, family):
    checkpoint = write(family, tmp_path)
    block = family_oracles.blocks(checkpoint, len(IDS), PROMPT)
    model = load(checkpoint.folder)
    assert relative(cached(model, block), family_oracles.logits(checkpoint, sequence(model), block)) < 1e-5


@pytest.mark.parametrize("family", MOE)
def test_the_experts_are_those_of_an_independent_forward(tmp_path, family):
    checkpoint = write(family, tmp_path)
    model = load(checkpoint.folder, dtype=torch.float64)
    model.set_experts_implementation("eager")  # the grouped product of torch has no float64
    chosen = {}

    def keep(layer):
        return lambda module, args, output: chosen.update({layer: output[-1]})

    for index, layer in enumerate(model.model.layers):
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None:
            gate.register_forward_hook(keep(index))
    block = family_oracles.blocks(checkpoint, len(IDS), PROMPT)
    assert relative(plain(model), family_oracles.logits(checkpoint, sequence(model), block)) < 1e-6
    routes = family_oracles.routes(checkpoint, sequence(model), block)
    assert chosen.keys() == routes.keys() and chosen
    for layer, choice in routes.items():
        clear = choice.margin > 1e-5
        assert clear.float().mean() > 0.9
        found = chosen[layer].sort(-1).values.view(len(IDS), -1)
        assert torch.equal(found[clear], choice.experts.sort(-1).values[clear])


@pytest.mark.parametrize("family", [name for name in NAMES if name not in MOE])
def test_bfloat16_is_as_near_to_float64_as_transformers_own_attention(tmp_path, family):
    """Each is compared with float64, never with the other. (In bfloat16 a flipped route of experts changes all.)"""
    checkpoint = write(family, tmp_path, dtype=torch.bfloat16)
    model = load(checkpoint.folder)
    assert model.dtype == torch.bfloat16
    block = family_oracles.blocks(checkpoint, len(IDS), PROMPT)
    expected = family_oracles.logits(checkpoint, sequence(model), block)
    ours = relative(plain(model), expected)
    ids = sequence(model)
    dlm_fast.handle_of(model).unpatch()
    seen = torch.zeros(len(IDS)) if block is None else block
    mask = (seen[None, :] <= seen[:, None])[None, None]
    with torch.no_grad():
        theirs = relative(model(torch.tensor([ids]), attention_mask=mask).logits[0], expected)
    assert 0 < ours <= 2 * theirs < 0.5


# The settings


def test_every_setting_is_found_and_says_where(checkpoint):
    model = load(checkpoint.folder)
    handle, facts = dlm_fast.handle_of(model), dlm_fast.explain(model)
    diffusion = handle.diffusion
    assert diffusion.mask_token_id == checkpoint.mask_id
    ends = {*checkpoint.eos_ids, *([] if checkpoint.turn_end_id is None else [checkpoint.turn_end_id])}
    assert set(diffusion.eos_token_ids) == ends
    assert diffusion.visibility == checkpoint.visibility and diffusion.logits_row == checkpoint.logits_row
    assert diffusion.block_length == checkpoint.block_length and diffusion.block_alignment == checkpoint.alignment
    assert diffusion.causal_prefix == checkpoint.causal_prefix
    assert handle.tokenizer.mask_token_id == checkpoint.mask_id
    assert handle.tokenizer.decode([checkpoint.mask_id]) == published.FAMILIES[checkpoint.family].mask
    template = handle.tokenizer.chat_template
    assert checkpoint.turn_end_id is None or template is not None
    if template is not None:  # of tokenizer_config.json, or of chat_template.jinja beside it
        chat = [{"role": "user", "content": "a"}]
        assert len(dlm_fast.generate(model, [chat], max_new_tokens=2).text) == 1
    assert facts["family"] == handle.family and facts["settings"]["mask_token_id"]["value"] == checkpoint.mask_id
    assert all(setting["source"] for setting in facts["settings"].values())
    assert {"mask_token_id", "eos_token_ids", "visibility", "block_length", "decoder"} <= facts["settings"].keys()


def test_a_model_decodes_by_its_familys_published_decoder(checkpoint):
    model = load(checkpoint.folder)
    decoder = dlm_fast.handle_of(model).settings.decoder
    out = dlm_fast.generate(model, [GIVEN], max_new_tokens=8)
    named = dlm_fast.generate(
        model, [GIVEN], max_new_tokens=8, preset=decoder.preset, temperature=decoder.temperature,
        top_p=decoder.top_p, **decoder.options,
    )  # fmt: skip
    assert out.preset.name == decoder.preset
    assert torch.equal(out.canvas[0], named.canvas[0]) and checkpoint.mask_id not in out.canvas[0]


@pytest.mark.parametrize("family", [*FAMILIES, *families.NATIVE], ids=lambda family: family.name)
def test_a_row_of_the_table_is_whole(family):
    decoders = [decoder for decoder in (family.decoder, *(other for _, other in family.decoders)) if decoder]
    for decoder in decoders:
        visibility = PRESETS[decoder.preset].visibility
        assert resolve(decoder.preset, visibility, dict(decoder.options)).name == decoder.preset
        known = [facts["visibility"] for _, facts in family.named if "visibility" in facts]
        assert visibility in [family.facts.get("visibility"), *known]
    assert family in families.NATIVE or (decoders and (family.proof or family.unproven))
    assert family.native in dlm_fast.models.native.CLASSES


def test_every_fixture_is_of_its_own_row_and_every_row_has_one(tmp_path):
    found = {name: families.family_of(write(name, tmp_path).config).name for name in NAMES}
    rows = {family.name for family in FAMILIES}
    assert set(found.values()) == rows - {"NBDiff"}, "NBDiff's layout is not known, and the row says so"
    assert len(set(found.values())) == len(NAMES) - 1, "only nemotron has two layouts"


@pytest.mark.parametrize(
    "place, source",
    [
        ("argument", "argument diffusion"),
        ("section", "config.json, section dlm"),
        ("config", "config.json, mask_token_id"),
        ("generation", "generation_config.json, mask_token_id"),
        ("tokenizer", "tokenizer, mask_token"),
        ("family", "tokenizer, the token '<|MASK|>' of family SDAR"),
    ],
)
def test_the_places_are_asked_in_order(tmp_path, place, source):
    """Every place before `place` says null or nothing; every place from there on says something."""
    order = ["argument", "section", "config", "generation", "tokenizer", "family"]
    later = order[order.index(place) :]
    checkpoint = write("sdar", tmp_path, mask_token_id=None)
    mask = checkpoint.mask_id
    values = {"mask_token_id": mask if "config" in later else None}
    if "section" in later:
        values["dlm"] = {"mask_token_id": mask}
    edit(checkpoint.folder / "config.json", **values)
    edit(checkpoint.folder / "generation_config.json", mask_token_id=mask if "generation" in later else None)
    token = "<|MASK|>" if "tokenizer" in later else None
    edit(checkpoint.folder / "tokenizer_config.json", mask_token=token)
    given = {"diffusion": {"mask_token_id": mask}} if place == "argument" else {}
    model = load(checkpoint.folder, **given)
    assert dlm_fast.explain(model)["settings"]["mask_token_id"] == {"value": mask, "source": source}


def edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, **changes}))


def test_a_block_length_comes_from_the_config_the_name_or_the_family(tmp_path):
    def length(name: str, **changes) -> tuple[int, str]:
        folder = published.write("sdar", tmp_path / name, **changes).folder
        setting = dlm_fast.explain(load(folder))["settings"]["block_length"]
        return setting["value"], setting["source"]

    assert length("SDAR-4B-Chat-b16", block_size=8) == (8, "config.json, block_size")
    assert length("SDAR-8B-Chat-b16", block_size=None) == (16, "the name 'SDAR-8B-Chat-b16'")
    value, source = length("SDAR-4B-Chat", block_size=published.ABSENT)
    assert value == 4 and "no file and no name says otherwise" in source


def test_what_only_a_name_tells_is_asked_for_where_the_name_is_silent(tmp_path):
    checkpoint = published.write("a2d-qwen3", tmp_path / "my-model")
    with pytest.raises(CheckpointError, match="nothing says how 'my-model' sees .* say diffusion={'visibility': ...}"):
        load(checkpoint.folder)
    given = {"visibility": "block", "block_length": 8, "block_alignment": "abs"}
    diffusion = dlm_fast.handle_of(load(checkpoint.folder, diffusion=given)).diffusion
    assert (diffusion.visibility, diffusion.block_length, diffusion.mask_token_id) == ("block", 8, checkpoint.mask_id)


NAMED_DECODERS = {
    "LLaDA2.0-mini": ("llada2", "llada2"),
    "LLaDA2.1-mini": ("llada2", "llada2.1"),
    "TraDo-4B-Instruct": ("sdar", "trado"),
    "d3LLM_LLaDA": ("llada", "d3llm"),
    "dParallel-LLaDA-instruct": ("llada", "dparallel"),
    "d3LLM_Dream_Coder": ("dream", "d3llm"),
    "dParallel_Dream_7B_Instruct": ("dream", "dparallel"),
}


@pytest.mark.parametrize("name", NAMED_DECODERS)
def test_a_checkpoint_of_which_only_the_name_tells_the_decoder(tmp_path, name):
    family, preset = NAMED_DECODERS[name]
    model = load(published.write(family, tmp_path / name).folder)
    assert dlm_fast.handle_of(model).settings.decoder.preset == preset
    out = dlm_fast.generate(model, [GIVEN], max_new_tokens=8)
    assert out.preset.name == preset and len(out.sequences[0]) <= 8


def test_llada2_2_decodes_with_the_ids_that_its_code_names(tmp_path):
    model = load(published.write("llada2", tmp_path / "LLaDA2.2-flash").folder)
    assert dlm_fast.handle_of(model).settings.decoder.preset == "llada2.2"
    with pytest.raises(ValueError, match="delete_id must be below the model.s vocab_size=128, got delete_id=156930"):
        dlm_fast.generate(model, [GIVEN], max_new_tokens=8)
    out = dlm_fast.generate(model, [GIVEN], max_new_tokens=8, delete_id=60, split_id=61)
    assert out.preset.name == "llada2.2"


# Copies


def test_a_saved_model_opens_again_here_and_in_transformers(checkpoint, tmp_path):
    model = load(checkpoint.folder)
    model.save_pretrained(tmp_path / "saved")
    dlm_fast.handle_of(model).tokenizer.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(plain(again), plain(model))
    before, after = dlm_fast.handle_of(model), dlm_fast.handle_of(again)
    assert after.diffusion == before.diffusion and after.settings.decoder == before.settings.decoder
    assert after.tokenizer.mask_token_id == before.tokenizer.mask_token_id
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", local_files_only=True).eval()
    assert type(theirs) is type(model)
    before.unpatch()
    with torch.no_grad():
        assert torch.equal(theirs(torch.tensor([IDS])).logits, model(torch.tensor([IDS])).logits)


# Adapters

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="an adapter is merged by peft")


@needs_peft
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("family", ["llada", "dream", "llada2", "sdar"])
def test_an_adapter_of_published_names_is_the_merged_model(tmp_path, family, merge):
    checkpoint = write(family, tmp_path)
    adapter = published.write_adapter(checkpoint, tmp_path / "adapter")
    model = load(checkpoint.folder, adapter=adapter.folder, merge_adapter=merge)
    block = family_oracles.blocks(checkpoint, len(IDS), PROMPT)
    expected = family_oracles.logits(adapter.merged, sequence(model), block)
    assert relative(plain(model), expected) < 1e-5
    assert relative(plain(load(checkpoint.folder)), expected) > 0.05
    assert any("lora" in name for name, _ in model.named_parameters()) != merge
    dlm_fast.generate(model, [GIVEN], max_new_tokens=4)


@needs_peft
@pytest.mark.parametrize("family", ["llada", "llada2"])
def test_peft_itself_merges_the_same_on_the_published_layout(tmp_path, family):
    """What the test above expects of a merged model is what peft makes of the published modules."""
    import peft
    from peft.tuners.lora import LoraLayer

    checkpoint = write(family, tmp_path)
    adapter = published.write_adapter(checkpoint, tmp_path / "adapter")
    tree = torch.nn.Module()
    for name in (name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")):
        *parents, leaf = name.split(".")
        module, weight = tree, checkpoint.tensors[f"{name}.weight"]
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, torch.nn.Module())
            module = module._modules[parent]
        if weight.dim() == 2 and leaf not in module._modules:
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data.copy_(weight)
            module.add_module(leaf, linear)
    fields = ("r", "lora_alpha", "target_modules", "lora_dropout", "bias")
    peft.inject_adapter_in_model(peft.LoraConfig(**{field: adapter.config[field] for field in fields}), tree)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in adapter.tensors.items()}
    assert not peft.set_peft_model_state_dict(tree, tensors).unexpected_keys
    merged = {name: layer for name, layer in tree.named_modules() if isinstance(layer, LoraLayer)}
    assert len(merged) == len(adapter.tensors) / 2
    for name, layer in merged.items():
        layer.merge()
        torch.testing.assert_close(layer.base_layer.weight.data, adapter.merged.tensors[f"{name}.weight"])


def test_a_renamed_or_missing_tensor_of_an_adapter_is_named(tmp_path):
    checkpoint = write("llada", tmp_path)
    folder = published.write_adapter(checkpoint, tmp_path / "adapter").folder
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "attn_out" in name)
    for change, message in (
        ({name.replace("attn_out", "out_attn"): tensors[name]}, "tensors missing or unknown"),
        ({}, "tensors missing or unknown: .*o_proj.lora_A"),
    ):
        others = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file({**others, **change}, path)
        with pytest.raises(CheckpointError, match=message):
            load(checkpoint.folder, adapter=folder)
    module = name.partition(".lora_")[0]
    save_file({other: tensor for other, tensor in tensors.items() if module not in other}, path)
    with pytest.raises(CheckpointError, match="tensors missing or unknown: .*o_proj.lora_A"):
        load(checkpoint.folder, adapter=folder)


@needs_peft
def test_an_adapter_for_another_base_is_named(tmp_path):
    other, checkpoint = write("dream", tmp_path), write("llada", tmp_path)
    folder = published.write_adapter(other, tmp_path / "adapter").folder
    with pytest.raises(CheckpointError, match="of base model '.*dream'. has tensors of another shape"):
        load(checkpoint.folder, adapter=folder)
    published.write("llada", tmp_path / "wider", d_model=48, n_heads=4)
    with pytest.raises(CheckpointError, match="has tensors of another shape .*attn_out.lora_A.weight in adapter_model"):
        load(tmp_path / "wider", adapter=published.write_adapter(checkpoint, tmp_path / "narrow").folder)


@needs_peft
def test_a_d2f_adapter_makes_its_model_block_causal(tmp_path):
    checkpoint = write("llada", tmp_path)
    adapter = published.write_adapter(checkpoint, tmp_path / "D2F_LLaDA_Instruct_8B_Lora")
    model = load(checkpoint.folder, adapter=adapter.folder)
    handle = dlm_fast.handle_of(model)
    assert (handle.diffusion.visibility, handle.diffusion.block_length, handle.diffusion.block_alignment) == (
        "block", 32, "rel",
    )  # fmt: skip
    assert handle.settings.decoder.preset == "d2f"
    assert "the name of the adapter" in dlm_fast.explain(model)["settings"]["visibility"]["source"]
    asked = load(checkpoint.folder, adapter=adapter.folder, diffusion={"visibility": "full", "block_length": 8})
    assert dlm_fast.handle_of(asked).diffusion.visibility == "full"


def test_an_adapter_where_a_model_is_wanted_says_how_to_pass_it(tmp_path):
    checkpoint = write("llada", tmp_path)
    adapter = published.write_adapter(checkpoint, tmp_path / "adapter")
    with pytest.raises(
        CheckpointError, match=r"is an adapter of '.*llada' and no model; .* load\('.*', adapter='.*'\)"
    ):
        load(adapter.folder)


@needs_peft
def test_patterns_of_an_adapter_are_read_by_the_published_names(tmp_path):
    """As peft reads them: the first key that is the end of a module's name counts."""
    for family, patterns, scalings in (
        ("llada2", {"layers.0.attention.query_key_value": 80}, {0: 20.0, 1: 2.0}),
        ("llada", {"model.transformer.blocks.0.q_proj": 80, r"blocks\.\d+\.v_proj": 40}, {0: 20.0, 1: 2.0}),
    ):
        checkpoint = write(family, tmp_path)
        adapter = published.write_adapter(checkpoint, tmp_path / f"{family}-adapter")
        edit(adapter.folder / "adapter_config.json", alpha_pattern=patterns)
        model = load(checkpoint.folder, adapter=adapter.folder, merge_adapter=False)
        for layer, scaling in scalings.items():
            attention = model.model.layers[layer].self_attn
            assert attention.q_proj.scaling["default"] == scaling
            if family == "llada2":
                assert attention.k_proj.scaling["default"] == attention.v_proj.scaling["default"] == scaling
            else:
                assert attention.v_proj.scaling["default"] == 10.0 and attention.k_proj.scaling["default"] == 2.0


@needs_peft
def test_an_adapter_with_a_pattern_of_targets_must_be_whole(tmp_path):
    checkpoint = write("llada", tmp_path)
    folder = published.write_adapter(checkpoint, tmp_path / "adapter").folder
    pattern = r".*\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out)"
    edit(folder / "adapter_config.json", target_modules=pattern)
    expected = plain(load(checkpoint.folder, adapter=folder))
    edit(folder / "adapter_config.json", target_modules=["q_proj", "k_proj", "v_proj", "attn_out"])
    assert torch.equal(plain(load(checkpoint.folder, adapter=folder)), expected)
    tensors = load_file(folder / "adapter_model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if "blocks.1.attn_out" not in name}
    save_file(left, folder / "adapter_model.safetensors")
    edit(folder / "adapter_config.json", target_modules=pattern)
    with pytest.raises(CheckpointError, match=r"missing or unknown: \['.*layers.1.self_attn.o_proj.lora_A.weight'"):
        load(checkpoint.folder, adapter=folder)


@needs_peft
def test_an_adapter_of_a_tied_head_is_kept_and_never_merged(tmp_path):
    checkpoint = write("sdar", tmp_path, tie_word_embeddings=True)
    width, vocabulary = checkpoint.config["hidden_size"], checkpoint.config["vocab_size"]
    folder = published.write_adapter(checkpoint, tmp_path / "adapter").folder
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.randn(4, width)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.randn(vocabulary, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="an adapter of a tied weight cannot be merged, .* changes lm_head"):
        load(checkpoint.folder, adapter=folder)
    assert load(checkpoint.folder, adapter=folder, merge_adapter=False).lm_head.scaling


@needs_peft
def test_a_model_with_an_adapter_beside_its_weights_is_not_saved_as_a_checkpoint(tmp_path):
    checkpoint = write("llada", tmp_path)
    folder = published.write_adapter(checkpoint, tmp_path / "adapter").folder
    model = load(checkpoint.folder, adapter=folder, merge_adapter=False)
    with pytest.raises(NotImplementedError, match="the adapter of this model is kept beside its weights"):
        model.save_pretrained(tmp_path / "saved")
    load(checkpoint.folder, adapter=folder).save_pretrained(tmp_path / "saved")
    assert torch.equal(plain(load(tmp_path / "saved")), plain(load(checkpoint.folder, adapter=folder)))


# Whatever is wrong has a name


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("sdar", {"mask_token_id": "104"}, "mask_token_id must be an id >= 0, got mask_token_id='104' .config.json"),
        ("nemotron", {"mask_token_id": [1]}, r"mask_token_id must be an id >= 0, got mask_token_id=\[1\] .config.json"),
        ("rnd1", {"mask_token_id": True}, "mask_token_id must be an id >= 0, got mask_token_id=True"),
        ("llada", {"eos_token_id": [[1]]}, "config.json describes no llama model: .*eos_token_id"),
        (
            "llada",
            {"eos_token_id": 5000},
            "eos_token_id must be below the .* vocab_size=.*, got 5000 .config.json",
        ),
        ("llada", {"pad_token_id": 999}, "pad_token_id must be below the model's vocab_size=.*, got 999 .config.json"),
        ("sdar", {"block_size": 0}, "block_length must be .* got block_length=0 .config.json, block_size."),
        ("sdar", {"block_size": "4"}, "got block_length='4' .config.json, block_size."),
        ("sdar", {"dlm": []}, "the section must be an object"),
        ("sdar", {"dlm": {"decoder": {"preset": "sdar", "options": [1]}}}, "decoder.options must be an object"),
        (
            "sdar",
            {"dlm": {"decoder": {"preset": "sdar", "temperature": "hot"}}},
            "decoder.temperature must be a finite number",
        ),
        ("sdar", {"dlm": {"decoder": {"preset": "sdra"}}}, "the decoder of config.json, section dlm, cannot be used"),
        ("sdar", {"dlm": {"decoder": {"preset": "llada"}}}, "section dlm, cannot be used: preset llada decodes models"),
        ("sdar", {"rope_scaling": "yarn"}, "config.json describes no qwen3 model"),
        ("sdar", {"num_attention_heads": 0}, "config.json describes no qwen3 model"),
        ("llada-moe", {"moe_layer_freq": 1}, "config.json describes no qwen3_moe model"),
        ("llada2", {"n_group": None}, "config.json of a LLaDA2 model must have the field n_group"),
    ],
)
def test_a_field_of_a_wrong_kind_is_named_with_its_file(tmp_path, family, changes, message):
    checkpoint = write(family, tmp_path)
    edit(checkpoint.folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load(checkpoint.folder)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "banana"}, "device must be a device that torch can use, got device='banana'"),
        ({"device": 5000}, "device must be a device that torch can use, got device=5000"),
        ({"device_map": "banana"}, "device_map must be a device that torch can use, got device_map='banana'"),
        ({"device_map": 5}, "device_map must be a name, a mapping or None, got device_map=5"),
        ({"device_map": {}}, "device_map must name a device for every module"),
        ({"quantization_config": "int8"}, "quantization_config must be one of transformers, such as .* got .*'int8'"),
        ({"revision": 5}, "revision must be a branch, tag or commit, or None, got revision=5"),
        ({"diffusion": 5}, "diffusion must be a DiffusionConfig, a mapping of its fields or None, got diffusion=5"),
        ({"diffusion": {"mask": 5}}, "diffusion must hold fields of DiffusionConfig .* got .*'mask'"),
    ],
)
def test_an_argument_of_a_wrong_kind_is_named(tmp_path, arguments, message):
    folder = write("sdar", tmp_path).folder
    with pytest.raises((TypeError, ValueError), match=message):
        dlm_fast.load(folder, backend="reference", **arguments)
    for path in (5, None, b"x"):
        with pytest.raises(TypeError, match="path must be a folder or an id of the Hub, got path="):
            load(path)


def test_a_head_that_the_config_ties_and_the_file_does_not_is_refused(tmp_path):
    checkpoint = write("sdar", tmp_path)
    edit(checkpoint.folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="ties the head to the embedding .* and the stored head is another one"):
        load(checkpoint.folder)


def test_quantised_weights_without_scales_are_no_weights(tmp_path):
    checkpoint = write("sdar", tmp_path)
    shard = first_shard(checkpoint)
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({**tensors, name: tensors[name].to(torch.int8)}, shard, metadata={"format": "pt"})
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit(checkpoint.folder / "config.json", quantization_config=section)
    with pytest.raises(CheckpointError, match=f"{name} in .* is stored as I8, and no scale of it is in any file"):
        load(checkpoint.folder)
    edit(checkpoint.folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(
        NotImplementedError, match="'fp8' of config.json may fetch kernels, which are code, from the Hub"
    ):
        load(checkpoint.folder)


@pytest.mark.parametrize("visibility", ["block", "full"])
def test_a_model_that_sees_otherwise_than_its_family_has_no_published_decoder(tmp_path, visibility):
    family = "llada" if visibility == "block" else "sdar"
    checkpoint = write(family, tmp_path)
    given = {"visibility": "block", "block_length": 4} if visibility == "block" else {"visibility": "full"}
    model = load(checkpoint.folder, diffusion={**given, "block_alignment": "rel"})
    setting = dlm_fast.explain(model)["settings"]["decoder"]
    assert setting["value"] is None and "for visibility" in setting["source"]
    chosen = dlm_fast.generate(model, [GIVEN], max_new_tokens=4).preset.name
    assert chosen == ("sdar" if visibility == "block" else "llada")


def test_the_name_of_a_checkpoint_is_found_behind_its_path(tmp_path, hub, monkeypatch):
    """A snapshot of the local cache has the repository's name, and `.` the folder's."""
    checkpoint = published.write("sdar", tmp_path / "SDAR-8B-Chat-b16", block_size=None)
    snapshot = hub("JetLM/SDAR-8B-Chat-b8", checkpoint.folder)
    assert dlm_fast.handle_of(load(snapshot)).diffusion.block_length == 8
    monkeypatch.chdir(checkpoint.folder)
    assert dlm_fast.handle_of(load(".")).diffusion.block_length == 16
    assert dlm_fast.handle_of(load(Path("."))).diffusion.block_length == 16


def test_threads_load_models_of_several_dtypes(tmp_path):
    """transformers sets the default dtype of the process while it builds a model."""
    folders = [write("sdar", tmp_path / str(dtype), dtype=dtype).folder for dtype in (torch.float32, torch.bfloat16)]
    with ThreadPoolExecutor(6) as pool:
        models = list(pool.map(load, folders * 6))
    expected = [torch.float32, torch.bfloat16] * 6
    assert [{tensor.dtype for tensor in model.parameters()} for model in models] == [{dtype} for dtype in expected]
    assert torch.get_default_dtype() == torch.float32
    alone = plain(load(folders[0]))
    assert all(torch.equal(plain(model), alone) for model in models[::2])


def test_no_mask_id_names_every_place(tmp_path):
    checkpoint = write("sdar", tmp_path, mask_token_id=None, tokenizer=False)
    with pytest.raises(CheckpointError) as error:
        load(checkpoint.folder)
    for place in ("argument diffusion", "dlm", "config.json", "generation_config.json", "mask_token", "<|MASK|>"):
        assert place in str(error.value)


def test_a_mask_id_that_is_not_the_tokenizers_or_the_vocabularys_is_named(tmp_path):
    checkpoint = write("llada", tmp_path, mask_token_id=7)
    with pytest.raises(ValueError, match="must be 108, which is '<.mdm_mask.>' in the tokenizer, got mask_token_id=7"):
        load(checkpoint.folder)
    checkpoint = write("llada", tmp_path, mask_token_id=5000)
    with pytest.raises(ValueError, match=r"below the model's vocab_size=\d+, got 5000 .config.json, mask_token_id."):
        load(checkpoint.folder)


def first_shard(checkpoint) -> Path:
    return sorted(checkpoint.folder.glob("*.safetensors"))[0]


def test_tensors_that_do_not_fit_are_named_with_their_file(tmp_path):
    checkpoint = write("llada2", tmp_path)
    shard = first_shard(checkpoint)
    tensors = load_file(shard)
    experts = [name for name in tensors if ".experts." in name]
    fused = next(name for name in tensors if name.endswith("query_key_value.weight"))

    def attempt(changed: dict, message: str) -> None:
        save_file(changed, shard, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load(checkpoint.folder)

    attempt({**tensors, "model.surprise": torch.zeros(2)}, f"unexpected keys: model.surprise in {shard.name}")
    attempt({k: v for k, v in tensors.items() if k != experts[0]}, rf"missing keys: .*{experts[0]}")
    swapped = tensors[experts[0]].T.contiguous()
    attempt({**tensors, experts[0]: swapped}, rf"mismatched keys: {experts[0]} in {shard.name} of shape")
    attempt({**tensors, fused: tensors[fused][:-4].clone()}, rf"mismatched keys: .*{fused} in {shard.name}")
    attempt({**tensors, fused: torch.cat([tensors[fused]] * 2)}, rf"mismatched keys: .*{fused} in {shard.name}")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is not a readable safetensors file"):
        load(checkpoint.folder)


def test_a_folder_of_pickles_is_named(tmp_path):
    checkpoint = write("dream", tmp_path)
    for path in checkpoint.folder.glob("*.safetensors*"):
        path.unlink()
    (checkpoint.folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80")
    with pytest.raises(
        CheckpointError, match="pytorch_model-00001-of-00002.bin, and pickle checkpoints are never opened"
    ):
        load(checkpoint.folder)


@pytest.mark.parametrize(
    "family, field, value",
    [
        ("llada", "block_type", "sequential"),
        ("llada", "alibi", True),
        ("llada", "layer_norm_type", "default"),
        ("llada", "include_bias", True),
        ("llada", "include_qkv_bias", True),
        ("llada", "rope", False),
        ("llada-moe", "qk_layernorm", False),
        ("llada-moe", "partial_rotary_factor", 0.5),
        ("llada2", "score_function", "softmax"),
        ("llada2", "num_experts_per_tok", 1),
        ("llada2", "norm_head", True),
        ("llada2", "use_bias", True),
        ("dream", "use_sliding_window", True),
        ("sdar", "use_sliding_window", True),
        ("nemotron", "sliding_window", 512),
    ],
)
def test_a_field_that_the_native_class_cannot_express_is_refused_by_name(tmp_path, family, field, value):
    checkpoint = write(family, tmp_path)
    edit(checkpoint.folder / "config.json", **{field: value})
    with pytest.raises(
        NotImplementedError, match=rf"load: {field} must be .*, got {field}={value!r} in config.json of"
    ):
        load(checkpoint.folder)


@pytest.mark.parametrize("model_type", ["wedlm", "diffusion_gemma", "mmada"])
def test_a_known_family_that_does_not_open_says_why(tmp_path, model_type):
    checkpoint = write("sdar", tmp_path)
    edit(checkpoint.folder / "config.json", model_type=model_type)
    with pytest.raises(NotImplementedError, match=rf"does not open \(model_type '{model_type}'"):
        load(checkpoint.folder)


def test_a_family_that_is_unproven_says_so(tmp_path):
    checkpoint = write("stable-diffcoder", tmp_path)
    with pytest.warns(UserWarning, match="family Stable-DiffCoder is unproven: the text of its mask token"):
        dlm_fast.load(checkpoint.folder, backend="reference", device="cpu")


def test_rope_scale_refuses_positions_that_are_stretched_already(tmp_path):
    folder = write("nemotron", tmp_path).folder
    with pytest.raises(ValueError, match="rope_scale goes with .* rope_type 'default', got rope_scale=2.*'yarn'"):
        load(folder, rope_scale=2)
    folder = write("llada", tmp_path).folder
    assert load(folder, rope_scale=4).config.rope_parameters["rope_theta"] == 4 * 500000.0


# The Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local cache of the Hub, with nobody behind it."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def lay(identifier: str, folder: Path, revision: str = "0" * 40) -> Path:
        root = tmp_path / "cache" / f"models--{identifier.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(revision)
        shutil.copytree(folder, root / "snapshots" / revision)
        return root / "snapshots" / revision

    return lay


def test_a_cached_repository_opens_offline_by_its_id(tmp_path, hub):
    checkpoint = write("sdar", tmp_path, block_size=None)
    hub("JetLM/SDAR-4B-Chat-b8", checkpoint.folder)
    model = load("JetLM/SDAR-4B-Chat-b8")
    assert dlm_fast.handle_of(model).diffusion.block_length == 8  # by the name of the repository, not of the snapshot
    assert torch.equal(load("JetLM/SDAR-4B-Chat-b8", revision="0" * 40).lm_head.weight, model.lm_head.weight)
    with pytest.raises(
        CheckpointError, match="at revision other' is no folder and not in the local cache, and the Hub cannot be asked"
    ):
        load("JetLM/SDAR-4B-Chat-b8", revision="other")


def test_an_id_that_is_not_cached_is_named_while_offline(tmp_path, hub):
    with pytest.raises(
        CheckpointError, match="path='GSAI-ML/LLaDA-8B-Instruct' is no folder and not in the local cache, and the Hub"
    ):
        load("GSAI-ML/LLaDA-8B-Instruct")
    checkpoint = write("llada", tmp_path)
    snapshot = hub("GSAI-ML/LLaDA-8B-Base", checkpoint.folder)
    sorted(snapshot.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="path='GSAI-ML/LLaDA-8B-Base' is not whole in the local cache"):
        load("GSAI-ML/LLaDA-8B-Base")
    adapter = "SJTU/D2F_LLaDA"
    with pytest.raises(CheckpointError, match="adapter='SJTU/D2F_LLaDA' is no folder and not in the local cache"):
        load(checkpoint.folder, adapter=adapter)


def test_only_weights_configurations_and_tokenizers_are_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    checkpoint = write("llada", tmp_path)
    there = [path.name for path in checkpoint.folder.iterdir()]
    names = [*there, "modeling.py", "weights.bin", "consolidated.safetensors", "onnx/model.json"]
    fetched = set()

    def snapshot(repo_id, *, revision, allow_patterns, ignore_patterns, local_files_only=False):
        assert (repo_id, revision) == ("GSAI-ML/LLaDA-8B-Instruct", "v1")
        if local_files_only:
            raise FileNotFoundError
        allowed = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        fetched.update(allowed)
        return str(checkpoint.folder)

    from huggingface_hub.utils import filter_repo_objects

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo_id, revision=None: names)
    load("GSAI-ML/LLaDA-8B-Instruct", revision="v1")
    assert any(name.endswith(".py") for name in there) and any(name.endswith(".safetensors") for name in there)
    assert sorted(fetched) == sorted(name for name in there if not name.endswith(".py"))
    names[:] = ["config.json", "pytorch_model.bin"]
    with pytest.raises(
        CheckpointError, match="has no .* weights; it has pytorch_model.bin, and pickle .* never opened"
    ):
        load("GSAI-ML/LLaDA-8B-Instruct", revision="v1")


# Quantised weights


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_weights_are_quantised_while_they_are_read(tmp_path, family):
    """The cache takes the dtype of the keys, not of the weights."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    checkpoint = write(family, tmp_path, dtype=torch.bfloat16)
    plain_model = load(checkpoint.folder)
    asked = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = load(checkpoint.folder, quantization_config=asked)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter and "int8" in repr(type(weight)).lower() + repr(weight).lower()
    assert relative(plain(model), plain(plain_model).double()) < 0.1
    assert checkpoint.mask_id not in dlm_fast.generate(model, [GIVEN], max_new_tokens=8).canvas[0]
    adapter = published.write_adapter(checkpoint, tmp_path / "adapter")
    with pytest.raises(ValueError, match="cannot be merged into quantised weights; say merge_adapter=False"):
        load(checkpoint.folder, quantization_config=asked, adapter=adapter.folder)


def test_a_quantised_folder_of_published_names_opens_again(tmp_path):
    """bitsandbytes in 8 bits: scales beside the weights, and a list of modules that stay, all by published names."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    checkpoint = write("llada", tmp_path, dtype=torch.bfloat16)
    model = load(checkpoint.folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert model.model.layers[0].self_attn.k_proj.weight.dtype == torch.int8
    model.save_pretrained(tmp_path / "saved")
    native = load_file(tmp_path / "saved" / "model.safetensors")
    family = next(row for row in FAMILIES if row.name == "LLaDA")
    names = {family.renamed(name): name for name in checkpoint.tensors}
    tensors = {}
    for name, tensor in native.items():
        module, _, kind = name.rpartition(".")
        tensors[names[f"{module}.weight"].removesuffix("weight") + kind] = tensor
    for path in checkpoint.folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, checkpoint.folder / "model.safetensors", metadata={"format": "pt"})
    section = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    section["llm_int8_skip_modules"] = ["model.transformer.ff_out"]
    edit(checkpoint.folder / "config.json", quantization_config=section)
    again = load(checkpoint.folder)
    assert again.config.quantization_config.llm_int8_skip_modules == ["lm_head"]
    assert torch.equal(plain(again), plain(model))
    assert torch.equal(plain(load(tmp_path / "saved")), plain(model))
    assert checkpoint.mask_id not in dlm_fast.generate(again, [GIVEN], max_new_tokens=8).canvas[0]


# Devices


def test_hooks_of_accelerate_are_no_replaced_forwards(tmp_path):
    """What `device_map` puts on a model that is spread over several devices."""
    accelerate = pytest.importorskip("accelerate")
    checkpoint = write("sdar", tmp_path)
    model = load(checkpoint.folder)
    expected = dlm_fast.generate(model, [GIVEN], max_new_tokens=8).canvas[0]
    handle = dlm_fast.handle_of(model)
    handle.unpatch()
    for module in [model, *model.modules()]:
        if not list(module.children()):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu"))
    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer.self_attn, accelerate.hooks.AlignDevicesHook("cpu"))
    with dlm_fast.patch(model, diffusion=handle.diffusion, backend="reference"):
        found = dlm_fast.generate(model, [GIVEN], max_new_tokens=8, preset="sdar-dynamic").canvas[0]
    assert torch.equal(found, expected)
    model.model.layers[0].self_attn._old_forward = lambda *args, **kwargs: None
    with pytest.raises(NotImplementedError, match="with a replaced forward"):
        dlm_fast.patch(model, diffusion=handle.diffusion, backend="reference")


def test_the_cache_of_a_layer_is_where_the_layer_is(tmp_path):
    model = load(write("sdar", tmp_path).folder)
    handle = dlm_fast.handle_of(model)
    model.model.layers[1].to("meta")
    cache = handle.adapter.new_cache(model, 2, 16)
    assert [layer.keys.device.type for layer in cache.layers] == ["cpu", "meta"] + ["cpu"] * (len(cache.layers) - 2)
    window = whole(torch.zeros(4, dtype=torch.int32))
    call = dlm_fast.models.native.AttentionCall(window, cache, handle.ops)
    meta = torch.device("meta")
    assert call.window_on(torch.device("cpu")) is window and call.window_on(meta) is call.window_on(meta)
    assert {tensor.device for tensor in call.window_on(meta).tensors().values()} == {meta}


def test_a_device_map_and_a_device_contradict_each_other(tmp_path):
    folder = write("sdar", tmp_path).folder
    with pytest.raises(ValueError, match="give device or device_map, got device='cpu' and device_map='auto'"):
        dlm_fast.load(folder, device="cpu", device_map="auto")
    pytest.importorskip("accelerate")
    model = dlm_fast.load(folder, device_map={"": "cpu"}, backend="reference")
    assert torch.equal(plain(model), plain(load(folder)))


def test_weights_are_read_one_by_one(tmp_path, monkeypatch):
    """transformers is given names and unread slices; nothing reads a whole file."""
    checkpoint = write("llada2", tmp_path)
    from dlm_fast.models import tensors

    reads = []
    original = tensors.Slice.__getitem__
    monkeypatch.setattr(
        tensors.Slice, "__getitem__", lambda self, index: reads.append(self._part.name) or original(self, index)
    )
    load(checkpoint.folder)
    fused = [name for name in checkpoint.tensors if "query_key_value" in name]
    assert sorted(reads) == sorted([*checkpoint.tensors, *fused, *fused])


def test_the_turned_part_of_a_head_is_found_wherever_it_stands(tmp_path):
    checkpoint = write("llada2", tmp_path)
    expected, path = plain(load(checkpoint.folder)), checkpoint.folder / "config.json"
    theta = checkpoint.config["rope_theta"]
    edit(path, partial_rotary_factor=None)  # rotary_dim says it too
    assert torch.equal(plain(load(checkpoint.folder)), expected)
    edit(path, rotary_dim=None, rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": theta})
    assert torch.equal(plain(load(checkpoint.folder)), expected)
    edit(path, rotary_dim=2)
    with pytest.raises(
        NotImplementedError, match="rotary_dim must be 8, got rotary_dim=2 .* partial_rotary_factor is 0.5"
    ):
        load(checkpoint.folder)
    edit(path, rotary_dim=None, rope_parameters=None)
    with pytest.raises(CheckpointError, match="config.json of a LLaDA2 model must have the field rotary_dim"):
        load(checkpoint.folder)


def test_a_change_of_a_field_changes_the_model(tmp_path):
    """What the fixtures vary, the builders read: heads, experts, tied heads."""
    for family, changes in (
        ("llada", {"n_kv_heads": 2}),
        ("llada", {"n_kv_heads": None, "multi_query_attention": True}),
        ("llada", {"weight_tying": True}),
        ("llada2", {"num_shared_experts": 2}),
        ("llada2", {"routed_scaling_factor": 1.5}),
        ("sdar", {"tie_word_embeddings": True}),
        ("sdar", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 10.0}),
    ):
        checkpoint = published.write(family, tmp_path / f"{family}-{len(str(changes))}", **changes)
        block = family_oracles.blocks(checkpoint, len(IDS), PROMPT)
        model = load(checkpoint.folder)
        expected = family_oracles.logits(checkpoint, sequence(model), block)
        assert relative(plain(model), expected) < 1e-5, (family, changes)
