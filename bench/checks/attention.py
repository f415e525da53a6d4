"""Is `block_attention` its float64 reference in every mode, dtype, group, head dim and cache? Does a row depend on
anything but itself?"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from dlm_fast import Ops
from dlm_kernels import Window, reference
from dlm_kernels.testing import Failure, GuardedMemory, no_worse_than_torch, poisoned, same_bits
from dlm_kernels.window import MODES

from .run import Case, Sizes, Skip, generator

SPLIT = 512  # prefixes are drawn around multiples of this: where a kernel is likely to cut
# A window for the prefill form is so many times as wide as the others: at 70, in every group more than 512 query rows.
LONG = 9
FP8 = torch.float8_e4m3fn
CACHES = ("none", "contiguous", "pages", "fp8", "fp8 pages")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a call is like. features: any of "kept", "sliding" and "long" (one row's window is long enough for the
    prefill form)."""

    dtype: torch.dtype
    mode: str
    D: int
    G: int
    cache: str
    features: tuple[str, ...] = ()

    def __str__(self) -> str:
        features = "".join(f" + {feature}" for feature in self.features)
        cache = {"none": "no cache", "contiguous": "cache"}.get(self.cache, self.cache)
        return f"{str(self.dtype).removeprefix('torch.')} {self.mode} D={self.D} G={self.G} {cache}{features}"


def cases(ops: Ops, device: torch.device, sizes: Sizes, seed: int) -> Iterator[Case]:
    def one(kind: Kind, check=equals_reference, what: str = "") -> Case:
        return case_of(ops, device, sizes, seed, kind, check, what)

    for dtype in sizes.attention_dtypes:
        first = dtype == sizes.attention_dtypes[0]
        # Every head dim with every group.
        for (i, D), (j, G) in itertools.product(enumerate(sizes.head_dims), enumerate(sizes.groups)):
            if first or (i + j) % 3 == 0:
                yield case(ops, device, sizes, seed, dtype, MODES[(i + j) % 4], D, G, cached=(2 * i + j) % 4 != 0)
        # At one head dim, every mode with every cache, every feature, and long windows.
        common, groups = 128 if 128 in sizes.head_dims else sizes.head_dims[0], itertools.cycle(sizes.groups)
        for (i, mode), (j, cache) in itertools.product(enumerate(MODES), enumerate(CACHES)):
            if first or (i + j) % 2 == 0:
                yield one(Kind(dtype, mode, common, next(groups), cache))
        features = [("kept",), ("kept", "sliding"), ("sliding",), ("kept", "sliding")]
        for mode, some, cache in zip(MODES, features, ("contiguous", "contiguous", "pages", "fp8 pages"), strict=True):
            yield one(Kind(dtype, mode, common, next(groups), cache, some))

        alone = (rows_are_independent, "a row alone = the row in the batch, bucket and capacity")
        for mode, cache in zip(MODES, ("contiguous", "fp8 pages", "pages", "contiguous"), strict=True):
            yield one(Kind(dtype, mode, common, next(groups), cache), *alone)
        yield one(Kind(dtype, "shadow", common, next(groups), "fp8", ("kept", "sliding")), *alone)
        yield one(Kind(dtype, "block", common, next(groups), "contiguous", ("long",)), *alone)
        for cache in ("contiguous", "fp8"):
            yield one(Kind(dtype, "block", common, next(groups), cache), pages_are_a_cache, "pages = contiguous")

        for mode, cache in zip(MODES, ("none", "contiguous", "pages", "fp8"), strict=True):
            yield one(Kind(dtype, mode, common, next(groups), cache, ("long",)))
    for dtype, (cache, features) in itertools.product(
        sizes.attention_dtypes, (("contiguous", ()), ("fp8 pages", ()), ("contiguous", ("long",)))
    ):
        kind = Kind(dtype, "full", common, sizes.groups[-1], cache, features)
        yield one(kind, not_finite_is_carried, "NaN and infinities")
    if sizes.far:
        for cache in ("contiguous", "pages"):
            name = f"{cache}: cache offsets beyond 2^31 elements"
            yield name, partial(far_cache, ops, device, seed, name, cache)


def case(
    ops: Ops, device: torch.device, sizes: Sizes, seed: int, dtype: torch.dtype, mode: str, D: int, G: int, cached: bool
) -> Case:
    """One call with a plain cache or without one, against the reference."""
    kind = Kind(dtype, mode, D, G, "contiguous" if cached else "none")
    return case_of(ops, device, sizes, seed, kind, equals_reference)


