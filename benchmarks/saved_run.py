"""A run that saves checkpoints, timed step by step; a program, so that the process is fresh.

    python -m benchmarks.saved_run DATA RUN DEVICE EVERY

A checkpoint is saved every EVERY steps; the run has three times as many, and scores nothing before its end. Prints a
JSON object: `step`, the median seconds of a step without a save; `stalls`, the seconds by which the step with a save is
longer; `costs`, the seconds by which it and all steps until the next save are longer: they may be slower meanwhile.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from math import prod

from torch import nn

import distrain
from distrain.distributed.watchdog import Watchdog


class Large(nn.Sequential):
    """Has as many weights as `resnet50`, 25.2 million, and needs little time for a step."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        hidden = [layer for _ in range(21) for layer in (nn.ReLU(), nn.Linear(1024, 1024))]
        super().__init__(nn.Flatten(), nn.Linear(prod(image_shape), 1024), *hidden, nn.Linear(1024, num_classes))


def main() -> None:
    """Train, and print the times."""
    data, run, device, every = sys.argv[1:]
    times: list[float] = []
    real = Watchdog.step

    def step(self: Watchdog, done: int) -> None:
        real(self, done)
        times.append(time.perf_counter())

    Watchdog.step = step  # type: ignore[method-assign]
    distrain.train(
        {
            "data": {"dir": data},
            "run": {"dir": run, "device": device},
            "model": {"name": "benchmarks.saved_run:Large"},
            "train": {"epochs": None, "max_steps": 3 * int(every), "global_batch_size": 16, "lr": 0.001},
            "eval": {"every_steps": 0},
            "checkpoint": {"every_steps": int(every), "every_minutes": 0},
            "log": {"report": False, "every_steps": int(every)},
        }
    )
    print(json.dumps(costs(times, int(every))))


def costs(times: Sequence[float], every: int) -> dict[str, object]:
    """Compute the times of steps and saves from the times at which 0, 1, 2 … steps were done."""
    seconds = [after - before for before, after in itertools.pairwise(times)]
    # Step `every` is the first one after a save; before it, nothing is written, and the first steps are slower.
    median = statistics.median(seconds[every // 3 : every])
    rounds = [seconds[begin : begin + every] for begin in (every, 2 * every)]
    return {
        "step": median,
        "stalls": [each[0] - median for each in rounds],
        "costs": [sum(each) - every * median for each in rounds],
    }


if __name__ == "__main__":
    main()
