"""The models of `batch` and `e2e`: the embedded ones, or random ones of any size.

A random model is made so that it decodes like a trained one: positions differ, and some are certain and others are not.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import random

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import dlm_fast
from dlm_fast.diffusion import DiffusionConfig
from dlm_fast.files import checkpoint_path
from dlm_fast.patching import attach
from dlm_fast.tiny.tasks import TASKS, held_out
from dlm_fast.tiny.tokenizer import build_tokenizer, prompt_text

from .checks.decode import FAMILIES
from .shapes import Model

EMBEDDED = {"full": "tiny-full", "block": "tiny-block"}
POSITIONS = 2**15  # of a random model, whose rotary positions are computed and not stored
# Standard deviation of the scores of attention: a position sees some others more than the rest, or else all masks of a
# row would predict the same.
ATTENTION_SPREAD = 4.0
# By how much the best logit exceeds the second one on average. SURE: about three tokens a step pass a threshold of 0.9,
# and rows differ. EVEN: hardly any probability is so near to 1 that float32 cannot rank two positions.
SURE, EVEN = 4.8, 1.0


class ModelError(ValueError):
    """A model that cannot be made as asked; the message names the option and the rule."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with full or block-causal visibility that is decoded.

    Attributes:
        name: what it is called in the tables.
        model: the model as transformers has it, in eval mode.
        diffusion: how the model is decoded; its blocks begin at the end of the prompt.
        block_length: positions of a block.
        positions: the longest row.
    """

    name: str
    model: nn.Module
    diffusion: DiffusionConfig
    block_length: int
    positions: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def eos(self) -> int:
        return self.diffusion.eos_token_ids[0]

    def with_attention(self, name: str) -> nn.Module:
        """Another instance over the same parameters, which attends by transformers' attention function `name`."""
        other = share(self.model)
        other.config._attn_implementation = name
        return other

    def ours(self, backend: str) -> nn.Module:
        """Another instance over the same parameters, patched, which `dlm_fast.generate` decodes."""
        other = share(self.model)
        attach(other, backend=backend, diffusion=self.diffusion, plain_mode=self.diffusion.visibility)
        return other

    def prompt(self, length: int, rng: random.Random) -> list[int]:
        """A prompt of `length` ids: text of the tasks for an embedded model, random ids for another one."""
        if self.name in EMBEDDED.values():
            start = rng.randrange(len(_text()) - length)
            return list(_text()[start : start + length])
        special = (self.diffusion.mask_token_id, *self.diffusion.eos_token_ids)
        allowed = [i for i in range(min(self.model.config.vocab_size, 4096)) if i not in special]
        return rng.choices(allowed, k=length)


@functools.cache
def _text() -> tuple[int, ...]:
    """Ids of held-out prompts of all tasks, one after the other."""
    tokenizer = build_tokenizer()
    samples = [sample for task in TASKS for sample in held_out(task, 40)]
    random.Random(0).shuffle(samples)
    return tuple(id for s in samples for id in tokenizer.encode(prompt_text(s.prompt), add_special_tokens=False))


def share(model: nn.Module) -> nn.Module:
    """Another instance over the parameters of the same model, with a configuration of its own."""
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})


def embedded(visibility: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Subject:
    """The embedded model of this visibility."""
    transformers.utils.logging.disable_progress_bar()  # transformers' bar would run through our lines
    name = EMBEDDED[visibility]
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path(name), dtype=dtype).to(device).eval()
    diffusion = DiffusionConfig.from_dict(model.config.dlm)
    positions = model.config.max_position_embeddings
    return Subject(name, model.requires_grad_(False), diffusion, diffusion.block_length or 32, positions)


def small(layers: int, hidden: int, vocab: int) -> Model:
    """A Llama of any size. Heads have 128 dimensions, those of narrow models 32, and two share keys and values."""
    head_dim = 128 if hidden >= 1024 else 32
    if hidden < 1 or hidden % (2 * head_dim):
        raise ModelError(f"--hidden must be a multiple of {2 * head_dim}, got {hidden}")
    if layers < 1 or vocab < 16:
        raise ModelError(f"--layers must be at least 1 and --vocab at least 16, got {layers} and {vocab}")
    heads = hidden // head_dim
    return Model(
        name=f"random {layers}x{hidden}",
        family="llama",
        visibility="full",
        layers=layers,
        hidden=hidden,
        intermediate=3 * hidden,
        heads=heads,
        kv_heads=heads // 2,
        head_dim=head_dim,
        vocab=vocab,
        mask_id=0,
        eos_id=1,
    )


def random_weights(shape: Model, device: torch.device, dtype: torch.dtype, gap: float, seed: int = 0) -> nn.Module:
    """A random model of a shape whose best logit exceeds the second one by `gap` on average (SURE, EVEN)."""
    if shape.family is None:
        raise ModelError(f"--shape must be of a dense model, got {shape.name}")
    config_class, _ = FAMILIES[shape.family]
    config = config_class(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=shape.eos_id,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    noise = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        # A row of unit variance stays one of unit variance, whatever the width.
        scale = 1.0 if "embed_tokens" in name else parameter.shape[1] ** -0.5
        if "q_proj" in name or "k_proj" in name:
            scale *= math.sqrt(ATTENTION_SPREAD)
        if "lm_head" in name:
            scale *= head_scale(shape.vocab, gap)
        parameter.normal_(0.0, scale, generator=noise)
    return model


def head_scale(vocab: int, gap: float) -> float:
    """Standard deviation of `vocab` logits of which the best exceeds the second one by `gap` on average: the largest of
    V normal numbers lie about 1 / sqrt(2 ln V) apart."""
    return gap * math.sqrt(2 * math.log(vocab))


def subject(shape: Model, model: nn.Module, visibility: str) -> Subject:
    """Random weights as a model of full or block-causal visibility."""
    diffusion = dlm_fast.DiffusionConfig(
        mask_token_id=shape.mask_id,
        eos_token_ids=(shape.eos_id,),
        visibility=visibility,
        block_length=shape.window if visibility == "block" else None,
        block_alignment="rel",
    )
    return Subject(shape.name, model, diffusion, shape.window, POSITIONS)


class Models:
    """The models of a run, each made when it is first asked for. Random ones of both visibilities share their
    weights."""

    def __init__(self, shape: Model | None, device: torch.device, dtype: torch.dtype, gap: float) -> None:
        """`shape` is that of random models; None = the embedded ones."""
        self.shape, self.device, self.dtype, self.gap = shape, device, dtype, gap
        self._made: dict[str, Subject] = {}
        self._weights: nn.Module | None = None

    def __call__(self, visibility: str) -> Subject:
        if visibility not in self._made:
            if self.shape is None:
                self._made[visibility] = embedded(visibility, self.device, self.dtype)
            else:
                if self._weights is None:
                    self._weights = random_weights(self.shape, self.device, self.dtype, self.gap)
                self._made[visibility] = subject(self.shape, self._weights, visibility)
        return self._made[visibility]

    def surer(self) -> Subject:
        """The model of full visibility, a random one from now on with the gap SURE."""
        found = self("full")
        if self.shape is not None:
            found.model.lm_head.weight.mul_(SURE / self.gap)
            self.gap = SURE
        return found

    def in_float32(self, layers: int) -> Models:
        """The same models in float32; of random ones in 16 bits, others of the same widths with at most `layers`
        layers."""
        if self.dtype == torch.float32:
            return self
        shape = self.shape
        if shape is not None:
            shape = dataclasses.replace(shape, layers=min(shape.layers, layers))
        return Models(shape, self.device, torch.float32, self.gap)