def case_of(
    ops: Ops, device: torch.device, sizes: Sizes, seed: int, kind: Kind, check: Callable, what: str = ""
) -> Case:
    name = f"{kind}: {what}" if what else str(kind)
    return name, partial(check, ops, device, sizes, seed, name, kind)


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of one call. Every position, slot and row that must not be read holds NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor | None
    v_cache: Tensor | None
    window: Window
    scale: float
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    sliding_window: int | None = None

    def to(self, dtype: torch.dtype | None = None) -> Call:
        """A copy (the caches are written) in another dtype; an fp8 cache stays one."""

        def copy(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or dtype is None or tensor.dtype == FP8:
                return None if tensor is None else tensor.clone()
            return tensor.to(dtype, copy=True)

        return dataclasses.replace(
            self, **{name: copy(getattr(self, name)) for name in ("q", "k", "v", "k_cache", "v_cache")}
        )

    def run(self, op) -> Tensor:
        options = {name: getattr(self, name) for name in ("k_scale", "v_scale", "sliding_window")}
        options = {name: value for name, value in options.items() if value is not None}
        return op(self.q, self.k, self.v, self.k_cache, self.v_cache, self.window, scale=self.scale, **options)


def random_call(random: torch.Generator, sizes: Sizes, kind: Kind, device: torch.device) -> Call:
    """Five rows: a long prefix; a row that sits out; one query and no prefix; dead positions and an overlay; a hidden
    cache.

    q, k and v are the transposed views that transformers hands over. With "long", the first row's window is long, the
    others' are not.
    """
    B, H_kv, G, D, short = 5, 2, kind.G, kind.D, sizes.width
    W = LONG * short if "long" in kind.features else short
    S_max = sizes.prefix + W + 3

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=random))

    near_split = min(sizes.prefix, SPLIT * integer(1, max(1, sizes.prefix // SPLIT)) + integer(-1, 1))
    q_len = [W, 0, 1, integer(2, short), integer(2, short - 1)]
    kv_len = [sizes.prefix, integer(0, sizes.prefix), 0, integer(short, sizes.prefix), near_split]
    overlay = integer(0, kv_len[3] - q_len[3])
    replaced = [(0, 0), (0, 0), (0, 0), (overlay, overlay + q_len[3]), (0, kv_len[4])]
    lane = torch.arange(W)
    q_pos = torch.stack([integer(0, 50) + lane for _ in range(B)])
    q_block = q_pos // integer(1, short)
    q_block[4] = q_block[4][torch.randperm(W, generator=random)]  # blocks in any order
    if kind.mode == "shadow":  # the second half of a window is a copy of the first, in blocks of its own
        for b, n in enumerate(q_len):
            half = n // 2
            q_pos[b, half : 2 * half] = q_pos[b, :half].clone()
            q_block[b, half : 2 * half] = q_block[b, :half] + int(q_block[b].max()) + 1
    q_block[3, torch.rand(W, generator=random) < 0.3] = -1
    q_block[3, 0] = 2
    slot = torch.stack([n + lane for n in kv_len])
    slot[3], slot[4] = overlay + lane, lane
    slot[2] = -1
    slot[0, torch.rand(W, generator=random) < 0.2] = -1
    slot = torch.where(slot < S_max, slot, -1)
    # The overlay's slots end with it; the last row's may lie inside its hidden cache only.
    slot[3] = torch.where(lane < q_len[3], slot[3], -1)
    slot[4] = torch.where(slot[4] < kv_len[4], slot[4], -1)
    cache_row = torch.randperm(B + 2, generator=random)[:B]
    kept = torch.rand(B, S_max, generator=random) < 0.8
    kept[0, : sizes.prefix // 2] = False
    sliding_window = sizes.prefix // 3 if "sliding" in kind.features else None
    if kind.cache == "none":
        # Documented as ignored: none of this may be looked at.
        slot, kv_len, replaced, cache_row = slot + 10**6, [10**6] * B, [(5, 9)] * B, cache_row + 10**6

    def int32(values) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32).contiguous().to(device)

    some = {"kept": kept.to(device)} if "kept" in kind.features else {}
    window = Window(
        int32(q_pos),
        int32(q_block),
        int32(q_len),
        int32(slot),
        int32(kv_len),
        int32(replaced),
        int32(cache_row),
        kind.mode,
        **some,
    )
    live = (lane < torch.tensor(q_len)[:, None]) & (q_block >= 0)

    def projection(heads: int) -> Tensor:
        values = torch.randn(B, W, heads, D, generator=random)
        values[~live] = math.nan
        return values.to(device, kind.dtype).transpose(1, 2)

    is_fp8 = kind.cache.startswith("fp8")
    scales: list[Tensor | None] = [None, None]
    if is_fp8:  # the small one saturates, the large one reaches the subnormal numbers
        scales = [torch.tensor([0.003, 0.3])[torch.randperm(H_kv, generator=random)].to(device) for _ in range(2)]

    def buffer(scale: Tensor | None) -> Tensor:
        values = torch.full((B + 2, H_kv, S_max, D), math.nan)
        for b in range(B):
            hidden = torch.ones(S_max, dtype=torch.bool)
            hidden[max(0, kv_len[b] - sliding_window + 1) if sliding_window else 0 : kv_len[b]] = False
            hidden[replaced[b][0] : replaced[b][1]] = True
            if "kept" in kind.features:
                hidden |= ~kept[b]
            values[cache_row[b]] = torch.randn(H_kv, S_max, D, generator=random)
            values[cache_row[b]][:, hidden] = math.nan
        if scale is None:
            return values.to(device, kind.dtype)
        return (values / scale.cpu()[:, None, None]).clamp(-448, 448).to(FP8).to(device)

    q, k, v = projection(H_kv * G), projection(H_kv), projection(H_kv)
    caches = (None, None) if kind.cache == "none" else (buffer(scales[0]), buffer(scales[1]))
    call = Call(q, k, v, *caches, window, D**-0.5, *scales, sliding_window)
    return paged(call, random) if "pages" in kind.cache else call


def paged(call: Call, random: torch.Generator) -> Call:
    """The same slots in pages at random places; the pool's last page is nobody's and holds NaN."""
    R, H_kv, S_max, D = call.k_cache.shape
    page_size = (16, 64, 256)[int(torch.randint(3, (1,), generator=random))]
    P = -(-S_max // page_size)
    order = torch.randperm(R * P, generator=random)
    table = order.view(R, P).to(torch.int32).to(call.q.device)

    def pool(cache: Tensor) -> Tensor:
        slots = torch.full((R, H_kv, P * page_size, D), math.nan, device=cache.device)
        slots[:, :, :S_max] = cache.float()
        pages = torch.full((R * P + 1, H_kv, page_size, D), math.nan, device=cache.device)
        pages[order.to(cache.device)] = slots.unflatten(2, (P, page_size)).transpose(1, 2).flatten(0, 1)
        return pages.to(cache.dtype)

    kept = call.window.kept
    if kept is not None:
        kept = torch.nn.functional.pad(kept, (0, P * page_size - S_max), value=True)
    window = dataclasses.replace(call.window, page_table=table, kept=kept)
    return dataclasses.replace(call, k_cache=pool(call.k_cache), v_cache=pool(call.v_cache), window=window)


def equals_reference(ops: Ops, device: torch.device, sizes: Sizes, seed: int, name: str, kind: Kind) -> None:
    check_call(ops, random_call(generator(seed, name), sizes, kind, device))


def not_finite_is_carried(ops: Ops, device: torch.device, sizes: Sizes, seed: int, name: str, kind: Kind) -> None:
    """In three rows something live is not finite, and all queries of the row see it ("full")."""
    call = random_call(generator(seed, name), sizes, kind, device)
    call.q[0, 0, 0], call.q[0, 1, 1, 3] = math.nan, math.inf
    call.k[2, 0, 0, 1] = math.inf
    call.v[3, 1, 0, 2] = math.nan
    check_call(ops, call)


def check_call(ops: Ops, call: Call) -> None:
    memory, low, exact = GuardedMemory(), call.to(), call.to(torch.float64)
    guarded = call
    if call.k_cache is not None:
        guarded = dataclasses.replace(call, k_cache=memory.copy(call.k_cache), v_cache=memory.copy(call.v_cache))
    with poisoned(memory):
        out = guarded.run(ops.block_attention)
    memory.check()
    if not out.transpose(1, 2).is_contiguous():
        raise Failure(f"out: must be a view of a contiguous [B, W, H, D], got strides {out.stride()}")
    compare(out, guarded, low, exact)


def compare(out: Tensor, ours: Call, low: Call, exact: Call) -> None:
    """Raises Failure unless `out` and the caches of `ours` are what the reference makes of `low` and `exact`."""
    low_out, exact_out = low.run(reference.block_attention), exact.run(reference.block_attention)
    for cache in ("k_cache", "v_cache"):
        if getattr(ours, cache) is not None:
            same_bits(cache, getattr(ours, cache), getattr(low, cache))
    no_worse_than_torch("out", out, low_out, exact_out)
    live = (torch.arange(out.shape[2], device=out.device) < ours.window.q_len[:, None]) & (ours.window.q_block >= 0)
    dead = out.transpose(1, 2)[~live]
    if dead.count_nonzero():
        raise Failure("out: a dead position must be zero")


def rows_are_independent(ops: Ops, device: torch.device, sizes: Sizes, seed: int, name: str, kind: Kind) -> None:
    """Every row, bit for bit: alone, in a bucket and a cache that are just large enough, and in the batch."""
    call = random_call(generator(seed, name), sizes, kind, device)
    before = call.to()
    together = call.run(ops.block_attention)
    for b in range(call.q.shape[0]):
        W = int(call.window.q_len[b])
        if W == 0:
            continue
        row, paged_row = int(call.window.cache_row[b]), call.window.page_table is not None
        capacity = max(1, int(call.window.kv_len[b]), 1 + int(call.window.kv_slot[b, :W].max()))
        fields = {field: t if field == "page_table" else t[b : b + 1] for field, t in call.window.tensors().items()}
        fields |= {n: fields[n][:, :W].contiguous() for n in ("q_pos", "q_block", "kv_slot")}
        caches = {c: getattr(before, c).clone() for c in ("k_cache", "v_cache")}
        if not paged_row:
            fields["cache_row"] = torch.zeros_like(fields["cache_row"])
            caches = {c: cache[row : row + 1, :, :capacity] for c, cache in caches.items()}
            if "kept" in fields:
                fields["kept"] = fields["kept"][:, :capacity].contiguous()
        inputs = {n: getattr(call, n)[b : b + 1, :, :W] for n in ("q", "k", "v")}
        alone = dataclasses.replace(before, **inputs, **caches, window=dataclasses.replace(call.window, **fields))
        same_bits(f"out of row {b} alone", alone.run(ops.block_attention), together[b : b + 1, :, :W])
        mine = call.window.page_table[row].long() if paged_row else slice(row, row + 1)
        for c, cache in caches.items():
            alone_bytes, batch_bytes = _bytes(cache), _bytes(getattr(call, c))[mine]
            alone_bytes = alone_bytes[mine] if paged_row else alone_bytes
            same_bits(f"{c} of row {b} alone", alone_bytes, batch_bytes if paged_row else batch_bytes[:, :, :capacity])


def pages_are_a_cache(ops: Ops, device: torch.device, sizes: Sizes, seed: int, name: str, kind: Kind) -> None:
    """The same slots in pages give the same bits as in a contiguous cache."""
    random = generator(seed, name)
    contiguous = random_call(random, sizes, kind, device)
    pages = paged(contiguous, random)
    same_bits("out of pages", pages.run(ops.block_attention), contiguous.run(ops.block_attention))
    for c in ("k_cache", "v_cache"):
        cache = getattr(contiguous, c)
        found = _bytes(getattr(pages, c))[pages.window.page_table.long()].transpose(1, 2).flatten(2, 3)
        same_bits(c, found[:, :, : cache.shape[2]], _bytes(cache))


def _bytes(cache: Tensor) -> Tensor:
    """Eight-bit floats as their bytes: torch gathers no others."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache


def far_cache(ops: Ops, device: torch.device, seed: int, name: str, cache: str) -> None:
    """A cache row, or pages, whose offset does not fit 32 bits. Only those are filled; the others are never read."""
    H_kv, S_max, D, W, dtype = 32, 16384, 128, 32, torch.bfloat16
    page_size = 1024
    R = 2**31 // (H_kv * S_max * D) + 2
    torch.cuda.empty_cache()  # what earlier cases left reserved is free too
    if torch.cuda.mem_get_info(device)[0] < 2 * 2 * R * H_kv * S_max * D * 1.2:
        raise Skip(f"needs {4 * R * H_kv * S_max * D / 1e9:.0f} GB of free device memory")

    random = generator(seed, name, device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device).to(dtype)

    def int32(values) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    kv_len = 1000
    lanes = torch.arange(kv_len, kv_len + W, dtype=torch.int32, device=device)[None]
    window = Window(
        lanes,
        torch.zeros_like(lanes),
        int32([W]),
        lanes.clone(),
        int32([kv_len]),
        int32([[0, 0]]),
        int32([R - 1]),
        "full",
    )
    shape = (R, H_kv, S_max, D) if cache == "contiguous" else (R * S_max // page_size, H_kv, page_size, D)
    caches = [torch.empty(*shape, dtype=dtype, device=device) for _ in range(2)]
    last = slice(R - 1, None) if cache == "contiguous" else slice(shape[0] - S_max // page_size, None)
    for tensor in caches:
        tensor[last] = normal(*tensor[last].shape)
    here = dataclasses.replace(window, cache_row=int32([0]))
    if cache == "pages":
        table = torch.arange(S_max // page_size, dtype=torch.int32, device=device)[None]
        here = dataclasses.replace(here, page_table=table)
        window = dataclasses.replace(here, page_table=table + last.start)
    inputs = [normal(1, W, H_kv, D).transpose(1, 2) for _ in range(3)]
    call = Call(*inputs, *caches, window=window, scale=D**-0.5)
    low = Call(*inputs, *(tensor[last].clone() for tensor in caches), window=here, scale=D**-0.5)
    exact = low.to(torch.float64)
    out = call.run(ops.block_attention)
    ours = dataclasses.replace(call, window=here, k_cache=caches[0][last], v_cache=caches[1][last])
    compare(out, ours, low, exact)
