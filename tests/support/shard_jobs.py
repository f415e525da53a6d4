"""Jobs that end well and badly, for processes of their own, which find this module by its name. Nothing here imports
torch."""

from __future__ import annotations

import os
import signal
import time


def do(word: str) -> None:
    """One job: what it does to its process."""
    if word.startswith("raises"):
        raise RuntimeError("an\nillegal address")
    if word.startswith("exits"):
        os._exit(7)
    if word.startswith("crashes"):
        os.kill(os.getpid(), signal.SIGKILL)
    if word.startswith("hangs"):
        time.sleep(600)


def make(words: list[str]):
    """What `bench.shards` calls in each process."""
    if "cannot start" in words:
        raise ImportError("no kernels here")

    def work(index: int) -> tuple[tuple[str, int], bool]:
        do(words[index])
        return (words[index], os.getpid()), not words[index].startswith("breaks")

    return work


def cases(words: dict[str, list[str]], ops, device, sizes, seed, wanted):
    """Cases of checks that are such jobs: the name of each op's case says what the case does."""
    return [(op, (word, lambda word=word: do(word))) for op in wanted for word in words[op]]


def reference_ops():
    import dlm_fast

    return dlm_fast.REFERENCE
