"""The image as the Dockerfile makes it: it runs restricted, and signals reach the job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine import RESTRICTED, Engine
from harness import newest_step, until

pytestmark = pytest.mark.images
ANYBODY = ["--user", "12345:54321", "--network", "none", "--tmpfs", "/tmp:rw,mode=1777"]
SMALL = ["data.dir=/work/data", "run.dir=/runs/first", "train.epochs=1", "checkpoint.every_steps=20"]


def options(folder: Path) -> list[str]:
    """Any user, nothing of the image to be written, no network; data and runs on volumes."""
    for name in ("data", "runs"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name).chmod(0o777)
    volumes = ["-v", f"{folder}/data:/work/data", "-v", f"{folder}/runs:/runs"]
    return [*ANYBODY, *RESTRICTED, *volumes]


def test_what_is_in_it(engine: Engine, image: str) -> None:
    code, told = engine.run(image)
    assert code == 0
    assert "Exit codes: 0 done" in told
    tools = "PATH=$PATH:/usr/bin:/bin; command -v gcc cc make git"
    look = f"{tools}; id -u; python -c 'import distrain; print(distrain.__file__)'"
    code, told = engine.run(image, "-c", look, options=["--entrypoint", "sh", *ANYBODY, *RESTRICTED])
    assert code == 0, told
    assert told.split() == ["12345", "/opt/app/distrain/__init__.py"]  # no compiler, no git


def test_the_job_runs_restricted_and_a_stop_is_a_save(engine: Engine, image: str, folder: Path) -> None:
    given = options(folder)
    prepared = ["prepare", "synthetic", "--samples", "4000", "--test-samples", "200", "--out", "/work/data"]
    code, told = engine.run(image, *prepared, options=given)
    assert code == 0, told
    train = ["launch", "--nproc", "2", "--", "train", "--config", "configs/synthetic.yaml", *SMALL]
    run = folder / "runs/first"
    job = engine.start(image, *train, "train.epochs=20", options=given)
    until(lambda: newest_step(run) >= 20, "a checkpoint", 120)
    engine.signal(job, "TERM")
    assert engine.wait(job, 60) == 75, engine.logs(job)
    assert "is saved" in engine.logs(job)
    stopped = newest_step(run)
    assert json.loads((run / "exit.json").read_text())["step"] == stopped
    code, told = engine.run(image, *train, "train.epochs=20", f"train.max_steps={stopped + 40}", options=given)
    assert code == 78, told  # epochs and max_steps do not go together: a mistake is told without a traceback
    assert "Traceback" not in told
    code, told = engine.run(image, *train, "train.epochs=20", options=given)
    assert code == 0, told
    assert f"resuming from step-{stopped:08d}" in told


def test_preparing_ends_on_a_signal(engine: Engine, image: str, folder: Path) -> None:
    big = ["prepare", "synthetic", "--samples", "2000000", "--out", "/work/data"]
    job = engine.start(image, *big, options=options(folder))
    until(lambda: any((folder / "data").iterdir()), "it has begun", 60)
    engine.signal(job, "TERM")
    assert engine.wait(job, 20) == 143  # as process 1 it would never see a signal that it has no handler for
