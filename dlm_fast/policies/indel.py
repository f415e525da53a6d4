"""Insert and delete: a policy by which the tokens of a block move between positions.

The policy works on the host, on every backend, so a step with this policy cannot be captured.
"""

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
    """What a position of the block holds; a slot moves as a whole.

    Attributes:
        token: the token, which may be the mask.
        is_given: whether the token was there when the block was opened.
        is_original: whether the slot was a mask when the block was opened, and is not one that was put in later.
        step: the denoise step that wrote the token; -1 = none did.
        confidence: the probability of the token when it was written.
    """

    token: int
    is_given: bool
    is_original: bool
    step: int
    confidence: float


@dataclasses.dataclass
class _Row:
    """A row's block while steps edit the block.

    Attributes:
        slots: the block's slots, one per position.
        seen: contents of the block with which earlier steps began.
        history: for each position, all that was written there, commands included. The history of a position stays
            there when tokens move.
        updates: number of steps that the block has taken.
        post: number of steps that began without original masks.
    """

    slots: list[_Slot]
    seen: set[tuple[int, ...]] = dataclasses.field(default_factory=set)
    history: dict[int, set[int]] = dataclasses.field(default_factory=lambda: collections.defaultdict(set))
    updates: int = 0
    post: int = 0


@dataclasses.dataclass(frozen=True)
class InsertDelete(Policy):
    """The joint threshold with two commands: DELETE drops a position, SPLIT puts a mask before a position.

    A step writes the masks whose prediction is above the threshold, and overwrites written tokens whose prediction is
    above `edit_threshold`. The smallest number of masks that a step writes is one more than the number of masks that
    were put into the block since its opening. A final step fills the block: the step writes every mask, and writes no
    mask, DELETE or SPLIT. A step is final in three cases:

    - The step is the `max_post_edits`-th one that began without original masks.
    - With `max_post_edits` 0: the step writes the last original mask.
    - The block has taken more than block length + `max_post_edits` steps.

    If a step begins with a content that the block has had before, the least certain change of the step avoids all that
    was ever written at its position, the commands included. LLaDA2.2.

    Attributes:
        delete_id: id of the command DELETE in the model's vocabulary. No finished text holds a command.
        split_id: id of the command SPLIT in the model's vocabulary.
        edit_threshold: the probability above which another prediction overwrites a written token.
        max_post_edits: number of steps that may edit the block once no original mask is left (SGLang's
            max_post_edit_steps).
    """

    delete_id: int | None = None
    split_id: int | None = None
    edit_threshold: float = 0.0
    max_post_edits: int = 16
    lane_fields: ClassVar[tuple[str, ...]] = ()
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
                f"generate: preset {setting.preset_name} needs delete_id= and split_id=, the ids of the model's two "
                "commands"
            )
        return {"rows": {}, "saved": {}}

    def choose(self, view: View, choice: Choice) -> Choice:
        state, rows, saved = view.state, view.memory["rows"], view.memory["saved"]
        saved.clear()
        canvas = {name: getattr(state, name).clone() for name in _CANVAS}
        for b in view.selects.nonzero().flatten().tolist():
            start, end, row = int(state.block_start[b]), int(state.block_end[b]), int(view.rows[b])
            if int(state.block_step[b]) == 0:
                rows[row] = self._open(view, b, start, end)
            final, changed = self._step(view, rows[row], b, end - start, float(choice.value[b]))
            for name, values in zip(_CANVAS, zip(*((s.token, s.step, s.confidence) for s in rows[row].slots))):
                canvas[name][b, start:end] = torch.tensor(values, dtype=canvas[name].dtype)
            if changed:
                saved[b] = (final, {name: int(getattr(state, name)[b]) for name in _SAVED}, int(state.block_step[b]))
        amend(state, view.selects, **canvas)
        no_lane = torch.zeros_like(view.eligible)
        return dataclasses.replace(choice.only(no_lane), edit_value=torch.full_like(choice.value, torch.inf))

    def after(self, view: View, choice: Choice, written: Tensor) -> None:
        # The op takes a block without masks for finished, and the row moves on. Rows that go on editing their block are
        # put back, and so are rows that have yet to commit their block.
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
        """The block [start, end) of row b as it is opened."""
        mask_id = view.setting.mask_id
        tokens = view.state.tokens[b, start:end].tolist()
        return _Row([_Slot(token, token != mask_id, token == mask_id, -1, 0.0) for token in tokens])

    def _step(self, view: View, row: _Row, b: int, n: int, threshold: float) -> tuple[bool, bool]:
        """Edits the block of n positions by one forward; returns whether the block is final, and whether it changed."""
        mask_id, slots = view.setting.mask_id, row.slots
        commands = {mask_id, self.delete_id, self.split_id}

        # 1. What a position predicts, with its probability, if some ids are avoided.
        logits = view.logits[b, :n].double()
        p = logits.softmax(-1)
        sampling = view.setting.sampling
        banned_ids = set(sampling.banned.tolist()[1:])  # without the mask, the first one, which is a command here
        no_eos_before = int(sampling.no_eos_before[b]) if sampling.no_eos_before is not None else 0
        first_position = int(view.position[b, 0])
        eos = set(sampling.eos.tolist())

        def predict(j: int, avoid: set[int]) -> tuple[int, float]:
            excluded_ids = sorted(avoid | banned_ids | (eos if first_position + j < no_eos_before else set()))
            # The logits decide, since equal logits may have probabilities that differ in the last bit.
            values = logits[j].clone()
            values[excluded_ids] = -torch.inf
            token = int(values.argmax())
            return token, float(p[j, token].float())

        # 2. Whether this step is final, before it is known which masks the step writes.
        masks = [j for j, slot in enumerate(slots) if slot.token == mask_id]
        original_masks = [j for j in masks if slots[j].is_original]
        row.updates += 1
        row.post += not original_masks
        limit = self.max_post_edits
        final = (limit > 0 and row.post >= limit) or (limit == 0 and not original_masks) or row.updates > n + limit

        # 3. The masks to write. An original mask never predicts a mask before the final step.
        predictions = [
            predict(j, {mask_id} if slots[j].is_original and slots[j].token == mask_id and not final else set())
            for j in range(n)
        ]

        def chosen_masks() -> list[int]:
            if final or not original_masks:
                return masks
            order = sorted(masks, key=lambda j: (-predictions[j][1], j))
            minimum = min(len(masks) - len(original_masks) + 1, len(masks))
            passing = [j for j in masks if predictions[j][1] > threshold]
            return passing if len(passing) >= minimum else order[:minimum]

        masks_to_write = chosen_masks()
        if limit == 0 and original_masks and set(original_masks) <= set(masks_to_write):
            final, masks_to_write = True, masks

        # 4. The written tokens to overwrite. A final step writes tokens only.
        written = [j for j, slot in enumerate(slots) if slot.token != mask_id and not slot.is_given]
        edits = [j for j in written if predictions[j][1] > self.edit_threshold and predictions[j][0] != slots[j].token]
        if final:
            predictions = [predict(j, commands) if predictions[j][0] in commands else predictions[j] for j in range(n)]
            edits = [j for j in edits if predictions[j][0] != slots[j].token]
        changes = sorted({*masks_to_write, *edits})
        if not changes:
            return final, False

        # 5. A content that comes back means a cycle: the least certain change avoids what its position has had.
        content = tuple(slot.token for slot in slots)
        differing = [j for j in changes if predictions[j][0] != slots[j].token]
        if content in row.seen and not final and differing:
            j = min(differing, key=lambda j: (predictions[j][1], j))
            predictions[j] = predict(j, row.history[j] | ({mask_id} if j in original_masks else set()))
        row.seen.add(content)

        # 6. Write.
        self._apply(row, {j: predictions[j] for j in changes}, int(view.state.step[b]), mask_id)
        return final, True

    def _apply(self, row: _Row, writes: dict[int, tuple[int, float]], step: int, mask_id: int) -> None:
        """Writes tokens with their confidence. DELETE drops the position, SPLIT puts a mask before the position's slot.

        Slots that are pushed beyond the block's end are lost, and masks fill up a block that became shorter.
        """
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
                result.append(_Slot(token, False, slot.is_original, -1, 0.0))
            elif token != self.delete_id:
                result.append(_Slot(token, False, slot.is_original, step, confidence))
        row.slots = (result + [_Slot(mask_id, False, False, -1, 0.0) for _ in range(n)])[:n]
