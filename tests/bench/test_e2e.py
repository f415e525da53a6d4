"""`python -m bench e2e`: what it holds ours to, prints and writes, on models of a layer."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench import __main__ as command
from bench import batch, decoders, e2e, e2e_report, timing, turns
from bench.e2e import Compared
from bench.loops import Loop, Task

SMALL = ["--layers", "1", "--hidden", "64", "--vocab", "96", "--prompt", "7", "--new-tokens", "32", "--per-step", "8"]
RATIOS = [
    "tokens_per_s_vs_recompute_b1",
    "tokens_per_s_vs_recompute_b8",
    "tokens_per_s_vs_recompute_b8_slots",
    "tokens_per_s_vs_cached_b1",
    "tokens_per_s_vs_cached_b8",
    "tokens_per_s_vs_cached_b8_slots",
    "together_over_alone",
    "computed_over_needed",
    "slots_over_static",
]


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Few bare forwards, and short requests of mixed lengths."""
    monkeypatch.setattr(decoders, "BARE_SECONDS", 0.0)
    monkeypatch.setattr(batch, "MEDIAN", 12)


def run(capsys, *options: str) -> tuple[int, list[str]]:
    status = command.main(["e2e", *SMALL, "--turns", "1", "--mixed", "3", "--slot-mixed", "9", *options])
    return status, capsys.readouterr().out.splitlines()


def test_every_decoder_has_a_time_and_the_last_line_is_the_ratios(tmp_path, capsys):
    status, lines = run(capsys, "--rows", "1", "8", "--json", "--out", str(tmp_path))
    ratios = json.loads(lines[-1])
    assert status == 0 and list(ratios) == ["ratios"] and list(ratios["ratios"]) == RATIOS
    assert all(value > 0 for value in ratios["ratios"].values()) and ratios["ratios"]["computed_over_needed"] >= 1

    written = [json.loads(line) for line in (tmp_path / "e2e.jsonl").read_text().splitlines()]
    rows = [row for row in written if row["line"] == "row"]
    assert [row["line"] for row in written][:1] == ["run"] and written[-1]["ratios"] == ratios["ratios"]
    assert {(row["visibility"], row["rows"]) for row in rows} == {("full", 1), ("full", 8), ("block", 1), ("block", 8)}
    for row in rows:
        assert row["status"] == "ok" and row["tokens_per_s"] > 0 and row["forwards"] > 0
        assert row["ms_per_step"] == pytest.approx(1000 * row["seconds"][0] / row["forwards"], rel=1e-3)
        assert row["forward_ms"] >= 0 and ("ops" in row) == (row["kind"] == "ours")
    assert {row["candidate"] for row in rows if row["kind"] == "greedy"} == set(decoders.GREEDY)
    slotted = {(row["candidate"], row["rows"]) for row in rows if "slots" in row["candidate"]}
    presets = ("llada", "fast-dllm-prefix", "fast-dllm-dual", "sdar")
    assert slotted == {(f"ours, {preset}, 8 slots", 8) for preset in presets}
    (mixed,) = [row for row in written if row["line"] == "slots"]
    assert (mixed["slots"], mixed["requests"], mixed["status"]) == (8, 9, "ok")
    checks = [row for row in written if row["line"] == "check"]
    assert len(checks) == 4 and all(reason is None for row in checks for reason in row["wrong"].values())
    assert sum(row["line"] == "sample" for row in written) == len(rows)
    assert "where we lose" in lines and any("beside dual cache: the same tokens" in line for line in lines)


def test_ours_has_no_time_if_it_writes_other_tokens(tmp_path, capsys, monkeypatch):
    right = decoders.decode_ours

    def wrong(model, task: Task, published, forwards) -> torch.Tensor:
        tokens = right(model, task, published, forwards)
        tokens[0, -1] += published.preset == "fast-dllm-dual"
        return tokens

    monkeypatch.setattr(decoders, "decode_ours", wrong)
    status, lines = run(capsys, "--rows", "1", "--visibility", "full", "--json", "--out", str(tmp_path))
    assert status == 1
    (line,) = [line for line in lines if line.startswith("    ours, fast-dllm-dual")]
    assert "FAILED: row 0: 1 tokens differ from the loop's" in line
    assert any(line.startswith("    ours, fast-dllm-prefix / prefix cache") for line in lines)
    assert not any("ours, fast-dllm-dual /" in line for line in lines)
    assert json.loads(lines[-1])["ratios"]["tokens_per_s_vs_cached_b1"] is None
    assert "    (3 comparisons without a time: FAILED or SKIPPED above)" in lines


