"""Agreements of the processes on whether to stop, every few steps, and while they wait for data.

An agreement is a collective, so it is made about every `POLL_SECONDS`, and not at every step.
"""

from __future__ import annotations

import contextlib
import time

from distrain.data.decoded import DecodedBatches
from distrain.data.stream import TrainingBatches
from distrain.distributed.busy_clock import BusyClock
from distrain.distributed.collectives import POLL_SECONDS, Collectives, StopAgreed
from distrain.distributed.runtime import Runtime
from distrain.errors import DataError

_MAX_STEPS = 256
"""Most steps between two agreements."""


class StopPoll:
    """Agrees, every few steps, on whether to stop and on what rank 0 says about checkpoints.

    Args:
        collectives: of this process.
        step: steps done so far; the first agreement is made there.
    """

    def __init__(self, collectives: Collectives, step: int) -> None:
        self._collectives = collectives
        self._next = self._last_step = step  # guard: early-agreement
        self._last_time = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether this step is followed by an agreement; the answer is the same on all processes."""
        return step >= self._next

    def poll_at(self, step: int) -> None:
        """Make the next agreement at this step, whatever was planned."""
        self._next = step

    def poll(self, step: int, save_due: bool, is_written: bool) -> tuple[bool, bool]:
        """Make an agreement.

        Args:
            step: steps done.
            save_due: on rank 0: whether a checkpoint is due by the clock.
            is_written: on rank 0: whether the pending checkpoint is written, or has failed.

        Returns:
            What rank 0 gave as `save_due` and `is_written`.

        Raises:
            StopAgreed: on all processes, if one was asked to stop.
        """
        steps, seconds = step - self._last_step, time.monotonic() - self._last_time
        affordable = int(POLL_SECONDS * steps / max(seconds, 1e-6))
        # At most twice the last interval: a first step, or a few quick ones, say little about the next ones.
        interval = max(1, min(affordable, 2 * (self._next - self._last_step), _MAX_STEPS))
        agreed = self._collectives.agree(save_due, is_written, main=interval)
        if agreed.stop:
            raise StopAgreed
        self._last_step, self._last_time, self._next = step, time.monotonic(), step + agreed.main
        return agreed.flags[0] > 0, agreed.flags[1] > 0


def wait_for_data(
    runtime: Runtime, batches: TrainingBatches | DecodedBatches, busy: BusyClock | None, step: int
) -> None:
    """Wait, between two steps and together, until every process has its data of the round that begins.

    Args:
        runtime: of this process.
        batches: the reader.
        busy: measures how long this process waits for its data alone.
        step: the next one.

    Raises:
        StopAgreed: on all processes, if one was asked to stop.
        DataError: on all processes, where one cannot read its shards.
    """
    while True:
        ready, error = False, None
        shards_read = batches.shards_read
        try:
            with busy.data() if busy is not None else contextlib.nullcontext():
                ready = batches.ready(step, POLL_SECONDS)
        except DataError as caught:
            error = caught
        runtime.watchdog.waiting_for(None if ready else "its data")  # guard: waits-for-data
        if not runtime.collectives.any_busy(not ready, batches.shards_read > shards_read, error):
            return
