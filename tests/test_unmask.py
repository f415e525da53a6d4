"""`unmask`: the rules and every state transition by hand, the reference against a per-row transcription, the kernel against the reference."""

from __future__ import annotations

import dataclasses
import math
import random
import struct
from typing import Any

import pytest
import torch
from dlm_kernels import RowState, UnmaskRule, reference
from dlm_kernels.reference.unmask import quota, select
from dlm_kernels.rules import CACHE_OPS, PASSES, STOPS
from dlm_kernels.state import COMMIT, DENOISE, DONE, ERROR_LOGITS, WIDE
from dlm_kernels.unmask import BLOCK_L, MAX_W, TILES, unmask
from torch import Tensor

MASK, STOP, GIVEN, WRITTEN = 7, 5, 1, 2
STATE_FIELDS = tuple(field.name for field in dataclasses.fields(RowState))
LANES = ("pred", "score", "confidence", "rank", "entropy", "stat_error")
ROWS = ("query_len", "value", "min_unmask", "steps", "block_length")


@dataclasses.dataclass
class Case:
    state: RowState
    rule: UnmaskRule
    args: dict[str, Any]

    def map(self, change) -> Case:
        """The same call with `change(name, tensor)` in place of every tensor."""
        state = RowState(**{name: change(name, getattr(self.state, name)) for name in STATE_FIELDS})
        args = {name: change(name, x) if isinstance(x, Tensor) else x for name, x in self.args.items()}
        return Case(state, self.rule, args)

    def run(self, op=reference.unmask) -> RowState:
        op(self.state, self.rule, **self.args)
        return self.state


def assert_same_state(ours: RowState, expected: RowState, note: object = "") -> None:
    for name in STATE_FIELDS:
        a, b = getattr(ours, name).cpu(), getattr(expected, name).cpu()
        assert torch.equal(a, b), f"{note}: {name}\n{a}\n{b}"


# Hand-worked: which lanes are chosen.

SCORES = (0.5, 0.9, 0.25, 0.9, 0.95)
SELECTIONS = [
    ("a schedule takes the best, ties to the lowest lane", "none", {}, SCORES, None, 0.0, 2, {4, 1}),
    ("a schedule takes no more than there are", "none", {}, SCORES, None, 0.0, 9, {0, 1, 2, 3, 4}),
    ("equal to the threshold does not pass", "threshold", {}, SCORES, None, 0.9, 1, {4}),
    ("equal to the threshold passes if inclusive", "threshold", {"inclusive": True}, SCORES, None, 0.9, 1, {1, 3, 4}),
    ("the best is forced if none passes", "threshold", {}, SCORES, None, 0.99, 1, {4}),
    ("nothing is forced at kmin 0", "threshold", {}, SCORES, None, 0.99, 0, set()),
    ("fewer than kmin pass: the kmin best", "threshold", {}, SCORES, None, 0.92, 3, {4, 1, 3}),
    ("more than kmin pass: all that pass", "threshold", {}, SCORES, None, 0.4, 1, {0, 1, 3, 4}),
    ("the forced lanes go by rank, the test by score", "threshold", {}, SCORES, (5, 4, 3, 2, 1), 0.99, 2, {0, 1}),
    ("NaN and -inf are last, by lane", "none", {}, (math.nan, -math.inf, -9.0, math.nan, -math.inf), None, 0.0, 3, {2, 0, 1}),
    ("-0.0 ties with 0.0", "none", {}, (-0.0, 0.0, -0.0, 0.0, -1.0), None, 0.0, 2, {0, 1}),
    # limits of factor 1: 1/2, 2/3, 3/4, 4/5, 5/6
    ("factor in rank order", "factor", {}, SCORES, None, 1.0, 1, {4, 1, 3}),
    ("factor stops at the first failure", "factor", {}, (0.9, 0.1, 0.95, 0.95, 0.95), (5, 4, 3, 2, 1), 1.0, 1, {0}),
    ("factor takes the best if the first fails", "factor", {}, (0.1, 0.2, 0.3, 0.3, 0.0), None, 1.0, 1, {2}),
    ("factor equal to its limit passes", "factor", {}, (0.5, 0.0, 0.0, 0.0, 0.0), None, 1.0, 0, {0}),
    # entropies 1/8, 1/4, 1/2, 1, 2 in rank order
    ("the entropy budget excludes the position's own", "entropy", {}, SCORES, (5, 4, 3, 2, 1), 0.375, 1, {0, 1, 2}),
    ("the inclusive budget is strict", "entropy", {"inclusive": True}, SCORES, (5, 4, 3, 2, 1), 0.375, 1, {0}),
    ("a budget below the first entropy still gives one", "entropy", {"inclusive": True}, SCORES, (5, 4, 3, 2, 1), 0.0, 1, {0}),
    ("an infinite budget takes all", "entropy", {}, SCORES, (5, 4, 3, 2, 1), math.inf, 0, {0, 1, 2, 3, 4}),
    ("nothing passes a NaN budget", "entropy", {}, SCORES, (5, 4, 3, 2, 1), math.nan, 0, set()),
]


