"""The device of a process, and the number of processes on a node: device files, variables and what torch sees."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import clean_environ

from distrain import machine
from distrain.distributed import devices, runtime
from distrain.distributed.compilation import Compilation
from distrain.distributed.watchdog import Watchdog
from distrain.environment import Environment
from distrain.errors import ConfigError
from distrain.launcher import launch

CUDA = "CUDA_VISIBLE_DEVICES"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees no GPU, whether or not there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_gpus(folder: Path, number: int) -> Path:
    """Return a folder with the device files of NVIDIA's driver for so many GPUs."""
    for name in ("nvidiactl", "nvidia-uvm", "nvidia-modeset", *(f"nvidia{index}" for index in range(number))):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("visible", ["", " ", "-1", "-1,0", "NoDevFiles", "none", ",0"])
@pytest.mark.usefixtures("no_gpu")
def test_an_empty_list_of_gpus_is_a_request_for_the_cpu(visible: str, tmp_path: Path) -> None:
    assert devices.on_cpu("auto", {CUDA: visible}, "run.device=", with_gpus(tmp_path, 2))


@pytest.mark.parametrize("variables", [{}, {CUDA: "0"}, {CUDA: "9"}, {CUDA: "GPU-5b7c"}, {CUDA: "MIG-5b7c"}])
@pytest.mark.usefixtures("no_gpu")
def test_gpus_that_torch_cannot_use_are_an_error(variables: dict[str, str], tmp_path: Path) -> None:
    folder = with_gpus(tmp_path, 2)
    with pytest.raises(ConfigError) as caught:
        devices.on_cpu("auto", variables, "run.device=", folder)
    message = str(caught.value)
    assert message.startswith(f"this machine has GPUs ({folder}/nvidia0, {folder}/nvidia1), but torch sees none")
    assert message.endswith("or use the CPU: run.device=cpu")
    for name, value in variables.items():
        assert f"with {name}={value}" in message
    assert devices.on_cpu("cpu", variables, "run.device=", folder)


@pytest.mark.usefixtures("no_gpu")
def test_without_gpus_auto_is_the_cpu_and_cuda_an_error(tmp_path: Path) -> None:
    assert devices.on_cpu("auto", {}, "--device ", with_gpus(tmp_path, 0))
    with pytest.raises(ConfigError, match="^--device cuda: this process sees no GPU; use --device cpu, or: "):
        devices.on_cpu("cuda", {}, "--device ", tmp_path)


def test_the_cure_names_what_torch_was_built_for() -> None:
    assert devices.cure(None) == "this torch is a build for CPUs: install one for GPUs"
    assert "new enough for CUDA 13.2" in devices.cure("13.2")


@pytest.mark.parametrize(
    ("local_rank", "count", "index"),
    [(0, 1, 0), (3, 8, 3), (7, 8, 7), (1, 1, 0), (5, 1, 0), (2, 2, None), (5, 4, None)],
)
def test_the_gpu_of_a_process(local_rank: int, count: int, index: int | None) -> None:
    """A process that sees one GPU uses it, whatever its rank: a launcher may show each process another one."""
    if index is None:
        with pytest.raises(ConfigError, match=f"^local rank {local_rank} has no GPU: this process sees {count}; "):
            devices.index(local_rank, count)
    else:
        assert devices.index(local_rank, count) == index
        assert index == local_rank % count  # accelerate's rule, which it applies afterwards


@pytest.mark.parametrize(
    ("variables", "listed"),
    [
        ({}, None),
        ({CUDA: ""}, 0),
        ({CUDA: "0,2, 3"}, 3),
        ({CUDA: "1,-1,0"}, 1),
        ({CUDA: "GPU-5b7c,GPU-9e11"}, 2),
        ({CUDA: "MIG-5b7c,MIG-9e11"}, 1),  # CUDA uses one slice in a process
        ({"HIP_VISIBLE_DEVICES": "0,1"}, 2),
        ({"ROCR_VISIBLE_DEVICES": "0,1,2,3", "HIP_VISIBLE_DEVICES": "0,1"}, 2),
        ({"ROCR_VISIBLE_DEVICES": "GPU-77af"}, 1),
    ],
)
def test_the_gpus_that_variables_list(variables: dict[str, str], listed: int | None) -> None:
    assert machine.listed_gpus(variables) == listed


def test_device_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.gpus({}, tmp_path) == 0
    (tmp_path / "dri").mkdir()
    for index in range(4):
        (tmp_path / f"dri/renderD{128 + index}").touch()
    assert machine.gpus({}, tmp_path) == 0  # those of a display; ROCm has /dev/kfd too
    (tmp_path / "kfd").touch()
    assert machine.gpus({}, tmp_path) == 0  # the graphics of a processor, which a torch for NVIDIA's GPUs does not use
    monkeypatch.setattr(machine.metadata, "version", lambda _: "2.15.0+rocm7.2")
    assert machine.gpus({}, tmp_path) == 4
    assert machine.gpus({"HIP_VISIBLE_DEVICES": "0,1"}, tmp_path) == 2
    with_gpus(tmp_path, 3)
    assert machine.gpus({}, tmp_path) == 3
    assert machine.gpus({CUDA: "0,1,2,3"}, tmp_path) == 3
    assert machine.gpus({CUDA: "MIG-5b7c,MIG-9e11"}, tmp_path) == 1


def test_accelerate_does_not_name_ddp_the_gpu_of_the_local_rank(tmp_path: Path) -> None:
    """A process that sees its own GPU alone has none of this number."""
    seen: list[str | None] = []

    def prepare(*objects: object) -> tuple[object, ...]:
        seen.append(os.environ.get("ACCELERATE_BYPASS_DEVICE_MAP"))
        return objects

    environment, model = Environment(), torch.nn.Linear(2, 2)
    watchdog = Watchdog({}, tmp_path, environment)
    with runtime.start(runtime.Options("cpu", "fp32", 1, False, 10), environment, watchdog) as rt:
        rt._accelerator.prepare = prepare
        rt.prepare_data_parallel(model, torch.optim.SGD(model.parameters()), Compilation("off", (2,)), 2)
    watchdog.close()
    assert seen == ["true"]
    assert "ACCELERATE_BYPASS_DEVICE_MAP" not in os.environ


def test_run_device_cpu_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda _: 8)
    assert launch.default_processes("cpu") == 1
    assert launch.default_processes("auto") == max(1, torch.cuda.device_count())


def test_a_command_does_not_silently_use_the_cpu(tmp_path: Path) -> None:
    """A real command, with a /dev of its own in which there is a GPU that torch cannot use."""
    if os.geteuid() or shutil.which("unshare") is None or torch.cuda.is_available():
        pytest.skip("needs root, util-linux and no GPU")
    script = (
        "mkdir $0/dev; for name in null zero random urandom; do touch $0/dev/$name;"
        " mount --bind /dev/$name $0/dev/$name; done; mkdir $0/dev/shm; touch $0/dev/nvidia0;"
        ' mount --rbind $0/dev /dev; exec "$@"'
    )
    command = [sys.executable, "-m", "distrain", "train", "data.dir=/nowhere", f"run.dir={tmp_path}/run"]
    visible = {name: value for name, value in clean_environ().items() if name != CUDA}
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-ec", script, str(tmp_path), *command],
        env=visible, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 78, done.stderr
    assert "distrain: error: this machine has GPUs (/dev/nvidia0), but torch sees none; " in done.stderr
    assert "Traceback" not in done.stderr
