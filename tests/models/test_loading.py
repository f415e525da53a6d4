"""Opening checkpoints: only safetensors are read, nothing is silently causal, and everything that is wrong has an error
with a name."""

from __future__ import annotations

import json
import shutil
import sys

import network
import pytest
import torch
from helpers import EOS, MASK, native_model, random_prompts, save_toy_checkpoint
from safetensors.torch import load_file, save_file

import dlm_fast
from dlm_fast import CheckpointError
from dlm_fast.files import EMBEDDED, checkpoint_path
from dlm_fast.loading import load_tokenizer
from dlm_fast.training.networks import stored_dtype


@pytest.fixture
def folder(tmp_path):
    save_toy_checkpoint(tmp_path / "toy")
    return tmp_path / "toy"


def load(path, **kwargs):
    return dlm_fast.load(path, backend="reference", device="cpu", **kwargs)


def edit(path, change) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("visibility", ["full", "block"])
def test_a_saved_model_comes_back_as_a_native_class_with_its_weights(tmp_path, family, visibility):
    saved = save_toy_checkpoint(tmp_path, visibility, family=family)
    model = load(tmp_path)
    assert type(model) is type(saved) and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), saved.state_dict().values()))
    handle = dlm_fast.handle_of(model)
    assert handle.diffusion.mask_token_id == MASK and handle.diffusion.eos_token_ids == (EOS,)
    assert handle.plain_mode == handle.diffusion.visibility == visibility
    out = dlm_fast.generate(model, ["abc", [{"role": "user", "content": "sum"}]], max_new_tokens=5)
    assert len(out.text) == 2 and all(isinstance(text, str) for text in out.text)


def test_a_plain_forward_is_bidirectional_and_honours_the_padding_mask(folder):
    model, (tokens, shorter) = load(folder), random_prompts([7, 4])
    padded = torch.tensor([tokens, shorter + [9] * 3])
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        both = model(padded, attention_mask=mask).logits
        alone = model(torch.tensor([shorter])).logits
        changed = model(torch.tensor([[*tokens[:-1], (tokens[-1] + 1) % 40 + 2]])).logits
    torch.testing.assert_close(both[1, :4], alone[0], atol=2e-5, rtol=1e-4)
    # The model is not causal: the last token reaches the first position.
    assert (changed[0, 0] - both[0, 0]).abs().max() > 1e-3


def test_a_plain_forward_of_a_block_causal_model_sees_to_the_end_of_the_block(tmp_path):
    save_toy_checkpoint(tmp_path, "block")
    model, tokens = load(tmp_path), torch.tensor(random_prompts([12]))

    def reaches(changed_position: int) -> list[int]:
        changed = tokens.clone()
        changed[0, changed_position] = (tokens[0, changed_position] + 1) % 40 + 2
        with torch.no_grad():
            lengths = torch.tensor([3])
            difference = (
                (model(changed, prompt_lengths=lengths).logits - model(tokens, prompt_lengths=lengths).logits)
                .abs()
                .amax(-1)[0]
            )
        return (difference > 1e-4).nonzero().flatten().tolist()

    assert reaches(2) == list(range(12))
    assert reaches(6) == list(range(3, 12))  # the block [3, 7)
    assert reaches(7) == list(range(7, 12))


def test_the_dtype_is_the_stored_one_unless_asked_otherwise(tmp_path):
    save_toy_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert load(tmp_path).lm_head.weight.dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_a_diffusion_configuration_may_be_given_instead(folder):
    edit(folder, lambda config: config.pop("dlm"))
    with pytest.raises(CheckpointError, match=r"config.json has no 'dlm' section .* pass diffusion=DiffusionConfig"):
        load(folder)
    diffusion = dlm_fast.DiffusionConfig(mask_token_id=MASK, eos_token_ids=(), visibility="full")
    assert dlm_fast.handle_of(load(folder, diffusion=diffusion)).diffusion is diffusion


def test_a_folder_without_a_tokenizer_decodes_ids(tmp_path):
    save_toy_checkpoint(tmp_path, tokenizer=False)
    model = load(tmp_path)
    assert load_tokenizer(tmp_path) is None
    assert dlm_fast.generate(model, [[5, 6]], max_new_tokens=2).text is None
    with pytest.raises(ValueError, match="prompts of text need a tokenizer"):
        dlm_fast.generate(model, ["abc"])


def test_a_path_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(
        CheckpointError,
        match=rf"path must be a checkpoint folder, an id of the Hub .owner/name. or one of {', '.join(EMBEDDED)}, got",
    ):
        load("no-such")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="path must be a checkpoint folder"):
        load(tmp_path / "file")
    with pytest.raises(CheckpointError, match="revision is for repositories of the Hub, got 'main' with"):
        load(tmp_path, revision="main")
    assert checkpoint_path(tmp_path) == tmp_path


