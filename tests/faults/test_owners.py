"""One writer per run: a second job waits, refuses, or takes over from a job that is gone."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from harness import Job, small_run, trained, until

from distrain.runs import attempts

pytestmark = pytest.mark.faults


@pytest.mark.short
def test_a_second_job_refuses_naming_the_owner(data: Path, tmp_path: Path, undisturbed: Any) -> None:
    expected = undisturbed()
    with Job(small_run(data, tmp_path / "run"), tmp_path, environ={"FAULT": "slow:0:1"}) as first:
        first.wait_for("train", 3)
        owner = first.workers()[0].pid
        with Job(small_run(data, tmp_path / "run", run={"wait_seconds": 1}), tmp_path) as second:
            assert second.wait(60) == 75, second.output
        assert f"another job is writing here: attempt 1, host {attempts.history(first.run)[0]['host']}" in second.output
        assert f"process {owner}" in second.output
        assert first.wait() == 0, first.output
    assert attempts.newest_attempt(first.run) == 1
    assert json.loads((first.run / "exit.json").read_text())["code"] == 0  # not the second job's 75
    trained(first.run).same_as(expected)


def test_a_second_job_waits_for_the_first_to_exit(data: Path, tmp_path: Path, undisturbed: Any) -> None:
    expected = undisturbed()
    with Job(small_run(data, tmp_path / "run"), tmp_path, environ={"FAULT": "slow:0:1"}) as first:
        first.wait_for("train", 3)
        with Job(small_run(data, tmp_path / "run"), tmp_path) as second:
            until(lambda: "waiting for another job to exit" in second.output, "it waits")
            first.signal("launcher")
            assert first.wait() == 75, first.output
            assert second.wait() == 0, second.output
            saved = int(re.findall(r"step (\d+) is saved", first.output)[-1])
            assert f"resuming from step-{saved:08d}" in second.output
    trained(first.run).same_as(expected)


def test_a_suspended_owner_loses_the_run_and_exits(data: Path, tmp_path: Path, undisturbed: Any) -> None:
    expected = undisturbed()
    with Job(small_run(data, tmp_path / "run"), tmp_path, environ={"FAULT": "slow:0:25"}) as first:
        first.wait_for("train", 23)
        first.signal("everything", number=signal.SIGSTOP)
        with Job(small_run(data, tmp_path / "run", run={"wait_seconds": 90}), tmp_path) as second:
            assert second.wait(120) == 0, second.output
        result = (first.run / "result.json").read_bytes()
        first.signal("everything", number=signal.SIGCONT)
        start = time.monotonic()
        assert first.wait(60) == 75, first.output
        assert time.monotonic() - start < 30
        assert "taken over by another job" in first.output
    assert (first.run / "result.json").read_bytes() == result
    trained(first.run).same_as(expected)
