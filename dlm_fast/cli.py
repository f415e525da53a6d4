"""The command `dlm-fast` with its subcommands demo, generate, inspect, doctor, presets and compile-report."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .version import __version__

# The options of a preset that have a flag, with their types; --set reaches every other option.
OPTION_TYPES = {
    "block_length": int,
    "cache": str,
    "rule": str,
    "score": str,
    "threshold": float,
    "factor": float,
    "entropy_bound": float,
    "min_unmask": int,
    "steps_per_block": int,
    "stop": str,
}


def _setting(text: str) -> tuple[str, Any]:
    """Name and value of NAME=VALUE, where the value is a JSON number, true, false, null, or a plain word."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


# The flags that say how a model sees, which are fields of its `DiffusionConfig`.
DIFFUSION_FLAGS = ("mask_token_id", "visibility", "block_alignment", "logits_row")
# The flags that say how a model that is opened runs, and nothing about the checkpoint.
RUNNING = ("fuse_layers", "max_positions", "max_rows")
# Flags of other decoders' commands, with the flags that mean the same here.
FOREIGN_FLAGS = {
    "--steps": "--steps-per-block = steps / blocks",
    "--gen-length": "--max-new-tokens",
    "--max-tokens": "--max-new-tokens",
    "--block-size": "--block-length",
    "--remasking": "--score",
    "--alg": "--score",
}


def option_names() -> tuple[str, ...]:
    """The names of a preset's options."""
    from .presets import FIELDS

    return FIELDS


class Parser(argparse.ArgumentParser):
    """An argument parser that takes whole names of flags only, and suggests a flag for a wrong one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        namespace, unknown = super().parse_known_args(args, namespace)
        flags = [flag.partition("=")[0] for flag in unknown if flag.startswith("--")]
        if flags:
            hints = [f"{flag}: use {suggestion}" for flag in flags if (suggestion := self._suggestion(flag))]
            self.error("; ".join([f"unrecognized arguments: {' '.join(unknown)}", *hints]))
        return namespace, unknown

    def _suggestion(self, flag: str) -> str:
        """The flags that a wrong flag may have meant, as text; empty without any."""
        known = list(self._option_string_actions)
        name = flag.replace("_", "-")
        foreign = FOREIGN_FLAGS.get(name, "")
        if foreign.partition(" ")[0] in known:
            return foreign
        option = flag.removeprefix("--").replace("-", "_")
        if "--set" in known and option in option_names():
            return f"--set {option}=VALUE"
        longer = [other for other in known if other.startswith(name)]
        return " or ".join(longer or difflib.get_close_matches(name, known, 1))


MODEL_HELP = "a folder, an id of the Hub such as GSAI-ML/LLaDA-8B-Instruct, or an embedded model such as tiny-full"
BLOCK_LENGTH_HELP = "positions of a block, with --visibility block"
DTYPES = ("bfloat16", "float16", "float32")


def _opening_flags() -> Parser:
    """The flags of the commands that open a checkpoint."""
    flags = Parser(add_help=False)
    group = flags.add_argument_group("the checkpoint")
    group.add_argument("--revision", default=None, help="branch, tag or commit of a repository of the Hub")
    group.add_argument(
        "--adapter", default=None, help="a LoRA adapter to merge; none: without the one beside the weights"
    )
    group.add_argument("--dtype", default=None, help=f"{', '.join(DTYPES)} (default: as stored)")
    group.add_argument(
        "--fuse-layers",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run layers in few launches (default: where every module of theirs is known)",
    )
    group.add_argument("--max-positions", type=int, default=None, help="most positions of a row, prompt and new tokens")
    group.add_argument("--max-rows", type=int, default=None, help="most rows that are decoded together")
    group.add_argument("--mask-token-id", type=int, default=argparse.SUPPRESS, help="where no file says the mask's id")
    group.add_argument("--visibility", default=argparse.SUPPRESS, help="full, or block with --block-length")
    group.add_argument("--block-alignment", default=argparse.SUPPRESS, help="rel (behind the prompt), abs or both")
    group.add_argument("--logits-row", default=argparse.SUPPRESS, help="self or previous")
    return flags


def _opening(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load` that say what is opened and how the model sees, without the device."""
    import torch

    if args.dtype is not None and args.dtype not in DTYPES:
        raise ValueError(f"--dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {args.dtype!r}")
    diffusion = {name: getattr(args, name) for name in DIFFUSION_FLAGS if hasattr(args, name)}
    if diffusion.get("visibility") == "block" and hasattr(args, "block_length"):
        diffusion["block_length"] = args.block_length  # a block-causal model must have one
    return {
        "revision": args.revision,
        "diffusion": diffusion or None,
        "dtype": None if args.dtype is None else getattr(torch, args.dtype),
        "adapter": False if args.adapter == "none" else args.adapter,
        "fuse_layers": args.fuse_layers,
        "max_positions": args.max_positions,
        "max_rows": args.max_rows,
    }


