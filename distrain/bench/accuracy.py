"""Accuracy and the time it takes: two epochs of the plain script (`distrain.bench.plain`), then a recipe that is
evaluated four times an epoch until its end. Repeat k has seed k.

"seconds" are of training: reading and decoding included, start and evaluation not. "clock" is the run's own, from the
start of distrain's work in its process: the set-up and earlier evaluations included.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distrain import config
from distrain.bench.context import Context, take_turns
from distrain.bench.members import write_folders
from distrain.bench.processes import call
from distrain.bench.table import Row, Table, ratio


class Point(NamedTuple):
    """An evaluation."""

    accuracy: float
    seconds: float
    clock: float


def measure(context: Context) -> Table:
    """Accuracies, and the time until the recipe has the script's mean accuracy."""
    folder = context.images or write_folders(context.dataset, context.work / "all-files", sys.maxsize)
    plains: list[dict[str, float]] = []
    curves: list[list[Point]] = []

    def plain() -> float:
        asked = [sys.executable, "-m", "distrain.bench.plain", str(folder), "--seed", str(len(plains))]
        plains.append(json.loads(call([*asked, "--device", context.device], threads=None)))
        return 100 * plains[-1]["accuracy"]

    def recipe() -> float:
        curves.append(list(_curve(_train(context, seed=len(curves)))))
        return 100 * curves[-1][-1].accuracy

    found = take_turns("accuracy", {"plain script, two epochs": plain, context.recipe.name: recipe}, context.repeats)
    target = statistics.fmean(one["accuracy"] for one in plains)
    reached = [next((point for point in curve if point.accuracy >= target), None) for curve in curves]
    rows = [Row(name, "%", samples) for name, samples in found.items()]
    rows.append(Row("plain script, two epochs", "s", [one["seconds"] for one in plains]))
    missed = [seed for seed, point in enumerate(reached) if point is None]
    if missed:
        return Table(_title(context), rows, [], [f"{100 * target:.2f} % was not reached by seeds {missed}"])
    for name in ("seconds", "clock"):
        samples = [getattr(point, name) for point in reached]
        rows.append(Row(f"{context.recipe.name} until {100 * target:.2f} %, {name}", "s", samples))
    return Table(_title(context), rows, [ratio(rows[2], rows[3]), ratio(rows[2], rows[4])])


def _title(context: Context) -> str:
    return f"Accuracy on {context.device}, {context.recipe.name} in {_processes(context)} processes"


def _processes(context: Context) -> int:
    return min(2, context.most_processes)


def _train(context: Context, seed: int) -> Path:
    """A run of the recipe."""
    run = context.work / "recipe"
    shutil.rmtree(run, ignore_errors=True)
    batch = config.load(context.recipe).train.global_batch_size
    every = max(1, context.dataset.split("train").samples // batch // 4)
    keys = {
        "data.dir": context.data,
        "run.dir": run,
        "run.seed": seed,
        "run.device": context.device,
        "eval.every_steps": every,
        "log.every_steps": every,
    }
    asked = [f"{key}={value}" for key, value in keys.items()]
    start = [sys.executable, "-m", "distrain", "launch", "--nproc", str(_processes(context)), "--"]
    call([*start, "train", "--config", str(context.recipe), *asked])
    return run


def _curve(run: Path) -> Iterator[Point]:
    """The evaluations of a run."""
    batch = config.load(run / "config.yaml").train.global_batch_size
    trained, clock, logged = 0.0, 0.0, 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values: dict[str, Any] = json.loads(line)
        if "train/images_per_second" in values:  # comes before the evaluation of the same step
            trained += (values["step"] - logged) * batch / values["train/images_per_second"]
            clock, logged = values["seconds"], values["step"]
        elif "test/accuracy" in values:
            yield Point(values["test/accuracy"], trained, clock)
