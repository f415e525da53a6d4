"""`unmask` in one launch: one program per row selects, writes and moves the row on. Specification: reference.unmask.

A region of up to 256 lanes stays in registers (kernel.py); a longer one is read tile by tile (memory.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from .. import device
from ..checks.unmask import LANES, check_arguments
from ..library import operator
from ..plans import Calls, Launch, Plan
from ..rules import Kind, UnmaskInputs, UnmaskRule
from ..state import RowState
from ..tiles import UNMASK_TILES, UnmaskTile, unmask_tile
from .kernel import unmask_kernel
from .memory import unmask_memory_kernel

MAX_W = UNMASK_TILES[-1].BLOCK_W
# 32-bit registers of a multiprocessor. A program is given as many as its threads can have: without a bound, ptxas
# prefers spills to fewer programs at once, but there are only as many programs as rows.
REGISTERS = 65536
# Canvas positions read at once in the search for the next mask; the search ends at the first tile that holds a mask.
BLOCK_L = 256

# Tensors whose rows may have any stride.
STRIDED = ("tokens", "unmask_step", "unmask_confidence", *LANES, "value")
# The tensors that a call may have, and what the rule says.
_STATE = tuple(field.name for field in dataclasses.fields(RowState))
_INPUTS = tuple(field.name for field in dataclasses.fields(UnmaskInputs) if field.name != "mask_id")
_of_state, _of_inputs = attrgetter(*_STATE), attrgetter(*_INPUTS)
_of_rule = attrgetter(*(field.name for field in dataclasses.fields(UnmaskRule)))
_NAMES = tuple(f"{name}_ptr" for name in (*_STATE, *_INPUTS))
_calls = Calls("unmask", _NAMES)


def _changed(*, inputs: UnmaskInputs, **_: object) -> Tensor:
    return inputs.score.new_empty(inputs.score.shape, dtype=torch.bool)


@operator(mutates=("state",), fake=_changed)
def unmask(state: RowState, rule: UnmaskRule, inputs: UnmaskInputs, *, kind: Kind) -> Tensor:
    """Write the chosen predictions of every row's region and move every row to what it needs next, in place, in one
    launch.

    Equal to reference.unmask on every field of `state` and in what is returned, bit for bit; the reference describes
    the arguments, the rules and the errors. W may be at most MAX_W. Nothing depends on the tile width or on the other
    rows. Traffic: 29 B a lane of the region at most (40 B with an optional lane tensor or two; above 256 lanes they are
    read three to five times, from L2 but for the first), plus 8 B a canvas position from the block to the next mask
    when the block is finished; rule.stop "fill" reads 12 B of every canvas position.

    Raises:
        As reference.unmask, and ValueError: W > MAX_W.  RuntimeError: CPU tensors without Triton's interpreter.
        NotImplementedError: a GPU that `tiles.TARGETS` does not name.
    """
    # 1. What is known of such a call.
    try:
        given = (*_of_state(state), *_of_inputs(inputs))
        mask_id = inputs.mask_id
        facts = (type(state), type(inputs), type(rule), *_of_rule(rule), kind, type(mask_id), mask_id)
    except AttributeError:  # one of them is another class: the check says so
        given, facts = (), ()
    call, key, tensors, pointers = _calls.find(given, facts)
    written = pointers[: len(_STATE)]

    # 2. The check, unless the call is known to pass.
    if call is None or not call.accepts(tensors, written):
        check_arguments(state, rule, inputs, kind)
        W = inputs.score.shape[1]
        if W > MAX_W:
            raise ValueError(f"unmask: score [B, W] must have W <= {MAX_W}, got W={W}")
        if call is None:
            call = _calls.add(key if facts[:3] == (RowState, UnmaskInputs, UnmaskRule) else None)
        call.accepted(written)

    # 3. The plan of such calls for this tile and these kernels.
    score = inputs.score
    B, W = score.shape
    if B == 0:
        return _changed(inputs=inputs)
    device.capability_of("unmask", score, unmask_kernel)
    tile = unmask_tile(W)
    depends = (tile, unmask_kernel, unmask_memory_kernel)
    plan = call.plan_for(depends)
    if plan is None:
        plan = _UnmaskPlan(given, rule, kind, inputs.mask_id, tile)
        call.plan = depends, plan
    return plan.run(score, tensors, pointers)


class _UnmaskPlan:
    """How all calls like one are launched.

    Args:
        given: the tensors of the call, as `_NAMES` names them; only what they look like is used.
    """

    def __init__(
        self, given: Sequence[Tensor | None], rule: UnmaskRule, kind: Kind, mask_id: int, tile: UnmaskTile
    ) -> None:
        tensors = dict(zip((*_STATE, *_INPUTS), given, strict=True))
        self.shape = B, W = tensors["score"].shape
        present = [name for name, tensor in zip(_NAMES, given) if tensor is not None]
        # Keys of a memory form that sorts.
        has_keys = tile.BLOCK_T is not None and rule.passes == "factor"
        self.keys = (B, tile.BLOCK_W) if has_keys else None
        places = {name: place for place, name in enumerate([*present, "changed_ptr", *(["keys_ptr"] * has_keys)])}
        values = dict(
            **{f"{name}_stride": 0 if tensors[name] is None else tensors[name].stride(0) for name in STRIDED},
            W=W,
            K=tensors["stop_ids"].shape[0],
            mask_id=mask_id,
            **flags_of(rule, kind, tensors["value"].dim() == 2),
            **tiles_of(tile),
            num_warps=tile.num_warps,
            num_stages=1,
            maxnreg=max_registers(tile.num_warps),
        )
        kernel, names = unmask_kernel, (*_NAMES, "changed_ptr")
        if tile.BLOCK_T is not None:
            kernel, names = unmask_memory_kernel, (*names, "keys_ptr")
        self.plan = Plan([Launch(kernel, (B,), names, places, values)])

    def run(self, score: Tensor, tensors: Sequence[Tensor], pointers: tuple[int, ...]) -> Tensor:
        """The lanes that the call wrote, which has these tensors, those of `_NAMES` that are not None."""
        written = [torch.empty(*self.shape, dtype=torch.bool, device=score.device)]
        if self.keys is not None:
            written.append(torch.empty(*self.keys, dtype=torch.int64, device=score.device))
        self.plan.run(score, tensors, written, pointers)
        return written[0]


def tiles_of(tile: UnmaskTile) -> dict[str, int]:
    tiles = dict(LOG_W=tile.BLOCK_W.bit_length() - 1, BLOCK_W=tile.BLOCK_W, BLOCK_L=BLOCK_L)
    if tile.BLOCK_T is not None:
        tiles |= dict(LOG_T=tile.BLOCK_T.bit_length() - 1, BLOCK_T=tile.BLOCK_T, BLOCK_L=tile.BLOCK_T)
    return tiles


def max_registers(num_warps: int) -> int:
    return min(255, REGISTERS // (32 * num_warps))


def flags_of(rule: UnmaskRule, kind: Kind, value_per_lane: bool) -> dict[str, object]:
    return dict(
        KIND=kind,
        PASSES=rule.passes,
        INCLUSIVE=rule.inclusive,
        QUOTA=rule.quota,
        SCOPE=rule.scope,
        RUNS=rule.runs,
        EDIT=rule.edit,
        RENOISE=rule.renoise,
        REMASK=rule.remask,
        CACHE=rule.cache,
        FIRST_TOKEN=rule.first_token,
        STOP=rule.stop,
        VALUE_PER_LANE=value_per_lane,
    )
