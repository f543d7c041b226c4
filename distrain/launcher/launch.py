"""`distrain launch`: start the workers of this node, forward signals, wait for the checkpoint, return a true exit code.

Our own, and not torchrun's agent: that one kills workers that are still saving 30 seconds after the first one exited,
turns every exit code into 1, leaves orphans when it is killed, and needs seconds and a GiB to import torch. Workers get
torchrun's environment variables; rank 0 serves the store on a socket that this process opens.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distrain import machine, signals
from distrain.config import Config
from distrain.environment import host_port
from distrain.errors import (
    EXIT_AGAIN,
    EXIT_FAULT,
    EXIT_NEVER_AGAIN,
    EXIT_OK,
    AgainError,
    ConfigError,
    PeerLostError,
)
from distrain.launcher.agreement import Agreement, Decision, Post
from distrain.launcher.attempt import AttemptRecord, NodeRecord, cause_elsewhere, is_done, was_killed
from distrain.launcher.cluster import LOCAL, Topology
from distrain.launcher.standby import Standby
from distrain.launcher.verdict import Verdict, decide, format_restart, may_restart
from distrain.launcher.workers import PROGRAM, StopRequests, Workers, common_variables
from distrain.text import plural

PROCESSES_PER_CORE = 4
"""More processes than these for each core are refused, unless they are wanted."""

log = logging.getLogger("distrain")


@dataclass(frozen=True)
class Restarts:
    """Settings of restarts, after an attempt that ended by a loss.

    Attributes:
        number: at most so many times.
        least_nodes: number of nodes that suffice for another attempt; None: all of them.
        rejoin_seconds: longest wait for a node that is lost.
        standby: whether processes wait with their imports done.
    """

    number: int = 0
    least_nodes: int | None = None
    rejoin_seconds: float = 60
    standby: bool = True


@dataclass(frozen=True)
class Job:
    """A command of distrain, as the launcher of this node runs it.

    Attributes:
        arguments: the command of distrain and its arguments.
        config: the run's configuration.
        processes: number of processes of each node.
        grace: seconds from a stop request until workers that are still saving are killed.
        logs: folder for the output of ranks other than 0, a file each; None: the launcher's own output.
    """

    arguments: Sequence[str]
    config: Config
    processes: int
    grace: float
    logs: Path | None

    @property
    def trains(self) -> bool:
        """Whether it writes in the run's folder."""
        return self.arguments[0] == "train"

    @property
    def environ(self) -> dict[str, str]:
        """Environment variables of all processes."""
        return common_variables(self.grace)

    @property
    def command(self) -> list[str]:
        """The program that each process runs, and its arguments."""
        return [sys.executable, str(PROGRAM), *self.arguments]


def launch(job: Job, topology: Topology, restarts: Restarts) -> Verdict:
    """Run a command of distrain in the processes of this node, to the end.

    Args:
        job: what to run.
        topology: this node among the others.
        restarts: whether the processes are started again.

    Raises:
        ConfigError: the topology cannot be used.
    """
    if topology.nodes > 1 and job.trains and is_done(job.config):
        # A pod that was lost at the very end is restarted, and the others never come back.
        log.info("%s: the run is done", job.config.run.dir)
        return Verdict(EXIT_OK, "the run is done")
    stops = StopRequests()
    with signals.handled_by(stops.record), contextlib.ExitStack() as stack:
        earlier = signals.requested()  # while this module was imported
        if earlier:
            stops.record(signal.Signals[earlier])
        standby = agreement = None
        if restarts.number and restarts.standby:
            standby = Standby(job.command, job.environ, job.processes)
            stack.callback(standby.close)
        try:
            if restarts.number and topology.nodes > 1:
                if standby is not None:
                    standby.start()  # they import torch while this process does
                agreement = _agreement(job, topology, restarts, stops)
            return _attempts(job, topology, restarts.number, stops, standby, agreement)
        except AgainError as error:
            return Verdict(EXIT_AGAIN, str(error))
        except OSError as error:
            return Verdict(EXIT_FAULT, f"processes could not be started: {error}")


