"""Text for messages: numbers, names that come with data, and lists that may be long."""

from __future__ import annotations

from collections.abc import Sequence


def plural(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1: `1 process`, `2,000 processes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def percent(fraction: float) -> str:
    """Format a fraction as all messages show it, `96.7 %`: accuracies, probabilities, parts of a time."""
    return f"{100 * fraction:.1f} %"


def clock(seconds: float) -> str:
    """Format a duration as 0:07 or 1:01:40: minutes and seconds, with hours if there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def printable(name: str) -> str:
    """Return a name with each unprintable character replaced, so that it is one line without control sequences."""
    return "".join(letter if letter.isprintable() else "�" for letter in name)


def shortened(items: Sequence[str], limit: int) -> list[str]:
    """Return the first `limit` items, and `and N more` as a last one if there are N more."""
    more = len(items) - limit
    return [*items[:limit], f"and {more} more"] if more > 0 else list(items)
