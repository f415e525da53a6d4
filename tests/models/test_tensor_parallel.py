"""Models that transformers spreads over two processes decode what one process decodes.

Ranks add what they made in another order than one process does, so logits differ in the last bits. The random models
here have no candidates that nearly tie: their tokens are the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import published
import pytest
import ranks
import torch
from helpers import native_model, save_toy_checkpoint

import dlm_fast

ROOT = Path(__file__).resolve().parents[2]


def torchrun(folder: Path, seconds: float) -> tuple[int, str]:
    """The exit status and the output of two ranks, none of which outlives the call."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # both ranks compute on the CPU, by gloo
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, ROOT / "tests" / "support" / "ranks.py"]
    process = subprocess.Popen(
        [*map(str, command), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        # Ranks of a launcher that was killed would wait for each other.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    for family in ("llama", "qwen2", "qwen3"):
        native_model(family).save_pretrained(root / family)
    save_toy_checkpoint(root / "one-head", kv_heads=1)
    for family, changes in {"llada": {}, "llada2": {}, "sdar": {"tie_word_embeddings": True}}.items():
        published.write(family, root / f"published-{family}", **changes)
    return root


@pytest.fixture(scope="module")
def run(folder):
    """The exit status and the output of the two ranks, which decode every case, and of which one fails then."""
    return torchrun(folder, 240)


@pytest.fixture(scope="module")
def both(folder, run):
    """What each of the two ranks found."""
    files = [folder / f"rank-{rank}.pt" for rank in range(2)]
    assert all(file.is_file() for file in files), run[1][-4000:]
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("name", ranks.CASES)
def test_two_ranks_decode_what_one_process_decodes(folder, both, name):
    case = ranks.CASES[name]
    alone = ranks.decode(ranks.opened(folder, case, spread=False), case)
    for rank in both:
        found = rank["cases"][name]
        assert (found["canvas"], found["steps"], found["nfe"]) == (alone["canvas"], alone["steps"], alone["nfe"])
        torch.testing.assert_close(found["confidence"], alone["confidence"], atol=1e-4, rtol=1e-3)
        assert (found["ranks"], alone["ranks"]) == (2, 1)
        assert 2 * found["heads"] == alone["heads"]


@pytest.mark.parametrize("name", ranks.CASES)
def test_ranks_have_the_same_bits_of_logits_and_confidence(both, name):
    first, second = (rank["cases"][name] for rank in both)
    assert first["logits"] == second["logits"]
    assert torch.equal(first["confidence"], second["confidence"])


def test_fused_layers_of_ranks_have_the_bits_of_transformers_own(both):
    fused, own = both[0]["cases"]["dual"], both[0]["unfused"]
    assert (fused["layers"], own["layers"]) == ("fused", "of transformers: asked for")
    assert fused["logits"] == own["logits"] and fused["canvas"] == own["canvas"]


def test_layers_whose_norms_transformers_took_over_are_its_own(both):
    assert {both[0]["cases"][name]["layers"] for name in ("biases", "loaded", "experts")} == {"fused"}
    for name in ("sdar", "tied head"):
        # By a forward of its own or, before 5.24, by hooks.
        assert both[0]["cases"][name]["layers"].startswith("of transformers: layer 0 has a q_norm ")


def test_a_plain_forward_with_gradients_equals_that_of_one_process(folder, both):
    alone = ranks.opened(folder, ranks.CASES["dual"], spread=False)
    expected = alone(torch.tensor(ranks.PROMPTS[1:])).logits
    for rank in both:
        torch.testing.assert_close(rank["with gradients"], expected, atol=1e-4, rtol=1e-3)


def test_a_session_of_ranks_shares_prompts_until_an_optimizer_changes_the_weights(folder, both):
    alone = ranks.shared_work(ranks.opened(folder, ranks.CASES["sdar"], spread=False))
    assert alone[0] == alone[2] > alone[1]
    assert [rank["shared"] for rank in both] == [alone, alone]


def test_the_memory_of_a_rank_is_counted_by_its_own_heads(folder, both):
    (alone,) = ranks.cached_bytes(ranks.opened(folder, ranks.CASES["dual"], spread=False))
    assert [rank["keys and values"] for rank in both] == [[alone // 2], [alone // 2]]


def test_a_batch_that_does_not_fit_one_rank_is_refused_by_all(both):
    assert both[0]["too large"] == both[1]["too large"]
    assert both[0]["too large"].startswith("BatchTooLarge: ")


def test_heads_that_ranks_do_not_divide_are_refused(both):
    got = "got 2 ranks for num_attention_heads=4 and num_key_value_heads=1"
    for rank in both:
        for how, owner in (("patched", "dlm_fast"), ("loaded", "load")):
            message = rank[f"one head, {how}"]
            assert message.startswith(f"ValueError: {owner}: the number of ranks must divide the heads"), message
            assert message.endswith(got), message


def test_plans_that_attention_or_decoder_would_take_wrongly_are_refused(both):
    for rank in both:
        assert rank["whole queries"] == (
            "NotImplementedError: dlm_fast: tp_plan must say 'colwise' of model.layers.*.self_attn.q_proj, got "
            "'colwise_rep'"
        )
        assert "of lm_head, got 'colwise'" in rank["head in shares"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tp_plan": "auto"}, "tp_plan needs processes that torchrun started"),
        ({"tp_plan": "all"}, "tp_plan must be 'auto' or None, got tp_plan='all'"),
        ({"tp_plan": "auto", "device": "cpu"}, "give tp_plan or device, got tp_plan='auto' and device='cpu'"),
        ({"tp_plan": "auto", "device_map": "auto"}, "give tp_plan or device_map"),
    ],
)
def test_what_contradicts_a_plan_is_refused(arguments, message, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        dlm_fast.load("tiny-full", **arguments)


def test_an_adapter_or_a_number_of_processes_that_does_not_fit_is_refused_before_the_weights(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="an adapter is not applied to a tensor parallel model"):
        dlm_fast.load(folder / "one-head", tp_plan="auto", adapter=str(folder))
    with pytest.raises(ValueError, match="got 2 ranks for num_attention_heads=4 and num_key_value_heads=1"):
        dlm_fast.load(folder / "one-head", tp_plan="auto")


def test_one_process_of_torchrun_has_the_whole_model(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    model = dlm_fast.load(folder / "one-head", tp_plan="auto", backend="reference")
    assert dlm_fast.explain(model)["ranks"] == 1


def test_a_rank_that_fails_ends_the_other(both, run):
    status, output = run
    assert status != 0 and f"RuntimeError: {ranks.FAILURE}" in output
