"""Images/s of W processes of one thread or GPU each, every one with the same batch, under `distrain launch`; beside it
the sum of W runs of one process that know nothing of each other, started at once: what the machine itself allows.

The first fifth of the steps is not counted. Shards are read in every epoch (data.cache=off).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

from distrain.tools.bench.context import Context, take_turns
from distrain.tools.bench.processes import call, call_all, steady, step_keys, train_command
from distrain.tools.bench.reader import order_of
from distrain.tools.bench.table import Row, Table, ratio


def measure(context: Context) -> Table:
    """Images/s by the number of processes and the batch of each."""
    contestants: dict[str, Callable[[], float]] = {}
    pairs: list[tuple[str, str]] = []
    for batch in context.batches:
        sizes = worlds(context, batch)
        for size in sizes:
            contestants[_name(batch, size, True)] = partial(_launched, context, batch, size)
            if size > 1:
                contestants[_name(batch, size, False)] = partial(_independent, context, batch, size)
                pairs += [(_name(batch, size, True), _name(batch, other, other == 1)) for other in (1, size)]
    found = take_turns("scaling", contestants, context.repeats)
    rows = {name: Row(name, "images/s", samples) for name, samples in found.items()}
    ratios = [ratio(rows[above], rows[below]) for above, below in pairs]
    return Table(
        f"Scaling on {context.device}, {context.models[0]}",
        list(rows.values()),
        ratios,
        [f"{context.most_processes} {'GPUs' if context.device == 'cuda' else 'cores'}"],
    )


def worlds(context: Context, batch: int) -> list[int]:
    """1, 2, 4 … and the most: of as many processes as there are cores or GPUs, and as the data set allows."""
    split = context.dataset.split("train")
    used = order_of(context.dataset, batch).samples_per_shard * len(split.shards)
    most = min(context.most_processes, split.lanes, used // batch)
    return sorted({most, *(2**power for power in range(most.bit_length()))})


def _name(batch: int, size: int, together: bool) -> str:
    return f"batch {batch} × {size}" if together else f"batch {batch}, {size} runs at once"


def _launched(context: Context, batch: int, size: int) -> float:
    run = context.work / "launched"
    shutil.rmtree(run, ignore_errors=True)
    call(train_command(context, run, step_keys(context, context.models[0], batch, size), size))
    return steady(run).rate


def _independent(context: Context, batch: int, size: int) -> float:
    runs = [context.work / f"independent-{number}" for number in range(size)]
    for run in runs:
        shutil.rmtree(run, ignore_errors=True)
    keys = step_keys(context, context.models[0], batch)
    call_all([train_command(context, run, keys) for run in runs], gpus=context.device == "cuda")
    return sum(steady(run).rate for run in runs)
