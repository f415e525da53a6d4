"""Learned heads: their files, what they compute, and how decoders use them."""

from __future__ import annotations

import json
import math
import os

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from head_cases import BLOCK, KINDS, PRESET_OF, inputs_of, random_head, toy_with_a_tokenizer
from helpers import MASK, VOCAB, native_model, random_prompts, save_toy_checkpoint, toy
from opened import faked, opened
from torch._subclasses.fake_tensor import FakeTensorMode

import dlm_fast
from dlm_fast import cli
from dlm_fast.decoding.step import denoise_step, open_decode
from dlm_fast.loading import CheckpointError
from dlm_fast.patching import attach
from dlm_fast.policies import CommitHead, FilterHead, Sched, heads, load_head, save_head
from dlm_fast.presets import PRESETS, describe, resolve

SHIPPED = {"tiny-filter": FilterHead, "tiny-commit": CommitHead}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_with_a_tokenizer(tmp_path_factory.mktemp("toy"))


def everything(out: dlm_fast.GenerateOutput, row: int) -> tuple:
    """A row without its confidences, which carry the rounding of the model's own matrix products."""
    tensors = tuple(t[row].tolist() for t in (out.sequences, out.canvas, out.unmask_step))
    return (*tensors, out.finish[row], out.nfe[row], out.query_tokens[row])


# What a head computes


def test_a_filter_is_two_layers_and_a_sigmoid():
    head = random_head("filter").double()
    (confidence,) = inputs_of("filter", 50)

    def linear(layer, x: list[float]) -> list[float]:
        return [sum(w * c for w, c in zip(line, x)) + b for line, b in zip(layer.weight.tolist(), layer.bias.tolist())]

    for row, ours in zip(confidence.double().tolist(), head(confidence.double()).tolist()):
        logits = linear(head.out, [max(0.0, h) for h in linear(head.hidden, row)])
        assert ours == pytest.approx([1 / (1 + math.exp(-x)) for x in logits], rel=1e-9, abs=1e-12)


def test_a_commit_head_is_one_transformer_layer():
    head = random_head("commit", 6, scale=1.0).double()
    confidence, masked, time = inputs_of("commit", 40, block_length=6)
    confidence, time = confidence.double(), time.double()
    weights = head.state_dict()

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    certainty = -(1 - confidence).log() / (24 * math.log(2))
    features = [confidence, certainty, masked.double(), time[:, None].expand(40, 6)]
    x = linear("features", torch.stack(features, -1)) + weights["position"]
    q, k, v = linear("qkv", F.rms_norm(x, (8,), eps=1e-5)).chunk(3, -1)
    split = [t.view(40, 6, 2, 4).transpose(1, 2) for t in (q, k, v)]
    x = x + linear("attended", F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
    x = x + linear("shrunk", linear("hidden", F.rms_norm(x, (8,), eps=1e-5)).relu())
    expected = linear("out", F.rms_norm(x, (8,), eps=1e-5))[..., 0].sigmoid()
    torch.testing.assert_close(head(confidence, masked, time), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_gives_a_row_the_same_bits_in_any_batch(kind):
    head, inputs = random_head(kind, 7), inputs_of(kind, 96, block_length=7)
    whole = head(*inputs)
    for size in (1, 2, 3, 5, 33):
        parts = [head(*(x[start : start + size] for x in inputs)) for start in range(0, 96, size)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_training_computes_what_decoding_does_but_for_rounding(kind):
    head, inputs = random_head(kind, scale=1.0), inputs_of(kind, 64)
    decoded = head.logits(*inputs)
    torch.testing.assert_close(head.train().logits(*inputs), decoded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 33])
def test_a_tree_sum_is_the_sum(size):
    x = torch.randn(3, size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(heads.tree_sum(x, 1), x.sum(1))


# Files


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_head_opens_as_it_was(kind, tmp_path):
    head = random_head(kind, accept_threshold=0.7, trained_on="tiny-full", seed=3, step=9)
    save_head(head, tmp_path / "sub" / "a.safetensors")
    again = load_head(tmp_path / "sub" / "a.safetensors", device="cpu")
    assert type(again) is type(head) and not again.training and not any(p.requires_grad for p in again.parameters())
    assert all(getattr(again, name) == getattr(head, name) for name in heads.FIELDS)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), head.state_dict().values()))


