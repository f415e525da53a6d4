"""Settings of the training commands and lines of their data: what is wrong is named, and nothing is allocated first."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from head_cases import toy_with_a_tokenizer
from helpers import EOS, MASK, VOCAB, save_toy_checkpoint, toy_tokenizer
from named_errors import unnamed

import dlm_fast
from dlm_fast.training import policy
from dlm_fast.training.__main__ import main
from dlm_fast.training.dataset import CanvasShape, DatasetError, Steps, read_dataset
from dlm_fast.training.distill import Distiller, DistillSettings
from dlm_fast.training.networks import check_targets
from dlm_fast.training.train import Settings, Trainer

# Values that hardly any setting takes, and the kinds of setting that take some of them.
VALUES: list[Any] = [
    None, "x", "", "\0", b"x", [], {}, (), object(), torch.tensor(1.0), True, -1, 0, 1.5, -0.5, 10**9, 10**400,
    float("nan"), float("inf"), -float("inf"), [float("nan"), 0.5], (0.9, 1), {"kv": "1"}, {5: 1.0}, ["q_proj", 5],
]  # fmt: skip
KINDS = {
    "int": lambda v: type(v) is int and 0 <= v <= 2**32,
    "int | None": lambda v: v is None or type(v) is int and 1 <= v <= 2**24,
    "float": lambda v: type(v) in (int, float) and 0 <= v < 1e30,
    "float | None": lambda v: v is None or type(v) in (int, float) and 0 <= v < 1e30,
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: v == "x",
    "str | None": lambda v: v in (None, "x", "\0"),  # torch knows what a device is, once a run begins
    "Path": lambda v: v == "x",
    "dict[str, float]": lambda v: v == {} or isinstance(v, dict) and "kv" in v,  # shares are checked by the stream
    "tuple[str, ...]": lambda v: False,
    "tuple[float, float]": lambda v: False,
}
CASES = [
    pytest.param(owner, required, field, id=f"{owner.__name__}: {field.name}")
    for owner, required in ((Settings, {"out": "o"}), (DistillSettings, {"model": "m", "data": "d", "out": "o"}))
    for field in dataclasses.fields(owner)
]


@pytest.mark.parametrize(("owner", "required", "field"), CASES)
def test_a_setting_takes_a_value_of_its_kind_or_is_named(owner, required, field):
    for value in VALUES:
        try:
            owner(**required | {field.name: value})
        except Exception as error:
            assert unnamed(error, field.name) is None, repr(value)[:60]
        else:
            assert KINDS[field.type](value), f"{field.name} takes {value!r}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 10**9), ("warmup", 10**9), ("tokens_per_step", 10**9), ("micro_batches", 10**9), ("max_length", 10**9)]
    + [("lora_rank", 10**9), ("block_length", 10**9), ("threads", 10**9), ("seed", 10**18), ("log_every", 10**9)],
)
def test_sizes_of_a_distillation_are_bounded(name, value):
    with pytest.raises(ValueError, match=f"distill: {name} must be a whole number <= .*, got {name}={value}"):
        DistillSettings("m", "d", "o", **{name: value})


@pytest.mark.parametrize("name", ["steps", "warmup", "tokens_per_step", "threads", "log_every"])
def test_sizes_of_a_pretraining_are_bounded(name):
    with pytest.raises(ValueError, match=f"training: {name} must be a whole number <= .*, got {name}=1000000000"):
        Settings("o", **{name: 10**9})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_toy_checkpoint(path / "model", layers=1)
    lines = [{"prompt_ids": [5, 6], "answer_ids": [7, 8, EOS]}] * 6
    (path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("max_length", {"max_length": 257, "tokens_per_step": 257}), ("max_length", {"max_length": 2**24}),
        ("lora_targets", {"lora_targets": ("q_proj", "w_proj")}), ("lora_targets", {"lora_targets": ("embed_tokens",)}),
        ("device", {"device": "abacus"}), ("device", {"device": "cuda:99"}), ("device", {"device": "meta2"}),
        ("block_length", {"block_length": 2**24}), ("block_length", {"block_length": None}),
        ("attention", {"attention": "flex_attention"}), ("tokens_per_step", {"tokens_per_step": 8}),
        ("model", {"model": "missing"}), ("data", {"data": "missing"}), ("data", {"data": "."}),
        ("teacher", {"teacher": "missing"}), ("device", {"device": "mps", "precision": "bf16"}),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_model_or_machine_are_named(folder, tmp_path, name, changes):
    fitting = dict(block_length=4, max_length=16, tokens_per_step=32, device="cpu", lora_rank=2)
    paths = {"model": folder / "model", "data": folder / "data.jsonl", "out": tmp_path / "out"}
    with pytest.raises((ValueError, TypeError)) as error:
        Distiller(DistillSettings(**paths | fitting | changes))
    named = {"teacher": "missing", "model": "path"}.get(name, name)
    assert unnamed(error.value, named) is None
    assert not (tmp_path / "out").exists()


def test_a_target_of_lora_names_layers_of_the_model(folder):
    model = dlm_fast.load(folder / "model", device="cpu")
    check_targets(model, ["q_proj", "mlp.up_proj", "model.layers.0.self_attn.k_proj"])
    with pytest.raises(ValueError, match="lora_targets must name linear layers of the model, .*, got 'proj'"):
        check_targets(model, ["q_proj", "proj"])


def test_many_micro_batches_cost_no_more_than_the_samples(folder):
    dataset = read_dataset(folder / "data.jsonl", None, DIFFUSION, SHAPE, vocab_size=VOCAB)
    steps = Steps(dataset, SHAPE, eos_id=EOS, tokens_per_step=64, micro_batches=2**24, seed=0)
    assert sum(len(part.prompt) for part in steps.next()) == 6


@pytest.mark.parametrize("weights", [{"kv": float("nan")}, {"kv": -1.0}, {"kv": "1"}, {"chess": 1.0}])
def test_shares_of_tasks_are_numbers(tmp_path, weights):
    with pytest.raises(ValueError) as error:
        Trainer(Settings(tmp_path, weights=weights))
    assert unnamed(error.value, "weight") is None


POLICY = {"kind": "commit", "tasks": ["reverse"], "prompts": 8, "max_new_tokens": 4, "block_length": 4, "width": 4}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value)
     for name in ("prompts", "width", "rounds", "steps", "batch", "block_length", "max_new_tokens", "seed")
     for value in (10**9 if name != "seed" else 10**18, -1, 1.5, "8", None, True, float("nan"))]
    + [(name, value)
       for name in ("learning_rate", "wrong_weight") for value in (0, -1.0, float("nan"), float("inf"), "1")]
    + [("kind", value) for value in (None, "oracle", 5, ["filter"])]
    + [("tasks", value) for value in ([], ["chess"], "reverse", 5, [None])]
    + [("trained_on", 5), ("width", 3), ("max_new_tokens", 10**6)],
)  # fmt: skip
def test_arguments_of_a_policys_training_are_named(model, name, value):
    options = POLICY | {name: value}
    with pytest.raises((ValueError, TypeError)) as error:
        policy.train(model, options.pop("kind"), **options)
    assert unnamed(error.value, name) is None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_with_a_tokenizer(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("model", [None, 5, "tiny-full"])
def test_a_policy_is_trained_on_a_model_that_was_opened(model):
    with pytest.raises((ValueError, TypeError)) as error:
        policy.train(model, **POLICY)
    assert unnamed(error.value, "model") is None


def test_the_policys_output_is_checked_before_its_model_is_opened(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path, tmp_path / "file" / "head.safetensors"):
        assert main(["policy", "--kind", "filter", "--model", "missing", "--out", str(out)]) == 1
        assert "training: out must be" in capsys.readouterr().err
    assert main(["policy", "--kind", "filter", "--out", str(tmp_path / "head"), "--threads", "0"]) == 1
    assert "threads must be a whole number >= 1, got threads=0" in capsys.readouterr().err


DIFFUSION = dlm_fast.DiffusionConfig(mask_token_id=MASK, eos_token_ids=(EOS,), visibility="full")
SHAPE = CanvasShape(block_length=4, absolute=False, max_length=32, extra=0.3)
GOOD = json.dumps({"prompt_ids": [5, 6], "answer_ids": [7, 8, EOS]})
TEXT = {"prompt": "ab", "answer": "cd"}


def read(path: Path, content: str | bytes, **options: Any) -> Any:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == '!' %}{{ raise_exception('no !') }}{% endif %}"
        "{{ m['content'] + ('[EOS]' if m['role'] == 'assistant' else ':') }}{% endfor %}"
    )
    return read_dataset(path, tokenizer, DIFFUSION, SHAPE, vocab_size=VOCAB, **options)


WRONG: dict[str, Any] = {
    "nested lists": "[" * 100_000,
    "nested in a value": '{"prompt": ' + "[" * 100_000,
    "a zero byte": "\0",
    "cut off": GOOD[:-3],
    "two records": GOOD + GOOD,
    "half a character in a prompt": '{"prompt": "a\\ud800", "answer": "b"}',
    "half a character in an answer": '{"prompt": "a", "answer": "\\udfff"}',
    "half a character in a key": '{"prompt": "a", "answer": "b", "\\ud800": 1}',
    "half a character in a task": '{"prompt": "a", "answer": "b", "task": "\\ud800"}',
    "no UTF-8": b'{"prompt": "a\xff", "answer": "b"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16-le"),
    "a line separator alone": "\u2028",
    "a long number": '{"prompt_ids": [' + "9" * 10_000 + '], "answer_ids": [7]}',
    "a number of 400 digits": '{"prompt_ids": [' + "9" * 400 + '], "answer_ids": [7]}',
    "not a number": '{"prompt_ids": [NaN], "answer_ids": [7]}',
    "null": "null",
    "a number": "5",
    "text": '"text"',
    **{f"{key} is {got!r}": json.dumps(TEXT | {key: got}) for key in TEXT for got in (None, 5, True, [], {}, [5])},
    **{
        f"{key} is {value!r}": json.dumps({"prompt_ids": [5], "answer_ids": [7, EOS]} | {key: value})
        for key in ("prompt_ids", "answer_ids")
        for value in (None, 5, "56", {}, [None], [True], [1.0], ["5"], [-1], [VOCAB], [2**70], [MASK], [[5]])
    },
    **{
        f"a message is {message!r}": json.dumps({"prompt": [message], "answer": "a"})
        for message in (
            None, 5, "x", {}, {"role": "user"}, {"role": None, "content": "a"}, {"role": "user", "content": None},
            {"role": "user", "content": 5}, {"role": "user", "content": ["a"]}, {"role": 5, "content": "a"},
        )
    },
    "a message the template refuses": json.dumps(TEXT | {"prompt": "!"}),
    **{f"task is {task!r}": json.dumps(TEXT | {"task": task}) for task in (None, 5, [], {})},
    **{f"order is {order!r}": json.dumps(TEXT | {"order": order}) for order in (None, 5, "0", [0.5], [-1], [2**70])},
}  # fmt: skip


@pytest.mark.parametrize("line", WRONG.values(), ids=[name[:60] for name in WRONG])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_wrong_line_is_named_by_file_and_line(tmp_path, line, end):
    raw = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(DatasetError, match="data.jsonl, line 3: ") as error:
        read(tmp_path / "data.jsonl", f"\ufeff{GOOD}{end}{end}".encode() + raw + f"{end}{GOOD}{end}".encode())
    assert unnamed(error.value, "dataset") is None
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_marks_ends_and_separators_of_lines_change_no_sample(tmp_path, end, separator):
    lines = [
        json.dumps({"prompt": f"a{separator}b", "answer": "c", "task": separator}, ensure_ascii=False),
        GOOD,
        " \t",
    ]
    plain = read(tmp_path / "data.jsonl", "\n".join(lines))
    marked = read(tmp_path / "data.jsonl", "\ufeff" + end.join(lines) + end + end)

    assert len(plain.samples) == 2 and plain.tasks == (separator,)
    assert marked.samples == plain.samples and marked.digest != plain.digest


@pytest.mark.parametrize("kind", ["a folder", "a fifo", "a device", "a link to nowhere", "nothing"])
def test_data_are_a_regular_file(tmp_path, kind):
    path = tmp_path / "data.jsonl"
    made = {"a folder": path.mkdir, "a fifo": lambda: os.mkfifo(path), "a device": lambda: path.symlink_to("/dev/zero")}
    made.get(kind, lambda: kind == "nothing" or path.symlink_to(tmp_path / "nowhere"))()
    with pytest.raises(DatasetError) as error:
        read_dataset(path, None, DIFFUSION, SHAPE, vocab_size=VOCAB)
    assert unnamed(error.value, "data") is None


def test_data_may_be_a_link_to_a_file(tmp_path):
    (tmp_path / "data.jsonl").write_text(GOOD + "\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data.jsonl")
    assert len(read_dataset(tmp_path / "link.jsonl", None, DIFFUSION, SHAPE, vocab_size=VOCAB).samples) == 1
