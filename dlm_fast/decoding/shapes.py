"""The shapes that the steps of a decode have: few of them, planned for its rows when the decode is opened.

A step computes `rows x width` positions, of which only the windows of the rows that take part are needed. With one
shape for all steps, a row that needs a refresh makes the canvas of every row be computed, and the longest row decides
for all. With a shape for each need, no step could be captured. So a decode has a grid of at most `MOST_SHAPES` shapes:
a few widths for each kind of step, chosen so that the windows that the batch will need waste least, each with the row
counts 1, 2, 4, ... that are worth a forward of their own. The rows that need a step are then divided among steps of
these shapes at the least cost, where a step costs its positions and a fixed number besides (`fixed_positions`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.rules import Kind
from dlm_kernels.state import DENOISE, REFRESH

from ..policies.constants import Constants
from .plan import Bucket, Plan
from .window import extent_of

MOST_SHAPES = 16
# What a step costs whatever it computes, in positions. It is Python and small launches, in whose time so many
# parameters are multiplied by one position; on a GPU it is the reading of every weight at least, in whose time an H100
# or H200 multiplies in bf16 for about 200 positions (2 FLOP per weight and position at 800 TFLOP/s, 2 bytes per weight
# at 3 to 4 TB/s). Only what a decode costs hangs on these numbers, and no result.
LAUNCHED = {"cuda": 1e12, "cpu": 3e7}
WEIGHTS_READ = {"cuda": 256, "cpu": 8}
# A row count is worth a shape as long as the step costs less than so many fixed parts: beyond, two steps of half the
# rows cost hardly more.
WORTH = 4
# Shapes that are left go to more rows as long as the step costs less than so many fixed parts: beyond, hardly any time
# is left to share, and what a step holds in memory grows.
SHARED = 16
# What is tried for `WORTH` where a grid is planned for many rows, and how many rounds of rows it is tried on.
WORTHS = (0.5, 1, 1.5, 2, 3, 4, 8, 16)
ROUNDS = 16
MOST_WIDTHS = 16
# So many different widths are told apart when a grid is planned.
TOLD_APART = 24
# A block takes so many denoise steps of one width, when a grid is planned: fewer than most decoders take, and how many
# they take is known only afterwards.
STEPS = 4
# A grid is planned for so many blocks of a row, evenly spaced, if it has more.
PLANNED_BLOCKS = 16
# The regions of a pipeline that its grid is planned for, in blocks, and the fewest lanes of its steps.
PIPELINE_BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16)
FEW_BLOCKS = 4


@dataclasses.dataclass(frozen=True)
class Grid:
    """The shapes of a decode.

    Attributes:
        counts: for each kind of step and each width, in ascending order, the row counts, in ascending order. The last
            width of a kind holds every row.
        lanes: for each kind of step, how many positions of a row are looked at, in ascending order; the last number
            holds every row.
        drafts: canvases per row of a step that verifies drafts.
        narrow: whether the lanes lie in the window, so that none are looked at beyond the width.
        fixed: what a step costs besides its positions, in positions.
    """

    counts: dict[Kind, dict[int, tuple[int, ...]]]
    lanes: dict[Kind, tuple[int, ...]]
    drafts: int
    narrow: bool
    fixed: int

    def steps(self, kind: Kind, needs: Sequence[tuple[int, int, int, bool]]) -> list[tuple[Bucket, list[int]]]:
        """The steps that serve all of `needs`, and the rows of each, widest first.

        Args:
            needs: (positions, row, lanes, whether it has drafts to verify) of every row that needs a step of `kind`.
        """
        steps = []
        for drafts in (1, self.drafts) if self.drafts > 1 else (1,):
            asking = [need for need in needs if need[3] == (drafts > 1)]
            if not asking:  # where no row has a mask, there may be no shape either
                continue
            asking.sort(key=lambda need: (-need[0], need[1]))
            classes = [self.class_of(kind, need[0]) for need in asking]
            begin = 0
            for count, width in self._division(kind, drafts, tuple(classes)):
                served = asking[begin : begin + count]
                known, wanted = self.lanes[kind], max(need[2] for need in served)
                lanes = next((n for n in known if n >= wanted), known[-1])
                if self.narrow and kind == "denoise":
                    lanes = min(lanes, width)
                steps.append((Bucket(kind, count, width, lanes, drafts), [need[1] for need in served]))
                begin += count
        return steps

    def class_of(self, kind: Kind, width: int) -> int:
        """The number of the width that a window of so many positions takes."""
        # A late count is that of a narrower window, with a margin that may exceed what any row can need.
        widths = tuple(self.counts[kind])
        return next((n for n, known in enumerate(widths) if known >= width), len(widths) - 1)

    def cost(self, kind: Kind, classes: tuple[int, ...]) -> int:
        """What serving rows of these classes of width, the widest first, costs in positions."""
        return sum(self.fixed + count * width for count, width in self._division(kind, 1, classes))

    def _division(self, kind: Kind, drafts: int, classes: tuple[int, ...]) -> list[tuple[int, int]]:
        """(rows, width) of steps of least cost for rows of these classes of width, the widest first.

        A step takes the next rows in that order; those of a narrower class fill its last places.
        """
        if (kind, drafts, classes) not in self._divisions:
            widths, n = tuple(self.counts[kind]), len(classes)
            # (cost of serving the rows from here on, row count of the first step), from the last row to the first.
            best = [(0, 0)] * (n + 1)
            for begin in reversed(range(n)):
                width = widths[classes[begin]]
                best[begin] = min(
                    (self.fixed + count * width * drafts + best[min(begin + count, n)][0], count)
                    for count in self.counts[kind][width]
                )
            found, begin = [], 0
            while begin < n:
                count = best[begin][1]
                found.append((count, widths[classes[begin]]))
                begin += count
            self._divisions[kind, drafts, classes] = found
        return self._divisions[kind, drafts, classes]

    @functools.cached_property
    def _divisions(self) -> dict[tuple[Kind, int, tuple[int, ...]], list[tuple[int, int]]]:
        return {}


def fixed_positions(device: str, parameters: int) -> int:
    """What a step of a model costs besides its positions, in positions."""
    known = device if device in LAUNCHED else "cuda"
    return max(WEIGHTS_READ[known], min(int(LAUNCHED[known] / max(1, parameters)), 4096))


def grid_of(plan: Plan, state: RowState, fixed: int, *, most_rows: int | None = None, refilled: bool = False) -> Grid:
    """Plans the shapes of a decode for rows as these are when they have just been opened, which may be more or fewer
    than it decodes together; reads the state on the host.

    Args:
        plan: the plan of the decode.
        state: the rows.
        fixed: `fixed_positions`.
        most_rows: the most rows of a step; None = all.
        refilled: whether rows take the places of rows that are done, so that those in work are at any block; and the
            grid is planned once for many rows, with more care.
    """
    B = plan.first.shape[0] if most_rows is None else min(plan.first.shape[0], most_rows)
    expected = {kind: widths for kind, widths in _expected(plan, state).items() if widths}
    if plan.preset.drafts > 1:
        expected["denoise"] = Counter({plan.denoise_width: expected["denoise"].total()})  # drafts are of whole blocks
    lanes: dict[Kind, tuple[int, ...]] = {"refresh": (plan.lanes,), "denoise": (plan.lanes,)}
    narrow = plan.preset.pipeline and plan.cache.op(True) == "fused"
    if narrow:
        lanes["refresh"] = (min(plan.block_length, plan.lanes),)  # it opens the first block
    elif plan.preset.pipeline:
        some = tuple(sorted({min(FEW_BLOCKS * plan.block_length, plan.lanes), plan.lanes}))
        lanes = {"refresh": some, "denoise": some}
    budget = MOST_SHAPES // (len(lanes["denoise"]) * (2 if plan.preset.drafts > 1 else 1))
    counts = (_counts_of_rounds if refilled else _counts)(expected, B, budget, fixed)
    return Grid(counts, lanes, plan.preset.drafts, narrow, fixed)


def _counts(
    expected: dict[Kind, Counter[int]], B: int, budget: int, fixed: int
) -> dict[Kind, dict[int, tuple[int, ...]]]:
    """The row counts of every width of every kind: at most `budget` shapes, if that is 4 or more."""
    divided = {kind: _classes(Counter(widths), MOST_WIDTHS) for kind, widths in expected.items()}
    chosen = dict.fromkeys(expected, 1)

    def shapes(kind: Kind, number: int) -> dict[int, list[int]]:
        return {width: _row_counts(B, width, fixed) for width in divided[kind][number - 1][0]}

    def size(grid: dict[int, list[int]]) -> int:
        return sum(map(len, grid.values()))

    # 1. One more width for the kind that gains most by it, as long as the shapes are not too many.
    while True:
        sizes = {kind: size(shapes(kind, number)) for kind, number in chosen.items()}
        better = []
        for kind, number in chosen.items():
            if number == len(divided[kind]):
                continue
            more = size(shapes(kind, number + 1)) - sizes[kind]
            saved = divided[kind][number - 1][1] - divided[kind][number][1]
            if saved > 0 and sum(sizes.values()) + more <= budget:
                better.append((saved / max(1, more), kind))
        if not better:
            break
        chosen[max(better)[1]] += 1
    grid = {kind: shapes(kind, number) for kind, number in chosen.items()}
    while sum(map(size, grid.values())) > budget:
        # Even one width of each kind has too many row counts: fewer of those between one row and the most.
        longest = max((counts for widths in grid.values() for counts in widths.values()), key=len)
        if len(longest) <= 2:
            break
        del longest[len(longest) // 2]

    # 2. What is left: more rows, which share the fixed cost of a step; then row counts between the powers of two, where
    # these are far apart.
    left = budget - sum(map(size, grid.values()))
    for _ in range(left):
        short = [
            (expected[kind].total() / counts[-1], kind, width)
            for kind, widths in grid.items()
            for width, counts in widths.items()
            if counts[-1] < B and counts[-1] * width < SHARED * fixed
        ]
        if not short:
            break
        _, kind, width = max(short)
        counts = grid[kind][width]
        counts.append(min(2 * counts[-1], B))
    between = [
        ((high - low) * width * expected[kind].total(), kind, width, (low + high) // 2)
        for kind, widths in grid.items()
        for width, counts in widths.items()
        for low, high in zip(counts, counts[1:])
        if high - low > 1
    ]
    left = budget - sum(map(size, grid.values()))
    for _, kind, width, count in sorted(between, reverse=True)[: max(0, left)]:
        grid[kind][width].append(count)
    return {kind: {width: tuple(sorted(counts)) for width, counts in widths.items()} for kind, widths in grid.items()}


def _counts_of_rounds(
    expected: dict[Kind, Counter[int]], B: int, budget: int, fixed: int
) -> dict[Kind, dict[int, tuple[int, ...]]]:
    """As `_counts`: of many ways to choose widths and row counts, the one with which rounds of rows at any block cost
    least."""
    known: dict[Kind, dict[int, tuple[float, dict[int, tuple[int, ...]]]]] = {}
    for kind, widths in expected.items():
        rounds = _rounds(kind, widths, B)
        rows = sum(map(len, rounds))
        best: dict[int, tuple[float, dict[int, tuple[int, ...]]]] = {}
        for chosen, _ in _classes(Counter(widths), MOST_WIDTHS):
            for worth in WORTHS:
                for ratio in (2, 3, 4):
                    counts = {width: tuple(_row_counts(B, width, fixed, worth, ratio)) for width in chosen}
                    size = sum(map(len, counts.values()))
                    if size > budget or any(other <= size and best[other][1] == counts for other in best):
                        continue
                    grid = Grid({kind: counts}, {}, 1, False, fixed)
                    classes = [tuple(grid.class_of(kind, width) for width in served) for served in rounds]
                    cost = sum(grid.cost(kind, served) for served in classes) * widths.total() / rows
                    if size not in best or cost < best[size][0]:
                        best[size] = cost, counts
        known[kind] = best
    kinds = tuple(known)
    ways = [way for way in itertools.product(*known.values()) if sum(way) <= budget]
    if not ways:
        return _counts(expected, B, budget, fixed)
    way = min(ways, key=lambda sizes: sum(known[kind][size][0] for kind, size in zip(kinds, sizes)))
    return {kind: known[kind][size][1] for kind, size in zip(kinds, way)}


def _rounds(kind: Kind, widths: Counter[int], B: int) -> list[list[int]]:
    """The windows of the rows of some rounds, widest first: of a round of denoise steps nearly all rows, and those that
    have come to a next block of a round of refreshes."""
    draws, sizes = random.Random(0), sorted(widths)
    weights = [widths[size] for size in sizes]
    found = []
    for _ in range(ROUNDS):
        opening = sum(draws.random() < 1 / (STEPS + 1) for _ in range(B))
        rows = max(1, opening if kind == "refresh" else B - opening)
        found.append(sorted(draws.choices(sizes, weights, k=rows), reverse=True))
    return found


def _row_counts(B: int, width: int, fixed: int, worth: float = WORTH, ratio: int = 2) -> list[int]:
    counts = [1]
    while counts[-1] < B and counts[-1] * width < worth * fixed:
        counts.append(min(ratio * counts[-1], B))
    return counts


def _classes(widths: Counter[int], most: int) -> list[tuple[list[int], int]]:
    """For 1, 2, ... `most` widths: those that waste least where every window takes the next width above it, and the
    positions that they waste."""
    sizes = sorted(widths)
    while len(sizes) > TOLD_APART:
        # The pair that costs least to be taken for one.
        n = min(range(len(sizes) - 1), key=lambda n: widths[sizes[n]] * (sizes[n + 1] - sizes[n]))
        widths[sizes[n + 1]] += widths[sizes[n]]
        del sizes[n]
    counted, summed = [0], [0]
    for size in sizes:
        counted.append(counted[-1] + widths[size])
        summed.append(summed[-1] + widths[size] * size)

    def waste(begin: int, end: int) -> int:
        return sizes[end - 1] * (counted[end] - counted[begin]) - (summed[end] - summed[begin])

    found: list[tuple[list[int], int]] = []
    best: list[tuple[int, list[int]]] = [(waste(0, end), [sizes[end - 1]]) for end in range(1, len(sizes) + 1)]
    for number in range(1, min(most, len(sizes)) + 1):
        found.append((best[-1][1], best[-1][0]))
        best = [
            min(
                (best[begin - 1][0] + waste(begin, end), [*best[begin - 1][1], sizes[end - 1]])
                for begin in range(1, end)
            )
            if end > number
            else best[end - 1]
            for end in range(1, len(sizes) + 1)
        ]
    return found


def _expected(plan: Plan, state: RowState) -> dict[Kind, Counter[int]]:
    """The widths of the windows that the rows will need for each kind of step and how often, and the largest that any
    row may need."""
    here, start = _on_host(plan, state)
    found: dict[Kind, Counter[int]] = {"refresh": Counter(), "denoise": Counter()}
    full: dict[Kind, int] = {"refresh": plan.refresh_width, "denoise": plan.denoise_width}
    if plan.scattered:
        # How many positions are computed one by one is not known ahead: every share of the canvas.
        lengths = start.canvas_len.tolist()
        shares = [(length, share) for length in lengths for share in range(1, 9)]
        return {
            kind: Counter({width: 1}) + Counter(min(-(-length * share // 8), width) for length, share in shares)
            for kind, width in full.items()
            if width
        }

    def note(kind: Kind, widths: Iterable[int], times: Iterable[int]) -> None:
        for width, number in zip(widths, times):
            if width > 0:
                found[kind][min(width, full[kind])] += number

    count = -(-int((start.canvas_len - start.block_start).clamp(min=1).amax()) // plan.block_length)
    stride = -(-count // PLANNED_BLOCKS)
    for block in range(0, count, stride):
        begin = start.block_start + block * plan.block_length
        for blocks in PIPELINE_BLOCKS if plan.preset.pipeline else (1,):
            rows = begin < start.canvas_len
            # Blocks of each row for which this one stands.
            stands = (-torch.div(begin - start.canvas_len, plan.block_length, rounding_mode="floor")).clamp(max=stride)
            blocks_of = stands[rows].tolist()
            end = torch.minimum(begin + blocks * plan.block_length, start.canvas_len)
            there = dataclasses.replace(
                start, block_start=begin, block_end=end, phase=torch.full_like(start.phase, DENOISE),
                block_step=torch.ones_like(start.block_step), step=torch.full_like(start.step, block),
            )  # fmt: skip
            widths = _positions(here, there, "denoise", rows)
            # A pipeline's steps are divided among the regions that it is planned for.
            steps = 1 if plan.preset.pipeline else STEPS
            note("denoise", widths, [steps * number for number in blocks_of])
            if plan.defers and block:
                # A block's first step computes the block before too.
                note("denoise", [width + plan.block_length for width in widths], blocks_of)
            refresh = plan.cache.refresh
            if refresh is not None and (block == 0 or refresh.repeats):
                widths = _positions(here, there, "refresh", rows)
                note("refresh", widths, blocks_of if refresh.repeats else [1] * len(widths))
    return {kind: widths + Counter({full[kind]: 1}) if full[kind] else widths for kind, widths in found.items()}


def first_steps(plan: Plan, state: RowState, grid: Grid) -> list[tuple[Bucket, bool]]:
    """The steps that a decode that has just been opened takes for certain, and whether each of them chooses tokens: the
    first round, and the second one where the first only fills the cache. Reads the state on the host."""
    here, start = _on_host(plan, state)
    phases, lanes = start.phase.tolist(), (start.block_end - start.block_start).tolist()

    def round_of(kind: Kind, served: Iterable[int], chooses: bool) -> list[tuple[Bucket, bool]]:
        # How many scattered positions are computed is not known ahead.
        everywhere = torch.ones_like(start.phase, dtype=torch.bool)
        widths = [1] * len(phases) if plan.scattered else _positions(here, start, kind, everywhere)
        rows = [row for row, phase in enumerate(phases) if phase in served]
        steps = grid.steps(kind, [(widths[row], row, lanes[row], False) for row in rows])
        return [(bucket, chooses) for bucket, _ in steps]

    if REFRESH not in phases:
        return round_of("denoise", (DENOISE,), True)
    steps = round_of("refresh", (REFRESH,), plan.prefill_rule is None)
    # A first token may end its row.
    goes_on = plan.prefill_rule is not None and not plan.preset.first_token
    return steps + (round_of("denoise", (REFRESH, DENOISE), True) if goes_on else [])


def _on_host(plan: Plan, state: RowState) -> tuple[Plan, RowState]:
    """A plan and a state whose tensors the host may read."""
    start = RowState(**{name: field.cpu() for name, field in vars(state).items()})
    B, L = start.tokens.shape
    constants = Constants.of(B, L + min(plan.block_length, L), None, torch.device("cpu"))
    return dataclasses.replace(plan, first=start.block_start, prefilled=None, constants=constants), start


def _positions(plan: Plan, state: RowState, kind: Kind, rows: Tensor) -> list[int]:
    extent = extent_of(plan, state, kind)
    width = extent.stop - extent.begin
    if plan.shadow and kind == "denoise":
        width = width + state.block_end - state.block_start
    return width[rows].tolist()
