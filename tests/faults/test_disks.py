"""Damaged checkpoints, and disks that are full or cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Job, exit_file, newest_step, small_run, trained, until

from distrain.runs.logs import JsonLines

pytestmark = pytest.mark.faults


def exit_output(job: Job) -> str:
    """Return what the launcher printed at the end."""
    return job.output[job.output.rindex("failed first") :]


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 1000)


def flip(checkpoint: Path) -> None:
    with (checkpoint / "optimizer.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 4]))


def halve(checkpoint: Path) -> None:
    """Damage it like a file system that lost the newest writes."""
    (checkpoint / "digests.json").unlink()
    (checkpoint / "optimizer.safetensors").write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, halve])
def test_a_damaged_checkpoint(damage: Callable[[Path], None], data: Path, tmp_path: Path, undisturbed: Any) -> None:
    expected = undisturbed()
    with Job(small_run(data, tmp_path / "run"), tmp_path, environ={"FAULT": "unhurried:0:1"}) as job:
        job.wait_for("train", 33)
        job.signal("launcher")
        assert job.wait() == 75, job.output
    newest = newest_step(job.run)
    damage(job.run / f"checkpoints/step-{newest:08d}")
    with Job(small_run(data, tmp_path / "run"), tmp_path) as job:
        assert job.wait() == 0, job.output
    assert f"skipped {job.run}/checkpoints/step-{newest:08d}" in job.output
    assert "resuming from step-00000030" in job.output
    trained(job.run).same_as(expected)


def test_nothing_but_damaged_checkpoints(data: Path, tmp_path: Path) -> None:
    with Job(small_run(data, tmp_path / "run"), tmp_path, environ={"FAULT": "unhurried:0:1"}) as job:
        job.wait_for("train", 23)
        job.signal("launcher")
        assert job.wait() == 75, job.output
    for checkpoint in (job.run / "checkpoints").iterdir():
        truncate(checkpoint)
    with Job(small_run(data, tmp_path / "run"), tmp_path) as job:
        assert job.wait() == 78, job.output
    assert "no readable checkpoint" in exit_file(job.run)["reason"]


def test_leftovers_of_an_interrupted_save_are_removed(data: Path, tmp_path: Path, finish: Any) -> None:
    leftover = tmp_path / "run/checkpoints/.partial-step-00000013"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    finish(tmp_path / "run")
    assert not leftover.exists()


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A small disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Take all the space that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))
    return filler


@pytest.mark.short
def test_no_space_for_a_while(data: Path, tmp_path: Path, tmpfs: Path, undisturbed: Any) -> None:
    slow = {"environ": {"FAULT": "slow:0:24"}}  # so that there is time to fill the disk, and to clear it
    expected = undisturbed()
    with Job(small_run(data, tmpfs / "run"), tmp_path, **slow) as job:  # type: ignore[arg-type]
        until(lambda: newest_step(job.run) == 20, "step 20")
        filler = fill(tmpfs)
        until(lambda: "no checkpoint could be saved" in job.output, "a failed save")
        assert newest_step(job.run) == 20  # no good checkpoint was deleted for it
        filler.unlink()
        assert job.wait() == 0, job.output
    assert "No space left on device; training continues" in job.output
    trained(job.run).same_as(expected)


def test_lines_without_space_are_written_later(tmpfs: Path) -> None:
    lines = JsonLines(tmpfs / "metrics.jsonl")
    lines.write({"step": 0})
    lines.sync()
    filler = fill(tmpfs)
    for step in (1, 2, 3):
        lines.write({"step": step, "long": "x" * 5000})  # more than is left of a memory page
        with pytest.raises(OSError, match="No space"):
            lines.flush()
    assert (tmpfs / "metrics.jsonl").read_text() == '{"step":0}\n'  # and not half a line
    filler.unlink()
    lines.sync()
    lines.close()
    steps = [json.loads(line)["step"] for line in (tmpfs / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]


def test_no_space_to_the_end(data: Path, tmp_path: Path, tmpfs: Path, undisturbed: Any) -> None:
    expected = undisturbed()
    slow = {"FAULT": "slow:0:24"}
    with Job(small_run(data, tmpfs / "run"), tmp_path, environ=slow) as job:
        until(lambda: newest_step(job.run) == 20, "step 20")
        filler = fill(tmpfs)
        assert job.wait() == 1, job.output
    assert "the end of the run could not be saved" in exit_output(job)
    assert "Traceback" not in job.output
    filler.unlink()
    with Job(small_run(data, tmpfs / "run"), tmp_path) as job:
        assert job.wait() == 0, job.output
    trained(job.run).same_as(expected)


def test_a_checkpoint_folder_that_cannot_be_written(data: Path, tmp_path: Path, tmpfs: Path, undisturbed: Any) -> None:
    expected = undisturbed()
    run = tmpfs / "run"
    with Job(small_run(data, run), tmp_path, environ={"FAULT": "slow:0:24"}) as job:
        until(lambda: newest_step(job.run) == 20, "step 20")
        (run / "checkpoints").rename(run / "elsewhere")
        (run / "checkpoints").write_text("not a folder, which has the effect of a missing permission")
        assert job.wait() == 1, job.output
        assert "no checkpoint could be saved" in job.output
    (run / "checkpoints").unlink()
    shutil.move(run / "elsewhere", run / "checkpoints")
    with Job(small_run(data, run), tmp_path) as job:
        assert job.wait() == 0, job.output
    trained(run).same_as(expected)


@pytest.mark.parametrize("where", ["> /dev/full", "> >(exec true)"], ids=["full", "gone"])
def test_a_log_that_cannot_be_written(where: str, data: Path, tmp_path: Path, undisturbed: Any) -> None:
    prefix = ["bash", "-c", f'exec "$@" {where} 2>&1', "bash"]
    with Job(small_run(data, tmp_path / "run"), tmp_path, prefix=prefix) as job:
        assert job.wait() == 0
    assert job.output == ""
    assert exit_file(job.run)["code"] == 0
    trained(job.run).same_as(undisturbed())
