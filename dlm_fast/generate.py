"""The decode loop: `generate` -> `_decode` -> `denoise_step`. One loop for every preset."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from dlm_kernels import RowState
from dlm_kernels.reference.noise import uniform_scores
from torch import Tensor, nn

from . import requests
from .patching import PatchHandle, handle_of
from .presets import Preset, resolve
from .requests import Requests
from .schedule import Plan, lane_positions, open_rows, phase_counts, window_of


class DecodeError(RuntimeError):
    """A decode that could not be finished. `output` holds every row as far as it got; `rows` the rows that failed."""

    def __init__(self, message: str, output: GenerateOutput, rows: list[int]) -> None:
        super().__init__(message)
        self.output = output
        self.rows = rows


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What was decoded and what it cost; one entry per prompt, in order.

    Attributes:
        sequences: generated ids up to and excluding the first EOS (or the stop string's end); 1-D int64.
        text: the same as text; None without a tokenizer.
        canvas: the whole canvas, given tokens included, as the loop left it; 1-D int64.
        finish: "eos", "stop" (a stop string), "length", or "error" (see DecodeError).
        nfe: forwards the row took part in, prefill, refreshes and commits included.
        query_tokens: positions computed over those forwards.
        tpf: generated tokens before the first EOS / nfe.
        unmask_step: the row's denoise step at which each canvas position was written, -1 = given or not written.
        confidence: probability of each token when it was written, 0 = given or not written.
        wall_time: seconds, for the whole batch. preset: as resolved.
    """

    sequences: list[Tensor]
    text: list[str] | None
    canvas: list[Tensor]
    finish: list[str]
    nfe: list[int]
    query_tokens: list[int]
    tpf: list[float]
    unmask_step: list[Tensor]
    confidence: list[Tensor]
    wall_time: float
    preset: Preset


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Device tensors that decide draws; arguments of every step, so that a captured step serves every request.

    Attributes:
        temperature: [B] fp32, 0 = greedy. seed: [1] int64. request: [B] int32 index that keys the noise.
        banned: [K] int64 ids never drawn. eos: [E] int64. no_eos_before: [B] int32 first position that may hold an EOS,
            None where no row has such a rule.
        value: [B] fp32 of the pass test. min_unmask, steps, block_length: [B] int32.
        draws: whether any row has a temperature above 0; the only field the host knows.
    """

    temperature: Tensor
    seed: Tensor
    request: Tensor
    banned: Tensor
    eos: Tensor
    no_eos_before: Tensor | None
    value: Tensor
    min_unmask: Tensor
    steps: Tensor
    block_length: Tensor
    draws: bool


def denoise_step(handle: PatchHandle, plan: Plan, state: RowState, sampling: Sampling, cache: Any, kind: str) -> None:
    """One forward and what follows from it, in place, with no host read: window -> model -> confidence -> unmask.

    Args:
        kind: "wide" (prefill or refresh) or "window"; rows that need the other kind are left unchanged.
    """
    window = window_of(plan, state, kind)
    input_ids = state.tokens.gather(1, window.q_pos.long())
    hidden = handle.adapter.window_hidden(handle.model, input_ids, handle.step(window, cache if plan.capacity else None))

    position = lane_positions(plan, state)
    inside = (position < state.block_end[:, None]) & (window.q_len > 0)[:, None]
    held = state.tokens.gather(1, position.clamp(max=state.tokens.shape[1] - 1).long())
    needed = inside & (held == plan.diffusion.mask_token_id)
    if kind == "wide" and plan.preset.cache == "commit":
        stats = _no_stats(position)
    else:
        stats = _statistics(handle, plan, state, sampling, hidden, window.q_pos, position, needed)
    handle.ops.unmask(
        state,
        plan.preset.unmask_rule(),
        kind=kind,
        query_len=window.q_len,
        value=sampling.value,
        min_unmask=sampling.min_unmask,
        steps=sampling.steps,
        block_length=sampling.block_length,
        mask_id=plan.diffusion.mask_token_id,
        stop_ids=sampling.eos,
        **stats,
    )


def _no_stats(position: Tensor) -> dict[str, Tensor]:
    """Statistics of a prefill: it writes no token."""
    none = torch.zeros(position.shape, dtype=torch.float32, device=position.device)
    return {"pred": torch.zeros_like(position, dtype=torch.int64), "score": none, "confidence": none, "entropy": none}


def _statistics(
    handle: PatchHandle,
    plan: Plan,
    state: RowState,
    sampling: Sampling,
    hidden: Tensor,
    q_pos: Tensor,
    position: Tensor,
    needed: Tensor,
) -> dict[str, Tensor]:
    """pred, score, confidence, ... [B, lanes] of the block's lanes from the window's hidden states [B, W, d]."""
    B, W, d = hidden.shape
    lanes = plan.lanes
    offset = (position - q_pos[:, :1]).clamp(0, W - 1).long()
    rows_hidden = hidden.gather(1, offset[..., None].expand(B, lanes, d)).flatten(0, 1)
    logits = handle.adapter.head(handle.model, rows_hidden)

    index = torch.arange(B * lanes, dtype=torch.int32, device=hidden.device)
    rows = torch.where(needed.flatten(), index, -1).int()
    banned = sampling.banned
    if sampling.no_eos_before is not None:
        too_early = position < sampling.no_eos_before[:, None]
        not_yet = torch.where(too_early.view(-1, 1), sampling.eos, -1)
        banned = torch.cat([banned.expand(B * lanes, -1), not_yet], -1)
    score = plan.preset.score
    noise = None
    if sampling.draws or score == "random":
        noise = torch.stack([sampling.request[:, None].expand_as(position), position, state.step[:, None].expand_as(position)], -1)
        noise = noise.flatten(0, 1)
    outputs = (
        *(("second",) if score == "margin" else ()),
        *(("entropy",) if score == "neg_entropy" or plan.preset.rule == "entropy" else ()),
        *(("sampled",) if sampling.draws else ()),
    )
    drawn = {}
    if sampling.draws:
        drawn = {"sample_temperature": sampling.temperature.repeat_interleave(lanes), "seed": sampling.seed, "noise": noise}
    stats = handle.ops.confidence(logits, rows=rows, outputs=outputs, banned=banned, **drawn)

    def lanes_of(tensor: Tensor) -> Tensor:
        return tensor.view(B, lanes)

    token, confidence = (stats.sampled_token, stats.sampled_confidence) if sampling.draws else (stats.token, stats.confidence)
    if score == "margin":
        ranked = stats.margin
    elif score == "neg_entropy":
        ranked = -stats.entropy
    elif score == "random":
        ranked = uniform_scores(sampling.seed, noise)
    else:
        ranked = confidence
    result = {"pred": token, "score": ranked, "confidence": confidence, "stat_error": stats.error}
    if plan.preset.rule == "entropy":
        result["entropy"] = stats.entropy
    return {name: lanes_of(tensor) for name, tensor in result.items()}


class _Progress:
    """Which kinds of step rows still need, read by the host from a pinned copy that may be one step old.

    A kind that only wide steps can serve is known to be served as soon as one was launched, so a late count never asks
    for a second wide forward that nobody needs.
    """

    def __init__(self, state: RowState, late: int) -> None:
        self.late = late
        self.pending: list[tuple[Tensor, Any]] = []
        self.wide, self.window = phase_counts(state).tolist()

    def record(self, state: RowState, kind: str) -> None:
        if kind == "wide":
            self.window, self.wide = self.window + self.wide, 0
        counts = phase_counts(state)
        if counts.device.type != "cuda":
            self.pending.append((counts, None))
            return
        host = torch.empty(2, dtype=torch.int32, pin_memory=True)
        host.copy_(counts, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append((host, event))

    def next_kind(self) -> str | None:
        while len(self.pending) > self.late:
            counts, event = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            self.wide, self.window = counts.tolist()
        return "wide" if self.wide else "window" if self.window else None


@torch.no_grad()
def _decode(
    handle: PatchHandle,
    plan: Plan,
    state: RowState,
    sampling: Sampling,
    after_step: Callable[[RowState], None] | None,
) -> None:
    """Runs steps until no row needs one. Bounded: every window step writes at least one token of each row, or commits."""
    B, L = state.tokens.shape
    cache = handle.adapter.new_cache(handle.model, B, plan.capacity) if plan.capacity else None
    # A wide step that nobody needs costs a forward of everything, so only decoders that never repeat one run a step late.
    late = int(state.tokens.is_cuda and plan.preset.cache in ("none", "commit") and after_step is None)
    progress = _Progress(state, late)
    limit = 4 * L + 4 * B + 8
    for _ in range(limit * max(1, B)):
        kind = progress.next_kind()
        if kind is None:
            return
        denoise_step(handle, plan, state, sampling, cache, kind)
        if after_step is not None:
            after_step(state)
        progress.record(state, kind)
    raise AssertionError(f"decode loop made no progress within {limit * max(1, B)} steps")


def generate(
    model: nn.Module,
    prompts: Sequence[Any] | None = None,
    *,
    canvas: Sequence[Any] | Tensor | None = None,
    preset: str | Preset | None = None,
    max_new_tokens: int | Sequence[int] | None = None,
    min_new_tokens: int | Sequence[int] = 0,
    temperature: float | Sequence[float] = 0.0,
    seed: int = 0,
    request_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    banned_token_ids: Sequence[int] = (),
    eos_token_ids: Sequence[int] | None = None,
    tokenizer: Any = None,
    on_step: Callable[[RowState], None] | None = None,
    **options: Any,
) -> GenerateOutput:
    """Completes every prompt (or fills every canvas) by diffusion decoding. A batch equals its rows run alone.

    Args:
        model: from `dlm_fast.load`, or patched by `dlm_fast.patch` with a diffusion configuration.
        prompts: a list of strings, chats (lists of {"role", "content"}) or token-id sequences, of any lengths >= 1.
        canvas: instead of prompts: token-id sequences that hold the mask id wherever a token is wanted (infilling).
        preset: a name of `dlm_fast.PRESETS` or a `Preset`; default "llada" or "sdar" by the model's visibility.
        **options: replace the preset's: block_length, cache, rule, threshold, factor, entropy_bound, inclusive, score,
            min_unmask, steps_per_block, stop. Unknown ones raise.
        max_new_tokens, min_new_tokens: per call or per row; an EOS is not drawn before min_new_tokens. max_new_tokens is
            128 by default, and refused with `canvas`, which says itself where tokens are wanted.
        temperature: per call or per row, 0 = greedy. Draws are a function of (seed, request id, position, step) only.
        request_ids: what keys each row's noise; default 0, 1, 2, ... Confidences are those of the drawn token without
            temperature (LLaDA, arXiv:2502.09992).
        stop_strings: a row ends where one appears in its text (excluded). Costs a host read per step.
        banned_token_ids: never drawn, besides the mask id. eos_token_ids: default the model's.
        tokenizer: default the one that `load` found. on_step: called after every step with the state (host reads allowed).
    Returns:
        GenerateOutput.
    Raises:
        ValueError, TypeError: bad arguments, each naming argument, rule and value; nothing is decoded then.
        DecodeError: logits with NaN; it holds what was decoded.
    """
    handle = handle_of(model)
    if handle.diffusion is None:
        raise ValueError("generate: the model has no diffusion configuration; pass diffusion= to dlm_fast.patch or load")
    tokenizer = tokenizer if tokenizer is not None else handle.tokenizer
    chosen = resolve(preset, handle.diffusion.visibility, options)
    batch = requests.read(
        handle.diffusion,
        vocab_size=model.config.vocab_size,
        max_positions=model.config.max_position_embeddings,
        tokenizer=tokenizer,
        prompts=prompts,
        canvas=canvas,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        seed=seed,
        request_ids=request_ids,
        stop_strings=stop_strings,
        banned_token_ids=banned_token_ids,
        eos_token_ids=eos_token_ids,
    )
    device = next(model.parameters()).device
    started = time.perf_counter()
    plan, state = open_rows(batch.canvases, chosen, handle.diffusion, device)
    if len(batch.canvases):
        stopper = requests.StopStrings(batch, tokenizer, handle.diffusion) if batch.stop_strings else None

        def after_step(state: RowState) -> None:
            if stopper is not None:
                stopper(state)
            if on_step is not None:
                on_step(state)

        hook = after_step if stopper is not None or on_step is not None else None
        _decode(handle, plan, state, _sampling(batch, plan, device), hook)
    output = _output(batch, state, tokenizer, handle.diffusion, chosen, time.perf_counter() - started)
    failed = state.error.nonzero().flatten().tolist()
    if failed:
        raise DecodeError(
            f"generate: the model's logits must be finite with a token to draw, got NaN, +inf or no candidate in rows {failed}",
            output,
            failed,
        )
    return output


def _sampling(batch: Requests, plan: Plan, device: torch.device) -> Sampling:
    B = len(batch.canvases)

    def rows(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).expand(B).contiguous().to(device)

    preset = plan.preset
    no_eos_before = [p + m for p, m in zip(batch.prompt_lengths, batch.min_new_tokens)]
    return Sampling(
        temperature=rows(batch.temperature, torch.float32),
        seed=torch.tensor([batch.seed], dtype=torch.int64, device=device),
        request=rows(batch.request_ids, torch.int32),
        banned=torch.tensor([plan.diffusion.mask_token_id, *batch.banned_token_ids], dtype=torch.int64, device=device),
        eos=torch.tensor(batch.eos_token_ids, dtype=torch.int64, device=device),
        no_eos_before=rows(no_eos_before, torch.int32) if any(batch.min_new_tokens) else None,
        value=rows(preset.value, torch.float32),
        min_unmask=rows(preset.min_unmask or 1, torch.int32),
        steps=rows(preset.steps_per_block or plan.block_length, torch.int32),
        block_length=rows(plan.block_length, torch.int32),
        draws=any(t > 0 for t in batch.temperature),
    )


def _output(batch: Requests, state: RowState, tokenizer: Any, diffusion: Any, preset: Preset, seconds: float) -> GenerateOutput:
    tokens, steps, confidence = state.tokens.cpu(), state.unmask_step.cpu(), state.unmask_confidence.cpu()
    nfe, query_tokens = state.nfe.tolist(), state.query_tokens.tolist()
    ends = [requests.response(batch, b, tokens[b], steps[b], tokenizer, diffusion) for b in range(len(batch.canvases))]
    lengths = [len(c) for c in batch.canvases]
    return GenerateOutput(
        sequences=[end.ids for end in ends],
        text=[end.text for end in ends] if tokenizer is not None else None,
        canvas=[tokens[b, :n] for b, n in enumerate(lengths)],
        finish=["error" if error else end.finish for end, error in zip(ends, state.error.tolist())],
        nfe=nfe,
        query_tokens=query_tokens,
        tpf=[end.written / n if n else 0.0 for end, n in zip(ends, nfe)],
        unmask_step=[steps[b, :n] for b, n in enumerate(lengths)],
        confidence=[confidence[b, :n] for b, n in enumerate(lengths)],
        wall_time=seconds,
        preset=preset,
    )
