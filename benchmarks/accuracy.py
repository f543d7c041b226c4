"""Accuracy, and the time to reach it.

Two epochs of the plain script (`benchmarks.plain_script`), then a recipe that is evaluated four times per epoch until
it ends. Repeat k uses seed k. With `--target`, the script is not run.

"seconds" are those of training: reading and decoding included, start-up and evaluation not. "clock" is the time since
`distrain train` began in its process, with set-up and earlier evaluations.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.commands import call, call_program
from benchmarks.context import Context, take_turns
from benchmarks.image_files import write_folders
from benchmarks.table import Row, Table, ratio
from distrain import config

_PLAIN = "plain script, two epochs"


class Evaluation(NamedTuple):
    """The accuracy of a run at some time."""

    accuracy: float
    seconds: float
    clock: float


def measure(context: Context) -> Table:
    """Measure accuracies, and the time until the recipe reaches the target or the script's mean accuracy."""
    plain_results: list[dict[str, float]] = []
    curves: list[list[Evaluation]] = []
    recipe_name, folder = context.recipe.name, context.images or context.work / "all-files"

    def plain() -> float:
        arguments = (folder, "--seed", len(plain_results), "--device", context.device)
        plain_results.append(call_program("plain_script", *arguments, threads=None))
        return 100 * plain_results[-1]["accuracy"]

    def recipe() -> float:
        curves.append(list(_evaluations(_train(context, seed=len(curves)))))
        return 100 * curves[-1][-1].accuracy

    contestants = {recipe_name: recipe}
    if context.target is None:
        if context.images is None:
            write_folders(context.dataset, folder)
        contestants = {_PLAIN: plain, **contestants}
    rows = list(take_turns("accuracy", "%", contestants, context.repeats).values())
    if context.target is None:
        rows.append(Row(_PLAIN, "s", [result["seconds"] for result in plain_results]))
        target = statistics.fmean(result["accuracy"] for result in plain_results)
    else:
        target = context.target / 100
    title = f"Accuracy on {context.device}, {recipe_name} in {_processes(context)} processes"
    reached = [next((point for point in curve if point.accuracy >= target), None) for curve in curves]
    failed_seeds = [seed for seed, point in enumerate(reached) if point is None]
    if failed_seeds:
        return Table(title, rows, notes=[f"{100 * target:.2f} % was not reached with seeds {failed_seeds}"])
    times = [
        Row(f"{recipe_name} until {100 * target:.2f} %, {name}", "s", [getattr(point, name) for point in reached])
        for name in ("seconds", "clock")
    ]
    ratios = [ratio(rows[-1], row) for row in times] if plain_results else []
    return Table(title, [*rows, *times], ratios)


def _processes(context: Context) -> int:
    return min(2, context.max_processes)


def _train(context: Context, seed: int) -> Path:
    """Train the recipe, and return the run's folder."""
    run = context.work / "recipe"
    shutil.rmtree(run, ignore_errors=True)
    batch = config.load(context.recipe).train.global_batch_size
    quarter_epoch = max(1, context.dataset.split("train").samples // batch // 4)
    keys = {
        "data.dir": context.dataset.root,
        "run.dir": run,
        "run.seed": seed,
        "run.device": context.device,
        "eval.every_steps": quarter_epoch,
        "log.every_steps": quarter_epoch,
    }
    overrides = [f"{key}={value}" for key, value in keys.items()]
    launch = [sys.executable, "-m", "distrain", "launch", "--nproc", str(_processes(context)), "--"]
    call([*launch, "train", "--config", str(context.recipe), *overrides])
    return run


def _evaluations(run: Path) -> Iterator[Evaluation]:
    """Yield the evaluations of a run, from its metrics."""
    batch = config.load(run / "config.yaml").train.global_batch_size
    seconds, clock, logged_step = 0.0, 0.0, 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values: dict[str, Any] = json.loads(line)
        if "train/images_per_second" in values:  # comes before the evaluation of the same step
            seconds += (values["step"] - logged_step) * batch / values["train/images_per_second"]
            clock, logged_step = values["seconds"], values["step"]
        elif "test/accuracy" in values:
            yield Evaluation(values["test/accuracy"], seconds, clock)
