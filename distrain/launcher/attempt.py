"""RUN/exit.json: how this attempt ended, and how many attempts ended without progress before it.

The launchers of other nodes leave theirs in RUN/nodes/, for the launcher of the first node.

A scheduler such as Kubernetes replaces a pod by itself, also after exit code 1. It gives the job an identity
(DISTRAIN_JOB): a job that has given up ends at once when it is started again; the attempts of another job are counted
from 0, because a person has started it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distrain.config import Config
from distrain.errors import EXIT_AGAIN, EXIT_FAULT, EXIT_NEVER_AGAIN, EXIT_OK
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

    def __init__(self, config: Config, job: str | None = None) -> None:
        self._run, self._limit = Path(config.run.dir), config.launch.max_attempts_without_progress
        self._resume, self._job, self._has_mirror = config.run.resume, job, config.run.mirror is not None
        self._checkpoints = self._run / checkpoint.FOLDER
        self._before = before = exit_record.read(self._run / EXIT)
        # Attempts are counted by leases: one that ended before it had a lease does not change their number.
        self._attempt = attempts.newest_attempt(self._run) + 1
        self._launch = int(before.get("launch", 0)) + 1
        self._nodes_before = [exit_record.read_node(path) for path in (self._run / NODES).glob("*.json")]
        self._step = before.get("step") or 0
        is_same_job = job is None or before.get("job") == job
        self._idle = int(before.get("attempts_without_progress", 0)) if is_same_job else 0
        if self._run.is_dir() and lease.owner(self._run) is None:
            step = checkpoint.newest_verified(self._checkpoints)
            if before.get("code", 0) is None and is_same_job:  # that launcher was killed before it could record its end
                self._idle = 0 if (step or 0) > self._step else self._idle + 1
            self._step = step or 0
            self._write(None, "running", step, self._attempt, self._idle)

    @property
    def exhausted(self) -> Verdict | None:
        """The verdict to give up, if this job has given up before, or its launchers were killed again and again."""
        if self._idle < self._limit:
            return None
        if self._before.get("code") == EXIT_FAULT:
            return Verdict(EXIT_FAULT, str(self._before["reason"]))
        return Verdict(EXIT_FAULT, f"{_without_progress(self._idle)}, each killed without a report")

    def crash_elsewhere(self, nodes: int, verdict: Verdict) -> Verdict:
        """Replace the verdict `a peer was lost` by what the launcher of another node recorded of its processes."""
        deadline = time.monotonic() + _NODES_SECONDS
        while True:
            records = [exit_record.read_node(path) for path in (self._run / NODES).glob("*.json")]
            new = [record for record in records if record and record not in self._nodes_before]
            complete = len(new) == nodes - 1 or time.monotonic() > deadline
            cause = cause_elsewhere(new, verdict, complete)
            if cause is not None or complete:
                return cause or verdict
            time.sleep(0.2)

    def without_folder(self, verdict: Verdict) -> Verdict | None:
        """Return the verdict if the run's folder was removed while the run trained there; None if it was not."""
        trained = verdict.code != EXIT_OK and verdict.first is not None and verdict.first.status.step > 0
        if not trained or self._has_mirror or self._run.is_dir():
            return None
        return Verdict(EXIT_NEVER_AGAIN, f"{self._run}: was removed while the run trained; bring it back")

    def can_resume(self) -> bool:
        """Return whether the next attempt will have a verified checkpoint, or there was none to lose."""
        if not checkpoint.steps(self._checkpoints):
            return True
        return self._newest_at_end is not None and self._resume != "never"

    def close(self, verdict: Verdict) -> Verdict:
        """Record the verdict; after too many attempts without progress, `run it again` becomes a fault."""
        step = self._newest_at_end
        idle = 0 if (step or 0) > self._step or verdict.code == EXIT_OK else self._idle + 1
        gave_up = self.exhausted is not None
        if verdict.code == EXIT_AGAIN and idle >= self._limit:  # guard: attempts-limit
            verdict = Verdict(EXIT_FAULT, f"{_without_progress(idle)}; {verdict.reason}", verdict.first)
            gave_up = True
        if (self._run.is_dir() or verdict.code == EXIT_AGAIN) and lease.owner(self._run) is None:
            attempt = max(attempts.newest_attempt(self._run), self._attempt)
            # After a fault a person looks, and the count restarts; without one, the same job would try again.
            is_counted = verdict.code == EXIT_AGAIN or (gave_up and self._job is not None)
            self._write(verdict.code, verdict.reason, step, attempt, idle if is_counted else 0)
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
            "job": self._job,
        }
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            exit_record.write(self._run / EXIT, content)
        except OSError as error:
            log.warning("%s: cannot be written: %s", self._run / EXIT, error.strerror)


