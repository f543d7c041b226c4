"""The cache of remote files: a folder of limited size, shared by any number of processes without a common lock.

Temporary names are unique, a rename is atomic, and an entry that another process deletes between two reads is fetched
again. The least recently used entries are deleted to make room.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from distrain import files

Check = Callable[[bytes], str | None]
"""A function that returns what is wrong with a content, or None."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEFTOVER_SECONDS = 3600
"""Age at which a temporary file is deleted: its process must be dead, since each write makes it young again."""
_POLL_SECONDS = 0.1
"""Interval at which a lock is tried again."""

_ENTRY = re.compile(r"[0-9a-f]{64}\.cached")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.([0-9a-f]{32}\.partial|lock)")
"""Names of the files in a cache folder that are counted and may be deleted; other files are never touched."""

log = logging.getLogger("distrain")


class Cache:
    """A folder of entries, each named by a key: 64 hexadecimal digits that determine its content.

    The total size of the entries, with those being written, is limited.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._first_warning = threading.Lock()

    def get(self, key: str, check: Check, size: int, start: int = 0) -> bytes | None:
        """Return `size` bytes of an entry, from byte `start`; None if it is not cached, or damaged."""
        path = self._path(key)
        try:
            with files.open_regular(path) as file:
                file.seek(start)
                data = file.read(size)
        except FileNotFoundError:
            return None
        except OSError:
            data = None  # treated as damaged
        intact = data is not None and check(data) is None  # guard: check-cached-bytes
        with contextlib.suppress(OSError):  # evicted in the meantime, or a read-only cache
            if intact:
                os.utime(path)  # now the most recently used
            else:
                path.unlink()
        return data if intact else None

    def put(self, key: str, data: bytes) -> None:
        """Store an entry if there is room for it; log one warning if there is not."""
        problem = self.store(key, len(data), lambda: [data])
        if problem is not None:
            self._warn(problem)

    def store(self, key: str, size: int, pieces: Callable[[], Iterable[bytes]]) -> str | None:
        """Store an entry; return why there is no room for it, with the cure, or None.

        Args:
            key: its name.
            size: its size in bytes.
            pieces: returns its content in pieces. It is called again after room was made on a full disk.
        """
        partial = self.folder / f".{key}.{uuid.uuid4().hex}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                if not self._reserve(partial, size):
                    return "data.cache_gib is too small for what is fetched at the same time; raise it"
                self._write(partial, size, pieces)
                partial.replace(self._path(key))
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            return f"{error.strerror}; make room there, or set data.cache_dir to a folder with more"
        return None

    @contextlib.contextmanager
    def only_one(self, key: str, patience_seconds: float, stop: threading.Event) -> Iterator[None]:
        """Hold the lock of a key, so that one of several processes fetches its content.

        The lock of a process that ends is released. The wait for it ends without the lock if what its holder writes
        does not grow for `patience_seconds`, if `stop` is set, or if the file system has no locks.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self.folder / f".{key}.lock").open("wb"))
                self._wait(lock, key, patience_seconds, stop)
            yield

    def _wait(self, lock: BinaryIO, key: str, patience_seconds: float, stop: threading.Event) -> None:
        written, deadline = self._last_write(key), time.monotonic() + patience_seconds
        while not stop.is_set():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # guard: fetched-by-one
                return
            except BlockingIOError:
                stop.wait(_POLL_SECONDS)
            if time.monotonic() >= deadline:
                before, written = written, self._last_write(key)
                if written == before:  # guard: holder-that-hangs
                    return
                deadline = time.monotonic() + patience_seconds

    def _last_write(self, key: str) -> int:
        """Return the time at which a process last wrote a part of this entry."""
        return max((path.stat().st_mtime_ns for path in self.folder.glob(f".{key}.*.partial")), default=0)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.cached"

    def _reserve(self, partial: Path, size: int) -> bool:
        """Reserve space for a file and delete old files to stay within the limit; return whether it may be written."""
        # Reserve first, count second: of two processes, the second one to count sees both files.
        with partial.open("xb") as file:
            file.truncate(size)
        entries, total = self._scan()
        excess = total - self.max_bytes
        if excess > sum(size for _, size, _ in entries):
            return False
        self._delete(entries, excess)  # guard: cache-bound
        return True

    def _write(self, partial: Path, size: int, pieces: Callable[[], Iterable[bytes]]) -> None:
        with partial.open("r+b", buffering=0) as file:  # not "wb", which would release the reserved space
            while True:
                try:
                    file.seek(0)
                    for piece in pieces():
                        view = memoryview(piece)
                        while view:
                            view = view[file.write(view) :]
                    os.fsync(file.fileno())
                    return
                except OSError as error:
                    file.truncate(0)  # release the blocks written so far
                    file.truncate(size)
                    if error.errno not in _FULL or not self._delete(self._scan()[0], size):
                        raise

    def _scan(self) -> tuple[list[tuple[int, int, str]], int]:
        """List (last use, bytes, path) of complete files, and all bytes; delete leftovers of dead processes."""
        entries, total = [], 0
        with os.scandir(self.folder) as folder:
            for entry in folder:
                complete = _ENTRY.fullmatch(entry.name)
                if not complete and not _TEMPORARY.fullmatch(entry.name):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                    if not complete and time.time() - status.st_mtime > _LEFTOVER_SECONDS:
                        os.unlink(entry.path)
                        continue
                except FileNotFoundError:  # another process has deleted it
                    continue
                total += status.st_size
                if complete:
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
        return entries, total

    @staticmethod
    def _delete(entries: list[tuple[int, int, str]], needed: int) -> bool:
        """Delete the least recently used files until `needed` bytes are free; return whether there were any files."""
        for _, size, path in sorted(entries):
            if needed <= 0:
                break
            Path(path).unlink(missing_ok=True)
            needed -= size
        return bool(entries)

    def _warn(self, reason: str) -> None:
        if self._first_warning.acquire(blocking=False):  # guard: full-cache
            log.warning("%s: data cannot be cached there and are fetched at every use: %s", self.folder, reason)
