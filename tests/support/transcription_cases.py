"""Seeded random decodes for tests/decoding/test_transcriptions.py: a toy model in float64, a batch of requests, a
transcription's answer to each.

The model computes in float64 and its logits are rounded to fp32, on both sides; so two correct decoders agree on every
token, and no near-tie has to be excused. `REGISTRY` says what each name draws at random, and which transcription
answers for it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import oracles
import torch
from decode_cases import ModelSpec, build, random_model
from helpers import EOS, MASK, VOCAB
from torch import Tensor, nn
from transcriptions import blockwise, editing, pipeline, sub_blocks
from transcriptions.common import Model, Row, Settings, fp32, last_block_end

import dlm_fast
from dlm_fast.patching import attach
from dlm_kernels.reference import noise

Options = dict[str, Any]


class Norm64(nn.Module):
    """transformers' RMSNorm, which computes in fp32 whatever it is given, in float64."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class Rotary64(nn.Module):
    """transformers' rotary embedding, which computes in fp32 whatever it is given, in float64."""

    def __init__(self, theta: float, head_dim: int) -> None:
        super().__init__()
        self.frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].double() * self.frequency).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


class RoundedHead(nn.Module):
    """A head whose logits are fp32 numbers, in float64."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).float().double()


@functools.lru_cache(maxsize=128)
def exact_model(spec: ModelSpec) -> tuple[nn.Module, oracles.Network]:
    """The toy model in float64, and the transcriptions' own network with its weights."""
    model = copy.deepcopy(build(spec)).double()
    network = oracles.Network(model)
    config = model.config
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, Norm64(child))
    model.model.rotary_emb = Rotary64(config.rope_parameters["rope_theta"], config.head_dim)
    model.lm_head = RoundedHead(model.lm_head)
    return model.requires_grad_(False).eval(), network


