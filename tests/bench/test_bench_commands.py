"""`python -m bench kernels, compare, gates, sanitize`: what they compute, refuse and write, without a GPU."""

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
from host_timer import host_timer

import dlm_fast
from bench import __main__ as command
from bench import compare, floors, gates, gpu_check, sanitize, shapes, sweep, timing
from bench.checks import run as checks
from bench.speed import attention as speed_attention
from bench.speed import forms as speed_forms
from bench.speed import ops as speed_ops
from bench.speed import step as speed_step
from bench.speed import unmask_forms as speed_unmask_forms
from bench.speed.run import Bench, Ceilings
from dlm_kernels.testing import Failure

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_tb_s=2.0, gemm_tflop_s=500.0, empty_kernel_us=1.0, empty_graph_us=3.0, empty_launch_us=5.0)


# ---- floors


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
    """Milliseconds, computed apart from this code and rounded more coarsely."""
    step = floors.step(model, B, prefix)
    for card, expected in (("H100", h100), ("H200", h200)):
        assert step.floor_us(*floors.CARDS[card]) / 1e3 == pytest.approx(expected, rel=0.02)


# ---- kernels without a GPU


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


STATIC_ROW = {
    "kernel": "confidence", "config": "bf16 second", "target": "sm_90", "tiles": {},
    "registers": 40, "spills": 0, "stack_bytes": 0, "shared_bytes": 1024, "tensor_memory": 0,
    "mma": "none", "instructions_per_element": 9.5, "widest_load": 128,
}  # fmt: skip


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
    assert (
        "| confidence | bf16 second | sm_90 | 40 | 0 | 1024 | none | 9.50 |"
        in (tmp_path / "kernels_static.md").read_text()
    )


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


# ---- kernels on a GPU, at toy size on the CPU


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


# ---- gates


def timings(chosen: shapes.Shapes, speedups: dict[str, float], share: float = 0.9) -> list[dict]:
    """A row for every candidate that a gate asks for, at every shape: ours at `share` of the measured ceiling."""
    rows = []
    for shape in sweep.listed(chosen, tuple(gpu_check.TIMINGS)):
        ours = shape.cost.floor_us(2.0, 500.0) / share
        for candidate, speedup in {"ours": 1.0, **speedups}.items():
            row = {"op": shape.op, "model": shape.model, "shape": shape.label, "candidate": candidate, "status": "ok"}
            row |= {
                "p50_us": ours * speedup,
                "p20_us": ours * speedup,
                "p80_us": ours * speedup,
                "share": share / speedup,
            }
            row |= {
                "nbytes": shape.cost.nbytes,
                "flops": shape.cost.flops,
                "facts": shape.facts,
                "graph": True,
                "noise": 0.01,
            }
            rows.append(row)
    return rows