@pytest.mark.parametrize("name, passes, options, score, rank, value, kmin, expected", SELECTIONS, ids=[s[0] for s in SELECTIONS])
def test_selection_by_hand(name, passes, options, score, rank, value, kmin, expected):
    chosen = select(
        UnmaskRule(passes, **options),
        torch.ones(1, 5, dtype=torch.bool),
        torch.tensor([score]),
        torch.tensor([value]),
        torch.tensor([kmin], dtype=torch.int32),
        None if rank is None else torch.tensor([rank], dtype=torch.float32),
        torch.tensor([[0.125, 0.25, 0.5, 1.0, 2.0]]),
    )
    assert {lane for lane in range(5) if chosen[0, lane]} == expected


@pytest.mark.parametrize("m0, S, expected", [(8, 4, [2, 2, 2, 2]), (10, 4, [3, 3, 2, 2]), (2, 4, [1, 1, 1, 1]), (3, 0, [3, 3])])
def test_quota_spreads_the_masks_over_the_steps_and_is_at_least_one(m0, S, expected):
    step = torch.arange(len(expected), dtype=torch.int32)
    given = quota(torch.full_like(step, m0), step, torch.full_like(step, S))
    assert given.tolist() == expected


# Hand-worked: what a row does next. g given, w written, # masked, S written stop, s given stop, . past the canvas; lane j predicts pred[j].

TOKEN = {"g": GIVEN, "w": WRITTEN, "#": MASK, "S": STOP, "s": STOP, ".": 0}


def one_row(canvas: str, block: tuple[int, int], phase: int, cache: str, stop: str, pred: str, kmin: int, block_length: int = 4, **args) -> Case:
    state = RowState.empty(1, len(canvas), "cpu")
    state.tokens[0] = torch.tensor([TOKEN[c] for c in canvas])
    state.unmask_step[0] = torch.tensor([0 if c in "wS" else -1 for c in canvas])
    fields = dict(canvas_len=len(canvas.split(".")[0]), block_start=block[0], block_end=block[1], phase=phase, step=3, block_step=1)
    for name, number in fields.items():
        getattr(state, name)[0] = number
    state.block_masks[0] = canvas[slice(*block)].count("#")
    W = len(pred)
    int32 = dict(dtype=torch.int32)
    defaults = dict(
        kind="wide" if phase == WIDE else "window", query_len=torch.tensor([4], **int32), pred=torch.tensor([[TOKEN[c] for c in pred]]),
        score=torch.arange(W, 0, -1.0)[None], confidence=torch.full((1, W), 0.5), value=torch.tensor([0.0]),
        min_unmask=torch.tensor([kmin], **int32), steps=torch.tensor([2], **int32), block_length=torch.tensor([block_length], **int32),
        mask_id=MASK, stop_ids=torch.tensor([STOP]),
    )  # fmt: skip
    return Case(state, UnmaskRule("none", cache=cache, stop=stop), {**defaults, **args})


