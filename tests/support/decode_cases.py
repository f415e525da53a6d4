"""Seeded random decodes: a toy model, a batch of requests and settings, and the oracle's answer to each row.

Shared by tests/decoding/test_generate.py (reference backend against the oracle) and
tests/decoding/test_decode_campaign.py (Triton against reference).
"""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import oracles
import torch
from helpers import EOS, MASK, VOCAB, native_model
from torch import nn

import dlm_fast
from dlm_fast.patching import attach
from dlm_kernels.reference import noise

GQA = {1: ((2, 2), (4, 4)), 4: ((4, 1), (8, 2)), 7: ((7, 1), (14, 2))}
FULL_PRESETS = ("llada", "fast-dllm", "fast-dllm-prefix", "fast-dllm-dual")
BLOCK_PRESETS = ("sdar", "sdar-dynamic", "llada2")

# Nearer than this to another decision, fp32 cannot be asked to agree with float64: a logit's relative distance to the
# runner-up, and the distance of scores (probabilities, or nats up to a few units) to each other or to their threshold.
LOGIT_BOUND, SCORE_BOUND = 5e-4, 5e-5


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A toy model. `twist`: "twins": pairs of ids have equal logits; "flat": attention adds nothing, so all masks have
    equal logits."""

    family: str = "llama"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    layers: int = 2
    seed: int = 0
    sharpness: float = 1.0
    twist: str = "none"


@functools.lru_cache(maxsize=64)
def build(spec: ModelSpec, device: str = "cpu") -> nn.Module:
    """The unpatched model, with biases and norms away from their initial zeros and ones, which would hide a bias or a
    norm that is missing."""
    model = native_model(
        spec.family,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        layers=spec.layers,
        # torch rounds the last elements of an activation otherwise than those that fill a pair of vectors (32 with
        # AVX-512): masks that are to have equal logits fill them.
        intermediate_size=64 if spec.twist == "flat" else 48,
        seed=spec.seed,
    )
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.lm_head.weight.mul_(spec.sharpness)
        if spec.twist == "twins":
            model.lm_head.weight[VOCAB // 2 :] = model.lm_head.weight[: VOCAB // 2].clone()
        if spec.twist == "flat":
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
    return model.requires_grad_(False).to(device)


@functools.lru_cache(maxsize=64)
def network(spec: ModelSpec, dtype: torch.dtype = torch.float64) -> oracles.Network:
    return oracles.Network(build(spec), dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `generate`, and everything an oracle needs to answer it."""

    seed: int
    model: ModelSpec
    diffusion: dlm_fast.DiffusionConfig
    preset: str
    options: dict[str, Any]
    prompts: list[list[int]] | None
    canvas: list[list[int]] | None
    max_new_tokens: list[int]
    min_new_tokens: list[int]
    temperature: list[float]
    noise_seed: int
    request_ids: list[int]
    banned: tuple[int, ...]

    def patched(self, backend: str | dlm_fast.Ops, device: str) -> dlm_fast.PatchHandle:
        return attach(
            build(self.model, device), backend=backend, diffusion=self.diffusion, plain_mode=self.diffusion.plain_mode
        )

    def generate(self, backend: str | dlm_fast.Ops = "reference", device: str = "cpu") -> dlm_fast.GenerateOutput:
        """The decode by our loop."""
        with self.patched(backend, device) as handle:
            return dlm_fast.generate(
                handle.model,
                self.prompts,
                canvas=self.canvas,
                preset=self.preset,
                max_new_tokens=self.max_new_tokens if self.canvas is None else None,
                min_new_tokens=self.min_new_tokens,
                temperature=self.temperature,
                seed=self.noise_seed,
                request_ids=self.request_ids,
                banned_token_ids=self.banned,
                **self.options,
            )

    def __len__(self) -> int:
        return len(self.max_new_tokens)

    def canvas_of(self, b: int) -> list[int]:
        return self.canvas[b] if self.canvas is not None else self.prompts[b] + [MASK] * self.max_new_tokens[b]

    def oracle(self, b: int, *, follow: tuple | None = None, cached: bool = True, **changes: Any) -> oracles.Row:
        """What the specification says about row b."""
        preset = dataclasses.replace(dlm_fast.PRESETS[self.preset], **{**self.options, **changes})
        canvas = self.canvas_of(b)
        masked = [p for p, token in enumerate(canvas) if token == MASK]
        first = masked[0] if masked else len(canvas)
        length = preset.block_length or self.diffusion.block_length or max(1, len(canvas) - first)
        quota = oracles.quota(preset.steps_per_block or length, length if preset.quota_of == "block" else None)
        kmin = quota if preset.min_unmask is None else preset.min_unmask
        rule = {
            "quota": lambda: quota,
            "threshold": lambda: oracles.threshold(preset.threshold, preset.inclusive, kmin),
            "factor": lambda: oracles.factor(preset.factor, kmin),
            "entropy": lambda: oracles.entropy_budget(preset.entropy_bound, preset.inclusive, kmin),
        }[preset.rule]()

        def address(position: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor([self.noise_seed]), torch.tensor(
                [[self.request_ids[b], position, step]], dtype=torch.int32
            )

        settings = oracles.Settings(
            mask_id=MASK,
            block_length=length,
            rule=rule,
            score=preset.score,
            banned=lambda p: (
                *self.banned,
                *(self.diffusion.eos_token_ids if p < first + self.min_new_tokens[b] else ()),
            ),
            stop_ids=self.diffusion.eos_token_ids,
            stop=preset.stop,
            temperature=self.temperature[b],
            noise=lambda p, s: noise.gumbel(noise.row_key(*address(p, s)), torch.arange(VOCAB), torch.float64)[0],
            random_score=lambda p, s: noise.uniform_scores(*address(p, s)).item(),
        )
        if self.diffusion.visibility == "full":
            isolated = self.diffusion.prompt_isolated
            return oracles.decode_full(network(self.model), canvas, settings, preset.cache, follow, isolated=isolated)
        return oracles.decode_block_causal(
            network(self.model),
            canvas,
            settings,
            self.diffusion.block_alignment,
            preset.cache if cached and preset.cache != "none" else None,
            follow,
        )


def first_difference(ours: tuple[list[int], list[int]], theirs: tuple[list[int], list[int]]) -> int | None:
    """The first denoise step at which two decodes of a row, (tokens, unmask_step) each, wrote different tokens or
    positions; None where they never did."""
    unwritten = 1 << 30
    steps = [
        min(a if a >= 0 else unwritten, b if b >= 0 else unwritten)
        for x, a, y, b in zip(*ours, *theirs, strict=True)
        if (x, a) != (y, b)
    ]
    return min(steps, default=None)


def near_tie(case: Case, b: int, ours: dlm_fast.GenerateOutput, step: int, **changes: Any) -> bool:
    """Whether row b of `ours`, replayed in float64 up to denoise step `step`, stood within the bounds of another
    decision there."""
    replay = case.oracle(b, follow=(ours.canvas[b].tolist(), ours.unmask_step[b].tolist()), **changes)
    scale = max(1.0, case.model.sharpness)
    return replay.token_margins[step] < LOGIT_BOUND * scale or replay.score_margins[step] < SCORE_BOUND


def random_model(rng: random.Random, small: bool) -> ModelSpec:
    heads, kv_heads = rng.choice(GQA[rng.choice((1, 4, 7))])
    if small and kv_heads > 1:
        heads, kv_heads = (2 * heads // kv_heads, 2) if heads == kv_heads else (heads // kv_heads, 1)
    return ModelSpec(
        family=rng.choice(("llama", "qwen2", "qwen3")),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=rng.choice((16, 32)),
        layers=2 if small else rng.choice((2, 2, 3)),
        seed=rng.randrange(3),
        sharpness=rng.choice((1.0, 2.0, 4.0)),
        twist=rng.choice(("none", "none", "none", "twins", "flat")),
    )


def random_rule(rng: random.Random, preset: str) -> dict[str, Any]:
    """Options that keep the preset's own rule half of the time, at numbers where a toy model takes both branches."""
    preset_rule = dlm_fast.PRESETS[preset].rule
    rule = preset_rule if rng.random() < 0.5 else rng.choice(("quota", "threshold", "factor", "entropy"))
    options: dict[str, Any] = {"rule": rule} if rule != preset_rule else {}
    if rule == "quota":
        options["steps_per_block"] = rng.choice((None, 1, 2, 3, 7))
    if rule == "threshold":
        options["threshold"] = rng.choice((0.15, 0.3, 0.5, 0.8))
        options["score"] = rng.choice(("confidence", "confidence", "margin"))
        if rng.random() < 0.2:  # dParallel: the entropy is at most so much
            options |= {"score": "neg_entropy", "threshold": rng.choice((-2.5, -1.5, -0.5)), "inclusive": True}
    if rule == "factor":
        options["factor"] = rng.choice((0.5, 1.0, 1.7))
    if rule == "entropy":
        options["entropy_bound"] = rng.choice((0.3, 1.5, 4.0))
        options["score"] = rng.choice(("neg_entropy", "confidence", "margin"))
    if rule in ("quota", "factor"):
        options["score"] = rng.choice(
            ("confidence", "confidence", "margin", "neg_entropy", "random") if rule == "quota" else ("confidence",)
        )
    if rng.random() < 0.4:
        inclusive = rng.random() < 0.5
        options |= {"inclusive": inclusive} if rule in ("threshold", "entropy") else {}
    if rule != "quota" and rng.random() < 0.3:
        minimum, steps = rng.choice((1, 2, 3, None)), rng.choice((1, 2, 4))
        options |= {"min_unmask": minimum} if minimum else {"min_unmask": None, "steps_per_block": steps}
    return options


def random_case(seed: int, *, preset: str | None = None, rows: int | None = None, small: bool = False) -> Case:
    """A case that depends on its arguments only: every preset and rule, GQA 1, 4 and 7, prompt lengths 1 and
    block_length +- 1, ragged batches, fixed tokens in the middle, early EOS, sampling, banned ids. With `small`, the
    model has few layers and heads and the case few tokens, for the interpreter."""
    rng = random.Random(f"decode {seed}")
    preset = preset or rng.choice(FULL_PRESETS + BLOCK_PRESETS)
    visibility = dlm_fast.PRESETS[preset].visibility
    block_length = rng.choice((2, 3, 3, 4, 5) if small else (1, 2, 3, 4, 5, 8))
    eos = tuple(sorted({EOS, *rng.sample(range(2, VOCAB), rng.choice((0, 0, 1, 6)))}))
    diffusion = dlm_fast.DiffusionConfig(
        mask_token_id=MASK,
        eos_token_ids=eos,
        visibility=visibility,
        block_length=block_length if visibility == "block" else None,
        block_alignment=rng.choice(("abs", "rel")),
    )
    options = random_rule(rng, preset)
    if visibility == "full":
        options["block_length"] = rng.choice((block_length, block_length, None)) if preset == "llada" else block_length
    if rng.random() < 0.3:
        options["stop"] = rng.choice(("never", "after_block"))
    if visibility == "block" and rng.random() < 0.15:
        options["cache"] = "none"
    if dlm_fast.PRESETS[preset].tempered:
        # Tempered statistics are what the transcriptions are for (tests/support/transcriptions).
        options["tempered"] = False
    B = rows or rng.choice((3, 4, 5))
    lengths = [
        max(1, rng.choice((1, block_length - 1, block_length, block_length + 1, rng.randint(1, 9 if small else 17))))
        for _ in range(B)
    ]
    plain = [token for token in range(2, VOCAB) if token not in eos]
    prompts = [[rng.choice(plain) for _ in range(n)] for n in lengths]
    new = [rng.randint(1, 7 if small else 11) for _ in range(B)]
    canvas = None
    if rng.random() < 0.25:  # infilling: fixed tokens, EOS among them, anywhere
        canvas = [
            p + [rng.choice((MASK, MASK, MASK, rng.choice(plain), EOS)) for _ in range(n)] for p, n in zip(prompts, new)
        ]
    elif visibility == "block":
        # A near-tie is judged by replaying all that was decoded, so no output may be cut here; whole last blocks are
        # what the transcriptions are for.
        options["last_block"] = "crop"
    sampled = rng.random() < 0.35
    return Case(
        seed=seed,
        model=random_model(rng, small),
        diffusion=diffusion,
        preset=preset,
        options=options,
        prompts=None if canvas else prompts,
        canvas=canvas,
        max_new_tokens=new,
        min_new_tokens=[rng.choice((0, 0, rng.randint(0, n))) for n in new] if rng.random() < 0.3 else [0] * B,
        temperature=[rng.choice((0.0, 0.3, 1.0)) for _ in range(B)] if sampled else [0.0] * B,
        noise_seed=rng.randrange(2**40),
        request_ids=rng.sample(range(1000), B),
        banned=tuple(rng.sample(range(VOCAB), rng.choice((0, 0, 5)))),
    )
