"""Jobs that torchrun shares among ranks: each decodes its lines, one may be killed, and any number of them goes on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from broken_jobs import kept
from commands import error_of, run

from dlm_fast import jobs

ROOT = Path(__file__).resolve().parents[2]
LINES = 15


def torchrun(argv: list[str], *, seconds: float = 120) -> tuple[int, str]:
    """The exit status and the output of two ranks, none of which outlives the call."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # both ranks compute on the CPU, and meet by gloo
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    script = str(ROOT / "tests" / "support" / "job_ranks.py")
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, script, *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def decoded(output: str) -> dict[int, list[int]]:
    """The lines that each rank says it decodes."""
    found: dict[int, list[int]] = {0: [], 1: []}
    for rank, index in re.findall(r"rank (\d) decodes line (\d+)\n", output):
        found[int(rank)].append(int(index))
    return found


@pytest.fixture(scope="module")
def job(checkpoint, tmp_path_factory):
    """The command of a job with a bad line in it, and what one process writes."""
    folder = tmp_path_factory.mktemp("ranks")
    records = [{"prompt": [5 + i] * (1 + i % 4), "id": i} for i in range(LINES)]
    records[4] = {"prompt": [99999], "id": 4}
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    argv = ["generate", "--model", str(checkpoint), "--input", str(folder / "in.jsonl"), "--device", "cpu"]
    argv += ["--max-new-tokens", "6", "--temperature", "0.7", "--batch-size", "2", "--output"]
    with pytest.MonkeyPatch.context() as patch:
        for name in jobs.ranks.VARIABLES:
            patch.delenv(name, raising=False)
        from dlm_fast import cli

        assert cli.main([*argv, str(folder / "whole.jsonl")]) == 1  # complete, with a line that says "error"
    return argv, (folder / "whole.jsonl").read_bytes()


@pytest.fixture(scope="module")
def broken(job, tmp_path_factory):
    """A job of two ranks of which the second one was killed: its folder, and what the ranks said."""
    folder = tmp_path_factory.mktemp("broken")
    status, output = torchrun(["kill", "1", "5", *job[0], str(folder / "out.jsonl")])
    assert status == 1 and "SIGKILL" in output, output
    return folder, output


@pytest.fixture
def left(broken, tmp_path):
    """A copy of what the broken job has left."""
    for path in broken[0].iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


def test_a_killed_rank_keeps_its_finished_lines_and_no_output_looks_complete(broken):
    folder, output = broken
    assert sorted(path.name for path in folder.iterdir()) == ["out.jsonl.partial", "out.jsonl.rank1.partial"]
    first, second = kept(folder / "out.jsonl.partial"), kept(folder / "out.jsonl.rank1.partial")
    assert len(second) == 4 and all(index % 2 == 1 for index in second)
    assert all(index % 2 == 0 for index in [*first, *decoded(output)[0]])
    assert output.count("1 of 15 lines cannot be decoded") == 1  # the first rank says it


def test_two_ranks_go_on_and_write_what_one_process_writes(job, left):
    before = [*kept(left / "out.jsonl.partial"), *kept(left / "out.jsonl.rank1.partial")]
    status, output = torchrun([*job[0], str(left / "out.jsonl")])
    assert status == 1 and "is complete, but 1 of 15 lines have finish 'error': line 5: prompt must hold ids" in output
    assert (left / "out.jsonl").read_bytes() == job[1]
    assert [path.name for path in left.iterdir()] == ["out.jsonl"]
    ranks = decoded(output)
    rest = set(range(LINES)) - {4, *before}
    assert {rank: set(found) for rank, found in ranks.items()} == {
        rank: {index for index in rest if index % 2 == rank} for rank in (0, 1)
    }


def test_one_process_goes_on_where_ranks_were_broken(job, left, capsys):
    before = [*kept(left / "out.jsonl.partial"), *kept(left / "out.jsonl.rank1.partial")]
    assert run([*job[0], str(left / "out.jsonl"), "--json"], capsys)[0] == 1
    assert (left / "out.jsonl").read_bytes() == job[1] and len(before) >= 4
    assert [path.name for path in left.iterdir()] == ["out.jsonl"]


def test_the_results_of_a_rank_are_those_of_one_job(job, left, capsys):
    argv, kept_before = [*job[0], str(left / "out.jsonl")], (left / "out.jsonl.rank1.partial").read_bytes()
    (left / "out.jsonl.partial").unlink()  # the other rank's file alone says what its results depend on
    message = error_of([*argv, "--seed", "3"], capsys)
    assert "out.jsonl.rank1.partial is from a run with other settings" in message and "--restart" in message
    assert (left / "out.jsonl.rank1.partial").read_bytes() == kept_before
    assert run([*argv, "--seed", "3", "--restart"], capsys)[0] == 1
    assert (left / "out.jsonl").read_bytes() != job[1] and [path.name for path in left.iterdir()] == ["out.jsonl"]


def test_a_rank_that_still_writes_keeps_the_job_from_starting(job, left, capsys):
    rank = jobs.partial.Partial(left / "out.jsonl", jobs.partial.Found(jobs.partial.Keys()), 1)
    with rank:
        message = error_of([*job[0], str(left / "out.jsonl")], capsys)
    assert "another process is writing" in message and "out.jsonl.rank1.partial" in message
    assert run([*job[0], str(left / "out.jsonl")], capsys)[0] == 1
    assert (left / "out.jsonl").read_bytes() == job[1]


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, jobs.Ranks(0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, jobs.Ranks(0, 1, 0)),  # as a cluster sets them, and no launcher of ranks
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, jobs.Ranks(5, 8, 1)),
        ({"RANK": "8", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, None),
        ({"RANK": "x", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, None),
    ],
    ids=str,
)
def test_ranks_are_those_of_the_launcher(monkeypatch, values, expected):
    for name in jobs.ranks.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(jobs.JobError, match="RANK, WORLD_SIZE and LOCAL_RANK must be those of torchrun"):
            jobs.Ranks.of_environment()
    else:
        assert jobs.Ranks.of_environment() == expected


def test_every_line_is_of_one_rank():
    for count in (1, 2, 3, 7):
        shares = [jobs.Ranks(rank, count).share(10) for rank in range(count)]
        assert sorted(index for share in shares for index in share) == list(range(10))
