"""What processes tell each other beside the collectives: keys of the store at which they met.

A process that loses a peer sees a broken connection, or nothing at all: why the peer left is asked here.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from distrain.failures import Failure, format_failure, parse_failure

_ANSWER_SECONDS = 5.0
_FAILED = "distrain/failed"


class PeerStore:
    """Asking and telling never fail, and take a few seconds at most: the store's own process may be gone or frozen, and
    torch then waits for its answer without end.
    """

    def __init__(self, store: Any) -> None:
        self._store = store.clone() if hasattr(store, "clone") else store  # a connection of its own
        self._silent: threading.Thread | None = None

    def leave(self, failure: Failure) -> None:
        """Tell why this process leaves the others; the first to fail stays."""
        self._bounded(lambda: self._store.compare_set(_FAILED, "", format_failure(failure)))

    def failed(self) -> Failure | None:
        """Why a process left the others, if one did."""
        found: list[Failure] = []

        def ask() -> None:
            if self._store.check([_FAILED]):
                found.append(parse_failure(self._store.get(_FAILED)))

        self._bounded(ask)
        return found[0] if found else None

    def tell_stuck(self, rank: int, told: Mapping[str, Any]) -> None:
        """What a process that makes no progress says of itself."""
        self._bounded(lambda: self._store.set(f"distrain/stuck/{rank}", json.dumps(told)))

    def all_stuck(self, size: int) -> dict[int, dict[str, Any]]:
        """What processes said of themselves, by rank."""
        found: dict[int, dict[str, Any]] = {}

        def ask() -> None:
            for rank in range(size):
                if self._store.check([f"distrain/stuck/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"distrain/stuck/{rank}"))

        self._bounded(ask)
        return dict(found)

    def _bounded(self, action: Callable[[], object]) -> None:
        if self._silent is not None and self._silent.is_alive():
            return  # the store does not answer

        def work() -> None:
            with contextlib.suppress(Exception):
                action()

        asking = threading.Thread(target=work, name="distrain-ask", daemon=True)
        asking.start()
        asking.join(_ANSWER_SECONDS)
        if asking.is_alive():
            self._silent = asking
