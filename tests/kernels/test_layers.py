"""`rms_norm`, `add_rms_norm`, `qk_norm_rope` and `swiglu`: references against the modules of transformers, bit for bit;
kernels against references, within the bounds of their docstrings."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from dlm_kernels import cpu, reference
from dlm_kernels.checks.layers import MAX_HEAD_DIM, MAX_ROW, row_stride
from dlm_kernels.testing import Failure, GuardedMemory, layers_calls, poisoned, same_bits
from dlm_kernels.tiles import NORM_TILES, SWIGLU_TILE, rope_tile

pytest.importorskip("triton", reason="without Triton there is no kernel to compare with the reference")

from dlm_kernels.layers import launch as layers

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "glm4_moe", "ministral3")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Triton's interpreter truncates to bfloat16: the launchers refuse it there, and it is left to a GPU.
KERNEL_DTYPES = DTYPES if torch.cuda.is_available() else (torch.float32, torch.float16)
EVERY = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
BACKENDS = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
KERNELS = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=NAMES.get)
# Of 16-bit results so many may differ from the reference's at all: float32 errors near a point between two numbers.
FEW = 0.01


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to(call: layers_calls.Call, device: torch.device) -> layers_calls.Call:
    """The call on a device; parts of a fused projection stay parts of one."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}
    for name in moved:
        if isinstance(moved[name], Tensor) and moved[name].stride() != call[name].stride():
            moved[name] = torch.empty_strided(call[name].shape, call[name].stride(), dtype=call[name].dtype,
                                              device=device).copy_(call[name])  # fmt: skip
    return moved


def norm_arguments(call: layers_calls.Call, op: str) -> layers_calls.Call:
    return {name: value for name, value in call.items() if op == "add_rms_norm" or name != "residual"}


def modeling(family: str):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


# References.


@EVERY
@BACKENDS
@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_of_a_cpu_is_the_module_bit_for_bit(family, backend, dtype):
    module = modeling(family)
    norm_class = next(getattr(module, name) for name in dir(module) if name.endswith("RMSNorm"))
    for d in (1, 7, 64, 1000, 3584):
        call = layers_calls.random_norm(drawn(d), (3, 5, d), dtype, hostile=0.2)
        norm = norm_class(d, eps=call["eps"]).to(dtype)
        norm.weight.data.copy_(call["weight"])
        with torch.no_grad():
            total = call["residual"] + call["x"]
            ours = backend.add_rms_norm(**call)
            same_bits("normed", backend.rms_norm(**norm_arguments(call, "rms_norm")), norm(call["x"]), any_nan=True)
            same_bits("total", ours.total, total, any_nan=True)
            same_bits("normed total", ours.normed, norm(total), any_nan=True)


@EVERY
@BACKENDS
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotation_of_a_cpu_is_the_module_bit_for_bit(family, backend, dtype):
    module = modeling(family)
    norm_class = next(getattr(module, name) for name in dir(module) if name.endswith("RMSNorm"))
    partial = [(128, 64), (80, 20)] if family == "glm4_moe" else []
    for D, R in [(32, 32), (96, 96), (128, 128), *partial]:
        for normed in (False, True):
            call = layers_calls.random_heads(
                drawn(D + R), B=2, W=5, H=6, H_kv=2, D=D, R=R, dtype=dtype, normed=normed, scaled=True, fused=True
            )
            q, k = call["q"], call["k"]
            if normed:
                for name, head in (("q_weight", "q"), ("k_weight", "k")):
                    norm = norm_class(D, eps=call["eps"]).to(dtype)
                    norm.weight.data.copy_(call[name])
                    q, k = (norm(q).detach(), k) if head == "q" else (q, norm(k).detach())
            q, k = module.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), call["cos"], call["sin"])
            ours = backend.qk_norm_rope(**call)
            same_bits("q", ours.q, q * call["q_scale"][:, None, :, None])
            same_bits("k", ours.k, k)
            assert backend is cpu or all(part.transpose(1, 2).is_contiguous() for part in ours)


