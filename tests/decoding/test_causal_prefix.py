"""Models of a causal prefix (Nemotron-Labs-Diffusion, NBDiff): who sees whom, first tokens, and rows that predict the
position behind them."""

from __future__ import annotations

import pytest
import torch
from helpers import EOS, MASK, bolder, facts_of, native_model, random_prompts, toy

import dlm_fast
from dlm_fast.presets import PRESETS

LENGTH = 4


def logits(model, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits


def tokens_of(out) -> list[list[int]]:
    return [row.tolist() for row in out.canvas]


def visible_to(tokens: list[int], alignment: str, prompt: int) -> torch.Tensor:
    """[L, L] bool of a plain forward, by the rule: causal up to the block of the first mask, blocks from there on."""
    L = len(tokens)
    start = 0 if alignment == "abs" else prompt
    block = [-1 if p < start else (p - start) // LENGTH for p in range(L)]
    first = block[tokens.index(MASK)] if MASK in tokens else L
    is_open = [b >= first for b in block]
    return torch.tensor(
        [[block[k] <= block[q] if is_open[q] else k <= q for k in range(L)] for q in range(L)], dtype=torch.bool
    )


def own_forward(tokens: list[int], visible: torch.Tensor) -> torch.Tensor:
    mask = torch.where(visible[None, None], 0.0, -1e9)
    return logits(native_model(), torch.tensor([tokens]), attention_mask=mask)[0]


CANVASES = [
    ([5, 6, 7, 8, 9, MASK, MASK, 4, MASK, MASK, 3], 5),
    ([5, 6, 7, MASK, MASK, MASK, MASK, MASK], 3),
    ([5, 6, 7, 8, 9, 10], 6),
    ([5, 6, 7, 8, 9, 10, 11, 12, MASK], 8),
]


@pytest.mark.parametrize("alignment", ["abs", "rel"])
@pytest.mark.parametrize("tokens, prompt", CANVASES)
def test_a_plain_forward_is_causal_up_to_the_block_of_the_first_mask(tokens, prompt, alignment):
    model = toy("block", block_length=LENGTH, block_alignment=alignment, causal_prefix=True)
    expected = own_forward(tokens, visible_to(tokens, alignment, prompt))
    torch.testing.assert_close(logits(model, torch.tensor([tokens]))[0], expected, rtol=1e-4, atol=1e-4)
    # Padding on either side changes nothing.
    L = len(tokens)
    padded = torch.tensor([[9] * 2 + tokens, tokens + [9] * 2])
    mask = torch.tensor([[0] * 2 + [1] * L, [1] * L + [0] * 2])
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    out = logits(model, padded, attention_mask=mask, position_ids=position)
    torch.testing.assert_close(out[1, :L], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[0, 2:], expected, rtol=1e-4, atol=1e-4)


def test_a_plain_forward_counts_blocks_from_the_prompt_that_it_is_told():
    tokens = CANVASES[0][0]
    model = toy("block", block_length=LENGTH, causal_prefix=True)
    out = logits(model, torch.tensor([tokens]), prompt_lengths=torch.tensor([3]))[0]
    torch.testing.assert_close(out, own_forward(tokens, visible_to(tokens, "rel", 3)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a model with a causal prefix needs input_ids, which hold its first mask"):
        model(inputs_embeds=torch.zeros(1, 4, model.config.hidden_size), prompt_lengths=torch.tensor([2]))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"visibility": "full"}, "causal_prefix goes with visibility 'block', got visibility='full'"),
        ({"causal_prefix": 1}, "causal_prefix must be true or false, got causal_prefix=1"),
    ],
)
def test_a_causal_prefix_is_refused_where_it_has_no_meaning(fields, message):
    settings = {"mask_token_id": MASK, "eos_token_ids": (EOS,), "visibility": "block", "block_length": LENGTH}
    with pytest.raises(ValueError, match=message):
        dlm_fast.DiffusionConfig(**settings | {"causal_prefix": True} | fields)
    read = dlm_fast.DiffusionConfig.from_dict({**settings, "causal_prefix": True})
    assert read.causal_prefix and read.predicts_next and not dlm_fast.DiffusionConfig(**settings).predicts_next


