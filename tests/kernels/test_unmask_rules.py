"""`unmask` by hand, rule by rule: lanes, edits, renoise, exits, masking again, first tokens and pipelines, for the
reference and the kernel alike."""

from __future__ import annotations

import pytest
import torch
from unmask_cases import STOP, WRITTEN, drawn, one_row

from dlm_kernels import UnmaskRule, reference
from dlm_kernels.state import COMMIT, DENOISE, DONE, ERROR_STALLED, REFRESH
from dlm_kernels.unmask import unmask

# One row: rule, canvas, region, phase, what each lane predicts, arguments -> canvas, phase, region. g given, w e r
# written, # masked, S written stop, s given stop. Scores fall from lane to lane unless given, kmin is 1 unless given,
# and the row's step is 3.
FIXED = UnmaskRule("none")
EDIT, EDIT_COMMIT = (UnmaskRule("none", edit=True, stop="after_block", cache=cache) for cache in ("none", "commit"))
RENOISE = UnmaskRule("none", renoise=True, stop="never")
LOWEST, SABER, WINO = (UnmaskRule("none", remask=remask) for remask in ("lowest", "saber", "wino"))
FIRST = UnmaskRule("none", cache="commit", first_token=True)
D2F = UnmaskRule("threshold", pipeline=True, scope="each", cache="fused", stop="appends")
D2F_CLOSED, D2F_BLOCK = (
    UnmaskRule("threshold", pipeline=True, scope="each", stop=stop) for stop in ("closed", "after_block")
)
D3LLM = UnmaskRule("threshold", pipeline=True, scope="first", stop="fill")
DELAYED = UnmaskRule("threshold", pipeline=True, scope="first", cache="delayed", stop="fill")

LANES = {
    "lanes may begin before the block": (
        FIXED, "gg####", (2, 6), DENOISE, "wwwwww", dict(kmin=2, lane_start=1), "ggww##", DENOISE, (2, 6)),
    "masks before the block are not eligible": (
        FIXED, "##g###", (2, 6), DENOISE, "wwwwww", dict(kmin=1, lane_start=0), "##gw##", DENOISE, (2, 6)),
    "lanes that are not allowed are not chosen": (
        FIXED, "gg####", (2, 6), DENOISE, "wwww", dict(kmin=3, allowed=[False, True, False, True]),
        "gg#w#w", DENOISE, (2, 6)),
    "a row that may take another step": (
        FIXED, "####", (0, 4), DENOISE, "wwww", dict(max_steps=4), "w###", DENOISE, (0, 4)),
    "an exiting row writes its masks before and behind the block": (
        FIXED, "#g##g###", (2, 4), DENOISE, "wwwwwwww", dict(lane_start=0, exits=True), "wgwwgwww", DONE, (2, 4)),
    "an exiting row keeps the masks that no lane sees": (
        FIXED, "######", (0, 2), DENOISE, "wwww", dict(exits=True, block_length=2), "wwww##", DENOISE, (4, 6)),
}  # fmt: skip

