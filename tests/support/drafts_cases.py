"""Calls of `draft_build` and `verify` for their tests, an oracle in Python numbers, and one random case checked from
end to end."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dlm_kernels import reference
from dlm_kernels.drafts import launch as drafts
from dlm_kernels.reference import DraftSource
from dlm_kernels.testing import GuardedMemory, poisoned, same_bits
from dlm_kernels.testing.drafts_calls import random_drafts
from dlm_kernels.testing.unmask_calls import MASK

FIELDS = tuple(field.name for field in dataclasses.fields(DraftSource))
LANES = ("held", "token", "score", "confidence")


@dataclasses.dataclass
class Case:
    """The lanes of a step and its drafts: what `draft_build` and then `verify` are given."""

    source: DraftSource
    tokens: Tensor
    eligible: Tensor
    ready: Tensor
    drafting: Tensor
    selects: Tensor
    held: Tensor
    token: Tensor
    score: Tensor
    confidence: Tensor

    def map(self, change) -> Case:
        """The same case with `change(name, tensor)` in place of every tensor."""
        source = DraftSource(**{name: change(f"source.{name}", getattr(self.source, name)) for name in FIELDS})
        return Case(source, **{f.name: change(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)[1:]})

    def copy(self, device: torch.device | str = "cpu") -> Case:
        return self.map(lambda _, x: x.to(device, copy=True))

    def build(self, op=reference.draft_build) -> Tensor:
        return op(self.source, self.tokens, self.eligible, self.ready, D=self.held.shape[1])

    def verify(self, op=reference.verify):
        """What is written; the source is advanced in place."""
        return op(
            self.source, self.held, self.token, self.score, self.confidence,
            eligible=self.eligible, ready=self.ready, drafting=self.drafting, selects=self.selects, mask_id=MASK,
        )  # fmt: skip


# One row at a time, in Python numbers.


def best_first(lanes: list[int], score: list[float]) -> list[int]:
    return sorted(lanes, key=lambda j: (math.inf if math.isnan(score[j]) else -score[j], j))


def build_row(row: dict[str, Any], D: int) -> list[list[int]]:
    order = best_first([j for j, ok in enumerate(row["eligible"]) if ok], row["source.score"]) if row["ready"] else []
    return [
        [row["source.token"][j] if j in order[: k + 1] else token for j, token in enumerate(row["tokens"])]
        for k in range(D)
    ]


def verify_row(row: dict[str, Any]) -> tuple[list[bool], list[int], list[float]]:
    """Advances the row's source."""
    held, eligible = row["held"], [j for j, ok in enumerate(row["eligible"]) if ok]
    best, drafts_too = 0, row["ready"] and row["drafting"]
    while drafts_too:
        target = list(held[best])
        for j in best_first([j for j in eligible if target[j] == MASK], row["score"][best])[:1]:
            target[j] = row["token"][best][j]
        agree = [j for j in range(best + 1, min(len(held), len(eligible))) if held[j] == target]
        if not agree:
            break
        best = agree[-1]
    order = best_first(eligible, row["source.score"])
    count = best + 1 if row["ready"] else 0
    chosen = order[: count + (len(order) - count == 1)]
    pred, confidence = list(row["token"][best]), list(row["confidence"][best])
    for j in order[:count]:
        pred[j], confidence[j] = row["source.token"][j], row["source.confidence"][j]
    if row["selects"]:
        for name in ("token", "score", "confidence"):
            row[f"source.{name}"] = list(row[name][best])
        if drafts_too:
            row["source.tried"] += 1
            row["source.accepted"] += best
    return [j in chosen for j in range(len(held[0]))], pred, confidence


def rows_of(case: Case) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{} for _ in range(case.held.shape[0])]
    case.map(lambda name, x: [rows[b].__setitem__(name, x[b].tolist()) for b in range(len(rows))])
    return rows


# Random cases.


def random_case(seed: int, B: int = 2, W: int | None = None, D: int | None = None) -> Case:
    """Random drafts, as many and as long as the seed says if that is not given."""
    rng = random.Random(seed)
    W = rng.choice((1, 2, 3, 5, 8, 15, 16, 17, 31, 33)) if W is None else W
    D = rng.choice((1, 2, 2, 3, 3, 5)) if D is None else D
    source, call = random_drafts(torch.Generator().manual_seed(seed), B=B, D=D, W=W)
    held = reference.draft_build(source, call["tokens"], call["eligible"], call["ready"], D=D)
    return Case(source, held=held, **call)


# Comparisons.


def same(name: str, ours: Tensor, expected: Tensor) -> None:
    same_bits(name, ours, expected, any_nan=True)


def same_sources(ours: DraftSource, expected: DraftSource) -> None:
    for name in FIELDS:
        same(f"source.{name}", getattr(ours, name), getattr(expected, name))


def check_kernels(case: Case, tile: tuple[int, int] | None = None) -> None:
    """Both kernels equal their references on the case, in guarded memory with strided rows, and write nothing else.
    `tile`: for the table's."""
    expected = case.copy()
    built, verified = expected.build(), expected.verify()
    memory = GuardedMemory()
    ours = case.map(lambda _, tensor: memory.spread(tensor, shift=2))
    inputs = ours.copy()
    choose = mock.patch.object(drafts, "drafts_tile", (lambda W: tile) if tile else drafts.drafts_tile)
    with choose, poisoned(memory):
        held = ours.build(drafts.draft_build)
        result = ours.verify(drafts.verify)
    memory.check()
    same("held", held, built)
    for name, a, b in zip(result._fields, result, verified, strict=True):
        same(name, a, b)
    same_sources(ours.source, expected.source)
    for field in dataclasses.fields(case)[1:]:
        same(f"the input {field.name}", getattr(ours, field.name), getattr(inputs, field.name))


def run_case(seed: int, device: torch.device | str) -> dict[str, object]:
    """One random case from the seed, checked as `check_kernels` does, in tiles of 16 lanes; every third against the
    oracle too."""
    W = random.Random(seed).choice((5, 16, 17, 17, 24, 31, 32))
    case = random_case(seed, B=2 - (seed % 3 > 0), W=W)
    if seed % 3 == 0:
        check_oracle(case)
    check_kernels(case.copy(device), (16, 1))
    return {"kind": f"D={case.held.shape[1]}", "boundary": W > 16}


def check_oracle(case: Case) -> None:
    """The references equal the per-row transcription."""
    rows, D = rows_of(case), case.held.shape[1]
    assert case.build().tolist() == [build_row(row, D) for row in rows]
    ours = case.copy()
    verified, written = ours.verify(), [verify_row(row) for row in rows]
    for name, x, at in zip(verified._fields, verified, range(3), strict=True):
        same(name, x, torch.tensor([row[at] for row in written], dtype=x.dtype))
    for name in FIELDS:
        field = getattr(ours.source, name)
        same(f"source.{name}", field, torch.tensor([row[f"source.{name}"] for row in rows], dtype=field.dtype))
