"""What `python -m bench batch` found, for reading: its lines and its plots. That of slots over time is in `plots`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .slots import SLOTS, STATIC

Row = dict[str, Any]
COUNT_COLUMNS = ("computed", "needed", "ratio", "forwards", "nfe", "shapes")
NAME = 22  # width of the first column
WASTE_TICKS = (1, 1.5, 2, 3, 5, 10, 20)


def header(*titles: str) -> str:
    return "    " + f"{'rows a call':{NAME}}" + "".join(f"{title:>11}" for title in titles)


def count_header() -> str:
    return header("computed", "needed", "ratio", "forwards", "NFE", "shapes")


def count_lines(row: Row) -> list[str]:
    """The line of a batch size, and one that says if its requests differ."""
    size = f"{row['rows']} slots" if row["way"] == SLOTS else "alone" if row["rows"] == 1 else str(row["rows"])
    name = f"    {size:{NAME}}"
    if row["status"] != "ok":
        return [f"{name}{row['status']}: {row['reason']}"]
    values = (f"{row[column]:.2f}" if column == "ratio" else f"{row[column]}" for column in COUNT_COLUMNS)
    lines = [name + "".join(f"{value:>11}" for value in values)]
    if row["differing"]:
        lines.append(
            f"        {row['differing']} requests got other tokens, NFE or query tokens than in the first line"
        )
    return lines


def time_lines(rows: Sequence[Row]) -> list[str]:
    """A table of the ways to cut the requests into calls."""
    lines = [header("tokens/s", "seconds", "over alone")]
    for row in rows:
        way = f"{row['rows']}, {row['order']} order"
        name = f"    {way:{NAME}}"
        if "seconds" not in row:
            lines.append(f"{name}{row['status']}: {row['reason']}")
            continue
        seconds = statistics.median(row["seconds"])
        over = f"{row['over_alone']:.2f}" if "over_alone" in row else "-"
        note = f"   {row['reason']}" if row["reason"] else ""
        lines.append(f"{name}{row['tokens_per_s']:11.1f}{seconds:11.2f}{over:>11}{note}")
    return lines


def slot_lines(row: Row) -> list[str]:
    """Slots beside static batches of as many rows."""
    name = f"    {row['slots']} slots, {row['requests']} requests: "
    if "slots_over_static" not in row:
        return [f"{name}{row['status']}: {row['reason']}"]
    static, slots = (f"{row[f'{way}_tokens_per_s']:.1f}" for way in (STATIC, SLOTS))
    note = f"   {row['reason']}" if row["reason"] else ""
    ratio = f"{row['slots_over_static']:.2f} of its tokens a second"
    return [f"{name}{slots} tokens/s, static batches {static}: {ratio}{note}"]


def plots(document: Row, out: Path) -> list[Path]:
    """Writes batch_waste.png and batch_throughput.png, of what was counted and of what was timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    counted = [row for row in document["counts"] if row["status"] == "ok"]
    through = [row for row in counted if row["way"] == SLOTS]
    counted = [row for row in counted if row["way"] == STATIC]
    timed = [row for row in document["times"] if "seconds" in row]
    mix = document["mix"]
    lengths = f"log-normal lengths of median {mix['median']}, seed {mix['seed']}"
    if counted:
        figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
        for number, (preset, rows) in enumerate(_by_preset(counted).items()):
            colour = f"C{number % 10}"
            axis.plot([row["rows"] for row in rows], [row["ratio"] for row in rows], "o-", color=colour, label=preset)
            rows = [row for row in through if row["preset"] == preset]
            axis.plot([row["rows"] for row in rows], [row["ratio"] for row in rows], "s:", color=colour)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_yticks(WASTE_TICKS, [f"{tick:g}" for tick in WASTE_TICKS])
        axis.set(
            ylabel="positions computed / positions that the rows need",
            title=f"{document['requests']} requests, {lengths}; dotted: slots",
        )
        _finish(axis, sorted({row["rows"] for row in counted}))
        written.append(_save(figure, out / "batch_waste.png"))
    if timed:
        figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
        for number, (preset, rows) in enumerate(_by_preset(timed).items()):
            colour = f"C{number % 10}"
            # What is alone or all together has no order, and belongs to both lines.
            ends = {min(row["rows"] for row in rows), max(row["rows"] for row in rows)}
            for order, style in (("given", "o-"), ("sorted", "^--")):
                line = [row for row in rows if row["order"] == order or row["rows"] in ends]
                label = preset if order == "given" else None
                axis.plot(
                    [row["rows"] for row in line],
                    [row["tokens_per_s"] for row in line],
                    style,
                    color=colour,
                    label=label,
                )
        axis.set_ylim(bottom=0)
        axis.set(
            ylabel=f"tokens a second of {document['clock']}",
            title=f"{document['timed_requests']} requests, {lengths}; dashed: sorted by length",
        )
        _finish(axis, sorted({row["rows"] for row in timed}))
        written.append(_save(figure, out / "batch_throughput.png"))
    return written


def _by_preset(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["preset"], []).append(row)
    return found


def _finish(axis: Any, sizes: list[int]) -> None:
    axis.set(xscale="log", xlabel="rows of a call")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