def _attempts(
    job: Job,
    topology: Topology,
    restarts: int,
    stops: StopRequests,
    standby: Standby | None,
    agreement: Agreement | None,
) -> Verdict:
    """Run attempts until one ends otherwise than by a loss, another node ends the job, or no restart is left."""
    verdict, is_done = Verdict(EXIT_OK, ""), False
    for left in range(restarts, -1, -1):
        # Recorded before it waits for other nodes, where a scheduler may kill this process.
        attempt = _Attempt(job, topology, stops, standby)
        if attempt.exhausted is not None:
            verdict = attempt.close(attempt.exhausted)
            break
        try:
            with _store_socket(topology if agreement is None else replace(topology, port=0)) as store:
                decision = _meet(agreement, topology, verdict, store, stops) if agreement is not None else None
                if agreement is not None and decision is not None and not decision.nodes:
                    ended = verdict if is_done else _ended(topology.node, verdict, decision)
                    return attempt.close_elsewhere(agreement.posts, ended)
                part = _part_of(topology, decision) if decision is not None else topology
                never = contextlib.nullcontext(lambda: False)
                with agreement.next_round() if agreement is not None else never as is_over:
                    verdict = attempt.run(part, store, is_over, restarts_left=left)
        except AgainError as error:
            return attempt.close(verdict if is_done else Verdict(EXIT_AGAIN, str(error)))
        except ConfigError as error:
            return attempt.close(Verdict(EXIT_NEVER_AGAIN, str(error)))
        again = left > 0 and stops.first is None and verdict.code == EXIT_AGAIN and may_restart(verdict)
        # Another node that is done waits for the first one, which may need it for another attempt.
        is_done = left > 0 and agreement is not None and topology.node > 0 and verdict.code == EXIT_OK
        if not again and not is_done:  # guard: restart-after-loss
            break
        if again:
            log.warning("%s", format_restart(verdict, left))
    if agreement is not None:
        agreement.meet(_post(topology.node, verdict, is_ready=False))
    return verdict


def _meet(
    agreement: Agreement, topology: Topology, verdict: Verdict, store: socket.socket | None, stops: StopRequests
) -> Decision:
    """Agree with the launchers of other nodes on the next attempt."""
    _wait_for_name(topology.host, agreement.seconds, stops)  # a lost pod's name is gone
    port = store.getsockname()[1] if store is not None else 0
    return agreement.meet(_post(topology.node, verdict, is_ready=True), port)


class _Attempt:
    """One attempt: processes are started, run, and end. Its record says from its creation on that it runs.

    Args:
        job: what to run.
        topology: this node among all nodes of the job.
        stops: stop requests.
        standby: processes that can become workers.
    """

    def __init__(self, job: Job, topology: Topology, stops: StopRequests, standby: Standby | None) -> None:
        self._job, self._node, self._stops, self._standby = job, topology.node, stops, standby
        self._record: AttemptRecord | NodeRecord | None = None
        if job.trains and topology.node:
            self._record = NodeRecord(job.config, topology.node, topology.job)
        elif job.trains:
            self._record = AttemptRecord(job.config, topology.job)

    @property
    def exhausted(self) -> Verdict | None:
        """The verdict to give up after too many attempts without progress; None otherwise."""
        return self._record.exhausted if self._record is not None else None

    def close(self, verdict: Verdict) -> Verdict:
        """Record the end of the attempt; return what it means."""
        return self._record.close(verdict) if self._record is not None else verdict

    def run(
        self, part: Topology, store: socket.socket | None, is_over: Callable[[], bool], restarts_left: int
    ) -> Verdict:
        """Run the processes of this node to their end, and record it; return what it means.

        Args:
            part: this node among those that take part.
            store: socket on which rank 0 will serve the store; None on other nodes than the first.
            is_over: whether the attempt has ended on another node.
            restarts_left: how often the processes may be started again.
        """
        record, nodes = self._record, part.nodes
        verdict = self._run_workers(part, store, is_over, restarts_left)
        if record is None or verdict.is_busy:
            return verdict
        lost = record.without_folder(verdict) if isinstance(record, AttemptRecord) else None
        if lost is not None:
            return record.close(lost)
        can_resume = not isinstance(record, AttemptRecord) or record.can_resume()
        if restarts_left and self._stops.first is None and may_restart(verdict) and can_resume:
            return record.close(replace(verdict, code=EXIT_AGAIN))  # a fault after too many attempts without progress
        if isinstance(record, AttemptRecord) and verdict.code == EXIT_AGAIN and verdict.first is not None and nodes > 1:
            verdict = record.crash_elsewhere(nodes, verdict)  # guard: crash-elsewhere
        return record.close(verdict)

    def close_elsewhere(self, posts: Sequence[Post], verdict: Verdict) -> Verdict:
        """Record that the job ends with this attempt, for a reason that other launchers have posted."""
        ends = [asdict(post) for post in posts if post.node != self._node]
        return self.close(cause_elsewhere(ends, verdict, complete=True) or verdict)

    def _run_workers(
        self, topology: Topology, store: socket.socket | None, is_over: Callable[[], bool], restarts_left: int
    ) -> Verdict:
        job, stops, timeouts = self._job, self._stops, self._job.config.timeouts
        can_resume = self._record.can_resume if isinstance(self._record, AttemptRecord) else lambda: True
        with tempfile.TemporaryDirectory(prefix="distrain-launch-") as folder:
            try:
                if topology.nodes > 1:
                    _wait_for_name(topology.host, timeouts.start_seconds, stops)
                workers = Workers(
                    job.command,
                    job.environ,
                    topology,
                    job.processes,
                    store,
                    Path(folder),
                    job.logs,
                    stops,
                    self._standby,
                )
                exits = workers.wait(stops, job.grace, timeouts.start_seconds, is_over, restarts_left)
                return decide(exits, stops.first, can_resume())
            except AgainError as error:
                return Verdict(EXIT_AGAIN, str(error))
            except OSError as error:
                return Verdict(EXIT_FAULT, f"processes could not be started: {error}")


