"""`python -m bench gates RESULT.json`: what the kernels are held to, as ratios that are computed from one result file.

A gate that the file has no rows for is "not measured", never met. Every gate is judged by the worst of its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Names of candidates, as the modules that time them spell them; strings, so that a file can be judged without torch.
UNSPLIT, DENSE, FLEX = "ours, unsplit", "ours, everything visible", "FlexAttention, compiled"
EAGER, FLOAT64 = "argmax + softmax + gather", "argmax + softmax + gather, float64"
LOOP = "loop over rows, launched by the host"
FROM_MEMORY = ("ours, from memory", "ours, from memory, tile of long regions")
PUBLISHED = "whole canvas, no cache, launched by the host"
FEWER_LAYERS = "layers: no more fit in this GPU's memory"

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
# Largest window queries x group of a class, and the share of copy bandwidth that it must reach.
DECODE_CLASSES = ((64, 0.75), (128, 0.65), (224, 0.5))
UNMASK_FORM_LANES = (32, 128)
LARGE_KV = 30e6  # bytes of keys and values a layer, below which a launch is not bound by memory
LONG = 32768  # a prefix from which the split form and its combine, two launches, are bound by memory even at 4 KV heads
CARDS = ("H100", "H200")  # judged apart: the same multiprocessors, and memories of different bandwidth
STATIC_TARGETS = 6
INSTRUCTIONS_PER_ELEMENT = 10.5


@dataclasses.dataclass(frozen=True)
class Gate:
    """One line of the table.

    Attributes:
        value: the worst value that was measured.
        detail: the row of that value, out of how many rows; or why there is no value.
    """

    goal: str
    rule: str
    value: float | None
    verdict: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One shape with its candidates by name, each with a time."""

    name: str
    facts: dict[str, Any]
    times: dict[str, dict[str, Any]]

    @property
    def ours(self) -> dict[str, Any]:
        return self.times["ours"]

    @property
    def W_x_G(self) -> int:
        return self.facts["W"] * self.facts["G"]

    def over_ours(self, candidate: str) -> float | None:
        """A candidate's time over ours: how many times faster we are."""
        return self.times[candidate]["p50_us"] / self.ours["p50_us"] if candidate in self.times else None

    def best_baseline(self) -> float | None:
        baselines = [row["p50_us"] for name, row in self.times.items() if not name.startswith("ours")]
        return min(baselines) / self.ours["p50_us"] if baselines else None


def evaluate(document: dict[str, Any]) -> list[Gate]:
    """Every gate of a result file of `kernels` or `gpu-check`."""
    rows = list(_rows(document.get("timings", ())))
    ceilings = document.get("ceilings") or {}
    copy, gemm = ceilings.get("copy_tb_s"), ceilings.get("gemm_tflop_s")
    decode = [r for r in rows if r.facts.get("kind") == "decode"]
    return [
        *_decode(decode, copy, document.get("device", "")),
        *_prefill([r for r in rows if r.facts.get("kind") == "prefill" and r.facts["L"] >= 4096], gemm),
        *_confidence([r for r in rows if r.facts.get("kind") == "confidence"], copy, document.get("device", "")),
        *_unmask([r for r in rows if r.facts.get("kind") == "unmask" and r.facts["lanes"] == 32]),
        *_unmask_forms([r for r in rows if r.facts.get("kind") == "unmask-forms"]),
        *_step(rows),
        *_static(document.get("static")),
    ]


def _rows(timings: Iterable[dict[str, Any]]) -> Iterator[Row]:
    shapes: dict[tuple[str, str, str], Row] = {}
    for timing in timings:
        key = timing["op"], timing["model"], timing["shape"]
        row = shapes.setdefault(key, Row(f"{key[1]} {key[2]}", timing.get("facts", {}), {}))
        if timing["status"] == "ok":
            row.times[timing["candidate"]] = timing
    yield from (row for row in shapes.values() if "ours" in row.times)


def _gate(
    goal: str, rule: str, rows: Iterable[Row], value: Callable[[Row], float | None], bound: float, at_most: bool = False
) -> Gate:
    """The worst value of the rows, judged against a bound."""
    values = [(taken, row.name) for row in rows if (taken := value(row)) is not None]
    if not values:
        return Gate(goal, rule, None, NOT_MEASURED, "no row with the times it needs")
    worst, name = max(values) if at_most else min(values)
    met = worst <= bound if at_most else worst >= bound
    return Gate(goal, rule, worst, MET if met else MISSED, f"worst of {len(values)}: {name}")


