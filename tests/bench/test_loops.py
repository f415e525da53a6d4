"""The published loops of `bench.loops`: what they write, compute and keep."""

from __future__ import annotations

import random

import pytest
import torch

import dlm_fast
from bench import decoders, loops, models
from bench.decoders import LOOPS, Instances, Setting

CPU = torch.device("cpu")
SETTING = Setting(("full", "block"), (2,), prompt=9, new_tokens=64, per_step=8, turns=1, mixed=0, backend="reference")


@pytest.fixture(scope="module")
def made() -> models.Models:
    return models.Models(models.small(2, 64, 96), CPU, torch.float32, models.EVEN)


def task_of(made: models.Models, visibility: str) -> tuple[Instances, loops.Task]:
    subject = made(visibility)
    return Instances.of(subject, "reference"), SETTING.task(subject, 2)


@pytest.mark.parametrize("visibility", LOOPS)
def test_ours_writes_the_tokens_of_every_loop_and_takes_no_more_forwards(made, visibility):
    instances, task = task_of(made, visibility)
    for published in LOOPS[visibility]:
        loop, forwards = published.make(instances.loops, task, watch=True), {}
        tokens, ours = loop.run(), decoders.decode_ours(instances.ours, task, published, forwards)
        assert tokens.equal(ours), published.name
        assert not (tokens == task.mask_id).any() and tokens[:, :9].equal(task.prompts)
        assert (loop.gap > 1e-5).all()  # so that equal tokens are no luck
        if published.same_windows:
            assert 8 <= forwards[published.ours] <= loop.forwards


def test_the_loops_of_a_block_causal_model_agree(made):
    instances, task = task_of(made, "block")
    written = [published.make(instances.loops, task).run() for published in LOOPS["block"]]
    assert written[0].equal(written[1]) and written[0].equal(written[2])


def test_banned_ids_are_never_written_and_count_in_the_softmax(made):
    instances, task = task_of(made, "full")
    plain = loops.Recompute(instances.loops, task).run()
    banned = tuple(plain[:, 9:].unique().tolist()[:20])
    task = loops.Task(task.prompts, 64, 32, 8, 0, (0, *banned))
    assert not torch.isin(loops.Recompute(instances.loops, task).run()[:, 9:], torch.tensor(banned)).any()

    # Two masks, the first of which would win if the banned id did not count.
    task = loops.Task(torch.tensor([[1]]), 2, 2, 1, 0, (0, 3))
    loop = loops.Recompute(instances.loops, task)
    loop.write(torch.tensor([[[0.0] * 4, [0.0, 2.0, 0.0, 9.0], [0.0, 1.0, 0.0, 0.0]]]), 0, 3)
    assert loop.tokens.tolist() == [[1, 0, 1]]


def test_equal_positions_are_written_from_the_left_and_the_gap_says_so(made):
    instances, _ = task_of(made, "full")
    loop = loops.Recompute(instances.loops, loops.Task(torch.tensor([[1]]), 4, 4, 2, 0, (0,)), watch=True)
    logits = torch.tensor([0.0, 1.0, 3.0, 0.0]).expand(1, 5, 4)
    loop.write(logits, 0, 5)
    assert loop.tokens.tolist() == [[1, 2, 2, 0, 0]] and loop.gap.tolist() == [0.0]
    loop.gap.fill_(9.0)
    loop.write(logits, 0, 5)  # nothing is left to prefer: what remains is the gap between two tokens
    assert loop.tokens.tolist() == [[1, 2, 2, 2, 2]] and loop.gap.tolist() == [2.0]


