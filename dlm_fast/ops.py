"""The device operations a decoder is made of, chosen once: a backend is a value (`REFERENCE`, `triton_ops()`), not a
mode.

A backend that cannot run says so by raising; nothing falls back from one to the other.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Collection

import torch

from dlm_kernels import reference
from dlm_kernels.tiles import HEAD_DIMS


@dataclasses.dataclass(frozen=True)
class Ops:
    """One implementation of each op, with the same contract (see `dlm_kernels.reference`).

    Attributes:
        name: "triton" or "reference".
        block_attention, confidence, unmask: the ops of every decoder. draft_build, verify: those of drafts.
        reason: why this backend was chosen, for `explain` and `dlm-fast doctor`.
    """

    name: str
    block_attention: Callable
    confidence: Callable
    unmask: Callable
    draft_build: Callable
    verify: Callable
    reason: str


OP_NAMES = ("block_attention", "confidence", "unmask", "draft_build", "verify")

REFERENCE = Ops("reference", *(getattr(reference, name) for name in OP_NAMES), "asked for by name")

BACKENDS = ("auto", "triton", "reference")


def triton_ops(reason: str = "asked for by name") -> Ops:
    """Our Triton kernels. Raises ImportError where Triton is not installed (it has no wheels for this platform)."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            "ops: backend 'triton' needs the package triton, which is not installed; use backend='reference'"
        )
    from dlm_kernels.attention import launch as attention
    from dlm_kernels.confidence import launch as confidence
    from dlm_kernels.drafts import launch as drafts
    from dlm_kernels.unmask import launch as unmask

    return Ops(
        "triton",
        attention.block_attention,
        confidence.confidence,
        unmask.unmask,
        drafts.draft_build,
        drafts.verify,
        reason,
    )


def check_head_dims(ops: Ops, head_dims: Collection[int]) -> None:
    """Raises NotImplementedError if `ops` are the Triton kernels and have none for a head size of the model."""
    for head_dim in head_dims:
        if ops.name == "triton" and head_dim not in HEAD_DIMS:
            raise NotImplementedError(
                f"ops: there is no Triton attention kernel for head_dim={head_dim}, only for multiples of 16 up to "
                "256, and 512; the "
                "plain-torch reference takes any (backend='reference')"
            )


def choose(backend: str | Ops, device: torch.device | str) -> Ops:
    """The ops for a model on `device`.

    Args:
        backend: "triton", "reference", an `Ops` of your own, or "auto": Triton on a CUDA device, the plain-torch
            reference elsewhere (same tokens, slower). `explain` reports what was chosen and why.
    Raises:
        ValueError: unknown backend. ImportError: Triton needed and not installed. NotImplementedError: Triton needed,
        and a GPU
            that has no kernels.
    """
    if isinstance(backend, Ops):
        return backend
    device = torch.device(device)
    if backend == "auto" and device.type != "cuda":
        return dataclasses.replace(
            REFERENCE, reason=f"auto: the model is on {device}, Triton kernels need a CUDA device"
        )
    if backend in ("auto", "triton"):
        chosen = triton_ops(f"auto: the model is on {device}") if backend == "auto" else triton_ops()
        from dlm_kernels.device import target_of  # needs triton

        target_of(f"ops: backend {backend!r}", device)
        return chosen
    if backend == "reference":
        return REFERENCE
    raise ValueError(f"ops: backend must be one of {', '.join(BACKENDS)} or an Ops, got backend={backend!r}")
