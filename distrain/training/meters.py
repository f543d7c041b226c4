"""The training loss and speed since the last line of metrics.jsonl."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from distrain.distributed.numerics import sum_in_order
from distrain.errors import DivergedError
from distrain.runs import checkpoint
from distrain.training.flops import TrainingTime
from distrain.training.job import Job
from distrain.training.profiling import Profile

_MAX_PENDING = 4096
"""Losses that are kept before they are read, where nothing is logged, evaluated or saved."""


class LossMeter:
    """Collects the losses of steps. They stay on the device until they are read: no step waits for the host."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._pending: list[Tensor] = []
        self._clock = time.monotonic()
        self._sum, self._steps, self._time = 0.0, 0, TrainingTime()
        self.logged_step = 0
        """Steps done at the newest line about training."""
        self.train_time = TrainingTime()
        """Time of training of all attempts, up to their last checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, so that the mean of a line is the same after an interruption."""
        return {
            "logged_step": self.logged_step,
            "sum": self._sum,
            "steps": self._steps,
            "seconds": self._time.seconds,
            "peak_flops": self._time.peak_flops,
            "train_seconds": self.train_time.seconds,
            "train_peak_flops": self.train_time.peak_flops,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.logged_step, self._sum, self._steps = state["logged_step"], state["sum"], state["steps"]
        self._time = TrainingTime(state["seconds"], state.get("peak_flops"))
        self.train_time = TrainingTime(state["train_seconds"], state.get("train_peak_flops"))

    def add(self, losses: Tensor) -> None:
        """Add the losses of a step, each summed over the samples of one virtual rank: [v]."""
        self._pending.append(losses)

    @property
    def is_full(self) -> bool:
        """Whether the losses should be read, to bound the memory; the answer is the same on all processes."""
        return len(self._pending) >= _MAX_PENDING

    def restart_clock(self) -> None:
        """Do not count the time since the last step as training."""
        self._clock = time.monotonic()

    def read(self, step: int) -> None:
        """Sum the losses since the last call over all processes; `step` steps are done.

        Raises:
            DivergedError: on all processes; names the first step whose loss is not finite.
        """
        if not self._pending:
            return
        sums = self._sums()
        for index, value in enumerate(sums, step - len(sums)):
            if not math.isfinite(value):
                raise diverged(self._job, index, f"the loss is {value / self._job.order.global_batch_size}")
            self._sum += value
        seconds = time.monotonic() - self._clock
        self._steps += len(sums)
        for each in (self._time, self.train_time):
            each.add(seconds, self._job.flops.peak)
        self.restart_clock()

    def _sums(self) -> list[float]:
        """Return the sum over the global batch of each pending step; the same bits on any number of processes."""
        pending, ranks = torch.stack(self._pending), self._job.virtual_ranks
        self._pending.clear()
        # Each virtual rank has its own column: all processes but one add zeros to it, which changes no bits.
        columns = pending.new_zeros(len(pending), ranks[0].size)
        columns[:, ranks[0].rank : ranks[-1].rank + 1] = pending
        rows: list[list[float]] = self._job.runtime.collectives.sum(columns).tolist()
        return [sum_in_order(row) for row in rows]

    def take_line(self, step: int, profile: Profile) -> dict[str, Any]:
        """Return a line of metrics.jsonl about the steps since the last one; the next one begins here."""
        job, batch_size = self._job, self._job.order.global_batch_size
        steps, seconds = range(step - self._steps, step), self._time.seconds
        images = len(steps) * batch_size
        rates = {"images_per_second": images / max(seconds, 1e-9), **job.flops.rates(steps, batch_size, self._time)}
        fractions = profile.take(seconds, job.model.distributed.exchange_fraction())
        line = {
            "epoch": job.epoch(step),
            "train/loss": self._sum / images,
            "train/lr": job.learning_rate(step - 1),
            **{f"train/{name}": value for name, value in rates.items() if value is not None},
            **{f"profile/{name}": round(part, 5) for name, part in fractions.items()},
        }
        self.logged_step, self._sum, self._steps, self._time = step, 0.0, 0, TrainingTime()
        return line


def check_weights(job: Job, step: int) -> None:
    """Check the weights after `step` steps before they are saved or scored: no loss has seen the last update yet.

    Raises:
        DivergedError: they are not finite.
    """
    if not job.model.is_finite():
        raise diverged(job, step - 1, "the weights are no longer finite")


def diverged(job: Job, step: int, what: str) -> DivergedError:
    """Return the error for a step (counted from 0) that failed, with the last good checkpoint."""
    # The checkpoint of `step` steps done holds the weights that this step failed with.
    good = [done for done in checkpoint.steps(job.checkpoints) if done < max(step, 1)]
    path = checkpoint.path_of(job.checkpoints, good[0]) if good else "none"
    return DivergedError(
        f"{what} at step {step + 1:,}, at learning rate {job.learning_rate(step):.3g};"
        f" last good checkpoint: {path}. Lower train.lr, or set train.clip_norm"
    )
