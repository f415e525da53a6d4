"""The small ops of a layer against the torch ops of the modules that they stand for, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dlm_fast import Ops
from dlm_kernels import reference

from .. import floors
from ..shapes import Model, Shapes
from ..timing import Candidate
from .ops import Compiled
from .run import OURS, Bench, Shape, Work

MODULES = "the modules' torch ops"
EPS = 1e-6
# One set of arguments for a call.
Draw = Callable[[], dict[str, Any]]


def shapes(bench: Bench, ops: Ops, chosen: Shapes) -> Iterator[Shape]:
    """Every op of a layer, at every number of positions; the feed-forward of a mixture of experts has no one width."""
    for model in chosen.models:
        if not model.small_ops:
            continue
        for N in chosen.positions:
            d, heads = f"d={model.hidden}", f"H={model.heads}/{model.kv_heads} D={model.head_dim} R={model.rotated}"
            yield _shape(bench, ops, model, "rms_norm", N, d, floors.norm(model, N, summed=False))
            yield _shape(bench, ops, model, "add_rms_norm", N, d, floors.norm(model, N, summed=True))
            heads += " norms" if model.head_norms else ""
            yield _shape(bench, ops, model, "qk_norm_rope", N, heads, floors.rotation(model, N))
            if model.intermediate:
                yield _shape(bench, ops, model, "swiglu", N, f"I={model.intermediate}", floors.swiglu(model, N))


def _shape(bench: Bench, ops: Ops, model: Model, op: str, N: int, sizes: str, cost: floors.Cost) -> Shape:
    facts = {"kind": "layers", "op": op, "N": N}
    return Shape(
        "layers", model.name, f"{op} N={N} {sizes}", partial(_work, bench, ops, model, op, N, cost), cost, facts
    )


def _work(bench: Bench, ops: Ops, model: Model, op: str, N: int, cost: floors.Cost) -> Work:
    count, cold = bench.rotation(int(cost.nbytes))
    draw = partial(_arguments, model, op, N, bench.device)
    sets = [draw() for _ in range(count)]
    specified = getattr(reference, op)

    def calls(function: Callable[..., object]) -> list[Callable[[], object]]:
        return [partial(function, **arguments) for arguments in sets]

    candidates = [
        Candidate(OURS, calls(getattr(ops, op))),
        Candidate(MODULES, calls(specified)),
        Candidate(f"{MODULES}, compiled", calls(Compiled(specified)), compiles=True),
    ]
    return Work(candidates, cost, count, cold)


def _arguments(model: Model, op: str, N: int, device: torch.device) -> dict[str, Any]:
    """bfloat16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    if op == "swiglu":
        return {"gate": drawn(N, model.intermediate), "up": drawn(N, model.intermediate)}
    if op == "qk_norm_rope":
        angles = torch.randn(1, N, model.rotated, device=device)
        arguments: dict[str, Any] = {
            "q": drawn(1, N, model.heads, model.head_dim),
            "k": drawn(1, N, model.kv_heads, model.head_dim),
            "cos": angles.cos().to(dtype),
            "sin": angles.sin().to(dtype),
        }
        if model.head_norms:
            arguments |= {"q_weight": drawn(model.head_dim), "k_weight": drawn(model.head_dim), "eps": EPS}
        return arguments
    residual = {"residual": drawn(N, model.hidden)} if op == "add_rms_norm" else {}
    return {"x": drawn(N, model.hidden), **residual, "weight": drawn(model.hidden), "eps": EPS}
