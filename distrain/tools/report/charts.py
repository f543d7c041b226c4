"""The charts of a report: each draws runs into a matplotlib figure that is readable at 400 pixels."""

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

from distrain.runs.folder import Record
from distrain.text import printable

WIDTH, HEIGHT = 4.4, 3.1
"""Inches; of a chart that is as wide as a telephone."""
MOST_CLASSES = 30
"""A confusion matrix of more has no names, and of accuracies the lowest are shown."""
_MOST_POINTS = 500
"""Of a line: a longer one becomes the mean over stretches, with their extremes as a band."""
_NUMBERED = 12
_LONGEST = 22

_INK = {"light": "#24292f", "dark": "#e6edf3"}
_FAINT = {"light": "#d0d7de", "dark": "#3d444d"}
_COLOURS = ["#2f81f7", "#e16f24", "#2da44e", "#bf3989", "#9a6700", "#8250df", "#1b7c83", "#cf222e"]
_STYLES = {"train": "-", "val": "--", "test": ":"}
"""Of several runs' lines: the run has the colour."""
_PHASES = {
    "compute": "#2f81f7",
    "data": "#cf222e",
    "copy": "#e16f24",
    "reduce": "#8250df",
    "log": "#9a6700",
    "start": "#8b949e",
}

Draw = Callable[[Figure, "Theme"], None]


@dataclass(frozen=True)
class Theme:
    """light or dark, and its colours."""

    name: str

    @property
    def ink(self) -> str:
        """Of text and axes."""
        return _INK[self.name]

    @property
    def heat(self) -> str:
        """Colour map whose zero is the page's background."""
        return "Blues" if self.name == "light" else "magma"


