"""Shards that vanish, shrink or change while a run reads them: they are named, and no trained step is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Job, exit_file, newest_step, small_run, trained

from distrain.data import manifest

pytestmark = pytest.mark.faults


def vanish(shard: Path) -> None:
    shard.unlink()


def shrink(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 512)


def change(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "split"),
    [
        (vanish, "train"), (shrink, "train"), (change, "train"), (vanish, "test"),
        (shrink, "test"), (change, "test"),
    ],
)  # fmt: skip
def test_a_shard_is_harmed(
    harm: Callable[[Path], None], split: str, data: Path, tmp_path: Path, copied: Any, undisturbed: Any
) -> None:
    expected = undisturbed()
    dataset = copied(data)
    shards = manifest.read(dataset).split(split).shards
    victim = dataset / shards[1].name  # a shard of lane 1: rank 1 reads it
    whole = victim.read_bytes()
    with Job(small_run(dataset, tmp_path / "run"), tmp_path, environ={"FAULT": "slow:0:1"}) as job:
        job.wait_for("train", 1)
        harm(victim)
        assert job.wait() == 78, job.output
    assert str(victim) in exit_file(job.run)["reason"]
    assert "Traceback" not in job.output
    saved = newest_step(job.run)
    state = json.loads((job.run / f"checkpoints/step-{saved:08d}/state.json").read_text())
    assert state["why"] == "data"  # saved at the step where it ended
    victim.write_bytes(whole)
    with Job(small_run(dataset, tmp_path / "run"), tmp_path) as job:
        assert job.wait() == 0, job.output
        assert f"resuming from step-{saved:08d}" in job.output
    trained(job.run).same_as(expected)
