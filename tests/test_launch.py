"""The same run under every way to start it, as commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distrain.manifest import Dataset

pytestmark = pytest.mark.ranks
BIN = Path(sys.executable).parent
FILES = Path(__file__).parent.parent / "launch"
LAUNCHERS = {
    "distrain": (1, [str(BIN / "distrain")]),
    "python": (1, [sys.executable, "-m", "distrain"]),
    "torchrun": (2, [str(BIN / "torchrun"), "--nproc-per-node", "2", "--standalone", "-m", "distrain"]),
    "accelerate": (
        2,
        [str(BIN / "accelerate"), "launch", "--config_file", str(FILES / "accelerate-2cpu.yaml"), "-m", "distrain"],
    ),
}  # fmt: skip


def launch(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    return subprocess.run(
        [*LAUNCHERS[name][1], *arguments],
        capture_output=True, text=True, timeout=240, env={**environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


def test_every_launcher_trains_the_same(small: Dataset, tmp_path: Path) -> None:
    ends = {}
    for name, (size, _) in LAUNCHERS.items():
        run = tmp_path / name
        done = launch(
            name, "train", f"data.dir={small.root}", f"run.dir={run}", "train.max_steps=30", "train.precision=fp64"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("Finished Training") == 1
        assert json.loads((run / "result.json").read_text())["world_size"] == size
        ends[name] = load_file(run / "checkpoints/step-00000030/model.safetensors")
    for name in ("python", "accelerate"):
        other = {"python": "distrain", "accelerate": "torchrun"}[name]
        assert all(torch.equal(ends[name][key], ends[other][key]) for key in ends[name])
    assert all(float((ends["torchrun"][k] - ends["python"][k]).abs().max()) < 1e-12 for k in ends["python"])


def test_errors_come_once_without_traceback_of_ours(small: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    alone = launch("python", "train", "train.lrr=1", f"run.dir={run}")
    assert alone.returncode == 78
    assert alone.stderr.startswith("distrain: error: the configuration cannot be used:")
    assert "Traceback" not in alone.stderr
    together = launch("torchrun", "train", f"data.dir={small.root}", f"run.dir={run}", "train.global_batch_size=1")
    assert together.returncode != 0
    assert together.stderr.count("distrain: error:") == 1
    assert "smaller than the number of processes" in together.stderr
    assert not run.exists()


def test_accelerate_that_starts_fewer_than_asked_is_an_error(small: Dataset, tmp_path: Path) -> None:
    command = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2", "-m", "distrain"]
    run = tmp_path / "run"
    done = subprocess.run(
        [*command, "train", f"data.dir={small.root}", f"run.dir={run}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "asked for 2 processes and started one" in done.stderr
    assert not run.exists()
