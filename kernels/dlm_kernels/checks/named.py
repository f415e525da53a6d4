"""How the errors of a check get their names: what is of a wrong type is found once a check has failed, so that a call
without a mistake pays nothing for it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import reprlib
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

# By the op, what reads its calls in the debug mode (`debug`); empty while the mode is off.
readers: dict[str, Callable[..., None]] = {}


def check_of(owner: str) -> Callable[[Callable], Callable]:
    """A decorator for the check of an op or a constructor: what the check says of a wrong type names the argument, and
    in the debug mode an accepted call of an op is read (`contents`).

    Args:
        owner: whose arguments are checked; every error of the check begins with this name.
    """

    def decorate(check: Callable) -> Callable:
        @functools.wraps(check)
        def checked(*arguments: Any, **options: Any) -> Any:
            try:
                result = check(*arguments, **options)
            except Exception as error:
                refuse_types(owner, check, arguments, options, error)
                raise
            if readers and owner in readers and not torch.compiler.is_compiling():
                readers[owner](*arguments, **options)
            return result

        return checked

    return decorate


def refuse_types(
    owner: str, function: Callable, arguments: Sequence[Any], options: dict[str, Any], error: Exception
) -> None:
    """Raises TypeError for the first argument that is not of the type that the function's hints say, fields of
    dataclasses included, and ValueError for a tensor that is not dense; unless `error` says already what is wrong."""
    if str(error).startswith(f"{owner}: "):
        return
    hints = typing.get_type_hints(function)
    for name, value in inspect.signature(function).bind(*arguments, **options).arguments.items():
        if name == "self":
            _refuse_fields(owner, "", value)
        elif name in hints:
            _refuse(owner, name, value, hints[name])


def shown(value: Any) -> str:
    """The value as an error shows it: in few words, and on one line."""
    if isinstance(value, int) and value.bit_length() > 200:
        # Python refuses to write out the longest integers.
        return f"an int of {value.bit_length()} bits"
    return " ".join(reprlib.repr(value).split())


def _refuse(owner: str, name: str, value: Any, hint: Any) -> None:
    wanted = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if not any(_fits(value, each) for each in wanted):
        rule = " or ".join(map(_words, wanted))
        raise TypeError(f"{owner}: {name} must be {rule}, got {name}={shown(value)} ({type(value).__name__})")
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested):
        layout = "a nested tensor" if value.is_nested else value.layout
        raise ValueError(f"{owner}: {name} must be a dense tensor, got {layout}")
    if dataclasses.is_dataclass(value):
        _refuse_fields(owner, f"{name}.", value)


def _refuse_fields(owner: str, prefix: str, value: Any) -> None:
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        _refuse(owner, prefix + field.name, getattr(value, field.name), hints[field.name])


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if origin is Literal:
        return isinstance(value, str)
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple)) and all(_fits(each, get_args(hint)[0]) for each in value)
    return not isinstance(hint, type) or origin is not None or isinstance(value, hint)


def _words(hint: Any) -> str:
    if hint is type(None):
        return "None"
    if get_origin(hint) is Literal:
        return "a str"
    if get_origin(hint) is not None:
        return "a sequence of str"
    name = hint.__name__
    return f"{'an' if name[0] in 'ioIO' else 'a'} {'torch.' if hint is Tensor else ''}{name}"
