"""Connections to rank 0, by which processes on several nodes see at once that one of them has ended, also by SIGKILL.

The kernel closes the connections of a process that ends, however it ends. If its end is no loss, the process has said
so before, with one byte. Nothing else is sent. A connection also breaks where a firewall or proxy drops it: a process
that still runs connects again, at once, and only one that does not is lost.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from distrain.environment import World

_KEY = "distrain/liveness"
_TOKEN, _FAREWELL = 32, 42
"""Ends of a token, which proves that a process belongs to the run, and of its rank; in the end it sends `_LEAVES`."""
_LEAVES = b"."
_CONNECT_SECONDS = 10.0
_RECONNECT_SECONDS = 2.0
"""Time in which a process connects again; it does not if the connection was broken sooner than this."""
_KEEPALIVE_SECONDS = 30
"""Firewalls forget, or reset, connections without traffic."""


class LivenessServer:
    """Rank 0's end of all connections.

    Args:
        store: this run's part of the store, where the others read the port.
        ended: called with the rank of a process that has ended, and with whether its end is a loss.
    """

    def __init__(self, store: Any, ended: Callable[[int, bool], None]) -> None:
        self._ended, self._token = ended, uuid.uuid4().hex
        self._connections: list[socket.socket] = []
        self._newest: dict[int, socket.socket] = {}
        self._missing: dict[int, float] = {}
        self._closed = threading.Event()
        self._listener = _listen()
        store.set(_KEY, json.dumps([self._listener.getsockname()[1], self._token]))
        threading.Thread(target=self._work, name="distrain-liveness", daemon=True).start()

    def leave(self) -> None:
        """Say that the end of this process is no loss."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.send(_LEAVES)

    def close(self) -> None:
        """Close all connections, soon."""
        self._closed.set()

    def _work(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener, contextlib.ExitStack() as opened:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._closed.is_set():
                for key, _ in selector.select(timeout=0.1 if self._missing else 1):
                    if key.fileobj is not self._listener:
                        self._receive(selector, key)
                        continue
                    with contextlib.suppress(OSError):
                        connection = opened.enter_context(self._listener.accept()[0])
                        _prepare(connection, blocking=False)
                        self._connections.append(connection)
                        selector.register(connection, selectors.EVENT_READ, bytearray())
                self._report_missing()

    def _receive(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        connection: Any = key.fileobj
        chunk = b""
        with contextlib.suppress(OSError):
            chunk = connection.recv(64)
        if chunk and len(key.data) < 100:  # another program may send anything
            key.data.extend(chunk)
            rank = self._rank(key.data)
            if rank is not None:
                self._newest[rank] = connection
                self._missing.pop(rank, None)
            return
        selector.unregister(connection)
        self._connections.remove(connection)
        connection.close()
        rank = self._rank(key.data)
        if rank is None or self._newest[rank] is not connection:
            return
        if key.data[_FAREWELL:].startswith(_LEAVES):
            self._ended(rank, False)
        else:
            self._missing[rank] = time.monotonic() + _RECONNECT_SECONDS

    def _rank(self, received: bytearray) -> int | None:
        """Return the rank of the process that has sent this; None if it is not complete, or of another program."""
        token, rank = bytes(received[:_TOKEN]), bytes(received[_TOKEN:_FAREWELL])
        return int(rank) if token == self._token.encode() and len(rank) == _FAREWELL - _TOKEN else None

    def _report_missing(self) -> None:
        for rank in [rank for rank, deadline in self._missing.items() if time.monotonic() > deadline]:
            del self._missing[rank]
            self._ended(rank, True)  # guard: liveness


class LivenessClient:
    """The end of another process.

    Args:
        store: this run's part of the store.
        address: name or address of rank 0's host.
        world: rank of this process, and their number.
        ended: called with 0 when rank 0 has ended, and with whether its end is a loss.

    Raises:
        OSError: rank 0 cannot be reached.
    """

    def __init__(self, store: Any, address: str, world: World, ended: Callable[[int, bool], None]) -> None:
        port, token = json.loads(store.get(_KEY))
        self._address: tuple[str, int] = (address, port)
        self._hello = f"{token}{world.rank:0{_FAREWELL - _TOKEN}d}".encode()
        self._ended, self._closed = ended, False
        self._connection = self._connect()
        threading.Thread(target=self._work, name="distrain-liveness", daemon=True).start()

    def leave(self) -> None:
        """Say that the end of this process is no loss."""
        with contextlib.suppress(OSError):
            self._connection.send(_LEAVES)

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(self._address, timeout=_CONNECT_SECONDS)
        self._address = connection.getpeername()[:2]  # to connect again, in time: looking up a name may take seconds
        _prepare(connection, blocking=True)
        connection.sendall(self._hello)
        return connection

    def _work(self) -> None:
        while True:
            started, farewell = time.monotonic(), b""
            with self._connection, contextlib.suppress(OSError):
                farewell = self._connection.recv(1)
            if self._closed or farewell == _LEAVES:
                break
            if time.monotonic() - started < _RECONNECT_SECONDS:
                break
            try:
                self._connection = self._connect()
            except OSError:
                break
        if not self._closed:
            self._ended(0, farewell != _LEAVES)


def _listen() -> socket.socket:
    """Open a port that the system chooses on all addresses, IPv4 and IPv6."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be turned off here
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=4096)


def _prepare(connection: socket.socket, blocking: bool) -> None:
    connection.setblocking(blocking)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):  # seconds; not on every system
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), _KEEPALIVE_SECONDS)
