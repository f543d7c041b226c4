"""Names that come with data, made fit to be shown."""

from __future__ import annotations


def printable(name: str) -> str:
    """In one line, and without what would steer a terminal, whatever a file or class is called."""
    return "".join(letter if letter.isprintable() else "�" for letter in name)
