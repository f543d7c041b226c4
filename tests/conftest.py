"""Data sets and groups of processes that tests share."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import make
from group import Group
from harness import TrainedRun, arguments, ip, small_run, trained

from distrain import config
from distrain.data.manifest import Dataset

CIFAR10 = Path(os.environ.get("DISTRAIN_CIFAR10_JPEG", Path(__file__).parent.parent.parent / "shared" / "data"))
"""Folder with cifar10-train.tar.gz and cifar10-test.tar.gz, JPEG files in class folders."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `make gpu`."""
    parser.addoption(
        "--gpu",
        choices=("cuda", "cpu"),
        help="run the tests for GPUs, and only these; cpu: try them on CPUs, as far as they go",
    )
    parser.addoption(
        "--gpu-work", metavar="FOLDER", help="for tests on several nodes: a new folder that all of them see"
    )
    parser.addoption("--gpu-out", metavar="FILE", help="JSON file for the results and measurements of --gpu")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from all other tests: their groups use gloo, and more processes than there may be GPUs."""
    if config.getoption("--gpu") is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the tests for GPUs, or all others."""
    chosen = [item for item in items if (item.get_closest_marker("gpu") is None) == (config.getoption("--gpu") is None)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(autouse=True, scope="session")
def _default_signals() -> None:
    """Restore the defaults of SIGINT and SIGHUP.

    After `nohup` or `&`, the processes of tests would inherit that these signals are ignored.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """1,003 samples in 24 shards of 12 lanes, and 203 test samples: nothing divides evenly."""
    return make(tmp_path_factory.mktemp("small") / "data", 1003, 203, shards=24, lanes=12)


@pytest.fixture(scope="session")
def group() -> Iterator[Callable[[int], Group]]:
    """`group(W)`: the session's group of W ranks."""
    groups: dict[int, Group] = {}

    def get(size: int) -> Group:
        if size not in groups:
            groups[size] = Group(size)
        return groups[size]

    yield get
    for one in groups.values():
        one.close()


@pytest.fixture(scope="session")
def cifar10_archives() -> list[Path]:
    """The archives of real images; skips where they are missing."""
    archives = [CIFAR10 / f"cifar10-{split}.tar.gz" for split in ("train", "test")]
    if not all(archive.is_file() for archive in archives):
        pytest.skip(f"no CIFAR-10 archives in {CIFAR10} (set DISTRAIN_CIFAR10_JPEG)")
    return archives


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """403 samples in 12 shards of 6 lanes: an epoch of 24 steps of 16 begins a round every 12 or 13 steps."""
    folder = tmp_path_factory.mktemp("faults") / "data"
    make(folder, 403, 100, image_size=8, shards=12, lanes=6)
    return folder


@pytest.fixture(scope="session")
def undisturbed(
    data: Path, group: Callable[[int], Group], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TrainedRun]:
    """`undisturbed(processes)`: the result of the small run without faults, trained by a group without a launcher."""
    runs: dict[Any, TrainedRun] = {}

    def get(processes: int = 2, /, **sections: dict[str, Any]) -> TrainedRun:
        key = (processes, repr(sections))
        if key not in runs:
            run = tmp_path_factory.mktemp("undisturbed") / "run"
            tree = small_run(data, run, **sections)
            group(processes).train(config.load(None, arguments(tree)).model_dump())
            runs[key] = trained(run)
        return runs[key]

    return get


@pytest.fixture
def nodes() -> Iterator[tuple[list[str], str]]:
    """Two network name spaces on one bridge: their names, and the name of the second one's link on the bridge."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    mark = uuid.uuid4().hex[:6]
    bridge, names = f"dtb{mark}", [f"dt{mark}-{number}" for number in range(2)]
    try:
        ip("link", "add", bridge, "type", "bridge")
    except subprocess.CalledProcessError:
        pytest.skip("cannot make network name spaces here")
    try:
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"dtv{mark}{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"dtv{mark}{number}", "master", bridge, "up")
            ip("-n", name, "addr", "add", f"10.99.7.{10 + number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names, f"dtv{mark}1"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        for number in range(2):
            subprocess.run(["ip", "link", "delete", f"dtv{mark}{number}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", bridge], check=False, capture_output=True)
