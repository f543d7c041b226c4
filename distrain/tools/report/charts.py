"""The charts of a report: matplotlib figures that are readable at a width of 400 pixels."""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib import colors, font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from distrain.runs import results
from distrain.runs.folder import RunRecord
from distrain.text import printable

WIDTH, HEIGHT = 4.4, 3.1
"""Size in inches of a chart that fits the screen of a telephone."""
MAX_CLASSES = 30
"""Number of classes above which the confusion matrix has no names, and only the lowest accuracies are shown."""
_MAX_DRAWN = 200
"""Classes in a confusion matrix: of K classes it has K² cells."""
_MAX_POINTS = 500
"""Points of a curve. With more values, each point is the mean of several; their extremes are shown as a band."""
_MAX_CLASSES_WITH_NUMBERS = 12
"""Number of classes above which the cells of a confusion matrix have no numbers."""
_MAX_NAME_LENGTH = 22

_INK = {"light": "#24292f", "dark": "#e6edf3"}
_FAINT = {"light": "#d0d7de", "dark": "#3d444d"}
_COLOURS = ["#2f81f7", "#e16f24", "#2da44e", "#bf3989", "#9a6700", "#8250df", "#1b7c83", "#cf222e"]
_STYLES = {"train": "-", "val": "--", "test": ":"}
"""Line styles of the splits when several runs are compared: then the colour identifies the run."""
_PHASES = {
    "compute": "#2f81f7",
    "data": "#cf222e",
    "copy": "#e16f24",
    "reduce": "#8250df",
    "log": "#9a6700",
    "start": "#8b949e",
}
"""Colours of the phases in `profile/…`, in the order of drawing."""

Draw = Callable[[Figure, "Theme"], None]


@dataclass(frozen=True)
class Theme:
    """A colour theme, `light` or `dark`."""

    name: str

    @property
    def ink(self) -> str:
        """Colour of text and axes."""
        return _INK[self.name]

    @property
    def heat(self) -> str:
        """Colour map of confusion matrices; its zero is like the page's background."""
        return "Blues" if self.name == "light" else "magma"


