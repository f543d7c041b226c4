"""The content of a run's folder, from Python."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrain.api.arguments import path_of
from distrain.api.result import Result, TrainingResult, of_record
from distrain.config import Config
from distrain.errors import DataError
from distrain.runs import checkpoint, folder
from distrain.runs.folder import REPORT, RunRecord
from distrain.text import shown
from distrain.tools.status import State, goodput_of, state_of


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint in a run's folder.

    Attributes:
        step: optimizer steps done.
        path: its folder.
        accuracy: on val, or on test without a val split; None if the run was not evaluated at this step.
    """

    step: int
    path: Path
    accuracy: float | None

    @property
    def name(self) -> str:
        """Name of the folder, such as `step-00001234`: what `evaluate` and `load_model` take as `checkpoint`."""
        return self.path.name


@dataclass(frozen=True)
class Run:
    """The content of a run's folder at the time when it was read.

    Attributes:
        folder: the run's folder.
        config: its configuration, with all defaults.
        state: `not started`, `running`, `done`, `stopped` (it can be resumed), `failed`, `killed` (its process ended
            without a report) or `unknown` (it runs on another host and does not renew its lease, or no record says).
        reason: the same in a sentence, with the exit code and the error.
        steps: number of optimizer steps that the run has in all; None if it has not started.
        classes: names of the classes; empty if it has not started.
        result: its result; None until it is done.
        evaluations: results of `evaluate`, sorted by the names of their files.
        checkpoints: its checkpoints, oldest first.
        attempts: number of times that a job took the folder.
        goodput: part of the wall time of all attempts that was spent in steps that counted (so far); None at first.
        problems: one message for each file that is damaged and was passed over.
    """

    folder: Path
    config: Config = field(repr=False)
    state: State
    reason: str
    steps: int | None
    classes: tuple[str, ...] = field(repr=False)
    result: TrainingResult | None = field(repr=False)
    evaluations: tuple[Result, ...] = field(repr=False)
    checkpoints: tuple[SavedCheckpoint, ...] = field(repr=False)
    attempts: int
    goodput: float | None
    problems: tuple[str, ...]
    _lines: tuple[Mapping[str, Any], ...] = field(repr=False)

    @functools.cached_property
    def metrics(self) -> dict[str, NDArray[np.float64]]:
        """The metrics as columns of one length, with a row for each step that has any: `step`, `train/loss` …

        A metric that a step does not have is NaN there; `series` drops these. Each column is float64.
        """
        rows: dict[int, dict[str, float]] = {}
        for line in self._lines:
            numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
            rows.setdefault(line["step"], {}).update(numbers)
        names = dict.fromkeys(name for row in rows.values() for name in row)
        return {
            name: np.array([row.get(name, np.nan) for _, row in sorted(rows.items())], np.float64) for name in names
        }

    def series(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the steps that have a metric, int64 [n], and its values, float64 [n].

            steps, losses = run.series("train/loss")

        Raises:
            distrain.DataError: the run has no such metric.
        """
        if name not in self.metrics:
            names = ", ".join(self.metrics) or "none yet"
            raise DataError(f"{self.folder}: has no metric {shown(name)}; there are: {names}")
        values = self.metrics[name]
        present = ~np.isnan(values)
        return self.metrics["step"][present].astype(np.int64), values[present]


def open_run(run: str | os.PathLike[str]) -> Run:
    """Read what the folder of a run holds: configuration, metrics, result, checkpoints, and how it ended.

        run = distrain.open_run("runs/first")
        print(run.state, run.checkpoints[-1].step)

    The run may be training, here or elsewhere. Weights are not read, and nothing is changed.

    Args:
        run: the run's folder.

    Raises:
        distrain.DataError: the folder holds no run.
    """
    path = path_of("run", run)
    record = folder.read(path)
    problems = list(record.problems)
    evaluations = folder.read_evaluations(path, problems)
    state, reason = state_of(record)
    return Run(
        folder=path,
        config=record.config,
        state=state,
        reason=reason,
        steps=record.setup.get("steps"),
        classes=tuple(record.classes),
        result=_result(record),
        evaluations=tuple(of_record(Result, each, run=path) for each in evaluations),
        checkpoints=_checkpoints(record),
        attempts=max((attempt["attempt"] for attempt in record.attempts), default=0),
        goodput=goodput_of(record).fraction,
        problems=tuple(problems),
        _lines=tuple(record.lines),
    )


def _result(record: RunRecord) -> TrainingResult | None:
    if record.result is None:
        return None
    report = record.folder / REPORT / "index.html"
    return of_record(
        TrainingResult, record.result, run=record.folder, split="test", report=report if report.is_file() else None
    )


def _checkpoints(record: RunRecord) -> tuple[SavedCheckpoint, ...]:
    split = "val" if "val" in record.setup.get("data", {}).get("splits", {}) else "test"
    key = f"{split}/accuracy"
    accuracies = {line["step"]: line[key] for line in record.lines if key in line}
    folders = record.folder / checkpoint.FOLDER
    return tuple(
        SavedCheckpoint(step, checkpoint.path_of(folders, step), accuracies.get(step)) for step in record.checkpoints
    )
