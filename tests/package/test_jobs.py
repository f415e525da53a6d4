"""Jobs: prompts from a file, what a broken run leaves and how it is resumed, full disks, settings of single lines."""

from __future__ import annotations

import errno
import json
import os

import published
import pytest
from broken_jobs import Interrupted, broken_after, kept, watched
from commands import error_of, run
from helpers import MASK, Synced, save_toy_checkpoint

import dlm_fast
from dlm_fast import cli, loading
from dlm_fast.jobs import job
from dlm_fast.jobs import partial as partials


def test_every_record_gets_its_line_in_order(command, tmp_path, capsys):
    status, out, _ = run([*command, "--json"], capsys)
    assert status == 0
    assert json.loads(out.splitlines()[-1]) == {"output": str(tmp_path / "out.jsonl"), "records": 7, "resumed": 0}
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(7))
    assert [line.get("id") for line in lines] == [None, "chat", 7, None, None, None, None]
    assert set(lines[0]) == {"index", "text", "ids", "finish", "nfe", "query_tokens", "tpf"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_results_are_on_the_disk_when_some_have_gathered_and_all_of_them_before_they_are_named(
    command, prompts, tmp_path, capsys, monkeypatch
):
    partial = tmp_path / "out.jsonl.partial"
    prompts.write_text("".join(json.dumps({"prompt": [5 + i]}) + "\n" for i in range(40)))
    synced, seen = Synced(monkeypatch), []
    monkeypatch.setattr(job, "SECONDS", 1000.0)

    def look(count):
        seen.append((synced.holds(partial), len(kept(partial))))

    with watched(on_result=look):
        assert run(command, capsys)[0] == 0
    assert seen == [(True, count // 16 * 16) for count in range(40)]
    assert synced.named == synced.kept == ["out.jsonl"]


def test_results_do_not_wait_for_long(command, tmp_path, capsys, monkeypatch):
    partial, seen = tmp_path / "out.jsonl.partial", []
    monkeypatch.setattr(job, "SECONDS", 0.0)
    with watched(on_result=lambda count: seen.append(len(kept(partial)))):
        assert run(command, capsys)[0] == 0
    assert seen == list(range(7))


def test_results_come_in_any_order_and_the_output_is_in_that_of_the_lines(command, prompts, tmp_path, capsys):
    lengths = [30, 2, 3, 2, 4, 2]
    records = [{"prompt": [5], "max_new_tokens": new, "min_new_tokens": new} for new in lengths]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    with broken_after(5):
        run(command, capsys)
    assert kept(tmp_path / "out.jsonl.partial") == [1, 2, 3, 4, 5]
    assert run(command, capsys)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6)) and [len(line["ids"]) for line in lines] == lengths


def test_the_output_does_not_depend_on_the_batch_size(command, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    run(command, capsys)
    by_two = output.read_bytes()
    assert run([*command, "--overwrite", "--batch-size", "7"], capsys)[0] == 0
    assert output.read_bytes() == by_two


@pytest.mark.parametrize("results", [0, 2, 5, 6])
def test_resuming_a_broken_run_equals_an_unbroken_one_byte_for_byte(command, tmp_path, capsys, results):
    output = tmp_path / "out.jsonl"
    run(command, capsys)
    whole = output.read_bytes()
    output.unlink()
    with broken_after(results):
        assert "power cut" in error_of(command, capsys)
    assert not output.exists() and (tmp_path / "out.jsonl.partial").exists()
    status, out, _ = run([*command, "--json"], capsys)
    assert status == 0 and json.loads(out)["resumed"] == results
    assert output.read_bytes() == whole and not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize("tail", [b'{"index": 2, "te', b'{"index": 2}', b"\xff\xfe\n", b"\n"])
def test_a_damaged_last_line_is_dropped_and_decoded_again(command, tmp_path, capsys, tail):
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    run(command, capsys)
    whole = output.read_bytes()
    output.unlink()
    with broken_after(2):
        run(command, capsys)
    partial.write_bytes(partial.read_bytes() + tail)
    assert run(command, capsys)[0] == 0
    assert output.read_bytes() == whole


@pytest.mark.parametrize("header", [b"", b'{"dlm-f', b'{"dlm-fast job": 1, "weights": "12'])
def test_a_partial_file_cut_inside_its_header_is_started_again(command, tmp_path, capsys, header):
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    partial.write_bytes(header)
    assert run(command, capsys)[0] == 0
    assert len(output.read_bytes().splitlines()) == 7


def test_a_partial_file_of_other_settings_is_refused_and_kept(command, tmp_path, capsys):
    with broken_after(2):
        run(command, capsys)
    partial = tmp_path / "out.jsonl.partial"
    before = partial.read_bytes()
    message = error_of([*command, "--seed", "9"], capsys)
    assert "is from a run with other settings" in message and "--restart" in message
    assert partial.read_bytes() == before
    assert run([*command, "--seed", "9", "--restart"], capsys)[0] == 0


def test_a_partial_file_of_another_model_is_refused(command, checkpoint, tmp_path, capsys):
    other_model = tmp_path / "other"
    save_toy_checkpoint(other_model, seed=5)
    with broken_after(2):
        run(command, capsys)
    argv = [str(other_model) if part == str(checkpoint) else part for part in command]
    assert "is from a run with other weights" in error_of(argv, capsys)


def test_an_existing_output_is_kept_unless_overwritten(command, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    assert f"--output {output} exists; use --overwrite to replace it" in error_of(command, capsys)
    assert output.read_text() == "precious"
    assert run([*command, "--overwrite"], capsys)[0] == 0
    assert len(output.read_text().splitlines()) == 7


def test_an_interrupt_keeps_what_was_finished(command, tmp_path, capsys):
    with broken_after(3, KeyboardInterrupt()):
        status, out, err = run(command, capsys)
    assert status == 130 and out == "" and err.splitlines()[-1] == "dlm-fast: interrupted; what was finished is kept"
    assert len((tmp_path / "out.jsonl.partial").read_bytes().splitlines()) == 1 + 3


class FullDisk:
    """A binary file that takes `room` more bytes and then says that the disk is full."""

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


@pytest.mark.parametrize("share", [0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_a_full_disk_is_an_error_and_no_output_looks_complete(command, tmp_path, capsys, monkeypatch, share):
    output, left, real_open = tmp_path / "out.jsonl", [10**6], os.fdopen
    patch = pytest.MonkeyPatch()
    patch.setattr(partials.os, "fdopen", lambda *args, **kwargs: FullDisk(real_open(*args, **kwargs), left))
    run(command, capsys)
    whole = output.read_bytes()
    output.unlink()
    left[0] = int(share * (10**6 - left[0]))
    assert "No space left on device" in error_of(command, capsys)
    patch.undo()
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith("out")} <= {"out.jsonl.partial"}
    assert run(command, capsys)[0] == 0  # with room again, it goes on
    assert output.read_bytes() == whole


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_disk_that_fails_while_the_output_is_finished_keeps_the_old_output(
    command, tmp_path, capsys, monkeypatch, step
):
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    real, calls = getattr(os, step), iter(range(100))

    def fail(*args):
        if step == "fsync" and next(calls) < 3:  # the header, the results, and what the finished file is known by
            return real(*args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    assert "No space left on device" in error_of([*command, "--overwrite"], capsys)
    assert output.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out.jsonl", "out.jsonl.partial"]
    monkeypatch.undo()
    assert json.loads(run([*command, "--overwrite", "--json"], capsys)[1])["resumed"] == 7


def test_an_output_in_a_folder_that_is_missing_or_read_only_is_an_error(command, tmp_path, capsys, monkeypatch):
    # Before the model is opened, which may take minutes.
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: pytest.fail("the model is opened"))
    missing = str(tmp_path / "no" / "out.jsonl")
    argv = [missing if part == str(tmp_path / "out.jsonl") else part for part in command]
    assert f"--output {missing}: the folder {tmp_path / 'no'} does not exist" in error_of(argv, capsys)
    argv = [str(tmp_path) if part == str(tmp_path / "out.jsonl") else part for part in command]
    assert f"--output must be a file, got the folder {tmp_path}" in error_of(argv, capsys)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "cannot be written to (Permission denied)" in error_of(command, capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompts.jsonl"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write to a read-only folder")
def test_an_output_in_a_read_only_folder_is_an_error(command, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    argv = [str(locked / "out.jsonl") if part == str(tmp_path / "out.jsonl") else part for part in command]
    assert "Permission denied" in error_of(argv, capsys)


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


def test_settings_of_lines_depend_neither_on_the_batch_nor_on_a_break(command, own_settings, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    run(command, capsys)
    whole = output.read_bytes()
    assert run([*command, "--overwrite", "--batch-size", "3"], capsys)[0] == 0 and output.read_bytes() == whole
    output.unlink()
    with broken_after(2):
        run(command, capsys)
    assert run(command, capsys)[0] == 0 and output.read_bytes() == whole


def test_a_line_without_a_temperature_has_that_of_the_published_decoder(tmp_path, capsys):
    checkpoint = published.write("dream", tmp_path / "dream")
    records = [{"prompt": [6, 40]}, {"prompt": [7, 41], "temperature": 0.0}, {"prompt": [8, 42], "temperature": 1.5}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "out.jsonl"
    argv = ["generate", "--model", str(checkpoint.folder), "--input", str(tmp_path / "in.jsonl"), "--output"]
    argv += [str(output), "--max-new-tokens", "8", "--device", "cpu"]
    with broken_after(0), pytest.raises(Interrupted):
        cli.main([*argv, "--debug"])
    # The header says what is decoded with, also what nobody asked for.
    header = json.loads(output.with_name("out.jsonl.partial").read_text().splitlines()[0])["settings"]
    assert (header["preset"], header["temperature"], header["top_p"]) == ("dream", 0.2, 0.95)
    assert run(argv, capsys)[0] == 0
    model = dlm_fast.load(checkpoint.folder, device="cpu")
    prompts = [record["prompt"] for record in records]
    expected = dlm_fast.generate(model, prompts, max_new_tokens=8, temperature=[0.2, 0.0, 1.5])
    found = [json.loads(line)["ids"] for line in output.read_text().splitlines()]
    assert found == [ids.tolist() for ids in expected.sequences] and found != []
    # Another temperature is another job.
    with broken_after(0), pytest.raises(Interrupted):
        cli.main([*argv, "--overwrite", "--debug"])
    message = error_of([*argv, "--overwrite", "--temperature", "0.3"], capsys)
    assert "is from a run with other settings" in message


def test_a_line_that_the_published_decoder_cannot_draw_is_refused_at_the_start(tmp_path, capsys):
    save_toy_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["dlm"]["decoder"] = {"preset": "freedave", "options": {}, "temperature": 0.0, "top_p": 1.0}
    path.write_text(json.dumps(config))
    (tmp_path / "in.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "abc", "temperature": 1.0}\n')
    argv = ["generate", "--model", str(tmp_path), "--input", str(tmp_path / "in.jsonl"), "--device", "cpu", "--output"]
    message = error_of([*argv, str(tmp_path / "out.jsonl"), "--strict"], capsys)
    assert "line 2: drafts are lossless for greedy decoding only, got temperature=1" in message
    assert not list(tmp_path.glob("out*"))
