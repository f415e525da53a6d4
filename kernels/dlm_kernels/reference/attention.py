"""What `block_attention` computes, in plain torch: the specification of the kernel and of the op for a CPU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks.attention import FP8, check_arguments
from ..window import Window, capacity

FP8_MAX = 448.0


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    window: Window,
    *,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention of the window's queries over the cached prefix and the window itself; stores the window's keys and
    values.

        first   cache[cache_row[b], :, kv_slot[b, j]] = k, v[b, :, j]   for every live j with kv_slot[b, j] >= 0
        then    out[b, h, i] = sum_s softmax_s(scale * q[b, h, i] . key_s) value_s   over what i sees (`Window`)

    Args:
        q: [B, H, W, D] float32, bfloat16 or float16 (here also float64, and any D); any strides, the last one 1.
        k, v: [B, H_kv, W, D], after RoPE, dtype of q. H is a multiple of H_kv; query head h uses KV head
            h // (H / H_kv).
        k_cache, v_cache: [R, H_kv, S_max, D] (with `window.page_table`, pages), dtype of q or float8_e4m3fn, written in
            place. Both None: nothing is stored, no cached key is visible, and kv_slot, kv_len, replaced and cache_row
            are ignored.
        window: what is visible and where keys go; every tensor contiguous.
        scale: multiplies q . k; positive, at most 1e38.
        k_scale, v_scale: [H_kv] float32, given with a float8_e4m3fn cache and with no other. What is stored is
            key / scale in float32, rounded to the nearest e4m3 value, ties to even, and beyond +-448 to +-448 (NaN
            stays NaN); what is read is that value times scale. The window's own keys are attended as they come.
        sliding_window: at least 1; of the cached slots only those s > kv_len - sliding_window are visible. None: all
            are.
    Returns:
        [B, H, W, D] in q's dtype, a transposed view of a fresh contiguous [B, W, H, D]. A query that sees nothing gets
        zeros.
    Raises:
        ValueError: shape, stride, device, one cache given, a scale that is not positive and finite, sliding_window < 1,
            scales without an fp8 cache or the other way round, caches that are empty, expanded, share memory or require
            a gradient.
        TypeError: dtype.

    Checked in the debug mode only (`dlm_kernels.debug`), because it reads the device: q_len in [0, W], cache_row in
    [0, R), kv_slot < S_max, kv_len <= S_max, page numbers, no two stored positions sharing a slot, and every stored
    slot hidden from all rows that read it. What lies in hidden slots and dead positions is irrelevant, NaN included. A
    NaN or an infinity in a live query, or in a key or value that it sees, is carried into the results as the formula
    says; queries of the same batch row that do not see that key or value may get NaN too, other rows never. Scores,
    softmax and the sum over values are float32 (float64 for float64) and the result is rounded once.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    check_arguments(
        q, k, v, k_cache, v_cache, window,
        scale=scale, k_scale=k_scale, v_scale=v_scale, sliding_window=sliding_window, dtypes=dtypes,
    )  # fmt: skip
    B, H, W, D = q.shape
    out = q.new_empty(B, W, H, D)
    if out.numel() == 0:
        return out.transpose(1, 2)

    # 1. Who sees whom in the window.
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    live = (torch.arange(W, device=q.device) < window.q_len[:, None]) & (window.q_block >= 0)
    visible = live[:, :, None] & live[:, None, :] & _window_allows(window)
    keys, values, readable = k.to(precision), v.to(precision), live

    # 2. The window's keys are stored; the row's visible slots come before the window.
    if k_cache is not None:
        stored = live & (window.kv_slot >= 0)
        _store(k_cache, k, k_scale, stored, window)
        _store(v_cache, v, v_scale, stored, window)
        in_cache = _cache_visible(window, S_max=capacity(k_cache, window), sliding_window=sliding_window)
        readable = torch.cat([in_cache, live], 1)
        visible = torch.cat([live[:, :, None] & in_cache[:, None, :], visible], 2)
        keys = torch.cat([_read(k_cache, k_scale, in_cache, window, precision), keys], 2)
        values = torch.cat([_read(v_cache, v_scale, in_cache, window, precision), values], 2)

    # 3. What nobody may read can be NaN, which neither a weight of zero nor a score of -inf would silence, so zeros
    # replace it.
    H_kv = k.shape[1]
    queries = q.to(precision).masked_fill(~live[:, None, :, None], 0.0).unflatten(1, (H_kv, H // H_kv)).flatten(2, 3)
    keys, values = (tensor.masked_fill(~readable[:, None, :, None], 0.0) for tensor in (keys, values))

    # 4. The softmax over the visible keys, and the mean of their values.
    mask = visible[:, None].repeat(1, 1, H // H_kv, 1)
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    # Over scores that are all -inf, torch's softmax is zeros, as if nothing were seen; the sum of the weights, which is
    # 1 otherwise, tells the two apart. Such a softmax is not a number, whether a query or its keys are not finite or
    # their product overflows.
    weights = F.scaled_dot_product_attention(
        queries, keys, torch.ones_like(values[..., :1]), attn_mask=mask, scale=scale
    )
    attended = attended.masked_fill(weights == 0, math.nan).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    out.copy_(attended.unflatten(2, (H // H_kv, W)).flatten(1, 2).transpose(1, 2))
    return out.transpose(1, 2)


def _window_allows(window: Window) -> Tensor:
    """[B, W, W] (or broadcastable): whether query i (dim 1) may look at position j (dim 2), if both are live."""
    allowed = torch.ones((), dtype=torch.bool, device=window.q_pos.device)
    if window.mode != "full":
        order = window.q_pos if window.mode == "causal" else window.q_block
        allowed = order[:, None, :] <= order[:, :, None]
    if window.mode == "shadow":
        same_position = window.q_pos[:, None, :] == window.q_pos[:, :, None]
        allowed = allowed & ~(same_position & (window.q_block[:, None, :] < window.q_block[:, :, None]))
    return allowed


def _cache_visible(window: Window, S_max: int, sliding_window: int | None) -> Tensor:
    """[B, S_max]: cached slots that every live query of the row sees."""
    slot = torch.arange(S_max, device=window.kv_len.device)
    replaced = (slot >= window.replaced[:, :1]) & (slot < window.replaced[:, 1:])
    visible = (slot < window.kv_len[:, None]) & ~replaced
    if sliding_window is not None:
        visible = visible & (slot > window.kv_len[:, None] - sliding_window)
    return visible if window.kept is None else visible & window.kept


def _place(row: Tensor, slot: Tensor, cache: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """(first index, third index) in the cache of `slot` of cache row `row`: the two themselves, or page and place."""
    row, slot = row.long(), slot.long()
    if window.page_table is None:
        return row, slot
    page_size = cache.shape[2]
    return window.page_table[row, slot // page_size].long(), slot % page_size


def _read(cache: Tensor, scale: Tensor | None, visible: Tensor, window: Window, precision: torch.dtype) -> Tensor:
    """[B, H_kv, S_max, D] of the rows' slots in `precision`; what is not visible may be anything."""
    B, S_max = visible.shape
    # A page that holds nothing visible may have any number in the table.
    slot = torch.arange(S_max, device=cache.device).expand(B, S_max)
    first, third = _place(window.cache_row[:, None].expand(B, S_max), slot, cache, window)
    if window.page_table is not None:
        first = torch.where(visible, first, 0)
    # Eight-bit floats have no gather: their bytes do.
    stored = cache if scale is None else cache.view(torch.uint8)
    read = stored[first, :, third].transpose(1, 2)
    return read.to(precision) if scale is None else read.view(FP8).to(precision) * scale.to(precision)[:, None, None]


