"""Every kernel against its float64 reference on random calls: a slice of the campaign here, all of it on request.

    python -m pytest -m campaign tests/kernels/test_campaign.py --campaign-summary bench/results/kernel_campaign.json

A case is a seed: `run_case(seed, device)` of the op's module builds one random call, poisons what must not be read or
left unwritten, runs the kernel and compares. The committed file was made with `--races` (tests/support/races.py), which
takes an hour of one core. The file keeps what earlier runs counted for the ops that this run leaves out (`-k`).
"""

from __future__ import annotations

import collections
import importlib
import json
import time

import pytest
import torch

import dlm_fast

triton = pytest.importorskip("triton", reason="without Triton, no kernel can be compared with its reference")

# Module with `run_case`, and the seeds of the campaign: more where there are more modes.
CASES = {
    "block_attention": ("attention_cases", 8000),
    "confidence": ("confidence_cases", 6000),
    "unmask": ("unmask_cases", 5000),
    "drafts": ("drafts_cases", 1500),
    "layers": ("layers_cases", 2000),
}
DEFAULT_CASES = 60


def run(op: str, seeds: range, device: torch.device) -> tuple[collections.Counter, list[str]]:
    """How often each kind came up and boundaries were crossed, and what was wrong."""
    run_case = importlib.import_module(CASES[op][0]).run_case
    counts: collections.Counter = collections.Counter()
    wrong = []
    for seed in seeds:
        try:
            found = run_case(seed, device)
        except Exception as error:  # a kernel that raises is as wrong as one that errs; the other seeds still count
            wrong.append(f"{op} seed {seed}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        counts["cases"] += 1
        counts["crossing a tile or split boundary"] += found["boundary"]
        counts[found["kind"]] += 1
    return counts, wrong


@pytest.mark.parametrize("op", CASES)
def test_a_kernel_equals_its_reference_on_the_first_cases_of_the_campaign(op, device):
    counts, wrong = run(op, range(DEFAULT_CASES), device)
    assert not wrong, "\n".join(wrong)
    assert counts["cases"] == DEFAULT_CASES
    assert 2 * counts["crossing a tile or split boundary"] >= DEFAULT_CASES


@pytest.mark.campaign
@pytest.mark.parametrize("op", CASES)
def test_campaign_of_a_kernel_against_its_reference(op, device, request):
    started = time.monotonic()
    counts, wrong = run(op, range(CASES[op][1]), device)
    path = request.config.getoption("--campaign-summary")
    if path is not None:
        kernels = json.loads(path.read_text())["kernels"] if path.exists() else {}
        kernels[op] = {
            "counts": dict(sorted(counts.items())),
            "wrong": wrong,
            "seconds": round(time.monotonic() - started),
            "on": "interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "dlm_fast": dlm_fast.__version__,
        }
        total = {
            "what": "random calls of every kernel against the float64 reference: "
            "ids and integers exact, floats within the error bound",
            "cases": sum(entry["counts"].get("cases", 0) for entry in kernels.values()),
            "crossing a boundary": sum(
                entry["counts"].get("crossing a tile or split boundary", 0) for entry in kernels.values()
            ),
            "wrong": sum(len(entry["wrong"]) for entry in kernels.values()),
            "kernels": {name: kernels[name] for name in CASES if name in kernels},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(total, indent=1) + "\n")
    assert not wrong, "\n".join(wrong)
    assert 2 * counts["crossing a tile or split boundary"] >= counts["cases"] == CASES[op][1]


def test_the_campaign_has_at_least_20000_cases():
    assert sum(count for _, count in CASES.values()) >= 20_000
