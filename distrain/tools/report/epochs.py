"""The table of a run by epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from distrain.runs.folder import RunRecord
from distrain.text import clock, percent, plural
from distrain.tools.report import charts


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"  # of a run that diverges


_COLUMNS: list[tuple[str, str, Callable[[float], str]]] = [
    ("train loss", "train/loss", _loss),
    ("train accuracy", "train/accuracy", percent),
    ("val loss", "val/loss", _loss),
    ("val accuracy", "val/accuracy", percent),
    ("test loss", "test/loss", _loss),
    ("test accuracy", "test/accuracy", percent),
    ("learning rate", "train/lr", lambda value: f"{value:.3g}"),
    ("gradient norm", "train/grad_norm", lambda value: f"{value:.3g}"),
    ("images/s", "train/images_per_second", lambda value: f"{value:,.0f}"),
]
_MEANS = ("train/loss", "train/accuracy", "train/grad_norm", "train/images_per_second")
"""Keys whose lines are averages since the line before; of the others, the last value of an epoch is shown."""


_MAX_ROWS = 300
"""Epochs in the table: of a longer run, the last ones."""


class Table(NamedTuple):
    """A title, headings, and rows of texts."""

    title: str
    head: list[str]
    rows: list[list[str]]


def table(record: RunRecord) -> Table:
    """Return a row for each epoch in which something was logged; columns that have no value are omitted."""
    per_epoch = record.setup["steps_per_epoch"]
    epochs: dict[int, list[dict[str, Any]]] = {}
    for line in _with_steps(charts.lines_of(record)):
        epochs.setdefault(max(1, -(-line["step"] // per_epoch)), []).append(line)
    values = [{key: _value(lines, key) for _, key, _ in _COLUMNS} for lines in epochs.values()]
    shown = [column for column in _COLUMNS if any(row[column[1]] is not None for row in values)]
    rows = []
    for (epoch, lines), row in sorted(zip(epochs.items(), values, strict=True), key=lambda pair: pair[0][0]):
        texts = ["–" if (value := row[key]) is None else show(value) for _, key, show in shown]
        times = [line["seconds"] for line in lines if "seconds" in line]
        time = clock(max(times)) if times else "–"
        rows.append([f"{epoch:,}", f"{max(line['step'] for line in lines):,}", *texts, time])
    title = plural(len(rows), "epoch") if len(rows) <= _MAX_ROWS else f"The last {_MAX_ROWS} of {len(rows):,} epochs"
    head = ["epoch", "step", *(name for name, *_ in shown), "time"]
    return Table(f"{title}; averages of training over each epoch", head, rows[-_MAX_ROWS:])


def _with_steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines, with the number of steps that those of training cover as `covered`."""
    last, counted = 0, []
    for line in lines:
        if "train/loss" in line:
            counted.append({**line, "covered": max(1, line["step"] - last)})
            last = line["step"]
        else:
            counted.append(line)
    return counted


def _value(lines: list[dict[str, Any]], key: str) -> float | None:
    """Return the value of a metric in an epoch; None if it was not logged."""
    logged = [line for line in lines if np.isfinite(line.get(key, np.nan))]
    if not logged:
        return None
    if key not in _MEANS:
        return float(logged[-1][key])
    return float(np.average([line[key] for line in logged], weights=[line.get("covered", 1) for line in logged]))
