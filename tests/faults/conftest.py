"""What the fault tests share: going on, a copy to harm, and which tests have passed already."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Job, Trained, small_run, trained

REPO = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True, scope="session")
def _hangups_count() -> None:
    """Under nohup (an hour of tests) jobs would inherit that SIGHUP is ignored, as they should of a user's nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _passed() -> Path | None:
    """With DISTRAIN_FAULTS: where tests that have passed with this code are noted."""
    folder = os.environ.get("DISTRAIN_FAULTS")
    if not folder:
        return None
    content = b"\0".join(path.read_bytes() for path in sorted(REPO.glob("distrain/**/*.py")))
    return Path(folder, f"passed-{hashlib.sha256(content).hexdigest()[:12]}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What has passed with this code is not run again."""
    noted = _passed()
    done = set(noted.read_text().splitlines()) if noted is not None and noted.exists() else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what has passed."""
    noted = _passed()
    if noted is not None and report.when == "call" and report.passed:
        noted.parent.mkdir(parents=True, exist_ok=True)
        with noted.open("a") as file:
            file.write(report.nodeid + "\n")


@pytest.fixture
def finish(data: Path, tmp_path: Path) -> Callable[..., Trained]:
    """`finish(run)`: the same command again, until the run is done; what it trained."""

    def again(run: Path, processes: int = 2, /, **sections: dict[str, Any]) -> Trained:
        with Job(small_run(data, run, **sections), tmp_path, processes) as job:
            assert job.wait() == 0, job.output
        return trained(run)

    return again


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a data set, to be harmed."""

    def copy(dataset: Path) -> Path:
        shutil.copytree(dataset, tmp_path / "data")
        return tmp_path / "data"

    return copy
