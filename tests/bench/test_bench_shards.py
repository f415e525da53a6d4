"""The checks in processes side by side: what breaks a process costs that process and is named, and a run that is cut
off loses nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import shard_jobs
import torch
from bench_module import ROOT
from host_timer import host_timer

import dlm_fast
from bench import __main__ as command
from bench import compare, gpu_check, record, report, shards, timing
from bench.checks import run as checks
from bench.floors import cost
from bench.shapes import TOY_SHAPES
from bench.speed import run as speed
from bench.speed.run import Ceilings, Timing

FACTS = {"device": "toy", "driver": "unknown", "versions": {"torch": torch.__version__}, "commit": "unknown"}
CEILINGS = Ceilings(copy_tb_s=2.0, gemm_tflop_s=500.0, empty_kernel_us=1.0, empty_graph_us=3.0, empty_launch_us=5.0)


@pytest.fixture(autouse=True)
def found_by_processes(monkeypatch) -> None:
    """A process finds `bench` where this process would look for it."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])


# Processes


def events(words: list[str], processes: int, **options) -> list[shards.Event]:
    jobs = [shards.Job(word.split()[0], word) for word in words]
    options = {"job_seconds": 60, **options}
    return list(shards.run(jobs, functools.partial(shard_jobs.make, words), processes=processes, **options))


def outcomes(found: list[shards.Event], words: list[str]) -> dict[str, str]:
    """How every job ended. Each job ends once, and after it began."""
    ends = [event for event in found if event.kind != "begun"]
    assert sorted(event.index for event in ends) == list(range(len(words)))
    for event in ends:
        begun = [start for start in found if (start.kind, start.index) == ("begun", event.index)]
        assert len(begun) == (event.kind != "not run")
        assert all(found.index(start) < found.index(event) for start in begun)
    return {words[event.index]: event.reason or event.kind for event in ends}


def test_a_job_that_ends_its_process_is_named_and_the_others_go_on_behind_it() -> None:
    words = ["fine 1", "exits", "crashes", "fine 2", "raises", "fine 3"]
    found = events(words, processes=2)
    assert outcomes(found, words) == {
        "fine 1": "ended", "fine 2": "ended", "fine 3": "ended", "exits": "its process died: exit status 7",
        "crashes": "its process died: SIGKILL", "raises": "its process died: exit status 1",
    }  # fmt: skip


def test_a_job_that_hangs_is_ended_and_the_others_go_on_behind_it() -> None:
    words = ["hangs", "fine 1", "fine 2"]
    started = time.monotonic()
    found = events(words, processes=1, job_seconds=1)
    assert time.monotonic() - started < 30
    assert outcomes(found, words) == {
        "hangs": "no end after 1 s: its process was killed", "fine 1": "ended", "fine 2": "ended",
    }  # fmt: skip


def test_a_job_that_ended_while_others_were_attended_to_is_no_time_out() -> None:
    words = [f"fine {n}" for n in range(6)]
    found = []
    for event in shards.run(
        [shards.Job("fine", word) for word in words],
        functools.partial(shard_jobs.make, words),
        processes=3,
        job_seconds=1,
    ):
        found.append(event)
        time.sleep(0.6)  # two such, and a second is over
    assert set(outcomes(found, words).values()) == {"ended"}


def test_a_process_that_a_job_left_unsound_is_not_used_again() -> None:
    found = events(["fine 1", "breaks", "fine 2", "fine 3"], processes=1)
    first, breaks, second, third = (event.result[1] for event in found if event.kind == "ended")
    assert first == breaks != second == third


def test_a_group_that_breaks_process_after_process_is_left_out() -> None:
    words = [*(f"exits {n}" for n in range(4)), "fine"]
    found = outcomes(events(words, processes=1, most_lost=2), words)
    assert [found[word] for word in words] == ["its process died: exit status 7"] * 2 + [
        "2 others of exits broke their process"
    ] * 2 + ["ended"]


