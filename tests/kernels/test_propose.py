"""Entries for the tile table: what is proposed, in which order, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton's wheels are for Linux; nothing is compiled elsewhere")

from dlm_kernels.propose import Proposal, ranked, residency
from dlm_kernels.static import CompileResult

ROOT = Path(__file__).resolve().parents[2]
RESULT = CompileResult("toy", "one", "sm_90", 128, 0, 0, 64 * 1024, 0, "wgmma", None, 128, 900, 9, [(400, 2)], {})


def proposed(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "dlm_kernels.propose", *arguments], env=environment, capture_output=True, text=True
    )


def test_programs_on_an_sm_are_bounded_by_registers_warps_and_shared_memory():
    def programs(num_warps: int, **changes) -> int:
        return residency(dataclasses.replace(RESULT, **changes), num_warps)

    assert programs(8, shared_bytes=1024) == 2  # 65,536 registers / (128 x 32 x 8)
    assert programs(4, registers=32, shared_bytes=1024) == 16  # 64 warps
    assert programs(4, registers=32) == 3  # 228 KiB / 64 KiB
    assert programs(4, registers=32, target="sm_86") == 1
    assert programs(1, registers=33, shared_bytes=1024) == 51  # registers come in units of 256 a warp: 40 for a thread


def test_what_fits_and_has_the_designed_instruction_and_more_warps_comes_first():
    def candidate(name: int, warps: int = 8, reason: str = "", **changes) -> Proposal:
        return Proposal({"BLOCK_M": name}, dataclasses.replace(RESULT, **changes), reason, warps // 4, warps)

    spilling = candidate(1, reason="spills must be 0, got 8")
    few, many = candidate(2, warps=4), candidate(3, warps=16)
    other = candidate(4, warps=64, mma="mma.sync")
    assert [item.numbers["BLOCK_M"] for item in ranked([spilling, other, few, many], "wgmma")] == [3, 2, 4, 1]
    assert not spilling.fits and many.fits


def test_candidates_are_compiled_and_the_shipped_one_is_marked():
    config = "bf16 D=128 G=4 full cache 128x64"
    run = proposed(
        "--kernel", "attention", "--config", config, "--target", "90", "--json",
        "--set", "BLOCK_M=128", "--set", "BLOCK_N=64", "--set", "num_warps=4,8", "--set", "num_stages=3",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    *lines, last = run.stdout.splitlines()
    found = json.loads(last)["candidates"]
    assert [item["numbers"]["num_warps"] for item in found] == [8, 4]
    assert found[0]["result"]["mma"] == "wgmma" and found[0]["reason"] == "" and found[0]["programs"] >= 1
    assert "spills must be 0" in found[1]["reason"]
    assert "shipped" in lines[1] and "shipped" not in lines[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--kernel", "sort", "--config", "x", "--target", "90"], "kernel must be one of attention, confidence"),
        (["--kernel", "unmask", "--config", "x", "--target", "90"], "unmask has no configuration 'x' on sm_90; it has"),
        (
            ["--kernel", "unmask", "--config", "x", "--target", "75"],
            "target must be one of 80, 86, 89, 90, 100, 120, got 75",
        ),
        (
            ["--kernel", "unmask", "--config", "x", "--target", "90", "--set", "BLOCK_W"],
            "--set must be NAME=NUMBER,NUMBER, got 'BLOCK_W'",
        ),
    ],
)
def test_what_is_not_shipped_or_not_a_number_is_refused_by_name(arguments, message):
    run = proposed(*arguments)
    assert run.returncode == 2 and message in run.stderr
