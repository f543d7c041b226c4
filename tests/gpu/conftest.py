"""The suite for GPUs, `make gpu`: its fixtures, and one table and JSON file of all results and measurements.

With `--gpu cpu` the same tests run on CPUs, as far as they go: so they are known to work before a GPU is at hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_results import Check, Results
from harness import Job, clean_environ

import distrain
from distrain.data.manifest import Dataset

Sections = dict[str, dict[str, Any]]

_RESULTS = pytest.StashKey[Results]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin the results, and let cuBLAS be deterministic in this process: it reads a variable at its first use."""
    device, out = config.getoption("--gpu"), config.getoption("--gpu-out")
    if device is not None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        config.stash[_RESULTS] = Results(device, Path(out) if out else None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """List the tests, so that one that is never run is seen."""
    if (results := session.config.stash.get(_RESULTS, None)) is not None:
        for item in session.items:
            part, name = item.path.stem.removeprefix("test_gpu_"), item.name.removeprefix("test_")
            results.checks[item.nodeid] = Check(part, name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Record the outcome of a test: that of its call, or of a set-up that failed or skipped."""
    report: pytest.TestReport = yield
    results = item.config.stash.get(_RESULTS, None)
    if results is not None:
        check = results.checks[item.nodeid]
        check.seconds += report.duration
        if report.when == "call" or not report.passed:
            check.outcome, check.reason = report.outcome, _reason(report, call)
        if report.when == "teardown":
            results.write()
    return report


def _reason(report: pytest.TestReport, call: pytest.CallInfo[None]) -> str:
    """Return why a test was skipped or failed, in one line."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return call.excinfo.exconly().partition("\n")[0] if call.excinfo is not None else ""


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table, and write the file."""
    results = config.stash.get(_RESULTS, None)
    if results is not None and results.checks:
        terminalreporter.write_line("\n".join(["", *results.table()]))
        results.write()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the variables of srun: a test is a run on this node, also if srun has started the suite on several."""
    for name in os.environ.keys() - clean_environ().keys():
        monkeypatch.delenv(name)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str, float, str], None]:
    """`measured(name, value, unit)` adds a figure to the table."""
    check = request.config.stash[_RESULTS].checks[request.node.nodeid]
    return lambda name, value, unit: check.measured.append((name, value, unit))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device of the suite: cuda, or cpu to try it."""
    chosen: str = request.config.getoption("--gpu")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.fail("--gpu cuda: this process sees no GPU")
    return chosen


@pytest.fixture(scope="session")
def large(device: str) -> str:
    """A model with convolutions and BatchNorm: resnet9, which on CPUs would take minutes."""
    return "resnet9" if device == "cuda" else "models_for_tests:Normed"


@pytest.fixture(scope="session")
def most(device: str) -> int:
    """The number of GPUs, 8 at most: the data set has lanes for 12 processes; two processes on CPUs."""
    return min(torch.cuda.device_count(), 8) if device == "cuda" else 2


@pytest.fixture
def several(most: int) -> int:
    """The number of processes of a test that needs several GPUs; skips where there is one."""
    if most < 2:
        pytest.skip("needs two GPUs")
    return most


@pytest.fixture(scope="session")
def sizes(most: int) -> list[int]:
    """Numbers of processes: 1, 2, 4 and 8, as far as there are GPUs."""
    return [size for size in (1, 2, 4, 8) if size <= most]


@pytest.fixture
def launched(device: str, tmp_path: Path) -> Callable[..., Job]:
    """`launched(tree, processes)`: a job under `distrain launch` on the device of the suite.

    It is on this node alone, in an allocation of several nodes too.
    """

    def launch(tree: Sections, processes: int, **options: Any) -> Job:
        on_device = {**tree, "run": {**tree["run"], "device": device}}
        return Job(on_device, tmp_path, processes, ["--nodes", "1"], **options)

    return launch


@pytest.fixture
def train(device: str, launched: Callable[..., Job]) -> Callable[..., Path]:
    """`train(tree, processes)` trains a run to its end, and returns its folder; one process is this one, to be fast."""

    def run(tree: Sections, processes: int = 1) -> Path:
        if processes == 1:
            distrain.train({**tree, "run": {**tree["run"], "device": device}})
        else:
            with launched(tree, processes) as job:
                assert job.wait(400) == 0, job.output[-6000:]
        return Path(tree["run"]["dir"])

    return run


@pytest.fixture
def configuration(small: Dataset, tmp_path: Path) -> Callable[..., Sections]:
    """`configuration(NAME, section=…)`: a run of 40 steps with all augmentations, in a folder of this name."""

    def build(name: str, /, **sections: dict[str, Any]) -> Sections:
        tree: Sections = {
            "data": {"dir": str(small.root), "audit": True},
            "run": {"dir": str(tmp_path / name), "seed": 7},
            "augment": {
                "flip": True,
                "crop_padding": 2,
                "cutout": 4,
                "erasing": 0.25,
                "mixup": 0.2,
                "cutmix": 1.0,
            },
            "train": {"max_steps": 40, "global_batch_size": 48, "lr": 0.01, "deterministic": True},
            "checkpoint": {"every_steps": 20, "keep": 0},
            "eval": {"every_steps": 0},
            "log": {"report": False},
        }
        for section, values in sections.items():
            tree.setdefault(section, {}).update(values)
        return tree

    return build
