"""What `python -m bench quality` found, for reading: its tables and the plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# The caches whose keys go stale, as the first section compares them: (what the cache is called, preset).
STALE = (
    ("none", "fast-dllm"),
    ("prefix", "fast-dllm-prefix"),
    ("dual", "fast-dllm-dual"),
    ("once", "freecache"),
)


def table(document: dict[str, Any]) -> str:
    """The comparisons, then the settings of every model in the order of NFE, as Markdown."""
    tasks, rows = document["tasks"], document["settings"]
    lines = [
        f"Exact match on held-out prompts of {len(tasks)} tasks ({', '.join(tasks)}; seed {document['seed']}), greedy:",
        f"{document['per_task']} prompts a task, fewer for slow decoders and for variations. Their number is in each",
        "row; +- is one standard error. NFE and query tokens (positions computed) are means per prompt and count",
        "prefills, refreshes and commits. `python -m bench quality` makes all of this;",
        "`python -m bench quality --check FILE` measures a sample of the settings again.",
        "",
        *stale_section(rows, tasks),
        *d2f_section(rows),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        columns = header("preset", "exact match", "prompts", "worst task", "NFE", "query tokens", "exactness")
        lines += [f"## {model}", "", *columns]
        for row in sorted((r for r in rows if r["model"] == model), key=lambda r: r["nfe"]):
            worst = min(row["exact_match_by_task"], key=row["exact_match_by_task"].get)
            lines.append(
                cells(
                    row["label"],
                    exact(row),
                    row["prompts"],
                    f"{worst} {row['exact_match_by_task'][worst]:.0%}",
                    f"{row['nfe']:.2f}",
                    f"{row['query_tokens']:.0f}",
                    row["exactness"].split(":")[0],
                )
            )
        lines.append("")
    lines += ["Not run: " + "; ".join(f"{name} ({why})" for name, why in document["left_out"].items()) + ".", ""]
    return "\n".join(lines)


def cells(*values: object) -> str:
    return f"| {' | '.join(map(str, values))} |"


def header(*names: str) -> list[str]:
    return [cells(*names), "|" + "-|" * len(names)]


def exact(row: Row) -> str:
    return f"{row['exact_match']:.1%} +- {100 * row['exact_match_se']:.1f}"


def find(rows: Sequence[Row], preset: str, model: str | None = None, **options: Any) -> Row | None:
    """The row of a preset at its default, or with these options changed and no other option; None if it was not run."""
    changed = "".join(f" {name}={value}" for name, value in options.items())
    return next((row for row in rows if row["label"] == preset + changed and model in (None, row["model"])), None)


def stale_section(rows: Sequence[Row], tasks: Sequence[str]) -> Iterator[str]:
    """What caches of full-visibility models lose against the same decoder uncached, with and without an isolated
    prompt."""
    compared = [
        (model, cache, row, find(rows, STALE[0][1], model))
        for model in dict.fromkeys(row["model"] for row in rows)
        for cache, preset in STALE
        if (row := find(rows, preset, model)) is not None and find(rows, STALE[0][1], model) is not None
    ]
    if not any(cache != "none" for _, cache, _, _ in compared):
        return
    yield from (
        "## What stale caches cost",
        "",
        "Fast-dLLM's threshold 0.9 uncached, over a prefix cache and a dual cache, and FreeCache, which refreshes",
        "nothing. The prompt of tiny-isolated does not see the response, so its keys are exact for good; those of",
        "earlier blocks (dual: and of later ones) are not. Differences are in points from the same model uncached,",
        "whose own exact match is in the rows `none`.",
        "",
        *header("model", "cache", "exact match", "points", "query tokens", *tasks),
    )
    for model, cache, row, base in compared:
        ours, theirs = row["exact_match_by_task"], base["exact_match_by_task"]
        by_task = [f"{ours[task]:.0%}" if row is base else points(ours[task] - theirs[task]) for task in tasks]
        lost = "" if row is base else points(row["exact_match"] - base["exact_match"])
        yield cells(model, cache, exact(row), lost, f"{row['query_tokens']:.0f}", *by_task)
    yield ""


def points(difference: float) -> str:
    """A difference in points or per cent, where -0.0 is 0."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def d2f_section(rows: Sequence[Row]) -> Iterator[str]:
    """The pipelined decoder against the same student's blocks one at a time, and against the teacher with a dual
    cache."""
    single = find(rows, "llada2", threshold=0.9)
    pipelined = [row for row in rows if row["preset"] == "d2f"]
    if single is None or not pipelined:
        return
    teachers: Sequence[tuple[str, Row | None]] = (
        ("teacher, one token per step", find(rows, "llada", "tiny-full")),
        ("teacher, threshold 0.9", find(rows, "fast-dllm", "tiny-full")),
        ("teacher, threshold 0.9, dual cache", find(rows, "fast-dllm-dual", "tiny-full")),
    )
    compared = [("student, one block at a time", single), *((f"student, {row['label']}", row) for row in pipelined)]
    compared += [(name, row) for name, row in teachers if row is not None]
    yield from (
        "## D2F pays",
        "",
        "The student's blocks in a pipeline (`d2f`, threshold 0.9 unless the row says otherwise) against one at a time",
        "(`llada2`, threshold 0.9), both over the exact cache, and against the student's teacher with Fast-dLLM's dual",
        "cache. `llada2` commits a finished block by a forward of its own, `d2f` together with the next denoise step:",
        "with append_threshold=1.0 activate_threshold=1.0 that is all that `d2f` saves, because its blocks are then",
        "decoded one at a time; what the other rows save beyond that is the pipeline's. Differences are from the first",
        "row.",
        "",
        *header("decoder", "exact match", "points", "NFE", "NFE, %", "query tokens", "query tokens, %"),
    )
    for name, row in compared:
        differences = ["", "", ""]
        if row is not single:
            ratios = [row[cost] / single[cost] - 1 for cost in ("nfe", "query_tokens")]
            differences = [points(by) for by in (row["exact_match"] - single["exact_match"], *ratios)]
        match, nfe, query_tokens = differences
        yield cells(name, exact(row), match, f"{row['nfe']:.2f}", nfe, f"{row['query_tokens']:.0f}", query_tokens)
    yield ""


