"""The launcher of `block_attention` in Triton. Its device code is in split.py and its neighbours."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import device
from ..checks.attention import check_arguments
from ..library import operator
from ..tiles import COMBINE_ELEMENTS, HEAD_DIMS, AttentionTile, attention_prefill_tile, attention_tile
from ..window import Window, capacity
from .combine import _combine_kernel
from .prefill import _prefill_kernel
from .split import _attention_kernel

__all__ = ["AttentionTile", "attention_prefill_tile", "attention_tile", "block_attention"]

LOG2_E = 1.4426950408889634
# Partial results are fp32 [splits, rows, D] per KV head. Where they would take more than this, groups of query tiles
# take turns in the workspace.
WORKSPACE_BYTES = 512 * 2**20


def _fake(q: Tensor, **_: object) -> Tensor:
    B, H, W, D = q.shape
    return q.new_empty(B, W, H, D).transpose(1, 2)


@operator(mutates=("k_cache", "v_cache"), fake=_fake)
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
        q: [B, H, W, D] float32, bfloat16 or float16; any strides, the last one 1.
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
        ValueError: shape, stride, device, D neither a multiple of 16 up to 256 nor 512, one cache given, a scale that
            is not positive and finite, sliding_window < 1, scales without an fp8 cache or the other way round, caches
            that are empty, expanded, share memory or require a gradient.
        TypeError: dtype.
        RuntimeError: a gradient of q, k or v is wanted; CPU tensors without Triton's interpreter, or bfloat16 in it.
        NotImplementedError: a GPU that `tiles.TARGETS` does not name.

    Checked in the debug mode only (`dlm_kernels.debug`), because it reads the device: q_len in [0, W], cache_row in
    [0, R), kv_slot < S_max, kv_len <= S_max, page numbers, no two stored positions sharing a slot, and every stored
    slot hidden from all rows that read it. A NaN or an infinity in a live query, or in a key or value that it sees, is
    carried into the results, as in the reference.

    The visible prefix is read in splits, which are cut by the row's own length and whose partial results are added in
    order. For a row of many queries (with the heads of a group more than the tile's PREFILL_ROWS), one program a query
    tile walks the whole prefix instead. Both depend on the row alone, so its result has the same bits alone or in a
    batch, in any bucket that holds the row and at any capacity.

    There is one launch; one more (the combine) if the capacity, or the sliding window, has room for several splits; and
    one more (the prefill) if W has room for a row of many queries. Beyond 512 MiB of workspace, which is at most
    PREFILL_ROWS / SPLIT times what B rows of a 16-bit cache take, groups of query tiles take turns in the workspace,
    with two launches each.

    Spec: reference.block_attention. Split-KV decoding: FlashInfer, arXiv:2501.01005; online softmax: arXiv:2205.14135.
    """
    check_arguments(
        q, k, v, k_cache, v_cache, window,
        scale=scale, k_scale=k_scale, v_scale=v_scale, sliding_window=sliding_window,
        dtypes=(torch.float32, torch.bfloat16, torch.float16), head_dims=HEAD_DIMS,
    )  # fmt: skip
    capability, D, G = _capability(q), q.shape[3], q.shape[1] // k.shape[1]
    tile = attention_tile(capability, D=D, G=G, dtype=q.dtype, fp8=k_scale is not None)
    prefill = attention_prefill_tile(capability, D=D, dtype=q.dtype, fp8=k_scale is not None)
    options = {"scale": scale, "k_scale": k_scale, "v_scale": v_scale, "sliding_window": sliding_window}
    return _launch(q, k, v, k_cache, v_cache, window, **options, tile=tile, prefill=prefill)


def _capability(q: Tensor) -> int:
    """Compute capability whose tiles q's GPU runs; under the interpreter, that of the GPU that it stands for."""
    capability = device.capability_of("block_attention", q, _attention_kernel)
    if not q.is_cuda and q.dtype == torch.bfloat16 and not isinstance(_attention_kernel, triton.runtime.JITFunction):
        raise RuntimeError(
            "block_attention: q is bfloat16, whose products Triton's interpreter gets wrong (triton #11585): "
            "use float16 or float32"
        )
    return capability


