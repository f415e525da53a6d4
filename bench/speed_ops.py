"""`confidence` against softmax in torch, eager and compiled; `unmask` against its reference and a loop over rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
from dlm_fast import Ops
from dlm_kernels import RowState, UnmaskRule, reference
from dlm_kernels.state import DENOISE
from torch import Tensor

from .shapes import WINDOW, Model, Shapes
from .speed import OURS, Bench, Shape, Work
from .timing import Candidate


def confidence_shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    for model in chosen.models:
        for N in chosen.rows:
            label = f"N={N} V={model.vocab} bf16 second"
            yield Shape("confidence", model.name, label, partial(_confidence, bench, ops, model, N, torch.bfloat16, ("second",)))
    model, N = chosen.models[0], chosen.rows[-1]
    for dtype, outputs in (
        (torch.float32, ("second",)),
        (torch.bfloat16, ("second", "logsumexp", "entropy")),
        (torch.bfloat16, ("sampled",)),
    ):
        label = f"N={N} V={model.vocab} {'bf16' if dtype == torch.bfloat16 else 'fp32'} {'+'.join(outputs)}"
        yield Shape("confidence", model.name, label, partial(_confidence, bench, ops, model, N, dtype, outputs))


def _softmax_gather(logits: Tensor) -> tuple[Tensor, Tensor]:
    token = logits.argmax(-1)
    return token, logits.float().softmax(-1).gather(-1, token[:, None])


def _softmax_gather_float64(logits: Tensor) -> tuple[Tensor, Tensor]:
    token = logits.argmax(-1)
    return token, logits.double().softmax(-1).gather(-1, token[:, None])


def _softmax_topk(logits: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(logits.float().softmax(-1).topk(2, dim=-1))


class _Compiled:
    """A function compiled for one shape, at its first call."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.compiled: Callable | None = None

    def __call__(self, *arguments: Tensor) -> object:
        if self.compiled is None:
            self.compiled = torch.compile(self.function, dynamic=False)
        return self.compiled(*arguments)


def _confidence(bench: Bench, ops: Ops, model: Model, N: int, dtype: torch.dtype, outputs: tuple[str, ...]) -> Work:
    V, device = model.vocab, bench.device
    nbytes = N * V * dtype.itemsize
    count, cold = bench.rotation(nbytes)
    sets = [(torch.randn(N, V, device=device) * 4).to(dtype) for _ in range(count)]
    rows = torch.arange(N, dtype=torch.int32, device=device)
    arguments: dict = {"rows": rows, "outputs": outputs, "banned": torch.tensor([model.mask_id], device=device)}
    if "sampled" in outputs:
        arguments["sample_temperature"] = torch.ones(N, device=device)
        arguments["seed"] = torch.zeros(1, dtype=torch.int64, device=device)
        arguments["noise"] = torch.stack([rows, rows, rows], 1)

    def calls(function: Callable[[Tensor], object]) -> list[Callable[[], object]]:
        return [partial(function, logits) for logits in sets]

    candidates = [
        Candidate(OURS, [partial(ops.confidence, logits, **arguments) for logits in sets]),
        Candidate("argmax + softmax + gather", calls(_softmax_gather)),
        Candidate("argmax + softmax + gather, compiled", calls(_Compiled(_softmax_gather)), compiles=True),
        Candidate("argmax + softmax + gather, float64", calls(_softmax_gather_float64)),
        Candidate("softmax + topk(2)", calls(_softmax_topk)),
        Candidate("softmax + topk(2), compiled", calls(_Compiled(_softmax_topk)), compiles=True),
    ]
    note = "" if "second" in outputs and len(outputs) == 1 else "the baselines compute less"
    return Work(candidates, bench.ceilings.floor_us(nbytes), count, cold, note)


RULE = UnmaskRule(passes="threshold")
THRESHOLD = 0.9


def unmask_shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    for B in chosen.batches:
        label = f"B={B} lanes={WINDOW} canvas=1056 threshold"
        yield Shape("unmask", "any", label, partial(_unmask, bench, ops, B), seconds=5)


def _open_state(B: int, device: torch.device) -> RowState:
    """Rows in the second of two blocks, half of it masked."""
    state = RowState.empty(B, 1056, device)
    state.tokens.random_(4, 1000)
    state.tokens[:, -WINDOW:] = torch.where(torch.rand(B, WINDOW, device=device) < 0.5, 0, state.tokens[:, -WINDOW:])
    state.canvas_len.fill_(1056)
    state.block_start.fill_(1056 - WINDOW)
    state.block_end.fill_(1056)
    state.block_masks.fill_(WINDOW)
    state.phase.fill_(DENOISE)
    return state


def _unmask(bench: Bench, ops: Ops, B: int) -> Work:
    device = bench.device
    lanes = 28 * B * WINDOW
    count, cold = bench.rotation(lanes)
    templates = [_open_state(B, device) for _ in range(count)]
    inputs = []
    for _ in range(count):
        score = torch.rand(B, WINDOW, device=device)
        counts = {"query_len": WINDOW, "min_unmask": 1, "steps": WINDOW, "block_length": WINDOW}
        rows = {name: torch.full((B,), value, dtype=torch.int32, device=device) for name, value in counts.items()}
        rows |= {"pred": torch.randint(4, 1000, (B, WINDOW), device=device), "score": score, "confidence": score}
        rows |= {"value": torch.full((B,), THRESHOLD, device=device), "stop_ids": torch.tensor([1], device=device)}
        inputs.append(rows)

    def candidate(name: str, op: Callable, graph: bool = True, sets: int = count) -> Candidate:
        states = [template.clone() for template in templates[:sets]]

        def restore() -> None:
            for state, template in zip(states, templates):
                for field in dataclasses.fields(RowState):
                    getattr(state, field.name).copy_(getattr(template, field.name))

        calls = [partial(op, state, RULE, kind="window", mask_id=0, **given) for state, given in zip(states, inputs)]
        return Candidate(name, calls, graph=graph, before=restore)

    candidates = [
        candidate(OURS, ops.unmask),
        candidate("reference, in a graph", reference.unmask),
        candidate("reference, launched by the host", reference.unmask, graph=False),
        # Bound by the host, milliseconds a row: one set of inputs is enough, and more would take minutes.
        candidate("loop over rows, launched by the host", _loop, graph=False, sets=1),
    ]
    return Work(candidates, bench.ceilings.floor_us(lanes), count, cold, "the loop does not advance blocks or stop rows")


def _loop(
    state: RowState,
    rule: UnmaskRule,
    *,
    pred: Tensor,
    score: Tensor,
    confidence: Tensor,
    mask_id: int,
    value: Tensor,
    **_: object,
) -> None:
    """Threshold unmasking as decoders written for one row do it: a host loop over rows, and over positions until one fails."""
    for b in range(score.shape[0]):
        start, end = int(state.block_start[b]), int(state.block_end[b])
        masked = state.tokens[b, start:end] == mask_id
        ranked = torch.where(masked, score[b, : end - start], -torch.inf)
        order = ranked.argsort(descending=True)
        for k in range(int(masked.sum())):
            lane = order[k]
            if k > 0 and not bool(ranked[lane] > value[b]):
                break
            state.tokens[b, start + lane] = pred[b, lane]
            state.unmask_step[b, start + lane] = state.step[b]
            state.unmask_confidence[b, start + lane] = confidence[b, lane]
        state.step[b] += 1
