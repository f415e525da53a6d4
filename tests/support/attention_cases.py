"""Random calls of `block_attention` with hostile contents, and how the kernel is compared with the loop of
attention_oracle.py."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from attention_oracle import (
    by_the_loop,
    cached_slots,
    e4m3,
    fields,
    live_positions,
    may_be_nan,
    place,
    stored_by_the_loop,
)
from torch import Tensor

from dlm_kernels import Window, reference
from dlm_kernels.attention import launch as kernel
from dlm_kernels.testing import GuardedMemory, no_worse_than_torch, poisoned, same_bits

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
GUARD = 8
FP8 = torch.float8_e4m3fn


@dataclasses.dataclass
class Case:
    """Arguments of one call. The caches are views of buffers whose margins (along the slots) nobody may touch.

    With a page table, a buffer is [num_pages, H_kv, GUARD + page_size + GUARD, D], else [R, H_kv, GUARD + capacity +
    GUARD, D]. A case in float64 holds the numbers of an fp8 cache before their scale.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_buffer: Tensor | None
    v_buffer: Tensor | None
    window: Window
    scale: float
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    sliding_window: int | None = None

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Case:
        """A copy: caches are written in place. Strides are kept."""
        stored = FP8 if self.k_scale is not None and dtype != torch.float64 else dtype
        q, k, v = (tensor.to(device, dtype, copy=True) for tensor in (self.q, self.k, self.v))
        buffers = (None if t is None else t.to(stored, copy=True).to(device) for t in (self.k_buffer, self.v_buffer))
        scales = (None if t is None else t.to(device, copy=True) for t in (self.k_scale, self.v_scale))
        window = self.change_window(lambda _, tensor: tensor.to(device, copy=True))
        return Case(q, k, v, *buffers, window, self.scale, *scales, self.sliding_window)

    def change_window(self, change) -> Window:
        """The window with `change(name, tensor)` in place of every tensor."""
        changed = {name: change(name, tensor).contiguous() for name, tensor in self.window.tensors().items()}
        return dataclasses.replace(self.window, **changed)

    @property
    def caches(self) -> tuple[Tensor | None, Tensor | None]:
        if self.k_buffer is None:
            return None, None
        return self.k_buffer[:, :, GUARD:-GUARD], self.v_buffer[:, :, GUARD:-GUARD]

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return () if self.k_buffer is None else (self.k_buffer, self.v_buffer)

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
    shared: bool = False,
    full_rows: bool = False,
    q_lens: Sequence[int] | None = None,
    kv_lens: Sequence[int] | None = None,
) -> Case:
    """A ragged batch in float64 (values exact in float16) where everything that must not be read is NaN or infinite.

    sliding: True for any sliding window. shared: the rows of the batch may read the same cache row. full_rows: every
    row uses the whole window. q_lens, kv_lens: the rows' lengths, instead of random ones around the boundaries.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    B = B or rng.choice((1, 2, 3))
    W = W or rng.choice((1, 3, 8, 15, 16, 17, 20))
    H_kv = H_kv or rng.choice((1, 2))
    G = G or rng.choice((1, 2, 4, 7))
    mode = mode or rng.choice(("full", "causal", "block"))
    cache = (rng.random() < 0.8 if cache is None else cache) or fp8 or kept or sliding or page_size is not None
    R = B + 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half().double()

    w: dict[str, Any] = {name: [] for name in ("q_pos", "q_block", "q_len", "kv_slot", "kv_len", "replaced", "kept")}
    w["cache_row"] = rng.choices(range(R), k=B) if shared else rng.sample(range(R), B)
    for b in range(B):
        q_len = W if full_rows else rng.choice((0, W, W, rng.randint(1, W)))
        lengths = [0, 1, SPLIT // 2, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT, 2 * SPLIT + 1, rng.randint(0, capacity)]
        kv_len, replaced = min(rng.choice(lengths), capacity), [0, 0]
        q_len = q_len if q_lens is None else q_lens[b]
        kv_len = kv_len if kv_lens is None else kv_lens[b]
        if rng.random() < 0.4 and kv_len > 0:
            start = rng.choice((0, rng.randrange(kv_len)))
            replaced = [start, min(start + rng.choice((1, SPLIT, rng.randint(1, W + 4))), capacity)]
        elif rng.random() < 0.2:  # nothing, said in another way
            replaced = rng.choice(([5, 5], [capacity, capacity], [9, 3]))
        # Slots lost one by one, or the whole beginning of the prefix.
        hidden = rng.choice((0, SPLIT // 2, SPLIT, SPLIT + 1, capacity))
        w["kept"].append([s >= hidden and rng.random() < 0.7 for s in range(capacity)])
        block_length, prompt, relative = rng.choice((1, 4, 5)), rng.randint(0, 9), rng.random() < 0.5
        first = rng.randint(0, 40)
        position = list(range(first, first + W))
        order = rng.random()
        if order < 0.2:
            rng.shuffle(position)
        elif order < 0.35:  # the keys of the first tiles come last
            position.reverse()
        elif mode == "shadow" or order < 0.5:  # a copy of the same positions, as a shadow has
            position = [first + j % max(1, q_len // 2) for j in range(W)]
        padding = rng.choice((0, 0, 1, W // 2))
        block = [max(0, (p - prompt) // block_length + 1) if relative else p // block_length for p in position]
        if mode == "shadow":
            block = [n + (50 + j if j >= q_len // 2 and rng.random() < 0.8 else 0) for j, n in enumerate(block)]
        w["q_block"].append([-1 if j < padding or rng.random() < 0.05 else n for j, n in enumerate(block)])
        for name, value in (("q_pos", position), ("q_len", q_len), ("kv_len", kv_len), ("replaced", replaced)):
            w[name].append(value)
        w["kv_slot"].append([-1] * W)
    w["mode"] = mode
    if not kept:
        del w["kept"]
    sliding_window = rng.choice((1, 2, SPLIT // 2, SPLIT, SPLIT + 1, 1000)) if sliding is True else sliding or None
    tensors = {
        n: torch.tensor(x, dtype=torch.bool if n == "kept" else torch.int32) for n, x in w.items() if n != "mode"
    }
    window = Window(mode=mode, **tensors)

    # q, k, v as Hugging Face hands them over: transposed views of [B, W, H, D].
    spread = rng.choice((1, 1, 8))
    q = normal(B, W, H_kv * G, D).transpose(1, 2) * spread
    k, v = (normal(B, W, H_kv, D).transpose(1, 2) for _ in range(2))
    scales: list[Tensor | None] = [None, None]
    if fp8:  # the small ones saturate, the large ones reach the subnormal numbers
        scales = [torch.tensor([rng.choice((0.004, 0.0123, 1.0, 37.0)) for _ in range(H_kv)]) for _ in range(2)]
    buffers: list[Tensor | None] = [None, None]
    if cache:
        buffers = [torch.full((R, H_kv, capacity + 2 * GUARD, D), math.nan, dtype=torch.float64) for _ in range(2)]
    case = Case(q, k, v, *buffers, window, rng.choice((D**-0.5, 0.3)), *scales, sliding_window)

    # What a slot may hold: a key if some row sees it; else NaN, and then one window position may be stored there, dead
    # ones included.
    seen: dict[int, set[int]] = {row: set() for row in w["cache_row"]}
    for b, row in enumerate(w["cache_row"]):
        seen[row] |= set(cached_slots(case, w, b)) if cache else set()
    # A store must be hidden from its readers by kv_len, replaced or kept: what only slides out of sight stays
    # unwritten.
    taken = {row: set(slots) for row, slots in seen.items()}
    unslid = dataclasses.replace(case, sliding_window=None)
    for b, row in enumerate(w["cache_row"]):
        taken[row] |= set(cached_slots(unslid, w, b)) if cache else set()
    for b, row in enumerate(w["cache_row"]):
        hidden_slots = [s for s in range(capacity) if s not in taken[row]]
        rng.shuffle(hidden_slots)
        for j in range(W):
            if hidden_slots and rng.random() < 0.7:
                window.kv_slot[b, j] = hidden_slots.pop()
                taken[row].add(int(window.kv_slot[b, j]))
        dead = [j for j in range(W) if j not in live_positions(w, b)]
        # Infinity times zero is NaN too, and shows if it is stored over the NaN of a hidden slot.
        q[b, :, dead], k[b, :, dead], v[b, :, dead] = math.nan, math.inf, math.inf
    for row, slots in seen.items() if cache else ():
        slots = torch.tensor(sorted(slots), dtype=torch.long)
        for buffer, unit in zip(buffers, scales, strict=True):
            new = normal(H_kv, len(slots), D)
            buffer[row][:, GUARD + slots] = new if unit is None else e4m3(new.float() / unit[:, None, None])
    return case if page_size is None else paged(case, page_size, rng)


def paged(case: Case, page_size: int, rng: random.Random | None = None) -> Case:
    """The same slots in pages that lie anywhere. Table entries that nobody needs are garbage; page 0 holds NaN and
    stays that way."""
    rng = rng or random.Random(page_size)
    w = fields(case)
    R, H_kv, capacity, D = case.caches[0].shape
    P = -(-capacity // page_size)
    needed = set()
    for b, row in enumerate(w["cache_row"]):
        slots = cached_slots(case, w, b) + [w["kv_slot"][b][j] for j in live_positions(w, b)]
        needed |= {(row, s // page_size) for s in slots if s >= 0}
    num_pages = len(needed) + 3
    table = torch.full((R, P), rng.choice((-1, 10**8)), dtype=torch.int32)
    pages = rng.sample(range(1, num_pages), len(needed))
    buffers = [torch.full((num_pages, H_kv, page_size + 2 * GUARD, D), math.nan, dtype=torch.float64) for _ in range(2)]
    for (row, index), page in zip(sorted(needed), pages, strict=True):
        table[row, index] = page
        for buffer, cache in zip(buffers, case.caches, strict=True):
            slots = cache[row, :, index * page_size : (index + 1) * page_size]
            buffer[page, :, GUARD : GUARD + slots.shape[1]] = slots
    changes = {"page_table": table}
    if case.window.kept is not None:
        changes["kept"] = torch.nn.functional.pad(case.window.kept, (0, P * page_size - capacity), value=True)
    window = dataclasses.replace(case.window, **changes)
    return dataclasses.replace(case, k_buffer=buffers[0], v_buffer=buffers[1], window=window)


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
    case: Case, dtype: torch.dtype, device: torch.device, tile: kernel.AttentionTile = TOY, **private
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
    check_against_the_loop(case if finite else not_finite(case, rng), dtype, device, tile, prefill=prefill)
    stored = "no cache" if case.k_buffer is None else "fp8 cache" if features["fp8"] else "cache"
    words = [mode, stored, *(["paged"] if features["page_size"] else []), *([] if finite else ["not finite"])]
    return {"kind": ", ".join(words), "boundary": has_boundary(case, tile)}
