"""Records that processes leave for each other in the store, beside the collectives.

A process that loses a peer sees a broken connection, or nothing at all (NCCL): here it finds out why the peer exited.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from distrain.environment import World
from distrain.failure_report import Failure

ASK_SECONDS = 1.0
"""Interval at which each process asks whether another one has failed."""

_LINGER_SECONDS = ASK_SECONDS + 2.0
"""Longest wait until all have seen a failure: one that was killed, or is frozen, never sees it."""

log = logging.getLogger("distrain")

_TIMEOUT_SECONDS = 5.0
_CONNECT_SECONDS = 60.0
"""Longest time for a connection at the start: looking up a name takes 5 s for each answer that the network loses."""

_FAILED = "distrain/failed"


def here_key(rank: int) -> str:
    """Return the key under which a process has left the name of its host."""
    return f"distrain/here/{rank}"


def _lost_key(rank: int) -> str:
    return f"distrain/lost/{rank}"


def _seen_key(rank: int) -> str:
    return f"distrain/seen/{rank}"


class PeerStore:
    """Error records and reports of stuck processes.

    Reading and writing never fail, and take a few seconds at most: the process that serves the store may be gone or
    frozen, and torch then waits for its answer without a time-out. Only `wait_for_failure` waits as long as that.

    Args:
        store: this run's part of the store.
        world: rank of this process, and their number.
    """

    def __init__(self, store: Any, world: World) -> None:
        self._store, self._world = _new_connection(store, _CONNECT_SECONDS), world
        self._store_to_ask = _new_connection(store, _CONNECT_SECONDS)
        self._pending: threading.Thread | None = None
        self._ended = False

    def record_failure(self, failure: Failure) -> None:
        """Record why this process exits; the first record of a run counts."""

        def write() -> None:
            self._store.compare_set(_FAILED, "", failure.to_json())
            self._store.set(_seen_key(self._world.rank), "")

        self._bounded(write)

    def first_failure(self) -> Failure | None:
        """Return the failure that a process recorded; None if there is none, or the store does not answer."""
        failures: list[Failure | None] = []
        self._bounded(lambda: failures.append(self._read_failure(self._store)))
        return failures[0] if failures else None

    def wait_for_failure(self, stop: threading.Event) -> Failure | None:
        """Ask every second whether a process has failed, over a connection of its own.

        Returns:
            The failure that was recorded; None once `stop` is set, or if the process that serves the store has ended.
        """
        wait = ASK_SECONDS * (0.618 * self._world.rank % 1)  # not all processes ask at the same moment
        try:
            while not stop.wait(wait):
                failure = self._read_failure(self._store_to_ask)
                if failure is not None:
                    return failure
                wait = ASK_SECONDS
        except RuntimeError as error:
            log.debug("the store does not answer any more: %s", error)
        return None

    def wait_until_seen(self) -> None:
        """Wait on rank 0, which serves the store, until all have seen why a process failed; a few seconds at most."""
        keys = [_seen_key(rank) for rank in range(self._world.size)]

        def wait() -> None:
            _new_connection(self._store, _TIMEOUT_SECONDS).wait(keys, timedelta(seconds=_LINGER_SECONDS))

        if self._world.rank == 0:
            self._bounded(wait)  # guard: linger

    def mark_seen(self, rank: int | None = None) -> None:
        """Let rank 0 not wait until a process, this one if none is given, has seen a failure: it needs no reason."""
        key = _seen_key(self._world.rank if rank is None else rank)
        self._bounded(lambda: self._store.set(key, ""))

    def _read_failure(self, store: Any) -> Failure | None:
        if not store.check([_FAILED]):
            return None
        failure = Failure.from_json(store.get(_FAILED))
        store.set(_seen_key(self._world.rank), "")
        return failure

    def first_lost(self, gone: Iterable[int]) -> list[int]:
        """Return which of the ranks that are gone were lost first, and record it for the others.

        A process that lost a peer ends too; it has recorded whom it lost.
        """
        first = set(gone)

        def read() -> None:
            recorded = [key for key in (_lost_key(other) for other in gone) if self._store.check([key])]
            survivors = {other for other in gone if _lost_key(other) in recorded}
            known = (first - survivors).union(*(json.loads(self._store.get(key)) for key in recorded))
            known -= {self._world.rank}
            if known:
                first.clear()
                first.update(known)
            self._store.set(_lost_key(self._world.rank), json.dumps(sorted(first)))

        self._bounded(read)
        return sorted(first)

    def hosts(self, ranks: Iterable[int]) -> dict[int, str]:
        """Return the names of the hosts of ranks, as far as these are known."""
        hosts: dict[int, str] = {}

        def read() -> None:
            for rank in ranks:
                if self._store.check([here_key(rank)]):
                    hosts[rank] = self._store.get(here_key(rank)).decode()

        self._bounded(read)
        return dict(hosts)

    def describe(self, ranks: Sequence[int]) -> str:
        """Return ranks with the names of their hosts, as far as these are known."""
        hosts = self.hosts(ranks)
        return ", ".join(f"rank {rank} on {hosts[rank]}" if rank in hosts else f"rank {rank}" for rank in ranks)

    def report_stuck(self, report: Mapping[str, Any]) -> None:
        """Report the state of this process, which makes no progress."""
        self._bounded(lambda: self._store.set(f"distrain/stuck/{self._world.rank}", json.dumps(report)))

    def stuck_reports(self) -> dict[int, dict[str, Any]]:
        """Return the reports of stuck processes, by rank."""
        reports: dict[int, dict[str, Any]] = {}

        def read() -> None:
            for rank in range(self._world.size):
                if self._store.check([f"distrain/stuck/{rank}"]):
                    reports[rank] = json.loads(self._store.get(f"distrain/stuck/{rank}"))

        self._bounded(read)
        return dict(reports)

    def _bounded(self, action: Callable[[], object]) -> None:
        if self._ended or (self._pending is not None and self._pending.is_alive()):
            return  # the store does not answer

        def work() -> None:
            try:
                action()
            except dist.DistNetworkError:
                self._ended = True  # torch never connects again, and writes its stack at every attempt
            except Exception as error:
                log.debug("the store: %s", error)

        thread = threading.Thread(target=work, name="distrain-peer-store", daemon=True)
        thread.start()
        thread.join(_TIMEOUT_SECONDS)
        if thread.is_alive():
            self._pending = thread


def _new_connection(store: Any, seconds: float) -> Any:
    """Return the same store over another connection: while one call waits, others on its connection wait too.

    Raises:
        DistNetworkError: its server does not answer within `seconds`.
    """
    if not hasattr(store, "clone"):
        return store
    before = store.timeout
    store.set_timeout(timedelta(seconds=seconds))  # that of connecting, too
    try:
        return store.clone()
    finally:
        store.set_timeout(before)
