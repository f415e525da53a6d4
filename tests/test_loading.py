"""Opening checkpoints: safetensors only, nothing silently causal, and an error with a name for everything that is wrong."""

from __future__ import annotations

import json

import dlm_fast
import pytest
import torch
from dlm_fast import CheckpointError
from dlm_fast.loading import EMBEDDED, checkpoint_path, load_tokenizer
from helpers import EOS, MASK, random_prompts, save_toy_checkpoint
from safetensors.torch import load_file, save_file


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
    model, (tokens, other) = load(folder), random_prompts([7, 4])
    padded = torch.tensor([tokens, other + [9] * 3])
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        both = model(padded, attention_mask=mask).logits
        alone = model(torch.tensor([other])).logits
        changed = model(torch.tensor([[*tokens[:-1], (tokens[-1] + 1) % 40 + 2]])).logits
    torch.testing.assert_close(both[1, :4], alone[0], atol=2e-5, rtol=1e-4)
    # Never silently causal: the last token reaches the first position.
    assert (changed[0, 0] - both[0, 0]).abs().max() > 1e-3


def test_a_plain_forward_of_a_block_causal_model_sees_to_the_end_of_the_block(tmp_path):
    save_toy_checkpoint(tmp_path, "block")
    model, tokens = load(tmp_path), torch.tensor(random_prompts([12]))

    def reaches(changed_position: int) -> list[int]:
        other = tokens.clone()
        other[0, changed_position] = (tokens[0, changed_position] + 1) % 40 + 2
        with torch.no_grad():
            lengths = torch.tensor([3])
            difference = (model(other, prompt_lengths=lengths).logits - model(tokens, prompt_lengths=lengths).logits).abs().amax(-1)[0]
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
    with pytest.raises(CheckpointError, match=rf"path must be a checkpoint folder or one of {', '.join(EMBEDDED)}, got 'no/such'"):
        load("no/such")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="path must be a checkpoint folder"):
        load(tmp_path / "file")
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
    with pytest.raises(CheckpointError, match=rf"it has {name}, and pickle checkpoints are never opened: convert them to safetensors"):
        load(folder)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "header"])
def test_a_corrupted_safetensors_file_is_named(folder, damage):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-7], "garbage": b"\x07" * 500, "empty": b"", "header": b"\xff" * 8 + data[8:]}[damage])
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
    with pytest.raises(NotImplementedError, match=r"unsupported model_type 'gpt2' in .*toy; supported are llama, qwen2, qwen3"):
        load(folder)


def test_remote_code_is_never_run(folder):
    edit(folder, lambda config: config.update(model_type="my_own", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}))
    (folder / "code.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(NotImplementedError, match="unsupported model_type 'my_own'"):
        load(folder)


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
