"""Stop requests in every phase: the processes save, exit together, and the exit code is 75, run it again."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import Job, TrainedRun, exit_file, newest_step, served, small_run, until

pytestmark = pytest.mark.faults
PHASES: dict[str, tuple[str, int]] = {
    "start": ("start", 0),
    "first step": ("first step", 0),
    "train": ("train", 23),
    "evaluate": ("evaluate", 14),
    "save": ("save", 20),
}


def has_handlers(process: psutil.Process) -> bool:
    """Return whether a process has installed its signal handlers: long before it has imported torch."""
    caught = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def has_torch(process: psutil.Process) -> bool:
    """Return whether a process has begun to import torch."""
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def state_of(run: Path) -> dict[str, Any]:
    """Read state.json of the newest checkpoint."""
    state: dict[str, Any] = json.loads((run / f"checkpoints/step-{newest_step(run):08d}/state.json").read_text())
    return state


def check_stopped(job: Job, finish: Callable[..., TrainedRun], expected: TrainedRun) -> None:
    """Check that the job has stopped properly, and that the next attempt ends like an undisturbed run."""
    check_code(job)
    finish(job.run).same_as(expected)


def check_code(job: Job) -> None:
    """Check that the job ends with 75, and that its reason names the step that is saved."""
    assert job.wait() == 75, job.output
    record = exit_file(job.run)
    assert record["code"] == 75
    assert "stopped" in record["reason"]
    step = newest_step(job.run)
    assert (record["step"] or 0) == step
    assert (f"step {step} is saved" if step else "nothing had to be saved") in record["reason"]


@pytest.mark.parametrize("target", ["rank1", "launcher", "group"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP],
    ids=lambda number: number.name,
)
def test_stop(
    number: signal.Signals, phase: str, target: str, data: Path, tmp_path: Path, undisturbed: Any, finish: Any
) -> None:
    expected = undisturbed()
    slow = {"FAULT": "unhurried:0:1"}  # so that the stop comes before the end
    with Job(small_run(data, tmp_path / "run"), tmp_path, environ=slow) as job:
        name, step = PHASES[phase]
        if phase == "start":
            until(lambda: sum(map(has_handlers, job.workers())) == 2, "two processes with handlers")
            assert not any(has_torch(process) for process in job.workers())
        job.wait_for(name, step)
        job.signal(target, number=number)
        check_code(job)
        if phase == "first step":
            assert (
                newest_step(job.run) <= 4
            )  # soon after it, and not only at step 7, when an evaluation has a collective
        finish(job.run).same_as(expected)


@pytest.mark.short
def test_stop_in_a_long_evaluation(data: Path, tmp_path: Path, undisturbed: Any, finish: Any) -> None:
    one_by_one = {"eval": {"batch_size": 1}}
    expected = undisturbed(**one_by_one)
    with Job(small_run(data, tmp_path / "run", **one_by_one), tmp_path, environ={"FAULT": "slow:0:15"}) as job:
        job.wait_for("evaluate", 14)  # 50 images a rank, five a second
        job.signal("rank1")
        start = time.monotonic()
        check_code(job)
        assert time.monotonic() - start < 8
        assert newest_step(job.run) == 14
        assert state_of(job.run)["evaluated_step"] == 7  # the next attempt evaluates step 14
    finish(job.run, **one_by_one).same_as(expected)


def test_stop_while_data_does_not_arrive(data: Path, tmp_path: Path, undisturbed: Any, finish: Any) -> None:
    expected = undisturbed()
    with served(data) as (address, silent):
        remote = {"dir": address, "cache_gib": 0, "fetch_timeout_seconds": 600}
        with Job(small_run(data, tmp_path / "run", data=remote), tmp_path) as job:
            job.wait_for("train", 1)
            silent.set()
            job.wait_until_stuck()
            job.signal("rank0")
            check_code(job)
    finish(job.run).same_as(expected)


def test_more_signals_do_not_break_a_save(data: Path, tmp_path: Path, undisturbed: Any, finish: Any) -> None:
    expected = undisturbed()
    with Job(small_run(data, tmp_path / "run"), tmp_path, environ={"FAULT": "unhurried:0:1"}) as job:
        job.wait_for("train", 23)
        job.signal("launcher")
        job.wait_for("save", 20)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            job.signal("group", number=number)
        check_stopped(job, finish, expected)