SPEEDUPS = {
    speed_attention.UNSPLIT: 6.0, speed_attention.DENSE: 1.9, speed_attention.FLEX: 1.5, speed_ops.EAGER: 4.0,
    speed_ops.FLOAT64: 12.0, speed_ops.LOOP: 300.0, speed_step.PUBLISHED: 3.0,
    speed_unmask_forms.MEMORY: 1.2, speed_unmask_forms.MEMORY_OF_LONG_REGIONS: 1.1,
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


def test_the_sweep_has_rows_for_every_gate_that_times_can_meet() -> None:
    judged = gates.evaluate(result(timings(shapes.SWEEP_SHAPES, SPEEDUPS)))
    assert [g.rule for g in judged if g.verdict == gates.NOT_MEASURED] == [
        "share of copy bandwidth >= 0.65, bf16 on H200", "one launch",
        "instructions an element <= 10.5", "violations = 0", "targets = 6",
    ]  # fmt: skip
    # At 0.9 of a ceiling of 2 TB/s, 32 rows of 262,144 ids take more than 8 us; all else is met.
    assert [g.rule for g in judged if g.verdict == gates.MISSED] == ["<= 8 us in a graph"]


def test_a_gate_is_judged_by_its_worst_row() -> None:
    rows = timings(shapes.SWEEP_SHAPES, SPEEDUPS)
    goal, rule = "decode attention, >= 30 MB KV a layer", "share of copy bandwidth >= 0.75 at 0 < W x G <= 64"

    def gate() -> gates.Gate:
        return next(g for g in gates.evaluate(result(rows)) if (g.goal, g.rule) == (goal, rule))

    assert gate().verdict == gates.MET and gate().value == pytest.approx(0.9)
    ours = {r["shape"]: r for r in rows if r["model"] == "LLaDA-8B" and r["candidate"] == "ours"}
    slow = ours["decode B=8 prefix=4096 window=32"]
    slow["p50_us"] *= 0.9 / 0.74
    assert gate().verdict == gates.MISSED and gate().value == pytest.approx(0.74)
    assert "LLaDA-8B decode B=8 prefix=4096" in gate().detail
    slow["status"] = "FAILED"  # no time of ours: no row of the gate's
    assert gate().verdict == gates.MET
    ours["decode B=1 prefix=1024 window=32"]["p50_us"] *= 10  # below 30 MB: not this gate's
    assert gate().verdict == gates.MET


@pytest.mark.parametrize(
    "candidate, goal",
    [
        (speed_attention.FLEX, "compiled FlexAttention / ours >= 1.0"),
        (speed_attention.UNSPLIT, "our unsplit form / ours >= 5 at 4 KV heads"),
        (speed_ops.FLOAT64, "float64 form / ours >= 10"),
        (speed_ops.LOOP, "loop over rows / ours >= 100 at B = 8"),
    ],
)
def test_a_gate_whose_baseline_has_no_time_is_not_met(candidate: str, goal: str) -> None:
    left = {name: speedup for name, speedup in SPEEDUPS.items() if name != candidate}
    judged = gates.evaluate(result(timings(shapes.SWEEP_SHAPES, left)))
    assert next(g for g in judged if g.rule == goal).verdict == gates.NOT_MEASURED
    judged = gates.evaluate(result(timings(shapes.SWEEP_SHAPES, left | {candidate: 0.9})))
    assert next(g for g in judged if g.rule == goal).verdict == gates.MISSED


def test_a_step_with_fewer_layers_is_not_the_step_of_the_gate() -> None:
    rows = timings(shapes.SWEEP_SHAPES, SPEEDUPS)
    for row in rows:
        row["note"] = f"20 of 32 {speed_step.FEWER_LAYERS}"
    judged = [g for g in gates.evaluate(result(rows)) if g.goal.startswith("denoise step")]
    assert [g.verdict for g in judged] == [gates.NOT_MEASURED] * 2


def test_static_gates_need_every_target_and_kernel() -> None:
    targets = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    static = {"kernels": [STATIC_ROW | {"target": target} for target in targets], "violations": [], "only": []}

    def verdicts(static: dict) -> list[str]:
        return [g.verdict for g in gates.evaluate({"static": static}) if g.goal == "static"]

    assert verdicts(static) == [gates.MET] * 3
    assert verdicts(static | {"only": ["confidence"]}) == [gates.MET, gates.MET, gates.NOT_MEASURED]
    assert verdicts(static | {"kernels": static["kernels"][:3], "violations": ["x: spills must be 0"]}) == [
        gates.NOT_MEASURED, gates.MISSED, gates.NOT_MEASURED,
    ]  # fmt: skip
    static["kernels"].append(STATIC_ROW | {"instructions_per_element": 10.6, "config": "bf16 everything"})
    assert verdicts(static)[0] == gates.MISSED


def test_the_names_that_gates_look_for_are_those_that_are_timed() -> None:
    modules = {
        "UNSPLIT DENSE FLEX": speed_attention,
        "EAGER FLOAT64 LOOP": speed_ops,
        "PUBLISHED FEWER_LAYERS": speed_step,
    }
    for names, module in modules.items():
        assert [getattr(gates, name) for name in names.split()] == [getattr(module, name) for name in names.split()]
    assert gates.FROM_MEMORY == (speed_unmask_forms.MEMORY, speed_unmask_forms.MEMORY_OF_LONG_REGIONS)


def test_gates_of_a_file_are_a_table_and_an_exit_status(tmp_path, capsys) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps(result([])))
    assert command.main(["gates", str(file)]) == 0
    assert "0 met, 0 missed" in capsys.readouterr().out
    file.write_text(json.dumps(result(timings(shapes.SWEEP_SHAPES, SPEEDUPS, share=0.1))))
    assert command.main(["gates", str(file)]) == 1
    assert command.main(["gates", str(tmp_path / "absent.json")]) == 2
    assert "absent.json: No such file" in capsys.readouterr().err