EDITS = {
    "a better prediction replaces a written token": (
        EDIT, "we##", (0, 4), DENOISE, "reww", dict(edit_value=3.5), "rew#", DENOISE, (0, 4)),
    "equal to edit_value is not above it": (
        EDIT, "we##", (0, 4), DENOISE, "reww", dict(edit_value=4.0), "wew#", DENOISE, (0, 4)),
    "given tokens are not edited": (
        EDIT, "ge##", (0, 4), DENOISE, "rrww", dict(edit_value=0.0), "grw#", DENOISE, (0, 4)),
    "a step that edits does not finish the block": (
        EDIT, "ww##", (0, 2), DENOISE, "we", dict(edit_value=0.0), "we##", DENOISE, (0, 2)),
    "a step that fills the block does not finish it": (
        EDIT, "w###", (0, 2), DENOISE, "we", dict(edit_value=9.0), "we##", DENOISE, (0, 2)),
    "a step that writes nothing does": (
        EDIT, "ww##", (0, 2), DENOISE, "ww", dict(edit_value=0.0), "ww##", DENOISE, (2, 4)),
    "its keys are final: no commit step": (
        EDIT_COMMIT, "ww##", (0, 2), DENOISE, "ww", dict(edit_value=0.0), "ww##", DENOISE, (2, 4)),
    "a given block after it is committed": (
        EDIT_COMMIT, "wwgg#", (0, 2), DENOISE, "ww", dict(edit_value=0.0), "wwgg#", COMMIT, (2, 4)),
    "an exiting row is not edited, and done": (
        EDIT, "w###", (0, 4), DENOISE, "eeee", dict(edit_value=0.0, exits=True), "weee", DONE, (0, 4)),
    "every region lane that is not chosen is drawn anew": (
        RENOISE, "wgew##", (0, 4), DENOISE, "rrrr", dict(kmin=2, refill=[3, 3, 4, 3]), "rrre##", DENOISE, (0, 4)),
    "only an exit finishes the block": (
        RENOISE, "wgeg##", (0, 4), DENOISE, "rrrr", dict(exits=True, refill=[3] * 4), "rrrr##", DENOISE, (4, 6)),
}  # fmt: skip
REMASKS = {
    "lowest: of what was written, this step included": (
        LOWEST, "ww##", (0, 4), DENOISE, "wwww", dict(remask_score=[0.9, 0.2, 0.5, 0.1], remask_count=2),
        "w###", DENOISE, (0, 4)),
    "lowest: ties to the lowest lane": (
        LOWEST, "ww##", (0, 4), DENOISE, "wwww", dict(remask_score=[0.5, 0.5, 0.5, 0.1], remask_count=1),
        "#ww#", DENOISE, (0, 4)),
    "lowest: NaN is below everything": (
        LOWEST, "ww##", (0, 4), DENOISE, "wwww", dict(remask_score=[-9.0, float("nan"), 0.5, 0.1], remask_count=1),
        "w#w#", DENOISE, (0, 4)),
    "lowest: given tokens stay": (
        LOWEST, "gw##", (0, 4), DENOISE, "wwww", dict(remask_score=[0.0, 0.9, 0.5, 0.1], remask_count=9),
        "g###", DENOISE, (0, 4)),
    "lowest: a block that is masked again is not finished": (
        LOWEST, "w###", (0, 2), DENOISE, "ww", dict(remask_score=[0.0, 0.5], remask_count=1), "#w##", DENOISE, (0, 2)),
    "lowest: an exiting row keeps all": (
        LOWEST, "ww##", (0, 4), DENOISE, "wwww", dict(remask_score=[0.0] * 4, remask_count=9, exits=True),
        "wwww", DONE, (0, 4)),
    "saber: one of two": (
        SABER, "w###", (0, 4), DENOISE, "wwww", dict(kmin=2, remask_score=[0.1, 0.5, 0.9, 0.0]),
        "#ww#", DENOISE, (0, 4)),
    "saber: half of n": (
        SABER, "w#####", (0, 6), DENOISE, "wwwwww", dict(kmin=4, remask_score=[0.1, 0.5, 0.9, 0.4, 0.3, 0.0]),
        "#www##", DENOISE, (0, 6)),
    "saber: none of one": (
        SABER, "w###", (0, 4), DENOISE, "wwww", dict(kmin=1, remask_score=[0.1] * 4), "ww##", DENOISE, (0, 4)),
    "saber: none if no mask is left": (
        SABER, "w##", (0, 3), DENOISE, "www", dict(kmin=2, remask_score=[0.1] * 3), "www", DONE, (0, 3)),
    "wino: what was written before and scores below remask_value": (
        WINO, "www##", (0, 5), DENOISE, "wwwww",
        dict(kmin=2, remask_score=[0.4, 0.5, 0.3, 0.1, 0.1], remask_value=0.5, remask_count=5),
        "#w#ww", DENOISE, (0, 5)),
    "wino: at most remask_count": (
        WINO, "www##", (0, 5), DENOISE, "wwwww",
        dict(kmin=2, remask_score=[0.4, 0.5, 0.3, 0.1, 0.1], remask_value=0.5, remask_count=1),
        "ww#ww", DENOISE, (0, 5)),
    "wino: nothing if only one was chosen": (
        WINO, "www##", (0, 5), DENOISE, "wwwww", dict(kmin=1, remask_score=[0.0] * 5, remask_value=0.5, remask_count=5),
        "wwww#", DENOISE, (0, 5)),
}  # fmt: skip

