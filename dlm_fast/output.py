"""What a decode gives: its output, row by row, and the errors that carry it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.state import DONE, ERROR_LOGITS

from . import requests
from .decoding.plan import Bucket
from .decoding.progress import StepsCancelled, StepTooLarge
from .diffusion import DiffusionConfig
from .presets import Preset
from .requests import Requests


class DecodeError(RuntimeError):
    """A decode that could not be finished.

    Attributes:
        output: the result of every row; a row that failed is there as far as its decode got, with finish "error".
        rows: indices of the rows that failed.
    """

    def __init__(self, message: str, output: Any, rows: list[int]) -> None:
        super().__init__(message)
        self.output = output
        self.rows = rows


class DecodeCancelled(DecodeError):
    """A decode that the caller cancelled (`generate(cancel=)`).

    Attributes:
        output: the result of every row; rows that were not done are there as far as they got, with finish "unfinished".
        rows: indices of the rows that were not done.
    """


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

    def __init__(self, message: str, output: Any, rows: list[int]) -> None:
        super().__init__(message)
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
            (see `DecodeCancelled`, `DecodeOutOfMemory` and `DecodeInterrupted`).
        nfe: number of forwards that the row took part in; prefills, refreshes and commits count.
        query_tokens: number of positions that were computed in those forwards.
        tpf: generated tokens before the first EOS, divided by `nfe`.
        unmask_step: for each canvas position, the row's denoise step that wrote the token; -1 = no step wrote one.
        confidence: for each canvas position, the probability of the token when it was written; 0 = no step wrote one.
        shapes: how many steps of every shape the batches took (`dlm_fast.decoding.plan.Bucket`).
        computed_tokens: number of positions that were computed in all steps, padding and rows that sat a step out
            included; above the sum of `query_tokens` by what the shapes waste.
        wall_time: seconds that all batches took.
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


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was decoded for one request, and what it cost.

    Attributes:
        index: number of the request, from 0, in the order in which the requests were given.
        sample: number of this answer among the `n` answers to its request.
        id: what the request was called.
        ids: generated token ids, 1-D int64 (`GenerateOutput.sequences`).
        text: the text (`GenerateOutput.text`); None without a tokenizer.
        finish: why the row ended: "eos", "stop", "length", "error" or "unfinished" (`GenerateOutput.finish`).
        error: what is wrong, where `finish` is "error"; else None.
        prompt_length: position of the canvas at which the response begins.
        canvas: the whole canvas as the loop left it, 1-D int64.
        unmask_step: for each canvas position, the row's denoise step that wrote the token; -1 = no step wrote one.
        confidence: for each canvas position, the probability of the token when it was written; 0 = no step wrote one.
        nfe: number of forwards that the row took part in; prefills, refreshes and commits count.
        query_tokens: number of positions that were computed in those forwards.
        tpf: generated tokens before the first EOS, divided by `nfe`.
    """

    index: int
    sample: int
    id: Any
    ids: Tensor
    text: str | None
    finish: str
    error: str | None
    prompt_length: int
    canvas: Tensor
    unmask_step: Tensor
    confidence: Tensor
    nfe: int
    query_tokens: int
    tpf: float

    @classmethod
    def refused(cls, index: int, id: Any, error: str) -> Completion:
        """That of a request that cannot be decoded."""
        nothing, floats = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float32)
        return cls(index, 0, id, nothing, None, "error", error, 0, nothing, nothing.int(), floats, 0, 0, 0.0)


def completions_of(
    batch: Requests,
    state: RowState,
    numbers: Sequence[tuple[int, int, Any]],
    tokenizer: Any,
    diffusion: DiffusionConfig,
) -> list[tuple[Completion, Failure | None]]:
    """The rows of a batch from their state on the host, and what failed of each; `numbers` are index, sample and id."""
    nfe, query_tokens = state.nfe.tolist(), state.query_tokens.tolist()
    errors, phases, steps = state.error.tolist(), state.phase.tolist(), state.step.tolist()
    found = []
    for b, (index, sample, name) in enumerate(numbers):
        failed = Failure(index, bool(errors[b] & ERROR_LOGITS), steps[b]) if errors[b] else None
        response = requests.response(batch, b, state.tokens[b], state.unmask_step[b], tokenizer, diffusion)
        length = len(batch.canvases[b])
        row = Completion(
            index=index,
            sample=sample,
            id=name,
            ids=response.ids,
            text=response.text,
            finish="error" if failed else response.finish if phases[b] == DONE else "unfinished",
            error=None if failed is None else failed.reason,
            prompt_length=batch.prompt_lengths[b],
            # Copies, so that a row does not keep those beside it alive.
            canvas=state.tokens[b, :length].clone(),
            unmask_step=state.unmask_step[b, :length].clone(),
            confidence=state.unmask_confidence[b, :length].clone(),
            nfe=nfe[b],
            query_tokens=query_tokens[b],
            tpf=response.written / nfe[b] if nfe[b] else 0.0,
        )
        found.append((row, failed))
    return found


