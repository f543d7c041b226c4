"""Stop requests: signals are noted, and acted upon where all processes can leave together.

Imports nothing that takes time: handlers are there before torch is imported, so a job that is preempted while it
starts is not killed by a signal's default.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
LAUNCHER = "DISTRAIN_LAUNCHER"
"""Environment variable: number of the launcher's process."""

_PR_SET_PDEATHSIG = 1
_requested: list[str] = []


def install() -> None:
    """Note stop requests from here on. Threads other than the main one cannot, and leave things as they are."""
    if threading.current_thread() is threading.main_thread():
        _set(_note)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Stop requests go to a handler within the block; afterwards to whom they went before. For the main thread."""
    before = {number: signal.getsignal(number) for number in STOP}
    _set(handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            if earlier is not None:  # one that a C library has set cannot be set again from here
                signal.signal(number, earlier)


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """As `install`, within the block; requests from before it count unless the handlers were other ones."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGTERM) is not _note:
        _requested.clear()
    with handled_by(_note):
        yield


def end_with_launcher() -> None:
    """Have the kernel end this process when its launcher ends, by whatever means: an orphan would train on, beside the
    next attempt of the same run. Counts for `distrain launch` and torchrun.
    """
    launcher = os.environ.get(LAUNCHER)
    if sys.platform != "linux" or not (launcher or "TORCHELASTIC_RUN_ID" in os.environ):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if launcher and os.getppid() != int(launcher):  # it ended before the kernel was told
        os._exit(1)


def requested() -> str | None:
    """The first stop request's name (`SIGTERM` …); None where there was none."""
    return _requested[0] if _requested else None


def requested_by() -> str:
    """For messages: ` by SIGTERM`."""
    return f" by {_requested[0]}" if _requested else " by a signal to another process"


def _set(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in STOP:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    _requested.append(signal.Signals(number).name)
