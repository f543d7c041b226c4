"""Two nodes or more, `make gpu-nodes` on each of them at the same time: NCCL between them, and the loss of one.

Every node runs the same tests in the same order, so that each of them starts its part of every job.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Job, small_run

from distrain.data.manifest import Dataset
from distrain.launcher import cluster
from distrain.launcher.cluster import Topology
from distrain.tools.hash_runs import check_equal, hash_runs

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def topology() -> Topology:
    detected = cluster.detect(os.environ, cluster.Options(), socket.getfqdn)
    if detected.nodes < 2:
        pytest.skip("needs several nodes: `make gpu-nodes` on each of them")
    return detected


@pytest.fixture(scope="module")
def work(request: pytest.FixtureRequest, topology: Topology) -> Path:
    folder = request.config.getoption("--gpu-work")
    if folder is None:
        pytest.skip("needs --gpu-work, a new folder that all nodes see: `make gpu-nodes` on each of them")
    return Path(folder)


@pytest.fixture(scope="module")
def processes(topology: Topology, device: str, most: int) -> int:
    """The number of processes of each node: its GPUs, as far as 8 virtual ranks go."""
    return min(most, 8 // topology.nodes) if device == "cuda" else 1


@pytest.fixture
def start(topology: Topology, device: str, processes: int, tmp_path: Path) -> Callable[..., Job]:
    """`start(tree)`: this node's part of a job on all nodes."""

    def launch(tree: dict[str, dict[str, Any]], **options: Any) -> Job:
        on_device = {**tree, "run": {**tree["run"], "device": device}}
        nodes, node, port = str(topology.nodes), str(topology.node), str(topology.port)
        position = ["--nodes", nodes, "--node", node, "--host", topology.host, "--port", port]
        return Job(on_device, tmp_path, processes, position, **options)

    return launch


def test_virtual_ranks_have_the_same_bits_on_one_node_and_on_all(
    small: Dataset, topology: Topology, large: str, device: str, work: Path, start: Callable[..., Job], tmp_path: Path
) -> None:
    virtual = {"virtual_ranks": 8, "precision": "bf16", "global_batch_size": 48}
    tree = small_run(small.root, work / "all", train=virtual, model={"name": large})
    with start(tree) as job:
        assert job.wait() == 0, job.output
    if topology.node == 0:
        alone = {**tree, "run": {**tree["run"], "dir": str(work / "one"), "device": device}}
        with Job(alone, tmp_path, 1, ["--nodes", "1"]) as job:
            assert job.wait() == 0, job.output
        check_equal(hash_runs([work / "all", work / "one"]))


@pytest.mark.parametrize("victim", ["rank0", "everything"])
def test_the_loss_of_a_process_or_a_node_ends_the_job_on_all_nodes(
    victim: str,
    small: Dataset,
    topology: Topology,
    processes: int,
    work: Path,
    start: Callable[..., Job],
    measured: Any,
) -> None:
    tree = small_run(small.root, work / victim, train={"max_steps": 2000}, timeouts={"step_seconds": 30})
    last = topology.node == topology.nodes - 1
    with start(tree) as job:
        job.wait_for("train", 23, topology.node * processes)
        if last:
            job.signal(victim, number=signal.SIGKILL)
        lost = time.monotonic()
        code = job.launcher.wait(100)
        job.all_gone(30)
        measured("until this node's part has ended", time.monotonic() - lost, "s")
        assert code == (-signal.SIGKILL if last and victim == "everything" else 75), job.output
    with start(tree) as job:
        assert job.wait() == 0, job.output


def test_a_stop_of_one_node_is_saved_by_all(
    small: Dataset, topology: Topology, processes: int, work: Path, start: Callable[..., Job]
) -> None:
    tree = small_run(small.root, work / "stop", train={"max_steps": 2000})
    with start(tree) as job:
        job.wait_for("train", 23, topology.node * processes)
        if topology.node == topology.nodes - 1:
            job.signal("launcher")
        assert job.wait() == 75, job.output
    with start(tree) as job:
        assert job.wait() == 0, job.output
