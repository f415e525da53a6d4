"""Where every stored tensor of a checkpoint goes in the native model, before a single weight is read."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..files import CheckpointError, Stored
from .family import Family

# Held while transformers builds a model, since it sets the default dtype of the whole process meanwhile.
BUILDING = threading.RLock()
# transformers stacks experts: gates and ups of all in one tensor [experts, 2 * intermediate, hidden], downs in another.
_STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")
# Old checkpoints store the rotary frequencies, which are no weights: transformers computes them.
_FREQUENCIES = "rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True)
class Part:
    """A stored tensor, or some of its rows.

    Attributes:
        name: name of the stored tensor.
        stored: what its header says.
        start: first row; None = all rows.
        stop: the row behind the last one; None = all rows.
    """

    name: str
    stored: Stored
    start: int | None = None
    stop: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.start is None:
            return self.stored.shape
        rows = min(self.stop, self.stored.shape[0]) - self.start if self.stored.shape else 0
        return (max(0, rows), *self.stored.shape[1:])

    def __str__(self) -> str:
        return f"{self.name} in {self.stored.file.name}"


@dataclasses.dataclass(frozen=True)
class Piece:
    """The weight of a single expert in a native stack.

    Attributes:
        name: name of the weight where experts are stored one by one.
        expert: number of the expert.
        start, stop: the weight's rows in the expert's part of the stack.
    """

    name: str
    expert: int
    start: int
    stop: int


def pieces_of_stack(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """The weights of single experts that a native tensor stacks; none where the tensor is no stack."""
    stack = _STACK.match(name)
    if stack is None:
        return []
    experts, kind = stack.groups()
    names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    rows = shape[1] // len(names)
    return [
        Piece(f"{experts}.{expert}.{part}.weight", expert, index * rows, (index + 1) * rows)
        for expert in range(shape[0])
        for index, part in enumerate(names)
    ]


@dataclasses.dataclass(frozen=True)
class Account:
    """Every tensor of a checkpoint and of its model.

    Attributes:
        parts: what is stored, by the native name.
        missing: native tensors that no file holds.
        unexpected: stored tensors that the model does not have, each with its file.
        misshaped: stored tensors of another shape, each with its file and both shapes.
        buffers: native names of tensors that keep their own dtype.
    """

    parts: Mapping[str, Part]
    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]
    buffers: frozenset[str]

    def check(self, where: Any) -> None:
        """Raises CheckpointError, with the names of tensors and files, unless every tensor has its place."""
        for kind, names in (
            ("missing keys", self.missing),
            ("unexpected keys", self.unexpected),
            ("mismatched keys", self.misshaped),
        ):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                raise CheckpointError(
                    f"load: {where} has {kind}: {', '.join(names[:8])}{more}; its tensors must be "
                    f"those that its configuration describes, got {len(names)} {kind}"
                )


def empty_model(native: type[nn.Module], config: Any) -> nn.Module:
    """The native model without storage."""
    with BUILDING, torch.device("meta"), _no_random_state():
        return native(config)


@contextlib.contextmanager
def _no_random_state():
    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def expected_tensors(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """The shapes of the tensors that a checkpoint of the native layout holds, and the names of those that may be left
    out because they are tied to others. Experts are stored one by one, as everybody publishes them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        pieces = pieces_of_stack(name, tuple(tensor.shape))
        shapes |= {piece.name: (piece.stop - piece.start, tensor.shape[-1]) for piece in pieces}
        if not pieces:
            shapes[name] = tuple(tensor.shape)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return shapes, set(tied)


def account_for(family: Family, config: Any, model: nn.Module, stored: Mapping[str, Stored]) -> Account:
    """Where every stored tensor goes.

    Args:
        family: the family, whose names the stored tensors have.
        config: the native configuration.
        model: the native model, which may be without storage.
        stored: the tensors of the files.
    Raises:
        CheckpointError: two stored tensors go to one place.
    """
    shapes, optional = expected_tensors(model)
    stacked = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if _STACK.match(name)}
    parts: dict[str, Part] = {}
    wrong: set[str] = set()
    unexpected, misshaped = [], []
    for name in sorted(stored):
        if name.endswith(_FREQUENCIES):
            continue
        for native, start, stop in family.parts(name, config):
            part = Part(name, stored[name], start, stop)
            if native in parts:
                raise CheckpointError(f"load: {part} and {parts[native]} both are {native} of {type(model).__name__}")
            expected = shapes.get(native, stacked.get(native))
            if expected is None:
                unexpected.append(str(part))
            elif part.shape != expected or (start is not None and stop > part.stored.shape[0]):
                misshaped.append(f"{part} of shape {list(part.shape)}, expected {list(expected)}")
                wrong.add(native)
            else:
                parts[native] = part
        rows = family.parts(name, config)[-1][2]
        if rows is not None and stored[name].shape and stored[name].shape[0] != rows:
            misshaped.append(f"{name} in {stored[name].file.name} of {stored[name].shape[0]} rows, expected {rows}")
    placed = {*parts, *wrong}
    placed |= {piece.name for name in placed & stacked.keys() for piece in pieces_of_stack(name, stacked[name])}
    missing = [_published(name, parts) for name in sorted(set(shapes) - placed - optional)]
    buffers = frozenset(name for name, _ in model.named_buffers())
    return Account(parts, missing, unexpected, misshaped, buffers)


def _published(name: str, parts: Mapping[str, Part]) -> str:
    """A missing native tensor as a checkpoint would call it, by the name of the same tensor of another layer."""
    numbers = re.findall(r"\.(\d+)(?=\.)", name)
    form = re.sub(r"\.\d+(?=\.)", ".#", name)
    for other, part in parts.items():
        if re.sub(r"\.\d+(?=\.)", ".#", other) == form and part.start is None:
            published = re.sub(r"\.\d+(?=\.)", ".#", part.name)
            if published.count("#") == len(numbers):
                for number in numbers:
                    published = published.replace("#", number, 1)
                return name if published == name else f"{published} ({name})"
    return name


class Slice:
    """A stored tensor, or some of its rows, that is read when transformers asks for it."""

    def __init__(self, part: Part, source: Any) -> None:
        self._part = part
        self._source = source

    def __getitem__(self, index: Any) -> Tensor:
        """The tensor (`[...]`), which is what transformers asks for."""
        if self._part.start is None:
            return self._source[index]
        return self._source[self._part.start : self._part.stop][index]

    def get_dtype(self) -> str:
        return self._part.stored.dtype

    def get_shape(self) -> list[int]:
        return list(self._part.shape)


def slices(parts: Mapping[str, Part]) -> dict[str, Any]:
    """What `from_pretrained` takes as a state_dict: every tensor by its native name, unread."""
    files = {part.stored.file: None for part in parts.values()}
    opened = {file: safe_open(file, framework="pt") for file in files}
    return {name: Slice(part, opened[part.stored.file].get_slice(part.name)) for name, part in parts.items()}
