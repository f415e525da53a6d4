"""What every op that writes its arguments in place asks of the memory of those arguments."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Where strides are so odd that more places than these must be tried, two tensors count as sharing memory.
MOST_PLACES = 64


def check_written(op: str, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless each tensor has memory of its own for every element and takes part in no gradient.

    An op checks before it writes anything. Nothing is checked while torch.compile traces, because what is traced has
    no memory yet.
    """
    if torch.compiler.is_compiling():
        return
    graded = torch.is_grad_enabled()
    extents = {
        tensor.data_ptr(): tensor.nbytes if tensor.is_contiguous() else _extent(tensor)
        for tensor in tensors.values()
        if type(tensor) is Tensor and not (graded and tensor.requires_grad)
    }
    if len(extents) == len(tensors) and None not in extents.values():
        end = 0
        for begin in sorted(extents):
            if begin < end:
                break
            end = begin + extents[begin]
        else:
            return

    # Something is to be refused, or looks like that: a tensor has a stride, no element, or no memory (FakeTensorMode).
    spans: list[_Span] = []
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        _check_strides(op, name, tensor)
        if graded and tensor.requires_grad:
            raise ValueError(
                f"{op}: {name} is written in place and must not require a gradient, got requires_grad=True"
            )
        spans.append(_span(name, tensor))
    for one, other in itertools.combinations(spans, 2):
        if one.memory == other.memory and _meets(other.begin - one.begin, _differences(one, other)):
            raise ValueError(
                f"{op}: {one.name} and {other.name} are written in place and must not share memory, "
                f"got {other.name} {other.begin - one.begin} bytes behind {one.name}"
            )


def _extent(tensor: Tensor) -> int | None:
    """Bytes from the first element to behind the last one and its gap; None unless each dimension steps over all that
    the next one holds."""
    inside = 1
    for stride, count in zip(reversed(tensor.stride()), reversed(tensor.shape)):
        if stride < inside:
            return None
        inside = stride * count
    return inside * tensor.element_size()


def _check_strides(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless the steps along each dimension are longer than all that lies inside: no two elements then meet."""
    inside, size = 1, tensor.numel()
    for stride, count in sorted(zip(tensor.stride(), tensor.shape)):
        if count == 1:
            continue
        if stride == 0:
            raise ValueError(
                f"{op}: {name} is written in place and must not be expanded, got strides {tensor.stride()}"
            )
        if stride < inside:
            raise ValueError(
                f"{op}: {name} is written in place and must have memory of its own for each of its {size} elements, "
                f"got shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            )
        inside += (count - 1) * stride


class _Span(NamedTuple):
    """Where a tensor lies: in which memory, at which byte it begins, and its steps in bytes, each with their count."""

    name: str
    memory: int
    begin: int
    steps: list[tuple[int, int]]


def _span(name: str, tensor: Tensor) -> _Span:
    itemsize = tensor.element_size()
    steps = [(stride * itemsize, count) for stride, count in zip(tensor.stride(), tensor.shape)]
    # What has addresses lies in one memory; a fake tensor or one without data has its storage only.
    if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.data_ptr():
        return _Span(name, 0, tensor.data_ptr(), [*steps, (1, itemsize)])
    begin = tensor.storage_offset() * itemsize
    return _Span(name, tensor.untyped_storage()._cdata, begin, [*steps, (1, itemsize)])


def _differences(one: _Span, other: _Span) -> list[tuple[int, int, int]]:
    """The steps of a byte of `one` minus those of a byte of `other`, the longest first: each with the least and the
    largest number of times that it is taken."""
    limits: dict[int, tuple[int, int]] = {}
    for step, count in one.steps:
        low, high = limits.get(step, (0, 0))
        limits[step] = (low, high + count - 1)
    for step, count in other.steps:
        low, high = limits.get(step, (0, 0))
        limits[step] = (low - count + 1, high)
    return [(step, *limits[step]) for step in sorted(limits, reverse=True)]


def _meets(distance: int, steps: Sequence[tuple[int, int, int]]) -> bool:
    """Whether some number of times of each step, within its limits, makes up the distance. The last step is 1."""
    (step, low, high), rest = steps[0], steps[1:]
    if not rest:
        return low <= distance <= high
    least, most = (sum(each[0] * each[i] for each in rest) for i in (1, 2))
    first, last = max(low, -((most - distance) // step)), min(high, (distance - least) // step)
    if last - first > MOST_PLACES:
        return True
    return any(_meets(distance - times * step, rest) for times in range(first, last + 1))
