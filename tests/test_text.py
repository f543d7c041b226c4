"""Text for messages."""

from __future__ import annotations

import pytest

from distrain.text import clock, percent, plural, printable, shortened


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


def test_one_thing_is_singular_and_thousands_have_a_separator() -> None:
    counts = [plural(0, "step"), plural(1, "process"), plural(2, "process"), plural(1000, "class"), plural(1, "node")]
    assert counts == ["0 steps", "1 process", "2 processes", "1,000 classes", "1 node"]


def test_fractions_have_one_decimal() -> None:
    assert [percent(0.9675), percent(0.219), percent(1.0), percent(0.0)] == ["96.8 %", "21.9 %", "100.0 %", "0.0 %"]


def test_a_duration_has_hours_only_where_there_are_some() -> None:
    assert [clock(7), clock(59.6), clock(6100)] == ["0:07", "1:00", "1:41:40"]
