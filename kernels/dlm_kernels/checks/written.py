"""What every op that writes its arguments in place asks of the memory of those arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def check_written(op: str, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless each tensor has memory of its own for every element and takes part in no gradient.

    The check looks at strides and at where the tensors begin, so views that overlap in part go unseen. An op checks
    before it writes anything. Nothing is checked while torch.compile traces, because what is traced has no memory yet.
    """
    if torch.compiler.is_compiling():
        return
    places = {
        tensor.data_ptr()
        for tensor in tensors.values()
        if type(tensor) is Tensor and tensor.is_contiguous() and not tensor.requires_grad
    }
    if len(places) == len(tensors):
        return

    # Something is to be refused, or looks like that: a tensor has a stride, no element, or no memory (FakeTensorMode).
    begins: dict[tuple[int, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        if 0 in tensor.stride() and any(
            size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise ValueError(
                f"{op}: {name} is written in place and must not be expanded, got strides {tensor.stride()}"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} is written in place and must not require a gradient, got requires_grad=True"
            )
        begin = tensor.untyped_storage()._cdata, tensor.storage_offset() * tensor.element_size()
        if begin in begins:
            raise ValueError(f"{op}: {begins[begin]} and {name} are written in place and must not share memory")
        begins[begin] = name
