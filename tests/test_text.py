"""Text for messages."""

from __future__ import annotations

import pytest

from distrain.text import printable, shortened


def test_a_printable_name_has_one_line_and_no_control_sequences() -> None:
    assert printable("café\n\x1b[31m") == "café��[31m"


@pytest.mark.parametrize(
    ("items", "shown"),
    [
        ([], []),
        (["a", "b"], ["a", "b"]),
        (["a", "b", "c"], ["a", "b", "and 1 more"]),
        (["a", "b", "c", "d", "e"], ["a", "b", "and 3 more"]),
    ],
)
def test_a_long_list_is_shortened_and_says_by_how_much(items: list[str], shown: list[str]) -> None:
    assert shortened(items, 2) == shown