FIRST_TOKENS = {
    "the first position of the block after a prefill": (
        FIRST, "gg####", (2, 6), REFRESH, "wwww", {}, "ggw###", DENOISE, (2, 6)),
    "and after a commit": (
        FIRST, "wwww####", (0, 4), COMMIT, "wwww", {}, "wwwww###", DENOISE, (4, 8)),
    "a given token is not replaced": (
        FIRST, "wwwwg###", (0, 4), COMMIT, "wwww", {}, "wwwwg###", DENOISE, (4, 8)),
    "a first token may fill its block": (
        FIRST, "wwww#ggg#", (0, 4), COMMIT, "wwww", {}, "wwwwwggg#", COMMIT, (4, 8)),
    "a first token may fill the canvas": (
        FIRST, "wwww#ggg", (0, 4), COMMIT, "wwww", {}, "wwwwwggg", DONE, (4, 8)),
    "a first token may close the row": (
        FIRST, "wwww####", (0, 4), COMMIT, "wwww", dict(first_token=STOP), "wwwwS###", DONE, (4, 8)),
    "no first token behind the canvas": (
        FIRST, "wwww", (0, 4), COMMIT, "wwww", {}, "wwww", DONE, (0, 4)),
}  # fmt: skip

HALVES = [0.5, 0.6, 0.3, 0.7]  # nothing passes 0.9
PIPELINES = {
    "each: the first block is fully activated, a later one waits": (
        D2F, "######", (0, 4), DENOISE, "wwww", {}, "#w####", DENOISE, (0, 4)),
    "each: a block is activated by the block before it": (
        D2F, "######", (0, 4), DENOISE, "wwww", dict(activate_masks=2), "#w#w##", DENOISE, (0, 4)),
    "each: activation counts the masks before the step": (
        D2F, "#w####", (0, 4), DENOISE, "wwww", dict(score=[0.95, 0, 0.3, 0.7]), "ww####", DENOISE, (0, 4)),
    "each: what passes is written in every block": (
        D2F, "######", (0, 4), DENOISE, "wwww", dict(score=[0.5, 0.6, 0.95, 0.7]), "#ww###", DENOISE, (0, 4)),
    "each: the best goes by rank": (
        D2F, "######", (0, 4), DENOISE, "wwww", dict(rank=[2.0, 1, 0, 0]), "w#####", DENOISE, (0, 4)),
    "a block is appended once the last has few masks": (
        D2F, "######", (0, 2), DENOISE, "wwww", dict(append_masks=1), "#w####", DENOISE, (0, 4)),
    "the last block is cut at the end of the canvas": (
        D2F, "#####", (2, 4), DENOISE, "wwww", dict(append_masks=1), "###w#", DENOISE, (2, 5)),
    "a block without masks leaves the region": (
        D2F, "ww####", (0, 4), DENOISE, "wwww", {}, "ww#w##", DENOISE, (2, 4)),
    "one that the step finished stays": (
        D2F, "w#####", (0, 2), DENOISE, "wwww", {}, "ww####", DENOISE, (0, 4)),
    "one behind an unfinished block stays": (
        D2F, "##ww##", (0, 4), DENOISE, "wwww", {}, "#www##", DENOISE, (0, 6)),
    "the last step of the canvas": (
        D2F, "www#", (2, 4), DENOISE, "wwww", {}, "wwww", DONE, (2, 4)),
    "appends: a stop token cuts the canvas behind the region": (
        D2F, "S#####", (0, 4), DENOISE, "wwww", dict(append_masks=2), "Sw##", DENOISE, (0, 4)),
    "closed: a stop token with no mask before it ends the row": (
        D2F_CLOSED, "##S###", (0, 4), DENOISE, "wwww", dict(score=[0.95, 0.95, 0, 0]), "wwS#", DONE, (0, 4)),
    "closed: with a mask before it, no block follows": (
        D2F_CLOSED, "##S###", (0, 4), DENOISE, "wwww", dict(append_masks=2), "#wS#", DENOISE, (0, 4)),
    "after_block: its block and all before it must be finished": (
        D2F_BLOCK, "##S###", (0, 4), DENOISE, "wwww", dict(score=[0.95, 0.95, 0, 0]), "wwS#", DENOISE, (0, 4)),
    "after_block: then the row ends": (
        D2F_BLOCK, "##Sw##", (0, 4), DENOISE, "wwww", dict(score=[0.95, 0.95, 0, 0]), "wwSw", DONE, (0, 4)),
    "first: at least kmin of the row, and one of the first block with masks": (
        D3LLM, "######", (0, 4), DENOISE, "wwww", {}, "#w#w##", DENOISE, (0, 4)),
    "first: none more if the first block has one": (
        D3LLM, "######", (0, 4), DENOISE, "wwww", dict(score=[0.95, 0.6, 0.3, 0.7]), "w#####", DENOISE, (0, 4)),
    "first: blocks without masks do not count": (
        D3LLM, "ww####", (0, 4), DENOISE, "wwww", {}, "ww#w##", DENOISE, (2, 4)),
    "fill: what follows a stop token, given tokens stay": (
        D3LLM, "#####g##", (0, 4), DENOISE, "wSww", dict(score=[0.5, 0.95, 0.3, 0.4]), "#SSSSgSS", DENOISE, (0, 4)),
    "fill: written tokens do not": (
        D3LLM, "##ww##", (0, 4), DENOISE, "wSww", dict(score=[0.5, 0.95, 0.3, 0.4]), "#SSSSS", DENOISE, (0, 4)),
    "fill: then nothing may be left": (
        D3LLM, "w#####", (0, 2), DENOISE, "wSww", {}, "wSSSSS", DONE, (0, 2)),
    "delayed: a block that the step finished calls for a refresh": (
        DELAYED, "w#####", (0, 4), DENOISE, "wwww", dict(delay=1, block_step=0), "ww#w##", REFRESH, (0, 4)),
    "delayed: a refresh step that found it finished calls for its commit": (
        DELAYED, "ww####", (0, 4), REFRESH, "wwww", dict(delay=1, block_step=0), "ww#w##", COMMIT, (0, 4)),
    "delayed: after `delay` of them": (
        DELAYED, "ww####", (0, 4), REFRESH, "wwww", dict(delay=3, block_step=1), "ww#w##", REFRESH, (0, 4)),
    "delayed: a commit is a denoise step too, after which the block leaves": (
        DELAYED, "ww####", (0, 4), COMMIT, "wwww", dict(delay=2, block_step=2), "ww#w##", DENOISE, (2, 4)),
    "delayed: one block at a time, the next has waited since this commit": (
        DELAYED, "wwww##", (0, 6), COMMIT, "wwwwww", dict(score=[*HALVES, 0.3, 0.7], delay=2, block_step=2),
        "wwww#w", REFRESH, (2, 6)),
    "delayed: which may be long enough": (
        DELAYED, "wwww##", (0, 6), COMMIT, "wwwwww", dict(score=[*HALVES, 0.3, 0.7], delay=1, block_step=1),
        "wwww#w", COMMIT, (2, 6)),
    "delayed: all steps are refreshes before what precedes the region is committed": (
        DELAYED, "######", (0, 4), REFRESH, "wwww", dict(delay=5, block_step=0), "#w#w##", REFRESH, (0, 4)),
    "delayed: by the `delay`-th step": (
        DELAYED, "######", (0, 4), REFRESH, "wwww", dict(delay=4, block_step=0), "#w#w##", DENOISE, (0, 4)),
}  # fmt: skip
CASES = LANES | EDITS | REMASKS | FIRST_TOKENS | PIPELINES
DEFAULTS = {
    D2F: dict(block_length=2, value=0.9, score=HALVES, append_masks=0, activate_masks=0),
    FIRST: dict(first_token=WRITTEN, first_token_confidence=0.25),
    EDIT: dict(block_length=2),
}
DEFAULTS |= dict.fromkeys((D2F_CLOSED, D2F_BLOCK, D3LLM, DELAYED), DEFAULTS[D2F]) | {EDIT_COMMIT: DEFAULTS[EDIT]}


