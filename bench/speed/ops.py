"""`confidence` against softmax in torch, eager and compiled; `unmask` against its reference and a loop over rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from dlm_fast import Ops
from dlm_kernels import RowState, UnmaskInputs, UnmaskRule, reference
from dlm_kernels.state import DENOISE

from .. import floors
from ..shapes import Model, Shapes
from ..timing import Candidate
from .run import OURS, Bench, Shape, Work

# (dtype, outputs) of `confidence`; the first is what most decoders ask for, the others are variants.
CALLS: tuple[tuple[torch.dtype, tuple[str, ...]], ...] = (
    (torch.bfloat16, ("second",)),
    (torch.bfloat16, ("second", "logsumexp", "entropy")),
    (torch.float32, ("second",)),
    (torch.bfloat16, ("sampled",)),
    (torch.bfloat16, ("logsumexp", "kl")),
)


def confidence_shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    """Every number of rows for every vocabulary; the variants at the largest, for the first model or for all."""
    models = [model for model in chosen.models if model.has_head]
    for model in models:
        for N in chosen.rows:
            yield _confidence_shape(bench, ops, model, N, *CALLS[0])
    for model in models if chosen.variants else models[:1]:
        for dtype, outputs in CALLS[1:]:
            yield _confidence_shape(bench, ops, model, chosen.rows[-1], dtype, outputs)


def _confidence_shape(
    bench: Bench, ops: Ops, model: Model, N: int, dtype: torch.dtype, outputs: tuple[str, ...]
) -> Shape:
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    label = f"N={N} V={model.vocab} {kind} {'+'.join(outputs)}" + (f" cap={model.soft_cap:g}" if model.soft_cap else "")
    cost = floors.confidence(N, model.vocab, dtype.itemsize, "kl" in outputs)
    facts = {"kind": "confidence", "N": N, "V": model.vocab, "dtype": kind, "outputs": list(outputs)}
    return Shape(
        "confidence", model.name, label, partial(_confidence, bench, ops, model, N, dtype, outputs, cost), cost, facts
    )


def _cap(logits: Tensor, soft_cap: float | None) -> Tensor:
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def _softmax_gather(logits: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    logits = _cap(logits, soft_cap)
    token = logits.argmax(-1)
    return token, logits.float().softmax(-1).gather(-1, token[:, None])


def _softmax_gather_float64(logits: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    logits = _cap(logits, soft_cap)
    token = logits.argmax(-1)
    return token, logits.double().softmax(-1).gather(-1, token[:, None])


def _softmax_topk(logits: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    return tuple(_cap(logits, soft_cap).float().softmax(-1).topk(2, dim=-1))


# Candidates that the gates look for by name.
EAGER = "argmax + softmax + gather"
FLOAT64 = "argmax + softmax + gather, float64"
LOOP = "loop over rows, launched by the host"


class Compiled:
    """A function compiled for one shape, at its first call."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.compiled: Callable | None = None

    def __call__(self, *arguments: object) -> object:
        if self.compiled is None:
            self.compiled = torch.compile(self.function, dynamic=False)
        return self.compiled(*arguments)


def _confidence(
    bench: Bench, ops: Ops, model: Model, N: int, dtype: torch.dtype, outputs: tuple[str, ...], cost: floors.Cost
) -> Work:
    V, device = model.vocab, bench.device
    count, cold = bench.rotation(int(cost.nbytes))
    sets = [(torch.randn(N, V, device=device) * 4).to(dtype) for _ in range(count)]
    rows = torch.arange(N, dtype=torch.int32, device=device)
    arguments: dict = {"rows": rows, "outputs": outputs, "banned": torch.tensor([model.mask_id], device=device)}
    if model.soft_cap is not None:
        arguments["soft_cap"] = model.soft_cap
    if "kl" in outputs:
        previous = (sets[0].float() + torch.randn(N, V, device=device)).to(dtype)
        arguments["previous"], arguments["previous_logsumexp"] = (
            previous,
            _cap(previous.float(), model.soft_cap).logsumexp(1),
        )
    if "sampled" in outputs:
        arguments["sample_temperature"] = torch.ones(N, device=device)
        arguments["seed"] = torch.zeros(1, dtype=torch.int64, device=device)
        arguments["noise"] = torch.stack([rows, rows, rows], 1)

    def calls(function: Callable[..., object]) -> list[Callable[[], object]]:
        return [partial(function, logits, model.soft_cap) for logits in sets]

    candidates = [
        Candidate(OURS, [partial(ops.confidence, logits, **arguments) for logits in sets]),
        Candidate(EAGER, calls(_softmax_gather)),
        Candidate(f"{EAGER}, compiled", calls(Compiled(_softmax_gather)), compiles=True),
        Candidate(FLOAT64, calls(_softmax_gather_float64)),
        Candidate("softmax + topk(2)", calls(_softmax_topk)),
        Candidate("softmax + topk(2), compiled", calls(Compiled(_softmax_topk)), compiles=True),
    ]
    note = "" if "second" in outputs and len(outputs) == 1 else "the baselines compute less"
    return Work(candidates, cost, count, cold, note)


