"""Rows that end before they are full, by a stop string."""

from __future__ import annotations

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.state import COMMIT, DONE, amend

from .requests import Requests
from .stops import REPLACEMENT


class Stopper:
    """Ends a row once a stop string is certain in what the decoder can no longer change. Reads the canvas on the host
    each step.

    That is the filled, contiguous text from the row's first mask on; of a decoder that edits or takes tokens back, only
    that of finished blocks. A step decodes its new tokens and a window before them, and the whole text only where that
    window has a stop string: what the window says decides when a row ends, never where its text does.
    """

    def __init__(self, batch: Requests, mask_id: int, takes_back: bool) -> None:
        self.batch, self.mask_id, self.takes_back = batch, mask_id, takes_back
        self.stops = batch.stop_strings
        # A character is at most four tokens.
        self.window = 4 * self.stops.longest + 8
        self.seen = torch.tensor(batch.prompt_lengths)
        self.length = torch.tensor([len(canvas) for canvas in batch.canvases])

    def __call__(self, state: RowState) -> None:
        tokens, steps, phase = state.tokens.cpu(), state.unmask_step.cpu(), state.phase.cpu()
        final = self.length
        if self.takes_back:
            final = torch.where(phase == COMMIT, state.block_end.cpu(), state.block_start.cpu()).long()
        position = torch.arange(tokens.shape[1])
        open_ = (tokens == self.mask_id) & (position >= self.seen[:, None])
        final = torch.where(open_, position, final[:, None]).amin(1).minimum(final)
        ends = torch.zeros_like(phase, dtype=torch.bool)
        for b in ((phase != DONE) & (final > self.seen)).nonzero().flatten().tolist():
            ends[b] = self._ends(b, tokens[b], steps[b], int(self.seen[b]), int(final[b]))
        if ends.any():
            amend(state, ends.to(state.phase.device), phase=DONE)
        self.seen = torch.maximum(self.seen, final)

    def _ends(self, b: int, tokens: Tensor, steps: Tensor, seen: int, final: int) -> bool:
        stops, start = self.stops, self.batch.prompt_lengths[b]
        new, written = tokens[seen:final].tolist(), (steps[seen:final] >= 0).tolist()
        eos = next((j for j, token in enumerate(new) if written[j] and token in self.batch.eos_token_ids), None)
        if eos is not None:
            # The text ends here, whatever follows.
            final, new = seen + eos, new[:eos]
            self.seen[b] = tokens.shape[0]
        if any(token in stops.ids for token in new):
            return True

        def text(begin: int) -> str:
            ids = tokens[begin:final].tolist()
            return stops.settled(ids) if eos is None else stops.decode(ids)

        begin = max(start, seen - self.window)
        # A window may begin inside a character; the text does not.
        tail = text(begin) if begin == start else text(begin).lstrip(REPLACEMENT)
        if stops.find(tail) is None:
            return False
        return stops.find(text(start)) is not None if eos is not None else stops.decided(text(start))