def edited(path, metadata=None, drop=None, **tensors):
    """A head's file with some of its metadata or tensors replaced or dropped."""
    head = random_head("filter")
    facts = {name: str(getattr(head, name)) for name in heads.FIELDS} | (metadata or {})
    kept = {name: t for name, t in {**head.state_dict(), **tensors}.items() if name != drop}
    safetensors.torch.save_file(
        kept, path, metadata={name: value for name, value in facts.items() if value is not None}
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metadata": {"kind": "oracle"}}, "kind of .* must be one of filter, commit, got kind='oracle'"),
        (
            {"metadata": {"seed": None}},
            "metadata of .* must be kind, block_length, .*, got accept_threshold, block_length",
        ),
        ({"metadata": {"more": "1"}}, "metadata of .* must be .*more"),
        ({"metadata": {"block_length": "four"}}, "block_length of .* must be int in .*, got block_length='four'"),
        ({"metadata": {"block_length": "0"}}, "block_length of .* must be int"),
        ({"metadata": {"width": "999999"}}, "width of .* must be int"),
        ({"metadata": {"accept_threshold": "nan"}}, "accept_threshold of .* must be float in"),
        ({"metadata": {"accept_threshold": "1.5"}}, "accept_threshold of .* must be float in"),
        ({"metadata": {"block_length": "5"}}, r"tensor .* must be \(.*5.*, got"),
        ({"metadata": {"kind": "commit"}}, "has missing tensors"),
        ({"drop": "out.bias"}, r"has missing tensors: \['out.bias'\]"),
        ({"extra": torch.zeros(1)}, r"has unknown tensors: \['extra'\]"),
        (
            {"out.bias": torch.zeros(BLOCK).double()},
            r"tensor out.bias of .* must be \(4,\) torch.float32, got .* torch.float64",
        ),
        ({"out.bias": torch.full((BLOCK,), float("nan"))}, "tensor out.bias of .* must be finite"),
    ],
)
def test_a_file_that_is_not_a_heads_is_refused_by_name(change, message, tmp_path):
    edited(tmp_path / "a.safetensors", **change)
    with pytest.raises(CheckpointError, match=message):
        load_head(tmp_path / "a.safetensors", device="cpu")


