"""The result of a part: one sample per repeat, with median and spread, as text and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One contestant, with one sample per repeat."""

    name: str
    unit: str
    samples: list[float]

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return {"name": self.name, "unit": self.unit, "samples": self.samples, **spread(self.samples)}


@dataclass(frozen=True)
class Table:
    """The rows of a part, and ratios of rows."""

    title: str
    rows: list[Row]
    ratios: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the table for JSON."""
        return {
            "title": self.title,
            "rows": [row.as_dict() for row in self.rows],
            "ratios": [row.as_dict() for row in self.ratios],
            "notes": self.notes,
        }

    def text(self) -> str:
        """Return the table as text."""
        rows = [*self.rows, *self.ratios]
        name_width, unit_width = max(len(row.name) for row in rows), max(len(row.unit) for row in rows)
        head = f"{'':<{name_width + unit_width + 2}}{'median':>12}{'lowest':>12}{'highest':>12}"
        lines = [
            f"{row.name:<{name_width}}  {row.unit:<{unit_width}}"
            + "".join(f"{_format(value):>12}" for value in spread(row.samples).values())
            for row in rows
        ]
        return "\n".join([self.title, "", head, *lines, *(f"- {note}" for note in self.notes)])


def ratio(numerator: Row, denominator: Row) -> Row:
    """Divide two rows repeat by repeat, so that both samples of a quotient were taken close together."""
    quotients = [a / b for a, b in zip(numerator.samples, denominator.samples, strict=True)]
    return Row(f"{numerator.name} / {denominator.name}", "×", quotients)


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Return median, lowest and highest."""
    return {"median": statistics.median(samples), "lowest": min(samples), "highest": max(samples)}


def _format(value: float) -> str:
    """Format with three significant digits, or as a whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
