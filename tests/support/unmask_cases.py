"""Calls of `unmask` for its tests: one row drawn by hand, random batches under every rule, and how two results are
compared."""

from __future__ import annotations

import dataclasses
import importlib
import random
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from unmask_oracle import unmask_row

from dlm_kernels import RowState, UnmaskInputs, UnmaskRule, reference
from dlm_kernels.checks.unmask import LANES, ROWS
from dlm_kernels.rules import CACHE_OPS, PASSES, STOPS
from dlm_kernels.state import REFRESH
from dlm_kernels.testing import GuardedMemory, poisoned, same_bits
from dlm_kernels.testing.unmask_calls import MASK, random_call
from dlm_kernels.tiles import UnmaskTile

STOP, GIVEN, WRITTEN = 5, 1, 2
STATE_FIELDS = tuple(field.name for field in dataclasses.fields(RowState))
DTYPES = LANES | ROWS


@dataclasses.dataclass
class Case:
    """One call of `unmask`. `args`: the fields of `UnmaskInputs` that are given, and the call's kind."""

    state: RowState
    rule: UnmaskRule
    args: dict[str, Any]

    def map(self, change) -> Case:
        """The same call with `change(name, tensor)` in place of every tensor."""
        state = RowState(**{name: change(name, getattr(self.state, name)) for name in STATE_FIELDS})
        args = {name: change(name, x) if isinstance(x, Tensor) else x for name, x in self.args.items()}
        return Case(state, self.rule, args)

    def copy(self, device: torch.device | str = "cpu") -> Case:
        return self.map(lambda _, x: x.to(device, copy=True))

    def run(self, op=reference.unmask) -> tuple[RowState, Tensor]:
        """The state, advanced in place, and the lanes written."""
        inputs = UnmaskInputs(**{name: x for name, x in self.args.items() if name != "kind"})
        return self.state, op(self.state, self.rule, inputs, kind=self.args["kind"])


def oracle(case: Case) -> tuple[RowState, Tensor]:
    """What the per-row transcription makes of a copy of the case."""
    result, args = case.state.clone(), case.args
    changed = []
    for b in range(result.tokens.shape[0]):
        row = {name: getattr(result, name)[b].tolist() for name in STATE_FIELDS}
        given = {name: args[name][b].tolist() for name in (*LANES, *ROWS) if args.get(name) is not None}
        changed.append(unmask_row(row, case.rule, args["kind"], given, args["mask_id"], set(args["stop_ids"].tolist())))
        for name in STATE_FIELDS:
            getattr(result, name)[b] = torch.tensor(row[name], dtype=getattr(result, name).dtype)
    return result, torch.tensor(changed, dtype=torch.bool).reshape(args["score"].shape)


def assert_same(ours: tuple[RowState, Tensor], expected: tuple[RowState, Tensor], note: object = "") -> None:
    for name in STATE_FIELDS:
        a, b = getattr(ours[0], name).cpu(), getattr(expected[0], name).cpu()
        assert torch.equal(a, b), f"{note}: {name}\n{a}\n{b}"
    assert torch.equal(ours[1].cpu(), expected[1].cpu()), f"{note}: lanes written\n{ours[1]}\n{expected[1]}"


# One row, drawn: g given, w written (e, r: other tokens), # masked, S written stop, s given stop, . past the canvas.
# Lane j predicts pred[j].

TOKEN = {"g": GIVEN, "w": WRITTEN, "#": MASK, "S": STOP, "s": STOP, "e": 3, "r": 4, ".": 0}


def one_row(
    canvas: str, block: tuple[int, int], phase: int, rule: UnmaskRule, pred: str, kmin: int = 1, block_length: int = 4,
    block_step: int = 1, **args,
) -> Case:  # fmt: skip
    """Scores fall from lane to lane, so `kmin` lanes are the first ones; `args` are lists of one row or numbers."""
    state = RowState.empty(1, len(canvas), "cpu")
    state.tokens[0] = torch.tensor([TOKEN[c] for c in canvas])
    state.unmask_step[0] = torch.tensor([0 if c in "wSe" else -1 for c in canvas])
    fields = dict(
        canvas_len=len(canvas.split(".")[0]),
        block_start=block[0],
        block_end=block[1],
        phase=phase,
        step=3,
        block_step=block_step,
    )
    for name, number in fields.items():
        getattr(state, name)[0] = number
    state.block_masks[0] = canvas[slice(*block)].count("#")
    W = len(pred)
    call = dict(
        query_len=4,
        pred=[TOKEN[c] for c in pred],
        score=list(range(W, 0, -1)),
        confidence=[0.5] * W,
        value=0.0,
        min_unmask=kmin,
        steps=2,
        block_length=block_length,
    )
    tensors = {
        name: x if isinstance(x, Tensor) else torch.tensor([x], dtype=DTYPES[name]) for name, x in (call | args).items()
    }
    kind = "refresh" if phase == REFRESH else "denoise"
    return Case(state, rule, dict(kind=kind, mask_id=MASK, stop_ids=torch.tensor([STOP])) | tensors)


def drawn(state: RowState) -> str:
    """The row's canvas as `one_row` takes it."""
    letters = {MASK: "#", GIVEN: "g", WRITTEN: "w", STOP: "S", 3: "e", 4: "r"}
    canvas = "".join(letters[token] for token in state.tokens[0, : state.canvas_len[0]].tolist())
    return "".join(
        "s" if c == "S" and step < 0 else c for c, step in zip(canvas, state.unmask_step[0].tolist(), strict=False)
    )


