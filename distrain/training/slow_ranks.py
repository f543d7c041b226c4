"""The process that is slower than the others, from the time in which each was busy (`distributed.busy_clock`)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Literal, NamedTuple

from distrain.distributed.busy_clock import BusyTime

FACTOR = 1.2
"""Factor above which a process is slow."""
LINES = 10
SECONDS = 60.0
"""Consecutive lines of metrics, and seconds of training, in which the same process is slow before there is a warning.

Where several processes use the same cores, one of them is slow for some seconds by chance.
"""


class Slowest(NamedTuple):
    """The process that is busy longest in a step, for which the others wait.

    Attributes:
        rank: of this process.
        seconds: busy time of a step.
        factor: how many times as long as the median of the others; if it has a larger local batch than the median of
            the others, that many times longer is expected, and the factor is divided by it.
        longer: what it does longer than the others: computing, or waiting for its data.
    """

    rank: int
    seconds: float
    factor: float
    longer: Literal["computing", "data"]

    @property
    def is_slow(self) -> bool:
        """Whether it is slower than is usual."""
        return self.factor > FACTOR


class Streak(NamedTuple):
    """The newest lines in a row in which the same process was slow, and their seconds; `rank` None: none was."""

    rank: int | None = None
    lines: int = 0
    seconds: float = 0.0

    @property
    def is_long(self) -> bool:
        """Whether this is no coincidence any more."""
        return self.lines >= LINES and self.seconds >= SECONDS


def find_slowest(times: Sequence[BusyTime]) -> Slowest:
    """Return the slowest of at least two processes; of two, it is compared with the other one."""
    busy = [each.computing + each.data for each in times]
    rank = max(range(len(busy)), key=busy.__getitem__)

    def median_of_others(values: Sequence[float]) -> float:
        return median([*values[:rank], *values[rank + 1 :]])

    of_samples = times[rank].samples / max(median_of_others([each.samples for each in times]), 1e-9)
    expected = median_of_others(busy) * max(of_samples, 1.0)
    more_data, more_computing = (
        values[rank] - median_of_others(values)
        for values in ([each.data for each in times], [each.computing for each in times])
    )
    longer: Literal["computing", "data"] = "data" if more_data > more_computing else "computing"
    return Slowest(rank, busy[rank], busy[rank] / max(expected, 1e-9), longer)


def next_streak(streak: Streak, slowest: Slowest, seconds: float) -> Streak:
    """Return the streak after one more line, about so many seconds of training."""
    if not slowest.is_slow:
        return Streak()
    before = streak if slowest.rank == streak.rank else Streak()
    return Streak(slowest.rank, before.lines + 1, before.seconds + seconds)


def warning(slowest: Slowest, host: str, device: str) -> str:
    """Return the warning about a slow process.

    Args:
        slowest: the process.
        host: its host.
        device: its device, such as cuda:3.
    """
    cures = {
        "data": "it waits for its data: check the disk, network and cores of this host",
        "computing": f"it computes longer: check {device} (clocks, temperature, errors), and other programs there",
    }
    return (
        f"rank {slowest.rank} on {host}, {device}, is slow, and all others wait for it: in at least {LINES} lines of"
        f" metrics in a row, it was busy more than {FACTOR:g} × as long as the median of the others; now"
        f" {1000 * slowest.seconds:,.1f} ms a step, {slowest.factor:.2f} ×; {cures[slowest.longer]}"
    )
