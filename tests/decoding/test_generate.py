"""The decode loop against its specification: tests/support/oracles.py, recomputing everything, and rows alone."""

from __future__ import annotations

import ast
import collections
import dataclasses
import math
from pathlib import Path

import decode_cases
import numpy as np
import oracles
import pytest
import torch
from decode_cases import BLOCK_PRESETS, FULL_PRESETS, first_difference, near_tie, random_case
from helpers import EOS, MASK, VOCAB, bolder, random_prompts, toy, toy_tokenizer

import dlm_fast
from dlm_fast.presets import PRESETS, resolve
from dlm_kernels.state import COMMIT, DENOISE, DONE

PRESET_NAMES = FULL_PRESETS + BLOCK_PRESETS


def toy_for(preset: str, **kwargs):
    return toy(PRESETS[preset].visibility, **kwargs)


def block_of(preset: str, length: int = 4) -> dict:
    """The block_length option; a block-causal toy has a block length of its own already."""
    return {"block_length": length} if PRESETS[preset].visibility == "full" else {}


def tokens(out) -> list[list[int]]:
    return [row.tolist() for row in out.canvas]


def everything(out, row: int) -> tuple:
    """All that the result of a row is, except the time that it took."""
    text = None if out.text is None else out.text[row]
    tensors = tuple(tuple(t[row].tolist()) for t in (out.sequences, out.canvas, out.unmask_step, out.confidence))
    return (*tensors, text, out.finish[row], out.nfe[row], out.query_tokens[row], out.tpf[row])


