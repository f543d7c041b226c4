"""launch/slurm.sbatch without changes, on a real SLURM: two nodes with one or two CPU processes each."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, until
from harness import clean_environ, exit_file, newest_step, small_run, trained

pytestmark = pytest.mark.slurm
REPO = Path(__file__).parent.parent.parent
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Submitted:
    """A job: `sbatch launch/slurm.sbatch` with nothing changed but the command line and the EDIT variables."""

    def __init__(
        self, cluster: Cluster, folder: Path, *configs: Path, options: tuple[str, ...] = (), **environ: str
    ) -> None:
        self._cluster, self.runs = cluster, folder / "runs"
        settings = {"VENV": sys.prefix, "RUNS": str(self.runs), "CPU_PROCESSES": "2", "CACHE": str(folder / "cache")}
        done = subprocess.run(
            ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=2", *options,
             str(REPO / "launch/slurm.sbatch"), *map(str, configs)],
            cwd=folder, capture_output=True, text=True, check=False, timeout=30,
            env={**clean_environ(), "SLURM_CONF": cluster.environ["SLURM_CONF"], **settings, **environ},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self._folder, self.id = folder, done.stdout.strip()

    def wait(self, seconds: float = 150) -> str:
        """Wait for its end; SLURM's state and exit code, as `COMPLETED 0`."""
        until(lambda: self._field("JobState") in ENDED, f"job {self.id} ends; {self.output}", seconds)
        return f"{self._field('JobState')} {self._field('ExitCode').partition(':')[0]}"

    def wait_for(self, run: Path, step: int, attempt: int, seconds: float = 90) -> None:
        """Wait until this attempt has saved a checkpoint of this or a later step."""
        until(
            lambda: newest_step(run) >= step and self.restarts == attempt,
            f"attempt {attempt} of job {self.id} saves step {step}; {self.output}",
            seconds,
        )

    @property
    def restarts(self) -> int:
        """The number of times that SLURM has requeued it."""
        return int(self._field("Restarts") or 0)

    @property
    def output(self) -> str:
        """The output of its script, of all attempts."""
        return "".join(path.read_text() for path in self._folder.glob(f"distrain-{self.id}.log"))

    def logs(self) -> dict[str, str]:
        """The logs of its nodes and ranks, by path."""
        return {str(path.relative_to(self.runs / "logs")): path.read_text() for path in self.runs.glob("logs/*/*/*")}

    def _field(self, name: str) -> str:
        match = re.search(rf"\b{name}=(\S*)", self._cluster.query("scontrol", "show", "job", "-o", self.id))
        return match[1] if match else ""


def write_config(data: Path, folder: Path, name: str = "small", **sections: dict[str, Any]) -> Path:
    """Write a configuration file; its run is runs/NAME."""
    tree = small_run(data, folder / "runs" / name, **sections)
    del tree["run"]["dir"]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


SLOW = {"FAULT": "unhurried:0:1"}  # 40 ms a step: the run is still training when the test acts on it
ONE_EACH = {"CPU_PROCESSES": "1"}  # processes of a node, where more would only take longer to start
# Without standby processes, whose imports would slow down other jobs; one test has restarts as the script sets them.
NO_RESTARTS = {"RESTARTS": "0"}
# SLURM looks every 30 s, and signals up to 30 s early: an attempt has 30 to 60 s, too short for all of these steps. The
# only checkpoints are those of a stop: an attempt that another test's crash ends is repeated, so one reaches the limit.
LIMIT = ("--time=2", "--signal=B:USR2@60")
LONG: dict[str, dict[str, Any]] = {
    "train": {"max_steps": 1600}, "eval": {"every_steps": 400}, "checkpoint": {"every_steps": 1600},
    "launch": {"max_attempts_without_progress": 10},
}  # fmt: skip
FATAL: dict[str, tuple[str, dict[str, dict[str, Any]], int, int]] = {  # FAULT, keys, exit code, restarts
    "configuration": ("none:0:0", {"train": {"lrr": 1}}, 78, 0),
    "crash": ("crash:1:30", {}, 1, 0),
    "no progress": ("kill:1:10", {"launch": {"max_attempts_without_progress": 2}}, 1, 1),
}


@pytest.fixture(scope="module")
def submitted(cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Submitted]:
    """Jobs that do not disturb each other, submitted together, because they wait for SLURM most of the time."""
    jobs = {}
    for name, (fault, sections, _, _) in FATAL.items():
        folder = tmp_path_factory.mktemp("fatal")
        environ = {**ONE_EACH, **NO_RESTARTS}  # a requeue, or none, at the first crash
        jobs[name] = Submitted(cluster, folder, write_config(data, folder, **sections), FAULT=fault, **environ)
    folder = tmp_path_factory.mktemp("array")
    files = [write_config(data, folder, name, run={"seed": seed}) for seed, name in enumerate(("first", "second"))]
    array = ("--array=0-1", "--nodes=1")
    jobs["array"] = Submitted(cluster, folder, *files, options=array, **ONE_EACH, **NO_RESTARTS)
    folder = tmp_path_factory.mktemp("trials")
    (folder / "lr.txt").write_text("train.lr=0.1\ntrain.lr=0.2  # the second run\n")
    jobs["trials"] = Submitted(
        cluster, folder, write_config(data, folder), options=array, TRIALS="lr.txt", **ONE_EACH, **NO_RESTARTS
    )
    folder = tmp_path_factory.mktemp("limit")
    # Another test crashes a node. SLURM then kills the launcher, which has no exit.json yet in an attempt that has to
    # create the run's folder; without it, launch/slurm.sbatch does not requeue. So the folder exists.
    (folder / "runs/small").mkdir(parents=True)
    others = ":".join(job.id for job in jobs.values())  # their starts would take much of an attempt's time
    options = (*LIMIT, f"--dependency=afterany:{others}")
    jobs["limit"] = Submitted(
        cluster, folder, write_config(data, folder, **LONG), options=options, **SLOW, **NO_RESTARTS
    )
    return jobs


