"""The lease on a run's folder: one owner, however many jobs want it at the same time."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distrain.errors import BusyError, Stopped
from distrain.runs import attempts
from distrain.runs import lease as leasing


def test_attempts_are_counted_and_a_released_lease_is_free(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        lease = leasing.acquire(tmp_path, 0)
        assert lease.attempt == attempt
        assert str(os.getpid()) in (leasing.owner(tmp_path) or "")
        lease.note(from_step=10 * attempt)
        lease.release()
        assert leasing.owner(tmp_path) is None
    assert [entry["from_step"] for entry in attempts.history(tmp_path)] == [10, 20, 30]


def test_a_running_owner_is_named(tmp_path: Path) -> None:
    leasing.acquire(tmp_path, 0)
    messages: list[str] = []
    with pytest.raises(BusyError, match=f"attempt 1, host .*, process {os.getpid()}"):
        leasing.acquire(tmp_path, 0.5, messages.append)
    assert len(messages) == 1


def test_a_stop_request_ends_the_wait(tmp_path: Path) -> None:
    leasing.acquire(tmp_path, 0)
    with pytest.raises(Stopped):
        leasing.acquire(tmp_path, 1000, stop_requested=lambda: "SIGTERM")


def test_an_owner_whose_process_is_gone_does_not_count(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from distrain.runs import lease as leasing;"
    code += " leasing.acquire(Path(sys.argv[1]), 0)"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)
    assert leasing.acquire(tmp_path, 0).attempt == 2


def test_an_owner_whose_process_number_is_reused_does_not_count(tmp_path: Path) -> None:
    leasing.acquire(tmp_path, 0)
    path = tmp_path / "attempts/000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "process_start": "1"}))
    assert leasing.acquire(tmp_path, 0).attempt == 2


def test_an_owner_elsewhere_counts_until_it_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leasing.acquire(tmp_path, 0)
    path = tmp_path / "attempts/000001.json"
    elsewhere = {**json.loads(path.read_text()), "machine": "another", "process": 1}
    path.write_text(json.dumps(elsewhere))
    with pytest.raises(BusyError):
        leasing.acquire(tmp_path, 0.3)
    monkeypatch.setattr(leasing, "STALE_SECONDS", 0.5)
    renewals = iter(range(1000))
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.1):
            attempts.replace(path, {**elsewhere, "beat": next(renewals)})

    renewing = threading.Thread(target=renew)
    renewing.start()
    with pytest.raises(BusyError):
        leasing.acquire(tmp_path, 1.5)
    stop.set()
    renewing.join()
    assert leasing.acquire(tmp_path, 10).attempt == 2


def test_an_owner_that_lost_the_lease_is_notified_and_may_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leasing, "RENEW_SECONDS", 0.05)
    lease = leasing.acquire(tmp_path, 0)
    lost = threading.Event()
    lease.renew_in_background(lambda error: lost.set())
    lease.check()
    (tmp_path / "attempts/000002.json").write_text("{}")
    assert lost.wait(30)
    with pytest.raises(BusyError, match="taken over"):
        lease.check()
    lease.release()


def _take(run: str, ready: object, owners: object) -> None:
    ready.wait()  # type: ignore[attr-defined]
    try:
        leasing.acquire(Path(run), 0)
        owners.put(os.getpid())  # type: ignore[attr-defined]
        ready.wait()  # type: ignore[attr-defined]
    except BusyError:
        owners.put(None)  # type: ignore[attr-defined]
        ready.wait()  # type: ignore[attr-defined]


def test_one_of_many_jobs_that_take_over_at_once_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for round_ in range(2):  # a new folder, and one whose owner has gone
        ready, owners = context.Barrier(6), context.Queue()
        takers = [context.Process(target=_take, args=(str(tmp_path), ready, owners)) for _ in range(6)]
        for taker in takers:
            taker.start()
        winners = [winner for winner in (owners.get(timeout=60) for _ in takers) if winner is not None]
        assert len(winners) == 1
        for taker in takers:
            taker.join(60)
        assert attempts.newest_attempt(tmp_path) == round_ + 1
        assert not list((tmp_path / "attempts").glob(".*"))
