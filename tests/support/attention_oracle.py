"""`block_attention` written down a second time: who sees whom by a loop over `Window`'s docstring, then a softmax over
the list.

Float64, one query at a time; nothing is imported from the project but what carries the arguments.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attention_cases import Case

# The finite, non-negative numbers of float8 e4m3, by their codes 0..126: subnormals m * 2^-9, then (8 + m) * 2^(e -
# 10).
E4M3 = torch.tensor(
    [(code & 7) * 2.0**-9 if code < 8 else (8 + (code & 7)) * 2.0 ** ((code >> 3) - 10) for code in range(127)]
).double()


def fields(case: Case) -> dict[str, Any]:
    """The window as nested lists."""
    window = {f.name: getattr(case.window, f.name) for f in dataclasses.fields(case.window)}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in window.items()}


def cached_slots(case: Case, w: dict[str, Any], b: int) -> list[int]:
    """The logical slots that row b sees."""
    if case.k_buffer is None:
        return []
    start, end = w["replaced"][b]
    return [
        s
        for s in range(w["kv_len"][b])
        if not start <= s < end
        and (w.get("kept") is None or w["kept"][b][s])
        and (case.sliding_window is None or s > w["kv_len"][b] - case.sliding_window)
    ]


def live_positions(w: dict[str, Any], b: int) -> list[int]:
    return [j for j in range(w["q_len"][b]) if w["q_block"][b][j] >= 0]


def sees(w: dict[str, Any], b: int, i: int, j: int) -> bool:
    """Whether live query i sees live window position j of its row."""
    position, block = w["q_pos"][b], w["q_block"][b]
    if w["mode"] == "causal":
        return position[j] <= position[i]
    if w["mode"] == "block":
        return block[j] <= block[i]
    if w["mode"] == "shadow":
        is_twin = position[j] == position[i] and block[j] < block[i]
        return block[j] <= block[i] and not is_twin
    return True


def place(w: dict[str, Any], row: int, slot: int, page_size: int) -> tuple[int, int]:
    """Where a logical slot of a cache row lies: index of the buffer's first dimension and of its third."""
    if w.get("page_table") is None:
        return row, slot
    return w["page_table"][row][slot // page_size], slot % page_size


def by_the_loop(case: Case) -> Tensor:
    """What the call returns, [B, H, W, D] float64."""
    B, H, W, D = case.q.shape
    H_kv = case.k.shape[1]
    out = torch.zeros(B, H_kv, H // H_kv, W, D, dtype=torch.float64)
    queries = case.q.double().unflatten(1, (H_kv, H // H_kv))
    k_cache, v_cache = case.caches
    w = fields(case)
    for b in range(B):
        live, slots = live_positions(w, b), cached_slots(case, w, b)
        if not live:
            continue
        k_seen, v_seen = case.k[b, :, :0].double(), case.v[b, :, :0].double()
        if slots:
            first, third = zip(*(place(w, w["cache_row"][b], s, k_cache.shape[2]) for s in slots), strict=True)
            # Two lists around a slice: the listed pairs come first.
            k_seen, v_seen = (cache[first, :, third].transpose(0, 1).double() for cache in (k_cache, v_cache))
            if case.k_scale is not None:
                k_seen, v_seen = (
                    k_seen * case.k_scale.double()[:, None, None],
                    v_seen * case.v_scale.double()[:, None, None],
                )
        for i in live:
            seen = [j for j in live if sees(w, b, i, j)]
            keys = torch.cat([k_seen, case.k[b, :, seen].double()], 1)
            values = torch.cat([v_seen, case.v[b, :, seen].double()], 1)
            scores = case.scale * (queries[b, :, :, i] @ keys.transpose(1, 2))
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            out[b, :, :, i] = weights @ values / weights.sum(-1, keepdim=True)
    return out.flatten(1, 2)


def may_be_nan(case: Case, *, keys: bool) -> Tensor:
    """[B, H, W, D] bool: results that may be NaN though the formula's are not: a live value of the row that the query
    does not see is not finite there (times a weight of 0 it is NaN); with `keys`, also where such a key is."""
    (B, H, W, D), H_kv = case.q.shape, case.k.shape[1]
    may = torch.zeros(B, H_kv, H // H_kv, W, D, dtype=torch.bool)
    w = fields(case)
    for b in range(B):
        live = live_positions(w, b)
        for j in live:
            column = ~case.v[b, :, j].isfinite()
            if keys:
                column = column | ~case.k[b, :, j].isfinite().all(-1, keepdim=True)
            unseeing = [i for i in live if not sees(w, b, i, j)] if column.any() else []
            may[b, :, :, unseeing] |= column[:, None, None]
    return may.flatten(1, 2)


def e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 number, ties to the even code, at most 448 in size; NaN stays NaN. In float64."""
    size = x.double().abs().clamp_max(448.0)
    above = torch.searchsorted(E4M3, size.contiguous().nan_to_num(0.0)).clamp_max(126)
    below = (above - 1).clamp_min(0)
    up, down = E4M3[above] - size, size - E4M3[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return torch.where(x.isnan(), math.nan, E4M3[code].copysign(x.double()))


def stored_by_the_loop(case: Case) -> tuple[Tensor, Tensor]:
    """The cache buffers after the call, in float64 (an fp8 cache: its numbers before the scale)."""
    w = fields(case)
    buffers = case.k_buffer.double().clone(), case.v_buffer.double().clone()
    margin = (case.k_buffer.shape[2] - case.caches[0].shape[2]) // 2
    for b in range(case.q.shape[0]):
        for j in live_positions(w, b):
            if w["kv_slot"][b][j] < 0:
                continue
            first, third = place(w, w["cache_row"][b], w["kv_slot"][b][j], case.caches[0].shape[2])
            for buffer, new, scale in zip(buffers, (case.k, case.v), (case.k_scale, case.v_scale), strict=True):
                stored = new[b, :, j]
                if scale is not None:
                    stored = e4m3(stored.float() / scale.float()[:, None])
                buffer[first, :, margin + third] = stored.double()
    return buffers
