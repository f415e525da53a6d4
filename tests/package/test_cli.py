"""The command line and its jobs: what goes to which stream, what a broken run leaves, and how it is resumed."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MASK, Synced, random_prompts, save_toy_checkpoint

import dlm_fast
from dlm_fast import cli, files, jobs, loading
from dlm_fast.training import __main__ as training

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    save_toy_checkpoint(path)
    return path


@pytest.fixture
def prompts(tmp_path):
    """Seven records: text, chat, ids with an id of their own, and canvases between them."""
    records = [
        {"prompt": "abc"},
        {"prompt": [{"role": "user", "content": "hi"}], "id": "chat"},
        {"prompt": random_prompts([5])[0], "id": 7},
    ]
    records += [{"canvas": [5, MASK, 7, MASK]}, {"canvas": [MASK, 9]}, {"prompt": "xyz"}, {"prompt": "0 1 2"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    return path


@pytest.fixture
def command(checkpoint, prompts, tmp_path):
    """generate, from `prompts` to out.jsonl, in batches of two."""
    where = ["--model", str(checkpoint), "--input", str(prompts), "--output", str(tmp_path / "out.jsonl")]
    return [
        "generate",
        *where,
        "--max-new-tokens",
        "6",
        "--temperature",
        "0.7",
        "--batch-size",
        "2",
        "--block-length",
        "3",
        "--device",
        "cpu",
    ]


def run(argv, capsys) -> tuple[int, str, str]:
    status = cli.main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def error_of(argv, capsys) -> str:
    """The one line that an error is."""
    status, out, err = run(argv, capsys)
    lines = [line for line in err.splitlines() if line.startswith("dlm-fast")]
    assert status == 1 and out == "" and len(lines) == 1 and "Traceback" not in err
    return lines[0]


class Interrupted(Exception):
    pass


def break_after(monkeypatch, batches: int, error: BaseException) -> None:
    """The decode of batch number `batches` (from 0) raises."""
    real, done = jobs.generate, iter(range(100))

    def generate(*args, **kwargs):
        if next(done) == batches:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(jobs, "generate", generate)


def test_prompts_on_the_command_line_are_answered_on_stdout(checkpoint, capsys):
    argv = [
        "generate",
        "--model",
        str(checkpoint),
        "--prompt",
        "abc",
        "--prompt",
        "de",
        "--max-new-tokens",
        "4",
        "--device",
        "cpu",
    ]
    status, out, _ = run([*argv, "--json"], capsys)
    report = json.loads(out.splitlines()[-1])
    assert status == 0 and report["preset"] == "llada" and [r["index"] for r in report["results"]] == [0, 1]
    status, out, _ = run(argv, capsys)
    assert status == 0 and out == "".join(r["text"] + "\n" for r in report["results"])


def test_a_text_prompt_goes_through_the_chat_template_unless_raw(checkpoint, capsys):
    argv = ["generate", "--model", str(checkpoint), "--max-new-tokens", "5", "--device", "cpu", "--json"]
    model = dlm_fast.load(checkpoint, device="cpu")
    for flags, prompt in (([], [{"role": "user", "content": "abc"}]), (["--raw"], "abc")):
        _, out, _ = run([*argv, *flags, "--prompt", "abc"], capsys)
        expected = dlm_fast.generate(model, [prompt], max_new_tokens=5)
        assert json.loads(out)["results"][0]["ids"] == expected.sequences[0].tolist()


def test_an_adapter_beside_the_weights_needs_a_word(tmp_path, capsys):
    peft = pytest.importorskip("peft", reason="an adapter is made and merged by peft")
    model = save_toy_checkpoint(tmp_path)
    answers = {}
    argv = [
        "generate",
        "--model",
        str(tmp_path),
        "--prompt",
        "abcde",
        "--max-new-tokens",
        "9",
        "--device",
        "cpu",
        "--json",
    ]

    def answer(*flags) -> list[int]:
        return json.loads(run([*argv, *flags], capsys)[1])["results"][0]["ids"]

    answers["before"] = answer()
    peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).save_pretrained(tmp_path)
    assert "holds an adapter (adapter_config.json), which is applied on request only" in error_of(argv[:-1], capsys)
    assert answer("--adapter", "none") == answers["before"] != answer("--adapter", str(tmp_path))


def test_every_record_gets_its_line_in_order(command, tmp_path, capsys):
    status, out, _ = run([*command, "--json"], capsys)
    assert status == 0
    assert json.loads(out.splitlines()[-1]) == {"output": str(tmp_path / "out.jsonl"), "records": 7, "resumed": 0}
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(7))
    assert [line.get("id") for line in lines] == [None, "chat", 7, None, None, None, None]
    assert set(lines[0]) == {"index", "text", "ids", "finish", "nfe", "query_tokens", "tpf"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_every_batch_is_on_the_disk_before_the_next_one_and_all_of_it_before_it_is_named(
    command, tmp_path, capsys, monkeypatch
):
    synced, decode, seen = Synced(monkeypatch), jobs.generate, []

    def generate(*args, **kwargs):
        seen.append(synced.holds(tmp_path / "out.jsonl.partial"))
        return decode(*args, **kwargs)

    monkeypatch.setattr(jobs, "generate", generate)
    assert run(command, capsys)[0] == 0
    assert seen == [True] * 4 and synced.named == ["out.jsonl"]


def test_the_output_does_not_depend_on_the_batch_size(command, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    run(command, capsys)
    by_two = output.read_bytes()
    assert run([*command, "--overwrite", "--batch-size", "7"], capsys)[0] == 0
    assert output.read_bytes() == by_two


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_resuming_a_broken_run_equals_an_unbroken_one_byte_for_byte(command, tmp_path, capsys, monkeypatch, batches):
    output = tmp_path / "out.jsonl"
    run(command, capsys)
    whole = output.read_bytes()
    output.unlink()
    with monkeypatch.context() as patch:
        break_after(patch, batches, Interrupted("power cut"))
        assert "power cut" in error_of(command, capsys)
    assert not output.exists() and (tmp_path / "out.jsonl.partial").exists()
    status, out, _ = run([*command, "--json"], capsys)
    finished = {0: 0, 1: 2, 3: 5}[batches]  # a batch holds prompts or canvases, never both: 2, 1, 2, 2
    assert status == 0 and json.loads(out)["resumed"] == finished
    assert output.read_bytes() == whole and not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize("tail", [b'{"index": 2, "te', b'{"index": 2}', b"\xff\xfe\n", b"\n"])
def test_a_damaged_last_line_is_dropped_and_decoded_again(command, tmp_path, capsys, monkeypatch, tail):
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    run(command, capsys)
    whole = output.read_bytes()
    output.unlink()
    with monkeypatch.context() as patch:
        break_after(patch, 1, Interrupted())
        run(command, capsys)
    partial.write_bytes(partial.read_bytes() + tail)
    assert run(command, capsys)[0] == 0
    assert output.read_bytes() == whole


def test_a_partial_file_cut_inside_its_header_is_started_again(command, tmp_path, capsys):
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    partial.write_bytes(b'{"input": "12')
    assert run(command, capsys)[0] == 0
    assert len(output.read_bytes().splitlines()) == 7


def test_a_partial_file_of_other_settings_is_refused_and_kept(command, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        break_after(patch, 1, Interrupted())
        run(command, capsys)
    partial = tmp_path / "out.jsonl.partial"
    before = partial.read_bytes()
    message = error_of([*command, "--seed", "9"], capsys)
    assert "is from a run with other settings" in message and "--restart" in message
    assert partial.read_bytes() == before
    assert run([*command, "--seed", "9", "--restart"], capsys)[0] == 0


def test_a_partial_file_of_another_model_is_refused(command, checkpoint, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other"
    save_toy_checkpoint(other, seed=5)
    with monkeypatch.context() as patch:
        break_after(patch, 1, Interrupted())
        run(command, capsys)
    argv = [str(other) if part == str(checkpoint) else part for part in command]
    assert "is from a run with other model" in error_of(argv, capsys)


def test_an_existing_output_is_kept_unless_overwritten(command, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    assert f"--output {output} exists; use --overwrite to replace it" in error_of(command, capsys)
    assert output.read_text() == "precious"
    assert run([*command, "--overwrite"], capsys)[0] == 0
    assert len(output.read_text().splitlines()) == 7


def test_an_interrupt_keeps_what_was_finished(command, tmp_path, capsys, monkeypatch):
    break_after(monkeypatch, 2, KeyboardInterrupt())
    status, out, err = run(command, capsys)
    assert status == 130 and out == "" and err.splitlines()[-1] == "dlm-fast: interrupted; what was finished is kept"
    assert len((tmp_path / "out.jsonl.partial").read_bytes().splitlines()) == 1 + 3


class FullDisk:
    """A binary file that takes `room` more bytes, and then says that the disk is full."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room[0] -= len(data)
        if self.room[0] < 0:
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()