def _shares_of_copy(
    goal: str, rows: list[Row], copy: float | None, device: str, bounds: dict[str, float], where: str
) -> Iterator[Gate]:
    """A gate for each card: the share of copy bandwidth that the rows must reach on it."""
    for card, bound in bounds.items():
        rule = f"share of copy bandwidth >= {bound}{where} on {card}"
        if card in device:
            yield _gate(goal, rule, rows, lambda r: _share_of_copy(r, copy), bound)
        else:
            yield Gate(goal, rule, None, NOT_MEASURED, f"the file is of {device or 'no GPU'}")


def _share_of_copy(row: Row, copy: float | None) -> float | None:
    return row.ours["nbytes"] / row.ours["p50_us"] / 1e6 / copy if copy else None


def _decode(rows: list[Row], copy: float | None, device: str) -> Iterator[Gate]:
    large, goal = [r for r in rows if r.facts["kv_bytes"] >= LARGE_KV], "decode attention, >= 30 MB KV a layer"
    equal = [r for r in large if r.facts["equal"]]
    above = 0
    for largest, bound in DECODE_CLASSES:
        chosen = [r for r in equal if above < r.W_x_G <= largest]
        where = f" at {above} < W x G <= {largest}"
        yield from _shares_of_copy(goal, chosen, copy, device, dict.fromkeys(CARDS, bound), where)
        above = largest
    yield _gate(goal, "best torch baseline / ours >= 1.0", large, Row.best_baseline, 1.0)
    special = [r for r in large if not r.facts["equal"] or r.facts["G"] == 7]
    yield _gate(
        goal, "best torch baseline / ours >= 1.3 where lengths differ or G = 7", special, Row.best_baseline, 1.3
    )
    single = [r for r in rows if r.facts["B"] == 1 and r.facts["prefix"] >= 4096]
    memory_bound = [
        r
        for r in single
        if r.W_x_G <= DECODE_CLASSES[-1][0] and (r.facts["kv_bytes"] >= LARGE_KV or r.facts["prefix"] >= LONG)
    ]
    goal = "decode attention, B=1, >= 30 MB KV a layer or prefix >= 32k"
    yield from _shares_of_copy(goal, memory_bound, copy, device, dict.fromkeys(CARDS, 0.5), " at W x G <= 224")
    goal = "decode attention, B=1, prefix >= 4k"
    few_heads = [r for r in single if r.facts["kv_heads"] == 4]
    yield _gate(goal, "our unsplit form / ours >= 5 at 4 KV heads", few_heads, lambda r: r.over_ours(UNSPLIT), 5.0)


def _prefill(rows: list[Row], gemm: float | None) -> Iterator[Gate]:
    goal = "prefill, L >= 4k"

    def rate(row: Row) -> float | None:
        return row.ours["flops"] / row.ours["p50_us"] / 1e6 / gemm if gemm else None

    def dense(row: Row) -> float | None:
        return 1 / row.over_ours(DENSE) if DENSE in row.times else None

    yield _gate(goal, "share of the GEMM rate >= 0.48", rows, rate, 0.48)
    yield _gate(goal, "ours / ours with everything visible <= 0.55", rows, dense, 0.55, at_most=True)
    yield _gate(goal, "compiled FlexAttention / ours >= 1.0", rows, lambda r: r.over_ours(FLEX), 1.0)


def _confidence(rows: list[Row], copy: float | None, device: str) -> Iterator[Gate]:
    goal = "confidence with top-2, N >= 256"
    large = [r for r in rows if r.facts["N"] >= 256 and "second" in r.facts["outputs"]]
    bf16, fp32 = ([r for r in large if r.facts["dtype"] == dtype] for dtype in ("bf16", "fp32"))
    yield from _shares_of_copy(goal, bf16, copy, device, {"H100": 0.75, "H200": 0.65}, ", bf16")
    yield _gate(goal, "share of copy bandwidth >= 0.85, fp32", fp32, lambda r: _share_of_copy(r, copy), 0.85)
    plain = [r for r in bf16 if r.facts["outputs"] == ["second"]]
    yield _gate(goal, "eager softmax path / ours >= 3", plain, lambda r: r.over_ours(EAGER), 3.0)
    yield _gate(goal, "float64 form / ours >= 10", plain, lambda r: r.over_ours(FLOAT64), 10.0)
    small = [r for r in rows if r.facts["N"] == 32 and r.facts["outputs"] == ["second"] and r.ours.get("graph")]
    yield _gate("confidence, N = 32", "<= 8 us in a graph", small, lambda r: r.ours["p50_us"], 8.0, at_most=True)


