"""When a call is this backend's, and when it is the specification's."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks.named import refuse_types
from ..state import RowState

PLAIN = (Tensor, torch.nn.Parameter)


def on_cpu(specification: Callable) -> Callable[[Callable], Callable]:
    """A decorator for an op of this backend, which computes what `specification` computes.

    A call that is traced (by `torch.compile`, `torch.export` or FakeTensorMode) or that takes part in a gradient goes
    to the specification itself: this backend reads values on the host, which a trace cannot, and writes results in
    place, which autograd refuses. Both are the same function by contract. Tensors on another device raise ValueError.
    """

    def decorate(op: Callable) -> Callable:
        name = next(iter(inspect.signature(op).parameters))

        @functools.wraps(op)
        def called(*arguments: Any, **options: Any) -> Any:
            if torch.compiler.is_compiling():
                return specification(*arguments, **options)
            first = arguments[0] if arguments else options.get(name)
            if isinstance(first, RowState):
                first = first.tokens
            if type(first) not in PLAIN or (torch.is_grad_enabled() and _has_gradient(*arguments, *options.values())):
                return specification(*arguments, **options)
            if not first.is_cpu:
                raise ValueError(
                    f"{op.__name__}: backend 'cpu' takes tensors on a CPU, got tensors on {first.device}; "
                    f"{name} must be on one, and the plain-torch reference runs anywhere (backend='reference')"
                )
            try:
                return op(*arguments, **options)
            except (AttributeError, TypeError) as error:
                # The op looks at some arguments before they are checked.
                refuse_types(op.__name__, specification, arguments, options, error)
                raise

        return called

    return decorate


def _has_gradient(*arguments: Any) -> bool:
    fields = (x for each in arguments if dataclasses.is_dataclass(each) for x in vars(each).values())
    return any(isinstance(x, Tensor) and x.requires_grad for x in (*arguments, *fields))
