"""The part of a run's wall time that was spent in steps that counted: arithmetic on its attempts."""

from __future__ import annotations

import calendar
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Goodput(NamedTuple):
    """The seconds of a run.

    Attributes:
        train_seconds: in steps that are part of the final history: those that were trained again after a crash count
            once, and evaluations, saves and starts do not count.
        attempt_seconds: wall time of all attempts, from their start to their end or their last renewal.
        pause_seconds: wall time between the attempts, in which no process of the run existed.
    """

    train_seconds: float
    attempt_seconds: float
    pause_seconds: float

    @property
    def fraction(self) -> float | None:
        """The first by the second, at most 1; None before an attempt has taken any time."""
        return min(self.train_seconds / self.attempt_seconds, 1.0) if self.attempt_seconds > 0 else None


def measure(train_seconds: float, seconds: float, history: Sequence[Mapping[str, Any]]) -> Goodput:
    """Return the seconds of a run.

    Args:
        train_seconds: in steps that counted.
        seconds: of all attempts, each up to its last checkpoint. The file of an attempt that was killed may be some
            seconds older than that.
        history: the content of the files of all attempts, oldest first. One that waited for the folder while another
            attempt had it is counted from the end of that one.
    """
    attempt_seconds = pause_seconds = 0.0
    last_end: float | None = None
    for attempt in history:
        taken = _time(attempt["start"])  # the run's folder
        start = taken - (attempt.get("startup_seconds") or 0.0)
        end = taken + _seconds(attempt)
        if last_end is not None:
            pause_seconds += max(start - last_end, 0.0)
            start = max(start, last_end)
        attempt_seconds += max(end - start, 0.0)
        last_end = end if last_end is None else max(end, last_end)
    return Goodput(train_seconds, max(attempt_seconds, seconds), pause_seconds)


def _seconds(attempt: Mapping[str, Any]) -> float:
    """Return how long an attempt had the folder; from whole seconds of the clock in files of older versions."""
    seconds = attempt.get("seconds")
    if seconds is not None:
        return float(seconds)
    return max(_time(attempt.get("ended") or attempt["renewed"]) - _time(attempt["start"]), 0.0)


def _time(text: str) -> float:
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))
