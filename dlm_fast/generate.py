"""The function `generate`: from prompts to texts, by one decode loop for every preset.

`generate` reads the arguments and opens the batch, `run_steps` runs the loop, and `denoise_step` is one step of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlm_kernels import RowState

from . import requests
from .decoding.memory import BatchTooLarge, open_batch
from .decoding.plan import Bucket, Plan, open_rows
from .decoding.progress import StepsCancelled, StepTooLarge, is_out_of_memory, run_steps
from .decoding.step import open_decode
from .draws import sampling_of
from .limits import shown, whole
from .output import (
    DecodeCancelled,
    DecodeError,
    DecodeInterrupted,
    DecodeOutOfMemory,
    Failure,
    GenerateOutput,
    failure,
    failures_of,
    merged,
    output_of,
    too_large,
)
from .patching import PatchHandle, handle_of
from .policies import Function
from .presets import Preset, resolve
from .requests import Requests
from .stopper import Stopper

__all__ = [
    "BatchTooLarge",
    "DecodeCancelled",
    "DecodeError",
    "DecodeInterrupted",
    "DecodeOutOfMemory",
    "GenerateOutput",
    "check_greedy",
    "check_mode",
    "generate",
    "read_call",
    "sampling_of",
    "settled",
]


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
    batch_size: int | None = None,
    on_step: Callable[[RowState], None] | None = None,
    cancel: Any = None,
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
        request_ids: for each row the number that keys the row's noise. Default: 0, 1, 2, ..., the row's place among all
            prompts, whatever `batch_size` is.
        stop_strings: strings that end a text: the text ends where the earliest of them begins. A stop string that is a
            special token is found by its id. The text is the one that would come without stop strings, cut; a row ends
            early once the cut is certain. If the decoder edits tokens or takes tokens back, only finished blocks make
            a cut certain. Stop strings cost a host read per step.
        banned_token_ids: ids that are never drawn. The mask id is always banned.
        eos_token_ids: ids that end a text. Default: those of the model's diffusion configuration.
        tokenizer: what encodes prompts and decodes responses. Default: the tokenizer that `load` found or that `patch`
            was given.
        batch_size: how many rows are decoded together, in order; all of them are read and checked before the first
            forward, and the output is that of one list. Default: all rows in one batch, which is refused where the
            model was opened with a smaller `max_rows`.
        on_step: a function that is called with the state of its batch after every step, and that may read tensors on
            the host. The state's canvases hold whole last blocks where the preset decodes whole ones.
        cancel: what ends the call early, an object with `is_set()` such as a `threading.Event`, which `on_step` or
            another thread may set. It is looked at before every step, and a call whose rows are all done returns.
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
        BatchTooLarge: a ValueError: a batch cannot fit the free memory of its device. The message says what takes how
            much, and which batch_size would fit. What is counted is a lower bound, and nothing has been decoded.
        DecodeError: the model's logits hold NaN, or a policy makes no progress. The other rows and batches are decoded,
            and the error holds them all.
        DecodeCancelled: a DecodeError: `cancel` was set. As with the next two, finished rows are whole, and the others
            are there as far as they got, those of later batches as they were asked.
        DecodeOutOfMemory: a DecodeError and a torch.OutOfMemoryError: the memory did not suffice for a step.
        DecodeInterrupted: a KeyboardInterrupt.
        RuntimeError: the patch is not in place any more, so that a layer did not attend through our op; or a parameter
            of a model with a native twin was replaced.
    """
    # 1. Check the arguments, and read the requests.
    if on_step is not None:
        _check_function("on_step", "a function of the state", on_step, 1)
    if cancel is not None and (isinstance(cancel, type) or not callable(getattr(cancel, "is_set", None))):
        raise TypeError(f"generate: cancel must have is_set(), as a threading.Event has, got cancel={shown(cancel)}")
    whole("generate", "batch_size", batch_size, 1, none=True)
    call = read_call(
        model,
        prompts,
        canvas=canvas,
        attention_mask=attention_mask,
        preset=preset,
        policy=policy,
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
        tokenizer=tokenizer,
        **options,
    )
    handle, chosen, batch, device = call.handle, call.preset, call.batch, call.device

    # 2. Decode batch after batch. A batch that could not fit is refused before the first one is decoded.
    parts = batch.parts(_rows_together(len(batch.canvases), batch_size, handle.max_rows))
    if len(parts) > 1:
        open_batch(handle, max((part.opened for part in parts), key=_positions), chosen, handle.diffusion, device)
    outputs: list[GenerateOutput] = []
    failures: list[Failure] = []
    stopped: BaseException | None = None
    for part in parts:
        started, shapes = time.perf_counter(), Counter()
        state = None
        if stopped is None:
            state, stopped = _decode(handle, part, chosen, device, shapes, on_step, cancel)
            if isinstance(stopped, BatchTooLarge) and not outputs:
                raise stopped
        if state is None:
            _, state = open_rows(part.opened, chosen, handle.diffusion, torch.device("cpu"))
        failures += failures_of(state, sum(len(output.finish) for output in outputs))
        seconds = time.perf_counter() - started
        outputs.append(output_of(part, state, shapes, call.tokenizer, handle.diffusion, chosen, seconds))

    # 3. Return the output, or raise with it.
    output = merged(outputs)
    if stopped is not None:
        raise _stopped(stopped, output) from stopped.__cause__ or stopped
    if failures:
        raise DecodeError(failure(failures), output, [failure.row for failure in failures])
    return output


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `generate` that nothing is wrong with; nothing has been decoded.

    Attributes:
        handle: the model's handle.
        preset: the decoder, with every option that the call replaced.
        batch: the rows.
        tokenizer: what encoded the prompts and decodes the responses; None = nothing does.
        device: where the model is.
    """

    handle: PatchHandle
    preset: Preset
    batch: Requests
    tokenizer: Any
    device: torch.device


def read_call(
    model: nn.Module,
    prompts: Sequence[Any] | None,
    *,
    canvas: Sequence[Any] | Tensor | None,
    attention_mask: Any,
    preset: str | Preset | None,
    policy: Any,
    max_new_tokens: int | Sequence[int] | None,
    min_new_tokens: int | Sequence[int],
    temperature: float | Sequence[float] | None,
    top_k: int,
    top_p: float | None,
    seed: int,
    request_ids: Sequence[int] | None,
    stop_strings: Sequence[str],
    banned_token_ids: Sequence[int],
    eos_token_ids: Sequence[int] | None,
    tokenizer: Any,
    **options: Any,
) -> Call:
    """Checks the model and all that a call asks for; the arguments are those of `generate`, and so are the errors."""
    # 1. Check that the model is ready to decode.
    if preset is not None and not isinstance(preset, (str, Preset)):
        raise TypeError(f"generate: preset must be a name of dlm_fast.PRESETS or a Preset, got preset={shown(preset)}")
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
        for part in chosen.policies:
            if type(part) is Function:
                name = "policies" if policy is None else "policy"
                _check_function(name, "a function (view, choice) -> choice", part.function, 2)
        requests.check_support(chosen, handle.diffusion)
        requests.check_commands(chosen, model.config.vocab_size)

    # 3. Read the requests, and check that the decoder can serve them.
    tokenizer = tokenizer if tokenizer is not None else handle.tokenizer
    batch = requests.read(
        handle.diffusion,
        vocab_size=model.config.vocab_size,
        max_positions=model.config.max_position_embeddings,
        limit=handle.max_positions,
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
        room = requests.Room.of(model.config.max_position_embeddings, handle.max_positions)
        batch = requests.with_last_blocks(batch, chosen, handle.diffusion, room)
    elif "last_block" in options:
        raise ValueError(
            f"generate: last_block goes with prompts; a canvas ends where it ends, got "
            f"last_block={shown(options['last_block'])}"
        )
    return Call(handle, chosen, batch, tokenizer, next(model.parameters()).device)


def _rows_together(rows: int, batch_size: int | None, most: int | None) -> int:
    """How many of `rows` rows are decoded together. Raises ValueError for more than `most`, the model's max_rows."""
    if most is not None and batch_size is not None and batch_size > most:
        raise ValueError(
            f"generate: batch_size must be <= max_rows={most} that the model was opened with, got "
            f"batch_size={batch_size}"
        )
    if most is not None and batch_size is None and rows > most:
        raise ValueError(
            f"generate: batch_size must be given for more rows than max_rows={most} that the model was opened with, "
            f"got {rows} rows; say batch_size={most}"
        )
    return batch_size or max(1, rows)


