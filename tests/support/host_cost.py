"""What a call of an op costs its host: `python tests/support/host_cost.py [--json]`, without TRITON_INTERPRET.

Calls are made until they are warm, through Triton's launch path with a stand-in for the driver (standin.py), on CPU
tensors. What is left out is the launch itself, in C. The table gives the CPU time of a call in microseconds (the
median of several rounds), that of the `torch.empty` calls in it, and the difference, which is Python. The last column
is the same every time: the functions that a call calls, in Python and in C.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from standin import launch_nothing

Calls = dict[str, Callable[[], Any]]


def int32(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


def attention_calls() -> Calls:
    from dlm_kernels import Window
    from dlm_kernels.attention.launch import block_attention

    B, W, H, H_kv, D, dtype = 2, 32, 32, 8, 128, torch.bfloat16
    q, k, v = (torch.zeros(B, W, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, H_kv, H_kv))
    lane = torch.arange(W, dtype=torch.int32).expand(B, W).contiguous()
    fields = {
        "q_pos": lane, "q_block": torch.zeros_like(lane), "q_len": int32([W] * B), "kv_slot": lane + 5,
        "kv_len": int32([5] * B), "replaced": int32([[0, 0]] * B), "cache_row": int32(range(B)), "mode": "full",
    }  # fmt: skip
    window = Window(**fields)

    def call(S_max: int) -> Callable[[], Any]:
        caches = [torch.zeros(B, H_kv, S_max, D, dtype=dtype) for _ in range(2)]
        return lambda: block_attention(q, k, v, *caches, window, scale=0.125)

    return {
        "block_attention, one launch": call(512),
        "block_attention, two launches": call(4096),
        "Window": lambda: Window(**fields),
    }


def confidence_calls() -> Calls:
    from dlm_kernels.confidence.launch import confidence

    banned = torch.tensor([3])

    def call(N: int) -> Callable[[], Any]:
        logits = torch.zeros(1, 126464, dtype=torch.bfloat16).expand(N, -1)
        rows = torch.arange(N, dtype=torch.int32)
        return lambda: confidence(logits, rows=rows, banned=banned, outputs=("second",))

    return {"confidence, two launches": call(64), "confidence, one launch": call(600)}


def unmask_calls() -> Calls:
    from dlm_kernels import RowState, UnmaskInputs, UnmaskRule
    from dlm_kernels.unmask.launch import unmask

    B, L, W = 4, 1024, 32
    rows = int32([1] * B)
    state, rule = RowState.empty(B, L, "cpu"), UnmaskRule("threshold", cache="refresh")
    fields = dict(
        query_len=rows, pred=torch.zeros(B, W, dtype=torch.int64), score=torch.zeros(B, W),
        confidence=torch.zeros(B, W), value=torch.zeros(B), min_unmask=rows, steps=rows, block_length=rows,
        mask_id=9, stop_ids=torch.tensor([8]), lane_start=rows, rank=torch.zeros(B, W),
        stat_error=torch.zeros(B, W, dtype=torch.int32), max_steps=rows,
    )  # fmt: skip
    inputs = UnmaskInputs(**fields)
    return {
        "unmask": lambda: unmask(state, rule, inputs, kind="denoise"),
        "UnmaskInputs": lambda: UnmaskInputs(**fields),
    }


def drafts_calls() -> Calls:
    from dlm_kernels import reference
    from dlm_kernels.drafts.launch import draft_build, verify

    B, D, W = 4, 3, 32
    lanes = torch.zeros(B, W, dtype=torch.int64), torch.zeros(B, W), torch.zeros(B, W)
    source = reference.DraftSource(*lanes, int32([0] * B), int32([0] * B))
    eligible, rows = torch.zeros(B, W, dtype=torch.bool), torch.zeros(B, dtype=torch.bool)
    held, scores = draft_build(source, lanes[0], eligible, rows, D=D), torch.zeros(B, D, W)
    given = {"eligible": eligible, "ready": rows, "drafting": rows, "selects": rows, "mask_id": 9}
    return {
        "draft_build": lambda: draft_build(source, lanes[0], eligible, rows, D=D),
        "verify": lambda: verify(source, held, held, scores, scores, **given),
    }


def noise_calls() -> Calls:
    from dlm_kernels.noise.launch import uniform_scores

    seed, noise = torch.tensor([7]), torch.zeros(128, 3, dtype=torch.int32)
    return {"uniform_scores": lambda: uniform_scores(seed, noise)}


def layers_calls() -> Calls:
    from dlm_kernels.layers.launch import add_rms_norm, qk_norm_rope, rms_norm, swiglu

    B, W, d, dtype = 1, 32, 4096, torch.bfloat16
    x, weight, gate = (
        torch.zeros(B, W, d, dtype=dtype),
        torch.ones(d, dtype=dtype),
        torch.zeros(B, W, 12288, dtype=dtype),
    )
    q, k = (torch.zeros(B, W, heads, 128, dtype=dtype) for heads in (32, 8))
    cos, of_head = torch.zeros(1, W, 128, dtype=dtype), torch.ones(128, dtype=dtype)
    return {
        "rms_norm": lambda: rms_norm(x, weight, eps=1e-6),
        "add_rms_norm": lambda: add_rms_norm(x, x, weight, eps=1e-6),
        "qk_norm_rope": lambda: qk_norm_rope(q, k, cos, cos, q_weight=of_head, k_weight=of_head, eps=1e-6),
        "swiglu": lambda: swiglu(gate, gate),
    }


def warm_calls() -> Calls:
    """Calls of every op that have been made before, on a machine where nothing is launched."""
    launch_nothing(90)
    made: Calls = {}
    for calls in (attention_calls, confidence_calls, unmask_calls, drafts_calls, noise_calls, layers_calls):
        made |= calls()
    for call in made.values():
        for _ in range(3):
            call()
    return made


def microseconds(call: Callable[[], Any], calls: int, rounds: int = 9) -> float:
    """CPU time of a call: the median over rounds of so many calls."""
    times = []
    gc.disable()
    for _ in range(rounds):
        started = time.process_time()
        for _ in range(calls):
            call()
        times.append((time.process_time() - started) * 1e6 / calls)
    gc.enable()
    return statistics.median(times)


def allocations(call: Callable[[], Any]) -> Callable[[], None]:
    """What makes the `torch.empty` calls of a call, and nothing else."""
    asked: list[tuple[tuple, dict]] = []
    empty = torch.empty

    def noted(*sizes: Any, **options: Any) -> torch.Tensor:
        asked.append((sizes, options))
        return empty(*sizes, **options)

    torch.empty = noted
    try:
        call()
    finally:
        torch.empty = empty

    def again() -> None:
        for sizes, options in asked:
            empty(*sizes, **options)

    return again


def functions_called(call: Callable[[], Any]) -> int:
    """How many functions are called within a call, in Python and in C."""
    events: list[str] = []

    def profiled(frame: Any, event: str, argument: Any) -> None:
        events.append(event)

    sys.setprofile(profiled)
    try:
        call()
    finally:
        sys.setprofile(None)
    # The call itself, and the last `sys.setprofile`.
    return events.count("call") + events.count("c_call") - 2


def measured(calls: int) -> dict[str, dict[str, float]]:
    found = {}
    for name, call in warm_calls().items():
        whole, empty = microseconds(call, calls), microseconds(allocations(call), calls)
        times = {"whole": whole, "torch.empty": empty, "Python": whole - empty}
        found[name] = {key: round(value, 1) for key, value in times.items()} | {"functions": functions_called(call)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1000, help="calls of a round (default: 1000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(given.calls)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if given.json:
        print(json.dumps(versions | {"microseconds": found}))
        return
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    columns = ("whole", "torch.empty", "Python", "functions")
    print(f"{'CPU microseconds a call':32}" + "".join(f"{column:>13}" for column in columns))
    for name, numbers in found.items():
        print(f"{name:32}" + "".join(f"{numbers[column]:13}" for column in columns))


if __name__ == "__main__":
    sys.exit(main())
