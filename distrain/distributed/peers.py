"""The other processes of a run: whether one of them has failed, and how this process leaves them.

Three signs are looked at, whatever the main thread does: a failure that a process has recorded in the store, for which
a thread asks every second; the end of a process on several nodes (`liveness`); and the error that NCCL itself reports.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, NamedTuple

from torch._C._distributed_c10d import ErrorType

from distrain.distributed.liveness import LivenessClient, LivenessServer
from distrain.distributed.peer_store import PeerStore
from distrain.environment import Environment
from distrain.errors import EXIT_AGAIN
from distrain.failure_report import Failure, failure_here

_KNOWN_SECONDS = 1.0
"""Time in which the main thread may end by itself after a failure of a peer: gloo reports the loss to it as well."""

_UNKNOWN_SECONDS = 10.0
"""The same after an error of NCCL alone: if the GPU of this process failed, its own error says more."""

_CLOSE_SECONDS = 5.0


class PeerFailure(NamedTuple):
    """Why the other processes cannot continue, and the seconds in which this one may end by itself."""

    failure: Failure
    patience: float


class Peers:
    """The other processes of a run.

    Args:
        store: where processes record failures.
        environment: this process among them.
    """

    def __init__(self, store: PeerStore, environment: Environment) -> None:
        self.store, self._environment = store, environment
        self._failure: Failure | None = None
        self._liveness: LivenessServer | LivenessClient | None = None
        self._backend: Any = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="distrain-peers", daemon=True)
        self._thread.start()

    def use_liveness(self, liveness: LivenessServer | LivenessClient) -> None:
        """Say there when this process leaves; it calls `ended` for others."""
        self._liveness = liveness

    def use_backend(self, backend: Any) -> None:
        """Ask NCCL, a backend of torch's process groups, for its error too."""
        self._backend = backend

    def ended(self, rank: int, is_loss: bool) -> None:
        """Know that a process has ended; if that is a loss, all others end, with what it may have recorded before."""
        if is_loss and not self._left.is_set():
            host = self.store.hosts([rank]).get(rank, str(self._environment.master_address))
            message = f"another process is gone: rank {rank} on {host}"
            loss = replace(failure_here(self._environment, "peer", EXIT_AGAIN, message), rank=rank, host=host)
            self.store.record_failure(loss)
            self._failure = self._failure or self.store.first_failure() or loss
        self.store.mark_seen(rank)

    def failure(self) -> PeerFailure | None:
        """Return why the others cannot continue; None while nothing is known, and after this process has left."""
        if self._left.is_set():
            return None
        if self._failure is not None:
            return PeerFailure(self._failure, _KNOWN_SECONDS)
        error = communicator_error(self._backend) if self._backend is not None else None
        if error is None:
            return None
        message = f"this GPU, another process or the network between them failed: NCCL reports {error}"
        return PeerFailure(failure_here(self._environment, "peer", EXIT_AGAIN, message), _UNKNOWN_SECONDS)

    def leave(self, *, is_loss: bool) -> None:
        """Leave the others: from here on this process ends by itself, with its own result or error.

        Args:
            is_loss: whether the others cannot continue without it.
        """
        if self._left.is_set():
            return
        self._left.set()
        self.store.mark_seen()
        if self._liveness is not None and not is_loss:
            self._liveness.leave()

    def close(self) -> None:
        """End the threads."""
        self._left.set()
        if self._liveness is not None:
            self._liveness.close()
        self._thread.join(_CLOSE_SECONDS)

    def _ask(self) -> None:
        failure = self.store.wait_for_failure(self._left)
        self._failure = failure or self._failure


def communicator_error(backend: Any) -> str | None:
    """Return the error that a backend of torch's process groups reports, such as COMM_ERROR; None if there is none."""
    error = backend.get_error()
    return None if error == ErrorType.SUCCESS else str(error.name)