@pytest.mark.parametrize("room", [0, 200, 700, 1000, 1400])
def test_a_full_disk_is_an_error_and_no_output_looks_complete(command, tmp_path, capsys, monkeypatch, room):
    output = tmp_path / "out.jsonl"
    run(command, capsys)
    whole = output.read_bytes()
    output.unlink()
    left, real_open = [room], Path.open

    def open_on_full_disk(self, mode="r", *args, **kwargs):
        file = real_open(self, mode, *args, **kwargs)
        return FullDisk(file, left) if self.parent == tmp_path and mode in ("wb", "ab") else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        assert "No space left on device" in error_of(command, capsys)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == ["out.jsonl.partial"]
    assert run(command, capsys)[0] == 0  # with room again, it goes on
    assert output.read_bytes() == whole


def test_a_disk_that_fills_up_while_the_output_is_finished_keeps_the_old_output(command, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    monkeypatch.setattr(
        jobs.os, "replace", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    )
    assert "No space left on device" in error_of([*command, "--overwrite"], capsys)
    assert output.read_text() == "old"


def test_an_output_in_a_folder_that_is_missing_or_read_only_is_an_error(command, tmp_path, capsys, monkeypatch):
    missing = str(tmp_path / "no" / "out.jsonl")
    argv = [missing if part == str(tmp_path / "out.jsonl") else part for part in command]
    assert missing in error_of(argv, capsys)
    # Root may write anywhere, so a read-only disk is simulated.
    real_open = Path.open

    def open_read_only(self, mode="r", *args, **kwargs):
        if mode != "r" and mode != "rb":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return real_open(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_read_only)
    assert "Read-only file system" in error_of(command, capsys)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write to a read-only folder")
def test_an_output_in_a_read_only_folder_is_an_error(command, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    argv = [str(locked / "out.jsonl") if part == str(tmp_path / "out.jsonl") else part for part in command]
    assert "Permission denied" in error_of(argv, capsys)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "a"}\n{"prompt"', r"line 2: not JSON"),
        ('{"text": "a"}', r"line 1: must be an object with exactly one of 'prompt' and 'canvas'"),
        ('{"prompt": "a", "canvas": [0]}', r"line 1: must be an object with exactly one"),
        ("[1, 2]", r"line 1: must be an object"),
        ("\n\n", r"has no prompts"),
    ],
)
def test_a_bad_input_line_is_named_before_anything_is_decoded(command, prompts, tmp_path, capsys, content, message):
    prompts.write_text(content)
    assert message in error_of(command, capsys)
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_an_input_that_cannot_be_read_is_named(command, prompts, capsys):
    prompts.write_bytes(b"\xff\xff")
    assert f"--input {prompts} cannot be read" in error_of(command, capsys)
    prompts.unlink()
    assert f"--input {prompts} cannot be read" in error_of(command, capsys)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "sdar"], "preset sdar decodes models of visibility 'block', this model is 'full'"),
        (["--preset", "nope"], "preset must be one of llada"),
        (["--block-length", "0"], "block_length must be a whole number >= 1 or None, got block_length=0"),
        (["--temperature", "-1"], "temperature must be a finite number >= 0, got temperature=-1.0"),
        (["--max-new-tokens", "0"], "max_new_tokens must be a finite number >= 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--dtype", "int8"], "--dtype must be bfloat16, float16 or float32, got 'int8'"),
        (["--backend", "cuda"], "backend must be one of auto, triton, reference or an Ops, got backend='cuda'"),
        (
            ["--model", "nowhere"],
            f"path must be a checkpoint folder or one of {', '.join(files.EMBEDDED)}, got 'nowhere'",
        ),
    ],
)
def test_a_bad_flag_is_one_line_that_names_argument_rule_and_value(command, capsys, flags, message):
    assert message in error_of([*command, *flags], capsys)


