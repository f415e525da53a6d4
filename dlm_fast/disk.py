"""Files on a disk: only regular ones are opened, and a file gets its name as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(OSError, ValueError):
    """What stands under a name is no regular file of ours; the message names the path and what stands there."""


def kind_of(path: Path, *, follow: bool = False) -> str | None:
    """What stands under a name, if that is no regular file; None if it is, or if nothing stands there.

    With `follow` a link is what it leads to. Nothing is opened.
    """
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path, follow_symlinks=follow).st_mode))
    except OSError as error:
        if os.path.islink(path):
            return "a link to nothing"  # or to itself
        if isinstance(error, FileNotFoundError):
            return None
        raise


def refuse_other(path: Path, *, follow: bool = False) -> None:
    """Raises NotRegularError if something that is no regular file has this name; with `follow` a link may lead to one.

    A name that nothing has is no error.
    """
    kind = kind_of(path, follow=follow)
    if kind is not None:
        raise NotRegularError(f"{path} must be a regular file, got {kind}")


def open_regular(path: Path, flags: int, *, follow: bool = False) -> int:
    """A descriptor of a regular file. A file to write to must have no other name (no hard links).

    Raises NotRegularError for anything else, and OSError as `os.open`.
    """
    refuse_other(path, follow=follow)
    # A fifo or a link that takes the name after the check neither blocks the process nor leads elsewhere.
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, 0o666)
    found = os.fstat(descriptor)
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    if not stat.S_ISREG(found.st_mode) or writes and found.st_nlink > 1:
        os.close(descriptor)
        got = f"one of {found.st_nlink} names (hard links)" if stat.S_ISREG(found.st_mode) else "another thing"
        raise NotRegularError(f"{path} must be a regular file of one name, got {got}")
    return descriptor


def read(path: Path, *, follow: bool = False) -> bytes:
    """The content of a regular file. Raises OSError."""
    with os.fdopen(open_regular(path, os.O_RDONLY, follow=follow), "rb") as file:
        return file.read()


def append(path: Path, text: str) -> None:
    """Adds text to a regular file, or makes the file. Raises OSError."""
    with os.fdopen(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8") as file:
        file.write(text)


def create(path: Path, is_ours: Callable[[BinaryIO], bool] = lambda file: True) -> int:
    """A descriptor of a new file. A regular file that is there is replaced if `is_ours` says so of its content.

    Raises NotRegularError if anything else is there.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return open_regular(path, flags)
    except FileExistsError:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            if not is_ours(file):
                raise NotRegularError(f"{path} is in the way, got a file that was not left here") from None
        path.unlink()
        return open_regular(path, flags)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty partial file to write to; what was written gets the name `path` once it is on the disk.

    The partial file of a broken run is replaced. A link, or anything else that is no regular file, is refused under the
    partial file's name and stays as it is. If the block raises, the file that had the name before is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    os.close(create(partial))
    try:
        yield partial
        sync(partial)
        rename(partial, path, replace=True)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def rename(source: Path, target: Path, *, replace: bool) -> None:
    """Gives a file another name, for good: the folder is synced. Raises FileExistsError unless `replace`."""
    if replace:
        os.replace(source, target)
    else:
        try:
            os.link(source, target)
        except OSError as error:
            # Not every file system has links.
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            os.rename(source, target)
        else:
            os.unlink(source)
    sync(target.parent)


def names(path: Path, descriptor: int) -> bool:
    """Whether a path is the name of an open file, and not of another one or of none."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems know no such thing of a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
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
