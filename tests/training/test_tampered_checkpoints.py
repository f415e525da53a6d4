"""A training resumes only from what it left: each way to tamper with a checkpoint, or with what the run was made of, is
refused by name, and the model, the optimizers and the log stay as they were."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tampering as t
import torch
from helpers import EOS, save_toy_checkpoint, toy_tokenizer
from named_errors import unnamed
from safetensors.torch import load_file, save_file

from dlm_fast import fingerprint
from dlm_fast.training import checkpoint, distill, train
from dlm_fast.training.__main__ import main
from dlm_fast.training.distill import Distiller, DistillSettings
from dlm_fast.training.train import Settings, Trainer

STEPS = 3
LOG = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6))
# The optimizers' states and the classes of tensors, for each kind of run: one tensor of each class.
ADAMW = ["adamw.0.exp_avg", "adamw.1.exp_avg_sq", "adamw.2.step"]
LORA = "model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
TENSORS = {
    "pretrain": ["model.model.embed_tokens.weight", "model.lm_head.weight", "muon.1.momentum_buffer", *ADAMW],
    "lora": [LORA, LORA.replace("lora_A", "lora_B"), *ADAMW],
    "full": ["model.model.embed_tokens.weight", "model.model.norm.weight", *ADAMW],
    "muon": ["model.model.layers.0.mlp.up_proj.weight", "muon.0.momentum_buffer", *ADAMW],
}
DISTILLATIONS = {
    "lora": {"lora_rank": 2},
    "full": {"full_finetune": True},
    "muon": {"full_finetune": True, "optimizer": "muon"},
}


def pretraining(out: Path, **changes: Any) -> Settings:
    small = dict(steps=20, tokens_per_step=256, compile=False, bf16=False, warmup=5, seed=5, block_causal=0.1)
    return Settings(out, **small | changes)


@dataclass
class Ground:
    """What distillations are made of: folders of teacher and student, and data."""

    model: Path
    teacher: Path
    data: Path

    def settings(self, out: Path, **changes: Any) -> DistillSettings:
        small = dict(block_length=4, max_length=24, tokens_per_step=48, micro_batches=2, steps=20, warmup=2, seed=5)
        paths = {"model": self.model, "teacher": self.teacher, "data": self.data, "out": out, "device": "cpu"}
        return DistillSettings(**paths | small | changes)

    def copy(self, folder: Path) -> Ground:
        """The same content under other names."""
        names = {"model": "student-2", "teacher": "teacher-2", "data": "data-2.jsonl"}
        for name, path in vars(self).items():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / names[name])
        return Ground(**{name: folder / new for name, new in names.items()})


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    for name, seed in (("model", 0), ("teacher", 1)):
        save_toy_checkpoint(folder / name, family="qwen3", heads=2, kv_heads=1, layers=1, seed=seed)
    rng = random.Random(0)
    lines = [{"prompt_ids": rng.choices(range(2, 40), k=4), "answer_ids": [7] * (i % 9) + [8, EOS]} for i in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Ground(folder / "model", folder / "teacher", folder / "data.jsonl")


@dataclass
class Run:
    """A run that has made no step, in whose folder another run of the same settings left a checkpoint.

    Attributes:
        resumed: the run, ready to resume.
        saved: the checkpoint's bytes.
        weights: fingerprint of the run's weights before it resumes.
    """

    resumed: Any
    saved: bytes
    weights: str

    def refusal(self) -> Exception:
        """The error of an attempt to resume, which must have changed nothing."""
        run, log = self.resumed, self.resumed.checkpoint_path.with_name("log.jsonl")
        with pytest.raises(Exception) as error:
            run._load()
        assert fingerprint.of_tensors(run.model.state_dict().items()) == self.weights
        assert not any(optimizer.state for optimizer in run.optimizers.values())
        assert (run.step if isinstance(run, Trainer) else run.step_number) == 0
        assert log.read_text() == LOG
        return error.value


def left_by(make: Callable[..., Any], step: str, folder: Path) -> Run:
    """A run that is ready to resume from what a broken run of the same settings left."""
    broken = make(folder / "broken")
    for _ in range(STEPS):
        getattr(broken, step)()
    broken.save()
    resumed = make(folder / "resumed")
    return Run(resumed, broken.checkpoint_path.read_bytes(), fingerprint.of_tensors(resumed.model.state_dict().items()))


@pytest.fixture(scope="module")
def runs(ground, tmp_path_factory) -> Callable[[str], Run]:
    made: dict[str, Run] = {}

    def run(kind: str) -> Run:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            if kind == "pretrain":
                made[kind] = left_by(lambda out: Trainer(pretraining(out)), "train_step", folder)
            else:
                options = DISTILLATIONS[kind]
                teacher = None if kind == "lora" else ground.teacher
                made[kind] = left_by(
                    lambda out: Distiller(ground.settings(out, teacher=teacher, **options)), "step", folder
                )
        path = made[kind].resumed.checkpoint_path
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        path.write_bytes(made[kind].saved)
        path.with_name("log.jsonl").write_text(LOG)
        return made[kind]

    return run


SAMPLE = {"task": 0, "prompt": [5, 6], "answer": [7, 1]}
WAITING = {str(length): [] for length in (48, 64, 80, 96, 128)}
FORGED = {
    "pretrain": {
        **t.of_metadata(train.FIELDS),
        **{
            f"loss_average {text}": (t.value("loss_average", text), "loss_average")
            for text in ("NaN", "-1", "true", "null")
        },
        **{
            f"stream {name}": (t.value("stream", state), "stream")
            for name, state in {
                "of another version": [9, [0] * 625, None],
                "too short": [3, [0] * 600, None],
                "of large numbers": [3, [2**40] * 625, None],
                "of text": [3, ["0"] * 625, None],
                "of a wrong normal": [3, [0] * 625, "x"],
                "of two entries": [3, [0] * 625],
            }.items()
        },  # fmt: skip
        **{
            f"batches {name}": (t.entry("batches", "full", json.dumps(state)), "batches")
            for name, state in {
                "of other lengths": {"48": []},
                "of a list": [],
                "of too many": WAITING | {"48": [SAMPLE] * 5},
                "of an unknown task": WAITING | {"48": [SAMPLE | {"task": 99}]},
                "of an unknown id": WAITING | {"48": [SAMPLE | {"prompt": [10**6]}]},
                "of a long sample": WAITING | {"48": [SAMPLE | {"answer": [7] * 50}]},
                "of a sample without answer": WAITING | {"48": [{"task": 0, "prompt": [5]}]},
                "of fractions": WAITING | {"48": [SAMPLE | {"prompt": [5.5]}]},
            }.items()
        },  # fmt: skip
        "batches of one objective": (t.entry("batches", "full", None), "batches"),
        "batches left over twice": (
            t.entry("batches", "block-causal", json.dumps([[SAMPLE, 8], [SAMPLE, 8]])),
            "batches",
        ),
        "batches of another block": (t.entry("batches", "block-causal", json.dumps([[SAMPLE, 7]])), "batches"),
        "another visibility after the fork": (t.entry("settings", "prompt_isolated", True), "prompt_isolated"),
        **{f"another {name}": (t.entry("settings", name, 123), name) for name in sorted(pretraining(Path()).fixed())},
        **{f"no {name}": (t.entry("settings", name, None), name) for name in ("seed", "adam_lr")},
        **{f"another {name} by content": (t.entry("digests", name, "0" * 64), name) for name in ("model", "tasks")},
        "another tokenizer by content": (t.entry("digests", "tokenizer", None), "tokenizer"),
        "of a distillation": (t.value("kind", "distillation"), "kind"),
    },
    "lora": {
        **t.of_metadata(distill.FIELDS),
        **{f"position {text}": (t.value("position", text), "position") for text in ("[0, 0]", "[0]", "[-1, 2]", "5")},
        **{f"seconds {text}": (t.value("seconds", text), "seconds") for text in ("NaN", "-1", "null", "Infinity")},
        **{f"tokens {text}": (t.value("tokens", text), "tokens") for text in ("0", "-5", "1e30", "null")},
        **{f"processes {text}": (t.value("processes", text), "processes") for text in ("2", "0", "null")},
        **{f"scaler {text}": (t.value("scaler", text), "scaler") for text in ('{"scale": 2.0}', "5", "[1]")},
        **{
            f"another {name}": (t.entry("settings", name, 123), name)
            for name in sorted(DistillSettings("m", "d", "o").fixed())
        },
        **{f"no {name}": (t.entry("settings", name, None), name) for name in ("seed", "lr")},
        **{
            f"another {name} by content": (t.entry("digests", name, "0" * 64), name)
            for name in ("model", "tokenizer", "data", "stored dtype")
        },
        "a teacher by content": (t.entry("digests", "teacher's model", "0" * 64), "teacher"),
        "of a pretraining": (t.value("kind", "pretraining"), "kind"),
    },
}
FORGERIES = [
    pytest.param(kind, change, name, id=f"{kind}: {case}")
    for kind, names in TENSORS.items()
    for case, (change, name) in (FORGED.get(kind, {}) | t.of_tensors(names)).items()
]
DAMAGES = [
    pytest.param(kind, damage, id=f"{kind}: {case}")
    for kind, names in TENSORS.items()
    for case, damage in t.of_files(names).items()
]


def test_there_are_more_than_forty_ways_to_tamper_with_each_kind_of_checkpoint():
    ids = [case.id for case in (*FORGERIES, *DAMAGES)]
    assert len(set(ids)) == len(ids)
    assert all(sum(name.startswith(f"{kind}:") for name in ids) >= 40 for kind in TENSORS)


@pytest.mark.parametrize(("kind", "change", "name"), FORGERIES)
def test_a_forged_checkpoint_is_refused_by_name(runs, kind, change, name):
    run = runs(kind)
    t.forge(run.resumed.checkpoint_path, change)

    assert unnamed(run.refusal(), name) is None


@pytest.mark.parametrize(("kind", "damage"), DAMAGES)
def test_a_damaged_file_is_refused_by_name(runs, kind, damage):
    run = runs(kind)
    damage(run.resumed.checkpoint_path)

    assert unnamed(run.refusal(), "checkpoint.safetensors") is None


@pytest.mark.parametrize("kind", TENSORS)
def test_every_byte_counts(runs, kind):
    """One bit of each of many bytes, anywhere in the file."""
    run = runs(kind)
    rng = random.Random(kind)
    path, content = run.resumed.checkpoint_path, run.saved
    for place in rng.sample(range(len(content)), 12):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        assert unnamed(run.refusal(), "checkpoint.safetensors") is None


@pytest.mark.parametrize("kind", TENSORS)
def test_a_checkpoint_that_was_not_touched_is_resumed(runs, kind, ground, tmp_path):
    run = runs(kind)
    out = run.resumed.checkpoint_path.parent
    if kind == "pretrain":
        again, step = Trainer(pretraining(out, resume=True)), "train_step"
        whole = Trainer(pretraining(tmp_path / "whole"))
    else:
        options = DISTILLATIONS[kind] | {"teacher": None if kind == "lora" else ground.teacher}
        again, step = Distiller(ground.settings(out, resume=True, **options)), "step"
        whole = Distiller(ground.settings(tmp_path / "whole", **options))
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    for _ in range(STEPS + 2):
        getattr(whole, step)()
    for _ in range(2):
        getattr(again, step)()

    for ours, theirs in ((again.model, whole.model), *zip(again.optimizers.values(), whole.optimizers.values())):
        state, other = ours.state_dict(), theirs.state_dict()
        if "state" in state:
            state, other = (
                {f"{i}.{key}": tensor for i, values in s["state"].items() for key, tensor in values.items()}
                for s in (state, other)
            )
        assert state and fingerprint.of_tensors(state.items()) == fingerprint.of_tensors(other.items())


def test_a_checkpoint_from_before_the_first_step_is_resumed(ground, tmp_path):
    Distiller(ground.settings(tmp_path)).save()
    assert Distiller(ground.settings(tmp_path, resume=True)).step_number == 0


def test_steps_that_a_scaler_of_losses_skipped_are_resumed(ground, tmp_path):
    """The scaler of fp16 begins with a scale that is too large, so the first steps change nothing."""
    run = Distiller(ground.settings(tmp_path))
    run.step_number = 2
    run.save()
    found = checkpoint.read(run.checkpoint_path)
    checkpoint.check(found, run._trained(), run.optimizers, 2, scaled=True)
    with pytest.raises(ValueError, match="unstepped must be some parameters of adamw at most after step 2, got"):
        checkpoint.check(found, run._trained(), run.optimizers, 2)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    broken = Trainer(pretraining(tmp_path))
    broken.save()
    t.forge(broken.checkpoint_path, t.tensor("model.lm_head.weight", None))
    options = "--steps 20 --tokens-per-step 256 --no-compile --fp32 --warmup 5 --seed 5 --block-causal 0.1 --resume"
    assert main(["pretrain", "--out", str(tmp_path), *options.split()]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "tensors must be those of this run, got none for 1 (['model.lm_head.weight'])" in line


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def half_the_weights(folder: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_template(folder: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(folder)


def edit_tokenizer(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda values: values["model"].update(unk_token="a"))


CONFIG, GENERATION = "config.json", "generation_config.json"
# What a run reads besides its checkpoint: which folder or file changes, how, and what the refusal names.
GROUNDS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weights": ("model", edit_weights, "model"),
    "weights of the teacher": ("teacher", edit_weights, "teacher's model"),
    "stored dtype": ("model", half_the_weights, "model"),
    "rope_theta": (
        "model", lambda f: edit_json(f / CONFIG, lambda v: v["rope_parameters"].update(rope_theta=77.0)), "model"
    ),
    "rope_theta of the teacher": (
        "teacher", lambda f: edit_json(f / CONFIG, lambda v: v["rope_parameters"].update(rope_theta=7.0)),
        "teacher's model",
    ),
    "logits_row": ("model", lambda f: edit_json(f / CONFIG, lambda v: v["dlm"].update(logits_row="previous")), "model"),
    "visibility of the teacher": (
        "teacher", lambda f: edit_json(f / CONFIG, lambda v: v["dlm"].update(prompt_isolated=True)), "teacher's model"
    ),
    "generation config": (
        "model", lambda f: edit_json(f / GENERATION, lambda v: v.update(max_length=33)), "model"
    ),
    "tokenizer": ("model", edit_tokenizer, "tokenizer"),
    "tokenizer of the teacher": ("teacher", edit_tokenizer, "teacher's tokenizer"),
    "chat template": ("model", edit_template, "tokenizer"),
    "data": ("data", lambda file: file.write_text(file.read_text().replace("7, 8", "8, 7")), "data"),
    "less data": ("data", lambda file: file.write_text("\n".join(file.read_text().split("\n")[:-2]) + "\n"), "data"),
}  # fmt: skip


@pytest.fixture(scope="module")
def remainder(ground, tmp_path_factory) -> bytes:
    """The checkpoint of a distillation of LoRA layers from another teacher."""
    run = Distiller(ground.settings(tmp_path_factory.mktemp("remainder"), lora_rank=2))
    run.step()
    run.save()
    return run.checkpoint_path.read_bytes()


def resume(ground: Ground, remainder: bytes, tmp_path: Path) -> Distiller:
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint.safetensors").write_bytes(remainder)
    return Distiller(ground.settings(out, lora_rank=2, resume=True))


@pytest.mark.parametrize("case", GROUNDS)
def test_a_run_whose_models_or_data_have_changed_is_not_resumed(ground, remainder, tmp_path, case):
    name, change, named = GROUNDS[case]
    copied = ground.copy(tmp_path)
    change(getattr(copied, name))

    with pytest.raises(ValueError, match=f"content of .* must be the checkpoint's, .*, got {named}=") as error:
        resume(copied, remainder, tmp_path)
    assert unnamed(error.value, named) is None


def test_copies_under_other_names_are_the_same_ground(ground, remainder, tmp_path):
    assert resume(ground.copy(tmp_path), remainder, tmp_path).step_number == 1


def test_the_same_weights_in_shards_are_the_same_ground(ground, remainder, tmp_path):
    """What counts is what was opened, and not the names of the files."""
    copied = ground.copy(tmp_path)
    weights = load_file(copied.model / "model.safetensors")
    (copied.model / "model.safetensors").unlink()
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for file in set(names.values()):
        part = {name: tensor for name, tensor in weights.items() if names[name] == file}
        save_file(part, copied.model / file, {"format": "pt"})
    (copied.model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))

    assert resume(copied, remainder, tmp_path).step_number == 1


def test_another_teacher_than_the_checkpoints_is_refused(ground, remainder, tmp_path):
    ground = Ground(ground.model, ground.model, ground.data)
    with pytest.raises(ValueError, match="content of teacher's model must be the checkpoint's"):
        resume(ground, remainder, tmp_path)


def test_another_tokenizer_of_a_pretraining_is_refused(tmp_path, monkeypatch):
    Trainer(pretraining(tmp_path)).save()
    tokenizer = train.build_tokenizer()
    tokenizer.chat_template += " "
    monkeypatch.setattr(train, "build_tokenizer", lambda: tokenizer)

    with pytest.raises(ValueError, match="content of tokenizer must be the checkpoint's, '.*', got tokenizer="):
        Trainer(pretraining(tmp_path, resume=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", 0.0), ("scale", float("nan")), ("scale", "x"), ("growth_factor", -1.0), ("growth_interval", 1.5)]
    + [("_growth_tracker", -1), ("_growth_tracker", True)],
)
def test_a_scaler_of_losses_is_checked_number_by_number(tmp_path, name, value):
    state = torch.amp.GradScaler("cpu").state_dict()
    found = checkpoint.Checkpoint(tmp_path / "checkpoint.safetensors", {}, {})
    distill.check_scaler(found, dict(state), state)

    with pytest.raises(ValueError) as error:
        distill.check_scaler(found, state | {name: value}, state)
    assert unnamed(error.value, name) is None
    for saved in (None, {}, [1], {"scale": 1.0}):
        with pytest.raises(ValueError, match="scaler must be numbers for scale, .* got scaler="):
            distill.check_scaler(found, saved, state)