def test_debug_shows_the_traceback(command):
    with pytest.raises(ValueError, match="preset must be one of"):
        cli.main([*command, "--preset", "nope", "--debug"])


def test_input_needs_output(checkpoint, prompts, capsys):
    assert "--input needs --output" in error_of(
        ["generate", "--model", str(checkpoint), "--input", str(prompts)], capsys
    )


@pytest.mark.parametrize("argv", [[], ["nope"], ["generate"], ["generate", "--model", "x"], ["presets", "--nope"]])
def test_a_bad_command_line_shows_its_usage_and_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("usage: dlm-fast")


def test_a_nan_model_is_an_error_that_names_the_rows(checkpoint, capsys, monkeypatch):
    def poisoned(*args, **kwargs):
        model = load(*args, **kwargs)
        model.lm_head.weight.data.fill_(float("nan"))
        return model

    load = loading.load
    monkeypatch.setattr(loading, "load", poisoned)
    assert "got NaN" in error_of(["generate", "--model", str(checkpoint), "--prompt", "ab", "--device", "cpu"], capsys)


def test_a_job_keeps_the_rows_beside_a_failed_one(checkpoint, prompts, tmp_path):
    model = dlm_fast.load(checkpoint, device="cpu")
    poison = 47
    model.model.embed_tokens.weight.data[poison] = float("nan")
    records = [{"prompt": [5, 6]}, {"prompt": [7, poison]}, {"prompt": [9]}]
    output = tmp_path / "results.jsonl"
    settings = {"max_new_tokens": 4, "banned_token_ids": [poison]}
    with pytest.raises(jobs.JobError, match=r"is complete, but .* were not in rows \[1\]"):
        jobs.run(model, records, output, settings=settings, batch_size=2)
    finishes = [json.loads(line)["finish"] for line in output.read_text().splitlines()]
    assert finishes[1] == "error" and "error" not in (finishes[0], finishes[2]) and len(finishes) == 3


