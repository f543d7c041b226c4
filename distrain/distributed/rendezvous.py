"""Rendezvous: the processes of a run find each other at a store that rank 0 serves, in time, all or none."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]

from distrain import signals
from distrain.distributed.peer_store import PeerStore
from distrain.distributed.watchdog import Watchdog
from distrain.environment import Environment
from distrain.errors import AgainError, ConfigError, PeerLostError, Stopped
from distrain.failure_report import PeerFailedError

NO_TIMEOUT = timedelta(hours=24)
"""Time-out of the collectives: the watchdog, which knows the phase and who is behind, ends a wait earlier."""

_STARTS = itertools.count()

_STOP_SECONDS = 5.0
"""Longest wait, after a stop request, for processes that have not arrived: with them, all stop together."""

_LINGER_SECONDS = 2.0


def connect(environment: Environment, seconds: float, watchdog: Watchdog) -> Any:
    """Connect to the store that the launcher's environment names, and return this run's part of it.

    Raises:
        ConfigError: the environment lacks a variable.
        PeerLostError: no answer within `seconds`.
        Stopped: a stop was requested before.
    """
    if environment.missing:
        raise ConfigError(
            f"WORLD_SIZE={environment.world.size} is set, but not {', '.join(environment.missing)}: start with distrain"
            " launch, torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    watchdog.heartbeat()  # the deadline here, which can name who is missing, comes before the watchdog's
    with report_loss(f"the processes could not meet at {environment.rendezvous}"):
        return run_part(_store(environment, seconds))


def run_part(store: Any) -> Any:
    """Return a part of the store for one run.

    Under torchrun the store outlives a run: another run of the same processes must not read its keys.
    """
    return PrefixStore(f"distrain/{next(_STARTS)}", store)


def join(
    environment: Environment, store: Any, peer_store: PeerStore, backend: str, seconds: float, watchdog: Watchdog
) -> None:
    """Create the default process group, once all processes have arrived.

    Raises:
        ConfigError: the processes expect different numbers of each other, or different devices.
        PeerFailedError: one of them cannot start.
        PeerLostError: one did not arrive within `seconds`.
        Stopped: a stop was requested before all had arrived.
    """
    world = environment.world
    with report_loss(f"the processes could not meet at {environment.rendezvous}"):
        _wait_for_all(environment, store, peer_store, backend, time.monotonic() + seconds)
        watchdog.heartbeat()
        if environment.several_nodes:
            interface = _interface(str(environment.master_address), environment.master_port or 0)
            if interface is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if backend == "nccl":
            # The watchdog ends a wait and says why; NCCL's own would abort the process without a message of ours.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
            torch.cuda.set_device(environment.local_rank)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=NO_TIMEOUT)


def linger(environment: Environment) -> None:
    """Keep serving the store for a moment on rank 0, so that processes of other nodes can read why it exits."""
    if environment.is_main and environment.several_nodes:
        time.sleep(_LINGER_SECONDS)


def _interface(host: str, port: int) -> str | None:
    """Return the network interface towards the first node, for gloo.

    Gloo would use the address of this host's name, which is a loopback address where /etc/hosts says so.
    """
    interfaces = {
        entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries if name != "lo"
    }
    with contextlib.suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # sends nothing
                # On the first node itself this is the loopback, but the address is one of its interfaces'.
                for local in (str(address[0]), probe.getsockname()[0]):
                    if local in interfaces:
                        return interfaces[local]
    # /etc/hosts may map the first node's name to a loopback address, which no other node can reach.
    candidates = {name for address, name in interfaces.items() if address.count(".") == 3}
    return candidates.pop() if len(candidates) == 1 else None


def _store(environment: Environment, seconds: float) -> Any:
    timeout, world = timedelta(seconds=seconds), environment.world
    if world.rank:
        _wait_for_server(environment, time.monotonic() + seconds)
    if environment.store_socket is None:
        return next(rendezvous("env://", world.rank, world.size, timeout=timeout))[0]
    return TCPStore(
        str(environment.master_address),
        environment.master_port or 0,
        world.size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=environment.store_socket,
    )


def _wait_for_server(environment: Environment, deadline: float) -> None:
    """Wait until the store's port is open: torch waits there too, but without acting on stop requests."""
    while True:
        try:
            address = (str(environment.master_address), environment.master_port or 0)
            socket.create_connection(address, timeout=5).close()
            return
        except OSError as error:
            if signals.requested():  # guard: stop-before-first-node
                raise Stopped(f"stopped{signals.requested_by()} while it waited for the first node") from error
            if time.monotonic() > deadline:
                raise PeerLostError(f"the first node does not answer at {environment.rendezvous}: {error}") from error
        time.sleep(0.1)


def _wait_for_all(environment: Environment, store: Any, peer_store: PeerStore, backend: str, deadline: float) -> None:
    """Wait until every process has arrived, and expects as many as this one, on the same kind of device."""
    rank, size = environment.world.rank, environment.world.size
    expected_here = f"{size} processes with {backend}"
    expected = store.compare_set("distrain/size", "", expected_here).decode()
    if expected != expected_here:  # guard: same-numbers
        raise ConfigError(
            f"nodes differ: one expects {expected}, another one {expected_here}: give every node the same --nproc and"
            " --nodes, and see that all have their GPUs (or set run.device)"
        )
    store.set(f"distrain/here/{rank}", json.dumps([socket.gethostname(), os.getpid()]))
    if store.add("distrain/arrived", 1) == size:
        store.set("distrain/all", "1")
    stop_seen_at = None
    while not store.check(["distrain/all"]):
        failure = peer_store.first_failure()  # guard: failure-while-waiting
        if failure is not None:
            linger(environment)
            raise PeerFailedError(failure)
        stop_seen_at = stop_seen_at or (time.monotonic() if signals.requested() else None)
        if stop_seen_at and time.monotonic() - stop_seen_at > _STOP_SECONDS:
            by = signals.requested_by()
            raise Stopped(f"stopped{by} while it waited for other processes; nothing had to be saved")
        if time.monotonic() > deadline:  # guard: rendezvous-deadline
            missing = [str(other) for other in range(size) if not store.check([f"distrain/here/{other}"])]
            raise PeerLostError(f"{size} processes were requested; rank {', '.join(missing)} did not arrive")
        time.sleep(0.05)


@contextlib.contextmanager
def report_loss(message: str) -> Iterator[None]:
    """Raise PeerLostError for whatever torch raises when another process is gone."""
    try:
        yield
    except (AgainError, ConfigError, PeerFailedError):
        raise
    except (RuntimeError, ValueError, OSError) as error:
        if _is_loss(error):
            first_line = str(error).strip().partition("\n")[0][:300]
            raise PeerLostError(f"{message}: {first_line}") from error
        raise


def _is_loss(error: BaseException) -> bool:
    """Whether an exception says that another process, or the link to it, is gone; gloo has no type of its own."""
    names = ("gloo", "nccl", "connection", "tcpstore", "broken pipe", "timed out", "socket")
    return isinstance(error, dist.DistError) or any(name in str(error).lower() for name in names)  # guard: lost-peer