@EVERY
@BACKENDS
@pytest.mark.parametrize("family", FAMILIES)
def test_the_activation_of_a_cpu_is_the_module_bit_for_bit(family, backend, dtype):
    module = modeling(family)
    mlp_class = next(getattr(module, name) for name in dir(module) if name.endswith("MLP"))
    projections = {"gate_proj": lambda x: x[0], "up_proj": lambda x: x[1], "down_proj": lambda x: x}
    mlp = SimpleNamespace(**projections, act_fn=ACT2FN["silu"])
    call = layers_calls.random_mlp(drawn(1), (3, 5, 200), dtype, fused=True, hostile=0.2)
    expected = mlp_class.forward(mlp, (call["gate"], call["up"]))
    same_bits("swiglu", backend.swiglu(**call), expected, any_nan=True)


@BACKENDS
def test_references_and_the_ops_for_a_cpu_are_differentiable(backend):
    norm = layers_calls.random_norm(drawn(0), (2, 6), torch.float64)
    heads = layers_calls.random_heads(drawn(1), B=1, W=2, H=2, H_kv=1, D=6, R=4, dtype=torch.float64, scaled=True)
    mlp = layers_calls.random_mlp(drawn(2), (2, 5), torch.float64)
    for op, call in (("add_rms_norm", norm), ("qk_norm_rope", heads), ("swiglu", mlp)):
        leaves = {name: value.requires_grad_() for name, value in call.items() if isinstance(value, Tensor)}
        result = getattr(backend, op)(**call | leaves)
        sum(part.sum() for part in (result if isinstance(result, tuple) else (result,))).backward()
        assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves.values()), op


# Kernels.

ROWS = sorted({1, 7, 31, 33, 96, *(longest + more for longest, _ in NORM_TILES[:2] for more in (-1, 0, 1))})


@KERNELS
@pytest.mark.parametrize("d", ROWS)
def test_the_kernel_of_the_norm_is_within_its_bound_and_touches_nothing_else(d, dtype, device):
    shares = []
    for shape in ((5, d), (2, 3, d)):
        call = to(layers_calls.random_norm(drawn(d), shape, dtype), device)
        memory = GuardedMemory()
        given = {name: memory.copy(value) if isinstance(value, Tensor) else value for name, value in call.items()}
        given["x"], given["residual"] = (memory.spread(call[name].view(-1, d), gap=3) for name in ("x", "residual"))
        with poisoned(memory):
            normed = layers.rms_norm(**norm_arguments(given, "rms_norm"))
            summed = layers.add_rms_norm(**given)
        memory.check()
        rows = {name: call[name].view(-1, d) for name in ("x", "residual")}
        expected = reference.add_rms_norm(**call | rows)
        alone = reference.rms_norm(rows["x"], call["weight"], eps=call["eps"])
        shares.append(layers_calls.norm_near("normed", normed, alone, rows["x"], call["weight"], call["eps"]))
        same_bits("total", summed.total, expected.total)
        shares.append(
            layers_calls.norm_near("sum", summed.normed, expected.normed, expected.total, call["weight"], call["eps"])
        )
        for name in ("x", "residual"):
            same_bits(f"{name} (an input)", given[name], rows[name])
        # What is normed is the rounded sum, by the same code.
        same_bits("normed total", layers.rms_norm(summed.total, call["weight"], eps=call["eps"]), summed.normed)
    assert dtype == torch.float32 or max(shares) <= FEW, shares


@KERNELS
@pytest.mark.parametrize("d", [3584, MAX_ROW])
def test_long_rows_are_within_the_bound(d, dtype, device):
    call = to(layers_calls.random_norm(drawn(d), (2, d), dtype), device)
    ours, expected = layers.add_rms_norm(**call), reference.add_rms_norm(**call)
    same_bits("total", ours.total, expected.total)
    share = layers_calls.norm_near("sum", ours.normed, expected.normed, expected.total, call["weight"], call["eps"])
    assert dtype == torch.float32 or share <= FEW


# (D, R, H, H_kv, W)
HEADS = [
    (128, 128, 3, 1, 3), (128, 64, 9, 2, 2), (64, 64, 5, 5, 2), (32, 32, 6, 2, 5), (256, 256, 2, 1, 2),
    (96, 96, 4, 2, 2), (80, 80, 3, 3, 2), (80, 20, 3, 1, 2), (6, 2, 2, 1, 3), (7, 4, 1, 2, 1), (2, 2, 1, 1, 1),
    (MAX_HEAD_DIM, 128, 2, 1, 1), (MAX_HEAD_DIM, MAX_HEAD_DIM, 1, 3, 1),
]  # fmt: skip


