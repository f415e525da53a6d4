"""The other forms of `block_attention`: paged and fp8 caches, kept slots, a shadow copy of the window, a sliding
window.

Before a form is timed, it is checked against its reference at the shape that is timed. A paged or fp8 cache is also
compared with our own contiguous bf16 cache, which shows what the form costs or saves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlm_fast import Ops
from dlm_kernels import Window, reference
from dlm_kernels.testing import no_worse_than_torch

from .. import floors
from ..shapes import Model, Shapes
from ..timing import Candidate
from .attention import Inputs, after_prefix, flex, int32, normal, projections, sdpa
from .run import OURS, Bench, Shape, Work

PAGE_SIZE = 64
FORMS = ("paged", "fp8", "shadow", "kept", "sliding")
CONTIGUOUS = "ours, contiguous bf16 cache"


def shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    for model in chosen.models:
        for form in FORMS:
            if form == "sliding" and model.reach is None:
                continue
            # A sliding window is given all of the prefix, and reads the end of it.
            reach = model.prefix if form != "sliding" else int
            for B, prefix in dict.fromkeys((B, reach(prefix)) for B, prefix in chosen.forms):
                W = _width(model, form)
                cost = floors.decode(model, [model.prefix(prefix)] * B, W, 1 if form == "fp8" else 2)
                facts = {
                    "kind": "form",
                    "form": form,
                    "B": B,
                    "W": W,
                    "prefix": prefix,
                    "G": model.group,
                    "D": model.head_dim,
                }
                label = f"decode B={B} prefix={prefix} window={W} {form}"
                build = partial(_form, bench, ops, model, B, prefix, form, cost)
                yield Shape("attention-forms", model.name, label, build, cost, facts, seconds=4)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of `block_attention`: its inputs, and its options by name."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    window: Window
    options: dict[str, Any]

    def run(self, op) -> Tensor:
        return op(self.q, self.k, self.v, self.k_cache, self.v_cache, self.window, **self.options)

    def row(self, b: int, dtype: torch.dtype | None = None) -> Call:
        """Row b alone, with copied caches; q, k, v and the caches are in `dtype` if one is given, but an fp8 cache
        stays an fp8 cache."""
        alone = {
            name: tensor[b : b + 1].contiguous()
            for name, tensor in self.window.tensors().items()
            if name != "page_table"
        }
        q, k, v = (
            tensor[b : b + 1] if dtype is None else tensor[b : b + 1].to(dtype) for tensor in (self.q, self.k, self.v)
        )
        stored = None if "k_scale" in self.options else dtype
        caches = (tensor.clone() if stored is None else tensor.to(stored) for tensor in (self.k_cache, self.v_cache))
        return Call(q, k, v, *caches, dataclasses.replace(self.window, **alone), self.options)


def check(call: Call, op) -> None:
    """Raises Failure unless the first row of the call is what the reference makes of that row. Rows do not depend on
    each other."""
    alone, exact = call.row(0), call.row(0, torch.float64)  # before the op writes anything
    ours = call.run(op)[:1]
    no_worse_than_torch("out", ours, alone.run(reference.block_attention), exact.run(reference.block_attention))


def _width(model: Model, form: str) -> int:
    """Positions of a window: a shadow's window holds the block twice."""
    return model.window * (2 if form == "shadow" else 1)


