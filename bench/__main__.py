"""`python -m bench COMMAND`, from a checkout: kernels, gpu-check, precompile, report, sanitize, compare, gates,
quality, seeds, batch, e2e, launches."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
MOST_PROCESSES = 16  # every process holds a CUDA context


class UsageError(ValueError):
    """The command cannot run as asked; the message says which option and which rule."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all is well, 1 something measured or checked is not, 2 it could not run at all."""
    make = partial(argparse.ArgumentParser, allow_abbrev=False)
    parser = make(prog="python -m bench")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=make)
    _kernels_options(
        commands.add_parser("kernels", help="every kernel at published shapes; without a GPU, the static table")
    )
    _gpu_check_options(
        commands.add_parser("gpu-check", help="are the kernels right on this GPU, and how fast are they")
    )
    _precompile_options(
        commands.add_parser("precompile", help="every kernel that gpu-check launches, compiled without a GPU")
    )
    report = commands.add_parser(
        "report", help="a run of kernels or gpu-check as text, from its lines; also one that was cut off"
    )
    report.add_argument("lines", type=Path, metavar="RUN.jsonl")
    _sanitize_options(commands.add_parser("sanitize", help="the kernels' checks under compute-sanitizer"))
    _compare_options(commands.add_parser("compare", help="two result files, row by row"))
    gates = commands.add_parser("gates", help="what the kernels are held to, judged from a result file")
    gates.add_argument("result", type=Path, metavar="RESULT", help="RESULT.json, or the lines of a run (.jsonl)")
    _quality_options(
        commands.add_parser("quality", help="exact match against forwards of every preset on the embedded models")
    )
    _seeds_options(
        commands.add_parser("seeds", help="the training of the embedded pair, shortened, once for each seed")
    )
    _batch_options(commands.add_parser("batch", help="what a batch of mixed lengths costs beside its rows"))
    _e2e_options(commands.add_parser("e2e", help="whole decodes beside published loops and autoregressive decoding"))
    commands.add_parser("launches", help="docs/launches.md: the small launches of a step of every preset")
    target = commands.add_parser("sanitize-target")  # what `sanitize` runs under the tool
    target.add_argument("--seed", type=int, required=True)
    target.add_argument("--plain-memory", action="store_true")
    given = parser.parse_args(arguments)
    run = {
        "kernels": _kernels,
        "gpu-check": _gpu_check,
        "precompile": _precompile,
        "report": _report,
        "sanitize": _sanitize,
        "sanitize-target": _sanitize_target,
        "compare": _compare,
        "gates": _gates,
        "quality": _quality,
        "seeds": _seeds,
        "batch": _batch,
        "e2e": _e2e,
        "launches": _launches,
    }[given.command]
    try:
        return run(given)
    except UsageError as error:
        print(f"{given.command}: {error}", file=sys.stderr)
        return 2


def _kernels_options(kernels: argparse.ArgumentParser) -> None:
    kernels.add_argument("--out", type=Path, default=None, help="folder for JSON and plots; made if it does not exist")
    kernels.add_argument("--models", nargs="+", metavar="NAME", default=None, help="models (default: all)")
    kernels.add_argument("--ops", nargs="+", metavar="NAME", default=None, help="what is timed (default: all)")
    kernels.add_argument(
        "--seed", type=int, default=None, help="of the checks' inputs, to repeat a run (default: a fresh one)"
    )
    kernels.add_argument(
        "--seconds", type=float, default=7200, help="what is not timed by then is SKIPPED (default: 7200)"
    )
    kernels.add_argument("--no-plots", action="store_true", help="JSON only")
    kernels.add_argument(
        "--without-gpu", action="store_true", help="the static table and floors, also where there is a GPU"
    )
    static = kernels.add_argument_group("without a GPU")
    static.add_argument(
        "--targets", nargs="+", metavar="90", default=[], help="compute capabilities (default: all six)"
    )
    static.add_argument(
        "--kernels", nargs="+", metavar="NAME", default=[], help="compiled kernels (default: those of --ops)"
    )
    static.add_argument(
        "--jobs", type=int, default=None, metavar="N", help="processes that compile (default: one a core)"
    )
    static.add_argument("--no-static", action="store_true", help="floors only: the whole table takes minutes")


