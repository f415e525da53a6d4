"""How learned heads are trained: what is recorded of decodes, what a training minimises, what its command writes."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from head_cases import BLOCK, KINDS, inputs_of, random_head, toy_with_a_tokenizer
from helpers import save_toy_checkpoint

from dlm_fast.policies import load_head
from dlm_fast.training import policy as training


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_with_a_tokenizer(tmp_path_factory.mktemp("toy"))


TINY = {"tasks": ["reverse", "sort"], "prompts": 16, "max_new_tokens": 8, "block_length": BLOCK}
TINY |= {"width": 8, "steps": 60, "batch": 64}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, model):
    return request.param, *training.train(model, request.param, **TINY)


def test_two_runs_with_one_seed_give_identical_weights(trained, model):
    kind, head, report = trained
    again, second = training.train(model, kind, **TINY)
    assert second == report and all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), head.state_dict().values())
    )
    assert again.accept_threshold == head.accept_threshold in training.THRESHOLDS
    other_seed = training.new_head(kind, BLOCK, 8, "", 1, 60)
    assert not torch.equal(other_seed.out.weight, training.new_head(kind, BLOCK, 8, "", 0, 60).out.weight)


def test_a_short_training_on_a_model_lowers_the_loss(trained):
    _, _, report = trained
    assert len(report["rounds"]) == 2
    assert all(row["states"] > 0 and row["last_loss"] < row["first_loss"] for row in report["rounds"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_training_beats_the_base_rate_on_states_it_has_not_seen(kind):
    """Here a prediction is final as often as its confidence says."""

    def states(seed: int) -> training.States:
        confidence, masked, time = inputs_of("commit", 600, seed)
        drawn = torch.rand(600, BLOCK, generator=torch.Generator().manual_seed(1000 + seed))
        return training.States(confidence, masked, time, drawn < confidence, masked)

    head = training.new_head(kind, BLOCK, 16, "", 0, 200)
    losses = training.fit(head, states(0), steps=200, batch=128, learning_rate=1e-2, wrong_weight=1.0, seed=0)
    measured = training.accuracy(head, states(1), 0.5)
    assert losses[-1] < losses[0] and measured["loss"] < 0.9 * measured["base_loss"]
    assert measured["precision"] > measured["base_rate"] + 0.1 and measured["recall"] > 0.5


@pytest.fixture(scope="module")
def recorded(model):
    fulls: dict[str, training.Full] = {}
    samples = training.draw_prompts(["reverse", "sort"], 6, seed=1)
    states = training.record(model, samples, max_new_tokens=8, block_length=BLOCK, fulls=fulls)
    return samples, fulls, states


def test_a_recorded_target_is_whether_the_prediction_is_the_final_token(recorded, model):
    samples, fulls, states = recorded
    # One token per step: a row's block of four has four states, with four masks to one; the prediction that is written
    # is final.
    assert len(states) == sum(full.nfe for full in fulls.values())
    masks = states.counts.sum(1)
    assert torch.equal(masks, states.eligible.sum(1)) and (states.right & states.counts).any(1).all()
    assert (states.right[masks == 1] == states.counts[masks == 1])[states.counts[masks == 1]].all()
    assert torch.equal(states.time, (BLOCK - masks) / BLOCK)
    best = torch.where(states.eligible, states.confidence, -1.0).argmax(1, keepdim=True)
    assert states.right.gather(1, best).all()


def test_recording_changes_no_decode(recorded, model):
    samples, fulls, _ = recorded
    plain = training.decode(model, samples, preset="llada", block_length=BLOCK, max_new_tokens=8, stop="after_block")
    for sample, canvas, nfe in zip(samples, plain.canvas, plain.nfe):
        assert torch.equal(canvas, fulls[sample.prompt].canvas) and nfe == fulls[sample.prompt].nfe


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_a_heads_own_path_end_where_it_leaves_the_full_decode(recorded, model, kind):
    samples, fulls, _ = recorded
    head = random_head(kind)
    for parameter in head.parameters():
        parameter.data.zero_()
    head.out.bias.data.fill_(9.0)  # writes every block in one step
    states = training.record(model, samples, max_new_tokens=8, block_length=BLOCK, head=head, fulls=fulls)
    # Every row's first block, and a second one only where all of the first was right.
    assert torch.equal(states.time, torch.zeros(len(states))) and len(samples) <= len(states) < 2 * len(samples)
    assert not states.right[: len(samples)].all()


def test_the_loss_is_a_weighted_cross_entropy_over_masked_positions():
    head, generator = random_head("filter", scale=1.0), torch.Generator().manual_seed(0)
    (confidence,) = inputs_of("filter", 5)
    right, counts = (torch.rand(5, BLOCK, generator=generator) < 0.6 for _ in range(2))
    states = training.States(confidence, counts, torch.zeros(5), right, counts)
    p = head(confidence)
    total = weights = 0.0
    for b in range(5):
        for j in range(BLOCK):
            if counts[b, j]:
                weight = 1.0 if right[b, j] else 3.0
                total -= weight * float(torch.log(p[b, j] if right[b, j] else 1 - p[b, j]))
                weights += weight
    assert training.loss_of(head, states, 3.0).item() == pytest.approx(total / weights, rel=1e-4)


def test_the_threshold_is_the_cheapest_that_costs_at_most_a_point():
    rows = {0.5: (0.90, 3), 0.7: (0.951, 4), 0.9: (0.96, 6), 0.95: (0.96, 6), 0.98: (0.955, 7)}
    assert training.choose_threshold({v: {"exact_match": match, "nfe": nfe} for v, (match, nfe) in rows.items()}) == 0.7
    assert training.choose_threshold({v: {"exact_match": 0.5, "nfe": 6} for v in rows}) == 0.98


def test_the_command_writes_a_head_and_prints_what_it_measured(tmp_path, capsys, monkeypatch):
    save_toy_checkpoint(tmp_path / "model", layers=1, heads=2, kv_heads=1)
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    out = tmp_path / "heads" / "a.safetensors"
    arguments = ["--kind", "filter", "--model", str(tmp_path / "model"), "--out", str(out), "--tasks", "reverse"]
    arguments += ["--prompts", "8", "--steps", "2", "--rounds", "1", "--block-length", str(BLOCK)]
    arguments += ["--max-new-tokens", "4", "--width", "4", "--seed", "5"]
    training.run(parser.parse_args(arguments))
    printed = capsys.readouterr().out.splitlines()
    head = load_head(out, device="cpu")
    assert (head.kind, head.block_length, head.width, head.seed, head.step) == ("filter", BLOCK, 4, 5, 2)
    assert json.loads(printed[-1])["threshold"] == head.accept_threshold and any(
        "precision" in line for line in printed
    )


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("oracle", {}, "kind must be one of filter, commit, got kind='oracle'"),
        ("filter", {"prompts": 3}, "prompts must be a whole number >= 8, got prompts=3"),
        ("filter", {"steps": 0}, "steps must be a whole number >= 1, got steps=0"),
        ("filter", {"wrong_weight": 0.0}, "wrong_weight must be positive, got wrong_weight=0.0"),
    ],
)
def test_arguments_out_of_range_are_named(model, kind, change, message):
    with pytest.raises(ValueError, match=message):
        training.train(model, kind, **{**TINY, **change})
