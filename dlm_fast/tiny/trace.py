"""`dlm-fast demo --svg FILE`: a picture of one decode of an embedded model, drawn step by step as selectable text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from torch import nn

from ..generate import generate
from ..loading import load
from ..patching import handle_of
from .demo import MAX_NEW_TOKENS, chat
from .tasks import held_out

MODEL, PRESET, TASK, SAMPLE = "tiny-block", "d2f", "trace", 2

# Sizes in pixels: of a character, of a line, left of the text, right of the text, above the first step, below the last.
CHARACTER, LINE, LEFT, RIGHT, ABOVE, BELOW = 8.4, 26, 80, 76, 74, 42
# Colours of the steps, taken in turn, on light ground and on dark ground.
LIGHT = ("#1d5fa8", "#a83a12", "#2b7a3d", "#8e3a8c", "#7a5a00", "#0b6f80", "#b3261e", "#4c4fb5")
DARK = ("#7cb7f5", "#f2a07b", "#86d29a", "#dba0da", "#e2c15c", "#6fd0e0", "#f5968f", "#aeb0f7")
MASK, END = "·", "∎"


@dataclasses.dataclass(frozen=True)
class Trace:
    """One answer, with the step that wrote each token.

    Attributes:
        model: name of the embedded model.
        preset: name of the preset.
        prompt: the prompt.
        tokens: text of every token that was written; an EOS is shown as END.
        steps: the denoise step that wrote the token, from 0.
        block_length: number of tokens in a block.
        nfe: number of forwards.
    """

    model: str
    preset: str
    prompt: str
    tokens: tuple[str, ...]
    steps: tuple[int, ...]
    block_length: int
    nfe: int

    @property
    def length(self) -> int:
        """Number of tokens before the end of the text."""
        return len(self.tokens) if END not in self.tokens else self.tokens.index(END)


def record(model: nn.Module) -> Trace:
    """Decodes one fixed held-out prompt, and records which step wrote each token."""
    prompt = held_out(TASK, SAMPLE + 1, seed=3)[SAMPLE].prompt
    out = generate(model, [chat(prompt)], preset=PRESET, max_new_tokens=MAX_NEW_TOKENS)
    handle = handle_of(model)
    eos, decode = handle.diffusion.eos_token_ids, handle.tokenizer.decode
    written = [(i, s) for i, s in zip(out.canvas[0].tolist(), out.unmask_step[0].tolist()) if s >= 0]
    return Trace(
        model=MODEL,
        preset=PRESET,
        prompt=prompt,
        tokens=tuple(END if i in eos else decode([i]) for i, _ in written),
        steps=tuple(step for _, step in written),
        block_length=handle.diffusion.block_length,
        nfe=out.nfe[0],
    )


def svg(trace: Trace) -> str:
    """The trace as an SVG with one line per step.

    New tokens stand on the colour of their step; older tokens are underlined in the colour of their step.
    """
    # 1. Sizes: the column at which each token begins, and the picture.
    starts = [0]
    for token in trace.tokens:
        starts.append(starts[-1] + len(token))
    columns, last_step = starts[-1], max(trace.steps)
    width, height = LEFT + columns * CHARACTER + RIGHT, ABOVE + (last_step + 1) * LINE + BELOW

    def x(column: float) -> str:
        return f"{LEFT + column * CHARACTER:.1f}"

    # 2. Frame, title and prompt.
    summary = f"{trace.length} tokens in {trace.nfe} forwards"
    size = f'width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{trace.model}, preset {trace.preset}: {summary}</title>",
        f"<style>{_style(last_step + 1)}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1}" rx="8"/>',
        '<text class="dim" x="14" y="28">prompt</text>',
        f'<text class="old" x="{x(0)}" y="28" xml:space="preserve">{escape(trace.prompt)}</text>',
    ]
    # 3. Edges of the blocks, then the steps, then the key.
    for first_token in range(0, len(trace.tokens), trace.block_length):
        left = x(starts[first_token])
        lines.append(f'<text class="small" x="{left}" y="56">block {first_token // trace.block_length + 1}</text>')
        if first_token:
            lines.append(f'<line class="edge" x1="{left}" x2="{left}" y1="46" y2="{height - BELOW}"/>')
    for step in range(last_step + 1):
        lines += _line(trace, starts, step, x)
    key = f"{summary}   {MASK} a masked token   {END} the end   colour: the step that wrote a token"
    lines += [f'<text class="small" x="14" y="{height - 16}" xml:space="preserve">{escape(key)}</text>', "</svg>", ""]
    return "\n".join(lines)


def _line(trace: Trace, starts: list[int], step: int, x: Any) -> list[str]:
    """The SVG of one step: the ground of new tokens, the underline of older tokens, and the text."""
    top = ABOVE + step * LINE
    base = top + 14
    marks, spans = [], []
    for start, after, when in _runs(trace.steps, step):
        run_width = f"{(starts[after] - starts[start]) * CHARACTER:.1f}"
        tokens = trace.tokens[start:after]
        # Every run says where it begins and how wide it is, since fonts differ.
        span = f'x="{x(starts[start])}" textLength="{run_width}"'
        if when > step:
            text = "".join(MASK.center(len(token)) for token in tokens)
            spans.append(f'<tspan class="dim" {span}>{text}</tspan>')
            continue
        is_new = when == step
        y, height = (top - 3, 23) if is_new else (base + 4, 2)
        place = f'x="{x(starts[start])}" y="{y}" width="{run_width}" height="{height}"'
        marks.append(f'<rect class="s{when % len(LIGHT)}" {place}/>')
        spans.append(f'<tspan class="{"new" if is_new else "old"}" {span}>{escape("".join(tokens))}</tspan>')
    count = trace.steps.count(step)
    return [
        *marks,
        f'<text class="dim" x="14" y="{base}">step {step + 1}</text>',
        f'<text y="{base}" xml:space="preserve">{"".join(spans)}</text>',
        f'<text class="dim" x="{x(starts[-1] + 1.5)}" y="{base}">+{count}</text>',
    ]


def _runs(steps: tuple[int, ...], step: int) -> list[tuple[int, int, int]]:
    """(first token, token after the last, step) of neighbours that are drawn alike in the line of `step`.

    Neighbours are drawn alike if one step wrote them, or if no step has written them yet.
    """
    runs: list[tuple[int, int, int]] = []
    for index, when in enumerate(steps):
        when = min(when, step + 1)
        if runs and runs[-1][2] == when:
            runs[-1] = (runs[-1][0], index + 1, when)
        else:
            runs.append((index, index + 1, when))
    return runs


def _style(steps: int) -> str:
    """The style sheet: colours on light ground, and on dark ground for a reader whose system asks for that."""

    def ground(colours: tuple[str, ...], card: str, edge: str, old: str, dim: str, new: str) -> str:
        marks = "".join(f".s{i}{{fill:{colour}}}" for i, colour in enumerate(colours[:steps]))
        frame = f".card{{fill:{card};stroke:{edge}}}.edge{{stroke:{edge};stroke-dasharray:3 3}}"
        return f"{frame}.old{{fill:{old}}}.dim,.small{{fill:{dim}}}.new{{fill:{new}}}{marks}"

    family = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
    font = f"text{{font:14px {family};white-space:pre}}.small{{font-size:11px}}"
    light = ground(LIGHT, "#ffffff", "#d0d7de", "#1f2328", "#59636e", "#ffffff")
    dark = ground(DARK, "#0d1117", "#3d444d", "#f0f6fc", "#9198a1", "#0d1117")
    return f"{font}{light}@media (prefers-color-scheme:dark){{{dark}}}"


def write(path: Path, *, backend: str = "auto", device: str | None = None) -> Trace:
    """Decodes with the embedded model, and writes the picture to `path`."""
    trace = record(load(MODEL, backend=backend, device=device))
    path.write_text(svg(trace), encoding="utf-8")
    return trace