def test_what_is_no_file_of_ours_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"head must be a \*.safetensors file or one of .*, got 'nowhere'"):
        load_head("nowhere")
    (tmp_path / "a.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="is a pickle file, which is never opened"):
        load_head(tmp_path / "a.pt")
    edited(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        load_head(tmp_path / "b.safetensors")


def test_a_full_disk_leaves_the_head_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_head(random_head("filter", seed=1), path)
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_head(random_head("filter", seed=2), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_heads_fit_the_embedded_model(name):
    head = dlm_fast.load_head(name, device="cpu")
    assert type(head) is SHIPPED[name] and head.block_length == 8 and head.trained_on == "tiny-full"
    assert 0 < head.accept_threshold < 1 and (heads.HEADS / f"{name}.safetensors").stat().st_size < 100_000


# In a decode


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_length": 5}, "head must be of block_length 5 as this decode is, got a head of block_length 4"),
        (
            {"head": random_head("commit")},
            "head must be of kind 'filter' as this decode is, got a head of kind 'commit'",
        ),
        ({"head": random_head("filter").to("meta")}, "head must be of device 'cpu' as .*, got a head of device 'meta'"),
        ({"head": random_head("filter").train()}, "head must be in eval mode"),
        ({"head": "nowhere"}, "load_head: head must be a"),
        ({"accept_threshold": 1.5}, r"accept_threshold must be a number in \[0, 1\] or None, got accept_threshold=1.5"),
    ],
)
def test_a_head_that_does_not_fit_is_named_before_anything_is_decoded(change, message):
    steps = []
    options = {"head": random_head("filter"), "block_length": BLOCK, **change}
    with pytest.raises(ValueError, match=message):
        dlm_fast.generate(
            toy(), random_prompts([2]), preset="learn2pd", on_step=steps.append, max_new_tokens=6, **options
        )
    assert not steps


def test_a_head_that_is_nothing_of_the_kind_is_refused():
    with pytest.raises(TypeError, match=r"head must be a name, a file or callable\(confidence .*, got head=3"):
        dlm_fast.generate(toy(), random_prompts([2]), preset="learn2pd", head=3, block_length=BLOCK, max_new_tokens=6)


@pytest.mark.parametrize("options", [{}, {"eotp": True}, {"cache": "prefix"}, {"cache": "dual"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_with_a_head_equals_its_rows_alone(kind, options):
    if kind == "commit" and "eotp" in options:
        pytest.skip("EoTP is the filter's")
    model = toy(eos=tuple(range(1, 9)))
    prompts, new = random_prompts([5, 1, 9, 4]), [11, 3, 8, 6]
    options = {"preset": PRESET_OF[kind], "head": random_head(kind), "block_length": BLOCK, **options}
    together = dlm_fast.generate(model, prompts, max_new_tokens=new, **options)
    for b, (prompt, n) in enumerate(zip(prompts, new)):
        assert everything(dlm_fast.generate(model, [prompt], max_new_tokens=[n], **options), 0) == everything(
            together, b
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_decides_by_its_own_threshold_unless_told_otherwise(kind):
    def nfe(head, **options):
        options |= {"preset": PRESET_OF[kind], "block_length": BLOCK, "max_new_tokens": 8, "stop": "never"}
        return dlm_fast.generate(toy(), random_prompts([5, 2]), head=head, **options).nfe

    everything_passes, nothing_passes = random_head(kind, accept_threshold=0.0), random_head(kind, accept_threshold=1.0)
    assert nfe(everything_passes) == [2, 2] and nfe(nothing_passes) == [8, 8]
    assert nfe(everything_passes, accept_threshold=1.0) == [8, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_looks_at_the_whole_row_does_not_move_the_block_under_the_head(kind):
    """Such a policy has lanes for every mask of the row, of which the head sees those of its block."""
    options = {"preset": PRESET_OF[kind], "head": random_head(kind), "accept_threshold": 0.3}
    options |= {"block_length": BLOCK, "max_new_tokens": [11, 6]}
    alone = dlm_fast.generate(toy(), random_prompts([5, 2]), **options)
    beside = dlm_fast.generate(toy(), random_prompts([5, 2]), policy=Sched(high=99.0, low=99.0), **options)
    assert [everything(beside, b) for b in range(2)] == [everything(alone, b) for b in range(2)]
    assert max(alone.nfe) < 11


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_a_head_reads_nothing_on_the_host(kind):
    # Opened before the fake mode: memory() may read on the host, a step may not.
    options = {"block_length": BLOCK, "head": random_head(kind)} | ({"eotp": True} if kind == "filter" else {})
    chosen = resolve(PRESET_OF[kind], "full", options)
    diffusion, plan, state, sampling = opened(chosen)
    model = native_model().requires_grad_(False)
    with FakeTensorMode() as fake:
        for module in [*model.modules(), *chosen.policies[0].head.modules()]:
            for values in (module._parameters, module._buffers):
                values.update({name: fake.from_tensor(tensor) for name, tensor in values.items() if tensor is not None})

        handle = attach(model, backend="reference", diffusion=diffusion, plain_mode="full")
        decode = open_decode(handle, *(faked(values, fake) for values in (plan, state, sampling)))
        denoise_step(decode, plan.bucket("denoise"))
        with pytest.raises(Exception, match="_local_scalar_dense|(?i:data.dependent)"):
            decode.state.phase.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_by_file_is_the_same_head_and_stays_plain_data(kind, tmp_path, capsys):
    head, path = random_head(kind, accept_threshold=0.6), tmp_path / "head.safetensors"
    save_head(head, path)
    save_toy_checkpoint(tmp_path / "model")
    model = dlm_fast.load(tmp_path / "model", device="cpu", backend="reference")
    options = {"preset": PRESET_OF[kind], "block_length": BLOCK, "max_new_tokens": 8}
    by_object, by_name = (dlm_fast.generate(model, ["abc"], head=h, **options) for h in (head, str(path)))
    assert everything(by_object, 0) == everything(by_name, 0)
    assert describe(by_name.preset)["policies"][0]["head"] == str(path)
    assert f"{kind} head trained on nothing" in json.dumps(describe(by_object.preset))

    command = ["generate", "--model", str(tmp_path / "model"), "--prompt", "abc", "--raw", "--json"]
    command += ["--backend", "reference", "--device", "cpu"]
    command += [
        "--preset",
        PRESET_OF[kind],
        "--block-length",
        str(BLOCK),
        "--max-new-tokens",
        "8",
        "--set",
        f"head={path}",
    ]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"][0]["text"] == by_name.text[0]


# End-of-text prediction


def predictions(model, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
    """Tokens and confidences that the first step predicts at the new positions."""
    seen = []

    def look(view, choice):
        seen.append(view)
        return choice

    dlm_fast.generate(model, [prompt], preset="fast-dllm", block_length=new, max_new_tokens=new, policy=look)
    return seen[0].token[0].tolist(), seen[0].confidence[0].tolist()


ENDING = tuple(range(1, VOCAB, 3))  # a third of the vocabulary ends a text, so that ends are predicted everywhere


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("accepts", [True, False])
def test_eotp_cuts_after_the_first_accepted_end_or_else_after_the_likeliest(accepts, seed):
    model, (prompt,), new = toy(eos=ENDING, seed=seed), random_prompts([5], seed=seed), 8
    tokens, confidence = predictions(model, prompt, new)
    ends = [j for j, token in enumerate(tokens) if token in ENDING]
    assert ends, "this seed predicts no end, and shows nothing"
    cut = ends[0] if accepts else max(ends, key=lambda j: (confidence[j], -j))
    lengths = []
    out = dlm_fast.generate(
        model, [prompt], preset="learn2pd", block_length=new, max_new_tokens=new, eotp=True, accept_threshold=0.5,
        head=lambda c: torch.full_like(c, float(accepts)),
        on_step=lambda state: lengths.append(state.canvas_len.tolist()),
    )  # fmt: skip
    assert lengths[0] == [len(prompt) + cut + 1]
    # What is cut off is never written, and later forwards do not compute it.
    assert (
        out.unmask_step[0][len(prompt) + cut + 1 :].eq(-1).all()
        and out.canvas[0][len(prompt) + cut + 1 :].eq(MASK).all()
    )
    assert out.query_tokens[0] == len(prompt) + new + sum(length for (length,) in lengths[:-1])
    if accepts:
        assert out.nfe == [1] and out.sequences[0].tolist() == tokens[:cut] and out.finish == ["eos"]


def test_eotp_leaves_a_row_that_predicts_no_end_as_long_as_it_is():
    lengths = []
    options = {
        "preset": "learn2pd",
        "block_length": 4,
        "max_new_tokens": 8,
        "head": lambda c: c,
        "accept_threshold": 0.2,
    }
    options |= {"banned_token_ids": [VOCAB - 1]}
    model = toy(eos=(VOCAB - 1,))
    (prompt,) = random_prompts([5], seed=2)
    plain = dlm_fast.generate(model, [prompt], **options)
    cut = dlm_fast.generate(
        model, [prompt], eotp=True, on_step=lambda s: lengths.append(s.canvas_len.tolist()), **options
    )
    assert everything(plain, 0) == everything(cut, 0) and set(map(tuple, lengths)) == {(13,)}


def test_both_presets_say_what_they_need():
    assert all("head=" in PRESETS[name].needs for name in PRESET_OF.values())