def test_presets_are_listed(capsys):
    status, out, _ = run(["presets"], capsys)
    assert status == 0 and all(name in out for name in dlm_fast.PRESETS)
    report = json.loads(run(["presets", "--json"], capsys)[1])
    assert [row["name"] for row in report["presets"]] == list(dlm_fast.PRESETS)


def test_the_page_of_decoders_is_the_table_of_presets(capsys):
    assert run(["presets", "--markdown"], capsys)[1] == (ROOT / "docs" / "decoders.md").read_text(encoding="utf-8")


def test_the_picture_in_the_readme_is_what_the_command_draws(tmp_path, capsys):
    drawn = tmp_path / "trace.svg"
    assert run(["demo", "--svg", str(drawn), "--backend", "reference", "--device", "cpu"], capsys)[0] == 0
    assert drawn.read_bytes() == (ROOT / "docs" / "trace.svg").read_bytes()
    assert "(docs/trace.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(drawn.read_bytes()) < 60_000


@pytest.mark.parametrize("flag", ["--seed", "--per-task"])
def test_the_picture_is_always_the_same(tmp_path, capsys, flag):
    status, _, error = run(["demo", "--svg", str(tmp_path / "trace.svg"), flag, "1"], capsys)
    assert status == 1 and f"--svg draws one decode, always the same, and goes without {flag}" in error
    assert not (tmp_path / "trace.svg").exists()


