"""A picture of all parts: a panel for each part and unit, with bars for medians and error bars for the extremes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.table import Row, Table, spread
from distrain import files

_LOG_SCALE_RATIO = 50
"""The axis is logarithmic if the longest bar is so many times the shortest, which would be invisible otherwise."""


def draw(tables: Mapping[str, Table], path: Path) -> None:
    """Write a PNG file atomically."""
    panels = [
        (f"{table.title} ({unit})", [row for row in table.rows if row.unit == unit])
        for table in tables.values()
        for unit in dict.fromkeys(row.unit for row in table.rows)
    ]
    heights = [len(rows) + 1.5 for _, rows in panels]
    figure = Figure(figsize=(11, 0.32 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for number, (title, rows) in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[number]), title, rows)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    files.replace(path, picture.getvalue())


def _draw_panel(axes: Axes, title: str, rows: list[Row]) -> None:
    spreads = [spread(row.samples) for row in rows]
    medians = [values["median"] for values in spreads]
    below = [values["median"] - values["lowest"] for values in spreads]
    above = [values["highest"] - values["median"] for values in spreads]
    names, colours = [row.name for row in rows], ["C0" if "distrain" in row.name else "C7" for row in rows]
    axes.barh(names, medians, xerr=[below, above], color=colours, ecolor="black", capsize=2)
    if min(medians) > 0 and max(medians) > _LOG_SCALE_RATIO * min(medians):
        axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
