"""The part of a run's wall time that was spent in steps that counted."""

from __future__ import annotations

from typing import Any

import pytest

from distrain.runs.goodput import measure


def attempt(start: str, **values: Any) -> dict[str, Any]:
    return {"start": f"2026-01-31T{start}Z", "renewed": f"2026-01-31T{start}Z", "ended": None, **values}


FIRST = attempt("12:00:00", seconds=100.0, startup_seconds=10.0)


@pytest.mark.parametrize(
    ("history", "wall", "pause", "fraction"),
    [
        ([], 0, 0, None),
        ([FIRST], 110, 0, 55 / 110),
        # It began 20 s after the end of the first one: these are in no attempt.
        ([FIRST, attempt("12:02:10", seconds=50.0, startup_seconds=10.0)], 170, 20, 55 / 170),
        # It waited for the folder while the first one had it.
        ([FIRST, attempt("12:01:45", seconds=50.0, startup_seconds=60.0)], 165, 0, 55 / 165),
        # A file of an older version: whole seconds of the clock, until the end or the last renewal.
        ([attempt("12:00:00", ended="2026-01-31T12:01:50Z")], 110, 0, 55 / 110),
        ([attempt("12:00:00", renewed="2026-01-31T12:01:50Z")], 110, 0, 55 / 110),
        ([attempt("12:00:00", seconds=50.0)], 50, 0, 1.0),  # never more than 1, whatever the clocks say
        ([FIRST, attempt("11:00:00", seconds=5.0)], 110, 0, 55 / 110),  # the clock was set back
    ],
)
def test_goodput_is_a_part_of_the_wall_time_of_all_attempts(
    history: list[dict[str, Any]], wall: float, pause: float, fraction: float | None
) -> None:
    spent = measure(55.0, 0.0, history)
    assert (spent.train_seconds, spent.attempt_seconds, spent.pause_seconds) == (55.0, wall, pause)
    assert spent.fraction == fraction


def test_an_attempt_that_was_killed_took_at_least_the_time_up_to_its_checkpoint() -> None:
    assert measure(55.0, 80.0, [attempt("12:00:00", seconds=5.0)]).fraction == 55 / 80