# name: canvas, block, phase, cache, stop, pred, kmin -> canvas, phase, block, block_masks, block_step
TRANSITIONS = {
    "masks left: the row goes on": ("gg####", (2, 6), DENOISE, "none", "closed", "wwww", 2, "ggww##", DENOISE, (2, 6), 4, 2),
    "the last mask of the canvas": ("gg####", (2, 6), DENOISE, "none", "closed", "wwww", 4, "ggwwww", DONE, (2, 6), 4, 2),
    "the next block, none": ("g#######", (1, 4), DENOISE, "none", "closed", "wwww", 3, "gwww####", DENOISE, (4, 8), 4, 0),
    "blocks without masks are skipped": ("#gggggggg#", (0, 1), DENOISE, "none", "closed", "wwww", 1, "wgggggggg#", DENOISE, (9, 10), 1, 0),
    "a skip keeps the alignment": ("#ggggg##g", (0, 1), DENOISE, "none", "closed", "wwww", 1, "wggggg##g", DENOISE, (5, 9), 2, 0),
    "the last block is cut at the end of the canvas": ("##g###..##", (0, 3), DENOISE, "none", "closed", "wwww", 2, "wwg###..##", DENOISE,
                                                       (3, 6), 3, 0),  # fmt: skip
    "masks past the canvas do not count": ("##..##", (0, 2), DENOISE, "none", "closed", "wwww", 2, "ww..##", DONE, (0, 2), 2, 2),
    "the next block, refresh": ("#####", (0, 4), DENOISE, "refresh", "closed", "wwww", 4, "wwww#", WIDE, (4, 5), 1, 0),
    "a refresh is denoise step 0": ("#####", (0, 4), WIDE, "refresh", "closed", "wwww", 1, "w####", DENOISE, (0, 4), 4, 2),
    "a refresh may finish its block": ("#####", (0, 4), WIDE, "refresh", "closed", "wwww", 4, "wwww#", WIDE, (4, 5), 1, 0),
    "a prefill selects nothing": ("#####", (0, 4), WIDE, "commit", "closed", "wwww", 4, "#####", DENOISE, (0, 4), 4, 1),
    "a prefill before a given block": ("gggg#", (0, 4), WIDE, "commit", "closed", "wwww", 4, "gggg#", COMMIT, (0, 4), 0, 1),
    "a finished block is committed first": ("#####", (0, 4), DENOISE, "commit", "closed", "wwww", 4, "wwww#", COMMIT, (0, 4), 4, 2),
    "the last block is not committed": ("wwww#", (4, 5), DENOISE, "commit", "closed", "wwww", 1, "wwwww", DONE, (4, 5), 1, 2),
    "after a commit, the very next block": ("wwww##gg##", (0, 4), COMMIT, "commit", "closed", "wwww", 4, "wwww##gg##", DENOISE, (4, 8), 2, 0),
    "a given block is committed too": ("wwwwgggg##", (0, 4), COMMIT, "commit", "closed", "wwww", 4, "wwwwgggg##", COMMIT, (4, 8), 0, 0),
    "a commit at the end of the canvas": ("wwww..", (0, 4), COMMIT, "commit", "closed", "wwww", 4, "wwww..", DONE, (0, 4), 0, 1),
    "closed: a stop token with no mask before it": ("######", (0, 4), DENOISE, "none", "closed", "wSww", 2, "wS####", DONE, (0, 4), 4, 2),
    "closed: an earlier step's stop token counts": ("##S###", (0, 4), DENOISE, "none", "closed", "wwww", 2, "wwS###", DONE, (0, 4), 3, 2),
    "closed: a mask before the stop token": ("##S###", (0, 4), DENOISE, "none", "closed", "wwww", 1, "w#S###", DENOISE, (0, 4), 3, 2),
    "closed: given stop tokens do not count": ("s####", (0, 4), DENOISE, "none", "closed", "wwww", 1, "sw###", DENOISE, (0, 4), 3, 2),
    "after_block: the block is finished first": ("####", (0, 4), DENOISE, "none", "after_block", "Swww", 2, "Sw##", DENOISE, (0, 4), 4, 2),
    "after_block: then the row ends": ("S#####", (0, 4), DENOISE, "none", "after_block", "wwww", 3, "Swww##", DONE, (0, 4), 3, 2),
    "after_block: given stop tokens do not count": ("s#####", (0, 4), DENOISE, "none", "after_block", "wwww", 3, "swww##", DENOISE, (4, 6), 2, 0),
    "never: stop tokens are text": ("######", (0, 4), DENOISE, "none", "never", "SSSS", 4, "SSSS##", DENOISE, (4, 6), 2, 0),
    "a stop token outside the block does not count": ("S###gggg#", (1, 4), DENOISE, "none", "closed", "wwww", 3, "Swwwgggg#", DENOISE,
                                                      (8, 9), 1, 0),  # fmt: skip
    "a stopped row is not committed": ("######", (0, 4), DENOISE, "commit", "closed", "Swww", 4, "Swww##", DONE, (0, 4), 4, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSITIONS)
def test_transition_by_hand(name):
    canvas, block, phase, cache, stop, pred, kmin, canvas_after, phase_after, block_after, masks_after, block_step_after = TRANSITIONS[name]
    state = one_row(canvas, block, phase, cache, stop, pred, kmin).run()
    assert state.tokens[0].tolist() == [TOKEN[c] for c in canvas_after]
    assert state.phase.item() == phase_after
    assert (state.block_start.item(), state.block_end.item()) == block_after
    assert (state.block_masks.item(), state.block_step.item()) == (masks_after, block_step_after)
    assert (state.nfe.item(), state.query_tokens.item(), state.error.item()) == (1, 4, 0)


def test_a_write_records_the_step_and_the_confidence():
    state = one_row("gg####", (2, 6), DENOISE, "none", "closed", "wwww", 2).run()
    assert state.unmask_step[0].tolist() == [-1, -1, 3, 3, -1, -1]
    assert state.unmask_confidence[0].tolist() == [0, 0, 0.5, 0.5, 0, 0]
    assert state.step.item() == 4


def test_an_unusable_statistic_ends_the_row_and_writes_nothing():
    case = one_row("gg####", (2, 6), DENOISE, "none", "closed", "wwww", 1, stat_error=torch.tensor([[0, 0, 4, 0]], dtype=torch.int32))
    before = case.state.clone()
    state = case.run()
    assert (state.phase.item(), state.error.item(), state.nfe.item(), state.step.item()) == (DONE, ERROR_LOGITS, 1, 3)
    assert torch.equal(state.tokens, before.tokens) and torch.equal(state.unmask_step, before.unmask_step)


def test_an_unusable_statistic_of_a_lane_that_is_not_masked_does_not_matter():
    case = one_row("gg#w##", (2, 6), DENOISE, "none", "closed", "wwww", 1, stat_error=torch.tensor([[0, 4, 0, 0]], dtype=torch.int32))
    assert case.run().error.item() == 0


MISFITS = [
    (DENOISE, "wide", "refresh"),
    (COMMIT, "wide", "commit"),
    (WIDE, "window", "refresh"),
    (COMMIT, "window", "none"),
    (DONE, "window", "none"),
    (DONE, "wide", "commit"),
]


@pytest.mark.parametrize("phase, kind, cache", MISFITS)
def test_a_row_that_needs_another_kind_of_step_is_unchanged(phase, kind, cache):
    case = one_row("gg####", (2, 6), phase, cache, "closed", "wwww", 2, kind=kind)
    before = case.state.clone()
    assert_same_state(case.run(), before)


def test_a_row_that_sat_the_forward_out_is_unchanged():
    case = one_row("gg####", (2, 6), DENOISE, "none", "closed", "wwww", 2, query_len=torch.zeros(1, dtype=torch.int32))
    before = case.state.clone()
    assert_same_state(case.run(), before)


def test_a_block_longer_than_the_lanes_is_unchanged():
    case = one_row("gg####", (2, 6), DENOISE, "none", "closed", "www", 2)
    before = case.state.clone()
    assert_same_state(case.run(), before)


# The per-row transcription, and random cases.


def fp32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def oracle_select(rule: UnmaskRule, eligible: list[int], score, rank, entropy, value: float, kmin: int) -> set[int]:
    def clean(x: float) -> float:
        return -math.inf if math.isnan(x) else x

    order = sorted(eligible, key=lambda j: (-clean(rank[j]), j))
    kmin = min(kmin, len(order))
    passing, spent = [], 0
    for r, j in enumerate(order, start=1):
        s = clean(score[j])
        if rule.passes == "none":
            break
        if rule.passes == "threshold":
            if s > value or (rule.inclusive and s == value):
                passing.append(j)
            continue
        if rule.passes == "factor":
            ok = s >= fp32(1 - fp32(value / (r + 1)))
        else:
            own, budget = math.floor(entropy[j] * 2**24), math.floor(value * 2**24)
            ok = spent + own < budget if rule.inclusive else spent <= budget
            spent += own
        if not ok:
            break
        passing.append(j)
    return set(passing if len(passing) >= kmin else order[:kmin])


def oracle(case: Case) -> RowState:
    """`unmask` on Python numbers, row after row."""
    rule, args = case.rule, case.args
    result = case.state.clone()
    stops = set(args["stop_ids"].tolist())
    for b in range(result.tokens.shape[0]):
        row = {name: getattr(result, name)[b].tolist() for name in STATE_FIELDS}
        given = {name: args[name][b].tolist() for name in (*LANES, *ROWS) if args.get(name) is not None}
        oracle_row(row, rule, args["kind"], given, args["mask_id"], stops)
        for name in STATE_FIELDS:
            getattr(result, name)[b] = torch.tensor(row[name], dtype=getattr(result, name).dtype)
    return result


def oracle_row(row: dict[str, Any], rule: UnmaskRule, kind: str, given: dict[str, Any], mask_id: int, stops: set[int]) -> None:
    step_of = {(WIDE, "wide", "commit"): "prefill", (WIDE, "wide", "refresh"): "select", (COMMIT, "window", "commit"): "commit"}
    what = "select" if (row["phase"], kind) == (DENOISE, "window") else step_of.get((row["phase"], kind, rule.cache))
    start, end, canvas_len = row["block_start"], row["block_end"], row["canvas_len"]
    if given["query_len"] == 0 or what is None or (what == "select" and end - start > len(given["score"])):
        return
    row["nfe"] += 1
    row["query_tokens"] += given["query_len"]
    tokens = row["tokens"]

    def open_block(at: int) -> None:
        row["block_start"], row["block_end"], row["block_step"] = at, min(at + given["block_length"], canvas_len), 0
        row["block_masks"] = tokens[at : row["block_end"]].count(mask_id)

    if what == "prefill":
        row["phase"] = DENOISE if row["block_masks"] else COMMIT
        return
    if what == "commit":
        if end >= canvas_len:
            row["phase"] = DONE
            return
        open_block(end)
        row["phase"] = DENOISE if row["block_masks"] else COMMIT
        return

    eligible = [j for j in range(end - start) if tokens[start + j] == mask_id]
    if any(given.get("stat_error", [0] * len(given["score"]))[j] for j in eligible):
        row["error"] |= ERROR_LOGITS
        row["phase"] = DONE
        return
    kmin = given["min_unmask"]
    if rule.quota:
        whole, rest = divmod(row["block_masks"], given["steps"])
        kmin = max(1, whole + (1 if row["block_step"] < rest else 0))
    chosen = oracle_select(rule, eligible, given["score"], given.get("rank", given["score"]), given.get("entropy"), given["value"], kmin)
    for j in chosen:
        tokens[start + j], row["unmask_step"][start + j] = given["pred"][j], row["step"]
        row["unmask_confidence"][start + j] = given["confidence"][j]
    row["step"] += 1
    row["block_step"] += 1

    masked = [p for p in range(start, end) if tokens[p] == mask_id]
    stopped = [p for p in range(start, end) if tokens[p] in stops and row["unmask_step"][p] >= 0]
    later = [p for p in range(end, canvas_len) if tokens[p] == mask_id]
    if rule.stop == "closed" and any(all(q > p for q in masked) for p in stopped):
        row["phase"] = DONE
    elif masked:
        row["phase"] = DENOISE
    elif not later or (rule.stop == "after_block" and stopped):
        row["phase"] = DONE
    elif rule.cache == "commit":
        row["phase"] = COMMIT
    else:
        at = end
        while at + given["block_length"] <= later[0]:
            at += given["block_length"]
        open_block(at)
        row["phase"] = WIDE if rule.cache == "refresh" else DENOISE


def random_case(seed: int, B: int = 4, wide: bool = False) -> Case:
    """One call with random rows: ties, NaN and -inf scores, infilled blocks, blocks without masks, errors, rows that do not take part.
    `wide`: more lanes than one tile class, or more canvas than one tile of the search for the next mask."""
    rng = random.Random(seed)
    W = rng.choice((31, 33, 63, 65, 70)) if wide else rng.choice((1, 2, 3, 5, 8, 12))
    L = rng.choice((2 * W + 3, BLOCK_L + W + 1, 2 * BLOCK_L + 2 * W)) if wide else rng.randint(W, 4 * W + 6)
    rule = UnmaskRule(rng.choice(PASSES), rng.random() < 0.4, rng.random() < 0.4, rng.choice(CACHE_OPS), rng.choice(STOPS))
    kind = "wide" if rule.cache != "none" and rng.random() < 0.3 else "window"
    fitting = {"wide": [WIDE], "window": [DENOISE, DENOISE, DENOISE] + [COMMIT] * (rule.cache == "commit")}[kind]
    stops = rng.sample(range(MASK), rng.choice((0, 1, 1, 3)))
    rows = [random_row(rng, L, W, stops, rng.choice(fitting) if rng.random() < 0.9 else rng.randint(WIDE, DONE)) for _ in range(B)]

    def gather(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=dtype)

    fields = RowState.empty(1, 1, "cpu")
    state = RowState(**{name: gather(name, getattr(fields, name).dtype) for name in STATE_FIELDS})
    dtypes = dict.fromkeys(("query_len", "min_unmask", "steps", "block_length", "stat_error"), torch.int32) | {"pred": torch.int64}
    args: dict[str, Any] = {name: gather(name, dtypes.get(name, torch.float32)) for name in (*ROWS, *LANES)}
    for name, keep in (("rank", 0.5), ("entropy", float(rule.passes == "entropy")), ("stat_error", 0.7)):
        if rng.random() >= keep:
            del args[name]
    return Case(state, rule, dict(kind=kind, mask_id=MASK, stop_ids=torch.tensor(stops, dtype=torch.int64), **args))


def random_row(rng: random.Random, L: int, W: int, stops: list[int], phase: int) -> dict[str, Any]:
    canvas_len = rng.choice((L, rng.randint(1, L)))
    start = rng.choice((0, rng.randint(0, max(0, canvas_len - W))))
    end = min(canvas_len, start + rng.choice((W, rng.randint(1, W))))
    inside, after = rng.choice((0.0, 0.2, 0.7, 1.0)), rng.choice((0.0, 0.0, 2 / L, 0.3, 1.0))
    tokens, unmask_step = [], []
    for p in range(L):
        masked = rng.random() < (inside if start <= p < end else after if p >= end else 0.0)
        written = not masked and p < end and rng.random() < 0.5
        tokens.append(MASK if masked else rng.choice(stops) if stops and rng.random() < 0.1 else rng.randrange(MASK))
        unmask_step.append(rng.randrange(3) if written else -1)
    eligible = [start + j < end and tokens[start + j] == MASK for j in range(W)]
    masks = sum(eligible)
    coarse, broken = rng.random() < 0.6, rng.random() < 0.08

    def number() -> float:
        return rng.choice((0.0, -0.0, 0.25, 0.5, 0.9, 1.0, -math.inf, math.nan)) if coarse else fp32(rng.random())

    def lanes(draw, poison) -> list:
        """Lanes that are not eligible may hold anything."""
        return [draw() if ok else poison for ok in eligible]

    return dict(
        tokens=tokens, unmask_step=unmask_step, unmask_confidence=[0.5 if s >= 0 else 0.0 for s in unmask_step], canvas_len=canvas_len,
        block_start=start, block_end=end, block_masks=masks + rng.choice((0, 0, rng.randint(0, end - start - masks))),
        block_step=rng.randrange(5), step=rng.randrange(3, 9), phase=phase, nfe=rng.randrange(9), query_tokens=rng.randrange(99), error=0,
        query_len=0 if rng.random() < 0.12 else rng.randint(1, W),
        value=fp32(rng.choice((0.0, 0.25, 0.5, 0.9, 1.0, 2.0, 4.0, -0.5))), min_unmask=rng.choice((0, 1, 1, 1, 2, W, W + 5)),
        steps=rng.choice((1, 2, 3, W, 2 * W + 1)), block_length=rng.randint(1, W),
        pred=lanes(lambda: rng.choice(stops) if stops and rng.random() < 0.15 else rng.randrange(MASK), 10**15),
        score=lanes(number, math.inf), rank=lanes(number, math.inf), confidence=lanes(lambda: fp32(rng.random()), math.nan),
        entropy=lanes(lambda: rng.choice((0.0, 0.125, 0.25, 0.5)) if coarse else fp32(0.3 * rng.random()), math.nan),
        stat_error=lanes(lambda: int(broken and rng.random() < 0.5), 1),
    )  # fmt: skip


def test_reference_equals_the_per_row_transcription_on_random_cases():
    phases: set[tuple[int, int]] = set()
    for seed in range(450):
        case = random_case(seed, wide=seed % 10 == 0)
        before, expected = case.state.phase.tolist(), oracle(case)
        assert_same_state(case.run(), expected, f"seed {seed} {case.rule}")
        phases |= set(zip(before, case.state.phase.tolist(), strict=True))
    moves = {(WIDE, DENOISE), (WIDE, COMMIT), (WIDE, WIDE), (WIDE, DONE), (DENOISE, DENOISE), (DENOISE, COMMIT), (DENOISE, WIDE),
             (DENOISE, DONE), (COMMIT, DENOISE), (COMMIT, COMMIT), (DONE, DONE)}  # fmt: skip
    assert moves <= phases, f"the cases never took {moves - phases}"


@pytest.mark.campaign
def test_campaign_reference_equals_the_transcription_and_the_kernel_equals_the_reference(device):
    for seed in range(10_000, 14_000):
        case = random_case(seed, wide=seed % 4 == 0)
        expected = oracle(case)
        if seed % 4 == 0:
            ours = case.map(lambda _, x: x.to(device, copy=True))
            assert_same_state(ours.run(unmask), expected, f"kernel, seed {seed} {case.rule}")
        assert_same_state(case.run(), expected, f"reference, seed {seed} {case.rule}")


def guarded(case: Case) -> tuple[Case, list[tuple[str, Tensor, Tensor]]]:
    """The case with every tensor inside a larger buffer (so rows are strided), and each buffer with a mask of its guard zone."""
    buffers = []

    def embed(name: str, x: Tensor) -> Tensor:
        guard = -77 if not x.is_floating_point() else -777.0
        buffer = torch.full([n + 4 for n in x.shape], guard, dtype=x.dtype, device=x.device)
        zone = torch.ones_like(buffer, dtype=torch.bool)
        inner = tuple(slice(2, 2 + n) for n in x.shape)
        buffer[inner], zone[inner] = x, False
        buffers.append((name, buffer, zone))
        return buffer[inner]

    return case.map(embed), buffers


KERNEL_SEEDS = range(64)


@pytest.mark.parametrize("seed", KERNEL_SEEDS)
def test_kernel_equals_reference_on_strided_rows_and_touches_nothing_else(seed, device):
    case = random_case(1000 + seed, B=3, wide=seed % 2 == 0).map(lambda _, x: x.to(device))
    expected = case.map(lambda _, x: x.clone()).run()
    ours, buffers = guarded(case)
    inputs = {name: x.clone() for name, x in ours.args.items() if isinstance(x, Tensor)}
    assert_same_state(ours.run(unmask), expected, f"seed {seed} {case.rule}")
    for name, buffer, zone in buffers:
        assert ((buffer == (-777.0 if buffer.is_floating_point() else -77)) | ~zone).all(), f"{name} was written outside its rows"
    for name, before in inputs.items():
        assert torch.equal(before.nan_to_num(), ours.args[name].nan_to_num()), f"the input {name} was written"


@pytest.mark.parametrize("passes", PASSES)
def test_kernel_equals_reference_in_a_tile_of_many_warps(passes, device):
    W = TILES[3][0] + 1
    rng = random.Random(W)
    row = random_row(rng, W, W, [], DENOISE)
    row |= dict(canvas_len=W, block_start=0, block_end=W, tokens=[MASK if rng.random() < 0.8 else 0 for _ in range(W)], query_len=W, value=0.5)
    row |= dict(rank=[fp32(rng.randrange(40) / 40) for _ in range(W)], min_unmask=40, block_masks=W)
    row |= dict(score=[fp32(1 - rng.random() / 300) for _ in range(W)], entropy=[fp32(0.01 * rng.random()) for _ in range(W)])
    fields = RowState.empty(1, 1, "cpu")
    state = RowState(**{name: torch.tensor([row[name]], dtype=getattr(fields, name).dtype) for name in STATE_FIELDS})
    lanes = dict(pred=torch.zeros(1, W, dtype=torch.int64), confidence=torch.rand(1, W))
    lanes |= {name: torch.tensor([row[name]], dtype=torch.float32) for name in ("score", "rank", "entropy", "value")}
    rows = {name: torch.tensor([row[name]], dtype=torch.int32) for name in ("query_len", "min_unmask", "steps", "block_length")}
    args = dict(kind="window", mask_id=MASK, stop_ids=torch.tensor([3]), **lanes, **rows)
    case = Case(state, UnmaskRule(passes), args).map(lambda _, x: x.to(device))
    expected = case.map(lambda _, x: x.clone()).run()
    assert (expected.unmask_step == row["step"]).sum() >= 40
    assert_same_state(case.run(unmask), expected)


@pytest.mark.parametrize("op, seeds", [(reference.unmask, range(2000, 2040)), (unmask, range(2000, 2006))], ids=["reference", "kernel"])
def test_a_row_alone_equals_the_row_in_the_batch(op, seeds, device):
    for seed in seeds:
        case = random_case(seed, wide=seed % 2 == 0).map(lambda _, x: x.to(device))
        alone = [case.map(lambda name, x, b=b: (x if name == "stop_ids" else x[b : b + 1]).clone()) for b in range(4)]
        together = case.run(op)
        for b, row in enumerate(alone):
            expected = RowState(**{name: getattr(together, name)[b : b + 1] for name in STATE_FIELDS})
            assert_same_state(row.run(op), expected, f"seed {seed} row {b}")


def test_whole_decodes_finish_with_fewer_masks_at_every_selection_and_leave_done_rows_alone():
    for seed in range(40):
        case = random_case(seed)
        B, W, rng = 4, case.args["score"].shape[1], torch.Generator().manual_seed(seed)
        case.state.phase.copy_(torch.full((B,), DENOISE if case.rule.cache == "none" else WIDE))
        case.state.unmask_step.fill_(-1)  # no stop token yet
        case.args |= dict(query_len=torch.ones(B, dtype=torch.int32), min_unmask=case.args["min_unmask"].clamp(min=1), stat_error=None)
        for _ in range(8 * case.state.tokens.shape[1] + 8):
            if (case.state.phase == DONE).all():
                break
            case.args["kind"] = "wide" if (case.state.phase == WIDE).any() else "window"
            case.args |= dict(pred=torch.randint(0, MASK, (B, W), generator=rng), score=torch.rand(B, W, generator=rng), rank=None)
            case.args |= {name: torch.rand(B, W, generator=rng) for name in ("confidence", "entropy")}
            before = case.state.clone()
            case.run()
            selected = (case.state.step > before.step) & in_block_masks(before)
            fewer = (case.state.tokens == MASK).sum(1) < (before.tokens == MASK).sum(1)
            assert (fewer | ~selected).all(), f"seed {seed}"
            done = before.phase == DONE
            for name in STATE_FIELDS:
                assert torch.equal(getattr(case.state, name)[done], getattr(before, name)[done]), f"seed {seed} {name}"
        else:
            raise AssertionError(f"seed {seed}: the rows never finished, {case.state}")


def in_block_masks(state: RowState) -> Tensor:
    """Rows whose block holds a mask."""
    position = torch.arange(state.tokens.shape[1])
    return ((state.tokens == MASK) & (position >= state.block_start[:, None]) & (position < state.block_end[:, None])).any(1)


@pytest.mark.parametrize("seed", range(12))
def test_reference_reads_nothing_on_the_host(seed):
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = random_case(seed)
    with FakeTensorMode() as fake:
        case.map(lambda _, x: fake.from_tensor(x)).run()


def test_an_empty_batch_does_nothing():
    for op in (reference.unmask, unmask):
        random_case(0).map(lambda name, x: x if name == "stop_ids" else x[:0]).run(op)


def case_of(**args) -> Case:
    case = one_row("gg####", (2, 6), DENOISE, "none", "closed", "wwww", 1)
    case.args |= args
    return case


ERRORS = [
    (dict(score=torch.zeros(1, 4, dtype=torch.float64)), TypeError, "unmask: score must be torch.float32, got torch.float64"),
    (dict(pred=torch.zeros(1, 4, dtype=torch.int32)), TypeError, "unmask: pred must be torch.int64, got torch.int32"),
    (dict(query_len=torch.zeros(1)), TypeError, "unmask: query_len must be torch.int32, got torch.float32"),
    (dict(rank=torch.zeros(1, 5)), ValueError, r"unmask: rank must have shape \(1, 4\), got \(1, 5\)"),
    (dict(value=torch.zeros(2)), ValueError, r"unmask: value must have shape \(1,\), got \(2,\)"),
    (dict(confidence=torch.zeros(1, 8)[:, ::2]), ValueError, r"last dimension of confidence must have stride 1, got strides \(8, 2\)"),
    (dict(score=torch.zeros(4)), ValueError, r"unmask: score must be 2-D and at least one position wide, got shape \(4,\)"),
    (dict(stop_ids=torch.arange(17)), ValueError, r"unmask: stop_ids must be \[K\] with K <= 16, got shape \(17,\)"),
    (dict(stop_ids=torch.zeros(1, dtype=torch.int32)), TypeError, "unmask: stop_ids must be torch.int64, got torch.int32"),
    (dict(kind="narrow"), ValueError, "unmask: kind must be one of wide, window, got kind='narrow'"),
    (dict(kind="wide"), ValueError, "unmask: kind 'wide' needs rule.cache 'commit' or 'refresh'"),
    (dict(mask_id=-1), ValueError, r"unmask: mask_id must be in \[0, 2\^31\), got mask_id=-1"),
    (dict(mask_id=7.0), TypeError, "unmask: mask_id must be an int, got float"),
    (dict(score=torch.zeros(1, 4, device="meta")), ValueError, "unmask: score must be on cpu like tokens, got meta"),
]


@pytest.mark.parametrize("op", [reference.unmask, unmask], ids=["reference", "kernel"])
@pytest.mark.parametrize("args, error, message", ERRORS, ids=[e[2][:60] for e in ERRORS])
def test_a_wrong_argument_is_named(op, args, error, message):
    with pytest.raises(error, match=message):
        case_of(**args).run(op)


@pytest.mark.parametrize("op", [reference.unmask, unmask], ids=["reference", "kernel"])
def test_an_entropy_rule_without_entropies_is_an_error(op):
    case = case_of()
    case.rule = UnmaskRule("entropy")
    with pytest.raises(ValueError, match="unmask: entropy must be given for rule.passes 'entropy', got entropy=None"):
        case.run(op)


def test_more_lanes_than_the_widest_tile_is_an_error_of_the_kernel_only():
    W = MAX_W + 1
    case = case_of(pred=torch.zeros(1, W, dtype=torch.int64), score=torch.zeros(1, W), confidence=torch.zeros(1, W), entropy=torch.zeros(1, W))
    case.map(lambda _, x: x.clone()).run()
    with pytest.raises(ValueError, match=f"must have W <= {W - 1}, got W={W}"):
        case.run(unmask)
