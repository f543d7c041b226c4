"""A thread that copies checkpoints to a run's mirror while the run trains: one at a time, the newest one next."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distrain import address
from distrain.data.fetch import FetchError
from distrain.errors import BusyError
from distrain.runs import checkpoint
from distrain.runs.checkpoint_archive import OpenCheckpoint
from distrain.runs.mirror import Mirror
from distrain.text import percent

log = logging.getLogger("distrain")

_PROGRESS_SECONDS = 30.0
"""Time between two messages about a long upload."""
_END_SECONDS = 5.0
"""Longest wait for the thread to end when the run fails."""


@dataclass
class _Task:
    """A request to copy the logs and, if they are not there yet, a checkpoint and the best one."""

    step: int | None
    best: int | None
    checkpoints: list[OpenCheckpoint]

    def close(self) -> None:
        for each in self.checkpoints:
            each.close()


class Copier:
    """Copies a run to its mirror in a thread.

    Args:
        mirror: where to.
        checkpoints: RUN/checkpoints.
        on_lost: called in the thread when another job has taken over; nothing more is copied.
        stop: the event that ends all requests of `mirror`.
    """

    def __init__(
        self, mirror: Mirror, checkpoints: Path, on_lost: Callable[[BusyError], None], stop: threading.Event
    ) -> None:
        self._mirror, self._checkpoints, self._on_lost, self._stop = mirror, checkpoints, on_lost, stop
        self._changed = threading.Condition()
        self._next: _Task | None = None
        self._is_copying = False
        self._error: str | None = None
        self._newest: tuple[int | None, int | None] = (None, None)
        self._bytes_sent = 0
        self._thread = threading.Thread(target=self._work, name="distrain-mirror", daemon=True)
        self._thread.start()

    def copy(self, step: int | None, best: int | None) -> None:
        """Copy the logs and a checkpoint; return at once. Its files are opened here, so they may be deleted later.

        Args:
            step: of a checkpoint that is committed; None before the first one.
            best: step of the best one, which a run that resumes needs too.
        """
        steps = dict.fromkeys(each for each in (best, step) if each is not None and self._mirror.lacks(each))
        opened = []
        for each in steps:
            try:
                opened.append(OpenCheckpoint(checkpoint.path_of(self._checkpoints, each), each))
            except OSError as error:
                log.warning("%s: cannot be copied to %s: %s", error.filename, self._mirror, error.strerror)
        with self._changed:
            self._newest = step, best
            before, self._next = self._next, _Task(step, best, opened)
            self._changed.notify_all()
        if before is not None:
            before.close()
            if before.step != step:
                log.info(
                    "step %s is not copied to %s, which is slower than the saves", f"{before.step:,}", self._mirror
                )

    def finish(self, on_progress: Callable[[], None], is_stopped: Callable[[], bool], seconds: float) -> str | None:
        """Copy what is not copied yet, and wait for it.

        Args:
            on_progress: called while bytes are sent.
            is_stopped: whether a stop was requested.
            seconds: longest wait after a stop request.

        Returns:
            Why the newest checkpoint or the logs could not be copied; None if they were.
        """
        if self._next is None:
            self.copy(*self._newest)
        deadline, sent = float("inf"), -1
        with self._changed:
            while self._next is not None or self._is_copying:
                if is_stopped():
                    deadline = min(deadline, time.monotonic() + seconds)
                if time.monotonic() > deadline:
                    return f"{self._mirror}: not complete {seconds:g} s after a stop request"
                if self._bytes_sent != sent:
                    sent = self._bytes_sent
                    on_progress()
                self._changed.wait(0.5)
            return self._error

    def close(self) -> None:
        """End the thread; what is not complete is abandoned."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(_END_SECONDS)

    def _work(self) -> None:
        while (task := self._take()) is not None:
            error = None
            try:
                self._copy(task)
            except BusyError as lost:
                error = str(lost)
                self._on_lost(lost)
            except FetchError as caught:
                error = "; ".join(filter(None, (f"{self._mirror}: {caught.reason}", caught.cure)))
            except Exception as caught:  # whatever it is, training continues and `finish` must not wait for ever
                error = f"{self._mirror}: {type(caught).__name__}: {address.scrub(str(caught))}"
            finally:
                task.close()
            self._report(error)
            with self._changed:
                self._is_copying = False
                self._changed.notify_all()

    def _take(self) -> _Task | None:
        with self._changed:
            self._changed.wait_for(lambda: self._next is not None or self._stop.is_set())
            if self._stop.is_set():
                return None
            task, self._next, self._is_copying = self._next, None, True
            return task

    def _copy(self, task: _Task) -> None:
        self._mirror.check_writer()
        self._mirror.put_logs()
        for saved in [each for each in task.checkpoints if self._mirror.lacks(each.step)]:
            start, self._bytes_sent = time.monotonic(), 0
            size = self._mirror.put(saved, self._progress_of(saved))
            seconds, mib = time.monotonic() - start, size / 2**20
            numbers = f"{mib:,.1f} MiB in {seconds:.1f} s, {mib / max(seconds, 1e-6):,.1f} MiB/s"
            log.info("step %s copied to %s: %s", f"{saved.step:,}", self._mirror, numbers)
        for step in (task.step, task.best):
            if step is not None and self._mirror.lacks(step):  # `copy` could not open it
                raise FetchError(f"step {step:,} cannot be read", "check the disk of run.dir")
        self._mirror.put_result()  # last: with it the run counts as done
        try:
            self._mirror.prune(task.best)
        except FetchError as error:  # the new checkpoint is there: an old one that remains is worth a warning only
            log.warning("%s: an old checkpoint cannot be deleted: %s", self._mirror, error)

    def _progress_of(self, saved: OpenCheckpoint) -> Callable[[int], None]:
        """Return a function that counts the bytes sent, and shows now and then which part of them that is."""
        total, shown, sent = saved.archive_bytes, time.monotonic(), 0

        def on_progress(size: int) -> None:
            nonlocal shown, sent
            sent += size
            self._bytes_sent += size
            if time.monotonic() - shown > _PROGRESS_SECONDS:
                shown = time.monotonic()
                log.info("copying step %s to %s: %s", f"{saved.step:,}", self._mirror, percent(min(1.0, sent / total)))

        return on_progress

    def _report(self, error: str | None) -> None:
        """Keep why the last copy failed; warn of the first failure after a success."""
        if error is not None and self._error is None and not self._stop.is_set():
            log.warning("%s; training continues, and the next checkpoint is copied", error)
        elif error is None and self._error is not None:
            log.info("%s can be written again", self._mirror)
        self._error = error
