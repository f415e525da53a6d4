"""`draft_build` and `verify`: by hand, reference against a per-row transcription, kernel against reference."""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import pytest
import torch
from drafts_cases import FIELDS, MASK, Case, check_kernels, check_oracle, random_case, run_case, same, same_sources

from dlm_kernels import reference
from dlm_kernels.drafts import launch as drafts
from dlm_kernels.reference import DraftSource

BUILDS = pytest.mark.parametrize("op", [reference.draft_build, drafts.draft_build], ids=["reference", "kernel"])
VERIFIES = pytest.mark.parametrize("op", [reference.verify, drafts.verify], ids=["reference", "kernel"])


def one_row(held: list[list[int]], token: list[list[int]], score: list[list[float]], **given) -> Case:
    """Four masked lanes whose source predicts 1 2 3 4 and likes them from left to right, and what their drafts hold and
    say."""
    row = {"tokens": [MASK] * 4, "eligible": [True] * 4, "ready": True, "drafting": True, "selects": True,
           "source_score": [4.0, 3.0, 2.0, 1.0]} | given  # fmt: skip
    source = DraftSource(
        token=torch.tensor([[1, 2, 3, 4]]),
        score=torch.tensor([row["source_score"]]),
        confidence=torch.tensor([[0.5, 0.5, 0.5, 0.5]]),
        tried=torch.tensor([3], dtype=torch.int32),
        accepted=torch.tensor([2], dtype=torch.int32),
    )
    flags = {name: torch.tensor([row[name]]) for name in ("tokens", "eligible", "ready", "drafting", "selects")}
    confidence = torch.arange(len(held))[None, :, None].expand(1, -1, 4).float().contiguous()
    by_draft = dict(
        held=torch.tensor([held]), token=torch.tensor([token]), score=torch.tensor([score]), confidence=confidence
    )
    return Case(source, **by_draft, **flags)


M = MASK
DRAFTS = [[1, M, M, M], [1, 2, M, M], [1, 2, 3, M]]
RIGHT = [[4.0, 3.0, 2.0, 1.0]] * 3  # what the static decoder writes next is what the next draft holds
SAYS = [[0, 2, 3, 4], [0, 0, 3, 4], [0, 0, 0, 4]]

# name: arguments -> lanes chosen, their tokens, drafts accepted beyond the first
VERIFIED = {
    "all drafts agree, and the last mask comes with them": ((DRAFTS, SAYS, RIGHT, {}), {0: 1, 1: 2, 2: 3, 3: 4}, 2),
    "a chain ends where the token differs": (
        (DRAFTS, [[0, 2, 3, 4], [0, 0, 5, 4], [0] * 4], RIGHT, {}), {0: 1, 1: 2}, 1,
    ),
    "and where another lane comes next": (
        (DRAFTS, SAYS, [[4.0, 3, 2, 1], [4.0, 3, 1, 2], [4.0, 3, 2, 1]], {}), {0: 1, 1: 2}, 1,
    ),
    "the first draft needs no agreement": ((DRAFTS, [[0, 5, 5, 5]] * 3, RIGHT, {}), {0: 1}, 0),
    "a row that does not draft accepts the first only": ((DRAFTS, SAYS, RIGHT, {"drafting": False}), {0: 1}, 0),
    "a row without a source writes nothing": ((DRAFTS, SAYS, RIGHT, {"ready": False}), {}, 0),
    "but its last mask": (
        ([[0, 0, 0, M]] * 3, [[0, 0, 0, 5]] * 3, RIGHT, {"ready": False, "eligible": [False] * 3 + [True]}), {3: 5}, 0),
    "no draft beyond the lanes there are": (
        ([[1, 6, 6, 6]] * 3, SAYS, RIGHT, {"eligible": [True] + [False] * 3}), {0: 1}, 0),
    "NaN is last, ties go to the lowest lane": (
        (DRAFTS, SAYS, [[math.nan, 3.0, 3.0, math.nan]] * 3, {}), {0: 1, 1: 2, 2: 3, 3: 4}, 2),
}  # fmt: skip


