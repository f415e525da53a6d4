"""`unmask` in one launch: one program per row selects, writes and moves the row on. Specification: reference.unmask.

A region of up to 256 lanes stays in registers (kernel.py); a longer one is read tile by tile (memory.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import device
from ..checks.unmask import LANES, check_arguments
from ..library import operator
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
    check_arguments(state, rule, inputs, kind)
    score = inputs.score
    B, W = score.shape
    if W > MAX_W:
        raise ValueError(f"unmask: score [B, W] must have W <= {MAX_W}, got W={W}")
    changed = torch.empty(B, W, dtype=torch.bool, device=score.device)
    if B == 0:
        return changed
    device.capability_of("unmask", score, unmask_kernel)
    tile = unmask_tile(W)
    tensors = vars(state) | vars(inputs)
    mask_id = tensors.pop("mask_id")
    arguments = dict(
        **{f"{name}_ptr": tensor for name, tensor in tensors.items()},
        changed_ptr=changed,
        **{f"{name}_stride": 0 if tensors[name] is None else tensors[name].stride(0) for name in STRIDED},
        W=W,
        K=inputs.stop_ids.shape[0],
        mask_id=mask_id,
        **flags_of(rule, kind, inputs.value.dim() == 2),
        **tiles_of(tile),
        num_warps=tile.num_warps,
        num_stages=1,
        maxnreg=max_registers(tile.num_warps),
    )
    with device.launching_on(score):
        if tile.BLOCK_T is None:
            unmask_kernel[(B,)](**arguments)
        else:
            keys = None
            if rule.passes == "factor":
                keys = torch.empty(B, tile.BLOCK_W, dtype=torch.int64, device=score.device)
            unmask_memory_kernel[(B,)](**arguments, keys_ptr=keys)
    return changed


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
