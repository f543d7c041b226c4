"""Text for messages: names that come with data, and lists that may be long."""

from __future__ import annotations

from collections.abc import Sequence


def printable(name: str) -> str:
    """Return a name with each unprintable character replaced, so that it is one line without control sequences."""
    return "".join(letter if letter.isprintable() else "�" for letter in name)


def shortened(items: Sequence[str], limit: int) -> list[str]:
    """Return the first `limit` items, and `and N more` as a last one if there are N more."""
    more = len(items) - limit
    return [*items[:limit], f"and {more} more"] if more > 0 else list(items)
