"""Launches: the operations that a step of --recipe sends to its device, and the time in which the host sends them.

The step runs on torch's device `meta`, which computes nothing: no GPU is needed, and what is timed is the host alone.
Operations are counted as they are dispatched, without compilation and in fp32: `train.compile` merges many of them, and
mixed precision adds conversions. Each is one kernel or a few.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from benchmarks.context import Context
from benchmarks.meta_device import META, Launches, batches_on_meta, fused_optimizers_skipped, job_on_meta
from benchmarks.table import Row, Table
from distrain import config
from distrain.data.rounds import Batch
from distrain.training.profiling import Profile
from distrain.training.step import TrainingStep

_WARM_UP_STEPS, _TIMED_STEPS = 2, 20


def measure(context: Context) -> Table:
    """Measure operations by part of a step, and milliseconds of the host."""
    with job_on_meta(_tree(context)) as job:
        step, batches = TrainingStep(job, Profile(META)), batches_on_meta(job)
        for number in range(_WARM_UP_STEPS):  # the first steps fill tables and states
            with Launches():
                step(number, batches)
        with Launches() as count:
            step(_WARM_UP_STEPS, batches)
        with fused_optimizers_skipped():
            milliseconds = [_milliseconds(step, batches) for _ in range(context.repeats)]
    return Table(
        f"A step of {context.recipe.name}, without compilation, in fp32",
        [*_rows(count.parts), Row("all operations", "launches", [count.total]), Row("host", "ms", milliseconds)],
        notes=["the host's time contains torch's computation of shapes, which is slower on `meta` than on a GPU"],
    )


def _milliseconds(step: TrainingStep, batches: list[Batch]) -> float:
    started = time.perf_counter()
    for number in range(_TIMED_STEPS):
        step(number, batches)
    return 1000 * (time.perf_counter() - started) / _TIMED_STEPS


def _rows(parts: Counter[str]) -> list[Row]:
    return [Row(part, "launches", [number]) for part, number in parts.items()]


def _tree(context: Context) -> dict[str, Any]:
    """Return the recipe's configuration with what a run on `meta` needs."""
    tree = config.load(context.recipe).model_dump(exclude_unset=True)
    return {
        **tree,
        "run": {**tree.get("run", {}), "dir": str(context.work / "launches"), "device": "cpu"},
        "data": {**tree.get("data", {}), "dir": str(context.dataset.root), "cache": "off"},
        "train": {**tree.get("train", {}), "precision": "fp32", "compile": "off"},
    }
