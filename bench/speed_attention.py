"""`block_attention` against what torch offers: SDPA without and with a mask, variable-length attention, compiled FlexAttention.

The baselines get their keys ready-made in one contiguous cache: ours stores the window's keys in the time measured, they do not.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from dlm_fast import Ops
from dlm_kernels import Window
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .shapes import WINDOW, Model, Shapes
from .speed import OURS, Bench, Shape, Work
from .timing import Candidate


def shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    for model in chosen.models:
        for B, prefix in chosen.decode:
            label = f"decode B={B} prefix={prefix} window={WINDOW}"
            yield Shape("block_attention", model.name, label, partial(_decode, bench, ops, model, [prefix] * B))
        for B, prefix in chosen.ragged:
            lengths = [prefix * (b + 1) // B for b in range(B)]
            label = f"decode B={B} prefix={lengths[0]}..{prefix} window={WINDOW}"
            yield Shape("block_attention", model.name, label, partial(_decode, bench, ops, model, lengths))
        for L in chosen.prefill:
            label = f"prefill B=1 L={L} {model.visibility}"
            yield Shape("block_attention", model.name, label, partial(_prefill, bench, ops, model, L))


@dataclasses.dataclass(frozen=True)
class _Set:
    """One set of inputs. keys, values: what baselines attend over, the window's own included."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor


def _normal(bench: Bench, *shape: int) -> Tensor:
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    return torch.randn(*shape, dtype=dtype, device=bench.device)


def _int32(bench: Bench, values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=bench.device).contiguous()


def _projections(bench: Bench, model: Model, B: int, W: int) -> list[Tensor]:
    return [
        _normal(bench, B, W, heads, model.head_dim).transpose(1, 2) for heads in (model.heads, model.kv_heads, model.kv_heads)
    ]


def _decode(bench: Bench, ops: Ops, model: Model, lengths: list[int]) -> Work:
    B, D, W = len(lengths), model.head_dim, WINDOW
    S = max(lengths) + W
    kv_bytes = model.kv_bytes(sum(lengths) + B * W)
    io_bytes = 2 * B * W * D * (2 * model.heads) + 2 * model.kv_bytes(B * W)  # q, out; the window's keys read and stored
    count, cold = bench.rotation(kv_bytes)
    sets = []
    for _ in range(count):
        caches = [_normal(bench, B, model.kv_heads, S, D) for _ in range(2)]
        sets.append(_Set(*_projections(bench, model, B, W), *caches))
    kv_len = _int32(bench, lengths)
    lane = torch.arange(W, dtype=torch.int32, device=bench.device)
    position = (kv_len[:, None] + lane).contiguous()
    window = Window(
        q_pos=position,
        q_block=torch.zeros_like(position),
        q_len=_int32(bench, [W] * B),
        kv_slot=position.clone(),
        kv_len=kv_len,
        replaced=_int32(bench, [[0, 0]] * B),
        cache_row=_int32(bench, range(B)),
        mode="full",
    )
    scale = D**-0.5
    ours = [partial(ops.block_attention, s.q, s.k, s.v, s.keys, s.values, window, scale=scale) for s in sets]
    for call in ours:
        call()  # the caches now hold the window's keys, and the baselines compute the same thing
    candidates = [Candidate(OURS, ours)]
    gqa = {"enable_gqa": model.heads != model.kv_heads, "scale": scale}
    if len(set(lengths)) == 1:
        candidates.append(Candidate("SDPA flash, no mask", [_sdpa(s, SDPBackend.FLASH_ATTENTION, None, gqa) for s in sets]))
    mask = (torch.arange(S, device=bench.device) < (kv_len[:, None] + W))[:, None, None].expand(B, 1, W, S)
    candidates.append(Candidate("SDPA, mask", [_sdpa(s, None, mask, gqa) for s in sets]))
    candidates.append(Candidate("SDPA cuDNN, mask", [_sdpa(s, SDPBackend.CUDNN_ATTENTION, mask, gqa) for s in sets]))
    candidates.append(_varlen(bench, sets, lengths, gqa))
    candidates.append(_flex(bench, sets, B, W, S, lambda b, h, i, j: j < kv_len[b] + W, gqa))
    return Work(candidates, bench.ceilings.floor_us(kv_bytes + io_bytes, _flops(model, W, sum(lengths) + B * W)), count, cold)