def test_slots_have_no_time_if_they_write_other_tokens(capsys, monkeypatch):
    right = decoders.decode_slots

    def wrong(session, task: Task) -> tuple[torch.Tensor, int]:
        tokens, forwards = right(session, task)
        tokens[0, -1] += 1
        return tokens, forwards

    monkeypatch.setattr(e2e, "decode_slots", wrong)
    status, lines = run(capsys, "--rows", "8", "--visibility", "block", "--json", "--slot-mixed", "0")
    ratios = json.loads(lines[-1])["ratios"]
    assert status == 1 and any("sdar, 8 slots" in line and "FAILED: beside" in line for line in lines)
    assert ratios["tokens_per_s_vs_recompute_b8_slots"] is None and ratios["tokens_per_s_vs_recompute_b8"] > 0
    assert ratios["slots_over_static"] is None


def test_what_was_timed_is_held_to_the_loop_as_well(capsys, monkeypatch):
    right = decoders.decode_ours

    def wrong_if_timed(model, task: Task, published, forwards) -> torch.Tensor:
        tokens = right(model, task, published, forwards)
        tokens[0, -1] += task.new_tokens > 32
        return tokens

    monkeypatch.setattr(e2e, "decode_ours", wrong_if_timed)
    monkeypatch.setattr(decoders, "SHORT_BLOCKS", 1)
    status, lines = run(capsys, "--rows", "1", "--visibility", "block", "--new-tokens", "64")
    assert status == 1 and any("FAILED: beside recompute: row 0: 1 tokens differ" in line for line in lines)


def test_in_16_bits_the_tokens_are_checked_on_float32_alone(capsys):
    status, lines = run(capsys, "--rows", "2", "--visibility", "full", "--dtype", "bfloat16")
    assert status == 0 and lines[0].startswith("random 1x64 (full), 1 layers, float32, B=2, beside recompute: the same")
    assert any(line.startswith("    ours, llada / recompute") for line in lines)


def test_what_there_is_no_time_for_is_skipped(capsys):
    status, lines = run(capsys, "--rows", "1", "--visibility", "full", "--seconds", "0", "--json")
    assert status == 0 and "random 1x64 (full), B=1: SKIPPED, time budget" in lines
    assert set(json.loads(lines[-1])["ratios"].values()) == {None}
    assert "    nowhere in what was measured" in lines


def test_the_embedded_models_are_decoded_too(capsys):
    options = [
        "--model",
        "tiny",
        "--prompt",
        "8",
        "--new-tokens",
        "32",
        "--rows",
        "1",
        "--turns",
        "1",
        "--slot-mixed",
        "0",
        "--seconds",
        "60",
    ]
    assert command.main(["e2e", *options]) == 0
    out = capsys.readouterr().out
    assert "tiny-full (full), B=1, ours by" in out and "tiny-block (block), B=1, ours by" in out


class Decided(Loop):
    """A loop that is over: its tokens and the gaps of its decisions."""

    def __init__(self, tokens: torch.Tensor, gap: list[float]) -> None:
        self.tokens, self.gap = tokens, torch.tensor(gap)


def test_a_row_may_differ_behind_a_near_tie_and_half_of_the_rows_must_be_equal():
    tokens = torch.arange(8).view(4, 2)
    ours = tokens.clone()
    ours[1, 0] += 1
    assert decoders.differing(tokens, Decided(tokens, [0.0] * 4)) is None
    assert decoders.differing(ours, Decided(tokens, [1.0, 1e-6, 1.0, 1.0])) is None
    assert "row 1: 1 tokens differ" in decoders.differing(ours, Decided(tokens, [1e-6, 1.0, 1e-6, 1e-6]))
    ours[2:] += 1
    assert "3 of 4 rows differ" in decoders.differing(ours, Decided(tokens, [1e-6] * 4))


def pair(rows: int, other: str, ratio: float | None, visibility: str = "block", slots: bool = False) -> Compared:
    return Compared("m", visibility, rows, "ours, sdar", other, other != "recompute", True, ratio, slots)


def test_a_ratio_is_that_of_the_worst_cached_loop_and_none_where_one_is_missing():
    nothing = e2e.NO_MIX
    pairs = [pair(1, "recompute", 3.0), pair(1, "block cache", 0.8), pair(1, "dual cache", 0.6, visibility="full")]
    pairs += [pair(1, "recompute", 0.1, visibility="full"), pair(8, "recompute", 6.0)]
    pairs += [pair(8, "recompute", 5.0, slots=True), pair(8, "block cache", 0.7, slots=True)]
    found = e2e.ratios(pairs, nothing)
    assert list(found) == RATIOS
    assert (found["tokens_per_s_vs_recompute_b1"], found["tokens_per_s_vs_cached_b1"]) == (3.0, 0.6)
    assert (found["tokens_per_s_vs_recompute_b8"], found["tokens_per_s_vs_cached_b8"]) == (6.0, None)
    names = [f"tokens_per_s_vs_{name}_b8_slots" for name in ("recompute", "cached")]
    assert [found[name] for name in names] == [5.0, 0.7]
    assert e2e.ratios([*pairs, pair(1, "prefix cache", None)], nothing)["tokens_per_s_vs_cached_b1"] is None


