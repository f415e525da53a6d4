"""Jobs that are killed, told to end, run against each other, or left without room: no line is lost, doubled, reordered,
cut, or of other weights.

The default suite breaks a few jobs. The campaign breaks many, and its summary is committed:

    python -m pytest -m campaign tests/package/test_job_campaign.py --campaign-summary bench/results/job_campaign.json
"""

from __future__ import annotations

import json
import platform
import time

import pytest
from helpers import save_toy_checkpoint
from job_processes import LINES, Jobs, campaign

import dlm_fast


@pytest.fixture
def broken_jobs(checkpoint, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save_toy_checkpoint(other, seed=9)
    return Jobs(checkpoint, other, tmp_path_factory.mktemp("job"))


def test_broken_jobs_end_as_unbroken_ones(broken_jobs):
    campaign(broken_jobs, kills=8, pairs=4, disks=3, seed=0, progress=lambda: None)
    assert broken_jobs.wrong == []
    assert broken_jobs.seen["kills"] >= 8 and broken_jobs.seen["pairs"] == 4 and broken_jobs.seen["signals"] == 6


@pytest.mark.campaign
def test_campaign_of_broken_jobs(broken_jobs, request):
    started = time.perf_counter()
    campaign(broken_jobs, kills=200, pairs=30, disks=20, seed=1, progress=lambda: print(broken_jobs.seen, flush=True))
    path = request.config.getoption("--campaign-summary")
    if path is not None:
        summary = {
            "command": "python -m pytest -m campaign tests/package/test_job_campaign.py --campaign-summary FILE",
            "version": dlm_fast.__version__,
            "python": platform.python_version(),
            "lines of a job": LINES,
            "seconds": round(time.perf_counter() - started),
            **broken_jobs.seen,
            "wrong": broken_jobs.wrong,
        }
        path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    assert broken_jobs.wrong == []
