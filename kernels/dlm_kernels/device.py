"""Which GPU a launcher launches on, and what is said where there is none."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

# What the interpreter stands for. An H100: what CI runs is what most users of these models run.
INTERPRETED = 90


def capability_of(op: str, tensor: Tensor, kernel: object) -> int:
    """Compute capability (90 for 9.0) of the tensor's GPU; INTERPRETED for a CPU tensor under Triton's interpreter.

    Raises:
        RuntimeError: a CPU tensor, and `kernel` is compiled, not interpreted.
    """
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    if isinstance(kernel, triton.runtime.JITFunction):
        raise RuntimeError(
            f"{op}: the Triton kernel needs CUDA tensors, or TRITON_INTERPRET=1 set before triton is imported, got tensors on "
            f"{tensor.device}; dlm_kernels.reference.{op} runs anywhere"
        )
    return INTERPRETED
