"""Asymmetric distillation: noise and losses are the recipe's, a run learns and resumes to the same bits, and its
student decodes."""

import dataclasses
import json
import math

import pytest
import torch
from helpers import EOS, MASK, VOCAB, Synced, native_model, toy_tokenizer

import dlm_fast
from dlm_fast.training import checkpoint
from dlm_fast.training.distill import Distiller, DistillSettings
from dlm_fast.training.forcing import Noise, block_rates, certainty_loss, forcing_loss, predicting_row
from dlm_fast.training.masking import Masking
from dlm_fast.training.networks import VocabularyError, check_vocabularies

BLOCK = 4
TINY = dict(
    block_length=BLOCK,
    max_length=40,
    tokens_per_step=160,
    micro_batches=2,
    steps=60,
    lr=3e-3,
    warmup=4,
    device="cpu",
    full_finetune=True,
)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A random full-attention model of 48 ids, small enough that a step takes a few milliseconds."""
    folder = tmp_path_factory.mktemp("teacher")
    model = native_model("qwen3", heads=2, kv_heads=1, layers=2)
    model.config.dlm = {"mask_token_id": MASK, "eos_token_ids": [EOS], "visibility": "full"}
    model.save_pretrained(folder)
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + ('[EOS]' if m['role'] == 'assistant' else ':') }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """Answers that repeat the prompt, of several lengths; two tasks."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(60):
        text = "".join(
            "abcdef"[i]
            for i in torch.randint(6, (int(torch.randint(2, 13, (), generator=generator)),), generator=generator)
        )
        lines.append({"prompt": text, "answer": text, "task": ("even", "odd")[number % 2]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def settings(teacher_folder, data_file, tmp_path):
    """DistillSettings of a toy run, with changes."""

    def make(**changes) -> DistillSettings:
        return DistillSettings(
            **{"model": str(teacher_folder), "data": data_file, "out": tmp_path / "student"} | TINY | changes
        )

    return make


def weights(distiller) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in distiller.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.7), (0.05, 1.0), (0.5, 0.5)])
def test_rates_never_fall_and_stay_within_their_bounds(low, high):
    num_blocks = torch.randint(1, 12, (500,))
    rates = block_rates(num_blocks, Noise(low, high), torch.Generator().manual_seed(1)).double()

    for row, count in zip(rates, num_blocks.tolist()):
        assert (row[:count].diff() >= 0).all()
        assert low - 1e-7 <= row[0] and row[count - 1] <= high + 1e-7


def test_rates_are_distributed_as_published():
    """p_1 ~ U(.2, .7), and each rise ~ U(0, (.7 - p_1) / (M - 1)): judged by their means, and by the greatest rise that
    is possible."""
    M = 5
    rates = block_rates(torch.full((20000,), M), Noise(), torch.Generator().manual_seed(2)).double()
    share = rates.diff() / ((0.7 - rates[:, :1]) / (M - 1))

    assert rates[:, 0].mean().item() == pytest.approx(0.45, abs=0.005)
    assert (rates[:, 0] < 0.325).double().mean().item() == pytest.approx(0.25, abs=0.02)
    near = rates[:, 0] < 0.69  # closer to the bound the share is a quotient of roundings
    assert share[near].mean().item() == pytest.approx(0.5, abs=0.01)
    assert share[near].min() >= -1e-4 and share[near].max() <= 1 + 1e-4
    assert (share[near] < 0.25).double().mean().item() == pytest.approx(0.25, abs=0.02)


def test_a_settled_row_is_clean_up_to_a_block_and_a_fresh_one_all_masked_after_it():
    noise = Noise(0.3, 0.6, settled=1.0, fresh=1.0)
    num_blocks = torch.tensor([4] * 400)
    rates = block_rates(num_blocks, noise, torch.Generator().manual_seed(3), starts=torch.tensor([3] * 400))

    current = (rates == 0).sum(1)
    assert sorted(set(current.tolist())) == [0, 1, 2]  # never the last block, which is not among the first three
    for row, start in zip(rates, current.tolist()):
        assert 0.3 <= row[start] <= 0.6
        assert (row[start + 1 :] == 1).all()
    assert (block_rates(num_blocks, Noise(0.3, 0.6), torch.Generator().manual_seed(3)) > 0).all()