def _decode(
    handle: PatchHandle,
    batch: Requests,
    preset: Preset,
    device: torch.device,
    shapes: Counter[Bucket],
    on_step: Callable[[RowState], None] | None,
    cancel: Any,
) -> tuple[RowState | None, BaseException | None]:
    """Decodes one batch and counts its steps in `shapes`: the last state, None if the batch was not opened; and what
    stopped the decode, if something did."""
    state = None
    try:
        plan, state, grid = open_batch(handle, batch.opened, preset, handle.diffusion, device)
        if batch.canvases:
            sampling = sampling_of(batch, plan, device)
            try:
                decode = open_decode(handle, plan, state, sampling)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise StepTooLarge(None) from error
            after_step = _after_step(batch, plan, on_step)
            run_steps(decode, after_step, shapes, grid=grid, cancelled=None if cancel is None else cancel.is_set)
    except (StepTooLarge, StepsCancelled, BatchTooLarge, KeyboardInterrupt) as error:
        return state, error
    return state, None


def _positions(canvases: list[Tensor]) -> int:
    """Positions of a batch."""
    return len(canvases) * max(map(len, canvases), default=0)


def _stopped(error: BaseException, output: GenerateOutput) -> BaseException:
    """What `generate` raises where a decode was stopped."""
    rows = [row for row, finish in enumerate(output.finish) if finish == "unfinished"]
    if isinstance(error, KeyboardInterrupt):
        return DecodeInterrupted(output, rows)
    if isinstance(error, StepsCancelled):
        done = f"with {len(rows)} of {len(output.finish)} rows not done"
        return DecodeCancelled(f"generate: cancelled, {done}", output, rows)
    message = too_large(error.bucket, output.shapes) if isinstance(error, StepTooLarge) else str(error)
    return DecodeOutOfMemory(message, output, rows)


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
    except RecursionError as error:
        raise ValueError("generate: policy and policies must be lists of policies, got lists in lists") from error
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


def _check_function(name: str, rule: str, function: Any, count: int) -> None:
    """Raises TypeError for what cannot be called with `count` arguments, as far as Python can tell."""
    is_called = callable(function)
    if is_called:
        try:
            inspect.signature(function).bind(*[None] * count)
        except TypeError:
            is_called = False
        except ValueError:  # a function in C may not say what it takes
            pass
    if not is_called:
        raise TypeError(f"generate: {name} must be {rule}, got {name}={shown(function)}")
