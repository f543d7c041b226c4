"""One writer: the lease on a run's folder, and the list of its attempts.

    RUN/attempts/000001.json  000002.json …      one file for each time that a job took the folder

The newest file is the lease. Its owner renews it; a job that wants the folder makes the next one, which only one can
do, once the newest is released, or its process is gone, or it was not renewed for a while. An owner that sees a newer
file than its own has lost the lease and must not write any more. Nothing is ever deleted, so two jobs that both take
over a stale lease cannot undo each other's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distrain.errors import BusyError, Stopped
from distrain.files import write

FOLDER = "attempts"
RENEW_SECONDS = 5.0
STALE_SECONDS = 30.0
"""Without a renewal for so long, an owner counts as gone. Seen by the one who waits: clocks are not compared."""

_NAME = re.compile(r"(\d{6,})\.json")


class Lease:
    """The right to write in a run's folder."""

    def __init__(self, run: Path, attempt: int, content: dict[str, Any]) -> None:
        self.attempt = attempt
        self._path, self._content = _path(run, attempt), content
        self._next = _path(run, attempt + 1)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """Before anything is written.

        Raises:
            BusyError: another job has taken the folder over.
        """
        if self._next.exists():  # guard: lease-lost
            raise BusyError(f"{self._path.parent.parent}: taken over by another job ({_named(_read(self._next))})")

    def keep(self, lost: Callable[[BusyError], None]) -> None:
        """Renew in the background; call `lost` when another job has taken over."""

        def work() -> None:
            while not self._closed.wait(RENEW_SECONDS):
                try:
                    self.check()
                    self.note(beat=self._content["beat"] + 1)
                except BusyError as error:
                    lost(error)
                    return
                except OSError:
                    continue  # a full or absent disk: the next renewal may do

        self._thread = threading.Thread(target=work, name="distrain-lease", daemon=True)
        self._thread.start()

    def note(self, **values: Any) -> None:
        """Write more into this attempt's file, and renew it."""
        with self._lock:
            self._content = {**self._content, **values, "renewed": _now()}
            _replace(self._path, self._content)

    def release(self) -> None:
        """Let the next job in at once."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(RENEW_SECONDS)
        with contextlib.suppress(OSError):  # it goes stale instead
            self.note(ended=_now())


def acquire(
    run: Path,
    wait_seconds: float,
    tell: Callable[[str], None] = lambda line: None,
    asked_to_stop: Callable[[], object] = lambda: None,
) -> Lease:
    """The lease on a run's folder, which must exist.

    Args:
        run: the run's folder.
        wait_seconds: longest wait for another owner to leave.
        tell: is told, once, that there is somebody to wait for.
        asked_to_stop: whether waiting should end.

    Raises:
        BusyError: there is an owner, and it stays.
        Stopped: asked to stop while it waited.
    """
    (run / FOLDER).mkdir(exist_ok=True)
    start = seen_at = time.monotonic()
    seen: Any = None
    told = False
    while True:
        newest = newest_attempt(run)
        current = _read(_path(run, newest)) if newest else None
        if current != seen:
            seen, seen_at = current, time.monotonic()
        if not newest or (current and _is_gone(current)) or time.monotonic() - seen_at > STALE_SECONDS:  # guard: lease
            content = _entry(newest + 1)
            if _create(_path(run, newest + 1), content):
                return Lease(run, newest + 1, content)
            continue
        if time.monotonic() - start > wait_seconds:
            raise BusyError(
                f"{run}: another job is writing here: {_named(current)}. Wait for it, end it, or choose another run.dir"
            )
        if asked_to_stop():
            raise Stopped(f"{run}: stopped while it waited for another job; nothing had to be saved")
        if not told:
            tell(f"{run}: waiting for another job to leave: {_named(current)}")
            told = True
        time.sleep(0.2)


def newest_attempt(run: Path) -> int:
    """Number of the newest attempt; 0 where there was none."""
    folder = run / FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), default=0)


def owner(run: Path) -> str | None:
    """Who holds the lease, for people; None if it is free. An owner on another host that died still counts."""
    newest = newest_attempt(run)
    current = _read(_path(run, newest)) if newest else None
    return None if current is None or _is_gone(current) else _named(current)


def history(run: Path) -> list[dict[str, Any]]:
    """What each attempt noted, oldest first."""
    found = (_read(_path(run, attempt)) for attempt in range(1, newest_attempt(run) + 1))
    return [entry for entry in found if entry is not None]


def _entry(attempt: int) -> dict[str, Any]:
    return {
        "attempt": attempt,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "machine": _machine(),
        "process_start": _process_start(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "start": _now(),
        "renewed": _now(),
        "beat": 0,
        "ended": None,
    }


def _is_gone(entry: dict[str, Any]) -> bool:
    """Released, or a process of this machine that no longer runs."""
    if entry.get("ended") is not None:
        return True
    here = entry.get("machine") is not None and entry["machine"] == _machine()
    return here and _process_start(int(entry["process"])) != entry.get("process_start")


def _machine() -> str | None:
    """This boot of this machine, and the name space that process numbers belong to: containers share host names."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_start(process: int) -> str | None:
    """When a process started, in the kernel's ticks: numbers are used again. None: it is not there, or a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _create(path: Path, content: dict[str, Any]) -> bool:
    """Make a file that must not be there yet; whole, and by one process alone (link is atomic on NFS too)."""
    work = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        write(work, json.dumps(content, indent=1).encode())
        os.link(work, path)
    except FileExistsError:
        return False
    finally:
        work.unlink(missing_ok=True)
    return True


def _replace(path: Path, content: dict[str, Any]) -> None:
    # Not synced, as `files.replace` would: a renewal must not wait behind a checkpoint on its way to the disk.
    work = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        work.write_text(json.dumps(content, indent=1), encoding="utf-8")
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None


def _path(run: Path, attempt: int) -> Path:
    return run / FOLDER / f"{attempt:06d}.json"


def _named(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "owner unknown"
    job = f", SLURM job {entry['job']}" if entry.get("job") else ""
    return (
        f"attempt {entry.get('attempt')}, host {entry.get('host')}, process {entry.get('process')}{job},"
        f" started {entry.get('start')}, renewed {entry.get('renewed')}"
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
