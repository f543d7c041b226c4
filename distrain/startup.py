"""One line that says what the start of a command waits for, if nothing else was shown for ten seconds.

Importing torch from a cold network disk, the rendezvous and the first step can each take minutes.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Iterator

from distrain.text import printable

SILENCE_SECONDS = 10.0
"""Time without a message after which one line says what the start waits for."""

log = logging.getLogger("distrain")


class _Start(logging.Filter):
    """A start that is under way. As a filter of the logger, which passes all messages, it sees when one was shown."""

    def __init__(self, activity: str) -> None:
        super().__init__()
        self.activity: str | None = activity
        self.ended = threading.Event()
        self._shown_at = time.monotonic()

    def filter(self, record: logging.LogRecord) -> bool:
        self._shown_at = time.monotonic()
        return True

    def explain(self) -> None:
        """Log each activity once, if nothing was logged for a while; until the start has ended."""
        said: str | None = None
        while not self.ended.wait(SILENCE_SECONDS / 20):
            activity = self.activity
            if activity is not None and activity != said and time.monotonic() - self._shown_at >= SILENCE_SECONDS:
                said = activity
                log.info("still starting: %s", printable(activity))


_start: _Start | None = None


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Within the block, collect no garbage: imports leave none, and searching for it is a quarter of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def explained(activity: str) -> Iterator[None]:
    """Within the block, say what the start of this process waits for if nothing else is shown; first for `activity`."""
    global _start  # noqa: PLW0603 - a process has one start; the modules that know what it does share no object
    start = _start = _Start(activity)
    log.addFilter(start)
    thread = threading.Thread(target=start.explain, name="distrain-startup", daemon=True)
    thread.start()
    try:
        yield
    finally:
        start.ended.set()
        log.removeFilter(start)
        _start = None
        thread.join()


def waits_for(activity: str | None) -> None:
    """Name what the start of this process waits for from here on; None: it is over."""
    if _start is not None:
        _start.activity = activity
