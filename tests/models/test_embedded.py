"""The two models inside the package: they load, they answer, and they trade steps for accuracy as a trained model
does."""

from __future__ import annotations

import functools
import json

import pytest

import dlm_fast
from dlm_fast import cli
from dlm_fast.files import EMBEDDED, checkpoint_path
from dlm_fast.tiny import demo
from dlm_fast.tiny.tasks import TASKS, held_out
from dlm_fast.training.__main__ import build_parser

PER_TASK = 3


@functools.lru_cache
def model(name: str):
    return dlm_fast.load(name, device="cpu")


@functools.lru_cache
def prompts() -> tuple:
    return tuple(sample for task in TASKS for sample in held_out(task, PER_TASK, seed=11))


@functools.lru_cache
def decode(name: str, preset: str, options: tuple = ()):
    chats = [[{"role": "user", "content": sample.prompt}] for sample in prompts()]
    return dlm_fast.generate(model(name), chats, preset=preset, max_new_tokens=64, **dict(options))


def exact_match(out) -> float:
    return sum(TASKS[s.task].check(s.prompt, text) for s, text in zip(prompts(), out.text)) / len(prompts())


DECODERS = [
    ("tiny-full", "llada", (("block_length", 8),)),
    ("tiny-full", "fast-dllm", (("block_length", 8),)),
    ("tiny-block", "sdar", ()),
    ("tiny-block", "llada2", ()),
    ("tiny-block", "d2f", ()),
]


@pytest.mark.parametrize("name, preset, options", DECODERS)
def test_most_held_out_prompts_are_answered_exactly(name, preset, options):
    assert exact_match(decode(name, preset, options)) >= 0.9


@pytest.mark.parametrize("careful, parallel", [(DECODERS[0], DECODERS[1]), (DECODERS[2], DECODERS[3])])
def test_a_threshold_saves_forwards_and_keeps_most_answers(careful, parallel):
    slow, fast = decode(*careful), decode(*parallel)
    assert sum(fast.nfe) < 0.6 * sum(slow.nfe)
    assert exact_match(fast) >= exact_match(slow) - 0.15


def test_tokens_that_depend_on_one_another_must_not_be_written_together():
    """Any order of a shuffle's words is right. Words that are drawn independently of one another repeat; words that are
    drawn one at a time do not."""
    samples = held_out("shuffle", 8, seed=3)
    chats = [[{"role": "user", "content": sample.prompt}] for sample in samples]

    def right(**options) -> int:
        out = dlm_fast.generate(model("tiny-full"), chats, preset="llada", block_length=8, max_new_tokens=24, **options)
        return sum(TASKS["shuffle"].check(sample.prompt, text) for sample, text in zip(samples, out.text))

    assert right() >= 6
    assert right(steps_per_block=1) <= 3


def test_an_isolated_prompt_makes_stale_caches_harmless():
    """A model of full attention reads off the prompt which words are used already, and the cached keys of the prompt do
    not know."""
    samples = held_out("shuffle", 10, seed=3)
    chats = [[{"role": "user", "content": sample.prompt}] for sample in samples]

    def right(name: str) -> int:
        out = dlm_fast.generate(model(name), chats, preset="fast-dllm-dual", block_length=8, max_new_tokens=24)
        return sum(TASKS["shuffle"].check(sample.prompt, text) for sample, text in zip(samples, out.text))

    assert right("tiny-isolated") >= 8
    assert right("tiny-full") <= 4


def test_the_pipeline_needs_fewer_forwards_than_one_block_at_a_time():
    published = (("threshold", 0.9), ("cache", "commit"))
    pipelined, single = decode("tiny-block", "d2f"), decode("tiny-block", "llada2", published)
    assert sum(pipelined.nfe) < 0.8 * sum(single.nfe)
    assert exact_match(pipelined) >= exact_match(single) - 0.1


def test_an_easy_task_is_answered():
    samples = held_out("reverse", 6, seed=3)
    out = dlm_fast.generate(
        model("tiny-full"),
        [[{"role": "user", "content": s.prompt}] for s in samples],
        preset="fast-dllm",
        block_length=8,
        max_new_tokens=24,
    )
    assert sum(TASKS["reverse"].check(s.prompt, text) for s, text in zip(samples, out.text)) >= 5
    assert out.finish.count("eos") >= 5


def test_the_exact_cache_of_the_block_causal_model_changes_no_token():
    chats = [[{"role": "user", "content": s.prompt}] for s in prompts()[::6]]
    cached, recomputed = (
        dlm_fast.generate(model("tiny-block"), chats, preset="llada2", max_new_tokens=48, cache=cache)
        for cache in ("commit", "none")
    )
    assert cached.text == recomputed.text


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_batch_of_prompts_equals_its_rows_alone(name):
    chats = [[{"role": "user", "content": s.prompt}] for s in prompts()[::9]]
    batch = dlm_fast.generate(model(name), chats, max_new_tokens=32)
    alone = [dlm_fast.generate(model(name), [chat], max_new_tokens=32) for chat in chats]
    assert batch.text == [out.text[0] for out in alone] and batch.nfe == [out.nfe[0] for out in alone]


def test_the_doctor_says_where_each_op_runs(capsys):
    assert cli.main(["doctor", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["embedded"]) == set(EMBEDDED)
    assert {facts["visibility"] for facts in report["embedded"].values()} == {"full", "block"}
    assert all(facts["backend"] == "cpu" and facts["reason"] for facts in report["embedded"].values())


def test_the_doctor_says_why_a_gpu_without_kernels_is_refused(capsys, monkeypatch):
    device = pytest.importorskip("dlm_kernels.device", reason="the kernels need Triton")
    monkeypatch.setattr(device, "INTERPRETED", 75)
    assert cli.main(["doctor", "--json", "--device", "cpu", "--backend", "triton"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(
        "no Triton kernels for compute capability 7.5" in facts["refused"] for facts in report["embedded"].values()
    )


def test_the_demo_prints_its_table_and_one_json_object(capsys):
    assert cli.main(["demo", "--per-task", "1", "--json", "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["decoders"]
    assert len(rows) == len(demo.RUNS) and {row["model"] for row in rows} == set(EMBEDDED)
    assert all(0 <= row["exact_match"] <= 1 and row["nfe"] > 0 for row in rows)


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_commands_that_made_a_model_are_commands(name):
    commands = json.loads((checkpoint_path(name) / "training.json").read_text())
    for command, calls in commands.items():
        for call in [calls] if isinstance(calls[0], str) else calls:
            settings = build_parser().parse_args([command, *call])
            assert settings.command == command


def test_both_heads_are_of_the_embedded_teacher():
    heads = [dlm_fast.load_head(name) for name in ("tiny-filter", "tiny-commit")]
    assert [(head.kind, head.trained_on) for head in heads] == [("filter", "tiny-full"), ("commit", "tiny-full")]
