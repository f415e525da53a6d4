"""What a launcher remembers of a call, so that the next one of the same kind costs its host little: that the check
accepted it, and how it is launched.

A decode makes the same few calls thousands of times, in other memory and with other numbers. Whatever a check looks at
but memory, and whatever a launch is compiled for but the alignment of pointers, makes up the *key* of a call: types,
shapes, strides, dtypes and devices of its tensors, which optional ones there are, and its scalars. Calls of one key
share a `Call`. What the key does not say is looked at in every call: whether the written tensors lie where they were
found to have memory of their own before, whether a gradient may be wanted, and which pointers are multiples of 16. The
debug mode reads every call, so every call is checked in it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from .checks import named
from .device import launching_on

# What is remembered of each kind is dropped beyond so many of it, and found out again.
MOST_CALLS, MOST_MEMORIES, MOST_ALIGNMENTS = 1024, 1024, 64

# What Triton's public launch looks at is known of these versions, under which tests compare it with direct launches.
# Under any other one every launch is a public one, which costs the host more.
IS_KNOWN = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"])

# A tensor of another class may say anything of itself.
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}

_data_ptr, _is_neg = Tensor.data_ptr, Tensor.is_neg


class Launch:
    """One launch of a kernel, for all calls of a key.

    Args:
        names: the kernel's arguments that are tensors.
        places: by the name of an argument, which of the call's tensors it is; an argument without one is None.
        values: every other argument and launch option.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        names: Sequence[str],
        places: Mapping[str, int],
        values: Mapping[str, object],
    ) -> None:
        self.kernel, self.grid = kernel, grid
        self.places = {name: places[name] for name in names if name in places}
        self.values = {name: None for name in names if name not in places} | dict(values)

    def publicly(self, tensors: Sequence[Tensor]) -> Any:
        """Launches as Triton documents it, and returns what Triton then returns."""
        return self.kernel[self.grid](**{name: tensors[place] for name, place in self.places.items()}, **self.values)

    def aligned(self) -> list[int]:
        """The places of the tensors of which Triton's compiled kernel depends on whether they are aligned."""
        return [
            self.places[param.name]
            for param in self.kernel.params
            if param.name in self.places and not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        ]

    def directly(self, compiled: CompiledKernel, pointers: int) -> tuple[Any, Any, tuple[object, ...]]:
        """(what launches, what orders its arguments, the constants among them) of a compiled kernel, which is given
        every argument by its place, a tensor by its pointer."""
        names = self.kernel.arg_names
        constants = [name for name in names if name not in self.places]
        places = {**self.places, **{name: pointers + i for i, name in enumerate(constants)}}
        grid = (*self.grid, 1, 1)[:3]
        order = itemgetter(*(places[name] for name in names))
        return compiled[grid], order, tuple(self.values[name] for name in constants)


class Plan:
    """The launches of all calls of a key, one after the other.

    The first launch is Triton's public one, which compiles. It returns the compiled kernel, and from then on that is
    launched itself, with no search for what to compile: this search takes most of a launch's time, and what it looks at
    is the same in every call of a key, but for the circumstances (`_circumstances`). In other circumstances the public
    launch is made again. What a direct launch leaves out is Triton's look at the globals of a kernel's module, which
    raises where one was changed since the kernel was compiled.

    Args:
        as_bytes: which of the call's tensors a kernel is given as the bytes that they are made of.
    """

    def __init__(self, launches: Sequence[Launch], as_bytes: Collection[int] = ()) -> None:
        self.launches = launches
        self.as_bytes = as_bytes
        # Not in the interpreter.
        self.is_direct = IS_KNOWN and all(isinstance(launch.kernel, JITFunction) for launch in launches)
        self.aligned = sorted({place for launch in launches for place in launch.aligned()}) if self.is_direct else []
        self.ways: dict[object, list[tuple[Any, Any, tuple[object, ...]]]] = {}

    def run(self, where: Tensor, tensors: Sequence[Tensor], outputs: Sequence[Tensor], pointers: Sequence[int]) -> None:
        """Launches on the GPU of a tensor.

        Args:
            tensors, outputs: the tensors of the call, to which `places` refer in this order.
            pointers: those of `tensors`; empty if they have none.
        """
        if not self.is_direct or not pointers:
            with launching_on(where):
                self._publicly(tensors, outputs)
            return
        pointers = (*pointers, *map(_data_ptr, outputs))
        circumstances = self._circumstances(pointers)
        way = self.ways.get(circumstances)
        with launching_on(where):
            if way is not None and not any(launch.kernel.pre_run_hooks for launch in self.launches):
                for launch, order, constants in way:
                    launch(*order(pointers + constants))
                return
            compiled = self._publicly(tensors, outputs)
        if circumstances is not None and all(map(_is_cuda, compiled)):
            if len(self.ways) >= MOST_ALIGNMENTS:
                self.ways.clear()
            self.ways[circumstances] = [
                launch.directly(each, len(pointers)) for launch, each in zip(self.launches, compiled, strict=True)
            ]

    def _publicly(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Any]:
        given = [*tensors, *outputs]
        for place in self.as_bytes:
            given[place] = given[place].view(torch.uint8)
        return [launch.publicly(given) for launch in self.launches]

    def _circumstances(self, pointers: tuple[int, ...]) -> object:
        """What Triton's public launch looks at besides the key: settings, and which pointers are multiples of 16.

        None: it looks at more.
        """
        if knobs.runtime.add_stages_inspection_hook is not None:
            return None
        bits = 0
        for place in self.aligned:
            bits |= pointers[place]
        # Most often all are aligned.
        aligned = bits & 15 == 0 or tuple([pointers[place] & 15 == 0 for place in self.aligned])
        return knobs.runtime.debug, knobs.compilation.instrumentation_mode, aligned


