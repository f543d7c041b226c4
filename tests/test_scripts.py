"""Checks of the scripts in launch/ that need no cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    assert "set -euo pipefail" in script.read_text()
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("arguments", "array", "message"),
    [
        ([], {}, "task 0 has no configuration: name one file for each task"),
        (["a.yaml", "train.lr=1"], {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, "task 1 has no"),
        (
            ["a.yaml", "b.yaml", "run.dir=runs/x"],
            {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"},
            "run.dir=runs/x would be the run of all 2 tasks: give RUNS=runs/x instead",
        ),
        (["a.yaml", "b.yaml"], {"TRIALS": "lr.txt"}, "TRIALS=lr.txt: give one configuration, which all runs share"),
    ],
)
def test_an_array_that_cannot_work_is_refused(
    arguments: list[str], array: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), *arguments],
        cwd=tmp_path, env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", **array},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert done.stderr.startswith(f"launch/slurm.sbatch: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("attempt", "killed", "record", "requeued"),
    [
        ("0", True, None, True),
        ("3", True, None, False),
        ("0", False, None, False),
        ("0", True, r'"launch": 1,\n"code": 78,\n', False),
    ],
)
def test_a_launcher_that_is_killed_before_it_could_record_anything_is_requeued(
    attempt: str, killed: bool, record: str | None, requeued: bool, tmp_path: Path
) -> None:
    ends = "kill -KILL $$" if killed else "exit 1"
    writes = f"mkdir -p runs/a && printf '{record}' >runs/a/exit.json; " if record else ""
    for name, script in (("srun", f"{writes}{ends}"), ("scontrol", 'echo "$@" >requeued')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "a.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1",
             "SLURM_RESTART_COUNT": attempt},
    )  # fmt: skip
    assert (tmp_path / "requeued").exists() == requeued, done.stdout
    assert done.returncode == (75 if requeued else 78 if record else 137 if killed else 1)


def test_a_number_of_nodes_that_is_none_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PROCESSES": "1", "NODES": "two", "HOST": "a"}
    done = subprocess.run(
        ["bash", str(LAUNCH / "torchrun.sh")], env=environ, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.startswith("--nnodes two ")  # torchrun refuses it; --standalone would run on this node alone
    assert done.stderr == ""


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sbatch")), ids=lambda path: path.name)
def test_directives_precede_the_first_command(script: Path) -> None:
    # SLURM stops reading at the first command and silently ignores later directives.
    lines = script.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith(("#SBATCH", "##SBATCH")) for line in lines[first:])
