"""Result files as `python -m bench kernels` writes them, made up by hand."""

from __future__ import annotations

STATIC_ROW = {
    "kernel": "confidence", "config": "bf16 second", "target": "sm_90", "tiles": {},
    "registers": 40, "spills": 0, "stack_bytes": 0, "shared_bytes": 1024, "tensor_memory": 0,
    "mma": "none", "instructions_per_element": 9.5, "widest_load": 128, "instructions": 900,
    "barriers": 9, "loops": [[227, 0]],
}  # fmt: skip


def result(rows: list[dict], **changes) -> dict:
    document = {
        "command": "kernels",
        "schema": 2,
        "measured": True,
        "device": "NVIDIA H100 80GB HBM3",
        "capability": "9.0",
    }
    document |= {"driver": "1", "versions": {"torch": "2.13.0"}, "ceilings": {"copy_tb_s": 2.0, "gemm_tflop_s": 500.0}}
    return document | {"timings": rows} | changes


def row(candidate: str, p50: float, noise: float = 0.02, **changes) -> dict:
    shape = {"op": "unmask", "model": "any", "shape": "B=8", "candidate": candidate, "status": "ok", "noise": noise}
    return shape | {"p50_us": p50, "p20_us": p50, "p80_us": p50} | changes
