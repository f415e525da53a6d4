"""One plot per op: the share of the ceiling by shape, ours beside the best baseline. And one of slots over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .slots import SLOTS, STATIC, occupancy
from .speed.run import OURS

OURS_COLOUR, BASELINE_COLOUR = "#1b6ca8", "#d1495b"
SPANS = 40  # into which the time of a decode is cut, whose tokens a second are a point each


def draw(result: dict[str, Any], out: Path) -> list[Path]:
    """Writes `out`/kernels_<op>.png for every op that has a time, and returns the paths. Needs matplotlib.

    A shape in which ours has no time is on the plot too, without a mark, because a gap is a finding. The bar through a
    mark spans the 20th to the 80th percentile.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for op in dict.fromkeys(row["op"] for row in result["timings"] if row["status"] == "ok"):
        shapes: dict[str, list[dict[str, Any]]] = {}
        for row in result["timings"]:
            if row["op"] == op:
                shapes.setdefault(f"{row['model']}  {row['shape']}", []).append(row)
        figure, axes = plt.subplots(figsize=(11, 1.6 + 0.28 * len(shapes)), layout="constrained")
        for place, rows in enumerate(shapes.values()):
            timed = [row for row in rows if row["status"] == "ok"]
            baselines = [row for row in timed if not row["candidate"].startswith(OURS)]
            best = min(baselines, key=lambda row: row["p50_us"], default=None)
            if best is not None:
                _mark(axes, best, place + 0.12, "s", BASELINE_COLOUR)
                axes.annotate(
                    best["candidate"], (best["share"], place + 0.12), (6, -3), textcoords="offset points", fontsize=6
                )
            for row in timed:
                if row["candidate"] == OURS:
                    _mark(axes, row, place - 0.12, "o", OURS_COLOUR)
        axes.plot([], [], "o", color=OURS_COLOUR, label="ours")
        axes.plot([], [], "s", color=BASELINE_COLOUR, label="best baseline (named beside it)")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(shapes)), list(shapes), fontsize=7)
        axes.set_ylim(len(shapes) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("share of the ceiling measured in the same run (floor / p50); bar: p20 to p80")
        axes.set_title(f"{op} on {result['device']}, commit {result['commit'][:12]}", fontsize=9)
        axes.legend(loc="lower right", fontsize=7)
        axes.grid(axis="x", linewidth=0.3)
        path = out / f"kernels_{op}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        written.append(path)
    return written


def _mark(axes: Any, row: dict[str, Any], place: float, shape: str, colour: str) -> None:
    floor = row["floor_us"]
    axes.plot([floor / row["p80_us"], floor / row["p20_us"]], [place, place], color=colour, linewidth=1)
    axes.plot(row["share"], place, shape, color=colour, markersize=4)


def draw_slots(timelines: list[dict[str, Any]], path: Path) -> Path:
    """Writes a plot of tokens a second and of occupancy over time: a column for each decoder, static batches beside
    slots. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (5.5 * len(timelines), 6)
    figure, grid = plt.subplots(2, len(timelines), figsize=size, layout="constrained", squeeze=False, sharex="col")
    for (above, below), found in zip(grid.T, timelines):
        for name, colour in ((SLOTS, OURS_COLOUR), (STATIC, BASELINE_COLOUR)):
            points, slots = found["points"][name], found["slots"]
            share = f"{name}: {occupancy(points, slots):.0%} on average"
            above.plot(*speeds(points), drawstyle="steps-mid", color=colour, label=name)
            below.step(
                [seconds for seconds, _, _ in points], [rows / slots for _, rows, _ in points], where="post",
                color=colour, linewidth=1, label=share,
            )  # fmt: skip
        above.set(ylabel="tokens a second, while recorded")
        above.set_title(f"{found['preset']}: {found['requests']} requests, {found['slots']} slots", fontsize=9)
        below.set(xlabel="seconds", ylabel="rows in work / slots", ylim=(0, 1.05))
        for axis in (above, below):
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        above.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def speeds(points: list[list[float]]) -> tuple[list[float], list[float]]:
    """The middle of each span of a decode, and the tokens a second that were written in it."""
    length = points[-1][0] / SPANS
    written = [0.0] * SPANS
    before = 0
    for seconds, _, tokens in points:
        written[min(int(seconds / length), SPANS - 1)] += tokens - before
        before = tokens
    return [(span + 0.5) * length for span in range(SPANS)], [count / length for count in written]