@KERNELS
@pytest.mark.parametrize("D, R, H, H_kv, W", HEADS)
def test_the_kernel_of_the_rotation_equals_the_reference_bit_for_bit(D, R, H, H_kv, W, dtype, device):
    for options in ({}, {"scaled": True}, {"shared": True, "scaled": True, "fused": True}):
        call = to(
            layers_calls.random_heads(drawn(D), B=2, W=W, H=H, H_kv=H_kv, D=D, R=R, dtype=dtype, **options), device
        )
        memory = GuardedMemory()
        given = {name: memory.copy(value) if isinstance(value, Tensor) else value for name, value in call.items()}
        with poisoned(memory):
            ours = layers.qk_norm_rope(**given)
        memory.check()
        expected = reference.qk_norm_rope(**call)
        for name in ("q", "k"):
            same_bits(name, getattr(ours, name), getattr(expected, name))
            assert getattr(ours, name).stride() == getattr(expected, name).stride()
            same_bits(f"{name} (an input)", given[name], call[name])


@KERNELS
@pytest.mark.parametrize("D, R, H, H_kv, W", HEADS)
def test_normed_heads_are_within_their_bound(D, R, H, H_kv, W, dtype, device):
    for options in ({}, {"scaled": True, "fused": True}):
        drawn_call = layers_calls.random_heads(
            drawn(D), B=2, W=W, H=H, H_kv=H_kv, D=D, R=R, dtype=dtype, normed=True, **options
        )
        call = to(drawn_call, device)
        share = layers_calls.heads_near("heads", layers.qk_norm_rope(**call), reference.qk_norm_rope(**call), call)
        assert dtype == torch.float32 or share <= 3 * FEW


@KERNELS
@pytest.mark.parametrize("width", [1, 7, SWIGLU_TILE[0] - 1, SWIGLU_TILE[0], SWIGLU_TILE[0] + 1, 3000])
def test_the_kernel_of_the_activation_is_within_its_bound_and_touches_nothing_else(width, dtype, device):
    for fused in (False, True):
        call = to(layers_calls.random_mlp(drawn(width), (2, 3, width), dtype, fused=fused), device)
        memory = GuardedMemory()
        given = {name: memory.copy(value) for name, value in call.items()}
        with poisoned(memory):
            ours = layers.swiglu(**given)
        memory.check()
        assert ours.is_contiguous()
        share = layers_calls.swiglu_near("swiglu", ours, reference.swiglu(**call), **call)
        assert dtype == torch.float32 or share <= FEW
        for name in ("gate", "up"):
            same_bits(f"{name} (an input)", given[name], call[name])


@KERNELS
def test_the_activation_is_within_its_bound_at_every_size_of_number(dtype, device):
    """Where exp overflows and vanishes, and every power of two on the way there."""
    powers = torch.tensor([2.0**e for e in range(-24, 8)])
    gate = torch.cat([sign * powers * factor for sign in (1, -1) for factor in (1.0, 1.37)] + [
        torch.linspace(-110, 110, 2201), torch.tensor([-88.72, -88.73, -88.8, -103.9, -104.1])
    ]).to(device, dtype)  # fmt: skip
    for size in (1.0, -1e4, 1e-4):
        up = torch.full_like(gate, size)
        layers_calls.swiglu_near("swiglu", layers.swiglu(gate, up), reference.swiglu(gate, up), gate, up)


@KERNELS
def test_nan_infinities_zeros_and_the_least_and_largest_numbers_are_carried_as_in_the_reference(dtype, device):
    for seed in range(6):
        norm = to(layers_calls.random_norm(drawn(seed), (24, 33), dtype, hostile=0.9), device)
        ours, expected = layers.add_rms_norm(**norm), reference.add_rms_norm(**norm)
        same_bits("total", ours.total, expected.total, any_nan=True)
        layers_calls.norm_near("sum", ours.normed, expected.normed, expected.total, norm["weight"], norm["eps"])
        mlp = to(layers_calls.random_mlp(drawn(seed), (24, 33), dtype, hostile=0.9), device)
        layers_calls.swiglu_near("swiglu", layers.swiglu(**mlp), reference.swiglu(**mlp), **mlp)
        shape = dict(B=2, W=3, H=3, H_kv=1, D=32, R=16, dtype=dtype, hostile=0.9)
        plain = to(layers_calls.random_heads(drawn(seed), **shape, scaled=True), device)
        ours, expected = layers.qk_norm_rope(**plain), reference.qk_norm_rope(**plain)
        same_bits("q", ours.q, expected.q, any_nan=True)
        same_bits("k", ours.k, expected.k, any_nan=True)
        normed = to(layers_calls.random_heads(drawn(seed), **shape, normed=True), device)
        ours, expected = layers.qk_norm_rope(**normed), reference.qk_norm_rope(**normed)
        layers_calls.heads_near("heads", ours, expected, normed)


