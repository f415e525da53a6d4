"""Are the small ops of a layer their references, within the bounds of their docstrings, and no further from float64
than plain torch is? Does a row depend on the other rows?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dlm_fast import Ops
from dlm_kernels import reference
from dlm_kernels.testing import Failure, GuardedMemory, layers_calls, no_worse_than_torch, poisoned, same_bits
from dlm_kernels.testing.layers_calls import Call

from .run import Case, Sizes, generator

# Lengths of rows, (H, H_kv, D, R, norms, a scale) and widths of feed-forward networks: of LLaDA-8B, Dream-7B, SDAR-8B,
# LLaDA2-mini and Ministral-3, odd ones, and the largest. The interpreter is too slow for the published ones.
ROWS = (2048, 3072, 3584, 4096, 63, 1000, 16384)
HEADS = (
    (32, 32, 128, 128, False, False),
    (28, 4, 128, 128, False, False),
    (32, 8, 128, 128, True, False),
    (16, 4, 128, 64, True, False),
    (32, 8, 128, 128, False, True),
    (9, 1, 80, 20, True, True),
    (5, 2, 512, 512, True, False),
)
WIDTHS = (512, 12288, 18944, 1000, 63)
TOY_ROWS, TOY_HEADS, TOY_WIDTHS = (63, 96), ((3, 2, 32, 16, True, True), (9, 1, 128, 128, False, False)), (63, 1100)
# Of 16-bit results so many may differ from the reference's at all; normed heads are rounded four times more.
FEW, FEW_HEADS = 0.01, 0.03


def cases(ops: Ops, device: torch.device, sizes: Sizes, seed: int) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    for dtype in sizes.attention_dtypes:
        kind = str(dtype).removeprefix("torch.")
        for hostile in (False, True):
            more = " hostile" if hostile else ""
            common = (ops, device, seed, sizes.canvases, dtype, hostile)
            for d in ROWS if on_gpu else TOY_ROWS:
                name = f"norm {kind} d={d}{more}"
                yield name, partial(norms, name, d, *common)
            for heads in HEADS if on_gpu else TOY_HEADS:
                H, H_kv, D, R, normed, scaled = heads
                extras = " norms" * normed + " scale" * scaled + more
                name = f"rotation {kind} H={H}/{H_kv} D={D} R={R}{extras}"
                yield name, partial(rotations, name, heads, *common)
            for width in WIDTHS if on_gpu else TOY_WIDTHS:
                name = f"swiglu {kind} I={width}{more}"
                yield name, partial(activations, name, width, *common)
        name = f"{kind} row alone = row in the batch"
        yield name, partial(rows_are_independent, name, ops, device, seed, dtype)


def on(device: torch.device, call: Call, memory: GuardedMemory | None = None) -> Call:
    """The call on a device, in guarded memory; parts of one projection keep their strides."""
    memory = memory or GuardedMemory()
    return {name: memory.copy(x.to(device)) if isinstance(x, Tensor) and x.is_contiguous() else
            memory.spread(x.to(device)) if isinstance(x, Tensor) else x for name, x in call.items()}  # fmt: skip


def norms(
    name: str, d: int, ops: Ops, device: torch.device, seed: int, N: int, dtype: torch.dtype, hostile: bool
) -> None:
    """`rms_norm` and `add_rms_norm`, between guard zones."""
    call = layers_calls.random_norm(generator(seed, name), (N, d), dtype, hostile=0.9 * hostile)
    memory = GuardedMemory()
    call = on(device, call, memory)
    before = {key: x.clone() for key, x in call.items() if isinstance(x, Tensor)}
    with poisoned(memory):
        alone = ops.rms_norm(call["x"], call["weight"], eps=call["eps"])
        total, normed = ops.add_rms_norm(**call)
    memory.check()
    for key, x in before.items():
        same_bits(f"{key} (an input)", call[key], x)
    compare_norms(call, alone, total, normed, exactly=not hostile)


def compare_norms(call: Call, alone: Tensor, total: Tensor, normed: Tensor, exactly: bool) -> None:
    x, weight, eps = call["x"], call["weight"], call["eps"]
    expected = reference.add_rms_norm(**call)
    same_bits("total", total, expected.total, any_nan=True)
    for name, ours, rows in (("rms_norm", alone, x), ("add_rms_norm", normed, expected.total)):
        theirs = reference.rms_norm(rows, weight, eps=eps)
        few(name, layers_calls.norm_near(name, ours, theirs, rows, weight, eps), FEW, ours.dtype)
        if exactly:
            exact = _exact_norm(rows, weight, eps)
            no_worse_than_torch(name, ours, theirs, exact)


def rotations(
    name: str,
    heads: tuple[int, int, int, int, bool, bool],
    ops: Ops,
    device: torch.device,
    seed: int,
    N: int,
    dtype: torch.dtype,
    hostile: bool,
) -> None:
    """`qk_norm_rope` of heads that are parts of one projection, and of heads that are not."""
    H, H_kv, D, R, normed, scaled = heads
    shape = dict(B=2, W=max(1, N // 2), H=H, H_kv=H_kv, D=D, R=R, dtype=dtype, normed=normed, scaled=scaled)
    for fused in (False, True):
        drawn = layers_calls.random_heads(
            generator(seed, name), **shape, fused=fused, shared=fused, hostile=0.9 * hostile
        )
        memory = GuardedMemory()
        call = on(device, drawn, memory)
        with poisoned(memory):
            ours = ops.qk_norm_rope(**call)
        memory.check()
        compare_rotations(call, ours, exactly=not hostile)


def compare_rotations(call: Call, ours: reference.RotatedHeads, exactly: bool) -> None:
    theirs = reference.qk_norm_rope(**call)
    if call["q_weight"] is None:
        for head in ("q", "k"):
            same_bits(head, getattr(ours, head), getattr(theirs, head), any_nan=True)
    few("heads", layers_calls.heads_near("heads", ours, theirs, call), FEW_HEADS, ours.q.dtype)
    if exactly:
        for head in ("q", "k"):
            exact = _exact_heads(call, head)
            no_worse_than_torch(head, getattr(ours, head), getattr(theirs, head), exact)


def activations(
    name: str, width: int, ops: Ops, device: torch.device, seed: int, N: int, dtype: torch.dtype, hostile: bool
) -> None:
    """`swiglu` of two tensors, and of the halves of one projection."""
    for fused in (False, True):
        drawn = layers_calls.random_mlp(
            generator(seed, name), (N, width), dtype, fused=fused, hostile=0.9 * hostile
        )  # fmt: skip
        memory = GuardedMemory()
        call = on(device, drawn, memory)
        with poisoned(memory):
            ours = ops.swiglu(**call)
        memory.check()
        compare_activations(call, ours, exactly=not hostile)


def compare_activations(call: Call, ours: Tensor, exactly: bool) -> None:
    theirs = reference.swiglu(**call)
    few("swiglu", layers_calls.swiglu_near("swiglu", ours, theirs, **call), FEW, ours.dtype)
    if exactly:
        exact = reference.swiglu(*(call[name].double() for name in ("gate", "up")))
        no_worse_than_torch("swiglu", ours, theirs, exact)


def few(name: str, share: float, most: float, dtype: torch.dtype) -> None:
    """Raises Failure if too many 16-bit results differ from the reference's."""
    if dtype != torch.float32 and share > most:
        raise Failure(f"{name}: {share:.2%} of the results differ from the reference's, at most {most:.0%} may")


