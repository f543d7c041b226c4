"""The status of a worker process, readable by its launcher at any time.

It is a few bytes of shared memory (a mapped file): a write costs almost nothing, and the launcher can read the status
of a process that was killed or is stopped.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

PHASES = ("start", "first step", "train", "evaluate", "save", "end")
STARTING = ("start", "first step")
"""Phases before a process has trained a step."""
_STATUS = struct.Struct("<qqqd?")


@dataclass(frozen=True)
class WorkerStatus:
    """The activity of a worker.

    Attributes:
        phase: one of `PHASES`.
        step: optimizer steps done.
        heartbeats: how often progress was made.
        limit: longest time in seconds that may pass without a heartbeat; 0: no limit.
        is_saving: whether a thread writes a checkpoint, or did so and the main thread does not know its outcome yet.
    """

    phase: str = "start"
    step: int = 0
    heartbeats: int = 0
    limit: float = 0.0
    is_saving: bool = False


class StatusWriter:
    """Publishes the status of this process; does nothing without a launcher that reads it."""

    def __init__(self, folder: Path | None, rank: int) -> None:
        self._map: mmap.mmap | None = None
        if folder is not None:
            with contextlib.suppress(OSError), _status_file(folder, rank).open("w+b") as file:
                file.write(bytes(_STATUS.size))  # not a hole: on a full disk, touching one is SIGBUS
                file.flush()
                self._map = mmap.mmap(file.fileno(), _STATUS.size)

    def write(self, status: WorkerStatus) -> None:
        """Replace the published status."""
        if self._map is not None:
            values = (status.step, status.heartbeats, status.limit, status.is_saving)
            _STATUS.pack_into(self._map, 0, PHASES.index(status.phase), *values)


def read_status(folder: Path, rank: int) -> WorkerStatus:
    """Read the status of a process, dead or alive; the initial one if it has published none."""
    try:
        phase, *values = _STATUS.unpack(_status_file(folder, rank).read_bytes())
    except (OSError, struct.error):
        return WorkerStatus()
    return WorkerStatus(PHASES[phase], *values)


def is_published(folder: Path, rank: int) -> bool:
    """Whether a process has published a status: it has done its imports."""
    return _status_file(folder, rank).exists()


def _status_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.status"
