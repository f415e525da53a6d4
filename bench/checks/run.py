"""What every correctness check is made of: its sizes, its random numbers, and the runner that makes rows of checks."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Iterable

import torch

OPS = ("confidence", "unmask", "layers", "block_attention", "decode")
NOT_RUN = "not run"
Case = tuple[str, Callable[[], None]]


class Skip(Exception):
    """A check that this machine cannot run; the message says why. It is reported, and is neither green nor red."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the checks are. The code is the same for all; only these numbers differ between a GPU and the
    interpreter.

    Attributes:
        vocab: vocabulary of the products of outputs and dtypes. vocabs: vocabularies that get one call with everything.
        rows: logits rows of a call. logits_dtypes, attention_dtypes: dtypes checked.
        head_dims, groups: every pair is one attention call of the first attention dtype, every third of the others.
        width, prefix: longest window and cached prefix of an attention call.
        canvases: rows of an unmask call. widths: lanes of an unmask call; the first is used for all rules.
        presets: how many of the decode checks run. layers: of the random models. prompt_lengths, new_tokens: of their
            decodes.
        prompts: per task, for the embedded models; 0 = leave them out.
        far: also read and write beyond 2^31 elements. every: of the cases of an op, every n-th runs.
    """

    vocab: int
    vocabs: tuple[int, ...]
    rows: int
    logits_dtypes: tuple[torch.dtype, ...]
    attention_dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...]
    groups: tuple[int, ...]
    width: int
    prefix: int
    canvases: int
    widths: tuple[int, ...]
    presets: int
    layers: int
    prompt_lengths: tuple[int, ...]
    new_tokens: int
    prompts: int
    far: bool
    every: int = 1


GPU = Sizes(
    vocab=126464,
    vocabs=(2, 97, 1025, 8191, 8193, 50257, 126464, 152064),
    rows=40,
    logits_dtypes=(torch.bfloat16, torch.float16, torch.float32),
    attention_dtypes=(torch.bfloat16, torch.float16, torch.float32),
    head_dims=(16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 512),
    groups=(1, 4, 7),
    width=70,
    prefix=1600,
    canvases=96,
    widths=(32, 33, 100, 200, 1000, 2048),
    presets=10**9,
    layers=2,
    prompt_lengths=(3, 40, 17, 1),
    new_tokens=48,
    prompts=3,
    far=True,
)
# bfloat16 attention is left out: Triton's interpreter computes tl.dot on it wrongly (triton issue 11585).
TOY = Sizes(
    vocab=1025,
    vocabs=(2, 97, 8193),
    rows=15,
    logits_dtypes=(torch.float16, torch.float32),
    attention_dtypes=(torch.float32, torch.float16),
    head_dims=(16, 48),
    groups=(1, 7),
    width=9,
    prefix=40,
    canvases=10,
    widths=(6, 70),
    presets=1,
    layers=1,
    prompt_lengths=(3, 9),
    new_tokens=5,
    prompts=0,
    far=False,
    every=8,
)


@dataclasses.dataclass(frozen=True)
class Check:
    """One row of the correctness report."""

    op: str
    name: str
    status: str  # "passed", "FAILED", "skipped" or NOT_RUN
    detail: str
    seconds: float


def run(op: str, cases: Iterable[Case], device: torch.device) -> list[Check]:
    """Runs every case to its end; a case that raises becomes a row that says so."""
    from dlm_kernels.testing import Failure  # here: what only reads a report of checks needs no kernels

    done = []
    for name, case in cases:
        started = time.perf_counter()
        status, detail = "passed", ""
        try:
            case()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Skip as reason:
            status, detail = "skipped", str(reason)
        except Exception as error:
            # Whatever a kernel, a compiler or a driver raises is the finding; the other cases still run.
            kind = "" if isinstance(error, Failure) else f"{type(error).__name__}: "
            status, detail = "FAILED", kind + " ".join(str(error).split())[:600]
        done.append(Check(op, name, status, detail, time.perf_counter() - started))
    return done


def sound(device: torch.device) -> bool:
    """Whether the device still answers. After an illegal access nothing does in the process that made it, whatever it
    computes."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except Exception:
        return False
    return True


def generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one case: they depend on the run's seed and the case's name, not on what ran before."""
    return torch.Generator(device).manual_seed((seed * 2654435761 + zlib.crc32(name.encode())) % 2**63)
