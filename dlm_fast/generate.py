"""The function `generate`: from prompts to texts, by one decode loop for every preset.

`generate` reads the arguments and opens the batch, `run_steps` runs the loop, and `denoise_step` is one step of it.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlm_kernels import RowState
from dlm_kernels.state import DONE, ERROR_LOGITS

from . import requests
from .decoding.plan import Bucket, Plan, open_rows
from .decoding.progress import StepTooLarge, run_steps
from .decoding.step import open_decode
from .patching import PatchHandle, handle_of
from .policies import Sampling
from .presets import Preset, resolve
from .requests import Requests
from .stopper import Stopper


class DecodeError(RuntimeError):
    """A decode that could not be finished.

    Attributes:
        output: the result of every row; a row that failed is there as far as its decode got, with finish "error".
        rows: indices of the rows that failed.
    """

    def __init__(self, message: str, output: GenerateOutput, rows: list[int]) -> None:
        super().__init__(message)
        self.output = output
        self.rows = rows


class DecodeOutOfMemory(DecodeError, torch.OutOfMemoryError):
    """A decode that ran out of memory in a step; the message says in which, and which steps fit.

    Attributes:
        output: the result of every row; rows that were not done are there as far as they got, with finish "unfinished".
        rows: indices of the rows that were not done.
    """


class DecodeInterrupted(KeyboardInterrupt):
    """A decode that the user interrupted.

    Attributes:
        output: the result of every row; rows that were not done are there as far as they got, with finish "unfinished".
        rows: indices of the rows that were not done.
    """

    def __init__(self, output: GenerateOutput, rows: list[int]) -> None:
        super().__init__(f"generate: interrupted, with {len(rows)} of {len(output.sequences)} rows not done")
        self.output = output
        self.rows = rows


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What a call of `generate` decoded, and what the decode cost.

    Every list has one entry per prompt, in the order of the prompts.

    Attributes:
        sequences: generated token ids, 1-D int64, up to and without the first EOS, or the first special token that is a
            stop string. Where a stop string of ordinary text ends the row, the ids are the fewest whose text begins
            with the row's `text`.
        text: `tokenizer.decode(ids, skip_special_tokens=True)` of the row, cut where the first stop string begins; None
            without a tokenizer. The text is shorter than that of `sequences` only where one id spells both the end of
            the text and the beginning of the stop string, since no smaller number of ids spells the text then.
        canvas: the whole canvas as the loop left it, the given tokens included, 1-D int64: the prompt and
            max_new_tokens positions, or those of its whole blocks where the preset drops a last block that is cut.
        finish: why the row ended: "eos", "stop" (a stop string), "length", "error" (see `DecodeError`), or "unfinished"
            (see `DecodeOutOfMemory` and `DecodeInterrupted`).
        nfe: number of forwards that the row took part in; prefills, refreshes and commits count.
        query_tokens: number of positions that were computed in those forwards.
        tpf: generated tokens before the first EOS, divided by `nfe`.
        unmask_step: for each canvas position, the row's denoise step that wrote the token; -1 = no step wrote one.
        confidence: for each canvas position, the probability of the token when it was written; 0 = no step wrote one.
        shapes: how many steps of every shape the batch took (`dlm_fast.decoding.plan.Bucket`).
        computed_tokens: number of positions that were computed in all steps, padding and rows that sat a step out
            included; above the sum of `query_tokens` by what the shapes waste.
        wall_time: seconds that the whole batch took.
        preset: the decoder as it ran, with every option that the call replaced.
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
    shapes: dict[Bucket, int]
    computed_tokens: int
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
    temperature: float | Sequence[float] | None = None,
    top_k: int = 0,
    top_p: float | None = None,
    seed: int = 0,
    request_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    banned_token_ids: Sequence[int] = (),
    eos_token_ids: Sequence[int] | None = None,
    tokenizer: Any = None,
    on_step: Callable[[RowState], None] | None = None,
    **options: Any,
) -> GenerateOutput:
    """Completes prompts, or fills the masks of canvases, by diffusion decoding.

    A canvas is a row of token ids that holds the mask token wherever a token is still to be written; the canvas of a
    prompt is the prompt with `max_new_tokens` masks behind it. A denoise step runs the model once and writes tokens
    over some of the masks. The preset, a published decoder, says which masks a step writes and what is cached.

    A row gets the tokens that it would get alone, whatever else is in the batch: every op and every decision treats
    each row by itself. Only torch's matrix products may round a row differently in a batch of another shape. In float32
    this rounding can change a token only where two candidates nearly tie. In bfloat16 and float16 the tokens of a row
    can differ from those that it gets alone. What holds there: at the same shapes (`GenerateOutput.shapes`: rows and
    width of every step that the row takes part in) a row's bits are the same whatever the other rows hold. The shapes
    follow from the lengths of all rows and from how many steps each of them has taken.

    A decode takes no gradients (`torch.no_grad`). Inside `torch.inference_mode()` the tokens are the same and every op
    costs the host less, but nothing that a hook, a policy or `on_step` keeps there can be trained on.

    A step computes the rows that take part in it, in windows about as wide as they need. A batch has at most 16 shapes
    of steps, which are planned for its rows (`dlm_fast.decoding.shapes`); prompts need not be sorted by length.

    Args:
        model: a model from `dlm_fast.load`, or one that `dlm_fast.patch` patched and that has a diffusion
            configuration. The model must be in eval mode, and autocast must be off.
        prompts: the prompts, each of at least one token: a list of strings, of chats (lists of {"role", "content"}) or
            of token ids (lists, 1-D tensors or arrays); or a tokenizer's result, of which the ids count where its
            attention_mask is 1; or a 2-D tensor or array [B, L] of ids.
        canvas: rows to fill in, instead of prompts and in the same forms. A row holds the mask wherever a token is
            wanted. The response begins at the row's first mask, so `text` and `sequences` also hold the given tokens
            that come after the first mask. A canvas ends where it ends: no preset fills its last block up or drops it.
        attention_mask: [B, L] of 0 and 1, beside token ids; 0 marks padding, which may stand at either end of a row.
            Without an attention_mask, a 2-D tensor whose row begins or ends with the tokenizer's pad id is refused,
            and lists of ids are taken as they are.
        preset: the decoder: a name of `dlm_fast.PRESETS`, or a `Preset`. Default: the published decoder of the
            model's family with its settings (`explain(model)` shows it); of a model that names none, "llada" with full
            visibility and "sdar" with block-causal one.
        policy: what modifies the preset's rule: a function `(view, choice) -> choice`, which may also return the
            positions to write or a score; or a `dlm_fast.policies.Policy`; or a list of functions and policies. The
            policies of the call act after the preset's own policies.
        max_new_tokens: number of masks behind a prompt, for all rows or one number per row. Default: 128. Refused
            beside `canvas`, which says itself where tokens are wanted. Where the number does not fill its last block,
            the preset's option `last_block` says whether a whole block is decoded and then cut.
        min_new_tokens: number of response tokens before which no EOS is drawn, for all rows or one number per row.
        temperature: temperature of the draws, for all rows or one number per row; 0 = greedy. Default: that of the
            family's published decoder where no preset is named, else 0. The reported confidence
            is the drawn token's probability without the temperature (LLaDA, arXiv:2502.09992), unless the preset is
            `tempered`.
        top_k: draw among the k most likely tokens only; 0 = off. The filters `top_k` and `top_p` run in plain torch,
            which sorts the vocabulary. A row of temperature 0 draws nothing, so that the filters change nothing in that
            row unless the preset has `greedy_filters`.
        top_p: draw among the most likely tokens whose probabilities sum to p only; 1.0 = off. Default: that of the
            family's published decoder where no preset is named, else 1.0.
        seed: random seed. A draw is a function of seed, request id, position and step alone.
        request_ids: for each row the number that keys the row's noise. Default: 0, 1, 2, ...
        stop_strings: strings that end a text: the text ends where the earliest of them begins. A stop string that is a
            special token is found by its id. The text is the one that would come without stop strings, cut; a row ends
            early once the cut is certain. If the decoder edits tokens or takes tokens back, only finished blocks make
            a cut certain. Stop strings cost a host read per step.
        banned_token_ids: ids that are never drawn. The mask id is always banned.
        eos_token_ids: ids that end a text. Default: those of the model's diffusion configuration.
        tokenizer: what encodes prompts and decodes responses. Default: the tokenizer that `load` found or that `patch`
            was given.
        on_step: a function that is called with the state after every step, and that may read tensors on the host. The
            state's canvases hold whole last blocks where the preset decodes whole ones.
        **options: options of the preset that the call replaces, such as block_length, cache, rule or threshold;
            `preset.options()` lists them. An unknown option raises, and so does one that the decoder would not read,
            such as a threshold where the rule is a quota.
    Returns:
        GenerateOutput.
    Raises:
        ValueError: an argument is out of range, or two arguments contradict each other. The message names the argument,
            the rule and the value, and nothing has been decoded.
        TypeError: an argument is of a wrong type, with the same kind of message.
        NotImplementedError: the preset needs a model family that is not here yet.
        DecodeError: the model's logits hold NaN, or a policy makes no progress. The error holds what was decoded.
        DecodeOutOfMemory: a DecodeError and a torch.OutOfMemoryError: the memory did not suffice for a step.
        DecodeInterrupted: a KeyboardInterrupt, which holds what was decoded.
        RuntimeError: the patch is not in place any more, so that a layer did not attend through our op; or a parameter
            of a model with a native twin was replaced.
    """
    # 1. Check what does not depend on the model, and that the model is ready to decode.
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
    model = handle.checked_model()

    # 2. Resolve the decoder, and check that it fits the model.
    named = preset is not None or handle.settings is None or handle.settings.decoder is None
    options = settled(handle, {**options, "preset": preset, "temperature": temperature, "top_p": top_p})
    preset, temperature, top_p = (options.pop(name) for name in ("preset", "temperature", "top_p"))
    with _unnamed_decoder(None if named else handle.settings.sources.get("decoder")):
        chosen = resolve(preset, handle.diffusion.visibility, options, policy)
        requests.check_support(chosen, handle.diffusion)
        requests.check_commands(chosen, model.config.vocab_size)

    # 3. Read the requests, and check that the decoder can serve them.
    tokenizer = tokenizer if tokenizer is not None else handle.tokenizer
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
    if canvas is None:
        batch = requests.with_last_blocks(batch, chosen, handle.diffusion, model.config.max_position_embeddings)
    elif "last_block" in options:
        raise ValueError(
            f"generate: last_block goes with prompts; a canvas ends where it ends, got "
            f"last_block={options['last_block']!r}"
        )

    # 4. Open the rows and run steps until no row needs one. A batch of no rows has nothing to run.
    device = next(model.parameters()).device
    started = time.perf_counter()
    plan, state = open_rows(batch.opened, chosen, handle.diffusion, device)
    shapes: Counter[Bucket] = Counter()
    stopped: BaseException | None = None
    if batch.canvases:
        decode = open_decode(handle, plan, state, sampling_of(batch, plan, device))
        try:
            run_steps(decode, _after_step(batch, plan, on_step), shapes)
        except (StepTooLarge, KeyboardInterrupt) as error:
            stopped = error

    # 5. Build the output, and raise if the loop or a row failed.
    output = _output(batch, state, shapes, tokenizer, handle.diffusion, chosen, time.perf_counter() - started)
    if stopped is not None:
        rows = [row for row, finish in enumerate(output.finish) if finish == "unfinished"]
        if isinstance(stopped, StepTooLarge):
            raise DecodeOutOfMemory(_too_large(stopped.bucket, shapes), output, rows) from stopped.__cause__
        raise DecodeInterrupted(output, rows) from stopped
    failed = state.error.nonzero().flatten().tolist()
    if failed:
        raise DecodeError(_failure(state, failed), output, failed)
    return output


def settled(handle: PatchHandle, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` with those that they leave to the model: where no preset is named, those of the published
    decoder of the model's family."""
    known = handle.settings
    decoder = known.decoder if known is not None and settings.get("preset") is None else None
    found = dict(settings) if decoder is None else {**decoder.options, **settings, "preset": decoder.preset}
    for name, default in (("temperature", 0.0), ("top_p", 1.0)):
        if found.get(name) is None:
            found[name] = default if decoder is None else getattr(decoder, name)
    return found