def test_a_folder_without_a_config_or_with_a_broken_one_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is not readable JSON"):
        load(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="config.json is not readable JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config.json"):
        load(folder)


@pytest.mark.parametrize("content", ["[]", '"text"', "3"])
def test_a_config_that_is_not_an_object_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json"):
        load(folder)


def test_a_folder_without_safetensors_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"toy has no \*.safetensors weights$"):
        load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_pickle_checkpoint_is_never_opened(folder, name):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('the pickle was opened')",))

    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / name)
    with pytest.raises(
        CheckpointError, match=rf"it has {name}, and pickle checkpoints are never opened: convert them to safetensors"
    ):
        load(folder)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "header"])
def test_a_corrupted_safetensors_file_is_named(folder, damage):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(
        {"truncated": data[:-7], "garbage": b"\x07" * 500, "empty": b"", "header": b"\xff" * 8 + data[8:]}[damage]
    )
    with pytest.raises(CheckpointError, match="model.safetensors is not a readable safetensors file"):
        load(folder)


def test_a_broken_or_dangling_index_is_named(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="index.json is not a safetensors index"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="model-00002.safetensors is not a readable safetensors file"):
        load(folder)


@pytest.mark.parametrize("kind", ["missing keys", "unexpected keys", "mismatched keys"])
def test_weights_that_do_not_fit_the_config_are_named_not_drawn_at_random(folder, kind):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if kind == "missing keys":
        del weights[name]
    elif kind == "unexpected keys":
        weights[name := "model.layers.0.self_attn.surprise.weight"] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(3, 3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"has {kind}: .*{name}"):
        load(folder)


def test_an_unsupported_architecture_is_named(folder):
    edit(folder, lambda config: config.update(model_type="gpt2"))
    with pytest.raises(
        NotImplementedError,
        match="unsupported model_type 'gpt2' with architectures LlamaForCausalLM; supported are LLaDA, .*Dream, SDAR",
    ):
        load(folder)
    edit(folder, lambda config: config.update(model_type="llada2"))
    with pytest.raises(NotImplementedError, match="unsupported model_type 'llada2' .*nearest .* LLaDA2 .'llada2_moe'"):
        load(folder)


def test_remote_code_is_never_run(folder):
    edit(
        folder,
        lambda config: config.update(
            model_type="my_own", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        ),
    )
    (folder / "code.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(NotImplementedError, match="unsupported model_type 'my_own'"):
        load(folder)


CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').write_text('')\nraise SystemExit('remote code ran')\n"


@pytest.fixture
def no_network():
    """Whatever asks the network fails the test, also where somebody catches the error."""
    with network.refused() as asked:
        yield
    assert asked == []


def test_code_beside_the_weights_of_a_known_model_is_never_imported(folder, no_network):
    for name in ("code", "configuration", "modeling", "tokenization"):
        (folder / f"{name}.py").write_text(CODE)
    edit(
        folder,
        lambda config: config.update(
            auto_map={"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
        ),
    )
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(
        json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["tokenization.Slow", "tokenization.Fast"]}})
    )
    model = load(folder)
    assert type(model).__module__.startswith("transformers.models.") and type(model.config).__module__.startswith(
        "transformers.models."
    )
    assert dlm_fast.generate(model, ["abc"], max_new_tokens=2).text is not None
    # A tokenizer that is of no use without its code.
    path.write_text(
        json.dumps({**tokenizer, "tokenizer_class": "Slow", "auto_map": {"AutoTokenizer": ["tokenization.Slow", None]}})
    )
    with pytest.raises(CheckpointError, match="the tokenizer of .*toy cannot be read"):
        load(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_that_the_config_names_is_never_fetched(folder, no_network, key):
    edit(folder, lambda config: config.update({key: "kernels-community/flash-attn3"}))
    model = load(folder)
    dlm_fast.handle_of(model).unpatch()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "sub/outside.safetensors"])
