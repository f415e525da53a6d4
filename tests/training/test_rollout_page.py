"""The example of docs/rollouts.md, at toy size: its gradient is that of a policy gradient written out by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dlm_fast

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rollouts.md"


@pytest.fixture(scope="module")
def page():
    """What the page's example defines, without its last line, which runs it."""
    block = re.search(r"```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    body, _ = block.rsplit("\nprint(", 1)
    assert len(block.splitlines()) <= 60
    names: dict = {}
    exec(compile(body, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def model():
    return dlm_fast.load("tiny-full", device="cpu").requires_grad_(True)


def sampled(page, model, **options):
    session = dlm_fast.Session(model, slots=8, max_positions=128, **{**page["DECODER"], **options})
    return page["decode"](session, ["Calc 13-9 9+4 2+2", "Calc 20-3 1+1 8-8"], 4, seed=3)


def test_the_gradient_of_the_example_is_a_policy_gradient_by_hand(page, model):
    rows, rewards = sampled(page, model)
    hidden = []
    hook = model.lm_head.register_forward_hook(lambda module, given, out: hidden.append(given[0].detach()))
    page["loss_of"](model, rows, rewards, 4).backward()
    hook.remove()
    found = model.lm_head.weight.grad
    tied = model.lm_head.weight is model.model.embed_tokens.weight

    paths, by_hand = dlm_fast.trajectories(rows), torch.zeros_like(found)
    for r in range(8):
        group = rewards[r // 4 * 4 : r // 4 * 4 + 4]
        advantage = (rewards[r] - group.mean()) / (group.std() + 1e-4)
        for j in paths.written[r].nonzero().flatten().tolist():
            logits = model.lm_head.weight.detach() @ hidden[0][r, j]
            logits[0] = -torch.inf  # the mask
            miss = torch.nn.functional.one_hot(paths.tokens[r, j], len(logits)) - logits.softmax(0)
            by_hand -= advantage / 8 * torch.outer(miss, hidden[0][r, j])
    assert not tied and by_hand.abs().max() > 1e-3
    torch.testing.assert_close(found, by_hand, atol=1e-4, rtol=1e-3)


def test_the_log_probability_of_a_path_is_that_of_its_confidences(page, model):
    rows, _ = sampled(page, model, steps_per_block=3)
    paths = dlm_fast.trajectories(rows)
    with torch.no_grad():
        found = page["log_probs"](model, paths)
    assert int(paths.steps.max()) == 3
    noted = torch.where(paths.written, paths.confidence.clamp(min=1e-30).log(), 0).sum(1)
    torch.testing.assert_close(found, noted, atol=2e-2, rtol=1e-3)  # the mask's share stays in a confidence


def test_a_step_makes_better_answers_likelier_and_worse_ones_less_likely(page, model):
    rows, rewards = sampled(page, model)
    group = rewards.view(2, 4)
    better = (group - group.mean(1, keepdim=True)).flatten()
    paths = dlm_fast.trajectories(rows)
    before = page["log_probs"](model, paths).detach()
    page["loss_of"](model, rows, rewards, 4).backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    with torch.no_grad():
        gain = page["log_probs"](model, paths) - before
    assert (better * gain).sum() > 0 and gain[better.argmax()] > gain[better.argmin()]


def test_a_second_model_decodes_with_the_parameters_of_the_first():
    text = PAGE.read_text(encoding="utf-8")
    names = {"dlm_fast": dlm_fast}
    exec(re.findall(r"```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[-1], names)
    trained, decoding = names["trained"], names["decoding"]
    assert [id(p) for p in decoding.parameters()] == [id(p) for p in trained.parameters()]
    prompt = [[{"role": "user", "content": "Calc 13-9 9+4 2+2"}]]
    before = dlm_fast.generate(decoding, prompt, max_new_tokens=16).canvas[0]
    with torch.no_grad():
        trained.lm_head.weight.mul_(-1)
    after = dlm_fast.generate(decoding, prompt, max_new_tokens=16).canvas[0]
    assert torch.equal(after, dlm_fast.generate(trained, prompt, max_new_tokens=16).canvas[0])
    assert not torch.equal(after, before)