def _is_cuda(compiled: object) -> bool:
    """Whether a public launch returned a kernel of which pointers are told by their alignment alone. Triton's other
    backends look at more, and a hook or a compilation in the background returns something else."""
    return isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda"


class Call:
    """What the calls of a key have in common.

    Attributes:
        memories: pointers of written tensors that were found to have memory of their own.
        plan: how the launcher launches them, behind what that depends on besides the key.
    """

    __slots__ = ("memories", "plan")

    def __init__(self) -> None:
        self.memories: set[tuple[int, ...]] = set()
        self.plan: tuple[object, Any] = (None, None)

    def accepts(self, tensors: Sequence[Tensor], written: tuple[int, ...]) -> bool:
        """Whether the check of a call of this key would accept it, as far as is known without the check.

        Args:
            written: pointers of the tensors that the call writes; they say whether those share memory.
        """
        if written not in self.memories or named.readers:
            return False
        return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))

    def accepted(self, written: tuple[int, ...]) -> None:
        """Notes that the check has accepted a call."""
        # A tensor without memory (on the meta device, or empty) does not say by its pointer what it shares.
        if 0 not in written and not torch.compiler.is_compiling():
            if len(self.memories) >= MOST_MEMORIES:
                self.memories.clear()
            self.memories.add(written)

    def plan_for(self, depends: tuple[object, ...]) -> Any:
        """The plan that was made for this tile and these kernels; None if it is yet to be made."""
        made_for, plan = self.plan
        return plan if made_for == depends else None


class Calls:
    """The calls of an op that were accepted, by their keys. It holds no tensor.

    Args:
        op: its name, and `names` those of the tensors that its calls may have, in order, for errors.
    """

    def __init__(self, op: str, names: Sequence[str]) -> None:
        self.op, self.names = op, names
        self.by_key: dict[tuple, Call] = {}

    def find(
        self, given: Sequence[Tensor | None], facts: tuple[object, ...]
    ) -> tuple[Call | None, tuple | None, list[Tensor], tuple[int, ...]]:
        """(the call, its key, its tensors, their pointers) of a call with these tensors, of which some may be None.

        Args:
            facts: all else that the check looks at. Where equal values of different types are different to the check,
                the type is a fact of its own.
        Returns:
            No call for a new one. No key and no pointers for one that cannot be remembered.
        Raises:
            ValueError: a tensor whose memory holds the negatives of its numbers, which a kernel would read.
        """
        tensors = [tensor for tensor in given if tensor is not None]
        types = tuple(map(type, given))
        if not _PLAIN.issuperset(types):
            return None, None, tensors, ()
        if any(map(_is_neg, tensors)):
            (name, *_) = (name for name, tensor in zip(self.names, given) if tensor is not None and tensor.is_neg())
            raise ValueError(
                f"{self.op}: {name.removesuffix('_ptr')} must lie in memory as it is, got a view of negatives "
                "(Tensor.is_neg); give its resolve_neg()"
            )
        try:
            looks = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]
            key = (facts, types, *looks)
            return self.by_key.get(key), key, tensors, tuple(map(_data_ptr, tensors))
        except Exception:
            # A tensor has no strides or no memory, or a fact has no hash. The check says so where it minds.
            return None, None, tensors, ()

    def add(self, key: tuple | None) -> Call:
        """The call of a key that the check has just accepted; one without a key is not remembered."""
        call = Call()
        if key is not None and not torch.compiler.is_compiling():
            if len(self.by_key) >= MOST_CALLS:
                self.by_key.clear()
            self.by_key[key] = call
        return call
