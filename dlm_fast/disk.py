"""Files that are opened as regular files only, and names that a file gets once it is complete."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class NotRegular(OSError):
    """A path is a link, a folder, a device or a file of somebody else, where a file of ours was to be opened."""


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file that has no other name; links are not followed, and nothing is waited for.

    Raises NotRegular if the path is anything else, and OSError as `os.open`.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EMLINK):
            raise NotRegular(f"{path} must be a regular file, got {_kind(path)}") from None
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise NotRegular(f"{path} must be a regular file, got {_kind(path)}")
        if found.st_nlink > 1:
            raise NotRegular(f"{path} must have one name, got a file with {found.st_nlink} (hard links)")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def create(path: Path, is_ours: Callable[[BinaryIO], bool]) -> int:
    """A descriptor of a new file. A file that is there is replaced if `is_ours` says so of its content.

    Raises NotRegular if the path is something else.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return open_regular(path, flags)
    except FileExistsError:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            if not is_ours(file):
                raise NotRegular(f"{path} is in the way, and no run of this job has left it") from None
        path.unlink()
        return open_regular(path, flags)


def names(path: Path, descriptor: int) -> bool:
    """Whether a path is the name of an open file, and not of another one or of none."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


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
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without such a thing
            raise
    finally:
        os.close(descriptor)


def _kind(path: Path) -> str:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return "nothing"
    kinds = {
        stat.S_IFLNK: "a link",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a fifo",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "a regular file")
