"""The written checkpoints and the forwards that judge a loader, checked against transformers' classes by hand.

Nothing of the project is used: keys are renamed by the few lines below, and the classes are asked in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import family_oracles
import published
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

transformers = pytest.importorskip("transformers")

FAMILIES = sorted(published.FAMILIES)
IDS = [5, 40, 99, 7, 108, 108, 23, 61, 108, 2, 77, 108, 108, 90, 14, 108, 33, 108, 8, 104, 55, 108, 12, 3]
EVERY_OTHER = list(range(0, 120, 2))


def write(family: str, folder: Path, **changes) -> published.Published:
    return published.write(family, folder / family, **changes)


class Double(TorchFunctionMode):
    """Computes in float64 what a module asks for in float32: norms, rotary tables, routers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            func = Tensor.double

        def widened(value):
            return torch.float64 if value is torch.float32 else value

        return func(*map(widened, args), **{name: widened(value) for name, value in (kwargs or {}).items()})


@contextlib.contextmanager
def double() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Double(), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(default)


def native(checkpoint: published.Published):
    """The class of transformers that the family's model is, with the checkpoint's tensors."""
    name, config, rename = NATIVES[checkpoint.family](checkpoint.config)
    tensors: dict[str, Tensor] = {}
    for key, tensor in checkpoint.tensors.items():
        tensors.update(rename(key, tensor.double()))
    config = getattr(transformers, name + "Config")(**config, attn_implementation="sdpa")
    with double():
        model = getattr(transformers, name + "ForCausalLM")(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    missing, unexpected = model.load_state_dict(_stacked(tensors), strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert set(missing) == tied and not unexpected, (missing, unexpected)
    return model


def _stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as transformers holds them: gates above ups, all experts of a layer in one tensor."""
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+)_proj\.weight", key)
        if match is None:
            found[key] = tensor
        else:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
    for prefix, parts in experts.items():
        numbers = range(1 + max(number for number, _ in parts))
        pairs = [torch.cat([parts[i, "gate"], parts[i, "up"]]) for i in numbers]
        found[prefix + "gate_up_proj"] = torch.stack(pairs)
        found[prefix + "down_proj"] = torch.stack([parts[i, "down"] for i in numbers])
    return found


def renaming(*rules: tuple[str, str]) -> Callable[[str, Tensor], dict[str, Tensor]]:
    def rename(key: str, tensor: Tensor) -> dict[str, Tensor]:
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        return {key: tensor}

    return rename


def shared_fields(config: dict, *further: str) -> dict:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", *further)
    found = {name: config[name] for name in names if name in config}
    if "rope_parameters" not in found:
        found["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    return found


def llada(config: dict):
    fields = {
        "vocab_size": config["embedding_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": config["mlp_hidden_size"] or config["mlp_ratio"] * config["d_model"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config["n_kv_heads"] or 1,
        "attention_bias": config["include_qkv_bias"],
        "rms_norm_eps": config["rms_norm_eps"],
        "tie_word_embeddings": config["weight_tying"],
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
    }
    rename = renaming(
        (r"^model\.transformer\.wte", "model.embed_tokens"),
        (r"^model\.transformer\.ln_f", "model.norm"),
        (r"^model\.transformer\.ff_out", "lm_head"),
        (r"^model\.transformer\.blocks", "model.layers"),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ff_norm\.", ".post_attention_layernorm."),
        (r"\.([qkv]_proj)\.", r".self_attn.\1."),
        (r"\.attn_out\.", ".self_attn.o_proj."),
        (r"\.ff_proj\.", ".mlp.gate_proj."),
        (r"\.up_proj\.", ".mlp.up_proj."),
        (r"\.ff_out\.", ".mlp.down_proj."),
    )
    return "Llama", fields, rename


def llada2(config: dict):
    fields = shared_fields(
        config,
        *("head_dim", "moe_intermediate_size", "num_experts_per_tok", "routed_scaling_factor", "n_group", "topk_group"),
        *("first_k_dense_replace", "norm_topk_prob", "use_qk_norm"),
    )
    fields |= {"n_routed_experts": config["num_experts"], "n_shared_experts": config["num_shared_experts"]}
    fields["rope_parameters"]["partial_rotary_factor"] = config["partial_rotary_factor"]
    names = renaming(
        (r"\.word_embeddings\.", ".embed_tokens."),
        (r"\.attention\.dense\.", ".self_attn.o_proj."),
        (r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
        (r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
        (r"\.expert_bias$", ".e_score_correction_bias"),
    )

    def rename(key: str, tensor: Tensor) -> dict[str, Tensor]:
        if not key.endswith("attention.query_key_value.weight"):
            return names(key, tensor)
        widths = [config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads")]
        prefix = key.removesuffix("attention.query_key_value.weight") + "self_attn."
        parts = tensor.split([*widths, widths[1]])
        return {f"{prefix}{part}_proj.weight": value for part, value in zip("qkv", parts)}

    return "Glm4Moe", fields, rename


def llada_moe(config: dict):
    fields = shared_fields(config, "num_experts", "num_experts_per_tok")
    dense = [layer for layer, sparse in enumerate(config["moe_layer_freq"]) if not sparse]
    fields |= {
        "intermediate_size": config["dense_intermediate_size"],
        "moe_intermediate_size": config["expert_intermediate_size"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "norm_topk_prob": False,
        "mlp_only_layers": dense,
    }
    return "Qwen3Moe", fields, renaming()


def plain(name: str, *further: str, rules: tuple[tuple[str, str], ...] = ()):
    return lambda config: (name, shared_fields(config, *further), renaming(*rules))


MOE_FIELDS = (
    "head_dim",
    "mlp_only_layers",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
)
ENCODER = ((r"^encoder\.", "model."), (r"^diffusion_head\.", "lm_head."))
LANGUAGE_MODEL = ((r"^language_model\.model\.", "model."), (r"^language_model\.lm_head\.", "lm_head."))
NATIVES = {
    "llada": llada,
    "llada2": llada2,
    "llada-moe": llada_moe,
    "llada-llama": plain("Llama"),
    "dream": plain("Qwen2"),
    "sdar": plain("Qwen3", "head_dim"),
    "sdar-moe": plain("Qwen3Moe", *MOE_FIELDS),
    "fast-dllm-v2": plain("Qwen2"),
    "nemotron": plain("Ministral3", "head_dim", "rope_parameters", rules=ENCODER),
    "nemotron-language-model": plain("Ministral3", "head_dim", "rope_parameters", rules=LANGUAGE_MODEL),
    "efficient-dlm": plain("Qwen3", "head_dim", rules=ENCODER),
    "stable-diffcoder": plain("Llama"),
    "a2d-qwen3": plain("Qwen3", "head_dim"),
    "a2d-qwen2": plain("Qwen2"),
    "a2d-llama": plain("Llama"),
    "rnd1": plain("Qwen3Moe", *MOE_FIELDS),
}


def native_logits(model, ids: list[int], block: Tensor | None) -> Tensor:
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool)
    if block is not None:
        seen = block[None, :] <= block[:, None]
    with double():
        return model(input_ids=torch.tensor([ids]), attention_mask=seen[None, None], use_cache=False).logits[0]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_two_shards_with_a_consistent_index(family: str, tmp_path: Path) -> None:
    checkpoint = write(family, tmp_path)
    folder = checkpoint.folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) == 2
    stored: dict[str, Tensor] = {}
    for file in files:
        with safe_open(folder / file, "pt") as shard:
            names = list(shard.keys())
            assert all(index["weight_map"][name] == file for name in names)
            stored.update({name: shard.get_tensor(name) for name in names})
    assert stored.keys() == index["weight_map"].keys() == checkpoint.tensors.keys()
    assert all(torch.equal(stored[name], checkpoint.tensors[name]) for name in stored)
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in stored.values())
    assert json.loads((folder / "config.json").read_text()) == checkpoint.config


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_tensors_are_equal_and_none_is_constant(family: str, tmp_path: Path) -> None:
    tensors = list(write(family, tmp_path).tensors.values())
    assert all(tensor.std() > 0 for tensor in tensors)
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[i + 1 :])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_beside_the_weights_refuses_to_be_imported(family: str, tmp_path: Path) -> None:
    checkpoint = write(family, tmp_path)
    for path in checkpoint.folder.glob("*.py"):
        with pytest.raises(RuntimeError, match="must not be imported"):
            runpy.run_path(str(path))
    named = published._modules(checkpoint.config)
    assert all((checkpoint.folder / f"{module}.py").is_file() for module in named)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_is_the_native_class(family: str, tmp_path: Path) -> None:
    checkpoint = write(family, tmp_path)
    model = native(checkpoint)
    for block in (None, torch.arange(len(IDS)) // 5):
        wanted = family_oracles.logits(checkpoint, IDS, block)
        found = native_logits(model, IDS, block)
        assert found.dtype == wanted.dtype == torch.float64
        assert relative(found, wanted) < 1e-10
        margins = [choice.margin.min() for choice in family_oracles.routes(checkpoint, IDS, block).values()]
        assert all(margin > 1e-6 for margin in margins)
        assert 2 < wanted.std() < 5
        causal = native_logits(model, IDS, torch.arange(len(IDS)))
        assert relative(causal, wanted) > 0.1


VARIANTS = {
    "llada with fewer key heads": ("llada", {"n_kv_heads": 2}),
    "llada with one key head": ("llada", {"n_kv_heads": None, "multi_query_attention": True}),
    "llada with a tied head": ("llada", {"weight_tying": True}),
    "llada by the ratio of the widths": ("llada", {"mlp_hidden_size": None}),
    "llada-moe with a dense layer": ("llada-moe", {"moe_layer_freq": [0, 1]}),
    "llada-moe whose file says normalized": ("llada-moe", {"norm_topk_prob": True}),
    "llada2 without groups": ("llada2", {"n_group": 1, "topk_group": 1}),
    "llada2 with two dense layers": ("llada2", {"first_k_dense_replace": 2}),
    "llada2 with two shared experts": ("llada2", {"num_shared_experts": 2}),
    "sdar-moe without normalized weights": ("sdar-moe", {"norm_topk_prob": False}),
    "sdar-moe with a dense layer": ("sdar-moe", {"mlp_only_layers": [1]}),
    "sdar with a tied head": ("sdar", {"tie_word_embeddings": True}),
    "fast-dllm-v2 7B": ("fast-dllm-v2", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_the_oracle_is_the_native_class(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    checkpoint = write(family, tmp_path, **changes)
    found = native_logits(native(checkpoint), IDS, torch.arange(len(IDS)) // 5)
    assert relative(found, family_oracles.logits(checkpoint, IDS, torch.arange(len(IDS)) // 5)) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_counts(family: str, tmp_path: Path) -> None:
    """A tensor that a loader fills with those of the next tensor of its shape, or leaves out, changes the logits."""
    checkpoint = write(family, tmp_path)
    wanted = family_oracles.logits(checkpoint, EVERY_OTHER)
    names = list(checkpoint.tensors)
    for i, name in enumerate(names):
        tensor = checkpoint.tensors[name]
        alike = [other for other in names[i + 1 :] if checkpoint.tensors[other].shape == tensor.shape]
        changed = {name: checkpoint.tensors[alike[0]], alike[0]: tensor} if alike else {name: torch.zeros_like(tensor)}
        other = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, **changed})
        assert relative(family_oracles.logits(other, EVERY_OTHER), wanted) > 1e-3, (name, alike[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_knows_the_ids_of_the_configuration(family: str, tmp_path: Path) -> None:
    checkpoint = write(family, tmp_path)
    row = published.FAMILIES[family]
    described = json.loads((checkpoint.folder / "tokenizer_config.json").read_text())
    if row.tokenizer.files == "json":
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint.folder)
    else:
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(checkpoint.folder)
    assert (checkpoint.folder / "tokenizer.json").is_file() == (row.tokenizer.files != "bpe")
    assert {text: tokenizer.convert_tokens_to_ids(text) for text in row.tokenizer.special} == row.tokenizer.special
    assert tokenizer("a" + row.mask + "the end\n")["input_ids"].count(checkpoint.mask_id) == 1
    text = "On the shore, 12 (twelve) herons stand.\nThen none."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert max(tokenizer.get_vocab().values()) < min(shape[0] for name, shape in _embeddings(checkpoint))
    assert checkpoint.config.get("mask_token_id", checkpoint.mask_id) == checkpoint.mask_id
    assert described["eos_token"] in row.eos
    if row.tokenizer.template is not None:
        turns = [{"role": "user", "content": "Hello"}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        end = checkpoint.turn_end_id
        assert (end in ids) if end is not None else True
        assert "Hello" in tokenizer.decode(ids)


def _embeddings(checkpoint: published.Published) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in checkpoint.tensors.items() if re.search("embed|wte", name)]


def test_a_field_can_be_left_out_and_shards_and_dtype_chosen(tmp_path: Path) -> None:
    checkpoint = write("sdar", tmp_path, mask_token_id=published.ABSENT, dtype=torch.bfloat16, shards=1)
    assert "mask_token_id" not in checkpoint.config and checkpoint.config["torch_dtype"] == "bfloat16"
    assert not (checkpoint.folder / "model.safetensors.index.json").exists()
    with safe_open(checkpoint.folder / "model.safetensors", "pt") as file:
        for name, tensor in checkpoint.tensors.items():
            stored = file.get_tensor(name)
            assert stored.dtype == torch.bfloat16 and torch.equal(stored.float(), tensor)


def test_one_seed_writes_one_checkpoint(tmp_path: Path) -> None:
    first, again = write("dream", tmp_path / "a", seed=3), write("dream", tmp_path / "b", seed=3)
    other = write("dream", tmp_path / "c", seed=4)
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert not any(torch.equal(first.tensors[name], other.tensors[name]) for name in first.tensors)


@pytest.mark.parametrize(
    "family, start, wanted",
    [
        ("llada", 5, None),
        ("sdar", 5, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),
        ("efficient-dlm", 5, [4, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6]),
        ("nemotron", 5, [0, 1, 2, 3, 4, 5, 5, 5, 5, 6, 6, 6]),
    ],
)
def test_who_sees_whom(family: str, start: int, wanted: list[int] | None, tmp_path: Path) -> None:
    checkpoint = write(family, tmp_path)
    if checkpoint.block_length is not None:
        checkpoint = dataclasses.replace(checkpoint, block_length=4)
    found = family_oracles.blocks(checkpoint, 12, start)
    assert (found if found is None else found.tolist()) == wanted


@pytest.mark.parametrize("family", ["llada", "dream", "llada2", "nemotron"])
def test_an_adapter_has_published_names_and_changes_what_it_names(family: str, tmp_path: Path) -> None:
    checkpoint = write(family, tmp_path)
    adapter = published.write_adapter(checkpoint, tmp_path / "adapter", seed=1)
    config = json.loads((adapter.folder / "adapter_config.json").read_text())
    assert config == adapter.config and set(config["target_modules"]) == set(published.FAMILIES[family].adapter_targets)
    with safe_open(adapter.folder / "adapter_model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    touched = set()
    for name, tensor in stored.items():
        assert tensor.abs().min() > 0
        module = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name)[1]
        touched.add(module + ".weight")
    changed = {
        name for name, tensor in checkpoint.tensors.items() if not torch.equal(tensor, adapter.merged.tensors[name])
    }
    assert changed == touched and len(stored) == 2 * len(changed)
    wanted = family_oracles.logits(checkpoint, IDS)
    assert relative(family_oracles.logits(adapter.merged, IDS), wanted) > 0.05


def test_a_merged_adapter_is_that_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    checkpoint = write("dream", tmp_path)
    adapter = published.write_adapter(checkpoint, tmp_path / "adapter")
    model = native(checkpoint)
    found = native_logits(peft.PeftModel.from_pretrained(model, adapter.folder).merge_and_unload(), IDS, None)
    assert relative(found, family_oracles.logits(adapter.merged, IDS)) < 1e-6
