"""Every op with one damaged argument: an error that names the argument, nothing written, no crash.

The first calls of the campaign are in the default suite; all of it, each slice in a process of its own:

    python -m pytest -m campaign tests/kernels/test_fuzz.py --campaign-summary bench/results/fuzz_ops.json
"""

from __future__ import annotations

import collections
import json
import random
from pathlib import Path

import pytest
import torch

import dlm_fast

pytest.importorskip("triton", reason="the calls are those of the kernels' tests, which import Triton")
import fuzz_ops
from fuzz_ops import BACKENDS, OPS

CALLS, SLICE, DEFAULT_CALLS = 200, 50, 24


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_an_undamaged_call_is_taken(op, backend):
    for seed in range(3 if backend == "triton" else 40):
        call = fuzz_ops.valid_call(op, random.Random(f"{op} {seed}"))
        damage = fuzz_ops.Damage("none", "", call, ("",))
        assert fuzz_ops.taken(op, backend, damage) == (False, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_a_damaged_argument_is_refused_by_name_before_anything_is_written(op, backend):
    outcomes = [fuzz_ops.run_case(op, backend, seed) for seed in range(DEFAULT_CALLS)]
    assert not fuzz_ops.counted(outcomes)["wrong"]


def test_a_process_that_dies_is_a_crash(monkeypatch):
    monkeypatch.setattr(fuzz_ops, "__file__", str(Path(fuzz_ops.__file__).with_name("named_errors.py")))
    found = fuzz_ops.run_apart("unmask", "cpu", range(1))
    assert found["crashes"] and not found["kinds"]


@pytest.mark.campaign
def test_campaign_of_damaged_calls(request):
    counts: dict[str, collections.Counter] = {name: collections.Counter() for name in ("op", "backend", "kind")}
    wrong, crashes, accepted = [], [], 0
    for op in OPS:
        for backend in BACKENDS:
            for start in range(0, CALLS, SLICE):
                found = fuzz_ops.run_apart(op, backend, range(start, start + SLICE))
                calls = sum(found["kinds"].values())
                counts["op"][op] += calls
                counts["backend"][backend] += calls
                counts["kind"].update(found["kinds"])
                accepted += found["accepted"]
                wrong += found["wrong"]
                crashes += found["crashes"]
    summary = {
        "what": "calls of every op with one damaged argument; each must end in an error that names it, with nothing "
        "written, or be a call like any other and equal the reference",
        "torch": torch.__version__,
        "dlm_fast": dlm_fast.__version__,
        "calls": sum(counts["op"].values()),
        "refused": sum(counts["op"].values()) - accepted,
        "accepted and equal to the reference": accepted,
        "unnamed errors": sum(": does not " in each or " is no refusal" in each for each in wrong),
        "writes before a refusal": sum(": written before " in each for each in wrong),
        "crashes": len(crashes),
        "wrong": wrong + crashes,
        "counts": {name: dict(sorted(counter.items())) for name, counter in counts.items()},
    }
    path = request.config.getoption("--campaign-summary")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=1) + "\n")
    assert not summary["wrong"]
    assert summary["calls"] == len(OPS) * len(BACKENDS) * CALLS >= 1000
