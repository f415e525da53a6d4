"""Data of a distillation: lines are read as a decoder would render them, wrong lines are named, and canvases are drawn
from a seed."""

import json

import pytest
import torch
from helpers import EOS, MASK, VOCAB, toy, toy_tokenizer

import dlm_fast
from dlm_fast.prompts import read_rows
from dlm_fast.tiny.tokenizer import EOS_ID, answer_text, build_tokenizer, prompt_text
from dlm_fast.training.curves import plot, read_log
from dlm_fast.training.dataset import CanvasShape, DatasetError, Steps, read_dataset
from dlm_fast.training.trajectories import teacher_orders

DIFFUSION = dlm_fast.DiffusionConfig(mask_token_id=MASK, eos_token_ids=(EOS,), visibility="full")
SHAPE = CanvasShape(block_length=4, absolute=False, max_length=32, extra=0.3)


def file_of(tmp_path, *records) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def read(path, shape=SHAPE, tokenizer=None, **options):
    return read_dataset(path, tokenizer or toy_tokenizer(), DIFFUSION, shape, vocab_size=VOCAB, **options)


def ids(prompt: int, answer: int, **fields) -> dict:
    return {"prompt_ids": [5] * prompt, "answer_ids": [6] * (answer - 1) + [EOS], **fields}


def test_text_is_tokenised_as_the_tiny_models_are_trained_and_prompted(tmp_path):
    tokenizer = build_tokenizer()
    chat = [{"role": "user", "content": "Add 12 and 34"}]
    path = file_of(
        tmp_path, {"task": "add", "prompt": "Add 12 and 34", "answer": "2+4=6"}, {"prompt": chat, "answer": "2+4=6"}
    )
    diffusion = dlm_fast.DiffusionConfig(mask_token_id=MASK, eos_token_ids=(EOS_ID,), visibility="full")
    text, messages = read_dataset(path, tokenizer, diffusion, SHAPE, vocab_size=256).samples

    encoded = read_rows("prompts", [chat], None, tokenizer)[0].ids
    assert text.prompt == messages.prompt == encoded == tokenizer(prompt_text("Add 12 and 34"))["input_ids"]
    assert text.answer == messages.answer == tokenizer(answer_text("2+4=6"))["input_ids"]
    assert (text.task, messages.task) == (0, -1)


def test_an_answer_ends_with_its_eos_exactly_once(tmp_path):
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{{ '[EOS]\n' if m['role'] == 'assistant' else ':' }}{% endfor %}"
    )
    (templated,) = read(file_of(tmp_path, {"prompt": "ab", "answer": "cd"}), tokenizer=tokenizer).samples
    tokenizer.chat_template = None
    bare, given, open_ended = read(
        file_of(tmp_path, {"prompt": "ab", "answer": "cd"}, ids(2, 3), {"prompt_ids": [5], "answer_ids": [7, 7]}),
        tokenizer=tokenizer,
    ).samples

    assert templated.answer == bare.answer == [4, 5, EOS]  # the template's newline after it is cut off
    assert given.answer == [6, 6, EOS] and open_ended.answer == [7, 7, EOS]


