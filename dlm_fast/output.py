"""What a decode gives: its output, row by row, and the errors that carry it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.state import DONE, ERROR_LOGITS

from . import requests
from .decoding.plan import Bucket
from .diffusion import DiffusionConfig
from .presets import Preset
from .requests import Requests


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


def output_of(
    batch: Requests,
    state: RowState,
    shapes: Counter[Bucket],
    tokenizer: Any,
    diffusion: DiffusionConfig,
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


def merged(outputs: list[GenerateOutput]) -> GenerateOutput:
    """The outputs of batches of one call as one, in their order."""
    if len(outputs) == 1:
        return outputs[0]
    fields = {name: [getattr(output, name) for output in outputs] for name in vars(outputs[0])}
    whole = {name: [row for rows in parts for row in rows] for name, parts in fields.items() if name in _PER_ROW}
    return dataclasses.replace(
        outputs[0],
        **whole,
        text=None if outputs[0].text is None else [text for output in outputs for text in output.text],
        shapes=dict(sum(map(Counter, fields["shapes"]), Counter())),
        computed_tokens=sum(fields["computed_tokens"]),
        wall_time=sum(fields["wall_time"]),
    )


_PER_ROW = ("sequences", "canvas", "finish", "nfe", "query_tokens", "tpf", "unmask_step", "confidence")


def too_large(bucket: Bucket | None, shapes: Mapping[Bucket, int]) -> str:
    """Which step ran out of memory, and which ones did not, as one message."""

    def words(shape: Bucket) -> str:
        drafts = f" of {shape.drafts} drafts" if shape.drafts > 1 else ""
        return f"{shape.rows} rows x {shape.width} positions{drafts} ({shape.lanes} of them with logits)"

    fitted = max(shapes, key=lambda shape: shape.rows * shape.width * shape.drafts, default=None)
    found = "no step before it fitted" if fitted is None else f"the largest step that fitted had {words(fitted)}"
    where = "the buffers of a batch" if bucket is None else f"a {bucket.kind} step of {words(bucket)}"
    return f"generate: out of memory in {where}; {found}; decode fewer prompts at a time (batch_size)"


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


def failures_of(state: RowState, first: int) -> list[Failure]:
    """The rows of a batch that failed; `first` is the index of its first row."""
    errors, steps = state.error.tolist(), state.step.tolist()
    return [Failure(first + row, bool(error & ERROR_LOGITS), steps[row]) for row, error in enumerate(errors) if error]


def failure(failures: list[Failure]) -> str:
    """Why rows failed, as one message."""
    broken = [failure.row for failure in failures if failure.by_logits]
    stalled = [failure for failure in failures if not failure.by_logits]
    reasons = []
    if broken:
        reasons.append(
            f"the model's logits must be finite with a token to draw, got NaN, +inf or no candidate in rows {broken}"
        )
    if stalled:
        reasons.append(
            f"a policy must fill its blocks, got no end within max_steps={stalled[0].step} denoise steps in rows "
            f"{[failure.row for failure in stalled]}"
        )
    return "generate: " + "; ".join(reasons)
