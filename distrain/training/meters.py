"""Training loss, accuracy and speed since the last line of metrics.jsonl; peaks of memory."""

from __future__ import annotations

import logging
import math
import socket
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distrain import machine
from distrain.distributed.busy_clock import BusyTime
from distrain.distributed.numerics import sum_in_order
from distrain.distributed.runtime import Runtime
from distrain.errors import DivergedError
from distrain.runs import checkpoint
from distrain.training import slow_ranks
from distrain.training.flops import TrainingTime
from distrain.training.job import Job
from distrain.training.profiling import Profile

log = logging.getLogger("distrain")

_MAX_PENDING = 4096
"""Losses that are kept before they are read, where nothing is logged, evaluated or saved."""


class StepResult(NamedTuple):
    """The sums and the norm that a step has computed, on the device: reading them waits for it.

    Attributes:
        sums: of each virtual rank, the sum of its losses, and the number of its samples whose class was predicted, but
            not where labels are mixed: fp64 [v, 2] or [v, 1].
        grad_norm: L2 norm of the complete gradient before clipping: []; None where it was not asked for.
    """

    sums: Tensor
    grad_norm: Tensor | None


class TrainAccuracy:
    """Counts the training samples whose class was predicted, as they were trained: augmented, and before the update.

    A count is None where it is not known: nothing is counted where labels are mixed.
    """

    def __init__(self, steps_per_epoch: int, batch_size: int) -> None:
        self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
        self._line: int | None = 0
        self._epoch: int | None = 0
        self._last_epoch: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"line": self._line, "epoch": self._epoch, "last_epoch": self._last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._line, self._epoch, self._last_epoch = (state.get(name) for name in ("line", "epoch", "last_epoch"))

    def add(self, step: int, correct: int | None) -> None:
        """Add the count of a step, counted from 0."""
        self._line, self._epoch = _plus(self._line, correct), _plus(self._epoch, correct)
        if (step + 1) % self._steps_per_epoch == 0:
            self._last_epoch, self._epoch = self._epoch, 0

    def take_line(self, steps: int) -> float | None:
        """Return the accuracy since the last line, which was `steps` steps ago; the next one begins here."""
        correct, self._line = self._line, 0
        return correct / (steps * self._batch_size) if correct is not None else None

    def of_last_epoch(self, step: int) -> float | None:
        """Return the accuracy in the last complete epoch, after `step` steps; before its end, that of all steps."""
        complete = step >= self._steps_per_epoch
        correct, steps = (self._last_epoch, self._steps_per_epoch) if complete else (self._epoch, step)
        return correct / (steps * self._batch_size) if correct is not None and steps else None


