"""What this GPU does at best, measured in the same run: bytes copied, bf16 products, empty launches."""

from __future__ import annotations

from functools import partial

import torch
import triton

from .speed.run import Ceilings
from .timing import Budget, Candidate, CudaTimer, Outcome, measure

COPY_BYTES = 1 << 30
GEMM_SIZE = 8192
EMPTY_LAUNCHES = 256


@triton.jit
def _empty_kernel(pointer):
    pass


def launch_empty(pointer: torch.Tensor) -> None:
    _empty_kernel[(1,)](pointer)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measures every ceiling. Raises RuntimeError if one of them cannot be measured: then no share of a ceiling can be
    reported."""
    timer, budget = CudaTimer(device), Budget(60, 0)
    elements = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 8) // 2
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    # Captured in a graph, `copy_` is a node that some drivers run at two thirds of what a kernel reaches (H200): the
    # ceiling is the fastest of three ways to read every byte once and write every byte once.
    copies = [
        Candidate("copy in a graph", [partial(target.copy_, source)]),
        Candidate("copy", [partial(target.copy_, source)], graph=False),
        Candidate("neg in a graph", [partial(torch.neg, source, out=target)]),
    ]
    copy = min(_median(outcome) for outcome in measure(copies, timer, budget).values())
    # Never zeros: a product of zeros runs faster than one of data.
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    gemm = _median(measure([Candidate("gemm", [partial(torch.matmul, a, b)])], timer, budget)["gemm"])
    del source, target, a, b
    launch = partial(launch_empty, torch.zeros(1, device=device))
    kernels = [
        Candidate("kernel", [launch] * EMPTY_LAUNCHES),
        Candidate("graph", [launch]),
        Candidate("launch", [launch] * EMPTY_LAUNCHES, graph=False),
    ]
    times = {name: _median(outcome) for name, outcome in measure(kernels, timer, budget).items()}
    torch.cuda.empty_cache()
    return Ceilings(
        copy_tb_s=2 * 2 * elements / copy / 1e6,
        gemm_tflop_s=2 * GEMM_SIZE**3 / gemm / 1e6,
        empty_kernel_us=times["kernel"],
        empty_graph_us=times["graph"],
        empty_launch_us=times["launch"],
    )


def _median(outcome: Outcome) -> float:
    if outcome.stats is None:
        raise RuntimeError(f"ceilings: {outcome.reason}")
    return outcome.stats.p50
