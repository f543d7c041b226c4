"""The rounds that steps use, cut into the samples of each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distrain.data.background import Background
from distrain.data.order import Order
from distrain.data.rounds import Batch, Round, concatenate
from distrain.environment import World


class StepParts:
    """The rounds that steps use, cut into the parts of each step.

    Args:
        order: the order of training.
        ranks: the virtual ranks of this process.
        background: reads the rounds.
        copy_stream: with it a GPU copies from the rounds' buffers.
    """

    def __init__(
        self, order: Order, ranks: Sequence[World], background: Background[Round], copy_stream: torch.cuda.Stream | None
    ) -> None:
        self._order, self._ranks, self._background, self._copy_stream = order, ranks, background, copy_stream
        self._current: Round | None = None

    def ready(self, step: int, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds (None: without limit) for all rounds of a step; return whether they are ready.

        Parts of earlier steps are no longer valid.
        """
        rounds = self._order.rounds(step)
        while self._current is None or self._current.number < rounds.start:
            if not self._background.wait(1, timeout):
                return False
            self._next()
        return self._background.wait(rounds.stop - 1 - self._current.number, timeout)

    def parts(self, step: int) -> list[list[Any]]:
        """Return the samples of each virtual rank in a step: consecutive ones of one round, or of several."""
        parts: list[list[Any]] = [[] for _ in self._ranks]
        for number in self._order.rounds(step):
            assert self._current is not None
            if self._current.number < number:
                # The thread reuses the round's buffers, so what is still needed of them is copied.
                for of_rank, part in zip(parts, self._current.parts, strict=True):
                    if isinstance(part, Batch):
                        of_rank[-1] = concatenate([of_rank[-1]], self._pin)
                self._next()
            for of_rank, part, world in zip(parts, self._current.parts, self._ranks, strict=True):
                of_rank.append(part.take(self._slice(step, number, world)))
        return parts

    def close(self) -> None:
        """End the thread after the shard that it reads."""
        self._background.close()

    @property
    def _pin(self) -> bool:
        return self._copy_stream is not None

    def _slice(self, step: int, number: int, world: World) -> slice:
        """Return which samples of a virtual rank in a round a step trains."""
        order = self._order
        epoch, in_epoch = divmod(step, order.steps_per_epoch)
        size = len(order.owned_lanes(world)) * order.samples_per_shard
        offset = (number - epoch * order.rounds_per_epoch) * size
        start, stop = (order.owned_before(each * order.global_batch_size, world) for each in (in_epoch, in_epoch + 1))
        return slice(max(start - offset, 0), min(stop - offset, size))

    def _next(self) -> None:
        if self._current is not None and self._current.copied is not None:
            self._current.copied.record(self._copy_stream)
        self._current = next(self._background)
