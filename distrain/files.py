"""Durable and atomic writes of files; reads of regular files only, of a limited size."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of file systems that cannot sync a folder, such as some network and FUSE file systems."""

_PARTIAL_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading; refuse a FIFO, device, socket or folder, where a read could wait forever or never end.

    Raises:
        OSError: the file cannot be opened, or is not a regular file. `strerror` is the reason for people.
    """
    try:
        _refuse_special(os.stat(path), path)  # opening a device may have effects
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL character, or text that is no file name in this encoding
        raise OSError(errno.EINVAL, "not a valid file name", path) from error
    try:
        _refuse_special(os.fstat(descriptor), path)  # it may have been replaced since
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is longer. `strerror` is the reason for people.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read((size or limit) + 1) if size <= limit else b""  # files in /proc have the size 0
        size = max(size, len(content))
        if size > limit:
            raise OSError(errno.EFBIG, f"too large: {size:,} bytes instead of at most {limit:,}", path)
        return content


def _refuse_special(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)


def sync(path: Path) -> bool:
    """Sync a file's content, or a folder's entries, to disk.

    Returns:
        False if it is a folder, and the file system cannot sync folders.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC or not path.is_dir():
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def write(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file, from its content or the pieces of it, and sync it to disk."""
    with open(os.open(path, _PARTIAL_FLAGS, 0o666), "wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())


def create(path: Path, content: bytes) -> bool:
    """Create a file as a whole; return False if it exists already.

    Of several processes exactly one succeeds: `link` is atomic, on NFS too.
    """
    work = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        write(work, content)
        os.link(work, path)
    except FileExistsError:
        return False
    finally:
        work.unlink(missing_ok=True)
    return True


def replace(path: Path, content: str | bytes) -> None:
    """Write a file atomically: after a crash it has either the new content or the old one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial, content if isinstance(content, bytes) else content.encode())
        partial.replace(path)
    except OSError:  # no space: what was written would take more of it
        _remove_partial(partial)
        raise
    sync(path.parent)


def _remove_partial(path: Path) -> None:
    """Remove what an interrupted `write` left; not a link or FIFO of this name, which it refuses to write to."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(path.lstat().st_mode):
            path.unlink()
