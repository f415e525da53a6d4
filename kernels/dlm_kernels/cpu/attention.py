"""`block_attention` on a CPU: what a window sees is worked out once (`sight`), and a layer only joins and attends."""

from __future__ import annotations

import math
from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..checks.attention import check_arguments
from ..checks.debug import is_on
from ..window import Window, capacity
from .calls import on_cpu
from .sight import Product, Sizes, at, known_sight, new_sight, step


@on_cpu(reference.block_attention)
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
    """`reference.block_attention`, which says what is computed, and of what arguments.

    Rows of other lengths are padded to one product where that is cheaper. So the last bits of a row may depend on the
    lengths of its neighbours, and never on what they hold. Pages give the bits of a cache in one piece: only where keys
    are written and read differs.
    """
    if k_cache is not None and k_scale is not None:
        # The same function by contract. No decoder of dlm_fast has eight-bit keys.
        return reference.block_attention(
            q, k, v, k_cache, v_cache, window,
            scale=scale, k_scale=k_scale, v_scale=v_scale, sliding_window=sliding_window,
        )  # fmt: skip
    # 1. What `check_arguments` reads of a call is in its form, and what it reads of a window are attributes of tensors,
    # which are compared for every window but that of the layer before. So a call of the form of one that was accepted,
    # with that window or with one of equal tensors, needs no second check.
    form = _form(q, k, v, k_cache, v_cache, scale, k_scale, v_scale, sliding_window)
    sight = None if form is None else known_sight(window, form)
    if sight is None or is_on():
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        check_arguments(
            q, k, v, k_cache, v_cache, window,
            scale=scale, k_scale=k_scale, v_scale=v_scale, sliding_window=sliding_window, dtypes=dtypes,
        )  # fmt: skip
    if sight is None:
        B, H, W, D = q.shape
        if q.numel() == 0:
            return q.new_empty(B, W, H, D).transpose(1, 2)
        precision = torch.float64 if q.dtype == torch.float64 else torch.float32
        sizes = Sizes(k.shape[1], 2 * H * D, precision, None, None, sliding_window)
        if k_cache is not None:
            R = (k_cache if window.page_table is None else window.page_table).shape[0]
            strides = k_cache.stride(), v_cache.stride()
            sizes = sizes._replace(R=R, S_max=capacity(k_cache, window), strides=strides)
        sight = new_sight(window, form, sizes)

    # 2. The window's keys are stored.
    for store in sight.stores:
        to, of = (store.cache_rows, slice(None), store.slots), (store.rows, slice(None), store.positions)
        new_keys, new_values = (k, v) if store.is_whole else (k[of], v[of])
        if store.in_memory is None:
            k_cache[to], v_cache[to] = new_keys, new_values
            continue
        for cache, places, new in zip((k_cache, v_cache), store.in_memory, (new_keys, new_values)):
            _in_steps(cache).index_copy_(0, places.flatten(), new.reshape(-1, new.shape[-1]))

    # 3. The products. What torch returns is a transposed view of [rows, queries, H, D], as the result is.
    if sight.is_whole:
        attended = _attended(sight.products[0], q, k, v, k_cache, v_cache, scale, sight.precision)
        attended = _cast(attended, q.dtype)
        laid_out = attended.transpose(1, 2)
        return attended if laid_out.is_contiguous() else laid_out.contiguous().transpose(1, 2)
    B, H, W, D = q.shape
    out = q.new_zeros(B, W, H, D)
    for product in sight.products:
        attended = _attended(product, q, k, v, k_cache, v_cache, scale, sight.precision).to(q.dtype).transpose(1, 2)
        rows, queries = (slice(None) if places is None else places for places in (product.rows, product.queries))
        out[rows, queries] = attended
    return out.transpose(1, 2)


def _form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    sliding_window: int | None,
) -> tuple | None:
    """What a sight and `check_arguments` read of a call, but for its window; None of a call that is always checked.

    Caches that begin near each other may share memory, which no shape tells. No tensor takes part in a gradient here
    (`on_cpu`).
    """
    tensors = [(x.shape, x.stride(), x.dtype, x.device) for x in (q, k, v)]
    if k_cache is not None or v_cache is not None:
        if k_cache is None or v_cache is None:
            return None
        extent = max(map(mul, k_cache.shape, k_cache.stride())) * k_cache.element_size()
        if abs(k_cache.data_ptr() - v_cache.data_ptr()) < extent:
            return None
        tensors += [(x.shape, x.stride(), x.dtype, x.device) for x in (k_cache, v_cache)]
    # True equals 1 and is refused.
    numbers = type(scale), scale, type(sliding_window), sliding_window
    return *tensors, *numbers, k_scale is None, v_scale is None


def _attended(
    product: Product,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    scale: float,
    precision: torch.dtype,
) -> Tensor:
    """[rows, H, queries, D] of one product, in `precision`; zeros where a query is dead."""
    queries = _cast(at(at(q, 0, product.rows), 2, product.queries), precision)
    places_k, places_v = product.in_memory or (None, None)
    keys = _joined(product, k_cache, places_k, k, precision)
    values = _joined(product, v_cache, places_v, v, precision)
    options = {"attn_mask": product.mask, "scale": scale, "enable_gqa": k.shape[1] != q.shape[1]}
    attended = F.scaled_dot_product_attention(queries, keys, values, **options)
    # Over scores that are all -inf torch's softmax is zeros, as if nothing were seen: then the first column is zero
    # too, or NaN where a value is not finite. The norm is the smallest size in that column, or NaN.
    if not torch.linalg.vector_norm(attended.select(3, 0), -math.inf).item() > 0 and not attended.all():
        # The sum of the weights, which is 1 otherwise, tells such a result from one that happens to hold a zero.
        weights = F.scaled_dot_product_attention(queries, keys, torch.ones_like(values), **options)
        attended = attended.masked_fill(weights == 0, math.nan)
    return attended if product.dead_queries is None else attended.masked_fill(product.dead_queries, 0.0)


def _joined(
    product: Product, cache: Tensor | None, places: Tensor | None, new: Tensor, precision: torch.dtype
) -> Tensor:
    """[rows, H_kv, keys, D]: the keys or values of a product; a view of the cache or of the window's where those are
    all. `places` of those of a cache in pages: `Product.in_memory`."""
    if product.joins:
        new = at(at(new, 0, product.rows), 2, product.positions)
    if places is not None:
        # One copy, in the layout that joining the parts of a cache in one piece has.
        joined = _cast(_in_steps(cache).index_select(0, places.flatten()), precision).view(*places.shape, -1)
        if product.joins:
            joined[:, :, places.shape[2] - new.shape[2] :] = new
    else:
        parts = [_cast(at(at(cache, 2, part), 0, product.cache_rows), precision) for part in product.slots]
        if product.joins:
            parts.append(_cast(new, precision))
        if len(parts) == 1 and product.dead_keys is None:
            return parts[0]
        joined = torch.cat(parts, 2)
    if product.dead_keys is not None:
        # What nobody may read can be NaN, which neither a weight of zero nor a score of -inf would silence.
        joined.view(-1, joined.shape[3]).index_fill_(0, product.dead_keys, 0.0)
    return joined


def _in_steps(cache: Tensor) -> Tensor:
    """[places, D]: a view of a cache in pages, whatever its strides, in which every key is at one number."""
    strides = cache.stride()
    last = sum((size - 1) * stride for size, stride in zip(cache.shape[:3], strides))
    return cache.as_strided((last // step(strides) + 1, cache.shape[3]), (step(strides), 1))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`; a call of `to` that changes nothing costs as much as one that does."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
