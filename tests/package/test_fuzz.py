"""Fuzzed calls: every public entry with every argument of every wrong kind, and files with every field of every wrong
kind, end in a named error, and nothing is written (tests/support/fuzz_entries.py).

The default suite runs a part of the cases, which a fixed seed has shuffled. The campaign runs all of them, in processes
of their own, so that a crash is noticed:

    python -m pytest -m campaign tests/package/test_fuzz.py --campaign-summary bench/results/fuzz_entries.json
"""

from __future__ import annotations

import collections
import inspect
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz_entries
import network
import pytest
import torch
import transformers
from fuzz_entries import Case, Entry, Scene

import dlm_fast
from dlm_fast import policies

ROOT = Path(__file__).resolve().parents[2]
CASES, PARTS = 600, 4


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("fuzz") / "scene")


def is_error(name: str) -> bool:
    value = getattr(dlm_fast, name)
    return inspect.isclass(value) and issubclass(value, BaseException)


def test_every_public_entry_is_called(scene):
    names = {name for name in dlm_fast.__all__ if not is_error(name)}
    assert names - set(fuzz_entries.NO_ENTRIES) <= set(scene.entries)
    assert set(policies.__all__) - set(fuzz_entries.NO_POLICIES) <= set(scene.entries)
    assert set(fuzz_entries.NO_ENTRIES) <= names and set(fuzz_entries.NO_POLICIES) <= set(policies.__all__)


def test_every_argument_of_a_signature_has_its_damages(scene):
    missing = {name: entry.missing() for name, entry in scene.entries.items() if entry.missing()}
    assert not missing, f"arguments without a row in the tables of tests/support/fuzz_entries.py: {missing}"


def test_a_valid_call_of_every_entry_is_taken(scene, monkeypatch):
    monkeypatch.chdir(scene.root)
    for entry in scene.entries.values():
        entry.function(**entry.arguments)
    (scene.root / "saved.safetensors").unlink()


def test_every_refusal_is_named_and_nothing_is_written(scene, monkeypatch):
    monkeypatch.chdir(scene.root.parent)
    wanted = fuzz_entries.cases(scene)[:CASES]
    found = list(fuzz_entries.run_all(wanted, scene))
    problems = [f"{case}: {outcome.problem}" for case, outcome in found if outcome.problem]
    assert not problems, "\n".join(problems)
    assert sum(outcome.refused for _, outcome in found) > 0.8 * CASES


@pytest.mark.parametrize(
    "what, problem",
    [
        ("takes", "was taken"),
        ("raises", "AttributeError is no refusal"),
        ("names another", "does not name value"),
        ("shows nothing", "does not say what was given"),
        ("writes", "something was written"),
        ("changes a weight", "something was written"),
        ("asks", "the network was asked"),
    ],
)
def test_what_is_no_refusal_is_noticed(scene, what, problem):
    weight = scene.model.lm_head.weight
    before = weight.detach().clone()

    def entry(value: object) -> None:
        if what == "takes":
            return
        if what == "raises":
            raise AttributeError("value: got nothing")
        if what == "names another":
            raise ValueError("other must be 1, got other=2")
        if what == "shows nothing":
            raise ValueError("value must be 1")
        if what == "writes":
            (scene.root / "written").write_text("")
        if what == "changes a weight":
            weight.data[0, 0] += 1
        if what == "asks":
            try:
                __import__("socket").getaddrinfo("example.org", 80)
            except network.NetworkAsked:
                pass
        raise ValueError("value must be 1, got value=2")

    scene.entries["stub"] = Entry(entry, {"value": 1}, {"value": fuzz_entries.never})
    try:
        ((_, found),) = fuzz_entries.run_all([Case("stub", "value", "None")], scene)
    finally:
        del scene.entries["stub"]
        weight.data.copy_(before)
        (scene.root / "written").unlink(missing_ok=True)
    assert found.problem is not None and found.problem.startswith(problem)


def run_part(part: int) -> tuple[list[dict], str | None]:
    """The rows of a part of the campaign, which runs in a process of its own, and how the process died, if it did."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "support" / "fuzz_entries.py"), str(part), str(PARTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    died = None if done.returncode == 0 else f"exit status {done.returncode}: {done.stderr[-500:]}"
    return rows, died


@pytest.mark.campaign
def test_campaign_of_all_cases(scene, request):
    expected = [str(case) for case in fuzz_entries.cases(scene)]
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(run_part, range(PARTS)))
    rows = [row for found, _ in parts for row in found]
    crashes = [died for _, died in parts if died is not None]
    problems = [f"{row['case']}: {row['problem']}" for row in rows if row["problem"]]
    summary = {
        "what": "calls of every public entry and files of every kind, each with one argument or field that is wrong",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dlm_fast": dlm_fast.__version__,
        "cases": len(rows),
        "refused_by_name": sum(row["refused"] and not row["problem"] for row in rows),
        "allowed": sum(not row["refused"] and not row["problem"] for row in rows),
        "problems": problems,
        "crashes": crashes,
        "cases_by_entry": dict(sorted(collections.Counter(row["case"].partition(": ")[0] for row in rows).items())),
    }
    print(json.dumps(summary, indent=1))
    path = request.config.getoption("--campaign-summary")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=1) + "\n")
    assert not problems and not crashes, "\n".join([*problems, *crashes])
    assert {row["case"] for row in rows} == set(expected) and len(rows) == len(expected) >= 1200
