"""Models of full visibility whose prompt sees itself only: who sees whom, what a cache keeps for good, and which
decoders are then exact."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import transcription_policies
from decode_cases import FULL_PRESETS, random_case
from helpers import EOS, MASK, bolder, native_model, options_of, random_prompts, save_toy_checkpoint, toy
from transcription_cases import REGISTRY, differences
from transcription_cases import random_case as transcribed_case

import dlm_fast
from dlm_fast.decoding import slots

REGISTRY.update(transcription_policies.REGISTRY)
DECODERS = [name for name, decoder in REGISTRY.items() if decoder.visibility == "full"]
CACHED = (
    "fast-dllm-prefix", "fast-dllm-dual", "freecache", "dinfer-vicinity", "d3llm", "dllm-var", "dkv-cache",
    "streaming-dllm", "freedave",
)  # fmt: skip


def isolated(case):
    """The case on a model whose prompt is isolated."""
    return dataclasses.replace(
        case, diffusion=dataclasses.replace(case.diffusion, prompt_isolated=True, block_alignment="rel")
    )


def logits(model, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits


def own_forward(tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of the toy's unpatched twin, told by a 4-D mask that the prompt sees itself only."""
    L = tokens.shape[1]
    visible = torch.ones(L, L, dtype=torch.bool)
    visible[:prompt, prompt:] = False
    return logits(native_model(), tokens, attention_mask=torch.where(visible[None, None], 0.0, -1e9))


def tokens_of(out) -> list[list[int]]:
    return [row.tolist() for row in out.canvas]


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"visibility": "block", "block_length": 4},
            "prompt_isolated goes with visibility 'full', got visibility='block'",
        ),
        (
            {"visibility": "full", "block_alignment": "abs"},
            "goes with block_alignment 'rel', got block_alignment='abs'",
        ),
        ({"visibility": "full", "prompt_isolated": 1}, "prompt_isolated must be true or false, got prompt_isolated=1"),
        (
            {"visibility": "full", "prompt_isolated": "yes"},
            "prompt_isolated must be true or false, got prompt_isolated='yes'",
        ),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dlm_fast.DiffusionConfig.from_dict(
            {"mask_token_id": MASK, "eos_token_ids": [EOS], "prompt_isolated": True, **fields}
        )


def test_a_plain_forward_shows_the_prompt_itself_only():
    model, tokens = toy("full", prompt_isolated=True), torch.tensor(random_prompts([11]))
    near = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(logits(model, tokens, prompt_lengths=torch.tensor([4])), own_forward(tokens, 4), **near)
    # Without prompt_lengths the prompt is what precedes the first mask; with no mask, everything.
    masked = tokens.clone()
    masked[0, [3, 6]] = MASK
    torch.testing.assert_close(logits(model, masked), own_forward(masked, 3), **near)
    torch.testing.assert_close(logits(model, tokens), own_forward(tokens, 11), **near)
    # prompt_lengths count real tokens.
    padded = torch.cat([torch.full((1, 2), 9), tokens], 1)
    attention_mask = torch.tensor([[0] * 2 + [1] * 11])
    shown = logits(model, padded, attention_mask=attention_mask, prompt_lengths=torch.tensor([4]))
    torch.testing.assert_close(shown[:, 2:], own_forward(tokens, 4), **near)
    embeds = model.get_input_embeddings()(tokens)
    with pytest.raises(ValueError, match="treats the prompt differently needs prompt_lengths with inputs_embeds"):
        model(inputs_embeds=embeds)
    embedded = logits(model, inputs_embeds=embeds, prompt_lengths=torch.tensor([4]))
    torch.testing.assert_close(embedded, own_forward(tokens, 4), **near)


def test_patch_keeps_transformers_visibility_in_a_plain_forward():
    model, tokens = native_model(), torch.tensor(random_prompts([8]))
    before = logits(model, tokens)
    diffusion = dlm_fast.handle_of(toy("full", prompt_isolated=True)).diffusion
    with dlm_fast.patch(model, diffusion=diffusion, backend="reference"):
        torch.testing.assert_close(logits(model, tokens), before, atol=2e-5, rtol=1e-4)
        patched = dlm_fast.generate(model, [[5, 6, 7]], max_new_tokens=6)
    assert tokens_of(patched) == tokens_of(
        dlm_fast.generate(toy("full", prompt_isolated=True), [[5, 6, 7]], max_new_tokens=6)
    )


