"""docs/scale.md: its actor decodes what a session decodes, alone and in Ray."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import dlm_fast
from dlm_fast.tiny.tasks import held_out

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
PROMPTS = [sample.prompt for task in ("add", "kv") for sample in held_out(task, 6)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def page() -> dict:
    """What the page defines; as of a script, so that its class is sent to actors by value."""
    (block,) = blocks("python")
    names: dict = {"__name__": "__main__"}
    exec(compile(block.rsplit("print(", 1)[0], str(PAGE), "exec"), names)
    names["options"]["temperature"] = 0.7
    return names


@pytest.fixture
def expected() -> list[str]:
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return dlm_fast.generate(dlm_fast.load("tiny-block"), chats, max_new_tokens=64, temperature=0.7).text


def test_the_actor_has_ten_lines_and_its_answers_do_not_depend_on_the_batch(page, expected):
    (block,) = blocks("python")
    lines = re.search(r"^class Decoder:\n(?:(?: .*)?\n)*", block, re.MULTILINE)[0].split("\n")
    assert len([line for line in lines if line.strip()]) <= 10
    decoder, found = page["Decoder"](**page["options"]), []
    for part in (slice(0, 5), slice(5, 12)):
        batch = {"id": numpy.arange(12)[part], "prompt": numpy.array(PROMPTS, dtype=object)[part]}
        found += decoder(batch)["response"]
    assert found == expected


def test_the_tensor_parallel_program_answers_once(tmp_path):
    (block,) = [block for block in blocks("py") if "tp_plan" in block]
    (tmp_path / "decode.py").write_text(block, encoding="utf-8")
    paths = os.pathsep.join([str(PAGE.parents[1]), str(PAGE.parents[1] / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(tmp_path / "decode.py")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert found.stdout.strip() == "8+4+0=12; 9+0+1=10; 3+9+1=13 #### 1302", found.stderr[-3000:]


def test_a_pool_of_actors_of_ray_answers_what_one_session_answers(page, expected, tmp_path, monkeypatch):
    """Skipped where Ray is not installed, as in CI; last run with Ray 2.60.0, torch 2.13.0 and Python 3.11.7."""
    ray = pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"id": number, "prompt": prompt}) for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (block,) = [block for block in blocks("py") if "import ray" in block]
    block = block.replace('"prompts.jsonl"', repr(str(tmp_path / "prompts.jsonl")))
    block = block.replace('"answers"', repr(str(tmp_path / "answers"))).replace("batch_size=32", "batch_size=4")
    ray.init(num_cpus=3, include_dashboard=False, logging_level="ERROR")
    try:
        exec(compile(block, str(PAGE), "exec"), page)
    finally:
        ray.shutdown()
    rows = [json.loads(line) for file in (tmp_path / "answers").glob("*.json") for line in open(file)]
    rows.sort(key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(12)) and {row["error"] for row in rows} == {""}
    assert [row["response"] for row in rows] == expected