def test_an_index_reaches_no_file_outside_its_folder(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    if name.startswith("/"):
        name = str(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match="is not a safetensors index: .*must name files of this folder"):
        load(folder)


def test_shards_are_one_model_and_two_sets_of_weights_are_refused(folder):
    whole = load(folder)
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, of_shard in shards.items():
        save_file({name: weights[name] for name in of_shard}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, of_shard in shards.items() for name in of_shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match="has both model.safetensors and a model.safetensors.index.json of other files; keep one"
    ):
        load(folder)
    (folder / "model.safetensors").unlink()
    sharded = load(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(sharded.state_dict().values(), whole.state_dict().values(), strict=True)
    )
    save_file(weights, folder / "model-2.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="model-2.safetensors holds tensors that another file of .*toy holds too"):
        load(folder)


KINDS = {
    torch.int8: "I8",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.complex64: "C64",
}


@pytest.mark.parametrize("asked", [None, torch.float32])
@pytest.mark.parametrize("dtype", KINDS)
def test_weights_that_are_no_floats_are_named_not_cast(folder, dtype, asked):
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(path)
    weights[name] = weights[name].to(dtype)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=rf"must be stored as F64, F32, F16, BF16, got {name} {KINDS[dtype]} \(1 of {len(weights)}\)",
    ):
        load(folder, dtype=asked)


@pytest.mark.parametrize("section", [{"quant_method": "bogus"}, {}, "int8"])
def test_a_quantisation_that_nobody_knows_is_named(folder, section):
    edit(folder, lambda config: config.update(quantization_config=section))
    with pytest.raises(
        CheckpointError, match="quantization_config must name a quant_method of transformers, got quantization_config="
    ):
        load(folder)


def test_a_quantisation_of_nothing_is_named(folder):
    edit(folder, lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(CheckpointError, match="says that the weights are quantised, and no tensor is: all .* as F32"):
        load(folder)


def test_weights_of_several_floats_need_to_be_told_which(folder):
    path, name = folder / "model.safetensors", "model.norm.weight"
    weights = load_file(path)
    weights = {key: tensor if key == name else tensor.bfloat16() for key, tensor in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"stored in several dtypes \(lm_head.weight BF16, {name} F32\); say which with dtype="
    ):
        load(folder)
    assert load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    # Frequencies that old checkpoints store are no weights.
    weights = {key: tensor.bfloat16() for key, tensor in weights.items()} | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)
    }
    save_file(weights, path, metadata={"format": "pt"})
    assert load(folder).dtype == torch.bfloat16 == stored_dtype(str(folder))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_opened_as_stored_whatever_the_config_says(tmp_path, stored):
    saved = save_toy_checkpoint(tmp_path, dtype=stored)
    edit(tmp_path, lambda config: config.update(dtype="bfloat16" if stored == torch.float32 else "float32"))
    model = load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {stored}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), saved.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_no_model_computes_in_is_named(folder, dtype):
    with pytest.raises(TypeError, match=r"dtype must be None \(as stored\) or one of torch.float64, .* got dtype="):
        load(folder, dtype=dtype)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_a_model_and_its_answer_do_not_depend_on_the_default_dtype(folder, default):
    expected = dlm_fast.generate(load(folder), ["abc"], max_new_tokens=4)
    torch.set_default_dtype(default)
    try:
        model = load(folder)
        found = dlm_fast.generate(model, ["abc"], max_new_tokens=4)
        head = dlm_fast.load_head("tiny-commit", device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in [*model.parameters(), *model.buffers(), *head.parameters()]} == {torch.float32}
    assert found.text == expected.text and torch.equal(found.confidence[0], expected.confidence[0])


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 0}, {"hidden_size": "many"}, {"rope_parameters": {"rope_type": "none such"}}]
)
def test_a_config_that_describes_no_model_is_named(folder, change):
    edit(folder, lambda config: config.update(change))
    with pytest.raises(CheckpointError, match="config.json describes no llama model"):
        load(folder)


def test_a_config_that_asks_for_tuples_decodes_all_the_same(folder):
    expected = answer(load(folder))
    edit(folder, lambda config: config.update(return_dict=False))
    assert answer(load(folder)) == expected


# Adapters