@dataclass(frozen=True)
class Chart:
    """A chart: the `name` of its PNG file, its `title`, a function that draws it, and its `size` in inches."""

    name: str
    title: str
    draw: Draw
    size: tuple[float, float] = (WIDTH, HEIGHT)

    def svg(self, theme: str) -> bytes:
        """Render as SVG with a transparent background; `theme` is light or dark."""
        return self._render(Theme(theme), format="svg", transparent=True, metadata={"Date": None})

    def png(self) -> bytes:
        """Render as PNG with a white background."""
        return self._render(Theme("light"), format="png", dpi=200, facecolor="white", metadata={"Software": "distrain"})

    def _render(self, theme: Theme, **options: Any) -> bytes:
        with _style(theme):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure, theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, **options)
        return buffer.getvalue()


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    ink, faint = _INK[theme.name], _FAINT[theme.name]
    settings = {
        "text.parse_math": False,  # the name of a class may be $x$
        "svg.hashsalt": "distrain",  # so that the same run gives the same bytes
        "font.family": _fonts(),
        "font.size": 9,
        "axes.prop_cycle": cycler(color=_COLOURS),
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": faint,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.4,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
        "axes.edgecolor": faint,
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the glyph is shown as a box
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        yield


def _fonts() -> list[str]:
    """Return matplotlib's own font, then the installed ones that have other scripts."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    candidates = ("Noto Sans CJK JP", "Noto Sans", "WenQuanYi Micro Hei", "Arial Unicode MS", "Segoe UI", "PingFang SC")
    return ["DejaVu Sans", *(name for name in candidates if name in installed)]


def short(name: str, length: int = _MAX_NAME_LENGTH) -> str:
    """Shorten a name to one line of at most `length` letters, by removing its middle."""
    clean = printable(name)
    return clean if len(clean) <= length else f"{clean[: length // 2]}…{clean[len(clean) - length // 2 + 1 :]}"


def colours(number: int) -> list[str]:
    """Return one colour for each run; for more runs than a legend can list, shades of a colour map."""
    if number <= len(_COLOURS):
        return _COLOURS[:number]
    return [colors.to_hex(shade) for shade in mpl.colormaps["turbo"](np.linspace(0.1, 0.9, number))]


def curves(records: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    """Return the charts of all metrics that were logged: loss, accuracy, learning rate, speed, time by phase.

    For more runs than a legend can list, the page itself shows which colour belongs to which run.
    """
    size = (WIDTH, HEIGHT + 0.16 * (len(records) // 2 if 1 < len(records) <= len(_COLOURS) else 0))

    def line(title: str, key: str, x: str, **options: Any) -> Chart:
        stem = f"{key.partition('/')[2] or key}-{x}".replace("/", "-").replace("_", "-")
        draw = functools.partial(_lines, records=records, names=names, key=key, x=x, **options)
        return Chart(stem, f"{title} by {x}", draw, size)

    logged = {key for record in records for each in record.lines for key in each}
    made = []
    if any(key.endswith("/loss") for key in logged):
        made += [line("Loss", "loss", x, label="loss") for x in ("step", "time")]
    if any(key.endswith("/accuracy") for key in logged):
        made += [line("Accuracy", "accuracy", x, label="accuracy, %", scale=100) for x in ("step", "time")]
    if "train/loss" in logged:
        made.append(line("Learning rate", "train/lr", "step", label="learning rate"))
        made.append(line("Speed", "train/images_per_second", "step", label="images/s", bottom=0))
    if "train/mfu" in logged:
        made.append(line("MFU", "train/mfu", "step", label="MFU, %", scale=100, bottom=0))
    if len(records) == 1:
        if "profile/compute" in logged:
            made.append(Chart("profile", "Time by phase", lambda figure, theme: _profile(figure, records[0])))
    elif any((record.result or {}).get("profile") for record in records):
        draw = functools.partial(_profiles, records=records, names=names)
        height = max(HEIGHT, 1.0 + 0.2 * len(records))
        made.append(Chart("profile", "Time by phase", draw, (WIDTH, height)))
    return made


def _series(record: RunRecord, key: str, x: str, scale: float) -> NDArray[np.float64]:
    """Return at most `_MAX_POINTS` points of a metric: x, mean, lowest and highest value, fp64 [4, n]."""
    x_key = "seconds" if x == "time" else "step"
    lines = [line for line in record.lines if key in line and x_key in line]
    if key.startswith("test/") and lines and record.result is not None:
        # The last line was written at the end of the run, and is about the checkpoint that was best on val.
        step = results.step_of(record.result)
        lines[-1] = {**lines[-1], "step": step, "seconds": float(_seconds_of_steps(record)([step])[0])}
    if key.startswith("train/") and lines:
        # Before an evaluation or a save, a line may average over one or two steps: noise that looks like an event.
        covered = np.diff([0, *(line["step"] for line in lines)])
        long_enough = covered >= np.median(covered) / 2
        lines = [line for line, is_long in zip(lines, long_enough, strict=True) if is_long]
    columns = []
    for group in _grouped(lines):
        values = [line[key] * scale for line in group]
        columns.append((group[-1][x_key], np.mean(values), min(values), max(values)))
    return np.array(columns, dtype=float).reshape(-1, 4).T


def _grouped(lines: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield groups of consecutive lines, one for each point of a chart: of several lines in a long run."""
    length = -(-len(lines) // _MAX_POINTS) or 1
    for start in range(0, len(lines), length):
        yield lines[start : start + length]


def _lines(
    figure: Figure,
    theme: Theme,
    records: Sequence[RunRecord],
    names: Sequence[str],
    key: str,
    x: str,
    label: str,
    scale: float = 1.0,
    bottom: float | None = None,
) -> None:
    axes = figure.add_subplot()
    several = len(records) > 1
    unit, divisor = _unit(records) if x == "time" else ("step", 1.0)
    shown_splits = {}
    for record, colour in zip(records, colours(len(records)), strict=True):
        for split, style in _STYLES.items() if "/" not in key else ((None, "-"),):
            xs, ys, lowest, highest = _series(record, key if split is None else f"{split}/{key}", x, scale)
            if not len(xs):
                continue
            if split is not None:
                shown_splits[split] = style
            line_colour = colour if several else _COLOURS[0 if split is None else list(_STYLES).index(split)]
            # A single point has no line, and must be visible: the evaluation of test is one.
            marker = "o" if len(xs) < 20 and split in ("val", "test") else None
            if (lowest < highest).any():
                axes.fill_between(xs / divisor, lowest, highest, color=line_colour, alpha=0.2, linewidth=0)
            axes.plot(
                xs / divisor, ys, style if several else "-", color=line_colour,
                label=None if several else split, marker=marker or ("." if len(xs) == 1 else None), markersize=3.5,
            )  # fmt: skip
        _marks(axes, record, x, divisor, colour if several else theme.ink, labelled=not several)
    axes.set_xlabel(unit)
    axes.set_ylabel(label)
    axes.margins(x=0.02)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    _plain_numbers(axes)
    if several:
        named = zip(names, colours(len(names)), strict=True) if len(names) <= len(_COLOURS) else ()
        handles = [Line2D([], [], color=colour, label=short(name)) for name, colour in named]
        handles += [
            Line2D([], [], color=theme.ink, linestyle=style, label=split) for split, style in shown_splits.items()
        ]
        _legend(figure, handles)
    else:
        _legend(figure, axes.get_legend_handles_labels()[0])


def _unit(records: Sequence[RunRecord]) -> tuple[str, float]:
    longest = max((line.get("seconds", 0) for record in records for line in record.lines), default=0)
    if longest > 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)


def _marks(axes: Axes, record: RunRecord, x: str, divisor: float, colour: str, labelled: bool) -> None:
    """Draw dashed lines where a later attempt resumed, and triangles for the checkpoints that exist."""
    to_x = _seconds_of_steps(record) if x == "time" else (lambda steps: np.asarray(steps, dtype=float))
    steps = restarts(record)
    for number, position in enumerate(to_x(steps) / divisor if steps else ()):
        label = "restart" if labelled and number == 0 else None
        axes.axvline(position, color=colour, linestyle=(0, (4, 3)), linewidth=0.9, alpha=0.7, label=label)
    if record.checkpoints:
        axes.plot(
            to_x(record.checkpoints) / divisor, np.full(len(record.checkpoints), 0.02), "^", color=colour,
            markersize=4, alpha=0.8, transform=axes.get_xaxis_transform(), clip_on=False,
            label="checkpoint" if labelled else None,
        )  # fmt: skip


def restarts(record: RunRecord) -> list[int]:
    """Return the steps after which later attempts resumed; attempts that started after the last step do not count."""
    end = record.result["steps"] if record.result is not None else record.setup.get("steps", 0)
    later = [attempt["from_step"] for attempt in record.attempts[1:] if attempt.get("from_step") is not None]
    return [int(step) for step in later if step < end]


def _seconds_of_steps(record: RunRecord) -> Callable[[Sequence[int]], NDArray[np.float64]]:
    """Return a function from steps to seconds, interpolated between the lines of the metrics."""
    known = {0: 0.0} | {line["step"]: line["seconds"] for line in record.lines if "seconds" in line}
    steps = sorted(known)
    return lambda positions: np.interp(positions, steps, [known[step] for step in steps])


def _plain_numbers(axes: Axes) -> None:
    """Show full numbers instead of an offset such as 1e-5 above the axis, and few ticks, which do not overlap."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}" if abs(value) < 1e4 else _thousands(value))
    axes.locator_params(axis="x", nbins=5)


def _thousands(value: float) -> str:
    return f"{value / 1e6:.4g} M" if abs(value) >= 1e6 else f"{value / 1e3:.4g} k"


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = 3 if longest < 14 else 2
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, handlelength=1.8)


def _profile(figure: Figure, record: RunRecord) -> None:
    axes = figure.add_subplot()
    groups = list(_grouped([line for line in record.lines if "profile/compute" in line]))
    edges = [0, *(group[-1]["step"] for group in groups)]
    below = np.zeros(len(edges))
    for phase, colour in _PHASES.items():
        parts = np.array([100 * np.mean([line.get(f"profile/{phase}", 0.0) for line in group]) for group in groups])
        if not len(parts) or not parts.any():
            continue
        # The values of a line hold for all steps since the line before: constant, not interpolated.
        top = below + np.append(parts, parts[-1:])
        axes.fill_between(edges, below, top, step="post", color=colour, linewidth=0, label=phase, alpha=0.9)
        below = top
    axes.set_xlabel("step")
    axes.set_ylabel("share of the time, %")
    axes.set_ylim(0, 100)
    axes.margins(x=0)
    _plain_numbers(axes)
    _legend(figure, axes.get_legend_handles_labels()[0])


def _profiles(figure: Figure, theme: Theme, records: Sequence[RunRecord], names: Sequence[str]) -> None:
    axes = figure.add_subplot()
    profiles = [(record.result or {}).get("profile") or {} for record in records]
    left = np.zeros(len(records))
    for phase, colour in _PHASES.items():
        parts = np.array([100 * profile.get(phase, 0.0) for profile in profiles])
        if parts.any():
            axes.barh(range(len(records)), parts, left=left, color=colour, label=phase)
            left += parts
    axes.set_yticks(range(len(records)), [short(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("share of the time, %")
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    _legend(figure, axes.get_legend_handles_labels()[0])


def class_charts(result: dict[str, Any], classes: Sequence[str], suffix: str = "") -> list[Chart]:
    """Return the charts of a run that is done: confusion matrix and accuracy by class."""
    confusion = results.Confusion.of_result(result)
    drawn = confusion.most_confused(_MAX_DRAWN)
    percent = 100 * confusion.matrix(drawn) / np.maximum(confusion.samples_by_class()[drawn, None], 1)
    names = [classes[k] for k in drawn]
    of_all = f" ({len(drawn)} of {len(classes)} classes, those with most mistakes)" if len(drawn) < len(classes) else ""
    shown = min(len(classes), MAX_CLASSES)
    height = max(HEIGHT, 0.7 + 0.21 * shown)
    return [
        Chart(
            f"confusion{suffix}", f"Confusion matrix, % of each true class{of_all}",
            lambda figure, theme: _confusion(figure, theme, percent, names), (WIDTH, WIDTH),
        ),
        Chart(
            f"classes{suffix}", "Accuracy by class",
            lambda figure, theme: _accuracy_by_class(figure, theme, result), (WIDTH, height),
        ),
    ]  # fmt: skip


def _confusion(figure: Figure, theme: Theme, percent: NDArray[np.float64], classes: Sequence[str]) -> None:
    axes = figure.add_subplot()
    axes.imshow(percent, cmap=theme.heat, vmin=0, vmax=100)
    axes.grid(visible=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) > MAX_CLASSES:
        return
    names = [short(name, 14) for name in classes]
    size = min(9.0, 215 / len(names))  # points: the height of a row
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    if len(classes) > _MAX_CLASSES_WITH_NUMBERS:
        return
    for row, column in np.ndindex(*percent.shape):
        value = float(percent[row, column])
        dark = value > 55 if theme.name == "light" else value < 60
        colour = "white" if dark else "black"
        if round(value):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)


def _accuracy_by_class(figure: Figure, theme: Theme, result: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    rows = results.classes_of(result)
    shown = [(row.name, 100 * row.accuracy) for row in rows if row.accuracy is not None]
    if len(shown) > MAX_CLASSES:
        shown = sorted(shown, key=lambda pair: pair[1])[:MAX_CLASSES]
        axes.set_title(f"the lowest {MAX_CLASSES} of {len(rows)}", fontsize=9)
    axes.barh(range(len(shown)), [value for _, value in shown], color=_COLOURS[0], height=0.7)
    for row, (_, value) in enumerate(shown):
        inside = value > 15
        axes.text(
            value - 1 if inside else value + 1, row, f"{value:.1f}", va="center", fontsize=8,
            ha="right" if inside else "left", color="white" if inside else theme.ink,
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [short(name) for name, _ in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, %")
    axes.grid(axis="y", visible=False)
