"""What a job resumes: the lines that are the same, of the same weights, tokenizer, backend and version, and of nobody
else."""

from __future__ import annotations

import json
import os
import shutil

import broken_jobs
import pytest
import torch
from commands import error_of, run
from head_cases import random_head
from helpers import save_toy_checkpoint, toy_tokenizer
from safetensors.torch import load_file, save_file

from dlm_fast import cli, disk
from dlm_fast.jobs import job
from dlm_fast.jobs import partial as partials
from dlm_fast.policies.heads import save_head


@pytest.fixture
def own_checkpoint(checkpoint, tmp_path, command):
    """A copy of the checkpoint that a test may change, in the command's place."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    command[command.index("--model") + 1] = str(folder)
    return folder


@pytest.fixture
def whole(command, tmp_path, capsys):
    """What an unbroken run writes."""
    assert run(command, capsys)[0] == 0
    content = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    return content


def broken_after(results: int, command, capsys) -> int:
    """A run of the command that is broken when it has so many results."""
    with broken_jobs.broken_after(results):
        return run(command, capsys)[0]


def decoded_indices(command, capsys) -> list[int]:
    """The indices that a run of the command decodes, which must end well."""
    indices: list[int] = []
    with broken_jobs.watched(on_row=indices.append):
        assert run(command, capsys)[0] == 0
    return indices


def test_a_corrected_line_costs_that_line_only(command, prompts, tmp_path, capsys):
    lines = prompts.read_text().split("\n")
    prompts.write_text("\n".join([*lines[:3], '{"prompt": [99999]}', *lines[4:]]))
    assert run(command, capsys)[0] == 1  # complete, with one line that says "error"
    assert not (tmp_path / "out.jsonl.partial").exists()
    output = tmp_path / "out.jsonl"
    output.unlink()
    # The same, broken before its end, and corrected.
    broken_after(5, command, capsys)
    prompts.write_text("\n".join(lines))
    assert decoded_indices(command, capsys) == [3, 6]
    corrected = output.read_bytes()
    output.unlink()
    assert decoded_indices(command, capsys) == [0, 1, 2, 3, 4, 5, 6]
    assert output.read_bytes() == corrected


def test_lines_that_are_added_or_changed_are_decoded_and_no_others(command, prompts, tmp_path, capsys):
    lines = prompts.read_text().split("\n")[:7]
    broken_after(5, command, capsys)  # indices 0 to 4 are there
    added = json.dumps({"prompt": "new"})
    prompts.write_text("\n".join(["", *lines[:2], "", lines[2].replace(": 7", ": 8"), *lines[3:], added]))
    assert decoded_indices(command, capsys) == [2, 5, 6, 7]
    resumed = (tmp_path / "out.jsonl").read_bytes()
    assert run([*command, "--overwrite"], capsys)[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == resumed and len(resumed.splitlines()) == 8


def change_weights(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))


def change_section(folder):
    config = json.loads((folder / "config.json").read_text())
    config["dlm"]["eos_token_ids"] = [1, 2]
    (folder / "config.json").write_text(json.dumps(config))


def change_template(folder):
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "x" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)


def change_tokenizer(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["b"], vocabulary["c"] = vocabulary["c"], vocabulary["b"]
    (folder / "tokenizer.json").write_text(json.dumps(values))


CHANGES = {
    change_weights: "weights",
    change_config: "weights",
    change_section: "diffusion, weights",
    change_template: "tokenizer",
    change_tokenizer: "tokenizer",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_changed_under_its_name_is_another_one(command, own_checkpoint, whole, tmp_path, capsys, change):
    broken_after(3, command, capsys)
    partial = tmp_path / "out.jsonl.partial"
    before = partial.read_bytes()
    kept = {file.name: file.read_bytes() for file in own_checkpoint.iterdir()}
    change(own_checkpoint)
    assert f"is from a run with other {CHANGES[change]};" in error_of(command, capsys)
    assert partial.read_bytes() == before
    for name, content in kept.items():
        (own_checkpoint / name).write_bytes(content)
    assert run(command, capsys)[0] == 0 and (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_model_that_moved_is_the_same_one(command, own_checkpoint, whole, tmp_path, capsys):
    broken_after(3, command, capsys)
    own_checkpoint.rename(tmp_path / "elsewhere")
    command[command.index("--model") + 1] = str(tmp_path / "elsewhere")
    assert decoded_indices(command, capsys) == [
        2,
        4,
        5,
        6,
    ]  # a canvas of two masks was done before the prompt beside it
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_another_backend_or_version_or_manner_is_another_run(command, tmp_path, capsys, monkeypatch):
    broken_after(3, command, capsys)
    assert "is from a run with other backend;" in error_of([*command, "--backend", "reference"], capsys)
    assert "is from a run with other raw;" in error_of([*command, "--raw"], capsys)
    assert "is from a run with other settings, weights;" in error_of(
        [*command, "--dtype", "bfloat16", "--seed", "3"], capsys
    )
    monkeypatch.setattr(job, "__version__", "0.0.0")
    assert "is from a run with other version;" in error_of(command, capsys)
    monkeypatch.setattr(job.importlib.metadata, "version", lambda name: "1")
    assert "other version, version of torch, version of transformers; " in error_of(command, capsys)


def test_damage_of_the_partial_file_costs_the_damaged_lines_only(command, whole, tmp_path, capsys):
    partial = tmp_path / "out.jsonl.partial"
    broken_after(5, command, capsys)
    header, *lines = partial.read_bytes().split(b"\n")[:-1]  # the lines 0 to 4
    cases = {
        "swapped": ([lines[1], lines[0], *lines[2:]], []),
        "doubled": ([lines[0], lines[0], lines[0], *lines[1:]], []),
        "missing": ([lines[0], *lines[2:]], [1]),
        "cut inside": ([lines[0], lines[1][:-9], *lines[2:]], [1]),
        "joined": ([lines[0] + lines[1], *lines[2:]], [0, 1]),
        "of nobody": ([*lines, b'{"key": "0", "line": {"index": 5}}', b"[]", b"7", b'{"key": 3}', b"\xff"], []),
        "of another job": ([lines[0].replace(b'"key": "', b'"key": "0'), *lines[1:]], [0]),
        "an empty line": ([b"", *lines, b""], []),
    }
    for name, (damaged, lost) in cases.items():
        partial.write_bytes(b"\n".join([header, *damaged, b""]))
        assert decoded_indices(command, capsys) == sorted([*lost, 5, 6]), name
        assert (tmp_path / "out.jsonl").read_bytes() == whole, name
        (tmp_path / "out.jsonl").unlink()


def test_a_result_that_was_changed_in_the_partial_file_is_not_believed(command, whole, tmp_path, capsys):
    partial = tmp_path / "out.jsonl.partial"
    broken_after(5, command, capsys)
    content = partial.read_bytes()
    place = content.index(b'"ids": [', content.index(b"\n")) + 8
    partial.write_bytes(content[:place] + b"4" + content[place + 1 :])
    assert content != partial.read_bytes()
    assert decoded_indices(command, capsys) == [0, 5, 6]
    assert (tmp_path / "out.jsonl").read_bytes() == whole


FOREIGN = [b"precious\n", b"precious", b"[1]\n", b"7\n", b"{}\n", b'{"input": "12"}\n{"index": 0}\n', b"\x00" * 40]


@pytest.mark.parametrize("content", FOREIGN, ids=repr)
@pytest.mark.parametrize("flags", [[], ["--restart"], ["--restart", "--overwrite"]], ids=" ".join)
def test_a_partial_file_of_somebody_else_is_kept(command, tmp_path, capsys, content, flags):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(content)
    assert f"{partial} is not what a job of this version leaves" in error_of([*command, *flags], capsys)
    assert partial.read_bytes() == content and not (tmp_path / "out.jsonl").exists()


def test_a_damaged_header_is_refused_until_it_is_discarded(command, whole, tmp_path, capsys):
    partial = tmp_path / "out.jsonl.partial"
    broken_after(3, command, capsys)
    damaged = partial.read_bytes().replace(b'"weights": "', b'"weights": ', 1)
    partial.write_bytes(damaged)
    assert f"{partial} has a damaged header; use the same, or --restart" in error_of(command, capsys)
    assert partial.read_bytes() == damaged
    assert run([*command, "--restart"], capsys)[0] == 0 and (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("name", ["out.jsonl.partial", "out.jsonl.finished"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "fifo", "folder"])
def test_only_a_regular_file_is_written(command, tmp_path, capsys, name, kind):
    path, precious = tmp_path / name, tmp_path / "precious"
    precious.write_text("precious")
    {
        "link": lambda: path.symlink_to(precious),
        "dangling link": lambda: path.symlink_to(tmp_path / "nothing"),
        "hard link": lambda: path.hardlink_to(precious),
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[kind]()
    message = error_of([*command, "--restart", "--overwrite"], capsys)
    assert str(path) in message and ("regular file" in message or "in the way" in message) and "move it away" in message
    assert precious.read_text() == "precious" and not (tmp_path / "nothing").exists()
    assert not (tmp_path / "out.jsonl").exists() and os.path.lexists(path)


def killed_while_finishing(command, tmp_path, capsys) -> bytes:
    """A run that is killed when its finished file has all lines and not yet the output's name; the partial file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partials.disk, "rename", lambda source, target, replace: os._exit(9))
        child = os.fork()
        if not child:
            cli.main(command)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "out.jsonl.finished").read_bytes() and not (tmp_path / "out.jsonl").exists()
    return (tmp_path / "out.jsonl.partial").read_bytes()


