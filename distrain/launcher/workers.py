"""The worker processes of this node: started, signalled, waited for, and killed if they do not exit."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from distrain.environment import COMMAND, GRACE, LAUNCHER, STATUS_FOLDER, STORE_SOCKET
from distrain.errors import Stopped
from distrain.failure_report import is_unfinished, mark_unfinished, read_failure
from distrain.launcher.cluster import Topology
from distrain.launcher.standby import Standby
from distrain.launcher.verdict import WorkerExit
from distrain.runs import origin
from distrain.worker_status import STARTING, WorkerStatus, is_published, read_status

PROGRAM = Path(__file__).parent.parent / "__main__.py"
"""The file that each worker runs: with `-m distrain` Python would look for modules in the current folder first."""
EXIT_SECONDS = 5.0
"""Time for workers that are not saving to exit after another one failed."""
_OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_HANG_SECONDS = 30.0
"""Time after a worker's own time-out until the launcher aborts it."""
_POLL_SECONDS = 0.05


class StopRequests:
    """Stop requests that the launcher received, to be forwarded to the workers."""

    def __init__(self) -> None:
        self.first: str | None = None
        self._pending: list[int] = []

    def record(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal."""
        self.first = self.first or signal.Signals(number).name
        self._pending.append(number)

    def take(self) -> list[int]:
        """Return the signals that were not forwarded yet, and forget them."""
        taken = []
        while self._pending:  # a handler may append at any moment
            taken.append(self._pending.pop(0))
        return taken


class Workers:
    """The worker processes of this node, started when this is created.

    Args:
        command: what each process runs: the program and its arguments.
        environ: environment variables of all workers (`common_variables`).
        topology: this node among the others.
        processes: number of processes to start.
        store: socket on which rank 0 will serve the store; None on other nodes.
        folder: where workers report status and failures.
        logs: folder for the output of ranks other than 0; None: it goes where the launcher's goes.
        stops: stop requests; one that arrives before all processes are started ends them at once.
        standby: processes that can become workers.

    Raises:
        Stopped: a stop was requested before all were started.
        OSError: a process cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        topology: Topology,
        processes: int,
        store: socket.socket | None,
        folder: Path,
        logs: Path | None,
        stops: StopRequests,
        standby: Standby | None = None,
    ) -> None:
        self._folder = folder
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._heartbeats: dict[int, tuple[int, float]] = {}
        self._killed: set[int] = set()
        self._aborted: set[int] = set()
        port = store.getsockname()[1] if store is not None and not topology.port else topology.port
        for local_rank in range(processes):
            if stops.first is not None:
                self._end_unfinished(stops.first)
            rank = topology.node * processes + local_rank
            variables = {**_group(topology, processes, local_rank, port), STATUS_FOLDER: str(folder)}
            served = store if rank == 0 and topology.nodes * processes > 1 else None
            mark_unfinished(folder, rank)
            with _output(logs, rank) as output:
                waiting = standby.become_worker(variables, served, output) if standby is not None else None
                self._running[rank] = waiting or _start(command, {**environ, **variables}, served, output)
        self._standby = standby
        """None once its missing processes were started: those that end by themselves would be started for ever."""

    def _end_unfinished(self, signal_name: str) -> NoReturn:
        """End a group that is not complete: none of its processes has anything to save."""
        self._kill(self._running)
        for process in self._running.values():
            process.wait()
        raise Stopped(f"stopped by {signal_name} while processes were started; nothing had to be saved")

    def wait(
        self, stops: StopRequests, grace: float, start_seconds: float, is_over: Callable[[], bool], restarts_left: int
    ) -> list[WorkerExit]:
        """Wait until all workers have ended, and forward stop requests to them.

        Workers that do not exit after another one failed, or within `grace` seconds of a stop request, are killed.

        Args:
            stops: stop requests.
            grace: in seconds.
            start_seconds: longest time until a worker publishes its status; 0: no limit.
            is_over: whether the attempt has ended on another node.
            restarts_left: if any, the missing standby processes are started once the workers train.
        """
        exits: list[WorkerExit] = []
        stopped_at = failed_at = None
        now, last = 0.0, time.monotonic()
        while self._running:
            # Capped: the time in which a job was suspended as a whole does not count.
            now, last = now + min(time.monotonic() - last, 1.0), time.monotonic()
            for number in stops.take():
                stopped_at = now if stopped_at is None else stopped_at
                self._send(self._running, number)
            exits += self._collect()
            if failed_at is None and (any(end.failed for end in exits) or is_over()):
                failed_at = now
            if stopped_at is not None and now - stopped_at > grace:  # guard: grace
                self._kill(self._running)
            if failed_at is not None:
                hung = any(end.kind == "hang" for end in exits)
                self._end_others(now - failed_at, grace, hung)
            self._abort_hung(now, start_seconds)  # guard: abort-hung-worker
            if restarts_left and failed_at is None and stopped_at is None:
                self._prepare_restart()
            time.sleep(_POLL_SECONDS)
        return exits

    def _collect(self) -> list[WorkerExit]:
        exits = []
        for rank, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[rank]
                by_launcher = rank in self._killed | self._aborted
                failure = read_failure(self._folder, rank)
                when = failure.time if failure is not None else time.time()
                unfinished = is_unfinished(self._folder, rank)
                exits.append(WorkerExit(rank, code, failure, self._status(rank), when, by_launcher, unfinished))
        return exits

    def _end_others(self, seconds: float, grace: float, hung: bool) -> None:
        """End the workers that still run `seconds` after the first failure.

        One that saves may finish, unless a hang ended the first one: then the others waited long enough already.
        """
        if hung and seconds > EXIT_SECONDS / 2:
            self._abort(self._running)
        for rank in list(self._running):
            status = self._status(rank)
            saves = (status.is_saving or status.phase in ("save", "end")) and not hung
            if seconds > (max(grace, EXIT_SECONDS) if saves else EXIT_SECONDS):
                self._kill([rank])

    def _abort_hung(self, now: float, start_seconds: float) -> None:
        """Abort a worker whose own watchdog cannot run: it is stopped, never releases the interpreter lock, or imports.

        Args:
            now: seconds that this node has waited.
            start_seconds: longest time until a worker publishes its status.
        """
        for rank in list(self._running):
            status = self._status(rank)
            limit = status.limit if is_published(self._folder, rank) else start_seconds
            heartbeats, since = self._heartbeats.get(rank, (-1, now))
            if status.heartbeats != heartbeats or not limit:
                self._heartbeats[rank] = (status.heartbeats, now)
            elif now - since > limit + _HANG_SECONDS:
                self._send_abort(rank)
                self._heartbeats[rank] = (status.heartbeats, now)

    def _prepare_restart(self) -> None:
        """Start the missing standby processes once the workers train: before, they would compete for the CPU."""
        if self._standby is None or any(self._status(rank).phase in STARTING for rank in self._running):
            return
        with contextlib.suppress(OSError):  # without them, a restart takes longer
            self._standby.start()
        self._standby = None

    def _abort(self, ranks: Iterable[int]) -> None:
        """Abort these workers, once each."""
        for rank in list(ranks):
            if rank not in self._aborted:
                self._aborted.add(rank)
                self._send_abort(rank)

    def _send_abort(self, rank: int) -> None:
        """Let Python's fault handler write a worker's stacks, even while the interpreter lock is held, and end it."""
        self._send([rank], signal.SIGABRT)
        self._send([rank], signal.SIGCONT)  # guard: continue-to-abort

    def _kill(self, ranks: Iterable[int]) -> None:
        for rank in list(ranks):
            if rank not in self._killed:
                self._killed.add(rank)
                self._send([rank], signal.SIGKILL)

    def _send(self, ranks: Iterable[int], number: int) -> None:
        for rank in list(ranks):
            with contextlib.suppress(ProcessLookupError):
                self._running[rank].send_signal(number)

    def _status(self, rank: int) -> WorkerStatus:
        return read_status(self._folder, rank)