def _gpu_check_options(check: argparse.ArgumentParser) -> None:
    check.add_argument(
        "--out", type=Path, required=True, help="folder for gpu-check.jsonl and .json; made if it does not exist"
    )
    check.add_argument(
        "--seed", type=int, default=None, help="of the random inputs, to repeat a run (default: a fresh one)"
    )
    check.add_argument(
        "--times", nargs="*", metavar="NAME", default=None, help="what is timed, in this order (default: all)"
    )
    check.add_argument(
        "--seconds",
        type=float,
        default=450,
        help="after these, what has not been timed is reported as skipped (default: 450)",
    )
    check.add_argument(
        "--compile-seconds",
        type=float,
        default=100,
        help="of these, for compiling baselines; 0 = no compiled ones (default: 100)",
    )
    check.add_argument(
        "--processes",
        type=int,
        default=None,
        metavar="N",
        help=f"that run the checks side by side; 0 = this one alone (default: one a core, at most {MOST_PROCESSES})",
    )
    check.add_argument(
        "--case-seconds",
        type=float,
        default=120,
        help="a check that takes longer costs its process, and is red (default: 120)",
    )
    check.add_argument(
        "--cache",
        type=Path,
        default=None,
        metavar="FILE",
        help="kernels compiled ahead by precompile, and their seed (default: none)",
    )


def _precompile_options(precompile: argparse.ArgumentParser) -> None:
    precompile.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the file for gpu-check --cache, a tar.xz"
    )
    precompile.add_argument(
        "--targets", nargs="+", type=int, metavar="90", default=[90], help="compute capabilities (default: 90)"
    )
    precompile.add_argument(
        "--seed", type=int, default=1, help="of the checks' inputs; gpu-check --cache takes it over (default: 1)"
    )
    precompile.add_argument(
        "--jobs", type=int, default=None, metavar="N", help="processes that compile (default: one a core)"
    )


def _sanitize_options(sanitize: argparse.ArgumentParser) -> None:
    tools = "memcheck, racecheck, initcheck, synccheck"
    sanitize.add_argument("--tool", action="append", metavar="NAME", help=f"of {tools}; may be repeated (default: all)")
    sanitize.add_argument(
        "--out", type=Path, default=None, help="folder for sanitize.json and the tools' logs (default: none)"
    )
    sanitize.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")


def _compare_options(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("a", type=Path, metavar="A.json")
    compare.add_argument("b", type=Path, metavar="B.json")
    compare.add_argument(
        "--tolerance", type=float, default=0.05, help="slower: beyond its noise and this share (default: 0.05)"
    )
    compare.add_argument(
        "--across-devices", action="store_true", help="ratios even if device, driver or versions differ"
    )


def _quality_options(quality: argparse.ArgumentParser) -> None:
    quality.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for quality.json, .md, .png (default: bench/results)"
    )
    quality.add_argument("--per-task", type=int, default=100, help="held-out prompts of every task (default: 100)")
    quality.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    quality.add_argument(
        "--batch-size", type=int, default=10, help="prompts decoded together, which changes no result (10)"
    )
    quality.add_argument("--models", nargs="+", metavar="NAME", default=None, help="embedded models (default: all)")
    quality.add_argument("--presets", nargs="+", metavar="NAME", default=None, help="presets (default: all)")
    quality.add_argument(
        "--from",
        nargs="+",
        type=Path,
        metavar="FILE",
        default=[],
        dest="earlier",
        help="results to take measured settings from",
    )
    quality.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        default=None,
        help="measure a sample of a quality.json again, on its own prompts",
    )
    quality.add_argument(
        "--settings", type=int, default=6, help="of --check: how many settings (default: 6); --seed chooses them"
    )