def test_a_finished_file_of_somebody_else_is_kept(command, whole, tmp_path, capsys):
    finished = tmp_path / "out.jsonl.finished"
    for content in (whole + b"x", b"precious", whole):
        finished.write_bytes(content)
        assert f"{finished} is in the way, got a file that was not left here" in error_of(command, capsys)
        assert finished.read_bytes() == content
    finished.write_bytes(b"")
    assert run([*command, "--overwrite"], capsys)[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole and not finished.exists()


@pytest.mark.parametrize("change", ["nothing", "settings", "a line"])
def test_a_finished_file_that_a_killed_run_left_is_in_nobodys_way(command, prompts, whole, tmp_path, capsys, change):
    killed_while_finishing(command, tmp_path, capsys)
    decoded = []
    if change == "settings":
        command += ["--seed", "5", "--restart"]
        decoded = [0, 1, 2, 3, 4, 5, 6]
    if change == "a line":
        prompts.write_text(prompts.read_text().replace("abc", "abd"))
        decoded = [0]
    assert decoded_indices(command, capsys) == decoded
    assert ((tmp_path / "out.jsonl").read_bytes() == whole) == (change == "nothing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_a_partial_file_that_goes_while_the_output_is_named_is_no_error(command, whole, tmp_path, capsys):
    partial = tmp_path / "out.jsonl.partial"
    with pytest.MonkeyPatch.context() as patch:
        rename = disk.rename

        def named(source, target, replace):
            rename(source, target, replace=replace)
            partial.unlink()

        patch.setattr(disk, "rename", named)
        assert run(command, capsys)[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_file_system_without_locks_is_named(command, tmp_path, capsys, monkeypatch):
    def flock(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(partials.fcntl, "flock", flock)
    assert "out.jsonl.partial cannot be locked: [Errno 37] No locks available" in error_of(command, capsys)
    assert not list(tmp_path.glob("out*"))


def test_a_head_is_what_is_in_its_file(command, tmp_path, capsys):
    head = tmp_path / "head.safetensors"
    save_head(random_head("filter", block_length=3, seed=1), head)
    command += ["--preset", "learn2pd", "--set", f"head={head}", "--temperature", "0"]
    broken_after(3, command, capsys)
    kept = head.read_bytes()
    save_head(random_head("filter", block_length=3, seed=2), head)
    assert "is from a run with other head;" in error_of(command, capsys)
    head.write_bytes(kept)
    assert decoded_indices(command, capsys) == [2, 4, 5, 6]


def test_an_output_that_appears_while_the_job_runs_is_kept(command, whole, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    with broken_jobs.watched(on_row=lambda index: output.write_text("precious")):
        assert f"--output {output} has appeared while the job ran" in error_of(command, capsys)
    assert output.read_text() == "precious"
    assert decoded_indices([*command, "--overwrite"], capsys) == [] and output.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_an_output_that_is_a_link_is_not_replaced(command, tmp_path, capsys):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "precious")
    assert "is no regular file, which --overwrite does not replace" in error_of([*command, "--overwrite"], capsys)
    assert (tmp_path / "precious").read_text() == "precious" and (tmp_path / "out.jsonl").is_symlink()


def test_a_file_system_without_links_gets_its_output_too(command, whole, tmp_path, capsys, monkeypatch):
    def link(source, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(disk.os, "link", link)
    assert run(command, capsys)[0] == 0 and (tmp_path / "out.jsonl").read_bytes() == whole
    assert "exists; use --overwrite" in error_of(command, capsys)


def test_what_is_left_by_a_kill_between_the_last_two_steps_is_in_nobodys_way(command, whole, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partials.disk, "rename", lambda source, target, replace: os.rename(source, target) or 1 / 0)
        run(command, capsys)
    assert (tmp_path / "out.jsonl").read_bytes() == whole and (tmp_path / "out.jsonl.partial").exists()
    assert "exists; use --overwrite to replace it" in error_of(command, capsys)
    # Other settings begin anew, for all results have their name. Results that have none are kept.
    assert run([*command, "--overwrite", "--seed", "5"], capsys)[0] == 0
    other = (tmp_path / "out.jsonl").read_bytes()
    assert other != whole and not (tmp_path / "out.jsonl.partial").exists()
    broken_after(3, [*command, "--overwrite"], capsys)
    assert "is from a run with other settings" in error_of([*command, "--overwrite", "--seed", "6"], capsys)
    assert (tmp_path / "out.jsonl").read_bytes() == other


def test_what_nobody_asked_for_is_not_written(command, tmp_path, capsys):
    assert "is from a run" not in error_of([*command, "--preset", "lada"], capsys)
    assert not list(tmp_path.glob("out*"))


def test_a_kill_while_the_output_has_both_names_is_in_nobodys_way(command, whole, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partials.disk, "rename", lambda source, target, replace: os.link(source, target) or os._exit(9))
        child = os.fork()
        if not child:
            cli.main(command)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "out.jsonl.finished").samefile(tmp_path / "out.jsonl")
    assert "exists; use --overwrite to replace it" in error_of(command, capsys)
    assert decoded_indices([*command, "--overwrite"], capsys) == [0, 1, 2, 3, 4, 5, 6]
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_header_holds_the_fingerprints(command, tmp_path, capsys, dtype):
    folder = tmp_path / "model"
    save_toy_checkpoint(folder, dtype=dtype)
    command[command.index("--model") + 1] = str(folder)
    broken_after(0, command, capsys)
    header = json.loads((tmp_path / "out.jsonl.partial").read_text().split("\n")[0])
    assert {"weights", "tokenizer", "backend", "device", "version", "settings", "diffusion"} <= set(header)
    assert header["backend"] == "cpu" and len(header["weights"]) == 64
    assert cli.__version__ == header["version"]
