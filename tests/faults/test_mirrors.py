"""Runs with a mirror in S3 (moto's server): killed during uploads, without their folder, with a second job."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Job, TrainedRun, small_run, trained, until
from object_stores import FaultyStore, faulty_store

from distrain.data.fetch import FetchOptions
from distrain.runs import checkpoint, checkpoint_archive
from distrain.runs.object_store import open_store

pytestmark = pytest.mark.faults
WHERE = "s3://bucket/run"
KILLS = 6
LENGTH = {"train": {"max_steps": 300}}
SLOW = {"FAULT": "unhurried:0:1"}  # so that checkpoints are not saved faster than they are sent


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    with faulty_store() as one:
        for name, value in one.environ.items():
            monkeypatch.setenv(name, value)
        yield one


def mirrored(data: Path, run: Path, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    patient = {"fetch_timeout_seconds": 100}  # a request that the store does not answer is not repeated meanwhile
    return small_run(data, run, run={"dir": str(run), "seed": 7, "mirror": WHERE}, data=patient, **sections)


def whole_checkpoints(folder: Path) -> list[str]:
    """The names of the checkpoints in the mirror; each of them is whole."""
    mirror = open_store(WHERE, FetchOptions(None, 0, 0, 20), threading.Event())
    names = mirror.names("checkpoints")
    for name in names:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        mirror.consume(f"checkpoints/{name}", lambda file: checkpoint_archive.extract(file, folder, lambda: None))
        assert checkpoint.problem(folder) is None, name
    return names


def same_weights_and_metrics(run: TrainedRun, expected: TrainedRun) -> None:
    """Compare all but the audit, which is lost with the folder."""
    TrainedRun(run.weights, expected.ids, run.metrics).same_as(expected)


def test_kills_in_uploads_without_the_folder(data: Path, tmp_path: Path, store: FaultyStore, undisturbed: Any) -> None:
    expected: TrainedRun = undisturbed(2, **LENGTH)
    uploads = 0

    def fault(method: str, path: str, number: int) -> str | None:
        nonlocal uploads
        if method == "PUT" and "/checkpoints/" in path:
            uploads += 1
            # Its client is killed while it sends the object (hold-body), or before it gets the answer.
            return (None, None, "hold-body" if kill % 2 else "hold")[uploads % 3]
        return (None, "503", None, "cut", None, None)[number % 6]

    store.fault = fault
    for kill in range(KILLS):
        store.is_waiting.clear()
        store.released.clear()
        with Job(mirrored(data, tmp_path / f"run-{kill}", **LENGTH), tmp_path, environ=SLOW) as job:
            until(lambda: store.is_waiting.is_set() or job.launcher.poll() is not None, "an upload")
            assert job.launcher.poll() is None, job.output
            job.signal("everything", number=signal.SIGKILL)
            job.all_gone(20)
        store.released.set()
        store.fault, before = lambda *_: None, store.fault
        assert whole_checkpoints(tmp_path / "checked")
        store.fault = before
        shutil.rmtree(tmp_path / f"run-{kill}")
    store.fault = lambda method, path, number: (None, "503", None, "cut", None, None)[number % 6]
    with Job(mirrored(data, tmp_path / "last", **LENGTH), tmp_path) as job:
        assert job.wait() == 0, job.output
        assert "has no checkpoint as new; resuming from step" in job.output
    same_weights_and_metrics(trained(tmp_path / "last"), expected)


@pytest.mark.short
def test_a_second_job_ends_the_first(data: Path, tmp_path: Path, store: FaultyStore, undisturbed: Any) -> None:
    expected: TrainedRun = undisturbed()
    store.fault = lambda method, path, _: "hold" if method == "PUT" and "/step-" in path else None
    with Job(mirrored(data, tmp_path / "first"), tmp_path) as first:
        until(store.is_waiting.is_set, "an upload")
        with Job(mirrored(data, tmp_path / "second"), tmp_path) as second:
            until(lambda: "attempts/000002.json" in str(store.requests), "the second job takes over")
            store.released.set()
            assert second.wait() == 0, second.output
        assert first.wait() == 75, first.output
        assert f"{WHERE}: taken over by another job (attempt 2, host " in first.output
    assert "Traceback" not in first.output
    same_weights_and_metrics(trained(tmp_path / "second"), expected)
    whole_checkpoints(tmp_path / "checked")


def test_an_answer_may_take_as_long_as_the_time_out_says(store: FaultyStore) -> None:
    """The client's own limit is 15 s."""
    store.fault = lambda *_: "hold"
    timer = threading.Timer(17, store.released.set)
    timer.start()
    mirror = open_store(WHERE, FetchOptions(None, 0, 0, 60), threading.Event())
    mirror.put("slow", lambda: [b"content"], 7, lambda: None)
    timer.join()
    assert mirror.read("slow") == b"content"
