"""The suite for GPUs (tests/gpu, `make gpu`) works: tried on CPUs, and on two nodes, before a GPU is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from group import Group
from harness import REPO, clean_environ

SUITE = [sys.executable, "-m", "pytest", "--gpu", "cpu", "-p", "no:cacheprovider"]


def start(
    arguments: Sequence[str], out: Path, prefix: Sequence[str] = (), environ: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [*prefix, *SUITE, "--gpu-out", str(out), f"--basetemp={out.with_suffix('')}", *arguments],
            stdout=log, stderr=subprocess.STDOUT, cwd=REPO, env={**clean_environ(), **(environ or {})},
        )  # fmt: skip


def results(process: subprocess.Popen[bytes], out: Path, seconds: float) -> list[dict[str, Any]]:
    try:
        code = process.wait(seconds)
    finally:
        process.kill()
    log = out.with_suffix(".log").read_text()
    assert code == 0, log[-8000:]
    content = json.loads(out.read_text())
    assert content["machine"]["device"] == "cpu"
    for check in content["checks"]:  # the table has a line for each of them
        assert f"{check['name']}" in log
        assert check["outcome"] in ("passed", "skipped")
        assert check["reason"] or check["outcome"] == "passed"
    return list(content["checks"])


def test_all_other_tests_hide_the_gpus(group: Callable[[int], Group]) -> None:
    assert group(1).call("function", os.getenv, "CUDA_VISIBLE_DEVICES") == [""]
    assert clean_environ()["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.ranks
def test_a_part_is_run_by_itself(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    chosen = ["tests/gpu/test_gpu_device.py", "-k", "net-accumulated or net-fp16"]
    by_name = {each["name"]: each for each in results(start(chosen, out), out, 200)}
    assert by_name["no_step_waits_for_the_gpu[net-accumulated]"]["outcome"] == "passed"
    assert "needs a GPU" in by_name["no_step_waits_for_the_gpu[net-fp16]"]["reason"]


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_the_whole_suite(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    checks = results(start(["tests/gpu"], out), out, 1700)
    assert {each["part"] for each in checks} == {
        path.stem.removeprefix("test_gpu_") for path in REPO.glob("tests/gpu/test_gpu_*.py")
    }
    assert any(each["measured"] for each in checks)


@pytest.mark.faults
def test_two_nodes(nodes: tuple[list[str], str], tmp_path: Path) -> None:
    names, _ = nodes
    outs = [tmp_path / f"node-{number}.json" for number in range(2)]
    chosen = ["tests/gpu/test_gpu_nodes.py", "--gpu-work", str(tmp_path / "work")]
    processes = [
        start(
            chosen, out, prefix=["ip", "netns", "exec", name],
            environ={"DISTRAIN_NODES": "2", "DISTRAIN_NODE": str(number), "DISTRAIN_HOST": "10.99.7.10",
                     "DISTRAIN_PORT": "29500"},
        )
        for number, (name, out) in enumerate(zip(names, outs, strict=True))
    ]  # fmt: skip
    try:
        for process, out in zip(processes, outs, strict=True):
            assert {each["outcome"] for each in results(process, out, 500)} == {"passed"}
    finally:
        for process in processes:
            process.kill()
