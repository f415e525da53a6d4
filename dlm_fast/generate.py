"""The decode loop: `generate` opens a batch, `run_steps` runs it, `denoise_step` is one step. One loop for every
preset."""

from __future__ import annotations

import bisect
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlm_kernels import RowState
from dlm_kernels.state import ERROR_LOGITS

from . import requests
from .decoding.plan import Plan, open_rows
from .decoding.progress import run_steps
from .decoding.step import open_decode
from .patching import handle_of
from .policies import Sampling
from .presets import Preset, resolve
from .requests import Requests
from .stopper import Stopper


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
        sequences: generated ids up to and excluding the first EOS or special token that is a stop string; 1-D int64.
            Where a stop string ends the row, the fewest ids whose text begins with `text`.
        text: `tokenizer.decode(sequences, skip_special_tokens=True)`, cut where the first stop string begins; None
            without a tokenizer. The cut takes something away only where the last id spells both an end of `text` and a
            beginning of the stop string: no id spells less.
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


def generate(
    model: nn.Module,
    prompts: Sequence[Any] | None = None,
    *,
    canvas: Sequence[Any] | Tensor | None = None,
    attention_mask: Any = None,
    preset: str | Preset | None = None,
    policy: Any = None,
    max_new_tokens: int | Sequence[int] | None = None,
    min_new_tokens: int | Sequence[int] = 0,
    temperature: float | Sequence[float] = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
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

    That is exact of every op and decision; torch's matrix products may round a row differently in a batch of another
    shape. In float32 only near-ties can tell. In bf16 and fp16 tokens can differ, and are bitwise independent of what
    the neighbours hold where the shapes are the same: rows, lengths, and the widths of windows, which follow the rows
    with cache "scattered", pipelines and drafts.

    Args:
        model: from `dlm_fast.load`, or patched by `dlm_fast.patch` with a diffusion configuration; in eval mode,
            outside autocast.
        prompts: strings, chats (lists of {"role", "content"}) or token ids (lists, 1-D tensors or arrays), of any
            lengths >= 1; or a tokenizer's result, whose ids are taken where its attention_mask is 1; or a 2-D tensor or
            array [B, L] of ids.
        canvas: instead of prompts, in the same forms: ids (or text) that hold the mask wherever a token is wanted
            (infilling). The response begins at the first mask; `text` and `sequences` hold what was given after it too.
        attention_mask: [B, L] of 0 and 1 beside token ids, 0 = padding, at either end of a row. Without it a 2-D tensor
            with the tokenizer's pad id at an end of a row is refused; lists of ids are taken as they are.
        preset: a name of `dlm_fast.PRESETS` or a `Preset`; default "llada" or "sdar" by the model's visibility.
        policy: what modifies the preset's rule: a function `(view, choice) -> choice` (or the positions to write, or a
            score), a `dlm_fast.policies.Policy`, or a list of them; they act after the preset's own.
        **options: replace the preset's (`preset.options()` lists them): block_length, cache, rule, threshold, ...
            Unknown ones raise, and so do those that the decoder would not read (a threshold where the rule is a quota).
        max_new_tokens, min_new_tokens: per call or per row; an EOS is not drawn before min_new_tokens. max_new_tokens
            is 128 by default, and refused with `canvas`, which says itself where tokens are wanted.
        temperature: per call or per row, 0 = greedy. Draws are a function of (seed, request id, position, step) only.
        request_ids: what keys each row's noise; default 0, 1, 2, ... Confidences are those of the drawn token without
            temperature (LLaDA, arXiv:2502.09992) unless the preset is `tempered`.
        top_k, top_p: draw among the most likely tokens only; 0 and 1.0 are off. Plain torch, which sorts the
            vocabulary. Rows of temperature 0 draw nothing and are as without them, unless the preset has
            `greedy_filters`.
        stop_strings: the text ends where the earliest of them begins; a special token among them is found by its id.
            The same text as without them, cut; a row ends early once that is certain, so only by finished blocks where
            a decoder edits or takes tokens back. Costs a host read per step.
        banned_token_ids: never drawn, besides the mask id. eos_token_ids: default the model's.
        tokenizer: default the one that `load` found. on_step: called after every step with the state (host reads
            allowed).
    Returns:
        GenerateOutput.
    Raises:
        ValueError, TypeError: bad arguments, each naming argument, rule and value; nothing is decoded then.
        DecodeError: logits with NaN, or a policy that makes no progress; it holds what was decoded.
        NotImplementedError: the preset's model family is not here yet.
        RuntimeError: the patch is not in place any more, so that a layer attended otherwise.
    """
    if preset is not None and not isinstance(preset, (str, Preset)):
        raise TypeError(f"generate: preset must be a name of dlm_fast.PRESETS or a Preset, got preset={preset!r}")
    if on_step is not None and not callable(on_step):
        raise TypeError(f"generate: on_step must be a function of the state, got on_step={on_step!r}")
    handle = handle_of(model)
    if handle.diffusion is None:
        raise ValueError(
            "generate: the model has no diffusion configuration; pass diffusion= to dlm_fast.patch or load"
        )
    check_mode(model)
    tokenizer = tokenizer if tokenizer is not None else handle.tokenizer
    chosen = resolve(preset, handle.diffusion.visibility, options, policy)
    requests.check_support(chosen, handle.diffusion)
    batch = requests.read(
        handle.diffusion,
        vocab_size=model.config.vocab_size,
        max_positions=model.config.max_position_embeddings,
        tokenizer=tokenizer,
        prompts=prompts,
        canvas=canvas,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        request_ids=request_ids,
        stop_strings=stop_strings,
        banned_token_ids=banned_token_ids,
        eos_token_ids=eos_token_ids,
    )
    check_greedy(chosen, batch.temperature, batch.top_k, batch.top_p)
    device = next(model.parameters()).device
    started = time.perf_counter()
    plan, state = open_rows(batch.canvases, chosen, handle.diffusion, device)
    if len(batch.canvases):
        takes_back = bool(chosen.families & {"edit", "revise"})
        stopper = Stopper(batch, handle.diffusion.mask_token_id, takes_back) if batch.stop_strings is not None else None

        def after_step(state: RowState) -> None:
            if stopper is not None:
                stopper(state)
            if on_step is not None:
                on_step(state)

        hook = after_step if stopper is not None or on_step is not None else None
        run_steps(open_decode(handle, plan, state, sampling_of(batch, plan, device)), hook)
    output = _output(batch, state, tokenizer, handle.diffusion, chosen, time.perf_counter() - started)
    failed = state.error.nonzero().flatten().tolist()
    if failed:
        raise DecodeError(_failure(state, failed), output, failed)
    return output


def check_mode(model: nn.Module) -> None:
    """Raises ValueError where a decode would not be the model's own: a module in training mode (dropout), or
    autocast."""
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = "" if model.training else f" in {training[0]}"
        raise ValueError(f"generate: the model must be in eval mode, got training=True{where}; call model.eval()")
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        raise ValueError(
            f"generate: autocast must be off, got torch.autocast({device!r}, {torch.get_autocast_dtype(device)}); "
            "decode under "
            f"torch.autocast({device!r}, enabled=False), and a model of that dtype for its speed"
        )


def check_greedy(preset: Preset, temperature: Sequence[float], top_k: int, top_p: float) -> None:
    """Raises ValueError for draws or filters that a decoder of greedy predictions cannot make."""
    if preset.drafts > 1 and any(t > 0 for t in temperature):
        raise ValueError(
            f"generate: drafts are lossless for greedy decoding only, got temperature={max(temperature):g}"
        )
    if any(policy.greedy_only for policy in preset.policies) and (any(temperature) or top_k or top_p < 1):
        got = f"temperature={max(temperature, default=0.0):g}, top_k={top_k}, top_p={top_p}"
        raise ValueError(f"generate: preset {preset.name} decodes greedily, got {got}")


def _failure(state: RowState, rows: list[int]) -> str:
    broken = [row for row in rows if int(state.error[row]) & ERROR_LOGITS]
    stalled = [row for row in rows if row not in broken]
    said = []
    if broken:
        said.append(
            f"the model's logits must be finite with a token to draw, got NaN, +inf or no candidate in rows {broken}"
        )
    if stalled:
        said.append(
            f"a policy must fill its blocks, got no end within max_steps={int(state.step[stalled[0]])} denoise steps "
            f"in rows {stalled}"
        )
    return "generate: " + "; ".join(said)


def sampling_of(batch: Requests, plan: Plan, device: torch.device) -> Sampling:
    """The device tensors that decide draws, quotas and thresholds of a batch."""
    B = len(batch.canvases)

    def rows(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).expand(B).contiguous().to(device)

    preset = plan.preset
    no_eos_before = [p + m for p, m in zip(batch.prompt_lengths, batch.min_new_tokens)]
    spans = [len(canvas) - start for canvas, start in zip(batch.canvases, plan.first.tolist())]
    # Where a row is one block, the batch's longest one must not decide its schedule.
    whole = preset.single_block or (preset.block_length or plan.diffusion.block_length) is None
    steps = [preset.steps_per_block or (max(1, span) if whole else plan.block_length) for span in spans]
    transfer = None
    if preset.by_share:
        transfer = torch.zeros(B, max(steps), dtype=torch.float32)
        for b, S in enumerate(steps):
            t = torch.linspace(1, preset.schedule_eps, S + 1, dtype=torch.float32)
            transfer[b, :S] = 1 - t[1:] / t[:-1]
        transfer = transfer.to(device)
    # A safety net, not a schedule: the bounds of every policy (tests/decoding/test_policy_bounds.py) are below it.
    edits = max((getattr(policy, "max_post_edits", 0) for policy in preset.policies), default=0)
    a_block = 2 * max(plan.block_length, *steps) + edits + 8
    max_steps = [min(a_block * (-(-span // plan.block_length) + 1), 2**30) for span in spans]

    def masks_at(share: float) -> int | None:
        """The most masks at which a block of the full length is filled to `share`."""
        length = plan.block_length
        return bisect.bisect_right(range(length + 1), -share, key=lambda masks: -(length - masks) / length) - 1

    pipeline = preset.pipeline
    return Sampling(
        temperature=rows(batch.temperature, torch.float32),
        seed=torch.tensor([batch.seed], dtype=torch.int64, device=device),
        request=rows(batch.request_ids, torch.int32),
        banned=torch.tensor([plan.mask_id, *batch.banned_token_ids], dtype=torch.int64, device=device),
        eos=torch.tensor(batch.eos_token_ids, dtype=torch.int64, device=device),
        no_eos_before=rows(no_eos_before, torch.int32) if any(batch.min_new_tokens) else None,
        value=rows(preset.value, torch.float32),
        min_unmask=rows(1 if preset.min_unmask is None else preset.min_unmask, torch.int32),
        steps=rows(steps, torch.int32),
        block_length=rows(plan.block_length, torch.int32),
        max_steps=rows(max_steps, torch.int32),
        transfer=transfer,
        append_masks=rows(masks_at(preset.append_threshold), torch.int32) if pipeline else None,
        activate_masks=rows(masks_at(preset.activate_threshold), torch.int32) if pipeline else None,
        delay=rows(preset.commit_delay, torch.int32) if plan.cache.commit_selects else None,
        top_k=batch.top_k,
        top_p=batch.top_p,
        draws=any(t > 0 for t in batch.temperature),
    )


def _output(
    batch: Requests, state: RowState, tokenizer: Any, diffusion: Any, preset: Preset, seconds: float
) -> GenerateOutput:
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
