"""Stop requests in every phase: saved, left together, and the scheduler is told to run it again."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import Job, Trained, exit_file, newest_step, small_run, until

pytestmark = pytest.mark.faults
PHASES: dict[str, tuple[str, int]] = {
    "start": ("start", 0),
    "first step": ("first step", 0),
    "train": ("train", 23),
    "evaluate": ("evaluate", 14),
    "save": ("save", 20),
}


def notes_stops(process: psutil.Process) -> bool:
    """Whether a process has its handlers: long before it has imported torch."""
    caught = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def check_stopped(job: Job, finish: Callable[..., Trained], expected: Trained) -> None:
    """75, told, saved to the step where it stopped, and the next life ends as if nothing had happened."""
    assert job.wait() == 75, job.output
    told = exit_file(job.run)
    assert told["code"] == 75
    assert "stopped" in told["reason"]
    step = newest_step(job.run)
    assert (told["step"] or 0) == step
    if step:
        state = json.loads((job.run / f"checkpoints/step-{step:08d}/state.json").read_text())
        assert f"step {step} is saved" in told["reason"]
        assert state["why"] in ("stop", "interval", "last")
    else:
        assert "nothing had to be saved" in told["reason"] or "before anything" in told["reason"]
    finish(job.run).same_as(expected)


@pytest.mark.parametrize("target", ["rank1", "rank0", "launcher", "group"])
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
    with Job(small_run(data, tmp_path / "run"), tmp_path) as job:
        name, step = PHASES[phase]
        if phase == "start":
            until(lambda: sum(map(notes_stops, job.workers())) == 2, "two processes with handlers")
        job.wait_for(name, step)
        job.signal(target, number=number)
        check_stopped(job, finish, expected)
