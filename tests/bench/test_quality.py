"""`python -m bench quality`: what it measures, resumes and prints, on a handful of prompts."""

from __future__ import annotations

import json

import pytest

from bench import __main__ as command
from bench import quality, quality_report
from dlm_fast.presets import PRESETS, resolve
from dlm_fast.tiny.tasks import TASKS


def row(model: str, preset: str, exact_match: float, nfe: float, **changes) -> dict:
    """A row as `measure` makes it."""
    cost = {"nfe": nfe, "nfe_se": 0.1, "query_tokens": 10 * nfe, "query_tokens_se": 1.0}
    right = {
        "exact_match": exact_match,
        "exact_match_se": 0.01,
        "exact_match_by_task": {"add": exact_match},
        "prompts": 9,
    }
    return {
        "model": model,
        "preset": preset,
        "options": {},
        "label": preset,
        "exactness": "exact",
        **right,
        **cost,
        **changes,
    }


def document(rows: list[dict]) -> dict:
    return {"per_task": 1, "seed": 0, "tasks": ["add"], "left_out": {"nbdiff": "why"}, "settings": rows}


def test_every_preset_is_run_on_a_model_or_left_out_with_a_reason():
    settings = quality.settings()
    run = {setting.preset for setting in settings}
    assert run | set(quality.LEFT_OUT) == set(PRESETS) and not run & set(quality.LEFT_OUT)
    assert all(quality.LEFT_OUT.values())
    assert set(quality.SWEEPS) | set(quality.NEEDED) | set(quality.PARTS) <= run
    assert len({setting.key for setting in settings}) == len(settings)
    for setting in settings:
        resolve(setting.preset, quality.visibility_of(setting.model), setting.options)  # else raises


def test_a_model_with_an_isolated_prompt_runs_what_keeps_prompt_keys(monkeypatch):
    monkeypatch.setattr(quality, "visibility_of", lambda model: "full")
    settings = quality.settings(["tiny-isolated"])
    assert [setting.preset for setting in settings if setting.options == {"block_length": 8}] == [
        s.preset for s in settings
    ]
    assert {setting.preset for setting in settings} == set(quality.ONLY["tiny-isolated"])


def test_slow_decoders_are_measured_on_fewer_prompts_and_the_baseline_on_all():
    counts = {setting.label: setting.prompts(100) for setting in quality.settings(["tiny-full"])}
    assert counts["llada"] == counts["fast-dllm"] == 100
    assert (counts["dream"], counts["llada steps_per_block=2"], counts["eb-sampler"]) == (10, 20, 50)
    assert quality.Setting("tiny-full", "dream", {}).prompts(1) == 1