def _unmask(rows: list[Row]) -> Iterator[Gate]:
    captured = [r for r in rows if r.ours.get("graph")]
    rule = "no device-to-host read (captured in a graph: 1)"
    yield _gate("unmask", rule, rows, lambda r: float(bool(r.ours.get("graph"))), 1.0)
    large = [r for r in captured if r.facts["B"] == 128]
    yield _gate("unmask", "<= 4 us at B = 128", large, lambda r: r.ours["p50_us"], 4.0, at_most=True)
    eight = [r for r in rows if r.facts["B"] == 8]
    yield _gate("unmask", "loop over rows / ours >= 100 at B = 8", eight, lambda r: r.over_ours(LOOP), 100.0)
    yield Gate("unmask", "one launch", None, NOT_MEASURED, "not a time: the test suite counts launches")


def _unmask_forms(rows: list[Row]) -> Iterator[Gate]:
    """Whether the table of tiles is right to keep regions of so many lanes in registers."""

    def fastest_from_memory(row: Row) -> float | None:
        return min((row.over_ours(name) for name in FROM_MEMORY if name in row.times), default=None)

    for lanes in UNMASK_FORM_LANES:
        chosen = [r for r in rows if r.facts["lanes"] == lanes]
        yield _gate(
            "unmask forms", f"from memory / in registers >= 1.0 at {lanes} lanes", chosen, fastest_from_memory, 1.0
        )


def _step(rows: list[Row]) -> Iterator[Gate]:
    goal = "denoise step, LLaDA-8B, B=1, prefix 1k"
    chosen = [r for r in rows if r.facts.get("kind") == "step" and r.name.startswith("LLaDA-8B ")]
    chosen = [
        r
        for r in chosen
        if (r.facts["B"], r.facts["prefix"]) == (1, 1024) and FEWER_LAYERS not in r.ours.get("note", "")
    ]
    graphed = [r for r in chosen if r.ours.get("graph")]
    yield _gate(goal, "time / floor <= 1.3 in a graph", graphed, lambda r: 1 / r.ours["share"], 1.3, at_most=True)
    yield _gate(goal, "published eager loop / ours >= 2.5", graphed, lambda r: r.over_ours(PUBLISHED), 2.5)


def _static(static: dict[str, Any] | None) -> Iterator[Gate]:
    goal = "static"
    if static is None:
        for rule in (
            f"instructions an element <= {INSTRUCTIONS_PER_ELEMENT}",
            "violations = 0",
            f"targets = {STATIC_TARGETS}",
        ):
            yield Gate(goal, rule, None, NOT_MEASURED, "the file has no static table")
        return
    confidence = [r for r in static["kernels"] if r["kernel"].startswith("confidence") and r["target"] == "sm_90"]
    counted = [
        (r["instructions_per_element"], r["config"]) for r in confidence if r["instructions_per_element"] is not None
    ]
    rule = f"confidence: instructions an element <= {INSTRUCTIONS_PER_ELEMENT} on sm_90"
    if counted:
        worst, name = max(counted)
        verdict = MET if worst <= INSTRUCTIONS_PER_ELEMENT else MISSED
        yield Gate(goal, rule, worst, verdict, f"worst of {len(counted)}: {name}")
    else:
        yield Gate(goal, rule, None, NOT_MEASURED, "the table has no confidence on sm_90")
    targets, found = {result["target"] for result in static["kernels"]}, len(static["violations"])
    detail = f"{len(static['kernels'])} binaries" + (f"; first: {static['violations'][0]}" if found else "")
    yield Gate(
        goal, "spills, shared memory and other limits: violations = 0", float(found), MISSED if found else MET, detail
    )
    complete = len(targets) >= STATIC_TARGETS and not static["only"]
    kernels = ", ".join(static["only"]) or "every kernel"
    detail = "every configuration" if complete else f"a part: {', '.join(sorted(targets))}; {kernels}"
    verdict = MET if complete else NOT_MEASURED
    yield Gate(goal, f"targets = {STATIC_TARGETS}, every configuration", float(len(targets)), verdict, detail)


def lines(gates: Iterable[Gate]) -> list[str]:
    """The table as text, and a line that counts the verdicts."""
    gates = list(gates)
    rows = [(g.verdict, "-" if g.value is None else f"{g.value:.3g}", g.goal, g.rule, g.detail) for g in gates]
    header = ("verdict", "value", "gate", "rule", "of")
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(4)]
    text = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[4]]).rstrip()
        for row in (header, *rows)
    ]
    counts = {verdict: sum(g.verdict == verdict for g in gates) for verdict in (MET, MISSED, NOT_MEASURED)}
    return [*text, ", ".join(f"{count} {verdict}" for verdict, count in counts.items())]
