"""Durations on the clock of the device that computes; nothing waits for the device to measure them."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A moment on the clock of a device: what is used of torch.cuda.Event."""

    def record(self) -> None:
        """Set the moment: when the device has done all its work so far."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from this moment to another one."""


class _HostMark:
    """A moment on the host's clock: its work is done when a call returns."""

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _HostMark, /) -> float:
        return (end._seconds - self._seconds) * 1000


class Stopwatch:
    """Adds up durations by name.

    A GPU gets its work ahead of time. There a mark is an event that the GPU records when it arrives at it, and a
    duration is added when the GPU has passed its end.

    Args:
        on_gpu: whether the current GPU is measured, or the host.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._pending: deque[tuple[str, Mark, Mark]] = deque()
        self._seconds: dict[str, float] = {}

    def mark(self) -> Mark:
        """Mark the present; on a GPU the moment at which it has done all its work so far."""
        mark: Mark = torch.cuda.Event(enable_timing=True) if self._on_gpu else _HostMark()
        mark.record()
        return mark

    def add(self, name: str, start: Mark, end: Mark) -> None:
        """Add the duration between two marks."""
        self._pending.append((name, start, end))
        self._collect()

    def take(self) -> dict[str, float]:
        """Return the seconds of each name since the last call; what the GPU has not done yet is in the next one."""
        self._collect()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _collect(self) -> None:
        while self._pending and self._pending[0][2].query():
            name, start, end = self._pending.popleft()
            self._seconds[name] = self._seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
