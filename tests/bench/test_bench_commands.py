"""`python -m bench kernels`: what it computes, refuses and writes, without a GPU; and what every command imports."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from bench_module import ROOT
from bench_results import STATIC_ROW, result, row
from host_timer import host_timer

import dlm_fast
from bench import __main__ as command
from bench import compare, floors, gpu_check, shapes, sweep, timing
from bench.checks import run as checks
from bench.speed import forms as speed_forms
from bench.speed.run import Bench, Ceilings
from dlm_kernels.testing import Failure

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_tb_s=2.0, gemm_tflop_s=500.0, empty_kernel_us=1.0, empty_graph_us=3.0, empty_launch_us=5.0)


# Floors


@pytest.mark.parametrize(
    "visibility, sees",
    [("full", lambda i, j: True), ("causal", lambda i, j: j <= i), ("block", lambda i, j: j // 4 <= i // 4)],
)
@pytest.mark.parametrize("L", [1, 4, 7, 12])
def test_visible_pairs_are_those_a_loop_counts(visibility: str, sees, L: int) -> None:
    assert floors.visible_pairs(visibility, L, 4) == sum(sees(i, j) for i, j in itertools.product(range(L), range(L)))


def test_a_decode_reads_its_prefix_once_and_moves_its_window_twice() -> None:
    cost = floors.decode(shapes.DREAM, [1000, 24])
    window = 2 * 32  # two rows
    kv_of_a_position, q_of_a_position = 2 * 2 * 4 * 128, 2 * 28 * 128
    assert cost.nbytes == (1000 + 24) * kv_of_a_position + 2 * window * kv_of_a_position + 2 * window * q_of_a_position
    assert cost.flops == 4 * 28 * 128 * 32 * (1000 + 24 + window)
    assert floors.decode(shapes.DREAM, [1000], cache_itemsize=1).nbytes < floors.decode(shapes.DREAM, [1000]).nbytes


@pytest.mark.parametrize(
    "model, B, prefix, h100, h200",
    [
        (shapes.LLADA, 1, 1024, 5.19, 3.62),
        (shapes.LLADA, 32, 1024, 25.5, 23.7),
        (shapes.DREAM, 8, 1024, 4.93, 4.76),
        (shapes.SDAR_8B, 8, 32768, 18.0, 13.9),
    ],
)
def test_the_floor_of_a_step_is_what_its_parts_add_up_to_by_hand(
    model: shapes.Model, B: int, prefix: int, h100: float, h200: float
) -> None:
    """Milliseconds that were computed without this code and are rounded more coarsely."""
    step = floors.step(model, B, prefix)
    for card, expected in (("H100", h100), ("H200", h200)):
        assert step.floor_us(*floors.CARDS[card]) / 1e3 == pytest.approx(expected, rel=0.02)


# Kernels without a GPU


def kernels_without_a_gpu(capsys, *options: str) -> tuple[int, list[str]]:
    status = command.main(["kernels", "--without-gpu", *options])
    return status, capsys.readouterr().out.splitlines()


def test_without_a_gpu_the_floors_are_computed_and_said_to_be(tmp_path, capsys) -> None:
    options = [
        "--no-static",
        "--models",
        "Dream-7B",
        "LLaDA2-mini",
        "--ops",
        "attention-decode",
        "step",
        "--out",
        str(tmp_path),
    ]
    status, lines = kernels_without_a_gpu(capsys, *options)
    document = json.loads(lines[-1])
    assert status == 0 and lines[0].startswith("No CUDA GPU was used: nothing here was measured.")
    assert document == json.loads((tmp_path / "kernels_static.json").read_text())
    assert (
        document["measured"] is False
        and document["static"] is None
        and "timings" not in document
        and "device" not in document
    )
    row = next(
        r for r in document["floors"] if (r["model"], r["shape"]) == ("Dream-7B", "decode B=1 prefix=4096 window=32")
    )
    cost = floors.decode(shapes.DREAM, [4096])
    assert row["floor_us"] == {card: pytest.approx(cost.floor_us(*at), rel=1e-4) for card, at in floors.CARDS.items()}
    assert {r["op"] for r in document["floors"]} == {"attention-decode", "step"}
    # What has no rows is said, not dropped.
    assert "LLaDA2-mini" not in {r["model"] for r in document["floors"] if r["op"] == "step"}
    assert any(line.startswith("step has no rows for LLaDA2-mini") for line in lines) and document["left_out"]
    page = (tmp_path / "kernels_static.md").read_text()
    assert "nothing here was measured" in page and "not measured" in page and "## Static table" not in page


def fake_static(monkeypatch, status: int, output: str, errors: str = "") -> list:
    calls = []

    def run(line, **options):
        if line[1:3] != ["-m", "dlm_kernels.static"]:
            return subprocess.CompletedProcess(line, 1, "", "")  # git, asked for the commit
        calls.append((line, options["env"]))
        return subprocess.CompletedProcess(line, status, output, errors)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_the_static_table_is_made_outside_of_the_interpreter_for_the_asked_kernels(
    monkeypatch, tmp_path, capsys
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    calls = fake_static(monkeypatch, 0, "the table\n" + json.dumps({"kernels": [STATIC_ROW]}) + "\n")
    options = ["--targets", "90", "80", "--jobs", "1", "--ops", "confidence", "unmask", "--out", str(tmp_path)]
    status, lines = kernels_without_a_gpu(capsys, *options)
    ((line, environment),) = calls
    assert status == 0 and "the table" in lines
    assert line == [
        sys.executable, "-m", "dlm_kernels.static", "--json", "--target", "90", "--target", "80",
        "--kernel", "confidence", "--kernel", "unmask", "--jobs", "1",
    ]  # fmt: skip
    assert "TRITON_INTERPRET" not in environment
    static = json.loads(lines[-1])["static"]
    assert static == {"kernels": [STATIC_ROW], "violations": [], "only": ["confidence", "unmask"]}
    page = (tmp_path / "kernels_static.md").read_text()
    assert "| confidence | bf16 second | sm_90 | 40 | 0 | 1024 | none | 9 | 227/0 | 9.50 |" in page
    # The rows of 264 and more have a predicted time, which needs their code; fewer are split, and have none.
    wanted = {"dtype": "bf16", "outputs": ["second"]}
    predicted = {
        row["facts"]["N"]: row["predicted_us"]["H200"]
        for row in json.loads(lines[-1])["floors"]
        if wanted.items() <= row["facts"].items()
    }
    assert predicted[1024] > 0 and predicted[32] is None
    assert "computed from the code for sm_90, not measured" in page


def test_a_violation_of_the_static_table_is_printed_and_exits_1(monkeypatch, capsys) -> None:
    row = json.dumps({"kernels": [STATIC_ROW | {"spills": 8}]})
    fake_static(monkeypatch, 1, f"table\n{row}\n", "confidence bf16 on sm_90: spills must be 0, got 8 bytes\n")
    status, lines = kernels_without_a_gpu(capsys, "--ops", "confidence")
    assert status == 1 and "VIOLATION: confidence bf16 on sm_90: spills must be 0, got 8 bytes" in lines
    assert any(line.split()[:2] == ["missed", "1"] and "violations = 0" in line for line in lines)


@pytest.mark.parametrize(
    "status, output, errors, finding",
    [
        (2, "", "error: no Triton", "exit status 2: error: no Triton"),
        (0, "table\nno json", "", "one JSON object"),
        (1, '{"kernels": []}', "Traceback", "without a violation"),
    ],
)
def test_a_static_table_that_could_not_be_made_is_an_error(
    monkeypatch, capsys, status: int, output: str, errors: str, finding: str
) -> None:
    fake_static(monkeypatch, status, output, errors)
    assert command.main(["kernels", "--without-gpu"]) == 2
    assert finding in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, finding",
    [
        (["--models", "GPT-2"], "kernels: --models must be among LLaDA-8B, Dream-7B,"),
        (["--ops", "attention"], "kernels: --ops must be among attention-decode,"),
        (["--without-gpu", "--no-static", "--targets", "90"], "--no-static leaves out the table"),
        (["--without-gpu", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--without-gpu", "--no-static", "--out", str(ROOT / "setup.py" / "below")], "--out"),
    ],
)
def test_wrong_options_of_kernels_are_named(capsys, options: list[str], finding: str) -> None:
    assert command.main(["kernels", *options]) == 2
    assert finding in capsys.readouterr().err


def test_options_of_the_static_table_are_refused_where_it_is_not_made(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.main(["kernels", "--targets", "90"]) == 2
    assert "kernels: --targets: of the form without a GPU" in capsys.readouterr().err


# Kernels on a GPU, at toy size on the CPU


def toy_rig() -> gpu_check.Rig:
    return gpu_check.Rig(
        device=CPU,
        facts={"device": "toy", "driver": "unknown", "versions": {"torch": torch.__version__}, "commit": "unknown"},
        ops=lambda: dlm_fast.REFERENCE,
        ceilings=lambda: CEILINGS,
        prepare=host_timer,
        sizes=dataclasses.replace(checks.TOY, every=9),
        shapes=shapes.TOY_SHAPES,
        l2_bytes=1000,
        replays=1,
        processes=0,
        compile_seconds=0,
    )


def test_a_sweep_checks_what_it_times_and_writes_its_document(tmp_path, capsys) -> None:
    status = sweep.measured(toy_rig(), tmp_path, ("unmask", "confidence"), seed=5, seconds=100, plots=False)
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert status == 0 and document == compare.load(tmp_path / "kernels.json")
    assert document["command"] == "kernels" and document["measured"] is True
    assert set(document["checks"]) == {"confidence", "unmask"}
    assert {row["op"] for row in document["timings"]} == {"unmask", "confidence"}
    assert lines.index("ceilings, measured now") < lines.index("correctness") < lines.index("gates")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "kernels.jsonl"]


def test_every_op_with_a_time_has_a_plot(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plots

    rows = [row("ours", 10.0, share=0.8, floor_us=8.0), row("theirs", 16.0, share=0.5, floor_us=8.0)]
    rows += [
        row("ours", 1.0) | {"shape": "B=9", "status": "FAILED"},
        row("ours", 1.0) | {"op": "step", "status": "SKIPPED"},
    ]
    (path,) = plots.draw(result(rows, commit="unknown"), tmp_path)
    assert path == tmp_path / "kernels_unmask.png" and path.read_bytes().startswith(b"\x89PNG")


def test_every_shape_has_a_name_of_its_own_and_a_floor() -> None:
    for chosen in (shapes.CHECK_SHAPES, shapes.SWEEP_SHAPES, shapes.TOY_SHAPES):
        listed = sweep.listed(chosen, tuple(gpu_check.TIMINGS))
        assert len({(s.op, s.model, s.label) for s in listed}) == len(listed)
        assert {s.op for s in listed} == set(gpu_check.TIMINGS)
        assert all(s.cost.floor_us(3.0, 790.0) > 0 and s.facts["kind"] for s in listed)


def toy_bench() -> Bench:
    return Bench(CPU, host_timer, timing.Budget(100, 0), CEILINGS, l2_bytes=1000, replays=1)


@pytest.mark.parametrize("form", speed_forms.FORMS)
def test_a_form_of_attention_that_ignores_its_form_is_not_timed(form: str) -> None:
    """An op that treats the cache or the window as if the form were not there fails the check of every form."""

    def ignores(q, k, v, k_cache, v_cache, window, **options):
        without = {"kept": None, "mode": "full"}
        if window.page_table is not None:
            without |= {
                "page_table": torch.arange(window.page_table.numel(), dtype=torch.int32).view_as(window.page_table)
            }
        options.pop("sliding_window", None)
        options |= {name: torch.ones_like(options[name]) for name in ("k_scale", "v_scale") if name in options}
        return dlm_fast.REFERENCE.block_attention(
            q, k, v, k_cache, v_cache, dataclasses.replace(window, **without), **options
        )

    model = dataclasses.replace(shapes.TOY_MODELS[0], reach=9)
    chosen = dataclasses.replace(shapes.TOY_SHAPES, models=(model,), forms=((2, 90),))
    broken = dataclasses.replace(dlm_fast.REFERENCE, block_attention=ignores)
    for ops, sound in ((dlm_fast.REFERENCE, True), (broken, False)):
        listed = {s.facts["form"]: s for s in speed_forms.shapes(toy_bench(), ops, chosen)}
        work = listed[form].build()
        if sound:
            work.check()
        else:
            with pytest.raises(Failure, match="out: error"):
                work.check()


# A bare checkout

BARE = """
import importlib.util, os, sys, traceback
sys.path.insert(0, {root!r})
import torch, triton
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM  # once for all
if importlib.util.find_spec("dlm_kernels"):
    sys.exit(77)
for what in {statements!r}:
    if (child := os.fork()) == 0:
        try:
            exec(what)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(what)
"""


def test_whatever_a_command_imports_is_found_from_a_bare_checkout() -> None:
    """Every module is the first import of a process of its own: no module may depend on what another one has put in
    place."""
    files = sorted(path for path in (ROOT / "bench").rglob("*.py") if path.stem not in ("conftest", "test_kernels"))
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    statements = [f"import {module}" for module in modules if module != "bench.plots" or sweep.has_matplotlib()]
    statements += ["from bench import sanitize; assert sanitize.kernel_names()"]
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    # Packages are found without what site.py adds for editable installs.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    script = BARE.format(root=str(ROOT), statements=statements)
    line = [sys.executable, "-S", "-c", script]
    done = subprocess.run(line, cwd=ROOT.parent, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("dlm-fast is installed by copy: nothing here is bare")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