def _launch(
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
    tile: AttentionTile,
    prefill: AttentionTile | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """`block_attention` after its checks, for a given tile and prefill tile (None: the same tile, not swapped)."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        raise RuntimeError(
            "block_attention: has no backward, got q, k or v with requires_grad=True; call it under torch.no_grad()"
        )
    # 1. What is written.
    B, H, W, D = q.shape
    H_kv = k.shape[1]
    G = H // H_kv
    has_cache = k_cache is not None
    out = torch.empty(B, W, H, D, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out.transpose(1, 2)

    # 2. What both forms are told. Of an fp8 cache the kernels handle the bytes.
    kept, page_table = (window.kept, window.page_table) if has_cache else (None, None)
    S_max = capacity(k_cache, window) if has_cache else 0
    if k_scale is not None:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    common = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "k_cache_ptr": k_cache,
        "v_cache_ptr": v_cache,
        "k_scale_ptr": k_scale,
        "v_scale_ptr": v_scale,
        "q_pos_ptr": window.q_pos,
        "q_block_ptr": window.q_block,
        "q_len_ptr": window.q_len,
        "kv_slot_ptr": window.kv_slot,
        "kv_len_ptr": window.kv_len,
        "replaced_ptr": window.replaced,
        "kept_ptr": None if kept is None else kept.view(torch.uint8),
        "page_table_ptr": page_table,
        "cache_row_ptr": window.cache_row,
        "out_ptr": out,
        "q_strides": q.stride()[:3],
        "k_strides": k.stride()[:3],
        "v_strides": v.stride()[:3],
        "k_cache_strides": k_cache.stride()[:3] if has_cache else (0, 0, 0),
        "v_cache_strides": v_cache.stride()[:3] if has_cache else (0, 0, 0),
        "W": W,
        "H_KV": H_kv,
        "S_MAX": S_max,
        "num_pages": 0 if page_table is None else page_table.shape[1],
        "sliding_window": sliding_window if has_cache else None,
        "longest": tile.PREFILL_ROWS,
        "scale_log2": scale * LOG2_E,
        "G": G,
        "D": D,
        "MODE": window.mode,
        "HAS_CACHE": has_cache,
        "PAGE": 0 if page_table is None else k_cache.shape[2],
        "BLOCK_D": triton.next_power_of_2(D),
    }

    # 3. The prefill, if the bucket has room for a row of many queries, and the splits.
    with device.launching_on(q):
        if W * G > tile.PREFILL_ROWS:
            prefill = prefill or tile
            num_tiles = triton.cdiv(W * G, prefill.BLOCK_M)
            _prefill_kernel[(B * H_kv * num_tiles,)](
                **common,
                num_tiles=num_tiles,
                BLOCK_M=prefill.BLOCK_M,
                BLOCK_N=prefill.BLOCK_N,
                num_warps=prefill.num_warps,
                num_stages=prefill.num_stages,
                maxnreg=prefill.max_registers,
            )
        _launch_splits(common, tile, workspace_bytes, B=B, S_max=S_max)
    return out.transpose(1, 2)


def _launch_splits(common: dict[str, object], tile: AttentionTile, workspace_bytes: int, *, B: int, S_max: int) -> None:
    """Launches the split form and its combine on the first PREFILL_ROWS query rows of the bucket: a batch row that has
    more is the prefill kernel's."""
    # 1. How many splits, and how many query tiles the workspace holds at once.
    q, H_kv, G, D, BLOCK_D = (common[name] for name in ("q_ptr", "H_KV", "G", "D", "BLOCK_D"))
    query_tiles = triton.cdiv(min(common["W"] * G, tile.PREFILL_ROWS), tile.BLOCK_M)
    # A row can have so many splits: a sliding window leaves few slots to cut, which need not begin at a key tile.
    visible = S_max
    if common["sliding_window"] is not None:
        visible = min(S_max, common["sliding_window"] - 1 + tile.BLOCK_N)
    num_splits = max(1, min(tile.MAX_SPLITS, triton.cdiv(visible, tile.SPLIT)))
    rows_per_tile = B * H_kv * num_splits * tile.BLOCK_M
    tiles_at_once = query_tiles
    if num_splits > 1:
        tiles_at_once = min(query_tiles, max(1, workspace_bytes // (rows_per_tile * (D + 2) * 4)))

    # 2. The workspace.
    partial_acc = partial_max = partial_sum = None
    if common["HAS_CACHE"]:
        # The workspace is empty if no row can have several splits: the kernel is the same for every capacity, and does
        # not look there.
        rows = rows_per_tile * tiles_at_once if num_splits > 1 else 0
        partial_acc = torch.empty(rows, D, dtype=torch.float32, device=q.device)
        partial_max = torch.empty(rows, dtype=torch.float32, device=q.device)
        partial_sum = torch.empty(rows, dtype=torch.float32, device=q.device)
    partials = {"partial_acc_ptr": partial_acc, "partial_max_ptr": partial_max, "partial_sum_ptr": partial_sum}
    plan = {"num_splits": num_splits, "SPLIT": tile.SPLIT, "MAX_SPLITS": tile.MAX_SPLITS, "BLOCK_N": tile.BLOCK_N}

    # 3. The launches, a group of query tiles after the other.
    shared = (
        "q_len_ptr", "kv_len_ptr", "replaced_ptr", "out_ptr", "W", "H_KV", "sliding_window", "longest", "G", "D",
        "BLOCK_D",
    )  # fmt: skip
    BLOCK_R = min(16, COMBINE_ELEMENTS // BLOCK_D)
    for first_tile in range(0, query_tiles, tiles_at_once):
        num_tiles = min(tiles_at_once, query_tiles - first_tile)
        _attention_kernel[(B * H_kv * num_tiles, num_splits)](
            **common,
            **partials,
            **plan,
            first_tile=first_tile,
            num_tiles=num_tiles,
            SWAP=tile.SWAP,
            BLOCK_M=tile.BLOCK_M,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
        )
        if num_splits > 1:
            _combine_kernel[(B * H_kv * (num_tiles * tile.BLOCK_M // BLOCK_R),)](
                **{name: common[name] for name in shared},
                **partials,
                **plan,
                first_row=first_tile * tile.BLOCK_M,
                num_rows=num_tiles * tile.BLOCK_M,
                BLOCK_R=BLOCK_R,
                num_warps=4,
                num_stages=1,
            )
