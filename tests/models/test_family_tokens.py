"""The published loop of a family on a checkpoint in its published layout, token for token: our transcription of the
loop (tests/support/transcriptions) on an independent float64 forward of the published tensors, and `generate` on what
`load` opened."""

from __future__ import annotations

import random
import warnings

import family_oracles
import published
import pytest
import torch
from transcription_cases import REGISTRY
from transcriptions.common import Model, Row, Settings, last_block_end

import dlm_fast
from dlm_fast import PRESETS

# Family -> presets: the published decoder and another one of the same loop.
LOOPS = {
    "llada": ("llada", "fast-dllm"),
    "dream": ("dream",),
    "sdar": ("sdar", "sdar-dynamic"),
    "llada2": ("llada2", "llada2-quota"),
    "fast-dllm-v2": ("fast-dllm-v2",),
    "nemotron": ("nemotron",),
    "rnd1": ("rnd1",),
    "stable-diffcoder": ("stable-diffcoder",),
    "efficient-dlm": ("efficient-dlm",),
    "a2d-qwen3": ("bd3lm",),
}
UNPROVEN = ("stable-diffcoder", "efficient-dlm", "a2d-qwen3")
CASES = [(family, preset) for family, presets in LOOPS.items() for preset in presets]


def answer(checkpoint, preset: str, diffusion, prompt: list[int], new: int, options: dict) -> Row:
    """What the published loop makes of a prompt."""
    decoder, options = REGISTRY[preset], dict(options)
    options = {**decoder.defaults, **options}
    length = options.get("block_length", diffusion.block_length)
    last_block = options.pop("last_block", PRESETS[preset].last_block)
    options.pop("cache", None)
    end = last_block_end(len(prompt), new, length or 1, diffusion.block_alignment, last_block if length else "crop")
    canvas = prompt + [diffusion.mask_token_id] * (end - len(prompt))
    settings = Settings(
        mask_id=diffusion.mask_token_id,
        stop_ids=diffusion.eos_token_ids,
        stop=options.pop("stop", "closed"),
        tempered=options.pop("tempered", False),
        top_k_first=options.pop("top_k_first", False),
        greedy_filters=options.pop("greedy_filters", False),
        exclude_eos=options.pop("exclude_eos", False),
    )
    if diffusion.visibility == "full":
        options.setdefault("block_length", decoder.block_length)
    model = Model(family_oracles.Network(checkpoint), diffusion.logits_row == "previous")
    row = decoder.transcribe(model, canvas, settings, options, diffusion)
    row.cut(len(prompt) + new)
    return row


@pytest.mark.parametrize("family, preset", CASES)
def test_generate_is_the_published_loop(tmp_path, family, preset):
    """Prompts and lengths off the grid of blocks included; all rows in one batch."""
    # The name of an A2D checkpoint alone tells how it sees.
    checkpoint = published.write(family, tmp_path / f"{family}-{preset}")
    # Short blocks, so that a few tokens are several blocks.
    options = {"sub_block_length": 2} if PRESETS[preset].sub_block_length else {}
    if PRESETS[preset].operation.defers(PRESETS[preset].pipeline):
        options["cache"] = "commit"  # the published loops append a block by a forward of its own
    given = {"block_length": 4} if PRESETS[preset].visibility == "block" else None
    if given is None and PRESETS[preset].schedule != "canvas":
        options["block_length"] = 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if family in UNPROVEN else "error", UserWarning)
        model = dlm_fast.load(
            checkpoint.folder, dtype=torch.float64, diffusion=given, backend="reference", device="cpu"
        )
    if family in ("llada2", "rnd1"):
        model.set_experts_implementation("eager")  # the grouped product of torch has no float64
    diffusion = dlm_fast.handle_of(model).diffusion
    rng = random.Random(f"{family} {preset}")
    ids = [i for i in range(3, 90) if i != diffusion.mask_token_id and i not in diffusion.eos_token_ids]
    requests = [(n, new) for n in (1, 3, 4, 6, 8) for new in (1, 5, 8, 11)]
    prompts = [rng.choices(ids, k=n) for n, _ in requests]
    out = dlm_fast.generate(model, prompts, preset=preset, max_new_tokens=[new for _, new in requests], **options)
    steps = 0
    for b, (prompt, (_, new)) in enumerate(zip(prompts, requests)):
        row = answer(checkpoint, preset, diffusion, prompt, new, options)
        assert out.canvas[b].tolist() == row.tokens, (family, preset, b)
        assert out.unmask_step[b].tolist() == row.unmask_step, (family, preset, b)
        assert out.nfe[b] == row.nfe, (family, preset, b)
        steps += row.step
    assert steps
