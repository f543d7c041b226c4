"""Two nodes (see `nodes` in tests/conftest.py); the link of one is cut during a step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from harness import Job, exit_file, ip, small_run, trained

pytestmark = pytest.mark.faults


def start(data: Path, tmp_path: Path, names: list[str], **environ: str) -> list[Job]:
    tree = small_run(data, tmp_path / "run", timeouts={"step_seconds": 5})
    options = ["--nodes", "2", "--host", "10.99.7.10", "--port", "29500"]
    return [
        Job(
            tree, tmp_path, 1, [*options, "--node", str(number)],
            prefix=["ip", "netns", "exec", name], environ=environ,
        )
        for number, name in enumerate(names)
    ]  # fmt: skip


def test_a_link_that_is_cut(nodes: tuple[list[str], str], data: Path, tmp_path: Path, undisturbed: Any) -> None:
    names, link = nodes
    expected = undisturbed(2)
    jobs = start(data, tmp_path, names, FAULT="slow:0:20")
    try:
        jobs[0].wait_for("train", 33)
        ip("link", "set", link, "down")
        began = time.monotonic()
        for job in jobs:
            assert job.wait(90) == 75, job.output
        assert time.monotonic() - began < 65
    finally:
        for job in jobs:
            job.close()
    assert exit_file(jobs[0].run)["code"] == 75
    for job in jobs:
        assert "no progress for 5 s in phase train" in job.output or "another process is gone" in job.output
    ip("link", "set", link, "up")
    jobs = start(data, tmp_path, names)
    try:
        for job in jobs:
            assert job.wait() == 0, job.output
    finally:
        for job in jobs:
            job.close()
    assert "resuming from step-" in jobs[0].output
    trained(jobs[0].run).same_as(expected)
