"""What `python -m bench e2e` found, for reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .e2e import Compared, Measured

NAME = 32  # width of the first column
TITLES = ("tokens/s", "ms a step", "its forward", "forwards")


def table(measured: Sequence[Measured], pairs: Sequence[Compared]) -> list[str]:
    """One model at one batch size: every decoder, and what ours is to the others."""
    first = measured[0]
    heading = f"{first.model} ({first.visibility}), B={first.rows}, ours by the {first.ops} ops"
    lines = [heading, " " * (4 + NAME) + "".join(f"{title:>12}" for title in TITLES)]
    for m in measured:
        name = f"    {m.candidate:{NAME}}"
        if m.tokens_per_s is None:
            lines.append(f"{name}{m.samples.status}: {m.samples.reason}")
            continue
        step = "-" if m.ms_per_step is None else f"{m.ms_per_step:.2f}"
        forward = "-" if m.forward_ms is None else f"{m.forward_ms:.2f}"
        note = f"   {m.samples.reason}" if m.samples.reason else ""
        lines.append(f"{name}{m.tokens_per_s:12.1f}{step:>12}{forward:>12}{m.forwards:12}{note}")
    for pair in pairs:
        if pair.ratio is not None:
            same = "the same tokens" if pair.same_tokens else "other tokens"
            lines.append(f"    {pair.ours} / {pair.other}: {pair.ratio:.2f} ({same})")
    return lines


def losses(pairs: Sequence[Compared], mixed: dict[str, float | None]) -> list[str]:
    """Where another decoder is faster, the worst first, and whether a batch costs more than its rows."""
    lost = sorted((pair for pair in pairs if pair.ratio is not None and pair.ratio < 1), key=lambda pair: pair.ratio)
    lines = [
        f"{p.model} ({p.visibility}), B={p.rows}: {p.ours} has {p.ratio:.2f} of the tokens/s of {p.other}" for p in lost
    ]
    over = mixed["together_over_alone"]
    if over is not None and over > 1:
        lines.append(f"rows of mixed lengths in one call take {over:.2f} of their time one by one")
    slots = mixed.get("slots_over_static")
    if slots is not None and slots < 1:
        lines.append(f"slots have {slots:.2f} of the tokens/s of static batches")
    lines = lines or ["nowhere in what was measured"]
    unmeasured = sum(pair.ratio is None for pair in pairs)
    return [*lines, f"({unmeasured} comparisons without a time: FAILED or SKIPPED above)"] if unmeasured else lines