@KERNELS
def test_squares_that_overflow_and_zeros_alone_have_the_modules_result(dtype, device):
    rows = torch.stack([torch.full((64,), value) for value in (0.0, -0.0, 1e-40, 6e4, 3e38)]).to(device, dtype)
    weight = torch.ones(64, device=device, dtype=dtype)
    ours = layers.rms_norm(rows, weight, eps=1e-6)
    layers_calls.norm_near("rows", ours, reference.rms_norm(rows, weight, eps=1e-6), rows, weight, 1e-6)
    if dtype == torch.float32:
        assert (ours[4] == 0).all()
    same_bits("zeros", ours[:2], rows[:2])


@KERNELS
def test_zeros_keep_their_signs_in_a_rotation(dtype, device):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0], device=device, dtype=dtype)
    q = torch.cartesian_prod(values, values).view(1, 16, 1, 2)
    for cos, sin in ((0.0, 1.0), (-0.0, 1.0), (1.0, -0.0), (-1.0, 0.0), (0.5, -0.5)):
        angles = [torch.full((1, 16, 2), value, device=device, dtype=dtype) for value in (cos, sin)]
        ours, expected = layers.qk_norm_rope(q, q, *angles), reference.qk_norm_rope(q, q, *angles)
        same_bits(f"cos {cos} sin {sin}", ours.q, expected.q)


@KERNELS
def test_a_row_alone_has_the_bits_of_the_row_in_the_batch(dtype, device):
    norm = to(layers_calls.random_norm(drawn(1), (7, 200), dtype), device)
    together, width = layers.add_rms_norm(**norm), SWIGLU_TILE[0] + 40
    mlp = to(layers_calls.random_mlp(drawn(2), (4, width), dtype, fused=True), device)
    activated = layers.swiglu(**mlp)
    for row in range(4):
        one = {name: value[row : row + 1] if value is not norm["weight"] else value
               for name, value in norm.items() if isinstance(value, Tensor)}  # fmt: skip
        same_bits("normed", layers.add_rms_norm(**one, eps=norm["eps"]).normed, together.normed[row : row + 1])
        alone = layers.swiglu(mlp["gate"][row].clone(), mlp["up"][row].clone())
        same_bits("swiglu", alone, activated[row])


@KERNELS
def test_a_position_alone_has_the_bits_of_the_position_in_the_batch_and_a_head_those_of_the_head_alone(dtype, device):
    shape = dict(B=2, W=3, H=rope_tile(64, 64)[0] + 1, H_kv=2, D=64, R=64)
    call = to(layers_calls.random_heads(drawn(3), **shape, dtype=dtype, normed=True, scaled=True, fused=True), device)
    together = layers.qk_norm_rope(**call)
    for b, w, h in ((0, 0, 0), (1, 2, 1), (1, 0, 1)):
        one = {name: call[name][b : b + 1, w : w + 1].clone() for name in ("q", "k", "cos", "sin", "q_scale")}
        one["q"] = one["q"][:, :, -1 - h : shape["H"] - h]
        alone = layers.qk_norm_rope(**call | one)
        same_bits("q", alone.q[0, 0, 0], together.q[b, -1 - h, w])
        same_bits("k", alone.k[0, :, 0], together.k[b, :, w])


LAUNCHES = {
    "rms_norm": ("rms_norm_kernel", (6,), 1),
    "add_rms_norm": ("rms_norm_kernel", (6,), 2),
    "qk_norm_rope": ("qk_norm_rope_kernel", (12,), 2),
    "swiglu": ("swiglu_kernel", (12,), 1),
}


def small_call(op: str, dtype: torch.dtype = torch.float32, **options: bool) -> layers_calls.Call:
    """A call of six rows, or positions; of the queries' heads two programs are needed, where there are several."""
    if op == "swiglu":
        return layers_calls.random_mlp(drawn(0), (2, 3, SWIGLU_TILE[0] + 5), dtype)
    if op == "qk_norm_rope":
        return layers_calls.random_heads(drawn(0), B=2, W=3, H=4, H_kv=2, D=16, R=8, dtype=dtype, **options)
    return norm_arguments(layers_calls.random_norm(drawn(0), (2, 3, 20), dtype), op)


