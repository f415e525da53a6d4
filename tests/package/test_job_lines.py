"""The lines of a job: which are refused together with the file, and which get an answer that says what is wrong."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch
from broken_jobs import kept, watched
from commands import error_of, run
from helpers import EOS, MASK, VOCAB

import dlm_fast
from dlm_fast import jobs, loading
from dlm_fast.decoding import memory

GOOD = {"prompt": "abc"}


def results(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().decode().split("\n")[:-1]]


# Every line of these cannot be decoded, whatever the model is.
BAD_LINES = [
    ('{"prompt"', "not JSON in UTF-8: Expecting ':' delimiter"),
    (b'{"prompt": "\xff"}', "not JSON in UTF-8: 'utf-8' codec can't decode"),
    ("[" * 100_000, "not JSON in UTF-8: maximum recursion depth"),
    ('{"prompt": "a", "prompt": "b"}', "not JSON in UTF-8: an object has the key 'prompt' twice"),
    ('{"text": "a"}', "must be an object with exactly one of 'prompt' and 'canvas'"),
    ('{"prompt": "a", "canvas": [0]}', "must be an object with exactly one"),
    ("[1, 2]", "must be an object"),
    ("null", "must be an object"),
    ({"index": 0, "finish": "eos", "question": "x"}, "must be an object with exactly one"),
    (
        '{"prompt": "a", "meta": ' + "[" * 300 + "]" * 300 + "}",
        "values must be nested at most 64 levels deep, got more",
    ),
    (
        {"prompt": {"role": "user", "content": "a"}},
        "prompt must be text, a chat or token ids, got one message of a chat",
    ),
    ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens must be a whole number >= 1, got max_new_tokens=0"),
    ({"prompt": "a", "max_new_tokens": None}, "max_new_tokens must be a whole number >= 1, got max_new_tokens=None"),
    ({"prompt": "a", "max_new_tokens": 10**30}, "max_new_tokens must be a whole number <= 16777216"),
    ({"prompt": "a", "min_new_tokens": "3"}, "min_new_tokens must be a whole number >= 0, got min_new_tokens='3'"),
    ({"prompt": "a", "temperature": [1]}, "temperature must be a finite number >= 0, got temperature=[1]"),
    ({"prompt": "a", "temperature": 1e-9}, "temperature must be 0 or in [1e-06, 1e+06], got temperature=1e-09"),
    ({"prompt": "a", "min_new_tokens": 7}, "min_new_tokens must be at most max_new_tokens, got 7 > 6"),
    ({"canvas": [MASK], "max_new_tokens": 3}, "max_new_tokens goes with a prompt"),
    ({"canvas": [MASK], "system": "s"}, "system goes with a prompt; a canvas has no beginning"),
    ({"prompt": "a", "system": 3}, "system must be a text, got system=3"),
    ({"prompt": "a", "seed": -1}, "seed must be a whole number >= 0, got seed=-1"),
    ({"prompt": "a", "seed": 2**63}, "seed must be a whole number <= 9223372036854775807"),
    ({"prompt": "a", "stop": ""}, "stop must be a non-empty string or a list of them, got stop=''"),
    ({"prompt": "a", "stop": ["b", 3]}, "stop must be a non-empty string or a list of them, got stop=['b', 3]"),
    ({"prompt": "a", "stop": "b" * 5000}, "stop must be at most 1024 strings of at most 4096 characters, got 1 of up"),
    ({"prompt": "a", "meta": [float("nan")]}, "meta must be JSON that a file in UTF-8 can hold: Out of range float"),
    ({"prompt": "a", "id": "\ud800"}, "id must be JSON that a file in UTF-8 can hold: 'utf-8' codec can't encode"),
]
# And these cannot be decoded by this model and its tokenizer.
BAD_ROWS = [
    ({"prompt": None}, "prompt must be text, a chat or token ids, got None"),
    ({"prompt": 5}, "prompt must be text, a chat or token ids, got 5"),
    ({"prompt": True}, "prompt must be text, a chat or token ids, got True"),
    ({"prompt": []}, "prompt must have at least one token, got an empty one"),
    ({"prompt": {}}, "prompt must be a list or a tokenizer's result with input_ids"),
    ({"prompt": [5, VOCAB]}, f"prompt must hold ids in [0, {VOCAB}), got {VOCAB}"),
    ({"prompt": [5, MASK]}, f"prompt must not contain the mask id {MASK}"),
    ({"prompt": [5.0]}, "prompt must be a string, a chat or token ids, got an item of type float"),
    ({"prompt": "\ud800"}, "prompt must be what the tokenizer can encode"),
    ({"prompt": [{"content": "a"}]}, "prompt must be a chat of messages with a role"),
    ({"prompt": [5] * 251}, "prompt with its new tokens must fit the model's 256 positions, got 257"),
    ({"prompt": "a", "max_new_tokens": 300}, "prompt with its new tokens must fit the model's 256 positions"),
    ({"canvas": []}, "canvas must have at least one token, got an empty one"),
    ({"canvas": [VOCAB, MASK]}, f"canvas must hold ids in [0, {VOCAB}), got {VOCAB}"),
    ({"canvas": None}, "canvas must be text, a chat or token ids, got None"),
    ({"prompt": [5, 6], "system": "be short"}, "system goes with a prompt that becomes a chat"),
    ({"prompt": [{"role": "system", "content": "x"}], "system": "y"}, "system goes with a chat that has no system"),
    ({"prompt": "a", "stop": "[MASK]"}, "stop must be what can be written, got the mask token '[MASK]'"),
]
BAD = [pytest.param(line, message, id=f"{i} {message[:40]}") for i, (line, message) in enumerate(BAD_LINES + BAD_ROWS)]


def written(line) -> bytes:
    return line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()


@pytest.mark.parametrize("line, message", BAD)
def test_a_bad_line_says_so_itself_and_the_others_are_decoded(command, prompts, tmp_path, capsys, line, message):
    prompts.write_bytes(b"\n".join([written(GOOD), b"", written(line), written(GOOD)]))
    status, out, err = run(command, capsys)
    assert status == 1 and out == ""
    assert f"1 of 3 lines cannot be decoded and get finish 'error': line 3: {message}" in err
    assert f"{tmp_path / 'out.jsonl'} is complete, but 1 of 3 lines have finish 'error': line 3: {message}" in err
    first, bad, last = results(tmp_path)
    assert [first["index"], bad["index"], last["index"]] == [0, 1, 2] and "error" not in {**first, **last}
    assert bad["finish"] == "error" and bad["error"].startswith(message) and not bad["ids"] and bad["text"] is None
    prompts.write_bytes(b"\n".join([written(GOOD), written(GOOD), written(GOOD)]))
    assert run([*command, "--overwrite"], capsys)[0] == 0
    alone = results(tmp_path)
    assert [alone[0], alone[2]] == [first, last]


@pytest.mark.parametrize("line, message", BAD)
def test_a_strict_job_decodes_nothing_beside_a_bad_line(command, prompts, tmp_path, capsys, line, message):
    prompts.write_bytes(b"\n".join([written(GOOD), written(line), written(GOOD)]))
    with watched(on_row=lambda index: pytest.fail("a line is decoded")):
        assert f"1 of 3 lines cannot be decoded: line 2: {message}" in error_of([*command, "--strict"], capsys)
    assert not list(tmp_path.glob("out*"))


def test_all_lines_are_checked_before_the_first_forward(command, prompts, tmp_path, capsys):
    bad = {700 + i: written(line) for i, (line, _) in enumerate(BAD_LINES + BAD_ROWS)}
    prompts.write_bytes(b"\n".join(bad.get(number, written(GOOD)) for number in range(1, 801)))
    said = []

    def first(index):
        said.append(capsys.readouterr().err)
        raise KeyboardInterrupt

    with watched(on_row=first):
        assert run(command, capsys)[0] == 130
    assert f"{len(bad)} of 800 lines cannot be decoded" in said[0] and "line 700: not JSON" in said[0]
    assert f"and {len(bad) - 20} more" in said[0]


def test_a_file_without_a_line_that_can_be_decoded_is_refused(command, prompts, tmp_path, capsys):
    for content, message in [("\n\n", "has no prompts"), ("hello\nworld\n", "has no line that can be decoded: line 1")]:
        prompts.write_text(content)
        assert message in error_of(command, capsys)
    prompts.write_text('{"prompt": []}\n{"prompt": [-1]}')  # what the model alone says
    message = error_of(command, capsys)
    assert "2 of 2 lines cannot be decoded: line 1: prompt must have at least one token" in message
    assert "line 2: prompt must hold ids in" in message
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "lada"], "preset must be one of"),
        (["--threshold", "0.3"], "threshold has no effect with rule='quota'"),
        (["--set", "banned_token_ids=5"], "banned_token_ids must be a list of token ids, got banned_token_ids=5"),
        (["--set", "prompts=5"], "settings must leave model, prompts, canvas"),
        (["--max-new-tokens", "0"], "max_new_tokens must be a whole number >= 1, got max_new_tokens=0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_with_the_settings_is_no_lines_problem(command, tmp_path, capsys, flags, message):
    text = error_of([*command, *flags], capsys)
    assert message in text and "line 1" not in text and not list(tmp_path.glob("out*"))


def test_unknown_keys_are_refused_or_repeated(command, prompts, tmp_path, capsys):
    records = [GOOD, {"prompt": "a", "sistem": "x", "answer": 3, "id": 1}, {"prompt": "a", "answer": [4, {"b": None}]}]
    prompts.write_text("\n".join(map(json.dumps, records)))
    message = error_of(command, capsys)
    assert "line 2: unknown keys ['answer', 'sistem'] (and 1 lines more); a line may have prompt or canvas" in message
    assert "--keep-keys" in message and not list(tmp_path.glob("out*"))
    assert run([*command, "--keep-keys"], capsys)[0] == 0
    first, second, third = results(tmp_path)
    assert "answer" not in first and (second["answer"], second["sistem"], second["id"]) == (3, "x", 1)
    assert third["answer"] == [4, {"b": None}]
    prompts.write_text('{"prompt": "a", "text": "b"}')
    assert "line 1: the key 'text' is one of the result's own" in error_of(
        [*command, "--keep-keys", "--overwrite"], capsys
    )


def test_a_line_may_have_a_seed_stop_strings_and_a_system_message_of_its_own(
    command, checkpoint, prompts, tmp_path, capsys
):
    chat = [{"role": "user", "content": "abc"}]
    records = [{"prompt": "abc"}, {"prompt": "abc", "seed": 7}, {"prompt": "abc", "system": "be short"}]
    records += [{"prompt": chat, "system": "be short"}, {"prompt": "abc", "stop": []}, {"canvas": [5, MASK], "seed": 7}]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run([*command, "--stop-string", "~~"], capsys)[0] == 0
    model = dlm_fast.load(checkpoint, device="cpu")
    settings = {"max_new_tokens": 6, "temperature": 0.7, "block_length": 3}
    with_system = [{"role": "system", "content": "be short"}, *chat]
    found = results(tmp_path)
    for index, (given, seed) in enumerate([(chat, 0), (chat, 7), (with_system, 0), (with_system, 0), (chat, 0)]):
        alone = dlm_fast.generate(model, [given], request_ids=[index], seed=seed, **settings)
        assert found[index]["ids"] == alone.sequences[0].tolist(), index
    assert not {"seed", "stop", "system"} & {key for line in found for key in line}
    # A stop string of a line is that line's alone, whatever the job's are.
    text = found[0]["text"]
    records = [{"prompt": "abc", "stop": text[1]}, {"prompt": "abc"}, {"prompt": "abc", "stop": ["zzz", text[2:4]]}]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    job = [*command, "--overwrite", "--stop-string", text[3]]
    assert run(job, capsys)[0] == 0
    for index, (line, stops) in enumerate(zip(results(tmp_path), ([text[1]], [text[3]], ["zzz", text[2:4]]))):
        alone = dlm_fast.generate(model, [chat], request_ids=[index], stop_strings=stops, **settings)
        assert (line["text"], line["finish"]) == (alone.text[0], alone.finish[0])
    assert results(tmp_path)[0]["finish"] == "stop"


def test_a_system_message_needs_a_chat(command, prompts, tmp_path, capsys):
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "abc", "system": "be short"}\n')
    assert run([*command, "--raw"], capsys)[0] == 1
    assert results(tmp_path)[1]["error"].startswith("system goes with a prompt that becomes a chat: one of text")


def test_a_line_that_changes_while_the_job_runs_is_named_and_the_finished_ones_are_kept(
    command, prompts, tmp_path, capsys
):
    # So long that no line waits in a buffer.
    lines = [json.dumps({"prompt": [5 + i], "meta": "x" * 20_000}) for i in range(8)]
    prompts.write_text("\n".join(lines))

    def change(count):
        if count == 3:
            with open(prompts, "r+") as file:
                file.write("\n".join([*lines[:6], lines[6].replace("11", "12", 1), lines[7]]))

    with watched(on_result=change):
        assert "line 7 was changed while the job ran; what was finished is kept" in error_of(command, capsys)
    assert len(kept(tmp_path / "out.jsonl.partial")) >= 4


def test_lines_from_a_pipe_are_read_once(command, prompts, tmp_path, capsys):
    assert run(command, capsys)[0] == 0
    whole, content = (tmp_path / "out.jsonl").read_bytes(), prompts.read_bytes()
    prompts.unlink()
    os.mkfifo(prompts)
    writer = threading.Thread(target=prompts.write_bytes, args=[content])
    writer.start()
    assert run([*command, "--overwrite"], capsys)[0] == 0
    writer.join()
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_two_lines_of_one_id_are_refused(command, prompts, tmp_path, capsys):
    records = [{"prompt": "a", "id": {"x": [1, "b"]}}, {"prompt": "b", "id": None}, {"prompt": "c", "id": None}]
    prompts.write_text("\n".join(map(json.dumps, [*records, {"prompt": "d", "id": {"x": [1, "b"]}}])))
    assert f"--input {prompts}: line 1 and line 4 have the same id {{'x': [1, 'b']}}" in error_of(command, capsys)
    prompts.write_text("\n".join(map(json.dumps, [*records, {"prompt": "d", "id": "1"}, {"prompt": "d", "id": 1}])))
    assert run(command, capsys)[0] == 0  # the text "1" and the number 1 are two ids, and null is none
    assert [line.get("id", "none") for line in results(tmp_path)] == [{"x": [1, "b"]}, None, None, "1", 1]


def test_a_line_ends_where_a_line_of_json_does(command, prompts, tmp_path, capsys):
    meta = "a\u2028b\u2029c\u0085d\x7f"
    prompts.write_bytes(
        b"\xef\xbb\xbf"  # a byte order mark, which editors write
        + json.dumps({"prompt": "abc", "meta": meta}, ensure_ascii=False).encode()
        + b"\r\n"
        + json.dumps({"prompt": "abc"}).encode()
    )
    assert run(command, capsys)[0] == 0
    assert [line.get("meta") for line in results(tmp_path)] == [meta, None]
    # What a job writes, a job reads.
    prompts.write_bytes(
        b"\n".join(
            json.dumps({"prompt": line["ids"] or [EOS], "meta": line}, ensure_ascii=False).encode()
            for line in results(tmp_path)
        )
    )
    assert run([*command, "--overwrite"], capsys)[0] == 0
    assert results(tmp_path)[0]["meta"]["meta"] == meta


def test_an_input_that_cannot_be_read_is_named(command, prompts, capsys):
    prompts.write_bytes(b"\xff\xff")
    assert f"--input {prompts} has no line that can be decoded: line 1: not JSON in UTF-8" in error_of(command, capsys)
    prompts.unlink()
    assert f"--input {prompts} cannot be read" in error_of(command, capsys)
    prompts.mkdir()
    assert f"--input {prompts} cannot be read" in error_of(command, capsys)


def test_records_of_a_program_are_lines_too(checkpoint, tmp_path):
    model = dlm_fast.load(checkpoint, device="cpu")
    settings = {"max_new_tokens": 4}
    lines = jobs.lines_of([{"prompt": [5, 6]}, {"prompt": [VOCAB]}, 7], settings)
    with pytest.raises(jobs.JobError, match=r"is complete, but 2 of 3 lines have finish 'error': records\[1\]: prompt"):
        jobs.run(model, lines, tmp_path / "out.jsonl", settings=settings, batch_size=2)
    assert [line["finish"] == "error" for line in results(tmp_path)] == [False, True, True]
    deep: list = []
    for _ in range(2000):
        deep = [deep]
    odd = [{"prompt": [5], "meta": deep}, {"prompt": deep}, {"prompt": torch.tensor([5])}, {"prompt": [5], "meta": {1}}]
    for line in jobs.lines_of([{"prompt": [5]}, *odd], settings)[1:]:
        assert line.problem is not None
    with pytest.raises(jobs.JobError, match=r"settings must be plain data.* got policy=<function"):
        jobs.run(
            model,
            lines,
            tmp_path / "other.jsonl",
            settings={**settings, "policy": lambda view, choice: choice},
            batch_size=2,
        )
    with pytest.raises(jobs.JobError, match=r"settings must be plain data.* got stop_strings="):
        jobs.run(model, lines, tmp_path / "o.jsonl", settings={**settings, "stop_strings": ["\udcff"]}, batch_size=2)


def test_whatever_a_template_raises_is_the_problem_of_its_line(checkpoint, tmp_path):
    def wrap(prompt):
        return {"a": [5], "b": [6]}[prompt]

    model, settings = dlm_fast.load(checkpoint, device="cpu"), {"max_new_tokens": 4}
    lines = jobs.lines_of([{"prompt": text} for text in "axb"], settings)
    with pytest.raises(jobs.JobError, match=r"1 of 3 lines have finish 'error': records\[1\]: KeyError: 'x'"):
        jobs.run(model, lines, tmp_path / "out.jsonl", settings=settings, batch_size=2, wrap_prompt=wrap)
    assert [line["finish"] == "error" for line in results(tmp_path)] == [False, True, False]


def test_the_longest_lines_are_planned_before_the_first_forward(checkpoint, tmp_path, monkeypatch):
    model, settings = dlm_fast.load(checkpoint, device="cpu"), {"max_new_tokens": 4}
    lines = jobs.lines_of(
        [{"prompt": [5] * 20}, {"prompt": [5] * 20}, {"prompt": [5], "max_new_tokens": 200}], settings
    )
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 40_000)
    with (
        watched(on_row=lambda index: pytest.fail("a line is decoded")),
        pytest.raises(dlm_fast.BatchTooLarge, match="got 1 rows of up to 201 positions"),
    ):
        jobs.run(model, lines, tmp_path / "out.jsonl", settings=settings, batch_size=1)


def test_a_job_can_be_cancelled_and_goes_on(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.job, "SECONDS", 0.0)
    model, settings, cancel = dlm_fast.load(checkpoint, device="cpu"), {"max_new_tokens": 4}, threading.Event()
    lines = jobs.lines_of([{"prompt": [5 + i]} for i in range(6)], settings)
    arguments = {"settings": settings, "batch_size": 2}
    with pytest.raises(dlm_fast.DecodeCancelled):
        jobs.run(
            model,
            lines,
            tmp_path / "out.jsonl",
            **arguments,
            cancel=cancel,
            progress=lambda done, total: cancel.set() if done >= 4 else None,
        )
    assert jobs.run(model, lines, tmp_path / "out.jsonl", **arguments) == 4
    jobs.run(model, lines, tmp_path / "whole.jsonl", **arguments)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_batch_is_bounded_by_what_the_model_was_opened_with(checkpoint, tmp_path):
    model, settings = dlm_fast.load(checkpoint, device="cpu", max_rows=2, max_positions=9), {"max_new_tokens": 4}
    lines = jobs.lines_of([{"prompt": [5] * n} for n in (5, 6)], settings)
    with pytest.raises(jobs.JobError, match="--batch-size must be at most the model's max_rows=2, got 3"):
        jobs.run(model, lines, tmp_path / "out.jsonl", settings=settings, batch_size=3)
    with pytest.raises(jobs.JobError, match=r"1 of 2 lines have finish 'error': records\[1\]: prompt .*max_positions"):
        jobs.run(model, lines, tmp_path / "out.jsonl", settings=settings, batch_size=2)


@pytest.mark.parametrize("suffix", ["", ".partial", ".finished"])
def test_a_job_does_not_destroy_what_it_reads(command, prompts, tmp_path, capsys, monkeypatch, suffix):
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: pytest.fail("the model is opened"))
    source, before = tmp_path / f"out.jsonl{suffix}", prompts.read_bytes()
    prompts.rename(source)
    argv = [str(source) if part == str(prompts) else part for part in command]
    assert f"would replace --input {source}" in error_of([*argv, "--overwrite", "--restart"], capsys)
    (tmp_path / "link.jsonl").hardlink_to(source)
    argv = [str(tmp_path / "link.jsonl") if part == str(prompts) else part for part in command]
    assert "would replace --input" in error_of([*argv, "--overwrite", "--restart"], capsys)
    assert source.read_bytes() == before
