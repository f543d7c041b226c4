"""Watchdog: a thread ends its process when a phase exceeds its time-out, and says which process is behind.

Processes compare how many collectives each has entered and left: the one with the fewest, or one that does not answer,
keeps the others waiting.

A second thread asks every second whether a peer recorded a failure: with NCCL the main thread may wait for the GPU,
which waits for that peer, and nothing would tell it.
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch._C._distributed_c10d import ErrorType

from distrain.distributed.liveness import LivenessClient, LivenessServer
from distrain.distributed.peer_store import PeerStore
from distrain.environment import Environment
from distrain.errors import EXIT_AGAIN
from distrain.failure_report import Failure, failure_here, report_failure
from distrain.worker_status import StatusWriter, WorkerStatus

_TICK_SECONDS = 0.5
_CHECK_SECONDS = 5.0
"""Wait for the reports of other stuck processes, for stacks to be written, and for threads to end."""

_GRACE_TICKS = 2
"""Ticks in which the main thread may end by itself after a peer has failed: gloo reports the loss to it as well."""

log = logging.getLogger("distrain")


class Watchdog:
    """The status of this process, and how long it may stay without a heartbeat.

    Args:
        limits: seconds without progress, by phase.
        stacks: folder for stack traces, created when needed.
        environment: this process among its peers.
    """

    def __init__(self, limits: Mapping[str, float], stacks: Path, environment: Environment) -> None:
        self._limits, self._stacks, self._environment = dict(limits), stacks, environment
        self._peer_store: PeerStore | None = None
        self._phase, self._step, self._heartbeats, self._collectives = "start", 0, 0, 0
        self._waiting_for: str | None = None
        self._peer_failure: Failure | None = None
        self._peer_loss: Failure | None = None
        self._liveness: LivenessServer | LivenessClient | None = None
        self._backend: Any = None
        self._writer = StatusWriter(environment.status_folder, environment.world.rank)
        self._closed, self._disconnected = threading.Event(), threading.Event()
        self._publish()
        self._threads: list[threading.Thread] = []
        self._start(self._work, "distrain-watchdog")

    @property
    def status(self) -> WorkerStatus:
        """Phase, step, heartbeats and time limit at this moment."""
        return WorkerStatus(self._phase, self._step, self._heartbeats, self._limits.get(self._phase, 0.0))

    def connect(self, peer_store: PeerStore) -> None:
        """Use the store for reports of stuck processes, and end this process when a peer has failed."""
        self._peer_store = peer_store

        def ask() -> None:
            self._peer_failure = peer_store.wait_for_failure(self._disconnected)

        self._start(ask, "distrain-peers")

    def use_liveness(self, liveness: LivenessServer | LivenessClient) -> None:
        """Say there when this process leaves; it calls `peer_ended` for others."""
        self._liveness = liveness

    def use_backend(self, backend: Any) -> None:
        """End this process too when NCCL, a backend of torch's process groups, reports an error."""
        self._backend = backend

    def peer_ended(self, rank: int, is_loss: bool) -> None:
        """Know that a process has ended; if that is a loss, all others end, with what it may have recorded before."""
        if self._peer_store is None:
            return
        if is_loss and not self._disconnected.is_set():
            host = self._peer_store.hosts([rank]).get(rank, str(self._environment.master_address))
            message = f"another process is gone: rank {rank} on {host}"
            failure = failure_here(self._environment, "peer", EXIT_AGAIN, message)
            self._peer_loss = replace(failure, rank=rank, host=host)
            self._peer_store.record_failure(self._peer_loss)
        self._peer_store.mark_seen(rank)

    def disconnect(self, *, is_loss: bool) -> None:
        """Leave the peers: from here on this process ends by itself, with its own result or error.

        Args:
            is_loss: whether the others cannot continue without it.
        """
        if self._disconnected.is_set():
            return
        self._disconnected.set()
        if self._peer_store is not None:
            self._peer_store.mark_seen()
        if self._liveness is not None and not is_loss:
            self._liveness.leave()

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

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Mark a collective: inside the block this process waits for the others, outside it is busy itself."""
        self._collectives += 1  # guard: count-collectives
        yield  # not counted after an exception: then this process still waits
        self._collectives += 1

    def close(self) -> None:
        """End the threads."""
        self._disconnected.set()
        self._closed.set()
        if self._liveness is not None:
            self._liveness.close()
        for thread in self._threads:
            thread.join(_CHECK_SECONDS)

    def _start(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _publish(self) -> None:
        self._writer.write(self.status)

    def _work(self) -> None:
        # Ticks are counted, not seconds: a job that was suspended as a whole, and continues, is not stuck.
        last, ticks, ticks_of_failure = -1, 0, 0
        while not self._closed.wait(_TICK_SECONDS):
            heartbeats, limit = self._heartbeats, self._limits.get(self._phase, 0.0)
            ticks = ticks + 1 if heartbeats == last else 0
            last = heartbeats
            idle = ticks * _TICK_SECONDS
            failure = self._failure_of_peer()
            ticks_of_failure = ticks_of_failure + 1 if failure is not None else 0
            if failure is not None and ticks_of_failure > _GRACE_TICKS:
                self._exit_with_peer(failure)  # guard: ends-with-peer
            if limit and idle >= limit / 2:
                self._report_stuck()
            if limit and idle >= limit:
                self._expire(limit)  # guard: watchdog-expires

    def _failure_of_peer(self) -> Failure | None:
        """Return the failure of a peer, with which this process may be ended wherever its main thread is."""
        waits = self._collectives % 2 == 1
        if self._disconnected.is_set() or not may_end(self._phase, waits):
            return None
        failure = self._peer_failure or self._peer_loss
        error = communicator_error(self._backend) if self._backend is not None else None
        if failure is None and error is not None:
            message = f"another process is gone, or cannot be reached: NCCL reports {error}"
            failure = failure_here(self._environment, "peer", EXIT_AGAIN, message)
        return failure

    def _exit_with_peer(self, failure: Failure) -> NoReturn:
        if self._peer_store is not None:
            self._peer_store.record_failure(failure)  # what NCCL reports here, others may not know
            self._peer_store.wait_until_seen()
        self._exit(failure)

    def _report_stuck(self) -> None:
        if self._peer_store is not None:
            report = {
                "collectives": self._collectives,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "waiting_for": self._waiting_for,
            }
            self._peer_store.report_stuck(report)

    def _expire(self, limit: float) -> None:
        status = self.status
        self._dump_stacks()
        message = f"no progress for {limit:g} s in phase {status.phase}, step {status.step:,}: {self._straggler()}"
        self._exit(failure_here(self._environment, "hang", EXIT_AGAIN, message))

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
        if self._peer_store is None:
            return straggler({}, size)
        self._report_stuck()
        time.sleep(_CHECK_SECONDS / 2)  # the time-outs of the others pass at nearly the same time
        return straggler(self._peer_store.stuck_reports(), size)


def may_end(phase: str, waits: bool) -> bool:
    """Return whether a process may be ended because a peer has failed, wherever its main thread is.

    A save is completed first, unless it waits for the others itself; at the end nothing depends on them any more.

    Args:
        phase: one of `PHASES`.
        waits: whether the main thread is in a collective.
    """
    return phase != "end" and (phase != "save" or waits)  # guard: completes-save


def communicator_error(backend: Any) -> str | None:
    """Return the error that a backend of torch's process groups reports, such as COMM_ERROR; None if there is none."""
    error = backend.get_error()
    return None if error == ErrorType.SUCCESS else str(error.name)


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
