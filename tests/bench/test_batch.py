"""`python -m bench batch`: what it counts, times, prints and writes, on a model of a layer."""

from __future__ import annotations

import json

import pytest
import torch

from bench import __main__ as command
from bench import batch, batch_report, models, plots, slots, timing, turns

CPU = torch.device("cpu")
SMALL = ["--layers", "1", "--hidden", "64", "--vocab", "64", "--turns", "1"]


@pytest.fixture(autouse=True)
def short_lengths(monkeypatch):
    monkeypatch.setattr(batch, "MEDIAN", 12)


@pytest.fixture(scope="module")
def made() -> models.Models:
    return models.Models(models.small(1, 64, 64), CPU, torch.float32, models.SURE)


def decoder(made: models.Models, preset: str) -> batch.Decoder:
    subject = made(batch.PRESETS[preset].visibility)
    return batch.Decoder(preset, subject, subject.ours("reference"))


def lengths(requests: list[batch.Request]) -> list[tuple[int, int]]:
    return [(len(request.prompt), request.new_tokens) for request in requests]


def test_the_mix_is_that_of_its_seed_and_a_longer_one_goes_on_with_it(made, monkeypatch):
    monkeypatch.setattr(batch, "MEDIAN", 120)
    few, many = (batch.mix(made("full"), count, seed=0)[0] for count in (5, 400))
    assert lengths(few) == [(107, 123), (183, 111), (280, 35), (141, 46), (116, 95)] and many[:5] == few
    assert lengths(batch.mix(made("full"), 5, seed=1)[0]) != lengths(few)
    middle = [sorted(values)[200] for values in zip(*lengths(many))]
    assert middle == pytest.approx([120, 120], rel=0.15)


def test_requests_are_cut_to_what_a_model_holds(monkeypatch):
    monkeypatch.setattr(batch, "MEDIAN", 400)
    subject = models.embedded("block", CPU)
    requests, cut = batch.mix(subject, 20, seed=0)
    assert 0 < cut <= 20 and all(request.length <= 512 - 8 for request in requests)
    assert f", {cut} of them cut to what the model holds" in batch.described(requests, cut)


@pytest.mark.parametrize("preset", ["fast-dllm-dual", "llada2"])
def test_a_batch_gives_every_request_what_it_gets_alone_and_counts_what_it_costs(made, preset):
    requests, _ = batch.mix(made("full"), 6, seed=0)
    rows = list(batch.counted(decoder(made, preset), requests, [1, 4, 6], timing.Budget(1000, 0)))
    alone, together = rows[0], rows[-1]
    for row in rows:
        assert row["status"] == "ok" and row["differing"] == 0 and row["shapes"] >= 1
        assert (row["needed"], row["nfe"]) == (alone["needed"], alone["nfe"])
        assert row["computed"] >= row["needed"] and row["ratio"] == pytest.approx(row["computed"] / row["needed"], 1e-4)
    assert alone["forwards"] == alone["nfe"] > together["forwards"]


@pytest.mark.parametrize("preset", ["fast-dllm-dual", "d2f", "llada2"])
def test_slots_give_every_request_what_it_gets_alone(made, preset):
    requests, _ = batch.mix(made("full"), 9, seed=0)
    decode = decoder(made, preset)
    sessions, budget = batch.Sessions(decode, requests), timing.Budget(1000, 0)
    alone, *through = batch.counted(decode, requests, [1], budget, sessions, [2, 4])
    assert [(row["way"], row["rows"]) for row in through] == [("slots", 2), ("slots", 4)]
    for row in through:
        assert (row["status"], row["differing"]) == ("ok", 0)
        assert (row["needed"], row["nfe"]) == (alone["needed"], alone["nfe"]) and row["forwards"] < alone["forwards"]
    (again,) = batch.counted(decode, requests, [], budget, sessions, [2])  # the session of before, and its own shapes
    assert again["forwards"] == through[0]["forwards"] and again["computed"] == through[0]["computed"]