# (model, canvas, settings, the contract's defaults and the case's options, the model's diffusion configuration)
Transcription = Callable[[Model, list[int], Settings, Options, dlm_fast.DiffusionConfig], Row]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What a name decodes with.

    Attributes:
        visibility: of the models it decodes. defaults: what the published decoder fixes, as its specification says.
        draw: options at numbers where a toy model takes every branch.
        transcribe: the answer to one row.
        rows: the row maps to try, one drawn per case. sampled: whether temperatures above 0 are drawn.
        infilling: whether canvases with given tokens anywhere are drawn. lengths: of blocks. new: least and most new
            tokens.
        last_block: what becomes of a last block that is cut, where the case does not say. causal_prefix: whether the
            models see causally before the block in work, one drawn per case.
        stops: stop rules to try. block_length: the preset's own; None = the model or the canvas decides.
        preset: the preset's name where it is not the registered one.
    """

    visibility: str
    defaults: Options
    draw: Callable[[random.Random], Options]
    transcribe: Transcription
    rows: tuple[str, ...] = ("self", "self", "previous")
    sampled: bool = True
    infilling: bool = True
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5, 8)
    new: tuple[int, int] = (1, 12)
    last_block: str = "crop"
    causal_prefix: tuple[bool, ...] = (False,)
    stops: tuple[str, ...] = ("never", "after_block", "closed", "all_stop")
    block_length: int | None = 32
    preset: str | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `generate`, and everything a transcription needs to answer it."""

    name: str
    seed: int
    model: ModelSpec
    diffusion: dlm_fast.DiffusionConfig
    options: Options
    prompts: list[list[int]] | None
    canvas: list[list[int]] | None
    max_new_tokens: list[int]
    min_new_tokens: list[int]
    temperature: list[float]
    top_p: float
    top_k: int
    noise_seed: int
    request_ids: list[int]
    banned: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.max_new_tokens)

    @property
    def decoder(self) -> Decoder:
        return REGISTRY[self.name]

    @property
    def preset(self) -> str:
        return self.decoder.preset or self.name

    def canvas_of(self, b: int) -> tuple[list[int], int]:
        """The canvas that row b is decoded on, and how much of it is the result."""
        if self.canvas is not None:
            return self.canvas[b], len(self.canvas[b])
        prompt, new = self.prompts[b], self.max_new_tokens[b]
        last_block = self.options.get("last_block", self.decoder.last_block)
        length = self.block_length
        end = last_block_end(len(prompt), new, length or 1, self.alignment, last_block if length else "crop")
        return prompt + [MASK] * (end - len(prompt)), min(end, len(prompt) + new)

    @property
    def block_length(self) -> int | None:
        """Positions of a block; None = the generation is one block."""
        if self.decoder.visibility == "block":
            return self.options.get("block_length", self.diffusion.block_length)
        return self.options.get("block_length", self.decoder.block_length)

    @property
    def alignment(self) -> str:
        return self.diffusion.block_alignment if self.decoder.visibility == "block" else "rel"

    @property
    def fuses(self) -> bool:
        """Whether the preset fuses commits, which the published loops append by forwards of their own."""
        preset = dlm_fast.PRESETS[self.preset]
        return "cache" not in self.options and preset.operation.defers(preset.pipeline)

    def generate(
        self, rows: list[int] | None = None, backend: str | dlm_fast.Ops = "reference", *, fused: bool = False
    ) -> dlm_fast.GenerateOutput:
        """The decode of these rows (all) by our loop, with the published commits or with fused ones."""
        published = {"cache": "commit"} if self.fuses and not fused else {}
        rows = list(range(len(self))) if rows is None else rows

        def of(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[b] for b in rows]

        filters = {
            name: value for name, value, off in (("top_p", self.top_p, 1.0), ("top_k", self.top_k, 0)) if value != off
        }
        model, _ = exact_model(self.model)
        with attach(model, backend=backend, diffusion=self.diffusion, plain_mode=self.diffusion.plain_mode):
            return dlm_fast.generate(
                model,
                of(self.prompts),
                canvas=of(self.canvas),
                preset=self.preset,
                max_new_tokens=of(self.max_new_tokens) if self.canvas is None else None,
                min_new_tokens=of(self.min_new_tokens),
                temperature=of(self.temperature),
                seed=self.noise_seed,
                request_ids=of(self.request_ids),
                banned_token_ids=self.banned,
                **filters,
                **published,
                **self.options,
            )

    def answer(self, b: int) -> Row:
        """What the specification says about row b."""
        options = {**self.decoder.defaults, **self.options}
        canvas, length = self.canvas_of(b)
        options.pop("last_block", None)
        first = canvas.index(MASK) if MASK in canvas else len(canvas)

        @functools.cache
        def draws(step: int) -> tuple[Tensor, Tensor]:
            """The step's Gumbel noise [L, V] and its uniform numbers [L]."""
            request, seed = self.request_ids[b], torch.tensor([self.noise_seed])
            address = torch.tensor([[request, position, step] for position in range(len(canvas))], dtype=torch.int32)
            return noise.gumbel(noise.row_key(seed, address), torch.arange(VOCAB), torch.float64), noise.uniform_scores(
                seed, address
            )

        settings = Settings(
            mask_id=MASK,
            stop_ids=self.diffusion.eos_token_ids,
            stop=options.pop("stop", "closed"),
            banned=lambda p: (
                *self.banned,
                *(self.diffusion.eos_token_ids if p < first + self.min_new_tokens[b] else ()),
            ),
            temperature=fp32(self.temperature[b]),
            gumbel=lambda position, step: draws(step)[0][position],
            uniform=lambda position, step: draws(step)[1][position].item(),
            tempered=options.pop("tempered", False),
            top_k=self.top_k,
            top_p=self.top_p,
            top_k_first=options.pop("top_k_first", False),
            greedy_filters=options.pop("greedy_filters", False),
            exclude_eos=options.pop("exclude_eos", False),
        )
        network = exact_model(self.model)[1]
        model = Model(
            network, self.diffusion.logits_row == "previous", isolated=first if self.diffusion.prompt_isolated else 0
        )
        if self.diffusion.visibility == "full":
            options.setdefault("block_length", self.decoder.block_length)
        row = self.decoder.transcribe(model, canvas, settings, options, self.diffusion)
        if self.options.get("cache", dlm_fast.PRESETS[self.preset].cache) != "none":
            # Transcriptions compute an isolated prompt whenever they recompute the canvas; with a cache, once is
            # enough.
            row.query_tokens -= sum(model.prompt_computed[1:])
        row.cut(length)
        return row


