"""What a process tells the launcher on its node: where it is, at any time, and why it failed.

The place is a few bytes of shared memory (a mapped file): writing costs next to nothing, and the launcher can read it
of a process that was killed, or is stopped.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

FOLDER = "DISTRAIN_REPORTS"
"""Environment variable: the launcher's folder for reports."""

PHASES = ("start", "first step", "train", "evaluate", "save", "end")
_PLACE = struct.Struct("<qqqd")

Kind = Literal["fault", "user", "again", "busy", "peer", "hang", "save"]


@dataclass(frozen=True)
class Place:
    """Where a process is: steps done, progress made (`beats` counts it), and the longest time in seconds that may pass
    without any (0: no limit).
    """

    phase: str = "start"
    step: int = 0
    beats: int = 0
    limit: float = 0.0


@dataclass(frozen=True)
class Failure:
    """Why a process ended otherwise than well."""

    kind: Kind
    code: int
    rank: int
    host: str
    message: str
    traceback: str
    time: float


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


def fail(kind: Kind, code: int, message: str, traceback: str = "") -> bool:
    """Tell the launcher why this process ends. Whether there is a launcher; the first failure told stays."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return False
    rank = int(os.environ.get("RANK", "0"))
    failure = Failure(kind, code, rank, socket.gethostname(), message, traceback, time.time())
    target = _failure_file(Path(folder), rank)
    work = target.with_suffix(".partial")
    try:
        work.write_text(json.dumps(asdict(failure)), encoding="utf-8")
        if not target.exists():
            work.replace(target)
    except OSError:
        return False  # a full disk: told on stderr instead
    return True


def read_failure(folder: Path, rank: int) -> Failure | None:
    """What a process told of its end."""
    try:
        return Failure(**json.loads(_failure_file(folder, rank).read_text(encoding="utf-8")))
    except OSError:
        return None


def _place_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.place"


def _failure_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.failure.json"
