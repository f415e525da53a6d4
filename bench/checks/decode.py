"""Whole decodes, Triton against the reference on the same device: random toy models, and the embedded tiny models where
the checkout has them.

The two are compared token for token. A row that differs is excused where the reference itself decided by a hair: two
float32 computations of one model differ in the last bits, and neither may be blamed for a decision between candidates
that lie closer than that. `Watch` measures how close every decision was. Trained models are certain of most tokens, so
that nearly every row holds such a decision: what is equal is compared all the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import dlm_fast
from dlm_fast import Ops
from dlm_fast.loading import CheckpointError
from dlm_fast.ops import REFERENCE
from dlm_fast.patching import attach
from dlm_fast.tiny.tasks import TASKS, held_out
from dlm_kernels import RowState, UnmaskInputs, UnmaskRule, reference
from dlm_kernels.reference import noise as random_numbers
from dlm_kernels.reference.select import rank_order
from dlm_kernels.testing import Failure

from ..quality import MAX_NEW_TOKENS, Setting, settings
from .run import Case, Sizes, Skip, generator

# In logits, probabilities and nats: well above float32 rounding through a few layers, well below most decisions.
CLEAR = 1e-4
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
VOCAB, MASK, EOS = 200, 0, 1
# (family, query heads, key/value heads, head dim, preset, options)
DECODES = (
    ("qwen3", 4, 1, 16, "sdar-dynamic", {"block_length": 4, "threshold": 0.2}),
    ("qwen2", 7, 1, 16, "fast-dllm-dual", {"block_length": 5, "threshold": 0.2}),
    ("llama", 4, 4, 32, "llada", {"block_length": 16}),
    ("llama", 4, 4, 32, "fast-dllm", {"block_length": 16, "threshold": 0.2}),
    ("llama", 8, 2, 64, "fast-dllm-prefix", {"block_length": 16, "rule": "factor"}),
    ("qwen2", 7, 1, 48, "llada", {"block_length": 12, "score": "margin", "rule": "entropy", "entropy_bound": 2.0}),
    ("qwen2", 14, 2, 64, "fast-dllm", {"block_length": 16, "score": "random", "threshold": 0.5}),
    ("qwen3", 4, 1, 32, "sdar", {"block_length": 8}),
    ("qwen3", 8, 2, 128, "llada2", {"block_length": 8, "threshold": 0.2, "score": "neg_entropy"}),
    ("llama", 4, 4, 32, "llada", {"block_length": 16, "temperature": 0.8}),
)


def cases(ops: Ops, device: torch.device, sizes: Sizes, seed: int) -> Iterator[Case]:
    for family, heads, kv_heads, head_dim, preset, options in DECODES[: sizes.presets]:
        words = " ".join(f"{name}={value}" for name, value in options.items())
        name = f"{family} H={heads} H_kv={kv_heads} D={head_dim} {preset} {words}"
        model = partial(random_model, family, heads, kv_heads, head_dim, sizes.layers, seed, name)
        yield name, partial(random_decode, ops, device, seed, name, sizes, model, preset, options)
    if sizes.prompts:
        # Every preset that runs on the embedded models, as it is published.
        published = {(setting.model, setting.preset): setting for setting in reversed(settings())}
        for setting in reversed(published.values()):
            case = partial(embedded_decode, ops, device, seed, setting, sizes)
            yield f"{setting.model} {setting.preset}", case


def random_model(family: str, heads: int, kv_heads: int, head_dim: int, layers: int, seed: int, name: str) -> nn.Module:
    """A small float32 model with logits spread widely enough that near-ties are rare."""
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.3,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(generator(seed, name).initial_seed())
        return model_class(config).float().eval()


def random_decode(
    ops: Ops, device: torch.device, seed: int, name: str, sizes: Sizes, make_model, preset: str, options: dict
) -> None:
    visibility = dlm_fast.PRESETS[preset].visibility
    diffusion = dlm_fast.DiffusionConfig(
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
        visibility=visibility,
        block_length=options["block_length"],
        block_alignment="abs",
    )
    model = make_model().to(device)
    random = generator(seed, name)
    prompts = [torch.randint(2, VOCAB, (n,), generator=random).tolist() for n in sizes.prompt_lengths]
    outputs = []
    watch = Watch()
    for backend in (ops, watch.ops()):
        with attach(model, backend=backend, diffusion=diffusion, plain_mode=visibility):
            outputs.append(
                dlm_fast.generate(model, prompts, preset=preset, max_new_tokens=sizes.new_tokens, seed=seed, **options)
            )
    compare(*outputs, watch)


def embedded_decode(ops: Ops, device: torch.device, seed: int, setting: Setting, sizes: Sizes) -> None:
    outputs = []
    watch = Watch()
    for backend in (ops, watch.ops()):
        try:
            model = dlm_fast.load(setting.model, backend=backend, device=device)
        except CheckpointError as error:
            raise Skip(str(error)) from error
        samples = [sample for task in TASKS for sample in held_out(task, sizes.prompts, seed % 1000)]
        chats = [[{"role": "user", "content": sample.prompt}] for sample in samples]
        outputs.append(
            dlm_fast.generate(model, chats, preset=setting.preset, max_new_tokens=MAX_NEW_TOKENS, **setting.options)
        )
    compare(*outputs, watch)


def compare(ours: dlm_fast.GenerateOutput, expected: dlm_fast.GenerateOutput, watch: Watch) -> None:
    """Raises Failure unless every clearly decided row has the reference's tokens, steps and NFE, and most rows are
    clear or have them as well."""
    clear = (watch.gap > CLEAR).tolist()
    excused = 0
    for b in range(len(clear)):
        same = (
            ours.canvas[b].equal(expected.canvas[b])
            and ours.unmask_step[b].equal(expected.unmask_step[b])
            and ours.nfe[b] == expected.nfe[b]
        )
        if clear[b] and not same:
            differ = int((ours.canvas[b] != expected.canvas[b]).sum())
            raise Failure(
                f"row {b}: {differ} tokens differ, NFE {ours.nfe[b]} instead of {expected.nfe[b]}, "
                f"though the closest decision of the reference had a gap of {float(watch.gap[b]):.2g}"
            )
        excused += not same
    if 2 * excused > len(clear):
        raise Failure(f"{excused} of {len(clear)} rows differ, where the reference decided by a hair")


class Watch:
    """The reference ops; for every row they record the smallest gap by which any decision of its decode was taken."""

    def __init__(self) -> None:
        self.gap: Tensor | None = None  # [B]
        self._tokens: Tensor | None = None  # [B * lanes] gap between the two best candidates of each position

    def ops(self) -> Ops:
        return dataclasses.replace(
            REFERENCE,
            confidence=self._confidence,
            unmask=self._unmask,
            verify=self._verify,
            reason="watched by a check",
        )

    def _confidence(self, logits: Tensor, *, outputs: tuple[str, ...], **arguments) -> reference.Confidence:
        asked = reference.confidence(logits, outputs=outputs, **arguments)
        gap = reference.confidence(logits, rows=arguments["rows"], banned=arguments["banned"])
        self._tokens = gap.logit - gap.second_logit
        if "sampled" in outputs:
            ids = torch.arange(logits.shape[1], device=logits.device)
            temperature = arguments["sample_temperature"].clamp(min=1e-6)[:, None]
            noise = random_numbers.gumbel(random_numbers.row_key(arguments["seed"], arguments["noise"]), ids)
            banned = (ids == arguments["banned"].expand(len(logits), -1)[..., None]).any(1)
            best = torch.where(banned, -math.inf, logits / temperature + noise).topk(2, dim=1).values
            drawn = arguments["sample_temperature"] > 0
            self._tokens = torch.where(drawn, best[:, 0] - best[:, 1], self._tokens)
        self._tokens = torch.where(arguments["rows"] >= 0, self._tokens, math.inf)
        return asked

    def _unmask(self, state: RowState, rule: UnmaskRule, inputs: UnmaskInputs, *, kind: str) -> Tensor:
        score, value = inputs.score, inputs.value
        B, W = score.shape
        lane_start = state.block_start if inputs.lane_start is None else inputs.lane_start
        lane = lane_start[:, None] + torch.arange(W, device=score.device)
        inside = (
            (lane < state.block_end[:, None]) & (lane >= state.block_start[:, None]) & (inputs.query_len > 0)[:, None]
        )
        tokens = state.tokens.gather(1, lane.clamp(max=state.tokens.shape[1] - 1).long())
        eligible = inside & (tokens == inputs.mask_id)
        chosen = reference.unmask(state, rule, inputs, kind=kind) & eligible
        if self.gap is None:
            self.gap = torch.full((B,), math.inf, device=score.device)
        if not chosen.any():
            return chosen

        rank = score if inputs.rank is None else inputs.rank
        gaps = [self._cut(rule, rank, eligible, chosen, inputs.block_length)]
        if self._tokens is not None and self._tokens.numel() == B * W:
            gaps.append(torch.where(chosen, self._tokens.view(B, W), math.inf).amin(1))
        # The test that was passed or failed, position by position in rank order.
        order = rank_order(eligible, rank)
        ranked, real = score.gather(1, order), eligible.gather(1, order)
        bound = value[:, None] if value.dim() == 1 else value.gather(1, order)
        r = torch.arange(1, W + 1, device=score.device)
        distance = None
        if rule.passes == "threshold":
            distance = ranked - bound
        elif rule.passes == "factor":
            distance = ranked - (1 - bound / (r + 1))
        elif rule.passes == "entropy":
            used = torch.where(real, inputs.entropy.gather(1, order), 0.0)
            distance = used.cumsum(1) - (0 if rule.inclusive else used.cummax(1).values) - bound
        if distance is not None:
            first = rule.passes == "entropy" and not rule.inclusive  # the first position in rank order always passes
            gaps.append(torch.where(real & ~((r == 1) & first), distance.abs(), math.inf).amin(1))
        if rule.remask != "none":
            # Any two scores may decide what is taken back.
            ordered = torch.where(inside, inputs.remask_score, math.inf).sort(1).values
            steps = ordered.diff(dim=1)
            gaps.append(torch.where(steps > 0, steps, math.inf).nan_to_num(nan=math.inf, posinf=math.inf).amin(1))
        self.gap = torch.minimum(self.gap, torch.stack(gaps).amin(0))
        return chosen

    def _verify(self, source, held: Tensor, token: Tensor, score: Tensor, *arguments, **named):
        """Which drafts agree hangs on the order of the source, on the best lane of each draft, and on the tokens."""
        eligible, (B, D, W) = named["eligible"], held.shape
        order = torch.where(eligible, source.score, -math.inf).topk(min(D + 1, W), dim=1).values
        steps = -order.diff(dim=1).nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        masked = eligible[:, None] & (held == named["mask_id"])
        best = torch.where(masked, score, -math.inf).topk(min(2, W), dim=2).values
        between = (best[..., 0] - best[..., -1]).nan_to_num(nan=math.inf, posinf=math.inf)
        tokens = torch.where(masked, self._tokens.view(B, D, W), math.inf).flatten(1)
        gap = torch.cat([steps, torch.where(masked.sum(2) > 1, between, math.inf), tokens], 1).amin(1)
        gap = torch.where(named["selects"], gap, math.inf)
        self.gap = gap if self.gap is None else torch.minimum(self.gap, gap)
        return reference.verify(source, held, token, score, *arguments, **named)

    @staticmethod
    def _cut(rule, rank: Tensor, eligible: Tensor, chosen: Tensor, block_length: Tensor) -> Tensor:
        """[B]: the gap between the worst position chosen and the best one left; in a pipeline, the gap between the best
        two of any block."""
        if not rule.pipeline:
            left = eligible & ~chosen & chosen.any(1, keepdim=True)
            return torch.where(chosen, rank, math.inf).amin(1) - torch.where(left, rank, -math.inf).amax(1)
        lane = torch.arange(rank.shape[1], device=rank.device)
        smallest = torch.full_like(rank[:, 0], math.inf)
        for block in range(-(-rank.shape[1] // int(block_length.min()))):
            inside = eligible & (lane // block_length[:, None] == block)
            best = torch.where(inside, rank, -math.inf).topk(min(2, rank.shape[1]), dim=1).values
            gap = best[:, 0] - best[:, -1]
            smallest = torch.where(inside.sum(1) > 1, torch.minimum(smallest, gap), smallest)
        return smallest