@pytest.mark.usefixtures("without_debug")
@pytest.mark.parametrize("op", LAUNCHES)
def test_each_op_is_one_launch_and_its_results(op, device):
    call, launches = to(small_call(op), device), []
    name, grid, allocated = LAUNCHES[op]
    kernel, counted = getattr(layers, name), mock.MagicMock()
    counted.__getitem__.side_effect = lambda grid: launches.append(grid) or kernel[grid]
    allocations = mock.patch.object(torch, "empty", side_effect=torch.empty)
    with mock.patch.object(layers, name, counted), allocations as empty:
        getattr(layers, op)(**call)
    assert launches == [grid] and empty.call_count == allocated


@pytest.mark.parametrize("backend", [reference, cpu, layers], ids=["reference", "cpu", "kernel"])
def test_no_rows_give_no_results_without_a_launch(backend):
    no_launch = mock.MagicMock()
    no_launch.__getitem__.side_effect = AssertionError
    x, weight = torch.zeros(0, 5, 8), torch.ones(8)
    q, k, angles = torch.zeros(2, 0, 3, 8), torch.zeros(2, 0, 1, 8), torch.zeros(1, 0, 4)
    names = ("rms_norm_kernel", "qk_norm_rope_kernel", "swiglu_kernel")
    with mock.patch.multiple(layers, **dict.fromkeys(names, no_launch)):
        assert backend.rms_norm(x, weight, eps=1e-6).shape == (0, 5, 8)
        assert [part.shape for part in backend.add_rms_norm(x, x, weight, eps=1e-6)] == [(0, 5, 8)] * 2
        assert [part.shape for part in backend.qk_norm_rope(q, k, angles, angles)] == [(2, 3, 0, 8), (2, 1, 0, 8)]
        assert backend.swiglu(x, x).shape == (0, 5, 8) and backend.swiglu(q[..., :0], q[..., :0]).shape == (2, 0, 3, 0)


# Arguments.


def half(x: Tensor) -> Tensor:
    return x.half()


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def elsewhere(x: Tensor) -> Tensor:
    return x.to("meta")