# Prompts on and off the grid, in one batch.
PROMPTS, NEW = [1, 3, 4, 5, 8], [9, 6, 8, 3, 5]


@pytest.mark.parametrize("causal_prefix", [True, False])
@pytest.mark.parametrize("logits_row", ["self", "previous"])
@pytest.mark.parametrize("alignment", ["abs", "rel"])
@pytest.mark.parametrize("preset", ["sdar", "sdar-dynamic", "sdar-entropy", "llada2", "efficient-dlm", "d2f", "bd3lm"])
def test_cached_equals_uncached(preset, alignment, logits_row, causal_prefix):
    """The row before a window is that of the prefill, of the commit, or of the step before, whatever it was computed
    with."""
    if causal_prefix and PRESETS[preset].pipeline:
        pytest.skip("pipelines are refused")
    differs = False
    for seed in range(3):
        facts = {"block_alignment": alignment, "logits_row": logits_row, "causal_prefix": causal_prefix}
        model = toy("block", block_length=LENGTH, eos=(), seed=seed, family=("llama", "qwen3")[seed % 2], **facts)
        settings = {"preset": preset, "max_new_tokens": NEW, "stop": "never"} | bolder(preset)
        prompts = random_prompts(PROMPTS, seed)
        cached = dlm_fast.generate(model, prompts, **settings)
        uncached = dlm_fast.generate(model, prompts, cache="none", **settings)
        assert tokens_of(cached) == tokens_of(uncached)
        assert [s.tolist() for s in cached.unmask_step] == [s.tolist() for s in uncached.unmask_step]
        # And the other facts matter.
        other = facts | {"logits_row": "self" if logits_row == "previous" else "previous"}
        model = toy("block", block_length=LENGTH, eos=(), seed=seed, family=("llama", "qwen3")[seed % 2], **other)
        differs |= tokens_of(dlm_fast.generate(model, prompts, **settings)) != tokens_of(cached)
    assert differs


@pytest.mark.parametrize("logits_row", ["self", "previous"])
@pytest.mark.parametrize("alignment", ["abs", "rel"])
@pytest.mark.parametrize("causal_prefix", [True, False])
def test_drafts_are_lossless_whatever_predicts_and_whoever_sees(alignment, logits_row, causal_prefix):
    saved = 0
    for seed in range(4):
        facts = {"block_alignment": alignment, "logits_row": logits_row, "causal_prefix": causal_prefix}
        model = toy("block", block_length=3 + seed % 3, eos=(), seed=seed, **facts)
        prompts = random_prompts(PROMPTS, seed)
        drafted = dlm_fast.generate(model, prompts, preset="freedave-block", max_new_tokens=NEW)
        static = dlm_fast.generate(model, prompts, preset="sdar", max_new_tokens=NEW, cache="none")
        assert tokens_of(drafted) == tokens_of(static)
        saved += sum(static.nfe) + sum(map(len, prompts)) - sum(drafted.nfe)
    assert saved > 0


@pytest.mark.parametrize("cache", ["commit", "none"])
@pytest.mark.parametrize("preset", ["llada2", "nemotron"])
def test_the_kernels_see_what_the_references_see(preset, cache):
    pytest.importorskip("triton")
    if PRESETS[preset].first_token and cache == "none":
        pytest.skip("first tokens come with commits")
    settings = {"preset": preset, "max_new_tokens": [5, 3], "cache": cache, "stop": "never"} | bolder(preset)
    ours, theirs = (
        dlm_fast.generate(
            toy("block", block_length=3, layers=1, eos=(), causal_prefix=True, backend=backend),
            random_prompts([4, 2]),
            **settings,
        )
        for backend in ("triton", "reference")
    )
    assert tokens_of(ours) == tokens_of(theirs) and ours.nfe == theirs.nfe


