"""`python -m bench precompile` and `gpu-check --cache`: what the checks launch is compiled without a GPU, and Triton
finds it again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile

import pytest
import torch
from bench_module import ROOT

from bench import __main__ as command
from bench import kernel_cache, machine

pytest.importorskip("triton", reason="these tests compile kernels")

# One case, what the ceilings launch, a kernel that does not compile and a case that raises. All of this runs in a
# process of its own, in which something stands in for the driver.
SCRIPT = """
import dataclasses, json, sys
from pathlib import Path
sys.path[:0] = [{root!r}]
import torch, triton
from bench import collect, gpu_check, kernel_cache, precompile, shapes
from bench.checks import run as checks

sizes = dataclasses.replace(checks.TOY, logits_dtypes=(torch.bfloat16,), attention_dtypes=(), vocabs=(), every=40)
shapes = dataclasses.replace(shapes.TOY_SHAPES, models=())
file, said, followed, collectors = Path({folder!r}) / "cache.tar.xz", [], [], []
compile, follow, cases_of, make = triton.compile, collect._follow, gpu_check.cases_of, collect.Collector


def broken(source, **options):
    if source.fn.__name__ == "_empty_kernel":
        raise AssertionError("Loop-carried variable candidates")
    return compile(source, **options)


def no_case():
    raise RuntimeError("not to be followed")


def cases(*given):
    return [*cases_of(*given), ("confidence", ("broken", no_case))]


triton.compile, gpu_check.cases_of = broken, cases
collect._follow = lambda collector, name, *rest, **options: (
    followed.append(name) or follow(collector, name, *rest, **options)
)
collect.Collector = lambda: collectors.append(make()) or collectors[0]
status = precompile.precompile(file, [90], 3, 1, said.append, sizes, shapes, ("confidence",))

listed = [name for _, (name, _) in cases_of(collect.dlm_fast.triton_ops(), collect.GPU, sizes, 3, ("confidence",))]
hits = {{}}
triton.knobs.compilation.listener = lambda **facts: hits.update({{facts["src"].name: facts["cache_hit"]}})
with kernel_cache.placed(file) as placed:
    for variant in collectors[0].variants.values():
        compile(variant.source, target=variant.target, options=variant.options.__dict__)
    found = {{"facts": placed.facts, "besides": placed.compiled_since(), "lines": kernel_cache.lines(placed)}}
print(json.dumps(found | {{"status": status, "said": said, "followed": followed, "listed": listed, "hits": hits}}))
"""


@pytest.fixture(scope="module")
def precompiled(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("precompiled")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    script = SCRIPT.format(root=str(ROOT), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"file": folder / "cache.tar.xz"}


def test_what_a_gpus_checks_and_its_ceilings_launch_is_followed(precompiled) -> None:
    listed = [f"confidence: {name}" for name in precompiled["listed"]]
    assert len(listed) == 1 and precompiled["followed"] == [*listed, "confidence: broken", "ceilings"]


def test_what_was_compiled_ahead_triton_does_not_compile_again(precompiled) -> None:
    hits, facts = precompiled["hits"], precompiled["facts"]
    assert hits.pop("_empty_kernel") is False and hits and all(hits.values())  # that one was not in the file
    assert precompiled["besides"] == 1
    assert facts["placed"] == len(hits) and facts["same_sources"] and facts["commit"] == machine.commit()
    assert "TRITON_CACHE_DIR=" in precompiled["lines"][1] and "TRITON_DISABLE_LINE_INFO=1" in precompiled["lines"][1]
    with tarfile.open(precompiled["file"]) as archive:
        names = archive.getnames()
        found = json.load(archive.extractfile("manifest.json"))
    assert sum(name.endswith(".cubin") for name in names) == len(found["kernels"]) == len(hits) and found["seed"] == 3


def test_what_does_not_compile_and_what_cannot_be_followed_is_named_and_the_others_are_packed(precompiled) -> None:
    lines = precompiled["said"]
    assert precompiled["status"] == 1 and lines[-1] == "1 did not compile, 1 could not be followed"
    kernel = "_empty_kernel for sm_90, asked for by ceilings"
    assert f"DOES NOT COMPILE {kernel}: AssertionError: Loop-carried variable candidates" in [
        line.strip() for line in lines
    ]
    assert "NOT FOLLOWED confidence: broken: RuntimeError: not to be followed" in lines


def manifest(**changes) -> kernel_cache.Manifest:
    import triton

    given = {
        "triton": triton.__version__,
        "ptxas": {"90": kernel_cache.ptxas(90)},
        "environment": kernel_cache.environment(),
    }
    given |= {"commit": "abc", "sources": machine.sources(), "seed": 3, "kernels": []}
    return kernel_cache.Manifest(**given | changes)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, ""),
        ({"triton": "3.5.0"}, "made by Triton 3.5.0, here is "),
        ({"environment": {"DISABLE_LINE_INFO": "maybe"}}, "made under {'DISABLE_LINE_INFO': 'maybe'}, here is "),
        ({"ptxas": {"90": "9.0-90"}}, "made by ptxas 9.0-90 for sm_90, here "),
    ],
)
def test_a_cache_of_another_installation_is_not_placed_and_says_why(tmp_path, changes: dict, reason: str) -> None:
    count, found = kernel_cache.place(manifest(**changes), tmp_path, tmp_path / "cache")
    assert count == 0 and found.startswith(reason) and bool(found) == bool(reason)


def test_the_commit_of_a_cache_counts_only_for_the_same_sources(tmp_path) -> None:
    file = tmp_path / "cache.tar.xz"
    before = dict(os.environ)
    for sources, commit in ((machine.sources(), "abc"), ("another", None)):
        kernel_cache.pack(file, manifest(sources=sources), tmp_path / "none", [])
        with kernel_cache.placed(file) as placed:
            assert placed.commit == commit and os.environ["TRITON_CACHE_DIR"] == str(placed.folder)
            assert any("other sources" in line for line in kernel_cache.lines(placed)) == (commit is None)
        assert dict(os.environ) == before and not placed.folder.exists()


def test_a_file_that_is_no_cache_is_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    file = tmp_path / "cache.tar.xz"
    file.write_text("no archive")
    damaged = tmp_path / "damaged.tar.xz"
    kernel_cache.pack(damaged, manifest(), tmp_path / "none", ["".join(f"{n * n};" for n in range(9999))])
    whole = damaged.read_bytes()
    middle = len(whole) // 2
    damaged.write_bytes(whole[:middle] + bytes(2000) + whole[middle + 2000 :])
    for path in (file, tmp_path / "absent", damaged):
        assert command.main(["gpu-check", "--out", str(tmp_path), "--cache", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"gpu-check: --cache {path}: must be a file of `precompile`, got ")


def test_precompile_says_what_it_lacks(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["precompile", "--out", str(tmp_path / "a")]) == 2
    assert "precompile: unset TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    assert command.main(["precompile", "--out", str(tmp_path / "a"), "--jobs", "0"]) == 2
    assert "precompile: --jobs must be at least 1, got 0" in capsys.readouterr().err
    assert command.main(["precompile", "--out", str(tmp_path)]) == 2  # before anything is compiled
    assert f"precompile: --out {tmp_path}: " in capsys.readouterr().err