def to_fp8(value: Tensor, scale: Tensor) -> Tensor:
    """What an fp8 cache stores of [N, H_kv, D] keys or values: value / scale, saturating; `scale` is [H_kv]."""
    return (value.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _store(cache: Tensor, new: Tensor, scale: Tensor | None, stored: Tensor, window: Window) -> None:
    """Writes the stored positions of `new` [B, H_kv, W, D] into `cache`, in place and with a fixed number of writes.

    A position that is not stored repeats the write of one that is: same place, same value, so the order of the
    duplicates does not matter. If nothing at all is stored, every write puts back what slot 0 of the first row, or
    page, already holds.
    """
    B, W = stored.shape
    if cache.numel() == 0:
        return
    position = torch.arange(B * W, device=new.device)
    source = torch.where(stored.flatten(), position, stored.flatten().int().argmax())
    slot = torch.where(stored.any(), window.kv_slot.flatten()[source], 0)
    first, third = _place(window.cache_row[source // W], slot, cache, window)
    first = torch.where(stored.any(), first, 0)
    value = new.transpose(1, 2)[source // W, source % W]
    if scale is not None:
        value, cache = to_fp8(value, scale).view(torch.uint8), cache.view(torch.uint8)
    cache[first, :, third] = torch.where(stored.any(), value, cache[first, :, third])