@pytest.mark.parametrize("name", FATAL)
def test_a_fatal_exit_code_is_not_requeued(name: str, submitted: dict[str, Submitted]) -> None:
    job, (_, _, code, restarts) = submitted[name], FATAL[name]
    assert job.wait() == f"FAILED {code}", job.output
    assert job.restarts == restarts
    if name == "configuration":
        assert any("train.lrr: unknown key" in text for text in job.logs().values())


def test_an_array_of_configurations(submitted: dict[str, Submitted]) -> None:
    job = submitted["array"]
    array = job.id
    for task, name in enumerate(("first", "second")):
        job.id = f"{array}_{task}"
        assert job.wait() == "COMPLETED 0"
        assert yaml.safe_load((job.runs / name / "config.yaml").read_text())["run"]["seed"] == task
        assert exit_file(job.runs / name)["code"] == 0


def test_an_array_of_the_runs_of_a_sweep(submitted: dict[str, Submitted]) -> None:
    job = submitted["trials"]
    array = job.id
    for task, lr in enumerate((0.1, 0.2)):
        job.id = f"{array}_{task}"
        assert job.wait() == "COMPLETED 0"
        assert yaml.safe_load((job.runs / f"lr/{task}/config.yaml").read_text())["train"]["lr"] == lr
        assert (job.runs / f"logs/lr-{task}-{job.id}/attempt-0/node-0.log").is_file()


def test_signals_requeues_and_a_crashed_node(
    cluster: Cluster, data: Path, tmp_path: Path, undisturbed: Callable[..., Any]
) -> None:
    length = {"train": {"max_steps": 500}, "eval": {"every_steps": 100}, "checkpoint": {"every_steps": 20}}
    job = Submitted(cluster, tmp_path, write_config(data, tmp_path, **length), **SLOW, **ONE_EACH)
    run = job.runs / "small"
    job.wait_for(run, 40, attempt=0)
    cluster.query("scancel", "--signal=USR1", job.id)
    until(lambda: job.restarts == 1, "it is requeued after a signal", 60)
    job.wait_for(run, newest_step(run) + 40, attempt=1)
    cluster.query("scontrol", "requeue", job.id)
    until(lambda: job.restarts == 2, "it starts again after a requeue", 60)
    job.wait_for(run, newest_step(run) + 40, attempt=2)
    cluster.crash(1)
    cluster.boot(1)
    assert job.wait(240) == "COMPLETED 0"
    assert job.restarts == 3
    trained(run).same_as(undisturbed(2, **length))


@pytest.mark.faults
def test_a_job_continues_without_a_crashed_node(
    cluster: Cluster, data: Path, tmp_path: Path, undisturbed: Callable[..., Any]
) -> None:
    length: dict[str, dict[str, Any]] = {
        "train": {"max_steps": 500, "virtual_ranks": 2}, "eval": {"every_steps": 100},
        "checkpoint": {"every_steps": 20}, "launch": {"rejoin_seconds": 5},
    }  # fmt: skip
    config = write_config(data, tmp_path, **length)
    job = Submitted(cluster, tmp_path, config, options=("--no-kill",), DISTRAIN_MIN_NODES="1", **SLOW, **ONE_EACH)
    run = job.runs / "small"
    job.wait_for(run, 40, attempt=0)
    cluster.crash(1)
    try:
        assert job.wait(240) == "COMPLETED 0", job.output
    finally:
        cluster.boot(1)
    assert job.restarts == 0
    assert any("continuing with 1 node of 2" in text for text in job.logs().values())
    trained(run).same_as(undisturbed(2, **length))


def test_cancelled_jobs_save_and_are_not_requeued(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    job = Submitted(
        cluster, tmp_path, write_config(data, tmp_path, train={"max_steps": 2000}), **SLOW, **ONE_EACH, **NO_RESTARTS
    )
    run = job.runs / "small"
    job.wait_for(run, 20, attempt=0)
    cluster.query("scancel", job.id)
    assert job.wait(60).startswith("CANCELLED")
    until(lambda: exit_file(run)["code"] == 75, "the launcher has exited", 30)
    assert "is saved" in exit_file(run)["reason"]
    assert job.restarts == 0


def test_preparing(cluster: Cluster, tmp_path: Path) -> None:
    job = subprocess.run(
        ["sbatch", "--wait", "--parsable", str(REPO / "launch/prepare.sbatch"), "synthetic", "--samples", "300",
         "--test-samples", "50", "--out", str(tmp_path / "data")],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
        env={**clean_environ(), "SLURM_CONF": cluster.environ["SLURM_CONF"], "VENV": sys.prefix},
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    assert (tmp_path / "data/manifest.json").exists()


def test_the_time_limit(submitted: dict[str, Submitted], undisturbed: Callable[..., Any]) -> None:
    """The last test: its job runs beside those of the others, and is requeued after their crash of a node too."""
    job = submitted["limit"]
    assert job.wait(400) == "COMPLETED 0"
    assert job.restarts >= 1, job.output
    assert "the time limit is near" in job.output
    assert "requeueing" in job.output
    run = job.runs / "small"
    assert exit_file(run)["code"] == 0
    assert 2 <= exit_file(run)["launch"] <= job.restarts + 1
    trained(run).same_as(undisturbed(4, **LONG))
    names = set(job.logs())
    for rank in ("node-0", "rank-00001", "rank-00002", "rank-00003"):
        assert f"small-{job.id}/attempt-{job.restarts}/{rank}.log" in names