@VERIFIES
@pytest.mark.parametrize("name", VERIFIED)
def test_verified_by_hand(name, op, device):
    (held, token, score, given), chosen, accepted = VERIFIED[name]
    case = one_row(held, token, score, **given).copy(device)
    result = case.verify(op)
    assert {lane: result.pred[0, lane].item() for lane in range(4) if result.chosen[0, lane]} == chosen
    assert case.source.accepted.item() == 2 + accepted
    assert case.source.tried.item() == 3 + (given.get("ready", True) and given.get("drafting", True))
    assert case.source.token[0].tolist() == token[accepted]


@VERIFIES
def test_a_row_that_sits_out_keeps_its_source(op, device):
    case = one_row(DRAFTS, SAYS, RIGHT, selects=False).copy(device)
    before = case.copy(device).source
    assert case.verify(op).chosen.all()
    same_sources(case.source, before)


@VERIFIES
def test_the_confidence_is_that_of_the_canvas_that_predicted_the_lane(op, device):
    case = one_row(DRAFTS, SAYS, RIGHT).copy(device)
    assert case.verify(op).confidence[0].tolist() == [0.5, 0.5, 0.5, 2.0]


@BUILDS
@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, [[1, M, M, M], [1, 2, M, M], [1, 2, 3, M]]),
        ({"source_score": [math.nan, -0.0, 0.0, 1.0]}, [[M, M, M, 4], [M, 2, M, 4], [M, 2, 3, 4]]),
        ({"eligible": [False, True, False, True]}, [[M, 2, M, M], [M, 2, M, 4], [M, 2, M, 4]]),
        ({"ready": False}, [[M] * 4] * 3),
    ],
    ids=["one lane more each", "ties and NaN", "no more than there are", "a row without a source"],
)
def test_built_by_hand(op, given, expected, device):
    case = one_row(DRAFTS, SAYS, RIGHT, **given).copy(device)
    assert case.build(op)[0].tolist() == expected


def test_references_equal_the_per_row_transcription_on_random_cases():
    accepted = torch.zeros(6, dtype=torch.int64)
    for seed in range(250):
        case = random_case(seed)
        check_oracle(case)
        before = case.source.accepted.clone()
        case.verify()
        accepted += torch.bincount(case.source.accepted - before, minlength=6)
    assert (accepted[:3] > 10).all() and accepted[3:].sum() > 5, f"too few chains of some length: {accepted.tolist()}"


def test_kernels_equal_references_across_tiles_and_touch_nothing_else(device):
    boundary = sum(run_case(seed, device)["boundary"] for seed in range(60))
    assert boundary >= 30


@pytest.mark.parametrize("W", [33, 257, 1025])
def test_kernels_equal_references_in_the_tiles_of_the_table(W, device):
    check_kernels(random_case(W, B=1, W=W, D=3).copy(device))


@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "kernel"])
def test_a_row_alone_equals_the_row_in_the_batch(kernel, device):
    build, verify = (drafts.draft_build, drafts.verify) if kernel else (reference.draft_build, reference.verify)
    for seed in range(300, 305 if kernel else 340):
        case = random_case(seed, B=3).copy(device)
        alone = [case.map(lambda _, x, b=b: x[b : b + 1].clone()) for b in range(3)]
        held, result = case.build(build), case.verify(verify)
        for b, row in enumerate(alone):
            same("held", row.build(build), held[b : b + 1])
            for ours, expected in zip(row.verify(verify), result, strict=True):
                same(f"seed {seed} row {b}", ours, expected[b : b + 1])
            same_sources(row.source, DraftSource(**{name: getattr(case.source, name)[b : b + 1] for name in FIELDS}))


