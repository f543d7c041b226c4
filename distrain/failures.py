"""Why a process failed: told to its launcher and to its peers, and the exit code that follows from it."""

from __future__ import annotations

import json
import os
import socket
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
from distrain.worker_status import FOLDER, WorkerStatus, read_status

Kind = Literal["fault", "user", "again", "busy", "peer", "hang", "save"]


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
    place = read_status(Path(folder), rank) if folder else WorkerStatus()
    return Failure(kind, code, rank, socket.gethostname(), place.phase, place.step, message, trace, time.time())


def parse_failure(text: str | bytes) -> Failure:
    """A failure from its JSON."""
    fields: dict[str, Any] = json.loads(text)
    return Failure(**fields)


def format_failure(failure: Failure) -> str:
    """The reverse of `parse_failure`."""
    return json.dumps(asdict(failure))


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


def _failure_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.failure.json"
