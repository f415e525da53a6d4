"""Every published decoder against its transcription, token for token: tests/support/transcriptions, through
tests/support/transcription_cases.py.

Both sides compute in float64 with logits rounded to fp32, so tokens, steps, forwards and positions computed must be
equal, and the recorded confidences within 1e-6; no near-tie is excused. The default suite runs the first tenth of the
campaign:

    python -m pytest -m campaign tests/decoding/test_transcriptions.py \\
        --campaign-summary bench/results/transcriptions.json
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import json
import math
import random
from pathlib import Path

import oracles
import pytest
import torch
import transcription_policies
import transcriptions
from transcription_cases import REGISTRY, Case, differences, features, random_case
from transcriptions.common import Settings, kept, quota, units

import dlm_fast

# The policies are written in a file of their own, on top of the same cases.
REGISTRY.update(transcription_policies.REGISTRY)
CASES, DEFAULT_CASES = 200, 20
# Decoders whose specification says nothing of given tokens behind the first mask.
WITHOUT_INFILLING = ("llada2.2",)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A toy's matrices are smaller than what it costs to hand them to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def there(name: str) -> None:
    """Skips a decoder that the package does not have."""
    preset = REGISTRY[name].preset or name
    if preset not in dlm_fast.PRESETS:
        pytest.skip(f"preset not there yet: {preset}")


def everything(out: dlm_fast.GenerateOutput, row: int) -> tuple:
    tensors = tuple(t[row].tolist() for t in (out.sequences, out.canvas, out.unmask_step))
    return (*tensors, out.finish[row], out.nfe[row], out.query_tokens[row])


def check(case: Case) -> tuple[collections.Counter, list[str]]:
    """Counts of what was compared, and what differs: each row from its transcription, and one row alone from the same
    row in its batch."""
    counts, wrong = collections.Counter(cases=1), []
    out = case.generate()
    for b in range(len(case)):
        row = case.answer(b)
        wrong += differences(case, b, out, b, row)
        counts["rows"] += 1
        counts["tokens"] += sum(step >= 0 for step in row.unmask_step)
        counts["forwards"] += row.nfe
        counts.update(features(case, b, row))
    if case.fuses:
        counts["fused"] += len(case)
        fused = case.generate(fused=True)
        for b in range(len(case)):
            (*same, forwards, positions), (*ours, fewer, computed) = everything(out, b), everything(fused, b)
            error = (fused.confidence[b] - out.confidence[b]).abs().max().item()
            if ours != same or computed != positions or fewer > forwards or not error <= 1e-6:
                wrong.append(
                    f"{case.name} seed {case.seed} row {b}: fused {everything(fused, b)}, not {everything(out, b)}"
                )
    b = random.Random(case.seed).randrange(len(case))
    alone = case.generate([b])
    counts["rows alone"] += 1
    if everything(alone, 0) != everything(out, b):
        wrong.append(
            f"{case.name} seed {case.seed} row {b}: alone {everything(alone, 0)}, in its batch {everything(out, b)}"
        )
    error = (alone.confidence[0] - out.confidence[b]).abs().max().item()
    if not error <= 1e-6:
        wrong.append(f"{case.name} seed {case.seed} row {b}: alone, confidence differs by {error:.2g}")
    return counts, wrong


def run(name: str, seeds: range) -> tuple[collections.Counter, list[str]]:
    counts, wrong = collections.Counter(), []
    for seed in seeds:
        added, found = check(random_case(name, seed))
        counts.update(added)
        wrong += found
    return counts, wrong


@pytest.mark.parametrize("name", REGISTRY)
def test_a_decoder_equals_its_transcription_token_for_token(name):
    there(name)
    counts, wrong = run(name, range(DEFAULT_CASES))
    assert not wrong, "\n".join(wrong)
    assert counts["cases"] == DEFAULT_CASES and counts["rows"] >= 2 * DEFAULT_CASES


@pytest.fixture(scope="module")
def summary(request):
    """What the campaign counted by decoder, written once it is over."""
    found: dict[str, dict] = {}
    yield found
    path = request.config.getoption("--campaign-summary")
    if not found or path is None:
        return
    document = {
        "what": "decodes by the plain-torch backend in float64 against independent transcriptions; "
        "identical tokens, steps and forwards",
        "torch": torch.__version__,
        "dlm_fast": dlm_fast.__version__,
        "cases": sum(entry["counts"]["cases"] for entry in found.values()),
        "rows": sum(entry["counts"]["rows"] for entry in found.values()),
        "wrong": sum(len(entry["wrong"]) for entry in found.values()),
        "decoders": found,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


@pytest.mark.campaign
@pytest.mark.parametrize("name", REGISTRY)
def test_campaign_of_a_decoder_against_its_transcription(name, summary):
    there(name)
    counts, wrong = run(name, range(CASES))
    summary[name] = {"counts": dict(sorted(counts.items())), "wrong": wrong}
    assert not wrong, "\n".join(wrong)
    assert counts["cases"] == CASES and counts["exact ties of tokens"] and counts["exact ties of positions"]
    assert counts["infilling"] or name in WITHOUT_INFILLING
    assert counts["ended early"]


PAIRS = [
    ("dparallel", "threshold", -2.5, -0.5),
    ("dllm-rl", "horizon", 1, 128),
    ("fast-dllm-v2", "sub_block_length", 1, 8),
    ("sdar", "last_block", "whole", "crop"),
    ("d2f", "last_block", "whole", "crop"),
    ("fast-dllm-factor", "published_factor", False, True),
    ("llada", "exclude_eos", False, True),
    ("d2f", "append_threshold", 0.0, 1.0),
    ("d3llm", "refresh_interval", 1, None),
]


@pytest.mark.parametrize("name, option, ours, theirs", PAIRS)
def test_the_comparison_notices_another_option(name, option, ours, theirs):
    there(name)
    for seed in range(20):
        case = random_case(name, seed)
        if option == "last_block" and case.canvas is not None or "suppress_eos" in case.options:
            continue
        if option == "published_factor" and (case.options.get("rule", "factor"), case.options.get("min_unmask", 1)) != (
            "factor",
            1,
        ):
            continue
        here, elsewhere = (
            dataclasses.replace(case, options={**case.options, option: value}) for value in (ours, theirs)
        )
        if differences(case, 0, here.generate([0]), 0, elsewhere.answer(0)):
            return
    raise AssertionError(f"{name} with {option}={ours} equals {option}={theirs} in 20 cases")


def test_the_comparison_notices_a_prefix_that_is_not_causal():
    for seed in range(20):
        case = random_case("efficient-dlm", seed)
        here, elsewhere = (
            dataclasses.replace(case, diffusion=dataclasses.replace(case.diffusion, causal_prefix=value))
            for value in (False, True)
        )
        if differences(case, 0, here.generate([0]), 0, elsewhere.answer(0)):
            return
    raise AssertionError("a causal prefix changes nothing in 20 cases")


def test_filters_quotas_and_budgets_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()

    def ids(**filters) -> list[int]:
        return kept(logits, Settings(mask_id=0, **{"temperature": 1.0, **filters})).nonzero().flatten().tolist()

    assert ids() == ids(top_k=1, temperature=0.0) == [0, 1, 2, 3]
    assert ids(top_k=1, temperature=0.0, greedy_filters=True) == [0]
    assert ids(top_k=2) == [0, 1] and ids(top_k=3) == [0, 1, 2, 3]  # the third largest is a tie
    assert ids(top_p=0.4) == [0] and ids(top_p=0.5) == [0, 1] and ids(top_p=0.75) == [0, 1, 2]
    assert ids(top_p=0.6, top_k=2, top_k_first=True) == [0] and ids(top_p=0.6, top_k=2) == [0, 1]
    assert ids(top_p=0.5, temperature=0.25) == [0]
    assert [quota(7, 3, i) for i in range(4)] == [3, 2, 2, 2] and quota(2, 5, 4) == 1
    assert units(0.5) == 2**23 and units(-1e-9) == 0 and units(math.ldexp(1, -25)) == 0


@pytest.mark.parametrize(
    "path", [Path(oracles.__file__), *sorted(Path(transcriptions.__file__).parent.glob("*.py"))], ids=lambda p: p.name
)
def test_a_transcription_imports_nothing_of_the_project(path):
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {"torch", "oracles", "transcriptions"}
    allowed = ours | {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "struct", "typing"}
    assert {name.split(".")[0] for name in imported} <= allowed