def test_where_no_process_can_start_no_job_is_run_and_the_reason_is_said() -> None:
    words = ["fine", "cannot start"]
    found = outcomes(events(words, processes=2), words)
    assert set(found.values()) == {"no process is left to run it: ImportError: no kernels here"}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_no_process_outlives_the_one_that_started_it(tmp_path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import functools, multiprocessing, sys\n"
        f"sys.path[:0] = {[str(ROOT), str(ROOT / 'tests' / 'support')]!r}\n"
        "import shard_jobs\n"
        "from bench import shards\n"
        "if __name__ == '__main__':\n"
        "    make = functools.partial(shard_jobs.make, ['hangs'])\n"
        "    for event in shards.run([shards.Job('', 'hangs')], make, processes=1, job_seconds=60):\n"
        "        print(multiprocessing.active_children()[0].pid, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as run:
        child = int(run.stdout.readline())
        assert alive(child)
        run.kill()
    deadline = time.monotonic() + 20
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(child)


# Checks in processes


def rig(words: dict[str, list[str]], **changes) -> gpu_check.Rig:
    return gpu_check.Rig(
        device=torch.device("cpu"),
        facts=FACTS,
        ops=shard_jobs.reference_ops,
        ceilings=lambda: CEILINGS,
        prepare=host_timer,
        sizes=checks.TOY,
        shapes=TOY_SHAPES,
        l2_bytes=1000,
        replays=1,
        compile_seconds=0,
        cases=functools.partial(shard_jobs.cases, words),
        **{"processes": 2, "case_seconds": 60} | changes,
    )


WORDS = {
    "confidence": ["fine 1", "fine 2"], "unmask": ["raises", "fine"],
    "layers": ["fine"],
    "block_attention": ["fine", "exits"], "decode": ["fine", "hangs"],
}  # fmt: skip


def test_what_raises_dies_or_hangs_is_red_by_name_and_only_green_ops_are_timed(tmp_path, capsys) -> None:
    wanted = ("unmask", "confidence", "attention-prefill")
    status = gpu_check.gpu_check(rig(WORDS, case_seconds=3), tmp_path, seed=5, seconds=100, wanted=wanted)
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert status == 1 and document["ended"] is True
    found = document["checks"]
    assert {op: (entry["green"], entry["passed"], entry["failed"]) for op, entry in found.items()} == {
        "confidence": (True, ["fine 1", "fine 2"], {}),
        "unmask": (False, ["fine"], {"raises": "RuntimeError: an illegal address"}),
        "layers": (True, ["fine"], {}),
        "block_attention": (False, ["fine"], {"exits": "its process died: exit status 7"}),
        "decode": (False, ["fine"], {"hangs": "no end after 3 s: its process was killed"}),
    }
    assert [(row["op"], row["status"]) for row in document["timings"] if row["candidate"] == "ours"] == [
        ("unmask", "SKIPPED"), ("confidence", "ok"), ("confidence", "ok"), ("confidence", "ok"), ("confidence", "ok"),
        ("confidence", "ok"), ("attention-prefill", "SKIPPED"),
    ]  # fmt: skip
    # There is a line as a case begins, and one as the case ends, in the order of what happened.
    assert lines.index("begins  unmask  raises") < lines.index(
        next(line for line in lines if line.startswith("FAILED  unmask  raises"))
    )
    assert any(line.startswith("passed  confidence  fine 1  ") for line in lines)
    assert (
        json.loads((tmp_path / "gpu-check.json").read_text()) == document == compare.load(tmp_path / "gpu-check.jsonl")
    )


CUT_OFF = """
import sys
sys.path[:0] = [{root!r}, {tests!r}, {support!r}]
import test_bench_shards as t
from pathlib import Path
if __name__ == "__main__":
    words = t.WORDS | {{"unmask": ["fine"], "block_attention": ["fine"]}}
    t.gpu_check.gpu_check(t.rig(words, processes=0), Path({out!r}), seed=5, seconds=100)
"""


def test_a_run_that_is_killed_leaves_every_finished_check_and_can_be_reported(tmp_path, capsys) -> None:
    script, file = tmp_path / "run.py", tmp_path / "gpu-check.jsonl"
    script.write_text(
        CUT_OFF.format(
            root=str(ROOT), tests=str(Path(__file__).parent), support=str(ROOT / "tests" / "support"), out=str(tmp_path)
        )
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL, env=environment) as run:
        deadline = time.monotonic() + 120
        while not (file.exists() and file.read_text().count('"line":"check",') == 6) and time.monotonic() < deadline:
            time.sleep(0.2)
        run.send_signal(signal.SIGKILL)
    assert not (tmp_path / "gpu-check.json").exists()
    status = command.main(["report", str(file)])
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert status == 1 and document["ended"] is False and document["ok"] is False
    assert {op: entry["green"] for op, entry in document["checks"].items()} == {
        "confidence": True, "unmask": True, "layers": True, "block_attention": True, "decode": False,
    }  # fmt: skip
    assert document["checks"]["decode"]["not_run"] == {"hangs": "began, and never ended"}
    assert "    not run, began, and never ended: hangs" in lines and lines[-2].endswith("cut off")
    assert command.main(["gates", str(file)]) == 0  # nothing is missed: nothing is measured
    assert "0 missed" in capsys.readouterr().out
    (tmp_path / "latin").write_bytes(b"\xe4\n")
    assert command.main(["report", str(tmp_path / "latin")]) == 2
    assert "latin: line 1 must be one of a run's" in capsys.readouterr().err


# The lines of a run


def recorded(path: Path) -> record.Record:
    """A run with a green op, an op that has not ended, and times of one shape out of three."""
    run = record.Record(path)
    run.begin("gpu-check", "2026-01-01", 5, FACTS)
    run.measured(CEILINGS)
    run.plan_checks("unmask", ["a", "b"])
    run.plan_checks("confidence", ["a"])
    for name in ("a", "b"):
        run.begin_check("unmask", name)
    run.check(checks.Check("unmask", "a", "passed", "", 0.1))
    run.plan_timings([("unmask", "any", "1"), ("unmask", "any", "2"), ("unmask", "any", "3")])
    run.begin_timing("unmask", "any", "1")
    run.timing(
        Timing("unmask", "any", "1", "ours", "ok", p50_us=1.234567, p20_us=1.0, p80_us=2.0, share=0.5, speedup=1.0)
    )
    run.begin_timing("unmask", "any", "2")
    return run


def test_a_run_that_was_cut_off_has_a_row_for_everything_it_did_not_come_to(tmp_path) -> None:
    file = tmp_path / "run.jsonl"
    recorded(file)
    with file.open("a") as stream:
        stream.write('{"line":"timing","at":3,"op":"unm')  # cut off in the middle of a line
    found = record.read(file)
    document = found.document()
    assert document["checks"]["unmask"]["not_run"] == {"b": "began, and never ended"} and not document["ok"]
    assert document["checks"]["confidence"]["not_run"] == {"a": "never began"}
    assert [(row["shape"], row["status"], row.get("reason")) for row in document["timings"]] == [
        ("1", "ok", None), ("2", "SKIPPED", "began, and the run was cut off"), ("3", "SKIPPED", "the run was cut off"),
    ]  # fmt: skip
    assert document["timings"][0]["p50_us"] == 1.2346
    text = found.lines()
    assert any(line.startswith("unmask           RED       1 passed") and "1 not run" in line for line in text)
    assert any(line.startswith("  ours") and "1.235" in line for line in text)


@pytest.mark.parametrize(
    "text, finding", [("", "got none that begins one"), ("{\n", "line 1 must be one of a run's, got '{'")]
)
def test_what_holds_no_lines_of_a_run_is_refused(tmp_path, capsys, text: str, finding: str) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(text)
    for name in ("report", "gates"):
        assert command.main([name, str(file)]) == 2
        assert finding in capsys.readouterr().err


def test_a_check_that_was_not_run_is_not_green() -> None:
    passed = checks.Check("unmask", "a", "passed", "", 0.1)
    assert report.is_green([passed]) and not report.is_green(
        [passed, dataclasses.replace(passed, status=checks.NOT_RUN)]
    )


def test_after_the_gpu_stopped_to_answer_no_row_has_a_time(monkeypatch) -> None:
    def illegal() -> speed.Work:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(speed, "sound", lambda device: False)
    bench = speed.Bench(torch.device("cpu"), host_timer, timing.Budget(100, 0), CEILINGS, l2_bytes=1, replays=1)
    rows = speed.time_shapes(bench, [speed.Shape("op", "m", label, illegal, cost(1.0)) for label in ("1", "2")])
    assert [(row.status, row.reason) for row in rows] == [
        ("FAILED", "RuntimeError: illegal memory access"),
        ("SKIPPED", "the GPU does not answer this process since op m 1"),
    ]


@pytest.mark.parametrize(
    "options, finding",
    [
        (["--times", "attention"], "gpu-check: --times must be among attention-decode,"),
        (["--processes", "-1"], "--processes must be at least 0, got -1"),
        (["--case-seconds", "-1"], "--case-seconds must be at least 0, got -1.0"),
    ],
)
def test_wrong_options_of_gpu_check_are_named(capsys, tmp_path, options: list[str], finding: str) -> None:
    assert command.main(["gpu-check", "--out", str(tmp_path), *options]) == 2
    assert finding in capsys.readouterr().err


def test_every_check_of_a_gpu_has_a_name_of_its_own() -> None:
    arguments = dlm_fast.REFERENCE, torch.device("cuda"), checks.GPU, 1
    cases_by_name = {}  # two cases of one name draw the same numbers, so they must be the same case
    for op, module in gpu_check.CASES.items():
        for name, case in module.cases(*arguments):
            assert cases_by_name.setdefault((op, name), repr(case.args)) == repr(case.args)
    assert [(op, name) for op, (name, _) in gpu_check.cases_of(*arguments)] == list(cases_by_name)
    assert len(cases_by_name) > 500 and {op for op, _ in cases_by_name} == set(checks.OPS)
