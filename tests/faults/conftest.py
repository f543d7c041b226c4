"""Shared by the fault tests: a way to finish a run, a copy of a data set to damage, the list of tests that passed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Job, TrainedRun, small_run, trained

REPO = Path(__file__).parent.parent.parent


def _passed() -> Path | None:
    """Return the file that lists the tests passed with this code, in the folder DISTRAIN_FAULTS; None without it."""
    folder = os.environ.get("DISTRAIN_FAULTS")
    if not folder:
        return None
    content = b"\0".join(path.read_bytes() for path in sorted(REPO.glob("distrain/**/*.py")))
    return Path(folder, f"passed-{hashlib.sha256(content).hexdigest()[:12]}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Do not run tests again that have passed with this code."""
    record = _passed()
    done = set(record.read_text().splitlines()) if record is not None and record.exists() else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record a test that has passed."""
    record = _passed()
    if record is not None and report.when == "call" and report.passed:
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a") as file:
            file.write(report.nodeid + "\n")


@pytest.fixture
def finish(data: Path, tmp_path: Path) -> Callable[..., TrainedRun]:
    """`finish(run)` starts the same command again, to the end of the run, and returns what it trained."""

    def again(run: Path, processes: int = 2, /, **sections: dict[str, Any]) -> TrainedRun:
        with Job(small_run(data, run, **sections), tmp_path, processes) as job:
            assert job.wait() == 0, job.output
        return trained(run)

    return again


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """`copied(dataset)` returns a copy of a data set, to be damaged."""

    def copy(dataset: Path) -> Path:
        shutil.copytree(dataset, tmp_path / "data")
        return tmp_path / "data"

    return copy
