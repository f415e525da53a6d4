"""How a candidate is timed in tests: by the wall clock of the host. The times say nothing about a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import bench_module  # noqa: F401

from bench.timing import Candidate


def host_timer(candidate: Candidate) -> Callable[[], float]:
    """A function that takes one sample, in microseconds a call, as `bench.timing.CudaTimer` makes one on a GPU."""

    def sample() -> float:
        if candidate.before is not None:
            candidate.before()
        started = time.perf_counter()
        for call in candidate.calls:
            call()
        return (time.perf_counter() - started) * 1e6 / len(candidate.calls)

    (candidate.warm or sample)()
    return sample
