"""`python -m bench gpu-check`: its checks can fail, its statistics are right, and what it says is a document."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from bench_module import ROOT
from host_timer import host_timer

import dlm_fast
from bench import __main__ as command
from bench import compare, gpu_check, report, timing
from bench.checks import attention as check_attention
from bench.checks import decode as check_decode
from bench.checks import run as checks
from bench.checks import unmask as check_unmask
from bench.floors import cost
from bench.shapes import TOY_SHAPES
from bench.speed import slots as speed_slots
from bench.speed.run import Bench, Ceilings, Shape, Timing, Work, losses, time_shapes
from dlm_fast import REFERENCE
from dlm_kernels import testing

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_tb_s=2.0, gemm_tflop_s=500.0, empty_kernel_us=1.0, empty_graph_us=3.0, empty_launch_us=5.0)
FACTS = {"device": "toy", "driver": "unknown", "versions": {"torch": torch.__version__}, "commit": "unknown"}


@pytest.fixture(autouse=True)
def one_thread():
    """Toy tensors on a busy machine gain nothing from a second thread, which is mostly waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_case(seed: int, op: str, ops: dlm_fast.Ops, sizes: checks.Sizes = checks.TOY) -> list[checks.Check]:
    """Every check of `op` on data of that seed, as a longer campaign runs them."""
    return checks.run(op, gpu_check.CASES[op].cases(ops, CPU, dataclasses.replace(sizes, every=1), seed), CPU)


def rig(ops: dlm_fast.Ops) -> gpu_check.Rig:
    return gpu_check.Rig(
        device=CPU,
        facts=FACTS,
        ops=lambda: ops,
        ceilings=lambda: CEILINGS,
        prepare=host_timer,
        sizes=dataclasses.replace(
            checks.TOY, every=9
        ),  # leaves out the bitwise invariance that plain torch does not promise
        shapes=TOY_SHAPES,
        l2_bytes=1000,
        replays=1,
        processes=0,
        compile_seconds=0,
    )


def failures(done: list[checks.Check]) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in done if check.status == "FAILED"]


# The checks


@pytest.mark.skipif(torch.cuda.is_available(), reason="bfloat16 and full sizes are what gpu-check itself runs on a GPU")
def test_the_kernels_are_green_under_the_interpreter() -> None:
    done = gpu_check.check_all(dlm_fast.triton_ops(), CPU, checks.TOY, seed=3, say=print)
    assert list(done) == list(checks.OPS)
    assert all(report.is_green(of_op) for of_op in done.values()), [
        line for of_op in done.values() for line in failures(of_op)
    ]


def _wrong_token(logits, **arguments):
    result = REFERENCE.confidence(logits, **arguments)
    return result._replace(token=torch.where(result.token > 0, result.token - 1, result.token))


def _rounded_confidence(logits, **arguments):
    result = REFERENCE.confidence(logits, **arguments)
    return result._replace(confidence=result.confidence.half().float())


def _unwritten(logits, **arguments):
    result = REFERENCE.confidence(logits, **arguments)
    confidence = torch.empty_like(result.confidence)
    confidence[1:] = result.confidence[1:]
    return result._replace(confidence=confidence)


def _of_the_batch(logits, **arguments):
    """A confidence whose sums depend on the row's place in the batch."""
    result = REFERENCE.confidence(logits, **arguments)
    place = torch.arange(len(result.confidence))
    return result._replace(confidence=result.confidence * (1 + place * 2e-7))


@pytest.mark.parametrize(
    "broken, finding",
    [
        (_wrong_token, "token: "),
        (_rounded_confidence, "confidence: error"),
        (_unwritten, "NaN"),
        (_of_the_batch, "confidence, batch turned round"),
    ],
)
def test_a_broken_confidence_is_red(broken, finding: str) -> None:
    sizes = dataclasses.replace(checks.TOY, logits_dtypes=(torch.float32,), vocabs=())
    found = failures(random_case(0, "confidence", dataclasses.replace(REFERENCE, confidence=broken), sizes))
    assert any(finding in line for line in found), found


def _one_position_more(state, rule, inputs, *, kind):
    REFERENCE.unmask(state, rule, inputs, kind=kind)
    state.tokens[0, 0] += 1


def _beyond_the_row(state, rule, inputs, *, kind):
    REFERENCE.unmask(state, rule, inputs, kind=kind)
    state.tokens.as_strided((1,), (1,), state.tokens.storage_offset() + state.tokens.shape[1]).fill_(4)


@pytest.mark.parametrize(
    "broken, finding", [(_one_position_more, "state.tokens: 1 of"), (_beyond_the_row, "between the rows")]
)
def test_a_broken_unmask_is_red(broken, finding: str) -> None:
    case = next(check_unmask.cases(dataclasses.replace(REFERENCE, unmask=broken), CPU, checks.TOY, 0))
    (check,) = checks.run("unmask", [case], CPU)
    assert check.status == "FAILED" and finding in check.detail


