"""Toy models and tolerances shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import dlm_fast
from dlm_fast.patching import attach
from dlm_fast.presets.options import unread

VOCAB = 48
MASK, EOS = 0, 1
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def native_model(
    family: str = "llama",
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 2,
    intermediate_size: int = 48,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    positions: int = 256,
) -> nn.Module:
    """A random transformers model with logits spread widely enough that ties are rare."""
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=heads * (32 // heads),  # Llama wants a multiple of the heads
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        initializer_range=0.4,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    config._attn_implementation = "eager"
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = model_class(config).to(dtype).eval()
    torch.random.set_rng_state(generator_state)
    return model


def toy(
    visibility: str = "full",
    *,
    block_length: int = 4,
    block_alignment: str = "rel",
    logits_row: str = "self",
    backend: str = "reference",
    eos: tuple[int, ...] = (EOS,),
    prompt_isolated: bool = False,
    causal_prefix: bool = False,
    **kwargs,
) -> nn.Module:
    """A random model as `dlm_fast.load` would leave it."""
    model = native_model(**kwargs)
    diffusion = dlm_fast.DiffusionConfig(
        mask_token_id=MASK,
        eos_token_ids=eos,
        visibility=visibility,
        block_length=block_length,
        block_alignment=block_alignment,
        logits_row=logits_row,
        prompt_isolated=prompt_isolated,
        causal_prefix=causal_prefix,
    )
    attach(model, backend=backend, diffusion=diffusion, plain_mode=diffusion.plain_mode)
    return model


def options_of(preset: str, length: int = 4) -> dict:
    """What a preset needs to run on a toy model."""
    chosen = dlm_fast.PRESETS[preset]
    options = {"block_length": length} if chosen.visibility == "full" and chosen.schedule != "canvas" else {}
    options |= {"sub_block_length": 2} if chosen.sub_block_length else {}
    options |= {"horizon": 3} if chosen.horizon else {}
    options |= {"head": lambda confidence: 2 * confidence} if preset == "learn2pd" else {}
    options |= (
        {"head": lambda confidence, eligible, time: confidence + time[:, None] / 4}
        if preset == "learned-commit"
        else {}
    )
    options |= {"delete_id": VOCAB - 1, "split_id": VOCAB - 2, "edit_threshold": 0.3} if preset == "llada2.2" else {}
    return options


def bolder(preset: str, threshold: float = 0.3, neg_entropy: float = -2.0) -> dict:
    """A threshold with which a preset that has one writes several tokens of a toy at once."""
    chosen = dlm_fast.PRESETS[preset]
    if unread(chosen, ["threshold"], chosen):
        return {}
    return {"threshold": neg_entropy if chosen.score == "neg_entropy" else threshold}


CAUSAL_PREFIX = ("nbdiff", "nemotron")  # presets of models that see causally before the block in work


def row_of(preset: str) -> str:
    """The logits_row of a model that the preset fits."""
    chosen = dlm_fast.PRESETS[preset]
    return "previous" if chosen.first_token and chosen.name != "nemotron" else "self"


def facts_of(preset: str) -> dict:
    """What a DiffusionConfig says of a model that the preset fits, besides its visibility."""
    return {"logits_row": row_of(preset), "causal_prefix": preset in CAUSAL_PREFIX}


# Presets that a toy can run, and the one that works on the host by design: it moves tokens between positions.
RUNNABLE = [name for name, preset in dlm_fast.PRESETS.items() if preset.supported]
HOST_SIDE = ("llada2.2",)


def model_for(preset: str, **kwargs) -> nn.Module:
    """A toy that the preset fits."""
    return toy(dlm_fast.PRESETS[preset].visibility, **facts_of(preset), **kwargs)


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts of the given lengths, without mask or EOS."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: the mask, the EOS, and 46 characters; with a chat template."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;#+-=\n"
    vocabulary = {"[MASK]": MASK, "[EOS]": EOS, **{c: 2 + i for i, c in enumerate(characters)}}
    assert len(vocabulary) == VOCAB
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="[EOS]", mask_token="[MASK]", clean_up_tokenization_spaces=False
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}: {% endif %}"
    )
    return fast


def save_toy_checkpoint(path: Path, visibility: str = "full", *, tokenizer: bool = True, **kwargs) -> nn.Module:
    """Writes a checkpoint folder as `dlm_fast.load` wants it; returns the (unpatched) model that it holds."""
    model = native_model(**kwargs)
    section = {"mask_token_id": MASK, "eos_token_ids": [EOS], "visibility": visibility}
    model.config.dlm = section if visibility == "full" else {**section, "block_length": 4, "block_alignment": "rel"}
    model.save_pretrained(path)
    if tokenizer:
        toy_tokenizer().save_pretrained(path)
    return model


class Synced:
    """What files held when they were last synced to the disk (`os.fsync`), and a check of every file that gets its name
    by `os.replace` or `os.link`.

    Attributes:
        named: the names given so far.
        kept: those of them whose folder was synced since.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.named: list[str] = []
        self.kept: list[str] = []
        self._sizes: dict[int, int] = {}
        self._waiting: list[tuple[int, str]] = []
        sync = os.fsync

        def recorded(descriptor: int) -> None:
            sync(descriptor)
            found = os.fstat(descriptor)
            self._sizes[found.st_ino] = found.st_size
            self.kept += [name for folder, name in self._waiting if folder == found.st_ino]
            self._waiting = [(folder, name) for folder, name in self._waiting if folder != found.st_ino]

        def checked(give_name: Callable) -> Callable:
            def named(source: str | Path, target: str | Path) -> None:
                files = [p for p in Path(source).rglob("*") if p.is_file()] if Path(source).is_dir() else [Path(source)]
                assert all(map(self.holds, files)), f"{source} gets the name {target} before it is on the disk"
                give_name(source, target)
                self.named.append(Path(target).name)
                self._waiting.append((Path(target).parent.stat().st_ino, Path(target).name))

            return named

        monkeypatch.setattr(os, "fsync", recorded)
        monkeypatch.setattr(os, "replace", checked(os.replace))
        monkeypatch.setattr(os, "link", checked(os.link))

    def holds(self, path: Path) -> bool:
        """Whether all of a file was synced."""
        found = path.stat()
        return self._sizes.get(found.st_ino) == found.st_size
