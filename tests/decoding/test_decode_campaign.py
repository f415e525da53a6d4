"""Whole decodes: the Triton kernels against the plain-torch backend, token for token. A decode is one row of a batch.

The default suite runs the first 100 decodes of the 2,000 of the campaign:

    python -m pytest -m campaign tests/decoding/test_decode_campaign.py \\
        --campaign-summary bench/results/decode_campaign.json

Two computations in fp32 may part where a decision is nearer than their rounding. A row that differs is exempt if
float64 finds another decision within the bounds of tests/support/decode_cases.py at the first step at which the two
differ (our oracle replays the row up to there); at most 1% of the rows may be exempt. Exact ties are no exemption,
because their order is defined.
"""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Iterator

import pytest
import torch
from decode_cases import LOGIT_BOUND, SCORE_BOUND, Case, first_difference, near_tie, random_case
from helpers import bolder, facts_of, options_of, random_prompts, toy

import dlm_fast
from dlm_fast.presets import PRESETS, resolve

DECODES_A_PART, PARTS, DEFAULT_PARTS = 100, 20, 1
CONFIDENCE_BOUND = 2e-4


def cases_of(part: int) -> Iterator[Case]:
    """Batches of 3 to 5 rows, 100 rows together."""
    rng, left, seed = random.Random(f"part {part}"), DECODES_A_PART, 100_000 * (part + 1)
    while left:
        rows = left if left <= 5 else min(rng.choice((3, 4, 5)), left - 3)
        yield random_case(seed, rows=rows, small=True)
        left, seed = left - rows, seed + 1


def run_part(part: int, device: str) -> tuple[collections.Counter, list[str], list[str]]:
    """Counts of what was decoded, the rows that are exempt as near-ties, and the rows that differ without excuse."""
    counts, exempt, wrong = collections.Counter(), [], []
    for case in cases_of(part):
        triton, reference = case.generate("triton", device), case.generate("reference", device)
        preset = resolve(case.preset, case.diffusion.visibility, case.options)
        length = preset.block_length or case.diffusion.block_length
        for row in range(len(case)):
            prompt = len(case.prompts[row]) if case.prompts else None
            counts["decodes"] += 1
            counts["tokens written"] += int((reference.unmask_step[row] >= 0).sum())
            counts["forwards"] += reference.nfe[row]
            features = {
                f"preset {case.preset}": True,
                f"rule {preset.rule}": True,
                f"score {preset.score}": True,
                f"GQA {case.model.heads // case.model.kv_heads}": True,
                f"batch of {len(case)}": True,
                f"layers {case.model.layers}": True,
                f"head_dim {case.model.head_dim}": True,
                f"blocks aligned {case.diffusion.block_alignment}": case.diffusion.visibility == "block",
                "exact ties of tokens": case.model.twist == "twins",
                "exact ties of positions": case.model.twist == "flat",
                "sampled": case.temperature[row] > 0,
                "infilling": case.canvas is not None,
                "prompt length 1": prompt == 1,
                "prompt length block_length - 1": length and prompt == length - 1,
                "prompt length block_length": length and prompt == length,
                "prompt length block_length + 1": length and prompt == length + 1,
                f"finish {reference.finish[row]}": True,
            }
            counts.update(name for name, present in features.items() if present)
            where = f"seed {case.seed} row {row}: {case.preset} {case.options} {case.model}"
            step = first_difference(
                *((out.canvas[row].tolist(), out.unmask_step[row].tolist()) for out in (triton, reference))
            )
            if step is not None:
                (exempt if near_tie(case, row, reference, step) else wrong).append(f"{where}: step {step}")
                continue
            for name in ("nfe", "query_tokens", "finish"):
                if getattr(triton, name)[row] != getattr(reference, name)[row]:
                    wrong.append(
                        f"{where}: {name} {getattr(triton, name)[row]} instead of {getattr(reference, name)[row]}"
                    )
            error = (triton.confidence[row] - reference.confidence[row]).abs().max().item()
            if not error <= CONFIDENCE_BOUND:
                wrong.append(f"{where}: confidence differs by {error:.2g}")
    return counts, exempt, wrong


@pytest.mark.parametrize("part", range(DEFAULT_PARTS))
def test_triton_decodes_equal_reference_decodes(part, device):
    counts, exempt, wrong = run_part(part, str(device))
    assert not wrong, "\n".join(wrong)
    assert counts["decodes"] == DECODES_A_PART
    assert len(exempt) <= DECODES_A_PART // 100, "\n".join(exempt)


RUNNABLE = [name for name, preset in PRESETS.items() if preset.supported]


@pytest.mark.parametrize("preset", RUNNABLE)
def test_every_preset_decodes_by_triton_as_by_the_reference(preset, device):
    options = {**options_of(preset, 2), **bolder(preset, 0.2, -2.5)}
    options |= {"max_post_edits": 1} if preset == "llada2.1" else {"drafts": 2} if PRESETS[preset].drafts > 1 else {}
    outputs = []
    for backend in ("triton", "reference"):
        model = toy(PRESETS[preset].visibility, block_length=2, layers=1, **facts_of(preset), backend=backend).to(
            device
        )
        outputs.append(
            dlm_fast.generate(model, random_prompts([2, 3]), preset=preset, max_new_tokens=[5, 2], **options)
        )
    ours, expected = outputs
    assert [canvas.tolist() for canvas in ours.canvas] == [canvas.tolist() for canvas in expected.canvas]
    assert [steps.tolist() for steps in ours.unmask_step] == [steps.tolist() for steps in expected.unmask_step]
    assert (ours.nfe, ours.query_tokens, ours.finish) == (expected.nfe, expected.query_tokens, expected.finish)


@pytest.mark.parametrize("preset", RUNNABLE)
def test_an_empty_batch_launches_nothing(preset, device):
    model = toy(PRESETS[preset].visibility, **facts_of(preset), backend="triton").to(device)
    assert dlm_fast.generate(model, [], preset=preset).sequences == []


@pytest.mark.campaign
def test_campaign_of_2000_decodes(device, request):
    counts, exempt, wrong = collections.Counter(), [], []
    for part in range(PARTS):
        for total, found in zip((counts, exempt, wrong), run_part(part, str(device))):
            total.update(found) if total is counts else total.extend(found)
    summary = {
        "what": "whole decodes, Triton kernels against the plain-torch backend, fp32; a decode is one row",
        "device": "Triton interpreter on CPU" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "dlm_fast": dlm_fast.__version__,
        "identical": counts["decodes"] - len(exempt) - len({w.split(":")[0] for w in wrong}),
        "near_ties_exempted": len(exempt),
        "near_tie_bounds": {"logits": LOGIT_BOUND, "scores": SCORE_BOUND},
        "exempted": exempt,
        "wrong": wrong,
        "counts": dict(sorted(counts.items())),
    }
    print(json.dumps(summary, indent=1))
    if request.config.getoption("--campaign-summary") is not None:
        path = request.config.getoption("--campaign-summary")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=1) + "\n")
    assert not wrong, "\n".join(wrong)
    assert counts["decodes"] == 2000
    assert len(exempt) <= 20, "\n".join(exempt)