ERRORS: list[tuple[str, str, Callable[[Tensor], object] | object, type[Exception], str]] = [
    ("rms_norm", "x", torch.tensor(1.0), ValueError, r"x must be \[..., d\], got shape \(\)"),
    ("rms_norm", "x", torch.zeros(2, 0), ValueError, r"d must be at least 1, got d=0 \(the last dimension of x\)"),
    ("rms_norm", "x", lambda x: x.int(), TypeError, "x must be one of torch.float32, .*, got torch.int32"),
    ("rms_norm", "x", strided, ValueError, r"x must have last stride 1, got strides \(120, 40, 2\)"),
    (
        "rms_norm", "x", lambda x: torch.cat([x, x])[:, :2, :].as_strided((2, 2, 20), (70, 30, 1)), ValueError,
        r"the rows of x must lie at one stride, got shape \(2, 2, 20\), strides \(70, 30, 1\)",
    ),
    ("rms_norm", "x", "text", TypeError, "x must be a torch.Tensor, got x='text'"),
    ("rms_norm", "weight", lambda x: x[:-1], ValueError, r"weight must have shape \[d\] with d=20, got shape \(19,\)"),
    ("rms_norm", "weight", None, TypeError, "weight must be a torch.Tensor, got weight=None"),
    ("rms_norm", "weight", half, TypeError, "weight must have the dtype of x, torch.float32, got torch.float16"),
    ("rms_norm", "weight", elsewhere, ValueError, "weight must be on cpu like x, got meta"),
    ("rms_norm", "weight", strided, ValueError, r"weight must have last stride 1, got strides \(2,\)"),
    ("rms_norm", "eps", "1", TypeError, "eps must be a float, got str"),
    ("rms_norm", "eps", True, TypeError, "eps must be a float, got bool"),
    ("rms_norm", "eps", 0, ValueError, r"eps must be in \[1e-30, 1e\+38\], got eps=0"),
    ("rms_norm", "eps", math.nan, ValueError, r"eps must be in \[1e-30, 1e\+38\], got eps=nan"),
    (
        "add_rms_norm", "residual", lambda x: x[:1], ValueError,
        r"residual must have the shape of x \(2, 3, 20\), got \(1, 3, 20\)",
    ),
    ("add_rms_norm", "residual", half, TypeError, "residual must have the dtype of x, torch.float32"),
    ("qk_norm_rope", "q", lambda x: x[0], ValueError, r"q must be \[B, W, H, D\], got shape \(3, 4, 16\)"),
    ("qk_norm_rope", "k", lambda x: x[:1], ValueError, r"k must be \[B, W, H_kv, D\] with B=2, W=3, D=16 of q, got"),
    ("qk_norm_rope", "k", strided, ValueError, "k must have last stride 1, got strides"),
    ("qk_norm_rope", "cos", lambda x: x[0], ValueError, r"cos must be \[B, W, R\] or \[1, W, R\] with B=2, W=3, got"),
    ("qk_norm_rope", "cos", torch.zeros(1, 3, 7), ValueError, "R must be even, at least 2 and at most D=16, got R=7"),
    ("qk_norm_rope", "cos", torch.zeros(1, 3, 18), ValueError, "R must be even, at least 2 and at most D=16, got R=18"),
    ("qk_norm_rope", "sin", lambda x: x[:1], ValueError, r"sin must have the shape of cos \(2, 3, 8\), got \(1, "),
    ("qk_norm_rope", "sin", half, TypeError, "sin must have the dtype of q, torch.float32, got torch.float16"),
    (
        "qk_norm_rope", "q_weight", None, ValueError,
        "q_weight, k_weight, eps must be given together, got k_weight, eps without q_weight",
    ),
    (
        "qk_norm_rope", "eps", None, ValueError,
        "q_weight, k_weight, eps must be given together, got q_weight, k_weight without eps",
    ),
    ("qk_norm_rope", "k_weight", lambda x: x[:8], ValueError, r"k_weight must have shape \[D\] with D=16, got"),
    ("qk_norm_rope", "eps", -1.0, ValueError, r"eps must be in \[1e-30, 1e\+38\], got eps=-1.0"),
    ("qk_norm_rope", "q_scale", lambda x: x[:, :2], ValueError, r"q_scale must be \[B, W\] or \[1, W\] with B=2, W=3"),
    ("qk_norm_rope", "q_scale", lambda x: x.to_sparse(), ValueError, "q_scale must be a dense tensor, got"),
    ("swiglu", "gate", torch.tensor(1.0), ValueError, r"gate must be \[..., I\], got shape \(\)"),
    ("swiglu", "up", lambda x: x[:1], ValueError, "up must have the shape of gate"),
    ("swiglu", "up", half, TypeError, "up must have the dtype of gate, torch.float32, got torch.float16"),
    ("swiglu", "gate", strided, ValueError, "gate must have last stride 1, got strides"),
    (
        "swiglu", "up", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), ValueError,
        "the rows of up must lie at one stride, got shape",
    ),
]  # fmt: skip


@pytest.mark.parametrize("backend", [reference, cpu, layers], ids=["reference", "cpu", "kernel"])
@pytest.mark.parametrize("op, name, change, error, message", ERRORS, ids=[f"{e[0]}-{e[1]}-{e[4][:24]}" for e in ERRORS])
def test_a_wrong_argument_is_named(backend, op, name, change, error, message):
    call = small_call(op, **({"normed": True, "scaled": True} if op == "qk_norm_rope" else {}))
    call[name] = change(call[name]) if callable(change) else change
    with pytest.raises(error, match=f"^{op}: {message}"):
        getattr(backend, op)(**call)


def test_what_the_kernels_cannot_hold_is_refused_by_name_and_the_reference_takes_it():
    x, weight = torch.ones(1, MAX_ROW + 1), torch.ones(MAX_ROW + 1)
    for op, given in (("rms_norm", (x, weight)), ("add_rms_norm", (x, x, weight))):
        getattr(reference, op)(*given, eps=1e-6)
        with pytest.raises(ValueError, match=f"^{op}: d must be at most {MAX_ROW}, got d={MAX_ROW + 1}"):
            getattr(layers, op)(*given, eps=1e-6)
    q, angles = torch.ones(1, 1, 1, MAX_HEAD_DIM + 2), torch.ones(1, 1, 2)
    reference.qk_norm_rope(q, q, angles, angles)
    with pytest.raises(ValueError, match=r"^qk_norm_rope: D must be at most 512, got D=514 \(dim 3 of q\)"):
        layers.qk_norm_rope(q, q, angles, angles)
    double = torch.ones(2, 4, dtype=torch.float64)
    reference.swiglu(double, double)
    with pytest.raises(TypeError, match="^swiglu: gate must be one of torch.float32, torch.bfloat16, torch.float16"):
        layers.swiglu(double, double)


