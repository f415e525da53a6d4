"""Poisoned memory with guard zones: what was never written is seen, and so is whatever was written beside a tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .compare import Failure, bits

GUARD_BYTES = 1024
GUARD = 0xA5
POISON = -0x5A5A5A5B  # what an integer that was never written holds; a float holds NaN
_POISON_OF_A_BYTE = 0x5A  # of two-byte integers and of bools too, where it reads as True
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class GuardedMemory:
    """Hands out tensors that lie between two guard zones; `check` raises Failure if one of the zones was written."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []
        self.gaps: list[tuple[Tensor, Tensor]] = []

    def empty(
        self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device, shift: int = 0
    ) -> Tensor:
        """A poisoned tensor of that shape and stride, which begins `shift` elements behind an address that is aligned
        as the allocator aligns."""
        itemsize = torch.empty((), dtype=dtype).element_size()
        elements = shift + 1 + sum((n - 1) * s for n, s in zip(shape, stride))
        nbytes = elements * itemsize
        buffer = torch.full(
            (GUARD_BYTES + -(-nbytes // 256) * 256 + GUARD_BYTES,), GUARD, dtype=torch.uint8, device=device
        )
        payload = buffer[GUARD_BYTES : GUARD_BYTES + nbytes].view(dtype)
        payload.fill_(_poison(dtype))
        self.buffers.append((buffer, nbytes))
        result = payload[shift:].as_strided(shape, stride)
        if elements > result.numel():
            gap = torch.ones(elements, dtype=torch.bool, device=device)
            gap[shift:].as_strided(shape, stride).fill_(False)
            self.gaps.append((payload, gap))
        return result

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor's values in guarded memory, with the same strides."""
        if tensor.numel() == 0:
            return tensor.clone()
        return self.empty(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device).copy_(tensor)

    def spread(self, tensor: Tensor, gap: int = 4, shift: int = 0) -> Tensor:
        """The tensor's values in guarded memory: behind each row of its last dimension lie `gap` elements that belong
        to nobody, behind each group of rows `gap` such rows, and before the first row `shift` elements."""
        if tensor.numel() == 0:
            return tensor.clone()
        strides = [1]
        for extent in reversed(tensor.shape[1:]):
            strides.append(strides[-1] * (extent + gap))
        stride = tuple(reversed(strides))[-tensor.dim() :]
        return self.empty(tuple(tensor.shape), stride, tensor.dtype, tensor.device, shift).copy_(tensor)

    def check(self) -> None:
        """Raises Failure if anything was written beside a tensor or between its rows."""
        for index, (buffer, nbytes) in enumerate(self.buffers):
            guards = torch.cat([buffer[:GUARD_BYTES], buffer[GUARD_BYTES + nbytes :]])
            touched = int((guards != GUARD).sum())
            if touched:
                raise Failure(f"{touched} bytes next to allocation {index} ({nbytes} bytes) were overwritten")
        for payload, gap in self.gaps:
            poison = torch.full((1,), _poison(payload.dtype), dtype=payload.dtype, device=payload.device)
            touched = int((bits(payload)[gap] != bits(poison)).sum())
            if touched:
                raise Failure(f"{touched} elements between the rows of a strided tensor were overwritten")


def _poison(dtype: torch.dtype) -> float:
    if dtype.is_floating_point:
        return float("nan")
    return POISON if torch.empty((), dtype=dtype).element_size() >= 4 else _POISON_OF_A_BYTE


class poisoned(TorchFunctionMode):
    """While active, every uninitialised tensor a launcher asks torch for comes from `memory`: poisoned, between
    guards."""

    def __init__(self, memory: GuardedMemory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _EMPTY and result.numel():
            return self.memory.empty(tuple(result.shape), result.stride(), result.dtype, result.device)
        return result
