"""Rendezvous: the processes of a run find each other at a store that rank 0 serves, in time, all or none."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]

from distrain import signals
from distrain.distributed import devices, gpu_errors, interfaces, nccl_variables
from distrain.distributed.peer_store import PeerStore, here_key
from distrain.distributed.watchdog import Watchdog
from distrain.environment import LAUNCHERS, Environment, World
from distrain.errors import ConfigError, PeerLostError, Stopped
from distrain.failure_report import PeerFailedError

NO_TIMEOUT = timedelta(hours=24)
"""Time-out of the collectives: the watchdog, which knows the phase and who is behind, ends a wait earlier."""

_STOP_SECONDS = 5.0
"""Longest wait, after a stop request, for processes that have not arrived: with them, all stop together."""

_POLL_SECONDS = 0.02

T = TypeVar("T")

log = logging.getLogger("distrain")


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
        return meet(_store(environment, seconds), environment.world, seconds)


def meet(store: Any, world: World, seconds: float) -> Any:
    """Return the part of the store for this run of these processes, once all of them are there.

    The store may have served an earlier run: torchrun's outlives the processes that it starts again, and counts its
    restarts on each node separately. So rank 0 names a new part, and at last writes there the list of those that have
    arrived in it. A process that reads the name of an earlier part is not on that part's list, and looks again.

    Raises:
        ConfigError: the processes expect different numbers of each other.
        PeerLostError: one did not arrive within `seconds`.
        Stopped: a stop was requested before all had arrived.
    """
    here = _Rendezvous(store, world)
    arrivals = _wait(here.poll, here.missing, world, seconds)
    numbers = sorted({arrival.size for arrival in arrivals})
    if len(numbers) > 1:  # guard: same-numbers
        raise ConfigError(
            f"nodes differ: one expects {numbers[0]} processes, another one {numbers[1]}: give every node the same"
            " --nproc and --nodes"
        )
    return here.part


def meet_in_group(seconds: float) -> Any:
    """Return the part of the default group's store for this run; the user's program has created that group."""
    store = dist.distributed_c10d._get_default_store()
    with report_loss("the processes could not meet at the store of their group"):
        return meet(store, World(dist.get_rank(), dist.get_world_size()), seconds)


def join(
    environment: Environment, store: Any, peer_store: PeerStore, backend: str, seconds: float, watchdog: Watchdog
) -> None:
    """Create the default process group, once all processes are ready for it.

    Raises:
        ConfigError: the processes are on different devices, or the environment names an interface that does not exist.
        PeerFailedError: one of them cannot start.
        PeerLostError: one was not ready within `seconds`.
        Stopped: a stop was requested before all were ready.
    """
    world = environment.world
    remote = environment.master_address if environment.several_nodes else None
    interfaces.check(os.environ, backend, remote, interfaces.addresses())  # guard: interfaces
    with report_loss(f"the processes could not meet at {environment.rendezvous}"):
        watchdog.heartbeat()
        _wait_until_ready(environment, store, peer_store, backend, seconds)
        watchdog.heartbeat()
    if environment.several_nodes:
        interface = interfaces.towards(str(environment.master_address), environment.master_port or 0)
        if interface is not None:
            os.environ.setdefault(interfaces.GLOO, interface)
    if backend == "nccl":
        _prepare_nccl(environment)
    with report_loss("the processes could not connect to each other"):
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=NO_TIMEOUT)


def _prepare_nccl(environment: Environment) -> None:
    """Select this process's GPU, and leave it to our watchdog to end the process: NCCL's would give no reason."""
    settings, overridden = nccl_variables.choose(os.environ, environment.torchrun)
    if overridden and environment.is_main:
        log.warning("set to 0, so that errors are reported: %s", "; ".join(overridden))
    os.environ.update(settings)
    torch.cuda.set_device(devices.index(environment.local_rank, torch.cuda.device_count()))


def _store(environment: Environment, seconds: float) -> Any:
    timeout, world = timedelta(seconds=seconds), environment.world
    if world.rank:
        _wait_for_server(environment, time.monotonic() + seconds)
    if environment.store_socket is None:
        store = next(rendezvous("env://", world.rank, world.size, timeout=timeout))[0]
        if world.rank and store.check([LAUNCHERS]):
            raise ConfigError("the first node was started with --restarts, this one without it: give both the same")
        return store
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


class _Arrival(NamedTuple):
    """A process that has arrived: a name that no other one has, its rank, the number of processes it expects."""

    name: str
    rank: int
    size: int


class _Rendezvous:
    """All processes of a run find the same new part of a store that may hold the keys of earlier runs."""

    def __init__(self, store: Any, world: World) -> None:
        self._store, self._world = store, world
        self._here = _Arrival(uuid.uuid4().hex, world.rank, world.size)
        self.part: Any = None
        self._part_name: str | None = None
        if world.rank == 0:
            self._enter(self._here.name)
            store.set("distrain/run", self._here.name)

    def poll(self) -> list[_Arrival] | None:
        """Return the processes of the run once all have arrived, this one among them."""
        if self._world.rank and self._store.check(["distrain/run"]):
            name = self._store.get("distrain/run").decode()
            if name != self._part_name:
                self._enter(name)
        if self.part is None:
            return None
        if self._world.rank == 0:
            arrivals = self._arrivals()
            wrong = any(arrival.size != self._world.size for arrival in arrivals)
            if wrong or {arrival.rank for arrival in arrivals} == set(range(self._world.size)):
                self.part.set("met", json.dumps(arrivals))
                return arrivals
        elif self.part.check(["met"]):
            arrivals = [_Arrival(*each) for each in json.loads(self.part.get("met"))]
            return arrivals if self._here in arrivals else None  # guard: fresh-part
        return None

    def missing(self) -> list[int]:
        """Return the ranks that have not arrived."""
        arrived = {arrival.rank for arrival in self._arrivals()} if self.part is not None else {self._world.rank}
        return sorted(set(range(self._world.size)) - arrived)

    def _enter(self, name: str) -> None:
        self.part, self._part_name = PrefixStore(f"distrain/{name}", self._store), name
        self.part.set(f"arrival/{self.part.add('arrivals', 1)}", json.dumps(self._here))

    def _arrivals(self) -> list[_Arrival]:
        keys = [f"arrival/{number}" for number in range(1, self.part.add("arrivals", 0) + 1)]
        return [_Arrival(*json.loads(self.part.get(key))) for key in keys if self.part.check([key])]


def _wait_until_ready(
    environment: Environment, store: Any, peer_store: PeerStore, backend: str, seconds: float
) -> None:
    """Wait until every process is ready to compute, on the same kind of device."""
    expected = store.compare_set("distrain/backend", "", backend).decode()
    if expected != backend:
        raise ConfigError(
            f"nodes differ: one communicates with {expected}, another one with {backend}: see that all have their GPUs,"
            " or set run.device"
        )
    ranks = range(environment.world.size)
    store.set(here_key(environment.world.rank), socket.gethostname())

    def poll() -> bool | None:
        failure = peer_store.first_failure()  # guard: failure-while-waiting
        if failure is not None:
            raise PeerFailedError(failure)
        return store.check([here_key(rank) for rank in ranks]) or None

    def missing() -> list[int]:
        return [rank for rank in ranks if not store.check([here_key(rank)])]

    _wait(poll, missing, environment.world, seconds)


def _wait(poll: Callable[[], T | None], missing: Callable[[], Sequence[int]], world: World, seconds: float) -> T:
    """Wait for a result of `poll`, which depends on the other processes."""
    deadline, stop_seen_at = time.monotonic() + seconds, None
    while (result := poll()) is None:
        stop_seen_at = stop_seen_at or (time.monotonic() if signals.requested() else None)
        if stop_seen_at and time.monotonic() - stop_seen_at > _STOP_SECONDS:
            by = signals.requested_by()
            raise Stopped(f"stopped{by} while it waited for other processes; nothing had to be saved")
        if time.monotonic() > deadline:  # guard: rendezvous-deadline
            names = ", ".join(str(rank) for rank in missing())
            raise PeerLostError(f"{world.size} processes were requested; rank {names} did not arrive")
        time.sleep(_POLL_SECONDS)
    return result


@contextlib.contextmanager
def report_loss(message: str) -> Iterator[None]:
    """Raise PeerLostError for what torch raises in its own code when another process is gone.

    Its store has exception types of its own, whose text is for people; gloo has neither.
    """
    try:
        yield
    except (dist.DistError, OSError) as error:
        if gpu_errors.is_one(error):
            raise
        first_line = str(error).strip().partition("\n")[0][:300]
        raise PeerLostError(f"{message}: {first_line}") from error
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        log.debug("%s: %s", message, error)
        raise PeerLostError(f"{message}: one of them ended, or its address cannot be reached") from error