def _plus(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


class LossMeter:
    """Collects the losses of steps, and what else they have computed.

    All of it stays on the device until it is read: no step waits for the host.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._pending: list[Tensor] = []
        self._pending_norm: Tensor | None = None
        self._grad_norm: float | None = None
        self.accuracy = TrainAccuracy(job.order.steps_per_epoch, job.order.global_batch_size)
        self._clock = time.monotonic()
        self._sum, self._steps, self._time = 0.0, 0, TrainingTime()
        self._streak = slow_ranks.Streak()
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
            "correct": self.accuracy.state_dict(),
            "grad_norm": self._grad_norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.logged_step, self._sum, self._steps = state["logged_step"], state["sum"], state["steps"]
        self._time = TrainingTime(state["seconds"], state.get("peak_flops"))
        self.train_time = TrainingTime(state["train_seconds"], state.get("train_peak_flops"))
        self.accuracy.load_state_dict(state.get("correct", {}))
        self._grad_norm = state.get("grad_norm")

    def add(self, result: StepResult) -> None:
        """Add what a step has computed."""
        self._pending.append(result.sums)
        if result.grad_norm is not None:
            self._pending_norm = result.grad_norm

    @property
    def is_full(self) -> bool:
        """Whether the losses should be read, to bound the memory; the answer is the same on all processes."""
        return len(self._pending) >= _MAX_PENDING

    def restart_clock(self) -> None:
        """Do not count the time since the last step as training."""
        self._clock = time.monotonic()

    def read(self, step: int) -> None:
        """Sum the losses since the last call over all processes, and read the norm; `step` steps are done.

        Raises:
            DivergedError: on all processes; names the first step whose loss is not finite.
        """
        if not self._pending:
            return
        sums = self._sums()
        for index, (loss, *correct) in enumerate(sums, step - len(sums)):
            if not math.isfinite(loss):
                raise diverged(self._job, index, f"the loss is {loss / self._job.order.global_batch_size}")
            self._sum += loss
            self.accuracy.add(index, int(correct[0]) if correct else None)
        if self._pending_norm is not None:
            norm, self._pending_norm = float(self._pending_norm), None
            self._grad_norm = norm if math.isfinite(norm) else None  # fp16's scaler skips such a step
        seconds = time.monotonic() - self._clock
        self._steps += len(sums)
        for each in (self._time, self.train_time):
            each.add(seconds, self._job.flops.peak)
        self.restart_clock()

    def _sums(self) -> list[list[float]]:
        """Return the sums over the global batch of each pending step; the same bits on any number of processes."""
        pending, ranks = torch.stack(self._pending), self._job.virtual_ranks
        self._pending.clear()
        # Each virtual rank has its own place: all processes but one add zeros to it, which changes no bits.
        by_rank = pending.new_zeros(len(pending), ranks[0].size, pending.shape[2])
        by_rank[:, ranks[0].rank : ranks[-1].rank + 1] = pending
        steps: list[list[list[float]]] = self._job.runtime.collectives.sum(by_rank).tolist()
        return [[sum_in_order(values) for values in zip(*of_step, strict=True)] for of_step in steps]

    def take_line(self, step: int, profile: Profile) -> dict[str, Any]:
        """Return a line of metrics.jsonl about the steps since the last one; the next one begins here; a collective."""
        job, batch_size = self._job, self._job.order.global_batch_size
        steps, seconds = range(step - self._steps, step), self._time.seconds
        images = len(steps) * batch_size
        rates = {"images_per_second": images / max(seconds, 1e-9), **job.flops.rates(steps, batch_size, self._time)}
        fractions = profile.take(seconds, job.model.distributed.exchange_fraction())
        values = {"accuracy": self.accuracy.take_line(self._steps), "grad_norm": self._grad_norm, **rates}
        slowest, peaks = self._compare_processes()
        line = {
            "epoch": job.epoch(step),
            "train/loss": self._sum / images,
            "train/lr": job.learning_rate(step - 1),
            **{f"train/{name}": value for name, value in values.items() if value is not None},
            **{f"profile/{name}": round(part, 5) for name, part in fractions.items()},
            **slowest,
            **{f"memory/{name}_gib": peak for name, peak in peaks.items()},
        }
        self.logged_step, self._sum, self._steps, self._time = step, 0.0, 0, TrainingTime()
        self._grad_norm = None
        return line

    def _compare_processes(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the slowest process as metrics, and the highest peaks of memory; warn of a process that stays slow."""
        runtime, busy = self._job.runtime, self._job.model.distributed.busy.take()
        peaks = peak_memory(runtime.device)
        rows = runtime.collectives.gather([self._time.seconds, *peaks.values(), *(busy or ())])
        columns = list(zip(*rows, strict=True))
        highest = {name: max(values) for name, values in zip(peaks, columns[1:], strict=False)}
        if busy is None:  # on all processes
            return {}, highest
        slowest = slow_ranks.find_slowest([BusyTime(*row[1 + len(peaks) :]) for row in rows])
        before, self._streak = self._streak, slow_ranks.next_streak(self._streak, slowest, rows[0][0])
        if self._streak.is_long and not before.is_long:
            device = str(runtime.device) if runtime.device.type == "cuda" else "cpu"
            where = runtime.collectives.from_all((socket.gethostname(), device))
            if runtime.is_main:
                log.warning("%s", slow_ranks.warning(slowest, *where[slowest.rank]))
        if not slowest.is_slow:
            return {}, highest
        return {"train/slowest_rank": slowest.rank, "train/slowest_factor": round(slowest.factor, 3)}, highest


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peaks of this process since it began, in GiB.

    Returns:
        `host`: resident memory; `device`, for a GPU: memory that torch has allocated on it.
    """
    peaks = {"host": machine.peak_memory()}
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return {name: round(peak / 2**30, 3) for name, peak in peaks.items()}


def peak_memory_of_all(runtime: Runtime) -> dict[str, float | None]:
    """Return the highest peaks of all processes, in GiB; `device` is None without GPUs. A collective."""
    of_each = runtime.collectives.from_all(peak_memory(runtime.device))
    return {name: max((each[name] for each in of_each if name in each), default=None) for name in ("host", "device")}


def check_weights(job: Job, step: int) -> None:
    """Check the weights after `step` steps before they are saved or scored: no loss has seen the last update yet.

    Raises:
        DivergedError: they are not finite.
    """
    if not job.model.is_finite():
        raise diverged(job, step - 1, "the weights are no longer finite")


def diverged(job: Job, step: int, what: str) -> DivergedError:
    """Return the error for a step (counted from 0) that failed; the trainer adds the last good checkpoint."""
    error = DivergedError(f"{what} at step {step + 1:,}, at learning rate {job.learning_rate(step):.3g}")
    error.step = step
    return error


def with_cure(job: Job, error: DivergedError) -> DivergedError:
    """Return the error with the last good checkpoint that is on disk, and what to do."""
    # The checkpoint of `step` steps done holds the weights that this step failed with.
    good = [done for done in checkpoint.steps(job.checkpoints) if done < max(error.step, 1)]
    path = checkpoint.path_of(job.checkpoints, good[0]) if good else "none"
    return DivergedError(f"{error}; last good checkpoint: {path}. Lower train.lr, or set train.clip_norm")
