"""The image from the Dockerfile: it runs with restrictions, and signals reach the job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine import RESTRICTED, Engine
from harness import newest_step, until

pytestmark = pytest.mark.images
ANY_USER = ["--user", "12345:54321", "--network", "none", "--tmpfs", "/tmp:rw,mode=1777"]
SMALL = ["data.dir=/work/data", "run.dir=/runs/first", "train.epochs=1", "checkpoint.every_steps=20"]


def options(folder: Path) -> list[str]:
    """Options of podman: any user id, a read-only image, no network; volumes for data and runs."""
    for name in ("data", "runs"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name).chmod(0o777)
    volumes = ["-v", f"{folder}/data:/work/data", "-v", f"{folder}/runs:/runs"]
    return [*ANY_USER, *RESTRICTED, *volumes]


def test_the_image_has_the_program_and_little_else(engine: Engine, image: str) -> None:
    code, output = engine.run(image)
    assert code == 0
    assert "Exit codes: 0 done" in output
    tools = "PATH=$PATH:/usr/bin:/bin; command -v make git"
    script = f"{tools}; id -u; python -c 'import distrain; print(distrain.__file__)'"
    code, output = engine.run(image, "-c", script, options=["--entrypoint", "sh", *ANY_USER, *RESTRICTED])
    assert code == 0, output
    assert output.split() == ["12345", "/opt/app/distrain/__init__.py"]  # no make, no git
    code, output = engine.run(
        image, "-c", "import s3fs, gcsfs, huggingface_hub", options=["--entrypoint", "python", *ANY_USER, *RESTRICTED]
    )
    assert code == 0, output


def test_a_restricted_job_trains_and_saves_when_it_is_stopped(engine: Engine, image: str, folder: Path) -> None:
    podman_options = options(folder)
    prepared = ["prepare", "synthetic", "--samples", "4000", "--test-samples", "200", "--out", "/work/data"]
    code, output = engine.run(image, *prepared, options=podman_options)
    assert code == 0, output
    train = ["launch", "--nproc", "2", "--", "train", "--config", "configs/synthetic.yaml", *SMALL]
    run = folder / "runs/first"
    job = engine.start(image, *train, "train.epochs=20", options=podman_options)
    until(lambda: newest_step(run) >= 20, "a checkpoint", 120)
    engine.signal(job, "TERM")
    assert engine.wait(job, 60) == 75, engine.logs(job)
    assert "is saved" in engine.logs(job)
    stopped = newest_step(run)
    assert json.loads((run / "exit.json").read_text())["step"] == stopped
    code, output = engine.run(
        image, *train, "train.epochs=20", f"train.max_steps={stopped + 40}", options=podman_options
    )
    assert code == 78, output  # train.epochs and train.max_steps exclude each other
    assert "Traceback" not in output
    code, output = engine.run(image, *train, "train.epochs=20", options=podman_options)
    assert code == 0, output
    assert f"resuming from step-{stopped:08d}" in output


@pytest.mark.faults  # a minute: left to `make faults`
def test_a_compiled_job_trains(engine: Engine, image: str, folder: Path) -> None:
    podman_options = ["/tmp:rw,exec,mode=1777" if each.startswith("/tmp:") else each for each in options(folder)]
    prepared = ["prepare", "synthetic", "--samples", "640", "--test-samples", "64", "--out", "/work/data"]
    code, output = engine.run(image, *prepared, options=podman_options)
    assert code == 0, output
    keys = ["data.dir=/work/data", "run.dir=/runs/first", "train.max_steps=5", "train.compile=default"]
    code, output = engine.run(image, "doctor", *keys, options=podman_options)
    assert code == 0, output
    assert "ok    compiler    /usr/bin/g++" in output
    assert ", compiled (default)" in output
    code, output = engine.run(image, "train", *keys, options=podman_options)
    assert code == 0, output


def test_a_signal_ends_preparing(engine: Engine, image: str, folder: Path) -> None:
    big = ["prepare", "synthetic", "--samples", "2000000", "--out", "/work/data"]
    job = engine.start(image, *big, options=options(folder))
    until(lambda: any((folder / "data").iterdir()), "it writes", 60)
    engine.signal(job, "TERM")
    assert engine.wait(job, 20) == 143  # process 1 gets only signals for which it has a handler
