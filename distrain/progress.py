"""Progress bars on terminals of any width."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from distrain.text import clock

_FREE_COLUMNS = 3
"""Columns without text at the end of a bar, beside the last one, which tqdm never uses.

A terminal shows `^C` there. If it had to begin a new line for that, the bar would be drawn a second time below.
"""
_LEAST_BAR = 8
"""The bar itself has at least this part of the columns, 1/8."""


class Bar(tqdm):
    """A progress bar on stderr, which fits the terminal; nothing if stderr is none.

    Args:
        label: its first word.
        iterable: if given, iterating over the bar advances it.
        total: number of steps; None: that of the iterable, or unknown.
        done: steps done before.
        unit: what is counted, plural; shown if the total is unknown.
        leave: whether it stays visible after the end.
        show: False: nothing is shown.
    """

    def __init__(
        self,
        label: str,
        iterable: Iterable[Any] | None = None,
        total: int | None = None,
        done: int = 0,
        unit: str = "steps",
        leave: bool = True,
        show: bool = True,
    ) -> None:
        self.notes: Sequence[str] = ()
        """Texts behind the bar, the most important one first; those that do not fit are omitted."""
        shown = show and _is_terminal()
        super().__init__(
            iterable, label, total, leave, initial=done, unit=unit, disable=not shown, dynamic_ncols=True, maxinterval=1
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """Values of tqdm's format; the format itself depends on the width."""
        values = dict(super().format_dict)
        columns = max((values["ncols"] or 80) - _FREE_COLUMNS, 1)
        done, total, elapsed = values["n"], values["total"], values["elapsed"]
        if not total:
            text = f"{self.desc}  {done:,} {self.unit}"
        else:
            rate = values["rate"] or (done - self.initial) / max(elapsed, 1e-9)
            time = [f"{clock((total - done) / rate)} left"] if rate and done < total else []
            time = [f"in {clock(elapsed)}"] if done >= total else time
            text = bar_format(columns, self.desc, done, total, [*time, *self.notes])
        return {**values, "ncols": columns, "bar_format": text}


def bar_format(columns: int, label: str, done: int, total: int, notes: Sequence[str]) -> str:
    """Return the line of a bar, with `{bar}` in the place of the bar itself.

    Args:
        columns: width of the line.
        label: its first word.
        done: steps done.
        total: number of steps.
        notes: texts behind the bar; the last ones are omitted if the bar would be too short.
    """
    head = f"{label} {done / total:4.0%}|"
    parts = [f" {done:>{len(f'{total:,}')},}/{total:,}", *(f"  {note}" for note in notes)]
    while parts and columns - len(head) - 1 - sum(map(len, parts)) < columns // _LEAST_BAR:
        parts.pop()
    return f"{head}{{bar}}|{''.join(parts)}"


def _is_terminal() -> bool:
    """Whether stderr is a terminal that can show a bar: some terminals have no columns."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False