def _prefill(bench: Bench, ops: Ops, model: Model, L: int) -> Work:
    D, scale = model.head_dim, model.head_dim**-0.5
    nbytes = 2 * L * D * 2 * (model.heads + model.kv_heads)
    count, cold = bench.rotation(nbytes)
    sets = [_Set(q, k, v, k, v) for q, k, v in (_projections(bench, model, 1, L) for _ in range(count))]
    position = torch.arange(L, dtype=torch.int32, device=bench.device)[None].contiguous()
    block = torch.div(position, WINDOW, rounding_mode="floor").int()
    none = torch.full_like(position, -1)
    zero = _int32(bench, [0])
    window = Window(position, block, _int32(bench, [L]), none, zero, _int32(bench, [[0, 0]]), zero.clone(), model.visibility)

    def calls(window: Window) -> list:
        return [partial(ops.block_attention, s.q, s.k, s.v, None, None, window, scale=scale) for s in sets]

    gqa = {"enable_gqa": model.heads != model.kv_heads, "scale": scale}
    pairs = L * L
    candidates = [Candidate(OURS, calls(window))]
    if model.visibility == "block":
        blocks = -(-L // WINDOW)
        pairs = sum(min(WINDOW, L - n * WINDOW) * min((n + 1) * WINDOW, L) for n in range(blocks))
        candidates.append(Candidate("ours, everything visible", calls(dataclasses.replace(window, mode="full"))))
        mask = (block[0][None, :] <= block[0][:, None])[None, None]
        candidates.append(Candidate("SDPA, mask", [_sdpa(s, None, mask, gqa) for s in sets]))
        candidates.append(_flex(bench, sets, 1, L, L, lambda b, h, i, j: j // WINDOW <= i // WINDOW, gqa))
    else:
        candidates.append(Candidate("SDPA flash, no mask", [_sdpa(s, SDPBackend.FLASH_ATTENTION, None, gqa) for s in sets]))
        candidates.append(Candidate("SDPA cuDNN, no mask", [_sdpa(s, SDPBackend.CUDNN_ATTENTION, None, gqa) for s in sets]))
    note = "" if model.visibility == "full" else "SDPA flash has no such mask; 'everything visible' computes more pairs"
    return Work(candidates, bench.ceilings.floor_us(nbytes, 4 * model.heads * D * pairs), count, cold, note)


def _flops(model: Model, W: int, keys: int) -> float:
    return 4 * model.heads * model.head_dim * W * keys


def _sdpa(s: _Set, backend: SDPBackend | None, mask: Tensor | None, options: dict):
    def call() -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(s.q, s.keys, s.values, attn_mask=mask, **options)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(s.q, s.keys, s.values, attn_mask=mask, **options)

    return call


def _varlen(bench: Bench, sets: list[_Set], lengths: list[int], options: dict) -> Candidate:
    """torch.nn.attention.varlen over keys packed beforehand; a torch without it fails in the row."""
    B, W = len(lengths), WINDOW
    ends = torch.tensor([n + W for n in lengths], device=bench.device)
    cu_q = _int32(bench, [W * b for b in range(B + 1)])
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
    """The options a function takes: `scale` and `enable_gqa` came to varlen_attn after its first release."""
    names = inspect.signature(function).parameters
    missing = [name for name, value in options.items() if name not in names and name == "enable_gqa" and value]
    if missing:
        raise NotImplementedError(f"{function.__name__} has no {missing[0]} in this torch")
    return {name: value for name, value in options.items() if name in names}


def _flex(bench: Bench, sets: list[_Set], B: int, W: int, S: int, visible, options: dict) -> Candidate:
    """FlexAttention compiled for this shape; its block mask is built beforehand, once."""
    state: dict = {}

    def call(s: _Set) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not state:
            state["mask"] = create_block_mask(visible, B, None, W, S, device=bench.device)
            state["op"] = torch.compile(flex_attention, dynamic=False)
        return state["op"](s.q, s.keys, s.values, block_mask=state["mask"], **options)

    return Candidate("FlexAttention, compiled", [partial(call, s) for s in sets], compiles=True)
