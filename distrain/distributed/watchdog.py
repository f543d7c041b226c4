"""Watchdog: a thread ends its process when a phase exceeds its time-out, and says which process is behind.

Processes compare how many collectives each has entered and left: the one with the fewest, or one that does not answer,
keeps the others waiting.

It also ends its process when a peer has failed: with NCCL the main thread may wait for the GPU, which waits for that
peer, and nothing would tell it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

from distrain.distributed.peers import PeerFailure, Peers
from distrain.environment import Environment
from distrain.errors import EXIT_AGAIN
from distrain.failure_report import Failure, failure_here, report_failure
from distrain.worker_status import StatusWriter, WorkerStatus

_TICK_SECONDS = 0.5
_CHECK_SECONDS = 5.0
"""Wait for the reports of other stuck processes, for stacks to be written, and for threads to end."""

log = logging.getLogger("distrain")


class Save(Protocol):
    """A checkpoint that a thread writes."""

    @property
    def step(self) -> int:
        """Steps done when it began."""

    @property
    def is_running(self) -> bool:
        """Whether the thread is still at work."""


class Watchdog:
    """The status of this process, and how long it may stay without a heartbeat.

    Args:
        limits: seconds without progress, by phase.
        stacks: folder for stack traces, created when needed.
        environment: this process among its peers.
    """

    def __init__(self, limits: Mapping[str, float], stacks: Path, environment: Environment) -> None:
        self._limits, self._stacks, self._environment = dict(limits), stacks, environment
        self._peers: Peers | None = None
        self._phase, self._step, self._heartbeats, self._collectives = "start", 0, 0, 0
        self._waiting_for: str | None = None
        self._save: Save | None = None
        self._writer = StatusWriter(environment.status_folder, environment.world.rank)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="distrain-watchdog", daemon=True)
        self._publish()
        self._thread.start()

    @property
    def status(self) -> WorkerStatus:
        """Phase, step, heartbeats and time limit at this moment."""
        limit = self._limits.get(self._phase, 0.0)
        return WorkerStatus(self._phase, self._step, self._heartbeats, limit, self._save is not None)

    def connect(self, peers: Peers) -> None:
        """End this process when one of them has failed; report to them if this one is stuck."""
        self._peers = peers

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Be in a phase within the block."""
        before = self._phase
        self.enter(name)
        yield  # after an exception the phase stays: it is where the process failed
        self.enter(before)

    def enter(self, name: str) -> None:
        """Go to a phase."""
        self._phase = name
        self.heartbeat()

    def step(self, done: int) -> None:
        """Set the number of optimizer steps done."""
        self._step = done
        self.heartbeat()

    def heartbeat(self) -> None:
        """Count progress."""
        self._heartbeats += 1
        self._publish()

    def waiting_for(self, what: str | None) -> None:
        """Name what this process waits for while it takes part in collectives; None: nothing."""
        self._waiting_for = what

    def saving(self, save: Save | None) -> None:
        """Know the checkpoint that a thread writes: it has its own time limit, and is completed; None: it is done."""
        self._save = save
        self.heartbeat()

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Mark a collective: inside the block this process waits for the others, outside it is busy itself."""
        self._collectives += 1  # guard: count-collectives
        yield  # not counted after an exception: then this process still waits
        self._collectives += 1

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(_CHECK_SECONDS)

    def _publish(self) -> None:
        self._writer.write(self.status)

    def _work(self) -> None:
        # Ticks are counted, not seconds: a job that was suspended as a whole, and continues, is not stuck.
        last, ticks, ticks_of_failure = -1, 0, 0
        last_save, ticks_of_save = None, 0
        while not self._closed.wait(_TICK_SECONDS):
            heartbeats, limit = self._heartbeats, self._limits.get(self._phase, 0.0)
            ticks = ticks + 1 if heartbeats == last else 0
            last = heartbeats
            idle = ticks * _TICK_SECONDS
            save = self._running_save
            ticks_of_save = ticks_of_save + 1 if save is not None and save is last_save else 0
            last_save = save
            known = self._failure_of_peer()
            ticks_of_failure = ticks_of_failure + 1 if known is not None else 0
            if known is not None and ticks_of_failure * _TICK_SECONDS > known.patience:
                self._exit_with_peer(known.failure)  # guard: ends-with-peer
            if limit and idle >= limit / 2:
                self._report_stuck()
            if limit and idle >= limit:
                self._expire(limit)  # guard: watchdog-expires
            limit = self._limits.get("save", 0.0)
            if save is not None and limit and ticks_of_save * _TICK_SECONDS >= limit:
                self._expire_save(save)  # guard: save-expires

    def _failure_of_peer(self) -> PeerFailure | None:
        """Return the failure of a peer, with which this process may be ended wherever its main thread is."""
        may = may_end(self._phase, self._collectives % 2 == 1, self._running_save is not None)
        return self._peers.failure() if self._peers is not None and may else None

    @property
    def _running_save(self) -> Save | None:
        save = self._save
        return save if save is not None and save.is_running else None

    def _exit_with_peer(self, failure: Failure) -> NoReturn:
        if self._peers is not None:
            self._peers.store.record_failure(failure)  # what NCCL reports here, others may not know
            self._peers.store.wait_until_seen()
        self._exit(failure)

    def _report_stuck(self) -> None:
        if self._peers is not None:
            report = {
                "collectives": self._collectives,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "waiting_for": self._waiting_for,
            }
            self._peers.store.report_stuck(report)

    def _expire(self, limit: float) -> None:
        status = self.status
        self._dump_stacks()
        message = f"no progress for {limit:g} s in phase {status.phase}, step {status.step:,}: {self._straggler()}"
        self._exit(failure_here(self._environment, "hang", EXIT_AGAIN, message))

    def _expire_save(self, save: Save) -> NoReturn:
        """End this process and the others: its main thread may make progress, but saves nothing any more."""
        self._dump_stacks()
        message = (
            f"the checkpoint of step {save.step:,} is not written after {self._limits['save']:g} s: the disk of"
            " run.dir does not answer, or is slow; if it is slow, raise timeouts.save_seconds"
        )
        self._exit_with_peer(failure_here(self._environment, "hang", EXIT_AGAIN, message))

    def _exit(self, why: Failure) -> NoReturn:
        """End this process, whatever its main thread waits for."""
        if not report_failure(why, self._environment):
            log.error("rank %d: %s", why.rank, why.message)
        os._exit(why.code)

    def _dump_stacks(self) -> None:
        """Write the stacks of all threads to RUN/stacks/ and to stderr."""
        rank = self._environment.world.rank
        title = f"rank {rank}, process {os.getpid()} on {socket.gethostname()}: no progress; stacks of all threads:"
        log.error(title)
        with contextlib.suppress(Exception):  # stderr may be something without a descriptor
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        # The file system of the run may be what hangs: it must not delay the exit.
        thread = threading.Thread(target=self._write_stacks, args=(title,), daemon=True)
        thread.start()
        thread.join(_CHECK_SECONDS)

    def _write_stacks(self, title: str) -> None:
        name = f"{time.strftime('%Y%m%dT%H%M%S')}-rank-{self._environment.world.rank:05d}.txt"
        with contextlib.suppress(OSError):
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / name).open("w", encoding="utf-8") as file:
                file.write(f"{title}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _straggler(self) -> str:
        """Name the process that keeps the others waiting, as far as it can be known."""
        size = self._environment.world.size
        if size == 1:
            return "the only process is stuck; see its stacks"
        if self._peers is None:
            return straggler({}, size)
        self._report_stuck()
        time.sleep(_CHECK_SECONDS / 2)  # the time-outs of the others pass at nearly the same time
        return straggler(self._peers.store.stuck_reports(), size)


def may_end(phase: str, waits: bool, saves: bool) -> bool:
    """Return whether a process may be ended because a peer has failed, wherever its main thread is.

    A save is completed first, unless it waits for the others itself; at the end nothing depends on them any more.

    Args:
        phase: one of `PHASES`.
        waits: whether the main thread is in a collective.
        saves: whether a thread writes a checkpoint, which waits for no other process.
    """
    return phase != "end" and (phase != "save" or waits) and not saves  # guard: completes-save


def straggler(reports: Mapping[int, Mapping[str, Any]], size: int) -> str:
    """Say which of `size` processes keeps the others waiting, from the reports of the stuck ones, by rank."""
    if not reports:
        return "rank 0, which serves the store, does not answer (stopped, ended, or its node or link is lost)"
    silent = [rank for rank in range(size) if rank not in reports]
    if silent:
        names = ", ".join(str(rank) for rank in silent[:8]) + (" …" if len(silent) > 8 else "")
        return f"rank {names} is behind: it does not answer (stopped, ended, or its node or link is lost)"
    waiting = [
        f"rank {rank} waits for {report['waiting_for']}" for rank, report in reports.items() if report["waiting_for"]
    ]
    if waiting:
        return "; ".join(waiting[:8])
    fewest = min(report["collectives"] for report in reports.values())
    late = [rank for rank, report in reports.items() if report["collectives"] == fewest]
    if len(late) == size:
        return "all ranks wait for each other: the link between them is lost, or one is stuck inside a collective"
    names = ", ".join(f"{rank} (host {reports[rank]['host']}, process {reports[rank]['pid']})" for rank in late[:8])
    return f"rank {names} is behind: it has not reached the collective in which the others wait; see its stacks"
