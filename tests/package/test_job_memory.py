"""A job of many lines keeps a few bytes of each, whatever is in them. Its decode is a stub, which costs nothing."""

from __future__ import annotations

import json
import resource
import tracemalloc

import pytest
import torch

import dlm_fast
from dlm_fast import jobs
from dlm_fast.jobs import rows
from dlm_fast.output import Completion

# Bytes of a line that are kept, with what arrays have in reserve while they grow; 41 were measured (docs: 55, of the
# process as a whole).
BYTES = 120


class Stub(rows.Runner):
    def run(self, source, *, at_once=True):
        ids = torch.arange(20)
        for row in source:
            yield Completion(row.number, 0, None, ids, "t", "length", None, 8, ids, ids, ids, 6, 6, 1.0), None


@pytest.fixture
def job(checkpoint, tmp_path, monkeypatch):
    """Runs a job of so many lines, and counts those of its output."""
    monkeypatch.setattr(rows, "Runner", Stub)
    model, settings = dlm_fast.load(checkpoint, device="cpu"), {"max_new_tokens": 20}
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def run(count: int) -> None:
        with open(source, "w") as file:
            for i in range(count):
                record = {"prompt": [5 + (i + j) % 30 for j in range(8)], "id": f"question {i}", "meta": "x" * 2000}
                file.write(json.dumps(record) + "\n")
        jobs.run(model, jobs.read_lines(source, settings), output, settings=settings, batch_size=16, overwrite=True)
        with open(output) as file:
            assert sum(json.loads(line)["index"] == index for index, line in enumerate(file)) == count

    return run


def test_a_job_keeps_a_few_bytes_of_a_line(job):
    peaks = []
    job(50)  # what is made once
    for count in (300, 1300):
        tracemalloc.start()
        job(count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1000 * BYTES


@pytest.mark.campaign
def test_a_job_of_many_lines_takes_no_more_memory_than_a_short_one(job):
    job(2000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    job(100_000)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 100_000 * BYTES
