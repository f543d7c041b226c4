"""The charts of a report, as positions, colours and texts, which charts.html writes as SVG.

SVG in the page needs no script: a chart is sharp at any width, has the page's colours in both themes, and its `<title>`
elements show the values under the pointer.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from distrain.runs import results
from distrain.runs.folder import RunRecord
from distrain.text import percent, printable, shortened_middle
from distrain.tools.report import axes
from distrain.tools.report.axes import Axis, Floats

WIDTH, HEIGHT = 400, 236
"""Size of a chart in its own pixels; the page scales it to the width of its column."""
LEFT, RIGHT, TOP, BOTTOM = 60, 394, 8, 192
"""Edges of the area inside the axes."""
MAX_COUNTS = 20
"""Number of classes up to which the cells of a confusion matrix have numbers."""
_NAME_LENGTH = 18
"""Letters of a name beside a confusion matrix."""
_MAX_NAMED, _MAX_DRAWN = 30, 100
"""Number of classes up to which a confusion matrix has names, and classes in it: of more, those with most mistakes."""
_MAX_POINTS, _MAX_POINTS_OF_MANY = 300, 100
"""Points of a curve. With more values, each point is the mean of several; their extremes are shown as a band."""
_MAX_COLUMNS = 120
"""Parts of a chart's width, each with the values that are shown under the pointer."""
_SPLITS = {"train": "", "val": "6 3", "test": "2 2"}
"""Dashes of the splits when several runs are compared: then the colour identifies the run."""
_COLOURS = ["#2f81f7", "#e16f24", "#2da44e", "#bf3989", "#9a6700", "#8250df", "#1b7c83", "#cf222e"]
"""Colours that are visible on a light and on a dark page."""
_PHASES = {
    "compute": "#2f81f7",
    "data": "#cf222e",
    "copy": "#e16f24",
    "reduce": "#8250df",
    "log": "#9a6700",
    "start": "#8b949e",
}
"""Colours of the phases in `profile/…`, in the order of drawing."""
_INK = "currentColor"


class Curve(NamedTuple):
    """A line through points, the dots at single ones, and the band of the extremes of which each point is the mean."""

    name: str
    colour: str
    dashes: str
    path: str
    dots: list[tuple[float, float]]
    band: str


class Area(NamedTuple):
    """A filled area of a stacked chart."""

    name: str
    colour: str
    path: str


class Mark(NamedTuple):
    """A position on the horizontal axis where something happened: a restart or a checkpoint."""

    x: float
    colour: str
    text: str


class Column(NamedTuple):
    """A part of a chart's width, and the text that is shown under the pointer."""

    x: float
    width: float
    text: str


class Key(NamedTuple):
    """An entry of a legend; `kind` is line, area, restart or checkpoint."""

    name: str
    colour: str
    dashes: str = ""
    kind: str = "line"


@dataclass(frozen=True)
class Chart:
    """A chart with two axes. Positions are in its own pixels."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    keys: list[Key]
    curves: list[Curve] = field(default_factory=list)
    areas: list[Area] = field(default_factory=list)
    restarts: list[Mark] = field(default_factory=list)
    checkpoints: list[Mark] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)


class Bar(NamedTuple):
    """A bar of several parts, each with its name, its colour and its part of the whole in percent."""

    name: str
    parts: list[tuple[str, str, float]]


class Cell(NamedTuple):
    """A cell of a confusion matrix that is not empty: its indices, its part of the true class, its number of images."""

    row: int
    column: int
    fraction: float
    number: str
    text: str


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix: the classes that are shown, and the cells that are not empty."""

    title: str
    classes: list[tuple[str, str]]
    """Names, whole and short."""
    cells: list[Cell]
    has_names: bool
    has_numbers: bool
    cell: float
    """Height and width of a cell, in pixels."""
    room: float
    """Width of the names to the left, and height of those below."""


