"""`kernels`: on a GPU every kernel at every shape; without a GPU the static table and computed floors, which measure
nothing."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import floors, gates, gpu_check, machine, predict, report, static_table
from .shapes import SWEEP_SHAPES, Shapes
from .speed.run import Shape

COMPILE_SECONDS = 1800.0
NAME = "kernels"
STATIC_NAME = "kernels_static"
# Kernels of `dlm_kernels.static` that belong to what is timed; a step uses all.
STATIC_KERNELS = {
    "attention-decode": "attention",
    "attention-ragged": "attention",
    "attention-prefill": "attention",
    "confidence": "confidence",
    "unmask": "unmask",
    "unmask-forms": "unmask",
    "layers": "layers",
    "attention-forms": "attention",
}
NOT_MEASURED = (
    "No CUDA GPU was used: nothing here was measured. It holds facts of compiled code and floors computed from shapes."
)


def choose(models: Sequence[str] | None, ops: Sequence[str] | None) -> tuple[Shapes, tuple[str, ...]]:
    """The shapes and the names of what is timed. Raises ValueError for an unknown name."""
    known = [model.name for model in SWEEP_SHAPES.models]
    for option, wanted, names in (("models", models, known), ("ops", ops, list(gpu_check.TIMINGS))):
        wrong = [value for value in wanted or () if value not in names]
        if wrong:
            raise ValueError(f"--{option} must be among {', '.join(names)}, got {', '.join(wrong)}")
    chosen = tuple(model for model in SWEEP_SHAPES.models if models is None or model.name in models)
    return dataclasses.replace(SWEEP_SHAPES, models=chosen), tuple(
        op for op in gpu_check.TIMINGS if ops is None or op in ops
    )


def measured(
    rig: gpu_check.Rig, out: Path | None, ops: Sequence[str], seed: int | None, seconds: float, plots: bool
) -> int:
    """Ceilings, checks, times, gates, JSON, and a plot for each op. Exit status: 0 every needed check is green, 1 a
    check is red."""

    def finish(result: dict[str, Any]) -> None:
        if out is not None and plots:
            from . import plots as drawing  # needs matplotlib

            for path in drawing.draw(result, out):
                print(f"wrote {path}")

    for line in left_out(rig.shapes, ops):
        print(line)
    return gpu_check.gpu_check(rig, out, seed, seconds, NAME, ops, finish)


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def left_out(shapes: Shapes, ops: Sequence[str]) -> list[str]:
    """What these ops have no rows for, and why."""
    experts = [model.name for model in shapes.models if model.family is None]
    short = [model for model in shapes.models if any(model.prefix(L) < L - 1 for L in shapes.prefill)]
    lines = []
    if "step" in ops and experts:
        reason = "mixtures of experts are bound by which experts the tokens choose"
        lines.append(f"step has no rows for {', '.join(experts)}: {reason}")
    if "slots" in ops and not any(model.family is not None and model.visibility == "full" for model in shapes.models):
        lines.append("slots has no rows: it decodes the first dense model with full visibility")
    if "attention-prefill" in ops and short:
        reach = ", ".join(f"{model.name} beyond {model.reach + 1}" for model in short)
        lines.append(f"attention-prefill has no rows for {reach}: its layers see no more in one window")
    return lines


def listed(shapes: Shapes, ops: Sequence[str]) -> list[Shape]:
    """Every shape of these ops. Nothing is built: neither a device nor a kernel is touched."""
    return [shape for op in ops for shape in gpu_check.TIMINGS[op][0](None, None, shapes)]


def computed(
    out: Path | None,
    shapes: Shapes,
    ops: Sequence[str],
    targets: Sequence[str],
    kernels: Sequence[str],
    jobs: int | None,
    static: bool,
) -> int:
    """The form without a GPU. Exit status: 0, or 1 if a configuration must not ship. Raises StaticError."""
    print(NOT_MEASURED)
    for line in (omitted := left_out(shapes, ops)):
        print(line)
    table: dict[str, Any] | None = None
    if static:
        if not kernels and all(op in STATIC_KERNELS for op in ops) and len(ops) < len(STATIC_KERNELS):
            kernels = tuple(dict.fromkeys(STATIC_KERNELS[op] for op in ops))
        print("\nstatic table: compiled code, by target", flush=True)
        table = static_table.static_table(targets, kernels, jobs)
        print(table.pop("text"))
        for violation in table["violations"]:
            print(f"VIOLATION: {violation}")
    result = {
        "command": NAME,
        "schema": report.SCHEMA,
        "measured": False,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "note": NOT_MEASURED,
        "cards": {card: {"copy_tb_s": copy, "gemm_tflop_s": gemm} for card, (copy, gemm) in floors.CARDS.items()},
        "left_out": omitted,
        "static": table,
        "assumed": predict.ASSUMED,
        "floors": [_floor(shape, shapes, table["kernels"] if table else ()) for shape in listed(shapes, ops)],
    }
    text = floor_lines(result)
    for line in ["", *text]:
        print(line)
    verdicts = gates.lines(gates.evaluate(result))
    print("\ngates")
    for line in verdicts:
        print("    " + line)
    line = report.dumps(result)
    if out is not None:
        (out / f"{STATIC_NAME}.json").write_text(line + "\n", encoding="utf-8")
        (out / f"{STATIC_NAME}.md").write_text(_page(result, text, verdicts), encoding="utf-8")
    print(line)
    return 1 if table and table["violations"] else 0


def _floor(shape: Shape, shapes: Shapes, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a shape cannot do without, and what its compiled code is predicted to take."""
    cost, model = shape.cost, next((model for model in shapes.models if model.name == shape.model), None)
    predicted = {card: predict.predicted_us(rows, model, shape.facts, copy) for card, (copy, _) in floors.CARDS.items()}
    return {
        "op": shape.op,
        "model": shape.model,
        "shape": shape.label,
        "nbytes": report.rounded(cost.nbytes),
        "flops": report.rounded(cost.flops),
        "floor_us": {card: report.rounded(cost.floor_us(*ceilings)) for card, ceilings in floors.CARDS.items()},
        "predicted_us": {card: None if us is None else report.rounded(us) for card, us in predicted.items()},
        "facts": shape.facts,
    }


