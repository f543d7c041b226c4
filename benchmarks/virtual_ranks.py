"""Virtual ranks: the time of a step with them, compared with a step without, on 1, 2 … processes.

For each model and global batch: none, one for each process, and 8. The first fifth of the steps is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.commands import speed_after_warm_up, timed_keys, train
from benchmarks.context import Context, take_turns
from benchmarks.table import Table, ratio

_NUMBER = 8
_FEW_STEPS = 5
"""Steps of a timed run of models that take seconds for one."""


def measure(context: Context) -> Table:
    """Measure milliseconds of a step by model, global batch, processes and number of virtual ranks."""
    contestants: dict[str, Callable[[], float]] = {}
    pairs: list[tuple[str, str]] = []
    most = min(_NUMBER, context.dataset.split("train").lanes)
    for model in context.models:
        for batch in context.batches[:1] if _takes_seconds(context, model) else context.batches:
            for size in (1, 2) if context.max_processes > 1 else (1,):
                name = f"{model}, batch {batch}, {size} processes" if size > 1 else f"{model}, batch {batch}, 1 process"
                contestants[name] = partial(_step, context, model, batch, size, None)
                for number in dict.fromkeys((size, most)):
                    virtual = f"{name}, {number} virtual ranks"
                    contestants[virtual] = partial(_step, context, model, batch, size, number)
                    pairs.append((virtual, name))
    rows = take_turns("virtual_ranks", "ms", contestants, context.repeats)
    return Table(
        f"A step with virtual ranks on {context.device}",
        list(rows.values()),
        [ratio(rows[name], rows[baseline]) for name, baseline in pairs],
        ["a ratio of 1 is no cost"],
    )


def _takes_seconds(context: Context, model: str) -> bool:
    return context.device == "cpu" and model != "net"


def _step(context: Context, model: str, batch: int, size: int, virtual_ranks: int | None) -> float:
    """Train, and return the milliseconds of a step."""
    keys = timed_keys(context, model, batch // size, size)
    if _takes_seconds(context, model):
        keys |= {"train.max_steps": _FEW_STEPS, "log.every_steps": 1}
    if virtual_ranks is not None:
        keys["train.virtual_ranks"] = virtual_ranks
    run = context.work / "virtual"
    train(context, run, keys, size)
    return 1000 * batch / speed_after_warm_up(run).images_per_second
