"""The training package: tokenizer, masks, checkpoints, and that a short run learns and resumes exactly."""

import json
import random

import pytest
import torch
from helpers import Synced

from dlm_fast.tiny.data import SampleStream
from dlm_fast.tiny.model import build_model
from dlm_fast.tiny.tasks import TASKS, generate_sample
from dlm_fast.tiny.tokenizer import (
    EOS_ID,
    MASK_ID,
    PAD_ID,
    SEP_ID,
    UNK_ID,
    VOCAB_SIZE,
    answer_text,
    build_tokenizer,
    prompt_text,
)
from dlm_fast.training import checkpoint
from dlm_fast.training.__main__ import build_parser, main
from dlm_fast.training.objectives import (
    FILLER_WEIGHT,
    LATER_WEIGHT,
    BlockCausalBatches,
    FullBatches,
    block_causal_batch,
    full_batch,
)
from dlm_fast.training.optimization import learning_rate_scale
from dlm_fast.training.train import Settings, Trainer, settings_of, token_losses


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def run_settings(tmp_path, **changes) -> Settings:
    small = dict(steps=20, tokens_per_step=512, compile=False, bf16=False, warmup=5, seed=5)
    return Settings(tmp_path / "run", **small | changes)


@pytest.mark.parametrize("task", TASKS)
def test_samples_round_trip_without_unknown_tokens(tokenizer, task):
    rng = random.Random(task)
    for _ in range(50):
        sample = generate_sample(task, rng)
        for text in (prompt_text(sample.prompt), answer_text(sample.answer)):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert UNK_ID not in ids


def test_any_ascii_text_round_trips(tokenizer):
    rng = random.Random(0)
    characters = [chr(code) for code in range(32, 127)] + ["\n", " mint", "oak", "####"]
    for _ in range(100):
        text = "".join(rng.choices(characters, k=40))
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_word_is_one_token_unless_letters_follow(tokenizer):
    assert tokenizer.tokenize(" Add mint #### 12") == [" Add", " mint", " ", "####", " ", "1", "2"]
    assert tokenizer.tokenize(" mints") == [" ", *"mints"]
    assert tokenizer.tokenize("é") == ["<unk>"]


def test_ids_fill_the_vocabulary_and_specials_come_first(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (MASK_ID, EOS_ID, PAD_ID)
    assert tokenizer.sep_token_id == SEP_ID


def test_one_turn_chat_is_the_training_prompt(tokenizer):
    turn = [{"role": "user", "content": "Add 12 and 34"}]

    assert tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) == " Add 12 and 34<sep>"
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(prompt_text("Add 12 and 34"))["input_ids"]
    assert ids[-1] == SEP_ID


def test_saved_tokenizer_encodes_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)

    text = prompt_text("Map mint=36 gray=92 Find gray")
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template


def test_full_states_are_those_of_a_block_by_block_decoder():
    stream = SampleStream(0)
    samples = [sample for sample in (stream.next() for _ in range(200)) if len(sample.prompt + sample.answer) <= 96]
    batch = full_batch(samples, 96, torch.Generator().manual_seed(0), (8,), semi_autoregressive=1.0)

    for row, sample in enumerate(samples):
        prompt_length, first_eos = len(sample.prompt), len(sample.prompt + sample.answer) - 1
        masked = (batch.tokens[row] == MASK_ID).tolist()
        assert batch.targets[row].tolist() == sample.prompt + sample.answer + [EOS_ID] * (95 - first_eos)
        block_starts = range(prompt_length, first_eos + 1, 8)
        assert any(
            batch.weight[row].tolist() == pytest.approx(_state(start, first_eos, masked)) for start in block_starts
        )


def _state(block_start, first_eos, masked):
    """The weights if the block at `block_start` is being denoised: before the block all is clean, after it all is
    masked."""
    weights = []
    for position, is_masked in enumerate(masked):
        later = position >= block_start + 8
        expected_masked = later or (position >= block_start and is_masked)
        weight = (LATER_WEIGHT if later else 1.0) * (FILLER_WEIGHT if position > first_eos else 1.0)
        weights.append(weight if expected_masked else 0.0)
        if is_masked != expected_masked:
            return []
    return weights