@dataclass(frozen=True)
class Chart:
    """`name` of its PNG file; `title` for people; `draw` fills a figure of `size` inches."""

    name: str
    title: str
    draw: Draw
    size: tuple[float, float] = (WIDTH, HEIGHT)

    def svg(self, theme: str) -> bytes:
        """On a transparent background."""
        return self._rendered(Theme(theme), format="svg", transparent=True, metadata={"Date": None})

    def png(self) -> bytes:
        """On white."""
        return self._rendered(Theme("light"), format="png", dpi=200, facecolor="white")

    def _rendered(self, theme: Theme, **how: Any) -> bytes:
        with _style(theme):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure, theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, **how)
        return buffer.getvalue()


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    ink, faint = _INK[theme.name], _FAINT[theme.name]
    settings = {
        "text.parse_math": False,  # a class may be called $x$
        "svg.hashsalt": "distrain",  # the same run gives the same bytes
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
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box stands for it
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        yield


def _fonts() -> list[str]:
    """matplotlib's own, then those here that know other scripts."""
    here = {font.name for font in font_manager.fontManager.ttflist}
    wanted = ("Noto Sans CJK JP", "Noto Sans", "WenQuanYi Micro Hei", "Arial Unicode MS", "Segoe UI", "PingFang SC")
    return ["DejaVu Sans", *(name for name in wanted if name in here)]


def short(name: str, most: int = _LONGEST) -> str:
    """A name for a chart: in one line, cut in its middle."""
    clean = printable(name)
    return clean if len(clean) <= most else f"{clean[: most // 2]}…{clean[len(clean) - most // 2 + 1 :]}"


def colours(number: int) -> list[str]:
    """One of each of so many runs; of more than a legend holds, shades in their order."""
    if number <= len(_COLOURS):
        return _COLOURS[:number]
    return [colors.to_hex(shade) for shade in mpl.colormaps["turbo"](np.linspace(0.1, 0.9, number))]


def curves(records: Sequence[Record], names: Sequence[str]) -> list[Chart]:
    """Loss and accuracy against steps and time, learning rate, speed, and where the time goes, of what was logged. The
    colours of more runs than a legend holds are told by the page.
    """
    size = (WIDTH, HEIGHT + 0.16 * (len(records) // 2 if 1 < len(records) <= len(_COLOURS) else 0))

    def line(title: str, key: str, x: str, **how: Any) -> Chart:
        stem = f"{key.partition('/')[2] or key}-{x}".replace("/", "-").replace("_", "-")
        draw = functools.partial(_lines, records=records, names=names, key=key, x=x, **how)
        return Chart(stem, f"{title} by {x}", draw, size)

    logged = {key for record in records for each in record.lines for key in each}
    found = []
    if any(key.endswith("/loss") for key in logged):
        found += [line("Loss", "loss", x, label="loss") for x in ("step", "time")]
    if any(key.endswith("/accuracy") for key in logged):
        found += [line("Accuracy", "accuracy", x, label="accuracy, %", scale=100) for x in ("step", "time")]
    if "train/loss" in logged:
        found.append(line("Learning rate", "train/lr", "step", label="learning rate"))
        found.append(line("Speed", "train/images_per_second", "step", label="images/s", bottom=0))
    if len(records) == 1:
        if "profile/compute" in logged:
            found.append(Chart("profile", "Where the time goes", lambda figure, theme: _profile(figure, records[0])))
    elif any((record.result or {}).get("profile") for record in records):
        draw = functools.partial(_profiles, records=records, names=names)
        height = max(HEIGHT, 1.0 + 0.2 * len(records))
        found.append(Chart("profile", "Where the time went", draw, (WIDTH, height)))
    return found


def _series(record: Record, key: str, x: str, scale: float) -> NDArray[np.float64]:
    """Of a metric, at most `_MOST_POINTS` columns of x, mean, lowest and highest value: fp64 [4, n]."""
    of_x = "seconds" if x == "time" else "step"
    lines = [line for line in record.lines if key in line and of_x in line]
    if key.startswith("train/") and lines:
        # Before an evaluation or a save a line may speak of a step or two: noise, that would look like an event.
        covered = np.diff([0, *(line["step"] for line in lines)])
        enough = covered >= np.median(covered) / 2
        lines = [line for line, kept in zip(lines, enough, strict=True) if kept]
    columns = []
    for stretch in _stretches(lines):
        values = [line[key] * scale for line in stretch]
        columns.append((stretch[-1][of_x], np.mean(values), min(values), max(values)))
    return np.array(columns, dtype=float).reshape(-1, 4).T


def _stretches(lines: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Lines that one point of a chart speaks of: one, or so many that a long run's charts stay small."""
    length = -(-len(lines) // _MOST_POINTS) or 1
    for start in range(0, len(lines), length):
        yield lines[start : start + length]


def _lines(
    figure: Figure,
    theme: Theme,
    records: Sequence[Record],
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
    seen = {}
    for record, colour in zip(records, colours(len(records)), strict=True):
        for split, style in _STYLES.items() if "/" not in key else ((None, "-"),):
            xs, ys, lowest, highest = _series(record, key if split is None else f"{split}/{key}", x, scale)
            if not len(xs):
                continue
            if split is not None:
                seen[split] = style
            own = colour if several else _COLOURS[0 if split is None else list(_STYLES).index(split)]
            # A point alone has no line; the one test at the end must be seen.
            marker = "o" if len(xs) < 20 and split in ("val", "test") else None
            if (lowest < highest).any():
                axes.fill_between(xs / divisor, lowest, highest, color=own, alpha=0.2, linewidth=0)
            axes.plot(
                xs / divisor, ys, style if several else "-", color=own,
                label=None if several else split, marker=marker or ("." if len(xs) == 1 else None), markersize=3.5,
            )  # fmt: skip
        _marks(axes, record, x, divisor, colour if several else theme.ink, told=not several)
    axes.set_xlabel(unit)
    axes.set_ylabel(label)
    axes.margins(x=0.02)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    _plain_numbers(axes)
    if several:
        named = zip(names, colours(len(names)), strict=True) if len(names) <= len(_COLOURS) else ()
        handles = [Line2D([], [], color=colour, label=short(name)) for name, colour in named]
        handles += [Line2D([], [], color=theme.ink, linestyle=style, label=split) for split, style in seen.items()]
        _legend(figure, handles)
    else:
        _legend(figure, axes.get_legend_handles_labels()[0])


def _unit(records: Sequence[Record]) -> tuple[str, float]:
    longest = max((line.get("seconds", 0) for record in records for line in record.lines), default=0)
    if longest > 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)


def _marks(axes: Axes, record: Record, x: str, divisor: float, colour: str, told: bool) -> None:
    """Dashed lines where a later attempt went on; triangles for checkpoints that are kept."""
    place = _places(record) if x == "time" else (lambda steps: np.asarray(steps, dtype=float))
    again = restarts(record)
    for number, where in enumerate(place(again) / divisor if again else ()):
        label = "restart" if told and number == 0 else None
        axes.axvline(where, color=colour, linestyle=(0, (4, 3)), linewidth=0.9, alpha=0.7, label=label)
    if record.checkpoints:
        axes.plot(
            place(record.checkpoints) / divisor, np.full(len(record.checkpoints), 0.02), "^", color=colour,
            markersize=4, alpha=0.8, transform=axes.get_xaxis_transform(), clip_on=False,
            label="checkpoint kept" if told else None,
        )  # fmt: skip


def restarts(record: Record) -> list[int]:
    """Steps after which a later attempt went on; one that found the run done is none."""
    end = record.setup.get("steps", 0)
    later = [attempt["from_step"] for attempt in record.attempts[1:] if attempt.get("from_step") is not None]
    return [int(step) for step in later if step < end]


def _places(record: Record) -> Callable[[Sequence[int]], NDArray[np.float64]]:
    """From steps to seconds, by the lines of the metrics."""
    known = {0: 0.0} | {line["step"]: line["seconds"] for line in record.lines if "seconds" in line}
    steps = sorted(known)
    return lambda wanted: np.interp(wanted, steps, [known[step] for step in steps])


def _plain_numbers(axes: Axes) -> None:
    """No offset such as 1e-5 above an axis, which nobody reads; few ticks, which never touch."""
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


def _profile(figure: Figure, record: Record) -> None:
    axes = figure.add_subplot()
    stretches = list(_stretches([line for line in record.lines if "profile/compute" in line]))
    edges = [0, *(stretch[-1]["step"] for stretch in stretches)]
    below = np.zeros(len(edges))
    for phase, colour in _PHASES.items():
        parts = np.array([100 * np.mean([line.get(f"profile/{phase}", 0.0) for line in each]) for each in stretches])
        if not len(parts) or not parts.any():
            continue
        # A line tells of the steps before it: steps, not slopes.
        top = below + np.append(parts, parts[-1:])
        axes.fill_between(edges, below, top, step="post", color=colour, linewidth=0, label=phase, alpha=0.9)
        below = top
    axes.set_xlabel("step")
    axes.set_ylabel("part of the time, %")
    axes.set_ylim(0, 100)
    axes.margins(x=0)
    _plain_numbers(axes)
    _legend(figure, axes.get_legend_handles_labels()[0])


def _profiles(figure: Figure, theme: Theme, records: Sequence[Record], names: Sequence[str]) -> None:
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
    axes.set_xlabel("part of the time, %")
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    _legend(figure, axes.get_legend_handles_labels()[0])


def of_classes(result: dict[str, Any], classes: Sequence[str], suffix: str = "") -> list[Chart]:
    """Confusion matrix and accuracy by class of a run that is done."""
    matrix = np.asarray(result["confusion_matrix"], dtype=float)
    shown = min(len(classes), MOST_CLASSES)
    height = max(HEIGHT, 0.7 + 0.21 * shown)
    return [
        Chart(
            f"confusion{suffix}", "Confusion: of each true class, %",
            lambda figure, theme: _confusion(figure, theme, matrix, classes), (WIDTH, WIDTH),
        ),
        Chart(
            f"classes{suffix}", "Accuracy by class",
            lambda figure, theme: _by_class(figure, theme, matrix, classes), (WIDTH, height),
        ),
    ]  # fmt: skip


def _confusion(figure: Figure, theme: Theme, matrix: NDArray[np.float64], classes: Sequence[str]) -> None:
    axes = figure.add_subplot()
    percent = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(percent, cmap=theme.heat, vmin=0, vmax=100)
    axes.grid(visible=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) > MOST_CLASSES:
        return
    names = [short(name, 14) for name in classes]
    size = min(9.0, 215 / len(names))  # points: what a row has
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    if len(classes) > _NUMBERED:
        return
    for row, column in np.ndindex(*percent.shape):
        value = percent[row, column]
        dark = value > 55 if theme.name == "light" else value < 60
        colour = "white" if dark else "black"
        if round(value):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)


def _by_class(figure: Figure, theme: Theme, matrix: NDArray[np.float64], classes: Sequence[str]) -> None:
    axes = figure.add_subplot()
    total = matrix.sum(1)
    accuracy = 100 * np.diagonal(matrix) / np.maximum(total, 1)
    shown = np.flatnonzero(total)
    if len(shown) > MOST_CLASSES:
        shown = shown[np.argsort(accuracy[shown], kind="stable")[:MOST_CLASSES]]
        axes.set_title(f"the lowest {MOST_CLASSES} of {len(classes)}", fontsize=9)
    axes.barh(range(len(shown)), accuracy[shown], color=_COLOURS[0], height=0.7)
    for place, value in enumerate(accuracy[shown]):
        inside = value > 15
        axes.text(
            value - 1 if inside else value + 1, place, f"{value:.1f}", va="center", fontsize=8,
            ha="right" if inside else "left", color="white" if inside else theme.ink,
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [short(classes[int(each)]) for each in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, %")
    axes.grid(axis="y", visible=False)
