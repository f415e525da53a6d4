"""See before you load: `dlm-fast inspect` says what `load` would open and `generate` would use, and reads no weight."""

from __future__ import annotations

import json
import shutil
import types
import warnings
from pathlib import Path

import published
import pytest
import torch
from commands import error_of, run
from helpers import save_toy_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dlm_fast
from dlm_fast import CheckpointError, adapters, files, inspect_checkpoint, support
from dlm_fast.inspection import ROW, lines
from dlm_fast.models import tensors
from dlm_fast.models.families import FAMILIES, NATIVE, REFUSED

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(published.FAMILIES)


def write(family: str, folder: Path, **changes) -> published.Published:
    """A fixture whose folder also says what only a name says."""
    return published.write(family, folder / (f"{family}-mdlm" if "a2d" in family else family), **changes)


def load(path, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is unproven")
        return dlm_fast.load(path, backend="reference", device="cpu", **kwargs)


def text_of(path, capsys, *flags) -> tuple[int, str]:
    """Exit status and text of the command, without the breaks of long lines."""
    status, out, _ = run(["inspect", str(path), *flags], capsys)
    return status, " ".join(out.split())


def edit(checkpoint: published.Published, change) -> None:
    """Changes the tensors of the second shard, and the index with them."""
    file = sorted(checkpoint.folder.glob("*.safetensors"))[1]
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})


# What is said is what is loaded


