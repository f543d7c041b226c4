"""RUN/exit.json: how this attempt ended, and how many attempts ended without progress before it.

The launchers of other nodes leave theirs in RUN/nodes/, for the launcher of the first node.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import time
from pathlib import Path

from distrain.config import Config
from distrain.errors import EXIT_AGAIN, EXIT_FAULT, EXIT_OK
from distrain.launcher.verdict import Verdict
from distrain.launcher.workers import EXIT_SECONDS
from distrain.runs import attempts, checkpoint, exit_record, lease
from distrain.runs.folder import EXIT, has_configuration
from distrain.text import plural

NODES = "nodes"
_NODES_SECONDS = 2 * EXIT_SECONDS
"""Longest wait for the records of other nodes."""

log = logging.getLogger("distrain")


class AttemptRecord:
    """RUN/exit.json, written by the launcher of the first node: when the attempt starts, and when it ends."""

    def __init__(self, config: Config) -> None:
        self._run, self._limit = Path(config.run.dir), config.launch.max_attempts_without_progress
        self._resume = config.run.resume
        self._checkpoints = self._run / checkpoint.FOLDER
        before = exit_record.read(self._run / EXIT)
        # Attempts are counted by leases: one that ended before it had a lease does not change their number.
        self._attempt = attempts.newest_attempt(self._run) + 1
        self._launch = int(before.get("launch", 0)) + 1
        self._nodes_before = [exit_record.read_node(path) for path in (self._run / NODES).glob("*.json")]
        self._step = before.get("step") or 0
        self._idle = int(before.get("attempts_without_progress", 0))
        if self._run.is_dir() and lease.owner(self._run) is None:
            step = checkpoint.newest_verified(self._checkpoints)
            if before.get("code", 0) is None:  # that launcher was killed before it could record its end
                self._idle = 0 if (step or 0) > self._step else self._idle + 1
            self._step = step or 0
            self._write(None, "running", step, self._attempt, self._idle)

    @property
    def exhausted(self) -> Verdict | None:
        """The verdict to give up, if launchers were killed again and again without progress; None otherwise."""
        if self._idle < self._limit:
            return None
        return Verdict(EXIT_FAULT, f"{_without_progress(self._idle)}, each killed without a report")

    def crash_elsewhere(self, nodes: int, verdict: Verdict) -> Verdict:
        """Replace the verdict `a peer was lost` by what another node recorded: only its launcher saw the process end.

        A fault of the program on any node comes first, then a process that was killed.
        """
        deadline = time.monotonic() + _NODES_SECONDS
        while True:
            records = [exit_record.read_node(_node_file(self._run, node)) for node in range(1, nodes)]
            new = [record for record in records if record and record not in self._nodes_before]
            faults = [record for record in new if record["code"] not in (EXIT_OK, EXIT_AGAIN)]
            killed = [record for record in new if record["killed"]]  # guard: killed-elsewhere
            complete = len(new) == nodes - 1 or time.monotonic() > deadline
            causes = faults or (killed if complete and not _was_killed(verdict) else [])
            if causes:
                first = min(causes, key=lambda record: record["time"])
                return Verdict(int(first["code"]), f"{first['host']}: {first['reason']}")
            if complete:
                return verdict
            time.sleep(0.2)

    def can_resume(self) -> bool:
        """Return whether the next attempt will have a verified checkpoint, or there was none to lose."""
        if not checkpoint.steps(self._checkpoints):
            return True
        return self._newest_at_end is not None and self._resume != "never"

    def close(self, verdict: Verdict) -> Verdict:
        """Record the verdict; after too many attempts without progress, `run it again` becomes a fault."""
        step = self._newest_at_end
        idle = 0 if (step or 0) > self._step or verdict.code == EXIT_OK else self._idle + 1
        if verdict.code == EXIT_AGAIN and idle >= self._limit:  # guard: attempts-limit
            verdict = Verdict(EXIT_FAULT, f"{_without_progress(idle)}; {verdict.reason}", verdict.first)
        if (self._run.is_dir() or verdict.code == EXIT_AGAIN) and lease.owner(self._run) is None:
            attempt = max(attempts.newest_attempt(self._run), self._attempt)
            idle = idle if verdict.code == EXIT_AGAIN else 0  # after a fault a person looks, and the count restarts
            self._write(verdict.code, verdict.reason, step, attempt, idle)
        return verdict

    @functools.cached_property
    def _newest_at_end(self) -> int | None:
        """Step of the newest verified checkpoint; computed once, as it reads the whole checkpoint."""
        return checkpoint.newest_verified(self._checkpoints)

    def _write(self, code: int | None, reason: str, step: int | None, attempt: int, idle: int) -> None:
        content = {
            "launch": self._launch,
            "attempts_without_progress": idle,
            "code": code,
            "reason": reason,
            "step": step,
            "attempt": attempt,
        }
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            exit_record.write(self._run / EXIT, content)
        except OSError as error:
            log.warning("%s: cannot be written: %s", self._run / EXIT, error.strerror)


def record_node(run: Path, node: int, verdict: Verdict) -> None:
    """Leave the verdict of a node other than the first one for the first node's launcher, if the run has a folder."""
    if not run.is_dir():
        return
    content = {
        "code": verdict.code,
        "reason": verdict.reason,
        "killed": _was_killed(verdict),
        "host": socket.gethostname(),
        "time": time.time(),
    }
    with contextlib.suppress(OSError):
        (run / NODES).mkdir(exist_ok=True)
        exit_record.write(_node_file(run, node), content)


def _was_killed(verdict: Verdict) -> bool:
    """Whether the process that failed first was ended by a signal."""
    return verdict.first is not None and verdict.first.code < 0


def is_done(config: Config) -> bool:
    """Return whether the run ended well, with this configuration."""
    run = Path(config.run.dir)
    return exit_record.read(run / EXIT).get("code") == EXIT_OK and has_configuration(run, config)


def _node_file(run: Path, node: int) -> Path:
    return run / NODES / f"{node:05d}.json"


def _without_progress(number: int) -> str:
    return f"{plural(number, 'attempt')} in a row without progress (launch.max_attempts_without_progress)"