@pytest.fixture
def adapter(tmp_path):
    """A LoRA adapter of the toy model that changes its answers."""
    peft = pytest.importorskip("peft", reason="an adapter is made and merged by peft")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    peft.get_peft_model(native_model(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def lay_beside(adapter, folder) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder / name)


def answer(model) -> list[int]:
    return dlm_fast.generate(model, random_prompts([5]), max_new_tokens=8).canvas[0].tolist()


def test_an_adapter_beside_the_weights_is_applied_by_request_only(folder, adapter, no_network):
    plain, merged = answer(load(folder)), answer(load(folder, adapter=adapter))
    assert plain != merged
    lay_beside(adapter, folder)
    with pytest.raises(
        CheckpointError,
        match=r"toy holds an adapter \(adapter_config.json\), which is applied on request only; say adapter='.*toy'",
    ):
        load(folder)
    alone = load(folder, adapter=False)
    assert answer(alone) == plain and not hasattr(alone, "peft_config")
    assert answer(load(folder, adapter=folder)) == merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged_in_float32(folder, adapter, dtype):
    base = load(folder, dtype=torch.float32)
    scaling, lora = 8 / 2, load_file(adapter / "adapter_model.safetensors")
    model = load(folder, adapter=str(adapter), dtype=dtype)
    name = "model.layers.1.mlp.down_proj"
    update = scaling * lora[f"base_model.model.{name}.lora_B.weight"] @ lora[f"base_model.model.{name}.lora_A.weight"]
    expected = (base.get_submodule(name).weight + update).to(dtype)
    torch.testing.assert_close(
        model.get_submodule(name).weight, expected, atol=1e-6, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5
    )
    assert type(model) is type(base) and {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model.model.rotary_emb.inv_freq, base.model.rotary_emb.inv_freq)


def test_an_adapter_that_does_not_fit_is_named(folder, adapter, tmp_path, monkeypatch):
    with pytest.raises(
        CheckpointError,
        match=r"adapter must be a folder with adapter_config.json and adapter_model.safetensors, got 'none' without",
    ):
        load(folder, adapter="none")
    for wrong in (True, 7, ""):
        with pytest.raises(TypeError, match=f"adapter must be a folder, False or None, got adapter={wrong!r}"):
            load(folder, adapter=wrong)
    path = adapter / "adapter_model.safetensors"
    lora = load_file(path)
    damages = [
        (
            lambda t: t.pop(sorted(t)[0]),
            r"tensors missing or unknown: \['base_model.model.model.layers.0.mlp.down_proj.lora_A.weight'\]",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}),
            "tensors missing or unknown: .*lm_head",
        ),
        (lambda t: t.update({sorted(t)[0]: torch.zeros(5, 5)}), "size mismatch"),
        (
            lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]].to(torch.int8)}),
            "must be stored as F64, F32, F16, BF16, got .* I8",
        ),
        (lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]] * torch.nan}), "cannot be merged"),
    ]
    for damage, message in damages:
        tensors = dict(lora)
        damage(tensors)
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message):
            load(folder, adapter=adapter)
    save_file(lora, path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"an adapter needs peft: pip install 'dlm-fast\[train\]'"):
        load(folder, adapter=adapter)


# What the configuration says of the model and the tokenizer


@pytest.mark.parametrize(
    "values, message",
    [
        ({"mask_token_id": 48}, "mask_token_id must be below the model's vocab_size=48, got 48"),
        ({"eos_token_ids": [EOS, 99]}, "eos_token_ids must be below the model's vocab_size=48, got 99"),
        (
            {"mask_token_id": 7},
            r"mask_token_id must be the tokenizer's, 0 \('\[MASK\]'\), "
            r"got mask_token_id=7 of the diffusion configuration",
        ),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_ids_that_are_not_the_models_or_the_tokenizers_are_refused(folder, values, message, given):
    values = {"mask_token_id": MASK, "eos_token_ids": [EOS], "visibility": "full", **values}
    if not given:
        edit(folder, lambda config: config.update(dlm=values))
    with pytest.raises(ValueError, match=message):
        load(folder, **({"diffusion": dlm_fast.DiffusionConfig.from_dict(values)} if given else {}))


def test_a_tokenizer_without_a_mask_of_its_own_takes_the_configurations(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_token": None}))
    assert load_tokenizer(folder).mask_token_id is None
    tokenizer = dlm_fast.handle_of(load(folder)).tokenizer
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("[MASK]", MASK)


def test_a_bad_dlm_section_names_the_rule(folder):
    edit(folder, lambda config: config["dlm"].update(visibility="sideways"))
    with pytest.raises(ValueError, match="visibility must be one of full, block, got visibility='sideways'"):
        load(folder)


def test_a_broken_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{]")
    with pytest.raises(CheckpointError, match="the tokenizer of .*toy cannot be read"):
        load(folder)


def test_loading_leaves_the_random_state_and_the_folder_alone(folder):
    names, state = sorted(p.name for p in folder.iterdir()), torch.random.get_rng_state()
    load(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sorted(p.name for p in folder.iterdir()) == names


def test_rope_scale_stretches_the_rotary_base_and_the_room(folder):
    plain, scaled = load(folder), load(folder, rope_scale=4.0)
    assert scaled.config.rope_parameters["rope_theta"] == 4 * plain.config.rope_parameters["rope_theta"]
    assert scaled.config.max_position_embeddings == 4 * plain.config.max_position_embeddings
    frequencies, slower = plain.model.rotary_emb.inv_freq, scaled.model.rotary_emb.inv_freq
    assert frequencies[0] == slower[0] and (slower[1:] < frequencies[1:]).all()
    tokens = torch.tensor(random_prompts([40]))
    assert not torch.allclose(plain(tokens).logits, scaled(tokens).logits)


@pytest.mark.parametrize("scale", [0.5, float("inf"), float("nan"), "4"])
def test_a_wrong_rope_scale_is_named(folder, scale):
    with pytest.raises(ValueError, match="rope_scale must be a finite number >= 1, got rope_scale="):
        load(folder, rope_scale=scale)
