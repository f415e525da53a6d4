"""The two forms of `unmask` side by side: the kernel that keeps a row's region in registers, and the one that reads the
region from memory.

The table of tiles gives regions of up to 256 lanes to the registers, for a reason that nothing has measured. Here both
forms run at the same lanes, each forced by its tile, so that a GPU can say which one is faster. Each form must equal
the reference exactly on every set of inputs that is timed, before a time is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from dlm_fast import Ops
from dlm_kernels import RowState, UnmaskInputs, UnmaskRule, reference
from dlm_kernels.testing import same_bits
from dlm_kernels.tiles import UNMASK_TILES, UnmaskTile, unmask_tile

from .. import floors
from ..checks.unmask import compare_states
from ..shapes import Shapes
from ..timing import Candidate
from .ops import THRESHOLD, _open_state
from .run import OURS, Bench, Shape, Work

# A threshold that enough lanes pass needs no order of the lanes; a quota always needs one, and there the forms differ
# most: in registers the lanes are sorted, from memory the cut between two lanes is searched for.
RULES = {"threshold": UnmaskRule("threshold"), "quota": UnmaskRule("none", quota=True)}
QUOTA_STEPS = 8
# Candidates that the gates look for by name.
MEMORY = "ours, from memory"
MEMORY_OF_LONG_REGIONS = "ours, from memory, tile of long regions"


def shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    """Every rule at every number of rows and lanes."""
    for B, lanes in chosen.unmask_forms:
        for name in RULES:
            cost, facts = floors.unmask(B, lanes), {"kind": "unmask-forms", "B": B, "lanes": lanes, "rule": name}
            build = partial(_forms, bench, ops, B, lanes, name, cost)
            yield Shape("unmask-forms", "any", f"B={B} lanes={lanes} {name}", build, cost, facts, seconds=3)


def tiles(lanes: int) -> dict[str, UnmaskTile]:
    """By candidate, the tile that forces its form.

    The form in registers has the table's tile. The form from memory runs in the same lanes and warps, as a table
    without registers would have it, and in the one tile that the table has for long regions.
    """
    narrow = unmask_tile(lanes)
    return {
        OURS: dataclasses.replace(narrow, BLOCK_T=None),
        MEMORY: dataclasses.replace(narrow, BLOCK_T=narrow.BLOCK_W),
        MEMORY_OF_LONG_REGIONS: UNMASK_TILES[-1],
    }


def forced(op: Callable[..., Tensor], tile: UnmaskTile) -> Callable[..., Tensor]:
    """The op, launched with that tile whatever the table says."""
    from dlm_kernels.unmask import launch

    def call(*arguments: object, **options: object) -> Tensor:
        of_the_table = launch.unmask_tile
        launch.unmask_tile = lambda W: tile
        try:
            return op(*arguments, **options)
        finally:
            launch.unmask_tile = of_the_table

    return call


def _forms(bench: Bench, ops: Ops, B: int, lanes: int, rule: str, cost: floors.Cost) -> Work:
    count, cold = bench.rotation(int(cost.nbytes))
    templates = [_open_state(B, lanes, bench.device) for _ in range(count)]
    inputs = [_inputs(B, lanes, bench.device) for _ in range(count)]
    forms = {OURS: ops.unmask}  # the reference has no tile, and no forms
    if ops.name == "triton":
        forms = {name: forced(ops.unmask, tile) for name, tile in tiles(lanes).items()}

    def candidate(name: str) -> Candidate:
        states = [template.clone() for template in templates]

        def restore() -> None:
            for state, template in zip(states, templates):
                for field in dataclasses.fields(RowState):
                    getattr(state, field.name).copy_(getattr(template, field.name))

        calls = [
            partial(forms[name], state, RULES[rule], given, kind="denoise") for state, given in zip(states, inputs)
        ]
        return Candidate(name, calls, before=restore)

    def check() -> None:
        for template, given in zip(templates, inputs):
            expected = template.clone()
            written = reference.unmask(expected, RULES[rule], given, kind="denoise")
            for name, form in forms.items():
                state = template.clone()
                same_bits(f"the lanes written, {name}", form(state, RULES[rule], given, kind="denoise"), written)
                compare_states(state, expected, f", {name}")

    return Work([candidate(name) for name in forms], cost, count, cold, check=check)


def _inputs(B: int, lanes: int, device: torch.device) -> UnmaskInputs:
    """One denoise step of blocks that fill their lanes."""
    counts = {"query_len": lanes, "min_unmask": 1, "steps": QUOTA_STEPS, "block_length": lanes}
    score = torch.rand(B, lanes, device=device)
    return UnmaskInputs(
        pred=torch.randint(4, 1000, (B, lanes), device=device),
        score=score,
        confidence=score,
        value=torch.full((B,), THRESHOLD, device=device),
        mask_id=0,
        stop_ids=torch.tensor([1], device=device),
        **{name: torch.full((B,), n, dtype=torch.int32, device=device) for name, n in counts.items()},
    )
