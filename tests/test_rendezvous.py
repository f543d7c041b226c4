"""Processes find each other in a store that earlier runs have used, and use network interfaces that exist."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from distrain.distributed import interfaces, rendezvous
from distrain.distributed.peer_store import PeerStore, here_key
from distrain.environment import LAUNCHERS, Environment, World
from distrain.errors import ConfigError, PeerLostError

SECONDS = 20


@pytest.fixture
def start() -> Iterator[Any]:
    """`start(rank, size)`: a process's part of a store that is kept all the time, as a Future."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(8) as threads:

        def process(rank: int, size: int, seconds: float = SECONDS) -> Future[PrefixStore]:
            client = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
            return threads.submit(rendezvous.meet, client, World(rank, size), seconds)

        yield process


def meet(start: Any, ranks: Sequence[int], size: int) -> list[PrefixStore]:
    return [started.result(SECONDS) for started in [start(rank, size) for rank in ranks]]


def test_each_attempt_gets_a_part_of_the_store_without_the_keys_of_earlier_ones(start: Any) -> None:
    for ranks in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        parts = meet(start, ranks, 3)
        assert not parts[0].check(["failed"])
        parts[1].set("failed", "in this attempt")
        assert all(part.get("failed") == b"in this attempt" for part in parts)


def test_a_process_of_the_next_attempt_may_come_long_before_rank_0(start: Any) -> None:
    meet(start, [0, 1], 2)
    early = start(1, 2)
    assert not threading.Event().wait(0.3)
    assert not early.done()  # the part of the first attempt is complete without it
    part = start(0, 2).result(SECONDS)
    early.result(SECONDS).set("key", "1")
    assert part.check(["key"])


def test_the_store_of_launchers_is_not_that_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.set(LAUNCHERS, "")
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="the first node was started with --restarts, this one without it"):
        rendezvous._store(Environment.read(variables), SECONDS)


def test_a_process_that_was_lost_at_the_rendezvous_can_be_replaced(start: Any) -> None:
    with pytest.raises(PeerLostError, match="rank 0 did not arrive"):
        start(1, 2, 0.2).result(SECONDS)
    with pytest.raises(PeerLostError, match="rank 1 did not arrive"):
        start(0, 2, 0.2).result(SECONDS)
    parts = meet(start, [1, 0], 2)
    parts[0].set("key", "1")
    assert parts[1].check(["key"])


def test_another_number_of_processes_than_in_the_attempt_before_is_no_contradiction(start: Any) -> None:
    meet(start, [0, 1, 2], 3)
    meet(start, [1, 0], 2)


def test_processes_that_expect_different_numbers_say_so(start: Any) -> None:
    for started in [start(1, 3), start(0, 2)]:
        with pytest.raises(ConfigError, match="one expects 2 processes, another one 3: give every node"):
            started.result(SECONDS)


def test_a_process_that_left_because_it_lost_another_one_is_not_the_lost_one() -> None:
    store = HashStore()
    first, second, third = (PeerStore(store, World(rank, 4)) for rank in (0, 1, 3))
    store.set(here_key(2), "node7")
    assert first.first_lost([2]) == [2]
    assert second.first_lost([0, 2]) == [2]  # rank 0 has recorded its loss
    assert third.first_lost([0, 1]) == [2]  # its own connection to rank 2 is not known to be broken yet
    assert third.describe([1, 2]) == "rank 1, rank 2 on node7"


def delay_connections(port: int, seconds: float) -> int:
    """Return a port that leads to another one; after the first connection, others wait some time to be established."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(4096):
                target.sendall(chunk)

    def accept() -> None:
        ours = listener.accept()[0]
        fillers = [socket.socket() for _ in range(4)]  # these fill the queue of the listener
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        while True:
            theirs = socket.create_connection(("127.0.0.1", port))
            for ends in ((ours, theirs), (theirs, ours)):
                threading.Thread(target=copy, args=ends, daemon=True).start()
            if fillers:
                time.sleep(seconds)
                while fillers:
                    fillers.pop().close()
            ours = listener.accept()[0]

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


@pytest.mark.faults
def test_a_connection_that_takes_longer_than_a_lost_answer_of_dns_is_no_loss() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = delay_connections(server.port, 6)
    peer_store = PeerStore(TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False), World(1, 2))
    server.set(here_key(0), "node7")
    assert peer_store.hosts([0]) == {0: "node7"}


HERE = {"lo": ["127.0.0.1", "::1"], "eth0": ["192.0.2.2"], "eth1": ["198.51.100.2"], "ib0": ["203.0.113.2"]}
CURE = (
    "there are eth0 (192.0.2.2), eth1 (198.51.100.2), ib0 (203.0.113.2), lo (127.0.0.1); correct the variable, or"
    " unset it"
)
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


@pytest.mark.parametrize(
    ("name", "value", "backend", "remote", "message"),
    [
        (GLOO, "eth9", "gloo", None, "this host has no interface 'eth9' with an address"),
        (GLOO, "eth", "nccl", None, "this host has no interface 'eth' with an address"),
        (GLOO, "eth0,ib1", "gloo", None, "this host has no interface 'ib1' with an address"),
        (GLOO, "lo", "gloo", "192.0.2.9", "lo does not lead to the other nodes"),
        (NCCL, "=eth", "nccl", None, "no interface of this host matches"),
        (NCCL, "^eth,ib,lo", "nccl", None, "no interface of this host matches"),
    ],
)
def test_an_interface_that_cannot_be_used_is_named(
    name: str, value: str, backend: str, remote: str | None, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        interfaces.check({name: value}, backend, remote, HERE)
    assert str(caught.value) == f"{name}={value}: {message}; {CURE}"


@pytest.mark.parametrize(
    ("variables", "backend", "remote"),
    [
        ({}, "nccl", "192.0.2.9"),
        ({GLOO: "eth0,ib0"}, "gloo", "192.0.2.9"),
        ({GLOO: "lo"}, "gloo", "127.0.0.1"),
        ({GLOO: "lo"}, "gloo", None),
        ({NCCL: "nothing"}, "gloo", None),
        ({NCCL: "ib,eth"}, "nccl", None),
    ],
)
def test_interfaces_that_can_be_used_are_accepted(variables: dict[str, str], backend: str, remote: str | None) -> None:
    interfaces.check(variables, backend, remote, HERE)


def test_nccl_matches_interfaces_by_prefix_or_exactly_or_all_others() -> None:
    assert interfaces.matching("eth", list(HERE)) == ["eth0", "eth1"]
    assert interfaces.matching("=eth1,ib0", list(HERE)) == ["eth1", "ib0"]
    assert interfaces.matching("^lo,ib", list(HERE)) == ["eth0", "eth1"]
    assert interfaces.matching("^=eth0", list(HERE)) == ["lo", "eth1", "ib0"]