def test_keys_are_kept_as_a_loop_asks():
    keys = loops.Keys()

    def join(how: str, *values: float) -> list[float]:
        keys.how = how
        new = torch.tensor(values)[None, None, :, None]
        key, value = keys.join(0, new, -new)
        assert value.equal(-key)
        return key.flatten().tolist()

    assert join("fill", 1, 2, 3) == [1, 2, 3]
    assert join("beside", 8) == [1, 2, 3, 8] and join("beside", 9) == [1, 2, 3, 9]
    assert join("append", 4) == [1, 2, 3, 4] and join("beside", 9) == [1, 2, 3, 4, 9]
    keys.at = 1
    assert join("replace", 5, 6) == [1, 5, 6, 4] and join("beside", 9) == [1, 5, 6, 4, 9]
    keys.crop(2)
    assert join("beside", 9) == [1, 5, 9]
    assert join("fill", 7) == [7]


def test_an_idle_loop_runs_the_forwards_and_writes_nothing(made):
    instances, task = task_of(made, "block")
    loop = loops.Committed(instances.loops, task)
    with torch.no_grad():
        loop.open(9)
        loop.block(9, loops.idle)
    assert loop.forwards == 1 + 4 + 1 and (loop.tokens[:, 9:] == 0).all()


# Models


def test_a_random_model_decodes_some_tokens_a_step_and_not_all_rows_alike():
    made = models.Models(models.small(2, 64, 256), CPU, torch.float32, models.SURE)
    subject, rng = made("full"), random.Random(0)
    prompts = [subject.prompt(length, rng) for length in (20, 60, 40, 30)]
    out = dlm_fast.generate(
        subject.ours("reference"), prompts, preset="fast-dllm", max_new_tokens=64, banned_token_ids=[subject.eos]
    )
    pace = [64 / nfe for nfe in out.nfe]
    assert 1.5 < sum(pace) / 4 < 8 and max(pace) > 1.1 * min(pace)


def test_the_gap_of_a_random_head_is_what_was_asked_for():
    logits = torch.randn(2000, 500, generator=torch.Generator().manual_seed(0)) * models.head_scale(500, 3.0)
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).mean().item() == pytest.approx(3.0, rel=0.25)


def test_both_visibilities_share_random_weights_and_a_surer_head_is_the_same_head():
    made = models.Models(models.small(1, 64, 32), CPU, torch.float32, models.EVEN)
    full, block = made("full"), made("block")
    assert full.model is block.model and made("full") is full
    assert (full.diffusion.block_length, block.diffusion.block_length) == (None, 32)
    before = full.model.lm_head.weight.clone()
    assert made.surer().model.lm_head.weight.allclose(before * models.SURE / models.EVEN)
    assert made.surer().model.lm_head.weight.allclose(before * models.SURE / models.EVEN)  # once


def test_a_model_of_16_bits_is_checked_in_float32_with_fewer_layers():
    made = models.Models(models.small(3, 64, 32), CPU, torch.bfloat16, models.EVEN)
    checked = made.in_float32(2)
    assert checked("full").dtype == torch.float32 and checked("full").model.config.num_hidden_layers == 2
    assert made("full").dtype == torch.bfloat16 and checked.in_float32(1) is checked


def test_instances_share_parameters_and_not_their_attention(made):
    instances, _ = task_of(made, "full")
    weights = {model.lm_head.weight.data_ptr() for model in (instances.loops, instances.ours, instances.greedy)}
    assert len(weights) == 1
    names = [model.config._attn_implementation for model in (instances.loops, instances.ours, instances.greedy)]
    assert names == [loops.ATTENTION, "dlm_fast", "sdpa"]


def test_prompts_hold_neither_the_mask_nor_an_eos(made):
    rng = random.Random(0)
    assert {0, 1}.isdisjoint(made("full").prompt(2000, rng))
    text = models.embedded("full", CPU).prompt(200, rng)
    assert len(text) == 200 and 0 not in text and 1 not in text


@pytest.mark.parametrize(
    "sizes, message", [((1, 65, 32), "--hidden must be a multiple of 64"), ((0, 64, 32), "--layers")]
)
def test_sizes_that_make_no_model_are_named(sizes, message):
    with pytest.raises(models.ModelError, match=message):
        models.small(*sizes)
