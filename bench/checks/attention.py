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
from dlm_kernels.testing.attention_calls import FP8, RandomAttentionCall, paged, random_call
from dlm_kernels.window import MODES

from .run import Case, Sizes, Skip, generator

SPLIT = 512  # prefixes are drawn around multiples of this: where a kernel is likely to cut
# A window for the prefill form is so many times as wide as the others: at 70, in every group more than 512 query rows.
LONG = 9
PAGE_SIZES = (16, 64, 256)
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


def call_of(random: torch.Generator, sizes: Sizes, kind: Kind, device: torch.device) -> Call:
    return on_device(random_call_of(random, sizes, kind), kind.dtype, device)


def random_call_of(random: torch.Generator, sizes: Sizes, kind: Kind) -> RandomAttentionCall:
    """Five rows: a long prefix; a row that sits out; one query and no prefix; an overlay; a hidden cache.

    With "long", the first row's window is long, the others' are not.
    """

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=random))

    prefix, short = sizes.prefix, sizes.width
    W = LONG * short if "long" in kind.features else short
    near_split = min(prefix, SPLIT * integer(1, max(1, prefix // SPLIT)) + integer(-1, 1))
    q_lens = [W, 0, 1, integer(2, short), integer(2, short - 1)]
    kv_lens = [prefix, integer(0, prefix), 0, integer(short, prefix), near_split]
    overlay = integer(0, kv_lens[3] - q_lens[3])
    return random_call(
        integer(0, 2**62),
        B=5,
        W=W,
        H_kv=2,
        G=kind.G,
        D=kind.D,
        mode=kind.mode,
        cache=kind.cache != "none",
        split=min(SPLIT, prefix // 3),
        capacity=prefix + W + 3,
        kept="kept" in kind.features,
        sliding=prefix // 3 if "sliding" in kind.features else False,
        fp8=kind.cache.startswith("fp8"),
        page_size=PAGE_SIZES[integer(0, 2)] if "pages" in kind.cache else None,
        q_lens=q_lens,
        kv_lens=kv_lens,
        replaced=[(0, 0), None, None, (overlay, overlay + q_lens[3]), (0, kv_lens[4])],
        scale=kind.D**-0.5,
        telling=True,
    )


def on_device(call: RandomAttentionCall, dtype: torch.dtype, device: torch.device) -> Call:
    """The call with its caches alone: what guards them here is memory of its own."""
    moved = call.to(dtype, device)
    caches = (None if cache is None else cache.contiguous() for cache in moved.caches)
    inputs = moved.q, moved.k, moved.v
    return Call(*inputs, *caches, moved.window, moved.scale, moved.k_scale, moved.v_scale, moved.sliding_window)


def equals_reference(ops: Ops, device: torch.device, sizes: Sizes, seed: int, name: str, kind: Kind) -> None:
    check_call(ops, call_of(generator(seed, name), sizes, kind, device))


def not_finite_is_carried(ops: Ops, device: torch.device, sizes: Sizes, seed: int, name: str, kind: Kind) -> None:
    """In three rows something live is not finite, and all queries of the row see it ("full")."""
    call = call_of(generator(seed, name), sizes, kind, device)
    live = [row.nonzero()[:, 0].tolist() for row in live_positions(call.window)]
    call.q[0, 0, live[0][0]], call.q[0, 1, live[0][-1], 3] = math.nan, math.inf
    call.k[2, 0, live[2][0], 1] = math.inf
    call.v[3, 1, live[3][0], 2] = math.nan
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
    dead = out.transpose(1, 2)[~live_positions(ours.window)]
    if dead.count_nonzero():
        raise Failure("out: a dead position must be zero")


def live_positions(window: Window) -> Tensor:
    """[B, W] bool."""
    lane = torch.arange(window.q_block.shape[1], device=window.q_block.device)
    return (lane < window.q_len[:, None]) & (window.q_block >= 0)


def rows_are_independent(ops: Ops, device: torch.device, sizes: Sizes, seed: int, name: str, kind: Kind) -> None:
    """Every row, bit for bit: alone, in a bucket and a cache that are just large enough, and in the batch."""
    call = call_of(generator(seed, name), sizes, kind, device)
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
        mine: Tensor | slice = slice(row, row + 1)
        if paged_row:
            mine = call.window.page_table[row].long()
            mine = mine[(mine >= 0) & (mine < call.k_cache.shape[0])]
        for c, cache in caches.items():
            alone_bytes, batch_bytes = _bytes(cache), _bytes(getattr(call, c))[mine]
            alone_bytes = alone_bytes[mine] if paged_row else alone_bytes
            same_bits(f"{c} of row {b} alone", alone_bytes, batch_bytes if paged_row else batch_bytes[:, :, :capacity])


def pages_are_a_cache(ops: Ops, device: torch.device, sizes: Sizes, seed: int, name: str, kind: Kind) -> None:
    """The same slots in pages give the same bits as in a contiguous cache."""
    random = generator(seed, name)
    drawn = random_call_of(random, sizes, kind)
    page_size = PAGE_SIZES[int(torch.randint(3, (1,), generator=random))]
    contiguous, pages = (on_device(call, kind.dtype, device) for call in (drawn, paged(drawn, page_size)))
    same_bits("out of pages", pages.run(ops.block_attention), contiguous.run(ops.block_attention))
    for c in ("k_cache", "v_cache"):
        cache = getattr(contiguous, c)
        pool, table = getattr(pages, c), pages.window.page_table.long()
        # What nobody needs has no page, and holds NaN in the contiguous cache.
        found = _bytes(pool)[table.clamp(0, len(pool) - 1)].transpose(1, 2).flatten(2, 3)[:, :, : cache.shape[2]]
        has_page = ((table >= 0) & (table < len(pool))).repeat_interleave(page_size, 1)[:, : cache.shape[2]]
        has_page = has_page[:, None, :, None]
        same_bits(c, torch.where(has_page, found, 0), torch.where(has_page, _bytes(cache), 0))
        if not (cache.float().isnan() | has_page).all():
            raise Failure(f"{c}: a slot without a page was written")


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