@pytest.mark.parametrize("preset", FULL_PRESETS)
def test_the_loop_equals_its_oracle_token_for_token(preset):
    changed = 0
    for seed in range(4):
        case = isolated(random_case(seed, preset=preset, small=True))
        out = case.generate()
        for row in range(len(case)):
            expected, where = case.oracle(row), f"seed {seed} row {row} {case.options}"
            assert (out.canvas[row].tolist(), out.unmask_step[row].tolist()) == (
                expected.tokens,
                expected.unmask_step,
            ), where
            assert (out.nfe[row], out.query_tokens[row]) == (expected.nfe, expected.query_tokens), where
        seeing = dataclasses.replace(
            case, diffusion=dataclasses.replace(case.diffusion, prompt_isolated=False)
        ).generate()
        changed += tokens_of(seeing) != tokens_of(out)
    assert changed >= 2  # the test can tell an isolated prompt from another


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_equals_its_transcription_and_a_row_alone_its_batch(name):
    if (REGISTRY[name].preset or name) not in dlm_fast.PRESETS:
        pytest.skip("preset not there yet")
    for seed in range(3):
        case = isolated(transcribed_case(name, seed))
        out = case.generate()
        wrong = [line for b in range(len(case)) for line in differences(case, b, out, b, case.answer(b))]
        assert not wrong, "\n".join(wrong)
        b = random.Random(seed).randrange(len(case))
        alone = case.generate([b])
        assert (tokens_of(alone)[0], alone.nfe[0], alone.query_tokens[0]) == (
            tokens_of(out)[b],
            out.nfe[b],
            out.query_tokens[b],
        )


def keys_after_every_step(monkeypatch, model, preset: str, canvases: list[list[int]], **options) -> list[torch.Tensor]:
    """Keys of every layer, [layers, B, H_kv, L, D], after each step of the decode."""
    opened, open_decode = [], slots.open_decode

    def spy(*args):
        opened.append(open_decode(*args))
        return opened[-1]

    seen: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(slots, "open_decode", spy)

        def keep(state) -> None:
            seen.append(torch.stack([layer.keys for layer in opened[0].forward.cache.layers]).clone())

        dlm_fast.generate(model, canvas=canvases, preset=preset, on_step=keep, **options)
    return seen


@pytest.mark.parametrize("preset", CACHED)
@pytest.mark.parametrize("logits_row", ["self", "previous"])
def test_the_keys_of_an_isolated_prompt_are_what_its_first_forward_made_them(monkeypatch, preset, logits_row):
    options = options_of(preset, 3) | bolder(preset, 0.3, -1.5)
    options |= {"vicinity": 2, "warmup_steps": 2} if preset == "dinfer-vicinity" else {}
    canvas = random_prompts([5])[0] + [MASK] * 11
    model = toy("full", prompt_isolated=True, logits_row=logits_row, eos=())
    first, *later = (
        keys[:, :, :, :5] for keys in keys_after_every_step(monkeypatch, model, preset, [canvas], **options)
    )
    assert later and all(torch.equal(first, keys) for keys in later)


def test_the_keys_of_an_isolated_prompt_do_not_depend_on_the_response(monkeypatch):
    """A refresh that computed the prompt again would find the same bits; without isolation the bits would differ."""
    prompt, filled = random_prompts([5, 6])

    def same(**options) -> bool:
        canvases = (prompt + [MASK] * 7, prompt + [MASK, *filled])
        decode = {"preset": "fast-dllm-dual", "block_length": 3}
        keys = [keys_after_every_step(monkeypatch, toy("full", **options), canvases=[c], **decode)[0] for c in canvases]
        return torch.equal(*(k[:, :, :, :5] for k in keys))

    assert same(prompt_isolated=True) and not same()


ONE_BLOCK = {  # what a decoder with a cache equals where the response is one block
    "fast-dllm-prefix": {}, "fast-dllm-dual": {}, "freecache": {}, "dinfer": {}, "dllm-rl": {}, "dllm-var": {},
    "d3llm": {"threshold": -2.0},
}  # fmt: skip


