"""The time of a run's steps by phase, measured in every run at almost no cost; torch's profiler on request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

from distrain.distributed.stopwatch import Stopwatch
from distrain.text import percent

Phase = Literal["start", "data", "copy", "log"]

_SAMPLED = 10
"""Interval of the steps in which copies are measured on a GPU."""

_ADVICE = {
    "data": (0.05, "steps wait for data: raise data.read_ahead, or data.cache=ram where it fits"),
    "copy": (0.25, "copying and augmenting take long: fewer augmentations, or data.cache=device on a GPU"),
    "reduce": (0.25, "gradients take long to reduce: a larger train.global_batch_size has fewer reductions an epoch"),
    "log": (0.05, "writing takes long: raise log.every_steps, or choose a faster disk for run.dir"),
}


_DECODING = (
    "steps wait for images that are read or decoded: give the processes more cores (data.decode_threads follows them),"
    " or smaller images; or raise data.read_ahead if the tar files are remote"
)


class Profile:
    """Seconds spent in each phase of the steps.

    start: until the first data of an attempt arrives; data: waiting for data; copy: batches are gathered, copied to the
    device and augmented; log: audit; reduce: all-reduce of gradients that no computation hides; compute: the rest.

    A GPU computes while the host waits, so data and copy are measured on the GPU's own clock: data is the time in which
    it has nothing to do because the next batch is not there, and copy what the computation does not hide.

    Args:
        device: the device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._host, self._device = Stopwatch(on_gpu=False), Stopwatch(self._on_gpu)
        self._number = 0
        self._steps = self._sampled_steps = 0
        self._copy_seconds = 0.0
        self._all: dict[str, float] = {}

    @property
    def _is_sampled(self) -> bool:
        """Whether the copies of this step are measured. The first step of an attempt is unusual."""
        return not self._on_gpu or self._number % _SAMPLED == 1

    def step(self) -> None:
        """Count a step."""
        self._sampled_steps += self._is_sampled
        self._steps += 1
        self._number += 1

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time within the block to a phase."""
        if name == "copy" and not self._is_sampled:
            yield
            return
        stopwatch = self._device if name in ("data", "copy") else self._host
        started = stopwatch.mark()
        try:
            yield
        finally:
            stopwatch.add(name, started, stopwatch.mark())

    def take(self, seconds: float, all_reduce: float) -> dict[str, float]:
        """Return the fraction of each phase in the time since the last call; together they are 1.

        Args:
            seconds: time of the steps since the last call, without the phase `start`.
            all_reduce: fraction of the computing time that waits for the all-reduce of gradients.
        """
        measured = self._host.take() | self._device.take()
        if self._sampled_steps:
            self._copy_seconds = measured.get("copy", 0.0) / self._sampled_steps
        measured["copy"] = self._copy_seconds * self._steps  # without a sample: as in the newest one
        self._steps = self._sampled_steps = 0
        in_steps = {name: min(measured.get(name, 0.0), seconds) for name in get_args(Phase) if name != "start"}
        rest = max(seconds - sum(in_steps.values()), 0.0)
        spent = {"start": measured.get("start", 0.0), **in_steps}
        spent |= {"reduce": rest * all_reduce, "compute": rest * (1 - all_reduce)}
        for name, value in spent.items():
            self._all[name] = self._all.get(name, 0.0) + value
        return _fractions(spent)

    def total(self) -> dict[str, float]:
        """Return the fraction of each phase in all steps of this attempt."""
        return _fractions(self._all)


def _fractions(spent: dict[str, float]) -> dict[str, float]:
    whole = sum(spent.values())
    return {name: value / whole for name, value in spent.items()} if whole else {}


def advice(fractions: dict[str, float], cached: bool, decodes: bool) -> list[str]:
    """Return advice if a phase takes too much time.

    Args:
        fractions: fraction of the time, by phase.
        cached: whether the train split is in memory already.
        decodes: whether images are decoded while training.
    """
    table = {**_ADVICE, "data": (0.05, _DECODING)} if decodes else _ADVICE
    names = [name for name in table if decodes or not (cached and name == "data")]
    return [table[name][1] for name in names if fractions.get(name, 0.0) > table[name][0]]


def format_fractions(fractions: dict[str, float]) -> str:
    """Format the fraction of each phase in one line."""
    return ", ".join(f"{name} {percent(fraction)}" for name, fraction in fractions.items())


class Tracer(Protocol):
    """Follows the steps of a run."""

    def step(self) -> None:
        """Count a step."""


class _NoTracer:
    def step(self) -> None:
        pass


@contextlib.contextmanager
def trace(folder: Path, steps: int, rank: int) -> Iterator[Tracer]:
    """Run torch's profiler over `steps` steps after the tenth; `step` of the yielded tracer is called after each one.

    Writes rank-00000.json, for Perfetto or chrome://tracing. With 0 steps nothing is traced.
    """
    if not steps:
        yield _NoTracer()
        return

    def write(profiler: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank-{rank:05d}.json"))

    schedule = torch.profiler.schedule(wait=9, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler
