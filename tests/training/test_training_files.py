"""Files of a training: only regular files are opened, no link leads out of the folder, and logs are read by lines that
end at a newline and nowhere else."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import EOS, MASK, native_model, save_toy_checkpoint
from named_errors import unnamed

import dlm_fast
from dlm_fast import disk
from dlm_fast.tiny.data import write_samples
from dlm_fast.training import runlog
from dlm_fast.training.checkpoint import CheckpointWriteError
from dlm_fast.training.curves import plot, read_log
from dlm_fast.training.dataset import DatasetError
from dlm_fast.training.distill import Distiller, DistillSettings
from dlm_fast.training.export import write_student
from dlm_fast.training.train import Settings, Trainer
from dlm_fast.training.trajectories import write_orders

VICTIM = "not ours\n"


@pytest.fixture
def victim(tmp_path) -> Path:
    """A file and a folder outside of the run's folder, which no run may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text(VICTIM)
    return folder / "file"


def trainer(tmp_path, **changes) -> Trainer:
    small = dict(steps=3, tokens_per_step=256, compile=False, bf16=False, warmup=2, log_every=1, block_causal=1.0)
    return Trainer(Settings(tmp_path / "run", **small | changes))


FOREIGN: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda path, victim: path.symlink_to(victim),
    "a link to nowhere": lambda path, victim: path.symlink_to(victim.with_name("nowhere")),
    "a fifo": lambda path, victim: os.mkfifo(path),
    "a folder": lambda path, victim: path.mkdir(),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_partial_that_is_no_regular_file_is_neither_followed_nor_deleted(tmp_path, victim, make):
    run = trainer(tmp_path)
    run.save()
    before = run.checkpoint_path.read_bytes()
    partial = run.checkpoint_path.with_name("checkpoint.safetensors.partial")
    make(partial, victim)
    kind = stat.S_IFMT(partial.lstat().st_mode)
    run.train_step()

    with pytest.raises(CheckpointWriteError, match=r"checkpoint.safetensors.partial must be a regular file, got a "):
        run.save()

    assert stat.S_IFMT(partial.lstat().st_mode) == kind
    assert run.checkpoint_path.read_bytes() == before
    assert victim.read_text() == VICTIM and not victim.with_name("nowhere").exists()


def test_a_partial_of_a_broken_run_is_replaced_and_another_name_of_its_file_keeps_its_content(tmp_path, victim):
    run = trainer(tmp_path)
    run.checkpoint_path.parent.mkdir()
    os.link(victim, run.checkpoint_path.with_name("checkpoint.safetensors.partial"))

    run.save()

    assert [path.name for path in run.checkpoint_path.parent.iterdir()] == ["checkpoint.safetensors"]
    assert victim.read_text() == VICTIM


def test_a_checkpoints_name_is_on_the_disk_after_it_was_given(tmp_path, monkeypatch):
    events = []
    sync, replace = disk.sync, os.replace
    monkeypatch.setattr(disk, "sync", lambda path: events.append(path.name) or sync(path))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append("replace") or replace(a, b))

    trainer(tmp_path).save()

    assert events == ["checkpoint.safetensors.partial", "replace", "run"]


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.partial"])
@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_log_that_is_no_regular_file_is_refused_before_a_step(tmp_path, victim, make, name):
    trainer(tmp_path).save()
    log = tmp_path / "run" / "log.jsonl"
    if name != log.name:
        log.write_text('{"step": 1, "loss": 2.0}\n')
    make(log.with_name(name), victim)

    with pytest.raises(ValueError) as error:
        trainer(tmp_path, resume=True)

    assert unnamed(error.value, name) is None
    assert victim.read_text() == VICTIM and os.path.lexists(log.with_name(name))


def test_a_log_that_becomes_a_link_is_not_written_through(tmp_path, victim):
    run = trainer(tmp_path)
    run.settings.out.mkdir()
    (run.settings.out / "log.jsonl").symlink_to(victim)

    with pytest.raises(ValueError, match="log.jsonl must be a regular file, got a link"):
        run.run()
    assert victim.read_text() == VICTIM


def test_a_checkpoint_that_is_a_link_to_nowhere_is_no_free_name(tmp_path, victim):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.safetensors").symlink_to(victim.with_name("nowhere"))

    with pytest.raises(FileExistsError, match="must hold no checkpoint unless resuming"):
        trainer(tmp_path)