def test_a_run_writes_results_that_a_second_run_takes_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "plot", lambda document, path: path.write_text("plot"))
    arguments = [
        "quality",
        "--out",
        str(tmp_path),
        "--per-task",
        "1",
        "--models",
        "tiny-block",
        "--presets",
        "llada2",
        "d2f",
    ]
    assert command.main(arguments) == 0
    written = json.loads((tmp_path / "quality.json").read_text())
    assert [row["preset"] for row in written["settings"]].count("d2f") == 1 + len(quality.SWEEPS["d2f"])
    for found in written["settings"]:
        assert (
            found["prompts"] == len(TASKS)
            and 0 <= found["exact_match"] <= 1
            and found["query_tokens"] >= found["nfe"] > 0
        )
        assert 0 < found["exact_match_se"] < 0.25 and found["nfe_se"] >= 0 and found["cpu_seconds"] > 0
    printed = capsys.readouterr().out
    assert (
        "| d2f |" in printed
        and "## D2F pays" in printed
        and "stale" not in printed
        and (tmp_path / "quality.png").exists()
    )

    # The same settings measured again are within the stated noise; other numbers are not.
    assert command.main(["quality", "--check", str(tmp_path / "quality.json"), "--settings", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("same    tiny-block")
    for found in written["settings"]:
        found["nfe"] += 1.1 * found["nfe_se"] + 0.01
    (tmp_path / "changed.json").write_text(json.dumps(written))
    assert command.main(["quality", "--check", str(tmp_path / "changed.json"), "--settings", "1"]) == 1
    assert capsys.readouterr().out.startswith("DIFFERS tiny-block")

    settings = json.loads((tmp_path / "quality.json").read_text())["settings"]
    monkeypatch.setattr(quality, "measure", None)  # would raise
    assert command.main([*arguments, "--from", str(tmp_path / "quality.json")]) == 0
    assert json.loads((tmp_path / "quality.json").read_text())["settings"] == settings


@pytest.mark.parametrize(
    "content, message",
    [
        ({**quality.conditions(3, 0), "settings": []}, "must hold per_task=1, got per_task=3"),
        ({**quality.conditions(1, 0), "tasks": None, "settings": []}, "must hold tasks=.*, got tasks=None"),
        ({**quality.conditions(1, 0), "weights": "0", "settings": []}, "must hold weights=[0-9a-f]{16}, got weights=0"),
        ({"per_task": 1}, "must be a quality.json of this command: KeyError"),
        ([], "must be a quality.json of this command: TypeError"),
    ],
)
def test_results_of_other_prompts_or_weights_are_refused(tmp_path, content, message):
    (tmp_path / "old.json").write_text(json.dumps(content))
    with pytest.raises(quality.QualityError, match=message):
        quality.finished([tmp_path / "old.json"], per_task=1, seed=0)


def test_nothing_to_check_is_named(tmp_path, capsys):
    facts = quality.conditions(1, 0)
    unknown = row("tiny-block", "llada2", 1.0, 5.0, options={"threshold": 0.123})
    for rows in ([], [unknown]):
        (tmp_path / "a.json").write_text(json.dumps({**facts, "settings": rows}))
        assert command.main(["quality", "--check", str(tmp_path / "a.json")]) == 2
        assert "must hold a setting that this version runs" in capsys.readouterr().err
    assert command.main(["quality", "--check", str(tmp_path / "none.json")]) == 2
    assert "must be a quality.json" in capsys.readouterr().err


def test_the_error_of_a_mean_and_of_a_share():
    assert quality.mean_and_error([2.0, 4.0]) == (3.0, 1.0)
    assert quality.mean_and_error([5.0]) == (5.0, 0.0)
    assert quality.share_error(0.5, 96) == pytest.approx(0.05)
    assert 0 < quality.share_error(1.0, 900) < 0.003


def test_the_table_states_prompts_and_errors():
    rows = [row("tiny-block", "sdar", 0.9, 20.0), row("tiny-block", "llada2", 0.8, 5.0, prompts=4)]
    text = quality_report.table(document(rows))
    assert "| llada2 | 80.0% +- 1.0 | 4 | add 80% | 5.00 | 50 | exact |\n| sdar | 90.0% +- 1.0 | 9 |" in text
    assert "Not run: nbdiff (why)." in text and "stale" not in text and "pays" not in text


def test_what_caches_cost_is_counted_from_the_same_model_uncached():
    full = {"fast-dllm": 0.99, "fast-dllm-dual": 0.85, "freecache": 0.7}
    rows = [row("tiny-full", preset, exact_match, 4.0) for preset, exact_match in full.items()]
    rows += [row("tiny-isolated", preset, 0.95, 4.0) for preset in ("fast-dllm", "fast-dllm-dual")]
    rows += [row("other", "freecache", 0.7, 5.0)]
    lines = list(quality_report.stale_section(rows, ["add"]))
    assert "| tiny-full | none | 99.0% +- 1.0 |  | 40 | 99% |" in lines
    assert "| tiny-full | dual | 85.0% +- 1.0 | -14.0 | 40 | -14.0 |" in lines
    assert "| tiny-full | once | 70.0% +- 1.0 | -29.0 | 40 | -29.0 |" in lines
    assert "| tiny-isolated | dual | 95.0% +- 1.0 | +0.0 | 40 | +0.0 |" in lines
    assert not [line for line in lines if "other" in line]  # nothing to compare with


def test_what_a_pipeline_saves_is_counted_from_one_block_at_a_time():
    single = row("tiny-block", "llada2", 0.95, 8.0, options={"threshold": 0.9}, label="llada2 threshold=0.9")
    rows = [single, row("tiny-block", "d2f", 0.94, 6.0), row("tiny-full", "fast-dllm-dual", 0.85, 4.0)]
    rows += [row("tiny-block", "llada2", 0.96, 9.0)]
    lines = list(quality_report.d2f_section(rows))
    assert "| student, one block at a time | 95.0% +- 1.0 |  | 8.00 |  | 80 |  |" in lines
    assert "| student, d2f | 94.0% +- 1.0 | -1.0 | 6.00 | -25.0 | 60 | -25.0 |" in lines
    assert "| teacher, threshold 0.9, dual cache | 85.0% +- 1.0 | -10.0 | 4.00 | -50.0 | 40 | -50.0 |" in lines
    assert list(quality_report.d2f_section(rows[1:])) == []


def test_the_frontier_is_what_nothing_beats():
    rows = [row("m", "p", match, nfe) for nfe, match in ((4, 0.5), (4, 0.7), (5, 0.6), (6, 0.9), (7, 0.9))]
    assert [(row["nfe"], row["exact_match"]) for row in quality_report.frontier(rows, "nfe")] == [(4, 0.7), (6, 0.9)]


def test_the_plot_draws_every_model(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(model, "p", 1 / nfe, nfe) for model in quality.MODELS for nfe in (2, 4)]
    quality_report.plot(document(rows), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "huge"], "--models must be among"),
        (["--presets", "none"], "--presets must be among"),
        (["--per-task", "0"], "must be at least 1"),
        (["--check", "any.json", "--settings", "0"], "--settings and --batch-size must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    assert command.main(["quality", *arguments]) == 2
    assert message in capsys.readouterr().err
