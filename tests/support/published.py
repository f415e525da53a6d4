"""Tiny random checkpoints in the layout of the public repositories, one entry for each family.

    write("llada", folder)                          a folder that looks like the public one
    write("sdar", folder, mask_token_id=ABSENT)     without a field of config.json
    write("llada", folder, n_kv_heads=2)            with another value

Norms, biases and expert biases are random too, so that a tensor that is read as another one changes the logits. Beside
the weights lies the code that the configuration names; the code raises when it is imported, because nobody may import
it. Nothing here is imported from the project.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import published_configs as configs
import published_layouts as layouts
import published_llada as llada
import published_tokenizers as tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

# As the value of a field: the field is left out of config.json.
ABSENT = object()

REFUSES = 'raise RuntimeError("the code of a checkpoint must not be imported")\n'


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        config: makes config.json.
        layout: names, shapes and kinds of the tensors of a configuration.
        tokenizer: the tokenizer files.
        mask: text of the mask token.
        eos: texts of the tokens that end a response, by config.json, generation_config.json and the tokenizer.
        turn_end: text of the token that ends a turn in the chat template; None = one of `eos` does, or nothing.
        generation: makes generation_config.json; None = no such file.
        visibility, block_length, alignment, logits_row: as in the description of a diffusion model.
        causal_prefix: whether what comes before the block in work is seen causally.
        adapter_targets: the linear layers of a LoRA adapter, by their published names.
    """

    config: Callable[[], dict[str, Any]]
    layout: Callable[[layouts.Config], layouts.Tensors]
    tokenizer: tokenizers.Tokenizer
    mask: str
    eos: tuple[str, ...]
    turn_end: str | None = None
    generation: Callable[[], dict[str, Any]] | None = None
    visibility: str = "full"
    block_length: int | None = None
    alignment: str = "rel"
    logits_row: str = "self"
    causal_prefix: bool = False
    adapter_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


NEMOTRON: dict[str, Any] = {
    "config": configs.nemotron,
    "tokenizer": tokenizers.NEMOTRON,
    "mask": "<SPECIAL_100>",
    "eos": ("<|im_end|>",),
    "visibility": "block",
    "block_length": 32,
    "causal_prefix": True,
}

