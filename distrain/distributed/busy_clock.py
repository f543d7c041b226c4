"""The time in which this process is busy in a training step: all but the time in which it waits for the others.

A step is synchronous: it takes as long as the slowest process needs, so all processes have the same time of a step. The
slow one shows in that the others wait for it, while it waits for nobody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from distrain.distributed.stopwatch import Mark, Stopwatch

_NOTHING = contextlib.nullcontext()
_SAMPLED = 10
"""Interval of the steps that are measured on a GPU."""


class BusyTime(NamedTuple):
    """The mean time of a step in which a process was busy, and its mean number of samples.

    Attributes:
        computing: seconds of its passes and its update, without waiting for the others.
        data: seconds in which the device had nothing to do because this process's data was not there.
        samples: number of samples in its local batches.
    """

    computing: float
    data: float
    samples: float


class BusyClock:
    """Measures the time in which this process is busy; on a GPU, durations are those on the GPU's clock.

    The first step is not counted: it is unusual. A single process measures nothing.

    Args:
        device: the device that computes.
        world_size: number of processes.
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._on_gpu, self._enabled = device.type == "cuda", world_size > 1
        self._stopwatch = Stopwatch(self._on_gpu)
        self._number = self._steps = self._samples = self._measured_steps = 0
        self._measures = False
        self._hooks: list[tuple[Tensor, RemovableHandle]] = []
        self._last: Tensor | None = None
        self._gradients_ready: Mark | None = None

    def follow_gradients(self, parameters: Iterable[Tensor]) -> None:
        """See when the last gradient of a backward pass is computed; then this process waits until all are exchanged.

        Which parameter's it is, is observed in the first step.
        """
        if self._enabled:
            hooked = [each for each in parameters if each.requires_grad]
            self._hooks = [(each, each.register_post_accumulate_grad_hook(self._on_gradient)) for each in hooked]

    def _on_gradient(self, parameter: Tensor) -> None:
        self._last = parameter
        if self._measures:
            self._gradients_ready = self._stopwatch.mark()

    def end_backward(self) -> None:
        """Count the time since the last gradient was computed as waiting."""
        if self._gradients_ready is not None:
            self._stopwatch.add("waiting", self._gradients_ready, self._stopwatch.mark())
            self._gradients_ready = None

    @contextlib.contextmanager
    def step(self, samples: int) -> Iterator[None]:
        """Measure the passes and the update of a step with so many samples."""
        self._number += 1
        first = self._number == 1
        self._measures = self._enabled and not first and (not self._on_gpu or self._number % _SAMPLED == 2)
        with self._duration("step") if self._measures else _NOTHING:
            yield
        if first:
            self._remove_hooks()
            return
        self._steps, self._samples = self._steps + 1, self._samples + samples
        self._measured_steps += self._measures
        self._measures = False

    def _remove_hooks(self) -> None:
        """Remove the hooks of all parameters but the last one, as each call takes time."""
        for parameter, hook in self._hooks:
            if parameter is not self._last:
                hook.remove()
        self._hooks = []

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Count the time within the block as waiting for the other processes, in a step that is measured."""
        return self._duration("waiting") if self._measures else _NOTHING

    def data(self) -> contextlib.AbstractContextManager[None]:
        """Count the time within the block as waiting for the data of this process, once training has begun."""
        return self._duration("data") if self._enabled and self._number else _NOTHING

    @contextlib.contextmanager
    def _duration(self, name: str) -> Iterator[None]:
        start = self._stopwatch.mark()
        yield
        self._stopwatch.add(name, start, self._stopwatch.mark())

    def take(self) -> BusyTime | None:
        """Return the means since the last call; None, on all processes, if no step was measured."""
        if not self._measured_steps:
            return None
        seconds = self._stopwatch.take().get
        busy = BusyTime(
            (seconds("step", 0.0) - seconds("waiting", 0.0)) / self._measured_steps,
            seconds("data", 0.0) / self._steps,
            self._samples / self._steps,
        )
        self._steps = self._samples = self._measured_steps = 0
        return busy