RULE = UnmaskRule(passes="threshold")
THRESHOLD = 0.9
PROMPT = 1024  # positions of the canvas before the block
LOOP_LANES = 4096  # B x lanes


def unmask_shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    for B, lanes in chosen.batches:
        cost, facts = floors.unmask(B, lanes), {"kind": "unmask", "B": B, "lanes": lanes}
        label = f"B={B} lanes={lanes} canvas={PROMPT + lanes} threshold"
        yield Shape("unmask", "any", label, partial(_unmask, bench, ops, B, lanes, cost), cost, facts, seconds=5)


def _open_state(B: int, lanes: int, device: torch.device) -> RowState:
    """Rows in their last block, half of it masked."""
    end = PROMPT + lanes
    state = RowState.empty(B, end, device)
    state.tokens.random_(4, 1000)
    state.tokens[:, -lanes:] = torch.where(torch.rand(B, lanes, device=device) < 0.5, 0, state.tokens[:, -lanes:])
    state.canvas_len.fill_(end)
    state.block_start.fill_(PROMPT)
    state.block_end.fill_(end)
    state.block_masks.fill_(lanes)
    state.phase.fill_(DENOISE)
    return state


def _unmask(bench: Bench, ops: Ops, B: int, lanes: int, cost: floors.Cost) -> Work:
    device = bench.device
    count, cold = bench.rotation(int(cost.nbytes))
    templates = [_open_state(B, lanes, device) for _ in range(count)]
    inputs = []
    for _ in range(count):
        score = torch.rand(B, lanes, device=device)
        counts = {"query_len": lanes, "min_unmask": 1, "steps": lanes, "block_length": lanes}
        rows = {name: torch.full((B,), value, dtype=torch.int32, device=device) for name, value in counts.items()}
        inputs.append(
            UnmaskInputs(
                pred=torch.randint(4, 1000, (B, lanes), device=device),
                score=score,
                confidence=score,
                value=torch.full((B,), THRESHOLD, device=device),
                mask_id=0,
                stop_ids=torch.tensor([1], device=device),
                **rows,
            )
        )

    def candidate(name: str, op: Callable, graph: bool = True, sets: int = count) -> Candidate:
        states = [template.clone() for template in templates[:sets]]

        def restore() -> None:
            for state, template in zip(states, templates):
                for field in dataclasses.fields(RowState):
                    getattr(state, field.name).copy_(getattr(template, field.name))

        calls = [partial(op, state, RULE, given, kind="denoise") for state, given in zip(states, inputs)]
        return Candidate(name, calls, graph=graph, before=restore)

    candidates = [
        candidate(OURS, ops.unmask),
        candidate("reference, in a graph", reference.unmask),
        candidate("reference, launched by the host", reference.unmask, graph=False),
    ]
    note = f"the loop over rows is timed up to {LOOP_LANES} lanes: it takes a host round trip a position"
    if B * lanes <= LOOP_LANES:
        # Bound by the host, milliseconds a row: one set of inputs is enough, and more would take minutes.
        candidates.append(candidate(LOOP, _loop, graph=False, sets=1))
        note = "the loop does not advance blocks or stop rows"
    return Work(candidates, cost, count, cold, note)


def _loop(state: RowState, rule: UnmaskRule, inputs: UnmaskInputs, *, kind: str) -> None:
    """Threshold unmasking as decoders written for one row do it: a host loop over rows, and over positions until one
    fails."""
    for b in range(inputs.score.shape[0]):
        start, end = int(state.block_start[b]), int(state.block_end[b])
        masked = state.tokens[b, start:end] == inputs.mask_id
        ranked = torch.where(masked, inputs.score[b, : end - start], -torch.inf)
        order = ranked.argsort(descending=True)
        for k in range(int(masked.sum())):
            lane = order[k]
            if k > 0 and not bool(ranked[lane] > inputs.value[b]):
                break
            state.tokens[b, start + lane] = inputs.pred[b, lane]
            state.unmask_step[b, start + lane] = state.step[b]
            state.unmask_confidence[b, start + lane] = inputs.confidence[b, lane]
        state.step[b] += 1
