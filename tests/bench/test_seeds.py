"""The shortened runs of several seeds: they train, measure and summarise."""

from __future__ import annotations

import json
import statistics

from bench import seeds
from bench.__main__ import main


def test_two_seeds_are_trained_measured_and_summarised(tmp_path):
    short = seeds.Short(
        steps=2, distill_steps=1, tokens_per_step=512, samples=60, per_task=1, tasks=("reverse", "calc"), compile=False
    )
    document = seeds.run(tmp_path, [3, 4], short, tmp_path / "runs")

    assert json.loads((tmp_path / "seeds.json").read_text()) == json.loads(json.dumps(document))
    assert [run["seed"] for run in document["runs"]] == [3, 4]
    for name in seeds.SETTINGS:
        values = [run[name]["nfe"] for run in document["runs"]]
        assert document["summary"][name]["nfe_mean"] == statistics.mean(values)
        assert document["summary"][name]["nfe_std"] == statistics.stdev(values)
        assert document["runs"][0][name]["exact_match_by_task"].keys() == {"reverse", "calc"}
    assert len(seeds.lines(document)) == len(seeds.SETTINGS)
    weights = {(tmp_path / "runs" / f"seed-{seed}" / "block" / "model.safetensors").read_bytes() for seed in (3, 4)}
    assert len(weights) == 2


def test_a_seed_given_twice_is_refused(tmp_path, capsys):
    assert main(["seeds", "--out", str(tmp_path), "--runs", str(tmp_path), "--seeds", "1", "1"]) == 2
    assert "--seeds must differ, got [1, 1]" in capsys.readouterr().err
