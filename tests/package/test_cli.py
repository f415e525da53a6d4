"""The command line: what goes to which stream, and what a wrong argument is told."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import published
import pytest
from commands import error_of, run
from helpers import save_toy_checkpoint

import dlm_fast
from dlm_fast import cli, files, loading
from dlm_fast.jobs.rows import Sizes
from dlm_fast.training import __main__ as training

ROOT = Path(__file__).resolve().parents[2]


def test_prompts_on_the_command_line_are_answered_on_stdout(checkpoint, capsys):
    argv = [
        "generate",
        "--model",
        str(checkpoint),
        "--prompt",
        "abc",
        "--prompt",
        "de",
        "--max-new-tokens",
        "4",
        "--device",
        "cpu",
    ]
    status, out, _ = run([*argv, "--json"], capsys)
    report = json.loads(out.splitlines()[-1])
    assert status == 0 and report["preset"] == "llada" and [r["index"] for r in report["results"]] == [0, 1]
    status, out, _ = run(argv, capsys)
    assert status == 0 and out == "".join(r["text"] + "\n" for r in report["results"])


def test_a_published_model_is_decoded_by_its_familys_decoder_and_settings(tmp_path, capsys):
    published.write("dream", tmp_path)
    argv = [
        "generate",
        "--model",
        str(tmp_path),
        "--prompt",
        "ab",
        "--max-new-tokens",
        "6",
        "--device",
        "cpu",
        "--json",
    ]
    model = dlm_fast.load(tmp_path, device="cpu")
    chat = [[{"role": "user", "content": "ab"}]]
    settings = {"temperature": 0.2, "top_p": 0.95}
    for flags, arguments in (
        ([], {"preset": "dream", **settings}),
        (["--temperature", "0"], {"preset": "dream", **settings, "temperature": 0}),
        (["--top-p", "1"], {"preset": "dream", **settings, "top_p": 1.0}),
        (["--preset", "dream"], {"preset": "dream"}),
        (["--preset", "llada"], {"preset": "llada"}),
    ):
        report = json.loads(run([*argv, *flags], capsys)[1])
        expected = dlm_fast.generate(model, chat, max_new_tokens=6, **arguments)
        assert (report["preset"], report["results"][0]["ids"]) == (arguments["preset"], expected.sequences[0].tolist())


def test_flags_say_how_a_model_sees_where_no_file_does(tmp_path, capsys):
    save_toy_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    mask = config.pop("dlm")["mask_token_id"]
    path.write_text(json.dumps(config))
    argv = ["generate", "--model", str(tmp_path), "--prompt", "abc", "--max-new-tokens", "5", "--device", "cpu"]
    assert "config.json has no 'dlm' section" in error_of(argv, capsys)
    diffusion = {"mask_token_id": mask, "visibility": "block", "block_length": 2, "block_alignment": "abs"}
    flags = ["--mask-token-id", str(mask), "--visibility", "block", "--block-length", "2", "--block-alignment", "abs"]
    for row in ("self", "previous"):
        model = dlm_fast.load(tmp_path, device="cpu", diffusion={**diffusion, "logits_row": row})
        expected = dlm_fast.generate(model, [[{"role": "user", "content": "abc"}]], max_new_tokens=5)
        report = json.loads(run([*argv, *flags, "--logits-row", row, "--json"], capsys)[1])
        assert (report["preset"], report["results"][0]["ids"]) == ("sdar", expected.sequences[0].tolist())
    assert "visibility must be one of full, block, got visibility='sideways'" in error_of(
        [*argv, *flags[:2], "--visibility", "sideways"], capsys
    )


def test_a_repository_of_the_hub_is_opened_by_its_id_and_revision(tmp_path, capsys, monkeypatch):
    import huggingface_hub

    save_toy_checkpoint(tmp_path)
    asked = []

    def snapshot(repo_id, *, revision, allow_patterns, ignore_patterns, local_files_only=False):
        asked.append((repo_id, revision, local_files_only))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    argv = ["--prompt", "abc", "--max-new-tokens", "5", "--device", "cpu"]
    status, _, _ = run(["generate", "--model", "somebody/model", "--revision", "v1", *argv], capsys)
    assert status == 0 and asked == [("somebody/model", "v1", True)]
    assert "revision is for repositories of the Hub, got 'v1'" in error_of(
        ["generate", "--model", str(tmp_path), "--revision", "v1", *argv], capsys
    )


def test_the_doctor_examines_a_checkpoint_too(checkpoint, tmp_path, capsys):
    argv = ["doctor", "--device", "cpu", "--model"]
    status, out, _ = run([*argv, str(checkpoint), "--json"], capsys)
    report = json.loads(out)
    assert status == 0 and report["model"] == dlm_fast.explain(dlm_fast.load(checkpoint, device="cpu"))
    assert list(report["embedded"]) == list(files.EMBEDDED)
    status, out, _ = run([*argv, str(checkpoint)], capsys)
    assert status == 0 and f"{checkpoint}: LlamaForCausalLM on cpu, visibility full" in out
    assert "(config.json, section dlm)" in out
    # What keeps a checkpoint from opening is what the doctor says.
    status, out, error = run([*argv, str(tmp_path)], capsys)
    assert status == 1 and f"{tmp_path}: load: {tmp_path} has no config.json" in out and error == ""
    assert json.loads(run([*argv, str(tmp_path), "--json"], capsys)[1])["model"]["refused"].endswith("no config.json")


def test_a_text_prompt_goes_through_the_chat_template_unless_raw(checkpoint, capsys):
    argv = ["generate", "--model", str(checkpoint), "--max-new-tokens", "5", "--device", "cpu", "--json"]
    model = dlm_fast.load(checkpoint, device="cpu")
    for flags, prompt in (([], [{"role": "user", "content": "abc"}]), (["--raw"], "abc")):
        _, out, _ = run([*argv, *flags, "--prompt", "abc"], capsys)
        expected = dlm_fast.generate(model, [prompt], max_new_tokens=5)
        assert json.loads(out)["results"][0]["ids"] == expected.sequences[0].tolist()


def test_an_adapter_beside_the_weights_needs_a_word(tmp_path, capsys):
    peft = pytest.importorskip("peft", reason="an adapter is made and merged by peft")
    model = save_toy_checkpoint(tmp_path)
    answers = {}
    argv = [
        "generate",
        "--model",
        str(tmp_path),
        "--prompt",
        "abcde",
        "--max-new-tokens",
        "9",
        "--device",
        "cpu",
        "--json",
    ]

    def answer(*flags) -> list[int]:
        return json.loads(run([*argv, *flags], capsys)[1])["results"][0]["ids"]

    answers["before"] = answer()
    peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).save_pretrained(tmp_path)
    assert "holds an adapter (adapter_config.json), which is applied on request only" in error_of(argv[:-1], capsys)
    assert answer("--adapter", "none") == answers["before"] != answer("--adapter", str(tmp_path))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "sdar"], "preset sdar decodes models of visibility 'block', this model is 'full'"),
        (["--preset", "nope"], "preset must be one of llada"),
        (["--block-length", "0"], "block_length must be a whole number >= 1 or None, got block_length=0"),
        (["--temperature", "-1"], "temperature must be a finite number >= 0, got temperature=-1.0"),
        (["--max-new-tokens", "0"], "max_new_tokens must be a whole number >= 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--dtype", "int8"], "--dtype must be bfloat16, float16 or float32, got 'int8'"),
        (["--backend", "cuda"], "backend must be one of auto, triton, cpu, reference or an Ops, got backend='cuda'"),
        (
            ["--model", "nowhere"],
            f"path must be a checkpoint folder, an id of the Hub (owner/name) or one of {', '.join(files.EMBEDDED)}, "
            "got 'nowhere'",
        ),
    ],
)
def test_a_bad_flag_is_one_line_that_names_argument_rule_and_value(command, capsys, flags, message):
    assert message in error_of([*command, *flags], capsys)


def test_debug_shows_the_traceback(command):
    with pytest.raises(ValueError, match="preset must be one of"):
        cli.main([*command, "--preset", "nope", "--debug"])


def test_input_needs_output(checkpoint, prompts, capsys):
    assert "--input needs --output" in error_of(
        ["generate", "--model", str(checkpoint), "--input", str(prompts)], capsys
    )


@pytest.mark.parametrize("argv", [[], ["nope"], ["generate"], ["generate", "--model", "x"], ["presets", "--nope"]])
def test_a_bad_command_line_shows_its_usage_and_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("usage: dlm-fast")


def test_a_nan_model_is_an_error_that_names_the_rows(checkpoint, capsys, monkeypatch):
    def poisoned(*args, **kwargs):
        model = load(*args, **kwargs)
        model.lm_head.weight.data.fill_(float("nan"))
        return model

    load = loading.load
    monkeypatch.setattr(loading, "load", poisoned)
    assert "got NaN" in error_of(["generate", "--model", str(checkpoint), "--prompt", "ab", "--device", "cpu"], capsys)


def test_presets_are_listed(capsys):
    status, out, _ = run(["presets"], capsys)
    assert status == 0 and all(name in out for name in dlm_fast.PRESETS)
    report = json.loads(run(["presets", "--json"], capsys)[1])
    assert [row["name"] for row in report["presets"]] == list(dlm_fast.PRESETS)


def test_the_page_of_decoders_is_the_table_of_presets(capsys):
    assert run(["presets", "--markdown"], capsys)[1] == (ROOT / "docs" / "decoders.md").read_text(encoding="utf-8")


def test_the_picture_in_the_readme_is_what_the_command_draws(tmp_path, capsys):
    drawn = tmp_path / "trace.svg"
    assert run(["demo", "--svg", str(drawn), "--backend", "reference", "--device", "cpu"], capsys)[0] == 0
    assert drawn.read_bytes() == (ROOT / "docs" / "trace.svg").read_bytes()
    assert "(docs/trace.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(drawn.read_bytes()) < 60_000


@pytest.mark.parametrize("flag", ["--seed", "--per-task"])
def test_the_picture_is_always_the_same(tmp_path, capsys, flag):
    status, _, error = run(["demo", "--svg", str(tmp_path / "trace.svg"), flag, "1"], capsys)
    assert status == 1 and f"--svg draws one decode, always the same, and goes without {flag}" in error
    assert not (tmp_path / "trace.svg").exists()


def test_any_option_of_a_preset_can_be_set(capsys):
    arguments = [
        "generate",
        "--model",
        "tiny-full",
        "--prompt",
        "Sort 3 1",
        "--preset",
        "local-leap",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    status, out, _ = run([*arguments, "--set", "distance=2", "--set", "block_length=2"], capsys)
    assert status == 0 and len(json.loads(out.splitlines()[-1])["results"]) == 1
    assert run([*arguments, "--set", "distances=2"], capsys)[0] == 1


def test_the_module_runs_as_a_program_and_fails_with_a_status():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "dlm_fast", "generate", "--model", "nowhere", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("dlm-fast generate: load: path must be")
    assert "Traceback" not in done.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"dlm-fast {dlm_fast.__version__}\n"


def test_no_command_takes_an_abbreviated_flag(monkeypatch):
    made = []
    real = argparse.ArgumentParser.__init__

    def recorded(self, *args, **kwargs):
        real(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", recorded)
    cli._parser()
    training.build_parser()
    for module in ("bench.__main__", "dlm_kernels.static", "dlm_kernels.propose"):
        with pytest.raises(SystemExit):
            importlib.import_module(module).main(["--help"])
    programs = {parser.prog.rpartition("python -m ")[2] for parser in made}
    assert {
        "dlm-fast generate",
        "dlm_fast.training distill",
        "bench quality",
        "dlm_kernels.static",
        "dlm_kernels.propose",
    } <= programs
    assert not [parser.prog for parser in made if parser.allow_abbrev]


@pytest.mark.parametrize(
    "flag, hint",
    [
        (["--steps", "4"], "--steps: use --steps-per-block = steps / blocks"),
        (["--temp", "1"], "--temp: use --temperature"),
        (["--gen_length=64"], "--gen_length: use --max-new-tokens"),
        (["--thresold", "0.5"], "--thresold: use --threshold"),
    ],
)
def test_a_flag_of_another_name_says_which_one_is_meant(command, capsys, flag, hint):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, *flag])
    assert caught.value.code == 2 and hint in capsys.readouterr().err


def test_an_option_that_the_decoder_does_not_read_is_refused(command, capsys):
    message = error_of([*command, "--threshold", "0.3"], capsys)
    assert "threshold has no effect with rule='quota' (preset llada): it is read by rule='threshold'" in message


def test_an_error_is_an_object_on_stdout_too_with_json(checkpoint, capsys):
    status, out, err = run(
        ["generate", "--model", str(checkpoint), "--prompt", "a", "--preset", "lada", "--json"], capsys
    )
    assert status == 1 and "preset must be one of" in err
    assert (
        json.loads(out)["error"]["type"] == "ValueError" and "got preset='lada'" in json.loads(out)["error"]["message"]
    )


def test_prompts_beside_a_failed_one_are_printed(checkpoint, capsys, monkeypatch):
    def poisoned(*args, **kwargs):
        model = load(*args, **kwargs)
        model.model.embed_tokens.weight.data[45] = float("nan")
        return model

    load = loading.load
    monkeypatch.setattr(loading, "load", poisoned)
    argv = ["generate", "--model", str(checkpoint), "--raw", "--device", "cpu", "--max-new-tokens", "4"]
    argv += ["--set", "banned_token_ids=[45]"]
    good = [text for text in "abcdef" if run([*argv, "--prompt", text], capsys)[0] == 0]
    bad = next(chr(code) for code in range(33, 127) if run([*argv, "--prompt", chr(code)], capsys)[0])
    alone = run([*argv, "--prompt", good[0]], capsys)[1]
    status, out, err = run([*argv, "--prompt", bad, "--prompt", good[0]], capsys)
    assert status == 1 and out == "\n" + alone and "got NaN, +inf or no candidate in rows [0]" in err
    status, out, _ = run([*argv, "--prompt", bad, "--prompt", good[0], "--json"], capsys)
    report = json.loads(out)
    assert status == 1 and [result["finish"] == "error" for result in report["results"]] == [True, False]
    assert "in rows [0]" in report["failed"][0]


@pytest.mark.parametrize("flag", ["--strict", "--keep-keys", "--restart", "--overwrite"])
def test_a_flag_of_jobs_goes_with_an_output(checkpoint, capsys, flag):
    assert f"{flag} goes with --output" in error_of(
        ["generate", "--model", str(checkpoint), "--prompt", "a", flag], capsys
    )


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=" ".join)
def test_who_stops_reading_is_no_error(flags):
    """As in `dlm-fast presets | head -1`."""
    argv = [sys.executable, "-c", "from dlm_fast.cli import main; raise SystemExit(main())", "presets", *flags]
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    os.close(write)
    assert ended.stderr == b"" and ended.returncode == 141


def test_who_stops_reading_what_is_no_file_is_no_error(capsys, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["presets"]) == 141 and capsys.readouterr().err == ""


def test_an_interrupt_is_an_object_on_stdout_too_with_json(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "presets", interrupted)
    status, out, err = run(["presets", "--json"], capsys)
    assert status == 130 and "interrupted; what was finished is kept" in err
    assert json.loads(out)["error"] == {
        "type": "KeyboardInterrupt",
        "message": "interrupted; what was finished is kept",
    }


def test_the_handlers_of_signals_are_the_callers_again_after_a_command(capsys):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    run(["presets"], capsys)
    assert [signal.getsignal(number) for number in numbers] == before


def test_prompts_are_decoded_as_many_at_a_time_as_the_flags_say(checkpoint, command, tmp_path, capsys, monkeypatch):
    argv = ["generate", "--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "4", "--json"]
    argv += [part for text in "abc" for part in ("--prompt", text)]
    together = json.loads(run(argv, capsys)[1])["results"]
    assert json.loads(run([*argv, "--batch-size", "2"], capsys)[1])["results"] == together
    assert "batch_size must be given for more rows than max_rows=2" in run([*argv, "--max-rows", "2"], capsys)[1]
    # A job has a batch size without a flag, and it is within the limit.
    at, sizes, opened = command.index("--batch-size"), [], Sizes.open

    def open_slots(self, rows, canvases):
        runner = opened(self, rows, canvases)
        sizes.append(runner.plan.first.shape[0])
        return runner

    monkeypatch.setattr(Sizes, "open", open_slots)
    assert run([*command[:at], *command[at + 2 :], "--max-rows", "2"], capsys)[0] == 0
    assert run([*command[:at], *command[at + 2 :], "--overwrite"], capsys)[0] == 0 and sizes == [2, 7]
