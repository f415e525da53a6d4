"""What `block_attention` accepts: checked by its reference and by the kernel's launcher, without reading an element."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..window import Window, capacity
from .named import check_of, shown
from .written import check_written

FP8 = torch.float8_e4m3fn
# What the kernel multiplies scores by, scale * log2(e), is a float32.
MAX_SCALE = 1e38


@check_of("block_attention")
def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    window: Window,
    *,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    sliding_window: int | None,
    dtypes: tuple[torch.dtype, ...],
    head_dims: Collection[int] | None = None,
) -> None:
    """Raises what `block_attention` documents; reads shapes, strides, dtypes and devices only.

    Args:
        dtypes: those that q may have. head_dims: those that D may be; None: any.
    """
    op = "block_attention"
    # 1. Shapes.
    if q.dim() != 4:
        raise ValueError(f"{op}: q must be [B, H, W, D], got shape {tuple(q.shape)}")
    B, H, W, D = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (B, W, D):
        raise ValueError(f"{op}: k must be [B, H_kv, W, D] with B={B}, W={W}, D={D} of q, got shape {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"{op}: v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    H_kv = k.shape[1]
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"{op}: H must be a multiple of H_kv, got H={H}, H_kv={H_kv} (dim 1 of q and k)")
    if D < 1:
        raise ValueError(f"{op}: D must be at least 1, got D={D} (dim 3 of q)")
    if head_dims is not None and D not in head_dims:
        raise ValueError(f"{op}: D must be a multiple of 16 up to 256, or 512, got D={D} (dim 3 of q)")
    if (k_cache is None) != (v_cache is None):
        given = "v_cache" if k_cache is None else "k_cache"
        raise ValueError(f"{op}: k_cache and v_cache must be given together, got only {given}")
    if window.shape != (B, W):
        raise ValueError(f"{op}: window must describe [B, W]=[{B}, {W}] of q, got {list(window.shape)}")
    if q.dtype not in dtypes:
        raise TypeError(f"{op}: q must be one of {', '.join(str(dtype) for dtype in dtypes)}, got {q.dtype}")

    # 2. Numbers.
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a float, got {type(scale).__name__}")
    if not abs(scale) <= MAX_SCALE:
        raise ValueError(
            f"{op}: scale must be a finite number, at most {MAX_SCALE:g} in size, got scale={shown(scale)}"
        )
    if scale <= 0:
        raise ValueError(f"{op}: scale must be positive, got scale={scale}")
    if sliding_window is not None:
        if isinstance(sliding_window, bool) or not isinstance(sliding_window, int):
            raise TypeError(f"{op}: sliding_window must be an int or None, got {type(sliding_window).__name__}")
        if not 1 <= sliding_window < 2**31:
            raise ValueError(f"{op}: sliding_window must be in [1, 2^31), got {shown(sliding_window)}")

    # 3. Dtypes, devices and strides.
    tensors = {"q": q, "k": k, "v": v}
    if k_cache is not None:
        tensors |= {"k_cache": k_cache, "v_cache": v_cache}
        _check_caches(op, k_cache, v_cache, window, H_kv=H_kv, D=D)
    _check_scales(op, k_cache, k_scale, v_scale, H_kv=H_kv, device=q.device)
    for name, tensor in tensors.items():
        dtype = FP8 if name.endswith("cache") and k_scale is not None else q.dtype
        if tensor.dtype != dtype:
            expected = f"the dtype of q, {dtype}" if dtype == q.dtype else f"dtype {dtype}, as there are scales"
            raise TypeError(f"{op}: {name} must have {expected}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{op}: {name} must be on {q.device}, got {tensor.device}")
        if tensor.stride(3) != 1:
            raise ValueError(f"{op}: {name} must have last stride 1, got strides {tensor.stride()}")
    if window.q_pos.device != q.device:
        raise ValueError(f"{op}: window must be on {q.device}, got {window.q_pos.device}")
    slots = None if k_cache is None else capacity(k_cache, window)
    if k_cache is not None and q.numel() and not k_cache.shape[0] * slots:
        raise ValueError(
            f"{op}: k_cache must have a row and a slot, got {tuple(k_cache.shape)} with S_max={slots}; None is no cache"
        )
    if window.kept is not None and window.kept.shape[1] != slots:
        raise ValueError(
            f"{op}: window.kept must be [B, S_max] with S_max={slots} of the cache, got {tuple(window.kept.shape)}"
        )
    for name, tensor in window.tensors().items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: window.{name} must be contiguous, got strides {tensor.stride()}")


def _check_caches(op: str, k_cache: Tensor, v_cache: Tensor, window: Window, *, H_kv: int, D: int) -> None:
    if k_cache.dim() != 4 or (k_cache.shape[1], k_cache.shape[3]) != (H_kv, D):
        axes = "[R, H_kv, S_max, D]" if window.page_table is None else "[num_pages, H_kv, page_size, D]"
        raise ValueError(f"{op}: k_cache must be {axes} with H_kv={H_kv}, D={D}, got {tuple(k_cache.shape)}")
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"{op}: v_cache must have the shape of k_cache {tuple(k_cache.shape)}, got {tuple(v_cache.shape)}"
        )
    check_written(op, {"k_cache": k_cache, "v_cache": v_cache})
    page_size = k_cache.shape[2]
    if window.page_table is not None and (page_size < 16 or page_size & (page_size - 1)):
        raise ValueError(f"{op}: page_size, dim 2 of k_cache, must be a power of two >= 16, got {page_size}")


def _check_scales(
    op: str, k_cache: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, *, H_kv: int, device: torch.device
) -> None:
    is_fp8 = k_cache is not None and k_cache.dtype == FP8
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != is_fp8:
            cache = "no cache" if k_cache is None else f"a cache of {k_cache.dtype}"
            given = f"no {name}" if scale is None else f"{name} {tuple(scale.shape)}"
            raise ValueError(
                f"{op}: {name} must be given with a cache of {FP8} and with no other, got {given} and {cache}"
            )
        if scale is None:
            continue
        if tuple(scale.shape) != (H_kv,) or not scale.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous [H_kv] with H_kv={H_kv}, "
                f"got {tuple(scale.shape)}, strides {scale.stride()}"
            )
        if scale.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be torch.float32, got {scale.dtype}")
        if scale.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {scale.device}")