def test_the_oracles_import_nothing_of_the_project():
    tree = ast.parse(Path(oracles.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "collections.abc", "dataclasses", "math", "torch"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_oracles_forward_equals_the_hugging_face_model(family):
    spec = decode_cases.ModelSpec(family=family, heads=4, kv_heads=1)
    ids = random_prompts([13])[0]
    causal = torch.ones(13, 13, dtype=torch.bool).tril()
    exact, _ = decode_cases.network(spec).forward(ids, range(13), causal)
    theirs = decode_cases.build(spec)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(theirs.double(), exact, atol=2e-4, rtol=2e-5)


def test_the_cases_cover_what_the_specification_names():
    cases = [random_case(seed) for seed in range(64)]
    seen = collections.Counter()
    for case in cases:
        preset = resolve(case.preset, case.diffusion.visibility, case.options)
        length = preset.block_length or case.diffusion.block_length
        heads = case.model.heads // case.model.kv_heads
        seen.update(
            {
                f"preset {case.preset}",
                f"rule {preset.rule}",
                f"score {preset.score}",
                f"stop {preset.stop}",
                f"GQA {heads}",
            }
        )
        seen.update(
            {f"align {case.diffusion.block_alignment}", f"twist {case.model.twist}", f"family {case.model.family}"}
        )
        seen.update(f"prompt {n - length:+d}" for n in map(len, case.prompts or []) if length and abs(n - length) <= 1)
        seen.update(f"prompt of {len(p)}" for p in case.prompts or [])
        seen.update(name for name, has in (("canvas", case.canvas), ("sampled", any(case.temperature))) if has)
    wanted = [f"preset {p}" for p in PRESET_NAMES] + [f"rule {r}" for r in ("quota", "threshold", "factor", "entropy")]
    wanted += [f"score {s}" for s in ("confidence", "margin", "neg_entropy", "random")] + ["GQA 1", "GQA 4", "GQA 7"]
    wanted += [
        "stop never",
        "stop after_block",
        "stop closed",
        "align abs",
        "align rel",
        "twist twins",
        "twist flat",
        "prompt of 1",
    ]
    wanted += [
        "prompt -1",
        "prompt +0",
        "prompt +1",
        "canvas",
        "sampled",
        "family llama",
        "family qwen2",
        "family qwen3",
    ]
    assert not [name for name in wanted if not seen[name]]
    assert all(case.model.layers >= 2 and len(case) >= 3 for case in cases)


@pytest.mark.parametrize("part", range(8))
def test_every_decoder_equals_its_oracle_token_for_token(part):
    near_ties = 0
    for seed in range(part * 8, part * 8 + 8):
        case = random_case(seed)
        out = case.generate()
        for row in range(len(case)):
            expected = case.oracle(row)
            where = f"seed {seed} row {row} {case.preset} {case.options}"
            step = first_difference(
                (out.canvas[row].tolist(), out.unmask_step[row].tolist()), (expected.tokens, expected.unmask_step)
            )
            if step is not None and near_tie(case, row, out, step):
                near_ties += 1  # float32 against float64, nearer than rounding
                continue
            assert out.canvas[row].tolist() == expected.tokens, where
            assert out.unmask_step[row].tolist() == expected.unmask_step, where
            assert (out.nfe[row], out.query_tokens[row]) == (expected.nfe, expected.query_tokens), where
            torch.testing.assert_close(
                out.confidence[row].double(), torch.tensor(expected.confidence).double(), atol=1e-4, rtol=0
            )
    assert near_ties <= 1


@pytest.mark.parametrize("alignment", ["abs", "rel"])
@pytest.mark.parametrize("preset", BLOCK_PRESETS)
def test_decoding_with_the_cache_equals_recomputing_everything(preset, alignment):
    model = toy("block", block_alignment=alignment, block_length=4, layers=3)
    prompts = random_prompts([1, 3, 4, 5, 11])
    cached, recomputed = (
        dlm_fast.generate(model, prompts, preset=preset, cache=cache, max_new_tokens=13, **bolder(preset))
        for cache in ("commit", "none")
    )
    assert tokens(cached) == tokens(recomputed)
    assert [s.tolist() for s in cached.unmask_step] == [s.tolist() for s in recomputed.unmask_step]
    assert sum(cached.query_tokens) < sum(recomputed.query_tokens)
    assert all(c > r for c, r in zip(cached.nfe, recomputed.nfe))  # prefill and commits


@pytest.mark.parametrize("temperature", [0.0, [0.0, 0.7, 1.0, 0.3, 1.0]])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_batch_of_unequal_prompts_equals_its_rows_alone(preset, temperature):
    model = toy_for(preset, heads=7, kv_heads=1, eos=(EOS, 7, 9))
    prompts, new = random_prompts([1, 3, 4, 5, 14]), [9, 1, 8, 13, 6]
    settings = {"preset": preset, "seed": 3, **bolder(preset), **block_of(preset)}
    batch = dlm_fast.generate(model, prompts, max_new_tokens=new, temperature=temperature, **settings)
    for row, prompt in enumerate(prompts):
        t = temperature[row] if temperature else 0.0
        alone = dlm_fast.generate(
            model, [prompt], max_new_tokens=new[row], temperature=t, request_ids=[row], **settings
        )
        by_itself, in_batch = everything(alone, 0), everything(batch, row)
        assert by_itself[:3] == in_batch[:3] and by_itself[4:] == in_batch[4:]
        assert by_itself[3] == pytest.approx(in_batch[3], abs=1e-5)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_draw_depends_on_the_seed_and_the_request_only(preset):
    model, prompts = toy_for(preset), random_prompts([2, 5, 9, 4])
    settings = {"preset": preset, "temperature": 1.0, "max_new_tokens": 8, **block_of(preset)}
    first = tokens(dlm_fast.generate(model, prompts, seed=11, request_ids=[40, 41, 42, 43], **settings))
    again = tokens(dlm_fast.generate(model, prompts[::-1], seed=11, request_ids=[43, 42, 41, 40], **settings))
    assert first == again[::-1]
    assert first != tokens(dlm_fast.generate(model, prompts, seed=12, request_ids=[40, 41, 42, 43], **settings))
    assert first != tokens(dlm_fast.generate(model, prompts, seed=11, request_ids=[50, 51, 52, 53], **settings))


def test_draws_follow_the_softmax_of_the_logits():
    model = toy("full", seed=4)
    drawn = dlm_fast.generate(model, [[5, 6, 7]] * 600, max_new_tokens=1, temperature=1.0)
    logits, _ = oracles.Network(model).forward([5, 6, 7, MASK], range(4), torch.ones(4, 4, dtype=torch.bool))
    p = logits[3].clone().index_fill_(0, torch.tensor(MASK), -math.inf).softmax(-1)
    counts = torch.tensor([row[3] for row in tokens(drawn)]).bincount(minlength=VOCAB).double()
    expected = 600 * p
    likely = expected > 10
    assert likely.sum() > 3
    assert ((counts - expected).abs()[likely] < 5 * expected.sqrt()[likely]).all()


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_an_empty_batch_decodes_to_nothing(preset):
    out = dlm_fast.generate(toy_for(preset), [], preset=preset)
    assert (out.sequences, out.canvas, out.finish, out.nfe, out.tpf) == ([], [], [], [], [])


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_canvas_without_masks_costs_nothing(preset):
    full = random_prompts([7])[0]
    hole = [*full[:3], MASK, *full[4:]]
    out = dlm_fast.generate(toy_for(preset), canvas=[full, hole], preset=preset, **block_of(preset))
    assert out.canvas[0].tolist() == full and out.nfe[0] == out.query_tokens[0] == 0 and out.tpf[0] == 0.0
    assert out.nfe[1] > 0 and MASK not in out.canvas[1]


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_given_tokens_stay_and_a_given_eos_stops_nothing(preset):
    canvas = [5, MASK, MASK, EOS, 9, MASK, MASK, MASK, EOS, 8, MASK, 7]
    out = dlm_fast.generate(toy_for(preset), canvas=[canvas], preset=preset, banned_token_ids=[EOS], **block_of(preset))
    given = [p for p, token in enumerate(canvas) if token != MASK]
    assert [out.canvas[0][p].item() for p in given] == [canvas[p] for p in given]
    assert MASK not in out.canvas[0] and out.finish == ["length"]
    assert all((out.unmask_step[0][p] == -1) == (p in given) for p in range(len(canvas)))
    assert out.sequences[0].tolist() == out.canvas[0][1:].tolist()


def test_a_canvas_may_be_a_tensor_and_prompts_may_be_tensors():
    model = toy("full")
    ids = torch.tensor([[4, 5, MASK], [MASK, 7, 8]])
    assert tokens(dlm_fast.generate(model, canvas=ids)) == tokens(dlm_fast.generate(model, canvas=ids.tolist()))
    assert tokens(dlm_fast.generate(model, [torch.tensor([4, 5])], max_new_tokens=2)) == tokens(
        dlm_fast.generate(model, [[4, 5]], max_new_tokens=2)
    )


def test_prompts_may_be_strings_chats_or_ids():
    model, tokenizer = toy("full"), toy_tokenizer()
    chat = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    settings = {"max_new_tokens": 5, "tokenizer": tokenizer}
    as_ids = dlm_fast.generate(model, [tokenizer(text)["input_ids"], tokenizer("abc")["input_ids"]], **settings)
    as_given = dlm_fast.generate(model, [chat, "abc"], **settings)
    assert tokens(as_given) == tokens(as_ids) and as_given.text == as_ids.text
    assert as_given.text[1] == tokenizer.decode(as_given.sequences[1].tolist(), skip_special_tokens=True)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_banned_ids_and_the_mask_are_never_written(preset):
    model, prompts = toy_for(preset), random_prompts([3, 6, 1])
    banned = list(range(2, 30))
    settings = {"max_new_tokens": 10, "temperature": [0.0, 1.0, 2.0], **block_of(preset)}
    out = dlm_fast.generate(model, prompts, preset=preset, banned_token_ids=banned, **settings)
    written = {t for row, prompt in zip(tokens(out), prompts) for t in row[len(prompt) :]}
    assert written and not written & set(banned)
    assert all(MASK not in row for row, finish in zip(tokens(out), out.finish) if finish == "length")


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_an_eos_is_not_drawn_before_min_new_tokens(preset):
    eos = tuple(range(1, 16))
    model, prompts = toy_for(preset, eos=eos), [[20, 21], [22], [23, 24, 25]]
    settings = {"preset": preset, "max_new_tokens": 9, **block_of(preset)}
    free = dlm_fast.generate(model, prompts, **settings)
    held_back = dlm_fast.generate(model, prompts, min_new_tokens=[6, 0, 9], **settings)
    assert min(map(len, free.sequences)) < 6  # the ids end rows early unless they are held back
    assert len(held_back.sequences[0]) >= 6 and len(held_back.sequences[2]) == 9
    assert everything(held_back, 1)[:2] == everything(free, 1)[:2]
    assert held_back.finish[2] == "length"


def test_the_stop_rules_differ_in_cost_and_never_in_text_while_later_tokens_are_unseen():
    """In a block-causal model, what follows an EOS cannot change what precedes it."""
    model = toy("block", eos=tuple(range(1, 8)), block_length=4)
    prompts = random_prompts([3, 5, 8, 2, 6])
    outs = {
        stop: dlm_fast.generate(model, prompts, preset="sdar", stop=stop, max_new_tokens=16)
        for stop in ("never", "after_block", "closed")
    }
    texts = {stop: [s.tolist() for s in out.sequences] for stop, out in outs.items()}
    assert texts["never"] == texts["after_block"] == texts["closed"]
    assert outs["closed"].finish.count("eos") >= 3
    for closed, after, never in zip(outs["closed"].nfe, outs["after_block"].nfe, outs["never"].nfe):
        assert closed <= after <= never
    assert sum(outs["closed"].nfe) < sum(outs["after_block"].nfe) < sum(outs["never"].nfe)


def test_closed_waits_until_nothing_before_the_eos_is_masked():
    case = dataclasses.replace(random_case(0, preset="llada"), options={"block_length": 8})
    stopped_early = 0
    for seed in range(12):
        model = toy("full", seed=seed, eos=tuple(range(1, 12)))
        out = dlm_fast.generate(model, [[40, 41, 42]], max_new_tokens=8, **case.options)
        row, written = out.canvas[0].tolist()[3:], out.unmask_step[0].tolist()[3:]
        if out.finish == ["eos"]:
            end = len(out.sequences[0])
            assert row[end] in range(1, 12) and MASK not in row[:end]
            stopped_early += MASK in row
            # The step that closed the row was its last.
            assert max(written[: end + 1]) == max(written)
    assert stopped_early >= 3


def test_finish_reasons_and_sequences_stop_before_the_eos():
    model = toy("full", eos=tuple(range(1, 17)))
    out = dlm_fast.generate(
        model, random_prompts([4, 4, 4, 4]), max_new_tokens=6, block_length=1, min_new_tokens=[0, 0, 6, 6]
    )
    assert out.finish[2:] == ["length", "length"] and "eos" in out.finish[:2]
    for sequence, canvas, finish in zip(out.sequences, out.canvas, out.finish):
        assert canvas[4 : 4 + len(sequence)].tolist() == sequence.tolist()
        assert not set(sequence.tolist()) & set(range(1, 17)) or finish == "length"


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_stop_string_ends_the_row_and_is_cut_off(preset):
    model, tokenizer = toy_for(preset, eos=()), toy_tokenizer()
    settings = {"preset": preset, "max_new_tokens": 12, "tokenizer": tokenizer, **block_of(preset, 3)}
    whole = dlm_fast.generate(model, random_prompts([3, 5]), **settings)
    stop = whole.text[0][4:6]
    out = dlm_fast.generate(model, random_prompts([3, 5]), stop_strings=[stop], **settings)
    cut = whole.text[0].index(stop)
    assert out.text[0] == whole.text[0][:cut] and out.finish[0] == "stop"
    assert out.text[0] == tokenizer.decode(out.sequences[0].tolist(), skip_special_tokens=True)
    assert out.nfe[0] < whole.nfe[0]


def test_llada_writes_one_token_a_step_by_descending_confidence_within_a_step_count_of_its_length():
    out = dlm_fast.generate(toy("full"), random_prompts([5]), preset="llada", max_new_tokens=7)
    steps = out.unmask_step[0][5:].tolist()
    assert sorted(steps) == list(range(7)) and out.nfe == [7] and out.query_tokens == [7 * 12]
    assert out.unmask_step[0][:5].tolist() == [-1] * 5 and out.confidence[0][:5].tolist() == [0.0] * 5
    assert (out.confidence[0][5:] > 0).all() and out.tpf == [len(out.sequences[0]) / 7]


def test_steps_per_block_is_the_number_of_forwards():
    out = dlm_fast.generate(
        toy("full", eos=()), random_prompts([5]), preset="llada", block_length=5, steps_per_block=2, max_new_tokens=10
    )
    assert out.nfe == [4]
    assert [out.unmask_step[0].tolist().count(step) for step in range(4)] == [3, 2, 3, 2]


def test_forwards_are_counted_by_hand_for_every_cache():
    full, block, prompt = toy("full", eos=()), toy("block", eos=(), block_length=4), random_prompts([6])
    settings = {"max_new_tokens": 8, "rule": "quota", "steps_per_block": 2}
    # 2 blocks of 4, 2 steps each, on a canvas of 14.
    counted = {p: dlm_fast.generate(full, prompt, preset=p, block_length=4, **settings) for p in FULL_PRESETS}
    assert [counted[p].nfe[0] for p in FULL_PRESETS] == [4, 4, 4, 4]
    assert counted["llada"].query_tokens == counted["fast-dllm"].query_tokens == [4 * 14]
    assert counted["fast-dllm-prefix"].query_tokens == [14 + 8 + 14 + 4]
    assert counted["fast-dllm-dual"].query_tokens == [14 + 4 + 14 + 4]
    # Prefill of 6, two blocks of two steps, and one commit between them.
    committed = dlm_fast.generate(block, prompt, preset="sdar", cache="commit", **settings)
    assert committed.nfe == [1 + 2 + 1 + 2] and committed.query_tokens == [6 + 2 * 4 + 4 + 2 * 4]
    # Fused, the same positions in one forward per denoise step: prompt with first block, and first with second block.
    fused = dlm_fast.generate(block, prompt, preset="sdar", **settings)
    assert fused.nfe == [2 + 2] and fused.query_tokens == [(6 + 4) + 4 + (4 + 4) + 4]
    # Aligned to multiples of 4: [0, 4) is prefilled; then come [4, 8), which holds two prompt tokens, [8, 12), and [12,
    # 16), of which two positions are cut. A step takes half a block of 4.
    model = toy("block", eos=(), block_length=4, block_alignment="abs")
    settings["cache"] = "commit"
    absolute = dlm_fast.generate(model, prompt, preset="sdar", **settings)
    assert absolute.nfe == [1 + 1 + 1 + 2 + 1 + 2] and absolute.query_tokens == [4 + (4 + 4) + (2 * 4 + 4) + 2 * 4]
    cropped = dlm_fast.generate(model, prompt, preset="sdar", last_block="crop", **settings)
    assert cropped.nfe == [1 + 1 + 1 + 2 + 1 + 1] and cropped.query_tokens == [4 + (4 + 4) + (2 * 4 + 4) + 2]
    settings["cache"] = "fused"
    assert dlm_fast.generate(model, prompt, preset="sdar", **settings).nfe == [1 + 2 + 2]
    assert dlm_fast.generate(model, prompt, preset="sdar", **settings).query_tokens == absolute.query_tokens


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_every_denoise_step_of_a_row_writes_at_least_one_token(preset):
    history = []

    def on_step(state):
        masks = (state.tokens == MASK) & (torch.arange(state.tokens.shape[1]) < state.canvas_len[:, None])
        history.append((masks.sum(1).tolist(), state.step.tolist(), state.nfe.tolist(), state.phase.tolist()))

    prompts = random_prompts([2, 5, 8, 1])
    dlm_fast.generate(
        toy_for(preset), prompts, preset=preset, max_new_tokens=[8, 3, 11, 9], on_step=on_step, **block_of(preset, 3)
    )
    for (before, steps, nfe, phase), (after, steps_after, nfe_after, _) in zip(history, history[1:]):
        for row in range(4):
            assert nfe_after[row] - nfe[row] in (0, 1)
            if steps_after[row] > steps[row]:
                assert after[row] < before[row]
            else:
                assert after[row] == before[row]
            if phase[row] == DONE:
                assert nfe_after[row] == nfe[row]
    assert all(phase == DONE for phase in history[-1][3])


def test_no_row_pays_for_a_commit_that_nothing_follows():
    model, phases = toy("block", eos=()), []
    out = dlm_fast.generate(
        model,
        random_prompts([4, 4]),
        preset="llada2",
        cache="commit",
        max_new_tokens=4,
        on_step=lambda s: phases.append(s.phase.tolist()),
    )
    assert all(COMMIT not in step for step in phases) and phases[-1] == [DONE, DONE] and DENOISE in phases[0]
    assert all(nfe == 1 + int(steps.max()) + 1 for nfe, steps in zip(out.nfe, out.unmask_step))


def test_lists_may_be_tensors_arrays_or_generators():
    model, prompts = toy("full"), random_prompts([3, 4])
    as_lists = {
        "max_new_tokens": [4, 6],
        "temperature": [0.0, 1.0],
        "request_ids": [7, 9],
        "banned_token_ids": [5, 6],
        "eos_token_ids": [1, 2],
    }
    expected = tokens(dlm_fast.generate(model, prompts, **as_lists))
    for form in (torch.tensor, np.array, iter, tuple):
        assert (
            tokens(dlm_fast.generate(model, iter(prompts), **{name: form(value) for name, value in as_lists.items()}))
            == expected
        )


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_canvas_of_exactly_the_models_positions_is_decoded_and_one_more_is_refused(preset):
    model = toy_for(preset)
    room = model.config.max_position_embeddings
    settings = {"preset": preset, **bolder(preset, 0.01), **block_of(preset)}
    prompt, canvas = [5] * (room - 8), [5] * (room - 4) + [MASK] * 4

    assert MASK not in tokens(dlm_fast.generate(model, [prompt], max_new_tokens=8, eos_token_ids=[], **settings))[0]
    assert len(tokens(dlm_fast.generate(model, canvas=[canvas], **settings))[0]) == room
    for longer in ({"prompts": [prompt], "max_new_tokens": 9}, {"canvas": [[5, *canvas]]}):
        with pytest.raises(
            ValueError, match=f"with its new tokens must fit the model's {room} positions, got {room + 1}"
        ):
            dlm_fast.generate(model, **longer, **settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_nan_logits_are_an_error_that_still_carries_the_other_rows(preset, temperature):
    model = toy_for(preset)
    poison = 47
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = math.nan
    settings = {
        "preset": preset,
        "max_new_tokens": 6,
        "temperature": temperature,
        "banned_token_ids": [poison],
        **block_of(preset),
    }
    prompts = [[5, 6], [7, poison, 8], [9]]
    with pytest.raises(dlm_fast.DecodeError, match=r"logits must be finite.*got NaN.* in rows \[1\]") as caught:
        dlm_fast.generate(model, prompts, **settings)
    assert caught.value.rows == [1]
    alone = dlm_fast.generate(model, [prompts[0], prompts[2]], request_ids=[0, 2], **settings)
    assert [tokens(caught.value.output)[b] for b in (0, 2)] == tokens(alone)
    assert MASK in caught.value.output.canvas[1]


def fill(name: str, value: float, rows=slice(None)):
    """A change of a model: the weights of a projection of its first layer."""
    return lambda attention: getattr(attention, name).weight[rows].fill_(value)


NOT_FINITE = {
    "NaN queries": fill("q_proj", math.nan),
    "an infinity in one query feature": fill("q_proj", math.inf, rows=3),
    "NaN keys": fill("k_proj", math.nan),
    "an infinity in one key feature": fill("k_proj", math.inf, rows=3),
    "NaN values": fill("v_proj", math.nan),
    "queries beyond float16": lambda attention: attention.q_proj.weight.mul_(3e4),
    "keys beyond float16": lambda attention: attention.k_proj.weight.mul_(3e4),
}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("change", NOT_FINITE)
def test_attention_that_is_not_finite_ends_in_an_error(change, backend):
    """Zeros in place of the results of attention would decode plausible tokens, because the residual stream stays
    finite."""
    if backend == "triton":
        pytest.importorskip("triton")
    model = toy(backend=backend, dtype=torch.float16)
    with torch.no_grad():
        NOT_FINITE[change](model.model.layers[0].self_attn)
    with pytest.raises(dlm_fast.DecodeError, match=r"logits must be finite.*got NaN.* in rows \[0, 1\]"):
        dlm_fast.generate(model, [[5, 6, 7], [8]], max_new_tokens=4, preset="llada")


def test_a_row_without_a_token_to_draw_is_an_error_not_a_loop():
    model = toy("full")
    with torch.no_grad():
        model.lm_head.weight.fill_(0)
        model.lm_head.weight[MASK] = math.inf
    with pytest.raises(dlm_fast.DecodeError, match=r"in rows \[0\]"):
        dlm_fast.generate(model, [[5]], max_new_tokens=2)
