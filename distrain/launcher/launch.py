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
from collections.abc import Iterator, Sequence
from pathlib import Path

from distrain import machine, signals
from distrain.config import Config
from distrain.environment import host_port
from distrain.errors import EXIT_AGAIN, EXIT_FAULT, EXIT_OK, AgainError, ConfigError, PeerLostError
from distrain.launcher.attempt import AttemptRecord, NodeRecord, is_done
from distrain.launcher.cluster import LOCAL, Topology
from distrain.launcher.verdict import Verdict, decide
from distrain.launcher.workers import StopRequests, Workers
from distrain.text import plural

PROCESSES_PER_CORE = 4
"""More processes than these for each core are refused, unless they are wanted."""

log = logging.getLogger("distrain")


def launch(
    arguments: Sequence[str],
    config: Config,
    topology: Topology,
    processes: int,
    grace: float,
    logs: Path | None,
) -> Verdict:
    """Run a command of distrain in the processes of this node, to the end.

    Args:
        arguments: the command and its arguments.
        config: the run's configuration.
        topology: this node among the others.
        processes: number of processes to start here.
        grace: seconds from a stop request until workers that are still saving are killed.
        logs: folder for the output of ranks other than 0, a file each; None: the launcher's own output.

    Raises:
        ConfigError: the topology cannot be used.
    """
    trains = arguments[0] == "train"
    if topology.nodes > 1 and trains and is_done(config):
        # A pod that was lost at the very end is restarted, and the others never come back.
        log.info("%s: the run is done", config.run.dir)
        return Verdict(EXIT_OK, "the run is done")
    record = AttemptRecord(config, topology.job) if trains and topology.node == 0 else None
    other = NodeRecord(config, topology.node, topology.job) if trains and topology.node else None
    for each in (record, other):
        if each is not None and each.exhausted is not None:
            return each.close(each.exhausted)
    verdict = _run_workers(arguments, config, topology, processes, grace, logs, record)
    if other is not None and not verdict.is_busy:
        return other.close(verdict)
    if record is None or verdict.is_busy:
        return verdict
    if verdict.code == EXIT_AGAIN and verdict.first is not None and topology.nodes > 1:
        verdict = record.crash_elsewhere(topology.nodes, verdict)  # guard: crash-elsewhere
    return record.close(verdict)


def _run_workers(
    arguments: Sequence[str],
    config: Config,
    topology: Topology,
    processes: int,
    grace: float,
    logs: Path | None,
    record: AttemptRecord | None,
) -> Verdict:
    stops = StopRequests()
    with tempfile.TemporaryDirectory(prefix="distrain-launch-") as folder, signals.handled_by(stops.record):
        earlier = signals.requested()  # while this module was imported
        if earlier:
            stops.record(signal.Signals[earlier])
        try:
            if topology.nodes > 1:
                _wait_for_name(topology.host, config.timeouts.start_seconds, stops)
            with _store_socket(topology) as store:
                workers = Workers(arguments, topology, processes, store, Path(folder), logs, stops)
                exits = workers.wait(stops, grace)
            return decide(exits, stops.first, record is None or record.can_resume())
        except AgainError as error:
            return Verdict(EXIT_AGAIN, str(error))
        except OSError as error:
            return Verdict(EXIT_FAULT, f"processes could not be started: {error}")


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