def frontier(rows: Sequence[Row], cost: str) -> list[Row]:
    """The rows that no other row beats in both cost and exact match, by cost."""
    best, kept = -1.0, []
    for row in sorted(rows, key=lambda r: (r[cost], -r["exact_match"])):
        if row["exact_match"] > best:
            best = row["exact_match"]
            kept.append(row)
    return kept


LEAST_WRONG = 0.3  # per cent: a decoder that makes no mistake is drawn here, because the scale is logarithmic


def wrong(row: Row) -> float:
    """Wrong answers in per cent, as the plot shows them."""
    return max(LEAST_WRONG, 100 * (1 - row["exact_match"]))


def name_points(axis: Any, named: Sequence[tuple[float, float, str]]) -> None:
    """Writes each (x, y, name) beside its point. A name moves up or down until it covers no other name, and a far name
    gets a line to its point."""
    height, width = 8.5, 3.7  # points a line and a character take
    scale = axis.figure.dpi / 72
    taken: list[tuple[float, float, float]] = []  # left, middle, right, in points
    for x, y, name in sorted(named, key=lambda point: (point[1], point[0])):
        px, py = axis.transData.transform((x, y)) / scale
        left, right = px + 5, px + 5 + width * len(name)
        for place in (step * sign for step in range(40) for sign in (1, -1)):
            middle = py + height * place
            if all(abs(middle - m) >= height or right < begin or left > end for begin, m, end in taken):
                break
        taken.append((left, middle, right))
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5} if place else None
        where = {"xytext": (5, middle - py), "textcoords": "offset points", "va": "center", "arrowprops": line}
        axis.annotate(name, (x, y), fontsize=6, **where)


def plot(document: dict[str, Any], path: Path) -> None:
    """One panel for each model and cost: every setting is a point with its standard error, and those that nothing beats
    are joined.

    These, and every preset at its defaults, have their names beside them. Wrong answers are on a logarithmic scale,
    because most decoders give few.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in document["settings"]))
    costs = (("nfe", "forwards per answer (NFE)"), ("query_tokens", "positions computed per answer (query tokens)"))
    figure, axes = pyplot.subplots(
        len(models), len(costs), figsize=(16, 7.5 * len(models)), squeeze=False, layout="constrained"
    )
    named: list[tuple[Any, list[tuple[float, float, str]]]] = []
    for axis_row, model in zip(axes, models):
        rows = [row for row in document["settings"] if row["model"] == model]
        for axis, (cost, title) in zip(axis_row, costs):
            for exactness, marker, color in (("exact", "o", "tab:blue"), ("approximate", "^", "tab:orange")):
                points_of = [row for row in rows if row["exactness"].startswith(exactness)]
                x, y = [row[cost] for row in points_of], [wrong(row) for row in points_of]
                error = [100 * row["exact_match_se"] for row in points_of]
                low = [min(e, v - LEAST_WRONG / 2) for e, v in zip(error, y)]
                bars = {
                    "fmt": marker,
                    "color": color,
                    "alpha": 0.7,
                    "elinewidth": 0.6,
                    "label": f"{exactness} decoders",
                }
                axis.errorbar(x, y, yerr=(low, error), **bars)
            best = frontier(rows, cost)
            axis.plot([row[cost] for row in best], [wrong(row) for row in best], color="0.6", linewidth=1, zorder=0)
            defaults = [row for row in rows if row["label"] == row["preset"]]
            chosen = {row["label"]: row for row in (*best, *defaults)}.values()
            named.append((axis, [(row[cost], wrong(row), row["label"]) for row in chosen]))
            axis.set(
                xscale="log",
                yscale="log",
                ylim=(105, LEAST_WRONG / 1.5),
                xlabel=title,
                ylabel="wrong answers, %",
                title=model,
            )
            axis.set_xlim(right=axis.get_xlim()[1] * 1.5)  # room for names
            axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axis.grid(alpha=0.3)
            axis.legend(loc="lower right", fontsize=8)
    prompts = f"{document['per_task']} held-out prompts a task (slow decoders fewer), {len(document['tasks'])} tasks"
    none = f"no mistake is drawn at {LEAST_WRONG} %"
    figure.suptitle(
        f"{prompts}, seed {document['seed']}, greedy; bars: one standard error; line: what nothing beats; {none}"
    )
    figure.canvas.draw()  # places the axes, which names need
    for axis, points in named:
        name_points(axis, points)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