def test_block_causal_visibility_equals_the_predicate_written_out():
    stream = SampleStream(1)
    picked = [(stream.next(), block_length) for block_length in (8, 16)]
    batch = block_causal_batch([picked], 512, torch.Generator().manual_seed(0), noisy_copies=2, all_masked=0.2)

    # The layout walked again, one place at a time: (sample, copy, index in response or None for prompt).
    places = []
    for number, (sample, block_length) in enumerate(picked):
        response = -(-len(sample.answer) // block_length) * block_length
        places += [(number, "clean", None)] * len(sample.prompt)
        places += [(number, "clean", index) for index in range(response - block_length)]
        places += [(number, copy, index) for copy in ("noisy 1", "noisy 2") for index in range(response)]

    def sees(query, key):
        if query[0] != key[0]:
            return False
        block_length = picked[query[0]][1]
        if key[2] is None:
            return True
        if query[2] is None:
            return False
        query_block, key_block = query[2] // block_length, key[2] // block_length
        if key[1] == "clean":
            return key_block <= query_block if query[1] == "clean" else key_block < query_block
        return query[1] == key[1] and query_block == key_block

    expected = torch.tensor([[sees(query, key) for key in places] for query in places])
    assert torch.equal(batch.visible[0, 0, : len(places), : len(places)], expected)
    padding = batch.visible[0, 0, len(places) :]
    assert torch.equal(padding, torch.eye(512, dtype=torch.bool)[len(places) :])
    assert not batch.visible[0, 0, : len(places), len(places) :].any()


def test_block_causal_rows_hold_the_sample_at_its_own_positions():
    sample = SampleStream(2).next()
    batch = block_causal_batch([[(sample, 8)]], 256, torch.Generator().manual_seed(0), noisy_copies=2, all_masked=0.2)

    prompt_length, answer_length = len(sample.prompt), len(sample.answer)
    response_length = -(-answer_length // 8) * 8
    response = sample.answer + [EOS_ID] * (response_length - answer_length)
    clean = slice(0, prompt_length + response_length - 8)
    assert batch.tokens[0, clean].tolist() == (sample.prompt + response)[clean]
    assert batch.position_ids[0, clean].tolist() == list(range(clean.stop))
    assert not batch.weight[0, clean].any()
    for copy in range(2):
        start = clean.stop + copy * response_length
        here = slice(start, start + response_length)
        assert batch.targets[0, here].tolist() == response
        assert batch.position_ids[0, here].tolist() == list(range(prompt_length, prompt_length + response_length))
        masked = batch.tokens[0, here] == MASK_ID
        assert torch.equal(batch.weight[0, here] > 0, masked)


def test_a_later_token_changes_an_earlier_logit_only_where_it_is_visible():
    model = build_model(seed=0).eval()
    tokens = torch.randint(5, 200, (1, 24), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20] = 7
    block = torch.arange(24) // 8
    for visible, sees in ((torch.ones(24, 24, dtype=torch.bool), block >= 0), (block <= block[:, None], block == 2)):
        before, after = (
            model(input_ids=ids, attention_mask=visible[None, None], use_cache=False).logits
            for ids in (tokens, changed)
        )
        assert torch.equal((before != after).any(-1)[0], sees)


def test_noisy_copy_predicts_as_a_decoder_would():
    """A block's logits in the two-copy layout equal those of a plain canvas holding the same tokens."""
    model = build_model(seed=0).eval()
    sample = next(sample for sample in iter(SampleStream(3).next, None) if len(sample.answer) > 16)
    batch = block_causal_batch([[(sample, 8)]], 256, torch.Generator().manual_seed(0), noisy_copies=1, all_masked=0.2)
    packed, _, _ = _logits(model, batch.tokens, batch.position_ids, batch.visible)

    prompt_length = len(sample.prompt)
    noisy_start = prompt_length + (-(-len(sample.answer) // 8) - 1) * 8
    second = slice(noisy_start + 8, noisy_start + 16)
    canvas = torch.cat([batch.tokens[0, : prompt_length + 8], batch.tokens[0, second]])[None]
    block = torch.cat([torch.full((prompt_length,), -1), torch.arange(16) // 8])
    plain, _, _ = _logits(model, canvas, torch.arange(canvas.shape[1])[None], (block <= block[:, None])[None, None])

    torch.testing.assert_close(plain[0, -8:], packed[0, second], atol=1e-5, rtol=1e-4)


def test_an_isolated_prompt_sees_itself_and_the_response_everything():
    stream = SampleStream(4)
    samples = [sample for sample in (stream.next() for _ in range(50)) if len(sample.prompt + sample.answer) <= 64]
    drawn = dict(block_lengths=(8,), semi_autoregressive=0.5)
    batch = full_batch(samples, 64, torch.Generator().manual_seed(0), **drawn, prompt_isolated=True)

    for row, sample in enumerate(samples):
        prompt_length = len(sample.prompt)
        expected = torch.ones(64, 64, dtype=torch.bool)
        expected[:prompt_length, prompt_length:] = False
        assert torch.equal(batch.visible[row, 0], expected)
    plain = full_batch(samples, 64, torch.Generator().manual_seed(0), **drawn)
    assert plain.visible.all()
    assert torch.equal(plain.tokens, batch.tokens)


def _logits(model, tokens, position_ids, visible):
    output = model(input_ids=tokens, position_ids=position_ids, attention_mask=visible, use_cache=False)
    return output.logits, tokens, visible


@pytest.mark.parametrize("block_causal", [0.0, 1.0])
def test_a_short_run_lowers_the_loss(tmp_path, block_causal):
    trainer = Trainer(run_settings(tmp_path, steps=40, block_causal=block_causal))
    losses = [trainer.train_step() for _ in range(20)]

    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@pytest.mark.parametrize("block_causal", [0.0, 0.3, 1.0])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, block_causal):
    kind = dict(block_causal=block_causal)
    whole = Trainer(run_settings(tmp_path / "whole", **kind))
    for _ in range(8):
        whole.train_step()
    first = Trainer(run_settings(tmp_path / "parts", **kind))
    for _ in range(4):
        first.train_step()
    first.save()
    second = Trainer(run_settings(tmp_path / "parts", **kind, resume=True))
    for _ in range(4):
        second.train_step()

    assert second.step == whole.step
    assert second.loss_average == whole.loss_average
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_a_finished_run_exports_a_folder_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = run_settings(tmp_path, steps=2, log_every=1, prompt_isolated=True)
    trainer = Trainer(settings)
    trainer.run()

    loaded = AutoModelForCausalLM.from_pretrained(settings.out, dtype="auto")
    assert loaded.config.dlm["mask_token_id"] == MASK_ID
    assert (loaded.config.dlm["visibility"], loaded.config.dlm["prompt_isolated"]) == ("full", True)
    assert loaded.generation_config.eos_token_id == EOS_ID
    assert len(AutoTokenizer.from_pretrained(settings.out)) == VOCAB_SIZE
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert len((settings.out / "log.jsonl").read_text().splitlines()) == 2


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    trainer = Trainer(run_settings(tmp_path))
    trainer.train_step()
    trainer.save()
    before = trainer.checkpoint_path.read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half a header")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    trainer.train_step()
    with pytest.raises(OSError, match="No space left"):
        trainer.save()

    assert trainer.checkpoint_path.read_bytes() == before
    assert [path.name for path in trainer.settings.out.iterdir()] == ["checkpoint.safetensors"]


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced = Synced(monkeypatch)
    Trainer(run_settings(tmp_path)).save()

    assert synced.named == ["checkpoint.safetensors"]


def test_a_checkpoint_of_another_kind_is_not_resumed(tmp_path):
    trainer = Trainer(run_settings(tmp_path))
    trainer.save()
    metadata = checkpoint.read(trainer.checkpoint_path).metadata
    foreign = {name: value for name, value in metadata.items() if name != "batches"} | {"kind": "distillation"}
    checkpoint.save(trainer.checkpoint_path, trainer.model.state_dict(), trainer.optimizers, foreign)

    with pytest.raises(ValueError, match="out must hold a checkpoint of a pretraining to resume, got another one at"):
        Trainer(run_settings(tmp_path, resume=True))


def test_a_run_does_not_overwrite_another_unless_resumed(tmp_path):
    Trainer(run_settings(tmp_path)).save()

    with pytest.raises(FileExistsError, match="must hold no checkpoint unless resuming"):
        Trainer(run_settings(tmp_path))
    with pytest.raises(ValueError, match="seed must be the checkpoint's, 5, got seed=6"):
        Trainer(run_settings(tmp_path, seed=6, resume=True))


def test_a_run_forks_into_both_visibilities_where_the_block_causal_steps_end(tmp_path):
    """Isolating the prompt changes nothing before the fork, so the two models share the steps before it."""
    whole = Trainer(run_settings(tmp_path / "whole", block_causal=0.2, prompt_isolated=True))
    for _ in range(6):
        whole.train_step()
    trunk = Trainer(run_settings(tmp_path / "fork", block_causal=0.2))
    for _ in range(4):
        trunk.train_step()
    trunk.save()
    fork = Trainer(run_settings(tmp_path / "fork", block_causal=0.2, prompt_isolated=True, resume=True))
    for _ in range(2):
        fork.train_step()

    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, fork.model.state_dict()[name]), name
    fork.save()
    with pytest.raises(ValueError, match="prompt_isolated must be the checkpoint's, True, got prompt_isolated=False"):
        Trainer(run_settings(tmp_path / "fork", block_causal=0.2, resume=True))


def test_learning_rate_rises_holds_and_falls_to_zero():
    scale = [learning_rate_scale(step, steps=100, warmup=10, decay=0.5) for step in range(101)]

    assert scale[0] == pytest.approx(0.1)
    assert scale[9:51] == [1.0] * 42
    assert scale[75] == pytest.approx(0.5)
    assert scale[100] == 0.0
    assert learning_rate_scale(100, steps=100, warmup=10, decay=0.0) == 1.0


def test_loss_counts_each_weighted_token(tmp_path):
    trainer = Trainer(run_settings(tmp_path))
    batch = trainer.batches["full"].next(torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss, cross_entropy, is_right = token_losses(trainer.model, batch, bf16=False)
        logits, _, _ = _logits(trainer.model, batch.tokens, batch.position_ids, batch.visible)
    probability = logits.double().softmax(-1).gather(-1, batch.targets[..., None])[..., 0]

    torch.testing.assert_close(cross_entropy.double(), -probability.log(), atol=1e-5, rtol=1e-5)
    expected = -(probability.log() * batch.weight).sum() / batch.weight.sum()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(is_right, logits.argmax(-1) == batch.targets)


@pytest.mark.parametrize("batches", [FullBatches, BlockCausalBatches])
def test_no_sample_is_dropped(batches):
    """Dropping the samples that do not fit would make long samples rare."""
    stream = SampleStream(7)
    drawn = []
    draw = stream.next
    stream.next = lambda: drawn.append(draw()) or drawn[-1]
    source = batches(stream, 1024)
    generator = torch.Generator().manual_seed(0)

    # Each prompt holds one <sep>, which no mask hides.
    batched = sum(int((source.next(generator).tokens == SEP_ID).sum()) for _ in range(20))

    assert batched + source.state().count('"task"') == len(drawn)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "training: steps must be a whole number >= 1, got steps=0"),
        (dict(threads=0), "training: threads must be a whole number >= 1, got threads=0"),
        (dict(decay=0.0), "training: decay must be positive, got decay=0.0"),
        (dict(decay=1.5), "training: decay must be a number in .0, 1., got decay=1.5"),
        (dict(block_causal=1.5), "block_causal must be a number in .0, 1., got block_causal=1.5"),
        (dict(tokens_per_step=64), "tokens_per_step must be a whole number >= 256, got tokens_per_step=64"),
    ],
)
def test_bad_settings_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_settings(tmp_path, **changes)


def test_command_line_gives_the_settings(tmp_path):
    arguments = ["pretrain", "--out", str(tmp_path), "--steps", "7", "--weight", "kv=0.5", "--fp32", "--no-compile"]
    settings = settings_of(build_parser().parse_args(arguments))

    assert (settings.out, settings.steps) == (tmp_path, 7)
    assert settings.weights == {"kv": 0.5}
    assert not settings.bf16 and not settings.compile
    assert settings_of(build_parser().parse_args(arguments[:3])) == Settings(tmp_path)


def test_unknown_task_weight_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match="weight must name one of .* got .'chess'"):
        Trainer(run_settings(tmp_path, weights={"chess": 1.0}))
    assert main(["pretrain", "--out", str(tmp_path), "--weight", "chess=1"]) == 1
    assert "weight must name one of" in capsys.readouterr().err


def test_written_samples_are_the_streams(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert main(["samples", "--out", str(path), "--n", "20", "--seed", "3"]) == 0

    stream = SampleStream(3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        vars(stream.next_sample()) for _ in range(20)
    ]
    assert main(["samples", "--out", str(path), "--n", "0"]) == 1
