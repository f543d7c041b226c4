"""How the processes of a run find each other: at a store that rank 0 serves, with a deadline, and all or none."""

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
from distrain.errors import AgainError, ConfigError, PeerLostError, Stopped
from distrain.failures import PeerFailedError
from distrain.worker_status import STORE_SOCKET

BEYOND = timedelta(hours=24)
"""Time-out of collectives themselves: `Watchdog` knows the phase and who is behind, so it is the one that ends a wait."""

_STARTS = itertools.count()

_STOP_SECONDS = 5.0
"""After a stop request, how long to wait for processes that have not come: with them, all leave together."""

_LINGER_SECONDS = 2.0


def connect(size: int, seconds: float, watch: Watchdog) -> Any:
    """This run's part of the store at which the launcher's environment has all processes meet.

    Raises:
        PeerLostError: nobody answers there within `seconds`.
        Stopped: asked to stop before.
    """
    watch.beat()  # its own deadline, which can name who is missing, comes before the watch's
    with loss_told(f"the processes could not meet at {_where()}"):
        return own_part(_store(int(os.environ["RANK"]), size, seconds))


def own_part(store: Any) -> Any:
    """Under torchrun the store outlives a run: another run of the same processes finds nothing of this one."""
    return PrefixStore(f"distrain/{next(_STARTS)}", store)


def join(store: Any, peer_store: PeerStore, size: int, backend: str, seconds: float, watch: Watchdog) -> None:
    """Make the group of all processes, once all have come.

    Raises:
        ConfigError: they expect different numbers of each other, or different devices.
        PeerFailedError: one of them cannot start.
        PeerLostError: one did not come within `seconds`.
        Stopped: asked to stop before all had come.
    """
    rank = int(os.environ["RANK"])
    with loss_told(f"the processes could not meet at {_where()}"):
        _wait_for_all(store, peer_store, rank, size, backend, time.monotonic() + seconds)
        watch.beat()
        if several_nodes():
            name = _interface(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            if name is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if backend == "nccl":
            # The watch ends waits, and says why; NCCL's own would abort the process without a word of ours.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=BEYOND)


def linger() -> None:
    """Rank 0 serves the store: processes of other nodes must find there why it leaves."""
    if os.environ.get("RANK") == "0" and several_nodes():
        time.sleep(_LINGER_SECONDS)


def several_nodes() -> bool:
    """Whether the launcher's environment speaks of processes on other nodes."""
    return os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE")


def _interface(host: str, port: int) -> str | None:
    """The network interface towards the first node, for gloo: it would take what this host's own name stands for, which
    is a loopback address where /etc/hosts says so.
    """
    own = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries if name != "lo"}
    with contextlib.suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asking:
                asking.connect(address)  # sends nothing
                # On the first node itself that is the loopback, but the address is one of its own.
                for local in (str(address[0]), asking.getsockname()[0]):
                    if local in own:
                        return own[local]
    # /etc/hosts may call the first node's own name a loopback address, which no other node can reach.
    found = {name for address, name in own.items() if address.count(".") == 3}
    return found.pop() if len(found) == 1 else None


def _where() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _store(rank: int, size: int, seconds: float) -> Any:
    timeout = timedelta(seconds=seconds)
    if rank:
        _wait_for_server(time.monotonic() + seconds)
    socket_number = os.environ.get(STORE_SOCKET)
    if socket_number is None:
        return next(rendezvous("env://", rank, size, timeout=timeout))[0]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, size, True, timeout, wait_for_workers=False, master_listen_fd=int(socket_number))


def _wait_for_server(deadline: float) -> None:
    """Until somebody listens where the store is to be: torch waits there too, but sees no stop request meanwhile."""
    while True:
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5).close()
            return
        except OSError as error:
            if signals.requested():
                raise Stopped(f"stopped{signals.requested_by()} while it waited for the first node") from error
            if time.monotonic() > deadline:
                raise PeerLostError(f"the first node does not answer at {_where()}: {error}") from error
        time.sleep(0.1)


def _wait_for_all(store: Any, peer_store: PeerStore, rank: int, size: int, backend: str, deadline: float) -> None:
    """Every process has come, and expects as many as this one does, on the same kind of device."""
    own = f"{size} processes with {backend}"
    expected = store.compare_set("distrain/size", "", own).decode()
    if expected != own:
        raise ConfigError(
            f"nodes differ: one expects {expected}, another one {own}: give every node the same --nproc and --nodes,"
            " and see that all have their GPUs (or set run.device)"
        )
    store.set(f"distrain/here/{rank}", json.dumps([socket.gethostname(), os.getpid()]))
    if store.add("distrain/arrived", 1) == size:
        store.set("distrain/all", "1")
    asked_at = None
    while not store.check(["distrain/all"]):
        peer = peer_store.failed()
        if peer is not None:
            linger()
            raise PeerFailedError(peer)
        asked_at = asked_at or (time.monotonic() if signals.requested() else None)
        if asked_at and time.monotonic() - asked_at > _STOP_SECONDS:
            by = signals.requested_by()
            raise Stopped(f"stopped{by} while it waited for other processes; nothing had to be saved")
        if time.monotonic() > deadline:
            missing = [str(other) for other in range(size) if not store.check([f"distrain/here/{other}"])]
            raise PeerLostError(f"{size} processes were asked for; rank {', '.join(missing)} did not come")
        time.sleep(0.05)


@contextlib.contextmanager
def loss_told(what: str) -> Iterator[None]:
    """Another process's loss, whatever torch raises for it, as PeerLostError."""
    try:
        yield
    except (AgainError, ConfigError, PeerFailedError):
        raise  # it is told already
    except (RuntimeError, ValueError, OSError) as error:
        if _is_loss(error):
            first_line = str(error).strip().partition("\n")[0][:300]
            raise PeerLostError(f"{what}: {first_line}") from error
        raise


def _is_loss(error: BaseException) -> bool:
    """Whether an exception says that another process, or the link to it, is gone. gloo has no type of its own."""
    names = ("gloo", "nccl", "connection", "tcpstore", "broken pipe", "timed out", "socket")
    return isinstance(error, dist.DistError) or any(name in str(error).lower() for name in names)