class _Metric(NamedTuple):
    """A metric that has a chart; `key` is one of metrics.jsonl, or what the keys of all splits end with (`loss`)."""

    title: str
    key: str
    label: str
    scale: float = 1.0
    unit: str = ""
    bottom: float | None = None
    may_be_log: bool = False

    @property
    def has_splits(self) -> bool:
        """Whether there is a key for each split."""
        return "/" not in self.key

    def keys(self) -> list[str]:
        """Return the keys in lines of metrics.jsonl, in the order of `_SPLITS`."""
        return [f"{split}/{self.key}" for split in _SPLITS] if self.has_splits else [self.key]


_LOSS = _Metric("Loss", "loss", "loss", may_be_log=True)
_ACCURACY = _Metric("Accuracy", "accuracy", "accuracy, %", 100, " %")
_OTHERS = (
    _Metric("Learning rate", "train/lr", "learning rate"),
    _Metric("Gradient norm", "train/grad_norm", "L2 norm", may_be_log=True),
    _Metric("Speed", "train/images_per_second", "images/s", bottom=0),
    _Metric("MFU", "train/mfu", "MFU, %", 100, " %", bottom=0),
)


class _Points(NamedTuple):
    """The points of one metric of one run: fp64 [n] each."""

    x: Floats
    mean: Floats
    low: Floats
    high: Floats


class _Line(NamedTuple):
    """A curve before it is drawn."""

    name: str
    colour: str
    dashes: str
    has_dots: bool
    points: _Points


def colours(number: int) -> list[str]:
    """Return one colour for each run; for more runs than a legend can list, the hues from red to violet."""
    if number <= len(_COLOURS):
        return _COLOURS[:number]
    hues = (colorsys.hls_to_rgb(0.8 * index / number, 0.48, 0.65) for index in range(number))
    return ["#" + "".join(f"{round(255 * part):02x}" for part in hue) for hue in hues]


