"""`python -m bench quality`: what it measures, resumes and prints, on a handful of prompts."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("bench") is None or "bench" not in sys.modules:
    # bench/ is not installed, and the checkout may not be on sys.path.
    spec = importlib.util.spec_from_file_location(
        "bench", ROOT / "bench" / "__init__.py", submodule_search_locations=[str(ROOT / "bench")]
    )
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])

from bench import __main__ as command  # noqa: E402
from bench import quality  # noqa: E402
from dlm_fast.presets import PRESETS  # noqa: E402

ROW = {"model": "tiny-block", "preset": "d2f", "options": {}, "exactness": "exact", "exact_match_by_task": {"add": 0.5}, "prompts": 2, "seconds": 1.0}


def test_every_preset_is_run_on_a_model_or_left_out_with_a_reason():
    run = {setting.preset for setting in quality.settings()}
    assert run | set(quality.LEFT_OUT) == set(PRESETS) and not run & set(quality.LEFT_OUT)
    assert all(quality.LEFT_OUT.values())
    assert set(quality.SWEEPS) <= run


def test_a_run_writes_results_that_a_second_run_takes_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "plot", lambda document, path: path.write_text("plot"))
    arguments = ["quality", "--out", str(tmp_path), "--per-task", "1", "--models", "tiny-block", "--presets", "llada2", "d2f"]
    assert command.main(arguments) == 0
    document = json.loads((tmp_path / "quality.json").read_text())
    assert [row["preset"] for row in document["settings"]].count("d2f") == 1 + len(quality.SWEEPS["d2f"])
    assert all(row["prompts"] == 7 and 0 <= row["exact_match"] <= 1 and row["query_tokens"] >= row["nfe"] > 0 for row in document["settings"])
    assert "| d2f |" in capsys.readouterr().out and (tmp_path / "quality.png").exists()

    monkeypatch.setattr(quality, "measure", None)  # would raise
    assert command.main([*arguments, "--from", str(tmp_path / "quality.json")]) == 0
    assert json.loads((tmp_path / "quality.json").read_text())["settings"] == document["settings"]


def test_results_of_other_prompts_are_refused(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"per_task": 3, "seed": 0, "settings": []}))
    with pytest.raises(ValueError, match=r"must hold per_task=1, seed=0, got per_task=3"):
        quality.finished([tmp_path / "old.json"], per_task=1, seed=0)


def test_the_frontier_is_what_nothing_beats():
    rows = [{**ROW, "nfe": nfe, "exact_match": match} for nfe, match in ((4, 0.5), (4, 0.7), (5, 0.6), (6, 0.9), (7, 0.9))]
    assert [(row["nfe"], row["exact_match"]) for row in quality.frontier(rows, "nfe")] == [(4, 0.7), (6, 0.9)]


def test_the_plot_draws_every_model(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{**ROW, "model": model, "nfe": nfe, "query_tokens": 9 * nfe, "exact_match": 1 / nfe} for model in quality.MODELS for nfe in (2, 4)]
    quality.plot({"per_task": 1, "seed": 0, "settings": rows}, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


@pytest.mark.parametrize("arguments, message", [(["--models", "huge"], "--models must be among"), (["--presets", "none"], "--presets must be among"),
                                                (["--per-task", "0"], "must be at least 1")])  # fmt: skip
def test_wrong_arguments_are_named(arguments, message, capsys):
    assert command.main(["quality", *arguments]) == 2
    assert message in capsys.readouterr().err
