"""What a part found: samples, one a repeat, with their median and spread; as text for people and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One contestant: a sample a repeat."""

    name: str
    unit: str
    samples: list[float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "unit": self.unit, "samples": self.samples, **spread(self.samples)}


@dataclass(frozen=True)
class Table:
    """A part: its rows, and ratios of rows, which were taken repeat by repeat."""

    title: str
    rows: list[Row]
    ratios: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "title": self.title,
            "rows": [row.as_dict() for row in self.rows],
            "ratios": [row.as_dict() for row in self.ratios],
            "notes": self.notes,
        }

    def text(self) -> str:
        """For people."""
        rows = [*self.rows, *self.ratios]
        wide, unit = (max(len(text) for text in texts) for texts in zip(*((r.name, r.unit) for r in rows), strict=True))
        head = f"{'':<{wide + unit + 2}}{'median':>12}{'lowest':>12}{'highest':>12}"
        lines = [
            f"{row.name:<{wide}}  {row.unit:<{unit}}"
            + "".join(f"{number(v):>12}" for v in spread(row.samples).values())
            for row in rows
        ]
        return "\n".join([self.title, "", head, *lines, *(f"- {note}" for note in self.notes)])


def ratio(above: Row, below: Row) -> Row:
    """How many times one row is the other, repeat by repeat."""
    quotients = [a / b for a, b in zip(above.samples, below.samples, strict=True)]
    return Row(f"{above.name} / {below.name}", "×", quotients)


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(samples), "lowest": min(samples), "highest": max(samples)}


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