def _no_opening(args: argparse.Namespace, command: str) -> None:
    """Raises ValueError for a flag that says how a checkpoint is opened, where a command opens none."""
    names = ("revision", "adapter", "dtype", *RUNNING, *DIFFUSION_FLAGS, "block_length")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name, None) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} {'goes' if len(given) == 1 else 'go'} with a model, got {command}")


def _block_length_of_model(args: argparse.Namespace) -> None:
    """Raises ValueError for a --block-length that says nothing of the model."""
    if hasattr(args, "block_length") and getattr(args, "visibility", None) != "block":
        raise ValueError(f"--block-length goes with --visibility block here, got --block-length {args.block_length}")


def _parser() -> Parser:
    # 1. What the subcommands share.
    parser = Parser(prog="dlm-fast", description="Fast, exact decoding of diffusion language models.")
    parser.add_argument("--version", action="version", version=f"dlm-fast {__version__}")
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    where = Parser(add_help=False)
    where.add_argument("--backend", default="auto", help="auto, triton, cpu or reference (default: auto)")
    where.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    opened = _opening_flags()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    # 2. demo
    demo = commands.add_parser(
        "demo", parents=[common, where], help="watch the embedded models decode, and a small table"
    )
    demo.add_argument("--per-task", type=int, default=None, help="held-out prompts of each task (default: 15)")
    demo.add_argument("--seed", type=int, default=None, help="which held-out prompts (default: 0)")
    demo.add_argument(
        "--svg", type=Path, metavar="FILE", help="draw one decode step by step, as the README shows it, and no more"
    )

    # 3. generate
    gen = commands.add_parser("generate", parents=[common, where, opened], help="decode prompts with a checkpoint")
    gen.add_argument("--model", required=True, help=MODEL_HELP)
    prompts = gen.add_argument_group("prompts and results")
    source = prompts.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    source.add_argument(
        "--input",
        type=Path,
        help='JSON lines: {"prompt": text, chat or ids} or {"canvas": ids}; optional "id" and "meta", which the result '
        'repeats, and "max_new_tokens", "min_new_tokens", "temperature", "seed", "stop" and "system" of the line; a '
        'line that cannot be decoded gets finish "error"',
    )
    prompts.add_argument("--output", type=Path, help="JSON lines, one per prompt; required with --input")
    prompts.add_argument("--restart", action="store_true", help="discard what a broken run left, and do not resume it")
    prompts.add_argument("--overwrite", action="store_true", help="replace an existing output")
    prompts.add_argument(
        "--strict", action="store_true", help="decode nothing if a line cannot be decoded (default: it says so itself)"
    )
    prompts.add_argument("--keep-keys", action="store_true", help="repeat the other keys of a line in its result")
    prompts.add_argument(
        "--shapes", action="store_true", help="print which shapes the steps had, and what they wasted; without --output"
    )
    prompts.add_argument("--raw", action="store_true", help="give text prompts as they are, without the chat template")
    prompts.add_argument(
        "--batch-size",
        type=int,
        default=None,
        help="prompts decoded together (default: all; in a job 16, or --max-rows)",
    )

    decoding = gen.add_argument_group("decoding")
    decoding.add_argument(
        "--preset",
        default=None,
        help="a decoder of `dlm-fast presets` (default: the published one of the model's family, with its settings)",
    )
    decoding.add_argument("--max-new-tokens", type=int, default=128, help="tokens behind a prompt (default: 128)")
    decoding.add_argument("--min-new-tokens", type=int, default=0, help="tokens before which no text ends (default: 0)")
    published = "(default: the family's published one where no --preset is given, else {})"
    decoding.add_argument(
        "--temperature", type=float, default=None, help=f"of the draws; 0 = greedy {published.format(0)}"
    )
    decoding.add_argument(
        "--top-k", type=int, default=0, help="draw among the k most likely tokens; 0 = all; not at temperature 0"
    )
    decoding.add_argument(
        "--top-p",
        type=float,
        default=None,
        help=f"draw among the likeliest of this mass; 1 = all; not at temperature 0 {published.format(1)}",
    )
    decoding.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    decoding.add_argument("--stop-string", action="append", default=[], help="ends a text; may be repeated")
    decoding.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any option of the preset or its policies; may be repeated",
    )
    for name, kind in OPTION_TYPES.items():
        decoding.add_argument(
            "--" + name.replace("_", "-"), type=kind, default=argparse.SUPPRESS, help=f"replaces the preset's {name}"
        )
    decoding.add_argument(
        "--inclusive", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help="score >= threshold"
    )

    # 4. inspect
    see = commands.add_parser(
        "inspect",
        parents=[common, opened],
        help="what a checkpoint is, before it is loaded; --families: what opens",
        description="What load would open and generate would use. No weights are read, and none are fetched. "
        "The exit status is 1 where load or generate would refuse.",
    )
    see.add_argument("--block-length", type=int, default=argparse.SUPPRESS, help=BLOCK_LENGTH_HELP)
    see.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    see.add_argument("--families", action="store_true", help="the support table instead of a model")
    see.add_argument("--markdown", action="store_true", help="the table as docs/models.md, which is made by this")

    # 5. doctor, presets and compile-report
    doctor = commands.add_parser(
        "doctor", parents=[common, where, opened], help="versions, GPU, which op runs where and why"
    )
    doctor.add_argument("--block-length", type=int, default=argparse.SUPPRESS, help=BLOCK_LENGTH_HELP)
    doctor.add_argument("--model", default=None, help=f"load this one too: {MODEL_HELP}")
    table = commands.add_parser("presets", parents=[common], help="the table of decoders")
    table.add_argument("--markdown", action="store_true", help="as docs/decoders.md, which is made by this")
    report = commands.add_parser(
        "compile-report", parents=[common], help="compile every kernel for six GPU targets, without a GPU"
    )
    report.add_argument("--kernel", action="append", default=None, help="only this kernel; may be repeated")
    report.add_argument(
        "--target",
        type=int,
        action="append",
        default=None,
        help="only this compute capability, e.g. 90; may be repeated",
    )
    return parser


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    """Shows the embedded models decode, or draws one decode; returns the report of --json."""
    from .tiny import demo, trace

    choices = {name: getattr(args, name) for name in ("per_task", "seed") if getattr(args, name) is not None}
    if args.svg is not None:
        if choices:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in choices)
            raise ValueError(f"--svg draws one decode, always the same, and goes without {flags}")
        drawn = trace.write(args.svg, backend=args.backend, device=args.device)
        if not args.json:
            print(f"{args.svg}: {drawn.model}, preset {drawn.preset}, {drawn.length} tokens in {drawn.nfe} forwards")
        return {"svg": str(args.svg), **dataclasses.asdict(drawn)}
    if choices.get("per_task", 1) < 1:
        raise ValueError(f"--per-task must be at least 1, got {args.per_task}")
    return demo.run(backend=args.backend, device=args.device, quiet=args.json, **choices)


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    """Decodes prompts with a checkpoint; returns the report of --json, empty but of the first rank of a job."""
    from . import jobs
    from .presets import FIELDS

    # 1. Read the arguments.
    if args.input is not None and args.output is None:
        raise ValueError("--input needs --output")
    if args.shapes and args.output is not None:
        raise ValueError("--shapes goes with --prompt, and without --output")
    of_jobs = [flag for flag in ("restart", "overwrite", "strict", "keep_keys") if getattr(args, flag)]
    if of_jobs and args.output is None:
        raise ValueError(f"--{of_jobs[0].replace('_', '-')} goes with --output")
    opening = _opening(args)
    settings = {
        "preset": args.preset,
        "max_new_tokens": args.max_new_tokens,
        "min_new_tokens": args.min_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "stop_strings": args.stop_string,
        **{name: getattr(args, name) for name in FIELDS if hasattr(args, name)},
        **dict(args.set),
    }
    if args.output is not None:
        jobs.check_places(args.output, source=args.input, overwrite=args.overwrite)
    if args.prompt:
        lines = jobs.lines_of([{"prompt": prompt} for prompt in args.prompt], settings, name="--prompt")
    else:
        lines = jobs.read_lines(args.input, settings, keep_keys=args.keep_keys)

    # 2. Decode. An output is a job, which ranks may share.
    if args.output is None:
        return _decoded(args, opening, lines, settings, jobs.Ranks())
    ranks = jobs.Ranks.of_environment()
    with ranks.joined():
        return _decoded(args, opening, lines, settings, ranks)


