"""Failures of a process: cause and exit code, as reported to the launcher and to the peers."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distrain import text
from distrain.environment import Environment
from distrain.errors import EXIT_FAULT, AgainError, Kind, SaveError, UserError
from distrain.worker_status import WorkerStatus, read_status


@dataclass(frozen=True)
class Failure:
    """The reason why a process ended without success.

    Attributes:
        kind: class of the cause.
        code: exit code of the process.
        rank: rank of the process.
        host: name of its host.
        phase: what it was doing (`worker_status.PHASES`).
        step: optimizer steps done.
        message: the cause and its cure, for people.
        traceback: of a fault; empty otherwise.
        time: seconds since the epoch.
    """

    kind: Kind
    code: int
    rank: int
    host: str
    phase: str
    step: int
    message: str
    traceback: str
    time: float

    @classmethod
    def from_json(cls, text: str | bytes) -> Failure:
        """Read what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**fields)

    def to_json(self) -> str:
        """Format as one JSON object."""
        return json.dumps(asdict(self))


class PeerFailedError(RuntimeError):
    """Another process failed and recorded why; this one exits with the same exit code."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"rank {failure.rank} on {failure.host} failed: {failure.message}")
        self.failure = failure


def failure_of(error: BaseException, environment: Environment) -> Failure:
    """Describe the error that ends this process; of a `PeerFailedError`, the failure of the peer."""
    if isinstance(error, PeerFailedError):
        return error.failure
    if isinstance(error, (UserError, AgainError, SaveError)):
        return failure_here(environment, error.kind, error.exit_code, str(error))
    trace = "".join(traceback.format_exception(error))
    message = f"{type(error).__name__}: {error}".removesuffix(": ")  # of an error without a text
    if isinstance(error, SystemExit):
        message = f"sys.exit({error.code!r}) was called before the command was done"
    return failure_here(environment, "fault", EXIT_FAULT, message, trace)


def failure_here(environment: Environment, kind: Kind, code: int, message: str, trace: str = "") -> Failure:
    """Build a failure of this process, in its present phase and step."""
    rank, folder = environment.world.rank, environment.status_folder
    status = read_status(folder, rank) if folder is not None else WorkerStatus()
    message, trace = text.message(message), text.message(trace)  # of a bounded length: they are kept in exit.json
    return Failure(kind, code, rank, socket.gethostname(), status.phase, status.step, message, trace, time.time())


def report_failure(failure: Failure, environment: Environment) -> bool:
    """Tell the launcher why this process ends; the first report counts.

    Returns:
        Whether there is a launcher that shows it. If not, the caller prints it.
    """
    if environment.status_folder is None:
        return False
    target = _failure_file(environment.status_folder, environment.world.rank)
    work = target.with_suffix(".partial")
    try:
        work.write_text(failure.to_json(), encoding="utf-8")
        if not target.exists():
            work.replace(target)
    except OSError:
        return False  # a full disk
    return True


def read_failure(folder: Path, rank: int) -> Failure | None:
    """Read what a process reported of its end; None if it reported nothing."""
    try:
        return Failure.from_json(_failure_file(folder, rank).read_text(encoding="utf-8"))
    except OSError:
        return None


def mark_unfinished(folder: Path, rank: int) -> None:
    """Note that a worker is about to start; it removes the mark when its command is done."""
    _unfinished_file(folder, rank).touch()


def report_done(environment: Environment) -> None:
    """Tell the launcher that the command is done. A file is removed, which is possible even on a full disk."""
    if environment.status_folder is not None:
        with contextlib.suppress(OSError):
            _unfinished_file(environment.status_folder, environment.world.rank).unlink()


def is_unfinished(folder: Path, rank: int) -> bool:
    """Whether a worker has not reported that its command is done."""
    return _unfinished_file(folder, rank).exists()


def _unfinished_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.unfinished"


def _failure_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.failure.json"