def test_losses_are_listed_with_the_worst_first():
    pairs = [pair(1, "a", 0.9), pair(1, "b", 0.5), pair(1, "c", 1.5), pair(8, "d", None)]
    lines = e2e_report.losses(pairs, {"together_over_alone": 2.0, "slots_over_static": 0.8})
    assert [line.split()[-1] for line in lines[:2]] == ["b", "a"]
    assert (
        "2.00 of their time one by one" in lines[2]
        and "slots have 0.80" in lines[3]
        and lines[4].startswith("(1 comparisons without a time")
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--new-tokens", "30"], "--new-tokens must be a multiple of the blocks of 32"),
        (["--per-step", "5"], "--per-step, got 32 and 5"),
        (["--prompt", "40000"], "--prompt and --new-tokens must fit"),
        (["--prompt", "0"], "--prompt, --new-tokens and --per-step must be at least 1"),
        (["--shape", "LLaDA-8B"], "--shape says --hidden and --vocab"),
        (["--shape", "LLaDA2-mini"], "--shape must be among LLaDA-8B"),
        (["--model", "tiny"], "are of --model random"),
        (["--backend", "fast"], "--backend must be among auto"),
        (["--rows", "1", "1"], "--rows must be at least 1 and differ"),
        (["--mixed", "-1"], "--mixed must be at least 0, got -1"),
        (["--slot-mixed", "-1"], "--slot-mixed must be at least 0, got -1"),
        (["--turns", "0"], "--turns must be at least 1"),
        (["--hidden", "70"], "--hidden must be a multiple of 64"),
    ],
)
def test_wrong_arguments_are_named(options, message, capsys):
    assert command.main(["e2e", *SMALL, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["e2e", *SMALL, "--device", "cuda"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


# Turns


class Ticks:
    """A clock of seconds that pass as calls say so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_calls_take_turns_until_the_time_is_up():
    ticks, order = Ticks(), []

    def call(name: str, seconds: float):
        def take() -> str:
            order.append(name)
            ticks.now += seconds
            return name

        return take

    def clock(take) -> tuple[float, str]:
        before = ticks.now
        result = take()
        return ticks.now - before, result

    calls = {"a": call("a", 1), "b": call("b", 3), "late": call("late", 1)}
    found = turns.in_turns(calls, clock, timing.Budget(4, 0, ticks), 3)
    assert order == ["a", "b"] and found["a"].seconds == [1] and found["b"].seconds == [3]
    assert (found["a"].status, found["a"].reason) == ("ok", "time budget: 1 of 3 turns")
    assert (found["late"].status, found["late"].seconds) == ("SKIPPED", [])

    order.clear()
    found = turns.in_turns(calls, clock, timing.Budget(math.inf, 0, ticks), 2)
    assert order == ["a", "b", "late"] * 2 and found["b"].median == 3


def test_a_call_that_raises_or_is_wrong_fails_and_the_others_go_on():
    def broken() -> None:
        raise RuntimeError("no\nmemory")

    heard = []
    found = turns.in_turns(
        {"broken": broken, "wrong": lambda: 1, "right": lambda: 2},
        turns.Clock(torch.device("cpu")),
        timing.Budget(100, 0),
        2,
        check=lambda name, result: "1 is not 2" if result == 1 else None,
        hear=lambda name, seconds: heard.append(name),
    )
    assert (found["broken"].status, found["broken"].reason) == ("FAILED", "RuntimeError: no memory")
    assert (found["wrong"].status, found["wrong"].reason, found["wrong"].seconds) == ("FAILED", "1 is not 2", [])
    assert found["right"].status == "ok" and heard == ["right", "right"]


def test_the_time_of_a_cpu_is_that_of_the_process():
    clock = turns.Clock(torch.device("cpu"))
    seconds, result = clock(lambda: sum(range(3_000_000)))
    assert result == 4_499_998_500_000 and 0.005 < seconds < 5 and clock.name == "user-CPU time"


def test_a_call_of_less_than_a_tick_takes_its_share_of_many(monkeypatch):
    """User time moves in ticks: most calls of a millisecond would take none."""
    ticks, calls = Ticks(), []

    def call() -> int:
        ticks.now += 0.001
        calls.append(None)
        return len(calls)

    monkeypatch.setattr(turns, "_user_seconds", lambda: ticks.now // 0.008 * 0.008)
    seconds, last = turns.Clock(torch.device("cpu"))(call)
    assert last == len(calls) > 20 and seconds == pytest.approx(0.001, rel=0.05)
