"""A picture of all parts: a panel for each part and unit, a bar for each row's median, a line for its spread."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distrain import files
from distrain.tools.bench.table import Row, Table, spread

_FAR = 50
"""Bars that are further apart have a logarithmic axis: the short ones could not be seen."""


def draw(tables: Mapping[str, Table], path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    panels = [
        (f"{table.title} ({unit})", [row for row in table.rows if row.unit == unit])
        for table in tables.values()
        for unit in dict.fromkeys(row.unit for row in table.rows)
    ]
    heights = [len(rows) + 1.5 for _, rows in panels]
    figure = Figure(figsize=(11, 0.32 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for place, (title, rows) in enumerate(panels):
        _panel(figure.add_subplot(grid[place]), title, rows)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    files.replace(path, picture.getvalue())


def _panel(axes: Axes, title: str, rows: list[Row]) -> None:
    spreads = [spread(row.samples) for row in rows]
    medians = [found["median"] for found in spreads]
    below = [found["median"] - found["lowest"] for found in spreads]
    above = [found["highest"] - found["median"] for found in spreads]
    names, colours = [row.name for row in rows], ["C0" if "distrain" in row.name else "C7" for row in rows]
    axes.barh(names, medians, xerr=[below, above], color=colours, ecolor="black", capsize=2)
    if min(medians) > 0 and max(medians) > _FAR * min(medians):
        axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
