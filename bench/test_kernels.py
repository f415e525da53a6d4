"""Microbenchmarks of every kernel for pytest-benchmark.

    python -m pytest bench/test_kernels.py --benchmark-only                            # with a CUDA GPU
    TRITON_INTERPRET=1 python -m pytest bench/test_kernels.py -m toy --benchmark-only  # without: its times mean nothing

A round replays one CUDA graph with a call for every set of inputs and waits for the device; `extra_info` says how many
calls that is. No round is timed before the op's checks are green. `python -m bench kernels` has the baselines, the
ceilings and the gates.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from functools import partial

import pytest
import torch

import dlm_fast
from bench.shapes import CHECK_SHAPES, TOY_SHAPES, Shapes
from bench.timing import Budget, Candidate

from . import gpu_check
from .checks import run as checks
from .speed.run import Bench, Ceilings, Shape

KERNELS = tuple(op for op in gpu_check.TIMINGS if op != "step")
ROUNDS, WARM_UP = 30, 3
SEED, TOY_EVERY = 3, 9
Key = tuple[str, str, str]


def shapes(chosen: Shapes, bench: Bench | None = None, ops: dlm_fast.Ops | None = None) -> dict[Key, Shape]:
    """Every shape by op, model and label. Without a bench the shapes can only be listed."""
    listed = [shape for op in KERNELS for shape in gpu_check.TIMINGS[op][0](bench, ops, chosen)]
    return {(shape.op, shape.model, shape.label): shape for shape in listed}


@functools.cache
def red(op: str, device: str) -> list[str]:
    """What the checks of an op find wrong on this device."""
    dtypes = (torch.float32,) if device == "cpu" else (torch.bfloat16, torch.float32)
    every = TOY_EVERY if device == "cpu" else 2
    sizes = dataclasses.replace(checks.TOY, attention_dtypes=dtypes, logits_dtypes=dtypes, every=every)
    with torch.no_grad():
        found = gpu_check.check_all(dlm_fast.triton_ops(), torch.device(device), sizes, SEED, print, wanted=(op,))
    return [f"{check.name}: {check.detail}" for check in found[op] if check.status == "FAILED"]


def run(benchmark, key: Key, chosen: Shapes, device: torch.device, l2_bytes: int) -> None:
    """Checks our kernel, then times it at one shape."""
    findings = [line for op in gpu_check.TIMINGS[key[0]][1] for line in red(op, device.type)]
    if findings:
        pytest.fail(f"not timed, {len(findings)} checks are red: {findings[0]}")
    # Neither a floor nor a budget is asked for here.
    bench = Bench(
        device, lambda candidate: lambda: 0.0, Budget(math.inf, 0), Ceilings(*[math.nan] * 5), l2_bytes, ROUNDS
    )
    with torch.no_grad():
        shape = shapes(chosen, bench, dlm_fast.triton_ops())[key]
        work = shape.build()
        if work.check is not None:
            work.check()
        ours = work.candidates[0]
        benchmark.group = key[0]
        cost, rounds = work.cost, ROUNDS if device.type == "cuda" else 1
        benchmark.extra_info.update(
            calls_per_round=len(ours.calls), nbytes=cost.nbytes, flops=cost.flops, cold=work.cold
        )
        setup = None if ours.before is None else partial(_restore, ours.before)
        benchmark.pedantic(_round(ours, device), setup=setup, rounds=rounds, warmup_rounds=min(rounds, WARM_UP))


def _restore(before: Callable[[], object]) -> None:
    """Returns nothing, because pytest-benchmark takes what a setup returns for arguments."""
    before()


def _round(candidate: Candidate, device: torch.device) -> Callable[[], None]:
    """One round: every call runs once, and the device is done when the round returns."""

    def calls() -> None:
        for call in candidate.calls:
            call()

    if device.type == "cpu":
        return calls
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        calls()  # compiles what capture must not
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize(device)

    return replay


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: it would have timed our kernel at this shape"
)
@pytest.mark.parametrize("key", shapes(CHECK_SHAPES), ids=" ".join)
def test_kernel(benchmark, key: Key) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    run(benchmark, key, CHECK_SHAPES, device, torch.cuda.get_device_properties(device).L2_cache_size)


@pytest.mark.toy
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 and -m toy")
@pytest.mark.parametrize("key", shapes(TOY_SHAPES), ids=" ".join)
def test_kernel_in_the_interpreter(benchmark, key: Key) -> None:
    run(benchmark, key, TOY_SHAPES, torch.device("cpu"), 1000)
