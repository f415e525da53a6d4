"""The processes that torchrun or accelerate started for one job, called ranks: each decodes its share of the lines."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from .partial import JobError

# All of these are set by torchrun and by what starts processes through it, and together by nothing else.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Ranks wait for each other as long as a job takes. One that has ended is noticed by its connections, not by the time.
PATIENCE = timedelta(days=30)
# How long a rank that waits sleeps, in seconds. It must be awake for signals.
PAUSE = 0.02


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The place of this process among the ranks of a job.

    Attributes:
        rank: the number of this process, from 0.
        count: how many there are.
        local: the number of this process on its machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> Ranks:
        """As the launcher says; one rank where there is no launcher. Raises JobError."""
        said = {name: os.environ.get(name) for name in VARIABLES}
        if None in said.values():
            return cls()
        try:
            rank, count, local = map(int, said.values())
        except ValueError:
            rank, count, local = -1, 0, 0
        if not 0 <= rank < count or local < 0:
            raise JobError(f"RANK, WORLD_SIZE and LOCAL_RANK must be those of torchrun, got {said}")
        return cls(rank, count, local)

    @property
    def leads(self) -> bool:
        """Whether this rank says what concerns all of them."""
        return self.rank == 0

    def share(self, lines: int) -> range:
        """The indices of the lines that this rank decodes, of so many."""
        return range(self.rank, lines, self.count)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Waits until all ranks are here, and takes leave of them at the end."""
        if self.count == 1:
            yield
            return
        dist.init_process_group("gloo", rank=self.rank, world_size=self.count, timeout=PATIENCE)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def meet(self) -> None:
        """Waits until all ranks are here. Raises JobError if one of them has ended."""
        if self.count == 1:
            return
        try:
            work = dist.barrier(async_op=True)
            while not work.is_completed():
                time.sleep(PAUSE)
            work.wait()
        except RuntimeError as error:
            raise JobError(
                "another rank has ended, and says why; what was finished is kept, and the same command goes on "
                f"({error})"
            ) from error
