"""What `block_attention` computes, in plain torch: the specification of the kernel, and what runs where there is no GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..window import Window

HEAD_DIMS = (*range(16, 257, 16), 512)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor | None, v_cache: Tensor | None, window: Window, *, scale: float
) -> Tensor:
    """Attention of the window's queries over the cached prefix and the window itself; stores the window's keys and values.

        first   cache[cache_row[b], :, kv_slot[b, j]] = k, v[b, :, j]   for every live j with kv_slot[b, j] >= 0
        then    out[b, h, i] = sum_s softmax_s(scale * q[b, h, i] . key_s) value_s   over the keys that `Window` lets i see

    Args:
        q: [B, H, W, D] float32, bfloat16 or float16 (here also float64); any strides, the last one 1.
        k, v: [B, H_kv, W, D], after RoPE, dtype of q; H a multiple of H_kv, query head h uses KV head h // (H / H_kv).
        k_cache, v_cache: [R, H_kv, S_max, D], dtype of q, written in place. Both None: nothing is stored, no cached key is
            visible, and kv_slot, kv_len, replaced and cache_row are ignored.
        window: what is visible and where keys go; every tensor contiguous.
        scale: multiplies q . k.
    Returns:
        [B, H, W, D] in q's dtype, a transposed view of a fresh contiguous [B, W, H, D]. A query that sees nothing gets zeros.
    Raises:
        ValueError: shape, stride, device, D not a multiple of 16 up to 256 nor 512, one cache given.  TypeError: dtype.

    Not checked, because it would read the device: cache_row in [0, R), kv_slot < S_max, kv_len <= S_max, no two stored
    positions sharing a slot, and every stored slot hidden from all rows that read the same cache row. What lies in hidden
    slots and dead positions is irrelevant, NaN included; a live key must be finite even for queries that do not see it.
    Scores, softmax and the sum over values are float32 (float64 for float64) and the result is rounded once.
    """
    check_arguments(q, k, v, k_cache, v_cache, window, dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64))
    B, H, W, D = q.shape
    out = q.new_empty(B, W, H, D)
    if out.numel() == 0:
        return out.transpose(1, 2)

    live = (torch.arange(W, device=q.device) < window.q_len[:, None]) & (window.q_block >= 0)
    visible = live[:, :, None] & live[:, None, :] & _order_allows(window)
    if k_cache is None:
        keys, values, readable = k.clone(), v.clone(), live
    else:
        stored = live & (window.kv_slot >= 0)
        _store(k_cache, k, stored, window)
        _store(v_cache, v, stored, window)
        in_cache = _cache_visible(window, S_max=k_cache.shape[2])
        readable = torch.cat([in_cache, live], 1)
        visible = torch.cat([live[:, :, None] & in_cache[:, None, :], visible], 2)
        keys = torch.cat([k_cache[window.cache_row], k], 2)
        values = torch.cat([v_cache[window.cache_row], v], 2)

    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    H_kv = k.shape[1]
    # What nobody may read can be NaN, and neither a weight of zero nor a score of -inf would silence it: it must be gone.
    queries = q.to(precision).masked_fill(~live[:, None, :, None], 0.0).unflatten(1, (H_kv, H // H_kv)).flatten(2, 3)
    keys, values = (tensor.to(precision).masked_fill_(~readable[:, None, :, None], 0.0) for tensor in (keys, values))
    mask = visible[:, None].repeat(1, 1, H // H_kv, 1)
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    attended = attended.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    out.copy_(attended.unflatten(2, (H // H_kv, W)).flatten(1, 2).transpose(1, 2))
    return out.transpose(1, 2)


def _order_allows(window: Window) -> Tensor:
    """[B, W, W] (or broadcastable): may query i (dim 1) look at position j (dim 2), both being live."""
    if window.mode == "full":
        return torch.ones((), dtype=torch.bool, device=window.q_pos.device)
    order = window.q_pos if window.mode == "causal" else window.q_block
    allowed = order[:, None, :] <= order[:, :, None]
    if window.mode == "shadow":
        same_position = window.q_pos[:, None, :] == window.q_pos[:, :, None]
        allowed = allowed & ~(same_position & (window.q_block[:, None, :] < window.q_block[:, :, None]))
    return allowed


def _cache_visible(window: Window, S_max: int) -> Tensor:
    """[B, S_max]: cached slots that every live query of the row sees."""
    slot = torch.arange(S_max, device=window.kv_len.device)
    replaced = (slot >= window.replaced[:, :1]) & (slot < window.replaced[:, 1:])
    visible = (slot < window.kv_len[:, None]) & ~replaced
    return visible if window.kept is None else visible & window.kept


def _store(cache: Tensor, new: Tensor, stored: Tensor, window: Window) -> None:
    """Writes the stored positions of `new` [B, H_kv, W, D] into `cache`, in place and with a fixed number of writes.

    A position that is not stored repeats the write of one that is: same place, same value, so the order of the duplicates
    does not matter. If nothing at all is stored, every write puts back what slot 0 of some row already holds.
    """
    B, W = stored.shape
    if cache.numel() == 0:
        return
    position = torch.arange(B * W, device=new.device)
    source = torch.where(stored.flatten(), position, stored.flatten().int().argmax())
    row = window.cache_row[source // W].long()
    slot = window.kv_slot.flatten()[source].clamp_min(0).long()
    value = new.transpose(1, 2)[source // W, source % W]
    cache[row, :, slot] = torch.where(stored.any(), value, cache[row, :, slot])


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor | None, v_cache: Tensor | None, window: Window, *, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raises what `block_attention` documents; reads shapes, strides, dtypes and devices only."""
    op = "block_attention"
    if q.dim() != 4:
        raise ValueError(f"{op}: q must be [B, H, W, D], got shape {tuple(q.shape)}")
    B, H, W, D = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (B, W, D):
        raise ValueError(f"{op}: k must be [B, H_kv, W, D] with B={B}, W={W}, D={D} of q, got shape {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"{op}: v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    H_kv = k.shape[1]
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"{op}: H must be a multiple of H_kv, got H={H}, H_kv={H_kv}")
    if D not in HEAD_DIMS:
        raise ValueError(f"{op}: D must be a multiple of 16 up to 256, or 512, got D={D}")
    if (k_cache is None) != (v_cache is None):
        given = "v_cache" if k_cache is None else "k_cache"
        raise ValueError(f"{op}: k_cache and v_cache must be given together, got only {given}")
    if window.shape != (B, W):
        raise ValueError(f"{op}: window must describe [B, W]=[{B}, {W}] of q, got {list(window.shape)}")
    if q.dtype not in dtypes:
        raise TypeError(f"{op}: q must be one of {', '.join(str(dtype) for dtype in dtypes)}, got {q.dtype}")

    tensors = {"q": q, "k": k, "v": v}
    if k_cache is not None:
        tensors |= {"k_cache": k_cache, "v_cache": v_cache}
        if k_cache.dim() != 4 or (k_cache.shape[1], k_cache.shape[3]) != (H_kv, D):
            raise ValueError(f"{op}: k_cache must be [R, H_kv, S_max, D] with H_kv={H_kv}, D={D}, got {tuple(k_cache.shape)}")
        if v_cache.shape != k_cache.shape:
            raise ValueError(f"{op}: v_cache must have the shape of k_cache {tuple(k_cache.shape)}, got {tuple(v_cache.shape)}")
    for name, tensor in tensors.items():
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{op}: {name} must be on {q.device}, got {tensor.device}")
        if tensor.stride(3) != 1:
            raise ValueError(f"{op}: {name} must have last stride 1, got strides {tensor.stride()}")
    if window.q_pos.device != q.device:
        raise ValueError(f"{op}: window must be on {q.device}, got {window.q_pos.device}")
    if window.kept is not None and (k_cache is None or window.kept.shape[1] != k_cache.shape[2]):
        slots = None if k_cache is None else k_cache.shape[2]
        raise ValueError(f"{op}: window.kept must be [B, S_max] with S_max={slots} of the cache, got {tuple(window.kept.shape)}")
    for name, tensor in window.tensors().items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: window.{name} must be contiguous, got strides {tensor.stride()}")