# Random batches.


def random_rule(rng: random.Random) -> UnmaskRule:
    kind = rng.choice(("plain", "plain", "first_token", "edit", "renoise", "remask", "pipeline", "pipeline"))
    options: dict[str, Any] = dict(inclusive=rng.random() < 0.4, runs=rng.random() < 0.25 and kind != "renoise")
    passes = PASSES
    caches, stops = ["none", "commit", "refresh", "once"], ["never", "after_block", "closed", "all_stop"]
    if kind == "pipeline":
        options |= dict(pipeline=True, scope=rng.choice(("each", "first")))
        passes = ("none", "threshold", "threshold") if options["scope"] == "each" else PASSES
        caches = ["none", "fused", "delayed", "delayed"]
        stops = ["never", "after_block", "closed", "appends", "fill", "fill"]
    elif kind == "renoise":
        options["renoise"], caches = True, ["none", "commit"]
    else:
        options["quota"] = rng.random() < 0.3
    if kind in ("edit", "renoise"):
        options["edit"] = kind == "edit"
        stops.remove("closed")
    if kind == "remask":
        options["remask"] = rng.choice(("lowest", "saber", "wino"))
    if kind == "first_token":
        options["first_token"], caches = True, ["commit"]
    assert set(caches) <= set(CACHE_OPS) and set(stops) <= set(STOPS)
    return UnmaskRule(rng.choice(passes), cache=rng.choice(caches), stop=rng.choice(stops), **options)


def random_case(
    seed: int,
    B: int = 3,
    long: bool = False,
    rule: UnmaskRule | None = None,
    lanes: int | None = None,
    canvas: int = 256,
) -> Case:
    """One random call, whose rule and sizes are the seed's if they are not given.

    lanes: of the call. long: more lanes than one tile has, or more canvas than one tile (of `canvas` positions) of a
    search has.
    """
    rng = random.Random(seed)
    rule = random_rule(rng) if rule is None else rule
    W = lanes or (rng.choice((31, 33, 63, 65, 70)) if long else rng.choice((1, 2, 3, 5, 8, 12)))
    L = rng.choice((2 * W + 3, canvas + W + 1, 2 * canvas + 2 * W)) if long else rng.randint(W, 4 * W + 6)
    kind = "refresh" if rule.cache != "none" and rng.random() < 0.3 else "denoise"
    state, inputs = random_call(torch.Generator().manual_seed(seed), rule, kind, B=B, L=L, W=W)
    return Case(state, rule, dict(kind=kind) | inputs)


# Kernel against reference.


def assert_kernel_equals_reference(case: Case, note: object, tile: UnmaskTile | None = None) -> None:
    """The kernel gets guarded memory, with strided rows that begin nowhere in particular, and writes nothing else.
    tile: in place of the table's."""
    module = importlib.import_module("dlm_kernels.unmask.launch")
    expected = case.copy(case.state.tokens.device).run()
    memory = GuardedMemory()
    ours = case.map(lambda _, tensor: memory.spread(tensor, shift=2))
    inputs = {name: x.clone() for name, x in ours.args.items() if isinstance(x, Tensor)}
    choose = mock.patch.object(module, "unmask_tile", (lambda W: tile) if tile else module.unmask_tile)
    with choose, poisoned(memory):
        result = ours.run(module.unmask)
    memory.check()
    assert_same(result, expected, f"{note} {case.rule} {case.args['kind']} {tile}")
    for name, before in inputs.items():
        same_bits(f"{note}: the input {name}", ours.args[name], before)


# A search of the canvas in tiles of so many positions, when the tile is a toy.
TOY_CANVAS = 16


def run_case(seed: int, device: torch.device | str) -> dict[str, object]:
    """One random call from the seed, checked as `assert_kernel_equals_reference` does; every fourth against the oracle
    too.

    The rule is the seed's, so many seeds meet every rule. One call in four runs in registers, in the narrowest tile;
    the others from memory in tiles of 8 or 16 lanes, most of them with a region or a canvas of several tiles.
    """
    rng = random.Random(seed)
    tile = UnmaskTile(32, 1) if seed % 4 == 0 else UnmaskTile(32, 1, rng.choice((8, 16)))
    BLOCK_T = tile.BLOCK_T or TOY_CANVAS
    lanes = rng.choice((1, 5, BLOCK_T - 1, BLOCK_T, BLOCK_T + 1, BLOCK_T + 1, 2 * BLOCK_T, 2 * BLOCK_T - 1))
    case = random_case(seed, B=1 + (seed % 3 == 0), lanes=lanes)
    if seed % 4 == 1:
        assert_same(case.copy().run(), oracle(case), f"seed {seed} {case.rule}, the reference")
    module = importlib.import_module("dlm_kernels.unmask.launch")
    with mock.patch.object(module, "BLOCK_L", TOY_CANVAS):
        assert_kernel_equals_reference(case.copy(device), f"seed {seed}", tile)
    rule = case.rule
    words = [
        rule.passes,
        rule.scope,
        rule.remask,
        *(name for name in ("runs", "edit", "renoise", "first_token") if getattr(rule, name)),
    ]
    kind = " ".join(word for word in words if word not in ("row", "none") or word == rule.passes)
    where = "memory" if tile.BLOCK_T else "registers"
    return {"kind": f"{kind} in {where}", "boundary": max(lanes, case.state.tokens.shape[1]) > BLOCK_T}
