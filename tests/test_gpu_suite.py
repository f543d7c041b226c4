"""The suite for GPUs (tests/gpu, `make gpu`) works: tried on CPUs, and on two nodes, before a GPU is at hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_results import Check, table
from group import Group
from harness import REPO, clean_environ, until
from torch.utils._python_dispatch import TorchDispatchMode

from distrain import models

SUITE = [sys.executable, "-m", "pytest", "--gpu", "cpu", "-p", "no:cacheprovider"]
CONTEXTS = "tests/gpu/test_gpu_device.py::test_a_process_opens_no_context_on_another_gpu[off]"
"""A test that starts a job."""
WAITING = "tests/gpu/test_gpu_device.py::test_no_step_waits_for_the_gpu"
TWO_NODES = {"DISTRAIN_NODES": "2", "DISTRAIN_NODE": "0", "DISTRAIN_HOST": "127.0.0.1", "DISTRAIN_PORT": "29500"}


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
    assert content["seconds"] < seconds
    for check in content["checks"]:  # the table has a line for each of them
        assert f"{check['name']}" in log
        assert check["outcome"] in ("passed", "skipped")
        assert check["reason"] or check["outcome"] == "passed"
    return list(content["checks"])


def test_all_other_tests_hide_the_gpus(group: Callable[[int], Group]) -> None:
    assert group(1).call("function", os.getenv, "CUDA_VISIBLE_DEVICES") == [""]
    assert clean_environ()["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.ranks
def test_parts_are_run_by_themselves_on_a_node_of_several_too(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    chosen = [f"{WAITING}[net-fp16]", f"{WAITING}[net-bf16]", CONTEXTS, "tests/gpu/test_gpu_nodes.py"]
    process = start(chosen, out, environ={**TWO_NODES, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"})
    by_name = {each["name"]: each for each in results(process, out, 200)}
    assert "needs a GPU" in by_name.pop("no_step_waits_for_the_gpu[net-fp16]")["reason"]
    assert by_name.pop("no_step_waits_for_the_gpu[net-bf16]")["outcome"] == "passed"
    assert by_name.pop("a_process_opens_no_context_on_another_gpu[off]")["outcome"] == "passed"
    assert len(by_name) == 4
    assert all("needs --gpu-work" in each["reason"] for each in by_name.values())


@pytest.mark.ranks
def test_a_failure_stops_no_other_test_and_results_are_written_after_each(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    chosen = ["tests/gpu/test_gpu_nodes.py", f"{WAITING}[net-bf16]"]
    process = start(chosen, out, environ={"DISTRAIN_NODES": "two"})

    def checks() -> list[dict[str, Any]]:
        return list(json.loads(out.read_text())["checks"]) if out.exists() else []

    try:
        first = until(checks, "the results of the first test")
        assert (first[0]["outcome"], first[-1]["outcome"]) == ("failed", "not run")
        assert process.wait(100) == 1
    finally:
        process.kill()
    assert "ConfigError" in first[0]["reason"]
    assert [each["outcome"] for each in checks()] == ["failed"] * 4 + ["passed"]


NO_DETERMINISTIC_FORM = re.compile(
    "_?adaptive_(avg|max)_pool|fractional_max_pool|max_unpool|max_pool3d|avg_pool3d|reflection_pad|upsample_"
    "|grid_sampler|nll_loss2d|ctc_loss|put_|histc|bincount|median|kthvalue|scatter_reduce|embedding_bag"
)
"""Operations that raise on GPUs under `train.deterministic`: see `torch.use_deterministic_algorithms`."""


class OperationNames(TorchDispatchMode):
    """Records the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


def test_the_models_of_the_suite_have_deterministic_gradients_on_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("OBSERVED", str(tmp_path)), ("WAITING", "net"), ("ACCUMULATION_STEPS", "1")):
        monkeypatch.setenv(name, value)
    sources = "".join(path.read_text() for path in REPO.glob("tests/gpu/*.py"))
    names = set(re.findall(r'"(net|resnet9|models_for_\w+:\w+)"', sources))
    assert len(names) > 5
    for name in names:
        with OperationNames() as operations:
            models.build(name, "relu", 10, (3, 16, 16))(torch.randn(4, 3, 16, 16)).square().sum().backward()
        assert operations.names
        assert not [each for each in operations.names if NO_DETERMINISTIC_FORM.match(each)], name


def test_the_table_warns_of_a_suite_that_takes_too_long() -> None:
    checks = [Check("bits", "one", "passed"), Check("bits", "other", "failed", "AssertionError"), Check("bits", "last")]
    assert table({}, checks, 600)[-1] == "1 failed, 1 not run, 1 passed, in 600 s"
    assert "warning: longer than the 600 s" in table({}, checks, 601)[-1]


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
            environ={**TWO_NODES, "DISTRAIN_NODE": str(number), "DISTRAIN_HOST": "10.99.7.10"},
        )
        for number, (name, out) in enumerate(zip(names, outs, strict=True))
    ]  # fmt: skip
    try:
        for process, out in zip(processes, outs, strict=True):
            assert {each["outcome"] for each in results(process, out, 500)} == {"passed"}
    finally:
        for process in processes:
            process.kill()
