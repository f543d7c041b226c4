"""Stop requests by signal: recorded here, acted upon at a step where all processes can stop together.

Imports nothing slow, so the handlers are installed before torch is imported: the default action of a signal would kill
a job that is preempted while it starts.
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

from distrain.environment import Environment

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
"""Signals that ask a run to stop; the kernel sends SIGXCPU at a limit of CPU time (`ulimit -t`)."""

_PR_SET_PDEATHSIG = 1
_requested: list[str] = []


def install() -> None:
    """Record stop requests from now on; in a thread other than the main one, do nothing."""
    if threading.current_thread() is threading.main_thread():
        _set(_record)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Send stop requests to `handler` within the block, and restore the earlier handlers after it; main thread only."""
    before = {number: signal.getsignal(number) for number in STOP}
    _set(handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            if earlier is not None:  # one that a C library has set cannot be set again from here
                signal.signal(number, earlier)


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Record stop requests within the block; earlier requests count if these handlers were installed already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGTERM) is not _record:
        _requested.clear()
    with handled_by(_record):
        yield


def end_with_launcher(environment: Environment) -> None:
    """Let the kernel kill this process when `distrain launch` or torchrun, its parent, ends.

    Otherwise an orphan would continue to train, beside the next attempt of the same run.
    """
    if sys.platform != "linux" or not (environment.launcher or environment.torchrun):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # guard: end-with-launcher
    if environment.launcher and os.getppid() != environment.launcher:  # it ended before the call
        os._exit(1)


def forget() -> None:
    """Forget the stop requests until now."""
    _requested.clear()


def requested() -> str | None:
    """Return the name of the first stop request (`SIGTERM` …), or None."""
    return _requested[0] if _requested else None


def requested_by() -> str:
    """Return ` by SIGTERM`, for messages."""
    return f" by {_requested[0]}" if _requested else " by a signal to another process"


def _set(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in STOP:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, handler)


def _record(number: int, frame: FrameType | None) -> None:
    _requested.append(signal.Signals(number).name)  # guard: note-signal