def cause_elsewhere(ends: Sequence[Mapping[str, Any]], verdict: Verdict, complete: bool) -> Verdict | None:
    """Return what ended the attempt on another node; only the launcher there saw how its processes ended.

    A fault of the program on any node comes first, then a process that was killed.

    Args:
        ends: of other nodes: `code`, `reason`, `killed`, `host`, `time`.
        verdict: of this node.
        complete: whether all nodes are among them that are waited for.
    """
    faults = [end for end in ends if end["code"] not in (EXIT_OK, EXIT_AGAIN)]
    killed = [end for end in ends if end["killed"]]  # guard: killed-elsewhere
    causes = faults or (killed if complete and not was_killed(verdict) else [])
    if not causes:
        return None
    first = min(causes, key=lambda end: float(end["time"]))
    return Verdict(int(first["code"]), f"{first['host']}: {first['reason']}")


class NodeRecord:
    """RUN/nodes/00001.json, written by the launcher of another node than the first one when its attempt ends.

    It counts the attempts of the same job without a newer checkpoint too: the first node may never start.
    """

    def __init__(self, config: Config, node: int, job: str | None = None) -> None:
        self._run, self._limit, self._job = Path(config.run.dir), config.launch.max_attempts_without_progress, job
        self._path = _node_file(self._run, node)
        self._before = before = exit_record.read_node(self._path)
        # Seen at the start, when the checkpoint at the end of the attempt before is visible on all nodes.
        self._step = next(iter(checkpoint.steps(self._run / checkpoint.FOLDER)), 0)
        self._idle = 0
        sees_checkpoints = config.run.mirror is None  # with a mirror, they may be on the first node alone
        if sees_checkpoints and job is not None and before.get("job") == job and self._step <= before["step"]:
            idle = int(before["attempts_without_progress"])
            self._idle = idle + 1 if before["code"] == EXIT_AGAIN else idle if idle >= self._limit else 0

    @property
    def exhausted(self) -> Verdict | None:
        """The verdict to give up after too many attempts of this job without progress; None otherwise."""
        if self._idle < self._limit:
            return None
        reason = str(self._before["reason"])
        gave_up = self._before["code"] == EXIT_FAULT
        return Verdict(EXIT_FAULT, reason if gave_up else f"{_without_progress(self._idle)}; {reason}")

    def close(self, verdict: Verdict) -> Verdict:
        """Record the verdict; a job that may be started again also where the run has no folder yet."""
        content = {
            "code": verdict.code,
            "reason": verdict.reason,
            "killed": was_killed(verdict),
            "host": socket.gethostname(),
            "time": time.time(),
            "job": self._job,
            "step": self._step,
            "attempts_without_progress": self._idle,
        }
        if self._run.is_dir() or self._job is not None:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                exit_record.write(self._path, content)
        return verdict


def was_killed(verdict: Verdict) -> bool:
    """Return whether the process that failed first was ended by a signal, not by its launcher."""
    return verdict.first is not None and verdict.first.code < 0 and not verdict.first.by_launcher


def is_done(config: Config) -> bool:
    """Return whether the run ended well, with this configuration."""
    run = Path(config.run.dir)
    if config.run.mirror is not None and not (run / EXIT).exists():  # only the first node has the run's folder
        from distrain.runs import mirror  # imports fsspec, which takes long

        return mirror.is_done(config)
    return exit_record.read(run / EXIT).get("code") == EXIT_OK and has_configuration(run, config)


def _node_file(run: Path, node: int) -> Path:
    return run / NODES / f"{node:05d}.json"


def _without_progress(number: int) -> str:
    return f"{plural(number, 'attempt')} in a row without progress (launch.max_attempts_without_progress)"
