"""A rank that fails under NCCL: the job ends in seconds with the documented code, and the same command resumes it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Job, exit_file, small_run

from distrain.data.manifest import Dataset

pytestmark = pytest.mark.gpu
Launched = Callable[..., Job]


@pytest.fixture
def tree(small: Dataset, tmp_path: Path) -> dict[str, dict[str, Any]]:
    return small_run(small.root, tmp_path / "run", train={"max_steps": 400}, timeouts={"step_seconds": 20})


def _finish(tree: dict[str, dict[str, Any]], processes: int, launched: Launched) -> None:
    with launched(tree, processes) as job:
        assert job.wait() == 0, job.output


def test_a_killed_rank(several: int, tree: Any, launched: Launched, measured: Any) -> None:
    with launched(tree, several) as job:
        job.wait_for("train", 23)
        job.signal(f"rank{several - 1}", number=signal.SIGKILL)
        started = time.monotonic()
        assert job.wait() == 75, job.output
        measured("until the job has ended", time.monotonic() - started, "s")
    assert "SIGKILL" in exit_file(job.run)["reason"]
    _finish(tree, several, launched)


def test_a_rank_that_raises(several: int, tree: Any, launched: Launched, measured: Any) -> None:
    with launched(tree, several, environ={"FAULT": f"raise:{several - 1}:30"}) as job:
        job.wait_for("train", 1)
        started = time.monotonic()
        assert job.wait() == 1, job.output
        measured("from the first step until the job has ended", time.monotonic() - started, "s")
    assert f"rank {several - 1} failed first" in job.output
    assert "a fault of the model" in exit_file(job.run)["reason"]
    _finish(tree, several, launched)


def test_a_stopped_rank(several: int, tree: Any, launched: Launched, measured: Any) -> None:
    with launched(tree, several) as job:
        job.wait_for("train", 23)
        job.signal(f"rank{several - 1}", number=signal.SIGSTOP)
        started = time.monotonic()
        assert job.wait() == 75, job.output
        measured("until the job has ended; timeouts.step_seconds is 20", time.monotonic() - started, "s")
    assert f"rank {several - 1} is behind" in exit_file(job.run)["reason"]
    _finish(tree, several, launched)


def test_a_stop_is_agreed_and_saved(several: int, tree: Any, launched: Launched) -> None:
    with launched(tree, several) as job:
        job.wait_for("train", 23)
        job.signal("launcher")
        assert job.wait() == 75, job.output
    assert "is saved" in exit_file(job.run)["reason"]
    _finish(tree, several, launched)
