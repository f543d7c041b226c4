"""The same run under every launcher, by its command."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_imports import write_hostile_modules

from distrain.data.manifest import Dataset

pytestmark = pytest.mark.ranks
BIN = Path(sys.executable).parent
FILES = Path(__file__).parent.parent / "launch"
LAUNCHERS = {
    "python": (1, [sys.executable, "-m", "distrain", "train"]),
    "distrain launch": (2, [str(BIN / "distrain"), "launch", "--nproc", "2", "--", "train"]),
    "torchrun": (2, [str(FILES / "torchrun.sh")]),
    "accelerate": (
        2,
        [str(BIN / "accelerate"), "launch", "--config_file", str(FILES / "accelerate-2cpu.yaml"), "-m", "distrain",
         "train"],
    ),
}  # fmt: skip


def environ(**more: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    return {**inherited, "PATH": f"{BIN}:{inherited['PATH']}", "PROCESSES": "2", "OMP_NUM_THREADS": "1", **more}


def launch(name: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCHERS[name][1], *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=240, env=environ(), check=False,
    )  # fmt: skip


def keys(dataset: Dataset, run: Path) -> list[str]:
    return [f"data.dir={dataset.root}", f"run.dir={run}", "train.max_steps=30", "train.precision=fp64",
            "log.report=false"]  # fmt: skip


@pytest.fixture(scope="module")
def run_under(small: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`run_under(launcher)`: a run on this machine, trained once for all tests, in a folder of misleading modules."""
    folder = tmp_path_factory.mktemp("hostile")
    write_hostile_modules(folder)

    @functools.cache
    def train(name: str) -> Path:
        run = tmp_path_factory.mktemp("launched") / name
        done = launch(name, *keys(small, run), cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("Finished Training") == 1
        return run

    return train


def test_every_launcher_trains_the_same(run_under: Callable[[str], Path]) -> None:
    ends = {}
    for name, (size, _) in LAUNCHERS.items():
        run = run_under(name)
        assert json.loads((run / "result.json").read_text())["world_size"] == size
        typed = "distrain launch --nproc 2 -- train" if name == "distrain launch" else "distrain train"
        assert json.loads((run / "attempts/000001.json").read_text())["command"].startswith(f"{typed} data.dir=")
        ends[name] = load_file(run / "checkpoints/step-00000030/model.safetensors")
    for name, other in (("accelerate", "torchrun"), ("distrain launch", "torchrun")):
        assert all(torch.equal(ends[name][key], ends[other][key]) for key in ends[name])
    assert all(float((ends["torchrun"][k] - ends["python"][k]).abs().max()) < 1e-12 for k in ends["python"])


def test_errors_are_printed_once_without_our_traceback(small: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    alone = launch("python", "train.lrr=1", f"run.dir={run}")
    assert alone.returncode == 78
    assert alone.stderr.startswith("distrain: error: the configuration cannot be used:")
    assert "Traceback" not in alone.stderr
    together = launch("torchrun", f"data.dir={small.root}", f"run.dir={run}", "train.global_batch_size=1")
    assert together.returncode != 0
    assert together.stderr.count("distrain: error:") == 1
    assert "smaller than the number of processes" in together.stderr
    wrong_command = subprocess.run(
        [BIN / "distrain", "launch", "--", "python", "train.py"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert wrong_command.returncode == 78
    assert wrong_command.stderr == (
        "distrain: error: launch: python: give train, evaluate or doctor after --, with its arguments\n"
    )
    assert not run.exists()


def test_fewer_processes_than_accelerate_was_asked_for_are_an_error(small: Dataset, tmp_path: Path) -> None:
    command = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2", "-m", "distrain"]
    run = tmp_path / "run"
    done = subprocess.run(
        [*command, "train", f"data.dir={small.root}", f"run.dir={run}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "asked for 2 processes and started one" in done.stderr
    assert not run.exists()


def test_torchrun_on_two_nodes(
    nodes: tuple[list[str], str], small: Dataset, run_under: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, str(FILES / "torchrun.sh"), *keys(small, run)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environ(NODES="2", NODE=str(number), HOST="10.99.7.10", PROCESSES="1"),
        )
        for number, name in enumerate(nodes[0])
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert json.loads((run / "result.json").read_text())["world_size"] == 2
    one_node = run_under("torchrun")
    ends = [load_file(folder / "checkpoints/step-00000030/model.safetensors") for folder in (run, one_node)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_pods_of_a_pytorchjob_train_one_run_over_ipv6(small: Dataset, tmp_path: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as free:
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": port, "PET_NNODES": "2",
           "PET_NPROC_PER_NODE": "1"}  # fmt: skip
    run = tmp_path / "run"
    command = [*LAUNCHERS["distrain launch"][1][:2], "--", "train", *keys(small, run)]
    pods = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environ(**job, RANK=str(pod), PET_NODE_RANK=str(pod)),
        )
        for pod in range(2)
    ]  # fmt: skip
    try:
        outputs = [pod.communicate(timeout=120)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, 0], "\n".join(outputs)
    assert f"node 1 of 2 (a Kubeflow job), 1 process here, rendezvous at [::1]:{port}" in outputs[1]
    assert json.loads((run / "result.json").read_text())["world_size"] == 2


@pytest.mark.parametrize("name", ["torchrun", pytest.param("accelerate", marks=pytest.mark.faults)])
def test_doctor_under_other_launchers(name: str, small: Dataset, tmp_path: Path) -> None:
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "distrain", "train"]
    command = torchrun if name == "torchrun" else LAUNCHERS[name][1]
    done = subprocess.run(
        [*command[:-1], "doctor", f"data.dir={small.root}", f"run.dir={tmp_path / 'run'}"],
        capture_output=True, text=True, timeout=120, env=environ(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "processes   2 on 1 node" in done.stdout
