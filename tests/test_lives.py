"""The lease on a run's folder: one owner, whoever asks at the same time."""

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
from distrain.runs import lives


def test_lives_are_counted_and_a_released_lease_is_free(tmp_path: Path) -> None:
    for life in (1, 2, 3):
        lease = lives.acquire(tmp_path, 0)
        assert lease.life == life
        assert str(os.getpid()) in (lives.owner(tmp_path) or "")
        lease.note(from_step=10 * life)
        lease.release()
        assert lives.owner(tmp_path) is None
    assert [entry["from_step"] for entry in lives.history(tmp_path)] == [10, 20, 30]


def test_an_owner_that_lives_is_named(tmp_path: Path) -> None:
    lives.acquire(tmp_path, 0)
    told: list[str] = []
    with pytest.raises(BusyError, match=f"life 1, host .*, process {os.getpid()}"):
        lives.acquire(tmp_path, 0.5, told.append)
    assert len(told) == 1


def test_a_stop_request_ends_the_wait(tmp_path: Path) -> None:
    lives.acquire(tmp_path, 0)
    with pytest.raises(Stopped):
        lives.acquire(tmp_path, 1000, asked_to_stop=lambda: "SIGTERM")


def test_an_owner_whose_process_is_gone_does_not_count(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from distrain.runs import lives; lives.acquire(Path(sys.argv[1]), 0)"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)
    assert lives.acquire(tmp_path, 0).life == 2


def test_a_process_number_that_is_used_again_does_not_count(tmp_path: Path) -> None:
    lives.acquire(tmp_path, 0)
    path = tmp_path / "lives/000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "process_start": "1"}))
    assert lives.acquire(tmp_path, 0).life == 2


def test_an_owner_elsewhere_counts_until_it_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.acquire(tmp_path, 0)
    path = tmp_path / "lives/000001.json"
    elsewhere = {**json.loads(path.read_text()), "machine": "another", "process": 1}
    path.write_text(json.dumps(elsewhere))
    with pytest.raises(BusyError):
        lives.acquire(tmp_path, 0.3)
    monkeypatch.setattr(lives, "STALE_SECONDS", 0.5)
    renewals = iter(range(1000))
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.1):
            lives._replace(path, {**elsewhere, "beat": next(renewals)})

    renewing = threading.Thread(target=renew)
    renewing.start()
    with pytest.raises(BusyError):
        lives.acquire(tmp_path, 1.5)
    stop.set()
    renewing.join()
    assert lives.acquire(tmp_path, 10).life == 2


def test_who_lost_the_lease_is_told_and_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lives, "RENEW_SECONDS", 0.05)
    lease = lives.acquire(tmp_path, 0)
    lost = threading.Event()
    lease.keep(lambda error: lost.set())
    lease.check()
    (tmp_path / "lives/000002.json").write_text("{}")
    assert lost.wait(30)
    with pytest.raises(BusyError, match="taken over"):
        lease.check()
    lease.release()


def _take(run: str, ready: object, found: object) -> None:
    ready.wait()  # type: ignore[attr-defined]
    try:
        lives.acquire(Path(run), 0)
        found.put(os.getpid())  # type: ignore[attr-defined]
        ready.wait()  # type: ignore[attr-defined]
    except BusyError:
        found.put(None)  # type: ignore[attr-defined]
        ready.wait()  # type: ignore[attr-defined]


def test_of_many_that_take_over_at_once_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for round_ in range(2):  # a new folder, and one whose owner has gone
        ready, found = context.Barrier(6), context.Queue()
        takers = [context.Process(target=_take, args=(str(tmp_path), ready, found)) for _ in range(6)]
        for taker in takers:
            taker.start()
        winners = [winner for winner in (found.get(timeout=60) for _ in takers) if winner is not None]
        assert len(winners) == 1
        for taker in takers:
            taker.join(60)
        assert lives.newest_life(tmp_path) == round_ + 1
        assert not list((tmp_path / "lives").glob(".*"))
