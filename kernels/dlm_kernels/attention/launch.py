"""The launcher of `block_attention` in Triton. Its device code is in split.py and its neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import attrgetter

import torch
import triton
from torch import Tensor

from .. import device
from ..checks.attention import FP8, check_arguments
from ..library import operator
from ..plans import Calls, Launch, Plan
from ..tiles import COMBINE_ELEMENTS, HEAD_DIMS, AttentionTile, attention_prefill_tile, attention_tile
from ..window import Window
from .combine import _combine_kernel
from .prefill import _prefill_kernel
from .split import _attention_kernel

__all__ = ["AttentionTile", "attention_prefill_tile", "attention_tile", "block_attention"]

LOG2_E = 1.4426950408889634
# Partial results are fp32, D + 2 numbers for each split and query row of each KV head. Where they would take more than
# this, groups of query tiles, of batch rows and at last of KV heads take turns in the workspace.
WORKSPACE_BYTES = 512 * 2**20
# Programs that a grid has at most in its second and third dimension.
GRID_LIMIT = 65535

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The tensors that a call may have, by their names in the kernels.
_NAMES = (
    "q_ptr", "k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr", "k_scale_ptr", "v_scale_ptr", "q_pos_ptr", "q_block_ptr",
    "q_len_ptr", "kv_slot_ptr", "kv_len_ptr", "replaced_ptr", "cache_row_ptr", "kept_ptr", "page_table_ptr",
)  # fmt: skip
_of_window = attrgetter("q_pos", "q_block", "q_len", "kv_slot", "kv_len", "replaced", "cache_row", "kept", "page_table")
_calls = Calls("block_attention", _NAMES)


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
    one more (the prefill) if W has room for a row of many queries. The workspace, one tensor, takes at most 512 MiB,
    and at most about PREFILL_ROWS / SPLIT times what B rows of a 16-bit cache take. What does not fit takes turns in
    it, with two launches each: groups of query tiles; groups of batch rows, if one tile of all B rows does not fit; and
    groups of KV heads, if one tile of one batch row does not fit. A launch has at most 65,535 batch rows.

    Spec: reference.block_attention. Split-KV decoding: FlashInfer, arXiv:2501.01005; online softmax: arXiv:2205.14135.
    """
    # 1. What is known of such a call.
    try:
        given = (q, k, v, k_cache, v_cache, k_scale, v_scale, *_of_window(window))
        mode = window.mode
    except AttributeError:  # no window: the check says so
        given, mode = (), None
    facts = (type(window), mode, type(scale), scale, type(sliding_window), sliding_window)
    call, key, tensors, pointers = _calls.find(given, facts)
    written = pointers[3:5] if k_cache is not None else ()

    # 2. The check, unless the call is known to pass.
    if call is None or not call.accepts(tensors, written):
        check_arguments(
            q, k, v, k_cache, v_cache, window,
            scale=scale, k_scale=k_scale, v_scale=v_scale, sliding_window=sliding_window,
            dtypes=_DTYPES, head_dims=HEAD_DIMS,
        )  # fmt: skip
        _capability(q)
        _refuse_gradients(q, k, v)
        if call is None:
            call = _calls.add(key if type(window) is Window else None)
        call.accepted(written)

    # 3. The plan of such calls for these tiles and kernels.
    capability = _capability(q)
    depends = (capability, _attention_kernel, _prefill_kernel, _combine_kernel)
    plan = call.plan_for(depends)
    if plan is None:
        fp8 = k_scale is not None
        tile = attention_tile(capability, D=q.shape[3], G=q.shape[1] // k.shape[1], dtype=q.dtype, fp8=fp8)
        prefill = attention_prefill_tile(capability, D=q.shape[3], dtype=q.dtype, fp8=fp8)
        plan = _AttentionPlan(given, window.mode, scale, sliding_window, tile, prefill, WORKSPACE_BYTES)
        call.plan = depends, plan
    return plan.run(q, tensors, pointers)


def _capability(q: Tensor) -> int:
    """Compute capability whose tiles q's GPU runs; under the interpreter, that of the GPU that it stands for."""
    capability = device.capability_of("block_attention", q, _attention_kernel)
    if q.dtype == torch.bfloat16 and not q.is_cuda and not isinstance(_attention_kernel, triton.runtime.JITFunction):
        raise RuntimeError(
            "block_attention: q is bfloat16, whose products Triton's interpreter gets wrong (triton #11585): "
            "use float16 or float32"
        )
    return capability


def _refuse_gradients(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "block_attention: has no backward, got q, k or v with requires_grad=True; call it under torch.no_grad()"
        )


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
    _refuse_gradients(q, k, v)
    given = (q, k, v, k_cache, v_cache, k_scale, v_scale, *_of_window(window))
    plan = _AttentionPlan(given, window.mode, scale, sliding_window, tile, prefill or tile, workspace_bytes)
    return plan.run(q, [tensor for tensor in given if tensor is not None], ())


def _at_most(number: int, room: int) -> int:
    """The number, or as many as there is room for, at least one."""
    return max(1, min(number, room))


class _AttentionPlan:
    """How all calls like one are launched: their output, their workspace and their launches.

    Args:
        given: the tensors of the call, as `_NAMES` names them; only what they look like is used.
    """

    def __init__(
        self,
        given: Sequence[Tensor | None],
        mode: str,
        scale: float,
        sliding_window: int | None,
        tile: AttentionTile,
        prefill: AttentionTile,
        workspace_bytes: int,
    ) -> None:
        q, k, v, k_cache, v_cache, *_, page_table = given
        (B, H, W, D), H_kv = q.shape, k.shape[1]
        G = H // H_kv
        has_cache = k_cache is not None
        self.out_shape = B, W, H, D
        self.partial_numbers: int | None = None
        if 0 in self.out_shape:
            self.plan = Plan([])
            return

        # 1. What both forms are told. Of booleans and of an fp8 cache the kernels handle the bytes.
        present = [(name, tensor) for name, tensor in zip(_NAMES, given) if tensor is not None]
        as_bytes = [place for place, (_, tensor) in enumerate(present) if tensor.dtype in (FP8, torch.bool)]
        places = {name: place for place, (name, _) in enumerate(present)}
        if not has_cache:
            page_table = None
            places.pop("page_table_ptr", None)
        S_max = 0
        if has_cache:
            S_max = k_cache.shape[2] * (1 if page_table is None else page_table.shape[1])
        places["out_ptr"] = len(present)
        values = {
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
            "MODE": mode,
            "HAS_CACHE": has_cache,
            "PAGE": 0 if page_table is None else k_cache.shape[2],
            "BLOCK_D": triton.next_power_of_2(D),
        }

        # 2. The prefill, if the bucket has room for a row of many queries, and the splits.
        launches = []
        if W * G > tile.PREFILL_ROWS:
            num_tiles = triton.cdiv(W * G, prefill.BLOCK_M)
            grid, names = (B * H_kv * num_tiles,), (*_NAMES, "out_ptr")
            options = {
                "num_tiles": num_tiles,
                "BLOCK_M": prefill.BLOCK_M,
                "BLOCK_N": prefill.BLOCK_N,
                "num_warps": prefill.num_warps,
                "num_stages": prefill.num_stages,
                "maxnreg": prefill.max_registers,
            }
            launches.append(Launch(_prefill_kernel, grid, names, places, values | options))
        launches += self._splits(places, values, tile, workspace_bytes, B=B)
        self.plan = Plan(launches, as_bytes)

    def _splits(
        self, places: dict[str, int], values: dict[str, object], tile: AttentionTile, workspace_bytes: int, *, B: int
    ) -> list[Launch]:
        """The launches of the split form and of its combine on the first PREFILL_ROWS query rows of the bucket: a batch
        row that has more is the prefill kernel's."""
        # 1. How many splits. A sliding window leaves few slots to cut, which need not begin at a key tile.
        H_kv, G, D, S_max, BLOCK_D = (values[name] for name in ("H_KV", "G", "D", "S_MAX", "BLOCK_D"))
        query_tiles = triton.cdiv(min(values["W"] * G, tile.PREFILL_ROWS), tile.BLOCK_M)
        visible = S_max
        if values["sliding_window"] is not None:
            visible = min(S_max, values["sliding_window"] - 1 + tile.BLOCK_N)
        num_splits = max(1, min(tile.MAX_SPLITS, triton.cdiv(visible, tile.SPLIT)))

        # 2. How many query tiles, batch rows and KV heads the workspace holds at once.
        rows, heads, tiles = min(B, GRID_LIMIT), H_kv, query_tiles
        if num_splits > 1:
            places_left = workspace_bytes // (num_splits * tile.BLOCK_M * (D + 2) * 4)
            tiles = _at_most(tiles, places_left // (rows * heads))
            rows = _at_most(rows, places_left // (tiles * heads))
            heads = _at_most(heads, places_left // (tiles * rows))

        # 3. The workspace. It is empty if no row can have several splits: the kernel is the same for every capacity,
        # and does not look there.
        partial_rows = num_splits * rows * heads * tiles * tile.BLOCK_M if num_splits > 1 else 0
        if values["HAS_CACHE"]:
            self.partial_numbers = partial_rows * (D + 2)
            places = places | {"partials_ptr": places["out_ptr"] + 1}
        plan = {
            "partial_rows": partial_rows,
            "SPLIT": tile.SPLIT,
            "MAX_SPLITS": tile.MAX_SPLITS,
            "BLOCK_N": tile.BLOCK_N,
        }

        # 4. The launches, a group after the other.
        names = ("q_len_ptr", "kv_len_ptr", "replaced_ptr", "out_ptr", "partials_ptr")
        told = {name: values[name] for name in ("W", "H_KV", "sliding_window", "longest", "G", "D", "BLOCK_D")}
        BLOCK_R = min(16, COMBINE_ELEMENTS // BLOCK_D)
        launches = []
        firsts = (range(0, B, rows), range(0, H_kv, heads), range(0, query_tiles, tiles))
        for first_batch, first_head, first_tile in itertools.product(*firsts):
            num_batches, num_heads = min(rows, B - first_batch), min(heads, H_kv - first_head)
            num_tiles = min(tiles, query_tiles - first_tile)
            group = {"first_batch": first_batch, "first_head": first_head}
            options = {
                "first_tile": first_tile,
                "num_tiles": num_tiles,
                "SWAP": tile.SWAP,
                "BLOCK_M": tile.BLOCK_M,
                "num_warps": tile.num_warps,
                "num_stages": tile.num_stages,
                "maxnreg": tile.max_registers,
            }
            # The dispatcher hands out the first dimension first and the last one last, so splits that no row has come
            # behind all that some row has.
            grid = (num_heads * num_tiles, num_batches, num_splits)
            every = (*_NAMES, "out_ptr", "partials_ptr")
            launches.append(Launch(_attention_kernel, grid, every, places, values | plan | group | options))
            if num_splits > 1:
                options = {
                    "first_row": first_tile * tile.BLOCK_M,
                    "num_rows": num_tiles * tile.BLOCK_M,
                    "BLOCK_R": BLOCK_R,
                    "num_warps": 4,
                    "num_stages": 1,
                }
                grid = (num_heads * (num_tiles * tile.BLOCK_M // BLOCK_R), num_batches)
                launches.append(Launch(_combine_kernel, grid, names, places, told | plan | group | options))
        return launches

    def run(self, q: Tensor, tensors: Sequence[Tensor], pointers: tuple[int, ...]) -> Tensor:
        """The output of the call that has these tensors, those of `_NAMES` that it has."""
        out = torch.empty(*self.out_shape, dtype=q.dtype, device=q.device)
        if self.plan.launches:
            outputs = [out]
            if self.partial_numbers is not None:
                outputs.append(torch.empty(self.partial_numbers, dtype=torch.float32, device=q.device))
            self.plan.run(q, tensors, outputs, pointers)
        return out.transpose(1, 2)