def test_slots_that_write_other_tokens_have_no_time(made, monkeypatch):
    requests, _ = batch.mix(made("full"), 5, seed=0)
    decode = decoder(made, "fast-dllm-dual")
    right = batch.SlotDecoder.__call__

    def wrong(self, *arguments):
        (found,) = right(self, *arguments)
        found.canvas[-1][-1] += 1
        return [found]

    arguments = (requests, turns.Clock(CPU), timing.Budget(1000, 0), 1)
    through = batch.Sessions(decode, requests)(2)
    row = batch.against_static(decode, through, *arguments)
    assert row["status"] == "ok" and row["slots_over_static"] > 0
    assert " of its tokens a second" in batch_report.slot_lines(row)[0]
    monkeypatch.setattr(batch.SlotDecoder, "__call__", wrong)
    row = batch.against_static(decode, through, *arguments)
    assert (row["status"], row["reason"]) == ("FAILED", "1 requests got other tokens, NFE or query tokens")
    assert "slots_over_static" not in row and "FAILED: 1 requests" in batch_report.slot_lines(row)[0]


def test_a_recorder_counts_the_tokens_of_slots_that_are_refilled(made):
    requests, _ = batch.mix(made("full"), 9, seed=0)
    found = batch.timeline(
        decoder(made, "fast-dllm"), batch.Sessions(decoder(made, "fast-dllm"), requests)(3), requests
    )
    wanted = sum(request.new_tokens for request in requests)
    for name in ("static", "slots"):
        points = found["points"][name]
        assert points == sorted(points, key=lambda point: (point[0], point[2])) and points[-1][1] == 0
        assert max(rows for _, rows, _ in points) <= 3 and points[-1][2] == wanted
    assert slots.occupancy(found["points"]["slots"], 3) > slots.occupancy(found["points"]["static"], 3) > 0
    assert slots.occupancy([[1.0, 2, 5], [2.0, 0, 9], [4.0, 4, 9]], 4) == pytest.approx(2 / (3 * 4))
    middles, speeds = plots.speeds([[1.0, 1, 10], [4.0, 0, 14]])
    assert len(middles) == plots.SPANS and sum(speeds) * 4.0 / plots.SPANS == pytest.approx(14)


def output(canvas: list[int], nfe: int, needed: int, shapes: dict, computed: int):
    class Output:
        pass

    found = Output()
    found.canvas, found.nfe, found.query_tokens = [torch.tensor(canvas)], [nfe], [needed]
    found.shapes, found.computed_tokens = shapes, computed
    return found


def test_counts_are_sums_over_calls_and_shapes_the_most_of_any_call():
    outputs = [output([1, 2], 3, 10, {"a": 2, "b": 1}, 12), output([3], 4, 20, {"a": 5}, 33)]
    found = batch.counts(outputs, 1, batch.rows_of(outputs))
    assert found == batch.Counts(rows=1, computed=45, needed=30, forwards=8, nfe=7, shapes=2, differing=0)
    assert found.ratio == 1.5
    assert batch.counts(outputs, 1, [([1, 2], 3, 10), ([4], 4, 20)]).differing == 1


def test_requests_are_timed_alone_in_static_batches_of_both_orders_and_in_one_call(made):
    assert [way.name for way in batch.calls(16)] == [
        "1 a call, given",
        "2 a call, given",
        "2 a call, sorted",
        "4 a call, given",
        "4 a call, sorted",
        "8 a call, given",
        "8 a call, sorted",
        "16 a call, given",
    ]
    assert [way.rows for way in batch.calls(2)] == [1, 2] and [way.rows for way in batch.calls(1)] == [1]

    called = []

    def decode(requests, rows):
        called.append(([request.number for request in requests], rows))

    requests = [batch.Request(number, [5] * length, 9) for number, length in enumerate((3, 1, 2, 4))]
    decode.preset = "p"
    ways = [batch.Call(1, "given"), batch.Call(2, "sorted")]
    seconds = iter((2.0, 1.0))

    def clock(call) -> tuple[float, None]:
        return next(seconds), call()

    rows = batch.timed(decode, requests, clock, timing.Budget(100, 0), 1, ways)
    assert called == [([0], 1), ([0, 1, 2, 3], 1), ([1, 2, 0, 3], 2)]
    assert [(row["tokens_per_s"], row["over_alone"]) for row in rows] == [(18.0, 1.0), (36.0, 0.5)]


