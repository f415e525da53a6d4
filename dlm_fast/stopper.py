"""Rows that a stop string ends before their canvas is full."""

from __future__ import annotations

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.state import COMMIT, DONE, amend

from .requests import Requests
from .stops import REPLACEMENT


class Stopper:
    """Ends a row once a stop string is certain in the text that the decoder can no longer change.

    This text is that of the filled positions from the start of the response to the first mask. If the decoder edits
    tokens or takes tokens back, only finished blocks count. The canvas is read on the host in every step.

    A step decodes the newly final tokens and a few tokens before them. Only if this tail has a stop string does the
    step decode the whole text: the tail decides when a row ends, and never where the row's text ends.

    Attributes:
        batch: the requests.
        mask_id: id of the mask.
        takes_back: whether the decoder edits tokens or takes tokens back.
        stops: the stop strings.
        tail_length: how many tokens before the new ones a step decodes.
        searched: [B] position up to which each row's text was final and was searched.
        length: [B] length of each canvas that was asked for; what a last block holds behind it is no text.
    """

    def __init__(self, batch: Requests, mask_id: int, takes_back: bool) -> None:
        self.batch, self.mask_id, self.takes_back = batch, mask_id, takes_back
        self.stops = batch.stop_strings
        # A character is at most four tokens.
        self.tail_length = 4 * self.stops.longest + 8
        self.searched = torch.tensor(batch.prompt_lengths)
        self.length = torch.tensor([len(canvas) for canvas in batch.canvases])

    def __call__(self, state: RowState) -> None:
        """Ends the rows in which a stop string became certain by the last step."""
        # 1. The position up to which each row's text is final now.
        tokens, steps, phase = state.tokens.cpu(), state.unmask_step.cpu(), state.phase.cpu()
        final = self.length
        if self.takes_back:
            final = torch.where(phase == COMMIT, state.block_end.cpu(), state.block_start.cpu()).minimum(final)
        position = torch.arange(tokens.shape[1])
        is_open = (tokens == self.mask_id) & (position >= self.searched[:, None])
        final = torch.where(is_open, position, final[:, None]).amin(1).minimum(final)

        # 2. The rows that end.
        ends = torch.zeros_like(phase, dtype=torch.bool)
        for b in ((phase != DONE) & (final > self.searched)).nonzero().flatten().tolist():
            ends[b] = self._ends(b, tokens[b], steps[b], int(self.searched[b]), int(final[b]))
        if ends.any():
            amend(state, ends.to(state.phase.device), phase=DONE)
        self.searched = torch.maximum(self.searched, final)

    def _ends(self, b: int, tokens: Tensor, steps: Tensor, searched: int, final: int) -> bool:
        """Whether row b ends, given that its text was searched up to one position and is final up to another."""
        # 1. The new ids, up to an EOS, and the special tokens among them.
        stops, start = self.stops, self.batch.prompt_lengths[b]
        new_ids, written = tokens[searched:final].tolist(), (steps[searched:final] >= 0).tolist()
        eos = next((j for j, token in enumerate(new_ids) if written[j] and token in self.batch.eos_token_ids), None)
        if eos is not None:
            # The text ends here, whatever follows.
            final, new_ids = searched + eos, new_ids[:eos]
            self.searched[b] = tokens.shape[0]
        if any(token in stops.ids for token in new_ids):
            return True

        # 2. The tail of the text, and the whole text only if the tail has a stop string.
        def text(begin: int) -> str:
            ids = tokens[begin:final].tolist()
            return stops.settled(ids) if eos is None else stops.decode(ids)

        begin = max(start, searched - self.tail_length)
        # The tail may begin inside a character; the whole text does not.
        tail = text(begin) if begin == start else text(begin).lstrip(REPLACEMENT)
        if stops.find(tail) is None:
            return False
        return stops.find(text(start)) is not None if eos is not None else stops.decided(text(start))