def test_any_option_of_a_preset_can_be_set(capsys):
    arguments = [
        "generate",
        "--model",
        "tiny-full",
        "--prompt",
        "Sort 3 1",
        "--preset",
        "local-leap",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    status, out, _ = run([*arguments, "--set", "distance=2", "--set", "block_length=2"], capsys)
    assert status == 0 and len(json.loads(out.splitlines()[-1])["results"]) == 1
    assert run([*arguments, "--set", "distances=2"], capsys)[0] == 1


def test_the_module_runs_as_a_program_and_fails_with_a_status():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "dlm_fast", "generate", "--model", "nowhere", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("dlm-fast generate: load: path must be")
    assert "Traceback" not in done.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"dlm-fast {dlm_fast.__version__}\n"


def test_no_command_takes_an_abbreviated_flag(monkeypatch):
    made = []
    real = argparse.ArgumentParser.__init__

    def recorded(self, *args, **kwargs):
        real(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", recorded)
    cli._parser()
    training.build_parser()
    for module in ("bench.__main__", "dlm_kernels.static", "dlm_kernels.propose"):
        with pytest.raises(SystemExit):
            importlib.import_module(module).main(["--help"])
    programs = {parser.prog.rpartition("python -m ")[2] for parser in made}
    assert {
        "dlm-fast generate",
        "dlm_fast.training distill",
        "bench quality",
        "dlm_kernels.static",
        "dlm_kernels.propose",
    } <= programs
    assert not [parser.prog for parser in made if parser.allow_abbrev]


@pytest.mark.parametrize(
    "flag, hint",
    [
        (["--steps", "4"], "--steps: use --steps-per-block = steps / blocks"),
        (["--temp", "1"], "--temp: use --temperature"),
        (["--gen_length=64"], "--gen_length: use --max-new-tokens"),
        (["--thresold", "0.5"], "--thresold: use --threshold"),
    ],
)
def test_a_flag_of_another_name_says_which_one_is_meant(command, capsys, flag, hint):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, *flag])
    assert caught.value.code == 2 and hint in capsys.readouterr().err


def test_an_option_that_the_decoder_does_not_read_is_refused(command, capsys):
    message = error_of([*command, "--threshold", "0.3"], capsys)
    assert "threshold has no effect with rule='quota' (preset llada): it is read by rule='threshold'" in message


@pytest.fixture
def own_settings(prompts):
    """Lines with settings of their own between lines without."""
    records = [{"prompt": "abc"}, {"prompt": "abc", "max_new_tokens": 2, "temperature": 0.0, "meta": {"answer": [1]}}]
    records += [
        {"prompt": "xy", "min_new_tokens": 6, "temperature": 1.5},
        {"canvas": [5, MASK], "temperature": 0},
        {"prompt": "z", "id": 3},
    ]
    prompts.write_text("\n".join(map(json.dumps, records)))
    return records


def test_a_line_may_have_settings_of_its_own(command, own_settings, checkpoint, tmp_path, capsys):
    assert run(command, capsys)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model = dlm_fast.load(checkpoint, device="cpu")
    job = {"max_new_tokens": 6, "min_new_tokens": 0, "temperature": 0.7}
    for index in (0, 1, 2, 4):
        record = own_settings[index]
        settings = {name: record.get(name, value) for name, value in job.items()}
        chat = [{"role": "user", "content": record["prompt"]}]
        alone = dlm_fast.generate(model, [chat], block_length=3, request_ids=[index], **settings)
        assert lines[index]["ids"] == alone.sequences[0].tolist()
    assert [line.get("meta") for line in lines] == [None, {"answer": [1]}, None, None, None] and lines[4]["id"] == 3


