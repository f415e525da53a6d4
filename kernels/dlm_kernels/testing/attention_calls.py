"""Random calls of `block_attention` with hostile contents, for the tests and for the check on a GPU."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..window import Window

GUARD = 8
FP8 = torch.float8_e4m3fn
# Added to window fields that nobody may look at.
IGNORED = 10**6
C = TypeVar("C", bound="RandomAttentionCall")


@dataclasses.dataclass
class RandomAttentionCall:
    """Arguments of one call. The caches are views of buffers whose margins (along the slots) nobody may touch.

    With a page table, a buffer is [num_pages, H_kv, GUARD + page_size + GUARD, D], else [R, H_kv, GUARD + capacity +
    GUARD, D]. A call in float64 holds the numbers of an fp8 cache before their scale.
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

    def to(self: C, dtype: torch.dtype, device: torch.device | str = "cpu") -> C:
        """A copy: caches are written in place. Strides are kept."""
        stored = FP8 if self.k_scale is not None and dtype != torch.float64 else dtype
        q, k, v = (tensor.to(device, dtype, copy=True) for tensor in (self.q, self.k, self.v))
        buffers = (None if t is None else t.to(stored, copy=True).to(device) for t in (self.k_buffer, self.v_buffer))
        scales = (None if t is None else t.to(device, copy=True) for t in (self.k_scale, self.v_scale))
        window = self.change_window(lambda _, tensor: tensor.to(device, copy=True))
        return type(self)(q, k, v, *buffers, window, self.scale, *scales, self.sliding_window)

    def change_window(self, change: Callable[[str, Tensor], Tensor]) -> Window:
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
    def live(self) -> Tensor:
        """[B, W] bool: the window positions that take part."""
        return (torch.arange(self.q.shape[2]) < self.window.q_len[:, None]) & (self.window.q_block >= 0)

    def seen_slots(self, capacity: int, sliding: bool = True) -> Tensor:
        """[B, capacity] bool: the cached slots that a row sees; without `sliding`, also those that only slid out of
        sight."""
        w, slot = self.window, torch.arange(capacity)
        kv_len, start, end = (length[:, None] for length in (w.kv_len, *w.replaced.unbind(1)))
        seen = (slot < kv_len) & ~((start <= slot) & (slot < end))
        if w.kept is not None:
            seen &= w.kept[:, :capacity]
        if sliding and self.sliding_window is not None:
            seen &= slot > kv_len - self.sliding_window
        return seen


