"""Random calls of `block_attention` with hostile contents, and how the kernel is compared with the loop of
attention_oracle.py."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import torch
from attention_oracle import (
    by_the_loop,
    cached_slots,
    fields,
    live_positions,
    may_be_nan,
    place,
    stored_by_the_loop,
)
from torch import Tensor

from dlm_kernels import reference
from dlm_kernels.attention import launch as kernel
from dlm_kernels.testing import GuardedMemory, no_worse_than_torch, poisoned, same_bits
from dlm_kernels.testing.attention_calls import GUARD, RandomAttentionCall, random_call, score_floor

# Boundaries at toy size: key tiles of 16, splits of two tiles and at most two of them, then longer ones; three tiles of
# queries at most.
TOY = kernel.AttentionTile(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1, SPLIT=32, MAX_SPLITS=2, PREFILL_ROWS=48)
# Tiles of the split form and of the prefill: swapped operands, key tiles larger than a page, tiles that do not divide
# PREFILL_ROWS.
TOYS = (
    (TOY, TOY),
    (dataclasses.replace(TOY, SWAP=True, MAX_SPLITS=8), TOY),
    (dataclasses.replace(TOY, BLOCK_N=32, MAX_SPLITS=8), dataclasses.replace(TOY, BLOCK_M=32)),
    (dataclasses.replace(TOY, PREFILL_ROWS=16), dataclasses.replace(TOY, BLOCK_N=32)),
    (dataclasses.replace(TOY, PREFILL_ROWS=24, SWAP=True), dataclasses.replace(TOY, BLOCK_M=32)),
)


class Case(RandomAttentionCall):
    """A call that the reference and the kernel can be given."""

    @property
    def page_table(self) -> Tensor | None:
        return getattr(self.window, "page_table", None)

    @property
    def arguments(self) -> tuple:
        return self.q, self.k, self.v, *self.caches, self.window

    @property
    def options(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ("k_scale", "v_scale", "sliding_window")}
        return {"scale": self.scale} | {name: value for name, value in given.items() if value is not None}

    def reference(self) -> Tensor:
        return reference.block_attention(*self.arguments, **self.options)

    def kernel(self, tile: kernel.AttentionTile = TOY, **private) -> Tensor:
        """The kernel at a toy tile, in memory that is poisoned and guarded."""
        memory = GuardedMemory()
        with poisoned(memory):
            out = kernel._launch(*self.arguments, **self.options, tile=tile, **private)
        memory.check()
        return out


def random_case(
    seed: int,
    *,
    B: int | None = None,
    W: int | None = None,
    H_kv: int | None = None,
    G: int | None = None,
    D: int = 16,
    mode: str | None = None,
    cache: bool | None = None,
    SPLIT: int = TOY.SPLIT,
    capacity: int = 80,
    kept: bool = False,
    sliding: bool | int = False,
    fp8: bool = False,
    page_size: int | None = None,
    **options: Any,
) -> Case:
    """A random call of any shape around the boundaries of a toy tile; `options` are those of `random_call`."""
    rng = random.Random(f"shape {seed}")
    shape = {
        "B": B or rng.choice((1, 2, 3)),
        "W": W or rng.choice((1, 3, 8, 15, 16, 17, 20)),
        "H_kv": H_kv or rng.choice((1, 2)),
        "G": G or rng.choice((1, 2, 4, 7)),
        "mode": mode or rng.choice(("full", "causal", "block")),
    }
    cache = (rng.random() < 0.8 if cache is None else cache) or fp8 or kept or sliding or page_size is not None
    features = {"kept": kept, "sliding": sliding, "fp8": fp8, "page_size": page_size}
    call = random_call(seed, D=D, cache=bool(cache), split=SPLIT, capacity=capacity, **shape, **features, **options)
    return Case(**vars(call))


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    """Equal to the last bit, the sign of zero included; NaN equals NaN."""
    same_bits("left", left, right, any_nan=True)


def assert_not_finite_where(ours: Tensor, exact: Tensor, may_be_nan: Tensor) -> None:
    """What the exact results are not, ours are not finite either, and nothing else but what may be NaN."""
    assert not (ours.isfinite() & ~exact.isfinite()).any(), "a result is finite where the exact one is not"
    assert not (~ours.isfinite() & exact.isfinite() & ~may_be_nan).any(), "a result is not finite, the exact one is"


def not_finite(case: Case, rng: random.Random) -> Case:
    """The case with NaN or infinities in live places: of queries, of the window's keys and values, of cached ones that
    a row sees."""
    w = fields(case)
    (B, _, _, D), H_kv = case.q.shape, case.k.shape[1]
    rows = [b for b in range(B) if live_positions(w, b)]
    # What an fp8 cache keeps is NaN or finite.
    values = (math.nan, math.inf, -math.inf)
    for _ in range(rng.choice((1, 1, 2, 3)) if rows else 0):
        b, value = rng.choice(rows), rng.choice(values)
        columns = slice(None) if rng.random() < 0.3 else rng.randrange(D)
        live, slots, head = live_positions(w, b), cached_slots(case, w, b), rng.randrange(H_kv)
        kind = rng.choice(("q", "k", "v", "k", "v", "every key"))
        if kind == "q":
            case.q[b, rng.randrange(case.q.shape[1]), rng.choice(live), columns] = value
            continue
        tensor, buffer = (case.v, case.v_buffer) if kind == "v" else (case.k, case.k_buffer)
        every = kind == "every key"
        if every or not slots or rng.random() < 0.5:
            tensor[b, head, live if every else rng.choice(live), columns] = value
        if slots and (every or rng.random() < 0.5):
            for slot in slots if every else [rng.choice(slots)]:
                first, third = place(w, w["cache_row"][b], slot, case.caches[0].shape[2])
                buffer[first, head, GUARD + third, columns] = value if case.k_scale is None else math.nan
    return case


def check_against_the_loop(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    tile: kernel.AttentionTile = TOY,
    floor: float = 1e-6,
    **private,
) -> None:
    """The kernel's output within the error bound, zero where dead, and its stores exact (fp8: the reference's
    bytes)."""
    ours, low = case.to(dtype, device), case.to(dtype)
    out, low_out, exact = ours.kernel(tile, **private), low.reference(), by_the_loop(case)
    assert out.shape == case.q.shape and out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert_not_finite_where(low_out, exact, may_be_nan(case, keys=True))
    no_worse_than_torch(
        "out",
        out,
        low_out,
        exact,
        floor=floor,
        half_steps=False,
        may_be_nan=may_be_nan(case, keys=False),
        means_of=case.v,
    )
    w = fields(case)
    for b in range(case.q.shape[0]):
        dead = sorted(set(range(case.q.shape[2])) - set(live_positions(w, b)))
        assert not out[b, :, dead].any(), "a dead position is not zero"
    for mine, theirs, expected in zip(
        ours.buffers, low.buffers, stored_by_the_loop(case) if ours.buffers else (), strict=True
    ):
        assert_same_bits(mine, theirs)
        assert_same_bits(mine.double().cpu(), expected)


def has_boundary(case: Case, tile: kernel.AttentionTile = TOY) -> bool:
    """Whether some row needs more than one tile of queries or keys, or more than one split of its prefix."""
    G = case.q.shape[1] // case.k.shape[1]
    q_len = case.window.q_len
    crosses = (q_len * G > tile.BLOCK_M) | (q_len > tile.BLOCK_N)
    if case.k_buffer is not None:
        crosses |= (q_len > 0) & (case.window.kv_len > tile.BLOCK_N)
    return bool(crosses.any())


MODES = ("full", "causal", "block", "shadow")


def run_case(seed: int, device: torch.device) -> dict[str, Any]:
    """One random call of any mode and any set of features, the kernel against the loop in float64."""
    rng = random.Random(f"attention {seed}")
    features = {name: rng.random() < 0.25 for name in ("kept", "sliding", "fp8", "shared")}
    features["page_size"] = rng.choice((None, None, 16, 32))
    mode = rng.choice(MODES)
    tile, prefill = rng.choice(TOYS + TOYS[3:])  # the prefill as often as the split form
    # Few rows of few tiles, most of them just below, at or above a boundary: the interpreter's time is per program.
    G = rng.choice((1, 2, 3, 4, 5, 7, 8))
    rows = rng.choice((1, 9, 16, 16, 17, 24, 25, 33, 48, 49))
    W = max(1, rows // G + rng.choice((0, 0, 1)))
    B, H_kv = rng.choice(((1, 1), (1, 2), (2, 1), (3, 1))) if rows < 18 else (rng.choice((1, 1, 2)), 1)
    D = rng.choice((16, 16, 16, 32, 48))
    case = random_case(
        rng.randrange(2**31),
        B=B,
        W=W,
        H_kv=H_kv,
        G=G,
        D=D,
        mode=mode,
        capacity=rng.choice((17, 40, 65, 80)),
        full_rows=rng.random() < 0.3,
        **features,
    )
    dtype = rng.choice((torch.float32, torch.float32, torch.float16))
    finite = rng.random() < 0.75
    # Of thousands of calls some have few rows and scores of 50, whose rounding torch hits by chance.
    floor = score_floor(case.q, case.k, case.k_buffer, case.k_scale, case.scale)
    check_against_the_loop(case if finite else not_finite(case, rng), dtype, device, tile, floor=floor, prefill=prefill)
    stored = "no cache" if case.k_buffer is None else "fp8 cache" if features["fp8"] else "cache"
    words = [mode, stored, *(["paged"] if features["page_size"] else []), *([] if finite else ["not finite"])]
    return {"kind": ", ".join(words), "boundary": has_boundary(case, tile)}