def _form(bench: Bench, ops: Ops, model: Model, B: int, prefix: int, form: str, cost: floors.Cost) -> Work:
    D, W = model.head_dim, _width(model, form)
    S = -(-(prefix + W) // PAGE_SIZE) * PAGE_SIZE
    count, cold = bench.rotation(int(cost.nbytes))
    window = after_prefix(bench, [prefix] * B, W)
    visible = torch.ones(B, W, prefix + W, dtype=torch.bool, device=bench.device)
    options = {"scale": D**-0.5}
    if form == "shadow":
        window = _shadow(window)
        visible[:, :, prefix:] = _shadow_sees(window)
    if form == "sliding":
        options["sliding_window"] = model.reach + 1
        visible[:, :, : max(0, prefix - model.reach)] = False
    if form == "kept":
        kept = torch.rand(B, S, device=bench.device) < 0.75
        window = dataclasses.replace(window, kept=kept)
        visible[:, :, :prefix] = kept[:, None, :prefix]
    sets = []
    for _ in range(count):
        keys, values = (normal(bench, B, model.kv_heads, S, D) for _ in range(2))
        sets.append(Inputs(*projections(bench, model, B, W), keys, values))

    contiguous = [Call(s.q, s.k, s.v, s.keys, s.values, window, options) for s in sets]
    calls = [_variant(bench, call, form) for call in contiguous]
    for call in contiguous:
        call.run(ops.block_attention)  # stores the window's keys, so that the baselines find them in place
    candidates = [Candidate(OURS, [partial(call.run, ops.block_attention) for call in calls])]
    if form in ("paged", "fp8"):
        candidates.append(Candidate(CONTIGUOUS, [partial(call.run, ops.block_attention) for call in contiguous]))
    gqa = {"scale": D**-0.5, "enable_gqa": model.heads != model.kv_heads}
    plain = [Inputs(s.q, s.k, s.v, s.keys[:, :, : prefix + W], s.values[:, :, : prefix + W]) for s in sets]
    candidates.append(Candidate("SDPA, mask", [sdpa(s, None, visible[:, None], gqa) for s in plain]))
    candidates.append(flex(bench, plain, B, W, prefix + W, lambda b, h, i, j: visible[b, i, j], gqa))
    note = "the baselines read a contiguous bf16 cache" if form in ("paged", "fp8") else ""
    return Work(candidates, cost, count, cold, note, partial(check, calls[0], ops.block_attention))


def _shadow(window: Window) -> Window:
    """The window with its first half once more in the second half, as the next block: the copies predict every token
    from the other tokens."""
    half = window.shape[1] // 2
    position, slot = window.q_pos.clone(), window.kv_slot.clone()
    position[:, half:], slot[:, half:] = position[:, :half], -1
    block = torch.zeros_like(position)
    block[:, half:] = 1
    return dataclasses.replace(window, q_pos=position, q_block=block, kv_slot=slot, mode="shadow")


def _shadow_sees(window: Window) -> Tensor:
    """[B, W, W]: what the shadow predicate shows a query of the window itself."""
    position, block = window.q_pos, window.q_block
    earlier = block[:, None, :] < block[:, :, None]
    twin = position[:, None, :] == position[:, :, None]
    return (block[:, None, :] <= block[:, :, None]) & ~(twin & earlier)


def _variant(bench: Bench, call: Call, form: str) -> Call:
    """The same call on a cache of that form."""
    if form == "paged":
        B, H_kv, S, D = call.k_cache.shape
        per_row = S // PAGE_SIZE
        order = torch.randperm(B * per_row, device=bench.device)
        # The first page is never in its place, because a kernel that ignored the table would be right there.
        order = torch.where(order[0] == 0, order.roll(1), order)
        window = dataclasses.replace(call.window, page_table=int32(bench, order.view(B, per_row)))

        def pages(cache: Tensor) -> Tensor:
            by_page = (
                cache.view(B, H_kv, per_row, PAGE_SIZE, D).transpose(1, 2).reshape(B * per_row, H_kv, PAGE_SIZE, D)
            )
            return torch.empty_like(by_page).index_copy_(0, order, by_page)

        return dataclasses.replace(call, k_cache=pages(call.k_cache), v_cache=pages(call.v_cache), window=window)
    if form == "fp8":
        # Normal values lie well inside the range of e4m3 at this scale.
        unit = torch.full((call.k_cache.shape[1],), 1 / 64, device=bench.device)
        caches = {name: (getattr(call, name) * 64).to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
        return dataclasses.replace(call, **caches, options=call.options | {"k_scale": unit, "v_scale": unit.clone()})
    return call
