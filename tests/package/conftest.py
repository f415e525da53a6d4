"""A checkpoint, a file of prompts, and the command that decodes the one with the other."""

from __future__ import annotations

import json

import pytest
from helpers import MASK, random_prompts, save_toy_checkpoint


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
