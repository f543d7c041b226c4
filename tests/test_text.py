"""Text for messages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain import failure_report
from distrain.environment import Environment
from distrain.text import NAME_LENGTH, clock, percent, plural, printable, shortened, shown, without_controls

ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=600)
"""Text with surrogates (undecodable bytes), control characters and marks that reverse the direction."""


def test_a_printable_name_has_one_line_and_no_control_sequences() -> None:
    assert printable("café\n\x1b[31m") == "café\\n\\x1b[31m"
    assert printable("\udcff\u202e") == "\\udcff\\u202e"


def test_a_long_name_keeps_its_start_and_its_end() -> None:
    assert printable("a" * 500 + "b" * 500, 9) == "aaaa…bbbb"
    assert printable("x" * NAME_LENGTH) == "x" * NAME_LENGTH


def test_a_value_is_shown_as_python_writes_it_while_it_is_short() -> None:
    assert [shown(value) for value in ("fast", [1, 2], {"a": None}, "\x1b\n")] == [
        "'fast'", "[1, 2]", "{'a': None}", "'\\x1b\\n'",
    ]  # fmt: skip


def test_a_message_keeps_its_lines_and_shows_other_controls_as_escapes() -> None:
    assert without_controls("a\n  b\tc\r\x1b[2J\x9b\u202e\udcff") == "a\n  b\tc\\r\\x1b[2J\\x9b\\u202e\\udcff"


@settings(deadline=None)
@given(ANY_TEXT, st.integers(10, 500))
def test_any_name_is_one_short_printable_line(text: str, limit: int) -> None:
    result = printable(text, limit)
    assert result.isprintable()
    assert len(result) <= limit
    assert result == text or not text.isprintable() or len(text) > limit


@settings(deadline=None)
@given(
    st.recursive(
        ANY_TEXT | st.integers() | st.floats() | st.none() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner),
        max_leaves=20,
    )
)
def test_any_value_is_one_short_printable_line(value: Any) -> None:
    assert shown(value).isprintable()
    assert len(shown(value)) <= NAME_LENGTH


@settings(deadline=None)
@given(ANY_TEXT)
def test_no_message_has_a_control_character_but_newlines_and_tabs(text: str) -> None:
    result = without_controls(text)
    assert all(each.isprintable() or each in "\n\t" or each.isspace() for each in result if ord(each) < 0xA0)
    result.encode()  # no surrogate
    assert result.count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], []),
        (["a", "b"], ["a", "b"]),
        (["a", "b", "c"], ["a", "b", "and 1 more"]),
        (["a", "b", "c", "d", "e"], ["a", "b", "and 3 more"]),
    ],
)
def test_a_long_list_is_shortened_and_says_by_how_much(items: list[str], expected: list[str]) -> None:
    assert shortened(items, 2) == expected


def test_one_thing_is_singular_and_thousands_have_a_separator() -> None:
    counts = [plural(0, "step"), plural(1, "process"), plural(2, "process"), plural(1000, "class"), plural(1, "node")]
    assert counts == ["0 steps", "1 process", "2 processes", "1,000 classes", "1 node"]


def test_fractions_have_one_decimal() -> None:
    assert [percent(0.9675), percent(0.219), percent(1.0), percent(0.0)] == ["96.8 %", "21.9 %", "100.0 %", "0.0 %"]


def test_a_duration_has_hours_only_where_there_are_some() -> None:
    assert [clock(7), clock(59.6), clock(6100)] == ["0:07", "1:00", "1:41:40"]


def test_the_message_and_the_traceback_of_a_failure_are_bounded() -> None:
    failure = failure_report.failure_of(RuntimeError("x" * 1_000_000 + "\x1b[2J"), Environment())
    assert len(failure.message) <= 2000
    assert len(failure.traceback) <= 5000
    assert "\x1b" not in failure.message + failure.traceback
