"""The lease on a run's folder, which allows one job at a time to write in it.

The newest file of RUN/attempts is the lease. Its owner renews it. A job that waits for the lease creates the next file,
which only one job can do, once the newest lease is released, or its process has ended, or it was not renewed for a
while. An owner that sees a newer file than its own has lost the lease and must not write any more. Nothing is ever
deleted, so two jobs that both take over a stale lease cannot undo each other's work.

A folder can be removed, moved or replaced by another while its owner runs. So an owner compares, before it writes
anything, what is at the path of the folder with what it took: the folder itself, and the token in its attempt's file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distrain.errors import AgainError, BusyError, DataError, FolderLostError, Stopped
from distrain.runs import attempts, records

RENEW_SECONDS = 5.0
STALE_SECONDS = 30.0
"""Time without a renewal after which an owner counts as gone.

The waiting job measures it, so the clocks of two hosts are never compared.
"""


_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
"""Errors that say that a file is not there; others may be a disk or server that fails for a while."""


class Lease:
    """The right to write in a run's folder; held by one job at a time."""

    def __init__(self, run: Path, attempt: int, content: dict[str, Any]) -> None:
        self.attempt = attempt
        self.started = time.monotonic()
        """The time when it was acquired, by `time.monotonic`."""
        self._run, self._folder = run, os.open(run, os.O_RDONLY | os.O_DIRECTORY)
        self._path, self._content = attempts.path_of(run, attempt), content
        self._next = attempts.path_of(run, attempt + 1)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """Check that this job still holds the lease; call it before anything is written.

        Raises:
            BusyError: another job has taken the folder over.
            FolderLostError: the folder was removed, moved or replaced.
        """
        self.check_folder()
        if self._next.exists():  # guard: lease-lost
            raise BusyError(f"{self._run}: taken over by another job ({_describe(self._next)})")

    def check_folder(self) -> None:
        """Check that the run's folder is the one that this job took.

        Raises:
            FolderLostError: it was removed, moved or replaced.
        """
        problem = self._change()
        if problem is not None:  # guard: folder-lost
            raise FolderLostError(
                f"{self._run}: {problem} while this job was writing there; nothing more is written."
                " If it was moved, move it back, or give its new place as run.dir, and the run resumes"
            )

    def _change(self) -> str | None:
        """Return what happened to the folder, or None if it is as it was or the disk does not answer now."""
        try:
            # The open folder keeps its inode, which no other folder can get.
            if not os.path.samestat(os.fstat(self._folder), os.stat(self._run)):
                return "was moved or removed, and another folder was put in its place,"
            token = self._path.read_bytes()
        except OSError as error:
            if error.errno not in _GONE:
                return None  # what is written next reports it
            return "was emptied" if self._run.is_dir() else "was removed or moved"
        return None if self._content["token"].encode() in token else "was replaced by another run's folder"

    def renew_in_background(self, on_lost: Callable[[BusyError | FolderLostError], None]) -> None:
        """Renew the lease in a thread; call `on_lost` when `check` fails."""

        def work() -> None:
            while not self._closed.wait(RENEW_SECONDS):
                try:
                    self.check()
                    self.note(beat=self._content["beat"] + 1)
                except (BusyError, FolderLostError) as error:
                    on_lost(error)
                    return
                except OSError:
                    continue  # the disk is full or missing: the next renewal may succeed

        self._thread = threading.Thread(target=work, name="distrain-lease", daemon=True)
        self._thread.start()

    def note(self, **values: Any) -> None:
        """Add values to this attempt's file, and renew the lease.

        Raises:
            FolderLostError: the folder was removed, moved or replaced.
            OSError: the file cannot be written.
        """
        self.check_folder()
        with self._lock:
            seconds = round(time.monotonic() - self.started, 3)
            self._content = {**self._content, **values, "renewed": attempts.now(), "seconds": seconds}
            attempts.replace(self._path, self._content)

    def release(self, code: int | None = None, reason: str = "") -> None:
        """Release the lease: a waiting job need not wait until it is stale.

        Args:
            code: exit code of a command that ends so; None: not known.
            reason: why the attempt ended, for people.
        """
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(RENEW_SECONDS)
        with contextlib.suppress(OSError, FolderLostError):  # the lease becomes stale instead
            self.note(ended=attempts.now(), code=code, reason=reason)
        folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)


