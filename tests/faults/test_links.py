"""Two nodes: network name spaces with an address and a host name each; one's link is cut in mid-step."""

from __future__ import annotations

import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Job, exit_file, small_run, trained

pytestmark = pytest.mark.faults


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


@pytest.fixture
def nodes() -> Iterator[tuple[list[str], str]]:
    """Two hosts on one bridge: the commands' prefixes that run there, and the name to cut the second one's link by."""
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
    assert "going on from step-" in jobs[0].output
    trained(jobs[0].run).same_as(expected)