@pytest.mark.parametrize("family", NAMES)
def test_what_is_said_of_a_checkpoint_is_what_is_loaded(tmp_path, family, capsys):
    checkpoint = write(family, tmp_path)
    report, model = inspect_checkpoint(checkpoint.folder), load(checkpoint.folder)
    handle = dlm_fast.handle_of(model)
    # The row, the class and its sizes.
    assert report["refused"] == [] and report["family"]["name"] == handle.family
    assert repr(checkpoint.config["model_type"]) in report["family"]["told_by"]
    sizes = report["model"]
    assert sizes["class"] == type(model).__name__ and sizes["layers"] == len(model.model.layers)
    assert sizes["head_dim"] == model.model.layers[0].self_attn.head_dim
    assert (sizes["hidden"], sizes["vocab"]) == model.model.embed_tokens.weight.shape[::-1]
    assert sizes["parameters"] == sum(p.numel() for p in model.parameters())
    # Every setting, with its source and the token of an id.
    settings = {name: {**row} for name, row in report["settings"].items()}
    texts = {name: row.pop("text") for name, row in settings.items() if "text" in row}
    assert settings == {name: row for name, row in handle.settings.as_dict().items() if name != "decoder"}
    assert all(row["source"] for row in settings.values())
    assert texts["mask_token_id"] == [published.FAMILIES[family].mask]
    assert set(published.FAMILIES[family].eos) <= set(texts["eos_token_ids"])
    # Every tensor has its place, and the memory is that of the model and of its cache.
    found = report["tensors"]
    assert found["stored"] == len(checkpoint.tensors) and found["files"] == 2 and found["checked"]
    weights = sum(p.nbytes for p in model.parameters()) + sum(
        tensor.nbytes for name, tensor in model.state_dict().items() if name in dict(model.named_buffers())
    )
    assert report["memory"]["weights"] == weights
    cache = handle.adapter.new_cache(model, 1, ROW)
    assert report["memory"]["cache"]["bytes"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    # The decoder is the one that `generate` takes.
    out = dlm_fast.generate(model, [[6, 40, 99]], max_new_tokens=3, eos_token_ids=[])
    decoder = report["decoder"]
    assert (decoder["preset"], decoder["cache"], decoder["rule"]) == (
        out.preset.name,
        out.preset.cache,
        out.preset.rule,
    )
    assert report["memory"]["cache"]["stored"] == out.preset.operation.stores
    # The command prints the same.
    status, text = text_of(checkpoint.folder, capsys)
    assert status == 0 and "every one has its place" in text
    said = [handle.family, sizes["class"], decoder["preset"], published.FAMILIES[family].mask]
    assert [word for word in said if word not in text] == []
    status, out, _ = run(["inspect", str(checkpoint.folder), "--json"], capsys)
    assert status == 0 and json.loads(out) == report


@pytest.mark.parametrize("name", files.EMBEDDED)
def test_an_embedded_model_is_told_by_its_section(name, capsys):
    status, text = text_of(name, capsys)
    assert status == 0 and "section dlm" in text and "47 in 1 file, every one has its place" in text


class Headers:
    """A reader of safetensors that has headers only."""

    def __init__(self, *args, **kwargs):
        self._file = safe_open(*args, **kwargs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def keys(self):
        return self._file.keys()

    def get_slice(self, name):
        found = self._file.get_slice(name)
        return types.SimpleNamespace(get_dtype=found.get_dtype, get_shape=found.get_shape)


@pytest.mark.parametrize("family", ["llada", "llada2"])
def test_no_data_of_a_tensor_is_read(tmp_path, monkeypatch, family):
    checkpoint = write(family, tmp_path)
    adapter = published.write_adapter(checkpoint, tmp_path / "adapter")
    expected = inspect_checkpoint(checkpoint.folder, adapter=adapter.folder)
    for module in (files, adapters, tensors):
        monkeypatch.setattr(module, "safe_open", Headers)
    assert inspect_checkpoint(checkpoint.folder, adapter=adapter.folder) == expected
    with pytest.raises((AttributeError, TypeError, CheckpointError)):
        load(checkpoint.folder)  # which reads data, so that the reader without data is the one that was used


def test_a_repository_that_is_not_cached_is_described_by_its_headers(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    checkpoint, fetched = write("sdar", tmp_path, block_size=None), []

    def snapshot(repo_id, *, revision, allow_patterns, ignore_patterns, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError
        fetched.extend(allow_patterns)
        ignored = shutil.ignore_patterns("*.safetensors", "*.py")
        return str(shutil.copytree(checkpoint.folder, tmp_path / "snapshot", ignore=ignored, dirs_exist_ok=True))

    def header(self, repo_id, filename, *, revision):
        data = (checkpoint.folder / filename).read_bytes()
        found = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        rows = {name: types.SimpleNamespace(**row) for name, row in found.items() if name != "__metadata__"}
        return types.SimpleNamespace(tensors=rows)

    names = [path.name for path in checkpoint.folder.iterdir()]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo_id, revision=None: names)
    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", header)
    report = inspect_checkpoint("JetLM/SDAR-4B-Chat-b8", revision="v1")
    assert fetched and not [pattern for pattern in fetched if Path("model-00001-of-00002.safetensors").match(pattern)]
    assert report["checkpoint"] == "JetLM/SDAR-4B-Chat-b8 at revision v1"
    # The name of the repository is that of the checkpoint, wherever its files stand.
    assert report["settings"]["block_length"] == {"value": 8, "source": "the name 'SDAR-4B-Chat-b8'"}
    local = inspect_checkpoint(checkpoint.folder)
    for name in ("family", "model", "tensors", "unread"):
        assert report[name] == local[name]
    assert report["memory"]["weights"] == local["memory"]["weights"]
    # A repository of an adapter is told as `load` tells a folder of one.
    (checkpoint.folder / "config.json").unlink()
    (tmp_path / "snapshot" / "config.json").unlink()
    published.write_adapter(checkpoint, checkpoint.folder)
    assert "is an adapter of" in error_of(["inspect", "JetLM/SDAR-D2F"], capsys)
    (checkpoint.folder / "config.json").write_text("{}")
    # What breaks on its way is one line.
    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", lambda *args, **kwargs: 1 / 0)
    assert "path='JetLM/SDAR-4B-Chat' is no folder and not in the local cache, and the Hub cannot be asked" in error_of(
        ["inspect", "JetLM/SDAR-4B-Chat"], capsys
    )


def test_a_repository_that_is_cached_is_told_by_its_name_and_not_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    checkpoint = write("sdar", tmp_path, block_size=None)

    def snapshot(repo_id, *, revision, allow_patterns, ignore_patterns, local_files_only=False):
        assert local_files_only
        return str(checkpoint.folder)  # which has not the repository's name, like every snapshot in the cache

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    report = inspect_checkpoint("JetLM/SDAR-4B-Chat-b16", revision="v1")
    assert report["settings"]["block_length"] == {"value": 16, "source": "the name 'SDAR-4B-Chat-b16'"}
    with pytest.raises(CheckpointError, match="revision is for repositories of the Hub"):
        inspect_checkpoint(checkpoint.folder, revision="v1")
    with pytest.raises(CheckpointError, match="path must be a checkpoint folder, an id of the Hub"):
        inspect_checkpoint(tmp_path / "nowhere")


# What is wrong is counted and named


def test_tensors_that_are_not_accounted_for_are_counted_and_the_first_are_named(tmp_path, capsys):
    checkpoint = write("llada", tmp_path)

    def damage(found):
        del found["model.transformer.ln_f.weight"]
        found["model.transformer.blocks.1.q_proj.weight"] = torch.zeros(3, 3)
        found.update({f"strange.{i}.weight": torch.zeros(1) for i in range(10)})

    edit(checkpoint, damage)
    report, shard = inspect_checkpoint(checkpoint.folder), "model-00002-of-00002.safetensors"
    found = report["tensors"]
    assert {kind: found[kind]["count"] for kind in ("missing", "unexpected", "misshaped")} == {
        "missing": 1,
        "unexpected": 10,
        "misshaped": 1,
    }
    assert found["missing"]["names"] == ["model.norm.weight in no file"]
    assert found["unexpected"]["names"] == [f"strange.{i}.weight in {shard}" for i in range(8)]
    expected = f"model.transformer.blocks.1.q_proj.weight in {shard} of shape [3, 3], expected [32, 32]"
    assert found["misshaped"]["names"] == [expected]
    assert len(report["refused"]) == 3
    with pytest.raises(CheckpointError, match="has missing keys: model.norm.weight"):
        load(checkpoint.folder)
    status, text = text_of(checkpoint.folder, capsys)
    assert status == 1 and "1 missing, 10 unexpected, 1 misshaped" in text
    assert f"unexpected: strange.7.weight in {shard}" in text and "strange.8.weight" not in text
    assert "refused 1 tensors are missing, the first model.norm.weight" in text
    assert run(["inspect", str(checkpoint.folder), "--json"], capsys)[0] == 1


def test_a_fused_tensor_is_counted_once(tmp_path):
    checkpoint = write("llada2", tmp_path)
    name = "model.layers.0.attention.query_key_value.weight"
    file = next(f for f in checkpoint.folder.glob("*.safetensors") if name in load_file(f))
    found = load_file(file)
    found["model.layers.9.attention.query_key_value.weight"] = found[name].clone()
    save_file(found, file, metadata={"format": "pt"})
    assert inspect_checkpoint(checkpoint.folder)["tensors"]["unexpected"] == {
        "count": 1,
        "names": [f"model.layers.9.attention.query_key_value.weight in {file.name}"],
    }


def test_a_field_of_the_configuration_that_nothing_reads_is_named(tmp_path, capsys):
    checkpoint = write("dream", tmp_path, a_field_of_tomorrow=3)
    assert "a_field_of_tomorrow" in inspect_checkpoint(checkpoint.folder)["unread"]
    assert "a_field_of_tomorrow" in text_of(checkpoint.folder, capsys)[1]
    read = {"mask_token_id", "eos_token_id", "hidden_size", "rope_theta", "architectures", "auto_map"}
    assert read & set(inspect_checkpoint(checkpoint.folder)["unread"]) == set()


def test_weights_of_several_dtypes_need_one_that_is_asked_for(tmp_path, capsys):
    checkpoint = write("dream", tmp_path)
    edit(checkpoint, lambda found: found.update({"model.norm.weight": found["model.norm.weight"].bfloat16()}))
    report = inspect_checkpoint(checkpoint.folder)
    assert report["memory"]["dtype"] is None and "stored in several dtypes" in report["refused"][0]
    assert text_of(checkpoint.folder, capsys)[0] == 1
    status, text = text_of(checkpoint.folder, capsys, "--dtype", "float16")
    model = load(checkpoint.folder, dtype=torch.float16)
    assert status == 0 and "in float16" in text
    asked = inspect_checkpoint(checkpoint.folder, dtype=torch.float16)["memory"]
    assert asked["weights"] == sum(p.nbytes for p in model.parameters())
    assert {name: row["tensors"] for name, row in asked["stored"].items()} == {
        "F32": len(checkpoint.tensors) - 1,
        "BF16": 1,
    }


def test_quantised_weights_are_said_to_be_and_not_checked(tmp_path, capsys):
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    checkpoint = write("dream", tmp_path, quantization_config=section)

    def quantise(found):
        name = next(name for name in found if name.endswith("up_proj.weight"))
        found[name] = torch.zeros(found[name].shape, dtype=torch.int8)
        found[name.replace("weight", "SCB")] = torch.zeros(found[name].shape[0])

    edit(checkpoint, quantise)
    report = inspect_checkpoint(checkpoint.folder)
    assert report["quantisation"] == section and report["refused"] == [] and not report["tensors"]["checked"]
    assert report["memory"]["weights"] == sum(row["bytes"] for row in report["memory"]["stored"].values())
    assert report["memory"]["stored"]["I8"]["bytes"] == 48 * 32
    status, text = text_of(checkpoint.folder, capsys)
    assert status == 0 and "quant_method 'bitsandbytes'" in text and "not checked" in text


def test_a_decoder_that_is_not_here_is_refused(tmp_path, capsys):
    save_toy_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "dlm": {**config["dlm"], "decoder": {"preset": "tomorrow"}}}))
    error = error_of(["inspect", str(tmp_path)], capsys)
    assert "the decoder of config.json, section dlm, cannot be used: preset must be one of" in error


