"""Slots: rows that come and go in one open decode, whose buffers outlive them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.state import DENOISE, DONE, REFRESH, amend

from ..models.cache import KVCache
from ..patching import PatchHandle
from ..policies import Sampling
from .plan import Plan, on_device, placed_rows
from .progress import Rounds
from .shapes import Grid
from .step import open_decode


class Needs(NamedTuple):
    """What a row asks of the steps of all rows, as Python values: they decide which ops a step runs.

    Attributes:
        draws: whether it has a temperature above 0.
        holds_eos: whether it has positions that may hold no EOS.
        seed: its random seed.
    """

    draws: bool
    holds_eos: bool
    seed: int


class Slots:
    """Rows that are decoded together, each in a slot that the next one takes when it is done.

    A row gets the tokens that it would get in a decode of its own. Between two rounds `admit` puts new rows into free
    slots, and `release` frees slots; the buffers stay.

    Attributes:
        handle: the patched model.
        plan: what is the same for every step, sized for any row.
        rounds: the loop over the rows.
        free: slots without a row, in ascending order.
    """

    def __init__(
        self,
        handle: PatchHandle,
        plan: Plan,
        grid: Grid,
        sampling: Sampling,
        cache: KVCache | None = None,
    ) -> None:
        """
        Args:
            handle: the patched model.
            plan: what is the same for every step.
            grid: the shapes of the steps.
            sampling: numbers of rows that are done, `idle_canvas`, for every slot.
            cache: key/value buffers; None = new ones, of the plan's size.
        """
        self.handle, self.plan = handle, plan
        B, device = plan.first.shape[0], plan.first.device
        state = self._placed([idle_canvas(plan)] * B)
        # A row may ask for each of these, so that all rows have them; what no row in work asks for, no step computes.
        self._sampling = dataclasses.replace(
            sampling,
            no_eos_before=torch.zeros(B, dtype=torch.int32, device=device),
            seed=torch.zeros(B, dtype=torch.int64, device=device),
        )
        self._needs: dict[int, Needs] = {}
        self._running: tuple[bool, bool, int | None] | None = None
        decode = open_decode(handle, plan, state, self._sampling, cache)
        decode.plan.first.copy_(state.block_start)
        self.rounds = Rounds(decode, grid)
        self.free = list(range(B))

    @property
    def cache(self) -> KVCache | None:
        return self.rounds.decode.forward.cache

    @property
    def state(self) -> RowState:
        return self.rounds.decode.state

    def _placed(self, canvases: list[Tensor], prefilled: list[int] | None = None) -> RowState:
        """The initial state of canvases on the device; of a prompt, so many positions are in the cache already."""
        plan = self.plan
        host = placed_rows(canvases, plan.width, plan.block_length, plan.preset, plan.diffusion)
        for row, length in enumerate(prefilled or ()):
            # Where a prefill computes the prompt alone, there may be nothing left to prefill.
            if plan.prefill_rule is not None and host.phase[row] == REFRESH and length == host.block_start[row]:
                host.phase[row] = DENOISE
        return on_device(host, plan.first.device)

    def admit(
        self,
        slots: list[int],
        canvases: list[Tensor],
        sampling_of: Callable[[Plan], Sampling],
        needs: list[Needs],
        prefilled: list[int] | None = None,
    ) -> None:
        """Puts new rows into free slots.

        Args:
            slots: a free slot for each row.
            canvases: what each row holds, no longer than the plan's `width`.
            sampling_of: the numbers of the rows, from their plan.
            needs: what each row asks for.
            prefilled: how many positions of each are in the cache already; None = none.
        """
        device = self.plan.first.device
        state = self._placed(canvases, prefilled)
        part_prefilled = None
        if self.plan.prefilled is not None:
            lengths = prefilled or [0] * len(slots)
            part_prefilled = torch.tensor(lengths, dtype=torch.int32, device=device)
        plan = dataclasses.replace(self.plan, first=state.block_start, prefilled=part_prefilled)
        sampling = sampling_of(plan)
        if sampling.no_eos_before is None:
            sampling = dataclasses.replace(sampling, no_eos_before=torch.zeros_like(state.phase))
        decode, rows = self.rounds.decode, torch.tensor(slots, device=device)
        decode.take_rows(rows, open_decode(self.handle, plan, state, sampling, decode.forward.cache))
        self._sampling.put_rows(rows, sampling)
        self._needs |= zip(slots, needs)
        self.free = [slot for slot in self.free if slot not in self._needs]
        self.rounds.allow(int(sampling.max_steps.sum()), len(slots))
        self._restart()

    def _restart(self) -> None:
        """Goes on with the rows that are here now."""
        wanted = self._needs.values()
        seeds = {row.seed for row in wanted}
        running = any(row.draws for row in wanted), any(row.holds_eos for row in wanted), min(seeds, default=0)
        decode, sampling = self.rounds.decode, self._sampling
        if len(seeds) > 1:
            running = (*running[:2], None)
        if running != self._running:
            self._running, (draws, holds_eos, seed) = running, running
            changes: dict[str, Any] = {"draws": draws}
            if not holds_eos:
                changes["no_eos_before"] = None
            if seed is not None:
                changes["seed"] = torch.tensor([seed], dtype=torch.int64, device=sampling.seed.device)
            decode = decode.with_sampling(dataclasses.replace(sampling, **changes))
        self.rounds.progress.restart(decode)

    def done(self) -> list[int]:
        """The slots whose rows are done, as far as the host knows."""
        self.rounds.progress.read()
        phases = self.rounds.progress.needs[0]
        return [slot for slot in sorted(self._needs) if phases[slot] == DONE]

    def rows(self, slots: list[int]) -> RowState:
        """A copy of the rows of some slots, on the host."""
        state, B = self.state, self.plan.first.shape[0]
        if slots != list(range(B)):
            state = state.of_rows(torch.tensor(slots, device=self.plan.first.device))
        return RowState(**{name: field.cpu() for name, field in vars(state).items()})

    def release(self, slots: list[int]) -> None:
        """Frees slots; rows in work are given up."""
        in_work = [slot for slot in slots if self.rounds.progress.needs[0][slot] != DONE]
        for slot in slots:
            del self._needs[slot]
        self.free = sorted({*self.free, *slots})
        if in_work:
            self.clear(in_work)

    def clear(self, slots: list[int]) -> None:
        """Frees slots, whatever they hold."""
        rows = torch.zeros(self.plan.first.shape[0], dtype=torch.bool)
        rows[slots] = True
        amend(self.state, rows.to(self.plan.first.device), phase=DONE)
        for slot in slots:
            self._needs.pop(slot, None)
        self.free = sorted({*self.free, *slots})
        self._restart()


def idle_canvas(plan: Plan) -> Tensor:
    """What a slot without a row holds: a canvas without a mask, which is done before it starts."""
    return torch.tensor([int(plan.mask_id == 0)])
