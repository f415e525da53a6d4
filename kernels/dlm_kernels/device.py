"""Which GPU a launcher launches on, whose tiles it runs, and what is said where there is none."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
from torch import Tensor

from .tiles import TARGETS

# The GPU that the interpreter stands for: an H100, so that CI runs what most users of these models run.
INTERPRETED = 90

_HERE = contextlib.nullcontext()


def launching_on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which the tensor's GPU is the current one: Triton launches on the current device and its stream,
    wherever the arguments are."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.get_device())


def capability_of(op: str, tensor: Tensor, kernel: object) -> int:
    """Compute capability (90 for 9.0) whose tiles the tensor's GPU runs; INTERPRETED's for a CPU tensor under Triton's
    interpreter.

    Raises:
        RuntimeError: a CPU tensor, and `kernel` is compiled, not interpreted.
        NotImplementedError: a GPU that the tile table has no tiles for.
    """
    if not tensor.is_cuda and isinstance(kernel, triton.runtime.JITFunction):
        raise RuntimeError(
            f"{op}: the Triton kernel needs CUDA tensors, or TRITON_INTERPRET=1 set before triton is imported, "
            f"got tensors on {tensor.device}; dlm_kernels.reference.{op} runs anywhere"
        )
    return target_of(op, tensor.device)


def target_of(caller: str, where: torch.device) -> int:
    """Compute capability whose tiles the kernels run on a device: a GPU's by `tiles.TARGETS`, INTERPRETED's on a CPU.

    Raises:
        NotImplementedError: a GPU that the table does not name.
    """
    capability = INTERPRETED
    if where.type == "cuda":
        capability = _capability(torch.cuda.current_device() if where.index is None else where.index)
    if capability not in TARGETS:
        known = ", ".join(str(known / 10) for known in sorted(TARGETS))
        raise NotImplementedError(
            f"{caller}: there are no Triton kernels for compute capability {capability / 10} ({where}), "
            f"only for {known}; the plain-torch reference runs anywhere (backend='reference')"
        )
    return TARGETS[capability]


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