def _last_key_unseen(q, k, v, k_cache, v_cache, window, *, scale):
    shorter = dataclasses.replace(window, kv_len=(window.kv_len - 1).clamp(min=0))
    return REFERENCE.block_attention(q, k, v, k_cache, v_cache, shorter, scale=scale)


def _stores_in_the_next_slot(q, k, v, k_cache, v_cache, window, *, scale):
    moved = dataclasses.replace(window, kv_slot=torch.where(window.kv_slot >= 0, window.kv_slot + 1, -1).int())
    return REFERENCE.block_attention(q, k, v, k_cache, v_cache, moved, scale=scale)


@pytest.mark.parametrize("broken, finding", [(_last_key_unseen, "out: error"), (_stores_in_the_next_slot, "k_cache: ")])
def test_a_broken_attention_is_red(broken, finding: str) -> None:
    ops = dataclasses.replace(REFERENCE, block_attention=broken)
    case = check_attention.case(ops, CPU, checks.TOY, 0, torch.float32, "full", D=16, G=7, cached=True)
    (check,) = checks.run("block_attention", [case], CPU)
    assert check.status == "FAILED" and finding in check.detail


def test_a_decode_that_draws_other_tokens_is_red() -> None:
    sizes = dataclasses.replace(checks.TOY, presets=1)
    (case,) = check_decode.cases(dataclasses.replace(REFERENCE, confidence=_wrong_token), CPU, sizes, 0)
    (check,) = checks.run("decode", [case], CPU)
    assert check.status == "FAILED" and "tokens differ" in check.detail


def _decoded(tokens: list[int], nfe: int) -> SimpleNamespace:
    rows = torch.tensor(tokens)[:, None]
    return SimpleNamespace(canvas=list(rows), unmask_step=list(torch.zeros_like(rows)), nfe=[nfe] * len(tokens))


def test_a_decode_may_differ_only_where_the_reference_decided_by_a_hair_and_in_half_of_the_rows_at_most() -> None:
    expected, hair, clear = _decoded([5, 6, 7, 8], 3), 1e-6, 0.5

    def compare(ours: SimpleNamespace, *gaps: float) -> None:
        watch = check_decode.Watch()
        watch.gap = torch.tensor(gaps)
        check_decode.compare(ours, expected, watch)

    compare(_decoded([5, 6, 7, 8], 3), hair, hair, hair, hair)
    compare(_decoded([5, 6, 9, 9], 3), clear, clear, hair, hair)
    with pytest.raises(testing.Failure, match="row 2: 1 tokens differ, NFE 3 instead of 3"):
        compare(_decoded([5, 6, 9, 9], 3), clear, clear, clear, hair)
    with pytest.raises(testing.Failure, match="row 0: 0 tokens differ, NFE 4 instead of 3"):
        compare(_decoded([5, 6, 7, 8], 4), clear, hair, hair, hair)
    with pytest.raises(testing.Failure, match="3 of 4 rows differ, where the reference decided by a hair"):
        compare(_decoded([5, 9, 9, 9], 3), hair, hair, hair, hair)


def test_guard_zones_see_a_write_past_the_end_and_outputs_start_poisoned() -> None:
    memory = testing.GuardedMemory()
    with testing.poisoned(memory):
        floats, integers = torch.empty(3, 5), torch.ones(2).new_empty(4, dtype=torch.int64)
    assert floats.isnan().all() and (integers == testing.POISON).all()
    memory.check()
    integers.as_strided((5,), (1,)).fill_(0)
    with pytest.raises(testing.Failure, match="8 bytes next to allocation 1"):
        memory.check()


def test_an_error_beyond_twice_torchs_own_is_a_failure_and_nan_never_passes() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    low = exact + 1e-3
    testing.no_worse_than_torch("x", exact + 1.9e-3, low, exact)
    with pytest.raises(testing.Failure, match="error 0.0021"):
        testing.no_worse_than_torch("x", exact + 2.1e-3, low, exact)
    with pytest.raises(testing.Failure, match="NaN"):
        testing.no_worse_than_torch("x", torch.tensor([1.0, math.nan]), low, exact)
    # A result of a 16-bit dtype may be off by two of its own roundings, also where torch hits the number: 2**-10 in [1,
    # 2), 2**-9 in [2, 4).
    exact = torch.tensor([1.75, 2.0], dtype=torch.float64)
    testing.no_worse_than_torch("x", torch.tensor([1.75 + 2**-10, 2 + 2**-9], dtype=torch.float16), exact, exact)
    with pytest.raises(testing.Failure, match="error 0.00195 against float64, torch's largest is 0 "):
        testing.no_worse_than_torch("x", torch.tensor([1.75 + 2**-9, 2], dtype=torch.float16), exact, exact)
    with pytest.raises(testing.Failure, match="error 1.01e-06 against"):
        testing.no_worse_than_torch(
            "x", torch.tensor([17 * 2**-24], dtype=torch.float16), torch.zeros(1), torch.zeros(1).double()
        )