def _agreement(job: Job, topology: Topology, restarts: Restarts, stops: StopRequests) -> Agreement:
    with _store_socket(topology) as listening:
        return Agreement(
            topology,
            restarts.least_nodes or topology.nodes,
            job.config.timeouts.start_seconds,
            restarts.rejoin_seconds,
            lambda: f"stopped by {stops.first} between two attempts" if stops.first is not None else None,
            listening.dup() if listening is not None else None,
        )


def _ended(node: int, verdict: Verdict, decision: Decision) -> Verdict:
    """Return the verdict of a node whose job another one ends; it is done where the first node says so."""
    if node and decision.code == EXIT_OK:
        return Verdict(EXIT_OK, "the run is done")
    reason = "; ".join(filter(None, (verdict.reason, decision.reason)))
    return replace(verdict, code=EXIT_AGAIN, reason=reason)


def _post(node: int, verdict: Verdict, is_ready: bool) -> Post:
    return Post(node, is_ready, verdict.code, verdict.reason, was_killed(verdict))


def _part_of(topology: Topology, decision: Decision) -> Topology:
    """Return this node among those that take part in an attempt; their indices have no gaps."""
    nodes = decision.nodes
    if len(nodes) < topology.nodes:
        log.warning("continuing with %s of %d: %s", plural(len(nodes), "node"), topology.nodes, nodes)
    return replace(topology, nodes=len(nodes), node=nodes.index(topology.node), port=decision.port)


def default_processes(device: str) -> int:
    """Return the number of GPUs of this node, or 1 if there is none or `run.device` is cpu."""
    if device == "cpu" or not machine.gpus(os.environ):
        return 1
    # Without '', the current folder, which may hold a module with the name of one that torch imports.
    code = "import sys; sys.path[:] = filter(None, sys.path); import torch; print(torch.cuda.device_count())"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return max(1, int(output)) if output.isdigit() else 1


def check_number(processes: int, device: str, gpus: int, cores: int, oversubscribe: bool) -> None:
    """Check that this node can run so many processes.

    Args:
        processes: their number.
        device: `run.device`.
        gpus: number of GPUs here.
        cores: number of CPU cores here.
        oversubscribe: whether more processes than the cores can run are wanted.

    Raises:
        ConfigError: there are too many.
    """
    if device != "cpu" and gpus and processes > gpus:
        raise ConfigError(
            f"launch: {processes} processes for {plural(gpus, 'GPU')}: each process needs one; lower --nproc, or set"
            " run.device=cpu"
        )
    if processes > PROCESSES_PER_CORE * cores and not oversubscribe:
        raise ConfigError(
            f"launch: {processes} processes for {cores} cores, more than {PROCESSES_PER_CORE} for each: they would only"
            " wait for each other; lower --nproc, or give --oversubscribe"
        )


@contextlib.contextmanager
def _store_socket(topology: Topology) -> Iterator[socket.socket | None]:
    """Open, on the first node, the socket on which rank 0 will serve the store: nobody can take the port in between."""
    if topology.node:
        yield None
        return
    try:
        listening = _listen(topology)
    except OSError as error:
        # The attempt before may still hold the port for a moment: later it may be free.
        raise PeerLostError(
            f"port {topology.port} cannot be opened: {error.strerror}; try again, or give another --port"
        ) from error
    with listening:
        yield listening


def _listen(topology: Topology) -> socket.socket:
    """Open the store's port: on the loopback for one node, or else on all addresses, IPv4 and IPv6."""
    if topology.nodes == 1:
        return socket.create_server((LOCAL, topology.port), backlog=4096)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be turned off here
            return socket.create_server(("", topology.port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    return socket.create_server(("", topology.port), backlog=4096)


def _wait_for_name(host: str, seconds: float, stops: StopRequests) -> None:
    """Wait until the name of the first node can be resolved: pods start in any order.

    Raises:
        PeerLostError: not within `seconds`, or a stop was requested.
    """
    start = last_message = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            now = time.monotonic()
            if now - start > seconds or stops.first:  # guard: name-deadline
                why = f"stopped by {stops.first}" if stops.first else f"waited {seconds:g} s"
                raise PeerLostError(
                    f"the first node's name, {host}, cannot be resolved ({error.strerror}; {why}): has its pod or node"
                    " started, and does its headless Service publish addresses that are not ready?"
                ) from error
            if now - last_message > 15:
                last_message = now
                log.info("waiting for the name %s: %s", host, error.strerror)
            time.sleep(0.5)


def describe(topology: Topology, processes: int) -> str:
    """Describe what is about to start, in one line."""
    where = f", rendezvous at {host_port(topology.host, topology.port)}" if topology.nodes > 1 else ""
    number = plural(processes, "process")
    return f"distrain: node {topology.node} of {topology.nodes} ({topology.source}), {number} here{where}"
