"""Text for messages: numbers, names and values that come from outside, and lists that may be long."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")

NAME_LENGTH = 400
"""Longest name that a message shows whole, in characters: most paths are shorter."""

_LINE_LENGTH = 2000
"""Longest line of a message, in characters."""

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but newline and tab, line separators, marks that reverse the direction, undecodable bytes."""


class Values(reprlib.Repr):
    """Shows values as Python writes them, such as ``'fast'`` or ``[1, 2]``, in one short line."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxlong = self.maxother = 120

    def repr(self, x: Any) -> str:
        """Return a value's short line."""
        return printable(super().repr(x))


def printable(name: object, limit: int = NAME_LENGTH) -> str:
    """Return a name or path as one line of at most `limit` characters without control sequences.

    Characters that cannot be printed are shown as escapes (``\\n``, ``\\x1b``); a longer name is cut in its middle.
    """
    text = shortened_middle(str(name), limit)
    if text.isprintable():
        return text
    return shortened_middle("".join(each if each.isprintable() else _escape(each) for each in text), limit)


def shown(value: object) -> str:
    """Return a value as Python writes it, such as ``'fast'`` or ``[1, 2]``, in one short line."""
    return Values().repr(value)


def shortened_middle(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters: the middle of a longer one is dropped."""
    if len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}…{text[len(text) - (limit - head - 1) :]}"


def without_controls(text: str) -> str:
    """Return a text of several lines with all control characters but newlines and tabs shown as escapes."""
    return _CONTROL.sub(lambda match: _escape(match[0]), text)


def message(text: str) -> str:
    """Return a message as it is shown to people: without control sequences, its lines of a limited length."""
    return "\n".join(shortened_middle(line, _LINE_LENGTH) for line in without_controls(text).split("\n"))


def shortened(items: Sequence[str], limit: int) -> list[str]:
    """Return the first `limit` items, and `and N more` as a last one if there are N more."""
    more = len(items) - limit
    return [*items[:limit], f"and {more} more"] if more > 0 else list(items)


def named(items: Sequence[Item], name: Callable[[Item], str], limit: int = 3) -> str:
    """Return the names of the first `limit` items, and how many more there are."""
    names = [printable(name(item)) for item in items[:limit]]
    return ", ".join(names) + (f" and {len(items) - limit:,} more" if len(items) > limit else "")


def counted(remarks: Iterable[tuple[str, Item]], name: Callable[[Item], str], limit: int = 3) -> list[str]:
    """Return one line for each text, with the number of items that it was said about and the names of the first.

    Texts that differ only in numbers count as the same. The most frequent one comes first.
    """
    by_text: dict[str, tuple[str, list[Item]]] = {}
    for text, item in remarks:
        by_text.setdefault(re.sub(r"\d+", "0", text), (text, []))[1].append(item)
    most_frequent_first = sorted(by_text.values(), key=lambda entry: -len(entry[1]))
    return [
        f"{len(items):,} × {printable(text.strip())}: {named(items, name, limit)}"
        for text, items in most_frequent_first
    ]


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


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
