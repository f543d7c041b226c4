"""What the fault tests share: one data set, and one run that nothing happened to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import make
from harness import Job, Trained, small_run, trained


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 samples in 12 shards of 6 lanes: an epoch of 25 steps of 16 begins a round every 12 or 13 steps."""
    folder = tmp_path_factory.mktemp("faults") / "data"
    make(folder, 403, 100, image_size=8, shards=12, lanes=6)
    return folder


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """`undisturbed(processes)`: what the small run trains when nothing happens to it."""
    found: dict[Any, Trained] = {}

    def get(processes: int = 2, /, **sections: dict[str, Any]) -> Trained:
        key = (processes, repr(sections))
        if key not in found:
            folder = tmp_path_factory.mktemp("undisturbed")
            with Job(small_run(data, folder / "run", **sections), folder, processes) as job:
                assert job.wait() == 0, job.output
            found[key] = trained(folder / "run")
        return found[key]

    return get


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
