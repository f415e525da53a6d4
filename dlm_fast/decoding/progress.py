"""The loop: steps until no row needs one, and what the host knows of the rows meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.rules import Kind

from .plan import Bucket
from .step import Decode, denoise_step
from .window import counts_of

# Scattered windows are rounded up to so many positions: few shapes to compile and capture, little waste.
WIDTH_GRAIN = 32


class Progress:
    """What rows still need, read by the host from a pinned copy that may be `steps_behind`.

    A kind that only refresh steps can serve is known to be served as soon as one was launched, so a count that is
    behind never asks for a second refresh that nobody needs. A pipeline appends one block a step at most: a width that
    is behind is that much too small.
    """

    def __init__(self, decode: Decode, steps_behind: int) -> None:
        self.decode, self.steps_behind = decode, steps_behind
        self.pending: list[tuple[Tensor, Any]] = []
        self._read(self._count())

    def _count(self) -> Tensor:
        """[5] int32 on the device: `counts_of`, and rows that go on drafting."""
        decode = self.decode
        counts = counts_of(decode.plan, decode.state, decode.sampling)
        return torch.cat([counts, decode.forward.drafting()])

    def _read(self, counts: Tensor) -> None:
        self.to_refresh, self.to_denoise, self.width, self.lanes, self.drafting = counts.tolist()

    def record(self, kind: Kind) -> None:
        """Counts again after a step of `kind` was launched, without waiting for it."""
        if kind == "refresh":
            self.to_denoise, self.to_refresh = self.to_denoise + self.to_refresh, 0
        counts = self._count()
        if counts.device.type != "cuda":
            self.pending.append((counts, None))
            return
        host = torch.empty(counts.shape, dtype=torch.int32, pin_memory=True)
        host.copy_(counts, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append((host, event))

    def next_bucket(self) -> Bucket | None:
        """The bucket of the next step, None if no row needs one."""
        while len(self.pending) > self.steps_behind:
            counts, event = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            self._read(counts)
        if self.to_refresh:
            return self._bucket("refresh")
        return self._bucket("denoise") if self.to_denoise else None

    def _bucket(self, kind: Kind) -> Bucket:
        """The narrowest bucket that holds every row: where widths vary, a multiple of the block length or of the
        grain."""
        plan = self.decode.plan
        width = lanes = None
        if plan.varies:
            grain, margin = WIDTH_GRAIN, 0
            if plan.preset.pipeline:
                grain, margin = plan.block_length, plan.block_length * self.steps_behind

            def up(need: int, maximum: int) -> int:
                return max(1, min(-(-(need + margin) // grain) * grain, maximum))

            width = up(self.width, plan.denoise_width) if kind == "denoise" else None
            lanes = up(self.lanes, plan.lanes) if plan.preset.pipeline else None
        drafts = plan.preset.drafts if self.drafting and kind == "denoise" else 1
        return plan.bucket(kind, width=width, lanes=lanes, drafts=drafts)


@torch.no_grad()
def run_steps(decode: Decode, after_step: Callable[[RowState], None] | None) -> None:
    """Runs steps until no row needs one. Bounded: a row that outlives its `max_steps` ends with an error."""
    plan = decode.plan
    # A refresh that nobody needs costs a forward of everything, so only decoders that never repeat one run a step
    # behind.
    repeats = (plan.cache.refresh is not None and plan.cache.refresh.repeats) or plan.preset.drafts > 1
    steps_behind = int(decode.state.tokens.is_cuda and not repeats and after_step is None)
    progress = Progress(decode, steps_behind)
    blocks = (decode.state.tokens.shape[1] + plan.block_length - 1) // plan.block_length
    limit = int((decode.sampling.max_steps + 2 * blocks + 4).sum())
    for _ in range(limit + steps_behind):
        bucket = progress.next_bucket()
        if bucket is None:
            return
        denoise_step(decode, bucket)
        if after_step is not None:
            after_step(decode.state)
        progress.record(bucket.kind)
    raise AssertionError(f"decode loop made no progress within {limit} steps")
