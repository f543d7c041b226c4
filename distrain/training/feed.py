"""Local batches on the device, one for each virtual rank of this process, in the order of the steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from distrain.data.decoded import DecodedBatches
from distrain.data.order import Order
from distrain.data.rounds import Batch
from distrain.data.stream import TrainingBatches
from distrain.distributed.busy_clock import BusyClock
from distrain.training.profiling import Phase, Profile


class Feed:
    """Takes this process's local batches of each step. On a GPU the next ones are copied while a step is computed.

    Args:
        batches: the reader; its batches are valid until the next one is taken.
        order: tells which steps begin a round, and so may have to wait for data.
        device: where the batches are used.
        wait: waits, on all processes together, for the data of a step that begins a round.
        profile: counts the time of waiting and copying.
        busy: counts the time in which this process alone waits for its data.
    """

    def __init__(
        self,
        batches: TrainingBatches | DecodedBatches,
        order: Order,
        device: torch.device,
        wait: Callable[[int], None],
        profile: Profile | None = None,
        busy: BusyClock | None = None,
    ) -> None:
        self._batches, self._order, self._wait, self._profile = batches, order, wait, profile
        self._busy = busy
        self._device, self._stream = device, batches.copy_stream
        self._ahead: list[Batch] | None = None
        self._started = False

    def take(self, step: int) -> list[Batch]:
        """Return the local batches of the next step.

        Raises:
            Exception: what `wait` raises.
        """
        if not self._started or self._order.begins_round(step):
            with self._phase("data" if self._started else "start"):
                self._wait(step)
            self._started = True
        elif self._batches.decodes and self._ahead is None:
            with (
                self._phase("data"),
                self._waiting_alone(),
            ):  # images are decoded in a bounded time: no agreement is needed
                self._batches.ready(step, None)
        with self._phase("copy"):
            batches, self._ahead = self._ahead or self._copy(), None
            if self._stream is not None:
                current = torch.cuda.current_stream(self._device)
                current.wait_stream(self._stream)
                for batch in batches:
                    for tensor in (batch.images, batch.labels, batch.random_bits):
                        tensor.record_stream(current)
        return batches

    def prefetch(self, step: int) -> None:
        """Start the host-to-device copy of the next step, unless its data must be waited for: `take` measures that."""
        if self._stream is None or self._ahead is not None or self._order.begins_round(step):
            return
        if not self._batches.decodes or self._batches.ready(step, 0):
            self._ahead = self._copy()

    def _phase(self, name: Phase) -> contextlib.AbstractContextManager[None]:
        return self._profile.phase(name) if self._profile is not None else contextlib.nullcontext()

    def _waiting_alone(self) -> contextlib.AbstractContextManager[None]:
        return self._busy.data() if self._busy is not None else contextlib.nullcontext()

    def _copy(self) -> list[Batch]:
        batches = next(self._batches)
        if self._stream is None:
            return batches
        with torch.cuda.stream(self._stream):
            return [
                batch._replace(
                    images=batch.images.to(self._device, non_blocking=True),
                    labels=batch.labels.to(self._device, non_blocking=True),
                    random_bits=batch.random_bits.to(self._device, non_blocking=True),
                )
                for batch in batches
            ]
