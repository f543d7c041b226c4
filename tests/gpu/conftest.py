"""The suite for GPUs, `make gpu`: its fixtures, and one table and JSON file of all results and measurements.

With `--gpu cpu` the same tests run on CPUs, as far as they go: so they are known to work before a GPU is at hand.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Job

import distrain
from distrain import files
from distrain.data.manifest import Dataset

Sections = dict[str, dict[str, Any]]


@dataclass
class Check:
    """A test of the suite: its outcome, and what it measured."""

    part: str
    name: str
    outcome: str = "not run"
    reason: str = ""
    seconds: float = 0.0
    measured: list[tuple[str, float, str]] = field(default_factory=list)
    """Name, value and unit."""


_CHECKS = pytest.StashKey[dict[str, Check]]()


def pytest_configure(config: pytest.Config) -> None:
    """Let cuBLAS be deterministic in this process: it reads this variable at its first use."""
    if config.getoption("--gpu") is not None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_finish(session: pytest.Session) -> None:
    """List the tests, so that one that is never run is seen."""
    checks = session.config.stash.setdefault(_CHECKS, {})
    for item in session.items:
        if item.get_closest_marker("gpu") is not None:
            checks[item.nodeid] = Check(item.path.stem.removeprefix("test_gpu_"), item.name.removeprefix("test_"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Record the outcome of a test: that of its call, or of a set-up that failed or skipped."""
    report: pytest.TestReport = yield
    check = item.config.stash[_CHECKS].get(item.nodeid)
    if check is not None:
        check.seconds += report.duration
        if report.when == "call" or not report.passed:
            check.outcome = report.outcome
            check.reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table, and write the file."""
    checks = list(config.stash.get(_CHECKS, {}).values())
    if config.getoption("--gpu") is None or not checks:
        return
    machine = _machine(config.getoption("--gpu"))
    terminalreporter.write_line("\n".join(["", *_table(machine, checks)]))
    if out := config.getoption("--gpu-out"):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine, "checks": [asdict(check) for check in checks]}
        files.replace(Path(out), json.dumps(content, indent=1) + "\n")


def _machine(device: str) -> dict[str, Any]:
    """Return what the results were measured on."""
    facts: dict[str, Any] = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda" and torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0],
        }
    return facts


def _table(machine: dict[str, Any], checks: list[Check]) -> list[str]:
    """Format the results: a line for each test, followed by what it measured."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items())]
    for check in checks:
        lines.append(f"{check.part:11} {check.outcome:8} {check.seconds:6.1f} s  {check.name}  {check.reason}".rstrip())
        lines += [f"{'':31}{name}: {value:,.4g} {unit}".rstrip() for name, value, unit in check.measured]
    counts = {
        outcome: sum(each.outcome == outcome for each in checks) for outcome in sorted({c.outcome for c in checks})
    }
    total = sum(check.seconds for check in checks)
    return [*lines, f"{', '.join(f'{count} {outcome}' for outcome, count in counts.items())}, in {total:,.0f} s"]


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str, float, str], None]:
    """`measured(name, value, unit)` adds a figure to the table."""
    check = request.config.stash[_CHECKS][request.node.nodeid]
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
    return "resnet9" if device == "cuda" else "models_for_tests:Mixed"


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
    """`launched(tree, processes)`: a job under `distrain launch` on the device of the suite."""

    def launch(tree: Sections, processes: int, **options: Any) -> Job:
        on_device = {**tree, "run": {**tree["run"], "device": device}}
        return Job(on_device, tmp_path, processes, **options)

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
            "augment": {"flip": True, "crop_padding": 2, "cutout": 4, "mixup": 0.2},
            "train": {"max_steps": 40, "global_batch_size": 48, "lr": 0.01, "deterministic": True},
            "checkpoint": {"every_steps": 20, "keep": 0},
            "eval": {"every_steps": 0},
            "log": {"report": False},
        }
        for section, values in sections.items():
            tree.setdefault(section, {}).update(values)
        return tree

    return build