@pytest.mark.parametrize("op", [reference.unmask, unmask], ids=["reference", "kernel"])
@pytest.mark.parametrize("name", CASES)
def test_row_by_hand(name, op, device):
    rule, canvas, block, phase, pred, args, canvas_after, phase_after, block_after = CASES[name]
    state, _ = one_row(canvas, block, phase, rule, pred, **DEFAULTS.get(rule, {}) | args).copy(device).run(op)
    assert drawn(state) == canvas_after
    assert state.phase.item() == phase_after
    assert (state.block_start.item(), state.block_end.item()) == block_after
    assert state.error.item() == 0


OPS = pytest.mark.parametrize("op", [reference.unmask, unmask], ids=["reference", "kernel"])


@OPS
def test_a_row_that_has_taken_max_steps_fails_and_writes_nothing(op, device):
    state, changed = one_row("####", (0, 4), DENOISE, FIXED, "wwww", max_steps=3).copy(device).run(op)
    assert (state.phase.item(), state.error.item(), state.nfe.item(), state.step.item()) == (DONE, ERROR_STALLED, 1, 3)
    assert drawn(state) == "####" and not changed.any()


@OPS
def test_a_position_masked_again_has_no_step_and_no_confidence(op, device):
    state, changed = (
        one_row("ww##", (0, 4), DENOISE, LOWEST, "wwww", remask_score=[0.9, 0.2, 0.1, 0.0], remask_count=2)
        .copy(device)
        .run(op)
    )
    assert state.unmask_step[0].tolist() == [0, -1, -1, -1]
    assert state.unmask_confidence[0].tolist() == [0, 0, 0, 0]
    assert changed[0].tolist() == [False, False, True, False]  # it was written, and masked again at once


