"""The folder that `distrain prepare` fills: it has one owner, who removes only what it wrote itself.

Everything is written to OUT/.partial, whose file `owner` is locked (flock) by the owner and its workers. The kernel
releases the lock when the last of them has ended, however that happens.

An owner that fails removes all of it, except a folder that it names as resumable: the next owner that gives the same
name continues with it. Any other owner removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from distrain import files
from distrain.data import manifest
from distrain.errors import BusyError, ConfigError

log = logging.getLogger("distrain")

_OWNER, _UNLOCKED, _MOVED = "owner", "unlocked", "moved.json"
_WAIT_SECONDS = 2.0
"""Workers of an owner that was killed end within a second."""


class OutputFolder:
    """A folder that this process owns until `finish` or `discard`.

    Attributes:
        path: the folder.
        work: an empty folder inside for everything that is not complete.
    """

    def __init__(self, path: Path, resumable: str | None = None) -> None:
        """Take the folder; remove what an earlier owner left.

        Args:
            path: the folder.
            resumable: name of a folder in `work` that an earlier owner may have left, and that is left on failure.

        Raises:
            BusyError: another process owns it.
            ConfigError: it holds something else, or cannot be created.
        """
        self.path, self.work = path, path / ".partial"
        self._resumable = resumable
        self._created = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._moved: dict[str, int] = {}
        """Files and folders that are in `path` already → their inodes, by which a restarted owner recognises them."""
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path}: is a file; choose another --out")
        if self.work.is_symlink():
            raise ConfigError(f"{self.work}: is a link; delete it, or choose another --out")
        if not (self.work / _OWNER).exists():
            self._check_content()
        self._lock = self._acquire()
        try:
            if (path / manifest.NAME).exists():  # another process has just finished
                return
            with contextlib.suppress(OSError, ValueError):
                self._moved = json.loads((self.work / _MOVED).read_bytes())
            self._clear()
            self._check_content()
        except BaseException:
            self.discard()
            raise

    def finish(self, root: Path, names: Iterable[str], manifest_text: str) -> None:
        """Move files and folders from `root` (in `work`) to `path`, write the manifest and give the folder back."""
        for name in names:
            if (self.path / name).exists():
                raise ConfigError(f"{self.path / name}: appeared while the data set was prepared; move it away")
            for file in (root / name).iterdir() if (root / name).is_dir() else [root / name]:
                files.sync(file)
        self._moved = {name: (root / name).stat().st_ino for name in names}
        files.write(self.work / _MOVED, json.dumps(self._moved).encode())
        for name in names:
            (root / name).rename(self.path / name)
        files.sync(self.path)
        files.replace(self.path / manifest.NAME, manifest_text)
        self._moved = {}  # what is complete stays, whatever happens from here on
        self._resumable = None
        self._release()

    def discard(self) -> None:
        """Remove all that this process wrote but the resumable folder, and give the folder back."""
        if self._moved:
            (self.path / manifest.NAME).unlink(missing_ok=True)  # first: without it, the folder is not a data set
        self._release()
        if self._resumable is not None and (self.work / self._resumable).exists():
            log.info(
                "%s has what was read so far: another attempt continues with it; delete it if there is none",
                self.work / self._resumable,
            )
        with contextlib.suppress(OSError):  # it holds something that this process did not write
            for folder in self._created:
                folder.rmdir()

    def _acquire(self) -> int:
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                self.work.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.work / _OWNER, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and time.monotonic() < deadline:
                    continue  # its owner has just removed it
                raise ConfigError(f"{self.path}: cannot be created: {error.strerror}") from error
            if self._locked(lock, wait=time.monotonic() < deadline):
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return lock
            os.close(lock)
            time.sleep(0.05)

    def _locked(self, lock: int, wait: bool) -> bool:
        """Try to lock a file that was opened; return whether it is locked, and still the folder's."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait:
                return False
            owner = os.pread(lock, 1000, 0).decode(errors="replace") or "a process"
            os.close(lock)
            raise BusyError(
                f"{self.path}: {owner} is preparing a data set there; wait until it has ended and run this again, or"
                " choose another --out"
            ) from None
        except OSError as error:
            self._mark_without_lock(lock, error)
        try:
            return os.fstat(lock).st_ino == (self.work / _OWNER).stat().st_ino
        except FileNotFoundError:
            return False

    def _mark_without_lock(self, lock: int, error: OSError) -> None:
        """Create a file in place of the lock, where the file system has none. It stays if the owner is killed."""
        owner = os.pread(lock, 1000, 0).decode(errors="replace") or "another process"
        try:
            os.close(os.open(self.work / _UNLOCKED, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            os.close(lock)
            raise ConfigError(
                f"{self.path}: {owner} is preparing a data set there, or was killed; this file system cannot lock files"
                f" ({os.strerror(error.errno or errno.ENOLCK)}), so delete {self.work} if it is not running any more"
            ) from None

    def _check_content(self) -> None:
        """Check that nothing else is in the folder."""
        known = {"lost+found", *((self.work.name,) if (self.work / _OWNER).exists() else ())}
        with contextlib.suppress(FileNotFoundError):
            content = sorted(set(os.listdir(self.path)) - known)
            if content == [self.work.name] and not os.listdir(self.work):
                return  # killed before it had the lock
            if content:
                raise ConfigError(
                    f"{self.path}: is neither empty nor a data set (it has {content[0]!r}); choose another --out"
                )

    def _clear(self) -> None:
        """Remove what owners wrote, but not the lock, nor the resumable folder."""
        for name, inode in self._moved.items():
            with contextlib.suppress(OSError):
                if (self.path / name).stat().st_ino == inode:
                    _remove(self.path / name)
        self._moved = {}
        with contextlib.suppress(OSError):
            for path in list(self.work.iterdir()):
                if path.name not in (_OWNER, _UNLOCKED, self._resumable):
                    _remove(path)

    def _release(self) -> None:
        self._clear()
        (self.work / _UNLOCKED).unlink(missing_ok=True)
        if not self._has_resumable():  # otherwise the file `owner` says that the folder is ours
            (self.work / _OWNER).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.work.rmdir()
        os.close(self._lock)

    def _has_resumable(self) -> bool:
        """Whether something can be resumed; an empty folder is removed."""
        if self._resumable is None:
            return False
        with contextlib.suppress(OSError):
            (self.work / self._resumable).rmdir()
        return (self.work / self._resumable).exists()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()
