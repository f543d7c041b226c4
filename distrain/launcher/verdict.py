"""The exit code of a node and its reason, from how its workers ended."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from distrain.errors import EXIT_AGAIN, EXIT_FAULT, EXIT_NEVER_AGAIN, EXIT_OK
from distrain.failure_report import Failure
from distrain.signals import STOP
from distrain.text import plural
from distrain.worker_status import WorkerStatus

_FROM_OUTSIDE = {signal.SIGKILL, *STOP}  # guard: crash-is-a-fault
"""Signals that somebody sends; any other is a crash of the program itself."""
_LOST = "it cannot be resumed: no checkpoint can be read, or run.resume=never"


@dataclass(frozen=True)
class WorkerExit:
    """The end of one worker of this node.

    Attributes:
        rank: rank of the worker.
        code: exit code; negative: the signal that ended it.
        failure: what the worker reported; None if nothing.
        status: its last status.
        time: seconds since the epoch.
        by_launcher: whether this launcher killed it.
        unfinished: whether its command was not done.
    """

    rank: int
    code: int
    failure: Failure | None
    status: WorkerStatus
    time: float
    by_launcher: bool
    unfinished: bool = False

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than by finishing its command; code that it runs may call `os._exit(0)`."""
        return self.code != EXIT_OK or self.unfinished  # guard: left-early

    @property
    def kind(self) -> str | None:
        """Kind of the reported failure."""
        return self.failure.kind if self.failure is not None else None


@dataclass(frozen=True)
class Verdict:
    """The exit code of the launcher, and why.

    Attributes:
        code: exit code of the launcher.
        reason: one line for people, and for RUN/exit.json.
        first: the worker that failed first, if that is the reason.
    """

    code: int
    reason: str
    first: WorkerExit | None = None

    @property
    def is_busy(self) -> bool:
        """Whether the run's folder belongs to another job; then this launcher must not write there."""
        return self.first is not None and self.first.kind == "busy"


def may_restart(verdict: Verdict) -> bool:
    """Return whether another attempt in the same allocation can help.

    It can where a process was killed or crashed by a signal, hung, or lost its GPU, a peer or a server; not where a
    stop was requested, the folder belongs to another job, or the program or the configuration has a fault.
    """
    first = verdict.first
    if first is None or verdict.is_busy:
        return False
    return verdict.code == EXIT_AGAIN or first.code < 0  # guard: loss-only


def decide(exits: Sequence[WorkerExit], stop_signal: str | None, can_resume: bool) -> Verdict:
    """Decide the exit code of a node from how its workers ended.

    Args:
        exits: one of each worker.
        stop_signal: the signal by which this launcher was asked to stop; None if it was not.
        can_resume: whether a verified checkpoint exists, or nothing that could be lost.
    """
    if not any(end.failed for end in exits):
        return Verdict(EXIT_OK, "done")
    failed = [end for end in sorted(exits, key=lambda end: end.time) if end.failed and not end.by_launcher]
    for end in failed:
        if end.code == EXIT_NEVER_AGAIN:
            return Verdict(EXIT_NEVER_AGAIN, _reason(end), end)
    for end in failed:
        if end.code not in (EXIT_AGAIN, *(-number for number in _FROM_OUTSIDE)):
            return Verdict(EXIT_FAULT, _reason(end), end)
    causes = [end for end in failed if end.code < 0 or end.kind == "gpu"]
    lost_peer = [end for end in failed if end.kind in ("peer", "hang", "busy")]
    stopped = [end for end in failed if end.kind == "again"]
    if stop_signal or (stopped and not causes and not lost_peer):
        return _stopped(stopped, stop_signal, can_resume)
    first = [*causes, *lost_peer, *exits][0]
    if not can_resume:
        return Verdict(EXIT_FAULT, f"{_reason(first)}; {_LOST}", first)
    return Verdict(EXIT_AGAIN, _reason(first), first)


def _stopped(stopped: Sequence[WorkerExit], stop_signal: str | None, can_resume: bool) -> Verdict:
    if stopped:
        return Verdict(EXIT_AGAIN, _reason(stopped[0]))
    reason = f"stopped by {stop_signal} before anything could be saved"
    return Verdict(EXIT_AGAIN, reason) if can_resume else Verdict(EXIT_FAULT, f"{reason}; {_LOST}")


def _reason(end: WorkerExit) -> str:
    if end.failure is not None:
        message = end.failure.message
        return message.partition("\n")[0] if end.failure.kind == "fault" else message
    where = f"in phase {end.status.phase}, step {end.status.step:,}"
    if end.code < 0:
        memory = " (out of memory, or from outside)" if -end.code == signal.SIGKILL else ""
        return f"rank {end.rank} was ended by {signal.Signals(-end.code).name}{memory} {where}"
    before = ", before its command was done" if end.code == EXIT_OK else ""
    return f"rank {end.rank} ended with {end.code} {where}{before}"


def format_restart(verdict: Verdict, left: int) -> str:
    """Format that the processes are started again, as one of `left` restarts, for people: one line."""
    return f"{verdict.reason}; starting again from the newest checkpoint ({plural(left - 1, 'more restart')} allowed)"


def format_verdict(verdict: Verdict) -> str:
    """Format a verdict other than success, for people: one screen."""
    lines = _first_failure(verdict.first) if verdict.first is not None else []
    meaning = {EXIT_AGAIN: "run it again", EXIT_NEVER_AGAIN: "not again unchanged"}.get(verdict.code, "a fault")
    prefix = "" if verdict.code == EXIT_AGAIN else "error: "
    return "\n".join([*lines, f"distrain: {prefix}{verdict.reason}", f"distrain: exit {verdict.code}: {meaning}"])


def _first_failure(end: WorkerExit) -> list[str]:
    failure = end.failure
    if failure is None:
        rank, host, phase, step = end.rank, socket.gethostname(), end.status.phase, end.status.step
    else:  # it may be the failure of a peer on another node, with which this worker ended
        rank, host, phase, step = failure.rank, failure.host, failure.phase, failure.step
    lines = []
    if failure is None or failure.kind != "user" or step:
        # One that lost a peer, or a server, is not where the failure began.
        what = "ended" if failure is not None and failure.kind == "peer" else "failed first"
        lines = [f"distrain: rank {rank} {what}", f"  host   {host}", f"  phase  {phase}, step {step:,}"]
    elif host != socket.gethostname():
        lines = [f"distrain: on {host}:"]
    if failure is not None and failure.traceback:  # guard: show-traceback
        lines.append(failure.traceback.rstrip())
    return lines