def curves(records: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    """Return the charts of all metrics that were logged: loss, accuracy, learning rate, gradient, speed, time by phase.

    For more runs than a legend can list, the page itself shows which colour belongs to which run.
    """
    records = [replace(record, lines=lines_of(record)) for record in records]
    metrics = [(_LOSS, "step"), (_LOSS, "time"), (_ACCURACY, "step"), (_ACCURACY, "time")]
    metrics += [(metric, "step") for metric in _OTHERS]
    made = [_chart(records, names, metric, x) for metric, x in metrics]
    if len(records) == 1:
        made.append(_profile(records[0]))
    return [chart for chart in made if chart is not None]


def _chart(records: Sequence[RunRecord], names: Sequence[str], metric: _Metric, x: str) -> Chart | None:
    """Return the chart of a metric by step or by time; None if it was never logged."""
    several, many = len(records) > 1, len(records) > len(_COLOURS)
    if several:
        runs = zip(records, names, colours(len(records)), strict=True)
        lines = [line for run in runs for line in _lines_of_several(*run, metric, x, many)]
    else:
        lines = list(_lines_of_one(records[0], metric, x))
    if not lines:
        return None
    unit, divisor = _unit(records) if x == "time" else ("step", 1.0)
    lines = [line._replace(points=line.points._replace(x=line.points.x / divisor)) for line in lines]
    x_axis = axes.axis_of(np.concatenate([line.points.x for line in lines]), LEFT, RIGHT)
    values = np.concatenate([part for line in lines for part in (line.points.low, line.points.high)])
    y_axis = axes.axis_of(values, BOTTOM, TOP, metric.may_be_log, metric.bottom)
    restart_marks, checkpoint_marks = ([], []) if many else _marks(records, x, divisor, x_axis)
    return Chart(
        f"{metric.title} by {x}",
        unit,
        f"{metric.label} (log scale)" if y_axis.is_log else metric.label,
        x_axis.ticks(),
        y_axis.ticks(),
        _keys_of_several(lines, names) if several else _keys_of_one(lines, restart_marks, checkpoint_marks),
        curves=[_curve(line, x_axis, y_axis) for line in lines],
        restarts=restart_marks,
        checkpoints=checkpoint_marks,
        columns=[] if many else _columns(lines, x_axis, unit, metric),
    )


def _lines_of_one(record: RunRecord, metric: _Metric, x: str) -> Iterator[_Line]:
    """Yield the curves of a single run: the colour identifies the split."""
    for split, key, colour in zip(_SPLITS, metric.keys(), _COLOURS):  # noqa: B905 - a key may have no split
        points = _points(record, key, x, metric.scale, _MAX_POINTS)
        if len(points.x):
            yield _Line(split if metric.has_splits else metric.label, colour, "", _has_dots(key, points), points)


def _lines_of_several(
    record: RunRecord, name: str, colour: str, metric: _Metric, x: str, many: bool
) -> Iterator[_Line]:
    """Yield the curves of one of several runs: dashes identify the split."""
    for split, key in zip(_SPLITS, metric.keys()):  # noqa: B905 - a key may have no split
        points = _points(record, key, x, metric.scale, _MAX_POINTS_OF_MANY if many else _MAX_POINTS)
        if len(points.x):
            full = f"{printable(name)} {split}" if metric.has_splits else printable(name)
            has_dots = _has_dots(key, points) and (len(points.x) == 1 or not many)
            yield _Line(full, colour, _SPLITS[split], has_dots, points)


def _has_dots(key: str, points: _Points) -> bool:
    """Whether each point is shown: a single one, which has no line, or one of few evaluations."""
    return len(points.x) == 1 or (not key.startswith("train/") and len(points.x) < 20)


def _points(record: RunRecord, key: str, x: str, scale: float, limit: int) -> _Points:
    """Return at most `limit` points of a metric."""
    x_key = "seconds" if x == "time" else "step"
    lines = [line for line in record.lines if x_key in line and np.isfinite(line.get(key, np.nan))]
    if key.startswith("train/") and lines:
        # Before an evaluation or a save, a line may average over one or two steps: noise that looks like an event.
        covered = np.diff([0, *(line["step"] for line in lines)])
        long_enough = covered >= np.median(covered) / 2
        lines = [line for line, is_long in zip(lines, long_enough, strict=True) if is_long]
    rows = []
    for group in _grouped(lines, limit):
        values = [line[key] * scale for line in group]
        rows.append((group[-1][x_key], np.mean(values), min(values), max(values)))
    return _Points(*np.array(rows, dtype=float).reshape(-1, 4).T)


def lines_of(record: RunRecord) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl by step; the last one of test has the step of the tested checkpoint."""
    lines = list(record.lines)
    tested = [number for number, line in enumerate(lines) if "test/accuracy" in line]
    if tested and record.result is not None:
        # It was written at the end of the run, and is about the checkpoint that was best on val.
        step = results.step_of(record.result)
        seconds = float(_seconds_of_steps(record)([step])[0])
        lines[tested[-1]] = {**lines[tested[-1]], "step": step, "seconds": seconds}
    return sorted(lines, key=lambda line: int(line["step"]))


def _grouped(lines: list[dict[str, Any]], limit: int) -> Iterator[list[dict[str, Any]]]:
    """Yield at most `limit` groups of consecutive lines, one for each point of a chart."""
    length = -(-len(lines) // limit) or 1
    for start in range(0, len(lines), length):
        yield lines[start : start + length]


def _curve(line: _Line, x_axis: Axis, y_axis: Axis) -> Curve:
    points = line.points
    x, y = x_axis.pixels(points.x), y_axis.pixels(points.mean)
    band = ""
    if (points.low < points.high).any():
        band = _outline(x, y_axis.pixels(points.low), y_axis.pixels(points.high))
    dots = list(zip(x.round(1).tolist(), y.round(1).tolist(), strict=True)) if line.has_dots else []
    return Curve(line.name, line.colour, line.dashes, _path(x, y), dots, band)


def _path(x: Floats, y: Floats) -> str:
    """Return the straight lines through points as the attribute `d` of a path."""
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def _outline(x: Floats, below: Floats, above: Floats) -> str:
    """Return the outline of the area between two lines."""
    return _path(np.concatenate([x, x[::-1]]), np.concatenate([below, above[::-1]])) + "Z"


def _columns(lines: Sequence[_Line], x_axis: Axis, unit: str, metric: _Metric) -> list[Column]:
    """Return columns, each with the last value of every curve in it: one for each position, or of the same width."""
    positions = np.unique(np.concatenate([x_axis.pixels(line.points.x) for line in lines]))
    if len(positions) > _MAX_COLUMNS:
        edges = np.linspace(LEFT, RIGHT, _MAX_COLUMNS + 1)
    else:
        edges = np.concatenate([[LEFT], (positions[1:] + positions[:-1]) / 2, [RIGHT]])
    texts: dict[int, tuple[float, list[str]]] = {}
    for line in lines:
        indices = np.clip(np.searchsorted(edges, x_axis.pixels(line.points.x), "right") - 1, 0, len(edges) - 2)
        for index, last in dict(zip(indices.tolist(), range(len(indices)), strict=True)).items():
            x, shown = texts.get(index, (-np.inf, []))
            value = f"{line.name} {line.points.mean[last]:.4g}{metric.unit}"
            texts[index] = max(x, float(line.points.x[last])), [*shown, value]
    return [
        Column(
            round(float(edges[index]), 1),
            round(float(edges[index + 1] - edges[index]), 1),
            "\n".join([f"step {x:,.0f}" if unit == "step" else f"{x:,.4g} {unit}", *shown]),
        )
        for index, (x, shown) in sorted(texts.items())
    ]


def _keys_of_one(lines: Sequence[_Line], restart_marks: list[Mark], checkpoint_marks: list[Mark]) -> list[Key]:
    keys = [Key(line.name, line.colour) for line in lines]
    keys += [Key("restart", _INK, kind="restart")] if restart_marks else []
    return keys + ([Key("checkpoint", _INK, kind="checkpoint")] if checkpoint_marks else [])


def _keys_of_several(lines: Sequence[_Line], names: Sequence[str]) -> list[Key]:
    """Return the runs by their colours, if they are not too many for a legend, and the splits by their dashes."""
    named = zip(names, colours(len(names)), strict=True) if len(names) <= len(_COLOURS) else ()
    keys = [Key(printable(name), colour) for name, colour in named]
    dashes = {line.dashes for line in lines}
    return keys + [Key(split, _INK, style) for split, style in _SPLITS.items() if style in dashes and len(dashes) > 1]


def _unit(records: Sequence[RunRecord]) -> tuple[str, float]:
    longest = max((line.get("seconds", 0) for record in records for line in record.lines), default=0)
    if longest > 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)


def _marks(records: Sequence[RunRecord], x: str, divisor: float, x_axis: Axis) -> tuple[list[Mark], list[Mark]]:
    """Return where later attempts resumed, and the checkpoints that exist."""
    shades = colours(len(records)) if len(records) > 1 else [_INK]
    marks: tuple[list[Mark], list[Mark]] = ([], [])
    for record, colour in zip(records, shades, strict=True):
        to_x = _seconds_of_steps(record) if x == "time" else (lambda steps: np.asarray(steps, dtype=float))
        for target, steps, text in (
            (marks[0], restarts(record), "resumed after"),
            (marks[1], record.checkpoints, "checkpoint of"),
        ):
            values = to_x(steps) / divisor if steps else np.zeros(0)
            for value, at, step in zip(values, x_axis.pixels(values), steps, strict=True):
                if x_axis.low <= value <= x_axis.high:
                    target.append(Mark(round(float(at), 1), colour, f"{text} step {step:,}"))
    return marks


def restarts(record: RunRecord) -> list[int]:
    """Return the steps after which later attempts resumed; attempts that started after the last step do not count."""
    end = record.result["steps"] if record.result is not None else record.setup.get("steps", 0)
    later = [attempt["from_step"] for attempt in record.attempts[1:] if attempt.get("from_step") is not None]
    return [int(step) for step in later if step < end]


def _seconds_of_steps(record: RunRecord) -> Callable[[Sequence[int]], Floats]:
    """Return a function from steps to seconds, interpolated between the lines of the metrics."""
    known = {0: 0.0} | {line["step"]: line["seconds"] for line in record.lines if "seconds" in line}
    steps = sorted(known)
    return lambda positions: np.interp(positions, steps, [known[step] for step in steps])


def _profile(record: RunRecord) -> Chart | None:
    """Return the chart of the time by phase: areas, one above the other; None if it was not logged."""
    groups = list(_grouped([line for line in record.lines if "profile/compute" in line], _MAX_COLUMNS))
    if not groups:
        return None
    edges = np.array([0, *(group[-1]["step"] for group in groups)], float)
    parts = {
        phase: np.array([100 * np.mean([line.get(f"profile/{phase}", 0.0) for line in group]) for group in groups])
        for phase in _PHASES
    }
    parts = {phase: values for phase, values in parts.items() if values.any()}
    x_axis, y_axis = Axis(0, edges[-1], LEFT, RIGHT), Axis(0, 100, BOTTOM, TOP)
    x = np.repeat(x_axis.pixels(edges), 2)[1:-1]  # the values of a line hold for all steps since the line before
    below, stacked = np.zeros(len(groups)), []
    for phase, values in parts.items():
        top = below + values
        outline = _outline(x, *(np.repeat(y_axis.pixels(each), 2) for each in (below, top)))
        stacked.append(Area(phase, _PHASES[phase], outline))
        below = top
    columns = []
    for number, (left, right) in enumerate(zip(x[::2], x[1::2], strict=True)):
        shown = [f"{phase} {values[number]:.1f} %" for phase, values in parts.items()]
        text = "\n".join([f"steps {edges[number] + 1:,.0f} to {edges[number + 1]:,.0f}", *shown])
        columns.append(Column(round(left, 1), round(right - left, 1), text))
    keys = [Key(phase, _PHASES[phase], kind="area") for phase in parts]
    return Chart(
        "Time by phase", "step", "part of the time, %", x_axis.ticks(), y_axis.ticks(), keys,
        areas=stacked, columns=columns,
    )  # fmt: skip


def profiles(records: Sequence[RunRecord], names: Sequence[str]) -> list[Bar]:
    """Return the time by phase of several runs that are done, as one bar for each."""
    bars = []
    for record, name in zip(records, names, strict=True):
        profile = (record.result or {}).get("profile") or {}
        parts = [(phase, colour, round(100 * profile.get(phase, 0.0), 2)) for phase, colour in _PHASES.items()]
        if any(part for *_, part in parts):
            bars.append(Bar(name, [each for each in parts if each[2]]))
    return bars


def phases(bars: Sequence[Bar]) -> list[Key]:
    """Return the legend of `profiles`: the phases that occur."""
    shown = {phase for bar in bars for phase, *_ in bar.parts}
    return [Key(phase, colour, kind="area") for phase, colour in _PHASES.items() if phase in shown]


def matrix(result: dict[str, Any], classes: Sequence[str]) -> Matrix:
    """Return the confusion matrix of a run that is done; of many classes, those with most mistakes."""
    confusion = results.Confusion.of_result(result)
    drawn = confusion.most_confused(_MAX_DRAWN)
    counts = confusion.matrix(drawn)
    samples = confusion.samples_by_class()[drawn]
    names = [printable(classes[index]) for index in drawn]
    cells = []
    for row, column in np.argwhere(counts).tolist():
        count, fraction = int(counts[row, column]), counts[row, column] / samples[row]
        text = f"{shortened_middle(names[row], 60)} predicted as {shortened_middle(names[column], 60)}:"
        text += f" {count:,} of {samples[row]:,} ({percent(fraction)})"
        number = str(count) if count < 10_000 else f"{count // 1000}k"
        cells.append(Cell(row, column, round(float(fraction), 3), number, text))
    is_part = len(drawn) < len(classes)
    of_all = f" ({len(drawn)} of {len(classes):,} classes, those with most mistakes)" if is_part else ""
    has_names, has_numbers = len(drawn) <= _MAX_NAMED, len(drawn) <= MAX_COUNTS
    cell = min(56.0, max(28.0, 240 / len(drawn))) if has_numbers else 16.0 if has_names else 400 / len(drawn)
    named = [(name, shortened_middle(name, _NAME_LENGTH)) for name in names]
    room = 28 + 6.5 * max(len(short) for _, short in named) if has_names else 22.0
    return Matrix(f"Confusion matrix: number of images{of_all}", named, cells, has_names, has_numbers, cell, room)
