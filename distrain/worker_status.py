"""Where a process is, told to the launcher on its node at any time.

The place is a few bytes of shared memory (a mapped file): writing costs next to nothing, and the launcher can read it
of a process that was killed, or is stopped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

FOLDER = "DISTRAIN_REPORTS"
"""Environment variable: the launcher's folder for what its processes tell."""
STORE_SOCKET = "DISTRAIN_STORE_SOCKET"
"""Environment variable: descriptor of the socket that the launcher listens on, for rank 0 to serve the store."""

PHASES = ("start", "first step", "train", "evaluate", "save", "end")
_STATUS = struct.Struct("<qqqd")


@dataclass(frozen=True)
class WorkerStatus:
    """Where a process is: steps done, progress made (`beats` counts it), and the longest time in seconds that may pass
    without any (0: no limit).
    """

    phase: str = "start"
    step: int = 0
    beats: int = 0
    limit: float = 0.0


class StatusWriter:
    """A process's place; kept to itself where no launcher asked for it."""

    def __init__(self, rank: int) -> None:
        folder = os.environ.get(FOLDER)
        self._map: mmap.mmap | None = None
        if folder:
            with contextlib.suppress(OSError), _status_file(Path(folder), rank).open("w+b") as file:
                file.write(bytes(_STATUS.size))  # not a hole: on a full disk, touching one is SIGBUS
                file.flush()
                self._map = mmap.mmap(file.fileno(), _STATUS.size)

    def tell(self, place: WorkerStatus) -> None:
        """Overwrite the place."""
        if self._map is not None:
            _STATUS.pack_into(self._map, 0, PHASES.index(place.phase), place.step, place.beats, place.limit)


def read_status(folder: Path, rank: int) -> WorkerStatus:
    """The place of a process, dead or alive; the start's where it has told none."""
    try:
        phase, step, beats, limit = _STATUS.unpack(_status_file(folder, rank).read_bytes())
    except (OSError, struct.error):
        return WorkerStatus()
    return WorkerStatus(PHASES[phase], step, beats, limit)


def _status_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.place"
