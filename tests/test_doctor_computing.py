"""`distrain doctor` on what computes: device, compiler, GPUs of all processes, memory, and real steps of training."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import arguments, clean_environ, small_run

from distrain import cli, config
from distrain.distributed import runtime
from distrain.environment import Environment
from distrain.tools.doctor import computing
from distrain.tools.doctor.computing import GpuFacts
from distrain.training import setup

H100, A100 = "NVIDIA H100", "NVIDIA A100"
UNUSABLE = "this machine has GPUs (/dev/nvidia0), but torch sees none"


@pytest.mark.parametrize(
    ("requested", "names", "processes", "unusable", "level", "message"),
    [
        ("auto", [], 2, None, "ok", "CPU"),
        ("cpu", [H100], 2, None, "ok", "CPU"),
        ("cpu", [], 2, UNUSABLE, "ok", "CPU"),
        ("auto", [], 1, UNUSABLE, "bad", UNUSABLE),
        ("cuda", [], 1, None, "bad", "run.device=cuda, but no GPU is seen"),
        ("auto", [H100] * 4, 4, None, "ok", "4 GPUs: NVIDIA H100"),
        ("auto", [H100, A100], 2, None, "ok", "2 GPUs: NVIDIA A100, NVIDIA H100"),
        ("auto", [H100] * 2, 4, None, "bad", "2 GPUs for 4 processes"),
        ("auto", [H100], 4, None, "ok", "1 GPU: NVIDIA H100"),  # each process may see another one
    ],
)
def test_the_device(
    requested: str, names: list[str], processes: int, unusable: str | None, level: str, message: str
) -> None:
    finding = computing.check_device(requested, names, processes, unusable)
    assert (finding.level, finding.message) == (level, message)
    assert level == "ok" or finding.cure


def test_the_compiler(tmp_path: Path) -> None:
    header = tmp_path / "Python.h"
    header.touch()

    def level(on_cpu: bool, **variables: str) -> str:
        return computing.check_compiler(on_cpu, {"PATH": str(tmp_path), **variables}, tmp_path).level

    assert [level(True), level(False)] == ["bad", "bad"]
    for name in ("gcc", "g++"):
        (tmp_path / name).touch(mode=0o755)
        assert level(True) == ("ok" if name == "g++" else "bad")
        assert level(False) == "ok"
    assert level(True, CXX="clang++") == level(False, CC="icc") == "bad"
    header.unlink()
    assert level(True) == "bad"


def test_the_compiler_of_this_machine_is_checked_only_for_a_compiled_run() -> None:
    off, on = (config.load(None, [f"train.compile={mode}"]) for mode in ("off", "default"))
    assert list(computing.compiler(off, Environment())) == []
    assert [finding.subject for finding in computing.compiler(on, Environment())] == ["compiler"]


FACTS = GpuFacts(H100, "570.86", "2.30.7", "Default")


@pytest.mark.parametrize(
    ("other", "level", "message"),
    [
        (FACTS, "ok", "2 × NVIDIA H100, driver 570.86, NCCL 2.30.7"),
        (replace(FACTS, model=A100), "note", "model NVIDIA H100 on rank 0, but rank 1 has NVIDIA A100"),
        (replace(FACTS, driver="550.54"), "note", "driver 570.86 on rank 0, but rank 1 has 550.54"),
        (replace(FACTS, nccl="2.27.5"), "bad", "nccl 2.30.7 on rank 0, but rank 1 has 2.27.5"),
        (replace(FACTS, compute_mode="Prohibited"), "bad", "rank 1: compute mode Prohibited: no process may use this"),
        (replace(FACTS, compute_mode="Exclusive_Process"), "note", "compute mode Exclusive_Process: a GPU refuses a"),
    ],
)
def test_the_gpus_of_all_processes_are_compared(other: GpuFacts, level: str, message: str) -> None:
    first, *_ = computing.compare_gpus([FACTS, other])
    assert first.level == level
    assert first.message.startswith(message)
    assert level == "ok" or first.cure


@pytest.mark.parametrize(("peak", "level"), [(8, "ok"), (9, "ok"), (9.5, "note"), (11, "note")])
def test_the_memory_of_a_gpu(peak: float, level: str) -> None:
    gib = 2**30
    finding = computing.check_gpu_memory(10 * gib, int(peak * gib), {"weights": 2 * gib, "cache": gib, "EMA": 0})
    assert finding.level == level
    rest = f"{peak - 3:.2f}"
    assert finding.message == f"10.0 GiB free, {peak:.2f} needed: weights 2.00, cache 1.00, activations {rest}"


def test_real_steps_are_trained_at_the_real_size_and_their_memory_is_known(data: Path, tmp_path: Path) -> None:
    tree = small_run(data, tmp_path / "run", train={"ema_decay": 0.9, "optimizer": "adam", "micro_batch_size": 4})
    tree["run"]["device"], tree["augment"] = "cpu", {"mixup": 0.2, "flip": "true"}
    resolved = config.load(None, arguments(tree))
    with (
        closing(setup.start_watchdog(resolved, Environment())) as watchdog,
        setup.start_runtime(resolved, Environment(), watchdog) as rt,
    ):
        (finding,) = computing.steps(resolved, rt)
        assert finding.level == "ok"
        assert finding.message.startswith("16 images in 4 passes a process: ")
        job = setup.set_up(resolved, time.monotonic(), rt)
        use = computing.memory_use(job)
    parameters = sum(parameter.numel() for parameter in job.model.module.parameters()) * 4
    buffers = sum(buffer.numel() for buffer in job.model.module.buffers()) * 4
    assert use == {
        "weights": parameters + buffers,
        "gradients": parameters,
        "optimizer": 0,  # before the first step
        "EMA": pytest.approx(parameters + buffers, abs=8),  # and its counter
        "cache": 0,
    }
    assert not (tmp_path / "run").exists()


def test_a_step_that_fails_is_a_problem(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model fails in the second real step, after all passes that try it."""
    monkeypatch.setenv("FAULT", "forward-memory:0:5")
    monkeypatch.setattr(runtime, "_broken", [])
    tree = small_run(data, tmp_path / "run", model={"name": "models_for_ends:Ending"}, run={"device": "cpu"})
    assert cli.main(["doctor", *arguments(tree)]) == 78
    output = capsys.readouterr()
    assert "CUDA out of memory. Tried to allocate 20.00 MiB" in output.err
    assert "lower train.micro_batch_size" in output.err
    assert "Traceback" not in output.err
    assert "seen by all" in output.out  # the other checks are shown before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a step on the CPU")
def test_a_compiled_step_is_tried(data: Path, tmp_path: Path) -> None:
    """The compiler is there, but does not work: only a step shows that."""
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    broken.chmod(0o755)
    tree = small_run(data, tmp_path / "run", model={"name": "small"}, train={"compile": "default"})
    done = subprocess.run(
        [sys.executable, "-m", "distrain", "doctor", *arguments(tree)],
        env={**clean_environ(), "CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 78, done.stderr
    assert f"ok    compiler    {broken}" in done.stdout
    assert "bad   steps       train.compile: the model cannot be compiled" in done.stdout
