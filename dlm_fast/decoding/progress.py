"""The loop: steps until no row needs one, and what the host knows of the rows meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.rules import Kind
from dlm_kernels.state import COMMIT, DENOISE, REFRESH

from ..patching import PatchHandle
from .plan import Bucket, Plan
from .shapes import Grid, fixed_positions, grid_of
from .step import Decode, denoise_step
from .window import needs_of

# The most bytes of logits of one step: more rows are taken in several steps. It is what 512 positions of a vocabulary
# of a million take in 16 bits, more than any step needs to be worth its launch.
LOGITS = 2**30


class Progress:
    """What rows still need, read by the host from a pinned copy that may be `rounds_behind`, and the steps that follow.

    The loop goes in rounds: in a round of refreshes every row that needs one takes part in one step, in a round of
    denoise steps every other row that is not done. Rounds of the two kinds alternate where rows need both, so that no
    row waits for more than one round. A row that a late copy has in the wrong step finds that out on the device and
    sits the step out. A pipeline appends one block a step at most, and a block's first step computes the block before
    too where commits are fused, so a late width is that much too small.
    """

    def __init__(self, decode: Decode, grid: Grid, rounds_behind: int = 0) -> None:
        self.grid, self.rounds_behind = grid, rounds_behind
        self.pending: list[tuple[Tensor, Any]] = []
        self.last: Kind | None = None
        self.restart(decode)

    @property
    def margin(self) -> int:
        """Positions by which a late width may be too small."""
        plan = self.decode.plan
        return plan.block_length * self.rounds_behind if plan.preset.pipeline or plan.defers else 0

    def restart(self, decode: Decode) -> None:
        """Counts at once, and goes on with `decode`: rows came or went between two rounds."""
        self.decode = decode
        self.pending.clear()
        self.needs = self._count().tolist()

    def _count(self) -> Tensor:
        """[6, B] int32 on the device: `needs_of`."""
        decode = self.decode
        return needs_of(decode.plan, decode.state, decode.sampling, decode.forward.drafting())

    def record(self, kind: Kind) -> None:
        """Counts again after a round of `kind` was launched, without waiting for it."""
        self.last = kind
        if kind == "refresh":
            # Known without reading: a late copy must not ask for a second refresh that nobody needs.
            self.needs[0] = [DENOISE if phase == REFRESH else phase for phase in self.needs[0]]
        counts = self._count()
        if counts.device.type != "cuda":
            self.pending.append((counts, None))
            return
        host = torch.empty(counts.shape, dtype=torch.int32, pin_memory=True)
        host.copy_(counts, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(counts.device))
        self.pending.append((host, event))

    def read(self) -> None:
        """Takes over the counts that are due, and waits for them."""
        while len(self.pending) > self.rounds_behind:
            counts, event = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            self.needs = counts.tolist()

    def next_round(self) -> tuple[Kind, list[tuple[Bucket, list[int]]]] | None:
        """The kind of the next round and its steps, each with its rows; None if no row needs one."""
        self.read()
        phases, refresh, denoise, lanes, drafting, _ = self.needs
        waiting: dict[Kind, list[tuple[int, int, int, bool]]] = {"refresh": [], "denoise": []}
        for row, phase in enumerate(phases):
            if phase == REFRESH:
                waiting["refresh"].append((refresh[row], row, lanes[row], False))
            elif phase in (DENOISE, COMMIT):
                waiting["denoise"].append(
                    (denoise[row] + self.margin, row, lanes[row] + self.margin, bool(drafting[row]))
                )
        other: Kind = "denoise" if self.last == "refresh" else "refresh"
        for kind in (other, "refresh", "denoise"):
            if waiting[kind]:
                return kind, self.grid.steps(kind, waiting[kind])
        return None


class StepTooLarge(RuntimeError):
    """A step for which the memory did not suffice. Its rows are as they were before.

    Attributes:
        bucket: the shape of the step; None = no step was reached, since the buffers of the batch did not fit.
    """

    def __init__(self, bucket: Bucket | None) -> None:
        super().__init__(f"out of memory in {'the buffers of a batch' if bucket is None else f'a step of {bucket}'}")
        self.bucket = bucket


class StepsCancelled(RuntimeError):
    """Steps that the caller cancelled. Every row is as its last step left it."""


def planned_grid(handle: PatchHandle, plan: Plan, state: RowState, refilled: bool = False) -> Grid:
    """The shapes of a decode of rows as these are when they have just been opened (`grid_of`); reads the state on the
    host."""
    parameters, config = sum(p.numel() for p in handle.model.parameters()), handle.model.config
    row = plan.copies * plan.preset.drafts * plan.lanes * config.vocab_size
    most_rows = max(1, LOGITS // (row * handle.adapter.compute_dtype(handle.model).itemsize))
    fixed = fixed_positions(plan.first.device.type, parameters)
    return grid_of(plan, state, fixed, most_rows=most_rows, refilled=refilled)


class Rounds:
    """The rounds of an open decode, one after another, until no row needs a step.

    Bounded: a row that outlives its `max_steps` ends with an error, so that no decode takes more rounds than `allow`
    has counted for its rows.

    Attributes:
        decode: what the steps read and write.
        grid: the shapes of the steps.
        progress: what the host knows of the rows.
        ran: how many steps of every shape there were.
    """

    def __init__(
        self,
        decode: Decode,
        grid: Grid | None = None,
        *,
        after_step: Callable[[RowState], None] | None = None,
        ran: Counter[Bucket] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """
        Args:
            decode: what the steps read and write.
            grid: the shapes of the steps. Default: `planned_grid`.
            after_step: is called with the state after every step.
            ran: counts the steps of every shape.
            cancelled: is asked before every step whether the caller wants no more of them.
        """
        plan = decode.plan
        self.grid = planned_grid(decode.forward.handle, plan, decode.state) if grid is None else grid
        self.after_step, self.cancelled = after_step, cancelled
        self.ran = Counter() if ran is None else ran
        # A refresh that nobody needs costs a forward of everything, so only decoders that never repeat one run a round
        # behind.
        repeats = (plan.cache.refresh is not None and plan.cache.refresh.repeats) or plan.preset.drafts > 1
        # Where a block waits, a late host computes two blocks in every step: worth it while a step's positions are few.
        many = plan.defers and decode.state.tokens.shape[0] * plan.block_length > self.grid.fixed
        self.may_be_late = decode.state.tokens.is_cuda and not repeats and not many
        self.left = int(self.may_be_late)
        self.progress = Progress(decode, self.grid)
        self.allow(int(decode.sampling.max_steps.sum()), decode.state.tokens.shape[0])

    @property
    def decode(self) -> Decode:
        return self.progress.decode

    def allow(self, max_steps: int, rows: int) -> None:
        """Counts the rounds that more rows may take, whose `max_steps` add up to this."""
        plan = self.decode.plan
        blocks = -(-self.decode.state.tokens.shape[1] // plan.block_length)
        self.left += max_steps + rows * (2 * blocks + 4)

    @torch.no_grad()
    def run(self) -> bool:
        """Runs the next round; False if no row needs one.

        Raises StepTooLarge if a step ran out of memory, and StepsCancelled if `cancelled` said so.
        """
        # Who looks after every step reads the device anyway, and may change what rows need.
        self.progress.rounds_behind = int(self.may_be_late and self.after_step is None)
        chosen = self.progress.next_round()
        if chosen is None:
            return False
        if self.left < 1:
            raise AssertionError("decode loop made no progress within the rounds that its rows may take")
        self.left -= 1
        decode, (kind, steps) = self.decode, chosen
        for bucket, rows in steps:
            if self.cancelled is not None and self.cancelled():
                raise StepsCancelled("the caller wants no more steps")
            try:
                denoise_step(decode, bucket, _on_device(decode, bucket, rows))
            except IndexError:
                _check_ids(decode)
                raise
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise StepTooLarge(bucket) from error
            self.ran[bucket] += 1
            if self.after_step is not None:
                self.after_step(decode.state)
        self.progress.record(kind)
        return True


def run_steps(
    decode: Decode,
    after_step: Callable[[RowState], None] | None,
    ran: Counter[Bucket] | None = None,
    *,
    grid: Grid | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> None:
    """Runs steps until no row needs one. The arguments and the errors are those of `Rounds`."""
    rounds = Rounds(decode, grid, after_step=after_step, ran=ran, cancelled=cancelled)
    while rounds.run():
        pass


def _check_ids(decode: Decode) -> None:
    """Raises ValueError if a policy wrote an id that is none, which a forward has no embedding for."""
    tokens, size = decode.state.tokens, decode.forward.handle.model.config.vocab_size
    wrong_ids = tokens[(tokens < 0) | (tokens >= size)].tolist()
    if wrong_ids:
        raise ValueError(f"generate: policy must write ids in [0, {size}), got {wrong_ids[0]}")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that a device has no memory left."""
    # The CPU's allocator has no error of its own.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _on_device(decode: Decode, bucket: Bucket, rows: list[int]) -> Tensor | None:
    """The rows of a step as a tensor, filled up to those of its bucket with others, which sit the step out, or take it
    too if it fits them; None = all rows."""
    B, device = decode.state.tokens.shape[0], decode.state.tokens.device
    if bucket.rows == B:
        return None
    taken = set(rows)
    spare = (row for row in range(B) if row not in taken)
    index = torch.tensor(rows + [next(spare) for _ in range(bucket.rows - len(rows))], dtype=torch.int64)
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index
