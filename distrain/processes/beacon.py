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

PHASES = ("start", "first step", "train", "evaluate", "save", "end")
_PLACE = struct.Struct("<qqqd")


@dataclass(frozen=True)
class Place:
    """Where a process is: steps done, progress made (`beats` counts it), and the longest time in seconds that may pass
    without any (0: no limit).
    """

    phase: str = "start"
    step: int = 0
    beats: int = 0
    limit: float = 0.0


class Beacon:
    """A process's place; kept to itself where no launcher asked for it."""

    def __init__(self, rank: int) -> None:
        folder = os.environ.get(FOLDER)
        self._map: mmap.mmap | None = None
        if folder:
            with contextlib.suppress(OSError), _place_file(Path(folder), rank).open("w+b") as file:
                file.write(bytes(_PLACE.size))  # not a hole: on a full disk, touching one is SIGBUS
                file.flush()
                self._map = mmap.mmap(file.fileno(), _PLACE.size)

    def tell(self, place: Place) -> None:
        """Overwrite the place."""
        if self._map is not None:
            _PLACE.pack_into(self._map, 0, PHASES.index(place.phase), place.step, place.beats, place.limit)


def read_place(folder: Path, rank: int) -> Place:
    """The place of a process, dead or alive; the start's where it has told none."""
    try:
        phase, step, beats, limit = _PLACE.unpack(_place_file(folder, rank).read_bytes())
    except (OSError, struct.error):
        return Place()
    return Place(PHASES[phase], step, beats, limit)


def _place_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.place"
