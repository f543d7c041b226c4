"""Records that processes leave for each other in the store, beside the collectives.

A process that loses a peer sees a broken connection, or nothing at all (NCCL): here it finds out why the peer exited.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distrain.failure_report import Failure

_TIMEOUT_SECONDS = 5.0
_FAILED = "distrain/failed"


def here_key(rank: int) -> str:
    """Return the key under which a process has left the name of its host."""
    return f"distrain/here/{rank}"


def _lost_key(rank: int) -> str:
    return f"distrain/lost/{rank}"


class PeerStore:
    """Error records and reports of stuck processes.

    Reading and writing never fail, and take a few seconds at most: the process that serves the store may be gone or
    frozen, and torch then waits for its answer without a time-out.
    """

    def __init__(self, store: Any) -> None:
        self._store = store.clone() if hasattr(store, "clone") else store  # a connection of its own
        self._pending: threading.Thread | None = None

    def record_failure(self, failure: Failure) -> None:
        """Record why this process exits; the first record of a run counts."""
        self._bounded(lambda: self._store.compare_set(_FAILED, "", failure.to_json()))

    def first_failure(self) -> Failure | None:
        """Return the failure that a process recorded; None if there is none, or the store does not answer."""
        failures: list[Failure] = []

        def read() -> None:
            if self._store.check([_FAILED]):
                failures.append(Failure.from_json(self._store.get(_FAILED)))

        self._bounded(read)
        return failures[0] if failures else None

    def first_lost(self, rank: int, gone: Iterable[int]) -> list[int]:
        """Return which of the ranks that are gone were lost first, and record it for the others.

        A process that lost a peer ends too; it has recorded whom it lost.
        """
        first = set(gone)

        def read() -> None:
            recorded = [key for key in (_lost_key(other) for other in gone) if self._store.check([key])]
            survivors = {other for other in gone if _lost_key(other) in recorded}
            known = (first - survivors).union(*(json.loads(self._store.get(key)) for key in recorded)) - {rank}
            if known:
                first.clear()
                first.update(known)
            self._store.set(_lost_key(rank), json.dumps(sorted(first)))

        self._bounded(read)
        return sorted(first)

    def describe(self, ranks: Iterable[int]) -> str:
        """Return ranks with the names of their hosts, as far as these are known."""
        ranks, hosts = list(ranks), {}

        def read() -> None:
            for rank in ranks:
                if self._store.check([here_key(rank)]):
                    hosts[rank] = self._store.get(here_key(rank)).decode()

        self._bounded(read)
        return ", ".join(f"rank {rank} on {hosts[rank]}" if rank in hosts else f"rank {rank}" for rank in ranks)

    def report_stuck(self, rank: int, report: Mapping[str, Any]) -> None:
        """Report the state of a process that makes no progress."""
        self._bounded(lambda: self._store.set(f"distrain/stuck/{rank}", json.dumps(report)))

    def stuck_reports(self, size: int) -> dict[int, dict[str, Any]]:
        """Return the reports of stuck processes, by rank."""
        reports: dict[int, dict[str, Any]] = {}

        def read() -> None:
            for rank in range(size):
                if self._store.check([f"distrain/stuck/{rank}"]):
                    reports[rank] = json.loads(self._store.get(f"distrain/stuck/{rank}"))

        self._bounded(read)
        return dict(reports)

    def _bounded(self, action: Callable[[], object]) -> None:
        if self._pending is not None and self._pending.is_alive():
            return  # the store does not answer

        def work() -> None:
            with contextlib.suppress(Exception):
                action()

        thread = threading.Thread(target=work, name="distrain-peer-store", daemon=True)
        thread.start()
        thread.join(_TIMEOUT_SECONDS)
        if thread.is_alive():
            self._pending = thread