def test_what_load_refuses_is_one_line(tmp_path, capsys):
    checkpoint = write("llada", tmp_path, block_type="sequential")
    assert "block_type must be 'llama', got block_type='sequential'" in error_of(
        ["inspect", str(checkpoint.folder)], capsys
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "unsupported model_type 'gpt2'" in error_of(["inspect", str(tmp_path / "other")], capsys)
    assert "--dtype must be bfloat16, float16 or float32, got 'int8'" in error_of(
        ["inspect", str(checkpoint.folder), "--dtype", "int8"], capsys
    )


def test_a_model_of_ones_own_is_told_by_flags(tmp_path, capsys):
    save_toy_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    mask = config.pop("dlm")["mask_token_id"]
    path.write_text(json.dumps(config))
    assert "config.json has no 'dlm' section" in error_of(["inspect", str(tmp_path)], capsys)
    flags = ["--mask-token-id", str(mask), "--visibility", "block", "--block-length", "4"]
    report = json.loads(run(["inspect", str(tmp_path), *flags, "--block-alignment", "abs", "--json"], capsys)[1])
    values = {name: (row["value"], row["source"]) for name, row in report["settings"].items()}
    assert values["block_length"] == (4, "argument diffusion")
    assert values["visibility"][0] == "block" and values["block_alignment"][0] == "abs"


# Adapters


@pytest.mark.parametrize("family", ["llada", "llada2", "dream"])
def test_the_tensors_of_an_adapter_are_accounted_for(tmp_path, family, capsys):
    checkpoint = write(family, tmp_path)
    adapter = published.write_adapter(checkpoint, tmp_path / "adapter")
    count = len(adapter.tensors)
    report = inspect_checkpoint(checkpoint.folder, adapter=adapter.folder)
    assert (report["adapter"]["stored"], report["adapter"]["placed"], report["refused"]) == (count, count, [])
    status, text = text_of(checkpoint.folder, capsys, "--adapter", str(adapter.folder))
    assert status == 0 and f"rank 4: {count} of {count} tensors have their place" in text


@pytest.mark.parametrize("kind", ["unexpected", "missing", "misshaped"])
def test_a_tensor_of_an_adapter_that_does_not_fit_is_named(tmp_path, kind, capsys):
    checkpoint = write("llada", tmp_path)
    adapter = published.write_adapter(checkpoint, tmp_path / "adapter")
    path, found = adapter.folder / "adapter_model.safetensors", dict(adapter.tensors)
    name = next(name for name in sorted(found) if "lora_B" in name)
    tensor = found.pop(name)
    if kind == "unexpected":
        found[name := name.replace("attn_out", "attn_in")] = tensor
    if kind == "misshaped":
        found[name] = torch.zeros(tensor.shape[0] + 1, tensor.shape[1])
    save_file(found, path, metadata={"format": "pt"})
    row = inspect_checkpoint(checkpoint.folder, adapter=adapter.folder)["adapter"]
    native = "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"
    assert row[kind]["count"] == 1
    assert row[kind]["names"][0].startswith(native if kind == "missing" else f"{name} in adapter_model.safetensors")
    status, text = text_of(checkpoint.folder, capsys, "--adapter", str(adapter.folder))
    assert status == 1 and f"1 tensors of the adapter are {kind}" in text
    pytest.importorskip("peft")
    with pytest.raises(CheckpointError):
        load(checkpoint.folder, adapter=adapter.folder)


def test_an_adapter_beside_the_weights_needs_a_word(tmp_path, capsys):
    checkpoint = write("llada", tmp_path)
    published.write_adapter(checkpoint, checkpoint.folder)
    status, text = text_of(checkpoint.folder, capsys)
    assert status == 1 and "adapter_config.json lies beside the weights" in text
    assert text_of(checkpoint.folder, capsys, "--adapter", "none")[0] == 0
    assert text_of(checkpoint.folder, capsys, "--adapter", str(checkpoint.folder))[0] == 0


def test_an_adapter_may_change_the_decoder(tmp_path):
    checkpoint = write("llada", tmp_path)
    adapter = published.write_adapter(checkpoint, tmp_path / "D2F_LLaDA")
    report = inspect_checkpoint(checkpoint.folder, adapter=adapter.folder)
    assert report["decoder"]["preset"] == "d2f" and report["settings"]["visibility"]["value"] == "block"
    assert report["decoder"]["source"] == "the name of the adapter 'D2F_LLaDA'"


@pytest.mark.parametrize("wrong", [{"dtype": torch.int8}, {"adapter": 7}, {"adapter": ""}])
def test_an_argument_of_a_wrong_kind_is_named(wrong):
    with pytest.raises(TypeError, match=f"inspect: {next(iter(wrong))} must be"):
        inspect_checkpoint("tiny-full", **wrong)


# The support table


def test_every_row_of_the_table_is_shown(capsys):
    status, out, _ = run(["inspect", "--families"], capsys)
    assert status == 0
    for family in (*FAMILIES, *NATIVE):
        assert f"{family.name}: {family.checkpoints}" in out and family.native.__name__ in out
        assert family.proof in out and family.unproven in out
    for name, _, reason in REFUSED:
        assert f"{name}: refused" in out and reason in out
    status, out, _ = run(["inspect", "--families", "--json"], capsys)
    assert status == 0 and json.loads(out) == json.loads(json.dumps(support.support()))


def test_the_page_of_models_is_the_table_of_families(capsys):
    status, out, _ = run(["inspect", "--families", "--markdown"], capsys)
    assert status == 0 and out == (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give a model, or --families for the support table"),
        (["tiny-full", "--families"], "give a model, or --families for the support table"),
        (["tiny-full", "--markdown"], "--markdown goes with --families"),
    ],
)
def test_a_model_or_the_table_is_asked_for(argv, message, capsys):
    assert message in error_of(["inspect", *argv], capsys)


def test_a_table_has_as_many_cells_in_every_row():
    rows = [line for line in support.markdown().splitlines() if line.startswith("|")]
    assert {row.count(" | ") for row in rows} == {6, 2}


def test_sizes_are_said_in_units(tmp_path):
    checkpoint = write("dream", tmp_path)
    report = inspect_checkpoint(checkpoint.folder)
    report["memory"]["logits"]["bytes"] = 5 * 2**30
    text = "\n".join(lines(report))
    assert "5.0 GiB in float32 for a block" in text and "KiB in F32 as stored" in text
