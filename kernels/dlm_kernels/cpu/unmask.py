"""`unmask` on a CPU: one row after the other in Python's numbers.

A row looks at a few lanes, which a loop passes in the time of a few calls of torch, and a row does only what its own
phase asks for. The reference computes every case of every row in about 110 calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks.unmask import check_arguments
from ..rules import Kind, UnmaskInputs, UnmaskRule
from ..state import CANVAS_FIELDS, ROW_FIELDS, RowState
from .calls import on_cpu
from .row import Call, Row

# Above so many rows the reference, whose time hardly grows with the rows, takes less time than the loop.
MOST_ROWS = 64


@on_cpu(reference.unmask)
def unmask(state: RowState, rule: UnmaskRule, inputs: UnmaskInputs, *, kind: Kind) -> Tensor:
    """`reference.unmask`, which says what is written, and of what arguments. Every number is the same bit for bit."""
    is_rare = rule.renoise or rule.remask != "none" or rule.cache == "delayed" or rule.stop == "fill"
    if is_rare or state.tokens.shape[0] > MOST_ROWS:
        # The same function by contract. Few decoders have a rare rule, and their policies cost more than the op.
        return reference.unmask(state, rule, inputs, kind=kind)
    check_arguments(state, rule, inputs, kind)
    written = torch.zeros(inputs.score.shape, dtype=torch.bool)
    canvases = [getattr(state, name).detach().numpy() for name in CANVAS_FIELDS]
    fields = [getattr(state, name).tolist() for name in ROW_FIELDS]
    given = {name: x.tolist() for name, x in vars(inputs).items() if isinstance(x, Tensor)}
    call = Call(rule, kind, inputs.mask_id, frozenset(given.pop("stop_ids")))
    rows = [Row(*numbers) for numbers in zip(*fields, *canvases, written.numpy(), strict=True)]
    for b, row in enumerate(rows):
        row.step_on(call, {name: numbers[b] for name, numbers in given.items()})
    for name, before in zip(ROW_FIELDS, fields, strict=True):
        after = [getattr(row, name) for row in rows]
        if after != before:
            getattr(state, name).numpy()[:] = after
    # torch does not see what is written through numpy.
    torch.autograd.graph.increment_version(vars(state).values())
    return written