def rows_are_independent(name: str, ops: Ops, device: torch.device, seed: int, dtype: torch.dtype) -> None:
    """A row alone, bit for bit the row in the batch."""
    random = generator(seed, name)
    norm = on(device, layers_calls.random_norm(random, (7, 200), dtype))
    heads = on(device, layers_calls.random_heads(
        random, B=2, W=3, H=9, H_kv=2, D=64, R=64, dtype=dtype, normed=True, scaled=True
    ))  # fmt: skip
    mlp = on(device, layers_calls.random_mlp(random, (7, 1088), dtype))
    together, turned, activated = ops.add_rms_norm(**norm), ops.qk_norm_rope(**heads), ops.swiglu(**mlp)
    for row in range(7):
        one = {key: x[row : row + 1].clone() if key in ("x", "residual") else x for key, x in norm.items()}
        same_bits(f"row {row} normed alone", ops.add_rms_norm(**one).normed, together.normed[row : row + 1])
        alone = ops.swiglu(*(mlp[key][row].clone() for key in ("gate", "up")))
        same_bits(f"row {row} activated alone", alone, activated[row])
    for b, w in ((0, 0), (1, 2)):
        parts = ("q", "k", "cos", "sin", "q_scale")
        alone = ops.qk_norm_rope(**heads | {key: heads[key][b : b + 1, w : w + 1].clone() for key in parts})
        for head in ("q", "k"):
            expected = getattr(turned, head)[b : b + 1, :, w : w + 1]
            same_bits(f"position {b}, {w} of {head} alone", getattr(alone, head), expected)


def _exact_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in float64; the reference norms float64 in float32, as the modules do."""
    rows = rows.double()
    return weight.double() * rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)


def _exact_heads(call: Call, head: str) -> Tensor:
    x, weight = call[head].double(), call[f"{head}_weight"]
    if weight is not None:
        x = _exact_norm(x, weight, call["eps"])
    cos, sin = (call[name].double() for name in ("cos", "sin"))
    scale = call["q_scale"].double() if head == "q" and call["q_scale"] is not None else None
    return reference.qk_norm_rope(x, x[:, :, :0], cos, sin, q_scale=scale).q
