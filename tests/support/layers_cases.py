"""Random calls of a layer's ops, each compared with its reference: the kernels within the bounds of their docstrings,
and a row alone with the row in its batch bit for bit."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import reference
from dlm_kernels.layers import launch as layers
from dlm_kernels.testing import same_bits
from dlm_kernels.testing.layers_calls import (
    heads_near,
    norm_near,
    random_heads,
    random_mlp,
    random_norm,
    swiglu_near,
)
from dlm_kernels.tiles import SWIGLU_TILE, norm_tile, rope_tile

DTYPES = (torch.float32, torch.float16)


def on(device: torch.device, call: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}


def run_case(seed: int, device: torch.device) -> dict[str, Any]:
    """One call of one op. "boundary" says that the tile is wider than what it holds, or that one is not enough."""
    rng = random.Random(f"layers {seed}")
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    kind, dtype, hostile = rng.choice(("norm", "heads", "mlp")), rng.choice(DTYPES), rng.choice((0.0, 0.3))
    return {"kind": kind, "boundary": _KINDS[kind](rng, generator, dtype, hostile, device)}


def _norm(rng, generator, dtype, hostile, device) -> bool:
    N, d = rng.randint(1, 9), rng.choice((16, 64, 192, 100, 1000, 2048, 3584, 4096, rng.randint(1, 3000)))
    call = on(device, random_norm(generator, (N, d), dtype, hostile=hostile))
    ours, expected = layers.add_rms_norm(**call), reference.add_rms_norm(**call)
    same_bits("total", ours.total, expected.total, any_nan=True)
    norm_near("normed", ours.normed, expected.normed, expected.total, call["weight"], call["eps"])
    alone = layers.rms_norm(ours.total[-1:], call["weight"], eps=call["eps"])
    same_bits("a row alone", alone, ours.normed[-1:], any_nan=True)
    return norm_tile(d)[0] != d


def _heads(rng, generator, dtype, hostile, device) -> bool:
    D = rng.choice((16, 32, 64, 80, 96, 128, 256))
    R = D if rng.random() < 0.6 else rng.choice([r for r in (8, 16, 64, 40) if r <= D])
    sizes = {
        "B": rng.randint(1, 3),
        "W": rng.randint(1, 7),
        "H": rng.choice((1, 4, 7, 12)),
        "H_kv": rng.choice((1, 2, 3)),
    }
    options = {name: rng.random() < 0.5 for name in ("normed", "scaled", "shared", "fused")}
    call = on(device, random_heads(generator, **sizes, D=D, R=R, dtype=dtype, **options, hostile=hostile))
    ours, expected = layers.qk_norm_rope(**call), reference.qk_norm_rope(**call)
    heads_near("heads", ours, expected, call)
    row = {name: call[name][-1:] for name in ("q", "k", "cos", "sin")}
    row["q_scale"] = None if call["q_scale"] is None else call["q_scale"][-1:]
    alone = layers.qk_norm_rope(**{**call, **row})
    for name in ("q", "k"):
        same_bits(f"{name} of a row alone", getattr(alone, name), getattr(ours, name)[-1:], any_nan=True)
    HEADS, BLOCK_R, _, _ = rope_tile(D, R)
    return BLOCK_R != R // 2 or bool(sizes["H"] % HEADS) or bool(sizes["H_kv"] % HEADS)


def _mlp(rng, generator, dtype, hostile, device) -> bool:
    N, width = rng.randint(1, 5), rng.choice((64, 100, 1024, 1536, 3000, rng.randint(1, 5000)))
    call = on(device, random_mlp(generator, (N, width), dtype, fused=rng.random() < 0.5, hostile=hostile))
    ours, expected = layers.swiglu(**call), reference.swiglu(**call)
    swiglu_near("swiglu", ours, expected, **call)
    same_bits("a row alone", layers.swiglu(call["gate"][-1:], call["up"][-1:]), ours[-1:], any_nan=True)
    return bool(width % SWIGLU_TILE[0])


_KINDS = {"norm": _norm, "heads": _heads, "mlp": _mlp}