def floor_lines(result: dict[str, Any]) -> list[str]:
    """The computed floors and the predicted times as text."""
    cards = list(result["cards"])
    ceilings = "; ".join(
        f"{card} {c['copy_tb_s']} TB/s, {c['gemm_tflop_s']:g} TFLOP/s" for card, c in result["cards"].items()
    )
    lines = [
        f"computed floors (not measured), microseconds at assumed ceilings: {ceilings}",
        f"predicted times (computed from the code for {predict.TARGET}, not measured), assuming {result['assumed']}",
        f"{'op':18}{'model':24}{'shape':58}{'MB':>10}{'GFLOP':>11}"
        + "".join(f"{card + ' floor':>12}{'predicted':>11}" for card in cards),
    ]
    for row in result["floors"]:
        numbers = f"{row['nbytes'] / 1e6:10.4g}{row['flops'] / 1e9:11.4g}"
        for card in cards:
            predicted = row["predicted_us"][card]
            numbers += f"{row['floor_us'][card]:12.4g}" + ("-".rjust(11) if predicted is None else f"{predicted:11.4g}")
        lines.append(f"{row['op']:18}{row['model']:24}{row['shape']:58}" + numbers)
    return lines


def _page(result: dict[str, Any], floor_text: list[str], verdicts: list[str]) -> str:
    """What was printed, as a page with headings."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [
        "# Kernels without a GPU",
        f"Written by `python -m bench kernels`, commit {result['commit']}, {versions}.\n\n**{result['note']}**",
    ]
    if result["static"] is not None:
        kernels = result["static"]["kernels"]
        names = (
            "kernel", "config", "target", "registers", "spills", "shared_bytes", "mma", "barriers", "loops",
            "instructions_per_element",
        )  # fmt: skip
        heading = f"## Static table\n\n{len(kernels)} binaries, {len(result['static']['violations'])} violations."
        rows = [" | ".join(_cell(row[name]) for name in names) for row in kernels]
        parts += [
            heading,
            "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", *(f"| {row} |" for row in rows)]),
        ]
    for title, text in (("Computed floors and predicted times", floor_text), ("Gates", verdicts)):
        parts += [f"## {title}", "\n".join(["```text", *text, "```"])]
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{instructions}/{barriers}" for instructions, barriers in value) or "-"
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
