"""Processes that stop, hang or never arrive: stack traces are written, the process that is behind is named."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from harness import Job, exit_file, served, small_run, trained, until

pytestmark = pytest.mark.faults
QUICK = {"start_seconds": 60, "step_seconds": 5, "eval_seconds": 5, "save_seconds": 5}


def reason_in_time(job: Job) -> str:
    """Check that the job ends with 75 within a minute; return the reason."""
    start = time.monotonic()
    assert job.wait(75) == 75, job.output
    assert time.monotonic() - start < 60 + QUICK["step_seconds"]
    reason = str(exit_file(job.run)["reason"])
    assert reason in job.output
    return reason


def stacks(run: Path) -> dict[int, str]:
    """Return the stack traces that each rank wrote."""
    paths = sorted((run / "stacks").glob("*-rank-*.txt"))
    return {int(path.stem.rpartition("-")[2]): path.read_text() for path in paths}


@pytest.mark.parametrize(
    ("phase", "step", "target"),
    [pytest.param("train", 23, "rank1", marks=pytest.mark.short), ("evaluate", 14, "rank1"), ("save", 20, "rank0")],
)
def test_a_stopped_rank(
    phase: str, step: int, target: str, data: Path, tmp_path: Path, undisturbed: Any, finish: Any
) -> None:
    expected = undisturbed()
    with Job(small_run(data, tmp_path / "run", timeouts=QUICK), tmp_path) as job:
        job.wait_for(phase, step)
        job.signal(target, number=signal.SIGSTOP)
        assert f"{target.replace('rank', 'rank ')}" in (reason := reason_in_time(job))
        assert "does not answer" in reason
        other = 0 if target == "rank1" else 1
        assert list(stacks(job.run)) == [other]
        assert "distrain" in stacks(job.run)[other]
    finish(job.run).same_as(expected)


def test_a_rank_that_hangs_in_its_own_code(data: Path, tmp_path: Path, undisturbed: Any, finish: Any) -> None:
    expected = undisturbed()
    with Job(small_run(data, tmp_path / "run", timeouts=QUICK), tmp_path, environ={"FAULT": "hang:1:30"}) as job:
        reason = reason_in_time(job)
        assert "rank 1 (host" in reason
        assert "is behind" in reason
        assert set(stacks(job.run)) == {0, 1}
        assert "models_for_tests.py" in stacks(job.run)[1]
    finish(job.run).same_as(expected)


def test_a_process_that_never_releases_the_interpreter_lock(data: Path, tmp_path: Path) -> None:
    with Job(small_run(data, tmp_path / "run", timeouts=QUICK), tmp_path, 1, environ={"FAULT": "hold:0:30"}) as job:
        assert job.wait(75) == 1, job.output
        assert "SIGABRT" in exit_file(job.run)["reason"]
        assert "models_for_tests.py" in job.output  # its stack traces, written without the interpreter lock


def test_the_only_process_is_stopped(data: Path, tmp_path: Path, undisturbed: Any) -> None:
    expected = undisturbed(1)
    with Job(small_run(data, tmp_path / "run", timeouts=QUICK), tmp_path, 1, ["--restarts", "1"]) as job:
        job.wait_for("train", 23)
        job.signal("rank0", number=signal.SIGSTOP)
        assert job.wait(100) == 0, job.output
        assert "rank 0 was ended by SIGABRT" in job.output
    trained(job.run).same_as(expected)


def test_a_shard_that_never_arrives(data: Path, tmp_path: Path) -> None:
    with served(data) as (address, silent):
        remote = {"dir": address, "cache_gib": 0, "fetch_timeout_seconds": 600}
        with Job(small_run(data, tmp_path / "run", timeouts=QUICK, data=remote), tmp_path) as job:
            job.wait_for("train", 1)
            silent.set()
            reason = reason_in_time(job)
    assert "waits for its data" in reason


def test_a_node_that_never_arrives(data: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--nodes", "2", "--node", "0", "--host", "localhost", "--port", str(port)]
    tree = small_run(data, tmp_path / "run", timeouts={**QUICK, "start_seconds": 12})
    with Job(tree, tmp_path, options=options) as job:
        assert job.wait(60) == 75, job.output
        assert "4 processes were requested; rank 2, 3 did not arrive" in exit_file(job.run)["reason"]


def test_a_name_that_cannot_be_resolved(data: Path, tmp_path: Path) -> None:
    options = ["--nodes", "2", "--node", "1", "--host", "no-such-host.invalid", "--port", "29400"]
    tree = small_run(data, tmp_path / "run", timeouts={**QUICK, "start_seconds": 3})
    with Job(tree, tmp_path, options=options) as job:
        assert job.wait(30) == 75, job.output
        assert "no-such-host.invalid, cannot be resolved" in job.output


@pytest.mark.parametrize("stopped", [False, True])
def test_a_first_node_that_never_arrives(stopped: bool, data: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    options = ["--nodes", "2", "--node", "1", "--host", "localhost", "--port", port]
    tree = small_run(data, tmp_path / "run", timeouts={**QUICK, "start_seconds": 300 if stopped else 8})
    with Job(tree, tmp_path, 1, options=options) as job:
        if stopped:
            until(lambda: job.status(1).heartbeats > 0, "rank 1 looks for the first node")
            job.signal("launcher")
        assert job.wait(30) == 75, job.output  # sooner than the grace period
        assert ("stopped by SIGTERM" if stopped else f"does not answer at localhost:{port}") in job.output


def test_nodes_that_expect_different_numbers(data: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    tree = small_run(data, tmp_path / "run")
    shared = ["--nodes", "2", "--host", "localhost", "--port", port]
    with (
        Job(tree, tmp_path, 1, options=[*shared, "--node", "0"]) as first,
        Job(tree, tmp_path, 2, options=[*shared, "--node", "1"]) as second,
    ):
        codes = {first.wait(60), second.wait(60)}
        assert 78 in codes, first.output + second.output
        assert "give every node the same --nproc" in first.output + second.output


def test_a_process_that_does_not_exit_in_time_is_killed(
    data: Path, tmp_path: Path, undisturbed: Any, finish: Any
) -> None:
    expected = undisturbed()
    tree = small_run(data, tmp_path / "run")
    with Job(tree, tmp_path, options=["--grace", "3"], environ={"FAULT": "hang:0:60"}) as job:
        job.wait_for("train", 12)
        job.wait_until_stuck()
        job.signal("launcher", number=signal.SIGUSR1)
        start = time.monotonic()
        assert job.wait(30) == 75, job.output
        assert time.monotonic() - start < 15
    finish(job.run).same_as(expected)
