"""Scaling: images/s of W processes under `distrain launch`.

Each has one thread or GPU and the same batch. The comparison is the sum of W independent runs of one process, started
at once, which is the limit of the machine.

The first fifth of the steps is not counted. Shards are read in every epoch (data.cache=off).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

from benchmarks.commands import call_all, speed_after_warm_up, timed_keys, train, train_command
from benchmarks.context import Context, take_turns
from benchmarks.reader import training_order
from benchmarks.table import Table, ratio


def measure(context: Context) -> Table:
    """Measure images/s by the number of processes and the batch of each."""
    contestants: dict[str, Callable[[], float]] = {}
    pairs: list[tuple[str, str]] = []
    for batch in context.batches:
        for size in world_sizes(context, batch):
            launched, independent = f"batch {batch} × {size}", f"batch {batch}, {size} runs at once"
            contestants[launched] = partial(_launched, context, batch, size)
            if size > 1:
                contestants[independent] = partial(_independent, context, batch, size)
                pairs += [(launched, f"batch {batch} × 1"), (launched, independent)]
    rows = take_turns("scaling", "images/s", contestants, context.repeats)
    return Table(
        f"Scaling on {context.device}, {context.models[0]}",
        list(rows.values()),
        [ratio(rows[name], rows[baseline]) for name, baseline in pairs],
        [f"{context.max_processes} {'GPUs' if context.device == 'cuda' else 'cores'}"],
    )


def world_sizes(context: Context, batch: int) -> list[int]:
    """Return 1, 2, 4 … and the largest number of processes that the machine and the data set allow."""
    split = context.dataset.split("train")
    samples = training_order(context.dataset, batch).samples_per_shard * len(split.sizes)
    largest = min(context.max_processes, split.lanes, samples // batch)
    return sorted({largest, *(2**power for power in range(largest.bit_length()))})


def _launched(context: Context, batch: int, size: int) -> float:
    run = context.work / "launched"
    train(context, run, timed_keys(context, context.models[0], batch, size), size)
    return speed_after_warm_up(run).images_per_second


def _independent(context: Context, batch: int, size: int) -> float:
    runs = [context.work / f"independent-{number}" for number in range(size)]
    for run in runs:
        shutil.rmtree(run, ignore_errors=True)
    keys = timed_keys(context, context.models[0], batch)
    call_all([train_command(context, run, keys) for run in runs], gpus=context.device == "cuda")
    return sum(speed_after_warm_up(run).images_per_second for run in runs)