def test_each_block_is_masked_at_its_rate(settings):
    distiller = Distiller(settings(extra_blocks=0.5))
    seen = torch.zeros(2)
    for number in range(60):
        (canvases, *_) = distiller.steps.next()
        batch = distiller.masking(canvases, torch.Generator().manual_seed(number))
        masked = (batch.tokens == MASK).sum()
        assert masked == len(batch.row)
        assert (batch.position >= batch.prompt[batch.row]).all() and (batch.position < batch.length[batch.row]).all()
        # Horvitz and Thompson: the masked tokens, each over its rate, estimate how many could have been masked.
        seen += torch.tensor([(1 / batch.rate).sum(), (canvases.length - canvases.prompt).sum()])
    assert (seen[0] / seen[1]).item() == pytest.approx(1, abs=0.05)


def softmax_by_hand(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp((x - max(row)) / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def forcing_by_hand(student, teacher, tokens, is_masked, rate, weight, *, shift, soft, inverse, temperature) -> float:
    """D2F's loss over whole canvases, position by position, in float64."""
    total = count = 0.0
    for b in range(len(tokens)):
        for p in range(len(tokens[b])):
            if not is_masked[b][p]:
                continue
            row = max(p - 1, 0) if shift else p
            ours = softmax_by_hand(student[b][row], temperature)
            if soft:
                theirs = softmax_by_hand(teacher[b][row], temperature)
                loss = -sum(t * math.log(o) for t, o in zip(theirs, ours)) * temperature**2
            else:
                loss = -math.log(softmax_by_hand(student[b][row])[tokens[b][p]])
            total += weight[b][p] * loss / (rate[b][p] if inverse else 1.0)
            count += weight[b][p]
    return total / count


@pytest.mark.parametrize("shift", [False, True], ids=["llada", "dream"])
@pytest.mark.parametrize(
    ("soft", "inverse", "temperature"), [(True, True, 1.0), (True, False, 2.0), (False, True, 1.0)]
)
def test_the_forcing_loss_equals_a_transcription_of_the_recipe(shift, soft, inverse, temperature):
    B, L, V = 3, 9, 13
    student, teacher = torch.randn(2, B, L, V).double().unbind()
    tokens, is_masked = torch.randint(V, (B, L)), torch.rand(B, L) < 0.5
    is_masked[0, 0] = True  # position 0 has its own row even in a model that predicts the next position
    rate, weight = torch.rand(B, L).double() * 0.8 + 0.2, torch.rand(B, L).double()

    row, position = is_masked.nonzero(as_tuple=True)
    index = predicting_row(position, "previous" if shift else "self")
    ours = forcing_loss(
        student[row, index],
        teacher[row, index] if soft else None,
        tokens[row, position],
        rate[row, position],
        weight[row, position],
        inverse_rate_weight=inverse,
        temperature=temperature,
    )

    lists = [t.tolist() for t in (student, teacher, tokens, is_masked, rate, weight)]
    expected = forcing_by_hand(*lists, shift=shift, soft=soft, inverse=inverse, temperature=temperature)
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_the_certainty_loss_equals_a_transcription():
    N, V = 40, 7
    student, targets, half = 2 * torch.randn(N, V), torch.randint(V, (N,)), torch.randint(2, (N,))
    targets[::3] = student.argmax(-1)[::3]
    expected = 0.0
    for number in (0, 1):
        losses, entropies = [], []
        for logits, target in zip(student[half == number].tolist(), targets[half == number].tolist()):
            losses.append(-math.log(softmax_by_hand(logits)[target]))
            if max(range(V), key=lambda v: logits[v]) == target:
                entropies.append(-sum(p * math.log(p) for p in softmax_by_hand(logits, 0.5)))
        expected += 0.5 * (sum(losses) / len(losses) + 2.0 * sum(entropies) / len(entropies))

    ours = certainty_loss(student, targets, half, torch.ones(N), entropy_weight=2.0, entropy_temperature=0.5, scale=0.5)

    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_a_step_is_the_recipe_on_its_canvases(settings):
    """The whole chain, from the batch's labels to the loss: each model makes a plain forward with dlm_fast's own
    visibility."""
    distiller = Distiller(settings(micro_batches=1))
    batch = distiller.masking(distiller.steps.next()[0], torch.Generator().manual_seed(5))
    loss = distiller.loss(batch, distiller.student_logits(batch), distiller.teacher_logits(batch))

    live = torch.arange(batch.tokens.shape[1]) < batch.length[:, None]
    with torch.no_grad():
        full = dlm_fast.load(distiller.settings.model, device="cpu")(batch.tokens, attention_mask=live).logits
        block = dlm_fast.load(distiller.settings.model, device="cpu", diffusion=distiller.diffusion)(
            batch.tokens, attention_mask=live, prompt_lengths=batch.prompt
        ).logits
    is_masked = torch.zeros_like(live).index_put((batch.row, batch.position), torch.tensor(True))
    rate = torch.ones(live.shape).index_put((batch.row, batch.position), batch.rate)
    lists = [t.tolist() for t in (block, full, batch.tokens, is_masked, rate, torch.ones(live.shape))]
    expected = forcing_by_hand(*lists, shift=False, soft=True, inverse=True, temperature=1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_step_that_is_cut_finer_takes_the_same_gradient(settings):
    """Micro-batches save memory and padding; the mean is over the step."""
    losses = []
    for parts in (1, 3):
        distiller = Distiller(settings(micro_batches=parts, low=1.0, high=1.0))  # masks do not depend on the cut
        losses.append([distiller.step() for _ in range(2)])

    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_lowers_the_loss_and_its_student_decodes(settings, data_file):
    distiller = Distiller(settings(log_every=20, steps=80, tokens_per_step=320, lr=1e-2))
    distiller.run()
    log = [json.loads(line) for line in (distiller.settings.out / "log.jsonl").read_text().splitlines()]

    assert [line["step"] for line in log] == [20, 40, 60, 80]
    # Most of the loss is the teacher's own entropy, which stays.
    assert log[-1]["loss"] < 0.95 * log[0]["loss"]
    assert log[-1]["agreement"] > log[0]["agreement"] + 0.05
    assert set(log[0]["accuracy"]) == {"all", "even", "odd"}
    model = dlm_fast.load(distiller.settings.out, device="cpu")
    diffusion = dlm_fast.handle_of(model).diffusion
    assert (diffusion.visibility, diffusion.block_length, diffusion.block_alignment) == ("block", BLOCK, "rel")
    for name, tensor in distiller.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    out = dlm_fast.generate(model, [[{"role": "user", "content": "abc"}]], preset="d2f", max_new_tokens=8)
    assert (out.canvas[0] != MASK).all()


@pytest.mark.parametrize("objective", ["forcing", "certainty"])
def test_hard_targets_and_certainty_learn_the_answers(settings, objective):
    distiller = Distiller(settings(objective=objective, hard_targets=True, lr=1e-2))
    losses = [distiller.step() for _ in range(30)]

    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(
    "changes",
    [dict(optimizer="muon"), dict(full_finetune=False, lora_rank=4, lora_dropout=0.3), dict(precision="bf16")],
    ids=["full, muon", "LoRA with dropout", "accelerate, bf16"],
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(settings, tmp_path, changes):
    whole = Distiller(settings(out=tmp_path / "whole", **changes))
    for _ in range(7):
        whole.step()
    first = Distiller(settings(out=tmp_path / "parts", **changes))
    for _ in range(4):
        first.step()
    first.save()
    second = Distiller(settings(out=tmp_path / "parts", resume=True, **changes))
    for _ in range(3):
        second.step()

    assert (second.step_number, second.tokens, second.steps.position) == (
        whole.step_number,
        whole.tokens,
        whole.steps.position,
    )
    ours, theirs = weights(second), weights(whole)
    assert ours.keys() == theirs.keys() and len(ours) > 4
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], weights(first)[name]) for name in ours)


def test_a_lora_teacher_is_the_base_model_exactly(settings):
    distiller = Distiller(settings(full_finetune=False, lora_rank=4, lora_dropout=0.5, lr=1e-2))
    for _ in range(3):
        distiller.step()
    batch = distiller.masking(distiller.steps.next()[0], torch.Generator().manual_seed(0))

    frozen = Distiller(settings())  # of a full fine-tuning the teacher is a copy of the base model
    assert torch.equal(distiller.teacher_logits(batch), frozen.teacher_logits(batch))
    assert not torch.allclose(distiller.student_logits(batch), frozen.student_logits(batch), atol=1e-3)
    assert distiller.model.training


def test_an_exported_lora_student_is_the_student(settings):
    distiller = Distiller(settings(full_finetune=False, lora_rank=4, lr=1e-2, steps=3, save_adapter=True))
    distiller.run()
    batch = distiller.masking(distiller.steps.next()[0], torch.Generator().manual_seed(0))
    distiller.model.eval()
    live = torch.arange(batch.tokens.shape[1]) < batch.length[:, None]
    with torch.no_grad():
        expected = distiller.student_logits(batch)
        merged = dlm_fast.load(distiller.settings.out, device="cpu")
        logits = merged(batch.tokens, attention_mask=live, prompt_lengths=batch.prompt).logits

    torch.testing.assert_close(logits[batch.row, batch.position], expected, atol=1e-4, rtol=1e-4)
    again = dlm_fast.load(distiller.settings.model, device="cpu", adapter=distiller.settings.out / "adapter")
    for (name, ours), theirs in zip(again.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_lora_on_half_precision_weights_trains_float32_and_exports_what_was_stored(settings):
    distiller = Distiller(settings(full_finetune=False, lora_rank=4, dtype="bfloat16", steps=2))
    distiller.run()

    assert {p.dtype for p in weights(distiller).values()} == {torch.float32}
    assert distiller.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert (
        next(dlm_fast.load(distiller.settings.out, device="cpu").parameters()).dtype == torch.float32
    )  # as the teacher's folder


def test_mixed_precision_goes_through_accelerate_and_stays_near_float32(settings, tmp_path):
    mixed, single = Distiller(settings(precision="bf16", out=tmp_path / "a")), Distiller(settings(out=tmp_path / "b"))
    losses = [(mixed.step(), single.step()) for _ in range(4)]

    assert next(iter(weights(mixed).values())).dtype == torch.float32
    for ours, exact in losses:
        assert ours != exact and ours == pytest.approx(exact, rel=0.05)


def test_gradient_checkpointing_changes_no_weight(settings, tmp_path):
    plain, spared = (
        Distiller(settings(out=tmp_path / "a")),
        Distiller(settings(out=tmp_path / "b", gradient_checkpointing=True)),
    )
    for _ in range(2):
        plain.step(), spared.step()

    assert all(torch.equal(value, weights(spared)[name]) for name, value in weights(plain).items())


def test_an_isolated_teacher_keeps_its_visibility(settings, teacher_folder, tmp_path):
    folder = copy_of(teacher_folder, tmp_path / "isolated", prompt_isolated=True)
    distiller = Distiller(settings(teacher=str(folder)))

    assert distiller.teacher_diffusion.prompt_isolated and not distiller.diffusion.prompt_isolated


def copy_of(folder, target, **section):
    """A copy of a checkpoint folder with a changed `dlm` section."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config["dlm"] |= section
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_certainty_masks_two_halves_that_complement_each_other(settings):
    distiller = Distiller(settings(objective="certainty", visibility="block"))
    canvases = distiller.steps.next()[0]
    batch = distiller.masking(canvases, torch.Generator().manual_seed(0))
    rows = len(canvases.prompt)
    first, second = (batch.tokens == MASK)[:rows], (batch.tokens == MASK)[rows:]
    place = torch.arange(first.shape[1])
    answer = (place >= canvases.prompt[:, None]) & (place < canvases.length[:, None])

    assert torch.equal(first ^ second, answer) and not (first & second).any()
    assert len(batch.row) == answer.sum()
    assert torch.equal(batch.half, (batch.row >= rows).long())


def test_a_trajectory_masks_a_block_in_the_order_a_teacher_filled_it(settings, teacher_folder, tmp_path):
    """The answer of six tokens and its EOS was written in the order 6 5 4 3 2 1 0."""
    path = tmp_path / "ordered.jsonl"
    path.write_text(
        json.dumps({"prompt_ids": [5, 6], "answer_ids": [9, 10, 11, 12, 13, 14, EOS], "order": [6, 5, 4, 3, 2, 1, 0]})
        + "\n"
    )
    distiller = Distiller(settings(objective="trajectory", data=path, extra_blocks=0.0, visibility="block"))
    (canvases,) = distiller.steps.next()
    states = set()
    for seed in range(80):
        batch = distiller.masking(canvases, torch.Generator().manual_seed(seed))
        states.add(tuple("".join("#" if token == MASK else "." for token in row[2:]) for row in batch.tokens.tolist()))

    # Two blocks; in the first the teacher filled from the right, the EOS tail (place 7, no step of its own) comes last
    # in the second.
    given = {("####", "...."), ("###.", "...#"), ("##..", "..##"), ("#...", ".###"), ("....", "####")}
    first = {(a + "####", b + "####") for a, b in given}
    second = {
        ("...." + a, "...." + b)
        for a, b in {("####", "...."), ("##.#", "..#."), ("#..#", ".##."), ("...#", "###."), ("....", "####")}
    }
    assert states <= first | second
    assert len(states & first) >= 3 and len(states & second) >= 3


def test_masking_of_a_trajectory_grows_with_the_training(settings):
    masking = Masking("trajectory", Noise(), Distiller(settings()).diffusion, first_block_length=1)
    canvases = dataclasses.replace(Distiller(settings()).steps.next()[0])
    canvases.rank = torch.where(
        torch.arange(canvases.tokens.shape[1]) >= canvases.prompt[:, None], torch.arange(canvases.tokens.shape[1]), -1
    )
    at_end = masking(canvases, torch.Generator().manual_seed(0), progress=1.0)
    at_start = masking(canvases, torch.Generator().manual_seed(0), progress=0.0)

    # At the end t is .8 of blocks of the full length, at the start of blocks of one token.
    assert len(at_end.row) > len(at_start.row)
    assert (at_end.half == 0).sum() > (at_end.half == 1).sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(objective="sft"), "objective must be one of forcing, certainty, trajectory, got objective='sft'"),
        (dict(low=0.8), "noise must have 0 < low <= high <= 1, got low=0.8, high=0.7"),
        (dict(settled=2.0), "settled must be a number in .0, 1., got settled=2.0"),
        (dict(steps=0), "steps must be a whole number >= 1, got steps=0"),
        (
            dict(optimizer="muon", full_finetune=False),
            "'muon' trains whole matrices and goes with full_finetune, got LoRA",
        ),
        (dict(optimizer="muon", precision="fp16"), "'muon' goes with precision fp32 or bf16, got precision=fp16"),
        (dict(seed=-1), "seed must be a whole number >= 0, got seed=-1"),
        (dict(dtype="bfloat16"), "full_finetune trains float32 weights .* got dtype=bfloat16"),
        (dict(tokens_per_step=39), "tokens_per_step must hold a canvas of max_length=40, got tokens_per_step=39"),
        (
            dict(max_length=512, tokens_per_step=512),
            "max_length must fit the model's 256 positions, got max_length=512",
        ),
        (dict(block_length=None), "block_length must be given where .* names none, got block_length=None"),
        (
            dict(block_length=37),
            "line 1: block_length must fit between the prompt and max_length, got block_length=37, a prompt of",
        ),
        (
            dict(attention="flex_attention"),
            "attention must be sdpa on a CPU, where flex_attention has no backward, got attention=",
        ),
        (dict(objective="trajectory"), "line 1: order must have a step for each of the answer's .* tokens, got none"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        Distiller(settings(**changes))


def test_teacher_and_student_of_different_vocabularies_are_refused(settings, teacher_folder, tmp_path):
    model = native_model("llama")
    model.resize_token_embeddings(VOCAB + 8)
    model.config.dlm = {"mask_token_id": MASK, "eos_token_ids": [EOS], "visibility": "full"}
    model.save_pretrained(tmp_path / "larger")
    with pytest.raises(
        VocabularyError, match=f"size of the teacher .*larger is {VOCAB + 8}, of the student .* {VOCAB}"
    ):
        Distiller(settings(teacher=str(tmp_path / "larger")))

    diffusion = dlm_fast.DiffusionConfig(mask_token_id=MASK, eos_token_ids=(EOS,), visibility="full")
    student, longer = native_model(), toy_tokenizer()
    longer.add_tokens(["zz"])
    with pytest.raises(
        VocabularyError, match="id of 'zz' .1 tokens differ. of the teacher b is 48, of the student a None"
    ):
        check_vocabularies((student, diffusion, toy_tokenizer()), (student, diffusion, longer), ("a", "b"))
    with pytest.raises(VocabularyError, match="mask id of the teacher b is 7, of the student a 0"):
        check_vocabularies(
            (student, diffusion, None), (student, dataclasses.replace(diffusion, mask_token_id=7), None), ("a", "b")
        )


def test_a_run_does_not_overwrite_another_and_resumes_with_its_own_settings_only(settings, data_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="resume needs a checkpoint, got none at"):
        Distiller(settings(resume=True))
    Distiller(settings()).save()

    with pytest.raises(FileExistsError, match="must hold no checkpoint unless resuming"):
        Distiller(settings())
    with pytest.raises(ValueError, match="distill: high must be the checkpoint's, 0.7, got high=0.9"):
        Distiller(settings(resume=True, high=0.9))
    longer_data = tmp_path / "other.jsonl"
    longer_data.write_text(data_file.read_text() + data_file.read_text())
    with pytest.raises(ValueError, match="distill: content of data must be the checkpoint's, '.*', got data='"):
        Distiller(settings(resume=True, data=longer_data))


def test_checkpoint_and_student_are_on_the_disk_before_they_get_their_names(settings, monkeypatch):
    distiller = Distiller(settings(full_finetune=False, save_adapter=True, lora_targets=("q_proj",)))
    synced = Synced(monkeypatch)
    distiller.save()
    distiller.export()

    assert synced.named[0] == "checkpoint.safetensors" and {"model.safetensors", "config.json", "adapter"} <= set(
        synced.named
    )


@pytest.mark.parametrize("kind", [None, "pretraining"])
def test_a_checkpoint_of_another_kind_is_not_resumed(settings, kind):
    """All else in the checkpoint fits, so that nothing but its kind can refuse it."""
    distiller = Distiller(settings())
    distiller.save()
    metadata = checkpoint.read(distiller.checkpoint_path).metadata
    assert metadata.pop("kind") == "distillation"
    if kind is not None:
        metadata["kind"] = kind
    trained = {name: p for name, p in distiller.model.named_parameters() if p.requires_grad}
    checkpoint.save(distiller.checkpoint_path, trained, distiller.optimizers, metadata)

    with pytest.raises(ValueError, match="out must hold a checkpoint of a distillation to resume, got another one at"):
        Distiller(settings(resume=True))


def test_a_disk_that_is_full_leaves_the_checkpoint_before(settings):
    """The file system refuses to let a file grow beyond an eighth of a checkpoint."""
    import resource

    distiller = Distiller(settings())
    distiller.step()
    distiller.save()
    before = distiller.checkpoint_path.read_bytes()
    distiller.step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 8, hard))
    try:
        with pytest.raises(
            checkpoint.CheckpointWriteError,
            match="checkpoint.safetensors could not be written, the checkpoint before is intact",
        ):
            distiller.save()
        with pytest.raises(checkpoint.CheckpointWriteError, match="export: .* could not be written"):
            distiller.export()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert distiller.checkpoint_path.read_bytes() == before
    assert [path.name for path in distiller.settings.out.iterdir()] == ["checkpoint.safetensors"]
    assert Distiller(settings(resume=True)).step_number == 1


@pytest.mark.parametrize(
    ("package", "changes"), [("peft", dict(full_finetune=False)), ("accelerate", dict(precision="bf16"))]
)
def test_a_missing_package_is_named_with_its_extra(settings, monkeypatch, package, changes):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"needs {package}: pip install 'dlm-fast.train.'"):
        Distiller(settings(**changes))
