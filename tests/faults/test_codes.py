"""Exit codes for the scheduler (0, 75, 78 or 1), and which process failed first."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Job, exit_file, small_run, trained
from models_for_ends import TEXTS

pytestmark = pytest.mark.faults


def test_a_fault_of_the_program_is_shown_once_with_its_traceback(data: Path, tmp_path: Path) -> None:
    with Job(small_run(data, tmp_path / "run"), tmp_path, environ={"FAULT": "raise:1:30"}) as job:
        assert job.wait() == 1, job.output
    assert exit_file(job.run)["code"] == 1
    assert "rank 1 failed first" in job.output
    assert job.output.count("Traceback") == 1
    assert "RuntimeError: a fault of the model" in job.output
    assert "phase  train, step" in job.output
    assert "gloo" not in job.output  # rank 0 failed too, as it lost rank 1


@pytest.fixture
def two_nodes(data: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[Job, Job]]]:
    """Two launchers on this machine, as two nodes of one process each; keys and variables of the second one."""
    started: list[Job] = []

    def start(second: dict[str, dict[str, Any]] | None = None, **environ: str) -> tuple[Job, Job]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        for number in range(2):
            tree = small_run(data, tmp_path / "run", **(second or {} if number else {}))
            options = ["--nodes", "2", "--node", str(number), "--host", "localhost", "--port", port]
            started.append(Job(tree, tmp_path, 1, options, environ if number else None))
        return started[0], started[1]

    yield start
    for job in started:
        job.close()


def test_a_fault_on_another_node_is_reported_by_the_first(two_nodes: Callable[..., tuple[Job, Job]]) -> None:
    first, second = two_nodes(FAULT="raise:1:30")
    assert (first.wait(), second.wait()) == (1, 1), first.output + second.output
    assert exit_file(first.run)["code"] == 1
    assert "a fault of the model" in exit_file(first.run)["reason"]
    assert "rank 1 failed first" in first.output


def test_a_crash_on_another_node_is_reported_by_the_first(two_nodes: Callable[..., tuple[Job, Job]]) -> None:
    first, second = two_nodes(FAULT="crash:1:30")
    assert (first.wait(), second.wait()) == (1, 1), first.output + second.output
    assert "rank 1 was ended by SIGSEGV" in exit_file(first.run)["reason"]


@pytest.mark.parametrize("what", ["environment", "data"])
def test_one_node_that_cannot_start_ends_all(
    what: str, two_nodes: Callable[..., tuple[Job, Job]], tmp_path: Path
) -> None:
    if what == "data":
        first, second = two_nodes({"data": {"dir": str(tmp_path / "nothing")}})
    else:
        first, second = two_nodes(ACCELERATE_DYNAMO_BACKEND="inductor")
    assert (first.wait(40), second.wait(40)) == (78, 78), first.output + second.output
    named = "nothing" if what == "data" else "ACCELERATE_DYNAMO_BACKEND"
    assert named in first.output
    assert named in second.output


def test_what_only_one_node_finds_impossible_is_reported_by_both(
    two_nodes: Callable[..., tuple[Job, Job]],
) -> None:
    first, second = two_nodes(FAULT="cannot:1:2")  # pass 1 tries the model, pass 2 is the first with all ranks
    assert (first.wait(40), second.wait(40)) == (78, 78), first.output + second.output
    for job in (first, second):
        assert "train.deterministic: this operation has no deterministic form" in job.output


def test_a_crash_is_a_fault(data: Path, tmp_path: Path) -> None:
    with Job(small_run(data, tmp_path / "run"), tmp_path, environ={"FAULT": "crash:1:30"}) as job:
        assert job.wait() == 1, job.output
    assert "rank 1 was ended by SIGSEGV" in exit_file(job.run)["reason"]


def test_a_wrong_configuration_starts_nothing(data: Path, tmp_path: Path) -> None:
    with Job(small_run(data, tmp_path / "run", train={"lrr": 1}), tmp_path) as job:
        assert job.wait(30) == 78, job.output
    assert "train.lrr: unknown key" in job.output
    assert not job.run.exists()


def test_data_that_does_not_exist(tmp_path: Path) -> None:
    with Job(small_run(tmp_path / "nothing", tmp_path / "run"), tmp_path) as job:
        assert job.wait(60) == 78, job.output
    assert job.output.count("make one with `distrain prepare`") == 1
    assert not job.run.exists()


@pytest.mark.parametrize("fault", [pytest.param("forward-leave:1", marks=pytest.mark.short), "backward-leave:0"])
def test_a_process_that_leaves_with_0_in_the_middle(fault: str, data: Path, tmp_path: Path) -> None:
    tree = small_run(data, tmp_path / "run", model={"name": "models_for_ends:Ending"})
    with Job(tree, tmp_path, environ={"FAULT": f"{fault}:30"}) as job:
        assert job.wait(60) == 1, job.output
    reason = exit_file(job.run)["reason"]
    assert reason.startswith(f"rank {fault[-1]} ended with 0 in phase train, step ")
    assert reason.endswith(", before its command was done")
    assert reason in job.output
    assert f"rank {fault[-1]} failed first" in job.output


@pytest.mark.parametrize("fault", ["forward-timeout:0", "backward-timeout:1", "hook-skip:1"])
def test_an_error_of_the_model_that_speaks_of_connections(fault: str, data: Path, tmp_path: Path) -> None:
    tree = small_run(data, tmp_path / "run", model={"name": "models_for_ends:Ending"})
    with Job(tree, tmp_path, environ={"FAULT": f"{fault}:30"}) as job:
        assert job.wait(60) == 1, job.output
    message = TEXTS[fault[:-2].partition("-")[2]]
    assert exit_file(job.run)["reason"] == f"RuntimeError: {message}"
    assert f"rank {fault[-1]} failed first" in job.output
    assert job.output.count("Traceback") == 1


@pytest.mark.parametrize("fault", ["forward-kill:1", "backward-kill:2", "forward-kill:0"])
def test_the_process_that_was_killed_is_named_first(fault: str, data: Path, tmp_path: Path) -> None:
    tree = small_run(data, tmp_path / "run", model={"name": "models_for_ends:Ending"})
    with Job(tree, tmp_path, 3, environ={"FAULT": f"{fault}:30"}) as job:
        assert job.wait(60) == 75, job.output
    assert exit_file(job.run)["reason"].startswith(f"rank {fault[-1]} was ended by SIGKILL")
    assert f"rank {fault[-1]} failed first" in job.output
    assert "gloo" not in job.output
    assert "Traceback" not in job.output


def test_a_process_killed_on_another_node_is_named_by_the_first(two_nodes: Callable[..., tuple[Job, Job]]) -> None:
    first, second = two_nodes(FAULT="kill:1:30")
    assert (first.wait(), second.wait()) == (75, 75), first.output + second.output
    assert "rank 1 was ended by SIGKILL" in exit_file(first.run)["reason"]
    assert "rank 1 was ended by SIGKILL" in first.output
    assert "rank 0" not in first.output.partition("distrain: exit")[0].rpartition("[rank 0]")[2].partition("\n")[2]


def test_an_interface_that_does_not_exist(data: Path, tmp_path: Path) -> None:
    with Job(small_run(data, tmp_path / "run"), tmp_path, environ={"GLOO_SOCKET_IFNAME": "nosuch0"}) as job:
        assert job.wait(60) == 78, job.output
    assert job.output.count("GLOO_SOCKET_IFNAME=nosuch0: this host has no interface 'nosuch0' with an address") == 1
    assert "lo (127.0.0.1)" in job.output
    assert not job.run.exists()


def test_attempts_without_progress_are_bounded(data: Path, tmp_path: Path, undisturbed: Any, finish: Any) -> None:
    expected = undisturbed()
    tree = small_run(data, tmp_path / "run", launch={"max_attempts_without_progress": 3})
    codes = []
    for _ in range(4):
        with Job(tree, tmp_path) as job:
            job.wait_for("first step")
            job.signal("rank1", number=signal.SIGKILL)
            codes.append(job.wait())
    assert codes == [75, 75, 1, 75]  # after the 1 the count restarts: somebody has looked at the fault
    assert exit_file(job.run)["attempts_without_progress"] == 1
    finish(job.run).same_as(expected)
    assert exit_file(job.run)["attempts_without_progress"] == 0


def test_killed_launchers_are_counted(data: Path, tmp_path: Path) -> None:
    tree = small_run(data, tmp_path / "run", launch={"max_attempts_without_progress": 2})
    for _ in range(3):  # the first one has no folder yet, and is not counted
        with Job(tree, tmp_path, 1) as job:
            job.wait_for("first step")
            job.signal("launcher", number=signal.SIGKILL)
            job.all_gone(5)
    assert exit_file(job.run)["code"] is None
    with Job(tree, tmp_path, 1) as job:
        assert job.wait(30) == 1
    assert "2 attempts in a row without progress" in exit_file(job.run)["reason"]


def test_any_number_of_processes_resumes(data: Path, tmp_path: Path, undisturbed: Any) -> None:
    exact = {"train": {"precision": "fp64"}}
    expected = undisturbed(1, **exact)
    for size, step in ((1, 9), (2, 21), (3, 33), (1, 45), (4, 60)):
        slow = {"FAULT": "unhurried:0:1"}  # so that the stop comes before the end
        with Job(small_run(data, tmp_path / "run", **exact), tmp_path, size, environ=slow) as job:
            if step < 60:
                job.wait_for("train", step)
                job.signal("launcher")
            assert job.wait() == (0 if step == 60 else 75), job.output
    actual = trained(job.run)
    assert actual.ids == expected.ids
    for name, value in actual.weights.items():
        assert float((value - expected.weights[name]).abs().max()) < 1e-10