def common_variables(grace: float) -> dict[str, str]:
    """Return the environment of all workers of this launcher, apart from their places in the group.

    Args:
        grace: seconds from a stop request until they are killed.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_GROUP}
    return {
        "OMP_NUM_THREADS": "1",
        **inherited,
        "PYTHONFAULTHANDLER": "1",
        LAUNCHER: str(os.getpid()),
        GRACE: str(grace),
        COMMAND: origin.command(sys.argv),
    }


def _group(topology: Topology, processes: int, local_rank: int, port: int) -> dict[str, str]:
    """Return the variables of a process in its group; a single one gets none, or accelerate would start a group."""
    size = topology.nodes * processes
    if size == 1:
        return {}
    values = (topology.node * processes + local_rank, local_rank, size, processes, topology.node, topology.host, port)
    return {name: str(value) for name, value in zip(_OF_A_GROUP, values, strict=True)}


def _start(
    command: Sequence[str], variables: Mapping[str, str], store: socket.socket | None, output: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    if store is not None:
        variables = {**variables, STORE_SOCKET: str(store.fileno())}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        env=variables,
        pass_fds=() if store is None else (store.fileno(),),
    )


@contextlib.contextmanager
def _output(logs: Path | None, rank: int) -> Iterator[IO[bytes] | None]:
    """Open the log file of a rank; None if it writes to the launcher's output, as rank 0 always does."""
    if logs is None or rank == 0:
        yield None
        return
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"rank-{rank:05d}.log").open("ab") as file:
        yield file
