"""The end of a process breaks its connection to rank 0; only its last byte says that nothing is lost."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

from distrain.distributed import liveness
from distrain.distributed.liveness import LivenessClient, LivenessServer
from distrain.environment import World

SECONDS = 20
Ends = queue.Queue[tuple[int, bool]]


@pytest.fixture
def store() -> HashStore:
    return HashStore()


@pytest.fixture
def seen_by_main(store: HashStore) -> Iterator[Ends]:
    """Ends that rank 0 saw: rank, and whether it is a loss."""
    ends: Ends = queue.Queue()
    server = LivenessServer(store, lambda *end: ends.put(end))
    yield ends
    server.close()


def connect(store: HashStore, rank: int, ends: Ends | None = None) -> LivenessClient:
    ends = queue.Queue() if ends is None else ends
    return LivenessClient(store, "127.0.0.1", World(rank, 4), lambda *end: ends.put(end))


def test_an_end_is_a_loss_unless_the_process_said_otherwise(store: HashStore, seen_by_main: Ends) -> None:
    clients = [connect(store, rank) for rank in (1, 2, 3)]
    clients[0].close()
    assert seen_by_main.get(timeout=SECONDS) == (1, True)
    clients[1].leave()
    clients[1].close()
    assert seen_by_main.get(timeout=SECONDS) == (2, False)
    clients[2].close()
    assert seen_by_main.get(timeout=SECONDS) == (3, True)


@pytest.mark.parametrize("is_loss", [True, False])
def test_the_end_of_rank_0_is_seen_by_the_others(store: HashStore, is_loss: bool) -> None:
    ends: Ends = queue.Queue()
    server = LivenessServer(store, lambda *end: None)
    clients = [connect(store, rank, ends) for rank in (1, 2)]
    clients[0].close()  # by itself: not an end of rank 0
    if not is_loss:
        server.leave()
    server.close()
    assert ends.get(timeout=SECONDS) == (0, is_loss)
    assert ends.empty()


class Proxy:
    """Passes on what is sent to a port, until it breaks its connections."""

    def __init__(self, port: int) -> None:
        self._port, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections: queue.Queue[list[socket.socket]] = queue.Queue()
        threading.Thread(target=self._accept, daemon=True).start()

    def break_next(self) -> None:
        """Break the oldest connection."""
        for end in self.connections.get(timeout=SECONDS):
            end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, theirs = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._port))
                theirs.sendall(ours.recv(42, socket.MSG_WAITALL))
                self.connections.put([ours, theirs])


def test_a_connection_that_breaks_is_no_loss_if_the_process_connects_again(
    store: HashStore, seen_by_main: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "_RECONNECT_SECONDS", 0.3)
    port, token = json.loads(store.get("distrain/liveness"))
    proxy, ends = Proxy(port), queue.Queue[tuple[int, bool]]()
    store.set("distrain/liveness", json.dumps([proxy.port, token]))
    client = connect(store, 1, ends)
    time.sleep(0.4)  # a connection that breaks sooner is a loss
    proxy.break_next()
    with pytest.raises(queue.Empty):
        seen_by_main.get(timeout=0.6)
    proxy.close()
    proxy.break_next()  # now it cannot connect
    assert seen_by_main.get(timeout=SECONDS) == (1, True)
    assert ends.get(timeout=SECONDS) == (0, True)
    client.close()


def test_what_other_programs_send_to_the_port_is_ignored(store: HashStore, seen_by_main: Ends) -> None:
    port, token = json.loads(store.get("distrain/liveness"))
    for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 10_000, b"0" * 32 + b"0000000001", token[:-1].encode()):
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(sent)
    connect(store, 1).close()
    assert seen_by_main.get(timeout=SECONDS) == (1, True)
    assert seen_by_main.empty()
