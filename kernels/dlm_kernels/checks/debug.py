"""The debug mode: whether every op reads its tensors first and refuses what breaks its contract (`contents`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType

from . import named


def debug(on: bool) -> contextlib.AbstractContextManager[None]:
    """Turns the debug mode on or off, for the whole process; as a context manager, until the block ends.

        dlm_kernels.debug(True)             with dlm_kernels.debug(True):
                                                block_attention(...)

    The ops check shapes, dtypes, devices and memory always, and numbers on the device never, because reading them makes
    the host wait. In the debug mode, which is off at first, every call reads them before it writes anything, and raises
    ValueError for what no op is defined for: lengths, slots, rows and pages out of range, slots that are stored twice
    or while they are seen, regions outside of their canvas, unknown phases, ids that are none, and so on. The error
    names op, field, rule, value and row. No result changes.

    A call that cannot be read is not looked at: one that `torch.compile`, `torch.export` or FakeTensorMode traces, one
    on the meta device, and one that a CUDA graph captures. What was compiled is looked at when it runs.

    Raises:
        TypeError: `on` is not a bool.
    """
    if not isinstance(on, bool):
        raise TypeError(f"debug: on must be a bool, got on={named.shown(on)}")
    before = named.readers
    if on:
        from .contents import READERS  # imports numpy, which few ops need

        named.readers = READERS
    else:
        named.readers = {}
    return _Until(before)


def is_on() -> bool:
    """Whether the debug mode is on."""
    return bool(named.readers)


class _Until:
    """What `debug` returns: at the end of its block the mode is again what it was before the call."""

    def __init__(self, before: dict[str, Callable[..., None]]) -> None:
        self.before = before

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        named.readers = self.before
