"""`block_attention` against what torch offers: SDPA without and with a mask, variable-length attention, compiled
FlexAttention.

The baselines find all keys ready in one contiguous cache. Ours stores the window's keys in the time that is measured;
the baselines do not.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dlm_fast import Ops
from dlm_kernels import Window

from .. import floors
from ..shapes import Model, Shapes
from ..timing import Candidate
from .run import OURS, Bench, Shape, Work


def decode_shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    """A window over cached prefixes of one length. A layer that sees only part of a prefix is timed once for all longer
    prefixes."""
    for model in chosen.models:
        for B, prefix in dict.fromkeys((B, model.prefix(prefix)) for B, prefix in chosen.decode):
            yield _decode_shape(bench, ops, model, [prefix] * B, f"prefix={prefix}")


def ragged_shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    """A window over cached prefixes whose lengths are spread evenly."""
    for model in chosen.models:
        for B, prefix in dict.fromkeys((B, model.prefix(prefix)) for B, prefix in chosen.ragged):
            lengths = [prefix * (b + 1) // B for b in range(B)]
            yield _decode_shape(bench, ops, model, lengths, f"prefix={lengths[0]}..{prefix}")


def prefill_shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    """One window of L positions and no cache. A layer that sees less than L has no such shape: no kernel has that
    predicate."""
    for model in chosen.models:
        for L in chosen.prefill:
            if model.prefix(L) < L - 1:
                continue
            cost = floors.prefill(model, L)
            facts = {
                "kind": "prefill",
                "L": L,
                "G": model.group,
                "D": model.head_dim,
                "visibility": model.prefill_visibility,
            }
            label = f"prefill B=1 L={L} {model.prefill_visibility}"
            yield Shape(
                "attention-prefill", model.name, label, partial(_prefill, bench, ops, model, L, cost), cost, facts
            )


def _decode_shape(bench: Bench, ops: Ops, model: Model, lengths: list[int], prefix: str) -> Shape:
    B, W, cost = len(lengths), model.window, floors.decode(model, lengths)
    equal = len(set(lengths)) == 1
    facts = {
        "kind": "decode",
        "B": B,
        "W": W,
        "prefix": max(lengths),
        "equal": equal,
        "G": model.group,
        "D": model.head_dim,
    }
    facts |= {"kv_heads": model.kv_heads, "kv_bytes": floors.kv_bytes(model, sum(lengths) + B * W)}
    op, label = f"attention-{'decode' if equal else 'ragged'}", f"decode B={B} {prefix} window={W}"
    return Shape(op, model.name, label, partial(_decode, bench, ops, model, lengths, cost), cost, facts)


# Candidates that the gates look for by name.
UNSPLIT = "ours, unsplit"
DENSE = "ours, everything visible"
FLEX = "FlexAttention, compiled"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One set of inputs.

    Attributes:
        keys, values: what the baselines attend over, the window's own keys and values included.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor


def normal(bench: Bench, *shape: int) -> Tensor:
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    return torch.randn(*shape, dtype=dtype, device=bench.device)


def int32(bench: Bench, values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=bench.device).contiguous()


def projections(bench: Bench, model: Model, B: int, W: int) -> list[Tensor]:
    return [
        normal(bench, B, W, heads, model.head_dim).transpose(1, 2)
        for heads in (model.heads, model.kv_heads, model.kv_heads)
    ]


def _decode(bench: Bench, ops: Ops, model: Model, lengths: list[int], cost: floors.Cost) -> Work:
    B, D, W = len(lengths), model.head_dim, model.window
    S = max(lengths) + W
    count, cold = bench.rotation(int(cost.nbytes))
    sets = []
    for _ in range(count):
        caches = [normal(bench, B, model.kv_heads, S, D) for _ in range(2)]
        sets.append(Inputs(*projections(bench, model, B, W), *caches))
    window = after_prefix(bench, lengths, W)
    kv_len = window.kv_len
    scale = D**-0.5
    ours = [partial(ops.block_attention, s.q, s.k, s.v, s.keys, s.values, window, scale=scale) for s in sets]
    for call in ours:
        call()  # the caches now hold the window's keys, and the baselines compute the same thing
    candidates = [Candidate(OURS, ours)]
    if B == 1 and ops.name == "triton":
        candidates.append(Candidate(UNSPLIT, [partial(unsplit, s, window, scale) for s in sets]))
        if bench.device.type == "cuda":
            candidates += [
                Candidate(f"{OURS}, {tile.BLOCK_M}x{tile.BLOCK_N}, at most {tile.MAX_SPLITS} splits of {tile.SPLIT}",
                          [partial(with_tile, s, window, scale, tile) for s in sets])
                for tile in candidate_tiles(sets[0])
            ]  # fmt: skip
    gqa = {"enable_gqa": model.heads != model.kv_heads, "scale": scale}
    if len(set(lengths)) == 1:
        candidates.append(
            Candidate("SDPA flash, no mask", [sdpa(s, SDPBackend.FLASH_ATTENTION, None, gqa) for s in sets])
        )
    mask = (torch.arange(S, device=bench.device) < (kv_len[:, None] + W))[:, None, None].expand(B, 1, W, S)
    candidates.append(Candidate("SDPA, mask", [sdpa(s, None, mask, gqa) for s in sets]))
    candidates.append(Candidate("SDPA cuDNN, mask", [sdpa(s, SDPBackend.CUDNN_ATTENTION, mask, gqa) for s in sets]))
    candidates.append(_varlen(bench, sets, lengths, W, gqa))
    candidates.append(flex(bench, sets, B, W, S, lambda b, h, i, j: j < kv_len[b] + W, gqa))
    return Work(candidates, cost, count, cold)


def after_prefix(bench: Bench, lengths: list[int], W: int) -> Window:
    """W new positions behind cached prefixes of these lengths, stored behind them, in one block."""
    kv_len = int32(bench, lengths)
    position = (kv_len[:, None] + torch.arange(W, dtype=torch.int32, device=bench.device)).contiguous()
    return Window(
        q_pos=position,
        q_block=torch.zeros_like(position),
        q_len=int32(bench, [W] * len(lengths)),
        kv_slot=position.clone(),
        kv_len=kv_len,
        replaced=int32(bench, [[0, 0]] * len(lengths)),
        cache_row=int32(bench, range(len(lengths))),
        mode="full",
    )


def unsplit(s: Inputs, window: Window, scale: float) -> Tensor:
    """Our kernel with the whole prefix in one split, which the effect of splitting is measured against."""
    from dlm_kernels import device
    from dlm_kernels.attention import launch as attention
    from dlm_kernels.tiles import attention_tile

    capability = device.capability_of("block_attention", s.q, attention._attention_kernel)
    tile = attention_tile(capability, D=s.q.shape[3], G=s.q.shape[1] // s.k.shape[1], dtype=s.q.dtype)
    return attention._launch(
        s.q, s.k, s.v, s.keys, s.values, window, scale=scale, tile=dataclasses.replace(tile, MAX_SPLITS=1)
    )


def candidate_tiles(s: Inputs) -> tuple[Any, ...]:
    """The tiles of this shape that no launcher runs until a GPU has compared them."""
    from dlm_kernels import device
    from dlm_kernels.attention import launch as attention
    from dlm_kernels.tiles import ATTENTION_CANDIDATES

    D, G = s.q.shape[3], s.q.shape[1] // s.k.shape[1]
    capability = device.capability_of("block_attention", s.q, attention._attention_kernel)
    return ATTENTION_CANDIDATES[capability].get((1 << (D - 1).bit_length(), int(G > 2)), ())


def with_tile(s: Inputs, window: Window, scale: float, tile: Any) -> Tensor:
    """Our kernel with another tile."""
    from dlm_kernels.attention import launch as attention

    return attention._launch(s.q, s.k, s.v, s.keys, s.values, window, scale=scale, tile=tile)


def _prefill(bench: Bench, ops: Ops, model: Model, L: int, cost: floors.Cost) -> Work:
    scale = model.head_dim**-0.5
    count, cold = bench.rotation(int(cost.nbytes))
    sets = [Inputs(q, k, v, k, v) for q, k, v in (projections(bench, model, 1, L) for _ in range(count))]
    position = torch.arange(L, dtype=torch.int32, device=bench.device)[None].contiguous()
    block = torch.div(position, model.window, rounding_mode="floor").int()
    none = torch.full_like(position, -1)
    zero = int32(bench, [0])
    visibility, W = model.prefill_visibility, model.window
    window = Window(position, block, int32(bench, [L]), none, zero, int32(bench, [[0, 0]]), zero.clone(), visibility)

    def calls(window: Window) -> list:
        return [partial(ops.block_attention, s.q, s.k, s.v, None, None, window, scale=scale) for s in sets]

    gqa = {"enable_gqa": model.heads != model.kv_heads, "scale": scale}
    candidates, note = [Candidate(OURS, calls(window))], ""
    if visibility == "full":
        candidates.append(
            Candidate("SDPA flash, no mask", [sdpa(s, SDPBackend.FLASH_ATTENTION, None, gqa) for s in sets])
        )
        candidates.append(
            Candidate("SDPA cuDNN, no mask", [sdpa(s, SDPBackend.CUDNN_ATTENTION, None, gqa) for s in sets])
        )
        return Work(candidates, cost, count, cold)
    candidates.append(Candidate(DENSE, calls(dataclasses.replace(window, mode="full"))))
    if visibility == "causal":
        causal = gqa | {"is_causal": True}
        candidates.append(
            Candidate("SDPA flash, causal", [sdpa(s, SDPBackend.FLASH_ATTENTION, None, causal) for s in sets])
        )
        candidates.append(
            Candidate("SDPA cuDNN, causal", [sdpa(s, SDPBackend.CUDNN_ATTENTION, None, causal) for s in sets])
        )
        candidates.append(flex(bench, sets, 1, L, L, lambda b, h, i, j: j <= i, gqa))
    else:
        mask = (block[0][None, :] <= block[0][:, None])[None, None]
        candidates.append(Candidate("SDPA, mask", [sdpa(s, None, mask, gqa) for s in sets]))
        candidates.append(flex(bench, sets, 1, L, L, lambda b, h, i, j: j // W <= i // W, gqa))
        note = f"SDPA flash has no such mask; '{DENSE}' computes more pairs"
    return Work(candidates, cost, count, cold, note)


def sdpa(s: Inputs, backend: SDPBackend | None, mask: Tensor | None, options: dict):
    def call() -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(s.q, s.keys, s.values, attn_mask=mask, **options)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(s.q, s.keys, s.values, attn_mask=mask, **options)

    return call


def _varlen(bench: Bench, sets: list[Inputs], lengths: list[int], W: int, options: dict) -> Candidate:
    """torch.nn.attention.varlen over keys that were packed beforehand; in a torch without that function, the row
    fails."""
    B = len(lengths)
    ends = torch.tensor([n + W for n in lengths], device=bench.device)
    cu_q = int32(bench, [W * b for b in range(B + 1)])
    cu_k = F.pad(ends.cumsum(0), (1, 0)).int()

    def pack(keys: Tensor) -> Tensor:
        packed = torch.cat([keys[b, :, : n + W] for b, n in enumerate(lengths)], 1).transpose(0, 1)
        return packed.contiguous()

    packed: list = []

    def call(index: int) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if not packed:
            packed.extend((pack(s.keys), pack(s.values)) for s in sets)
        q = sets[index].q.transpose(1, 2).flatten(0, 1)
        return varlen_attn(q, *packed[index], cu_q, cu_k, W, max(lengths) + W, **_known(varlen_attn, options))

    return Candidate("torch varlen_attn", [partial(call, index) for index in range(len(sets))])


def _known(function, options: dict) -> dict:
    """Those of the options that a function takes: `scale` and `enable_gqa` came to varlen_attn after its first
    release."""
    names = inspect.signature(function).parameters
    missing = [name for name, value in options.items() if name not in names and name == "enable_gqa" and value]
    if missing:
        raise NotImplementedError(f"{function.__name__} has no {missing[0]} in this torch")
    return {name: value for name, value in options.items() if name in names}


def flex(bench: Bench, sets: list[Inputs], B: int, W: int, S: int, visible, options: dict) -> Candidate:
    """FlexAttention, compiled for this shape; its block mask is built once, beforehand."""
    state: dict = {}

    def call(s: Inputs) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not state:
            state["mask"] = create_block_mask(visible, B, None, W, S, device=bench.device)
            state["op"] = torch.compile(flex_attention, dynamic=False)
        return state["op"](s.q, s.keys, s.values, block_mask=state["mask"], **options)

    return Candidate(FLEX, [partial(call, s) for s in sets], compiles=True)