def acquire(
    run: Path,
    wait_seconds: float,
    on_wait: Callable[[str], None] = lambda message: None,
    stop_requested: Callable[[], object] = lambda: None,
) -> Lease:
    """Acquire the lease on a run's folder; wait while another job holds it.

    Args:
        run: the run's folder, which must exist.
        wait_seconds: longest wait for another job.
        on_wait: called once, with a message that names the other job, if there is one to wait for.
        stop_requested: returns a true value when the wait should end.

    Raises:
        BusyError: another job still holds the lease after `wait_seconds`.
        Stopped: a stop was requested during the wait.
    """
    (run / attempts.FOLDER).mkdir(exist_ok=True)
    start = changed_at = time.monotonic()
    last_seen: Any = None
    reported = False
    while True:
        newest = attempts.newest_attempt(run)
        current = _read(attempts.path_of(run, newest)) if newest else None
        if current != last_seen:
            last_seen, changed_at = current, time.monotonic()
        stale = time.monotonic() - changed_at > STALE_SECONDS
        if not newest or (current and _is_gone(current)) or stale:  # guard: lease
            content = _entry(newest + 1)
            if attempts.create(attempts.path_of(run, newest + 1), content):
                return Lease(run, newest + 1, content)
            newest = attempts.newest_attempt(run)  # of a job that was faster
        if time.monotonic() - start > wait_seconds:
            raise BusyError(
                f"{run}: another job is writing here: {_describe(attempts.path_of(run, newest))}."
                " Wait for it, end it, or choose another run.dir"
            )
        if stop_requested():
            raise Stopped(f"{run}: stopped while waiting for another job; nothing had to be saved")
        if not reported:
            on_wait(f"{run}: waiting for another job to exit: {_describe(attempts.path_of(run, newest))}")
            reported = True
        time.sleep(0.2)


def owner(run: Path) -> str | None:
    """Describe the job that holds the lease; None if it is free.

    A job on another host counts as the owner until it releases the lease, even if it has died: its process cannot be
    seen from here. So does the unknown owner of a lease that cannot be read.
    """
    newest = attempts.newest_attempt(run)
    if not newest:
        return None
    path = attempts.path_of(run, newest)
    current = _read(path)
    return None if current and _is_gone(current) else _describe(path)


def _read(path: Path) -> dict[str, Any] | None:
    record = records.read_or_warn(path, records.Attempt, [], attempts.CURE)
    return records.content_of(record) if record is not None else None


def _describe(path: Path) -> str:
    """Describe the owner of a lease, or why it is not known."""
    try:
        record = records.read(path, records.Attempt, f"taken over unless a job renews it within {STALE_SECONDS:g} s")
    except (DataError, AgainError) as error:
        return f"owner unknown: {error}"
    return attempts.describe(records.content_of(record)) if record is not None else "owner unknown"


def _entry(attempt: int) -> dict[str, Any]:
    return {
        "attempt": attempt,
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "machine": _machine(),
        "process_start": _process_start(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "start": attempts.now(),
        "renewed": attempts.now(),
        "beat": 0,
        "ended": None,
    }


def _is_gone(entry: dict[str, Any]) -> bool:
    """Whether the lease is released, or its process ran on this machine and has ended."""
    if entry.get("ended") is not None:
        return True
    same_machine = entry.get("machine") is not None and entry["machine"] == _machine()
    return same_machine and _process_start(entry["process"]) != entry.get("process_start")


def _machine() -> str | None:
    """Identify this boot of this machine, and the PID name space: containers may share a host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_start(process: int) -> str | None:
    """Return a process's start time in the kernel's ticks, as process numbers are reused; None if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]