def last_block_of(rng: random.Random, case: Case) -> Options:
    """Another end of the last block than the decoder's own, now and then; "drop" where every row has a whole block."""
    if case.canvas is not None or case.block_length is None or case.name in ONE_BLOCK or rng.random() < 0.7:
        return {}
    ends = ("crop", "whole", "drop")
    chosen = dataclasses.replace(case, options={**case.options, "last_block": rng.choice(ends)})
    has_blocks = all(len(chosen.canvas_of(b)[0]) > len(prompt) for b, prompt in enumerate(case.prompts))
    return {"last_block": chosen.options["last_block"]} if has_blocks else {}


def some(rng: random.Random, chance: float, name: str, values: tuple) -> Options:
    """An option, now and then; else the preset's own value is used."""
    return {name: rng.choice(values)} if rng.random() < chance else {}


def common_rule(preset_rule: str, own_min: int | None = 1) -> Callable[[random.Random], Options]:
    """The four common rules; half of the time the preset keeps its own."""

    def draw(rng: random.Random) -> Options:
        rule = preset_rule if rng.random() < 0.5 else rng.choice(("quota", "threshold", "factor", "entropy"))
        options: Options = {"rule": rule} if rule != preset_rule else {}
        if rule == "quota":
            options |= some(rng, 0.8, "steps_per_block", (None, 1, 2, 3, 7))
            options |= some(rng, 0.6, "score", ("confidence", "margin", "neg_entropy", "random", "position"))
        if rule == "threshold":
            options |= some(rng, 0.85, "threshold", (0.15, 0.3, 0.5, 0.8, 1.0))
            options |= some(rng, 0.3, "score", ("confidence", "margin"))
            if rng.random() < 0.2:
                options |= {"score": "neg_entropy", "threshold": rng.choice((-2.5, -1.5, -0.5)), "inclusive": True}
            options |= some(rng, 0.2, "rank", ("confidence", "margin", "neg_entropy", "random", "position"))
        if rule == "factor":
            options |= some(rng, 0.8, "factor", (0.5, 1.0, 1.7)) | {"score": "confidence"}
        if rule == "entropy":
            options |= some(rng, 0.8, "entropy_bound", (0.3, 1.5, 4.0)) | {
                "score": rng.choice(("neg_entropy", "confidence", "margin"))
            }
        if rule in ("threshold", "entropy") and "inclusive" not in options:
            options |= some(rng, 0.3, "inclusive", (True, False))
        if rule != "quota" and rng.random() < 0.3:
            options["min_unmask"] = rng.choice((1, 2, 3, None, None))
            if options["min_unmask"] is None:
                options["steps_per_block"] = rng.choice((1, 2, 4))
        return options

    return draw


def plus(
    draw: Callable[[random.Random], Options], *optional: tuple[float, str, tuple]
) -> Callable[[random.Random], Options]:
    def both(rng: random.Random) -> Options:
        options = draw(rng)
        for chance, name, values in optional:
            options |= some(rng, chance, name, values)
        return options

    return both


def only(*optional: tuple[float, str, tuple]) -> Callable[[random.Random], Options]:
    return plus(lambda rng: {}, *optional)


LOW = (0.1, 0.2, 0.3, 0.5, 0.8, 1.0)
THRESHOLD = (0.85, "threshold", LOW)
SCORE = (0.25, "score", ("confidence", "margin"))
TEMPERED = (0.1, "tempered", (True, False)), (0.1, "top_k_first", (True, False)), (0.1, "greedy_filters", (True, False))


