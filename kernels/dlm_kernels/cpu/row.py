"""What one row does in a step of `unmask` (`reference.unmask`), in Python's numbers."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from ..rules import Kind, UnmaskRule
from ..state import COMMIT, DENOISE, DONE, ERROR_LOGITS, ERROR_STALLED, REFRESH
from .select import Inputs, chosen_lanes


class Call(NamedTuple):
    """What a call is told about all its rows."""

    rule: UnmaskRule
    kind: Kind
    mask_id: int
    stop_ids: frozenset[int]


@dataclasses.dataclass(slots=True)
class Row:
    """One row of a `RowState`: its numbers, its canvas [L] in three views, and `written` [W], the lanes that the step
    writes. The region lies in the canvas: 0 <= block_start <= block_end <= canvas_len <= L."""

    canvas_len: int
    block_start: int
    block_end: int
    block_masks: int
    block_step: int
    step: int
    phase: int
    nfe: int
    query_tokens: int
    error: int
    tokens: np.ndarray
    unmask_step: np.ndarray
    unmask_confidence: np.ndarray
    written: np.ndarray

    def step_on(self, call: Call, given: Inputs) -> None:
        """Writes what the step chooses and moves on, if the row takes part."""
        if given["query_len"] <= 0:
            return
        is_refresh, commits = call.kind == "refresh", call.rule.cache == "commit"
        lane_start = given.get("lane_start", self.block_start)
        fits = lane_start <= self.block_start and self.block_end <= lane_start + len(self.written)
        if commits and self.phase == (REFRESH if is_refresh else COMMIT):
            self._enter(call, given)
        elif fits and self.phase == (REFRESH if is_refresh else DENOISE):
            self._select(call, given, lane_start)
        else:
            return
        self.nfe += 1
        self.query_tokens += given["query_len"]

    def _enter(self, call: Call, given: Inputs) -> None:
        """A prefill or a commit: the block that follows opens, and may receive its first token."""
        if self.phase == COMMIT:
            if self.block_end >= self.canvas_len:
                self.phase = DONE
                return
            self._move_to(self.block_end, given)
        start, is_done = self.block_start, False
        if call.rule.first_token and start < len(self.tokens) and self.tokens[start] == call.mask_id:
            self._write(start, given["first_token"], given["first_token_confidence"])
            filled = self._first_mask(call, start, self.block_end) == self.block_end
            is_done = self._is_stopped(call, self._held(), filled) or (filled and self._is_last(call))
        self.block_masks = self._held().count(call.mask_id)
        self.phase = DONE if is_done else DENOISE if self.block_masks else COMMIT

    def _select(self, call: Call, given: Inputs, lane_start: int) -> None:
        """A step that chooses among the lanes of the region; lane j is the position lane_start + j."""
        rule, mask_id = call.rule, call.mask_id
        first, held = self.block_start - lane_start, self._held()

        # 1. Which lanes may be chosen, overwritten, and written by an exit.
        masks = [j for j, token in enumerate(held, first) if token == mask_id]
        eligible = [j for j in masks if given["allowed"][j]] if "allowed" in given else masks
        edits, exits = [], []
        if rule.edit:
            edits = [j for j, step in enumerate(self._steps(), first) if step >= 0]
        if "exits" in given:
            begin, end = max(lane_start, 0), max(min(lane_start + len(self.written), self.canvas_len), 0)
            canvas = enumerate(self.tokens[begin:end].tolist(), begin - lane_start)
            exits = [j for j, token in canvas if token == mask_id]

        # 2. A row that fails writes nothing.
        if "stat_error" in given and any(map(given["stat_error"].__getitem__, eligible + edits + exits)):
            self.error |= ERROR_LOGITS
            self.phase = DONE
            return
        if "max_steps" in given and self.step >= given["max_steps"]:
            self.error |= ERROR_STALLED
            self.phase = DONE
            return

        # 3. What is written.
        pred, confidence, is_exit = given["pred"], given["confidence"], given.get("exits", False)
        if is_exit:
            chosen = exits
        else:
            chosen = chosen_lanes(rule, given, eligible, masks, self._least(rule, given))
            chosen += [j for j in edits if pred[j] != held[j - first] and given["score"][j] > given["edit_value"]]
        for j in chosen:
            self._write(lane_start + j, pred[j], confidence[j])
            self.written[j] = True

        # 4. Where the row stands then.
        self.step += 1
        self.block_step += 1
        if rule.pipeline:
            self._advance_pipeline(call, given, lane_start + masks[0] if masks else self.block_end)
        else:
            self._advance_block(call, given, may_finish=not rule.edit or not chosen or is_exit)

    def _advance_block(self, call: Call, given: Inputs, may_finish: bool) -> None:
        """Blocks one at a time: the block goes on, or ends the row, or waits for its commit, or another one opens."""
        rule, held = call.rule, self._held()
        finished = may_finish and call.mask_id not in held
        if self._is_stopped(call, held, finished) or (finished and self._is_last(call)):
            self.phase = DONE
        elif not finished:
            self.phase = DENOISE
        elif rule.cache == "commit" and not rule.edit:
            self.phase = COMMIT
        else:
            skipped, length = 0, max(given["block_length"], 1)
            if rule.cache != "commit":
                skipped = (self._first_mask(call, self.block_end, self.canvas_len) - self.block_end) // length
            self._move_to(self.block_end + skipped * length, given)
            self.block_masks = self._held().count(call.mask_id)
            self.phase = REFRESH if rule.cache == "refresh" else DENOISE if self.block_masks else COMMIT

    def _advance_pipeline(self, call: Call, given: Inputs, first_mask: int) -> None:
        """Several blocks at once: the leading blocks that were finished before the step leave the region, and one
        block may be appended. first_mask: the region's before the step."""
        rule, mask_id, held = call.rule, call.mask_id, self._held()
        start, end, length = self.block_start, self.block_end, max(given["block_length"], 1)

        def begin_of(position: int) -> int:
            return start + (position - start) // length * length if position < end else end

        # 1. Does a stop token end the row, or cut its canvas?
        stops, is_stopped = self._stops(call, held), False
        if stops and rule.stop == "closed":
            is_stopped = mask_id not in held[: stops[0] + 1]
        if stops and rule.stop == "after_block":
            is_stopped = start + stops[0] < begin_of(self._first_mask(call, start, end))
        if stops:
            self.canvas_len = end

        # 2. Where the region then is. The last block begins at `tail`.
        tail = end - 1 - (end - 1 - start) % length
        self.block_start = begin_of(first_mask)
        if end < self.canvas_len and self.tokens[max(tail, 0) : end].tolist().count(mask_id) <= given["append_masks"]:
            self.block_end = min(end + length, self.canvas_len)
        has_masks = mask_id in held or self._first_mask(call, end, self.canvas_len) < self.canvas_len
        self.phase = DENOISE if has_masks and not is_stopped else DONE

    # What the canvas holds, and what is written there.

    def _held(self) -> list[int]:
        """Tokens of the region."""
        return self.tokens[self.block_start : self.block_end].tolist()

    def _steps(self) -> list[int]:
        """Steps at which the region's tokens were written."""
        return self.unmask_step[self.block_start : self.block_end].tolist()

    def _first_mask(self, call: Call, begin: int, end: int) -> int:
        """The first masked position in [begin, end), or `end`."""
        if begin >= end:
            return end
        masked = self.tokens[begin:end] == call.mask_id
        found = int(masked.argmax())
        return begin + found if masked[found] else end

    def _is_last(self, call: Call) -> bool:
        """Whether no mask follows the block."""
        return self._first_mask(call, self.block_end, self.canvas_len) == self.canvas_len

    def _stops(self, call: Call, held: list[int]) -> list[int]:
        """Written stop tokens of the region, by their place in it."""
        if call.rule.stop == "never" or call.stop_ids.isdisjoint(held):
            return []
        written = zip(held, self._steps(), strict=True)
        return [i for i, (token, step) in enumerate(written) if step >= 0 and token in call.stop_ids]

    def _is_stopped(self, call: Call, held: list[int], finished: bool) -> bool:
        """Does a token that was written in the block end the row?"""
        stops = self._stops(call, held) if finished or call.rule.stop == "closed" else []
        if not stops:
            return False
        if call.rule.stop == "closed":
            return call.mask_id not in held[: stops[0] + 1]
        return call.rule.stop == "after_block" or call.stop_ids.issuperset(held)

    def _least(self, rule: UnmaskRule, given: Inputs) -> int:
        """Positions to write at least: LLaDA's schedule, or the call's number."""
        if not rule.quota:
            return given["min_unmask"]
        quotient, remainder = divmod(self.block_masks, max(given["steps"], 1))
        return max(quotient + (self.block_step < remainder), 1)

    def _write(self, position: int, token: int, confidence: float) -> None:
        self.tokens[position], self.unmask_step[position] = token, self.step
        self.unmask_confidence[position] = confidence

    def _move_to(self, start: int, given: Inputs) -> None:
        """Another block becomes the row's."""
        self.block_start = start
        self.block_end = min(start + max(given["block_length"], 1), self.canvas_len)
        self.block_step = 0
