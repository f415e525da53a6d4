"""The backends: the ops that a decoder is made of, in Triton, for a CPU, and as the plain torch that specifies them.

A backend is a value (`triton_ops()`, `CPU`, `REFERENCE`), and is chosen once per model. A backend that cannot run
raises an error; nothing falls back from one backend to another.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Collection
from typing import Any

import torch

from dlm_kernels import cpu, reference
from dlm_kernels.tiles import HEAD_DIMS

from .limits import shown


@dataclasses.dataclass(frozen=True)
class Ops:
    """One implementation of each op. `dlm_kernels.reference` specifies the ops.

    Attributes:
        name: "triton", "cpu" or "reference".
        block_attention: stores the keys and values of a window, and attends.
        confidence: says what every row of logits predicts, and how certainly.
        unmask: writes tokens to the canvas, and advances the state of every row.
        draft_build: makes the drafts of every row, for decoders with drafts.
        verify: accepts the drafts that the decoder would have written, for decoders with drafts.
        uniform_scores: draws a number per position, for decoders that draw positions.
        rms_norm: norms the rows of a layer's input.
        add_rms_norm: adds what a module made to the residual stream, and norms the sum.
        qk_norm_rope: norms queries and keys by head, where the model does, and turns them by their positions.
        swiglu: the activation of an MLP times its gate.
        reason: why this backend was chosen, for `explain` and `dlm-fast doctor`.
    """

    name: str
    block_attention: Callable
    confidence: Callable
    unmask: Callable
    draft_build: Callable
    verify: Callable
    uniform_scores: Callable
    rms_norm: Callable
    add_rms_norm: Callable
    qk_norm_rope: Callable
    swiglu: Callable
    reason: str

    def __post_init__(self) -> None:
        for name in ("name", "reason"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"Ops: {name} must be a text, got {name}={shown(getattr(self, name))}")
        for name in OP_NAMES:
            if not callable(getattr(self, name)):
                raise TypeError(f"Ops: {name} must be a function, got {name}={shown(getattr(self, name))}")


# The ops of a layer, which models with fused layers call.
LAYER_OPS = ("rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu")
OP_NAMES = ("block_attention", "confidence", "unmask", "draft_build", "verify", "uniform_scores", *LAYER_OPS)

REFERENCE = Ops("reference", *(getattr(reference, name) for name in OP_NAMES), "asked for by name")
CPU = Ops("cpu", *(getattr(cpu, name) for name in OP_NAMES), "asked for by name")

BACKENDS = ("auto", "triton", "cpu", "reference")


def triton_ops(reason: str = "asked for by name") -> Ops:
    """The backend of our Triton kernels.

    Raises ImportError where Triton is not installed; for some platforms Triton has no wheels.
    """
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            "ops: backend 'triton' needs the package triton, which is not installed; use backend='reference'"
        )
    from dlm_kernels.attention import launch as attention
    from dlm_kernels.confidence import launch as confidence
    from dlm_kernels.drafts import launch as drafts
    from dlm_kernels.layers import launch as layers
    from dlm_kernels.noise import launch as noise
    from dlm_kernels.unmask import launch as unmask

    return Ops(
        "triton",
        attention.block_attention,
        confidence.confidence,
        unmask.unmask,
        drafts.draft_build,
        drafts.verify,
        noise.uniform_scores,
        layers.rms_norm,
        layers.add_rms_norm,
        layers.qk_norm_rope,
        layers.swiglu,
        reason,
    )


def check_head_dims(ops: Ops, head_dims: Collection[int]) -> None:
    """Raises NotImplementedError if the backend is Triton and has no kernel for a head size of the model."""
    for head_dim in head_dims:
        if ops.name == "triton" and head_dim not in HEAD_DIMS:
            raise NotImplementedError(
                f"ops: there is no Triton attention kernel for head_dim={head_dim}, only for multiples of 16 up to "
                "256, and 512; the plain-torch reference takes any (backend='reference')"
            )


def check_device(owner: str, name: str, device: Any) -> None:
    """Raises ValueError unless an argument is a device that holds tensors, or None."""
    if device is None:
        return
    try:
        empty = torch.empty(0, device=device)
        reason = "it holds no numbers" if empty.is_meta else None
    except Exception as error:
        reason = str(error).splitlines()[0]
    if reason is not None:
        rule = "must be a device that torch can use"
        raise ValueError(f"{owner}: {name} {rule}, got {name}={shown(device)}: {reason}")


def choose(backend: str | Ops, device: torch.device | str) -> Ops:
    """The backend of a model on `device`. `explain` reports which backend was chosen and why.

    Args:
        backend: "triton", "cpu", "reference", an `Ops` of your own, or "auto". With "auto" a model on a CUDA device
            gets Triton, one on a CPU gets "cpu", and any other model gets the plain-torch reference, which gives the
            same tokens more slowly.
        device: the model's device.
    Raises:
        ValueError: the backend is unknown, or it is "cpu" and the model is not on a CPU.
        ImportError: the backend is Triton, and Triton is not installed.
        NotImplementedError: the backend is Triton, which has no kernels for the GPU.
    """
    if isinstance(backend, Ops):
        return backend
    device = torch.device(device)
    if backend == "auto" and device.type == "cpu":
        return dataclasses.replace(CPU, reason=f"auto: the model is on {device}, Triton kernels need a CUDA device")
    if backend == "auto" and device.type != "cuda":
        return dataclasses.replace(
            REFERENCE, reason=f"auto: the model is on {device}, where neither Triton kernels nor the ops for a CPU run"
        )
    if backend in ("auto", "triton"):
        chosen = triton_ops(f"auto: the model is on {device}") if backend == "auto" else triton_ops()
        from dlm_kernels.device import target_of  # needs triton

        target_of(f"ops: backend {backend!r}", device)
        return chosen
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f"ops: backend 'cpu' needs a model on a CPU, got one on {device}")
        return CPU
    if backend == "reference":
        return REFERENCE
    raise ValueError(f"ops: backend must be one of {', '.join(BACKENDS)} or an Ops, got backend={shown(backend)}")
