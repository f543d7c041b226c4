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
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from distrain.errors import (
    EXIT_AGAIN,
    EXIT_FAULT,
    EXIT_NEVER_AGAIN,
    AgainError,
    BusyError,
    PeerLostError,
    SaveError,
    UnreachableError,
    UserError,
)

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
    phase: str
    step: int
    message: str
    traceback: str
    time: float


class PeerFailedError(RuntimeError):
    """Another process failed by itself, and left word why: this one ends in the same way."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"rank {failure.rank} on {failure.host} failed: {failure.message}")
        self.failure = failure


_ENDS: list[tuple[type[Exception], Kind, int]] = [
    (UnreachableError, "peer", EXIT_AGAIN),
    (UserError, "user", EXIT_NEVER_AGAIN),
    (PeerLostError, "peer", EXIT_AGAIN),
    (BusyError, "busy", EXIT_AGAIN),
    (AgainError, "again", EXIT_AGAIN),
    (SaveError, "save", EXIT_FAULT),
]
"""How a command ends for an error; anything else is a fault, with its traceback."""


def failure_of(error: BaseException) -> Failure:
    """Why this process ends, for the launcher and for its peers."""
    if isinstance(error, PeerFailedError):
        return error.failure
    for type_, kind, code in _ENDS:
        if isinstance(error, type_):
            return failure(kind, code, str(error))
    trace = "".join(traceback.format_exception(error))
    return failure("fault", EXIT_FAULT, f"{type(error).__name__}: {error}", trace)


def failure(kind: Kind, code: int, message: str, trace: str = "") -> Failure:
    """A failure of this process, here and now."""
    rank = int(os.environ.get("RANK", "0"))
    folder = os.environ.get(FOLDER)
    place = read_place(Path(folder), rank) if folder else Place()
    return Failure(kind, code, rank, socket.gethostname(), place.phase, place.step, message, trace, time.time())


def parse_failure(text: str | bytes) -> Failure:
    """A failure from its JSON."""
    fields: dict[str, Any] = json.loads(text)
    return Failure(**fields)


def format_failure(failure: Failure) -> str:
    """The reverse of `parse_failure`."""
    return json.dumps(asdict(failure))


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


def fail(failure: Failure) -> bool:
    """Tell the launcher why this process ends. Whether there is a launcher; the first failure told stays."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return False
    target = _failure_file(Path(folder), int(os.environ.get("RANK", "0")))
    work = target.with_suffix(".partial")
    try:
        work.write_text(format_failure(failure), encoding="utf-8")
        if not target.exists():
            work.replace(target)
    except OSError:
        return False  # a full disk: told on stderr instead
    return True


def read_failure(folder: Path, rank: int) -> Failure | None:
    """What a process told of its end."""
    try:
        return parse_failure(_failure_file(folder, rank).read_text(encoding="utf-8"))
    except OSError:
        return None


def _place_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.place"


def _failure_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.failure.json"