@pytest.mark.parametrize("place", [".", "run", "run/below"])
def test_a_folder_that_cannot_be_is_named_before_a_model_is_made(tmp_path, place):
    (tmp_path / "file").write_text("x")
    for settings, make in (
        (Settings(tmp_path / "file" / place), Trainer),
        (DistillSettings("missing", "data.jsonl", tmp_path / "file" / place), Distiller),
    ):
        with pytest.raises(ValueError, match="out must lead to a folder that can be written to, got out="):
            make(settings)


@pytest.mark.parametrize("name", ["log.jsonl", "checkpoint.safetensors"])
def test_data_are_no_file_that_the_run_writes(tmp_path, name):
    with pytest.raises(ValueError) as error:
        DistillSettings("model", tmp_path / "out" / ".." / "out" / name, tmp_path / "out")
    assert unnamed(error.value, "data") is None


def test_a_first_run_drops_the_lines_of_a_run_without_a_checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    trainer(tmp_path).run()

    assert [record["step"] for record in runlog.read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_characters_that_split_lines_elsewhere_are_data_in_a_log(tmp_path, separator):
    log = tmp_path / "log.jsonl"
    records = [{"step": step, "loss": 1.0, "accuracy": {f"a{separator}b": 0.5}} for step in (1, 2, 3)]
    text = "".join(json.dumps(record, ensure_ascii=separator < "\x20") + "\n" for record in records)
    log.write_text(text + '{"step": 4, "lo')

    assert read_log(log) == records
    runlog.rewrite(log, runlog.records_until(log, 2))
    assert runlog.read_log(log) == records[:2]


@pytest.mark.parametrize(
    "line",
    [b"{", b"", b"[1]", b"5", b'{"loss": 1}', b'{"step": "2"}', b'{"step": true}', b'{"step": 1.5}', b"\xff", b"\0\0"]
    + [b"[" * 100_000],
    ids=lambda line: line[:12].decode("latin-1"),
)
def test_a_damaged_line_of_a_log_is_named(tmp_path, line):
    trainer(tmp_path).save()
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(b'{"step": 1, "loss": 1.0}\n' + line + b"\n")

    for read in (lambda: trainer(tmp_path, resume=True), lambda: read_log(log)):
        with pytest.raises(ValueError, match="log.jsonl, line 2: ") as error:
            read()
        assert unnamed(error.value, "step") is None


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"loss": "1"}, "loss"), ({"loss": None}, "loss"), ({"loss": True}, "loss"), ({}, "loss"),
        ({"loss": 1.0, "accuracy": "high"}, "accuracy"), ({"loss": 1.0, "accuracy": {"all": None}}, "accuracy"),
        ({"loss": 1.0, "accuracy": [1]}, "accuracy"), ({"loss": 1e400}, "loss"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_drawn_is_named(tmp_path, record, name):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"step": 1} | record) + "\n")

    with pytest.raises(ValueError, match="curves: .*log.jsonl, line 1: ") as error:
        read_log(log)
    assert unnamed(error.value, name) is None


def test_a_picture_is_written_to_no_log_and_by_a_known_suffix_only(tmp_path):
    pytest.importorskip("matplotlib")
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "same.png").symlink_to(log)
    for logs, out, name in (
        ([log], log, "out"), ([log], tmp_path / "same.png", "out"), ([log], tmp_path / "a.xyz", "out"),
        ([log], tmp_path / "folder.png", "out"), ([log], log / "a.png", "out"), ([log], 5, "out"),
        ([], tmp_path / "a.png", "logs"), (log, tmp_path / "a.png", "logs"), ([None], tmp_path / "a.png", "logs"),
        ([tmp_path / "missing"], tmp_path / "a.png", "logs"), ([tmp_path], tmp_path / "a.png", "curves"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)) as error:
            plot(logs, out)
        assert unnamed(error.value, name) is None, (logs, out)
    assert log.read_text() == '{"step": 1, "loss": 1.0}\n'


def student(folder: Path) -> None:
    diffusion = dlm_fast.DiffusionConfig(mask_token_id=MASK, eos_token_ids=(EOS,), visibility="full")
    model = native_model("qwen3", layers=1)
    write_student(model, folder, diffusion=diffusion, tokenizer=None, dtype=torch.float32)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
@pytest.mark.parametrize("target", ["file", "."])
def test_a_link_under_the_name_of_a_students_file_is_replaced_and_not_followed(tmp_path, victim, name, target):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / name).symlink_to(victim.parent / target)

    student(folder)

    assert not (folder / name).is_symlink() and (folder / name).is_file()
    assert victim.read_text() == VICTIM and [path.name for path in victim.parent.iterdir()] == ["file"]
    dlm_fast.load(folder, device="cpu")


