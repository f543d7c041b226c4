"""The process that is slower than the others: its name in metrics.jsonl, and a warning if it stays slow."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from group import Group
from hypothesis import given
from hypothesis import strategies as st

from distrain.data.manifest import Dataset
from distrain.distributed.busy_clock import BusyTime
from distrain.training import slow_ranks
from distrain.training.slow_ranks import FACTOR, LINES, SECONDS, Streak, find_slowest, next_streak, warning


def times(*seconds: float, data: Sequence[float] = (), samples: Sequence[float] = ()) -> list[BusyTime]:
    return [
        BusyTime(each, data[rank] if data else 0.0, samples[rank] if samples else 8.0)
        for rank, each in enumerate(seconds)
    ]


@pytest.mark.parametrize(
    ("processes", "rank", "factor", "longer"),
    [
        (times(0.1, 0.1, 0.2), 2, 2.0, "computing"),
        (times(0.1, 0.3), 1, 3.0, "computing"),  # of two, it is compared with the other one
        (times(0.1, 0.1, 0.1, data=(0, 0.1, 0)), 1, 2.0, "data"),
        (times(0.1, 0.2, samples=(4, 8)), 1, 1.0, "computing"),  # a local batch twice as large
        (times(0.3, 0.1, samples=(4, 8)), 0, 3.0, "computing"),  # a smaller one is no excuse
        (times(0.1, 0.2, samples=(0, 8)), 1, 0.0, "computing"),  # the others have nothing to do
        (times(0.0, 0.0, 0.0), 0, 0.0, "computing"),
    ],
)
def test_the_slowest_process_is_compared_with_the_median_of_the_others(
    processes: list[BusyTime], rank: int, factor: float, longer: str
) -> None:
    slowest = find_slowest(processes)
    assert (slowest.rank, slowest.longer) == (rank, longer)
    assert slowest.factor == pytest.approx(factor, abs=1e-6)


@given(st.lists(st.floats(0.001, 10), min_size=2, max_size=9))
def test_no_process_is_slow_unless_it_is_above_all_others(seconds: list[float]) -> None:
    slowest = find_slowest(times(*seconds))
    assert slowest.seconds == max(seconds)
    others = sorted([*seconds[: slowest.rank], *seconds[slowest.rank + 1 :]])
    assert slowest.is_slow == (slowest.factor > FACTOR)
    assert max(seconds) / others[-1] <= slowest.factor * (1 + 1e-9) <= max(seconds) / others[0] * (1 + 2e-9)


def warnings_of(ranks: Sequence[int | None], seconds: float = SECONDS / LINES) -> list[int]:
    """The lines with a warning, where in each line this rank is slow."""
    streak, lines = Streak(), []
    for line, rank in enumerate(ranks, 1):
        slowest = find_slowest(times(*(0.2 if each == rank else 0.1 for each in range(3))))
        before, streak = streak, next_streak(streak, slowest, seconds)
        lines += [line] if streak.is_long and not before.is_long else []
    return lines


def test_there_is_one_warning_until_the_process_was_normal_again() -> None:
    assert warnings_of([1] * (LINES - 1)) == []
    assert warnings_of([1] * 50) == [LINES]
    assert warnings_of([1] * 20 + [None] + [1] * 20) == [LINES, 21 + LINES]
    assert warnings_of([1, 2] * 30) == []
    assert warnings_of(([1] * 9 + [None]) * 5) == []
    assert warnings_of([1] * 50, seconds=SECONDS / 40) == [40]
    assert warnings_of([1] * 50, seconds=0.1) == []


def test_the_warning_names_rank_host_device_and_cause() -> None:
    text = warning(find_slowest(times(0.1, 0.1, 0.25)), "node-7", "cuda:3")
    assert text.startswith("rank 2 on node-7, cuda:3, is slow")
    assert "250.0 ms a step, 2.50 ×; it computes longer: check cuda:3" in text
    assert "disk, network" in warning(find_slowest(times(0.1, 0.1, data=(0, 0.1))), "a", "cpu")


def slow_on_rank_1(images: Any, random_bits: Any) -> Any:
    """Augment as a slow processor would."""
    time.sleep(0.03 if os.environ.get("RANK") == "1" else 0.0)
    return images


def train_recorded(config: dict[str, Any]) -> list[str]:
    """Train, and return the messages of this process; no time is too short for a warning."""
    import distrain

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("distrain")
    logger.addHandler(handler)
    try:
        with mock.patch.object(slow_ranks, "SECONDS", 0.0):
            distrain.train(config)
    finally:
        logger.removeHandler(handler)
    return messages


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("model", "train"), [("net", {}), ("models_for_tests:Normed", {}), ("net", {"virtual_ranks": 6})]
)
def test_a_process_that_is_slow_for_real_is_named(
    model: str, train: dict[str, Any], group: Callable[[int], Group], small: Dataset, tmp_path: Path
) -> None:
    config = {
        "data": {"dir": str(small.root)}, "run": {"dir": str(tmp_path / "run")}, "model": {"name": model},
        "train": {"max_steps": 25, "global_batch_size": 24, **train}, "log": {"every_steps": 1, "report": False},
        "augment": {"also": "test_slow_ranks:slow_on_rank_1"},
    }  # fmt: skip
    messages, *others = group(3).call("function", train_recorded, config)
    warned = [text for text in messages if "is slow, and all others wait for it" in text]
    assert warned
    assert all(text.startswith(f"rank 1 on {socket.gethostname()}, cpu, ") for text in warned)
    assert not any("is slow" in text for each in others for text in each)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    named = [line["train/slowest_rank"] for line in lines if "train/slowest_rank" in line]
    assert named.count(1) > 18
    assert all(line["train/slowest_factor"] > FACTOR for line in lines if "train/slowest_factor" in line)
