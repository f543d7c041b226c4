"""Accuracy and the time it takes: two epochs of the plain script (`distrain.tools.bench.plain`), then a recipe that is
evaluated four times an epoch until its end. Repeat k has seed k. `--target` takes the place of the script.

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
from distrain.tools.bench.context import Context, take_turns
from distrain.tools.bench.members import write_folders
from distrain.tools.bench.processes import call
from distrain.tools.bench.table import Row, Table, ratio


class Point(NamedTuple):
    """An evaluation."""

    accuracy: float
    seconds: float
    clock: float


def measure(context: Context) -> Table:
    """Accuracies, and the time until the recipe has the script's mean accuracy."""
    plains: list[dict[str, float]] = []
    curves: list[list[Point]] = []

    def plain() -> float:
        plains.append(_plain(context, folder, seed=len(plains)))
        return 100 * plains[-1]["accuracy"]

    def recipe() -> float:
        curves.append(list(_curve(_train(context, seed=len(curves)))))
        return 100 * curves[-1][-1].accuracy

    contestants = {context.recipe.name: recipe}
    folder = context.images or context.work / "all-files"
    if context.target is None:
        if context.images is None:
            write_folders(context.dataset, folder, sys.maxsize)
        contestants = {"plain script, two epochs": plain, **contestants}
    found = take_turns("accuracy", contestants, context.repeats)
    rows = [Row(name, "%", samples) for name, samples in found.items()]
    if context.target is None:
        rows.append(Row("plain script, two epochs", "s", [one["seconds"] for one in plains]))
        target = statistics.fmean(one["accuracy"] for one in plains)
    else:
        target = context.target / 100
    reached = [next((point for point in curve if point.accuracy >= target), None) for curve in curves]
    missed = [seed for seed, point in enumerate(reached) if point is None]
    if missed:
        return Table(_title(context), rows, [], [f"{100 * target:.2f} % was not reached by seeds {missed}"])
    times = [
        Row(f"{context.recipe.name} until {100 * target:.2f} %, {name}", "s", [getattr(p, name) for p in reached])
        for name in ("seconds", "clock")
    ]
    ratios = [ratio(rows[-1], row) for row in times] if plains else []
    return Table(_title(context), [*rows, *times], ratios)


def _plain(context: Context, folder: Path, seed: int) -> dict[str, float]:
    """Two epochs of the plain script."""
    asked = [sys.executable, "-m", "distrain.tools.bench.plain", str(folder), "--seed", str(seed)]
    found: dict[str, float] = json.loads(call([*asked, "--device", context.device], threads=None))
    return found


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