def test_a_check_that_crashes_is_a_row_and_the_next_one_runs() -> None:
    def crash() -> None:
        raise RuntimeError("illegal\naddress")

    done = checks.run("confidence", [("a", crash), ("b", lambda: None)], CPU)
    assert [(c.status, c.detail) for c in done] == [("FAILED", "RuntimeError: illegal address"), ("passed", "")]


# The times


def test_percentiles_of_known_samples() -> None:
    assert timing.stats([5, 1, 2, 4, 3, 6]) == timing.Stats(p50=3.5, p20=2.0, p80=5.0, replays=6)
    assert timing.stats([7.0]) == timing.Stats(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="at least one sample"):
        timing.stats([])


def test_inputs_rotate_through_twice_the_l2_cache() -> None:
    assert timing.rotation(bytes_per_set=10, l2_bytes=101) == (21, True)
    assert timing.rotation(bytes_per_set=1000, l2_bytes=100) == (3, True)
    assert timing.rotation(bytes_per_set=1, l2_bytes=10**6) == (timing.MAX_SETS, False)


class FakeTimer:
    """Samples from a list instead of a clock; records the order in which candidates were sampled."""

    def __init__(self, samples: dict[str, list[float]]) -> None:
        self.samples = {name: iter(values) for name, values in samples.items()}
        self.order: list[str] = []

    def __call__(self, candidate: timing.Candidate):
        if candidate.name not in self.samples:
            raise NotImplementedError(f"{candidate.name} is not available")

        def sample() -> float:
            self.order.append(candidate.name)
            return next(self.samples[candidate.name])

        return sample


def test_candidates_are_sampled_in_turn_and_a_failing_one_is_a_row() -> None:
    timer = FakeTimer({"a": [1.0, 2.0, 3.0], "b": [9.0, 9.0]})
    candidates = [timing.Candidate(name, []) for name in ("a", "b", "c")] + [timing.Candidate("d", [], compiles=True)]
    outcomes = timing.measure(candidates, timer, timing.Budget(10, 0), replays=3)
    assert timer.order == ["a", "b", "a", "b", "a", "b"]
    assert outcomes["a"] == timing.Outcome("ok", timing.Stats(2.0, 1.4, 2.6, 3))
    assert [(name, o.status) for name, o in outcomes.items()] == [
        ("a", "ok"),
        ("b", "FAILED"),
        ("c", "FAILED"),
        ("d", "SKIPPED"),
    ]
    assert outcomes["c"].reason == "NotImplementedError: c is not available"


def fake_bench(samples: dict[str, list[float]], seconds: float = 10) -> Bench:
    return Bench(CPU, FakeTimer(samples), timing.Budget(seconds, 0), CEILINGS, l2_bytes=1, replays=1)


def test_rows_hold_share_speedup_noise_and_every_failure() -> None:
    def out_of_memory() -> Work:
        raise MemoryError("no room")

    def wrong() -> None:
        raise testing.Failure("out: error 1")

    work = Work(
        [timing.Candidate("ours", []), timing.Candidate("theirs", []), timing.Candidate("absent", [])],
        cost=cost(10e6),
        sets=3,
        cold=True,
    )
    bench = fake_bench({"ours": [10.0], "ours, again": [11.0], "theirs": [8.0]})
    rows = time_shapes(
        bench,
        [
            Shape("op", "m", "1", lambda: work, work.cost),
            Shape("op", "m", "2", out_of_memory, work.cost),
            Shape("op", "m", "3", lambda: work, work.cost, seconds=99),
            Shape("op", "m", "4", lambda: dataclasses.replace(work, check=wrong), work.cost),
        ],
    )
    assert [(r.shape, r.candidate, r.status) for r in rows] == [
        ("1", "ours", "ok"), ("1", "theirs", "ok"), ("1", "absent", "FAILED"),
        ("2", "ours", "FAILED"),
        ("3", "ours", "SKIPPED"),
        ("4", "ours", "FAILED"),
    ]  # fmt: skip
    assert (
        rows[1].share == pytest.approx(0.625)
        and rows[1].speedup == pytest.approx(0.8)
        and rows[1].noise == pytest.approx(0.1)
    )
    assert rows[3].reason == "MemoryError: no room" and rows[5].reason == "Failure: out: error 1"
    assert losses(rows) == [rows[1]]