# ---- compare


def row(candidate: str, p50: float, noise: float = 0.02, **changes) -> dict:
    shape = {"op": "unmask", "model": "any", "shape": "B=8", "candidate": candidate, "status": "ok", "noise": noise}
    return shape | {"p50_us": p50, "p20_us": p50, "p80_us": p50} | changes


def compared(tmp_path, capsys, a: dict, b: dict, *options: str) -> tuple[int, str, str]:
    for name, document in (("a", a), ("b", b)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    status = command.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *options])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    "p50, options, status", [(10.8, (), 0), (11.2, (), 1), (11.2, ("--tolerance", "0.1"), 0), (5.0, (), 0)]
)
def test_slower_means_beyond_the_noise_of_both_and_the_tolerance(
    tmp_path, capsys, p50: float, options: tuple, status: int
) -> None:
    found = compared(tmp_path, capsys, result([row("ours", 10.0)]), result([row("ours", p50)]), *options)
    assert found[0] == status
    assert f"{p50 / 10:7.3f}    4.0%         10 {p50:10.4g}" in found[1]


def test_the_spread_of_a_row_counts_as_noise_if_it_is_larger() -> None:
    wide = row("ours", 10.0, p20_us=8.0, p80_us=12.0)
    (pair,) = compare.compare(result([wide]), result([row("ours", 12.0)])).pairs
    assert pair.noise == pytest.approx(0.22) and pair.verdict(0.0) == "same"


def test_rows_of_one_file_alone_are_listed_and_one_that_fails_now_exits_1(tmp_path, capsys) -> None:
    a = result([row("ours", 10.0), row("old", 9.0), row("gone", 5.0)])
    b = result([row("ours", 10.0), row("new", 9.0), row("gone", 5.0) | {"status": "FAILED", "reason": "no room"}])
    status, out, _ = compared(tmp_path, capsys, a, b)
    assert status == 1 and "FAILED in B, timed in A: unmask  any  B=8  gone: no room" in out
    assert "only in A: unmask  any  B=8  old" in out and "only in B: unmask  any  B=8  new" in out


@pytest.mark.parametrize("changes", [{"device": "NVIDIA H200"}, {"versions": {"torch": "2.14.0"}}, {"driver": "2"}])
def test_another_machine_is_said_and_compared_only_when_asked_to(tmp_path, capsys, changes: dict) -> None:
    files = result([row("ours", 10.0)]), result([row("ours", 99.0)], **changes)
    status, out, _ = compared(tmp_path, capsys, *files)
    assert (
        status == 2
        and f"the machines differ in {next(iter(changes))}: " in out
        and "no ratios" in out
        and "9.9" not in out
    )
    status, out, _ = compared(tmp_path, capsys, *files, "--across-devices")
    assert status == 1 and "9.900" in out and "the machines differ" in out


@pytest.mark.parametrize(
    "changes, finding",
    [
        ({"schema": 1}, "schema must be 2, got 1"),
        ({"command": "quality"}, "command must be one of kernels, gpu-check, got 'quality'"),
        ({"command": "gpu-check"}, "both files must be of one command, got A: kernels, B: gpu-check"),
        ({"measured": False}, "B must hold measured times"),
    ],
)
def test_files_that_cannot_be_compared_are_refused_by_name(tmp_path, capsys, changes: dict, finding: str) -> None:
    status, out, errors = compared(tmp_path, capsys, result([row("ours", 1.0)]), result([row("ours", 1.0)], **changes))
    assert status == 2 and out == "" and errors.startswith("compare: ") and finding in errors


def test_what_is_no_result_file_or_no_tolerance_is_refused(tmp_path, capsys) -> None:
    file = tmp_path / "a.json"
    file.write_text("{")
    assert command.main(["compare", str(file), str(file)]) == 2
    assert "must be JSON" in capsys.readouterr().err
    file.write_text("[]")
    assert command.main(["compare", str(file), str(file)]) == 2
    assert "got 'list'" in capsys.readouterr().err
    assert command.main(["compare", str(file), str(file), "--tolerance", "-1"]) == 2
    assert "--tolerance must be at least 0, got -1" in capsys.readouterr().err


# ---- sanitize

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


# ---- a bare checkout

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
    """Each module first in a process of its own: none may hang on what another has put in place."""
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