@pytest.mark.parametrize("op", LAUNCHES)
def test_a_gradient_is_refused_by_name(op, device):
    call = to(small_call(op), device)
    last = [name for name, value in call.items() if isinstance(value, Tensor)][-1]
    call[last] = call[last].requires_grad_()
    refusal = f"^{op}: has no backward, got {last} with requires_grad=True; call it under torch.no_grad"
    with pytest.raises(RuntimeError, match=refusal):
        getattr(layers, op)(**call)
    with torch.no_grad():
        getattr(layers, op)(**call)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's bfloat16 is not a GPU's")
@pytest.mark.parametrize("op", LAUNCHES)
def test_bfloat16_is_refused_in_the_interpreter(op):
    call = small_call(op, torch.bfloat16)
    first = next(iter(call))
    with pytest.raises(RuntimeError, match=f"^{op}: {first} is bfloat16, to which Triton's interpreter truncates"):
        getattr(layers, op)(**call)


def test_rows_lie_at_one_stride_or_at_none():
    whole = torch.zeros(4, 6, 10)
    assert [row_stride(rows) for rows in (whole, whole[..., 2:5], whole[0], whole[0, 0])] == [10] * 4
    assert row_stride(whole[:, 3]) == 60 and row_stride(whole[:, :3]) is None and row_stride(whole[:1, :3]) == 10
    assert row_stride(whole[1:2, 1:2, :7]) == 7 and row_stride(whole[:1, :1].expand(3, 5, 10)) == 0


def test_a_result_beyond_its_bound_is_a_failure():
    """The bounds above would let nothing wrong pass."""
    call = layers_calls.random_norm(drawn(0), (4, 64), torch.float16)
    expected = reference.rms_norm(call["x"], call["weight"], eps=call["eps"])
    wrong = expected.clone()
    wrong[2, 3] *= 1.01
    with pytest.raises(Failure, match=r"1 of 256 are too far from the reference, first at \[2, 3\]"):
        layers_calls.norm_near("normed", wrong, expected, call["x"], call["weight"], call["eps"])


# Machine code, without a GPU.

CODE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dlm_kernels import static
from dlm_kernels.layers import cases

def compiled(case, aligned):
    attributes = static._attributes(case) if aligned else {}
    source = ASTSource(case.fn, case.signature, constexprs=case.constexprs, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": 1, "enable_fp_fusion": case.fusion}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm

def layouts(code):
    names = re.findall(r'"tt.reduce"\\(.*?\\}\\) : \\(tensor<[^>]*?(#\\w+)>\\)', code, re.DOTALL)
    return [re.search(rf"^{name} = .*$", code, re.MULTILINE)[0].split("= ")[1] for name in names]

by_name = {f"{case.kernel} {case.config}": case for case in cases.compile_cases(90)}
rotation = compiled(by_name["qk_norm_rope fp32 LLaDA-8B H=32/32 D=128 R=128"], True)["ptx"]
pairs = {}
for name in ("add_rms_norm bf16 d=4096", "add_rms_norm fp32 d=4096"):
    pairs[name] = [layouts(compiled(by_name[name], aligned)["ttgir"]) for aligned in (True, False)]
heads = ("qk_norm_rope bf16 SDAR-8B", "H=32/8 D=128 R=128")
pairs["heads"] = [layouts(compiled(by_name[" ".join([heads[0], *middle, heads[1]])], True)["ttgir"])
                  for middle in ((), ("unaligned",))]
print(json.dumps([sorted(set(re.findall(r"fma[.\\w]*", rotation))), pairs]))
"""


def test_no_product_is_fused_in_a_rotation_and_no_alignment_changes_the_order_of_a_sum(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(CODE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    fused, pairs = json.loads(run.stdout.splitlines()[-1])
    assert fused == []
    for name, (aligned, unaligned) in pairs.items():
        assert aligned and aligned == unaligned, name