def without_eos(rng: random.Random) -> Options:
    """The common rules, now and then with one of LLaDA's two EOS options."""
    options = common_rule("quota")(rng)
    return options | some(rng, 0.45, rng.choice(("suppress_eos", "exclude_eos")), (True, True, False))


def factor_rule(rng: random.Random) -> Options:
    """The common rules; where it is Fast-dLLM's factor rule, now and then as published."""
    options = common_rule("factor")(rng)
    if options.get("rule", "factor") == "factor" and options.get("min_unmask", 1) is not None:
        options |= some(rng, 0.5, "published_factor", (True, False))
    return options


def uncached(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    return blockwise.decode_uncached(model, canvas, settings, **o)


def dream(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    o = {name: value for name, value in o.items() if name != "block_length"}
    return blockwise.decode_dream(model, canvas, settings, **o)


def rnd1(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    o = {name: value for name, value in o.items() if name != "block_length"}
    return blockwise.decode_rnd1(model, canvas, settings, **o)


def refreshed(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    return blockwise.decode_refreshed(model, canvas, settings, **o)


def dinfer(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    return blockwise.decode_dinfer(model, canvas, settings, **o)


def vicinity(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    return blockwise.decode_vicinity(model, canvas, settings, **o)


def credit(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    return blockwise.decode_credit(model, canvas, settings, **o)


def d3llm(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    return pipeline.decode_d3llm(model, canvas, settings, **o)


def dllm_var(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    return pipeline.decode_pipeline(model, canvas, settings, visibility="full", **o)


def blocks(diffusion: Any) -> Options:
    return {"block_length": diffusion.block_length, "alignment": diffusion.block_alignment}


def cached(o: Options) -> Options:
    """The option `cache` of block-causal decoders, as the transcriptions say it."""
    return {name: value for name, value in o.items() if name != "cache"} | {"cached": o.get("cache") != "none"}


def d2f(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    return pipeline.decode_pipeline(model, canvas, settings, visibility="block", **blocks(diffusion), **cached(o))


def block_causal(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    facts = blocks(diffusion) | {"causal_prefix": diffusion.causal_prefix}
    return blockwise.decode_block_causal(model, canvas, settings, **facts, **cached(o))


def with_first_tokens(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    facts = blocks(diffusion) | {"causal_prefix": diffusion.causal_prefix}
    return sub_blocks.decode_seeded(model, canvas, settings, **facts, **o)


def joint(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    return editing.decode_joint_threshold(model, canvas, settings, **blocks(diffusion), **o)


def scoped(rng: random.Random) -> Options:
    """A pipeline's other scope, now and then; else how soon its blocks are activated."""
    if rng.random() < 0.25:
        return {"scope": "first", "min_unmask": rng.choice((0, 1, 2))}
    return some(rng, 0.7, "activate_threshold", (0.0, 0.2, 0.4, 0.7, 1.0))


SHORT = (1, 2, 3, 4, 5)
PIPELINE_STOPS = ("never", "after_block", "closed", "appends", "fill")


def insert_delete(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    return editing.decode_insert_delete(model, canvas, settings, **blocks(diffusion), **o)


ONE_BLOCK = ("dream", "dream-origin", "rnd1")
FAST = {"rule": "threshold", "threshold": 0.9, "inclusive": True}
SDAR = {"tempered": True, "top_k_first": True}
# Block-causal decoders whose loops decode whole last blocks, on models that may see causally before the block in work.
WHOLE: Any = {"last_block": "whole"}
PREFIXES: Any = {"causal_prefix": (False, False, True)}
NO_CACHE = (0.15, "cache", ("none",))
HIGH = (0.85, "threshold", (0.2, 0.3, 0.5, 0.8, 1.0))
APPEND = (0.8, "append_threshold", (0.0, 0.1, 0.3, 0.5, 1.0))

REGISTRY: dict[str, Decoder] = {
    "llada": Decoder(
        "full",
        {"rule": "quota"},
        plus(without_eos, (0.25, "cfg_scale", (0.5, 1.5)), *TEMPERED),
        uncached,
        block_length=None,
    ),
    "fast-dllm": Decoder("full", FAST, plus(common_rule("threshold"), *TEMPERED), uncached),
    "fast-dllm-factor": Decoder("full", {"rule": "factor", "factor": 1.0}, factor_rule, uncached),
    "fast-dllm-prefix": Decoder("full", {**FAST, "cache": "prefix"}, common_rule("threshold"), refreshed),
    "fast-dllm-dual": Decoder("full", {**FAST, "cache": "dual"}, common_rule("threshold"), refreshed),
    "dparallel": Decoder(
        "full",
        {"rule": "threshold", "score": "neg_entropy", "threshold": -0.5, "inclusive": True},
        only((0.8, "threshold", (-2.5, -2.0, -1.5, -1.0))),
        uncached,
    ),
    "dream": Decoder(
        "full",
        {"tempered": True, "greedy_filters": True},
        only(
            (0.7, "steps_per_block", (1, 2, 3, 5, 9, 30)),
            (0.4, "score", ("confidence", "margin", "neg_entropy")),
            (0.3, "order_temperature", (0.2, 1.0, 5.0)),
            (0.3, "schedule_eps", (1e-2, 0.3, 0.6)),
            (0.3, "strict_reference", (True, False)),
        ),
        dream,
        rows=("self", "previous"),
        block_length=None,
    ),
    "dream-origin": Decoder(
        "full",
        {"tempered": True, "greedy_filters": True, "bernoulli": True},
        only((0.7, "steps_per_block", (1, 2, 3, 5, 9)), (0.3, "schedule_eps", (1e-2, 0.3, 0.6))),
        dream,
        rows=("self", "previous"),
        block_length=None,
    ),
    "rnd1": Decoder(
        "full",
        {"tempered": True, "top_k_first": True, "greedy_filters": True},
        only((0.8, "steps_per_block", (1, 2, 3, 5, 9, 30)), (0.3, "score", ("confidence", "margin", "neg_entropy"))),
        rnd1,
        rows=("self", "previous"),
        block_length=None,
    ),
    "dllm-rl": Decoder(
        "full",
        {"rule": "threshold", "threshold": 0.95, "cache": "prefix", "horizon": 128},
        plus(common_rule("threshold"), (0.8, "horizon", (1, 2, 3, 6, 20))),
        refreshed,
    ),
    "dinfer": Decoder("full", {"threshold": 0.9}, only(THRESHOLD, SCORE), dinfer),
    "dinfer-hierarchy": Decoder(
        "full",
        {"threshold": 0.9, "run_threshold": 0.4},
        only(THRESHOLD, SCORE, (0.6, "run_threshold", (0.05, 0.1, 0.2, 0.3))),
        dinfer,
    ),
    "dinfer-credit": Decoder(
        "full",
        {"threshold": 0.9},
        only(
            THRESHOLD,
            SCORE,
            (0.3, "credit_decay", (0.5, 1.0)),
            (0.3, "credit_power", (0.5, 1.0)),
            (0.4, "credit_weight", (1.5, 3.0)),
        ),
        credit,
    ),
    "dinfer-vicinity": Decoder(
        "full",
        {"threshold": 0.9},
        only(
            THRESHOLD,
            SCORE,
            (0.8, "vicinity", (1, 2, 3, 5)),
            (0.7, "warmup_steps", (0, 1, 2)),
            (0.6, "refresh_interval", (None, 1, 2, 3)),
        ),
        vicinity,
        new=(4, 20),
    ),
    "d3llm": Decoder(
        "full",
        {"stop": "fill"},
        only(
            (0.85, "threshold", (-2.5, -2.0, -1.5, -1.0, -0.3)),
            (0.3, "inclusive", (True, False)),
            (0.4, "min_unmask", (0, 1)),
            APPEND,
            (0.7, "refresh_interval", (None, 1, 2, 3, 4)),
            (0.5, "commit_delay", (1, 2, 3)),
        ),
        d3llm,
        stops=("fill", "fill", "fill", *PIPELINE_STOPS),
        lengths=SHORT,
        new=(3, 16),
    ),
    "dllm-var": Decoder(
        "full",
        {"threshold": 0.9, "stop": "after_block"},
        plus(scoped, HIGH, SCORE, (0.2, "inclusive", (True, False)), APPEND),
        dllm_var,
        stops=PIPELINE_STOPS,
        lengths=SHORT,
        new=(3, 16),
        block_length=64,
        **WHOLE,
    ),
    "d2f": Decoder(
        "block",
        {"threshold": 0.9, "append_threshold": 0.1, "activate_threshold": 0.95, "greedy_filters": True},
        plus(
            scoped,
            HIGH,
            SCORE,
            (0.3, "inclusive", (True, False)),
            (0.4, "rank", ("margin", "neg_entropy")),
            APPEND,
            (0.25, "cache", ("none",)),
        ),
        d2f,
        stops=PIPELINE_STOPS,
        lengths=SHORT,
        new=(3, 16),
        **WHOLE,
    ),
    "fast-dllm-v2": Decoder(
        "block",
        {"threshold": 0.9, "sub_block_length": 8},
        only(
            THRESHOLD,
            SCORE,
            (0.85, "sub_block_length", (1, 2, 3, 4)),
            (0.5, "sub_block_cache", (True, False)),
            (0.2, "min_unmask", (1, 2)),
        ),
        with_first_tokens,
        rows=("previous",),
        lengths=(1, 2, 4, 5, 8, 8),
        new=(1, 18),
        **WHOLE,
        **PREFIXES,
    ),
    "nbdiff": Decoder(
        "block",
        {"threshold": 0.9},
        only(THRESHOLD, SCORE, (0.2, "min_unmask", (1, 2))),
        with_first_tokens,
        rows=("previous",),
        causal_prefix=(True,),
        **WHOLE,
    ),
    "nemotron": Decoder(
        "block",
        {"threshold": 0.9, "inclusive": True, "draws_first_token": True},
        only(
            THRESHOLD,
            SCORE,
            (0.2, "min_unmask", (1, 2)),
            (0.2, "sub_block_length", (1, 2, 3)),
            (0.2, "draws_first_token", (True, False)),
            (0.2, "exclude_eos", (True,)),
            (0.1, "tempered", (True,)),
        ),
        with_first_tokens,
        rows=("self", "self", "previous"),
        causal_prefix=(True,),
        **WHOLE,
    ),
    "efficient-dlm": Decoder(
        "block",
        {"rule": "threshold", "threshold": 0.9, "inclusive": True},
        only(THRESHOLD, SCORE, (0.3, "cache", ("none",))),
        block_causal,
        rows=("self", "previous"),
        causal_prefix=(False, True),
        **WHOLE,
    ),
    "stable-diffcoder": Decoder(
        "block",
        {"rule": "threshold", "threshold": 0.95, "inclusive": True},
        only(THRESHOLD, SCORE, NO_CACHE),
        block_causal,
    ),
    "bd3lm": Decoder(
        "block",
        {"rule": "quota", "quota_of": "masks"},
        only((0.8, "steps_per_block", (None, 1, 2, 3, 7)), SCORE, NO_CACHE),
        block_causal,
    ),
    "sdar": Decoder(
        "block",
        {"rule": "quota", **SDAR},
        plus(common_rule("quota"), NO_CACHE, (0.2, "exclude_eos", (True,)), *TEMPERED),
        block_causal,
        **WHOLE,
        **PREFIXES,
    ),
    "sdar-dynamic": Decoder(
        "block",
        {"rule": "threshold", "threshold": 0.85, "min_unmask": None, **SDAR},
        plus(common_rule("threshold"), NO_CACHE),
        block_causal,
        **WHOLE,
        **PREFIXES,
    ),
    "trado": Decoder(
        "block",
        {"rule": "threshold", "threshold": 0.9, "min_unmask": None, **SDAR},
        plus(common_rule("threshold"), NO_CACHE),
        block_causal,
        **WHOLE,
    ),
    "sdar-sequential": Decoder(
        "block",
        {"rule": "quota", "score": "position", **SDAR},
        only((0.8, "steps_per_block", (None, 1, 2, 3)), NO_CACHE),
        block_causal,
        **WHOLE,
    ),
    "sdar-entropy": Decoder(
        "block",
        {"rule": "entropy", "entropy_bound": 0.35, "inclusive": True, "score": "neg_entropy", **SDAR},
        only((0.8, "entropy_bound", (0.3, 1.5, 4.0)), (0.2, "min_unmask", (1, 2)), NO_CACHE),
        block_causal,
        **WHOLE,
    ),
    "llada2": Decoder(
        "block",
        {"rule": "threshold", "threshold": 0.95},
        plus(common_rule("threshold"), NO_CACHE),
        block_causal,
        **WHOLE,
        **PREFIXES,
    ),
    "llada2-quota": Decoder(
        "block",
        {"rule": "threshold", "threshold": 0.95, "min_unmask": None},
        plus(common_rule("threshold"), NO_CACHE),
        block_causal,
        **WHOLE,
    ),
    "llada2.1": Decoder(
        "block",
        {"stop": "after_block"},
        only(
            (0.7, "threshold", (0.2, 0.3, 0.8)),
            (0.6, "edit_threshold", (0.1, 0.2, 0.4, 0.9)),
            (0.6, "max_post_edits", (1, 2, 3)),
            (0.3, "repeat_penalty", (0.5, 3.0)),
        ),
        joint,
        stops=("never", "after_block"),
        **WHOLE,
    ),
    "llada2.2": Decoder(
        "block",
        {"stop": "after_block"},
        only(
            (1.0, "delete_id", (2, 3)),
            (1.0, "split_id", (4, 5)),
            (0.7, "threshold", (0.2, 0.3, 0.8)),
            (0.7, "edit_threshold", (0.2, 0.4, 0.9)),
            (0.6, "max_post_edits", (0, 1, 2, 3)),
        ),
        insert_delete,
        sampled=False,
        infilling=False,
        stops=("never", "after_block"),
        **WHOLE,
    ),
}


def random_case(name: str, seed: int) -> Case:
    """A case that depends on its arguments only: unequal rows, infilling, early EOS, draws, filters, banned ids, exact
    ties."""
    rng = random.Random(f"{name} {seed}")
    decoder = REGISTRY[name]
    block_length = rng.choice(decoder.lengths)
    eos = tuple(sorted({EOS, *rng.sample(range(2, VOCAB), rng.choice((0, 0, 1, 6, 12)))}))
    diffusion = dlm_fast.DiffusionConfig(
        mask_token_id=MASK,
        eos_token_ids=eos,
        visibility=decoder.visibility,
        block_length=block_length if decoder.visibility == "block" else None,
        block_alignment=rng.choice(("abs", "rel", "both", "both") if name == "bd3lm" else ("abs", "rel")),
        logits_row=rng.choice(decoder.rows),
    )
    options = decoder.draw(rng)
    if decoder.visibility == "full" and name not in ONE_BLOCK and rng.random() < 0.85:
        options["block_length"] = block_length
    if rng.random() < 0.4 and len(decoder.stops) > 1:
        options["stop"] = rng.choice(decoder.stops)
    B = rng.choice((2, 3, 3, 4))
    lengths = [
        max(1, rng.choice((1, block_length - 1, block_length, block_length + 1, rng.randint(1, 9)))) for _ in range(B)
    ]
    plain = [token for token in range(2, VOCAB) if token not in eos]
    prompts = [[rng.choice(plain) for _ in range(n)] for n in lengths]
    new = [rng.randint(*decoder.new) for _ in range(B)]
    canvas = None
    if decoder.infilling and rng.random() < 0.25:  # infilling: fixed tokens, EOS among them, anywhere
        canvas = [
            p[: rng.choice((0, len(p), len(p)))]
            + [rng.choice((MASK, MASK, MASK, rng.choice(plain), EOS)) for _ in range(n)]
            for p, n in zip(prompts, new)
        ]
    spec = random_model(rng, small=True)
    sampled = decoder.sampled and rng.random() < 0.35
    filters = sampled or (decoder.sampled and rng.random() < 0.2)
    case = Case(
        name=name,
        seed=seed,
        model=spec if rng.random() < 0.85 else dataclasses.replace(spec, sharpness=10.0),  # probabilities of 1.0
        diffusion=diffusion,
        options=options,
        prompts=None if canvas else prompts,
        canvas=canvas,
        max_new_tokens=new,
        min_new_tokens=[rng.choice((0, 0, rng.randint(0, n))) for n in new] if rng.random() < 0.3 else [0] * B,
        temperature=[rng.choice((0.0, 0.3, 1.0)) for _ in range(B)] if sampled else [0.0] * B,
        top_p=rng.choice((0.5, 0.9, 1.0)) if filters else 1.0,
        top_k=rng.choice((0, 4, 20)) if filters else 0,
        noise_seed=rng.randrange(2**40),
        request_ids=rng.sample(range(1000), B),
        banned=tuple(rng.sample(range(VOCAB), rng.choice((0, 0, 5)))),
    )
    causal_prefix = rng.choice(decoder.causal_prefix)
    return dataclasses.replace(
        case,
        diffusion=dataclasses.replace(diffusion, causal_prefix=causal_prefix),
        options=case.options | last_block_of(rng, case),
    )


def features(case: Case, b: int, row: Row) -> list[str]:
    """What row b exercises, for the summary."""
    length = case.options.get("block_length", case.diffusion.block_length)
    present = {
        f"GQA {case.model.heads // case.model.kv_heads}": True,
        f"stop {case.options.get('stop', 'default')}": True,
        f"aligned {case.diffusion.block_alignment}": case.diffusion.visibility == "block",
        "previous rows": case.diffusion.logits_row == "previous",
        "causal prefix": case.diffusion.causal_prefix,
        "last block cut": case.canvas is None and len(case.canvas_of(b)[0]) != case.canvas_of(b)[1],
        "exact ties of tokens": case.model.twist == "twins",
        "exact ties of positions": case.model.twist == "flat",
        "infilling": case.canvas is not None,
        "sampled": case.temperature[b] > 0,
        "filtered": case.top_p < 1 or case.top_k > 0,
        "banned ids": bool(case.banned),
        "min_new_tokens": case.min_new_tokens[b] > 0,
        "ended early": MASK in row.tokens,
        "several blocks": length is not None and length < case.max_new_tokens[b],
        **{
            f"{name}={value}": True
            for name, value in case.options.items()
            if not isinstance(value, float) and not callable(value)
        },
    }
    return [name for name, is_present in present.items() if is_present]


def differences(case: Case, b: int, out: dlm_fast.GenerateOutput, index: int, row: Row) -> list[str]:
    """How entry `index` of the output differs from the transcription's row b; empty if it does not."""
    pairs = {
        "canvas": (out.canvas[index].tolist(), row.tokens),
        "unmask_step": (out.unmask_step[index].tolist(), row.unmask_step),
        "nfe": (out.nfe[index], row.nfe),
        "query_tokens": (out.query_tokens[index], row.query_tokens),
    }
    where = f"{case.name} seed {case.seed} row {b}"
    found = [f"{where}: {name} {ours} instead of {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    error = max((abs(a - c) for a, c in zip(out.confidence[index].tolist(), row.confidence)), default=0.0)
    if out.unmask_step[index].tolist() == row.unmask_step and not error <= 1e-6:
        found.append(f"{where}: confidence differs by {error:.2g}")
    return found
