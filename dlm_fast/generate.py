"""The function `generate`: from prompts to texts, by one decode loop for every preset.

`generate` reads the arguments, `Runner` takes the rows through the slots of one decode, `Rounds` runs the loop, and
`denoise_step` is one step of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from dlm_kernels import RowState

from .call import check_cancel, check_function, read_call
from .decoding.memory import BatchTooLarge, open_batch
from .decoding.progress import StepsCancelled, StepTooLarge
from .limits import whole
from .output import (
    Completion,
    DecodeCancelled,
    DecodeError,
    DecodeInterrupted,
    DecodeOutOfMemory,
    Failure,
    GenerateOutput,
    failure,
    output_of,
    stopped,
)
from .presets import Preset
from .running import Row, Runner

__all__ = [
    "BatchTooLarge",
    "DecodeCancelled",
    "DecodeError",
    "DecodeInterrupted",
    "DecodeOutOfMemory",
    "GenerateOutput",
    "generate",
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
        check_function("on_step", "a function of the state", on_step, 1)
    check_cancel(cancel)
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
        options=options,
    )
    decoder, batch = call.decoder, call.batch
    started, count = time.perf_counter(), len(batch.canvases)
    together = _rows_together(count, batch_size, decoder.handle.max_rows)
    if not count:
        return output_of([], {}, decoder.tokenizer, decoder.preset, time.perf_counter() - started)

    # 2. Decode. What could not fit is refused before anything is decoded.
    plan, grid = open_batch(
        decoder.handle, batch.opened, together, decoder.preset, decoder.handle.diffusion, decoder.device
    )
    runner = Runner(decoder, batch, plan, grid)
    runner.on_step, runner.cancelled = on_step, None if cancel is None else cancel.is_set
    waiting = [Row(batch.of_rows([row]), row) for row in range(count)]
    found: dict[int, Completion] = {}
    failures: list[Failure] = []
    error: BaseException | None = None

    def keep(rows: Iterable[tuple[Completion, Failure | None]]) -> None:
        for row, failed in rows:
            found[row.index] = row
            failures.extend([failed] if failed else [])

    try:
        keep(runner.run(waiting, at_once=together < count))
    except (StepTooLarge, StepsCancelled, KeyboardInterrupt) as caught:
        error = caught
        keep(runner.stopped())
        keep(runner.untouched([row for row in waiting if row.number not in found]))

    # 3. Return the output, or raise with it.
    rows = [found[row] for row in range(count)]
    output = output_of(rows, runner.shapes, decoder.tokenizer, decoder.preset, time.perf_counter() - started)
    if error is not None:
        raise stopped(error, output, runner.shapes) from error.__cause__ or error
    if failures:
        failures.sort(key=lambda failure: failure.row)
        raise DecodeError(failure(failures), output, [failure.row for failure in failures])
    return output


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