def _decoded(
    args: argparse.Namespace, opening: dict[str, Any], lines: Any, settings: dict[str, Any], ranks: Any
) -> dict[str, Any]:
    """Opens the model and decodes lines, as a job or to be printed; returns the report of --json."""
    import torch

    from . import jobs
    from .loading import load
    from .patching import handle_of

    # 1. Open the model. Text becomes a chat where the tokenizer has a chat template, unless --raw is given.
    device = args.device
    if device is None and ranks.count > 1 and torch.cuda.is_available():
        device = f"cuda:{ranks.local}"  # each rank has one of its own
    model = load(args.model, backend=args.backend, device=device, **opening)
    tokenizer, most = handle_of(model).tokenizer, handle_of(model).max_rows
    chats = not args.raw and getattr(tokenizer, "chat_template", None) is not None

    def wrap(prompt: Any) -> Any:
        return [{"role": "user", "content": prompt}] if chats and isinstance(prompt, str) else prompt

    if args.output is None:
        return _print_texts(args, model, lines, wrap, settings)

    # 2. With an output file: run a job, with a bar of its progress on stderr.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not ranks.leads) as bar:
        task = bar.add_task("decoding", total=len(lines))
        resumed = jobs.run(
            model,
            lines,
            args.output,
            settings=settings,
            batch_size=min(16, most or 16) if args.batch_size is None else args.batch_size,
            source={"raw": args.raw},
            strict=args.strict,
            restart=args.restart,
            overwrite=args.overwrite,
            wrap_prompt=wrap,
            ranks=ranks,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            warn=lambda message: (
                bar.console.print(message, markup=False, highlight=False, soft_wrap=True) if ranks.leads else None
            ),
        )
    if not ranks.leads:
        return {}
    if not args.json:
        print(f"{len(lines)} results in {args.output}" + (f" ({resumed} from the broken run)" if resumed else ""))
    return {"output": str(args.output), "records": len(lines), "resumed": resumed}