def random_call(
    seed: int,
    *,
    B: int,
    W: int,
    H_kv: int,
    G: int,
    D: int,
    mode: str,
    cache: bool,
    split: int,
    capacity: int,
    kept: bool = False,
    sliding: bool | int = False,
    fp8: bool = False,
    page_size: int | None = None,
    shared: bool = False,
    full_rows: bool = False,
    q_lens: Sequence[int] | None = None,
    kv_lens: Sequence[int] | None = None,
    replaced: Sequence[tuple[int, int] | None] | None = None,
    scale: float | None = None,
    telling: bool = False,
) -> RandomAttentionCall:
    """A ragged batch in float64 (values exact in float16) where everything that must not be read is NaN or infinite.

    Args:
        cache: False: the window's fields about the cache are garbage.
        split: cached prefixes end around its multiples: where a kernel is likely to cut.
        capacity: slots of a cache row.
        sliding: a sliding window; True for any.
        shared: the rows of the batch may read the same cache row.
        full_rows: every row uses the whole window.
        q_lens, kv_lens: the rows' lengths instead of random ones around the boundaries. A row of q_lens that is not
            empty has a live position.
        replaced: the rows' replaced slots; None, or None for a row: random ones.
        scale: of the scores; None: D**-0.5 or another.
        telling: the call shows what chance may hide: the edges of every row's replaced slots are kept, and of the first
            row also those of its prefix and of its sliding window; most of the first row's window is live, and in
            "shadow" its second half is a copy of the first.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    R = B + 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half().double()

    # 1. The window, row by row.
    sliding_window = rng.choice((1, 2, split // 2, split, split + 1, 1000)) if sliding is True else sliding or None
    w: dict[str, Any] = {name: [] for name in ("q_pos", "q_block", "q_len", "kv_len", "replaced", "kept")}
    w["cache_row"] = rng.choices(range(R), k=B) if shared else rng.sample(range(R), B)
    for b in range(B):
        q_len = W if full_rows else rng.choice((0, W, W, rng.randint(1, W)))
        lengths = [0, 1, split // 2, split - 1, split, split + 1, 2 * split, 2 * split + 1, rng.randint(0, capacity)]
        kv_len = min(rng.choice(lengths), capacity)
        q_len = q_len if q_lens is None else q_lens[b]
        kv_len = kv_len if kv_lens is None else kv_lens[b]
        w["replaced"].append(
            random_replaced(rng, W, kv_len, capacity, split) if replaced is None or replaced[b] is None else replaced[b]
        )
        # Slots lost one by one, or the whole beginning of the prefix.
        clear = telling and b == 0
        lost = kv_len // 2 if clear else rng.choice((0, split // 2, split, split + 1, kv_len // 2, capacity))
        edge = kv_len - (sliding_window or kv_len)
        edges = [w["replaced"][b][0], w["replaced"][b][1] - 1] if telling else []
        edges += [edge, edge + 1, kv_len - 1] if clear else []
        w["kept"].append([s in edges or (s >= lost and rng.random() < 0.7) for s in range(capacity)])
        position, block = random_positions(rng, W, q_len, mode, clear)
        if q_lens is not None and q_len and max(block[:q_len]) < 0:
            block[rng.randrange(q_len)] = rng.randint(0, 3)
        for name, value in (("q_pos", position), ("q_block", block), ("q_len", q_len), ("kv_len", kv_len)):
            w[name].append(value)
    if not kept:
        del w["kept"]
    tensors = {n: torch.tensor(x, dtype=torch.bool if n == "kept" else torch.int32) for n, x in w.items()}
    window = Window(mode=mode, kv_slot=torch.full((B, W), -1, dtype=torch.int32), **tensors)

    # 2. q, k, v as Hugging Face hands them over: transposed views of [B, W, H, D].
    # In one of three calls the softmax has few large weights, in all heads, so that many results say how far torch is
    # off.
    q = (normal(B, W, H_kv * G, D) * rng.choice((1, 1, 8))).transpose(1, 2)
    k, v = (normal(B, W, H_kv, D).transpose(1, 2) for _ in range(2))
    scales: list[Tensor | None] = [None, None]
    if fp8:  # the small ones saturate, the large ones reach the subnormal numbers
        small, large = (0.003, 0.004), (0.0123, 0.3, 1.0, 37.0)
        for i in range(2):
            units = [rng.choice(small), rng.choice(large), *rng.choices(small + large, k=H_kv)]
            scales[i] = torch.tensor(rng.sample(units[: max(2, H_kv)], H_kv))
    buffers: list[Tensor | None] = [None, None]
    if cache:
        buffers = [torch.full((R, H_kv, capacity + 2 * GUARD, D), math.nan, dtype=torch.float64) for _ in range(2)]
    scale = rng.choice((D**-0.5, 0.3)) if scale is None else scale
    call = RandomAttentionCall(q, k, v, *buffers, window, scale, *scales, sliding_window)

    # 3. What a slot may hold: a key if some row sees it; else NaN, and then one window position may be stored there,
    # dead ones included. A store must be hidden from its readers by kv_len, replaced or kept: what only slides out of
    # sight stays unwritten.
    seen, taken = (torch.zeros(R, capacity, dtype=torch.bool) for _ in range(2))
    if cache:
        for b, row in enumerate(w["cache_row"]):
            seen[row] |= call.seen_slots(capacity)[b]
            taken[row] |= call.seen_slots(capacity, sliding=False)[b]
    for b, row in enumerate(w["cache_row"]):
        (start, end), kv_len = w["replaced"][b], w["kv_len"][b]
        slots = random_stores(rng, W, (~taken[row]).nonzero()[:, 0].tolist(), start if start < end else kv_len)
        window.kv_slot[b] = torch.tensor(slots)
        taken[row, [slot for slot in slots if slot >= 0]] = True
    for b, dead in enumerate(~call.live):
        # Infinity times zero is NaN too, and shows if it is stored over the NaN of a hidden slot.
        q[b, :, dead], k[b, :, dead], v[b, :, dead] = math.nan, math.inf, math.inf
    if not cache:
        for ignored in (window.kv_slot, window.kv_len, window.cache_row):
            ignored += IGNORED
        window.replaced.copy_(torch.tensor([5, 9]))
        return call
    for row in sorted(set(w["cache_row"])):
        slots = seen[row].nonzero()[:, 0]
        for buffer, unit in zip(buffers, scales, strict=True):
            new = normal(H_kv, len(slots), D)
            if unit is not None:
                new = (new.float() / unit[:, None, None]).clamp(-448, 448).to(FP8).double()
            buffer[row][:, GUARD + slots] = new
    return call if page_size is None else paged(call, page_size, rng)


def score_floor(q: Tensor, k: Tensor, k_cache: Tensor | None, k_scale: Tensor | None, scale: float) -> float:
    """How far a result may be off that torch hits by chance: 1e-6, or what rounding the largest scores in fp32 costs.

    A weight is the exponential of a score, and a score of size s is rounded by up to 2^-24 s. No score is larger than
    the scale times the largest norms of a query and of a key.
    """

    def norm(rows: Tensor) -> float:
        lengths = rows.double().nan_to_num(0, 0, 0).norm(dim=-1)
        return lengths.max().item() if lengths.numel() else 0.0

    cached = 0.0 if k_cache is None else norm(k_cache) * (1.0 if k_scale is None else k_scale.abs().max().item())
    return max(1e-6, 2**-24 * scale * norm(q) * max(norm(k), cached))


def random_replaced(rng: random.Random, W: int, kv_len: int, capacity: int, split: int) -> tuple[int, int]:
    chance = rng.random()
    if chance < 0.4 and kv_len > 0:
        start = rng.choice((0, rng.randrange(kv_len)))
        return start, min(start + rng.choice((1, split, rng.randint(1, W + 4))), capacity)
    # Nothing, said in several ways.
    return rng.choice(((5, 5), (capacity, capacity), (9, 3))) if chance > 0.8 else (0, 0)


def random_positions(rng: random.Random, W: int, q_len: int, mode: str, clear: bool) -> tuple[list[int], list[int]]:
    """Positions and blocks of a row's window; dead positions are in block -1. clear: it is the first row of a telling
    call."""
    block_length, prompt, relative = rng.choice((1, 4, 5, rng.randint(1, W))), rng.randint(0, 9), rng.random() < 0.5
    first = rng.randint(0, 40)
    position = list(range(first, first + W))
    order = rng.uniform(0.35, 1) if clear else rng.random()
    if order < 0.2:
        rng.shuffle(position)
    elif order < 0.35:  # the keys of the first tiles come last
        position.reverse()
    elif mode == "shadow" or order < 0.5:  # a copy of the same positions, as a shadow has
        position = [first + j % max(1, q_len // 2) for j in range(W)]
    block = [max(0, (p - prompt) // block_length + 1) if relative else p // block_length for p in position]
    if rng.random() < 0.2 and not clear:
        rng.shuffle(block)
    if mode == "shadow":  # copies in blocks that are as those of the originals, or each in a block by itself
        step, share = rng.choice((0, 1)), rng.choice((0.8, 1.0))
        block = [n + (50 + step * j if j >= q_len // 2 and rng.random() < share else 0) for j, n in enumerate(block)]
    padding = rng.choice((0, 0, 1, min(1, q_len // 2) if clear else q_len // 2))
    dead = 0.05 if clear else rng.choice((0.05, 0.05, 0.3))
    return position, [-1 if j < padding or rng.random() < dead else n for j, n in enumerate(block)]


def random_stores(rng: random.Random, W: int, hidden: list[int], start: int) -> list[int]:
    """Hidden slots that the positions of a row are stored in, -1 = nowhere: anywhere, or in order from `start` on."""
    if rng.random() < 0.5:
        rng.shuffle(hidden)
    else:
        hidden = [slot for slot in hidden if slot >= start] + [slot for slot in hidden if slot < start]
    return [slot if rng.random() < 0.75 else -1 for slot in hidden[:W]] + [-1] * (W - len(hidden))


def paged(call: C, page_size: int, rng: random.Random | None = None) -> C:
    """The same slots in pages that lie anywhere. Table entries that nobody needs are garbage; page 0 and the last pages
    hold NaN and stay that way."""
    rng = rng or random.Random(page_size)
    window = call.window
    R, H_kv, capacity, D = call.caches[0].shape
    P = -(-capacity // page_size)
    needed: set[tuple[int, int]] = set()
    for b, (seen, live) in enumerate(zip(call.seen_slots(capacity), call.live, strict=True)):
        slots = [*seen.nonzero()[:, 0].tolist(), *window.kv_slot[b][live].tolist()]
        needed |= {(int(window.cache_row[b]), slot // page_size) for slot in slots if slot >= 0}
    num_pages = len(needed) + 3
    table = torch.full((R, P), rng.choice((-1, 10**8)), dtype=torch.int32)
    pages = rng.sample(range(1, num_pages), len(needed))
    buffers = [torch.full((num_pages, H_kv, page_size + 2 * GUARD, D), math.nan, dtype=torch.float64) for _ in range(2)]
    for (row, index), page in zip(sorted(needed), pages, strict=True):
        table[row, index] = page
        for buffer, cache in zip(buffers, call.caches, strict=True):
            slots = cache[row, :, index * page_size : (index + 1) * page_size]
            buffer[page, :, GUARD : GUARD + slots.shape[1]] = slots
    changes = {"page_table": table}
    if window.kept is not None:
        changes["kept"] = torch.nn.functional.pad(window.kept, (0, P * page_size - capacity), value=True)
    window = dataclasses.replace(window, **changes)
    return dataclasses.replace(call, k_buffer=buffers[0], v_buffer=buffers[1], window=window)