@contextlib.contextmanager
def _unnamed_decoder(source: str | None) -> Iterator[None]:
    """Says of an error that the call did not name the decoder that it speaks of, and where the decoder comes from."""
    try:
        yield
    except ValueError as error:
        if source is None:
            raise
        raise ValueError(f"{error} (the decoder is that of {source}, since the call names no preset)") from error


def check_mode(model: nn.Module) -> None:
    """Raises ValueError where a decode would not compute what the model computes.

    That is the case if a module is in training mode (dropout), and under autocast.
    """
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = "" if model.training else f" in {training[0]}"
        raise ValueError(f"generate: the model must be in eval mode, got training=True{where}; call model.eval()")
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        raise ValueError(
            f"generate: autocast must be off, got torch.autocast({device!r}, {torch.get_autocast_dtype(device)}); "
            f"decode under torch.autocast({device!r}, enabled=False), and a model of that dtype for its speed"
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


def sampling_of(batch: Requests, plan: Plan, device: torch.device) -> Sampling:
    """How a batch draws, and the numbers of its rule, as tensors on the device."""
    preset = plan.preset
    B = len(batch.canvases)

    def rows(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).expand(B).contiguous().to(device)

    # 1. First positions of an EOS, and the number of steps that fill a block.
    no_eos_before = [p + m for p, m in zip(batch.prompt_lengths, batch.min_new_tokens)]
    spans = [len(canvas) - start for canvas, start in zip(batch.opened, plan.first.tolist())]
    # Where a row is one block, the longest row of the batch must not decide the schedule of a shorter one.
    one_block = preset.single_block or (preset.block_length or plan.diffusion.block_length) is None
    steps = [preset.steps_per_block or (max(1, span) if one_block else plan.block_length) for span in spans]

    # 2. The share of the masks that each step writes: a time falls from 1 to schedule_eps, and the masks with it; the
    # last step writes them all.
    transfer = None
    if preset.by_share:
        transfer = torch.ones(B, max(steps), dtype=torch.float32)
        for b, S in enumerate(steps):
            t = torch.linspace(1, preset.schedule_eps, S + 1, dtype=torch.float32)
            transfer[b, : S - 1] = (1 - t[1:] / t[:-1])[: S - 1]
        transfer = transfer.to(device)

    # 3. The steps after which a row has stalled. This is a safety net and not a schedule: the bounds of every policy
    # (tests/decoding/test_policy_bounds.py) are below these numbers.
    edits = max((getattr(policy, "max_post_edits", 0) for policy in preset.policies), default=0)
    steps_of_block = 2 * max(plan.block_length, *steps) + edits + 8
    max_steps = [min(steps_of_block * (-(-span // plan.block_length) + 1), 2**30) for span in spans]

    def masks_at(share: float) -> int | None:
        """The largest number of masks at which a block of the full length is filled to `share`."""
        length = plan.block_length
        return bisect.bisect_right(range(length + 1), -share, key=lambda masks: -(length - masks) / length) - 1

    # 4. Everything on the device.
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


def _after_step(
    batch: Requests, plan: Plan, on_step: Callable[[RowState], None] | None
) -> Callable[[RowState], None] | None:
    """What the loop calls after a step: stop strings end rows first, then the user's function sees the state."""
    if batch.stop_strings is None:
        return on_step
    takes_back = bool(plan.preset.families & {"edit", "revise"})
    stopper = Stopper(batch, plan.mask_id, takes_back)

    def after_step(state: RowState) -> None:
        stopper(state)
        if on_step is not None:
            on_step(state)

    return after_step


def _output(
    batch: Requests,
    state: RowState,
    shapes: Counter[Bucket],
    tokenizer: Any,
    diffusion: Any,
    preset: Preset,
    seconds: float,
) -> GenerateOutput:
    """The final state of a batch as plain results, one per row."""
    tokens, steps, confidence = state.tokens.cpu(), state.unmask_step.cpu(), state.unmask_confidence.cpu()
    nfe, query_tokens = state.nfe.tolist(), state.query_tokens.tolist()
    responses = [
        requests.response(batch, b, tokens[b], steps[b], tokenizer, diffusion) for b in range(len(batch.canvases))
    ]
    lengths = [len(canvas) for canvas in batch.canvases]
    endings = [
        "error" if error else response.finish if phase == DONE else "unfinished"
        for response, error, phase in zip(responses, state.error.tolist(), state.phase.tolist())
    ]
    copies = 2 if preset.cfg_scale else 1
    computed = sum(copies * shape.rows * shape.width * shape.drafts * steps for shape, steps in shapes.items())
    return GenerateOutput(
        sequences=[response.ids for response in responses],
        text=[response.text for response in responses] if tokenizer is not None else None,
        canvas=[tokens[b, :length] for b, length in enumerate(lengths)],
        finish=endings,
        nfe=nfe,
        query_tokens=query_tokens,
        tpf=[response.written / forwards if forwards else 0.0 for response, forwards in zip(responses, nfe)],
        unmask_step=[steps[b, :length] for b, length in enumerate(lengths)],
        confidence=[confidence[b, :length] for b, length in enumerate(lengths)],
        shapes=dict(shapes),
        computed_tokens=computed,
        wall_time=seconds,
        preset=preset,
    )


def _too_large(bucket: Bucket, shapes: Counter[Bucket]) -> str:
    """Which step ran out of memory, and which ones did not, as one message."""

    def words(shape: Bucket) -> str:
        drafts = f" of {shape.drafts} drafts" if shape.drafts > 1 else ""
        return f"{shape.rows} rows x {shape.width} positions{drafts} ({shape.lanes} of them with logits)"

    fitted = max(shapes, key=lambda shape: shape.rows * shape.width * shape.drafts, default=None)
    found = "no step before it fitted" if fitted is None else f"the largest step that fitted had {words(fitted)}"
    return (
        f"generate: out of memory in a {bucket.kind} step of {words(bucket)}; {found}; decode fewer prompts in a call"
    )


def _failure(state: RowState, rows: list[int]) -> str:
    """Why `rows` failed, as one message."""
    broken = [row for row in rows if int(state.error[row]) & ERROR_LOGITS]
    stalled = [row for row in rows if row not in broken]
    reasons = []
    if broken:
        reasons.append(
            f"the model's logits must be finite with a token to draw, got NaN, +inf or no candidate in rows {broken}"
        )
    if stalled:
        reasons.append(
            f"a policy must fill its blocks, got no end within max_steps={int(state.step[stalled[0]])} denoise steps "
            f"in rows {stalled}"
        )
    return "generate: " + "; ".join(reasons)