def _print_texts(
    args: argparse.Namespace, model: Any, lines: list[Any], wrap: Callable[[Any], Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Decodes prompts as one batch, and prints the texts; returns the report of --json."""
    from . import jobs
    from .generate import DecodeError, generate

    # 1. Decode. If a row failed, the others are good all the same.
    failed: list[str] = []
    try:
        prompts = [wrap(line.record["prompt"]) for line in lines]
        out = generate(model, prompts, batch_size=args.batch_size, **settings)
    except DecodeError as error:
        if len(error.rows) == len(lines):
            raise
        failed, out = [str(error)], error.output
    results = [jobs.result_line(out, index, index, line) for index, line in enumerate(lines)]

    # 2. Print.
    if not args.json:
        for result in results:
            text = result["text"] if result["text"] is not None else result["ids"]
            print("" if result["finish"] in ("error", "unfinished") else text)
    if args.shapes and not args.json:
        for shape, steps in sorted(out.shapes.items()):
            drafts = f" x {shape.drafts} drafts" if shape.drafts > 1 else ""
            print(f"{steps:6} {shape.kind} steps of {shape.rows} rows x {shape.width} positions{drafts}")
        print(f"{out.computed_tokens} positions computed, {sum(out.query_tokens)} needed")
    for message in failed:
        print(f"dlm-fast generate: {message}", file=sys.stderr)
    shapes = [{**shape._asdict(), "steps": steps} for shape, steps in sorted(out.shapes.items())]
    computed = {"computed_tokens": out.computed_tokens, "query_tokens": sum(out.query_tokens)}
    report = {"results": results, "preset": out.preset.name, "wall_time": out.wall_time, "shapes": shapes, **computed}
    return {**report, "failed": failed} if failed else report


def _inspect(args: argparse.Namespace) -> dict[str, Any]:
    """Prints what a checkpoint is, or the support table; returns the report of --json."""
    from . import support
    from .inspection import inspect_checkpoint, lines

    # 1. The support table.
    if args.model is None:
        _no_opening(args, "inspect --families")
    if args.families == (args.model is not None):
        raise ValueError("give a model, or --families for the support table")
    if args.markdown and not args.families:
        raise ValueError("--markdown goes with --families")
    if args.families:
        if args.markdown and not args.json:
            print(support.markdown(), end="")
        elif not args.json:
            print("\n".join(support.lines()))
        return support.support()

    # 2. One checkpoint.
    _block_length_of_model(args)
    # Limits are of decodes, and say nothing of a checkpoint.
    report = inspect_checkpoint(args.model, **{name: v for name, v in _opening(args).items() if name not in RUNNING})
    if not args.json:
        print("\n".join(lines(report)))
    return report


def _doctor(args: argparse.Namespace) -> dict[str, Any]:
    """Reports versions, the GPU, and which op runs where and why; returns the report of --json."""
    import torch

    from .files import EMBEDDED
    from .loading import load
    from .patching import explain

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    if args.model is None:
        _no_opening(args, "doctor")
    else:
        _block_length_of_model(args)

    # 1. Gather the facts.
    report: dict[str, Any] = {
        "dlm_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {p: version(p) for p in ("torch", "triton", "transformers", "safetensors", "tokenizers", "numpy")},
        "gpu": None,
        "triton_interpreter": os.environ.get("TRITON_INTERPRET") == "1",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        report["gpu"] = {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    report["embedded"] = {}
    for name in EMBEDDED:
        try:
            report["embedded"][name] = explain(load(name, backend=args.backend, device=args.device))
        except NotImplementedError as error:  # the GPU has no kernels, which is what the report must say
            report["embedded"][name] = {"refused": str(error)}
    report["model"] = None
    if args.model is not None:
        opening = _opening(args)
        try:
            report["model"] = explain(load(args.model, backend=args.backend, device=args.device, **opening))
        except Exception as error:  # whatever keeps the model from opening is what the report must say
            if args.debug:
                raise
            report["model"] = {"refused": str(error)}
            report["refused"] = [str(error)]

    # 2. Print the facts.
    if not args.json:
        print(f"dlm-fast {__version__}, Python {report['python']}, {report['platform']}")
        for package, number in report["packages"].items():
            print(f"  {package:14}{number or 'not installed'}")
        gpu = report["gpu"]
        print(
            f"GPU: {gpu['name']}, {gpu['capability']}, {gpu['memory_gib']} GiB, CUDA {gpu['cuda']}"
            if gpu
            else "GPU: none that torch can use"
        )
        examined = {**report["embedded"], **({} if args.model is None else {args.model: report["model"]})}
        for name, facts in examined.items():
            if "refused" in facts:
                print(f"{name}: {facts['refused']}")
                continue
            print(f"{name}: {facts['model']} on {facts['device']}, visibility {facts['visibility']}")
            for op, where in facts["ops"].items():
                print(f"  {op:16}{where}  ({facts['reason']})")
            for setting, row in facts["settings"].items() if name == args.model else ():
                print(f"  {setting:16}{row['value']}  ({row['source']})")
    return report


def _presets(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the table of presets; returns the report of --json."""
    from .presets import PRESETS, describe
    from .presets.page import markdown

    rows = [describe(preset) for preset in PRESETS.values()]
    if args.markdown and not args.json:
        print(markdown(), end="")
    elif not args.json:
        print(f"{'preset':18}{'model':7}{'schedule':10}{'cache':10}{'rule':11}{'policy':22}{'exactness':12} source")
        for row in rows:
            policy = ", ".join(p["name"] for p in row["policies"]) or ("drafts" if row["drafts"] > 1 else "-")
            exactness, source = row["exactness"].split(":")[0], row["source"]
            choices = f"{row['visibility']:7}{row['schedule']:10}{row['cache']:10}{row['rule']:11}{policy:22}"
            print(f"{row['name']:18}{choices}{exactness:12} {source}")
            if row["needs"]:
                print(f"{'':18}needs {row['needs']}")
    return {"presets": rows}


def _compile_report(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles the kernels for several GPU targets, without a GPU; returns the report of --json."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError("compile-report needs the package triton, which is not installed")
    from dlm_kernels import static

    results = static.report(**({"capabilities": tuple(args.target)} if args.target else {}), kernels=args.kernel)
    if not args.json:
        static.print_table(results)
    broken = static.violations(results)
    for line in broken:
        print(f"violation: {line}", file=sys.stderr)
    report = {"kernels": [static.as_dict(r) for r in results]}
    if broken:
        report["violations"] = [str(line) for line in broken]
    return report


COMMANDS = {
    "demo": _demo,
    "generate": _generate,
    "inspect": _inspect,
    "doctor": _doctor,
    "presets": _presets,
    "compile-report": _compile_report,
}


class Terminated(KeyboardInterrupt):
    """The process was told to end, by the signal of this number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def _signals_end_as_an_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does, and not in the middle of a step. A signal that is ignored, as
    under nohup, stays ignored."""

    def end(number: int, frame: Any) -> None:
        raise Terminated(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors are one line on stderr unless --debug is given."""
    args = _parser().parse_args(argv)
    try:
        with _signals_end_as_an_interrupt():
            import transformers

            # The bar that transformers shows for loading weights would run through our bar.
            transformers.utils.logging.disable_progress_bar()
            report = COMMANDS[args.command](args)
        if args.json and report:
            print(json.dumps(report))
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        # A decode that is interrupted raises an error of its own, whose cause is the signal's.
        number = getattr(error.__cause__ or error, "number", int(signal.SIGINT))
        how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        text = f"{how}; what was finished is kept"
        print(f"dlm-fast: {text}", file=sys.stderr)
        if args.json:
            print(json.dumps({"error": {"type": "KeyboardInterrupt", "message": text}}))
        return 128 + number
    except BrokenPipeError:
        # Who read our output has enough of it. Python would complain again when it flushes the stream at its exit.
        with contextlib.suppress(OSError):  # it may be no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + int(signal.SIGPIPE)
    except Exception as error:
        if args.debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"dlm-fast {args.command}: {text}", file=sys.stderr)
        if args.json:
            print(json.dumps({"error": {"type": type(error).__name__, "message": text}}))
        return 1
    return 1 if any(report.get(name) for name in ("violations", "refused", "failed")) else 0


if __name__ == "__main__":
    sys.exit(main())