@pytest.mark.parametrize("preset, alignment", [("nemotron", "rel"), ("nbdiff", "rel"), ("nemotron", "abs")])
def test_a_blocks_first_token_is_what_a_causal_forward_predicts(preset, alignment):
    facts = {"block_alignment": alignment, **facts_of(preset)}
    model, causal = toy("block", block_length=LENGTH, eos=(), **facts), native_model()
    prompts = random_prompts([4, 8, 5] if alignment == "rel" else [4, 8, 12])
    out = dlm_fast.generate(model, prompts, preset=preset, max_new_tokens=11, stop="never", threshold=0.3)
    for b, prompt in enumerate(prompts):
        canvas = out.canvas[b]
        plain = logits(causal, canvas[None])[0]
        plain[:, MASK] = -torch.inf
        for start in range(len(prompt), len(canvas), LENGTH):
            assert canvas[start] == plain[start - 1].argmax()
            probability = logits(causal, canvas[None])[0, start - 1].softmax(-1)[canvas[start]]
            assert abs(out.confidence[b][start] - probability) < 1e-4


def test_the_other_masks_read_their_own_rows_where_the_model_says_so():
    # The second and last position of a block of two, once its first token stands.
    model, native = toy("block", block_length=2, eos=(), causal_prefix=True), native_model()
    prompt = random_prompts([4])[0]
    canvas = dlm_fast.generate(model, [prompt], preset="nemotron", max_new_tokens=2, stop="never").canvas[0].tolist()
    seen = [*canvas[:5], MASK]
    visible = torch.ones(6, 6).tril().bool()
    visible[4:] = True
    rows = logits(native, torch.tensor([seen]), attention_mask=torch.where(visible[None, None], 0.0, -1e9))[0]
    rows[:, MASK] = -torch.inf
    assert canvas[5] == rows[5].argmax() != rows[4].argmax()


def test_a_drawn_first_token_follows_the_temperature_and_the_seed():
    model, prompts = toy("block", block_length=2, eos=(), causal_prefix=True), random_prompts([4] * 40)
    prompts = [prompts[0]] * 40

    def first(temperature: float, seed: int = 0, **options) -> list[int]:
        out = dlm_fast.generate(
            model, prompts, preset="nemotron", max_new_tokens=2, temperature=temperature, seed=seed, **options
        )
        return [row[4].item() for row in out.canvas]

    assert len(set(first(0.0))) == 1 < len(set(first(1.0)))
    assert first(1.0) == first(1.0) != first(1.0, seed=1)
    assert set(first(1.0, draws_first_token=False)) == set(first(0.0))
    assert set(first(1.0, top_k=1)) == set(first(0.0)) and len(set(first(1.0, top_k=2))) == 2


def test_what_such_a_model_cannot_run_is_refused_by_name():
    model, plain, prompt = toy("block", causal_prefix=True), toy("block"), random_prompts([3])

    def refused(model, message: str, **arguments) -> None:
        with pytest.raises(ValueError, match=message):
            dlm_fast.generate(model, prompt, **arguments)

    refused(model, r"preset d2f decodes several blocks at once.*causal_prefix=True.*schedule='pipeline'", preset="d2f")
    refused(
        model, r"preset llada2.1 keeps a block's keys from its last .*use cache='none'.*'commit'", preset="llada2.1"
    )
    for preset in ("nemotron", "nbdiff", "fast-dllm-v2"):
        refused(
            plain,
            r"needs logits_row 'previous' or causal_prefix=True, got 'self' and causal_prefix=False",
            preset=preset,
        )
    refused(
        model,
        "unknown options causal_commit; causal_commit is here causal_prefix of the model's DiffusionConfig",
        preset="efficient-dlm",
        causal_commit=True,
    )
    assert dlm_fast.generate(model, prompt, preset="llada2.1", cache="none", max_new_tokens=3).nfe[0] > 0
