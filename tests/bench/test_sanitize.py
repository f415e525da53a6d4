"""`python -m bench sanitize`: what it takes for clean, what for red, and what it runs under the tools."""

from __future__ import annotations

import json

import pytest
import torch

import dlm_fast
from bench import __main__ as command
from bench import sanitize, shapes
from bench.checks import run as checks
from bench.speed import forms as speed_forms
from bench.speed import unmask_forms as speed_unmask_forms

CPU = torch.device("cpu")


KERNELS = ("_attention_kernel", "_confidence_kernel")
CLEAN = "========= COMPUTE-SANITIZER\nconfidence green\nsanitize-target: green\n========= ERROR SUMMARY: 0 errors\n"
INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at _attention_kernel+0x1230 in split.py:120
=========     by thread (0,0,0) in block (3,0,0)
=========     Access at 0x7f0000000400 is out of bounds
=========
sanitize-target: green
========= ERROR SUMMARY: 1 error
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _confidence_kernel+0x90 in kernel.py:41
=========     and Read access at _confidence_kernel+0x100 in kernel.py:51 [508 hazards]
=========
sanitize-target: green
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
ELSEWHERE = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<512>(float *)+0x450
=========     by thread (0,0,0) in block (0,0,0)
sanitize-target: green
========= ERROR SUMMARY: 1 error
"""


def test_clean_output_of_every_tool_is_clean() -> None:
    race = CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
    for tool, output in (("memcheck", CLEAN), ("initcheck", CLEAN), ("synccheck", CLEAN), ("racecheck", race)):
        verdict = sanitize.parse(tool, 0, output, KERNELS)
        assert verdict.ok and (verdict.errors, verdict.findings, verdict.reason) == (0, [], "")


@pytest.mark.parametrize(
    "output, finding",
    [
        (INVALID, sanitize.Finding("Invalid __global__ read of size 4 bytes", "_attention_kernel")),
        (RACE, sanitize.Finding(RACE.splitlines()[1].removeprefix("========= Error: "), "_confidence_kernel")),
    ],
)
def test_a_report_in_our_kernels_is_red(output: str, finding: sanitize.Finding) -> None:
    verdict = sanitize.parse("memcheck", sanitize.ERROR_STATUS, output, KERNELS)
    assert not verdict.ok and verdict.errors == 1 and verdict.findings == [finding]
    assert verdict.reason.startswith("1 reports in our kernels, first: ")


def test_a_report_in_another_kernel_is_counted_apart() -> None:
    verdict = sanitize.parse("initcheck", sanitize.ERROR_STATUS, ELSEWHERE, KERNELS)
    assert verdict.ok and verdict.elsewhere == 1 and verdict.errors == 1


@pytest.mark.parametrize(
    "status, output, reason",
    [
        (1, "========= COMPUTE-SANITIZER\nTraceback", "it printed no summary (exit status 1)"),
        (sanitize.ERROR_STATUS, CLEAN.replace("0 errors", "7 errors"), "7 counted, 0 printed"),
        (1, CLEAN.replace("green\n=", "RED\n="), "exit status 1"),
        (0, CLEAN.replace("sanitize-target: green", ""), "the checks did not end green"),
        (0, "========= Internal Sanitizer Error: no memory\n" + CLEAN, "Internal Sanitizer Error: no memory"),
    ],
)
def test_what_does_not_say_that_it_is_clean_is_red(status: int, output: str, reason: str) -> None:
    verdict = sanitize.parse("memcheck", status, output, KERNELS)
    assert not verdict.ok and reason in verdict.reason


def test_only_initcheck_watches_kernels_that_are_not_ours() -> None:
    lines = {tool: sanitize.command("compute-sanitizer", tool, KERNELS, 7) for tool in sanitize.TOOLS}
    assert {tool for tool, line in lines.items() if "--kernel-name" not in line} == {"initcheck"}
    assert {tool for tool, line in lines.items() if "--plain-memory" in line} == {"initcheck"}
    assert "kns=_attention_kernel,kns=_confidence_kernel" in lines["racecheck"]
    assert all(line[1:3] == ["--tool", tool] and "7" in line for tool, line in lines.items())


def test_sanitize_says_what_it_lacks(monkeypatch, tmp_path, capsys) -> None:
    assert command.main(["sanitize", "--tool", "valgrind"]) == 2
    assert (
        "sanitize: --tool must be among memcheck, racecheck, initcheck, synccheck, got valgrind"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["sanitize"]) == 2
    assert "sanitize: needs a CUDA GPU" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(sanitize.SanitizeError, match="must be on PATH or under CUDA_HOME, found neither"):
        sanitize.find()
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert sanitize.find() == str(tool)


def test_the_kernels_that_are_sanitized_are_those_that_are_launched(monkeypatch) -> None:
    class Case:
        def __init__(self, name: str) -> None:
            self.fn = type(name, (), {})

    from dlm_kernels import static

    shipped = {op: (Case(f"_{op}_kernel"), Case("_combine_kernel")) for op in static.KERNEL_MODULES}
    monkeypatch.setattr(static, "shipped", lambda op, capability: shipped[op])
    assert sanitize.kernel_names() == sorted({"_combine_kernel", *(f"_{op}_kernel" for op in static.KERNEL_MODULES)})


def test_what_is_checked_only_where_it_is_timed_is_sanitized_too() -> None:
    # The toy model has no sliding layers.
    expected = {"attention-forms": len(speed_forms.FORMS) - 1, "unmask-forms": 2 * len(speed_unmask_forms.RULES)}
    assert set(sanitize.CHECKED_WHERE_TIMED) == set(expected)
    for op in sanitize.CHECKED_WHERE_TIMED:
        cases = list(sanitize.shape_checks(op, dlm_fast.REFERENCE, CPU, shapes.TOY_SHAPES))
        assert len({name for name, _ in cases}) == len(cases) == expected[op]
        assert {check.status for check in checks.run(op, cases, CPU)} == {"passed"}


def test_a_sanitize_run_is_a_document(tmp_path) -> None:
    verdicts = [
        sanitize.parse("memcheck", 0, CLEAN, KERNELS),
        sanitize.parse("racecheck", sanitize.ERROR_STATUS, RACE, KERNELS),
    ]
    document = json.loads(json.dumps(sanitize.document(verdicts, {"device": "toy"}, 3, 2)))
    assert document["ok"] is False and document["tools"]["memcheck"]["ok"] is True
    assert document["tools"]["racecheck"]["findings"][0]["function"] == "_confidence_kernel"
    assert (document["command"], document["seed"], document["schema"], document["device"]) == ("sanitize", 3, 2, "toy")