def test_one_call_over_its_rows_is_counted_and_timed(made):
    requests, _ = batch.mix(made("full"), 4, seed=0)
    clock = turns.Clock(CPU)
    found = batch.together(decoder(made, "fast-dllm-dual"), requests, clock, timing.Budget(1000, 0), 1)
    assert found["together_over_alone"] > 0 and found["computed_over_needed"] >= 1
    late = batch.together(decoder(made, "fast-dllm-dual"), requests, clock, timing.Budget(0, 0), 1)
    assert late == {"together_over_alone": None, "computed_over_needed": None}


def test_a_run_prints_and_writes_counts_times_and_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = ["--presets", "fast-dllm", "d2f", "--rows", "1", "3", "--requests", "3", "--timed-requests", "4"]
    options += ["--slots", "2", "--slot-requests", "4"]
    assert command.main(["batch", *SMALL, *options, "--json", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert document == json.loads((tmp_path / "batch.json").read_text())
    assert [(row["preset"], row["way"], row["rows"]) for row in document["counts"]] == [
        (preset, *way) for preset in ("fast-dllm", "d2f") for way in (("static", 1), ("static", 3), ("slots", 2))
    ]
    assert [(row["preset"], row["slots"], row["requests"]) for row in document["slots"]] == [
        ("fast-dllm", 2, 4), ("d2f", 2, 4),
    ]  # fmt: skip
    assert all(row["slots_over_static"] > 0 for row in document["slots"]) and len(document["timelines"]) == 2
    assert len(document["times"]) == 8 and all(row["tokens_per_s"] > 0 for row in document["times"])
    assert lines[0].startswith("fast-dllm on random 1x64, 4 requests: prompts of ")
    assert lines[2].startswith("    alone ") and lines[3].startswith("    3 ")
    for name in ("batch_waste.png", "batch_throughput.png", "batch_slots.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_what_fails_and_what_there_is_no_time_for_is_said(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise MemoryError("too large")

    monkeypatch.setattr(batch, "generate", broken)
    options = ["--presets", "llada", "--rows", "1", "--requests", "2", "--timed-requests", "2", "--json"]
    options += ["--slots"]
    assert command.main(["batch", *SMALL, *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("FAILED: MemoryError: too large" in line for line in lines) == 3
    assert command.main(["batch", *SMALL, *options, "--seconds", "0"]) == 0
    assert sum("SKIPPED: time budget" in line for line in capsys.readouterr().out.splitlines()) == 3


def test_requests_that_differ_are_named_below_their_line():
    row = {
        "way": "static",
        "rows": 8,
        "status": "ok",
        "computed": 9,
        "needed": 6,
        "ratio": 1.5,
        "forwards": 3,
        "nfe": 4,
        "shapes": 2,
    }
    line, note = batch_report.count_lines(row | {"differing": 2})
    assert line.split() == ["8", "9", "6", "1.50", "3", "4", "2"] and "2 requests got other tokens" in note


def test_every_preset_shown_can_be_run_and_those_of_other_models_are_refused(capsys):
    assert set(batch.SHOWN) <= set(batch.PRESETS) and not set(batch.SHOWN) & set(batch.UNFIT)
    for wrong in ("nbdiff", "learn2pd", "none"):
        assert command.main(["batch", *SMALL, "--presets", wrong]) == 2
        assert "--presets must be among llada, dream" in capsys.readouterr().err
    assert command.main(["batch", *SMALL, "--requests", "-1"]) == 2
    assert "--requests, --timed-requests and --slot-requests must be at least 0" in capsys.readouterr().err
    assert command.main(["batch", *SMALL, "--slots", "2", "2"]) == 2
    assert "--slots must be at least 1 and differ, got [2, 2]" in capsys.readouterr().err
