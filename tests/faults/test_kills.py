"""SIGKILL at any time, to any process of a job: the next attempt ends like an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import make
from group import fork_server
from harness import Job, TrainedRun, exit_file, newest_step, small_run, trained, until
from test_saves import KILLED, train_until, tree

import distrain
from distrain.tools.hash_runs import check_equal, hash_runs

pytestmark = pytest.mark.faults
TARGETS = ("rank1", "workers", "launcher", "everything", "rank0")
EVENTS = ("train", "save", "write", "evaluate", "first step")
KILLS = 100


@pytest.mark.parametrize("target", ["rank0", pytest.param("rank1", marks=pytest.mark.short)])
def test_a_killed_worker(target: str, data: Path, tmp_path: Path, undisturbed: Any, finish: Any) -> None:
    expected: TrainedRun = undisturbed()
    with Job(small_run(data, tmp_path / "run"), tmp_path) as job:
        job.wait_for("train", 23)
        job.signal(target, number=signal.SIGKILL)
        assert job.wait(30) == 75, job.output
        assert f"{target.replace('rank', 'rank ')} was ended by SIGKILL" in exit_file(job.run)["reason"]
        assert "Traceback" not in job.output  # nor of the others, which only lost a peer
    finish(job.run).same_as(expected)


@pytest.mark.short
def test_a_killed_launcher_takes_its_workers_with_it(data: Path, tmp_path: Path, undisturbed: Any, finish: Any) -> None:
    expected: TrainedRun = undisturbed()
    slow = {"FAULT": "slow:0:30"}  # workers that continued would need longer than 5 seconds
    with Job(small_run(data, tmp_path / "run"), tmp_path, environ=slow) as job:
        job.wait_for("train", 23)
        job.signal("launcher", number=signal.SIGKILL)
        job.all_gone(5)
    finish(job.run).same_as(expected)


@pytest.mark.timeout(1800)
def test_a_kill_before_every_use_of_the_disk_by_the_thread_that_saves(data: Path, tmp_path: Path) -> None:
    """Kill the run before each audit event of the thread: folders, files, renames and removals, of all its saves."""
    distrain.train(tree(data, tmp_path / "whole", **KILLED))
    expected, kills = trained(tmp_path / "whole"), 0
    while True:
        run = tree(data, tmp_path / "run", **KILLED)
        process = fork_server().Process(target=train_until, args=(run, "", kills + 1))
        process.start()
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        distrain.train(run)
        trained(tmp_path / "run").same_as(expected)
        assert not list((tmp_path / "run/checkpoints").glob(".partial-*"))
        shutil.rmtree(tmp_path / "run")
    assert kills > 60
    print(f"\n{kills} kills")


@pytest.mark.timeout(3600)
def test_a_hundred_kills_of_one_run(tmp_path: Path) -> None:
    """Kill one run a hundred times. Its state is in DISTRAIN_FAULTS/kills: an interrupted test resumes there."""
    folder = Path(os.environ.get("DISTRAIN_FAULTS", tmp_path)) / "kills"
    history = folder / "history.json"
    if not history.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make(folder / "data", 403, 100, image_size=8, shards=12, lanes=6)
        history.write_text("[]")
    kills: list[list[str]] = json.loads(history.read_text())
    changes: dict[str, Any] = {
        "launch": {"max_attempts_without_progress": 1000},  # a first step may be hit several times in a row
        "train": {"max_steps": 900}, "checkpoint": {"every_steps": 3, "keep": 2}, "eval": {"every_steps": 4},
    }  # fmt: skip
    draw = random.Random(len(kills))
    while len(kills) < KILLS:
        target = TARGETS[len(kills) % len(TARGETS)]
        event = draw.choice(EVENTS)
        kills.append([target, *kill_once(folder, changes, target, event, draw)])
        history.write_text(json.dumps(kills))
    for run in ("killed", "whole"):
        with Job(small_run(folder / "data", folder / run, **changes), folder) as job:
            assert job.wait(600) == 0, job.output
    phases, targets = (dict(Counter(kill[part] for kill in kills).most_common()) for part in (1, 0))
    summary = f"Phases that were hit: {phases}. Targets: {targets}."
    summary += " The result has the same bits as that of an undisturbed run."
    trained(folder / "killed").same_as(trained(folder / "whole"))
    ids = trained(folder / "killed").ids
    for epoch in range(900 // 24):  # every sample of an epoch at most once; 403 - 24 · 16 are dropped
        epoch_ids = [i for step in range(epoch * 24, (epoch + 1) * 24) for i in ids[step]]
        assert len(epoch_ids) == len(set(epoch_ids)) == 24 * 16
    print(f"\n{summary}")
    if "DISTRAIN_FAULTS" in os.environ:
        Path(__file__).with_name("kills.txt").write_text(summary + "\n")
    shutil.rmtree(folder)


@pytest.mark.timeout(1800)
def test_thirty_kills_of_one_run_on_other_numbers_of_processes(tmp_path: Path) -> None:
    """Virtual ranks give the same bits, though each attempt has another number of processes."""
    make(tmp_path / "data", 403, 100, image_size=8, shards=12, lanes=6)
    changes: dict[str, Any] = {
        "model": {"name": "models_for_tests:Mixed"},
        "launch": {"max_attempts_without_progress": 1000},
        "train": {"max_steps": 400, "virtual_ranks": 6, "global_batch_size": 24, "ema_decay": 0.9},
        "checkpoint": {"every_steps": 3, "keep": 2}, "eval": {"every_steps": 4},
    }  # fmt: skip
    draw, sizes, phases = random.Random(0), Counter[int](), Counter[str]()
    for _ in range(30):
        size = draw.randint(1, 5)
        target = draw.choice(("rank0", f"rank{size - 1}", "workers", "launcher", "everything"))
        phase, _ = kill_once(tmp_path, changes, target, draw.choice(EVENTS), draw, size)
        sizes[size] += 1
        phases[phase] += 1
    for run, size in (("killed", draw.randint(1, 5)), ("whole", 2)):
        with Job(small_run(tmp_path / "data", tmp_path / run, **changes), tmp_path, size) as job:
            assert job.wait(600) == 0, job.output
    check_equal(hash_runs([tmp_path / "whole", tmp_path / "killed"]))
    trained(tmp_path / "killed").same_as(trained(tmp_path / "whole"))
    assert set(sizes) == {1, 2, 3, 4, 5}
    print(f"\nProcesses: {dict(sorted(sizes.items()))}. Phases that were hit: {dict(phases.most_common())}.")


def kill_once(
    folder: Path, changes: dict[str, Any], target: str, event: str, draw: random.Random, processes: int = 2
) -> tuple[str, str]:
    """Start an attempt, wait for a new step, and kill at an event; return phase and step of rank 0 at that moment."""
    run = folder / "killed"
    before = newest_step(run)
    with Job(small_run(folder / "data", run, **changes), folder, processes) as job:
        if event == "first step":  # of this attempt; the new step belongs to an earlier one
            job.wait_for("first step", before)
        else:
            job.wait_for("train", before + draw.randint(1, 8))
            if event == "write":  # by the thread, while the main thread is in another phase
                until(lambda: job.status().is_saving, "a checkpoint is written")
            elif event != "train":
                job.wait_for(event)
        hit = job.status()
        job.signal(target, number=signal.SIGKILL)
        if target == "launcher":
            job.all_gone(5)
        elif target == "everything":
            job.all_gone(10)
        else:
            assert job.wait(60) == 75, job.output
    return "write" if hit.is_saving else hit.phase, str(hit.step)
