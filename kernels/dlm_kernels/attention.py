"""`block_attention` in Triton: its launcher, its tiles, and the configurations that must compile."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .attention_device import _attention_kernel, _combine_kernel
from .reference.attention import check_arguments
from .static import CompileCase
from .tiles import AttentionTile, attention_tile
from .window import Window

LOG2_E = 1.4426950408889634
# Partial results are fp32 [splits + 1, rows, D] per KV head; a long window is processed in groups of query tiles to bound them.
WORKSPACE_BYTES = 256 * 2**20
COMBINE_ELEMENTS = 2048


# What the kernel can do; the reference also has "shadow", and kept slots.
KERNEL_MODES = ("full", "causal", "block")


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor | None, v_cache: Tensor | None, window: Window, *, scale: float
) -> Tensor:
    """Attention of the window's queries over the cached prefix and the window itself; stores the window's keys and values.

        first   cache[cache_row[b], :, kv_slot[b, j]] = k, v[b, :, j]   for every live j with kv_slot[b, j] >= 0
        then    out[b, h, i] = sum_s softmax_s(scale * q[b, h, i] . key_s) value_s   over the keys that `Window` lets i see

    Args:
        q: [B, H, W, D] float32, bfloat16 or float16; any strides, the last one 1.
        k, v: [B, H_kv, W, D], after RoPE, dtype of q; H a multiple of H_kv, query head h uses KV head h // (H / H_kv).
        k_cache, v_cache: [R, H_kv, S_max, D], dtype of q, written in place. Both None: nothing is stored, no cached key is
            visible, and kv_slot, kv_len, replaced and cache_row are ignored.
        window: what is visible and where keys go; every tensor contiguous.
        scale: multiplies q . k.
    Returns:
        [B, H, W, D] in q's dtype, a transposed view of a fresh contiguous [B, W, H, D]. A query that sees nothing gets zeros.
    Raises:
        ValueError: shape, stride, device, D not a multiple of 16 up to 256 nor 512, one cache given.  TypeError: dtype.
        NotImplementedError: mode "shadow" or kept slots, which only the reference has.
        RuntimeError: a gradient is wanted; CPU tensors without Triton's interpreter, or bfloat16 in it.

    Not checked, because it would read the device: cache_row in [0, R), kv_slot < S_max, kv_len <= S_max, no two stored
    positions sharing a slot, and every stored slot hidden from all rows that read the same cache row.

    The cached prefix is read in splits of a fixed length whose partial results are added in order, so a row's result has the
    same bits alone or in a batch, in any bucket that holds it and at any capacity. One launch without a cache, two with one;
    a long window takes several pairs, so that the workspace stays near 256 MiB.
    Spec: reference.block_attention. Split-KV decoding: FlashInfer, arXiv:2501.01005; online softmax: arXiv:2205.14135.
    """
    check_arguments(q, k, v, k_cache, v_cache, window, dtypes=(torch.float32, torch.bfloat16, torch.float16))
    for name, missing in (("mode 'shadow'", window.mode not in KERNEL_MODES), ("kept slots", window.kept is not None)):
        if missing:
            raise NotImplementedError(f"block_attention: the Triton kernel has no {name} yet; reference.block_attention does")
    capability = _capability(q)
    tile = attention_tile(capability, D=q.shape[3], G=q.shape[1] // k.shape[1], dtype=q.dtype)
    return _launch(q, k, v, k_cache, v_cache, window, scale=scale, tile=tile)


def _capability(q: Tensor) -> int:
    """Compute capability of q's GPU; of CPU tensors under the interpreter, an arbitrary one."""
    if q.is_cuda:
        major, minor = torch.cuda.get_device_capability(q.device)
        return 10 * major + minor
    if isinstance(_attention_kernel, triton.runtime.JITFunction):
        raise RuntimeError(
            f"block_attention: q is on {q.device}; the Triton kernel needs a CUDA GPU, or TRITON_INTERPRET=1 set before "
            "dlm_kernels is imported. dlm_kernels.reference.attention runs anywhere."
        )
    if q.dtype == torch.bfloat16:
        raise RuntimeError(
            "block_attention: q is bfloat16, whose products Triton's interpreter gets wrong (triton #11585): use float16 or float32"
        )
    return 80


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    window: Window,
    *,
    scale: float,
    tile: AttentionTile,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """`block_attention` after its checks, for a given tile."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        raise RuntimeError("block_attention: has no backward, got q, k or v with requires_grad=True; call it under torch.no_grad()")
    B, H, W, D = q.shape
    H_kv = k.shape[1]
    G = H // H_kv
    has_cache = k_cache is not None
    out = torch.empty(B, W, H, D, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out.transpose(1, 2)

    # Without a cache the window is the only split and the attention kernel writes the output itself.
    num_splits = triton.cdiv(k_cache.shape[2], tile.SPLIT) if has_cache else 0
    query_tiles = triton.cdiv(W * G, tile.BLOCK_M)
    tiles_at_once = query_tiles
    partial_acc = partial_max = partial_sum = None
    if has_cache:
        rows_per_tile = B * H_kv * (num_splits + 1) * tile.BLOCK_M
        tiles_at_once = min(query_tiles, max(1, workspace_bytes // (rows_per_tile * (D + 2) * 4)))
        rows = rows_per_tile * tiles_at_once
        partial_acc = torch.empty(rows, D, dtype=torch.float32, device=q.device)
        partial_max = torch.empty(rows, dtype=torch.float32, device=q.device)
        partial_sum = torch.empty(rows, dtype=torch.float32, device=q.device)
    BLOCK_D = triton.next_power_of_2(D)
    BLOCK_R = min(16, COMBINE_ELEMENTS // BLOCK_D)

    with torch.cuda.device_of(q):
        for first_tile in range(0, query_tiles, tiles_at_once):
            num_tiles = min(tiles_at_once, query_tiles - first_tile)
            _attention_kernel[(B * H_kv * num_tiles, num_splits + 1)](
                q_ptr=q,
                k_ptr=k,
                v_ptr=v,
                k_cache_ptr=k_cache,
                v_cache_ptr=v_cache,
                q_pos_ptr=window.q_pos,
                q_block_ptr=window.q_block,
                q_len_ptr=window.q_len,
                kv_slot_ptr=window.kv_slot,
                kv_len_ptr=window.kv_len,
                replaced_ptr=window.replaced,
                cache_row_ptr=window.cache_row,
                out_ptr=out,
                partial_acc_ptr=partial_acc,
                partial_max_ptr=partial_max,
                partial_sum_ptr=partial_sum,
                q_strides=q.stride()[:3],
                k_strides=k.stride()[:3],
                v_strides=v.stride()[:3],
                k_cache_strides=k_cache.stride()[:3] if has_cache else (0, 0, 0),
                v_cache_strides=v_cache.stride()[:3] if has_cache else (0, 0, 0),
                W=W,
                H_KV=H_kv,
                num_splits=num_splits,
                first_tile=first_tile,
                num_tiles=num_tiles,
                scale_log2=scale * LOG2_E,
                G=G,
                D=D,
                MODE=window.mode,
                HAS_CACHE=has_cache,
                SPLIT=tile.SPLIT,
                BLOCK_M=tile.BLOCK_M,
                BLOCK_N=tile.BLOCK_N,
                BLOCK_D=BLOCK_D,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
            if has_cache:
                _combine_kernel[(B * H_kv * (num_tiles * tile.BLOCK_M // BLOCK_R),)](
                    partial_acc_ptr=partial_acc,
                    partial_max_ptr=partial_max,
                    partial_sum_ptr=partial_sum,
                    q_len_ptr=window.q_len,
                    kv_len_ptr=window.kv_len,
                    out_ptr=out,
                    W=W,
                    H_KV=H_kv,
                    num_splits=num_splits,
                    first_row=first_tile * tile.BLOCK_M,
                    num_rows=num_tiles * tile.BLOCK_M,
                    G=G,
                    D=D,
                    SPLIT=tile.SPLIT,
                    BLOCK_R=BLOCK_R,
                    BLOCK_D=BLOCK_D,
                    num_warps=4,
                    num_stages=1,
                )
    return out.transpose(1, 2)


def compile_cases(capability: int) -> list[CompileCase]:
    """Every tile, and every mode with and without a cache, as the launcher specialises them for aligned strides."""
    cases = [_attention_case(capability, "bf16", D, 1, "full", True) for D in (32, 64, 128, 256, 512)]
    cases += [_attention_case(capability, "bf16", D, 4, "full", True) for D in (32, 64, 128)]
    cases += [_attention_case(capability, "bf16", D, 1, "block", True) for D in (16, 64, 80, 128, 256, 512)]
    cases += [_attention_case(capability, "bf16", D, 7, "block", True) for D in (16, 64, 128)]
    cases += [_attention_case(capability, "bf16", 128, G, "causal", True) for G in (1, 4)]
    cases += [_attention_case(capability, "bf16", 128, G, mode, False) for G, mode in ((1, "full"), (1, "block"), (4, "causal"))]
    cases += [_attention_case(capability, "bf16", 256, 1, "full", False)]
    cases += [_attention_case(capability, "fp16", 128, G, mode, True) for G, mode in ((1, "full"), (7, "block"))]
    cases += [_attention_case(capability, "fp32", D, 1, "block", True) for D in (16, 32, 64, 128, 256, 512)]
    cases += [_combine_case(dtype, D) for dtype, D in (("bf16", 32), ("bf16", 128), ("fp16", 512), ("fp32", 64))]
    return cases


def _attention_case(capability: int, dtype: str, D: int, G: int, mode: str, has_cache: bool) -> CompileCase:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    tile = attention_tile(capability, D=D, G=G, dtype=torch_dtype)
    BLOCK_D = triton.next_power_of_2(D)
    constexprs = {"G": G, "D": D, "MODE": mode, "HAS_CACHE": has_cache, "SPLIT": tile.SPLIT}
    constexprs |= {"BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_D": BLOCK_D}
    if not has_cache:
        absent = ("k_cache_ptr", "v_cache_ptr", "partial_acc_ptr", "partial_max_ptr", "partial_sum_ptr")
        constexprs |= dict.fromkeys(absent)
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr", "out_ptr"), f"*{dtype}")
    pointers |= dict.fromkeys(("partial_acc_ptr", "partial_max_ptr", "partial_sum_ptr"), "*fp32")
    config = f"{dtype} D={D} G={G} {mode} {'cache' if has_cache else 'no cache'} {tile.BLOCK_M}x{tile.BLOCK_N}"
    return _case(_attention_kernel, config, pointers, constexprs, num_warps=tile.num_warps, num_stages=tile.num_stages)


def _combine_case(dtype: str, D: int) -> CompileCase:
    BLOCK_D = triton.next_power_of_2(D)
    constexprs = {"G": 4, "D": D, "SPLIT": 512, "BLOCK_R": min(16, COMBINE_ELEMENTS // BLOCK_D), "BLOCK_D": BLOCK_D}
    pointers = dict.fromkeys(("partial_acc_ptr", "partial_max_ptr", "partial_sum_ptr"), "*fp32") | {"out_ptr": f"*{dtype}"}
    return _case(_combine_kernel, f"{dtype} D={D}", pointers, constexprs, num_warps=4, num_stages=1)


def _case(fn, config: str, pointers: dict[str, str], constexprs: dict[str, object], *, num_warps: int, num_stages: int) -> CompileCase:
    signature: dict[str, object] = {}
    aligned: list[str] = []
    for name in fn.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*i32")
            aligned.append(name)
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32", "i32")
            aligned += [f"{name}.{dim}" for dim in range(3)]
        else:
            signature[name] = "fp32" if name == "scale_log2" else "i32"
    kernel = {_attention_kernel: "attention", _combine_kernel: "attention combine"}[fn]
    return CompileCase(kernel, config, fn, signature, constexprs, tuple(aligned), num_warps, num_stages)