def _seeds_options(seeds: argparse.ArgumentParser) -> None:
    seeds.add_argument("--out", type=Path, default=RESULTS, help="folder for seeds.json (default: bench/results)")
    seeds.add_argument("--runs", type=Path, required=True, help="folder for the runs themselves")
    seeds.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")


def _model_options(parser: argparse.ArgumentParser, layers: int, hidden: int, vocab: int) -> None:
    """Options of a command that decodes with models of any size."""
    parser.add_argument(
        "--model", choices=("tiny", "random"), default="random", help="embedded or random ones (default: random)"
    )
    size = parser.add_argument_group("random models")
    size.add_argument("--layers", type=int, default=None, metavar="N", help=f"layers (default: {layers})")
    size.add_argument("--hidden", type=int, default=None, metavar="N", help=f"width (default: {hidden})")
    size.add_argument("--vocab", type=int, default=None, metavar="N", help=f"ids (default: {vocab})")
    size.add_argument("--shape", metavar="NAME", default=None, help="of a published model, such as LLaDA-8B")
    parser.set_defaults(size=(layers, hidden, vocab))
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--backend", default="auto", help="the ops, as for dlm_fast.load (default: auto)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch on a CPU (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and prompts (default: 0)")
    parser.add_argument("--out", type=Path, default=None, help="folder for results; made if it does not exist")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON document")


def _batch_options(batch: argparse.ArgumentParser) -> None:
    _model_options(batch, layers=2, hidden=64, vocab=256)
    batch.add_argument("--presets", nargs="+", metavar="NAME", default=None, help="decoders (default: a choice)")
    batch.add_argument(
        "--rows", nargs="+", type=int, metavar="N", default=[1, 8, 32, 64], help="rows a call (default: 1 8 32 64)"
    )
    batch.add_argument("--requests", type=int, default=64, help="that are counted; 0 = none (default: 64)")
    batch.add_argument("--timed-requests", type=int, default=16, help="that are timed; 0 = none (default: 16)")
    batch.add_argument(
        "--slots", nargs="*", type=int, metavar="N", default=[8, 32],
        help="slots of a session; the first number is timed beside static batches (default: 8 32)",
    )  # fmt: skip
    batch.add_argument(
        "--slot-requests", type=int, default=64, help="that are timed in slots and in static batches; 0 = none (64)"
    )
    batch.add_argument("--turns", type=int, default=3, help="how often each is timed (default: 3)")
    batch.add_argument("--seconds", type=float, default=7200, help="what is left by then is SKIPPED (default: 7200)")
    batch.add_argument("--no-plots", action="store_true", help="JSON only")


def _e2e_options(e2e: argparse.ArgumentParser) -> None:
    _model_options(e2e, layers=4, hidden=256, vocab=8192)
    e2e.add_argument("--rows", nargs="+", type=int, metavar="N", default=[1, 8], help="batch sizes (default: 1 8)")
    e2e.add_argument(
        "--visibility",
        nargs="+",
        choices=("full", "block"),
        default=["full", "block"],
        help="in this order (default: both)",
    )
    e2e.add_argument("--prompt", type=int, default=64, help="positions of each prompt (default: 64)")
    e2e.add_argument("--new-tokens", type=int, default=256, help="positions to fill (default: 256)")
    e2e.add_argument("--per-step", type=int, default=4, help="tokens a step (default: 4)")
    e2e.add_argument("--mixed", type=int, default=16, help="requests of mixed lengths; 0 = none (default: 16)")
    e2e.add_argument(
        "--slot-mixed", type=int, default=48, help="that go through slots and static batches; 0 = none (default: 48)"
    )
    e2e.add_argument("--turns", type=int, default=3, help="how often each is timed (default: 3)")
    e2e.add_argument("--seconds", type=float, default=1800, help="what is left by then is SKIPPED (default: 1800)")
    e2e.add_argument(
        "--cache", type=Path, default=None, metavar="FILE", help="kernels compiled ahead by precompile (default: none)"
    )


def _need_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError("needs a CUDA GPU, and torch sees none here; nothing was measured")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("unset TRITON_INTERPRET: it would run the kernels on the CPU")


def _make(file: Path | None) -> None:
    """Makes the file's folder, and tries whether the file can be written: that is better known before there is
    something to write."""
    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("a").close()
    except OSError as error:
        raise UsageError(f"--out {file}: {error}") from None


def _in(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


def _processes() -> int:
    return min(MOST_PROCESSES, os.cpu_count() or 1)


def _gpu_check(given: argparse.Namespace) -> int:
    began = time.monotonic()
    for option in ("seconds", "compile_seconds", "case_seconds", "processes"):
        value = getattr(given, option)
        if value is not None and not value >= 0:
            raise UsageError(f"--{option.replace('_', '-')} must be at least 0, got {value}")
    from . import gpu_check

    wanted = tuple(gpu_check.TIMINGS) if given.times is None else tuple(dict.fromkeys(given.times))
    wrong = [name for name in wanted if name not in gpu_check.TIMINGS]
    if wrong:
        raise UsageError(f"--times must be among {', '.join(gpu_check.TIMINGS)}, got {', '.join(wrong)}")
    _need_cuda()
    _make(_in(given.out, "gpu-check.jsonl"))
    processes = _processes() if given.processes is None else given.processes
    options = {"compile_seconds": given.compile_seconds, "case_seconds": given.case_seconds}
    if given.cache is None:
        rig = gpu_check.cuda_rig(processes, **options)
        return gpu_check.gpu_check(rig, given.out, given.seed, began + given.seconds - time.monotonic(), wanted=wanted)
    from . import kernel_cache

    try:
        with kernel_cache.placed(given.cache) as cache:
            print("\n".join(kernel_cache.lines(cache)), flush=True)
            seed = cache.manifest.seed if given.seed is None else given.seed
            rig = gpu_check.cuda_rig(processes, **options, commit=cache.commit, facts={"kernel_cache": cache.facts})

            def finish(result: dict[str, Any]) -> None:
                count = cache.compiled_since()
                print(f"\n{count} kernels were compiled besides those compiled ahead, compiled baselines among them")

            left = began + given.seconds - time.monotonic()
            return gpu_check.gpu_check(rig, given.out, seed, left, wanted=wanted, finish=finish)
    except kernel_cache.CacheError as error:
        raise UsageError(f"--cache {error}") from None


def _precompile(given: argparse.Namespace) -> int:
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        raise UsageError("needs the package triton, which is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("unset TRITON_INTERPRET: it interprets kernels, and nothing is compiled")
    if given.jobs is not None and given.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {given.jobs}")
    from . import precompile

    _make(given.out)
    jobs = given.jobs or os.cpu_count() or 1
    return precompile.precompile(given.out, given.targets, given.seed, jobs, lambda line: print(line, flush=True))


def _report(given: argparse.Namespace) -> int:
    from . import record, report

    try:
        found = record.read(given.lines)
    except OSError as error:
        raise UsageError(f"{given.lines}: {error.strerror or error}") from None
    except record.LineError as error:
        raise UsageError(f"{given.lines}: {error}") from None
    result = found.document()
    print("\n".join([*found.lines(), "", report.verdict_line(result), report.dumps(result)]))
    return 0 if result["ok"] else 1


def _kernels(given: argparse.Namespace) -> int:
    import torch

    from . import gpu_check, static_table, sweep

    try:
        shapes, ops = sweep.choose(given.models, given.ops)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not given.without_gpu and torch.cuda.is_available():
        table = {
            "--targets": given.targets,
            "--kernels": given.kernels,
            "--jobs": given.jobs,
            "--no-static": given.no_static,
        }
        wrong = [name for name, value in table.items() if value]
        if wrong:
            raise UsageError(f"{', '.join(wrong)}: of the form without a GPU; add --without-gpu, or leave it out")
        _need_cuda()
        plots = given.out is not None and not given.no_plots
        if plots and not sweep.has_matplotlib():
            raise UsageError(
                "plots need matplotlib (`pip install matplotlib`), which is not installed; or give --no-plots"
            )
        _make(_in(given.out, "kernels.jsonl"))
        rig = gpu_check.cuda_rig(_processes(), shapes=shapes, compile_seconds=sweep.COMPILE_SECONDS)
        return sweep.measured(rig, given.out, ops, given.seed, given.seconds, plots)
    if given.no_static and (given.targets or given.kernels or given.jobs):
        raise UsageError("--no-static leaves out the table that --targets, --kernels and --jobs are of")
    if given.jobs is not None and given.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {given.jobs}")
    _make(_in(given.out, "kernels_static.json"))
    try:
        return sweep.computed(given.out, shapes, ops, given.targets, given.kernels, given.jobs, not given.no_static)
    except static_table.StaticError as error:
        raise UsageError(str(error)) from None


def _compare(given: argparse.Namespace) -> int:
    from . import compare

    if given.tolerance < 0:
        raise UsageError(f"--tolerance must be at least 0, got {given.tolerance:g}")
    try:
        found = compare.compare(compare.load(given.a), compare.load(given.b))
    except compare.ResultError as error:
        raise UsageError(str(error)) from None
    lines, status = compare.report(found, given.tolerance, given.across_devices)
    print("\n".join(lines))
    return status


def _gates(given: argparse.Namespace) -> int:
    from . import compare, gates

    try:
        judged = gates.evaluate(compare.load(given.result))
    except compare.ResultError as error:
        raise UsageError(str(error)) from None
    print("\n".join(gates.lines(judged)))
    return 1 if any(gate.verdict == gates.MISSED for gate in judged) else 0


def _sanitize(given: argparse.Namespace) -> int:
    import torch

    from . import machine, report, sanitize

    tools = given.tool or list(sanitize.TOOLS)
    wrong = [tool for tool in tools if tool not in sanitize.TOOLS]
    if wrong:
        raise UsageError(f"--tool must be among {', '.join(sanitize.TOOLS)}, got {', '.join(wrong)}")
    _need_cuda()
    try:
        sanitizer = sanitize.find()
    except sanitize.SanitizeError as error:
        raise UsageError(str(error)) from None
    _make(_in(given.out, "sanitize.json"))
    facts = machine.device_facts(torch.device("cuda", torch.cuda.current_device()))
    facts |= {"versions": machine.versions(), "commit": machine.commit()}
    kernels, verdicts = sanitize.kernel_names(), []
    print(
        f"{facts['device']}, driver {facts['driver']}, commit {facts['commit']}; kernels: {', '.join(kernels)}",
        flush=True,
    )
    for tool in dict.fromkeys(tools):
        log = None if given.out is None else given.out / f"sanitize-{tool}.log"
        verdict = sanitize.run(sanitizer, tool, kernels, given.seed, log, ROOT)
        verdicts.append(verdict)
        outcome = "clean" if verdict.ok else f"RED: {verdict.reason}"
        outcome += f" ({verdict.elsewhere} reports in other kernels)" if verdict.elsewhere else ""
        print(f"{tool:10} {outcome}", flush=True)
    result = sanitize.document(verdicts, facts, given.seed, report.SCHEMA)
    line = report.dumps(result)
    if given.out is not None:
        (given.out / "sanitize.json").write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0 if result["ok"] else 1


def _sanitize_target(given: argparse.Namespace) -> int:
    _need_cuda()
    from .sanitize import check_target

    return check_target(given.seed, given.plain_memory)


def _quality(given: argparse.Namespace) -> int:
    from dlm_fast.presets import PRESETS

    from . import quality

    if given.check is not None:
        return _check_quality(given)
    for name, known in (("models", quality.MODELS), ("presets", tuple(PRESETS))):
        wrong = [value for value in getattr(given, name) or () if value not in known]
        if wrong:
            raise UsageError(f"--{name} must be among {', '.join(known)}, got {', '.join(wrong)}")
    if min(given.per_task, given.batch_size) < 1:
        raise UsageError("--per-task and --batch-size must be at least 1")
    try:
        document = quality.run(
            given.out,
            per_task=given.per_task,
            seed=given.seed,
            batch_size=given.batch_size,
            models=given.models or quality.MODELS,
            presets=given.presets,
            earlier=given.earlier,
        )
    except quality.QualityError as error:
        raise UsageError(str(error)) from None
    print(quality.table(document))
    return 0


def _seeds(given: argparse.Namespace) -> int:
    from . import seeds

    if len(set(given.seeds)) != len(given.seeds):
        raise UsageError(f"--seeds must differ, got {given.seeds}")
    _make(_in(given.out, "seeds.json"))
    print("\n".join(seeds.lines(seeds.run(given.out, given.seeds, seeds.Short(), given.runs))))
    return 0


def _launches(given: argparse.Namespace) -> int:
    from . import launches

    print(launches.markdown(), end="")
    return 0


def _check_quality(given: argparse.Namespace) -> int:
    from . import quality

    if min(given.settings, given.batch_size) < 1:
        raise UsageError("--settings and --batch-size must be at least 1")
    try:
        lines = quality.check(given.check, count=given.settings, batch_size=given.batch_size, choice=given.seed)
    except quality.QualityError as error:
        raise UsageError(str(error)) from None
    print("\n".join(lines))
    return 1 if any(line.startswith("DIFFERS") for line in lines) else 0


def _models(given: argparse.Namespace, gap: float) -> Any:
    """The models of `batch` and `e2e`, and the facts of the run."""
    import torch

    from dlm_fast.ops import BACKENDS

    from . import machine, models, shapes

    if given.backend not in BACKENDS:
        raise UsageError(f"--backend must be among {', '.join(BACKENDS)}, got {given.backend}")
    known = {shape.name: shape for shape in shapes.MODELS if shape.family is not None}
    if given.shape is not None and given.shape not in known:
        raise UsageError(f"--shape must be among {', '.join(known)}, got {given.shape}")
    for option in ("threads", "turns"):
        if getattr(given, option) < 1:
            raise UsageError(f"--{option} must be at least 1, got {getattr(given, option)}")
    if min(given.rows) < 1 or len(set(given.rows)) < len(given.rows):
        raise UsageError(f"--rows must be at least 1 and differ, got {given.rows}")
    sizes = {name: getattr(given, name) for name in ("layers", "hidden", "vocab")}
    if given.model == "tiny" and (given.shape or any(sizes.values())):
        raise UsageError("--shape, --layers, --hidden and --vocab are of --model random")
    if given.shape is not None and (given.hidden or given.vocab):
        raise UsageError("--shape says --hidden and --vocab; only --layers may be given beside it")
    if given.device.split(":")[0] == "cuda":
        _need_cuda()
    device = torch.device(given.device)
    facts = {"versions": machine.versions(), "commit": machine.commit(), "seed": given.seed}
    if device.type == "cuda":
        facts |= machine.device_facts(device)
    else:
        torch.set_num_threads(given.threads)
        facts |= {"device": str(device), "threads": given.threads}
    shape = None
    try:
        if given.shape is not None:
            shape = known[given.shape]
            shape = shape if given.layers is None else dataclasses.replace(shape, layers=given.layers)
        elif given.model == "random":
            shape = models.small(*(sizes[name] or default for name, default in zip(sizes, given.size)))
    except models.ModelError as error:
        raise UsageError(str(error)) from None
    facts |= {"model": given.model if shape is None else shape.name, "dtype": given.dtype, "backend": given.backend}
    return models.Models(shape, device, getattr(torch, given.dtype), gap), facts


def _batch(given: argparse.Namespace) -> int:
    from dlm_fast.presets import PRESETS

    from . import batch, batch_report, models, plots, sweep, timing, turns
    from .report import dumps

    presets = given.presets or batch.SHOWN
    known = [name for name in PRESETS if name not in batch.UNFIT]
    if wrong := [name for name in presets if name not in known]:
        raise UsageError(f"--presets must be among {', '.join(known)}, got {', '.join(wrong)}")
    if min(given.requests, given.timed_requests, given.slot_requests) < 0:
        raise UsageError("--requests, --timed-requests and --slot-requests must be at least 0")
    if any(number < 1 for number in given.slots) or len(set(given.slots)) < len(given.slots):
        raise UsageError(f"--slots must be at least 1 and differ, got {given.slots}")
    draws = given.out is not None and not given.no_plots
    if draws and not sweep.has_matplotlib():
        raise UsageError("plots need matplotlib (`pip install matplotlib`), which is not installed; or give --no-plots")
    subjects, facts = _models(given, models.SURE)
    _make(_in(given.out, "batch.json"))
    names = ("rows", "requests", "timed_requests", "slots", "slot_requests", "turns", "seed", "backend")
    work = batch.Work(subjects=subjects, presets=presets, **{name: getattr(given, name) for name in names})
    clock, budget = turns.Clock(subjects.device), timing.Budget(given.seconds, 0)
    document = batch.run(work, facts, clock, budget, lambda line: print(line, flush=True), given.out)
    if draws:
        batch_report.plots(document, given.out)
        if document["timelines"]:
            plots.draw_slots(document["timelines"], given.out / "batch_slots.png")
    if given.json:
        print(dumps(document))
    found = [*document["counts"], *document["times"], *document["slots"]]
    return 1 if any(row["status"] == "FAILED" for row in found) else 0


def _e2e(given: argparse.Namespace) -> int:
    import contextlib

    from . import decoders, e2e, kernel_cache, models, timing, turns
    from .report import dumps

    began = time.monotonic()
    if min(given.prompt, given.new_tokens, given.per_step) < 1:
        raise UsageError("--prompt, --new-tokens and --per-step must be at least 1")
    for option in ("mixed", "slot_mixed"):
        if getattr(given, option) < 0:
            raise UsageError(f"--{option.replace('_', '-')} must be at least 0, got {getattr(given, option)}")
    subjects, facts = _models(given, models.EVEN)
    names = ("prompt", "new_tokens", "per_step", "turns", "mixed", "slot_mixed", "backend", "seed")
    visibilities = tuple(dict.fromkeys(given.visibility))
    setting = decoders.Setting(visibilities, tuple(given.rows), **{name: getattr(given, name) for name in names})
    for visibility in visibilities:
        if (wrong := setting.check(subjects(visibility))) is not None:
            raise UsageError(wrong)
    _make(_in(given.out, "e2e.jsonl"))
    with contextlib.ExitStack() as stack:
        if given.cache is not None:
            try:
                cache = stack.enter_context(kernel_cache.placed(given.cache))
            except kernel_cache.CacheError as error:
                raise UsageError(f"--cache {error}") from None
            print("\n".join(kernel_cache.lines(cache)), flush=True)
        rig = e2e.Rig(
            subjects=subjects,
            checked=subjects.in_float32(e2e.CHECKED_LAYERS),
            mixed=subjects.surer,
            clock=turns.Clock(subjects.device),
            budget=timing.Budget(began + given.seconds - time.monotonic(), 0),
            say=lambda line: print(line, flush=True),
            tell=e2e.Lines(_in(given.out, "e2e.jsonl")),
        )
        stack.callback(rig.tell.close)
        ratios, ok = e2e.run(rig, setting, facts)
    if given.json:
        print(dumps({"ratios": ratios}))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
