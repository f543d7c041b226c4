"""Collectives: sums, values from all ranks, agreements on stopping and on errors.

All processes make the same calls in the same order. A single process gets its own values.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrain import signals
from distrain.distributed import losses
from distrain.distributed.peer_store import PeerStore
from distrain.distributed.watchdog import Watchdog
from distrain.environment import World
from distrain.errors import AgainError, BusyError, PeerLostError, SaveError, Stopped, UserError
from distrain.failure_report import Failure, PeerFailedError

T = TypeVar("T")

log = logging.getLogger("distrain")

POLL_SECONDS = 0.25
"""About how often the processes agree on whether to stop."""

_GONE_SECONDS = 2.0
"""Longest wait, after a collective has failed, for a broken connection or the error record of a peer."""

_RAISED_BY_ALL = (UserError, AgainError, SaveError)
"""Errors that all processes raise at the same step, or that say that another one is gone already."""


class StopAgreed(Exception):  # noqa: N818 - a request, not an error
    """Raised on all processes, at the same step, when one of them was asked to stop."""

    @property
    def by(self) -> str:
        """The signal, for messages: ` by SIGTERM`."""
        return signals.requested_by()


class Agreement(NamedTuple):
    """The result of `Collectives.agree`, the same on all processes.

    Attributes:
        stop: whether one was asked to stop.
        flags: how many processes raised each flag.
        main: the number that rank 0 gave.
    """

    stop: bool
    flags: tuple[int, ...]
    main: int


class Collectives:
    """The collectives of this process.

    Args:
        world: rank of this process, and their number.
        control: gloo group for control messages: on the CPU, so it neither waits for a GPU nor delays it.
        watchdog: knows when this process waits for the others; None outside a run.
        peer_store: where failures are recorded; None for a single process, and outside a run.
    """

    def __init__(
        self, world: World, control: Any, watchdog: Watchdog | None = None, peer_store: PeerStore | None = None
    ) -> None:
        self._world, self._control, self._watchdog, self._peer_store = world, control, watchdog, peer_store
        self._failed_alone = False
        self.broken = False
        """Whether a peer is gone, or was left waiting: the group can no longer be closed."""

    @property
    def size(self) -> int:
        """Number of the processes."""
        return self._world.size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self._world.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place; all get the same."""
        with self.collective():
            if self._world.size > 1:
                dist.all_reduce(tensor)
        return tensor

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give all processes the buffers of rank 0: a layer may have changed its own differently on each."""
        self._broadcast(module.buffers())

    def broadcast_weights(self, module: nn.Module) -> None:
        """Give all processes the parameters and buffers of rank 0."""
        self._broadcast((*module.parameters(), *module.buffers()))

    def _broadcast(self, tensors: Iterable[Tensor]) -> None:
        with self.collective():
            for tensor in tensors if self._world.size > 1 else ():
                dist.broadcast(tensor.detach(), src=0)

    def from_main(self, value: Any) -> Any:
        """Return rank 0's value on all processes (pickled, between processes of one job)."""
        box = [value]
        with self.collective():
            if self._world.size > 1:
                dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def tensors_from_main(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return rank 0's tensors, which are on the CPU, on all processes; those of the others are ignored."""
        kinds = self.from_main({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        if self._world.rank:
            tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
        with self.collective():
            for tensor in tensors.values() if self._world.size > 1 else ():
                if tensor.numel():  # as bytes: gloo does not know all types
                    dist.broadcast(tensor.view(-1).view(torch.uint8), src=0, group=self._control)
        return dict(tensors)

    def from_all(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, on each of them (pickled, between processes of one job)."""
        values: list[Any] = [value]
        with self.collective():
            if self._world.size > 1:
                values = [None] * self._world.size
                dist.all_gather_object(values, value, group=self._control)
        return values

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return the numbers of all processes, by rank, on each of them; all give the same number of them."""
        local = torch.tensor(values, dtype=torch.float64)
        gathered = local[None].repeat(self._world.size, 1)
        with self.collective():
            if self._world.size > 1:
                dist.all_gather_into_tensor(gathered, local[None], group=self._control)
        rows: list[list[float]] = gathered.tolist()
        return rows

    def unlike_rank_0(self, value: object) -> list[str]:
        """Return the ranks whose value is not that of rank 0, as text; a collective."""
        values = self.from_all(value)
        return [str(rank) for rank, each in enumerate(values) if each != values[0]]

    def agree(self, *flags: bool, main: int = 0) -> Agreement:
        """Agree on whether one was asked to stop, on how many raise each flag, and on rank 0's number `main`."""
        here = [signals.requested() is not None, *flags, main if self._world.rank == 0 else 0]
        sums = torch.tensor(here, dtype=torch.int64)
        with self.collective():
            if self._world.size > 1:
                dist.all_reduce(sums, group=self._control)  # guard: sum-of-flags
        stop, *raised, number = sums.tolist()
        return Agreement(stop > 0, tuple(raised), number)

    def stop_if_requested(self) -> None:
        """Stop before training, where nothing has to be saved.

        Raises:
            Stopped: on all processes, if one was asked to stop.
        """
        if self.agree().stop:
            raise Stopped(f"stopped{StopAgreed().by} while it started; nothing had to be saved")

    def first_error(self, error: Exception | None) -> Exception:
        """Return, on all processes, the error of the lowest rank that has one; at least one must have one."""
        errors = self.from_all(error)
        return next(each for each in errors if each is not None)

    def all_or_none(self, action: Callable[[], T]) -> T:
        """Run what may fail on one process alone, and return its value.

        Raises:
            UserError, AgainError: on all processes, the first error of any of them.
        """
        error: Exception | None = None
        try:
            value = action()
        except (UserError, AgainError) as caught:
            error = caught
        if any(self.agree(error is not None).flags):  # guard: all-or-none
            raise self.first_error(error)
        return value

    def any_busy(self, busy: bool, progress: bool, error: Exception | None) -> bool:
        """Agree on whether any process still waits for data or has work left.

        Args:
            busy: whether this process does.
            progress: whether this process made progress since the last call.
            error: why this process cannot continue.

        Raises:
            Exception: on all processes, the first error of any of them.
            StopAgreed: one process was asked to stop.
        """
        agreed = self.agree(busy, progress, error is not None)
        number_busy, number_progressing, number_failed = agreed.flags
        if number_failed:  # guard: data-error-for-all
            raise self.first_error(error)
        if agreed.stop:  # guard: stop-while-busy
            raise StopAgreed
        if number_progressing and self._watchdog is not None:
            self._watchdog.heartbeat()
        return number_busy > 0

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Run a collective: waiting for the others is known to the watchdog, and their loss is a PeerLostError."""
        if self._world.size == 1:
            yield
            return
        waiting = self._watchdog.collective() if self._watchdog is not None else contextlib.nullcontext()
        with self.detect_loss(), waiting:
            yield

    @contextlib.contextmanager
    def detect_loss(self) -> Iterator[None]:
        """Run what may contain collectives of a library, beside the user's code.

        An exception is a loss only if a collective raised it and a peer is gone; any other one is raised as it is.

        Raises:
            PeerFailedError: another process failed, and recorded why.
            PeerLostError: another process is gone.
        """
        try:
            yield
        except Exception as error:
            if self._world.size > 1 and losses.raised_by_collective(error):  # guard: where-it-was-raised
                self._raise_loss(error)
            raise

    def _raise_loss(self, error: Exception) -> None:
        """Raise what became of the peer that a collective has lost; return if no peer is gone."""
        deadline = time.monotonic() + _GONE_SECONDS
        while True:
            gone = losses.lost_ranks(self._world, self._control)  # guard: no-peer-is-gone
            failure = self._peer_store.first_failure() if self._peer_store is not None else None
            if gone or failure is not None:
                break
            if time.monotonic() > deadline:
                return
            time.sleep(_GONE_SECONDS / 20)
        self.broken = True
        log.debug("a collective failed: %s", error)
        if failure is not None:
            raise PeerFailedError(failure) from None
        names = ", ".join(f"rank {rank}" for rank in gone)
        if self._peer_store is not None:
            names = self._peer_store.describe(self._peer_store.first_lost(gone))
        raise PeerLostError(f"another process is gone: {names}") from error  # guard: lost-peer

    @contextlib.contextmanager
    def fail_alone(self) -> Iterator[None]:
        """Run what may be impossible on this process while the others already wait; they read why in the store."""
        try:
            yield
        except (UserError, BusyError):
            self._failed_alone = True
            raise

    def needs_record(self, error: BaseException) -> bool:
        """Whether the other processes do not raise this error too, so that it must be recorded for them."""
        return self._failed_alone or not isinstance(error, _RAISED_BY_ALL)

    def is_loss(self, error: BaseException) -> bool:
        """Whether the others cannot end by themselves, as this process does with this error."""
        return self.needs_record(error) or isinstance(error, PeerLostError)

    def abandon(self, failure: Failure | None) -> None:
        """Exit without waiting for the others, who are at another step; `failure` is recorded for them."""
        self.broken = self._world.size > 1
        if self._peer_store is None:
            return
        if failure is not None:
            self._peer_store.record_failure(failure)  # guard: record-failure
        self._peer_store.wait_until_seen()
