"""`unmask` on a CPU: one row after the other in Python's numbers.

A row looks at a few lanes, which a loop passes in the time of a few calls of torch, and a row does only what its own
phase asks for. The reference computes every case of every row in about 110 calls.
"""

from __future__ import annotations

from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..checks.unmask import check_arguments
from ..rules import Kind, UnmaskInputs, UnmaskRule
from ..state import ROW_FIELDS, RowState
from .calls import on_cpu
from .row import Call, Row

# Above so many rows or lanes of all rows the reference, whose time hardly grows with them, takes less than the loop.
MOST_ROWS, MOST_LANES = 64, 2048

_numbers = attrgetter(*ROW_FIELDS)


@on_cpu(reference.unmask)
def unmask(state: RowState, rule: UnmaskRule, inputs: UnmaskInputs, *, kind: Kind) -> Tensor:
    """`reference.unmask`, which says what is written, and of what arguments. Every number is the same bit for bit."""
    is_rare = rule.renoise or rule.remask != "none" or rule.cache == "delayed" or rule.stop == "fill"
    if is_rare or state.tokens.shape[0] > MOST_ROWS or inputs.score.numel() > MOST_LANES:
        # The same function by contract. Few decoders have a rare rule, and their policies cost more than the op.
        return reference.unmask(state, rule, inputs, kind=kind)
    check_arguments(state, rule, inputs, kind)
    written = np.zeros(inputs.score.shape, dtype=bool)
    canvases = state.tokens.numpy(), state.unmask_step.numpy(), state.unmask_confidence.numpy()
    fields = [getattr(state, name).tolist() for name in ROW_FIELDS]
    given = {name: x.tolist() for name, x in vars(inputs).items() if x is not None and name != "mask_id"}
    call = Call(rule, kind, inputs.mask_id, frozenset(given.pop("stop_ids")))
    rows = [Row(*numbers) for numbers in zip(*fields, *canvases, written)]
    for row, numbers in zip(rows, zip(*given.values())):
        row.step_on(call, dict(zip(given, numbers)))
    for name, before, after in zip(ROW_FIELDS, fields, zip(*map(_numbers, rows))):
        if list(after) != before:
            getattr(state, name).numpy()[:] = after
    # torch does not see what is written through numpy.
    torch.autograd.graph.increment_version(vars(state).values())
    return torch.from_numpy(written)
