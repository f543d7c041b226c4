"""Where the time of a run's steps goes: measured in every run, for next to nothing; and torch's profiler on request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch

Phase = Literal["start", "data", "copy", "log"]

_ADVICE = {
    "data": (0.05, "steps wait for data: raise data.read_ahead, or data.cache=ram where it fits"),
    "copy": (0.25, "copying and augmenting take long: fewer augmentations, or data.cache=device on a GPU"),
    "reduce": (0.25, "gradients take long to reduce: a larger train.global_batch_size has fewer reductions an epoch"),
    "log": (0.05, "writing takes long: raise log.every_steps, or choose a faster disk for run.dir"),
}


class Profile:
    """Seconds by phase.

    start: until the first data of an attempt are there; data: waited for it; copy: to the device, and augmenting (on a GPU,
    what the host does of it); log: audit; reduce: gradients that no computation hid, as DDP samples it; the rest
    computes.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(get_args(Phase), 0.0)
        self._all: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Around a part of a step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def shares(self, seconds: float, reducing: float) -> dict[str, float]:
        """Parts of the `seconds` since the last call, which sum to 1; `reducing`: the part of the rest that reduces."""
        spent = {name: min(value, seconds) for name, value in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        rest = max(seconds - sum(spent.values()), 0.0)
        spent |= {"reduce": rest * reducing, "compute": rest * (1 - reducing)}
        for name, value in spent.items():
            self._all[name] = self._all.get(name, 0.0) + value
        return _parts(spent)

    def total(self) -> dict[str, float]:
        """Parts of all steps of this attempt."""
        return _parts(self._all)


def _parts(spent: dict[str, float]) -> dict[str, float]:
    whole = sum(spent.values())
    return {name: value / whole for name, value in spent.items()} if whole else {}


def advice(parts: dict[str, float], cached: bool) -> list[str]:
    """What to change where a phase takes more than it should; `cached`: train is in memory already."""
    names = [name for name in _ADVICE if not (cached and name == "data")]
    return [_ADVICE[name][1] for name in names if parts.get(name, 0.0) > _ADVICE[name][0]]


def told(parts: dict[str, float]) -> str:
    """One line for people."""
    return ", ".join(f"{name} {part:.1%}" for name, part in parts.items())


def reducing(ddp: Any) -> float:
    """Part of a step's computation that waits for gradients to be reduced, as DDP samples it (1 step in 100); 0 where
    it has not measured yet, or there is one process.
    """
    if not hasattr(ddp, "_get_ddp_logging_data"):
        return 0.0
    found = ddp._get_ddp_logging_data()
    names = (
        "forward_compute_time",
        "backward_compute_time",
        "backward_comm_time",
        "backward_compute_comm_overlap_time",
    )
    forward, backward, comm, hidden = (int(found.get(f"avg_{name}", 0)) for name in names)
    exposed = max(comm - hidden, 0)
    return exposed / (forward + backward + exposed) if forward + backward else 0.0


@contextlib.contextmanager
def traced(folder: Path, steps: int, rank: int) -> Iterator[Any]:
    """torch's profiler over `steps` steps after the tenth; the value's `step` is called after each one. Writes
    rank-00000.json, for Perfetto or chrome://tracing.
    """
    if not steps:
        yield None
        return

    def write(profiler: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank-{rank:05d}.json"))

    schedule = torch.profiler.schedule(wait=9, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler
