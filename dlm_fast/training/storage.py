"""Files of a run: only regular files are opened, and a file gets its name as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(OSError, ValueError):
    """What stands under a name is no regular file; the message names the path and what stands there."""


def refuse_other(path: Path, *, follow: bool = False) -> None:
    """Raises NotRegularError if something that is no regular file has this name; with `follow` a link may lead to one.

    A name that nothing has is no error.
    """
    try:
        kind = _KINDS.get(stat.S_IFMT(os.stat(path, follow_symlinks=follow).st_mode))
    except FileNotFoundError:
        return
    if kind is not None:
        raise NotRegularError(f"{path} must be a regular file, got {kind}")


def read(path: Path, *, follow: bool = False) -> bytes:
    """The content of a regular file. Raises OSError."""
    with os.fdopen(_opened(path, os.O_RDONLY, follow=follow), "rb") as file:
        return file.read()


def append(path: Path, text: str) -> None:
    """Adds text to a regular file, or makes the file. Raises OSError."""
    with os.fdopen(_opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, follow=False), "a", encoding="utf-8") as file:
        file.write(text)


def _opened(path: Path, flags: int, *, follow: bool) -> int:
    """A descriptor of a regular file."""
    refuse_other(path, follow=follow)
    # A fifo or a link that takes the name after the check neither blocks the process nor leads out of the folder.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), 0o666)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty partial file to write to; what was written gets the name `path` once it is on the disk.

    The partial file of a broken run is replaced. A link, or anything else that is no regular file, is refused under the
    partial file's name and stays as it is. If the block raises, the file that had the name before is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    refuse_other(partial)
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(owner: str, argument: str, path: Path, *inputs: Path) -> None:
    """Raises ValueError unless a file can be written under this name, and the name is that of no input.

    Commands that compute for minutes or hours before they write check their output first.
    """
    got = f"got {argument}={str(path)!r}"
    if any(path.resolve() == other.resolve() for other in inputs):
        raise ValueError(f"{owner}: {argument} must be another file than the input, {got}")
    try:
        refuse_other(path, follow=True)
        refuse_other(path.with_name(path.name + ".partial"))
    except OSError as error:
        raise ValueError(f"{owner}: {argument} must be a regular file or a new name, {got}: {error}") from error
    check_folder(owner, argument, path.absolute().parent)


def check_folder(owner: str, argument: str, folder: Path) -> None:
    """Raises ValueError unless files can be written to this folder, or to a new folder of this name."""
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(
            f"{owner}: {argument} must lead to a folder that can be written to, got {argument}={str(folder)!r}, where "
            f"{nearest} is none"
        )