GOOD = ids(3, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "ab"}, "must have 'answer', got .'prompt'."),
        ({"prompt_ids": [5]}, "must have 'answer_ids', got .'prompt_ids'."),
        ({}, "must have 'prompt', got .."),
        ("{", "must be JSON of whole characters, got '{'"),
        ("[1]", "must be a JSON object, got list"),
        ({"prompt": "ab", "answer": " "}, "answer must not be empty, got ' '"),
        ({"prompt": "ab", "answer": 5}, "answer must be text, got int"),
        (
            {"prompt": [{"content": "x"}], "answer": "a"},
            "prompt must be text or a list of messages with role and content, got ",
        ),
        ({"prompt": "ab", "answer": "c", "reply": "d"}, "must have no unknown keys, got .'reply'.; known are"),
        ({"prompt": "ab", "answer_ids": [5]}, "must be text or token ids, got both"),
        ({"prompt_ids": [5.5], "answer_ids": [5]}, "prompt_ids must be a list of whole numbers, got .5.5."),
        ({"prompt_ids": [5], "answer_ids": [VOCAB]}, f"answer must hold ids in .0, {VOCAB}., got {VOCAB}"),
        ({"prompt_ids": [5], "answer_ids": [MASK, 6]}, "answer must not contain the mask id 0"),
        (
            {"prompt_ids": [5], "answer_ids": [6, EOS, 6]},
            "answer must have its EOS 1 at its end only, got it at place 1 of 3",
        ),
        (
            ids(29, 2),
            "block_length must fit between the prompt and max_length, "
            "got block_length=4, a prompt of 29 tokens and max",
        ),
        (ids(7, 26), "must fit max_length=32 in whole blocks of 4, got 7 . 26 tokens, which take 35"),
        (
            {"prompt": "ab", "answer": "cd"},
            "answer must stand after the prompt that the chat template opens for generation, got another",
        ),
        (dict(GOOD, task=3), "task must be a name, got 3"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = file_of(tmp_path, GOOD, "", line)

    with pytest.raises(DatasetError, match=rf"dataset: .*data.jsonl, line 3: .*({message})"):
        read(path)


def test_files_that_hold_nothing_to_train_on_are_named(tmp_path):
    with pytest.raises(DatasetError, match="must have a sample to train on, got none .0 dropped"):
        read(file_of(tmp_path, ""))
    with pytest.raises(DatasetError, match="data must be a file that can be read, got '.*missing.jsonl'"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(
        DatasetError, match="eos_token_ids of the model must have an id, since an answer must end, got none"
    ):
        read_dataset("x", None, dlm_fast.DiffusionConfig(MASK, (), "full"), SHAPE, vocab_size=VOCAB)
    with pytest.raises(DatasetError, match="line 1: text needs a tokenizer, got a checkpoint without one"):
        read_dataset(file_of(tmp_path, {"prompt": "a", "answer": "b"}), None, DIFFUSION, SHAPE, vocab_size=VOCAB)


def test_samples_that_are_too_long_are_dropped_only_when_asked_and_counted(tmp_path):
    path = file_of(tmp_path, GOOD, ids(30, 9))
    with pytest.raises(DatasetError, match="line 2"):
        read(path)

    dataset = read(path, too_long="drop")

    assert (len(dataset.samples), dataset.dropped) == (1, 1)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_canvas_is_prompt_and_whole_blocks_that_hold_the_answer(tmp_path, absolute):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 12, (60, 2), generator=generator).tolist()
    shape = CanvasShape(4, absolute, 32, 0.4)
    dataset = read(file_of(tmp_path, *(ids(p, a + 1) for p, a in sizes)), shape)
    steps = Steps(dataset, shape, eos_id=EOS, tokens_per_step=200, micro_batches=3, seed=1)
    extra = []
    for canvases in (part for _ in range(30) for part in steps.next()):
        assert canvases.tokens.shape[1] == canvases.length.max()
        for tokens, prompt, length, eos in zip(
            canvases.tokens.tolist(), *(t.tolist() for t in (canvases.prompt, canvases.length, canvases.first_eos))
        ):
            assert (length - (0 if absolute else prompt)) % 4 == 0 and eos < length <= 32
            assert tokens == [5] * prompt + [6] * (eos - prompt) + [EOS] * (len(tokens) - eos)
            extra.append(length - shape.needed(prompt, eos + 1 - prompt))
    assert min(extra) == 0 and max(extra) >= 8
    assert 0.3 < sum(e > 0 for e in extra) / len(extra) < 0.5


def test_every_sample_comes_once_an_epoch_and_the_seed_decides_when(tmp_path):
    dataset = read(
        file_of(tmp_path, *({"prompt_ids": [5 + i % 40, 5 + i // 40], "answer_ids": [6, EOS]} for i in range(70)))
    )

    def epochs(seed, position=(0, 0), steps=40):
        stream = Steps(dataset, SHAPE, eos_id=EOS, tokens_per_step=64, micro_batches=2, seed=seed)
        stream.position = position
        out = []
        for _ in range(steps):
            epoch = stream.position[0]
            out.append((epoch, [tuple(row[:2]) for part in stream.next() for row in part.tokens.tolist()]))
        return out

    first = epochs(1)
    seen = [prompt for epoch, prompts in first if epoch == 0 for prompt in prompts]
    assert len(seen) == len(set(seen)) == 70
    assert epochs(1) == first and epochs(2) != first
    assert epochs(1, position=(0, 3), steps=20) == first[3:23]
    assert [p for e, prompts in first if e == 1 for p in prompts][:20] != seen[:20]


def test_a_step_is_cut_by_length_so_that_padding_is_small(tmp_path):
    dataset = read(file_of(tmp_path, *(ids(1 + i % 20, 4) for i in range(200))))
    areas = []
    for parts in (1, 4):
        steps = Steps(dataset, SHAPE, eos_id=EOS, tokens_per_step=640, micro_batches=parts, seed=0)
        areas.append(sum(part.tokens.numel() for _ in range(4) for part in steps.next()))
        live = sum(
            int(part.length.sum())
            for part in Steps(dataset, SHAPE, eos_id=EOS, tokens_per_step=640, micro_batches=parts, seed=0).next()
        )
        assert 560 <= live <= 640

    assert areas[1] < 0.8 * areas[0]


def test_a_teachers_order_is_a_permutation_block_by_block(tmp_path):
    dataset = read(file_of(tmp_path, *(ids(3 + i, 5 + i) for i in range(4))))
    orders = teacher_orders(toy("full"), dataset, block_length=4, batch_size=3)

    for sample, order in zip(dataset.samples, orders):
        assert len(order) == -(-len(sample.answer) // 4) * 4
        assert sorted(order) == list(range(len(order)))
        for begin in range(0, len(order), 4):
            assert sorted(order[begin : begin + 4]) == list(range(begin, begin + 4))
    assert any(order != sorted(order) for order in orders)


def test_curves_of_one_run_and_of_several_become_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    logs = []
    for name, accuracy in (("one", 0.5), ("two", {"add": 0.2, "sort": 0.4})):
        (tmp_path / name).mkdir()
        logs.append(tmp_path / name / "log.jsonl")
        logs[-1].write_text(
            "".join(json.dumps({"step": i, "loss": 1 / i, "accuracy": accuracy}) + "\n" for i in (1, 2, 3))
        )
    plot(logs[1:], tmp_path / "one.png")
    plot(logs, tmp_path / "both.svg")

    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "both.svg").read_text()
    logs[0].write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="line 1: loss must be a number, got loss=None"):
        read_log(logs[0])
