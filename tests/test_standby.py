"""Standby processes: real ones, which import a small module instead of torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distrain.environment import STORE_SOCKET
from distrain.launcher.standby import Standby

PROGRAM = f"""
import os, socket, sys
from distrain import signals
from distrain.launcher import standby
signals.install()
open(f"{{os.environ['FOLDER']}}/{{os.getpid()}}", "x").close()
standby._IMPORTED = "json"
standby.wait_for_work()
assert signals.requested() is None
with socket.socket(fileno=int(os.environ["{STORE_SOCKET}"])) as store:
    print(os.environ["COMMON"], os.environ["RANK"], store.getsockname()[1])
"""
SECONDS = 30


@pytest.fixture
def standby(tmp_path: Path) -> Iterator[Standby]:
    command = [sys.executable, "-c", PROGRAM]
    processes = Standby(command, {**os.environ, "COMMON": "common", "FOLDER": str(tmp_path)}, 2)
    processes.start()
    deadline = time.monotonic() + SECONDS
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield processes
    processes.close()


def become_worker(standby: Standby, output: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Return the worker, and the port of its store."""
    with socket.create_server(("127.0.0.1", 0)) as store, output.open("wb") as file:
        worker = standby.become_worker({"RANK": "3"}, store, file)
        assert worker is not None
        return worker, store.getsockname()[1]


def test_a_standby_process_becomes_a_worker(standby: Standby, tmp_path: Path) -> None:
    worker, port = become_worker(standby, tmp_path / "output")
    assert worker.wait(SECONDS) == 0
    assert (tmp_path / "output").read_text() == f"common 3 {port}\n"


def test_a_stop_request_to_a_standby_process_does_not_stop_the_worker(standby: Standby, tmp_path: Path) -> None:
    for process in standby._waiting:
        process.popen.send_signal(signal.SIGTERM)
    worker, _ = become_worker(standby, tmp_path / "output")
    assert worker.wait(SECONDS) == 0


def test_a_standby_process_that_has_ended_is_replaced(standby: Standby, tmp_path: Path) -> None:
    lost, other = (process.popen for process in standby._waiting)
    lost.kill()
    lost.wait(SECONDS)
    worker, _ = become_worker(standby, tmp_path / "output")
    assert worker is other
    assert worker.wait(SECONDS) == 0
    assert standby.become_worker({}, None, None) is None  # a new process is started instead
    standby.start()
    assert len(standby._waiting) == 2


def test_standby_processes_end_with_their_launcher(standby: Standby) -> None:
    for process in standby._waiting:
        process._socket.close()  # as the kernel does when the launcher is killed
        assert process.popen.wait(SECONDS) == 0