def test_a_difference_within_the_noise_is_not_a_loss() -> None:
    row = Timing("op", "m", "1", "theirs", "ok", speedup=0.95, noise=0.06)
    assert losses([row]) == [] and losses([dataclasses.replace(row, noise=0.04)]) != []


# The command


def test_a_green_run_prints_its_document_last_and_exits_0(tmp_path, capsys) -> None:
    status = gpu_check.gpu_check(rig(REFERENCE), tmp_path, seed=5, seconds=100)
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert status == 0 and document == json.loads((tmp_path / "gpu-check.json").read_text())
    assert {
        "command",
        "schema",
        "measured",
        "ended",
        "ok",
        "time",
        "seconds",
        "seed",
        "device",
        "driver",
        "versions",
        "commit",
        "ceilings",
        "checks",
        "timings",
        "losses",
    } == set(document)
    assert document == compare.load(tmp_path / "gpu-check.jsonl")  # the lines of the run hold all of it
    assert (
        document["ended"] is True
        and document["ok"] is True
        and document["seed"] == 5
        and document["ceilings"] == dataclasses.asdict(CEILINGS)
    )
    assert {op: entry["green"] for op, entry in document["checks"].items()} == dict.fromkeys(checks.OPS, True)
    assert {row["op"] for row in document["timings"]} == set(gpu_check.TIMINGS)
    for row in document["timings"]:
        assert row["status"] in ("ok", "FAILED", "SKIPPED")
        assert ("p50_us" in row and "share" in row) if row["status"] == "ok" else row["reason"]
    # Ours has a time for every op: without one, a comparison would be empty.
    assert {(r["op"], r["status"]) for r in document["timings"] if r["candidate"] == "ours"} == {
        (op, "ok") for op in gpu_check.TIMINGS
    }
    assert lines.index("ceilings, measured now") < lines.index("correctness")


def test_a_red_op_is_not_timed_and_exits_1(tmp_path, capsys) -> None:
    broken = dataclasses.replace(REFERENCE, confidence=_wrong_token)
    status = gpu_check.gpu_check(rig(broken), tmp_path, seed=5, seconds=0)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 1 and document["ok"] is False
    assert {op: entry["green"] for op, entry in document["checks"].items()} == {
        "confidence": False, "unmask": True, "layers": True, "block_attention": True, "decode": False,
    }  # fmt: skip
    reasons = {row["op"]: row["reason"] for row in document["timings"]}
    assert (
        reasons["confidence"] == "correctness of confidence is red"
        and reasons["step"] == "correctness of confidence, decode is red"
    )
    assert reasons["unmask"].startswith("time budget")


def test_kernels_that_do_not_import_are_red(tmp_path, capsys) -> None:
    def missing() -> dlm_fast.Ops:
        raise ImportError("no module named attention")

    assert gpu_check.gpu_check(dataclasses.replace(rig(REFERENCE), ops=missing), tmp_path, seed=0, seconds=0) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["checks"]["block_attention"]["failed"] == {"import": "ImportError: no module named attention"}


def test_without_a_gpu_it_says_so_in_one_line_and_exits_2(tmp_path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu-check", "--out", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == "" and not out.exists()
    assert done.stderr == "gpu-check: needs a CUDA GPU, and torch sees none here; nothing was measured\n"


def test_under_the_interpreter_a_gpu_is_not_enough(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["gpu-check", "--out", str(tmp_path)]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_slots_are_timed_beside_static_batches_and_one_by_one_and_give_up_at_the_deadline(monkeypatch) -> None:
    rows: list = []
    bench = Bench(CPU, host_timer, timing.Budget(100, 0), CEILINGS, l2_bytes=1000, replays=5)
    time_shapes(bench, speed_slots.shapes(bench, REFERENCE, TOY_SHAPES), rows.extend)
    assert [(row.candidate, row.status, row.replays) for row in rows] == [
        ("ours", "ok", 1), ("static batches of 2", "ok", 1), ("one by one", "ok", 1),
    ]  # fmt: skip
    assert rows[0].shape == "5 requests, 2 slots, at most 12 new tokens" and rows[0].p50_us > rows[0].floor_us > 0

    late = speed_slots.Deadline(80.0, iter([0.0, 79.0, 81.0]).__next__)

    class Over(speed_slots.Deadline):
        def is_set(self) -> bool:
            return True

    monkeypatch.setattr(speed_slots, "Deadline", Over)
    rows.clear()
    time_shapes(bench, speed_slots.shapes(bench, REFERENCE, TOY_SHAPES), rows.extend)
    assert [row.status for row in rows] == ["FAILED"] and "cancelled" in rows[0].reason
    assert [late.is_set(), late.is_set()] == [False, True]