@OPS
def test_a_first_token_is_recorded_and_takes_no_denoise_step(op, device):
    case = one_row("wwww####", (0, 4), COMMIT, FIRST, "wwww", **DEFAULTS[FIRST])
    state, changed = case.copy(device).run(op)
    assert state.unmask_step[0].tolist() == [0, 0, 0, 0, 3, -1, -1, -1] and state.unmask_confidence[0, 4].item() == 0.25
    assert (state.step.item(), state.block_step.item(), state.block_masks.item(), state.nfe.item()) == (3, 0, 3, 1)
    assert not changed.any()


@OPS
def test_what_renoise_draws_anew_is_not_recorded_as_written(op, device):
    state, changed = one_row("wgeg", (0, 4), DENOISE, RENOISE, "rrrr", kmin=1, refill=[3] * 4).copy(device).run(op)
    assert state.tokens[0].tolist() == [4, 3, 3, 3]
    assert state.unmask_step[0].tolist() == [3, -1, 0, -1]
    assert changed[0].tolist() == [True, False, False, False]


@OPS
def test_a_statistic_of_a_written_lane_is_needed_by_an_editing_rule_only(op, device):
    for rule, args, error in (
        (FIXED, {}, 0),
        (EDIT, dict(edit_value=0.5), 1),
        (LOWEST, dict(remask_score=[1.0] * 4, remask_count=0), 1),
    ):
        state, _ = one_row("w###", (0, 4), DENOISE, rule, "wwww", stat_error=[1, 0, 0, 0], **args).copy(device).run(op)
        assert state.error.item() == error, rule


def test_a_rule_that_makes_no_sense_is_refused_with_a_reason():
    for options, reason in (
        (dict(pipeline=True), "scope must be 'each' or 'first' for a pipeline"),
        (dict(scope="each"), "and 'row' otherwise"),
        (dict(pipeline=True, scope="each", cache="commit"), "a pipeline must have cache 'none', 'fused' or 'delayed'"),
        (dict(stop="fill"), "needs a pipeline"),
        (dict(pipeline=True, scope="first", stop="all_stop"), "stop='all_stop' must not be a pipeline's"),
        (dict(edit=True), "stop='closed' must not be an editing rule's"),
        (dict(first_token=True), "first_token must have cache 'commit'"),
        (dict(edit=True, remask="wino", stop="never"), "must not be combined"),
        (dict(renoise=True, runs=True, stop="never"), "renoise must have no runs"),
        (dict(remask="all"), "remask must be one of none, lowest, saber, wino, got remask='all'"),
    ):
        with pytest.raises(ValueError, match=reason):
            UnmaskRule("none", **options)
    with pytest.raises(ValueError, match="scope 'each' must have a flat test"):
        UnmaskRule("factor", pipeline=True, scope="each")


@OPS
def test_a_pipeline_decodes_its_canvas_block_by_block_with_no_host_decision(op, device):
    """Two positions a block and a threshold that nothing passes: one forced position a step in every active block."""
    case = one_row(
        "######",
        (0, 2),
        DENOISE,
        D2F,
        "wwwwww",
        **DEFAULTS[D2F] | dict(score=[0.5] * 6, append_masks=1, activate_masks=1),
    ).copy(device)
    seen = []
    while case.state.phase.item() == DENOISE:
        case.run(op)
        seen.append((drawn(case.state), case.state.block_start.item(), case.state.block_end.item()))
    assert seen == [("w#####", 0, 4), ("www###", 0, 6), ("wwwww#", 2, 6), ("wwwwww", 4, 6)]
    assert torch.equal(case.state.unmask_step.cpu(), torch.tensor([[3, 4, 4, 5, 5, 6]], dtype=torch.int32))