FAMILIES = {
    "llada": Family(
        config=llada.llada,
        layout=layouts.llada,
        tokenizer=tokenizers.LLADA,
        mask="<|mdm_mask|>",
        eos=("<|endoftext|>",),
        turn_end="<|eot_id|>",
        adapter_targets=("q_proj", "k_proj", "v_proj", "attn_out"),
    ),
    "llada2": Family(
        config=llada.llada2,
        layout=layouts.llada2,
        tokenizer=tokenizers.LLADA2,
        mask="<|mask|>",
        eos=("<|endoftext|>",),
        turn_end="<|role_end|>",
        visibility="block",
        block_length=32,
        alignment="abs",
        adapter_targets=("query_key_value", "dense"),
    ),
    "dream": Family(
        config=configs.dream,
        layout=partial(layouts.native, qkv_bias=True),
        tokenizer=tokenizers.DREAM,
        mask="<|mask|>",
        eos=("<|endoftext|>",),
        turn_end="<|im_end|>",
        generation=configs.dream_generation,
        logits_row="previous",
    ),
    "sdar": Family(
        config=configs.sdar,
        layout=partial(layouts.native, qk_norm=True),
        tokenizer=tokenizers.SDAR,
        mask="<|MASK|>",
        eos=("<|im_end|>", "<|endoftext|>"),
        generation=configs.sdar_generation,
        visibility="block",
        block_length=4,
        alignment="abs",
    ),
    "sdar-moe": Family(
        config=configs.sdar_moe,
        layout=partial(layouts.native, qk_norm=True, experts="moe_intermediate_size"),
        tokenizer=tokenizers.SDAR,
        mask="<|MASK|>",
        eos=("<|im_end|>", "<|endoftext|>"),
        generation=configs.sdar_generation,
        visibility="block",
        block_length=4,
        alignment="abs",
    ),
    "llada-moe": Family(
        config=llada.llada_moe,
        layout=partial(layouts.native, qk_norm=True, experts="expert_intermediate_size"),
        tokenizer=tokenizers.LLADA2,
        mask="<|mask|>",
        eos=("<|endoftext|>",),
        turn_end="<|role_end|>",
    ),
    "llada-llama": Family(
        config=llada.llada_llama,
        layout=layouts.native,
        tokenizer=tokenizers.LLADA,
        mask="<|mdm_mask|>",
        eos=("<|endoftext|>",),
        turn_end="<|eot_id|>",
    ),
    "fast-dllm-v2": Family(
        config=configs.fast_dllm,
        layout=partial(layouts.native, qkv_bias=True),
        tokenizer=tokenizers.FAST_DLLM,
        mask="|<MASK>|",
        eos=("<|im_end|>",),
        visibility="block",
        block_length=32,
        alignment="abs",
        logits_row="previous",
    ),
    "nemotron": Family(layout=partial(layouts.native, root="encoder", head="diffusion_head"), **NEMOTRON),
    # Assumed: the configuration, where a public one describes a vision tower too.
    "nemotron-language-model": Family(
        layout=partial(layouts.native, root="language_model.model", head="language_model.lm_head"), **NEMOTRON
    ),
    # Assumed: the name of the head.
    "efficient-dlm": Family(
        config=configs.efficient_dlm,
        layout=partial(layouts.native, root="encoder", head="diffusion_head", qk_norm=True),
        tokenizer=tokenizers.EFFICIENT_DLM,
        mask="<|fim_pad|>",
        eos=("<|endoftext|>",),
        turn_end="<|im_end|>",
        visibility="block",
        block_length=32,
    ),
    "stable-diffcoder": Family(
        config=configs.stable_diffcoder,
        layout=layouts.native,
        tokenizer=tokenizers.STABLE_DIFFCODER,
        mask="<[MASK_TOKEN]>",
        eos=("<[end▁of▁sentence]>",),
        visibility="block",
        block_length=4,
        alignment="abs",
    ),
    "a2d-qwen3": Family(
        config=configs.a2d_qwen3,
        layout=partial(layouts.native, qk_norm=True),
        tokenizer=tokenizers.A2D,
        mask="<|mask|>",
        eos=("<|im_end|>",),
    ),
    "a2d-qwen2": Family(
        config=configs.a2d_qwen2,
        layout=partial(layouts.native, qkv_bias=True),
        tokenizer=tokenizers.A2D,
        mask="<|mask|>",
        eos=("<|im_end|>",),
    ),
    "a2d-llama": Family(
        config=configs.a2d_llama,
        layout=layouts.native,
        tokenizer=tokenizers.A2D_LLAMA,
        mask="<|mask|>",
        eos=("<|eot_id|>",),
    ),
    "rnd1": Family(
        config=configs.rnd1,
        layout=partial(layouts.native, qk_norm=True, experts="moe_intermediate_size"),
        tokenizer=tokenizers.RND1,
        mask="<|mask|>",
        eos=("<|im_end|>",),
        logits_row="previous",
    ),
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A checkpoint that was written, and what is true of it.

    Attributes:
        config: config.json as written.
        tensors: published name -> the value that was written, in float32.
        turn_end_id: id of the token that ends a turn in the chat template, where `eos_ids` has not got it.
    """

    family: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    mask_id: int
    eos_ids: tuple[int, ...]
    turn_end_id: int | None
    visibility: str
    block_length: int | None
    alignment: str
    logits_row: str
    causal_prefix: bool


def write(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 2,
    tokenizer: bool = True,
    **config_changes: Any,
) -> Published:
    """Writes a random checkpoint of `family` into `folder`, which is made where there is none.

    Args:
        dtype: what the tensors are stored in.
        tokenizer: whether the tokenizer files are written.
        config_changes: fields of config.json with other values; ABSENT leaves a field out. The tensors follow.
    """
    row = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    asked = {**row.config(), **config_changes}
    config = {name: value for name, value in asked.items() if value is not ABSENT}
    for name in ("dtype", "torch_dtype"):
        if name in config and name not in config_changes:
            config[name] = str(dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(seed)
    tied = bool(config.get("tie_word_embeddings") or config.get("weight_tying"))
    tensors = {
        name: draw(shape, "head" if tied and kind == "embedding" else kind, generator).to(dtype)
        for name, shape, kind in row.layout(config)
    }
    _write_json(folder / "config.json", config)
    if row.generation is not None:
        _write_json(folder / "generation_config.json", row.generation())
    if tokenizer:
        row.tokenizer.write(folder)
    for module in _modules(config, row.tokenizer.settings):
        (folder / f"{module}.py").write_text(REFUSES)
    _write_shards(folder, tensors, shards)
    special = row.tokenizer.special
    return Published(
        family=family,
        folder=folder,
        config=config,
        tensors={name: tensor.float() for name, tensor in tensors.items()},
        mask_id=special[row.mask],
        eos_ids=tuple(special[text] for text in row.eos),
        turn_end_id=None if row.turn_end is None else special[row.turn_end],
        visibility=row.visibility,
        block_length=row.block_length,
        alignment=row.alignment,
        logits_row=row.logits_row,
        causal_prefix=row.causal_prefix,
    )


def draw(shape: Sequence[int], kind: str, generator: torch.Generator) -> Tensor:
    """A random tensor; what follows a norm comes out with a standard deviation of about 3 for logits, 1.5 elsewhere."""
    if kind == "norm":
        return torch.rand(shape, generator=generator) + 0.5
    if kind == "expert bias":
        return 0.4 * torch.rand(shape, generator=generator) - 0.1
    scale = {"embedding": 1.0, "bias": 0.5}.get(kind)
    if scale is None:
        scale = {"linear": 1.5, "router": 1.5, "head": 3.0}[kind] / shape[-1] ** 0.5
    return scale * torch.randn(shape, generator=generator)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that was written: adapter_config.json, its tensors, and the weights with the adapter merged in."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    merged: Published


def write_adapter(
    published: Published,
    folder: Path,
    *,
    r: int = 4,
    alpha: int = 8,
    targets: Iterable[str] | None = None,
    seed: int = 0,
) -> Adapter:
    """Writes a random LoRA adapter for `published` with published names; both factors of each pair are nonzero."""
    targets = tuple(FAMILIES[published.family].adapter_targets if targets is None else targets)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    factors, merged = {}, dict(published.tensors)
    for name, weight in published.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or module.rsplit(".", 1)[-1] not in targets:
            continue
        rows, columns = weight.shape
        down = torch.randn(r, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, r, generator=generator) / r**0.5
        factors[f"base_model.model.{module}.lora_A.weight"] = down
        factors[f"base_model.model.{module}.lora_B.weight"] = up
        merged[name] = (weight.double() + alpha / r * (up.double() @ down.double())).float()
    if not factors:
        raise ValueError(f"write_adapter: no tensor of {published.family} belongs to targets={targets}")
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": str(published.folder),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "revision": None,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
    }
    _write_json(folder / "adapter_config.json", config)
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return Adapter(folder, config, factors, dataclasses.replace(published, tensors=merged))


def _write_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Safetensors files of about equally many tensors and their index; one file without an index for shards=1."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, places = list(tensors), {}
    for shard in range(shards):
        chosen = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(chosen, file))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})


def _modules(*documents: Any) -> set[str]:
    """Names of the python modules that the auto_map of some configurations names."""
    found: set[str] = set()
    for document in documents:
        for value in document.get("auto_map", {}).values():
            classes = value if isinstance(value, list) else [value]
            found.update(name.split(".")[0] for name in classes if name is not None)
    return found


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