def output_of(
    rows: Sequence[Completion], shapes: Mapping[Bucket, int], tokenizer: Any, preset: Preset, seconds: float
) -> GenerateOutput:
    """The rows of a call as one output, in their order."""
    copies = 2 if preset.cfg_scale else 1
    computed = sum(copies * shape.rows * shape.width * shape.drafts * steps for shape, steps in shapes.items())
    return GenerateOutput(
        sequences=[row.ids for row in rows],
        text=[row.text for row in rows] if tokenizer is not None else None,
        shapes=dict(shapes),
        computed_tokens=computed,
        wall_time=seconds,
        preset=preset,
        **{name: [getattr(row, name) for row in rows] for name in _PER_ROW},
    )


_PER_ROW = ("canvas", "finish", "nfe", "query_tokens", "tpf", "unmask_step", "confidence")


def stopped(
    error: BaseException, output: Any, shapes: Mapping[Bucket, int], argument: str = "batch_size"
) -> BaseException:
    """What a call raises that a step or the caller stopped.

    Args:
        error: what the loop raised: StepTooLarge, StepsCancelled, BatchTooLarge or a KeyboardInterrupt.
        output: a `GenerateOutput`, or a list of `Completion`.
        shapes: how many steps of every shape there were.
        argument: what says how many rows are decoded together.
    """
    if isinstance(output, GenerateOutput):
        count, rows = len(output.finish), [row for row, how in enumerate(output.finish) if how == "unfinished"]
    else:
        count, rows = len(output), [row.index for row in output if row.finish == "unfinished"]
    if isinstance(error, KeyboardInterrupt):
        return DecodeInterrupted(f"generate: interrupted, with {len(rows)} of {count} rows not done", output, rows)
    if isinstance(error, StepsCancelled):
        return DecodeCancelled(f"generate: cancelled, with {len(rows)} of {count} rows not done", output, rows)
    message = too_large(error.bucket, shapes, argument) if isinstance(error, StepTooLarge) else str(error)
    return DecodeOutOfMemory(message, output, rows)


def too_large(bucket: Bucket | None, shapes: Mapping[Bucket, int], argument: str = "batch_size") -> str:
    """Which step ran out of memory, and which ones did not, as one message; `argument` says how many rows there are."""

    def words(shape: Bucket) -> str:
        drafts = f" of {shape.drafts} drafts" if shape.drafts > 1 else ""
        return f"{shape.rows} rows x {shape.width} positions{drafts} ({shape.lanes} of them with logits)"

    fitted = max(shapes, key=lambda shape: shape.rows * shape.width * shape.drafts, default=None)
    found = "no step before it fitted" if fitted is None else f"the largest step that fitted had {words(fitted)}"
    where = "the buffers of a batch" if bucket is None else f"a {bucket.kind} step of {words(bucket)}"
    return f"generate: out of memory in {where}; {found}; decode fewer prompts at a time ({argument})"


@dataclasses.dataclass(frozen=True)
class Failure:
    """A row that failed.

    Attributes:
        row: index of the row.
        by_logits: whether its logits could not be used; else its policy made no progress.
        step: the denoise steps that it took.
    """

    row: int
    by_logits: bool
    step: int

    @property
    def reason(self) -> str:
        """What is wrong, whichever row it is."""
        if self.by_logits:
            return "the model's logits must be finite with a token to draw, got NaN, +inf or no candidate"
        return f"a policy must fill its blocks, got no end within max_steps={self.step} denoise steps"


def failure(failures: list[Failure]) -> str:
    """Why rows failed, as one message."""
    kinds: dict[bool, list[Failure]] = {}
    for failed in failures:
        kinds.setdefault(failed.by_logits, []).append(failed)
    reasons = [
        f"{rows[0].reason} in rows {[row.row for row in rows]}" for _, rows in sorted(kinds.items(), reverse=True)
    ]
    return "generate: " + "; ".join(reasons)
