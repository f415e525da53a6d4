"""The launchers as PyTorch operators, `torch.ops.dlm_kernels.<name>`, for whatever traces instead of running.

In eager mode a launcher runs as it stands, because going through the dispatcher costs the host more than the launch
does. Under `torch.compile(fullgraph=True)`, `torch.export` and `FakeTensorMode` the same call becomes one opaque node
with a fake implementation and a schema that says what the call mutates. Both ways run the same code.

The schema is read off the launcher's signature. A dataclass (`Window`, `RowState`, `UnmaskRule`, `UnmaskInputs`,
`DraftSource`) goes in field by field, and a result of optional tensors comes out as the list of the tensors that are
there:

    block_attention(q, ..., window, *, scale)
    becomes  block_attention(Tensor q, ..., Tensor window_q_pos, ..., float scale) -> Tensor
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

NAMESPACE = "dlm_kernels"

_SCALARS = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str"}


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """One argument of the operator: an argument of the launcher, or one field of an argument that is a dataclass."""

    name: str
    argument: str
    field: str | None
    schema: str

    def of(self, arguments: dict[str, Any]) -> Any:
        value = arguments[self.argument]
        return value if self.field is None else getattr(value, self.field)


def operator(
    *,
    mutates: Sequence[str] = (),
    fake: Callable[..., Any],
    result: type | None = None,
    present: Callable[..., Sequence[str]] | None = None,
) -> Callable[[Callable], Callable]:
    """Registers a launcher as an operator, and returns what calls the launcher or, where the call is traced, the
    operator.

    Args:
        mutates: arguments that are written in place; of a dataclass, all its tensors are.
        fake: called with the launcher's arguments, it returns empty tensors like the launcher's.
        result: the type of a result that is a NamedTuple of tensors.
        present: for a NamedTuple of optional tensors, it returns the fields that are not None, from the launcher's
            arguments and without reading tensors. Such an operator must not mutate, because functionalization then
            takes no list of tensors.
    """

    def register(launcher: Callable) -> Callable:
        hints = typing.get_type_hints(launcher)
        arguments = inspect.signature(launcher).parameters
        parameters, dataclass_of = _parameters(arguments, hints, mutates)
        name = launcher.__name__
        fields = present or (lambda **_: result._fields)
        returns = (
            _returns(hints["return"]) if result is None else "Tensor[]" if present else _tuple_of(len(result._fields))
        )
        schema = f"({', '.join(f'{p.schema} {p.name}' for p in parameters)}) -> {returns}"
        names = tuple(arguments)
        defaults = {key: p.default for key, p in arguments.items() if p.default is not inspect.Parameter.empty}

        def rebuilt(values: Sequence[Any]) -> dict[str, Any]:
            flat = dict(zip((p.name for p in parameters), values, strict=True))
            given = {p.argument: flat[p.name] for p in parameters if p.field is None}
            for argument, kind in dataclass_of.items():
                given[argument] = kind(**{p.field: flat[p.name] for p in parameters if p.argument == argument})
            return given

        def listed(function: Callable) -> Callable:
            def of_flat(*values: Any) -> Any:
                given = rebuilt(values)
                out = function(**given)
                if result is None:
                    return out
                return [getattr(out, field) for field in fields(**given)] if present else tuple(out)

            return of_flat

        mutated = tuple(p.name for p in parameters if "!" in p.schema)
        op = torch.library.custom_op(f"{NAMESPACE}::{name}", listed(launcher), mutates_args=mutated, schema=schema)
        op.register_fake(listed(fake))

        @functools.wraps(launcher)
        def dispatched(*positional: Any, **keywords: Any) -> Any:
            first = positional[0] if positional else keywords.get(names[0])
            if not (torch.compiler.is_compiling() or _is_traced(first)):
                return launcher(*positional, **keywords)
            given = {**defaults, **dict(zip(names, positional)), **keywords}
            unknown = [key for key in given if key not in arguments]
            missing = [key for key in names if key not in given]
            if unknown or missing or len(positional) > len(names):
                raise TypeError(
                    f"{name}: missing arguments {missing}, unknown arguments {unknown}, "
                    f"{len(positional)} positional ones"
                )
            out = getattr(torch.ops.dlm_kernels, name)(*(p.of(given) for p in parameters))
            return (
                out
                if result is None
                else result(**{**dict.fromkeys(result._fields), **dict(zip(fields(**given), out))})
            )

        return dispatched

    return register


def _is_traced(first: Any) -> bool:
    """Whether the first argument, or its first tensor, is of a subclass (a FakeTensor, for one), which only the
    dispatcher can handle."""
    if type(first) is Tensor:
        return False
    field = _first_field(type(first))
    if field is not None:
        first = getattr(first, field)
    return isinstance(first, Tensor) and type(first) not in (Tensor, torch.nn.Parameter)


@functools.cache
def _first_field(kind: type) -> str | None:
    """The name of a dataclass's first field; None for another class."""
    return dataclasses.fields(kind)[0].name if dataclasses.is_dataclass(kind) else None


def _parameters(
    arguments: Any, hints: dict[str, Any], mutates: Sequence[str]
) -> tuple[list[_Parameter], dict[str, type]]:
    parameters: list[_Parameter] = []
    dataclass_of: dict[str, type] = {}

    def add(name: str, argument: str, field: str | None, hint: Any) -> None:
        kind = _schema(hint, name)
        if argument in mutates and kind.startswith("Tensor"):
            kind = f"Tensor(a{len(parameters)}!){kind[len('Tensor') :]}"
        parameters.append(_Parameter(name, argument, field, kind))

    for argument in arguments:
        hint = hints[argument]
        if dataclasses.is_dataclass(hint):
            dataclass_of[argument] = hint
            fields = typing.get_type_hints(hint)
            for field in dataclasses.fields(hint):
                add(f"{argument}_{field.name}", argument, field.name, fields[field.name])
        else:
            add(argument, argument, None, hint)
    return parameters, dataclass_of


def _schema(hint: Any, name: str) -> str:
    """The operator schema's word for a type hint."""
    if hint in _SCALARS:
        return _SCALARS[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "str"
    if origin in (typing.Union, types.UnionType) and len(inner) == 2 and type(None) in inner:
        return _schema(inner[0] if inner[1] is type(None) else inner[1], name) + "?"
    if inner == (str,):
        return "str[]"
    raise TypeError(f"operator: argument {name} has the type {hint}, which an operator's schema does not have")


def _returns(hint: Any) -> str:
    if hint is Tensor:
        return "Tensor"
    if hint is type(None):
        return "()"
    raise TypeError(f"operator: a launcher returns a tensor, None, or a NamedTuple given as result, got {hint}")


def _tuple_of(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"