def never_refreshed(preset: str) -> dict:
    return {} if dlm_fast.PRESETS[preset].refresh_interval is None else {"refresh_interval": None}


@pytest.mark.parametrize("preset", ONE_BLOCK)
def test_in_one_block_a_cache_loses_nothing(preset):
    options = {"block_length": 12, "max_new_tokens": [12, 7, 9], **bolder(preset, 0.25), **ONE_BLOCK[preset]}
    lost = 0
    for seed in range(3):

        def loses(model, prompts: list[list[int]]) -> bool:
            cached, exact = (
                dlm_fast.generate(model, prompts, preset=preset, **options, **cache)
                for cache in ({}, {"cache": "none", **never_refreshed(preset)})
            )
            return tokens_of(cached) != tokens_of(exact)

        prompts = random_prompts([4, 9, 1], seed)
        assert not loses(toy("full", prompt_isolated=True, seed=seed), prompts)
        lost += loses(toy("full", seed=seed), prompts)
    # Where the prompt sees the response, the same cache changes tokens.
    assert lost


@pytest.mark.parametrize("preset", ["fast-dllm-prefix", "freecache", "d3llm"])
def test_over_several_blocks_only_the_first_is_exact(preset):
    options = {"preset": preset, "block_length": 3, "max_new_tokens": 15, **never_refreshed(preset)}
    options |= bolder(preset, 0.25)
    at_once = {"commit_delay": 1} if preset == "d3llm" else {}
    changed = 0
    for seed in range(4):
        model, prompt = toy("full", prompt_isolated=True, seed=seed, eos=()), random_prompts([4], seed)
        exact, stale = (dlm_fast.generate(model, prompt, **options, **cache) for cache in ({"cache": "none"}, at_once))
        assert exact.canvas[0][:7].tolist() == stale.canvas[0][:7].tolist()  # 4 given, 3 written
        changed += tokens_of(exact) != tokens_of(stale)
    assert changed  # keys of earlier blocks went stale


@pytest.mark.parametrize(
    "preset",
    ["llada", "fast-dllm-prefix", "fast-dllm-dual", "dinfer-vicinity", "d3llm", "dllm-var", "dkv-cache", "wino"],
)
def test_triton_decodes_as_the_reference_does(preset, device):
    pytest.importorskip("triton")
    options = options_of(preset, 3) | bolder(preset, 0.2, -2.5)
    options |= {"vicinity": 2, "warmup_steps": 1} if preset == "dinfer-vicinity" else {}
    outputs = [
        dlm_fast.generate(
            toy("full", layers=1, prompt_isolated=True, backend=backend).to(device), random_prompts([3, 5]),
            preset=preset, max_new_tokens=[7, 4], **options,
        )
        for backend in ("triton", "reference")
    ]  # fmt: skip
    ours, expected = outputs
    assert tokens_of(ours) == tokens_of(expected)
    assert (ours.nfe, ours.query_tokens, ours.finish) == (expected.nfe, expected.query_tokens, expected.finish)


def test_a_checkpoint_says_so_itself_and_keeps_saying_it(tmp_path):
    model = save_toy_checkpoint(tmp_path / "a")
    model.config.dlm["prompt_isolated"] = True
    model.save_pretrained(tmp_path / "a")
    loaded = dlm_fast.load(tmp_path / "a", backend="reference", device="cpu")
    assert dlm_fast.handle_of(loaded).diffusion.prompt_isolated
    assert (dlm_fast.explain(loaded)["plain_forward"], dlm_fast.explain(loaded)["prompt_isolated"]) == (
        "isolated",
        True,
    )
    call = {"prompts": [[5, 6, 7]], "preset": "fast-dllm-dual", "block_length": 4, "max_new_tokens": 8}
    out, expected = (dlm_fast.generate(model, **call) for model in (loaded, toy("full", prompt_isolated=True)))
    assert tokens_of(out) == tokens_of(expected)
    loaded.save_pretrained(tmp_path / "b")
    again = dlm_fast.load(tmp_path / "b", backend="reference", device="cpu")
    assert dlm_fast.handle_of(again).diffusion == dlm_fast.handle_of(loaded).diffusion