def test_settings_of_lines_depend_neither_on_the_batch_nor_on_a_break(
    command, own_settings, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "out.jsonl"
    run(command, capsys)
    whole = output.read_bytes()
    assert run([*command, "--overwrite", "--batch-size", "3"], capsys)[0] == 0 and output.read_bytes() == whole
    output.unlink()
    with monkeypatch.context() as patch:
        break_after(patch, 1, Interrupted())
        run(command, capsys)
    assert run(command, capsys)[0] == 0 and output.read_bytes() == whole


@pytest.mark.parametrize(
    "line, message",
    [
        (
            {"prompt": "a", "system": "x", "answer": 3},
            "line 2: unknown keys ['answer', 'system']; a line may have prompt or canvas, id, meta",
        ),
        (
            {"prompt": "a", "max_new_tokens": 0},
            "line 2: max_new_tokens must be a whole number >= 1, got max_new_tokens=0",
        ),
        ({"prompt": "a", "max_new_tokens": 10**30}, "line 2: max_new_tokens must be a whole number <= 16777216"),
        (
            {"prompt": "a", "min_new_tokens": "3"},
            "line 2: min_new_tokens must be a whole number >= 0, got min_new_tokens='3'",
        ),
        ({"prompt": "a", "temperature": [1]}, "line 2: temperature must be a finite number >= 0, got temperature=[1]"),
        (
            {"prompt": "a", "temperature": 1e-9},
            "line 2: temperature must be 0 or in [1e-06, 1e+06], got temperature=1e-09",
        ),
        ({"prompt": "a", "min_new_tokens": 7}, "line 2: min_new_tokens must be at most max_new_tokens, got 7 > 6"),
        ({"canvas": [MASK], "max_new_tokens": 3}, "line 2: max_new_tokens goes with a prompt"),
        (
            {"prompt": "a", "meta": [float("nan")]},
            "line 2: meta must be JSON that a file in UTF-8 can hold: Out of range float values",
        ),
        (
            {"prompt": "a", "id": "\ud800"},
            "line 2: id must be JSON that a file in UTF-8 can hold: 'utf-8' codec can't encode",
        ),
    ],
)
def test_a_bad_setting_of_a_line_is_named_before_anything_is_decoded(command, prompts, tmp_path, capsys, line, message):
    prompts.write_text(json.dumps({"prompt": "abc"}) + "\n" + json.dumps(line))
    assert message in error_of(command, capsys)
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_temperature_that_the_decoder_refuses_is_named_before_anything_is_decoded(command, prompts, tmp_path, capsys):
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "abc", "temperature": 0.5}')
    message = error_of([*command, "--preset", "freedave", "--temperature", "0"], capsys)
    assert "the line of index 1: generate: drafts are lossless for greedy decoding only, got temperature=0.5" in message
    prompts.write_text('{"prompt": "abc", "temperature": 0}\n{"prompt": "abc"}')
    message = error_of([*command, "--preset", "freedave", "--temperature", "0.5"], capsys)
    assert "the line of index 1: generate: drafts are lossless for greedy decoding only, got temperature=0.5" in message


def test_a_line_ends_where_a_line_of_json_does(command, prompts, tmp_path, capsys):
    meta = "a\u2028b\u0085c"
    prompts.write_text(
        json.dumps({"prompt": "abc", "meta": meta}, ensure_ascii=False) + "\r\n" + json.dumps({"prompt": "abc"})
    )
    assert run(command, capsys)[0] == 0
    lines = (tmp_path / "out.jsonl").read_bytes().decode().split("\n")[:-1]
    assert [json.loads(line).get("meta") for line in lines] == [meta, None]
    assert not (tmp_path / "out.jsonl.partial").exists()
