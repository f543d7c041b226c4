"""Connections to rank 0, by which processes on several nodes see at once that one of them has ended, also by SIGKILL.

The kernel closes the connections of a process that ends, however it ends. If its end is no loss, the process has said
so before, with one byte. Nothing else is sent.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import uuid
from collections.abc import Callable
from typing import Any

from distrain.environment import World

_KEY = "distrain/liveness"
_RANK_BYTES = 10
_FIELDS = (0, 32), (32, 42), (42, None)
"""Bytes that a process sends: a token that proves that it belongs to the run, its rank, and `_LEAVES` in the end."""
_LEAVES = b"."
_CONNECT_SECONDS = 10.0
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
                for key, _ in selector.select(timeout=1):
                    if key.fileobj is not self._listener:
                        self._receive(selector, key)
                        continue
                    with contextlib.suppress(OSError):
                        connection = opened.enter_context(self._listener.accept()[0])
                        _prepare(connection, blocking=False)
                        self._connections.append(connection)
                        selector.register(connection, selectors.EVENT_READ, bytearray())

    def _receive(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        connection: Any = key.fileobj
        chunk = b""
        with contextlib.suppress(OSError):
            chunk = connection.recv(64)
        if chunk and len(key.data) < 100:  # another program may send anything
            key.data.extend(chunk)
            return
        selector.unregister(connection)
        self._connections.remove(connection)
        connection.close()
        token, rank, farewell = (bytes(key.data[first:stop]) for first, stop in _FIELDS)
        if token == self._token.encode() and len(rank) == _RANK_BYTES:
            self._ended(int(rank), not farewell.startswith(_LEAVES))  # guard: liveness


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
        self._ended, self._closed = ended, False
        self._connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
        _prepare(self._connection, blocking=True)
        self._connection.sendall(f"{token}{world.rank:0{_RANK_BYTES}d}".encode())
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

    def _work(self) -> None:
        farewell = b""
        with self._connection, contextlib.suppress(OSError):
            farewell = self._connection.recv(1)
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
