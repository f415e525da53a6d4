"""Is `block_attention` its float64 reference in every mode, dtype, group and head dim? Does a row depend on anything but itself?"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import partial

import torch
from dlm_fast import Ops
from dlm_kernels import Window, reference
from dlm_kernels.attention import KERNEL_MODES as MODES
from torch import Tensor

from .checks import Case, Failure, GuardedMemory, Sizes, Skip, generator, no_worse_than_torch, poisoned, same_bits

SPLIT = 512  # prefixes are drawn around multiples of this: where a kernel is likely to cut


def cases(ops: Ops, device: torch.device, sizes: Sizes, seed: int) -> Iterator[Case]:
    first = sizes.attention_dtypes[0]
    for dtype in sizes.attention_dtypes:
        kind = str(dtype).removeprefix("torch.")
        for (i, D), (j, G) in itertools.product(enumerate(sizes.head_dims), enumerate(sizes.groups)):
            if dtype != first and (i + j) % 3:
                continue
            mode, cached = MODES[(i + j) % 3], (2 * i + j) % 4 != 0
            yield case(ops, device, sizes, seed, dtype, mode, D, G, cached)
        for mode, G in zip(MODES, itertools.cycle(sizes.groups)):
            name = f"{kind} {mode} G={G} row alone = row in the batch, bucket and capacity"
            yield name, partial(rows_are_independent, ops, device, seed, name, sizes, dtype, mode, G)
        # All modes, with and without a cache, at one head dim: what the products above leave out.
        for mode, cached in itertools.product(MODES, (True, False)):
            G = sizes.groups[-1] if cached else sizes.groups[0]
            yield case(ops, device, sizes, seed, dtype, mode, 128 if 128 in sizes.head_dims else sizes.head_dims[0], G, cached)
    if sizes.far:
        yield "cache offsets beyond 2^31 elements", partial(far_cache, ops, device, seed)


def case(
    ops: Ops, device: torch.device, sizes: Sizes, seed: int, dtype: torch.dtype, mode: str, D: int, G: int, cached: bool
) -> Case:
    kind = str(dtype).removeprefix("torch.")
    name = f"{kind} {mode} D={D} G={G} {'cache' if cached else 'no cache'}"
    return name, partial(equals_reference, ops, device, seed, name, sizes, dtype, mode, D, G, cached)


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

    def to(self, dtype: torch.dtype | None = None) -> Call:
        """A copy (the caches are written) in another dtype."""

        def copy(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.clone() if dtype is None else tensor.to(dtype, copy=True)

        return dataclasses.replace(
            self, q=copy(self.q), k=copy(self.k), v=copy(self.v), k_cache=copy(self.k_cache), v_cache=copy(self.v_cache)
        )

    def run(self, op) -> Tensor:
        return op(self.q, self.k, self.v, self.k_cache, self.v_cache, self.window, scale=self.scale)


def random_call(
    random: torch.Generator, sizes: Sizes, dtype: torch.dtype, mode: str, D: int, G: int, cached: bool, device: torch.device
) -> Call:
    """Five rows: a long prefix; a row that sits out; one query and no prefix; dead positions and an overlay; a hidden cache.

    q, k and v are the transposed views that transformers hands over.
    """
    B, H_kv, W, S_max = 5, 2, sizes.width, sizes.prefix + sizes.width + 3

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=random))

    near_split = min(sizes.prefix, SPLIT * integer(1, max(1, sizes.prefix // SPLIT)) + integer(-1, 1))
    q_len = [W, 0, 1, integer(2, W), integer(2, W - 1)]
    kv_len = [sizes.prefix, integer(0, sizes.prefix), 0, integer(W, sizes.prefix), near_split]
    overlay = integer(0, kv_len[3] - q_len[3])
    replaced = [(0, 0), (0, 0), (0, 0), (overlay, overlay + q_len[3]), (0, kv_len[4])]
    lane = torch.arange(W)
    q_pos = torch.stack([integer(0, 50) + lane for _ in range(B)])
    q_block = q_pos // integer(1, W)
    q_block[4] = q_block[4][torch.randperm(W, generator=random)]  # blocks in any order
    q_block[3, torch.rand(W, generator=random) < 0.3] = -1
    q_block[3, 0] = 2
    slot = torch.stack([n + lane for n in kv_len])
    slot[3], slot[4] = overlay + lane, lane
    slot[2] = -1
    slot[0, torch.rand(W, generator=random) < 0.2] = -1
    slot = torch.where(slot < S_max, slot, -1)
    # The last row's slots may lie inside its hidden cache only.
    slot[4] = torch.where(slot[4] < kv_len[4], slot[4], -1)
    cache_row = torch.randperm(B + 2, generator=random)[:B]
    if not cached:
        # Documented as ignored: none of this may be looked at.
        slot, kv_len, replaced, cache_row = slot + 10**6, [10**6] * B, [(5, 9)] * B, cache_row + 10**6

    def int32(values) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32).contiguous().to(device)

    window = Window(
        int32(q_pos), int32(q_block), int32(q_len), int32(slot), int32(kv_len), int32(replaced), int32(cache_row), mode
    )
    live = (lane < torch.tensor(q_len)[:, None]) & (q_block >= 0)

    def projection(heads: int) -> Tensor:
        values = torch.randn(B, W, heads, D, generator=random)
        values[~live] = math.nan
        return values.to(device, dtype).transpose(1, 2)

    def buffer() -> Tensor:
        values = torch.full((B + 2, H_kv, S_max, D), math.nan)
        for b in range(B):
            values[cache_row[b], :, : kv_len[b]] = torch.randn(H_kv, kv_len[b], D, generator=random)
            values[cache_row[b], :, replaced[b][0] : replaced[b][1]] = math.nan
        return values.to(device, dtype)

    q, k, v = projection(H_kv * G), projection(H_kv), projection(H_kv)
    return Call(q, k, v, buffer() if cached else None, buffer() if cached else None, window, D**-0.5)


def equals_reference(
    ops: Ops,
    device: torch.device,
    seed: int,
    name: str,
    sizes: Sizes,
    dtype: torch.dtype,
    mode: str,
    D: int,
    G: int,
    cached: bool,
) -> None:
    call = random_call(generator(seed, name), sizes, dtype, mode, D, G, cached, device)
    memory, low, exact = GuardedMemory(), call.to(), call.to(torch.float64)
    guarded = dataclasses.replace(call, **{c: memory.copy(getattr(call, c)) for c in ("k_cache", "v_cache") if cached})
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


def rows_are_independent(
    ops: Ops, device: torch.device, seed: int, name: str, sizes: Sizes, dtype: torch.dtype, mode: str, G: int
) -> None:
    """Every row, bit for bit: alone, in a bucket and a cache that are just large enough, and in the batch."""
    D = 128 if 128 in sizes.head_dims else sizes.head_dims[0]
    call = random_call(generator(seed, name), sizes, dtype, mode, D, G, True, device)
    before = call.to()
    together = call.run(ops.block_attention)
    for b in range(call.q.shape[0]):
        W = int(call.window.q_len[b])
        if W == 0:
            continue
        row = int(call.window.cache_row[b])
        capacity = max(1, int(call.window.kv_len[b]), 1 + int(call.window.kv_slot[b, :W].max()))
        fields = {f.name: getattr(call.window, f.name) for f in dataclasses.fields(Window)}
        fields = {n: t[b : b + 1] if isinstance(t, Tensor) else t for n, t in fields.items()}
        fields |= {n: fields[n][:, :W].contiguous() for n in ("q_pos", "q_block", "kv_slot")}
        fields["cache_row"] = torch.zeros_like(fields["cache_row"])
        caches = {c: getattr(before, c)[row : row + 1, :, :capacity].clone() for c in ("k_cache", "v_cache")}
        inputs = {n: getattr(call, n)[b : b + 1, :, :W] for n in ("q", "k", "v")}
        alone = Call(**inputs, **caches, window=Window(**fields), scale=call.scale)
        same_bits(f"out of row {b} alone", alone.run(ops.block_attention), together[b : b + 1, :, :W])
        for c in ("k_cache", "v_cache"):
            same_bits(f"{c} of row {b} alone", getattr(alone, c), getattr(call, c)[row : row + 1, :, :capacity])


def far_cache(ops: Ops, device: torch.device, seed: int) -> None:
    """A cache row whose offset does not fit 32 bits. Only that row is filled; the others are never read."""
    H_kv, S_max, D, W, dtype = 32, 16384, 128, 32, torch.bfloat16
    R = 2**31 // (H_kv * S_max * D) + 2
    if torch.cuda.mem_get_info(device)[0] < 2 * 2 * R * H_kv * S_max * D * 1.2:
        raise Skip(f"needs {4 * R * H_kv * S_max * D / 1e9:.0f} GB of free device memory")
    random = generator(seed, "far", device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device).to(dtype)

    def int32(values) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    kv_len = 1000
    lanes = torch.arange(kv_len, kv_len + W, dtype=torch.int32, device=device)[None]
    window = Window(
        lanes, torch.zeros_like(lanes), int32([W]), lanes.clone(), int32([kv_len]), int32([[0, 0]]), int32([R - 1]), "full"
    )
    caches = [torch.empty(R, H_kv, S_max, D, dtype=dtype, device=device) for _ in range(2)]
    for cache in caches:
        cache[-1] = normal(H_kv, S_max, D)
    inputs = [normal(1, W, H_kv, D).transpose(1, 2) for _ in range(3)]
    call = Call(*inputs, *caches, window=window, scale=D**-0.5)
    here = dataclasses.replace(window, cache_row=int32([0]))
    low = Call(*inputs, *(cache[-1:].clone() for cache in caches), window=here, scale=D**-0.5)
    exact = low.to(torch.float64)
    out = call.run(ops.block_attention)
    ours = dataclasses.replace(call, window=here, k_cache=caches[0][-1:], v_cache=caches[1][-1:])
    compare(out, ours, low, exact)
