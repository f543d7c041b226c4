"""The axes of a chart: from values to pixels, and the values that are written beside an axis. Arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LOG_RATIO = 20
"""A loss is shown on a logarithmic axis if the largest value is more than so many times the median."""
_MARGIN = 0.03
"""Part of an axis that is empty at each end."""


class Axis(NamedTuple):
    """An axis from `start` to `end`, in pixels, that shows the values from `low` to `high`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def pixels(self, values: Sequence[float] | Floats) -> Floats:
        """Return the positions of values, in pixels; those beyond the axis are put at its ends."""
        clipped = np.clip(np.asarray(values, float), self.low, self.high)
        low, high = self.low, self.high
        if self.is_log:
            clipped, low, high = np.log10(clipped), math.log10(low), math.log10(high)
        fractions: Floats = (clipped - low) / (high - low)
        return self.start + fractions * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return about six positions, in pixels, and the values there as text."""
        values = _log_ticks(self.low, self.high) if self.is_log else _linear_ticks(self.low, self.high)
        return list(zip(self.pixels(values).tolist(), map(number, values), strict=True))


def axis_of(
    values: Sequence[float] | Floats, start: float, end: float, may_be_log: bool = False, bottom: float | None = None
) -> Axis:
    """Return an axis on which all values are visible.

    Args:
        values: finite numbers, at least one.
        start: position of its low end, in pixels.
        end: position of its high end.
        may_be_log: it is logarithmic if one value would flatten the others: `LOG_RATIO`.
        bottom: the low end, instead of the lowest value.
    """
    numbers = np.asarray(values, float)
    low, high = float(numbers.min()), float(numbers.max())
    if may_be_log and low > 0 and high > LOG_RATIO * float(np.median(numbers)):
        margin = (high / low) ** _MARGIN
        return Axis(low / margin, high * margin, start, end, is_log=True)
    low = low if bottom is None else bottom
    if high <= low:  # a single value, which is shown in the middle
        room = abs(low) / 2 or 1.0
        low, high = (low - room if bottom is None else low), max(low, high) + room
    margin = _MARGIN * (high - low)
    return Axis(low - margin if bottom is None else low, high + margin, start, end)


def number(value: float) -> str:
    """Format a value beside an axis: `0.05`, `2,000`, `12 k`, `3.5 M`, `1e12`."""
    if abs(value) >= 1e9:
        return f"{value:.3g}".replace("e+", "e")
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g} M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g} k"
    return f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:,.6g}"


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten; on a short axis also their double and fivefold, on a long one only some of them."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    if last - first >= 2:
        return [10.0**exponent for exponent in range(first, last + 1, -(-(last - first) // 5))]
    finer = [factor * 10.0**exponent for exponent in range(first - 1, last + 1) for factor in (1, 2, 5)]
    return [value for value in finer if low <= value <= high]
