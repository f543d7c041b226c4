"""What processes tell each other beside the collectives: keys of the store at which they met.

A process that loses a peer sees a broken connection, or nothing at all: why the peer left is asked here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from distrain.report import Failure, format_failure, parse_failure

_ANSWER_SECONDS = 5.0
_FAILED = "distrain/failed"


class Notices:
    """Asking and telling never fail: the store's own process may be the one that is gone."""

    def __init__(self, store: Any) -> None:
        self._store = store.clone() if hasattr(store, "clone") else store  # a connection, and a time-out, of its own
        with contextlib.suppress(RuntimeError, NotImplementedError):
            self._store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))

    def leave(self, failure: Failure) -> None:
        """Tell why this process leaves the others; the first to fail stays."""
        with contextlib.suppress(Exception):
            self._store.compare_set(_FAILED, "", format_failure(failure))

    def failed(self) -> Failure | None:
        """Why a process left the others, if one did."""
        with contextlib.suppress(Exception):
            if self._store.check([_FAILED]):
                return parse_failure(self._store.get(_FAILED))
        return None

    def tell_stuck(self, rank: int, told: Mapping[str, Any]) -> None:
        """What a process that makes no progress says of itself."""
        with contextlib.suppress(Exception):
            self._store.set(f"distrain/stuck/{rank}", json.dumps(told))

    def add_stuck(self, size: int, found: dict[int, dict[str, Any]]) -> None:
        """What others said, by rank; added one by one, so that those before a silence are known."""
        with contextlib.suppress(Exception):
            for rank in range(size):
                if self._store.check([f"distrain/stuck/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"distrain/stuck/{rank}"))
