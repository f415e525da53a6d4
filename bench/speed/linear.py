"""`linear_confidence` (head and statistics in one, logits never written) against cuBLAS and then our `confidence`, or
torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_fast import Ops
from dlm_kernels import reference

from .. import floors
from ..checks.run import Failure, no_worse_than_torch
from ..shapes import Model, Shapes
from ..timing import Candidate
from .run import OURS, Bench, Shape, Work

OUTPUTS = ("second", "logsumexp", "entropy")
CHECKED_ROWS = 8
CLEAR = 1e-3  # a float64 gap between the two best logits, relative to the best, below which a sum in fp32 may swap them
ROUNDING = 1e-4  # relative error always allowed: tensor cores may cut what they add, where torch's fp32 sums round


def shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    for model in chosen.models:
        if not model.has_head:
            continue
        for N in chosen.linear_rows:
            cost = floors.linear_confidence(N, model.vocab, model.hidden)
            facts = {"kind": "linear_confidence", "N": N, "V": model.vocab, "hidden": model.hidden}
            label = f"N={N} V={model.vocab} hidden={model.hidden} {'+'.join(OUTPUTS)}"
            build = partial(_work, bench, ops, model, N, cost)
            yield Shape("linear-confidence", model.name, label, build, cost, facts, seconds=4)


def _op(ops: Ops) -> Callable:
    """Not a field of `Ops`: no decoder needs it."""
    if ops.name == "triton":
        from dlm_kernels.linear_confidence import linear_confidence

        return linear_confidence
    return reference.linear_confidence


def _work(bench: Bench, ops: Ops, model: Model, N: int, cost: floors.Cost) -> Work:
    fused, device = _op(ops), bench.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight = (torch.randn(model.vocab, model.hidden, device=device) * model.hidden**-0.5 * 4).to(dtype)
    count, cold = bench.rotation(2 * model.vocab * model.hidden)
    # The weight dwarfs any L2 cache; rotating the rows alone keeps the memory in bounds.
    sets = [torch.randn(N, model.hidden, device=device).to(dtype) for _ in range(count)]
    options: dict = {"outputs": OUTPUTS, "banned": torch.tensor([model.mask_id], device=device)}
    if model.soft_cap is not None:
        options["soft_cap"] = model.soft_cap

    def head_then_confidence(hidden: Tensor) -> object:
        return ops.confidence(F.linear(hidden, weight), **options)

    def head_then_softmax(hidden: Tensor) -> object:
        logits = F.linear(hidden, weight)
        logits = logits if model.soft_cap is None else model.soft_cap * torch.tanh(logits / model.soft_cap)
        return logits.float().softmax(-1).topk(2, dim=-1)

    candidates = [
        Candidate(OURS, [partial(fused, hidden, weight, **options) for hidden in sets]),
        Candidate("cuBLAS head, our confidence", [partial(head_then_confidence, hidden) for hidden in sets]),
        Candidate("cuBLAS head, softmax + topk(2)", [partial(head_then_softmax, hidden) for hidden in sets]),
    ]
    note = f"for memory: {2 * N * model.vocab / 1e6:.0f} MB of logits are never written; softmax + topk computes less"
    return Work(candidates, cost, count, cold, note, partial(check, fused, sets[0][:CHECKED_ROWS], weight, options))


def check(fused: Callable, hidden: Tensor, weight: Tensor, options: dict) -> None:
    """Raises Failure unless a few rows are what float64 makes of them. Rows do not depend on each other."""
    ours = fused(hidden, weight, **options)
    low = reference.linear_confidence(hidden, weight, **options)
    exact = reference.linear_confidence(hidden.double(), weight.double(), **options)
    gap = (exact.logit - exact.second_logit).double()
    clear = gap > CLEAR * exact.logit.double().abs().clamp(min=1.0)
    wrong = clear & (ours.token != exact.token)
    if wrong.any():
        n = int(wrong.nonzero()[0, 0])
        raise Failure(f"token: row {n} is {int(ours.token[n])} instead of {int(exact.token[n])}")
    for field in ("logit", "logsumexp", "entropy", "confidence"):
        values = (getattr(result, field)[clear] for result in (ours, low, exact))
        no_worse_than_torch(field, *values, floor=ROUNDING)
