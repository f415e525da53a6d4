"""Rows that a stop string ends before their canvas is full."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.state import COMMIT, DONE, amend

from .requests import Requests
from .stops import REPLACEMENT, StopStrings


class Stopper:
    """Ends a row once a stop string is certain in the text that the decoder can no longer change.

    This text is that of the filled positions from the start of the response to the first mask. If the decoder edits
    tokens or takes tokens back, only finished blocks count. The canvas is read on the host in every step.

    Attributes:
        mask_id: id of the mask.
        takes_back: whether the decoder edits tokens or takes tokens back.
        rows: the rows that have stop strings, by the slot of each.
    """

    def __init__(self, mask_id: int, takes_back: bool) -> None:
        self.mask_id, self.takes_back = mask_id, takes_back
        self.rows: dict[int, _Row] = {}

    @classmethod
    def of(cls, batch: Requests, mask_id: int, takes_back: bool) -> Stopper:
        """That of a batch whose rows are in the slots 0, 1, 2, ..."""
        stopper = cls(mask_id, takes_back)
        stopper.admit(list(range(len(batch.canvases))), batch)
        return stopper

    def admit(self, slots: list[int], batch: Requests) -> None:
        """Takes the rows of a batch, which are in these slots from now on."""
        for b, slot in enumerate(slots):
            self.rows.pop(slot, None)
            stops = batch.stop_strings[b]
            if stops is not None:
                start = batch.prompt_lengths[b]
                self.rows[slot] = _Row(stops, batch.eos_token_ids, start, len(batch.canvases[b]), start)

    def __call__(self, state: RowState) -> None:
        """Ends the rows in which a stop string became certain by the last step."""
        if not self.rows:
            return
        # 1. The canvases of the rows with stop strings, and the position up to which the text of each is final now.
        device, slots, whole = state.phase.device, sorted(self.rows), state
        if len(slots) < state.phase.shape[0]:
            state = state.of_rows(torch.tensor(slots, device=device))
        tokens, steps, phase = state.tokens.cpu(), state.unmask_step.cpu(), state.phase.cpu()
        searched, final = (torch.tensor([getattr(self.rows[slot], name) for slot in slots])
                           for name in ("searched", "length"))  # fmt: skip
        if self.takes_back:
            final = torch.where(phase == COMMIT, state.block_end.cpu(), state.block_start.cpu()).minimum(final)
        position = torch.arange(tokens.shape[1])
        is_open = (tokens == self.mask_id) & (position >= searched[:, None])
        final = torch.where(is_open, position, final[:, None]).amin(1).minimum(final)

        # 2. The rows that end.
        ends = torch.zeros(whole.phase.shape[0], dtype=torch.bool)
        for b in ((phase != DONE) & (final > searched)).nonzero().flatten().tolist():
            ends[slots[b]] = self.rows[slots[b]].ends(tokens[b], steps[b], int(final[b]))
        if ends.any():
            amend(whole, ends.to(device), phase=DONE)


@dataclasses.dataclass
class _Row:
    """A row with stop strings.

    A step decodes the newly final tokens and a few tokens before them. Only if this tail has a stop string does the
    step decode the whole text: the tail decides when a row ends, and never where the row's text ends.

    Attributes:
        stops: the stop strings.
        eos: ids that end the text.
        start: position at which the response begins.
        length: length of the canvas that was asked for; what a last block holds behind it is no text.
        searched: position up to which the text was final and was searched.
    """

    stops: StopStrings
    eos: tuple[int, ...]
    start: int
    length: int
    searched: int

    def ends(self, tokens: Tensor, steps: Tensor, final: int) -> bool:
        """Whether the row ends, now that its text is final up to a position."""
        # 1. The new ids, up to an EOS, and the special tokens among them.
        stops, start, searched = self.stops, self.start, self.searched
        self.searched = max(searched, final)
        new_ids, written = tokens[searched:final].tolist(), (steps[searched:final] >= 0).tolist()
        eos = next((j for j, token in enumerate(new_ids) if written[j] and token in self.eos), None)
        if eos is not None:
            # The text ends here, whatever follows.
            final, new_ids = searched + eos, new_ids[:eos]
            self.searched = tokens.shape[0]
        if any(token in stops.ids for token in new_ids):
            return True

        # 2. The tail of the text, and the whole text only if the tail has a stop string.
        def text(begin: int) -> str:
            ids = tokens[begin:final].tolist()
            return stops.settled(ids) if eos is None else stops.decode(ids)

        # A character is at most four tokens.
        begin = max(start, searched - 4 * stops.longest - 8)
        # The tail may begin inside a character; the whole text does not.
        tail = text(begin) if begin == start else text(begin).lstrip(REPLACEMENT)
        if stops.find(tail) is None:
            return False
        return stops.find(text(start)) is not None if eos is not None else stops.decided(text(start))