def test_a_partial_folder_of_a_student_that_is_a_link_is_refused_and_not_followed(tmp_path, victim):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "student.partial").symlink_to(victim.parent)

    with pytest.raises(CheckpointWriteError, match="student.partial must be a folder or a new name, got"):
        student(folder)
    assert [path.name for path in folder.iterdir()] == ["student.partial"] and victim.read_text() == VICTIM

    (folder / "student.partial").unlink()
    (folder / "student.partial").mkdir()
    (folder / "student.partial" / "link").symlink_to(victim.parent)  # what a broken export left
    student(folder)
    assert not (folder / "student.partial").exists() and victim.read_text() == VICTIM


def test_a_pretraining_exports_through_no_link(tmp_path, victim):
    run = trainer(tmp_path)
    run.settings.out.mkdir()
    (run.settings.out / "model.safetensors").symlink_to(victim)
    run.run()

    assert victim.read_text() == VICTIM and not (run.settings.out / "model.safetensors").is_symlink()


def test_orders_are_written_to_another_file_than_the_data_and_as_a_whole(tmp_path, victim, monkeypatch):
    save_toy_checkpoint(tmp_path / "model", layers=1)
    data = tmp_path / "data.jsonl"
    lines = [{"prompt_ids": [5, 6], "answer_ids": [7, EOS]}, {"prompt_ids": [6], "answer_ids": [8, 9, EOS]}]
    text = "\ufeff" + "".join(json.dumps(line) + "\r\n" for line in lines)
    data.write_bytes(text.encode())
    (tmp_path / "same.jsonl").symlink_to(data)

    def write(out: Path, **changes) -> None:
        options = dict(block_length=4, max_length=16, device="cpu")
        write_orders(str(tmp_path / "model"), data, out, **options | changes)

    for out in (data, tmp_path / "same.jsonl", tmp_path / "." / "data.jsonl", tmp_path, data / "below", 5):
        with pytest.raises((ValueError, TypeError)) as error:
            write(out)
        assert unnamed(error.value, "out") is None
    for name, wrong in {"block_length": 0, "max_length": 10**9, "batch_size": -1, "device": "abacus"}.items():
        with pytest.raises(ValueError) as error:
            write(tmp_path / "ordered.jsonl", **{name: wrong})
        assert unnamed(error.value, name) is None
    partial = tmp_path / "ordered.jsonl.partial"
    partial.symlink_to(victim)
    with pytest.raises(ValueError, match="out must be a regular file or a new name, got out="):
        write(tmp_path / "ordered.jsonl")
    partial.unlink()
    write(tmp_path / "ordered.jsonl")

    written = [json.loads(line) for line in (tmp_path / "ordered.jsonl").read_text().splitlines()]
    assert [{key: record[key] for key in lines[0]} for record in written] == lines
    assert all(sorted(record["order"]) == [0, 1, 2, 3] for record in written)
    assert data.read_bytes() == text.encode() and victim.read_text() == VICTIM

    monkeypatch.setattr("dlm_fast.training.trajectories.teacher_orders", lambda *a, **k: data.write_text("{}\n"))
    with pytest.raises(DatasetError, match="data must stay as it is, got other lines"):
        write(tmp_path / "changed.jsonl")
    assert not (tmp_path / "changed.jsonl").exists()


def test_samples_are_written_through_no_link(tmp_path, victim):
    out = tmp_path / "samples.jsonl"
    out.with_name("samples.jsonl.partial").symlink_to(victim)
    for arguments, name in (
        ((out, 3), "out"), ((tmp_path, 3), "out"), ((victim / "below", 3), "out"), ((None, 3), "out"),
        ((tmp_path / "a", 10**9), "n"), ((tmp_path / "a", 1.5), "n"), ((tmp_path / "a", True), "n"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)) as error:
            write_samples(*arguments, seed=0)
        assert unnamed(error.value, name) is None
    for name, wrong in {"seed": [-1, 0.5, None], "easy": [float("nan"), 2, "x"]}.items():
        for value in wrong:
            with pytest.raises(ValueError) as error:
                write_samples(tmp_path / "a", 3, **{"seed": 0, name: value})
            assert unnamed(error.value, name) is None
    for weights in ({"kv": float("nan")}, {"kv": -1}, {"kv": "1"}, {"chess": 1.0}):
        with pytest.raises(ValueError) as error:
            write_samples(tmp_path / "a", 3, seed=0, weights=weights)
        assert unnamed(error.value, "weight") is None
    assert victim.read_text() == VICTIM and not (tmp_path / "a").exists()