@pytest.mark.usefixtures("without_debug")
def test_each_op_is_one_launch_and_its_allocations(device):
    case, launches = random_case(7, B=2, W=9, D=3).copy(device), []
    allocated = []
    for name in ("draft_build", "verify"):
        kernel = getattr(drafts, f"{name}_kernel")
        counted = mock.MagicMock()
        counted.__getitem__.side_effect = lambda grid, kernel=kernel: launches.append(grid) or kernel[grid]
        allocations = mock.patch.object(torch, "empty", side_effect=torch.empty)
        with mock.patch.object(drafts, f"{name}_kernel", counted), allocations as empty:
            (case.build if name == "draft_build" else case.verify)(getattr(drafts, name))
        allocated.append(empty.call_count)
    assert launches == [(2,), (2,)] and allocated == [1, 3]


def test_an_empty_batch_does_nothing():
    empty = random_case(0, W=3, D=2).map(lambda _, x: x[:0])
    for build, verify in ((reference.draft_build, reference.verify), (drafts.draft_build, drafts.verify)):
        assert empty.build(build).shape == (0, 2, 3) and empty.verify(verify).chosen.shape == (0, 3)


def test_references_read_nothing_on_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    drawn = random_case(1)
    with FakeTensorMode() as fake:
        case = drawn.map(lambda _, x: fake.from_tensor(x))
        case.build()
        case.verify()


ERRORS = [
    ("source.score", lambda x: x.double(), TypeError, "source.score must be torch.float32, got torch.float64"),
    ("eligible", lambda x: x.int(), TypeError, "eligible must be torch.bool, got torch.int32"),
    ("ready", lambda x: x[:1], ValueError, r"ready must have shape \(2,\), got \(1,\)"),
    (
        "source.token",
        lambda x: x.t().contiguous().t(),
        ValueError,
        r"last dimension of source.token must have stride 1",
    ),
    ("source.tried", lambda x: x.to("meta"), ValueError, "source.tried must be on cpu like "),
]


@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "kernel"])
@pytest.mark.parametrize("name, change, error, message", ERRORS, ids=[e[0] for e in ERRORS])
def test_a_wrong_argument_is_named(kernel, name, change, error, message):
    case = random_case(3, B=2, W=5, D=2).map(lambda field, x: change(x) if field == name else x)
    for op, module in (("draft_build", case.build), ("verify", case.verify)):
        with pytest.raises(error, match=f"^{op}: .*{message}"):
            module(getattr(drafts if kernel else reference, op))


@BUILDS
def test_drafts_are_counted_with_an_int_of_at_least_one(op):
    case = random_case(3, W=5)
    for D, error, message in (
        (0, ValueError, "D must be at least 1, got D=0"),
        (1.0, TypeError, "D must be an int, got float"),
    ):
        with pytest.raises(error, match=f"draft_build: {message}"):
            op(case.source, case.tokens, case.eligible, case.ready, D=D)


@VERIFIES
def test_what_verify_writes_has_memory_of_its_own_and_a_mask_is_a_token(op):
    case = random_case(3, B=2, W=5)
    before = case.source.token.clone()
    shared = dataclasses.replace(case, source=dataclasses.replace(case.source, accepted=case.source.tried))
    with pytest.raises(
        ValueError, match="verify: source.tried and source.accepted are written in place and must not share memory"
    ):
        shared.verify(op)
    with pytest.raises(ValueError, match=r"verify: mask_id must be in \[0, 2\^31\), got mask_id=-1"):
        op(case.source, case.held, case.token, case.score, case.confidence, eligible=case.eligible, ready=case.ready,
           drafting=case.drafting, selects=case.selects, mask_id=-1)  # fmt: skip
    assert torch.equal(case.source.token, before)


@VERIFIES
def test_drafts_are_three_dimensional(op):
    case = random_case(3, W=5)
    case.held = case.held[:, 0]
    with pytest.raises(
        ValueError, match=r"verify: held must be \[B, D, W\] with at least one lane, got shape \(2, 5\)"
    ):
        case.verify(op)
