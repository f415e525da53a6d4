"""Insert and delete: a block whose tokens move between positions. Plain torch on the host, on every backend; it cannot
be captured."""

from __future__ import annotations

import collections
import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.state import COMMIT, DENOISE, DONE, amend

from ..limits import number, whole
from .base import Policy
from .setting import Setting
from .view import Choice, Memory, View

_CANVAS = ("tokens", "unmask_step", "unmask_confidence")
_SAVED = ("block_start", "block_end", "block_masks", "canvas_len")


@dataclasses.dataclass
class _Slot:
    """What a position of the block holds, and what moves with it. original: it was a mask when the block was opened."""

    token: int
    given: bool
    original: bool
    step: int
    confidence: float


@dataclasses.dataclass
class _Row:
    """A row's block while it is edited. seen: contents that steps have begun with. history: by position, what was
    written there, commands included; it stays where it is when tokens move."""

    slots: list[_Slot]
    seen: set[tuple[int, ...]] = dataclasses.field(default_factory=set)
    history: dict[int, set[int]] = dataclasses.field(default_factory=lambda: collections.defaultdict(set))
    updates: int = 0
    post: int = 0


@dataclasses.dataclass(frozen=True)
class InsertDelete(Policy):
    """The joint threshold with two more predictions: DELETE drops its position, SPLIT puts a mask before it. LLaDA2.2.

    A step writes masks above the threshold (one more than were introduced since, at least) and overwrites written
    tokens above `edit_threshold`. The block is final in its `max_post_edits`-th step without original masks (0: in the
    one that writes the last of them), or after more than block length + `max_post_edits` steps; a final step writes
    everything, and no mask, DELETE or SPLIT. Where the block returns to a content it has had, the least certain change
    avoids what was written at its position before, DELETE and SPLIT included; the position's history stays when tokens
    move.

    delete_id, split_id: of the model's vocabulary; the commands are never part of a finished text. max_post_edits:
    SGLang's max_post_edit_steps.
    """

    delete_id: int | None = None
    split_id: int | None = None
    edit_threshold: float = 0.0
    max_post_edits: int = 16
    reads: ClassVar[str] = "region"
    family: ClassVar[str] = "edit"
    greedy_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("delete_id", "split_id"):
            whole("policy InsertDelete", name, getattr(self, name), none=True)
        number("policy InsertDelete", "edit_threshold", self.edit_threshold)
        whole("policy InsertDelete", "max_post_edits", self.max_post_edits)

    def memory(self, setting: Setting, state: RowState) -> Memory:
        if self.delete_id is None or self.split_id is None:
            raise ValueError(
                "generate: preset llada2.2 needs delete_id= and split_id=, the ids of the model's two commands"
            )
        return {"rows": {}, "saved": {}}

    def choose(self, view: View, choice: Choice) -> Choice:
        state, rows, saved = view.state, view.memory["rows"], view.memory["saved"]
        saved.clear()
        canvas = {name: getattr(state, name).clone() for name in _CANVAS}
        for b in view.selects.nonzero().flatten().tolist():
            start, end = int(state.block_start[b]), int(state.block_end[b])
            if int(state.block_step[b]) == 0:
                rows[b] = self._open(view, b, start, end)
            final, changed = self._step(view, rows[b], b, end - start, float(choice.value[b]))
            for name, values in zip(_CANVAS, zip(*((s.token, s.step, s.confidence) for s in rows[b].slots))):
                canvas[name][b, start:end] = torch.tensor(values, dtype=canvas[name].dtype)
            if changed:
                saved[b] = (final, {name: int(getattr(state, name)[b]) for name in _SAVED}, int(state.block_step[b]))
        amend(state, view.selects, **canvas)
        nothing = torch.zeros_like(view.eligible)
        return dataclasses.replace(choice.only(nothing), edit_value=torch.full_like(choice.value, torch.inf))

    def after(self, view: View, choice: Choice, written: Tensor) -> None:
        # A block without masks looks finished to the op: rows that go on in it, or have yet to commit it, are put back.
        state, rows = view.state, torch.zeros_like(view.selects)
        fields = {name: getattr(state, name).clone() for name in (*_SAVED, "block_step", "phase")}
        for b, (final, saved, block_step) in view.memory["saved"].items():
            if final and int(state.phase[b]) == DONE:
                continue
            rows[b] = True
            for name, value in saved.items():
                fields[name][b] = value
            fields["block_step"][b] = block_step + 1
            fields["phase"][b] = COMMIT if final else DENOISE
        amend(state, rows, **fields)

    def _open(self, view: View, b: int, start: int, end: int) -> _Row:
        mask_id = view.setting.mask_id
        tokens = view.state.tokens[b, start:end].tolist()
        return _Row([_Slot(token, token != mask_id, token == mask_id, -1, 0.0) for token in tokens])

    def _step(self, view: View, row: _Row, b: int, n: int, threshold: float) -> tuple[bool, bool]:
        """Edits the block by one forward; returns whether it is final now, and whether it changed."""
        mask_id, slots = view.setting.mask_id, row.slots
        commands = {mask_id, self.delete_id, self.split_id}
        logits = view.logits[b, :n].double()
        p = logits.softmax(-1)
        never = set(view.setting.sampling.banned.tolist()[1:])  # the first is the mask, which is a command here
        first_eos = (
            int(view.setting.sampling.no_eos_before[b]) if view.setting.sampling.no_eos_before is not None else 0
        )
        first = int(view.position[b, 0])
        eos = set(view.setting.sampling.eos.tolist())

        def predict(j: int, avoid: set[int]) -> tuple[int, float]:
            without = sorted(avoid | never | (eos if first + j < first_eos else set()))
            # By the logits: equal ones may have probabilities that differ in the last bit.
            values = logits[j].clone()
            values[without] = -torch.inf
            token = int(values.argmax())
            return token, float(p[j, token].float())

        masks = [j for j, slot in enumerate(slots) if slot.token == mask_id]
        original = [j for j in masks if slots[j].original]
        row.updates += 1
        row.post += not original
        limit = self.max_post_edits
        final = (limit > 0 and row.post >= limit) or (limit == 0 and not original) or row.updates > n + limit
        best = [
            predict(j, {mask_id} if slots[j].original and slots[j].token == mask_id and not final else set())
            for j in range(n)
        ]

        def chosen_masks() -> list[int]:
            if final or not original:
                return masks
            order = sorted(masks, key=lambda j: (-best[j][1], j))
            minimum = min(len(masks) - len(original) + 1, len(masks))
            passing = [j for j in masks if best[j][1] > threshold]
            return passing if len(passing) >= minimum else order[:minimum]

        write = chosen_masks()
        if limit == 0 and original and set(original) <= set(write):
            final, write = True, masks
        written = [j for j, slot in enumerate(slots) if slot.token != mask_id and not slot.given]
        edits = [j for j in written if best[j][1] > self.edit_threshold and best[j][0] != slots[j].token]
        if final:
            best = [predict(j, commands) if best[j][0] in commands else best[j] for j in range(n)]
            edits = [j for j in edits if best[j][0] != slots[j].token]
        writing = sorted({*write, *edits})
        if not writing:
            return final, False
        content = tuple(slot.token for slot in slots)
        differing = [j for j in writing if best[j][0] != slots[j].token]
        if content in row.seen and not final and differing:
            j = min(differing, key=lambda j: (best[j][1], j))
            best[j] = predict(j, row.history[j] | ({mask_id} if j in original else set()))
        row.seen.add(content)
        self._apply(row, {j: best[j] for j in writing}, int(view.state.step[b]), mask_id)
        return final, True

    def _apply(self, row: _Row, writes: dict[int, tuple[int, float]], step: int, mask_id: int) -> None:
        """Writes tokens with their confidence; DELETE drops its position, SPLIT puts a mask before what it holds."""
        result, n = [], len(row.slots)
        for j, slot in enumerate(row.slots):
            if j not in writes:
                result.append(slot)
                continue
            token, confidence = writes[j]
            row.history[j].add(token)
            if token == self.split_id:
                result += [_Slot(mask_id, False, False, -1, 0.0), slot]
            elif token == mask_id:
                result.append(_Slot(token, False, slot.original, -1, 0.0))
            elif token != self.delete_id:
                result.append(_Slot(token, False, slot.original, step, confidence))
        row.slots = (result + [_Slot(mask_id, False, False, -1, 0.0) for _ in range(n)])[:n]
